"""An LSTM with attention and one output head a voice (section 5.6 of the paper).

The voices of a frame are chosen one after the other, outer ones first (soprano, bass, alto, tenor), each knowing those
chosen before it. With y_t the V symbols of frame t and o_t what a two-layer LSTM says after reading y_1 .. y_{t-1}:

    a_t  = softmax(q(o_t) . k(o_j) / sqrt(d)),  j < t      attention weights (N heads, t - 1), last `window` frames
    g_t  = [o_t, sum_j a_tj v(o_{j+1})]                    context (2H); o_{j+1} knows what followed o_j
    u_v  = Head_v(g_t, voices chosen before v)             linear, ReLU, dropout, linear
    l_v  = u_v[absolute] + u_v[interval from the voice's last note] + u_v[interval from each chosen voice]
           + u_v[tonality] log(notes of its pitch class so far, relative to the mean of all twelve)
           + sum_j (u_v[votes] . a_tj) * (what frame j did)    (89) logits of voice v
    p(y_t | y_<t) = prod_v softmax(l_v)[y_tv]              loss: - log p(y_t | y_<t), nats a frame

A voice gets no probability for notes that would cross or double a chosen voice, nor for sounding where the one before it
in the chain rests: no frame reads so (data.to_voices). So all frames together have probability one and the likelihood
is exact.

    python attn_lstm.py                                                                   # default run
    python attn_lstm.py --heads parallel --relations off --weight-decay 0.06 --lr 1e-3 --dropout-input 0 \\
        --dropout-lstm 0.2 --dropout 0.5 --steps 3334                       # the paper's enhanced one, 100 epochs; its
    # baseline: also --optimizer adam --attention off --window 16 --hidden 16 --batch 16 --weight-decay 0.001 --steps 16094

Differences from the paper (in brackets: nats a frame gained on held-out pieces, in short runs of prototypes):
- The heads are chained; --heads parallel is the paper's. Independent voices cannot choose a chord together. (2; outer
  voices first instead of top to bottom 0.13)
- Relations (--relations off leaves them out): besides its keys a frame is read as each voice's pitch, motion, interval to
  its neighbour and frames held, and the number of the frame modulo 16; logits are relative as well as absolute. What is
  learnt in one key and register then holds in all. (0.44)
- The tonality, with relations: the pitch classes so far say in which key a piece is. Without them samples wander from key
  to key. (0.12)
- A key belongs to the frame before its value, so that a match tells what came next, and the weights vote for what frame
  j did: its notes voice by voice (both 0.19), its pitch classes (0.18), each voice's motion from its note before (0.13).
  Phrases repeat, and so do the notes of a key.
- Dropout has one mask for all frames of a window and is strong, windows are transposed: overfitting is the limit here, not
  size. AdamW's decay is decoupled: as an L2 inside Adam (--optimizer adam) the paper's 0.06 lets nothing be learnt.
- The sum over a multi-hot target in the paper's loss is no likelihood; each voice's symbol is a category here.
"""

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 36  # relative logits reach three octaves up and down; beyond, they are those of the last step
HELD = 16  # frames a note is held are counted up to this, and the frame's number modulo this
PAST = ("notes", "moves", "chroma")  # what the votes know of the frames that attention sees


