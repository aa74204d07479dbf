"""A VQ-VAE over beats of music, and an LSTM prior over its codes (sections 5.4 and 5.5).

A pattern, P frames of V voices, becomes C codes; with C = V each says how one voice goes on from
its last note. x_c are the notes of slot c, and to a slot belongs a codebook e_c of K entries (D):

    z_c = encoder_c(x_c)                 from intervals to the voices' last notes: (D)
    k_c = argmin_k |z_c - e_ck|          the nearest entry
    p(x_c | k_c) = decoder_c(e_ck)       one softmax over 89 symbols after the other
    loss = sum_c -log p(x_c | k_c) + beta |z_c - sg(e_ck)|^2              sg: stop-gradient

The codebooks follow the encoder by exponential moving averages (van den Oord et al. 2017, appendix
A.1). When they stand, an LSTM learns the prior p(k_c). To write a pattern the prior chooses the
first code, the decoder its notes, the prior the second code and so on; each knows all notes before.
So -log p(k) - log p(x | k) is an upper bound on -log p(x), to compare with other models' figures.

    python vqvae.py --codebook 64                                                  # default run
    python vqvae.py --codebook 64 --pattern 4 --codes 1 --window 256 --context 4   # the paper's

Differences from the paper:
- A code for each voice and beat, not one for half a bar: 6 bits cannot hold four voices.
- Codes are relative to the last notes: what is learnt at one pitch holds at all.
- The decoder chooses notes, not 88 keys independently of each other, which would clash.
- Equation (8) adds log p where it must be subtracted.
- The prior reads notes beside codes, and all patterns before, not four.
- Transposed windows; entries that nothing chooses start again.
"""

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # intervals are counted up to two octaves
STEPS = 2 * SPAN + 2  # classes of an interval
METRE = 16  # frames after which the metre repeats: two bars


def interval(a, b):
    """The interval from symbols b up to symbols a as a class 0..STEPS-1: 0 where a rests."""
    return torch.where(a > 0, (a - b).clamp(-SPAN, SPAN) + SPAN + 1, 0)


class OneHotLinear(nn.EmbeddingBag):
    """A linear layer over one-hot columns: classes (..., columns) -> (..., width).
    sizes: how many classes each column has."""

    def __init__(self, sizes, width):
        super().__init__(sum(sizes), width, mode="sum")
        nn.init.normal_(self.weight, std=len(sizes) ** -0.5)
        offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("first", offsets, persistent=False)

    def forward(self, classes):
        rows = (classes + self.first).flatten(0, -2)
        return super().forward(rows).unflatten(0, classes.shape[:-1])


class Choice(nn.Module):
    """Logits of a choice for voice v: from a context (inputs), the notes of the voices `written`
    in some frames, all voices' last notes, the tonality and the middle of v's range. Notes are
    relative to v's own last one; so what is learnt at one pitch holds at all."""

    def __init__(self, v, written, frames, voices, inputs, hidden, outputs, dropout):
        super().__init__()
        self.v, self.written, self.voices, n = v, written, voices, len(written) * frames
        sizes = [STEPS] * n + [12 * 15 + 1] * n + [STEPS] * (voices + 1) + [data.SYMBOLS]
        self.near, self.direct = OneHotLinear(sizes, hidden), OneHotLinear(sizes, outputs)
        nn.init.zeros_(self.direct.weight)
        self.context, self.tonality = nn.Linear(inputs, hidden), nn.Linear(12, hidden)
        self.out = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))

    def forward(self, context, own, notes, before, last, sung):
        """context (..., inputs); own (..., 1), v's last note; notes (..., V) or (..., frames, V)
        and before, what the voices sang before; last (..., V); sung, of VQVAE.count ->
        (..., outputs)."""
        notes, before = (torch.stack([x[..., u] for u in self.written], -1).flatten(own.dim() - 1)
                         if self.written else own[..., :0] for x in (notes, before))
        # Where a voice stood above this one (12, up to octaves) and its move since (15, up to a
        # fifth): the same move from a fifth or an octave would be parallel.
        moves = 1 + (before - own) % 12 * 15 + (notes - before).clamp(-7, 7) + 7
        classes, often, total = (x.float() for x in sung.split([12, self.voices, self.voices], -1))
        middle = (total[..., self.v, None] + own) / (often[..., self.v, None] + 1)
        near = torch.cat([interval(notes, own), torch.where(notes > 0, moves, 0),
                          interval(last, own), interval(own, middle.round().long()), own], -1)
        tonality = (classes + 1).log() - (classes.mean(-1, keepdim=True) + 1).log()
        tonality = tonality.gather(-1, (own + torch.arange(12, device=own.device)) % 12)
        hidden = self.context(context) + self.near(near) + self.tonality(tonality)
        return self.out(hidden) + self.direct(near)


