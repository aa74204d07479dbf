"""A VQ-VAE over beats of music, and an LSTM prior over its codes (sections 5.4 and 5.5).

A pattern, P frames of V voices, becomes C codes out of K. With C = V a code is a figure of one
voice, counted from its last note: "a step up, then a third down". Of its notes x_c:

    z_c = encoder(x_c)                                             (D)
    k_c = argmin_k |z_c - e_k|^2                                   the nearest of K entries e (K, D)
    p(x_c | k_c) = softmax(decoder(e_k_c, notes before))           of every note (P, V / C, 89)
    p(k_c) = softmax(prior(LSTM(patterns before), notes before))   (K)
    loss = sum_c -log p(x_c | k_c) - log p(k_c) + beta |z_c - sg(e_k_c)|^2

argmin has no gradient: z_c gets that of e_k_c, straight through. sg is stop-gradient: entries are
moving averages of the z that choose them. The first two terms, and -log p(kind), bound -log p(x).
To write, a code is drawn, the decoder's likeliest notes are taken, and so on.

    python vqvae.py                                     # default run
    python vqvae.py --pattern 4 --codes 1 --window 256  # the paper's patterns: half a bar, one code

Differences from the paper: a code is for one voice and beat; 6 bits cannot hold half a bar of four.
The decoder chooses notes: 88 keys would clash. A kind of piece (data.kind) is drawn first. The
prior reads all patterns before, not four, and their notes. Equation (8) must subtract log p.
"""

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # semitones: larger intervals count as this one
STEPS = 2 * SPAN + 2  # classes of an interval
METRE = 16  # frames after which the count of beats begins again: two bars
MIDDLE = 44  # E4, which stands for a voice's last note before it has one


class Quantizer(nn.Module):
    """K entries (D), each a moving average (decay 0.9) of the vectors that choose it (cf. van den
    Oord et al. 2017, A.1). One that none in a batch chose starts again beside one that some did."""

    def __init__(self, codebook, dim):
        super().__init__()
        self.register_buffer("entries", torch.randn(codebook, dim))  # e

    def forward(self, z, real=None):
        """z (..., C, D) -> the nearest entries' codes k (..., C) and the entries (..., C, D). With
        real (B, N), 0 for padding, which moves none, these move in training."""
        k = (self.entries.pow(2).sum(-1) - 2 * z @ self.entries.T).argmin(-1)  # |z - e|^2 - |z|^2
        found = self.entries[k]
        if self.training and real is not None:
            chosen = (F.one_hot(k, len(self.entries)) * real[..., None, None]).flatten(0, 2)
            counts = data.sum_over_processes(chosen.sum(0))  # (K,)
            means = data.sum_over_processes(chosen.T @ z.detach().flatten(0, 2)) / counts[:, None]
            near = means[torch.multinomial(counts, len(counts), replacement=True)]
            new = data.sum_over_processes(torch.normal(near, 0.1) * (data.RANK == 0))  # rank 0's
            self.entries = torch.where(counts[:, None] > 0, means.lerp(self.entries, 0.9), new)
        return k, found


def interval(a, b):
    """The interval from symbols b up to symbols a as a class 0..STEPS-1: 0 where a rests."""
    return torch.where(a > 0, (a - b).clamp(-SPAN, SPAN) + SPAN + 1, 0)


class OneHotLinear(nn.Embedding):
    """A linear layer over one-hot columns of so many classes: (..., columns) -> (..., width)."""

    def __init__(self, sizes, width):
        super().__init__(sum(sizes), width)
        nn.init.normal_(self.weight, std=len(sizes) ** -0.5)
        self.register_buffer("first", torch.tensor([0, *sizes[:-1]]).cumsum(0), persistent=False)

    def forward(self, classes):
        return super().forward(classes + self.first).sum(-2)


class Choice(nn.Module):
    """Logits for voice i: of its code, given what the LSTM says, or of its notes, given an entry.
    It also reads the notes before, counted from i's last one, and facts of so many classes."""

    def __init__(self, i, voices, pattern, inputs, hidden, outputs, dropout, facts=()):
        super().__init__()
        self.i, n = i, i * pattern
        sizes = [STEPS] * n + [12 * 15 + 1] * n + [STEPS] * voices + [data.SYMBOLS, *facts]
        self.facts, self.context = OneHotLinear(sizes, hidden), nn.Linear(inputs + voices, hidden)
        self.out = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))

    def forward(self, context, notes, past, *facts):
        """context (..., inputs), notes (..., P, V) before i's, VQVAE.past -> (..., outputs)."""
        last, own, now = past[..., :-2], past[..., self.i, None], notes[..., :self.i]
        then = torch.cat([last[..., None, :self.i], now[..., :-1, :]], -2)  # (..., P, i)
        # One of 12 distances of a voice from i's last note, and of its 15 moves: no parallels.
        moves = 1 + (then - own[..., None]) % 12 * 15 + (now - then).clamp(-7, 7) + 7
        moves = torch.where((now > 0) & (then > 0), moves, 0)
        classes = [interval(now, own[..., None]).flatten(-2), moves.flatten(-2),
                   interval(last, own), own, *(x[..., None] for x in facts)]
        context = torch.cat([context, (last - MIDDLE) / 12], -1)  # heights, for rare notes' sake
        return self.out(self.context(context) + self.facts(torch.cat(classes, -1)))


