"""An LSTM with attention, one output head per voice (section 5.6 of the paper), and a memory.

A piece's kind c is drawn first: its key, and whether it pauses (data.kind). Then its frames y_t,
voice after voice (soprano, bass, alto, tenor). o_t is what a two-layer LSTM says after c and y_<t:

    a_t = softmax(q(o_t) . k(o_j) / sqrt(d)),  j < t    weights of N attention heads, and of nothing
    g_t = [o_t, sum_j a_tj v(o_{j+1})]                  (2H); o_{j+1} knows what followed o_j
    u_v = ReLU(W_v [g_t, voices chosen before v])       (H)
    p(y_t | y_<t, c) = prod_v softmax(l_v)[y_tv]        loss: -log p(c) - log p(y | c), in nats

The logits l_v (89) are sums of scores that are linear in u_v; in eval mode they are calibrated: see
voice_logits. What crosses or doubles a chosen voice, or sounds where that rests, is no frame
(data.to_voices) and has no probability: that of all frames is one. The loss bounds -log p(y).

    python attn_lstm.py                                        # default run
    python attn_lstm.py --heads parallel --without relations   # the paper's network (see README.md)

Differences from the paper (--without NAME leaves one out, relations the three after them as well):
- Heads are chained: independent voices choose no chord. --heads parallel is the paper's.
- Relations: frames are read, and notes scored, by intervals too, which are the same in all keys.
- Tonality: samples that draw no kind drift into major, and all pause. Degrees have scores.
- Memory: the longest passage that equals the last frames votes for what followed it; see recall.
- Parallels: notes that move in parallel with a chosen voice have a score: no other tells them.
- Windows know the frame before them: pieces begin as Bach's do. Ever fewer are transposed.
- Dropout has one mask per window and spares the last frame in the heads. Weights are averaged.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # intervals are told apart up to two octaves
HELD = 16  # frames that a note is held are counted up to this, beats modulo this
NEAR, REACH, LONGEST = 8, 256, 48  # memory looks so many frames back, for passages so long
LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24)  # passages are told apart by these bounds of their length
FADE = 0.98  # what is left after a frame of how often a pitch class has sounded
CALM, EVEN = 1.1, 0.003  # in eval mode: temperature; the share that all symbols have alike
PAIR = [2 * SPAN + 1, 12]  # scores of intervals from a chosen voice, of parallels with it


def interval(a, b):
    """Interval from symbols b up to symbols a as a class: 88 is the same key, 0: one rests."""
    return torch.where((a > 0) & (b > 0), a - b + data.KEYS, 0)


def relative(scores, symbol):
    """Scores (..., 2 * SPAN + 1) of intervals from symbol (...), none if a rest -> (..., 89)."""
    symbols = torch.arange(data.SYMBOLS, device=symbol.device)
    steps = (symbols - symbol[..., None]).clamp(-SPAN, SPAN) + SPAN
    return scores.gather(-1, steps) * ((symbols > 0) & (symbol[..., None] > 0))


def runs(same):
    """How many frames in a row, up to each, are the same: bool (B, T, .) -> (B, T, .)."""
    time = torch.arange(1, same.shape[1] + 1, device=same.device)[:, None]
    return time - torch.where(same, 0, time).cummax(1).values


def relations(past):
    """Of each frame of past (B, S, V): symbols, motions, intervals between neighbours, frames held
    and the next frame's beat, as rows of one table (B, S, 4 V); the motions alone (B, S, V)."""
    moves = interval(past, F.pad(past, (0, 0, 1, -1)))
    chords = interval(past[..., :-1], past[..., 1:])
    held = runs(F.pad(past[:, 1:] == past[:, :-1], (0, 0, 1, 0))).clamp(max=HELD)
    beat = torch.arange(past.shape[1], device=past.device)[:, None].expand_as(past[..., :1]) % HELD
    return torch.cat([past, moves + 2 * data.KEYS, chords + 4 * data.KEYS, held + 6 * data.KEYS,
                      beat + 6 * data.KEYS + HELD + 1], -1), moves


