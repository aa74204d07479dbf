"""An LSTM with attention, one output head per voice (section 5.6 of the paper), and a memory.

The voices of a frame are chosen one after the other, outer ones first (soprano, bass, alto,
tenor), each knowing those chosen before it. With y_t the V symbols of frame t and o_t what a
two-layer LSTM says after reading y_1 .. y_{t-1}:

    a_t = softmax(q(o_t) . k(o_j) / sqrt(d)),  j < t    weights of N attention heads (N, t - 1)
    g_t = [o_t, sum_j a_tj v(o_{j+1})]                  (2H); o_{j+1} knows what followed o_j
    u_v = ReLU(W_v [g_t, voices chosen before v])       (H)
    p(y_t | y_<t) = prod_v softmax(l_v)[y_tv]           loss: -log p(y_t | y_<t), nats per frame

The logits l_v (89) add up scores of several kinds, all linear in u_v: see voice_logits. A voice
gets no probability for notes that would cross or double a chosen voice, nor for sounding where the
one before it in the chain rests: no frame reads so (data.to_voices). So the likelihood is exact:
all frames together have probability one.

    python attn_lstm.py                                                         # default run
    python attn_lstm.py --heads parallel --relations off --average 0 --weight-decay 0.06 \\
        --lr 1e-3 --batch 32 --dropout-input 0 --dropout 0.2 --dropout-heads 0.5 --steps 3334
    # the paper's enhanced one, 100 epochs; its baseline: also --optimizer adam --attention off
    # --window 16 --hidden 16 --batch 16 --weight-decay 0.001 --steps 16094

Differences from the paper (--relations off leaves out the second to fifth, --without one of them):
- The heads are chained; --heads parallel is the paper's. Independent voices choose no chord.
- Relations: a frame is read as motions, intervals and frames held too, and notes are scored by
  their distance from other notes as well as by name. What is learnt in one key holds in all. The
  heads see the last frame themselves: which chord follows which must not get lost in dropout.
- Tonality: which notes have sounded so far gives the key, and notes are scored by their degree.
- Memory: the longest earlier passage that equals what was just played votes for what came next
  there, and attention's weights vote for the notes and motions of the frames they see.
- Parallels: a score for moving in parallel with each chosen voice. A parallel fifth is the product
  of two intervals and a motion, which the network cannot see.
- Dropout has one mask for all frames of a window. AdamW's decay is decoupled: as an L2 in Adam
  (--optimizer adam) 0.06 lets nothing be learnt. The weights tested and kept are an average.
- The paper's loss sums over a multi-hot target, which is no likelihood.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # intervals are told apart up to two octaves
HELD = 16  # frames a note is held are counted up to this, and the frame's number modulo this
NEAR, REACH = 8, 256  # memory looks for passages so many frames back
LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24)  # passages are told apart by these bounds of their length
PHRASE = 8  # a passage of so many frames that has stood twice before is known as a repetition
KEPT = (1.0, 0.95)  # pitch classes are counted in all, and lately: the share left after a frame
SCALE = (1.0, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, 1)  # a key's degrees, at first those of major
SEEN = ("notes", "moves")  # what is known of the frames that attention sees


def locked_dropout(x, p, training):
    """Dropout with one mask for all frames of a sequence (Gal and Ghahramani 2016): (B, T, D)."""
    return x * F.dropout(torch.ones_like(x[:, :1]), p, training)


def interval(a, b):
    """Interval from symbols b up to symbols a as a class: 88 is the same key, 0: one rests."""
    return torch.where((a > 0) & (b > 0), a - b + data.KEYS, 0)


def relative(scores, symbol):
    """Scores (..., 2 * SPAN + 1) of intervals from symbol (...), none if a rest -> (..., 89)."""
    symbols = torch.arange(data.SYMBOLS, device=symbol.device)
    steps = (symbols - symbol[..., None]).clamp(-SPAN, SPAN) + SPAN
    return scores.gather(-1, steps) * ((symbols > 0) & (symbol[..., None] > 0))


def degrees(voices, turn):
    """The degrees of the key that voices (B, T, V) are, given turn (B, T, 12, 12), how likely each
    pitch class is each degree: (B, T, V, 12), none where a voice rests."""
    likely = turn.gather(2, (voices % 12)[..., None].expand(-1, -1, -1, 12))
    return likely * (voices > 0)[..., None]


def tonality(past, T, scale):
    """Which key a piece is in: past (B, S, V), of which the last T frames are new, and the scale's
    degrees (2, 12) -> how often each pitch class has sounded, in all and lately, as logarithms less
    their mean (B, T, 2, 12), and how likely each class is each degree (B, T, 12, 12)."""
    time, classes = (torch.arange(n, device=past.device) for n in (past.shape[1], 12))
    sound = ((past % 12)[..., None] == classes) & (past > 0)[..., None]  # (B, S, V, 12)
    lag = time[-T:, None] - time  # (T, S)
    left = torch.stack([rate ** lag.clamp(min=0) for rate in KEPT]) * (lag >= 0) * (lag < REACH)
    tally = left.to(scale.dtype) @ sound.sum(2)[:, None].to(scale.dtype)  # (B, 2, T, 12)
    often = (tally + 1).log() - (tally.mean(-1, keepdim=True) + 1).log()
    degree = (classes - classes[:, None]) % 12  # in each key, of each class
    key = torch.einsum("brtc,rkc->btk", often, scale[:, degree]).softmax(-1)
    turn = key @ F.one_hot(degree, 12).to(key.dtype).flatten(1)
    return often.transpose(1, 2), turn.unflatten(-1, (12, 12))


def recall(past, T):
    """The longest earlier passage, NEAR to REACH frames back, that equals what has just been
    played, the latest of several: past (B, S, V), of which the last T frames are new -> the frame
    that followed it (B, T, V), and the kind of match (B, T), -1 where there is none."""
    V, longest = past.shape[2], LENGTHS[-1]
    R = min(REACH, past.shape[1])
    distance = torch.arange(R, 0, -1, device=past.device)
    code = (past * data.SYMBOLS ** torch.arange(V, device=past.device)).sum(-1)  # one per frame
    code = F.pad(code, (R + longest, 0), value=-1)[:, -(R + longest + T - 1):]
    before = code.unfold(1, R + 1, 1)  # (B, longest + T - 1, R + 1): the R frames before, and each
    same = (before[..., :-1] == before[..., -1:]) & (distance >= NEAR)
    time = torch.arange(1, same.shape[1] + 1, device=past.device)[:, None]
    runs = (time - torch.where(same, 0, time).cummax(1).values)[:, -T:].clamp(max=longest)
    which = (runs * REACH - distance).argmax(-1)  # the longest, then the latest
    length = runs.gather(-1, which[..., None])[..., 0]  # (B, T), in frames
    after = past.shape[1] - T - R + 1 + which + torch.arange(T, device=past.device)
    follows = past.gather(1, after.clamp(min=0)[..., None].expand(-1, -1, V))
    again = (runs >= PHRASE).sum(-1) > 1
    kind = sum(length >= bound for bound in LENGTHS) + (len(LENGTHS) + 1) * again
    return follows, torch.where(length > 0, kind, -1)


class AttnLSTM(nn.Module):
    """Two-layer LSTM, attention over its outputs, a memory of passages, a head per voice.

    voices: V; window: frames that attention sees, and training length; hidden: H, also of the
    heads; heads: "chained" or "parallel"; attention, relations: "on" or "off"; without: of
    "memory", "parallels", "tonality", those to leave out; attention_heads: N; dropout_input,
    dropout, dropout_heads: of what the LSTM reads, of what each layer says, in the heads.
    """

    def __init__(self, voices=4, window=96, hidden=256, heads="chained", attention="on",
                 relations="on", without=(), attention_heads=4, dropout_input=0.2, dropout=0.5,
                 dropout_heads=0.2):
        super().__init__()
        V, H, N = voices, hidden, attention_heads
        if H % N:
            raise data.InputError(f"--attention-heads {N} does not divide --hidden {H}")
        self.voices, self.window, self.attention_heads = V, window, N
        self.chained, self.attention = heads == "chained", attention == "on"
        self.relations = relations == "on"
        self.memory, self.parallels, self.tonality = (
            self.relations and part not in without for part in ("memory", "parallels", "tonality"))
        self.order = [0, V - 1, *range(1, V - 1)][:V]  # outer voices first: they decide the others
        self.dropouts = dropout_input, dropout, dropout_heads
        inputs, degree = data.KEYS, 12 * self.tonality
        if self.relations:
            # What is read of a frame besides its keys: a row for each symbol, motion, interval to
            # the neighbour, frames held, and place of the next frame in the bar.
            sizes = torch.tensor([data.SYMBOLS, 2 * data.KEYS, 2 * data.KEYS, HELD + 1, HELD])
            first = (sizes.cumsum(0) - sizes).repeat_interleave(torch.tensor([V, V, V - 1, V, 1]))
            self.register_buffer("first_row", first, persistent=False)
            self.facts = nn.Embedding(int(sizes.sum()), 16)
            inputs += 16 * 4 * V + degree * (V + 1)
        if self.tonality:
            self.scale = nn.Parameter(torch.tensor(SCALE).repeat(2, 1) / 2)
        self.start = nn.Parameter(torch.zeros(inputs))  # read before the first frame
        self.lstm1 = nn.LSTM(inputs, H, batch_first=True)  # two: nn.LSTM has no locked dropout
        self.lstm2 = nn.LSTM(H, H, batch_first=True)
        if not self.relations:
            nn.init.normal_(self.lstm1.weight_ih_l0)  # four of 88 are on; PyTorch expects all
        if self.attention:
            self.query, self.key, self.value = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)
        # What the heads read: context, last frame, and each chosen voice's pitch, motion, interval.
        self.pitch, self.interval = nn.Embedding(data.SYMBOLS, 32), nn.Embedding(2 * data.KEYS, 32)
        chosen = range(V) if self.chained else [0] * V
        context = H + self.attention * H + self.relations * 32 * (V - 1) + degree
        each = 3 * 32 + degree
        self.hidden = nn.ModuleList(nn.Linear(context + each * n, H) for n in chosen)
        votes = N * (self.memory and self.attention)
        self.sizes = [{"absolute": data.SYMBOLS, "from_last": self.relations * (2 * SPAN + 1),
                       "from_chosen": self.relations * n * (2 * SPAN + 1), "degree": degree,
                       "often": 2 * self.tonality, "copy": self.memory * 2 * (len(LENGTHS) + 1),
                       "same_note": votes, "same_move": votes, "parallel": self.parallels * n * 12}
                      for n in chosen]
        self.scores = nn.ModuleList(nn.Linear(H, sum(sizes.values())) for sizes in self.sizes)

    def read(self, voices, state=None):
        """Read frames: voices (B, T, V) -> what the heads know when they choose the frame after
        each, and the state to go on with. Without a state the start is read before them, which
        counts as a frame of rests."""
        if state is None:
            voices = F.pad(voices, (0, 0, 1, 0))
            keys = self.start.new_zeros(len(voices), 0, self.lstm2.hidden_size)
            state = {"time": 0, "past": voices[:, :0], "lstm1": None, "lstm2": None,
                     "keys": keys, "values": keys}
        (B, T, _), time = voices.shape, state["time"]
        past = torch.cat([state["past"], voices], 1)  # (B, S, V)
        moves = interval(past, F.pad(past, (0, 0, 1, -1)))
        known = {"last": voices}
        x = [data.from_voices(voices).to(self.start.dtype)]  # (B, T, 88)
        if self.relations:
            row = torch.arange(past.shape[1], device=past.device)[:, None]
            same = F.pad(past[:, 1:] == past[:, :-1], (0, 0, 1, 0))
            held = (row - torch.where(same, 0, row).cummax(1).values)[:, -T:].clamp(max=HELD)
            beat = (time + torch.arange(T, device=past.device)[:, None]) % HELD
            neighbours = interval(voices[..., :-1], voices[..., 1:])
            facts = [voices, moves[:, -T:], neighbours, held, beat.expand(B, -1, -1)]
            x.append(self.facts(torch.cat(facts, -1) + self.first_row).flatten(2))
        if self.tonality:
            known["often"], known["turn"] = tonality(past, T, self.scale)
            x += [known["turn"][:, :, 0], degrees(voices, known["turn"]).flatten(2)]
        if self.memory:
            known["next"], known["match"] = recall(past, T)
        x = torch.cat(x, -1)
        if time == 0:
            x = torch.cat([self.start.expand(B, 1, -1), x[:, 1:]], 1)
        drop_input, drop, _ = self.dropouts
        x = locked_dropout(x, drop_input, self.training)
        h, lstm1 = self.lstm1(x, state["lstm1"])  # (B, T, H)
        h = locked_dropout(h, drop, self.training)
        h, lstm2 = self.lstm2(h, state["lstm2"])
        known["context"], keys, values = h, state["keys"], state["values"]
        if self.attention:
            keys = torch.cat([keys, self.key(h)], 1)  # of the frames that are still kept
            values = torch.cat([values, self.value(h)], 1)
            found, known["weights"] = self.attend(self.query(h), keys[:, :-1], values[:, 1:])
            known["context"] = torch.cat([h, found], -1)
            first = past.shape[1] - keys.shape[1] + 1
            known["notes"], known["moves"] = past[:, first:], moves[:, first:]
        known["context"] = locked_dropout(known["context"], drop, self.training)
        kept = max(REACH + LENGTHS[-1], self.window + 1)
        return known, {"time": time + T, "past": past[:, -kept:], "lstm1": lstm1, "lstm2": lstm2,
                       "keys": keys[:, -1 - self.window:], "values": values[:, -1 - self.window:]}

    def attend(self, query, key, value):
        """query (B, T, H) of the newest T outputs, key and value (B, S, H) of the frames before the
        newest output -> context (B, T, H), weights (B, T, N, S). One more key of zeros lets
        attention look at nothing."""
        (B, T, H), S, N = query.shape, key.shape[1], self.attention_heads
        query, key, value = (x.unflatten(-1, (N, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) / (H / N) ** 0.5  # (B, N, T, S)
        now = torch.arange(S + 1 - T, S + 1, device=key.device)[:, None]
        then = torch.arange(S, device=key.device)
        scores = scores.masked_fill((then >= now) | (then < now - self.window), -torch.inf)
        weights = F.pad(scores, (1, 0)).softmax(-1)[..., 1:]
        return (weights @ value).transpose(1, 2).flatten(2), weights.transpose(1, 2)

    def voice_logits(self, i, known, voices, legal=False):
        """Logits (B, T, 89) of the i-th voice in the chain; chained heads read those before it in
        voices (B, T, V). legal: leave out what crosses them, which chained heads always do."""
        v, last, chosen = self.order[i], known["last"], self.order[:i] if self.chained else []
        own, x = last[..., v], [known["context"]]
        if self.relations:
            x += [self.interval(interval(last[..., u], own)) for u in range(self.voices) if u != v]
        for u in chosen:
            x += [self.pitch(voices[..., u]),
                  self.interval(interval(voices[..., u], last[..., u])),  # its motion
                  self.interval(interval(voices[..., u], own))]
        if self.tonality:
            heard = torch.stack([own, *(voices[..., u] for u in chosen)], -1)
            x.append(degrees(heard, known["turn"]).flatten(2))
        h = locked_dropout(self.hidden[i](torch.cat(x, -1)).relu(), self.dropouts[2], self.training)
        score = self.scores[i](h).split(list(self.sizes[i].values()), -1)
        score = dict(zip(self.sizes[i], score))
        logits, symbols = score["absolute"], torch.arange(data.SYMBOLS, device=h.device)
        if self.relations:
            logits = logits + relative(score["from_last"], own)
            for u, scores in zip(chosen, score["from_chosen"].split(2 * SPAN + 1, -1)):
                logits = logits + relative(scores, voices[..., u])
        if self.tonality:
            classes = (known["turn"] @ score["degree"][..., None])[..., 0]  # (B, T, 12)
            classes = classes + (score["often"][:, :, None] @ known["often"])[:, :, 0]
            logits = logits + classes[..., symbols % 12] * (symbols > 0)
        if self.memory:
            follows = known["match"] >= 0  # what came next has a vote while all follow it
            for u in chosen:
                follows = follows & (voices[..., u] == known["next"][..., u])
            vote = score["copy"].gather(-1, known["match"].clamp(min=0)[..., None])
            logits = logits.scatter_add(-1, known["next"][..., v, None], vote * follows[..., None])
        if self.memory and self.attention:
            moves = known["moves"][..., v]  # (B, S)
            steps = F.one_hot((moves - data.KEYS).clamp(-SPAN, SPAN) + SPAN, 2 * SPAN + 1)
            steps = (steps * (moves > 0)[..., None]).to(h.dtype)
            notes = F.one_hot(known["notes"][..., v], data.SYMBOLS).to(h.dtype)
            votes = torch.stack([score["same_note"], score["same_move"]], 2) @ known["weights"]
            logits = logits + votes[:, :, 0] @ notes + relative(votes[:, :, 1] @ steps, own)
        if self.parallels:
            for u, scores in zip(chosen, score["parallel"].split(12, -1)):
                now, before = voices[..., u], last[..., u]
                to = (own + now - before).clamp(0, data.KEYS)  # the note that keeps the interval
                moved = (now > 0) & (before > 0) & (own > 0) & (now != before)
                scores = scores.gather(-1, ((before - own) % 12)[..., None]) * moved[..., None]
                logits = logits.scatter_add(-1, to[..., None], scores)
        if i and (self.chained or legal):
            above = voices[..., 0 if v == self.voices - 1 else v - 1, None]
            below = voices[..., -1:] if i > 1 else torch.zeros_like(above)
            sounds = voices[..., self.order[i - 1], None] > 0  # the voice before it in the chain
            fits = (symbols < above) & (symbols > below) & sounds
            logits = logits.masked_fill(~fits & (symbols > 0), -torch.inf)
        return logits

    def frame_nll(self, frames, mask):
        """-log p of each frame given those before it, summed over voices: (B, T) nats, 0 where
        masked."""
        voices = data.to_voices(frames, self.voices)  # (B, T, V)
        known, _ = self.read(voices[:, :-1])
        nll = 0
        for i, v in enumerate(self.order):
            logits = self.voice_logits(i, known, voices)
            nll = nll + F.cross_entropy(logits.mT, voices[..., v], reduction="none")
        return nll * mask

    def nll(self, frames, mask):
        """-log p of each window in nats, first frame included: (B,)."""
        return self.frame_nll(frames, mask).sum(1)

    def forward(self, frames, mask):
        """frames (B, T, 88), mask (B, T) -> loss in nats per frame, and its parts for the log."""
        loss = self.nll(frames, mask).sum() / mask.sum()
        return loss, {"nll": loss.detach()}

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.85, prime=None,
               melody=None):
        """n new pieces as bool (n, length, 88), frame by frame; with prime, a bool (T, 88) roll,
        what follows it. temperature, top_p: see data.sample_symbols. Each voice first holds or
        leaves its note, then chooses another: one nucleus for both would hold too often.

        melody: bool (T, 88); where it sounds, its top note is kept as voice 0 and the other voices
        are drawn below it; where it rests, all stay below its last note.
        """
        self.eval()
        device, V = self.start.device, self.voices
        prime, melody = (torch.zeros(0, data.KEYS) if given is None else torch.as_tensor(given)
                         for given in (prime, melody))
        tune = data.to_voices(melody.to(device), 1)[:length]  # (T, 1)
        known, state = self.read(data.to_voices(prime.to(device), V).expand(n, -1, -1))
        known = {name: x if name in SEEN else x[:, -1:] for name, x in known.items()}
        symbols, roll, top = torch.arange(data.SYMBOLS, device=device), [], data.SYMBOLS
        for t in data.progress(range(length), "sampling frames"):
            voices = torch.zeros(n, 1, V, dtype=torch.long, device=device)
            for i, v in enumerate(self.order):
                logits = self.voice_logits(i, known, voices, legal=True)
                if v == 0 and t < len(tune):
                    top = torch.where(tune[t] > 0, tune[t], top)  # the tune's last note
                    fits = torch.where(tune[t] > 0, symbols == top, symbols < top)
                    logits = logits.masked_fill(~fits, -torch.inf)
                own, draw = known["last"][..., v], (generator, temperature, top_p)
                others = logits.scatter(-1, own[..., None], -1e9)
                holds = logits.gather(-1, own[..., None])[..., 0]
                leaves = data.sample_symbols(torch.stack([holds, others.logsumexp(-1)], -1), *draw)
                voices[..., v] = torch.where(leaves > 0, data.sample_symbols(others, *draw), own)
            roll.append(data.from_voices(voices))
            known, state = self.read(data.to_voices(roll[-1], V), state)
        return torch.cat(roll, 1)


@torch.no_grad()
def evaluate(model, pieces):
    """Figures on held-out pieces (bool (T, 88)): nats per frame over whole pieces (nll), without
    each piece's first frame (nll_after_first), and nats per sounding note."""
    model.eval()
    total = first = torch.zeros((), device=model.start.device)
    for frames, mask in data.whole_pieces(pieces, 8, model.start.device):
        nll = model.frame_nll(frames, mask)
        total, first = total + nll.sum(), first + nll[:, 0].sum()
    model.train()
    count, notes = sum(map(len, pieces)), sum(int(piece.sum()) for piece in pieces)
    return {"nll": total.item() / count,
            "nll_after_first": (total - first).item() / (count - len(pieces)),
            "nll_per_note": total.item() / notes}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    average = AttnLSTM(**data.config(AttnLSTM, args))  # weights' running average: tested, kept
    model = copy.deepcopy(average).to(args.device)
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    average.to(args.device)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("attn_lstm", args, average, corpus, trained=model, optimizer=optimizer)

    for step in run.steps(args.steps):
        frames, mask = windows.sample(args.batch, args.transpose)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * data.warmup_cosine(step, args.steps)
        loss, parts = model(frames, mask)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model, mask)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        with torch.no_grad():  # a shorter average at first, when the weights are still far off
            for mean, weight in zip(average.parameters(), model.parameters()):
                mean.lerp_(weight, 1 - min(args.average, step / (step + 10)))
        run.add(parts, mask)
        if step % args.eval_every == 0 or step == args.steps:
            valid = evaluate(average, corpus.valid)
            # The last weights write better music than those of the lowest validation nll.
            run.log(args.steps, valid, best=valid["nll"] if args.keep == "best" else -float(step))

    run.load_best()
    run.finish(evaluate(average, corpus.test))


