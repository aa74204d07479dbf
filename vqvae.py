"""A VQ-VAE over beats of music, and an LSTM prior over its codes (sections 5.4 and 5.5).

A pattern, P frames of V voices, becomes C codes out of K. With C = V a code is a figure of one
voice, counted from its last note: "a step up, then a third down". Of its notes x_c:

    z_c = encoder(x_c)                                             (D)
    k_c = argmin_k |z_c - e_k|^2                                   the nearest of K entries e (K, D)
    p(x_c | k_c) = softmax(decoder(e_k_c, notes before))           of every note (P, V / C, 89)
    p(k_c) = softmax(prior(LSTM(patterns before), notes before))   (K)
    loss = sum_c -log p(x_c | k_c) - log p(k_c) + beta |z_c - sg(e_k_c)|^2

argmin has no gradient: z_c gets that of e_k_c, straight through. sg is stop-gradient: entries are
moving averages of the z that choose them. After --steps all but prior and LSTM stand. The first two
terms bound -log p(x). To write, the prior draws a code, the decoder its notes, and so on.

    python vqvae.py                                     # default run
    python vqvae.py --pattern 4 --codes 1 --window 256  # the paper's patterns: half a bar, one code

Differences from the paper: a code is for one voice and beat (6 bits cannot hold half a bar of four)
and counted from the last note. The decoder chooses notes; 88 independent keys would clash. The
prior reads notes too, and all patterns before, not four. Equation (8) adds log p: it must subtract.
"""

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # semitones: larger intervals count as this one
STEPS = 2 * SPAN + 2  # classes of an interval
METRE = 16  # frames after which the count of beats begins again: two bars


class Quantizer(nn.Module):
    """K entries (D), each a moving average (decay 0.9) of the vectors that choose it (van den Oord
    et al. 2017, A.1). One that nothing in a batch chooses starts again beside one that is."""

    def __init__(self, codebook, dim):
        super().__init__()
        self.register_buffer("entries", torch.randn(codebook, dim))  # e

    def forward(self, z):
        """z (..., D) -> the nearest entries' codes k (...) and the entries (..., D)."""
        k = (self.entries.pow(2).sum(-1) - 2 * z @ self.entries.T).argmin(-1)  # |z - e|^2 - |z|^2
        return k, self.entries[k]

    @torch.no_grad()
    def update(self, z, k, real):
        """Move entries after z (B, N, C, D) with codes k (B, N, C); real (B, N): 0 for padding."""
        chosen = (F.one_hot(k, len(self.entries)) * real[..., None, None]).flatten(0, 2)  # (., K)
        counts = data.sum_over_processes(chosen.sum(0))
        means = data.sum_over_processes(chosen.T @ z.flatten(0, 2)) / counts[:, None]
        near = means[torch.multinomial(counts, len(counts), replacement=True)]
        new = data.sum_over_processes(torch.normal(near, 0.1) * (data.RANK == 0))  # for all
        self.entries = torch.where(counts[:, None] > 0, means.lerp(self.entries, 0.9), new)


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
    """Logits of a choice for voice i: of a code, given what the LSTM says, or of notes, given an
    entry; and given the notes before, counted from i's own last one."""

    def __init__(self, i, voices, pattern, inputs, hidden, outputs, dropout):
        super().__init__()
        self.i, n = i, i * pattern
        sizes = [STEPS] * n + [12 * 15 + 1] * n + [STEPS] * voices + [data.SYMBOLS]
        self.facts, self.context = OneHotLinear(sizes, hidden), nn.Linear(inputs + 12, hidden)
        self.out = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))

    def forward(self, context, notes, past):
        """context (..., inputs); notes (..., P, V), read up to voice i - 1; past (..., V + 13), see
        VQVAE.past -> (..., outputs)."""
        last, tally, _ = past.split([notes.shape[-1], 12, 1], -1)
        own, now = last[..., self.i, None], notes[..., :self.i]  # (..., 1), (..., P, i)
        then = torch.cat([last[..., None, :self.i], now[..., :-1, :]], -2)
        # How far a voice stood from this one (12), and its move since (15): not to be paralleled.
        moves = 1 + (then - own[..., None]) % 12 * 15 + (now - then).clamp(-7, 7) + 7
        moves = torch.where((now > 0) & (then > 0), moves, 0)
        facts = torch.cat([interval(now, own[..., None]).flatten(-2), moves.flatten(-2),
                           interval(last, own), own], -1)
        # How often each pitch class has sounded, from own up: this tells the key.
        tally = tally.gather(-1, (own + torch.arange(12, device=own.device)) % 12).float()
        often = (tally + 1).log() - (tally.mean(-1, keepdim=True) + 1).log()
        return self.out(self.context(torch.cat([context, often], -1)) + self.facts(facts))


