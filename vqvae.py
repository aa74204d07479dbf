"""A VQ-VAE over beats of music, and an LSTM prior over its codes (sections 5.4 and 5.5).

A pattern, P frames of V voices, becomes C codes out of K. With C = V a code is a figure of one
voice, counted from its last note: "a step up, then a third down". x_c are the notes that code c
stands for; the codebook has K entries e_k (D), moving averages of the z that choose them:

    z_c = encoder(x_c)                                                  (D)
    k_c = argmin_k |z_c - e_k|^2                                        the nearest entry
    p(x_c | k_c) = softmax(decoder(e_k_c, notes before)), every note    (P, V / C, 89)
    loss = sum_c -log p(x_c | k_c) + beta |z_c - sg(e_k_c)|^2           sg: stop-gradient

argmin has no gradient: z_c gets that of e_k_c, straight through. Then all this stands, and an LSTM
learns the prior p(k_c | all before). To write, it chooses a code, the decoder its notes, and so on.
-log p(k) - log p(x | k) bounds -log p(x) from above.

    python vqvae.py                                     # default run
    python vqvae.py --pattern 4 --codes 1 --window 256  # the paper's patterns: half a bar, one code

Differences from the paper, besides transposed windows: a code is for one voice and beat, as 6 bits
cannot hold half a bar of four. It is counted from the last notes: what is learned at one pitch
holds at all. The decoder chooses notes, not 88 keys independently of each other, which would clash.
The prior reads notes beside codes, and all patterns before, not four. Entries that nothing chooses
start again. Equation (8) adds log p where it must be subtracted.
"""

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # semitones: larger intervals count as this one
STEPS = 2 * SPAN + 2  # classes of an interval
METRE = 16  # frames after which the metre repeats: two bars


class Quantizer(nn.Module):
    """K entries (D), each a moving average (decay: g) of the vectors that choose it (van den Oord
    et al. 2017, A.1). Those chosen less than `restart` times as often as the mean start again."""

    def __init__(self, codebook, dim, decay=0.99, restart=0.1):
        super().__init__()
        self.decay, self.restart = decay, restart
        self.register_buffer("entries", torch.randn(codebook, dim))  # e
        self.register_buffer("counts", torch.full((codebook, 1), 0.01))  # N: of choices
        self.register_buffer("sums", 0.01 * self.entries)  # m: of the vectors that chose

    def forward(self, z):
        """z (..., D) -> the nearest entries' codes k (...) and the entries (..., D)."""
        k = (self.entries.pow(2).sum(-1) - 2 * z @ self.entries.T).argmin(-1)  # |z - e|^2 - |z|^2
        return k, self.entries[k]

    @torch.no_grad()
    def update(self, z, k, real):
        """Move the entries after vectors z (M, D) of codes k (M,). real (M,): 0 for padding."""
        # N <- g N + (1 - g) n, m <- g m + (1 - g) sum z, e = m / N
        chosen = F.one_hot(k, len(self.entries)) * real[:, None]  # (M, K)
        self.counts.lerp_(data.sum_over_processes(chosen.sum(0)[:, None]), 1 - self.decay)
        self.sums.lerp_(data.sum_over_processes(chosen.T @ z), 1 - self.decay)
        # Dead entries start again on vectors far from their own: near a live one they die again.
        far = (z - self.entries[k]).pow(2).sum(-1).nan_to_num(0, 0) * real
        new = z[torch.multinomial(far + 1e-9, len(self.entries), replacement=True)]
        mean, first = self.counts.mean(), data.RANK == 0  # whose new vectors all processes take
        dead = self.counts < self.restart * mean  # (K, 1)
        self.sums = torch.where(dead, data.sum_over_processes(first * mean * new), self.sums)
        self.counts = torch.where(dead, mean, self.counts)
        self.entries = self.sums / self.counts