class Quantizer(nn.Module):
    """C codebooks of K entries (D). decay: g, of the moving averages; restart: entries chosen less
    often than this share of the mean start again, 0 for never."""

    def __init__(self, slots, size, dim, decay, restart):
        super().__init__()
        self.decay, self.restart = decay, restart
        self.register_buffer("entries", torch.randn(slots, size, dim))  # e
        self.register_buffer("counts", torch.full((slots, size, 1), 0.01))  # N: of choices
        self.register_buffer("sums", 0.01 * self.entries)  # m: of the vectors that chose

    def forward(self, z):
        """z (B, N, C, D) -> the codes k (B, N, C) and their entries (B, N, C, D)."""
        products = torch.einsum("bncd,ckd->bnck", z, self.entries)
        k = (self.entries.pow(2).sum(-1) - 2 * products).argmin(-1)  # |e|^2 - 2 z e, + |z|^2
        return k, self.entries[torch.arange(len(self.entries), device=z.device), k]

    @torch.no_grad()
    def follow(self, z, k, real):
        """Move the entries after the vectors z (M, C, D) that chose them, where real (M, 1) is 1:
        N <- g N + (1 - g) n, m <- g m + (1 - g) sum z, e = m / N."""
        chosen = F.one_hot(k, self.counts.shape[1]) * real[..., None]  # (M, C, K)
        sums = torch.einsum("mck,mcd->ckd", chosen, z)
        self.counts.lerp_(data.sum_over_processes(chosen.sum(0)[..., None]), 1 - self.decay)
        self.sums.lerp_(data.sum_over_processes(sums), 1 - self.decay)
        self.entries.copy_(self.sums / self.counts.clamp(min=1e-9))

    @torch.no_grad()
    def revive(self, z, far):
        """Start dead entries again on vectors z (M, C, D), drawn in proportion to far (M, C), the
        squared distance from their entry, as k-means++ seeds (Arthur and Vassilvitskii 2007):
        many vectors are alike, and where one is served well a new entry would die again."""
        mean = self.counts.mean(1, keepdim=True)  # (C, 1, 1)
        dead = self.counts < self.restart * mean  # (C, K, 1)
        drawn = torch.multinomial(far.nan_to_num(0, 0).T + 1e-9, self.counts.shape[1], True)
        fresh = z.transpose(0, 1).take_along_dim(drawn[..., None], 1)  # (C, K, D)
        fresh = data.from_first_process(fresh.contiguous())
        for held, new in (self.entries, fresh), (self.sums, fresh * mean), (self.counts, mean):
            held.copy_(torch.where(dead, new, held))