class VQVAE(nn.Module):
    """Encoder, quantiser, decoder, prior; the arguments are the flags in main."""

    def __init__(self, voices=4, window=128, pattern=2, codebook=64, codes=4, dim=32, hidden=256,
                 beta=0.25, dropout=0.6, dropout_heads=0.2):
        super().__init__()
        V, P, C, K, H, drop = voices, pattern, codes, codebook, hidden, dropout_heads
        self.voices, self.window, self.pattern, self.codes, self.share = V, window, P, C, V // C
        self.beta, self.dropout = beta, dropout
        self.turn = [0, V - 1, *range(1, V - 1)][:V]  # of choice: outer voices first
        self.register_buffer("middle", torch.linspace(52, 33, V).long()[self.turn])  # before any
        self.encoder = nn.Sequential(OneHotLinear([STEPS] * P * self.share, H), nn.GELU(),
                                     nn.Linear(H, H), nn.GELU(), nn.Linear(H, dim))
        self.quantizer = Quantizer(K, dim)
        self.decoder = nn.ModuleList(Choice(i, V, P, dim, H, P * STEPS, drop) for i in range(V))
        sizes = [data.SYMBOLS] * P * V + [STEPS] * P * (2 * V - 1) + [K] * C + [METRE]
        self.listen = OneHotLinear(sizes, H)
        self.lstm = nn.LSTM(H, H, num_layers=2, dropout=dropout, batch_first=True)
        self.prior = nn.ModuleList(Choice(i, V, P, H, H, K, drop) for i in range(0, V, self.share))

    def past(self, notes):
        """What came before each pattern of notes (B, N, P, V), and the next: last notes of voices
        (V), how often each pitch class has sounded (12), number of frames: (B, N + 1, V + 13)."""
        lines = F.pad(notes.flatten(1, 2), (0, 0, 1, 0))  # (B, T + 1, V), silence at first
        time = torch.arange(lines.shape[1], device=lines.device)[:, None]
        last = lines.gather(1, (time * (lines > 0)).cummax(1).values)
        last = torch.where(last > 0, last, self.middle)
        tally = (F.one_hot(lines % 12, 12) * (lines > 0)[..., None]).sum(2).cumsum(1)
        return torch.cat([last, tally, time.expand_as(lines[..., :1])], -1)[:, ::self.pattern]

    def vectors(self, notes, past):
        """What the encoder makes of notes (..., P, V) after their past: z (..., C, D)."""
        steps = interval(notes, past[..., None, :self.voices]).unflatten(-1, (self.codes, -1))
        return self.encoder(steps.transpose(-3, -2).flatten(-2))

    def read(self, frames):
        """frames (B, T, 88) of N = T / P patterns -> notes (B, N, P, V), past, z (B, N, C, D),
        codes k (B, N, C) and their entries (B, N, C, D)."""
        notes = data.to_voices(frames, self.voices)[..., self.turn].unflatten(1, (-1, self.pattern))
        past = self.past(notes)[:, :-1]
        z = self.vectors(notes, past)
        return notes, past, z, *self.quantizer(z)

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

    def remember(self, k, notes, past, state=None):
        """What the LSTM says after patterns' codes k (B, N, C), notes and past: (B, N, H), and its
        state; without a state (B, N + 1, H), first after nothing. Dropout: one mask a window."""
        moves = interval(notes, past[..., None, :self.voices])
        columns = [notes, moves, interval(notes[..., 1:], notes[..., :-1])]
        beat = (past[..., -1:] + self.pattern) % METRE  # of the next pattern
        heard = self.listen(torch.cat([*(x.flatten(-2) for x in columns), k, beat], -1))
        heard = F.pad(heard, (0, 0, int(state is None), 0)).mT
        h, state = self.lstm(F.dropout1d(heard, self.dropout * 2 / 3, self.training).mT, state)
        return F.dropout1d(h.mT, self.dropout, self.training).mT, state

    def terms(self, frames, mask):
        """Codes k (B, N, C) of frames (B, T, 88); the loss in terms, 0 if masked: -log p(x | k) of
        frames (B, T), -log p(k) and |z - e|^2 of patterns (B, N). In training entries move."""
        notes, past, z, k, entries = self.read(frames)
        # Straight-through: the decoder reads the entries, its gradient goes to z as it is.
        straight = z + (entries - z).detach()
        logits = [self.note_logits(i, straight, notes, past) for i in range(self.voices)]
        nll = F.cross_entropy(torch.stack(logits, -1).movedim(3, 1), notes, reduction="none")
        h, _ = self.remember(k[:, :-1], notes[:, :-1], past[:, :-1])
        prior = sum(F.cross_entropy(head(h, notes, past).mT, k[..., c], reduction="none")
                    for c, head in enumerate(self.prior))
        # Stop-gradient: entries are no parameters, so this draws the encoder alone, towards them.
        commitment, real = (z - entries).pow(2).sum((-2, -1)), mask[:, ::self.pattern]  # (B, N)
        if self.quantizer.training:
            self.quantizer.update(z, k, real)
        return k, {"reconstruction": nll.sum(-1).flatten(1) * mask, "prior": prior * real,
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

    def write(self, notes, k=None, h=None, **draw):
        """Notes (B, N, P, V) and one more pattern: its codes (B, C), and notes (B, N + 1, P, V).
        Codes are k, or else drawn from the prior when the LSTM says h (B, H)."""
        past = self.past(notes)[:, -1]
        new = past.new_zeros(len(past), self.pattern, self.voices)
        codes = past.new_zeros(len(past), self.codes) if k is None else k
        for i in range(self.voices):
            c = i // self.share
            if k is None and i % self.share == 0:
                codes[:, c] = data.sample_symbols(self.prior[c](h, new, past), **draw)
            logits = self.note_logits(i, self.quantizer.entries[codes], new, past)
            new[..., i] = data.sample_symbols(logits, **draw)
        return codes, torch.cat([notes, new[:, None]], 1)

    @torch.no_grad()
    def encode(self, frames, mask=None):
        """frames (B, T, 88) -> codes (B, N, C), after rebuilt notes: errors do not add up."""
        notes, codes = self.read(frames)[0], []
        rebuilt = notes[:, :0]
        for pattern in notes.unbind(1):
            codes.append(self.quantizer(self.vectors(pattern, self.past(rebuilt)[:, -1]))[0])
            _, rebuilt = self.write(rebuilt, codes[-1], temperature=0)
        return torch.stack(codes, 1)

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, N, C) -> the likeliest roll, bool (B, T, 88)."""
        notes = codes.new_zeros(len(codes), 0, self.pattern, self.voices)
        for k in codes.unbind(1):
            _, notes = self.write(notes, k, temperature=0)
        return data.from_voices(notes).flatten(1, 2)

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=0.9, top_p=0.95, prime=None):
        """n new pieces as bool (n, length, 88); with prime, bool (T, 88), what follows it."""
        self.eval()
        draw = {"generator": generator, "temperature": temperature, "top_p": top_p}
        prime = torch.zeros(0, data.KEYS) if prime is None else torch.as_tensor(prime)
        prime = prime[len(prime) % self.pattern:]  # whole patterns of it, its end first
        notes, past, _, k, _ = self.read(prime.to(self.middle.device).expand(n, -1, -1))
        new, state = notes, None
        for _ in data.progress(range(0, length, self.pattern), "sampling patterns"):
            h, state = self.remember(k, new, past, state)
            k, notes = self.write(notes, None, h[:, -1], **draw)
            k, new, past = k[:, None], notes[:, -1:], self.past(notes)[:, -2:-1]
        return data.from_voices(notes).flatten(1, 2)[:, len(prime):][:, :length]


@torch.no_grad()
def evaluate(model, pieces):
    """Figures on held-out pieces (bool (T, 88)), over windows that tile them: the bound (nll) and
    its halves in nats per frame, nats per sounding note, F1 of rebuilt notes, codes' perplexity."""
    model.eval()
    windows, sums = data.Windows(pieces, model.window, model.middle.device, hop=model.window), []
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
        raise data.InputError("--pattern must divide --window, and --codes --voices")
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    model = VQVAE(**data.config(VQVAE, args)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("vqvae", args, model, corpus, optimizer=optimizer)

    steps = args.steps + args.prior_steps
    for step in run.steps(steps):
        moving = step <= args.steps  # then the codec stands, and the prior can learn its codes
        done, whole = (step, args.steps) if moving else (step - args.steps, args.prior_steps)
        for part in (model.encoder, model.quantizer, model.decoder):
            part.train(moving).requires_grad_(moving)
        frames, mask = windows.sample(args.batch, args.transpose * (1 - done / whole))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * data.warmup_cosine(done, whole)
        loss, parts = model(frames, mask)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model, mask)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        run.add(parts, mask)
        if step % args.eval_every == 0 or step in (args.steps, steps):
            valid = evaluate(model, corpus.valid)
            run.log(steps, valid, best=None if moving else valid["nll"])

    run.finish(evaluate)


