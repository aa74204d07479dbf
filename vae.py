"""A recurrent variational autoencoder of windows of music (section 5.2 of the paper).

A window x of N frames (N, 88) has a latent vector z (Z). An encoder reads the window both ways, a
decoder writes it frame by frame from z and from the frames before:

    q(z | x) = N(mu(x), diag sigma(x)^2)           bidirectional LSTM, linear to mu, log sigma^2
    z = mu + sigma * epsilon, epsilon ~ N(0, I)    the reparametrisation trick
    h_t = LSTM(x_<t, z)                            (H), the first state is linear in z
    p(x_t | x_<t, z) = prod_v p(voice v | h_t, z, x_t-1, the voices chosen before v)
    -log p(x) <= E_q [- sum_t log p(x_t | x_<t, z)] + KL(q(z | x) || N(0, I))
                 reconstruction + KL: the bound

    python vae.py                         # default run; --beta 0.3: z holds nearly all notes
    python vae.py --latent 0 --drop 0.1   # no z: what the decoder does alone
    python vae.py --paper --voices 1      # the paper's; --rec-mean: as its code had it

Differences from the paper, whose latents collapsed (KL to 0: the decoder did not listen to z):
- The bound sums over frames, voices and dimensions. The study's code averaged the reconstruction
  over notes but summed the KL, which weighs the KL N times too much: --rec-mean.
- Each segment of S frames has a share of z, with the same weights in all segments: what is learned
  from one helps in all. z itself is the cosine transform of the shares (class Encoder).
- The decoder reads true frames, not its own softmax. In training each window has a random share of
  them blanked, from none to --drop: what the decoder cannot read, z must say.
- The KL weighs --beta: at 1 the decoder does nearly without z. The reported bound weighs it 1.
- Voices are chosen one after the other (class Heads). The rest is as in lstm.py.
"""

import math
import sys
import warnings

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # semitones: the largest interval that the heads tell apart


def relative(scores, symbol):
    """Scores of intervals from a symbol (..., 2 * SPAN + 1), -SPAN first -> scores of all symbols
    (..., 89): none for the rest, none at all where the symbol (...) is a rest."""
    symbols = torch.arange(data.SYMBOLS, device=symbol.device)
    steps = (symbols - symbol[..., None]).clamp(-SPAN, SPAN) + SPAN
    return scores.gather(-1, steps) * ((symbols > 0) & (symbol[..., None] > 0))


class Heads(nn.Module):
    """The voices of a frame, chosen one after the other, outer voices first, a head each.

    A head scores symbols, intervals from its voice's last note and from each chosen voice, and the
    note that would move in parallel with a chosen voice, by the interval between the two. Notes
    that cross or double a chosen voice get no mass, so the likelihood of a frame is exact.
    """

    def __init__(self, voices, inputs, hidden, dropout):
        super().__init__()
        self.order = [0, voices - 1, *range(1, voices - 1)][:voices]
        self.pitch = nn.Embedding(data.SYMBOLS, 32)
        self.sizes = [[data.SYMBOLS, 2 * SPAN + 1, *[2 * SPAN + 1, 12] * i] for i in range(voices)]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs + 32 * i, hidden), nn.ReLU(), nn.Dropout(dropout),
                          nn.Linear(hidden, sum(sizes))) for i, sizes in enumerate(self.sizes))

    def logits(self, i, x, last, voices):
        """Logits (B, T, 89) of the i-th voice in order, from what the decoder knows, x (B, T, .),
        the voices of the frame before, last (B, T, V), and the chosen ones in voices (B, T, V)."""
        v, chosen = self.order[i], self.order[:i]
        x = torch.cat([x, *(self.pitch(voices[..., u]) for u in chosen)], -1)
        logits, motion, *pairs = self.heads[i](x).split(self.sizes[i], -1)
        logits = logits + relative(motion, last[..., v])
        for u, harmony, parallel in zip(chosen, pairs[::2], pairs[1::2]):
            now, then, own = voices[..., u], last[..., u], last[..., v]
            along = (own + now - then).clamp(0, data.KEYS)  # the note that keeps the interval
            moves = (now > 0) & (then > 0) & (own > 0) & (now != then)
            score = parallel.gather(-1, ((then - own) % 12)[..., None]) * moves[..., None]
            logits = (logits + relative(harmony, now)).scatter_add(-1, along[..., None], score)
        if i:
            symbols = torch.arange(data.SYMBOLS, device=x.device)
            above = voices[..., 0 if i == 1 else v - 1, None]  # where it rests, so does this voice
            below = voices[..., -1:] if i > 1 else torch.zeros_like(above)
            fits = (symbols < above) & (symbols > below) & ((i != 2) | (below > 0))
            logits = logits.masked_fill(~fits & (symbols > 0), -torch.inf)
        return logits

    def draw(self, x, last, generator=None, temperature=1.0, top_p=1.0):
        """The voices of frames, drawn: (B, T, V)."""
        voices = torch.zeros_like(last)
        for i, v in enumerate(self.order):
            logits = self.logits(i, x, last, voices)
            voices[..., v] = data.sample_symbols(logits, generator, temperature, top_p)
        return voices


