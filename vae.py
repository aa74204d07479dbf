"""A recurrent variational autoencoder of windows of music (section 5.2 of the paper).

A window x of N frames (N, 88) has a latent vector z (Z). An encoder reads the window both ways, a decoder writes it
frame by frame from z and from the frames before:

    q(z | x) = N(mu(x), diag sigma(x)^2)            encoder: bidirectional LSTM, one linear layer to mu and log sigma^2
    z = mu + sigma * epsilon,  epsilon ~ N(0, I)    the reparametrisation trick
    h_t = LSTM(x_<t, z)                             (H), the first state is linear in z
    p(x_t | x_<t, z) = prod_v softmax(W h_t)_v [symbol of voice v in x_t]
    -log p(x) <= E_q [- sum_t log p(x_t | x_<t, z)] + KL(q(z | x) || N(0, I))      reconstruction + KL: the bound

    python vae.py                                                              # default run: music from N(0, I)
    python vae.py --beta 0.3 --free-nats 0 --drop 1 --latent 256               # faithful reconstruction
    python vae.py --latent 0                                                   # no latent: what the decoder does alone
    python vae.py --paper --voices 1                                           # the paper's; --rec-mean: as its code had it

Differences from the paper, whose latents collapsed (KL to 0: the decoder did not listen to z):
- The bound is a sum over frames, voices and dimensions. The study's code averaged the reconstruction over notes and
  summed the KL, which weighs the KL N times too much: --rec-mean shows what comes of it.
- Free nats: the KL costs nothing below 16 nats a window, so z is in use before the decoder has learned to do without.
- Each frame of the window has its own linear view of z, joined to the decoder's input and output, and the encoder's
  mu and sigma read every frame, not the last states alone: what z says of frame 20 need not survive 20 steps.
- True frames, some of them blanked (--drop), instead of the decoder's own softmax: one LSTM call, and faster learning.
- Section 5.2 writes log p with a minus sign; what is minimised here is an upper bound on -log p.
- Four voices, transposed windows, AdamW with a schedule: as in lstm.py.
"""

import math
import sys
import warnings

import torch
from torch import nn
from torch.nn import functional as F

import data


class Encoder(nn.Module):
    """q(z | x): frames (B, T, 88), mask (B, T), T <= window -> mu, log sigma^2, each (B, Z).

    features: numbers that each frame hands to mu and sigma; 0: the LSTM's two last states do (the paper's).
    """

    def __init__(self, window, hidden, latent, features):
        super().__init__()
        self.window = window
        self.lstm = nn.LSTM(data.KEYS, hidden, batch_first=True, bidirectional=True)
        self.reduce = nn.Linear(2 * hidden + data.KEYS, features) if features else None
        self.out = nn.Linear(window * features if features else 2 * hidden, 2 * latent)

    def forward(self, frames, mask):
        frames = F.pad(frames * mask[..., None], (0, 0, 0, self.window - frames.shape[1]))  # (B, N, 88)
        h, (last, _) = self.lstm(frames)  # (B, N, 2E), (2, B, E)
        if self.reduce:
            h = self.reduce(torch.cat([h, frames], -1)).relu().flatten(1)  # (B, N * features)
        else:
            h = last.transpose(0, 1).flatten(1)  # (B, 2E)
        return self.out(h).chunk(2, -1)