def main(argv=None):
    parser = data.Parser(__doc__, "vqvae", log="nll: bound, prior + reconstruction; f1: rebuilt")
    parser.set_defaults(transpose=0.6667)  # at first; at last all music lies where Bach's does
    add = parser.add_argument
    add("--window", type=data.positive_int, default=128, help="frames of a training window")
    add("--steps", type=data.positive_int, default=600, help="training steps of all parts")
    add("--prior-steps", type=data.positive_int, default=600, help="of the prior, after those")
    add("--batch", type=data.positive_int, default=16, help="windows per step")
    add("--lr", type=data.positive, default=4e-3, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=100, help="steps between checkpoints")
    add("--pattern", type=data.positive_int, default=2, help="frames that are coded together")
    add("--codebook", type=data.positive_int, default=64, help="entries of the codebook")
    add("--codes", type=data.positive_int, default=4, help="codes of a pattern; 4: one per voice")
    add("--dim", type=data.positive_int, default=32, help="dimensions of an entry")
    add("--hidden", type=data.positive_int, default=256, help="units of a layer")
    add("--beta", type=data.non_negative, default=0.25, help="weight of the commitment")
    add("--dropout", type=data.dropout, default=0.6, help="of what the LSTM says")
    add("--dropout-heads", type=data.dropout, default=0.2, help="of the choices' units")
    add("--weight-decay", type=data.non_negative, default=0.5, help="AdamW's decoupled decay")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