class LockedDropout(nn.Module):
    """Dropout with one mask for all frames of a sequence (Gal and Ghahramani 2016): (B, T, D)."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x * F.dropout(torch.ones_like(x[:, :1]), self.p, self.training)


def interval(a, b):
    """Interval from symbols b up to symbols a as a class: 88 is the same key, 0 says that one of them rests."""
    return torch.where((a > 0) & (b > 0), a - b + data.KEYS, 0)


def relative(scores, symbol):
    """Scores of intervals from a symbol (..., 2 * SPAN + 1), -SPAN first -> scores of all symbols (..., 89): none for
    the rest, none at all where the symbol (...) is a rest."""
    symbols = torch.arange(data.SYMBOLS, device=symbol.device)
    steps = (symbols - symbol[..., None]).clamp(-SPAN, SPAN) + SPAN
    return scores.gather(-1, steps) * ((symbols > 0) & (symbol[..., None] > 0))


def of_pitch_classes(scores):
    """Scores of pitch classes (..., 12) -> scores of all symbols (..., 89), none for the rest."""
    symbols = torch.arange(data.SYMBOLS, device=scores.device)
    return scores[..., symbols % 12] * (symbols > 0)


def chroma(voices):
    """Voices that sound each pitch class: symbols (B, T, V) -> (B, T, 12), numbered by symbols modulo 12."""
    return (F.one_hot(voices % 12, 12) * (voices > 0)[..., None]).sum(2)


class AttnLSTM(nn.Module):
    """Two-layer LSTM, attention over its outputs, a head for each voice.

    voices: V; hidden: H, also of the heads; window: frames that attention sees, and training length; heads: "chained" or
    "parallel"; attention, relations: "on" or "off"; attention_heads: N; dropout_input, dropout_lstm, dropout: of the
    frames read, between the LSTM's layers, and in the heads.
    """

    def __init__(self, voices=4, hidden=256, window=96, heads="chained", attention="on", relations="on",
                 attention_heads=4, dropout_input=0.4, dropout_lstm=0.6, dropout=0.6):
        super().__init__()
        if hidden % attention_heads:
            raise data.InputError(f"--attention-heads {attention_heads} does not divide --hidden {hidden}")
        V, H, N = voices, hidden, attention_heads
        self.voices, self.window, self.attention_heads = V, window, N
        self.chained, self.attention, self.relations = heads == "chained", attention == "on", relations == "on"
        self.order = [0, V - 1, *range(1, V - 1)][:V]  # outer voices first: they decide most of the others

        # A row for each pitch, motion, interval to the neighbour, frames held, and frame number modulo 16.
        sizes = (data.SYMBOLS, 2 * data.KEYS, 2 * data.KEYS, HELD + 1, HELD)
        counts = torch.tensor([V, V, V - 1, V, 1])
        self.register_buffer("rows", torch.tensor([0, *sizes[:-1]]).cumsum(0).repeat_interleave(counts), persistent=False)
        self.embed = nn.Embedding(sum(sizes), 16)
        inputs = data.KEYS + (16 * len(self.rows) if self.relations else 0)
        self.start = nn.Parameter(torch.zeros(inputs))  # read before the first frame
        self.lstm1 = nn.LSTM(inputs, H, batch_first=True)  # two modules: nn.LSTM has no locked dropout
        self.lstm2 = nn.LSTM(H, H, batch_first=True)
        if not self.relations:
            nn.init.normal_(self.lstm1.weight_ih_l0)  # of 88 inputs four are on: PyTorch's range is for dense ones
        if self.attention:
            self.query, self.key, self.value = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)
        self.drop_input, self.drop_lstm = LockedDropout(dropout_input), LockedDropout(dropout_lstm)
        self.drop = LockedDropout(dropout)

        self.pitch, self.interval = nn.Embedding(data.SYMBOLS, 32), nn.Embedding(2 * data.KEYS, 32)  # of chosen voices
        self.sizes, self.heads = [], nn.ModuleList()
        for i in range(V):
            chosen = i if self.chained else 0
            sizes = [data.SYMBOLS]  # absolute logits; those relative to the voice itself and to the chosen ones
            if self.relations:
                sizes += [2 * SPAN + 1] * (1 + chosen) + [1] + [3 * N] * self.attention  # ... tonality, votes
            self.sizes.append(sizes)
            self.heads.append(nn.Sequential(nn.Linear((1 + self.attention) * H + 3 * 32 * chosen, H), nn.ReLU(),
                                            LockedDropout(dropout), nn.Linear(H, sum(sizes))))

    def read(self, voices, state=None):
        """Read frames: voices (B, T, V) -> what the heads know when they choose the frame after each, and the state to go
        on with. Without a state the start is read first, so T + 1 frames can be chosen."""
        B, T, V = voices.shape
        first = state is None
        if first:
            rest = voices.new_zeros(B, 1, V)
            empty = self.start.new_zeros(B, 0, len(self.lstm2.weight_hh_l0.T))  # (B, 0, H)
            state = dict(time=0, last=rest, since=rest, lstm1=None, lstm2=None, keys=empty, values=empty,
                         notes=rest[:, :0], moves=rest[:, :0], tally=self.start.new_zeros(B, 1, 12),
                         chroma=self.start.new_zeros(B, 0, 12))
        lasts = torch.cat([state["last"], voices], 1)  # (B, T + 1, V)
        time = state["time"] + torch.arange(T, device=voices.device)
        moves = interval(voices, lasts[:, :-1])
        changed = torch.where(voices != lasts[:, :-1], time[:, None], 0)
        since = torch.cat([state["since"], changed], 1).cummax(1).values
        classes = chroma(voices).to(self.start.dtype)
        tally = torch.cat([state["tally"], classes], 1).cumsum(1)  # (B, T + 1, 12) of all frames so far
        x = data.from_voices(voices).to(self.start.dtype)  # (B, T, 88)
        if self.relations:
            held = (time[:, None] - since[:, 1:]).clamp(max=HELD)
            beat = ((time + 1) % HELD)[:, None].expand(B, T, 1)  # of the frame to choose
            relations = torch.cat([voices, moves, interval(voices[..., :-1], voices[..., 1:]), held, beat], -1)
            x = torch.cat([x, self.embed(relations + self.rows).flatten(2)], -1)
        if first:
            x = torch.cat([self.start.expand(B, 1, -1), x], 1)
        h, lstm1 = self.lstm1(self.drop_input(x), state["lstm1"])
        h, lstm2 = self.lstm2(self.drop_lstm(h), state["lstm2"])  # (B, T, H), or T + 1 of them
        tonality = (tally + 1).log() - (tally.mean(-1, keepdim=True) + 1).log()
        known = {"last": lasts[:, 1 - first:], "context": h, "tonality": tonality[:, 1 - first:]}
        state = state | dict(time=state["time"] + T, last=lasts[:, -1:], since=since[:, -1:], tally=tally[:, -1:],
                             lstm1=lstm1, lstm2=lstm2)
        if self.attention:
            keys = torch.cat([state["keys"], self.key(h)], 1)  # (B, S + 1, H): S frames have been read that are kept
            values = torch.cat([state["values"], self.value(h)], 1)
            past = {name: torch.cat([state[name], new], 1) for name, new in zip(PAST, (voices, moves, classes))}  # (B, S, .)
            seen, known["weights"] = self.attend(self.query(h), keys[:, :-1], values[:, 1:])
            known.update(past, context=torch.cat([h, seen], -1))
            W = self.window
            state.update(keys=keys[:, -W - 1:], values=values[:, -W - 1:], **{name: x[:, -W:] for name, x in past.items()})
        known["context"] = self.drop(known["context"])
        return known, state

    def attend(self, query, key, value):
        """query (B, T, H) of the newest T outputs, key and value (B, S, H) of the frames before the newest output ->
        context (B, T, H), weights (B, T, N, S). One more key of zeros lets attention look at nothing."""
        (B, T, H), S, N = query.shape, key.shape[1], self.attention_heads
        query, key, value = (x.unflatten(-1, (N, -1)).transpose(1, 2) for x in (query, key, value))  # (B, N, ., H / N)
        scores = query @ key.transpose(-1, -2) / (H / N) ** 0.5  # (B, N, T, S)
        now, then = torch.arange(S + 1 - T, S + 1, device=key.device)[:, None], torch.arange(S, device=key.device)
        scores = scores.masked_fill((then >= now) | (then < now - self.window), -torch.inf)
        weights = F.pad(scores, (1, 0)).softmax(-1)[..., 1:]
        return (weights @ value).transpose(1, 2).flatten(2), weights.transpose(1, 2)

    def votes(self, scale, known, voice):
        """What attended frames did, as logits of a voice: scale (B, T, 3 * N), how much each head's weights count for
        each kind of vote -> (B, T, 89)."""
        weights = scale.unflatten(-1, (3, -1)) @ known["weights"]  # (B, T, 3, S)
        kind, move = weights.unbind(2), known["moves"][..., voice]
        same = kind[0] @ F.one_hot(known["notes"][..., voice], data.SYMBOLS).to(scale.dtype)
        classes = of_pitch_classes(kind[1] @ known["chroma"])
        steps = F.one_hot((move - data.KEYS).clamp(-SPAN, SPAN) + SPAN, 2 * SPAN + 1) * (move > 0)[..., None]
        return same + classes + relative(kind[2] @ steps.to(scale.dtype), known["last"][..., voice])

    def voice_logits(self, i, known, voices, legal=False):
        """Logits (B, T, 89) of the i-th voice in the chain; chained heads read those before it in voices (B, T, V).
        legal: leave out what crosses the chosen voices, which chained heads always do."""
        v, last, chosen = self.order[i], known["last"], self.order[:i] if self.chained else []
        x = [known["context"]]
        for u in chosen:  # its pitch, its motion, and where it lies from this voice's last note
            x += [self.pitch(voices[..., u]), self.interval(interval(voices[..., u], last[..., u])),
                  self.interval(interval(voices[..., u], last[..., v]))]
        parts = self.heads[i](torch.cat(x, -1)).split(self.sizes[i], -1)
        logits = parts[0]  # (B, T, 89)
        if self.relations:
            for scores, symbol in zip(parts[1:], [last[..., v], *(voices[..., u] for u in chosen)]):
                logits = logits + relative(scores, symbol)
            logits = logits + of_pitch_classes(parts[2 + len(chosen)] * known["tonality"])
            if self.attention:
                logits = logits + self.votes(parts[-1], known, v)
        if i and (self.chained or legal):
            symbols = torch.arange(data.SYMBOLS, device=logits.device)
            above = voices[..., 0 if v == self.voices - 1 else v - 1, None]
            below = voices[..., -1:] if i > 1 else torch.zeros_like(above)
            sounds = (symbols < above) & (symbols > below) & (voices[..., self.order[i - 1], None] > 0)
            logits = logits.masked_fill(~sounds & (symbols > 0), -torch.inf)
        return logits

    def frame_nll(self, frames, mask):
        """Negative log-likelihood of each frame given those before it, summed over voices: (B, T) nats, 0 if masked."""
        voices = data.to_voices(frames, self.voices)  # (B, T, V)
        known, _ = self.read(voices[:, :-1])
        logits = torch.stack([self.voice_logits(i, known, voices) for i in range(self.voices)], 2)  # (B, T, V, 89)
        target = voices[..., self.order]
        return F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view_as(target).sum(-1) * mask

    def nll(self, frames, mask):
        """Negative log-likelihood of each window in nats, first frame included: (B,)."""
        return self.frame_nll(frames, mask).sum(1)

    def forward(self, frames, mask):
        """frames (B, T, 88), mask (B, T) -> loss in nats a frame, and its parts for the log."""
        loss = self.nll(frames, mask).sum() / mask.sum()
        return loss, {"nll": loss.detach()}

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.9, prime=None, melody=None):
        """n new pieces as bool (n, length, 88), frame by frame; with prime, a bool (T, 88) roll, what follows it.

        melody: bool (T, 88); where it sounds, its top note is kept as voice 0 and the other voices are drawn below it.
        """
        self.eval()
        device, V = self.start.device, self.voices
        prime = torch.zeros(0, data.KEYS) if prime is None else torch.as_tensor(prime)
        kept = torch.zeros(length, dtype=torch.long, device=device)
        if melody is not None:
            melody = torch.as_tensor(melody[:length], device=device)
            kept[:len(melody)] = data.to_voices(melody, 1)[:, 0]
        known, state = self.read(data.to_voices(prime.to(device), V).expand(n, -1, -1))
        known = {name: x if name in PAST else x[:, -1:] for name, x in known.items()}
        roll = []
        for t in range(length):
            voices = torch.zeros(n, 1, V, dtype=torch.long, device=device)
            for i, v in enumerate(self.order):
                logits = self.voice_logits(i, known, voices, legal=True)
                voices[..., v] = data.sample_symbols(logits, generator, temperature, top_p)
                if v == 0:
                    voices[..., 0] = torch.where(kept[t] > 0, kept[t], voices[..., 0])
            roll.append(data.from_voices(voices))
            known, state = self.read(data.to_voices(roll[-1], V), state)
        return torch.cat(roll, 1)


@torch.no_grad()
def evaluate(model, pieces):
    """Figures on held-out pieces (bool arrays (T, 88)): nats a frame over whole pieces (nll), without each piece's
    first frame (nll_after_first), and nats a sounding note."""
    model.eval()
    device = next(model.parameters()).device
    total = first = torch.zeros((), device=device)
    for frames, mask in data.whole_pieces(pieces, 8, device):
        nll = model.frame_nll(frames, mask)
        total, first = total + nll.sum(), first + nll[:, 0].sum()
    model.train()
    count = sum(len(piece) for piece in pieces)
    return {"nll": total.item() / count, "nll_after_first": (total - first).item() / (count - len(pieces)),
            "nll_per_note": total.item() / sum(int(piece.sum()) for piece in pieces)}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    model = AttnLSTM(**data.config(AttnLSTM, args)).to(args.device)
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("attn_lstm", args, model, corpus, optimizer=optimizer)

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
        run.add(parts, mask)
        if step % args.eval_every == 0 or step == args.steps:
            valid = evaluate(model, corpus.valid)
            run.log(args.steps, valid, best=valid["nll"])

    run.load_best()
    run.finish(evaluate(model, corpus.test))


def main(argv=None):
    parser = data.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", help="folder of .mid or .midi files, searched below (default: Bach from music21)")
    add("--time-step", type=data.note_value, help="time step of all pieces, such as 1/16 (default: each piece its own)")
    add("--voices", type=data.voice_count, default=4, help="notes at once; 1 is the top note alone")
    add("--window", type=data.positive_int, default=96, help="frames of a training window, and that attention sees")
    add("--transpose", type=int, choices=[0, 1], default=1, help="1 moves training windows by -6..+5 semitones")
    add("--out", default="runs/attn_lstm", help="run folder")
    add("--steps", type=data.positive_int, default=600, help="training steps")
    add("--batch", type=data.positive_int, default=32, help="windows a step")
    add("--lr", type=data.positive, default=5e-3, help="highest learning rate")
    add("--seed", type=data.natural, default=0, help="seed of weights, batches and samples")
    add("--device", type=data.device_name, default="auto", help="cpu, cuda, cuda:1; auto takes cuda where there is one")
    add("--eval-every", type=data.positive_int, default=75, help="steps between log lines, validations, checkpoints")
    add("--resume", action="store_true", help="go on with the run in --out; its schedule is for --steps from there")
    add("--force", action="store_true", help="replace a run that --out holds")
    add("--hidden", type=data.positive_int, default=256, help="units of each LSTM layer and of the heads")
    add("--heads", choices=["chained", "parallel"], default="chained",
        help="chained: each voice knows those chosen before it; parallel: none does, as in the paper")
    add("--attention", choices=["on", "off"], default="on", help="off is the paper's baseline")
    add("--relations", choices=["on", "off"], default="on",
        help="off reads and writes keys alone: no motions, intervals, held notes, beats and votes, as in the paper")
    add("--attention-heads", type=data.positive_int, default=4, help="heads of the attention; must divide --hidden")
    add("--dropout-input", type=data.dropout, default=0.4, help="share of the LSTM's inputs dropped in training")
    add("--dropout-lstm", type=data.dropout, default=0.6, help="share dropped between the LSTM's layers")
    add("--dropout", type=data.dropout, default=0.6, help="share of the context, and of the heads' units, dropped")
    add("--optimizer", choices=["adamw", "adam"], default="adamw",
        help="adamw decays weights apart from the gradient; adam adds the decay to it, as an L2 penalty")
    add("--weight-decay", type=data.non_negative, default=0.5, help="weight decay of the optimizer")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