def tonality(past, T, kind):
    """After each of the last T frames of past (B, S, V): how often the degrees of kind's key have
    sounded, lately most, as a log less that of the mean; if minor; if it pauses: (B, T, 12 + 2)."""
    time = torch.arange(past.shape[1], device=past.device)
    fade = (FADE ** (time[-T:, None] - time)).tril(len(time) - T)  # (T, S), 0 for later frames
    degrees = F.one_hot((past + data.LOWEST - 1 - kind[:, None, None]) % 12, 12)
    tally = fade @ (degrees * (past > 0)[..., None]).sum(2).float()  # (B, T, 12)
    often = (tally + 1).log() - (tally.mean(-1, keepdim=True) + 1).log()
    traits = torch.stack([kind % 24 >= 12, kind >= 24], -1)[:, None]
    return torch.cat([often, traits.expand(-1, T, -1)], -1)


def recall(past, T):
    """Of passages NEAR to REACH frames back that equal what has just been played, the longest, the
    latest of several, for each of the last T frames of past (B, S, V): the frame that followed it
    (B, T, V), and the match's class (B, T), 0 where there is none."""
    code = (past * data.SYMBOLS ** torch.arange(past.shape[2], device=past.device)).sum(-1)
    now = torch.arange(past.shape[1], device=past.device)[-(T + LONGEST - 1):]
    back = torch.arange(NEAR, REACH + 1, device=past.device)
    then = now[:, None] - back  # (., R): R frames, with which each of the last is compared
    same = (code[:, then.clamp(min=0)] == code[:, now, None]) & (then >= 0)
    length = runs(same)[:, -T:].clamp(max=LONGEST)  # (B, T, R), in frames
    best = back[(length * REACH - back).argmax(-1)]  # (B, T): the longest, then the latest
    follows = past.take_along_dim((now[-T:] - best + 1).clamp(min=0)[..., None], 1)
    length = length.amax(-1)
    twice = length >= best  # the passage was just stated twice in a row: time for another
    match = 1 + sum(length >= bound for bound in LENGTHS) + (len(LENGTHS) + 1) * twice
    return follows, match * (length > 0)


