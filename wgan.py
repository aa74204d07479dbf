"""A Wasserstein GAN of piano-roll windows (section 5.7 of the paper).

A generator G turns noise into T frames of 88 keys, a critic f gives T frames one score; both are LSTM layers under
multi-head attention, with time as the axis of both. f is trained to score Bach above G, G to be scored high:

    L_C = E[f(G(z))] - E[f(x)] + lambda E[(|grad f(x')| - 1)^2]    x: (B, T, 88) from the corpus, x' between x and G(z)
    L_G = - E[f(G(z))]                                             z: (B, Z), N(0, I)

The gap E[f(x)] - E[f(G(z))] estimates the Wasserstein distance between music and samples as far as f is 1-Lipschitz:
by the penalty (--gp, Gulrajani et al. 2017) or by clipping its weights (--clip, Arjovsky et al. 2017).

    python wgan.py                                                                        # default run
    python wgan.py --z 64 --noise 0 --layers 4 --critic-layers 2 --heads 8 --critic-heads 4 --hidden 1024 --patch 1 \\
        --dropout 0 --batch 1024 --lr 1e-4 --critic-lr 2e-4 --entropy 0 --gp 0 --clip 0.01 --average 0 \\
        --steps 41                                                                        # the paper's: 20 epochs

Differences from the paper:
- It prints L_C = E[f(x)] - E[f(G(z))]. Minimised as printed, the critic learns to score G above Bach, as G does: both
  losses fall together and nothing is learnt (--loss printed). The loss it tried first is --loss minimax.
- Gradient penalty, not clipping, which hardly learns at this size.
- Keys are 0 or 1: each voice takes its likeliest symbol, with the gradient of the softmax (straight-through). From soft
  keys a critic tells samples by their values alone.
- The softmax behind the choices is held near one nat of entropy (--entropy): else it flattens, its gradient means less
  and less, and runs come apart after some hundred steps.
- Noise of its own in each frame, beside the z of the whole piece: without it samples are alike.
- The critic also reads which intervals sound and are moved by, counted alike in all keys: lines and chords are learnt in
  half the time.
- Dropout in the critic: a critic that is too sure drives the generator about instead of teaching it.
- The generator attends to the frames behind it, so that it can go on beyond a window.
- Averaged generator weights at a constant learning rate, and of them those with the best style on the validation pieces:
  the last of a run need not be the best.
"""

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data

METRE = 16  # frames: training windows begin at multiples of 16


class Attention(nn.Module):
    """Multi-head self-attention over frames, added to its input.

    window: 0 lets every frame see all frames; else a frame sees itself and the window - 1 frames before it.
    """

    def __init__(self, hidden, heads, window=0):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(hidden)
        self.query, self.memory = nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x, past=None):
        """x (B, T, H) and the P frames before it, past (B, P, H) -> (B, T, H)."""
        seen = x if past is None else torch.cat([past, x], 1)  # (B, P + T, H)
        q = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, H / heads)
        k, v = self.memory(self.norm(seen)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # An explicit softmax: the fused attention has no second derivatives, which the gradient penalty needs.
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, T, P + T)
        if self.window:
            ago = torch.arange(seen.shape[1], device=x.device)
            ago = ago[-x.shape[1]:, None] - ago  # (T, P + T): how many frames before
            scores = scores.masked_fill((ago < 0) | (ago >= self.window), -torch.inf)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Generator(nn.Module):
    """Noise -> LSTM layers -> attention over the last `window` frames -> voices -> keys."""

    def __init__(self, voices, window, z, noise, hidden, layers, heads):
        super().__init__()
        self.voices = voices
        self.place = nn.Parameter(0.3 * torch.randn(METRE, 32))  # learned: where in the metre a frame stands
        self.start = nn.Linear(z, 2 * layers * hidden)
        self.lstm = nn.LSTM(z + noise + 32, hidden, layers, batch_first=True)
        self.attention = Attention(hidden, heads, window)
        self.mix = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, voices * data.SYMBOLS)
        nn.init.normal_(self.out.weight, std=hidden ** -0.5)

    def forward(self, z, noise, first=0, state=None):
        """z (B, Z) and noise (B, T, N) -> keys (B, T, 88), exactly 0 or 1, the entropy of the choices in nats a voice, and
        the state after them.

        first, state: how many frames came before and the state after them, to go on from there.
        """
        b, t = noise.shape[:2]
        lstm, past = state or (None, None)
        if lstm is None:
            lstm = self.start(z).tanh().view(b, 2, self.lstm.num_layers, -1).permute(1, 2, 0, 3).contiguous().unbind()
        place = self.place[torch.arange(first, first + t, device=z.device) % METRE]
        x = torch.cat([z[:, None].expand(-1, t, -1), noise, place.expand(b, -1, -1)], -1)
        h, lstm = self.lstm(x, lstm)  # (B, T, H)
        x = self.attention(h, past)
        x = x + F.gelu(self.mix(x))
        logits = self.out(x).unflatten(-1, (self.voices, data.SYMBOLS))  # (B, T, V, 89)
        # Straight through: the likeliest symbol, one-hot, with the gradient of the softmax.
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        chosen = F.one_hot(logits.argmax(-1), data.SYMBOLS) + (p - p.detach())  # the bracket is exactly 0
        silent = 1
        for keys in chosen[..., 1:].unbind(2):  # a key sounds unless no voice takes it; symbol 0, the rest, is no key
            silent = silent * (1 - keys)  # (B, T, 88)
        return 1 - silent, -(p * log_p).sum(-1).mean(), (lstm, h)


