"""An LSTM with attention, one output head per voice (section 5.6 of the paper), and a memory.

The voices of a frame are chosen one after the other, outer ones first (soprano, bass, alto,
tenor), each knowing those chosen before it. With y_t the V symbols of frame t and o_t what a
two-layer LSTM says after reading y_1 .. y_{t-1}:

    a_t = softmax(q(o_t) . k(o_j) / sqrt(d)),  j < t    weights of N attention heads (N, t - 1)
    g_t = [o_t, sum_j a_tj v(o_{j+1})]                  (2H); o_{j+1} knows what followed o_j
    u_v = ReLU(W_v [g_t, voices chosen before v])       (H)
    p(y_t | y_<t) = prod_v softmax(l_v)[y_tv]           loss: -log p(y_t | y_<t), nats per frame

The logits l_v (89) add up several scores, all linear in u_v: see voice_logits. What crosses or
doubles a chosen voice, or sounds where the one chosen before it rests, is no frame
(data.to_voices) and gets no probability. So that of all frames is one: the likelihood is exact.

    python attn_lstm.py                                                         # default run
    python attn_lstm.py --heads parallel --relations off --average 0 --weight-decay 0.06 \\
        --lr 1e-3 --batch 32 --dropout-input 0 --dropout 0.2 --dropout-heads 0.5 --steps 3334
    # the paper's enhanced one, 100 epochs; its baseline: also --optimizer adam --attention off
    # --window 16 --hidden 16 --batch 16 --weight-decay 0.001 --steps 16094

Differences from the paper (--relations off leaves out the second to fifth, --without one of them):
- The heads are chained; --heads parallel is the paper's. Independent voices choose no chord.
- Relations: frames are read, and notes scored, by their distance from other notes as well as by
  name: what is learnt in one key holds in all. The heads see the last frame without dropout.
- Tonality: which notes have sounded so far gives the key, and notes are scored by their degree.
- Memory: the longest earlier passage that equals what was just played votes for what came next
  there, and attention for the notes and motions of the frames it sees.
- Parallels: a score for moving in parallel with a chosen voice. A parallel fifth is the product
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
SCALE = (1.0, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, 1)  # a key's degrees, at first those of major
FADE = 0.98  # what is left of a note's count after each frame, when the key is judged


def interval(a, b):
    """Interval from symbols b up to symbols a as a class: 88 is the same key, 0: one rests."""
    return torch.where((a > 0) & (b > 0), a - b + data.KEYS, 0)


def relative(scores, symbol):
    """Scores (..., 2 * SPAN + 1) of intervals from symbol (...), none if a rest -> (..., 89)."""
    symbols = torch.arange(data.SYMBOLS, device=symbol.device)
    steps = (symbols - symbol[..., None]).clamp(-SPAN, SPAN) + SPAN
    return scores.gather(-1, steps) * ((symbols > 0) & (symbol[..., None] > 0))


def relations(past):
    """What is read of each frame of past (B, S, V) besides its keys, as rows of one table: symbols,
    motions, intervals between neighbours, frames held, the next frame's beat (B, S, 4 V); and the
    motions alone (B, S, V)."""
    moves = interval(past, F.pad(past, (0, 0, 1, -1)))
    chords = interval(past[..., :-1], past[..., 1:])
    time = torch.arange(past.shape[1], device=past.device)[:, None].expand_as(past)
    same = F.pad(past[:, 1:] == past[:, :-1], (0, 0, 1, 0))
    held = (time - torch.where(same, 0, time).cummax(1).values).clamp(max=HELD)
    beat = time[..., :1] % HELD + HELD + 1
    first = 2 * data.KEYS  # rows for each kind of interval, and at least as many for symbols
    return torch.cat([past, moves + first, chords + 2 * first, held + 3 * first,
                      beat + 3 * first], -1), moves


def tonality(past, T, scale):
    """The key after each of the last T frames of past (B, S, V), given what a scale's degrees are
    worth (12,): how likely each pitch class is each degree (B, T, 12, 12), and how often each
    degree has sounded, lately most, as a logarithm less its mean (B, T, 12)."""
    time, classes = (torch.arange(n, device=past.device) for n in (past.shape[1], 12))
    sound = F.one_hot(past % 12, 12) * (past > 0)[..., None]  # (B, S, V, 12)
    ago = time[-T:, None] - time  # (T, S)
    tally = (FADE ** ago.clamp(min=0) * (ago >= 0)) @ sound.sum(2).to(scale.dtype)  # (B, T, 12)
    often = (tally + 1).log() - (tally.mean(-1, keepdim=True) + 1).log()
    degree = (classes - classes[:, None]) % 12  # in each key, of each class
    key = (often @ scale[degree].T).softmax(-1)
    turn = torch.einsum("btk,kcd->btcd", key, F.one_hot(degree, 12).to(key.dtype))
    return turn, (often[:, :, None] @ turn)[:, :, 0]


def recall(past, T):
    """The longest earlier passage, NEAR to REACH frames back, that equals what has just been
    played, the latest of several, for each of the last T frames of past (B, S, V): the frame that
    followed it (B, T, V), and the kind of match (B, T), 0 where there is none."""
    V, longest = past.shape[2], LENGTHS[-1]
    back = torch.arange(REACH, 0, -1, device=past.device)
    code = (past * data.SYMBOLS ** torch.arange(V, device=past.device)).sum(-1)  # one per frame
    code = F.pad(code, (REACH + longest, 0), value=-1)[:, -(REACH + longest + T - 1):]
    code = code.unfold(1, REACH + 1, 1)  # (B, longest + T - 1, REACH + 1): frames before, and each
    same = (code[..., :-1] == code[..., -1:]) & (back >= NEAR)
    time = torch.arange(1, same.shape[1] + 1, device=past.device)[:, None]
    runs = (time - torch.where(same, 0, time).cummax(1).values)[:, -T:].clamp(max=longest)
    best = (runs * REACH - back).argmax(-1, keepdim=True)  # the longest, then the latest
    length = runs.gather(-1, best)[..., 0]  # (B, T), in frames
    now = torch.arange(past.shape[1] - T, past.shape[1], device=past.device)
    after = (now - REACH + 1 + best[..., 0]).clamp(min=0)
    follows = past.gather(1, after[..., None].expand(-1, -1, V))
    again = (runs >= PHRASE).sum(-1) > 1
    kind = 1 + sum(length >= bound for bound in LENGTHS) + (len(LENGTHS) + 1) * again
    return follows, kind * (length > 0)


class AttnLSTM(nn.Module):
    """Two-layer LSTM, attention over its outputs, a memory of passages, a head per voice; the
    arguments are the flags in main."""

    def __init__(self, voices=4, window=96, hidden=256, heads="chained", attention="on",
                 relations="on", without=(), attention_heads=4, dropout_input=0.2, dropout=0.5,
                 dropout_heads=0.2):
        super().__init__()
        V, H = voices, hidden
        if H % attention_heads:
            raise data.InputError(f"--attention-heads {attention_heads} does not divide --hidden")
        self.voices, self.window = V, window
        self.chained, self.attention = heads == "chained", attention == "on"
        self.relations, has = relations == "on", {"memory", "parallels", "tonality"} - {*without}
        self.has = has = has if self.relations else set()
        self.order = [0, V - 1, *range(1, V - 1)][:V]  # outer voices first: they decide the others
        self.dropouts = dropout_input, dropout, dropout_heads
        inputs, degree = data.KEYS, 12 * ("tonality" in has)
        if self.relations:
            self.facts = nn.Embedding(6 * data.KEYS + 2 * HELD + 1, 16)
            inputs += 16 * 4 * V + degree
        self.scale = nn.Parameter(torch.tensor(SCALE))
        self.lstm1 = nn.LSTM(inputs, H, batch_first=True)  # two: nn.LSTM has no locked dropout
        self.lstm2 = nn.LSTM(H, H, batch_first=True)
        if not self.relations:
            nn.init.normal_(self.lstm1.weight_ih_l0)  # four of 88 are on; PyTorch expects all
        if self.attention:
            # One more key, of zeros, lets attention look at nothing.
            self.attend = nn.MultiheadAttention(H, attention_heads, batch_first=True,
                                                add_zero_attn=True)
        # What heads read: context, last frame, key, each chosen voice's pitch, motion, interval.
        self.pitch, self.interval = nn.Embedding(data.SYMBOLS, 32), nn.Embedding(2 * data.KEYS, 32)
        context = H + self.attention * H + self.relations * 32 * (V - 1) + degree
        chosen = range(V) if self.chained else [0] * V
        self.hidden = nn.ModuleList(nn.Linear(context + 96 * n, H) for n in chosen)
        # What they say: scores of symbols, of intervals from the last note, of degrees, of the
        # memory by kind of match, of notes and of motions that each attention head sees, and
        # of intervals from each chosen voice and parallels with it.
        self.sizes = [[data.SYMBOLS, 2 * SPAN + 1, 12, 2 * len(LENGTHS) + 2, attention_heads,
                       attention_heads, *[2 * SPAN + 1, 12] * n] for n in chosen]
        self.scores = nn.ModuleList(nn.Linear(H, sum(sizes)) for sizes in self.sizes)

    def read(self, voices, state=None):
        """Read frames: voices (B, T, V) -> what the heads know when they choose the frame after
        each, and the state to go on with. Without a state a frame of rests is read before them."""
        if state is None:
            voices = F.pad(voices, (0, 0, 1, 0))
            none = self.scale.new_zeros(len(voices), 0, self.lstm2.hidden_size)
            state = voices[:, :0], None, None, none
        past, lstm1, lstm2, outputs = state
        past = torch.cat([past, voices], 1)  # (B, S, V)
        T, known = voices.shape[1], {"last": voices}
        x = [data.from_voices(voices).to(self.scale.dtype)]  # (B, T, 88)
        if self.relations:
            facts, moves = relations(past)
            x.append(self.facts(facts[:, -T:]).flatten(2))
        if "tonality" in self.has:
            known["key"], often = tonality(past, T, self.scale)
            x.append(known["key"][:, :, 0])
        if "memory" in self.has:
            known["next"], known["match"] = recall(past, T)
        drop_input, drop, _ = self.dropouts
        h, lstm1 = self.lstm1(self.locked(torch.cat(x, -1), drop_input), lstm1)
        h, lstm2 = self.lstm2(self.locked(h, drop), lstm2)
        outputs, context = torch.cat([outputs, h], 1), h  # (B, S', H), (B, T, H)
        if self.attention:
            place = torch.arange(outputs.shape[1], device=h.device)
            ago = place[-T:, None] - place[:-1]  # (T, S' - 1)
            found, weights = self.attend(h, outputs[:, :-1], outputs[:, 1:],
                                         attn_mask=(ago <= 0) | (ago > self.window),
                                         average_attn_weights=False)  # (B, T, H), (B, N, T, S')
            if "memory" in self.has:  # how much of it lies on each note and each motion
                first = past.shape[1] - len(place) + 1
                notes = F.one_hot(past[:, first:], data.SYMBOLS).to(h.dtype)
                steps = F.one_hot(moves[:, first:], 2 * data.KEYS).to(h.dtype)
                steps = steps[..., data.KEYS - SPAN:data.KEYS + SPAN + 1]
                known["notes"], known["moves"] = (  # (B, T, V, N, .)
                    torch.einsum("bnts,bsvk->btvnk", weights[..., :-1], x) for x in (notes, steps))
            context = torch.cat([h, found], -1)
        known["context"] = self.locked(context, drop)
        if "tonality" in self.has:
            known["context"] = torch.cat([known["context"], often], -1)
        return known, (past, lstm1, lstm2, outputs[:, -1 - self.window:])

    def locked(self, x, p):
        """Dropout with one mask for all frames of a window (Gal and Ghahramani 2016): (B, T, D)."""
        return F.dropout1d(x.mT, p, self.training).mT

    def voice_logits(self, i, known, voices, legal=False):
        """Logits (B, T, 89) of the i-th voice in the chain; chained heads read those before it in
        voices (B, T, V). legal: leave out what crosses them, which chained heads always do."""
        v, last, chosen = self.order[i], known["last"], self.order[:i] if self.chained else []
        own, symbols = last[..., v], torch.arange(data.SYMBOLS, device=last.device)
        x = [known["context"]]
        if self.relations:
            x += [self.interval(interval(last[..., u], own)) for u in range(self.voices) if u != v]
        for u in chosen:  # its pitch, its motion, its interval from this voice's last note
            now = voices[..., u]
            x += [self.pitch(now), self.interval(interval(now, last[..., u])),
                  self.interval(interval(now, own))]
        h = self.locked(self.hidden[i](torch.cat(x, -1)).relu(), self.dropouts[2])
        scores = self.scores[i](h).split(self.sizes[i], -1)
        logits, motion, degree, memory, note, move, *pairs = scores
        if self.relations:
            logits = logits + relative(motion, own)
        if "tonality" in self.has:
            classes = (known["key"] @ degree[..., None])[..., 0]  # (B, T, 12)
            logits = logits + classes[..., symbols % 12] * (symbols > 0)
        if "memory" in self.has:  # what came next has a vote while all chosen voices follow it
            vote = F.pad(memory, (1, 0)).gather(-1, known["match"][..., None])
            for u in chosen:
                vote = vote * (voices[..., u] == known["next"][..., u])[..., None]
            logits = logits.scatter_add(-1, known["next"][..., v, None], vote)
            if self.attention:  # and so have the notes and motions that attention sees
                logits = logits + (note[..., None, :] @ known["notes"][:, :, v])[..., 0, :]
                move = (move[..., None, :] @ known["moves"][:, :, v])[..., 0, :]
                logits = logits + relative(move, own)
        for u, harmony, parallel in zip(chosen, pairs[::2], pairs[1::2]):
            now, then = voices[..., u], last[..., u]
            if self.relations:
                logits = logits + relative(harmony, now)
            if "parallels" in self.has:
                along = (own + now - then).clamp(0, data.KEYS)  # the note that keeps the interval
                moves = (now > 0) & (then > 0) & (own > 0) & (now != then)
                gain = parallel.gather(-1, ((then - own) % 12)[..., None])
                logits = logits.scatter_add(-1, along[..., None], gain * moves[..., None])
        for u in self.order[:i] if self.chained or legal else []:
            now = voices[..., u, None]  # voices below one that rests rest too
            fits = ((symbols - now) * (u - v) > 0) & (now > 0)
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
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.8, prime=None,
               melody=None):
        """n new pieces as bool (n, length, 88), frame by frame; with prime, a bool (T, 88) roll,
        what follows it. temperature, top_p: see data.sample_symbols. A voice first chooses whether
        to hold its note, from a nucleus of at least 95 %, then which other to take: one smaller
        nucleus for both would hold too often.

        melody: bool (T, 88); where it sounds, its top note is kept as voice 0 and the other voices
        are drawn below it; where it rests, all stay below its last note.
        """
        self.eval()
        device, V = self.scale.device, self.voices
        prime, melody = (torch.zeros(0, data.KEYS) if given is None else torch.as_tensor(given)
                         for given in (prime, melody))
        tune = data.to_voices(melody.to(device), 1)[:length]  # (T, 1)
        known, state = self.read(data.to_voices(prime.to(device), V).expand(n, -1, -1))
        known = {name: x[:, -1:] for name, x in known.items()}
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
                leaves = data.sample_symbols(torch.stack([holds, others.logsumexp(-1)], -1),
                                             generator, temperature, max(0.95, top_p))
                voices[..., v] = torch.where(leaves > 0, data.sample_symbols(others, *draw), own)
            roll.append(data.from_voices(voices))
            known, state = self.read(data.to_voices(roll[-1], V), state)
        return torch.cat(roll, 1)


@torch.no_grad()
def evaluate(model, pieces):
    """Figures on held-out pieces (bool (T, 88)): nats per frame over whole pieces (nll), without
    each piece's first frame (nll_after_first), and nats per sounding note."""
    model.eval()
    total = first = torch.zeros((), device=model.scale.device)
    for frames, mask in data.whole_pieces(pieces, 8, model.scale.device):
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
    parser.set_defaults(transpose=0.3333)  # most music lies where Bach's does
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