def main(argv=None):
    parser = data.Parser(__doc__, run="attn_lstm", log=(
        "nll, nats per frame (valid: held-out pieces); after first: without first frames"))
    add = parser.add_argument
    add("--window", type=data.positive_int, default=96, help="frames trained on, attention sees")
    add("--steps", type=data.positive_int, default=400, help="training steps")
    add("--batch", type=data.positive_int, default=16, help="windows per step")
    add("--lr", type=data.positive, default=5e-3, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=50, help="steps between checkpoints")
    add("--hidden", type=data.positive_int, default=256, help="units of LSTM layers and heads")
    add("--heads", choices=["chained", "parallel"], default="chained", help="parallel: the paper's")
    add("--attention", choices=["on", "off"], default="on", help="off is the paper's baseline")
    add("--relations", choices=["on", "off"], default="on", help="off: keys alone, as in the paper")
    add("--without", nargs="*", choices=["memory", "parallels", "tonality"], default=(),
        help="leave out some of the relations")
    add("--attention-heads", type=data.positive_int, default=4, help="must divide --hidden")
    add("--dropout-input", type=data.dropout, default=0.2, help="share of the inputs dropped")
    add("--dropout", type=data.dropout, default=0.5, help="dropped of what LSTM layers say")
    add("--dropout-heads", type=data.dropout, default=0.2, help="dropped of the heads' units")
    add("--optimizer", choices=["adamw", "adam"], default="adamw", help="adam: the decay is an L2")
    add("--weight-decay", type=data.non_negative, default=1.0, help="of the optimizer")
    add("--average", type=data.decay, default=0.99, help="share of the averaged weights kept")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    add("--keep", choices=["last", "best"], default="last", help="weights: best by validation nll")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