class VQVAE(nn.Module):
    """Encoder, quantiser, decoder, prior; the arguments are the flags in main."""

    def __init__(self, voices=4, window=128, pattern=2, codebook=64, codes=4, dim=32, hidden=256,
                 beta=0.25, dropout=0.6):
        super().__init__()
        V, P, C, K, H, drop = voices, pattern, codes, codebook, hidden, dropout / 3
        self.voices, self.window, self.pattern, self.codes, self.share = V, window, P, C, V // C
        self.beta, self.dropout = beta, dropout
        self.turn = [0, V - 1, *range(1, V - 1)][:V]  # the order of choice: outer voices first
        self.encoder = nn.Sequential(OneHotLinear([STEPS] * P * self.share, H), nn.GELU(),
                                     nn.Linear(H, H), nn.GELU(), nn.Linear(H, dim))
        self.quantizer = Quantizer(K, dim)
        self.decoder = nn.ModuleList(Choice(i, V, P, dim, H, P * STEPS, drop) for i in range(V))
        sizes = ([data.SYMBOLS] * V + [STEPS] * (2 * V - 1)) * P + [K] * C + [METRE, 48]
        self.listen = OneHotLinear(sizes, H)
        self.lstm = nn.LSTM(H, H, num_layers=2, dropout=dropout, batch_first=True)
        self.prior = nn.ModuleList(Choice(i, V, P, H, H, K, drop, [48]) for i in range(V)[::V // C])
        self.register_buffer("kinds", torch.full((48,), 0.1))  # training pieces of each, counted

    def past(self, notes, kind=24):
        """Before each pattern of notes (B, N, P, V), and after all: the voices' last notes (V),
        number of frames, kind (an int or (B, 1, 1)): together (B, N + 1, V + 2)."""
        lines = F.pad(notes.flatten(1, 2), (0, 0, 1, 0))  # (B, T + 1, V), silence at first
        time = torch.arange(lines.shape[1], device=lines.device)[:, None]
        last = lines.gather(1, (time * (lines > 0)).cummax(1).values)
        last = torch.where(last > 0, last, MIDDLE)
        more = (x.expand_as(lines[..., :1]) for x in (time, 0 * time + kind))
        return torch.cat([last, *more], -1)[:, ::self.pattern]

    def vectors(self, notes, past):
        """What the encoder makes of notes (..., P, V) after their past: z (..., C, D)."""
        steps = interval(notes, past[..., None, :self.voices]).unflatten(-1, (self.codes, -1))
        return self.encoder(steps.transpose(-3, -2).flatten(-2))

    def read(self, frames, kind=24, real=None):
        """frames (B, T, 88) of N = T / P patterns -> notes (B, N, P, V), past, z (B, N, C, D),
        codes k (B, N, C) and their entries (B, N, C, D); real (B, N): 0 for padding."""
        notes = data.to_voices(frames, self.voices)[..., self.turn].unflatten(1, (-1, self.pattern))
        past = self.past(notes, kind)[:, :-1]
        z = self.vectors(notes, past)
        return notes, past, z, *self.quantizer(z, real)

    def note_logits(self, i, entries, notes, past):
        """Logits (..., P, 89) of the i-th voice chosen, given the entries. What crosses or doubles
        those before it in notes (..., P, V) has no probability: that of all frames is one."""
        scores = self.decoder[i](entries[..., i // self.share, :], notes, past)
        symbols = torch.arange(data.SYMBOLS, device=past.device)
        steps = interval(symbols, past[..., i, None])[..., None, :]  # from i's last note
        logits = scores.unflatten(-1, (self.pattern, STEPS)).take_along_dim(steps, -1)
        if i:
            above, bass = notes[..., 0 if i < 3 else i - 1, None], notes[..., 1, None]
            fits = (symbols < above) & ((i == 1) | (symbols > bass) & (bass > 0))
            logits = logits.masked_fill(~fits & (symbols > 0), -torch.inf)
        return logits

    def remember(self, k, notes, past):
        """What the LSTM says after each of 0 .. N patterns with codes k (B, N, C), notes and past:
        (B, N + 1, H). Outside nn.LSTM dropout has one mask a window."""
        notes = torch.cat([notes, interval(notes, past[..., None, :self.voices]),
                           interval(notes[..., 1:], notes[..., :-1])], -1).flatten(-2)
        beat, kind = (past[..., -2:-1] + self.pattern) % METRE, past[..., -1:]  # of the next one
        heard = self.listen(torch.cat([notes, k, beat, kind], -1))
        heard = F.dropout1d(F.pad(heard, (0, 0, 1, 0)).mT, self.dropout * 2 / 3, self.training).mT
        return F.dropout1d(self.lstm(heard)[0].mT, self.dropout, self.training).mT

    def code_logits(self, c, h, notes, past):
        """Logits (..., K) of the c-th code, when the LSTM says h (..., H)."""
        last, kind = past[..., c * self.share], past[..., -1]
        return self.prior[c](h, notes, past, (last - kind) % 12 + kind // 12 * 12)  # its degree

    def terms(self, frames, mask):
        """Codes k (B, N, C) of frames (B, T, 88); loss terms, 0 for patterns of padding alone:
        -log p(x | k) (B, T); -log p(k), with its share of -log p(kind), and |z - e|^2 (B, N)."""
        kind, real = data.kind(frames, mask)[:, None], mask[:, ::self.pattern]  # (B, 1), (B, N)
        notes, past, z, k, entries = self.read(frames, kind[..., None], real)
        # Straight-through: the decoder reads the entries, its gradient goes to z as it is.
        straight = z + (entries - z).detach()
        logits = [self.note_logits(i, straight, notes, past) for i in range(self.voices)]
        nll = F.cross_entropy(torch.stack(logits, -1).movedim(3, 1), notes, reduction="none")
        h = self.remember(k[:, :-1], notes[:, :-1], past[:, :-1])
        prior = sum(F.cross_entropy(self.code_logits(c, h, notes, past).mT, k[..., c],
                                    reduction="none") for c in range(self.codes))
        prior = prior - self.kinds.log().log_softmax(0)[kind] / real.sum(1, True).clamp(min=1)
        # Stop-gradient: entries are no parameters, so this draws the encoder alone, towards them.
        commitment = (z - entries).pow(2).sum((-2, -1))  # (B, N)
        nll = nll.sum(-1) * real[..., None]  # (B, N, P)
        return k, {"reconstruction": nll.flatten(1), "prior": prior * real,
                   "commitment": commitment * real}

    def forward(self, frames, mask):
        """frames (B, T, 88), mask (B, T) -> loss in nats per frame, and its parts for the log."""
        parts = {name: x.sum() / mask.sum() for name, x in self.terms(frames, mask)[1].items()}
        loss = parts["reconstruction"] + parts["prior"] + self.beta * parts["commitment"]
        return loss, {name: part.detach() for name, part in parts.items()}

    def nll(self, frames, mask):
        """Upper bound on -log p of each window in nats: (B,)."""
        terms = self.terms(frames, mask)[1]
        return terms["reconstruction"].sum(1) + terms["prior"].sum(1)

    def write(self, notes, k, kind=24, **draw):
        """Notes (B, N, P, V) and one more pattern, the likeliest for the last of k (B, N + 1, C);
        and k. With draw k is (B, N, C): the codes are drawn, as sample_symbols' options say."""
        past = self.past(notes, kind)
        if draw:
            h = self.remember(k, notes, past[:, :-1])[:, -1]
            k = F.pad(k, (0, 0, 0, 1))
        past, codes, new = past[:, -1], k[:, -1], notes.new_zeros(len(k), *notes.shape[2:])
        for i in range(self.voices):
            if draw and i % self.share == 0:
                logits = self.code_logits(i // self.share, h, new, past)
                codes[:, i // self.share] = data.sample_symbols(logits, **draw)
            logits = self.note_logits(i, self.quantizer.entries[codes], new, past)
            logits[..., 0] -= 1e9 * (i == 0) * (past[:, -1:] < 24)  # a kind that does not pause
            new[..., i] = logits.argmax(-1)
        return torch.cat([notes, new[:, None]], 1), k

    @torch.no_grad()
    def encode(self, frames, mask=None):
        """frames (B, T, 88) -> codes (B, N, C), after rebuilt notes: so errors do not add up."""
        notes, k = self.read(frames)[0], frames.new_zeros(len(frames), 0, self.codes).long()
        rebuilt = notes[:, :0]
        for pattern in notes.unbind(1):
            z = self.vectors(pattern, self.past(rebuilt)[:, -1])
            k = torch.cat([k, self.quantizer(z)[0][:, None]], 1)
            rebuilt, _ = self.write(rebuilt, k)
        return k

    @torch.no_grad()
    def decode(self, k):
        """Codes k (B, N, C) -> the likeliest roll, bool (B, T, 88)."""
        notes = k.new_zeros(len(k), 0, self.pattern, self.voices)
        for n in range(k.shape[1]):
            notes, _ = self.write(notes, k[:, :n + 1])
        return data.from_voices(notes).flatten(1, 2)

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=0.9, top_p=0.95, prime=None):
        """n new pieces as bool (n, length, 88); with prime, bool (T, 88), what follows it."""
        self.eval()
        draw = {"generator": generator, "temperature": temperature, "top_p": top_p}
        prime = torch.zeros(0, data.KEYS) if prime is None else torch.as_tensor(prime)
        prime = prime[len(prime) % self.pattern:].to(self.kinds.device)  # its last whole ones
        kind = self.kinds.log().expand(n, -1)  # as likely a one as a pattern, of C codes, must be
        kind = (data.kind(prime).expand(n) if prime.any() else
                data.sample_symbols(kind, generator, temperature, top_p ** self.codes))
        notes, _, _, k, _ = self.read(prime.expand(n, -1, -1), kind[:, None, None])
        for _ in data.progress(range(0, length, self.pattern), "sampling patterns"):
            notes, k = self.write(notes, k, kind[:, None, None], **draw)
        return data.from_voices(notes).flatten(1, 2)[:, len(prime):][:, :length]


@torch.no_grad()
def evaluate(model, pieces):
    """Figures on held-out pieces (bool (T, 88)), over windows that tile them: the bound (nll) and
    its halves in nats per frame, nats per sounding note, F1 of rebuilt notes, codes' perplexity."""
    model.eval()
    windows, sums = data.Windows(pieces, model.window, model.kinds.device, hop=model.window), []
    for frames, mask in windows.chunks(64):
        k, terms = model.terms(frames, mask)
        rebuilt = model.decode(model.encode(frames)) * mask[..., None]
        used = F.one_hot(k, len(model.quantizer.entries)) * mask[:, ::model.pattern, None, None]
        sums.append((terms["prior"].sum(), terms["reconstruction"].sum(),
                     (2 * rebuilt * frames).sum(), (rebuilt + frames).sum(), used.sum((0, 1, 2))))
    model.train()
    *totals, used = (sum(parts) for parts in zip(*sums))
    prior, reconstruction, hits, cells = torch.stack(totals).tolist()
    count, notes = sum(map(len, pieces)), sum(int(piece.sum()) for piece in pieces)
    nll = prior + reconstruction
    return {"nll": nll / count, "nll_per_note": nll / notes, "prior_nll": prior / count,
            "reconstruction": reconstruction / count, "note_f1": hits / max(1, cells),
            "codebook_perplexity": torch.special.entr(used / used.sum()).sum().exp().item()}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    args.codes = min(args.codes, args.voices)
    if args.window % args.pattern or args.voices % args.codes:
        raise data.InputError("--pattern must divide --window, and --codes must divide --voices")
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    model = VQVAE(**data.config(VQVAE, args))
    model.kinds += sum(F.one_hot(data.kind(torch.as_tensor(x)), 48) for x in corpus.train)
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("vqvae", args, model, corpus, optimizer=optimizer)

    for step in run.steps(args.steps):
        frames, mask = windows.sample(args.batch, args.transpose * (1 - step / args.steps))
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
            run.log(args.steps, valid, best=-float(step))  # the last weights write better music

    run.finish(evaluate)


def main(argv=None):
    parser = data.Parser(__doc__, "vqvae", log="nll: bound, prior + reconstruction; f1: rebuilt")
    parser.set_defaults(transpose=0.6667)  # at first; at last all music lies where Bach's does
    add = parser.add_argument
    add("--window", type=data.positive_int, default=128, help="frames of a training window")
    add("--steps", type=data.positive_int, default=1000, help="training steps")
    add("--batch", type=data.positive_int, default=16, help="windows per step")
    add("--lr", type=data.positive, default=4e-3, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=100, help="steps between checkpoints")
    add("--pattern", type=data.positive_int, default=2, help="frames that are coded together")
    add("--codebook", type=data.positive_int, default=64, help="entries of the codebook")
    add("--codes", type=data.positive_int, default=4, help="codes of a pattern; 4: one per voice")
    add("--dim", type=data.positive_int, default=32, help="dimensions of an entry")
    add("--hidden", type=data.positive_int, default=256, help="units of a layer")
    add("--beta", type=data.non_negative, default=0.25, help="weight of the commitment")
    add("--dropout", type=data.dropout, default=0.6, help="of what the LSTM says; less elsewhere")
    add("--weight-decay", type=data.non_negative, default=0.25, help="AdamW's decoupled decay")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