class AttnLSTM(nn.Module):
    """LSTM, attention, memory, a head per voice; the arguments are the flags in main."""

    def __init__(self, voices=4, window=96, hidden=256, heads="chained", without=(),
                 attention_heads=4, dropout_input=0.2, dropout=0.5, dropout_heads=0.2):
        super().__init__()
        V, H, N = voices, hidden, attention_heads
        if H % N:
            raise data.InputError(f"--attention-heads {N} does not divide --hidden")
        self.voices, self.window, self.chained = V, window, heads == "chained"
        parts = {"attention", "relations", "memory", "parallels", "tonality"} - {*without}
        self.has = has = parts if "relations" in parts else parts & {"attention"}
        self.order = [0, V - 1, *range(1, V - 1)][:V]  # outer voices first: they decide the others
        self.register_buffer("turn", torch.tensor(self.order), persistent=False)
        self.dropouts = dropout_input, dropout, dropout_heads
        inputs, tonal = data.KEYS, "tonality" in has
        if "relations" in has:
            self.facts = nn.Embedding(6 * data.KEYS + 2 * HELD + 1, 16)
            inputs += 16 * 4 * V + 48 * tonal
        self.register_buffer("kinds", torch.full((48,), 0.1))  # how often each was seen: p(c)
        self.lstm1 = nn.LSTM(inputs, H, batch_first=True)  # two: nn.LSTM has no locked dropout
        self.lstm2 = nn.LSTM(H, H, batch_first=True)
        if "relations" not in has:
            nn.init.normal_(self.lstm1.weight_ih_l0)  # four of 88 are on; PyTorch expects all
        if "attention" in self.has:  # one more key, of zeros, lets it look at nothing
            self.attend = nn.MultiheadAttention(H, N, batch_first=True, add_zero_attn=True)
        # What heads read: context, last frame, key, each chosen voice's pitch, motion, interval.
        self.pitch, self.interval = nn.Embedding(data.SYMBOLS, 32), nn.Embedding(2 * data.KEYS, 32)
        context = H + ("attention" in has) * H + ("relations" in has) * 32 * (V - 1) + 14 * tonal
        chosen = range(V) if self.chained else [0] * V
        self.hidden = nn.ModuleList(nn.Linear(context + 96 * n, H) for n in chosen)
        # What they say: scores of symbols, intervals from the last note, degrees, kinds of match,
        # notes and motions that each attention head sees; and about each chosen voice.
        self.sizes = [[data.SYMBOLS, 2 * SPAN + 1, 24, 2 * len(LENGTHS) + 2, 2 * N, sum(PAIR) * n]
                      for n in chosen]
        self.scores = nn.ModuleList(nn.Linear(H, sum(sizes)) for sizes in self.sizes)

    def read(self, voices, kind, state=None):
        """Frames as voices (B, T, V), a new piece's after one of rests, and its kind (B,) -> what
        heads know when they choose the frame after each, {name: (B, T, ...)}; the next state."""
        past, lstm1, lstm2, outputs = state or (voices[:, :0], None, None, None)
        past, T, known = torch.cat([past, voices], 1), voices.shape[1], {"last": voices}
        x, told = [data.from_voices(voices).float()], []  # what the LSTM reads; what heads do
        if "relations" in self.has:
            facts, moves = relations(past)
            x.append(self.facts(facts[:, -T:]).flatten(2))
        if "tonality" in self.has:
            known["kind"], told = kind[:, None].expand(-1, T), [tonality(past, T, kind)]
            x.append(F.one_hot(known["kind"], 48).float())
        if "memory" in self.has:
            known["next"], known["match"] = recall(past, T)
        h, lstm1 = self.lstm1(self.locked(torch.cat(x, -1), 0), lstm1)
        h, lstm2 = self.lstm2(self.locked(h, 1), lstm2)
        outputs = h if outputs is None else torch.cat([outputs, h], 1)  # (B, S', H)
        if "attention" in self.has:
            place = torch.arange(outputs.shape[1], device=h.device)
            ago = place[-T:, None] - place[:-1]  # (T, S' - 1)
            found, weights = self.attend(h, outputs[:, :-1], outputs[:, 1:],
                                         attn_mask=(ago <= 0) | (ago > self.window),
                                         average_attn_weights=False)  # (B, T, H), (B, N, T, S')
            h = torch.cat([h, found], -1)
            if "memory" in self.has:  # weights (B, T, N, S' - 1), frames seen (B, 1, S' - 1, V)
                known["weights"] = weights.transpose(1, 2)[..., :-1]
                steps = (moves - data.KEYS + SPAN + 1).clamp(0, 2 * SPAN + 2)  # both ends: no score
                first = past.shape[1] - len(place) + 1
                known["notes"], known["steps"] = past[:, None, first:], steps[:, None, first:]
        known["context"] = torch.cat([self.locked(h, 1), *told], -1)
        return known, (past, lstm1, lstm2, outputs[:, -1 - self.window:])

    def locked(self, x, which):
        """Dropout with one mask for all frames of a window (Gal and Ghahramani 2016): (B, T, D)."""
        return F.dropout1d(x.mT, self.dropouts[which], self.training).mT

    def voice_logits(self, i, known, voices, legal=False):
        """Logits (B, T, 89) of the i-th voice in the chain; chained heads read the n before it in
        voices (B, T, V). legal: leave out what crosses them, which chained heads always do."""
        v, last, chosen = self.order[i], known["last"], self.turn[:i * self.chained]
        own, now, then = last[..., v, None], voices[..., chosen], last[..., chosen]  # (B, T, .)
        x, symbols = [known["context"]], torch.arange(data.SYMBOLS, device=last.device)
        if "relations" in self.has:
            others = torch.cat([last[..., :v], last[..., v + 1:]], -1)
            x.append(self.interval(interval(others, own)).flatten(2))
        x.append(torch.cat([self.pitch(now), self.interval(interval(now, then)),
                            self.interval(interval(now, own))], -1).flatten(2))
        h = self.locked(self.hidden[i](torch.cat(x, -1)).relu(), 2)
        logits, motion, degree, memory, look, pairs = self.scores[i](h).split(self.sizes[i], -1)
        if "memory" in self.has:  # what came next has a vote while all chosen voices follow it
            vote = F.pad(memory, (1, 0)).gather(-1, known["match"][..., None])
            vote = vote * (now == known["next"][..., chosen]).all(-1, keepdim=True)
            logits = logits.scatter_add(-1, known["next"][..., v, None], vote)
            if "attention" in self.has:  # so has each frame that attention sees
                note, move = (look.unflatten(-1, (2, -1)) @ known["weights"]).unbind(-2)
                notes, steps = (known[name][..., v].expand_as(note) for name in ("notes", "steps"))
                logits = logits.scatter_add(-1, notes, note)  # of each frame: (B, T, S' - 1)
                motion = F.pad(motion, (1, 1)).scatter_add(-1, steps, move)[..., 1:-1]
        if "tonality" in self.has:
            key = known["kind"][..., None] % 24
            place = (symbols + data.LOWEST - 1 - key) % 12 + 12 * (key >= 12)  # a degree, as 0..23
            logits = logits + degree.gather(-1, place) * (symbols > 0)
        harmony, parallel = pairs.unflatten(-1, (-1, sum(PAIR))).split(PAIR, -1)  # (B, T, n, .)
        if "relations" in self.has:
            logits = logits + relative(motion, own[..., 0]) + relative(harmony, now).sum(-2)
        if "parallels" in self.has:
            along = (own + now - then).clamp(0, data.KEYS)  # the note that keeps the interval
            moves = (now > 0) & (then > 0) & (own > 0) & (now != then)
            gain = parallel.gather(-1, ((then - own) % 12)[..., None])[..., 0]  # (B, T, n)
            logits = logits.scatter_add(-1, along, gain * moves)
        if not self.training:  # training makes it too sure of itself (Guo et al. 2017)
            logits = torch.log((1 - EVEN) * (logits / CALM).softmax(-1) + EVEN / data.SYMBOLS)
        for u in self.order[:i] if self.chained or legal else []:  # after a rest all rest
            fits = ((symbols - voices[..., u, None]) * (u - v) > 0) & (voices[..., u, None] > 0)
            logits = logits.masked_fill(~fits & (symbols > 0), -torch.inf)
        return logits

    def frame_nll(self, frames, mask, before=None, kind=None):
        """-log p (B, T) in nats, 0 if masked, of frames after one before (B, 1, 88), or silence, of
        kind (B,); by default of the one that fits, whose own -log p is spread over them."""
        voices = data.to_voices(frames, self.voices)  # (B, T, V)
        first = 0 * voices[:, :1] if before is None else data.to_voices(before, self.voices)
        fits = data.kind(frames, mask) if kind is None else kind
        known, _ = self.read(torch.cat([first, voices[:, :-1]], 1), fits)
        nll = sum(F.cross_entropy(self.voice_logits(i, known, voices).mT, voices[..., v],
                                  reduction="none") for i, v in enumerate(self.order))
        if kind is None and "tonality" in self.has:
            nll = nll - self.kinds.log().log_softmax(0)[fits, None] / mask.sum(1, True).clamp(min=1)
        return mask * nll

    def nll(self, frames, mask):
        """-log p of each window in nats, first frame included: (B,)."""
        return self.frame_nll(frames, mask).sum(1)

    def forward(self, frames, mask, before=None):
        """frames (B, T, 88), mask (B, T) -> loss in nats per frame, and its parts for the log."""
        loss = self.frame_nll(frames, mask, before).sum() / mask.sum()
        return loss, {"nll": loss.detach()}

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=0.85, top_p=0.8, prime=None,
               melody=None):
        """n new pieces as bool (n, length, 88); with prime, bool (T, 88), what follows of its kind.
        A voice chooses first whether to hold, from 95 % at least: against each other note it would
        hold too often. melody: bool (T, 88), voice 0's; in its rests all stay below its last."""
        self.eval()
        prime, melody = (torch.as_tensor(torch.zeros(0, data.KEYS) if roll is None else roll)
                         .to(self.kinds.device) for roll in (prime, melody))
        heard, draw = torch.cat([prime, melody]), (generator, temperature, top_p)
        kind = (data.kind(heard).expand(n) if heard.any() else
                data.sample_symbols(self.kinds.log().expand(n, -1), *draw))
        prime, tune = data.to_voices(prime, self.voices), data.to_voices(melody, 1)
        known, state = self.read(F.pad(prime, (0, 0, 1, 0)).expand(n, -1, -1), kind)
        known = {name: x[:, -1:] for name, x in known.items()}
        symbols, frames, top = torch.arange(data.SYMBOLS, device=heard.device), [], data.SYMBOLS
        for t in data.progress(range(length), "sampling frames"):
            voices = torch.zeros_like(known["last"])  # (n, 1, V)
            for i, v in enumerate(self.order):
                logits = self.voice_logits(i, known, voices, legal=True)
                if v == 0 and t < len(tune):
                    top = int(tune[t]) or top  # the tune's last note
                    fits = symbols == top if tune[t] else symbols < top
                    logits = logits.masked_fill(~fits, -torch.inf)
                own = known["last"][..., v, None]  # (n, 1, 1)
                others = logits.scatter(-1, own, -1e9)
                choice = torch.cat([logits.gather(-1, own), others.logsumexp(-1, True)], -1)
                leaves = data.sample_symbols(choice, generator, temperature, max(0.95, top_p))
                other = data.sample_symbols(others, *draw)
                voices[..., v] = torch.where(leaves > 0, other, own[..., 0])
            frames.append(voices)
            known, state = self.read(voices, kind, state)
        return data.from_voices(torch.cat(frames, 1))