def interval(a, b):
    """The interval from symbols b up to symbols a as a class 0..STEPS-1: 0 where a rests."""
    return torch.where(a > 0, (a - b).clamp(-SPAN, SPAN) + SPAN + 1, 0)


class OneHotLinear(nn.EmbeddingBag):
    """A linear layer over one-hot columns of so many classes: (..., columns) -> (..., width)."""

    def __init__(self, sizes, width):
        super().__init__(sum(sizes), width, mode="sum")
        nn.init.normal_(self.weight, std=len(sizes) ** -0.5)
        self.register_buffer("first", torch.tensor([0, *sizes[:-1]]).cumsum(0), persistent=False)

    def forward(self, classes):
        rows = (classes + self.first).flatten(0, -2)
        return super().forward(rows).unflatten(0, classes.shape[:-1])


class Choice(nn.Module):
    """Logits of a choice for voice i: of a code, given what the LSTM says, or of notes, given an
    entry; and given the notes before, counted from i's own last one."""

    def __init__(self, i, voices, pattern, inputs, hidden, outputs, dropout):
        super().__init__()
        self.i, n = i, i * pattern
        sizes = [STEPS] * n + [12 * 15 + 1] * n + [STEPS] * (voices + 1) + [data.SYMBOLS]
        self.facts, self.direct = OneHotLinear(sizes, hidden), OneHotLinear(sizes, outputs)
        nn.init.zeros_(self.direct.weight)
        self.context, self.key = nn.Linear(inputs, hidden), nn.Linear(12, hidden)
        self.out = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))

    def forward(self, context, notes, past):
        """context (..., inputs); notes (..., P, V), read up to voice i - 1; past (..., F), see
        VQVAE.past -> (..., outputs)."""
        last, sums, classes, frames = past.split([notes.shape[-1], notes.shape[-1], 12, 1], -1)
        own, now = last[..., self.i, None], notes[..., :self.i]  # (..., 1), (..., P, i)
        mean = ((sums[..., self.i, None] + own) / (frames + 1)).round().long()
        then = torch.cat([last[..., None, :self.i], now[..., :-1, :]], -2)
        # Where a voice stood above this one (12, up to octaves) and its move since (15, up to a
        # fifth): the same move from a fifth or an octave would be parallel.
        moves = 1 + (then - own[..., None]) % 12 * 15 + (now - then).clamp(-7, 7) + 7
        moves = torch.where((now > 0) & (then > 0), moves, 0)
        facts = torch.cat([interval(now, own[..., None]).flatten(-2), moves.flatten(-2),
                           interval(last, own), interval(own, mean), own], -1)
        # The key: how often each pitch class has sounded, from own up.
        classes = classes.gather(-1, (own + torch.arange(12, device=own.device)) % 12).float()
        key = (classes + 1).log() - (classes.mean(-1, keepdim=True) + 1).log()
        hidden = self.context(context) + self.facts(facts) + self.key(key)
        return self.out(hidden) + self.direct(facts)