class VAE(nn.Module):
    """Encoder, and a decoder of one LSTM.

    voices: V; window: N; hidden: units of the decoder, the encoder has half of them each way; latent: Z; features:
    numbers a frame between LSTMs and z, 0 for the paper's wiring; dropout: on the decoder's output; feed: "teacher",
    true frames, or "softmax", the decoder's own; drop: share of true frames blanked in training, 1: in decoding too;
    beta: weight of the KL; free_nats: KL a window that costs nothing; rec_mean: average the reconstruction over notes.
    """

    def __init__(self, voices=4, window=32, hidden=256, latent=128, features=64, dropout=0.3, feed="teacher", drop=0.1,
                 beta=1.0, free_nats=16.0, rec_mean=False):
        super().__init__()
        self.voices, self.window, self.latent, self.features = voices, window, latent, features
        self.feed, self.drop, self.beta, self.free_nats, self.rec_mean = feed, drop, beta, free_nats, rec_mean
        warnings.filterwarnings("ignore", "Initializing zero-element")  # --latent 0, --features 0
        self.encode = Encoder(window, (hidden + 1) // 2, latent, features)
        self.start = nn.Parameter(torch.zeros(data.KEYS))  # stands for the frame before the first
        self.first = nn.Linear(latent, 2 * hidden)
        self.context = nn.Linear(latent, window * features)
        self.lstm = nn.LSTM(data.KEYS + features, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden + features, voices * data.SYMBOLS)

    def plan(self, z):
        """z (B, Z) -> the decoder's first state, two of (1, B, H), and each frame's view of z, (B, N, features)."""
        h, c = self.first(z)[None].chunk(2, -1)
        return (h.tanh().contiguous(), c.contiguous()), self.context(z).view(len(z), self.window, self.features)

    def logits(self, previous, context, state):
        """previous frames (B, T, 88), views of z (B, T, features), state -> logits (B, T, V, 89) and the next state."""
        if self.drop == 1:
            previous = torch.zeros_like(previous)
        h, state = self.lstm(torch.cat([previous, context], -1), state)  # (B, T, H)
        return self.out(torch.cat([self.dropout(h), context], -1)).unflatten(-1, (self.voices, data.SYMBOLS)), state

    def soft_frame(self, logits):
        """The decoder's own softmax as a frame: the chance that some voice has the key, (..., V, 89) -> (..., 88)."""
        return 1 - (1 - logits.softmax(-1)[..., 1:]).prod(-2)

    def frame_nll(self, frames, mask, z):
        """-log p(x_t | x_<t, z) of each frame, summed over voices: (B, T) nats, 0 if masked."""
        state, context = self.plan(z)
        previous = self.start.expand(len(frames), 1, -1)
        if self.feed == "softmax":
            logits = []
            for t in range(frames.shape[1]):
                step, state = self.logits(previous, context[:, t:t + 1], state)
                logits.append(step)
                previous = self.soft_frame(step)
            logits = torch.cat(logits, 1)
        else:
            previous = torch.cat([previous, frames[:, :-1]], 1)
            if self.training:
                previous = previous * (torch.rand(previous.shape[:2], device=frames.device) >= self.drop)[..., None]
            logits, _ = self.logits(previous, context[:, :frames.shape[1]], state)
        target = data.to_voices(frames, self.voices)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view_as(target).sum(-1) * mask

    def posterior(self, frames, mask):
        """z drawn from q(z | x), and KL(q(z | x) || N(0, I)) of each of its dimensions in nats: (B, Z) each."""
        mu, logvar = self.encode(frames, mask)
        return mu + (logvar / 2).exp() * torch.randn_like(mu), (mu ** 2 + logvar.exp() - 1 - logvar) / 2

    def nll(self, frames, mask):
        """Upper bound on the negative log-likelihood of each window in nats, with one z drawn: (B,)."""
        z, kl = self.posterior(frames, mask)
        return self.frame_nll(frames, mask, z).sum(1) + kl.sum(1)

    def log_weights(self, frames, mask, samples):
        """log p(x, z) / q(z | x) of `samples` draws from q: (samples, B). Their mean is a lower bound on log p(x), the
        log of the mean of their exponentials a tighter one (Burda et al. 2016)."""
        mu, logvar = self.encode(frames, mask)
        weights = []
        for _ in range(samples):
            noise = torch.randn_like(mu)
            z = mu + (logvar / 2).exp() * noise
            ratio = (noise ** 2 + logvar - z ** 2).sum(1) / 2  # log p(z) - log q(z | x)
            weights.append(ratio - self.frame_nll(frames, mask, z).sum(1))
        return torch.stack(weights)

    def forward(self, frames, mask):
        """frames (B, T, 88), mask (B, T) -> loss in nats a frame, and its parts for the log."""
        z, kl = self.posterior(frames, mask)
        nll, kl = self.frame_nll(frames, mask, z).sum(), kl.sum(1).mean()  # nats of the batch, nats a window
        if self.rec_mean:
            loss = nll / mask.sum() / self.voices + self.beta * kl
        else:
            loss = (nll + self.beta * kl.clamp(min=self.free_nats) * len(frames)) / mask.sum()
        return loss, {"reconstruction": nll.detach() / mask.sum(), "kl": kl.detach()}

    @data.sampling()
    def decode(self, z, length=None, generator=None, temperature=1.0, top_p=1.0, past=None):
        """Latents (n, Z) -> bool (n, length, 88), the decoder reading what it wrote; length: a window, or less.

        temperature 0 takes the likeliest symbols. past: bool (n, P, 88), the window's first frames if they are given;
        the result begins with them.
        """
        state, context = self.plan(z)
        frame, roll = self.start.expand(len(z), 1, -1), []
        for t in range(length or self.window):
            logits, state = self.logits(frame, context[:, t:t + 1], state)
            if past is not None and t < past.shape[1]:
                roll.append(past[:, t:t + 1])
            else:
                roll.append(data.from_voices(data.sample_voices(logits, generator, temperature, top_p)))  # (n, 1, 88)
            frame = self.soft_frame(logits) if self.feed == "softmax" else roll[-1].float()
        return torch.cat(roll, 1)

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.9, prime=None, walk=0.5):
        """n new pieces as bool (n, length, 88), z drawn from N(0, I); with prime, a bool (T, 88) roll, what follows it.

        Beyond one window, z takes a step of a random walk that keeps N(0, I), and the next window begins with the last
        quarter of what is written. With a prime, the walk sets out from q(z | the prime's last window).
        """
        def noise():
            """n draws from N(0, I): (n, Z)."""
            return torch.randn(n, self.latent, generator=generator, device=self.start.device)

        self.eval()
        z, given = noise(), 0
        roll = torch.zeros(n, 0, data.KEYS, dtype=torch.bool, device=self.start.device)
        if prime is not None and len(prime):
            roll = torch.as_tensor(prime, device=self.start.device).bool().expand(n, -1, -1)
            given, last = len(prime), roll[:1, -self.window:].float()
            mu, logvar = self.encode(last, torch.ones_like(last[..., 0]))
            z = (1 - walk ** 2) ** 0.5 * (mu + (logvar / 2).exp() * z) + walk * noise()
        while roll.shape[1] < given + length:
            past = roll[:, max(0, roll.shape[1] - self.window // 4):]
            new = self.decode(z, None, generator, temperature, top_p, past)
            roll = torch.cat([roll, new[:, past.shape[1]:]], 1)
            z = (1 - walk ** 2) ** 0.5 * z + walk * noise()
        return roll[:, given:given + length]


@torch.no_grad()
def evaluate(model, pieces, samples=0):
    """Figures on held-out pieces (bool arrays (T, 88)), over windows that tile them: the bound (nll) and its halves,
    reconstruction in nats a frame and kl in nats a window; nats a sounding note; dimensions of z with a mean KL above
    0.1 nat; F1 of the notes rebuilt from mu, and of each window's last eight frames; with samples, the
    importance-weighted bound with so many."""
    model.eval()
    device = model.start.device
    windows = data.Windows(pieces, model.window, device, hop=model.window)
    nll = weighted = torch.zeros((), device=device)
    kl, (hits, cells) = torch.zeros(model.latent, device=device), torch.zeros(2, 2, device=device)
    for frames, mask in windows.chunks(64):
        z, dims = model.posterior(frames, mask)
        nll, kl = nll + model.frame_nll(frames, mask, z).sum(), kl + dims.sum(0)
        rebuilt = model.decode(model.encode(frames, mask)[0], temperature=0) * mask[..., None]
        for i, part in enumerate((slice(None), slice(-8, None))):
            hits[i] += 2 * (rebuilt * frames)[:, part].sum()
            cells[i] += (rebuilt + frames)[:, part].sum()
        if samples:
            weights = model.log_weights(frames, mask, samples)
            weighted = weighted + (math.log(samples) - weights.logsumexp(0)).sum()
    model.train()
    count, bound = sum(len(piece) for piece in pieces), (nll + kl.sum()).item()
    figures = {"nll": bound / count, "nll_per_note": bound / sum(int(piece.sum()) for piece in pieces),
               "reconstruction": nll.item() / count, "kl": kl.sum().item() / len(windows),
               "used_dims": float((kl / len(windows) > 0.1).sum()), "note_f1": (hits / cells.clamp(min=1))[0].item(),
               "note_f1_end": (hits / cells.clamp(min=1))[1].item()}
    return {**figures, f"nll_iw{samples}": weighted.item() / count} if samples else figures


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
            run.log(args.steps, valid, best=valid["reconstruction"] + args.beta * (valid["nll"] - valid["reconstruction"]))

    run.load_best()
    run.finish(evaluate(model, corpus.test, samples=64))


def main(argv=None):
    parser = data.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", help="folder of .mid or .midi files, searched below (default: Bach from music21)")
    add("--time-step", type=data.note_value, help="time step of all pieces, such as 1/16 (default: each piece its own)")
    add("--voices", type=data.voice_count, default=4, help="notes at once; 1 is the top note alone")
    add("--window", type=data.positive_int, default=32, help="frames of a window, N")
    add("--transpose", type=int, choices=[0, 1], default=1, help="1 moves training windows by -6..+5 semitones")
    add("--out", default="runs/vae", help="run folder")
    add("--steps", type=data.positive_int, default=6000, help="training steps")
    add("--batch", type=data.positive_int, default=32, help="windows a step")
    add("--lr", type=data.positive, default=5e-3, help="highest learning rate")
    add("--seed", type=data.natural, default=0, help="seed of weights, batches and samples")
    add("--device", type=data.device_name, default="auto", help="cpu, cuda, cuda:1; auto takes cuda where there is one")
    add("--eval-every", type=data.positive_int, default=200, help="steps between log lines, validations, checkpoints")
    add("--resume", action="store_true", help="go on with the run in --out; its schedule is for --steps from there")
    add("--force", action="store_true", help="replace a run that --out holds")
    add("--hidden", type=data.positive_int, default=256, help="units of the decoder; the encoder has half each way")
    add("--latent", type=data.natural, default=128, help="dimensions of z; 0 trains the decoder alone")
    add("--features", type=data.natural, default=64, help="numbers a frame between LSTMs and z; 0 is the paper's wiring")
    add("--dropout", type=data.dropout, default=0.3, help="share of the decoder's outputs dropped in training")
    add("--feed", choices=["teacher", "softmax"], default="teacher", help="what the decoder reads: true frames or its own")
    add("--drop", type=data.probability, default=0.1, help="share of true frames blanked; with 1 the decoder never reads")
    add("--beta", type=data.non_negative, default=1.0, help="weight of the KL; 1 is the bound, less rebuilds better")
    add("--anneal", type=data.natural, default=300, help="steps over which beta rises from 0")
    add("--free-nats", type=data.non_negative, default=16.0, help="KL a window that costs nothing")
    add("--rec-mean", action="store_true", help="average the reconstruction over notes, as the study's code did")
    add("--weight-decay", type=data.non_negative, default=0.0, help="AdamW's decoupled weight decay")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    add("--paper", action="store_true", help="the paper's training: --hidden 512 --latent 32 --features 0 --dropout 0 "
        "--feed softmax --drop 0 --anneal 0 --free-nats 0 --lr 1e-3, where these are not given")
    if "--paper" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(hidden=512, latent=32, features=0, dropout=0.0, feed="softmax", drop=0.0, anneal=0,
                            free_nats=0.0, lr=1e-3)
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