@torch.no_grad()
def evaluate(model, pieces):
    """Nats per frame of held-out pieces, bool (T, 88), with and without first frames; per note."""
    model.eval()
    whole = [model.frame_nll(*batch) for batch in data.whole_pieces(pieces, 8, model.kinds.device)]
    total, first = (sum(map(torch.sum, nll)).item() for nll in (whole, [x[:, 0] for x in whole]))
    model.train()
    frames, notes = sum(map(len, pieces)), sum(int(piece.sum()) for piece in pieces)
    return {"nll": total / frames, "nll_after_first": (total - first) / (frames - len(pieces)),
            "nll_per_note": total / notes}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    average = AttnLSTM(**data.config(AttnLSTM, args))  # of the weights of all steps: tested, kept
    average.kinds += sum(F.one_hot(data.kind(torch.as_tensor(x)), 48) for x in corpus.train)
    model, average = copy.deepcopy(average).to(args.device), average.to(args.device)
    make = getattr(torch.optim, args.optimizer)
    optimizer = make(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    # One frame more: that before the window, read but not scored; silence where a piece begins.
    pieces = [F.pad(torch.as_tensor(piece), (0, 0, 1, 0)) for piece in corpus.train]
    windows = data.Windows(pieces, args.window + 1, args.device)
    run = data.Run("attn_lstm", args, average, corpus, trained=model, optimizer=optimizer)

    for step in run.steps(args.steps):
        frames, mask = windows.sample(args.batch, args.transpose * (1 - step / args.steps))
        before, frames, mask = frames[:, :1], frames[:, 1:], mask[:, 1:]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * data.warmup_cosine(step, args.steps)
        loss, parts = model(frames, mask, before)
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
            run.log(args.steps, valid, best=valid["nll"] if args.keep == "best" else -float(step))

    run.finish(evaluate)


def main(argv=None):
    parser = data.Parser(__doc__, "attn_lstm", log="nats per frame; after first: from the 2nd on")
    parser.set_defaults(transpose=0.6667)  # at first; at last all music lies where Bach's does
    add = parser.add_argument
    add("--window", type=data.positive_int, default=96, help="frames trained on, attention sees")
    add("--steps", type=data.positive_int, default=400, help="training steps")
    add("--batch", type=data.positive_int, default=24, help="windows per step")
    add("--lr", type=data.positive, default=5e-3, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=50, help="steps between checkpoints")
    add("--hidden", type=data.positive_int, default=256, help="units of LSTM layers and heads")
    add("--heads", choices=["chained", "parallel"], default="chained", help="parallel: the paper's")
    add("--without", nargs="*", default=(), help="parts left out; relations: the last three too",
        choices=["attention", "relations", "memory", "parallels", "tonality"])
    add("--attention-heads", type=data.positive_int, default=4, help="must divide --hidden")
    add("--dropout-input", type=data.dropout, default=0.2, help="share of the inputs dropped")
    add("--dropout", type=data.dropout, default=0.5, help="dropped of what LSTM layers say")
    add("--dropout-heads", type=data.dropout, default=0.2, help="dropped of the heads' units")
    add("--optimizer", choices=["AdamW", "Adam"], default="AdamW", help="Adam: the decay is an L2")
    add("--weight-decay", type=data.non_negative, default=1.0, help="of the optimizer")
    add("--average", type=data.decay, default=0.99, help="share of the averaged weights kept")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    add("--keep", choices=["last", "best"], default="last", help="last write better music")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
