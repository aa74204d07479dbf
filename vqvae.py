"""A VQ-VAE over patterns of four frames, and an LSTM prior over its codes (sections 5.4 and 5.5; after Bachsformer).

Half a bar of music becomes a few symbols of a learned alphabet, and new music is written in that alphabet:

    z = encoder(x)                  x (4, 88): a pattern;  z (C, D): C vectors a pattern
    k_c = argmin_k |z_c - e_ck|     the nearest entry of slot c's codebook e_c (K, D)
    p(x | k) = Bernoulli(sigmoid(decoder(e_1k1, ..., e_CkC)))        4 x 88 key logits
    loss = -log p(x | k) + beta * sum_c |z_c - sg(e_ck)|^2           sg: stop-gradient

The codebooks follow the encoder by exponential moving averages (van den Oord et al. 2017, appendix A.1). When they
stand, an LSTM learns log p(k): it reads the patterns so far and writes the C codes of the next one after the other,
each given those before it. -log p(k) - log p(x | k) is an upper bound on -log p(x), so the figures compare with the
other models'.

    python vqvae.py --codebook 64                                          # default run
    python vqvae.py --codebook 64 --codes 1 --window 256 --context 4       # the paper's

Differences from the paper:
- C codes a pattern, each with its own codebook, not one: 6 bits cannot hold half a bar of four voices. A code reads its
  own share of the pattern (of eight, one reads two voices in one frame), and the decoder all of them: codes with a
  meaning of their own are far easier to learn for the prior than those of an encoder that mixes everything.
- Equation (8) adds log p where it must be subtracted: the loss above is a negative log-likelihood.
- The prior reads all patterns before, not four (--context 4), and windows of 128 frames: the median piece has 112.
- Transposed windows; codes that die are restarted from encoded patterns.
"""

import torch
from torch import nn
from torch.nn import functional as F

import data

PATTERN = 4  # frames that are coded together


class SlotLinear(nn.Module):
    """A linear layer of its own for each slot: (..., C, inputs) -> (..., C, outputs)."""

    def __init__(self, slots, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(slots, inputs, outputs) / inputs ** 0.5)
        self.bias = nn.Parameter(torch.zeros(slots, outputs))

    def forward(self, x):
        return torch.einsum("...si,sio->...so", x, self.weight) + self.bias


