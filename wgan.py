"""A Wasserstein GAN of piano-roll windows (section 5.7 of the paper).

A generator G turns noise into T frames, a critic f gives T frames one score; both are LSTM layers
under multi-head attention over time. f learns to score Bach above G, and G to be scored high:

    L_C = E[f(G(z))] - E[f(x)] + lambda E[(|grad f(x')| - 1)^2]
    L_G = - E[f(G(z))]
    x: (B, T, 88) from the corpus, z: (B, Z) from N(0, I), x' between x and G(z)

The gap E[f(x)] - E[f(G(z))] estimates the Wasserstein distance between the two as far as f is
1-Lipschitz: by the penalty (--gp, Gulrajani et al. 2017) or by clipping its weights (--clip,
Arjovsky et al. 2017).

    python wgan.py                                                          # default run
    python wgan.py --noise 0 --layers 4 --critic-layers 2 --heads 8 --hidden 1024 --patch 1 \\
        --dropout 0 --batch 1024 --lr 1e-4 --critic-lr 2e-4 --entropy 0 --gp 0 --clip 0.01 \\
        --average 0 --steps 41                                              # the paper's 20 epochs

Differences from the paper:
- It prints L_C = E[f(x)] - E[f(G(z))]. Minimised as printed, critic and generator both learn to
  score G above Bach (--loss printed). The loss it tried first is --loss minimax.
- Gradient penalty, not clipping, which hardly learns at this size.
- Keys are 0 or 1: each voice takes its likeliest symbol, with the gradient of the softmax
  (straight-through). From soft keys a critic tells samples by their values alone.
- The softmax is held near one nat of entropy: else it flattens, and runs diverge.
- Noise in each frame, beside the z of the whole piece: without it samples are alike.
- The critic also reads intervals, counted alike in all keys: chords are learnt in half the time.
- Dropout in the critic: one that is too sure drives the generator about instead of teaching it.
- The generator attends only backwards, so that it can go on beyond a window.
- Averaged generator weights, and of them those that come nearest to the validation pieces.
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

    window: 0 lets every frame see all frames; else a frame sees itself and the window - 1 before.
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
        q = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        both = self.memory(self.norm(seen)).unflatten(-1, (2, self.heads, -1))
        k, v = both.permute(2, 0, 3, 1, 4)  # each (B, heads, P + T, H / heads), as q
        # Written out: the fused attention has no second derivatives, which the penalty needs.
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, T, P + T)
        if self.window:
            place = torch.arange(seen.shape[1], device=x.device)
            ago = place[-x.shape[1]:, None] - place  # (T, P + T)
            scores = scores.masked_fill((ago < 0) | (ago >= self.window), -torch.inf)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Generator(nn.Module):
    """Noise -> LSTM layers -> attention over the last `window` frames -> voices -> keys."""

    def __init__(self, voices, window, z, noise, hidden, layers, heads):
        super().__init__()
        self.voices = voices
        self.place = nn.Parameter(0.3 * torch.randn(METRE, 32))  # where in the metre a frame stands
        self.start = nn.Linear(z, 2 * layers * hidden)
        self.lstm = nn.LSTM(z + noise + 32, hidden, layers, batch_first=True)
        self.attention = Attention(hidden, heads, window)
        self.mix = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, voices * data.SYMBOLS)
        nn.init.normal_(self.out.weight, std=hidden ** -0.5)

    def forward(self, z, noise, first=0, state=None):
        """z (B, Z), noise (B, T, N) -> keys (B, T, 88), exactly 0 or 1, the entropy of the choices
        in nats per voice, and the state to go on with, after `first` more frames."""
        batch, length = noise.shape[:2]
        if state is None:
            start = self.start(z).tanh().view(batch, 2, self.lstm.num_layers, -1)
            state = tuple(part.contiguous() for part in start.permute(1, 2, 0, 3)), None
        lstm_state, past = state
        place = self.place[torch.arange(first, first + length, device=z.device) % METRE]
        whole = z[:, None].expand(-1, length, -1)
        h, lstm_state = self.lstm(torch.cat([whole, noise, place.expand(batch, -1, -1)], -1),
                                  lstm_state)  # (B, T, H)
        x = self.attention(h, past)
        x = x + F.gelu(self.mix(x))
        log_p = self.out(x).unflatten(-1, (self.voices, data.SYMBOLS)).log_softmax(-1)
        p = log_p.exp()  # (B, T, V, 89)
        # Straight through: the likeliest symbol, one-hot; the bracket is 0, its gradient p's.
        chosen = F.one_hot(p.argmax(-1), data.SYMBOLS) + (p - p.detach())
        silent = math.prod((1 - chosen[..., 1:]).unbind(2))  # a key is, if no voice takes it
        return 1 - silent, -(p * log_p).sum(-1).mean(), (lstm_state, h)


def intervals(frames, changes):
    """How often each interval sounds in each frame, 1..24 semitones, and is moved by from a key
    that ends to one that begins, 0..12 up and 1..12 down: (B, T, 88) twice -> (B, T, 49)."""
    def count(low, high, apart):  # pairs of keys, one in low and one in high, so far apart
        return (low[..., :data.KEYS - apart] * high[..., apart:]).sum(-1)

    begins, ends = changes.relu(), (-changes).relu()
    return torch.stack([*(count(frames, frames, apart) for apart in range(1, 25)),
                        *(count(ends, begins, apart) for apart in range(13)),
                        *(count(begins, ends, apart) for apart in range(1, 13))], -1)


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
        x = torch.cat([frames, changes, 0.2 * intervals(frames, changes)], -1)  # (B, window, 225)
        x = x.unflatten(1, (-1, self.patch)).flatten(2)  # (B, window / patch, patch * 225)
        x, _ = self.lstm(self.dropout(F.leaky_relu(self.inp(x), 0.2)))  # (B, window / patch, H)
        x = self.attention(x + self.place)
        x = torch.cat([x.mean(1), x[:, -1]], -1)
        return self.out(self.dropout(F.leaky_relu(self.mix(x), 0.2)))[:, 0]


def gradient_penalty(critic, real, fake):
    """E[(|grad f(x')| - 1)^2] over points x' on lines between real and fake windows (B, T, 88).
    The loss needs this gradient's gradient, which cuDNN's LSTM lacks and oneDNN's takes long for:
    both are switched off for this pass."""
    with (torch.backends.cudnn.flags(enabled=False),
          torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)):
        part = torch.rand(len(real), 1, 1, device=real.device)
        between = (part * real + (1 - part) * fake).requires_grad_()
        gradient, = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class WGAN(nn.Module):
    """Generator, critic, and the running average of the generator's weights, which samples.

    voices: V; window: frames that the critic sees; z: noise of a piece; noise: of each frame;
    patch: frames that the critic's LSTM reads at once; loss: "wasserstein", "minimax", or
    "printed", with the paper's sign; gp: weight of the gradient penalty; entropy: that the choices
    are held near, in nats per voice, 0 for no hold.
    """

    def __init__(self, voices=4, window=32, z=64, noise=16, hidden=128, layers=1, heads=4,
                 critic_layers=1, critic_heads=4, patch=2, dropout=0.3, loss="wasserstein",
                 gp=10.0, entropy=1.0):
        super().__init__()
        for name, count in (("heads", heads), ("critic-heads", critic_heads)):
            if hidden % count:
                raise data.InputError(f"--{name} {count} does not divide --hidden {hidden}")
        self.window, self.z, self.noise = window, z, noise
        self.loss, self.gp, self.entropy = loss, gp, entropy
        self.generator = Generator(voices, window, z, noise, hidden, layers, heads)
        self.critic = Critic(window, hidden, critic_layers, critic_heads, patch, dropout)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    @torch.no_grad()
    def start_at(self, frames):
        """Start from how often each voice does what in these windows (B, T, 88)."""
        symbols = data.to_voices(frames, self.generator.voices).flatten(0, -2)  # (B * T, V)
        often = F.one_hot(symbols, data.SYMBOLS).float().mean(0)  # (V, 89)
        for generator in (self.generator, self.average):
            generator.out.bias.copy_((often + 1e-4).log().flatten())

    def fake(self, n):
        """n windows of the generator (n, window, 88) and their entropy, with gradients."""
        device = self.generator.place.device
        noise = torch.randn(n, self.window, self.noise, device=device)
        return self.generator(torch.randn(n, self.z, device=device), noise)[:2]

    def forward(self, frames, mask):
        """The critic's loss on full windows (B, window, 88), and its parts for the log."""
        with torch.no_grad():
            fake, _ = self.fake(len(frames))
        real_score, fake_score = self.critic(torch.cat([frames, fake])).chunk(2)
        gap = real_score.mean() - fake_score.mean()
        if self.loss == "minimax":  # Goodfellow et al. 2014: the score is the log-odds of real
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
        """The generator's loss on n windows, and its parts. It holds the entropy of the choices:
        as that grows, gradients speak of symbols never chosen, and the critic runs away."""
        fake, entropy = self.fake(n)
        score = self.critic(fake)
        loss = -F.softplus(score).mean() if self.loss == "minimax" else -score.mean()
        parts = {"generator_loss": loss.detach(), "entropy": entropy.detach()}
        return (loss + (entropy - self.entropy) ** 2 if self.entropy else loss), parts

    @torch.no_grad()
    def sample(self, n, length, generator=None, temperature=1.0):
        """n pieces as bool (n, length, 88), a window at a time: the LSTM's state is carried on,
        attention reaches back over the last window. temperature scales the frames' noise, not z."""
        device = self.average.place.device
        z, state, roll = torch.randn(n, self.z, generator=generator, device=device), None, []
        for first in range(0, length, self.window):
            noise = torch.randn(n, self.window, self.noise, generator=generator, device=device)
            keys, _, state = self.average(z, temperature * noise, first, state)
            roll.append(keys > 0.5)
        return torch.cat(roll, 1)[:, :length]


def textures(rolls):
    """Histograms over all rolls (T, 88): notes at once, note lengths in frames, steps of the top
    and of the bottom line in semitones, chords as pitch-class sets above the bass."""
    sizes = {"notes": 89, "length": 17, "top": 27, "bottom": 27, "chord": 4096}
    total = {name: np.zeros(size) for name, size in sizes.items()}
    for roll in rolls:
        sounding = roll[roll.any(1)]
        top, bottom = data.KEYS - 1 - sounding[:, ::-1].argmax(1), sounding.argmax(1)
        up, down = (np.diff(line) for line in (top, bottom))
        edges = np.diff(np.pad(roll, ((1, 1), (0, 0))).astype(int), axis=0).T  # (88, T + 1)
        frame, key = np.nonzero(sounding)
        classes = np.zeros((len(sounding), 12), int)
        classes[frame, (key - bottom[frame]) % 12] = 1
        values = {"notes": roll.sum(1), "top": up[up != 0].clip(-13, 13) + 13,
                  "length": (np.nonzero(edges < 0)[1] - np.nonzero(edges > 0)[1]).clip(max=16),
                  "bottom": down[down != 0].clip(-13, 13) + 13, "chord": classes @ 2**np.arange(12)}
        for name, size in sizes.items():
            total[name] += np.bincount(values[name], minlength=size)
    return total


@torch.no_grad()
def evaluate(model, pieces):
    """Figures against held-out pieces (bool (T, 88)): critic_gap, E[f(x)] - E[f(G(z))]; of 64
    samples of 128 frames the mean divergence of their textures, the share of silent frames, and
    the largest share of frames that two have in common (alike: mode collapse)."""
    model.eval()
    device = model.average.place.device
    generator = torch.Generator(device).manual_seed(0)
    windows = data.Windows(pieces, model.window, device, hop=model.window, full=True)
    real = torch.cat([model.critic(frames) for frames, _ in windows.chunks(64)]).mean()
    fake = model.critic(model.sample(256, model.window, generator).float()).mean()
    rolls = model.sample(64, 128, generator).cpu().numpy()
    have, want = textures(rolls), textures(pieces)
    model.train()
    alike = max((roll == rolls[:i]).all(2).mean(1).max() for i, roll in enumerate(rolls) if i)
    distances = [data.divergence(have[name], want[name]) for name in want]
    return {"critic_gap": (real - fake).item(), "texture_distance": float(np.mean(distances)),
            "silent": float((~rolls.any(2)).mean()), "alike": float(alike)}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    model = WGAN(**data.config(WGAN, args)).to(args.device)
    kind = torch.optim.RMSprop if args.optimizer == "rmsprop" else torch.optim.Adam
    more = {"betas": (0.0, 0.9)} if args.optimizer == "adam" else {}
    # Constant rates: as they fall, the critic outruns G.
    optimizer = kind(model.generator.parameters(), lr=args.lr, **more)
    critic_optimizer = kind(model.critic.parameters(), lr=args.critic_lr, **more)
    windows = data.Windows(corpus.train, args.window, args.device, full=True)
    for pieces in (corpus.valid, corpus.test):  # they need a full window too: said now
        data.Windows(pieces, args.window, full=True)
    model.start_at(windows.sample(256, args.transpose)[0])
    run = data.Run("wgan", args, model, corpus, optimizer=optimizer, critic=critic_optimizer)

    for step in run.steps(args.steps):
        for _ in range(args.n_critic):
            frames, mask = windows.sample(args.batch, args.transpose)
            loss, parts = model(frames, mask)
            critic_optimizer.zero_grad()
            loss.backward()
            run.average_gradients(model.critic, mask)
            critic_optimizer.step()
            for weight in model.critic.parameters() if args.clip else []:
                weight.data.clamp_(-args.clip, args.clip)  # keeps f Lipschitz, the crude way
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
            collapsed = valid["alike"] > 0.5  # distances count once the samples differ
            run.log(args.steps, valid, best=valid["texture_distance"] + collapsed)

    run.load_best()
    run.finish(evaluate(model, corpus.test))


def main(argv=None):
    parser = data.Parser(__doc__, run="wgan", log=(
        "gap, score of Bach less score of samples; alike: largest share two samples share"))
    add = parser.add_argument
    add("--window", type=data.positive_int, default=32, help="frames of a training window")
    add("--steps", type=data.positive_int, default=4000, help="generator steps")
    add("--batch", type=data.positive_int, default=32, help="windows per step")
    add("--lr", type=data.positive, default=1e-3, help="learning rate of the generator")
    add("--eval-every", type=data.positive_int, default=200, help="steps between checkpoints")
    add("--z", type=data.positive_int, default=64, help="dimensions of a whole piece's noise")
    add("--noise", type=data.natural, default=16, help="dimensions of each frame's noise")
    add("--hidden", type=data.positive_int, default=128, help="units of each LSTM layer")
    add("--layers", type=data.positive_int, default=1, help="LSTM layers of the generator")
    add("--heads", type=data.positive_int, default=4, help="attention heads of the generator")
    add("--critic-layers", type=data.positive_int, default=1, help="LSTM layers of the critic")
    add("--critic-heads", type=data.positive_int, default=4, help="attention heads of the critic")
    add("--patch", type=data.positive_int, default=2, help="frames the critic's LSTM reads at once")
    add("--dropout", type=data.dropout, default=0.3, help="share of the critic's units dropped")
    add("--loss", choices=["wasserstein", "minimax", "printed"], default="wasserstein",
        help="minimax: Goodfellow's, tried first in the paper; printed: with the paper's sign")
    add("--entropy", type=data.non_negative, default=1.0, help="of the choices, nats per voice, "
        "that they are held near; 0: no hold")
    add("--gp", type=data.non_negative, default=10.0, help="weight of the gradient penalty")
    add("--clip", type=data.non_negative, default=0.0, help="largest weight of the critic; 0: any")
    add("--n-critic", type=data.positive_int, default=1, help="critic steps per generator step")
    add("--critic-lr", type=data.positive, default=2e-3, help="learning rate of the critic")
    add("--optimizer", choices=["adam", "rmsprop"], default="adam", help="adam has betas 0 and 0.9")
    add("--average", type=data.decay, default=0.997, help="how slowly the averaged weights follow")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