class VQVAE(nn.Module):
    """Encoder, quantiser, decoder, prior. voices: V; pattern: P; codebook: K; codes: C, divides V;
    dim: D; prior_hidden: H; the others as the flags in main."""

    def __init__(self, voices=4, window=128, pattern=2, codebook=64, codes=4, dim=32, hidden=128,
                 beta=0.25, prior_hidden=256, dropout=0.6, dropout_heads=0.2):
        super().__init__()
        V, P, C, K, H = voices, pattern, codes, codebook, prior_hidden
        self.voices, self.window, self.pattern, self.codes, self.share = V, window, P, C, V // C
        self.beta, self.dropout = beta, dropout
        self.order = [0, V - 1, *range(1, V - 1)][:V]  # of choice: outer voices first
        middle = torch.linspace(52, 33, V).round().long()[self.order]  # of ranges: C5 .. F3
        self.register_buffer("middle", middle, persistent=False)
        self.encoder = nn.Sequential(
            OneHotLinear([STEPS] * P * self.share, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.quantizer = Quantizer(K, dim)
        self.decoder = nn.ModuleList(Choice(i, V, P, dim, hidden, P * STEPS, 0.2) for i in range(V))
        self.start = nn.Parameter(torch.zeros(H))  # stands for the pattern before the first
        sizes = [data.SYMBOLS] * P * V + [STEPS] * P * (2 * V - 1) + [K] * C + [METRE]
        self.listen = OneHotLinear(sizes, H)
        self.lstm = nn.LSTM(H, H, num_layers=2, dropout=dropout, batch_first=True)
        self.prior = nn.ModuleList(
            Choice(i, V, P, H, H, K, dropout_heads) for i in range(0, V, self.share))

    def past(self, notes, before=None):
        """What came before each of N patterns and the next: notes (B, N, P, V), which go on from
        before (B, F) -> (B, N + 1, F), F = 2 V + 13: each voice's last note, the sum of its notes,
        rests being the middle, how often each pitch class has sounded (12), how many frames."""
        V, lines = self.voices, notes.flatten(1, 2)  # (B, T, V)
        if before is None:
            before = F.pad(self.middle, (0, V + 13)).expand(len(notes), -1)
        last = torch.cat([before[:, None, :V], lines], 1)
        time = torch.arange(last.shape[1], device=last.device)[:, None]
        last = last.gather(1, (time * (last > 0)).cummax(1).values)
        classes = (F.one_hot(lines % 12, 12) * (lines > 0)[..., None]).sum(2)
        frame = [torch.where(lines > 0, lines, self.middle), classes, lines[..., :1] * 0 + 1]
        counts = torch.cat([before[:, None, V:], torch.cat(frame, -1)], 1).cumsum(1)
        return torch.cat([last, counts], -1)[:, ::self.pattern]

    def vectors(self, notes, past):
        """What the encoder makes of notes (..., P, V) after their past: z (..., C, D)."""
        steps = interval(notes, past[..., None, :self.voices]).unflatten(-1, (self.codes, -1))
        return self.encoder(steps.transpose(-3, -2).flatten(-2))

    def read(self, frames):
        """frames (B, T, 88) of N = T / P patterns -> notes (B, N, P, V), past of each (B, N, F),
        z (B, N, C, D), codes k (B, N, C) and their entries (B, N, C, D)."""
        notes = data.to_voices(frames, self.voices)[..., self.order]
        notes = notes.unflatten(1, (-1, self.pattern))
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

    def reconstruction(self, entries, notes, past):
        """-log p(x | k) of each frame: entries (B, N, C, D) -> (B, T) nats."""
        logits = [self.note_logits(i, entries, notes, past) for i in range(self.voices)]
        nll = F.cross_entropy(torch.stack(logits, -1).movedim(3, 1), notes, reduction="none")
        return nll.sum(-1).flatten(1)

    def forward(self, frames, mask):
        """The codec's loss: frames (B, T, 88), mask (B, T) -> loss in nats per frame, and its parts
        for the log. In training the codebook moves."""
        notes, past, z, k, entries = self.read(frames)
        real = mask[:, ::self.pattern, None].expand(k.shape)  # (B, N, C)
        # Straight-through: the decoder reads the entries, its gradient goes to z as it is.
        straight = z + (entries - z).detach()
        reconstruction = (self.reconstruction(straight, notes, past) * mask).sum() / mask.sum()
        # Stop-gradient: entries are no parameters, so this draws the encoder alone, towards them.
        commitment = ((z - entries).pow(2).sum(-1) * real).sum() / mask.sum()
        if self.training:
            self.quantizer.update(z.flatten(0, 2), k.flatten(), real.flatten())
        return reconstruction + self.beta * commitment, {
            "reconstruction": reconstruction.detach(), "commitment": commitment.detach()}

    def remember(self, k, notes, past, state=None):
        """What the LSTM says after patterns' codes k (B, N, C), notes and past: (B, N, H), and its
        state; without a state (B, N + 1, H), first after the start. Dropout: a mask per window."""
        moves = interval(notes, past[..., None, :self.voices])
        columns = [notes, moves, interval(notes[..., 1:], notes[..., :-1])]
        beat = (past[..., -1:] + self.pattern) % METRE  # of the next pattern
        heard = self.listen(torch.cat([*(x.flatten(-2) for x in columns), k, beat], -1))
        if state is None:
            heard = torch.cat([self.start.expand(len(heard), 1, -1), heard], 1)
        heard = F.dropout1d(heard.mT, self.dropout * 2 / 3, self.training).mT
        h, state = self.lstm(heard, state)
        return F.dropout1d(h.mT, self.dropout, self.training).mT, state

    def halves(self, frames, mask):
        """The bound's halves: -log p(k) of each pattern (B, N), -log p(x | k) of each frame (B, T),
        in nats; and k (B, N, C). The codec gets no gradient: it stands while the prior learns."""
        with torch.no_grad():
            notes, past, _, k, entries = self.read(frames)
            reconstruction = self.reconstruction(entries, notes, past) * mask
        h, _ = self.remember(k[:, :-1], notes[:, :-1], past[:, :-1])
        prior = sum(F.cross_entropy(prior(h, notes, past).mT, k[..., c], reduction="none")
                    for c, prior in enumerate(self.prior))
        return prior * mask[:, ::self.pattern], reconstruction, k

    def prior_loss(self, frames, mask):
        """The prior's loss in nats per frame, and parts for the log."""
        loss = self.halves(frames, mask)[0].sum() / mask.sum()
        return loss, {"prior": loss.detach()}

    def nll(self, frames, mask):
        """Upper bound on -log p of each window in nats: (B,)."""
        return sum(half.sum(1) for half in self.halves(frames, mask)[:2])

    def write(self, past, k=None, h=None, **draw):
        """The pattern after past (B, F): codes (B, 1, C), notes (B, 1, P, V), the next past (B, F).
        Codes are k, or else drawn from the prior when the LSTM says h (B, H)."""
        notes = past.new_zeros(len(past), self.pattern, self.voices)
        codes = past.new_zeros(len(past), self.codes) if k is None else k
        for i in range(self.voices):
            c = i // self.share
            if k is None and i % self.share == 0:
                codes[:, c] = data.sample_symbols(self.prior[c](h, notes, past), **draw)
            logits = self.note_logits(i, self.quantizer.entries[codes], notes, past)
            notes[..., i] = data.sample_symbols(logits, **draw)
        return codes[:, None], notes[:, None], self.past(notes[:, None], past)[:, -1]

    @torch.no_grad()
    def rebuild(self, frames, codes=None):
        """frames (B, T, 88) -> their codes (B, N, C), or those given, and the likeliest roll, bool
        (B, T, 88). A code is counted from the notes rebuilt so far, not from the real ones: so an
        error does not shift all that follows."""
        notes, past, *_ = self.read(frames)
        past, rebuilt = past[:, 0], []
        for n in range(notes.shape[1]):
            k = self.quantizer(self.vectors(notes[:, n], past))[0] if codes is None else codes[:, n]
            *pattern, past = self.write(past, k, temperature=0)
            rebuilt.append(pattern)
        codes, notes = (torch.cat(parts, 1) for parts in zip(*rebuilt))
        return codes, data.from_voices(notes).flatten(1, 2)

    def encode(self, frames, mask=None):
        """frames (B, T, 88) -> codes (B, N, C)."""
        return self.rebuild(frames)[0]

    def decode(self, codes):
        """codes (B, N, C) -> the likeliest roll, bool (B, T, 88)."""
        frames = self.start.new_zeros(len(codes), codes.shape[1] * self.pattern, data.KEYS)
        return self.rebuild(frames, codes)[1]

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.85, prime=None):
        """n new pieces as bool (n, length, 88), pattern by pattern; with prime, a bool (T, 88)
        roll, what follows it (whole patterns of it are read, its end first)."""
        self.eval()
        prime = torch.zeros(0, data.KEYS) if prime is None else torch.as_tensor(prime)
        prime = prime[len(prime) % self.pattern:].to(self.start.device).expand(n, -1, -1)
        notes, past, _, k, _ = self.read(prime)
        after, state, roll = self.past(notes)[:, -1], None, []
        for _ in data.progress(range(0, length, self.pattern), "sampling patterns"):
            h, state = self.remember(k, notes, past, state)
            past = after[:, None]
            k, notes, after = self.write(after, None, h[:, -1], generator=generator,
                                         temperature=temperature, top_p=top_p)
            roll.append(data.from_voices(notes).flatten(1, 2))
        return torch.cat(roll, 1)[:, :length]


@torch.no_grad()
def evaluate(model, pieces):
    """Figures on held-out pieces (bool (T, 88)), over windows that tile them: the bound (nll) and
    its halves in nats per frame, nats per sounding note, F1 of rebuilt notes, codes' perplexity."""
    model.eval()
    windows, sums = data.Windows(pieces, model.window, model.start.device, hop=model.window), []
    for frames, mask in windows.chunks(64):
        prior, reconstruction, k = model.halves(frames, mask)
        rebuilt = model.rebuild(frames)[1] * mask[..., None]
        used = F.one_hot(k, len(model.quantizer.entries)) * mask[:, ::model.pattern, None, None]
        sums.append((prior.sum(), reconstruction.sum(), (2 * rebuilt * frames).sum(),
                     (rebuilt + frames).sum(), used.sum((0, 1, 2))))
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
        coding = step <= args.steps  # then the codec stands still, and the prior learns its codes
        done, whole = (step, args.steps) if coding else (step - args.steps, args.prior_steps)
        frames, mask = windows.sample(args.batch, args.transpose * (1 - done / whole))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * data.warmup_cosine(done, whole)
        loss, parts = model(frames, mask) if coding else model.prior_loss(frames, mask)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model, mask)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        run.add(parts, mask)
        if step % args.eval_every == 0 or step in (args.steps, steps):
            valid = evaluate(model, corpus.valid)
            run.log(steps, valid, best=None if coding else valid["nll"])

    run.finish(evaluate)