class VQVAE(nn.Module):
    """Encoder, quantiser, decoder, and the prior over codes.

    voices: V; window: frames of a training window; pattern: P frames; codebook: K; codes: C, which
    divides V; dim: D, which P divides; hidden: units of encoder and decoder; beta: weight of the
    commitment; decay, restart: see Quantizer; prior_hidden: H; context: patterns that the LSTM
    reads, 0 for all; dropout: of the prior.
    """

    def __init__(self, voices=4, window=128, pattern=2, codebook=64, codes=4, dim=32, hidden=128,
                 beta=0.25, decay=0.99, restart=0.1, prior_hidden=256, context=0, dropout=0.6):
        super().__init__()
        V, P, C, K, H = voices, pattern, codes, codebook, prior_hidden
        self.voices, self.window, self.pattern, self.codes, self.codebook = V, window, P, C, K
        self.beta, self.context, self.dropout = beta, context, dropout
        self.order = [0, V - 1, *range(1, V - 1)][:V]  # outer voices first: they decide the others
        self.slots = [self.order[c * V // C:(c + 1) * V // C] for c in range(C)]  # their voices
        middle = torch.linspace(52, 33, V).round().long()  # symbols of C5 .. F3: before a voice's
        self.register_buffer("middle", middle, persistent=False)  # first note it goes on from here
        self.register_buffer("symbols", torch.arange(data.SYMBOLS), persistent=False)

        self.encoder = nn.ModuleList(nn.Sequential(
            OneHotLinear([STEPS] * P * len(slot), hidden), nn.GELU(), nn.Linear(hidden, hidden),
            nn.GELU(), nn.Linear(hidden, dim)) for slot in self.slots)
        self.quantizer = Quantizer(C, K, dim, decay, restart)
        self.decoder = nn.ModuleList(
            Choice(v, self.order[:i], 1, V, dim // P, hidden, data.SYMBOLS + STEPS, 0.2)
            for i, v in enumerate(self.order))
        self.start = nn.Parameter(torch.zeros(H))  # read before the first pattern
        sizes = [data.SYMBOLS] * P * V + [STEPS] * P * (2 * V - 1) + [K] * C + [METRE]
        self.listen = OneHotLinear(sizes, H)
        self.lstm = nn.LSTM(H, H, num_layers=2, dropout=dropout, batch_first=True)
        self.prior = nn.ModuleList(
            Choice(slot[0], self.order[:c * V // C], P, V, H, H, K, dropout)
            for c, slot in enumerate(self.slots))

    def read(self, frames):
        """frames (B, T, 88) -> what is known of their N = T / P patterns: notes (B, N, P, V);
        before, what each voice sang before each of them; last, before the pattern (B, N, V); sung,
        what count() gives of all notes before the pattern (B, N, 12 + 2V)."""
        voices = data.to_voices(frames, self.voices)  # (B, T, V)
        time = torch.arange(1, frames.shape[1] + 1, device=frames.device)[:, None]
        at = F.pad(torch.where(voices > 0, time, 0), (0, 0, 1, -1)).cummax(1).values
        before = torch.cat([self.middle.expand(len(frames), 1, -1), voices], 1).gather(1, at)
        notes, before = (x.unflatten(1, (-1, self.pattern)) for x in (voices, before))
        sung = F.pad(self.count(notes).cumsum(1), (0, 0, 1, -1))
        return notes, before, before[:, :, 0], sung

    @staticmethod
    def count(notes):
        """Of notes (..., P, V), how many have each pitch class, how many each voice has, and the
        sums of each voice's: (..., 12 + 2V)."""
        classes = (F.one_hot(notes % 12, 12) * (notes > 0)[..., None]).sum((-3, -2))
        return torch.cat([classes, (notes > 0).sum(-2), notes.sum(-2)], -1)

    # -------------------------------------------------------------------------------------- codec

    def vectors(self, notes, last):
        """notes (B, N, P, V), last (B, N, V) -> z (B, N, C, D)."""
        steps = interval(notes, last[..., None, :])
        return torch.stack([encoder(torch.cat([steps[..., v] for v in slot], -1))
                            for encoder, slot in zip(self.encoder, self.slots)], -2)

    def note_logits(self, i, entry, notes, before, last, sung):
        """Logits (..., 89) of the i-th voice in the order: entry (..., D / P), its frame's part of
        its code's entry; notes, before, last (..., V), sung: see read(). Notes that cross
        or double the voices before have no probability: that of all frames together is one."""
        v, own = self.order[i], before[..., self.order[i], None]
        logits = self.decoder[i](entry, own, notes, before, last, sung)
        absolute, relative = logits.split([data.SYMBOLS, STEPS], -1)
        logits = absolute + relative.gather(-1, interval(self.symbols, own))
        if i:
            above = notes[..., 0 if v == self.voices - 1 else v - 1, None]
            below = notes[..., -1:] if i > 1 else torch.zeros_like(above)
            fits = (self.symbols < above) & (self.symbols > below)
            fits = fits & (notes[..., self.order[i - 1], None] > 0)  # else it rests too
            logits = logits.masked_fill(~fits & (self.symbols > 0), -torch.inf)
        return logits

    def reconstruction(self, entries, notes, before, last, sung):
        """-log p(x | k) of each frame: entries (B, N, C, D) -> (B, T) nats."""
        entries, nll = entries.unflatten(-1, (self.pattern, -1)), 0  # (B, N, C, P, D / P)
        last, sung = (x[:, :, None].expand(-1, -1, self.pattern, -1) for x in (last, sung))
        for i, v in enumerate(self.order):
            entry = entries[:, :, i * self.codes // self.voices]
            logits = self.note_logits(i, entry, notes, before, last, sung)
            nll = nll + F.cross_entropy(logits.movedim(-1, 1), notes[..., v], reduction="none")
        return nll.flatten(1)

    def forward(self, frames, mask):
        """The codec's loss. frames (B, T, 88), mask (B, T) -> nats per frame plus commitment, and
        parts for the log. In training the codebooks move."""
        music, real = self.read(frames), mask[:, ::self.pattern, None]  # (B, N, 1)
        z = self.vectors(music[0], music[2])
        k, entries = self.quantizer(z)
        # Stop-gradient: entries are no parameters, so this draws the encoder alone, towards them.
        far = (z - entries).pow(2).sum(-1) * real  # (B, N, C)
        commitment = far.sum() / mask.sum()
        # Straight-through: the decoder reads the entries; its gradient reaches the encoder as if
        # it had read z.
        straight = z + (entries - z).detach()
        reconstruction = (self.reconstruction(straight, *music) * mask).sum() / mask.sum()
        if self.training:
            vectors = z.detach().flatten(0, 1)
            self.quantizer.follow(vectors, k.flatten(0, 1), real.flatten(0, 1))
            self.quantizer.revive(vectors, far.detach().flatten(0, 1))
        return reconstruction + self.beta * commitment, {
            "reconstruction": reconstruction.detach(), "commitment": commitment.detach()}

    # -------------------------------------------------------------------------------------- prior

    def hear(self, notes, last, k, first=0):
        """What the LSTM reads of patterns: notes (B, N, P, V), last (B, N, V), k (B, N, C) ->
        (B, N, H). first: the number of the first of them in its piece."""
        beat = (torch.arange(1, k.shape[1] + 1, device=k.device) + first) * self.pattern % METRE
        chords = interval(notes[..., :-1], notes[..., 1:])
        classes = [x.flatten(2) for x in (notes, interval(notes, last[:, :, None]), chords)]
        return self.listen(torch.cat([*classes, k, beat[:, None].expand(len(k), -1, 1)], -1))

    def remember(self, heard, state=None):
        """The LSTM over what was heard (B, N, H): outputs (B, N, H), state. With a context each
        output comes from so many patterns alone. Dropout has one mask for a whole window (Gal and
        Ghahramani 2016)."""
        if self.context:
            start = self.start.expand(len(heard), self.context - 1, -1)
            heard = torch.cat([start, heard], 1).unfold(1, self.context, 1).mT
            h = self.lstm(heard.flatten(0, 1))[0][:, -1].unflatten(0, heard.shape[:2])
        else:
            heard = F.dropout1d(heard.mT, self.dropout * 2 / 3, self.training).mT
            h, state = self.lstm(heard, state)
        return F.dropout1d(h.mT, self.dropout, self.training).mT, state

    def code_logits(self, c, h, notes, before, last, sung):
        """Logits (..., K) of slot c's code: h (..., H), the rest as in read(). Of the pattern's
        notes (..., P, V) only the slots before are read."""
        return self.prior[c](h, last[..., self.slots[c][0], None], notes, before, last, sung)

    def prior_nll(self, k, notes, before, last, sung):
        """-log p(k) of each pattern: k (B, N, C) -> (B, N) nats."""
        heard = self.hear(notes[:, :-1], last[:, :-1], k[:, :-1])
        h, _ = self.remember(torch.cat([self.start.expand(len(k), 1, -1), heard], 1))
        return sum(F.cross_entropy(self.code_logits(c, h, notes, before, last, sung).mT, k[..., c],
                                   reduction="none") for c in range(self.codes))

    def halves(self, frames, mask):
        """The bound's halves, -log p(k) and -log p(x | k), in nats per window (B,), and k. No
        gradient for the codec, which stands still while the prior learns."""
        music = self.read(frames)
        with torch.no_grad():
            k, entries = self.quantizer(self.vectors(music[0], music[2]))
            reconstruction = (self.reconstruction(entries, *music) * mask).sum(1)
        return (self.prior_nll(k, *music) * mask[:, ::self.pattern]).sum(1), reconstruction, k

    def prior_loss(self, frames, mask):
        """The prior's loss in nats per frame, and parts for the log."""
        loss = self.halves(frames, mask)[0].sum() / mask.sum()
        return loss, {"prior": loss.detach()}

    def nll(self, frames, mask):
        """Upper bound on -log p of each window in nats: (B,)."""
        return sum(self.halves(frames, mask)[:2])

    # ------------------------------------------------------------------------------------ writing

    def write(self, last, sung, choose_code, choose_note):
        """Write a pattern slot by slot after last (n, V) and sung: choose_code(c, what is
        known) gives codes (n,), choose_note(logits) notes (n,). Gives k (n, C), notes (n, P, V),
        and the next pattern's last and sung."""
        notes, k = last.new_zeros(len(last), self.pattern, self.voices), []
        before = last[:, None].repeat(1, self.pattern, 1)
        for c, slot in enumerate(self.slots):
            k.append(choose_code(c, notes, before, last, sung))
            entry = self.quantizer.entries[c, k[c]].unflatten(-1, (self.pattern, -1))
            for t in range(self.pattern):
                for v in slot:
                    note = notes[:, t, v] = choose_note(self.note_logits(
                        self.order.index(v), entry[:, t], notes[:, t], before[:, t], last, sung))
                    before[:, t + 1:, v] = torch.where(note > 0, note, before[:, t, v])[:, None]
        last = torch.where(notes[:, -1] > 0, notes[:, -1], before[:, -1])
        return torch.stack(k, -1), notes, last, sung + self.count(notes)

    @torch.no_grad()
    def rebuild(self, frames, codes=None):
        """frames (B, T, 88) -> their codes (B, N, C) and the likeliest notes of these, bool (B, T,
        88). A code is relative to the notes rebuilt so far, not to the real ones: so an error does
        not shift all that follows. With codes those are taken, and of frames nothing is read."""
        notes, _, last, sung = self.read(frames)
        last, sung, ks, roll = last[:, 0], sung[:, 0], [], []
        for n in range(notes.shape[1]):
            k = (self.quantizer(self.vectors(notes[:, n:n + 1], last[:, None]))[0][:, 0]
                 if codes is None else codes[:, n])
            _, now, last, sung = self.write(last, sung, lambda c, *_: k[:, c],
                                            lambda logits: logits.argmax(-1))
            ks, roll = ks + [k], roll + [data.from_voices(now)]
        return torch.stack(ks, 1), torch.cat(roll, 1)

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
        frames = prime[len(prime) % self.pattern:].to(self.start.device).float()
        frames = F.pad(frames, (0, 0, 0, self.pattern)).expand(n, -1, -1)  # and one to write
        notes, _, last, sung = self.read(frames)
        k, _ = self.quantizer(self.vectors(notes, last))
        heard = self.hear(notes, last, k)[:, :-1]
        heard = torch.cat([self.start.expand(n, 1, -1), heard], 1)
        (h, state), last, sung = self.remember(heard), last[:, -1], sung[:, -1]

        def draw(logits):
            return data.sample_symbols(logits, generator, temperature, top_p)

        roll = []
        numbers = range(k.shape[1] - 1, k.shape[1] - 1 - (-length // self.pattern))
        for number in data.progress(numbers, "sampling patterns"):
            k, notes, after, sung = self.write(
                last, sung, lambda c, *known: draw(self.code_logits(c, h[:, -1], *known)), draw)
            new = self.hear(notes[:, None], last[:, None], k[:, None], number)
            heard, last = torch.cat([heard, new], 1)[:, -max(1, self.context):], after
            h, state = self.remember(heard, state)
            roll.append(data.from_voices(notes))
        return torch.cat(roll, 1)[:, :length]


@torch.no_grad()
def evaluate(model, pieces):
    """Figures on held-out pieces (bool (T, 88)), over windows that tile them: the bound (nll) and
    its halves (prior_nll, reconstruction) in nats per frame, nats per sounding note, the F1 of the
    rebuilt roll's notes, and the codes' perplexity (mean over slots)."""
    model.eval()
    device = model.start.device
    prior = decoder = hits = cells = torch.zeros((), device=device)
    used = torch.zeros(model.codes, model.codebook, device=device)
    for frames, mask in data.Windows(pieces, model.window, device, hop=model.window).chunks(64):
        parts = model.halves(frames, mask)
        prior, decoder = prior + parts[0].sum(), decoder + parts[1].sum()
        real = mask[:, ::model.pattern, None, None]
        used += (F.one_hot(parts[2], model.codebook) * real).sum((0, 1))
        rebuilt = model.rebuild(frames)[1] & (mask[..., None] > 0)
        hits = hits + 2 * (rebuilt & (frames > 0)).sum()
        cells = cells + rebuilt.sum() + frames.sum()
    model.train()
    count, notes = sum(map(len, pieces)), sum(int(piece.sum()) for piece in pieces)
    nll, p = (prior + decoder).item(), used / used.sum(-1, keepdim=True)
    return {"nll": nll / count, "nll_per_note": nll / notes, "prior_nll": prior.item() / count,
            "reconstruction": decoder.item() / count, "note_f1": (hits / cells).item(),
            "codebook_perplexity": torch.special.entr(p).sum(-1).exp().mean().item()}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    args.codes = min(args.codes, args.voices)
    if args.window % args.pattern or args.voices % args.codes or args.dim % args.pattern:
        raise data.InputError("--pattern must divide --window and --dim, and --codes --voices")
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    model = VQVAE(**data.config(VQVAE, args)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("vqvae", args, model, corpus, optimizer=optimizer)

    steps = args.steps + args.prior_steps
    for step in run.steps(steps):
        coding = step <= args.steps  # then the codec stands still, and the prior learns its codes
        frames, mask = windows.sample(args.batch, args.transpose)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (
                data.warmup_cosine(step, args.steps) if coding else
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
    parser = data.Parser(__doc__, run="vqvae", log=(
        "nll, the bound in nats per frame, prior plus reconstruction; f1 of rebuilt notes"))
    add = parser.add_argument
    add("--window", type=data.positive_int, default=128, help="frames of a training window")
    add("--steps", type=data.positive_int, default=500, help="training steps of the codec")
    add("--prior-steps", type=data.positive_int, default=700, help="of the prior, after those")
    add("--batch", type=data.positive_int, default=16, help="windows per step")
    add("--lr", type=data.positive, default=4e-3, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=100, help="steps between checkpoints")
    add("--pattern", type=data.positive_int, default=2, help="frames that are coded together")
    add("--codebook", type=data.positive_int, default=64, help="entries of each codebook")
    add("--codes", type=data.positive_int, default=4, help="codes of a pattern; 4: one per voice")
    add("--dim", type=data.positive_int, default=32, help="dimensions of an entry")
    add("--hidden", type=data.positive_int, default=128, help="units of encoder and decoder")
    add("--beta", type=data.non_negative, default=0.25, help="weight of the commitment")
    add("--decay", type=data.decay, default=0.99, help="of the codebooks' moving averages")
    add("--restart", type=data.probability, default=0.1, help="share of the mean use to live on")
    add("--prior-hidden", type=data.positive_int, default=256, help="units of the prior")
    add("--context", type=data.natural, default=0, help="patterns the LSTM reads; 0: all")
    add("--dropout", type=data.dropout, default=0.6, help="of the prior")
    add("--weight-decay", type=data.non_negative, default=1.0, help="AdamW's decoupled decay")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