class Encoder(nn.Module):
    """q(z | x): frames (B, T, 88), mask (B, T), T <= window -> mu, log sigma^2, each (B, Z).

    A linear layer reads each segment. The cosine transform over segments turns what the U segments
    have in common, as the key, into one number instead of U: cheaper to say, and agreed among
    segments when z is drawn from N(0, I). features 0: the LSTM's two last states (the paper's).
    """

    def __init__(self, window, segment, hidden, latent, features):
        super().__init__()
        self.window, self.segments = window, window // segment if features else 1
        self.lstm = nn.LSTM(data.KEYS, hidden, batch_first=True, bidirectional=True)
        for weight in (self.lstm.weight_ih_l0, self.lstm.weight_ih_l0_reverse):
            nn.init.normal_(weight, std=0.5)  # four of 88 inputs are on; PyTorch expects all
        self.reduce = nn.Linear(2 * hidden + data.KEYS, features) if features else None
        self.out = nn.Linear(segment * features or 2 * hidden, 2 * latent // self.segments)
        self.bias = nn.Parameter(torch.zeros(self.segments, 2 * latent // self.segments))
        u = torch.arange(self.segments)
        waves = (math.pi / len(u) * (u + 0.5) * u[:, None]).cos() * (2 / len(u)) ** 0.5
        waves[0] /= 2 ** 0.5  # now orthonormal
        self.register_buffer("waves", waves, persistent=False)  # (U, U), slowest first

    def forward(self, frames, mask):
        frames = F.pad(frames * mask[..., None], (0, 0, 0, self.window - frames.shape[1]))
        h, (last, _) = self.lstm(frames)  # (B, N, 2E), (2, B, E)
        h = self.reduce(torch.cat([h, frames], -1)).relu() if self.reduce else last.transpose(0, 1)
        shares = self.out(h.reshape(len(frames), self.segments, -1))  # (B, U, 2 Z / U)
        mu, logvar = (self.waves @ shares + self.bias).chunk(2, -1)
        return mu.flatten(1), logvar.flatten(1)


class VAE(nn.Module):
    """Encoder, a decoder of one LSTM, heads.

    voices: V; window: N; segment: S; hidden: units of the decoder, the encoder has half of them
    each way; latent: Z; features: numbers per frame between LSTMs and z, 0 for the paper's wiring;
    dropout: before and in the heads; feed, drop, beta, free_nats, rec_mean: as the flags in main.
    """

    def __init__(self, voices=4, window=32, segment=4, hidden=256, latent=128, features=64,
                 dropout=0.4, feed="teacher", drop=1.0, beta=0.9, free_nats=0.0, rec_mean=False):
        super().__init__()
        if window % segment or (features and latent % (window // segment)):
            raise data.InputError(f"--segment {segment} must divide --window {window}, and the "
                                  f"number of segments --latent {latent}")
        self.voices, self.window, self.latent, self.features = voices, window, latent, features
        self.feed, self.drop, self.beta = feed, drop, beta
        self.free_nats, self.rec_mean = free_nats, rec_mean
        warnings.filterwarnings("ignore", "Initializing zero-element")  # --latent 0, --features 0
        self.encode = Encoder(window, segment, (hidden + 1) // 2, latent, features)
        segments = self.encode.segments
        self.gain = nn.Parameter(torch.ones(segments, latent // segments))  # 0: a wave not in use
        self.start = nn.Parameter(torch.zeros(data.KEYS))  # stands for the frame before the first
        self.first = nn.Linear(latent, 2 * hidden)
        self.views = nn.Linear(latent // segments, window // segments * features)
        self.lstm = nn.LSTM(data.KEYS + features, hidden, batch_first=True)
        nn.init.normal_(self.lstm.weight_ih_l0[:, :data.KEYS], std=0.5)
        self.dropout = nn.Dropout(dropout)
        self.heads = Heads(voices, hidden + features, hidden // 2, dropout)

    def plan(self, z):
        """z (B, Z) -> the decoder's first state, two of (1, B, H), and what z says to each frame,
        (B, N, features)."""
        h, c = self.first(z)[None].chunk(2, -1)
        shares = self.encode.waves.T @ (z.view(len(z), *self.gain.shape) * self.gain)
        views = self.views(shares).view(len(z), self.window, self.features)
        return (h.tanh().contiguous(), c.contiguous()), views

    def read(self, previous, views, state):
        """Frames (B, T, 88), each the one before, views of z (B, T, features), state -> what the
        heads know (B, T, H + features), and the next state."""
        h, state = self.lstm(torch.cat([previous, views], -1), state)  # (B, T, H)
        return torch.cat([self.dropout(h), views], -1), state

    def soft_frame(self, x, last):
        """The decoder's own softmax as a frame: the chance that some voice has the key, given the
        likeliest voices before it, (B, T, 88)."""
        voices = self.heads.draw(x, last, temperature=0)
        chances = (self.heads.logits(i, x, last, voices).softmax(-1) for i in range(self.voices))
        return 1 - math.prod(1 - chance[..., 1:] for chance in chances)

    def frame_nll(self, frames, mask, z):
        """-log p(x_t | x_<t, z) of each frame, summed over voices: (B, T) nats, 0 if masked."""
        state, views = self.plan(z)
        views, voices = views[:, :frames.shape[1]], data.to_voices(frames, self.voices)
        previous, last = self.start.expand(len(frames), 1, -1), F.pad(voices[:, :-1], (0, 0, 1, 0))
        if self.feed == "softmax":
            x, last = [], torch.zeros_like(last)
            for view in views.split(1, 1):
                now, state = self.read(previous, view, state)
                x, previous = [*x, now], self.soft_frame(now, last[:, :1])
            x = torch.cat(x, 1)
        else:
            share = self.drop * torch.rand_like(mask[:, :1]) if self.training else 0.0
            seen = (torch.rand_like(mask) >= share)[..., None]  # of each window its own share
            previous, last = torch.cat([previous, frames[:, :-1]], 1) * seen, last * seen
            x, _ = self.read(previous, views, state)
        return mask * sum(
            F.cross_entropy(self.heads.logits(i, x, last, voices).transpose(1, 2), voices[..., v],
                            reduction="none") for i, v in enumerate(self.heads.order))

    def posterior(self, frames, mask):
        """z drawn from q(z | x), and its dimensions' KL(q(z | x) || N(0, I)), (B, Z) each."""
        mu, logvar = self.encode(frames, mask)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        return z, (mu ** 2 + logvar.exp() - 1 - logvar) / 2

    def nll(self, frames, mask):
        """Upper bound on -log p of each window in nats, with one z drawn: (B,)."""
        z, kl = self.posterior(frames, mask)
        return self.frame_nll(frames, mask, z).sum(1) + kl.sum(1)

    def log_weights(self, frames, mask, samples):
        """log p(x, z) / q(z | x) of `samples` draws from q: (samples, B). Their mean is a lower
        bound on log p(x), the log of their exponentials' mean a tighter one (Burda et al. 2016)."""
        mu, logvar = self.encode(frames, mask)
        noise = torch.randn(samples, *mu.shape, device=mu.device, dtype=mu.dtype)
        z = mu + (logvar / 2).exp() * noise  # (samples, B, Z)
        ratio = (noise ** 2 + logvar - z ** 2).sum(-1) / 2  # log p(z) - log q(z | x)
        return ratio - torch.stack([self.frame_nll(frames, mask, one).sum(1) for one in z])

    def forward(self, frames, mask):
        """frames (B, T, 88), mask (B, T) -> loss in nats per frame, and its parts for the log."""
        z, kl = self.posterior(frames, mask)
        nll, kl = self.frame_nll(frames, mask, z).sum() / mask.sum(), kl.sum(1).mean()
        loss = nll + self.beta * kl.clamp(min=self.free_nats) * len(frames) / mask.sum()
        if self.rec_mean:  # as the study's code: nats per note, but per window
            loss = nll / self.voices + self.beta * kl
        return loss, {"reconstruction": nll.detach(), "kl": kl.detach()}

    @data.sampling()
    def decode(self, z, length=None, generator=None, temperature=1.0, top_p=1.0, past=None):
        """Latents (n, Z) -> bool (n, length, 88), the decoder reading what it wrote; length: a
        window, or less; past: bool (n, P, 88), the first frames, where they are given.

        temperature 0 takes the likeliest notes; after training with whole windows blanked (drop 1)
        given z alone, since the decoder's own guesses would lead it astray.
        """
        (state, views), alone = self.plan(z), temperature == 0 and self.drop == 1
        frame, roll = self.start.expand(len(z), 1, -1) * (not alone), []
        last = torch.zeros(len(z), 1, self.voices, dtype=torch.long, device=z.device)
        for t, view in enumerate(views[:, :length].split(1, 1)):
            x, state = self.read(frame, view, state)
            voices = self.heads.draw(x, last, generator, temperature, top_p)
            if past is not None and t < past.shape[1]:
                voices = data.to_voices(past[:, t:t + 1], self.voices)
            roll.append(data.from_voices(voices))  # (n, 1, 88)
            if self.feed == "softmax":
                frame = self.soft_frame(x, last)
            elif not alone:
                frame, last = roll[-1].float(), voices
        return torch.cat(roll, 1)

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.8, prime=None, walk=0.3):
        """n new pieces as bool (n, length, 88), z drawn from N(0, I); with prime, a bool (T, 88)
        roll, what follows it, z drawn from q(z | its last window).

        Each window is written twice, from z and from q(z | the first draft), which lies where music
        lies (a step of Gibbs sampling). Then z takes a step of a random walk that keeps N(0, I),
        and the next window begins with the last quarter of what is written.
        """
        def noise():
            return torch.randn(n, self.latent, generator=generator, device=self.start.device)

        def encoded(frames):
            mu, logvar = self.encode(frames.float(), torch.ones_like(frames[..., 0]).float())
            return mu + (logvar / 2).exp() * noise()

        self.eval()
        prime = torch.zeros(0, data.KEYS) if prime is None else torch.as_tensor(prime)
        roll, given = prime.to(self.start.device).bool().expand(n, -1, -1), len(prime)
        z = encoded(roll[:, -self.window:]) if given else noise()
        while roll.shape[1] < given + length:
            past = roll[:, max(0, roll.shape[1] - self.window // 4):]
            draft = self.decode(z, None, generator, temperature, top_p, past)
            new = self.decode(encoded(draft), None, generator, temperature, top_p, past)
            roll = torch.cat([roll, new[:, past.shape[1]:]], 1)
            z = (1 - walk ** 2) ** 0.5 * z + walk * noise()
        return roll[:, given:given + length]


@torch.no_grad()
def evaluate(model, pieces, samples=0):
    """Figures on held-out pieces (bool (T, 88)), over windows that tile them: the bound (nll) in
    nats per frame and per note; kl in nats per window; used_dims, with a mean KL above 0.1 nat; F1
    of the notes rebuilt from mu, and of windows' last quarters; the bound of `samples` weights."""
    model.eval()
    device = model.start.device
    windows = data.Windows(pieces, model.window, device, hop=model.window)
    nll = weighted = torch.zeros((), device=device)
    kl, hits = torch.zeros(model.latent, device=device), torch.zeros(2, model.window, device=device)
    for frames, mask in windows.chunks(64):
        z, dims = model.posterior(frames, mask)
        nll, kl = nll + model.frame_nll(frames, mask, z).sum(), kl + dims.sum(0)
        rebuilt = model.decode(model.encode(frames, mask)[0], temperature=0) * mask[..., None]
        hits = hits + torch.stack([2 * rebuilt * frames, rebuilt + frames]).sum((1, 3))  # (2, N)
        if samples:
            weights = model.log_weights(frames, mask, samples)
            weighted = weighted + (math.log(samples) - weights.logsumexp(0)).sum()
    model.train()
    count, notes = sum(map(len, pieces)), sum(int(piece.sum()) for piece in pieces)
    bound, kl = (nll + kl.sum()).item(), kl / len(windows)
    f1, f1_end = (h[0] / h[1] for h in (hits.sum(1), hits[:, -(model.window // 4):].sum(1)))
    weighted = {f"nll_iw{samples}": weighted.item() / count} if samples else {}
    return {"nll": bound / count, "nll_per_note": bound / notes, "kl": kl.sum().item(),
            "reconstruction": nll.item() / count, "used_dims": (kl > 0.1).sum().item(),
            "note_f1": f1.item(), "note_f1_end": f1_end.item(), **weighted}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    model = VAE(**data.config(VAE, args)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("vae", args, model, corpus, optimizer=optimizer)

    for step in run.steps(args.steps):
        frames, mask = windows.sample(args.batch, args.transpose)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * data.warmup_cosine(step, args.steps)
        model.beta = args.beta * min(1, step / max(1, args.anneal))
        loss, parts = model(frames, mask)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model, mask)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        run.add(parts, mask)
        if step % args.eval_every == 0 or step == args.steps:
            valid = evaluate(model, corpus.valid)
            loss = args.beta * valid["nll"] + (1 - args.beta) * valid["reconstruction"]
            run.log(args.steps, valid, best=loss)

    run.load_best()
    run.finish(evaluate(model, corpus.test, samples=64))


def main(argv=None):
    parser = data.Parser(__doc__, run="vae", log=(
        "nll, the bound in nats per frame; kl, nats per window; f1 of notes rebuilt from z"))
    add = parser.add_argument
    add("--window", type=data.positive_int, default=32, help="frames of a window, N")
    add("--steps", type=data.positive_int, default=3000, help="training steps")
    add("--batch", type=data.positive_int, default=32, help="windows per step")
    add("--lr", type=data.positive, default=5e-3, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=250, help="steps between checkpoints")
    add("--segment", type=data.positive_int, default=4, help="frames that a share of z speaks of")
    add("--hidden", type=data.positive_int, default=256, help="units of the decoder")
    add("--latent", type=data.natural, default=128, help="numbers in z; 0: the decoder alone")
    add("--features", type=data.natural, default=64, help="between LSTMs and z; 0: the paper's")
    add("--dropout", type=data.dropout, default=0.4, help="before and in the heads")
    add("--feed", choices=["teacher", "softmax"], default="teacher", help="true frames or its own")
    add("--drop", type=data.probability, default=1.0, help="largest share of true frames blanked")
    add("--beta", type=data.non_negative, default=0.9, help="weight of the KL; less: z holds more")
    add("--anneal", type=data.natural, default=1000, help="steps over which beta rises from 0")
    add("--free-nats", type=data.non_negative, default=0.0, help="KL per window that costs nothing")
    add("--rec-mean", action="store_true", help="average the reconstruction over notes")
    add("--weight-decay", type=data.non_negative, default=0.1, help="AdamW's decoupled decay")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    add("--paper", action="store_true", help="the paper's settings, where flags do not say others")
    if "--paper" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(hidden=512, latent=32, features=0, dropout=0.0, feed="softmax",
                            drop=0.0, beta=1.0, anneal=0, lr=1e-3, weight_decay=0.0)
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