def main(argv=None):
    parser = data.Parser(__doc__, "vqvae", log="nll: bound, prior + reconstruction; f1: rebuilt")
    parser.set_defaults(transpose=0.6667)  # at first; at last all music lies where Bach's does
    add = parser.add_argument
    add("--window", type=data.positive_int, default=128, help="frames of a training window")
    add("--steps", type=data.positive_int, default=600, help="training steps of the codec")
    add("--prior-steps", type=data.positive_int, default=600, help="of the prior, after those")
    add("--batch", type=data.positive_int, default=16, help="windows per step")
    add("--lr", type=data.positive, default=4e-3, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=100, help="steps between checkpoints")
    add("--pattern", type=data.positive_int, default=2, help="frames that are coded together")
    add("--codebook", type=data.positive_int, default=64, help="entries of the codebook")
    add("--codes", type=data.positive_int, default=4, help="codes of a pattern; 4: one per voice")
    add("--dim", type=data.positive_int, default=32, help="dimensions of an entry")
    add("--hidden", type=data.positive_int, default=128, help="units of encoder and decoder")
    add("--beta", type=data.non_negative, default=0.25, help="weight of the commitment")
    add("--prior-hidden", type=data.positive_int, default=256, help="units of the prior")
    add("--dropout", type=data.dropout, default=0.6, help="of what the prior's LSTM says")
    add("--dropout-heads", type=data.dropout, default=0.2, help="of the prior's other units")
    add("--weight-decay", type=data.non_negative, default=0.5, help="AdamW's decoupled decay")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
