"""An LSTM with attention, one output head per voice (section 5.6 of the paper), and a memory.

The voices of a frame are chosen one after the other, outer ones first (soprano, bass, alto,
tenor), each knowing those chosen before it. With y_t the V symbols of frame t and o_t what a
two-layer LSTM says after reading y_1 .. y_{t-1}:

    a_t = softmax(q(o_t) . k(o_j) / sqrt(d)),  j < t    weights of N attention heads (N, t - 1)
    g_t = [o_t, sum_j a_tj v(o_{j+1})]                  (2H); o_{j+1} knows what followed o_j
    u_v = ReLU(W_v [g_t, voices chosen before v])       (H)
    p(y_t | y_<t) = prod_v softmax(l_v)[y_tv]           loss: -log p(y_t | y_<t), nats per frame

The logits l_v (89) add up what class Head names, all linear in u_v. A voice gets no probability
for notes that would cross or double a chosen voice, nor for sounding where the one before it in
the chain rests: no frame reads so (data.to_voices). So the likelihood is exact: all frames
together have probability one.

    python attn_lstm.py                                                         # default run
    python attn_lstm.py --heads parallel --relations off --average 0 --weight-decay 0.06 \\
        --lr 1e-3 --batch 32 --dropout-input 0 --dropout-lstm 0.2 --dropout 0.5 --steps 3334
    # the paper's enhanced one, 100 epochs; its baseline: also --optimizer adam --attention off
    # --window 16 --hidden 16 --batch 16 --weight-decay 0.001 --steps 16094

Differences from the paper:
- The heads are chained; --heads parallel is the paper's. Independent voices choose no chord.
- Relations (--relations off leaves out this and the next two): a frame is read as motions,
  intervals, frames held and degrees of the key too, and logits are relative to notes and key as
  well as absolute. What is learnt in one key and register then holds in all.
- Memory: the longest earlier passage that equals what was just played votes for what came next
  there, and attention's weights vote for the notes and motions of the frames they see.
- A score for moving in parallel with each chosen voice: parallel fifths are the product of two
  intervals and a motion, which the network cannot see.
- Dropout has one mask for all frames of a window. AdamW's decay is decoupled: as an L2 in Adam
  (--optimizer adam) 0.06 lets nothing be learnt. The weights tested and kept are an average.
- The paper's loss sums over a multi-hot target, which is no likelihood.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # relative logits reach two octaves up and down; beyond, they are those of the last step
HELD = 16  # frames a note is held are counted up to this, and the frame's number modulo this
NEAR, REACH = 8, 256  # memory looks for passages so many frames back
PHRASE = 8  # a passage of so many frames that has stood twice before is known as a repetition
LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24)  # matches are told apart by these bounds of their length
KEPT = (1.0, 0.95)  # pitch classes are counted in all, and lately: the share left after a frame
SEEN = ("notes", "moves")  # what the heads know of the frames that attention sees
SCALE = (1.0, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, 1)  # a key's degrees, at first those of major


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


def of_symbol(score, symbol, where):
    """Score (...) of one symbol (...), none unless where (...) -> (..., 89)."""
    return (score * where)[..., None] * F.one_hot(symbol.where(where, 0), data.SYMBOLS)


def of_degrees(voices, turn):
    """Degrees of the key that voices (B, T, V) are, given turn (B, T, 12, 12): (B, T, V, 12)."""
    degrees = turn.gather(2, (voices % 12)[..., None].expand(-1, -1, -1, 12))
    return degrees * (voices > 0)[..., None]


class Head(nn.Module):
    """One voice's hidden layer and, by name, the scores that its logits are made of."""

    def __init__(self, inputs, hidden, chosen, relations, votes):
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.absolute = nn.Linear(hidden, data.SYMBOLS)
        if relations:
            spans = [nn.Linear(hidden, 2 * SPAN + 1) for _ in range(1 + chosen)]
            self.from_last, self.from_chosen = spans[0], nn.ModuleList(spans[1:])  # intervals
            self.degree = nn.Linear(hidden, 12)  # degrees of the key
            self.tally = nn.Linear(hidden, 2)  # how often pitch classes have sounded
            self.copy = nn.Linear(hidden, 2 * (len(LENGTHS) + 1))  # by kind of match
            self.parallel = nn.ModuleList(  # keeping the interval to a chosen voice, by interval
                nn.Linear(hidden, 12) for _ in range(chosen))
        if relations and votes:
            self.same_note = nn.Linear(hidden, votes)  # as in the frames each head attends to
            self.same_move = nn.Linear(hidden, votes)