class VQVAE(nn.Module):
    """Encoder, codebooks, decoder (the codec), and the prior over codes.

    voices: V, as the encoder reads; window: frames, a multiple of 4; codebook: K entries a slot; codes: C slots a pattern;
    dim: D; hidden: units of the decoder's layers; beta: weight of the commitment; decay: of the moving averages;
    prior_hidden: units of the prior's LSTM; context: patterns the prior reads, 0 for all; dropout: of the prior.
    """

    def __init__(self, voices=4, window=128, codebook=64, codes=8, dim=32, hidden=512, beta=0.05, decay=0.99,
                 prior_hidden=384, context=0, dropout=0.4):
        super().__init__()
        self.voices, self.window, self.codes, self.codebook_size = voices, window, codes, codebook
        self.beta, self.decay, self.context = beta, decay, context
        # The pattern's V x 4 cells, two neighbouring voices at a time and frame by frame, are dealt out to the C slots.
        order = sorted(range(voices * PATTERN), key=lambda cell: (cell // PATTERN // 2, cell % PATTERN, cell))
        slot = torch.tensor([order.index(cell) * codes // len(order) for cell in range(len(order))])
        reads = (slot.repeat_interleave(data.SYMBOLS) == torch.arange(codes)[:, None]).float()  # (C, V * 4 * 89)
        self.register_buffer("reads", reads[:, None], persistent=False)
        self.cells = nn.Parameter(torch.randn(codes, 128, reads.shape[1]) / (voices * PATTERN) ** 0.5)
        self.encoder = nn.Sequential(nn.GELU(), SlotLinear(codes, 128, 128), nn.GELU(), SlotLinear(codes, 128, dim))
        self.decoder = nn.Sequential(nn.Linear(codes * dim, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, hidden),
                                     nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, PATTERN * data.KEYS))
        nn.init.constant_(self.decoder[-1].bias, -3.0)  # most keys are silent
        self.register_buffer("codebook", torch.zeros(codes, codebook, dim))  # e
        self.register_buffer("counts", torch.zeros(codes, codebook))  # N: moving average of how often an entry is chosen
        self.register_buffer("sums", torch.zeros(codes, codebook, dim))  # m: of the vectors that chose it

        self.embed = nn.Embedding(codes * codebook + 1, 32)  # of a slot's code; the last one stands before the start
        self.lstm = nn.LSTM(codes * 32, prior_hidden, num_layers=2, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.from_past = nn.Linear(prior_hidden, codes * 128)
        self.from_codes = nn.Parameter(torch.randn(codes, 128, codes, 32) / (codes * 32) ** 0.5)
        self.register_buffer("earlier", torch.ones(codes, codes).tril(-1)[:, None, :, None], persistent=False)
        self.to_logits = nn.Parameter(torch.randn(codes, 128, codebook) / 128 ** 0.5)
        self.bias = nn.Parameter(torch.zeros(codes, codebook))

    # ------------------------------------------------------------------------------------------------------- codec

    def vectors(self, frames):
        """frames (B, T, 88) -> what the encoder makes of their patterns: z (N, C, D), N = B * T / 4."""
        cells = data.to_voices(frames, self.voices).view(-1, PATTERN, self.voices).mT  # (N, V, 4)
        cells = F.one_hot(cells, data.SYMBOLS).flatten(1).float()  # (N, V * 4 * 89)
        return self.encoder(F.linear(cells, (self.cells * self.reads).flatten(0, 1)).unflatten(-1, (self.codes, -1)))

    def quantize(self, z):
        """z (N, C, D) -> the nearest entries of each slot's codebook: their indices (N, C), themselves (N, C, D)."""
        distance = self.codebook.pow(2).sum(-1) - 2 * torch.einsum("ncd,ckd->nck", z, self.codebook)  # + |z|^2
        codes = distance.argmin(-1)
        return codes, self.codebook[torch.arange(self.codes, device=z.device), codes]

    @torch.no_grad()
    def follow(self, z, codes, entries, real):
        """Move the codebooks after the vectors z (N, C, D) that chose them, where real (N,) is 1 and not 0.

        Moving averages of van den Oord et al. 2017, appendix A.1: N <- g N + (1-g) n, m <- g m + (1-g) sum z, e = m / N,
        with the counts smoothed (Laplace) as in DeepMind's Sonnet, VectorQuantizerEMA, and not in that appendix.

        Entries that are hardly ever chosen restart on vectors drawn in proportion to the squared distance from the
        entry that serves them, as k-means++ seeds (Arthur and Vassilvitskii 2007): many patterns are equal, and an entry
        on a vector that is served already would die again. The first entries come so too: all start out dead.
        """
        size = self.codebook.shape[1]
        chosen = F.one_hot(codes, size) * real[:, None, None]  # (N, C, K)
        self.counts.lerp_(data.sum_over_processes(chosen.sum(0)), 1 - self.decay)
        self.sums.lerp_(data.sum_over_processes(torch.einsum("nck,ncd->ckd", chosen, z)), 1 - self.decay)
        total = self.counts.sum(-1, keepdim=True)  # (C, 1)
        smooth = (self.counts + 1e-5) / (total + size * 1e-5) * total
        moved = self.sums / smooth[..., None]
        dead = self.counts < 0.1 * total / size  # (C, K)
        far = (z - entries).pow(2).sum(-1) * real[:, None]  # (N, C)
        far = far.nan_to_num(0, 0) + 1e-9  # no longer finite: the next log line will say so
        slots = torch.arange(self.codes, device=z.device)[:, None]
        fresh = data.from_first_process(z[torch.multinomial(far.T, size, replacement=True), slots])  # (C, K, D)
        self.codebook.copy_(torch.where(dead[..., None], fresh, moved))
        self.counts.copy_(torch.where(dead, total / size, self.counts))
        self.sums.copy_(torch.where(dead[..., None], fresh * self.counts[..., None], self.sums))

    def forward(self, frames, mask):
        """The codec's loss. frames (B, T, 88), mask (B, T) -> nats a frame plus commitment, and parts for the log."""
        real = mask[:, ::PATTERN].flatten()
        z = self.vectors(frames)
        codes, entries = self.quantize(z)
        if self.training:
            self.follow(z.detach(), codes, entries, real)
        # Stop-gradient: entries are no parameters, so only the encoder is drawn, towards those that it chose.
        commitment = ((z - entries).pow(2).sum((1, 2)) * real).sum() / mask.sum()
        # Straight-through: the decoder reads the entries, its gradient reaches the encoder as if it had read z.
        logits = self.decoder((z + (entries - z).detach()).flatten(1)).view_as(frames)
        reconstruction = self.bernoulli(logits, frames, mask).sum() / mask.sum()
        return reconstruction + self.beta * commitment, {"reconstruction": reconstruction.detach(),
                                                         "commitment": commitment.detach()}

    @staticmethod
    def bernoulli(logits, frames, mask):
        """-log p of each frame under independent keys: logits, frames (B, T, 88), mask (B, T) -> (B, T) nats."""
        return F.binary_cross_entropy_with_logits(logits, frames, reduction="none").sum(-1) * mask

    @torch.no_grad()
    def encode(self, frames, mask=None):
        """frames (B, T, 88), T a multiple of 4 -> codes, long (B, T / 4, C)."""
        return self.quantize(self.vectors(frames))[0].view(len(frames), -1, self.codes)

    def key_logits(self, codes):
        """codes (B, P, C) -> (B, P * 4, 88) logits of the keys."""
        entries = self.codebook[torch.arange(self.codes, device=codes.device), codes]  # (B, P, C, D)
        return self.decoder(entries.flatten(2)).view(len(codes), -1, data.KEYS)

    def decode(self, codes):
        """codes (B, P, C) -> roll, bool (B, P * 4, 88): in each frame as many of the likeliest keys as are expected.

        Where codes disagree about a voice, no key may reach 1/2; a voice would then be missing.
        """
        p = self.key_logits(codes).sigmoid()
        rank = p.argsort(-1, descending=True).argsort(-1)
        return rank < p.sum(-1, keepdim=True).round()

    # ------------------------------------------------------------------------------------------------------- prior

    def embed_codes(self, codes):
        """codes (B, P, C) -> embeddings (B, P, C, 32), each slot with its own."""
        return self.embed(codes + torch.arange(self.codes, device=codes.device) * self.codebook_size)

    def code_logits(self, past, embedded):
        """past (..., H): the LSTM's output before a pattern; embedded (..., C, 32): its codes -> (..., C, K) logits.

        Slot c reads the codes of the slots before it alone: `earlier` is a strictly lower triangle over slots.
        """
        hidden = self.from_past(self.dropout(past)).unflatten(-1, (self.codes, -1))  # (..., C, 128)
        hidden = hidden + torch.einsum("...se,chse->...ch", embedded, self.from_codes * self.earlier)
        return torch.einsum("...ch,chk->...ck", self.dropout(hidden.relu()), self.to_logits) + self.bias

    def prior_nll(self, codes):
        """-log p of each pattern's codes given the patterns before it: (B, P, C) -> (B, P) nats."""
        embedded = self.embed_codes(codes)
        start = self.embed.weight[-1].expand(len(codes), 1, self.codes, -1)
        past = torch.cat([start, embedded[:, :-1]], 1).flatten(2)  # (B, P, C * 32)
        if self.context:  # each pattern reads exactly the `context` before it, from a fresh state
            past = torch.cat([start.flatten(2).expand(-1, self.context - 1, -1), past], 1)
            past = past.unfold(1, self.context, 1).movedim(-1, 2)  # (B, P, context, C * 32)
            h = self.lstm(past.flatten(0, 1))[0][:, -1].view(*codes.shape[:2], -1)
        else:
            h, _ = self.lstm(past)  # (B, P, H)
        logits = self.code_logits(h, embedded)
        return F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none").view_as(codes).sum(-1)

    def prior_loss(self, frames, mask):
        """The prior's loss, with the codec fixed: nats a frame, and parts for the log."""
        loss = (self.prior_nll(self.encode(frames)) * mask[:, ::PATTERN]).sum() / mask.sum()
        return loss, {"prior": loss.detach()}

    def bound(self, frames, mask):
        """The two halves of the bound in nats a window: -log p(k) and -log p(x | k), (B,) each."""
        codes = self.encode(frames)
        prior = (self.prior_nll(codes) * mask[:, ::PATTERN]).sum(1)
        return prior, self.bernoulli(self.key_logits(codes), frames, mask).sum(1)

    def nll(self, frames, mask):
        """Upper bound on the negative log-likelihood of each window in nats: (B,)."""
        return sum(self.bound(frames, mask))

    def draw_pattern(self, past, generator, temperature, top_p):
        """Draw the C codes of a pattern, slot after slot: past (n, H), the LSTM's output before it -> codes (n, C)."""
        pattern = torch.zeros(len(past), self.codes, dtype=torch.long, device=past.device)
        for slot in range(self.codes):
            logits = self.code_logits(past, self.embed_codes(pattern[:, None])[:, 0])[:, slot]
            pattern[:, slot] = data.sample_symbols(logits, generator, temperature, top_p)
        return pattern

    def contradictions(self, pattern):
        """How many of a pattern's codes (n, C) are not those that its notes have when they are encoded: (n,)."""
        return (self.encode(self.decode(pattern[:, None]).float())[:, 0] != pattern).sum(-1)

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.9, prime=None, tries=8):
        """n new pieces as bool (n, length, 88), pattern by pattern; with prime, a bool (T, 88) roll, what follows it
        (whole patterns of it are read, its end first). temperature and top_p act on the prior.

        Codes that contradict each other are no music: of `tries` draws of a pattern the one with the fewest contradictions
        is kept (notes at once with top_p 1: divergence from Bach 0.12 with one draw, 0.03 with eight).
        """
        self.eval()
        device = self.codebook.device
        past = [self.embed.weight[-1].expand(n, 1, self.codes, -1).flatten(2)] * max(1, self.context)  # (n, 1, C * 32) each
        if prime is not None and len(prime) >= PATTERN:
            prime = torch.as_tensor(prime[len(prime) % PATTERN:], device=device).float()[None]
            past += self.embed_codes(self.encode(prime)).flatten(2).expand(n, -1, -1).split(1, 1)
        state, codes = None, []
        for _ in range(-(-length // PATTERN)):
            if self.context:
                h, _ = self.lstm(torch.cat(past[-self.context:], 1))
            else:
                h, state = self.lstm(torch.cat(past, 1), state)
                past = []
            drawn = self.draw_pattern(h[:, -1].repeat_interleave(tries, 0), generator, temperature, top_p)  # (n * tries, C)
            best = self.contradictions(drawn).view(n, tries).argmin(1)
            codes.append(drawn.view(n, tries, -1).take_along_dim(best[:, None, None], 1))  # (n, 1, C)
            past.append(self.embed_codes(codes[-1]).flatten(2))
        return self.decode(torch.cat(codes, 1))[:, :length]


@torch.no_grad()
def evaluate(model, pieces):
    """Figures on held-out pieces (bool arrays (T, 88)), over windows that tile them: the bound (nll) and its halves
    (prior_nll, reconstruction) in nats a frame, nats a sounding note, the F1 of the rebuilt roll's notes, and the
    codes' perplexity (mean over slots)."""
    model.eval()
    device = model.codebook.device
    prior = decoder = hits = cells = torch.zeros((), device=device)
    used = torch.zeros(model.codes, model.codebook_size, device=device)
    for frames, mask in data.Windows(pieces, model.window, device, hop=model.window).chunks(64):
        parts = model.bound(frames, mask)
        prior, decoder = prior + parts[0].sum(), decoder + parts[1].sum()
        codes = model.encode(frames)
        rebuilt = (model.key_logits(codes) > 0) & (mask[..., None] > 0)  # p > 1/2
        hits, cells = hits + 2 * (rebuilt & (frames > 0)).sum(), cells + rebuilt.sum() + frames.sum()
        used += F.one_hot(codes, model.codebook_size)[mask[:, ::PATTERN] > 0].sum(0)
    model.train()
    count = sum(len(piece) for piece in pieces)
    p = used / used.sum(-1, keepdim=True)
    perplexity = torch.special.entr(p).sum(-1).exp().mean()
    nll = (prior + decoder).item()
    return {"nll": nll / count, "nll_per_note": nll / sum(int(piece.sum()) for piece in pieces),
            "prior_nll": prior.item() / count, "reconstruction": decoder.item() / count,
            "note_f1": (hits / cells).item(), "codebook_perplexity": perplexity.item()}


def train(args):
    """Train the codec for --steps, then the prior for --prior-steps; leaves the run folder that data.Run describes."""
    if args.window % PATTERN:
        raise data.InputError(f"--window {args.window} is no multiple of the {PATTERN} frames of a pattern")
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    args.codes = min(args.codes, args.voices * PATTERN)  # a slot reads at least one voice in one frame
    model = VQVAE(**data.config(VQVAE, args)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("vqvae", args, model, corpus, optimizer=optimizer)

    steps = args.steps + args.prior_steps
    for step in run.steps(steps):
        coding = step <= args.steps  # then the codec stands still, and the prior learns its codes
        frames, mask = windows.sample(args.batch, args.transpose)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (data.warmup_cosine(step, args.steps) if coding else
                                     data.warmup_cosine(step - args.steps, args.prior_steps))
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

    run.load_best()
    run.finish(evaluate(model, corpus.test))


def main(argv=None):
    parser = data.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", help="folder of .mid or .midi files, searched below (default: Bach from music21)")
    add("--time-step", type=data.note_value, help="time step of all pieces, such as 1/16 (default: each piece its own)")
    add("--voices", type=data.voice_count, default=4, help="notes at once; 1 is the top note alone")
    add("--window", type=data.positive_int, default=128, help="frames of a training window, a multiple of 4")
    add("--transpose", type=int, choices=[0, 1], default=1, help="1 moves training windows by -6..+5 semitones")
    add("--out", default="runs/vqvae", help="run folder")
    add("--steps", type=data.positive_int, default=3500, help="training steps of the codec")
    add("--batch", type=data.positive_int, default=16, help="windows a step")
    add("--lr", type=data.positive, default=2e-3, help="highest learning rate")
    add("--seed", type=data.natural, default=0, help="seed of weights, batches and samples")
    add("--device", type=data.device_name, default="auto", help="cpu, cuda, cuda:1; auto takes cuda where there is one")
    add("--eval-every", type=data.positive_int, default=200, help="steps between log lines, validations, checkpoints")
    add("--resume", action="store_true", help="go on with the run in --out; its schedule is for --steps from there")
    add("--force", action="store_true", help="replace a run that --out holds")
    add("--codebook", type=data.positive_int, default=64, help="entries of a slot's codebook (K)")
    add("--codes", type=int, choices=range(1, 9), default=8, help="codes a pattern of four frames (C)")
    add("--dim", type=data.positive_int, default=32, help="dimensions of a codebook entry (D)")
    add("--hidden", type=data.positive_int, default=512, help="units of the decoder's layers")
    add("--beta", type=data.non_negative, default=0.05, help="weight of the commitment")
    add("--decay", type=data.decay, default=0.99, help="of the codebooks' moving averages")
    add("--prior-steps", type=data.positive_int, default=2200, help="training steps of the prior, after the codec's")
    add("--prior-hidden", type=data.positive_int, default=384, help="units of the prior's LSTM layers")
    add("--context", type=data.natural, default=0, help="patterns the prior reads, 0 for all; the paper's is 4")
    add("--dropout", type=data.dropout, default=0.4, help="dropout of the prior")
    add("--weight-decay", type=data.non_negative, default=0.1, help="AdamW's decoupled weight decay")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