def intervals(frames, changes):
    """How often each interval sounds in each frame, 1..24 semitones, and is moved by from a key that ends to one that
    begins, -12..12: (B, T, 88) twice -> (B, T, 49). The same in every key, so the critic need not learn it 12 times."""
    x, begins, ends = torch.fft.rfft(torch.stack([frames, changes.relu(), (-changes).relu()]), 112)  # no wrap to 24
    sounding = torch.fft.irfft(x.conj() * x, 112)[..., 1:25]  # sum_k x_k x_{k+i}, the autocorrelation
    moving = torch.fft.irfft(ends.conj() * begins, 112)  # sum_k ends_k begins_{k+i}
    return torch.cat([sounding, moving[..., :13], moving[..., -12:]], -1)


class Critic(nn.Module):
    """The mirror: frames -> LSTM layers -> attention over all of them -> one score."""

    def __init__(self, window, hidden, layers, heads, patch, dropout):
        super().__init__()
        if window % patch:
            raise data.InputError(f"--patch {patch} does not divide --window {window}")
        self.patch = patch
        self.inp = nn.Linear(patch * (2 * data.KEYS + 49), hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.place = nn.Parameter(0.1 * torch.randn(window // patch, hidden))
        self.attention = Attention(hidden, heads)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, frames):
        """frames (B, window, 88) -> scores (B,)."""
        changes = F.pad(frames.diff(dim=1), (0, 0, 1, 0))  # 1 a key begins, -1 it ends
        x = torch.cat([frames, changes, 0.2 * intervals(frames, changes)], -1)  # (B, window, 225); 0.5 drowns the rest
        x = x.unflatten(1, (-1, self.patch)).flatten(2)  # (B, window / patch, patch * 225)
        x, _ = self.lstm(self.dropout(F.leaky_relu(self.inp(x), 0.2)))  # (B, window / patch, H)
        x = self.attention(x + self.place)
        x = torch.cat([x.mean(1), x[:, -1]], -1)
        return self.out(self.dropout(F.leaky_relu(self.mix(x), 0.2)))[:, 0]


def gradient_penalty(critic, real, fake):
    """E[(|grad f(x')| - 1)^2] over points x' on the lines between real and fake windows (B, T, 88).

    The loss needs the gradient of this gradient. cuDNN's LSTM has none, and oneDNN's (on the CPU) takes twice as long as
    PyTorch's own: both are switched off here, for this pass alone.
    """
    with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        part = torch.rand(len(real), 1, 1, device=real.device)
        between = (part * real + (1 - part) * fake).requires_grad_()
        gradient, = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class WGAN(nn.Module):
    """Generator, critic, and the running average of the generator's weights, which samples are drawn from.

    voices: V; window: frames that the critic sees; z: noise a piece; noise: noise a frame; hidden, layers, heads: of the
    generator; critic_layers, critic_heads: of the critic; patch: frames that the critic's LSTM reads at once; dropout: in
    the critic; loss: "wasserstein", "minimax", or "printed", the paper's sign; gp: weight of the gradient penalty;
    entropy: that the generator's choices are held near, in nats a voice, 0 for no hold.
    """

    def __init__(self, voices=4, window=32, z=64, noise=16, hidden=128, layers=1, heads=4, critic_layers=1, critic_heads=4,
                 patch=2, dropout=0.3, loss="wasserstein", gp=10.0, entropy=1.0):
        super().__init__()
        self.config = dict(voices=voices, window=window, z=z, noise=noise, hidden=hidden, layers=layers, heads=heads,
                           critic_layers=critic_layers, critic_heads=critic_heads, patch=patch,
                           dropout=dropout, loss=loss, gp=gp, entropy=entropy)
        for name, count in (("heads", heads), ("critic-heads", critic_heads)):
            if hidden % count:
                raise data.InputError(f"--{name} {count} does not divide --hidden {hidden}")
        self.window, self.z, self.noise, self.loss, self.gp, self.entropy = window, z, noise, loss, gp, entropy
        self.generator = Generator(voices, window, z, noise, hidden, layers, heads)
        self.critic = Critic(window, hidden, critic_layers, critic_heads, patch, dropout)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    @torch.no_grad()
    def start_at(self, frames):
        """Start from how often each voice does what in these windows (B, T, 88): notes in the right register."""
        symbols = data.to_voices(frames, self.generator.voices).flatten(0, -2)  # (B * T, V)
        often = F.one_hot(symbols, data.SYMBOLS).float().mean(0)  # (V, 89)
        for generator in (self.generator, self.average):
            generator.out.bias.copy_((often + 1e-4).log().flatten())

    def fake(self, n):
        """n windows of the generator (n, window, 88) and the entropy of their choices, with gradients."""
        device = self.generator.place.device
        noise = torch.randn(n, self.window, self.noise, device=device)
        return self.generator(torch.randn(n, self.z, device=device), noise)[:2]

    def forward(self, frames, mask):
        """The critic's loss on full windows (B, window, 88) against as many of the generator, and its parts."""
        with torch.no_grad():
            fake, _ = self.fake(len(frames))
        real_score, fake_score = self.critic(torch.cat([frames, fake])).chunk(2)
        gap = real_score.mean() - fake_score.mean()
        if self.loss == "minimax":  # Goodfellow et al. 2014: the score is the log-odds of being real
            loss = F.softplus(-real_score).mean() + F.softplus(fake_score).mean()
        else:
            loss = gap if self.loss == "printed" else -gap
        parts = {"critic_loss": loss.detach(), "critic_gap": gap.detach()}
        if self.gp:
            penalty = gradient_penalty(self.critic, frames, fake)
            loss = loss + self.gp * penalty
            parts["penalty"] = penalty.detach()
        return loss, parts

    def generator_loss(self, n):
        """The generator's loss on n windows, and its parts. It holds the softmax behind the choices at some entropy: left
        alone that grows, gradients then speak of symbols that are never chosen, and the critic runs away."""
        fake, entropy = self.fake(n)
        score = self.critic(fake)
        loss = -F.softplus(score).mean() if self.loss == "minimax" else -score.mean()
        parts = {"generator_loss": loss.detach(), "entropy": entropy.detach()}
        return (loss + (entropy - self.entropy) ** 2 if self.entropy else loss), parts

    @torch.no_grad()
    def sample(self, n, length, generator=None, temperature=1.0):
        """n pieces as bool (n, length, 88), a window at a time: the LSTM's state is carried on, attention reaches back
        over the last window. temperature scales the noise of the frames (not z): 0 leaves the metre alone to move."""
        device = self.average.place.device
        z, state, roll = torch.randn(n, self.z, generator=generator, device=device), None, []
        for first in range(0, length, self.window):
            noise = temperature * torch.randn(n, self.window, self.noise, generator=generator, device=device)
            keys, _, state = self.average(z, noise, first, state)
            roll.append(keys > 0.5)
        return torch.cat(roll, 1)[:, :length]


def histograms(rolls):
    """What style is judged by here, over all rolls (T, 88): notes at once, note lengths in frames, steps of the top and of
    the bottom line in semitones, chords as pitch-class sets above the bass. sample.py compares more."""
    bins = {"notes": 89, "length": 17, "top": 27, "bottom": 27, "chord": 4096}
    total = {name: np.zeros(size) for name, size in bins.items()}
    for roll in rolls:
        edges = np.diff(np.pad(roll, ((1, 1), (0, 0))).astype(np.int8), axis=0).T
        sounding = roll[roll.any(1)]
        top, bottom = data.KEYS - 1 - sounding[:, ::-1].argmax(1), sounding.argmax(1)
        t, key = np.nonzero(sounding)
        classes = np.zeros((len(sounding), 12), int)
        classes[t, (key - bottom[t]) % 12] = 1
        steps = [np.diff(line)[np.diff(line) != 0].clip(-13, 13) + 13 for line in (top, bottom)]
        counted = (roll.sum(1), (np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]).clip(max=16), *steps,
                   classes @ 2 ** np.arange(12))
        for name, values in zip(bins, counted):
            total[name] += np.bincount(values, minlength=bins[name])
    return total


@torch.no_grad()
def clip_weights(critic, c):
    """Keep f Lipschitz the crude way: every weight in [-c, c]."""
    for weight in critic.parameters():
        weight.clamp_(-c, c)


@torch.no_grad()
def evaluate(model, pieces):
    """Figures against held-out pieces (bool arrays (T, 88)): critic_gap, E[f(x)] - E[f(G(z))] over windows that tile them;
    of 64 samples of 128 frames, the mean divergence of their histograms (style), the share of silent frames, and the
    largest share of equal frames that two of them have (alike: mode collapse)."""
    model.eval()
    device = model.average.place.device
    generator = torch.Generator(device).manual_seed(0)
    windows = data.Windows(pieces, model.window, device, hop=model.window, full=True)
    real = torch.cat([model.critic(frames) for frames, _ in windows.chunks(64)]).mean()
    fake = model.critic(model.sample(256, model.window, generator).float()).mean()
    rolls = model.sample(64, 128, generator).cpu().numpy()
    have, want = histograms(rolls), histograms(pieces)
    model.train()
    alike = max((roll == rolls[:i]).all(2).mean(1).max() for i, roll in enumerate(rolls) if i)
    return {"critic_gap": (real - fake).item(), "style": float(np.mean([data.divergence(have[k], want[k]) for k in have])),
            "silent": float((~rolls.any(2)).mean()), "alike": float(alike)}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    corpus = data.load_corpus(args.data, args.step, args.voices)
    torch.manual_seed(args.seed)
    model = WGAN(args.voices, args.window, args.z, args.noise, args.hidden, args.layers, args.heads, args.critic_layers,
                 args.critic_heads, args.patch, args.dropout, args.loss, args.gp, args.entropy).to(args.device)
    kind = {"adam": lambda p, lr: torch.optim.Adam(p, lr, betas=(0.0, 0.9)), "rmsprop": torch.optim.RMSprop}[args.optimizer]
    optimizer = kind(model.generator.parameters(), args.lr)  # constant rates: as they fall, the critic outruns G
    critic_optimizer = kind(model.critic.parameters(), args.critic_lr)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    windows = data.Windows(corpus.train, args.window, args.device, full=True)
    for pieces in (corpus.valid, corpus.test):  # they need a full window too: better said now
        data.Windows(pieces, args.window, full=True)
    model.start_at(windows.sample(256, generator, args.transpose)[0])
    run = data.Run("wgan", args, model, corpus, optimizer=optimizer, critic_optimizer=critic_optimizer, generator=generator)

    for step in range(run.step + 1, args.steps + 1):
        for _ in range(args.n_critic):
            frames, mask = windows.sample(args.batch, generator, args.transpose)
            loss, parts = model(frames, mask)
            critic_optimizer.zero_grad()
            loss.backward()
            run.average_gradients(model.critic, mask)
            critic_optimizer.step()
            if args.clip:
                clip_weights(model.critic, args.clip)
        loss, generator_parts = model.generator_loss(len(frames))
        optimizer.zero_grad()
        loss.backward(inputs=list(model.generator.parameters()))
        run.average_gradients(model.generator, mask)
        optimizer.step()
        with torch.no_grad():  # the average follows the first steps closely
            keep = min(args.average, step / (step + 10))
            for mean, weight in zip(model.average.parameters(), model.generator.parameters()):
                mean.lerp_(weight, 1 - keep)
        run.add({**parts, **generator_parts}, mask.repeat(args.n_critic, 1))
        if step % args.eval_every == 0 or step == args.steps:
            valid = evaluate(model, corpus.valid)
            run.log(args.steps, valid, best=valid["style"] + (valid["alike"] > 0.5))  # style counts once modes are apart
        if run.stopped():
            return

    run.load_best()
    run.finish(evaluate(model, corpus.test))


def main(argv=None):
    parser = data.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", help="folder of .mid or .midi files, searched below (default: Bach from music21)")
    add("--step", type=data.note_value, help="time step of all pieces, such as 1/16 (default: each piece its own)")
    add("--voices", type=data.voice_count, default=4, help="notes at once; 1 is the top note alone")
    add("--window", type=data.positive_int, default=32, help="frames of a training window")
    add("--transpose", type=int, choices=[0, 1], default=1, help="1 moves training windows by -6..+5 semitones")
    add("--out", default="runs/wgan", help="run folder")
    add("--steps", type=data.positive_int, default=4000, help="generator steps")
    add("--batch", type=data.positive_int, default=32, help="windows a step")
    add("--lr", type=data.positive, default=1e-3, help="learning rate of the generator")
    add("--seed", type=data.natural, default=0, help="seed of weights, batches and samples")
    add("--device", type=data.device_name, default="auto", help="cpu, cuda, cuda:1; auto takes cuda where there is one")
    add("--eval-every", type=data.positive_int, default=200, help="steps between log lines, validations, checkpoints")
    add("--resume", action="store_true", help="go on with the run in --out; its schedule is for --steps from there")
    add("--force", action="store_true", help="replace a run that --out holds")
    add("--z", type=data.positive_int, default=64, help="dimensions of the noise that a whole piece has")
    add("--noise", type=data.natural, default=16, help="dimensions of the noise that each frame has")
    add("--hidden", type=data.positive_int, default=128, help="units of each LSTM layer")
    add("--layers", type=data.positive_int, default=1, help="LSTM layers of the generator")
    add("--heads", type=data.positive_int, default=4, help="attention heads of the generator")
    add("--critic-layers", type=data.positive_int, default=1, help="LSTM layers of the critic")
    add("--critic-heads", type=data.positive_int, default=4, help="attention heads of the critic")
    add("--patch", type=data.positive_int, default=2, help="frames that the critic's LSTM reads at once: 2 takes half the time")
    add("--dropout", type=data.dropout, default=0.3, help="share of the critic's units dropped in training")
    add("--loss", choices=["wasserstein", "minimax", "printed"], default="wasserstein",
        help="minimax: Goodfellow's, tried first in the paper; printed: the critic's loss with the paper's sign")
    add("--entropy", type=data.non_negative, default=1.0, help="nats a voice that the choices' entropy is held near; 0: free")
    add("--gp", type=data.non_negative, default=10.0, help="weight of the gradient penalty")
    add("--clip", type=data.non_negative, default=0.0, help="clip the critic's weights to [-c, c]; 0 leaves them")
    add("--n-critic", type=data.positive_int, default=1, help="critic steps a generator step")
    add("--critic-lr", type=data.positive, default=2e-3, help="learning rate of the critic")
    add("--optimizer", choices=["adam", "rmsprop"], default="adam", help="adam has betas 0 and 0.9")
    add("--average", type=data.decay, default=0.997, help="how slowly the averaged weights follow; 0: no average")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