class AttnLSTM(nn.Module):
    """Two-layer LSTM, attention over its outputs, a memory of passages, a head per voice.

    voices: V; window: frames that attention sees, and training length; hidden: H, also of the
    heads; heads: "chained" or "parallel"; attention, relations: "on" or "off"; attention_heads: N;
    dropout_input, dropout_lstm, dropout: of what the LSTM reads, between its layers, in the heads.
    """

    def __init__(self, voices=4, window=96, hidden=256, heads="chained", attention="on",
                 relations="on", attention_heads=4, dropout_input=0.2, dropout_lstm=0.4,
                 dropout=0.4):
        super().__init__()
        V, H, N = voices, hidden, attention_heads
        if H % N:
            raise data.InputError(f"--attention-heads {N} does not divide --hidden {H}")
        self.voices, self.window, self.hidden, self.attention_heads = V, window, H, N
        self.chained, self.attention = heads == "chained", attention == "on"
        self.relations = relations == "on"
        self.order = [0, V - 1, *range(1, V - 1)][:V]  # outer voices first: they decide the others
        self.dropouts = dropout_input, dropout_lstm, dropout
        inputs = data.KEYS
        if self.relations:
            # What is read of a frame besides its keys: a row for each symbol, motion, interval to
            # the neighbour, frames held, and place of the next frame in the bar.
            sizes = (data.SYMBOLS, 2 * data.KEYS, 2 * data.KEYS, HELD + 1, HELD)
            first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
            first = first.repeat_interleave(torch.tensor([V, V, V - 1, V, 1]))
            self.register_buffer("first_row", first, persistent=False)
            self.facts = nn.Embedding(sum(sizes), 16)
            inputs += 16 * 4 * V + 12 * (V + 1)  # and degrees of the key
            self.scale = nn.Parameter(torch.tensor(SCALE).repeat(2, 1) / 2)
        self.start = nn.Parameter(torch.zeros(inputs))  # read before the first frame
        self.lstm1 = nn.LSTM(inputs, H, batch_first=True)  # two: nn.LSTM has no locked dropout
        self.lstm2 = nn.LSTM(H, H, batch_first=True)
        if not self.relations:
            nn.init.normal_(self.lstm1.weight_ih_l0)  # four of 88 are on; PyTorch expects all
        if self.attention:
            self.query, self.key, self.value = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)
        # What the heads read of each voice chosen before: pitch, motion, interval, degree.
        self.pitch, self.interval = nn.Embedding(data.SYMBOLS, 32), nn.Embedding(2 * data.KEYS, 32)
        context, each = H + self.attention * H, 3 * 32 + 12 * self.relations
        self.heads = nn.ModuleList(
            Head(context + each * chosen, H, chosen, self.relations, self.attention * N)
            for chosen in (range(V) if self.chained else [0] * V))

    def read(self, voices, state=None):
        """Read frames: voices (B, T, V) -> what the heads know when they choose the frame after
        each, and the state to go on with. Without a state the start is read before them, which
        counts as a frame of rests."""
        first = state is None
        if first:
            rest = voices.new_zeros(len(voices), 1, self.voices)
            voices, empty = torch.cat([rest, voices], 1), rest.new_zeros(len(rest), 0)
            keys = self.start.new_zeros(len(rest), 0, self.hidden)
            state = {"time": 0, "past": rest, "held": rest, "tally": self.start.new_zeros(1, 2, 12),
                     "runs": empty, "lstm1": None, "lstm2": None, "keys": keys, "values": keys}
        B, T, V = voices.shape
        past = torch.cat([state["past"], voices], 1)  # (B, 1 + S, V), the last T of S are new
        known, moves = {"last": voices}, interval(past[:, 1:], past[:, :-1])
        state = state | {"time": state["time"] + T, "past": past[:, -1 - max(REACH, self.window):]}
        x = data.from_voices(voices).to(self.start.dtype)  # (B, T, 88)
        if self.relations:
            time = torch.arange(1, T + 1, device=voices.device)[:, None]
            onset = torch.where(voices != past[:, -T - 1:-1], time, -HELD)
            onset = torch.cat([-state["held"], onset], 1).cummax(1).values[:, 1:]
            held = (time - onset).clamp(max=HELD)  # (B, T, V) frames
            beat = ((state["time"] - T + time) % HELD).expand(B, T, 1)  # of the frame to choose
            facts = torch.cat([voices, moves[:, -T:], interval(voices[..., :-1], voices[..., 1:]),
                               held, beat], -1)
            known["tonality"], known["turn"], tally = self.tonality(voices, state["tally"])
            known["next"], known["match"], runs = self.recall(past[:, 1:], T, state["runs"])
            state.update(held=held[:, -1:], tally=tally, runs=runs)
            x = torch.cat([x, self.facts(facts + self.first_row).flatten(2), known["turn"][:, :, 0],
                           of_degrees(voices, known["turn"]).flatten(2)], -1)
        if first:
            x = torch.cat([self.start.expand(B, 1, -1), x[:, 1:]], 1)
        drop_input, drop_lstm, drop = self.dropouts
        x = locked_dropout(x, drop_input, self.training)
        h, state["lstm1"] = self.lstm1(x, state["lstm1"])  # (B, T, H)
        h = locked_dropout(h, drop_lstm, self.training)
        h, state["lstm2"] = self.lstm2(h, state["lstm2"])
        known["context"] = h
        if self.attention:
            keys = torch.cat([state["keys"], self.key(h)], 1)  # (B, S + 1, H) of the frames kept
            values = torch.cat([state["values"], self.value(h)], 1)
            found, known["weights"] = self.attend(self.query(h), keys[:, :-1], values[:, 1:])
            known["context"] = torch.cat([h, found], -1)
            S = keys.shape[1] - 1
            known["notes"] = past[:, past.shape[1] - S:]  # (B, S, V)
            known["moves"] = moves[:, moves.shape[1] - S:]
            state.update(keys=keys[:, -1 - self.window:], values=values[:, -1 - self.window:])
        known["context"] = locked_dropout(known["context"], drop, self.training)
        return known, state

    def tonality(self, voices, tally):
        """Which key a piece is in: voices (B, T, V) and how often pitch classes have sounded before
        (B, 2, 12), in all and lately -> this as logarithms less their mean (B, T, 24); turn
        (B, T, 12, 12), how likely each class is each degree; and the tally after all frames."""
        sound = (F.one_hot(voices % 12, 12) * (voices > 0)[..., None]).sum(2).to(tally.dtype)
        age = torch.arange(voices.shape[1], device=voices.device)
        lag = (age[:, None] - age).clamp(min=0).to(tally.dtype)  # from each frame to each before
        left = torch.stack([(rate ** lag).tril() for rate in KEPT])  # (2, T, T)
        old = torch.stack([rate ** (lag[:, 0] + 1) for rate in KEPT])[..., None] * tally[:, :, None]
        tally = left @ sound[:, None] + old  # (B, 2, T, 12)
        tonality = (tally + 1).log() - (tally.mean(-1, keepdim=True) + 1).log()
        classes = torch.arange(12, device=age.device)
        degree = (classes - classes[:, None]) % 12  # in each key, of each class
        key = torch.einsum("brtc,rkc->btk", tonality, self.scale[:, degree]).softmax(-1)
        turn = key @ F.one_hot(degree, 12).to(key.dtype).flatten(1)
        return tonality.transpose(1, 2), turn.unflatten(-1, (12, 12)), tally[:, :, -1]

    def recall(self, past, T, runs):
        """The longest earlier passage, NEAR to REACH frames back, that equals what has just been
        played, the latest of several: past (B, S, V) frames, the last T of them new -> the frame
        that followed it (B, T, V), the kind of match (B, T), -1 where there is none, and runs.

        runs (B, R): for how many frames what was played has equalled what stood R, .., 2, 1 frames
        before it; each new frame lengthens a run or ends it.
        """
        S, V = past.shape[1:]
        R = min(REACH, S)
        code = (past * data.SYMBOLS ** torch.arange(V, device=past.device)).sum(-1)  # (B, S)
        before = F.pad(code, (max(R + T - S, 0), 0), value=-1)[:, -(R + T):].unfold(1, R + 1, 1)
        distance = torch.arange(R, 0, -1, device=past.device)
        same = (before[..., :-1] == code[:, S - T:, None]) & (distance >= NEAR)  # (B, T, R)
        time = torch.arange(1, T + 1, device=past.device)
        ended = torch.where(same, 0, time[:, None]).cummax(1).values
        runs = F.pad(runs, (R - runs.shape[1], 0))[:, None]
        runs = time[:, None] - ended + runs * (ended == 0)
        which = (runs * REACH - distance).argmax(-1)  # the longest, then the latest
        length = runs.gather(-1, which[..., None])[..., 0]  # (B, T)
        follows = past.gather(1, (S - T - R + time + which)[..., None].expand(-1, -1, V))
        again = (runs >= PHRASE).sum(-1) > 1
        kind = sum(length >= bound for bound in LENGTHS) + (len(LENGTHS) + 1) * again
        return follows, torch.where(length > 0, kind, -1), runs[:, -1]

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
        v, head, last = self.order[i], self.heads[i], known["last"]
        chosen = self.order[:i] if self.chained else []
        own, x = last[..., v], [known["context"]]
        for u in chosen:
            x += [self.pitch(voices[..., u]),
                  self.interval(interval(voices[..., u], last[..., u])),  # its motion
                  self.interval(interval(voices[..., u], own))]
            if self.relations:
                x.append(of_degrees(voices[..., u, None], known["turn"])[:, :, 0])
        h = locked_dropout(head.hidden(torch.cat(x, -1)).relu(), self.dropouts[-1], self.training)
        logits = head.absolute(h)
        if self.relations:
            logits = logits + relative(head.from_last(h), own)
            classes = (known["turn"] @ head.degree(h)[..., None])[..., 0]  # (B, T, 12)
            classes = classes + (head.tally(h)[:, :, None] @ known["tonality"])[:, :, 0]
            symbols = torch.arange(data.SYMBOLS, device=h.device)
            logits = logits + classes[..., symbols % 12] * (symbols > 0)
            follows = known["match"] >= 0  # what came next is a vote while chosen voices follow it
            for u, from_chosen, parallel in zip(chosen, head.from_chosen, head.parallel):
                now, before = voices[..., u], last[..., u]
                logits = logits + relative(from_chosen(h), now)
                to = (own + now - before).clamp(0, data.SYMBOLS - 1)  # keeps the interval
                moved = (now > 0) & (before > 0) & (own > 0) & (now != before) & (to > 0)
                score = parallel(h).gather(-1, ((before - own) % 12)[..., None])[..., 0]
                logits = logits + of_symbol(score, to, moved)
                follows = follows & (now == known["next"][..., u])
            score = head.copy(h).gather(-1, known["match"].clamp(min=0)[..., None])[..., 0]
            logits = logits + of_symbol(score, known["next"][..., v], follows)
            if self.attention:
                votes = torch.stack([head.same_note(h), head.same_move(h)], 2) @ known["weights"]
                notes = F.one_hot(known["notes"][..., v], data.SYMBOLS).to(h.dtype)
                moves = known["moves"][..., v]
                steps = (moves - data.KEYS).clamp(-SPAN, SPAN) + SPAN
                steps = F.one_hot(steps, 2 * SPAN + 1).to(h.dtype) * (moves > 0)[..., None]
                logits = logits + votes[:, :, 0] @ notes + relative(votes[:, :, 1] @ steps, own)
        if i and (self.chained or legal):
            symbols = torch.arange(data.SYMBOLS, device=logits.device)
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
            run.log(args.steps, valid, best=valid["nll"])

    run.load_best()
    run.finish(evaluate(average, corpus.test))


def main(argv=None):
    parser = data.Parser(__doc__, run="attn_lstm", log=(
        "nll, nats per frame (valid: held-out pieces); after first: without first frames"))
    add = parser.add_argument
    add("--window", type=data.positive_int, default=96, help="frames trained on, attention sees")
    add("--steps", type=data.positive_int, default=500, help="training steps")
    add("--batch", type=data.positive_int, default=16, help="windows per step")
    add("--lr", type=data.positive, default=5e-3, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=50, help="steps between checkpoints")
    add("--hidden", type=data.positive_int, default=256, help="units of LSTM layers and heads")
    add("--heads", choices=["chained", "parallel"], default="chained", help="parallel: the paper's")
    add("--attention", choices=["on", "off"], default="on", help="off is the paper's baseline")
    add("--relations", choices=["on", "off"], default="on", help="off: keys alone, as in the paper")
    add("--attention-heads", type=data.positive_int, default=4, help="must divide --hidden")
    add("--dropout-input", type=data.dropout, default=0.2, help="share of the inputs dropped")
    add("--dropout-lstm", type=data.dropout, default=0.4, help="dropped between the LSTM's layers")
    add("--dropout", type=data.dropout, default=0.4, help="dropped of context and heads' units")
    add("--optimizer", choices=["adamw", "adam"], default="adamw", help="adam: the decay is an L2")
    add("--weight-decay", type=data.non_negative, default=0.3, help="of the optimizer")
    add("--average", type=data.decay, default=0.98, help="share of the averaged weights kept")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
