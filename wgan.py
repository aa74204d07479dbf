"""A Wasserstein GAN of windows of music (section 5.7 of the paper).

A generator G writes pieces x from noise z (Z), reading what it has played; a critic f gives a
window of T frames one score. f learns to score Bach above G, and G to be scored high:

    h_t = LSTM(x_<t, z)                                                  (H), z ~ N(0, I)
    x_t ~ prod_v p(voice v | h_t, attention(h_t), x_t-1, the voices chosen before v)   (V, 89)
    L_C = E[f(G(z))] - E[f(x)] + lambda E[(|grad f(y)| - 1)^2]
    L_G = - E[f(G(z))]

E[f(x)] - E[f(G(z))] estimates the Wasserstein distance between the two as far as f is 1-Lipschitz
in what it reads, fixed features of a window: by the penalty, at points y between Bach's features
and G's (--gp, Gulrajani et al. 2017), or by clipping its weights (--clip, Arjovsky et al. 2017).

    python wgan.py                                                          # default run
    python wgan.py --layers 4 --critic-layers 2 --heads 8 --hidden 1024 --patch 1 --restart 1 \\
        --dropout 0 --batch 1024 --lr 1e-4 --critic-lr 2e-4 --gp 0 --clip 0.01 \\
        --average 0 --steps 41                                              # the paper's 20 epochs

Differences from the paper:
- It prints L_C = E[f(x)] - E[f(G(z))], whose minimum teaches both to score G above Bach (--loss
  printed). The loss it tried first is --loss minimax. Clipping hardly learns at this size.
- G's pieces go on from one training step to the next, so that f sees, and G learns, what becomes
  of them; a share of them ends and begins anew (--restart 1: all, a piece is one window).
- A frame's voices are drawn one after the other. Each is one-hot, with the gradient of its
  probabilities (straight-through, Bengio et al. 2013): G learns how f would change, to first
  order, had it drawn another symbol and all else stayed.
- f reads intervals and pitch classes, counted alike in all keys, and also scores every four frames.
- Dropout in f: a critic too sure drives the generator about instead of teaching it.
- Averaged generator weights, kept where the samples' changes of chords come nearest to Bach's.
"""

import copy
from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data

GOING = "z", "h", "c", "heard", "last"
METRE = 16  # frames: training windows begin at multiples of 16
SPAN = 24  # semitones: the largest interval that heads and critic tell apart


def interval(a, b):
    """Interval from symbols b up to symbols a as a class: 88 is the same key, 0: one rests."""
    return torch.where((a > 0) & (b > 0), a - b + data.KEYS, 0)


def relative(scores, symbol):
    """Scores (..., 2 * SPAN + 1) of intervals from symbol (...), none if a rest -> (..., 89)."""
    symbols = torch.arange(data.SYMBOLS, device=symbol.device)
    steps = (symbols - symbol[..., None]).clamp(-SPAN, SPAN) + SPAN
    return scores.gather(-1, steps) * ((symbols > 0) & (symbol[..., None] > 0))


class Heads(nn.Module):
    """The voices of a frame, chosen one after the other, outer ones first, a head each. It scores
    symbols, intervals from its voice's last note and from each chosen voice, and the note that
    moves in parallel with a chosen one. What crosses or doubles a chosen voice gets no mass."""

    def __init__(self, voices, inputs, hidden):
        super().__init__()
        self.order = [0, voices - 1, *range(1, voices - 1)][:voices]
        self.pitch, self.interval = nn.Embedding(data.SYMBOLS, 32), nn.Embedding(2 * data.KEYS, 32)
        self.sizes = [[data.SYMBOLS, 2 * SPAN + 1, *[2 * SPAN + 1, 12] * i] for i in range(voices)]
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Linear(inputs + 32 * (voices - 1) + 96 * i, hidden), nn.LeakyReLU(0.2),
            nn.Linear(hidden, sum(out))) for i, out in enumerate(self.sizes))

    def forward(self, x, last, voices=None, **draw):
        """Frames after last (B, T, V), from what is known, x (B, T, .): voices (B, T, V), given or
        drawn, see data.sample_symbols; and the probabilities of their symbols (B, T, V, 89)."""
        symbols, chosen, p = torch.arange(data.SYMBOLS, device=x.device), {}, {}
        for v, head, sizes in zip(self.order, self.heads, self.sizes):
            own = last[..., v]
            known = [x, *(self.interval(interval(last[..., u], own)) for u in self.order if u != v)]
            for u, now in chosen.items():  # its pitch, its motion, its interval from v's last note
                known += [self.pitch(now), self.interval(interval(now, last[..., u])),
                          self.interval(interval(now, own))]
            logits, motion, *pairs = head(torch.cat(known, -1)).split(sizes, -1)
            logits = logits + relative(motion, own)
            for (u, now), harmony, parallel in zip(chosen.items(), pairs[::2], pairs[1::2]):
                then = last[..., u]
                along = (own + now - then).clamp(0, data.KEYS)  # the note that keeps the interval
                moves = (now > 0) & (then > 0) & (own > 0) & (now != then)
                score = parallel.gather(-1, ((then - own) % 12)[..., None]) * moves[..., None]
                logits = (logits + relative(harmony, now)).scatter_add(-1, along[..., None], score)
                fits = ((symbols - now[..., None]) * (u - v) > 0) & (now > 0)[..., None]
                logits = logits.masked_fill(~fits & (symbols > 0), -torch.inf)  # a rest always fits
            chosen[v] = data.sample_symbols(logits, **draw) if voices is None else voices[..., v]
            p[v] = logits.softmax(-1)
        return tuple(torch.stack([parts[v] for v in sorted(parts)], at) for parts, at in
                     ((chosen, -1), (p, -2)))


class Generator(nn.Module):
    """z and the frames before -> LSTM layers -> attention to their last outputs -> heads."""

    def __init__(self, voices, window, z, hidden, layers, heads):
        super().__init__()
        self.voices, self.window, self.z = voices, window, z
        self.start = nn.Linear(z, 2 * layers * hidden)
        self.lstm = nn.LSTM(data.KEYS + z + METRE, hidden, layers, batch_first=True)
        nn.init.normal_(self.lstm.weight_ih_l0[:, :data.KEYS], std=0.3)  # four of 88 are on
        self.attend = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.heads = Heads(voices, 2 * hidden, hidden)

    def begin(self, n, generator=None):
        """What n new pieces go on from: z (n, Z), states h and c of the LSTM (n, layers, H), its
        last outputs (n, window, H), none yet, and the last frame (n, 1, V), silence."""
        z = torch.randn(n, self.z, generator=generator, device=self.start.weight.device)
        h, c = self.start(z).tanh().unflatten(-1, (2, self.lstm.num_layers, -1)).unbind(1)
        silence = torch.zeros(n, 1, self.voices, dtype=torch.long, device=z.device)
        return z, h, c, z.new_zeros(n, self.window, h.shape[-1]), silence

    def read(self, voices, z, h, c, heard, t=0):
        """Read frames t, t + 1, ... of pieces, voices (n, T, V), with the first four of begin():
        what the heads know of the frame after each (n, T, 2 H), and what to go on from."""
        n, T = voices.shape[:2]
        time, old = (torch.arange(x, device=z.device) for x in (T, self.window + T))
        x = [data.from_voices(voices).to(z.dtype), z[:, None].expand(-1, T, -1),
             F.one_hot((time + t) % METRE, METRE).expand(n, -1, -1)]  # and its place in the metre
        state = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        x, (h, c) = self.lstm(torch.cat(x, -1), state)  # (n, T, H)
        heard = torch.cat([heard, x], 1)
        ago = time[:, None] + self.window - old  # (T, window + T)
        found, _ = self.attend(x, heard, heard, need_weights=False,
                               attn_mask=(ago < 0) | (ago >= self.window))
        going = z, h.transpose(0, 1), c.transpose(0, 1), heard[:, T:]
        return torch.cat([x, found], -1), going

    @torch.no_grad()
    def play(self, begun, length, generator=None, **draw):
        """`length` frames more of pieces that go on from `begun`: their voices, the last frame
        before them first (n, 1 + length, V), and what to go on from."""
        *going, last = begun
        frames = [last]
        for t in range(length):
            known, going = self.read(frames[-1], *going, t)
            frames.append(self.heads(known, frames[-1], generator=generator, **draw)[0])
        return torch.cat(frames, 1), (*going, frames[-1])

    def forward(self, begun, frames):
        """The pieces that play() played, frames (n, 1 + length, V), from what it began with: the
        probabilities of their notes (n, length, V, 89)."""
        known, _ = self.read(frames[:, :-1], *begun[:-1])
        return self.heads(known, frames[:, :-1], frames[:, 1:])[1]


def before(x):
    """x (B, T, ...) a frame later: at each frame what was in the one before, at the first 0."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def intervals(a, b, steps):
    """Notes a and b (..., S), one-hot or, in a rest, zero -> the interval from a up to b as one-hot
    of `steps` (D), zero if it is none of them: (..., D), with the gradients of sum_k a_k b_k+d."""
    a_key, b_key = a.argmax(-1, keepdim=True), b.argmax(-1, keepdim=True)
    up = b.gather(-1, (a_key + steps).clamp(min=0) * (a_key > 0))
    down = a.gather(-1, (b_key - steps).clamp(min=0) * (b_key > 0))
    return up + down - down.detach()


class Critic(nn.Module):
    """Features of frames -> a score of every four; LSTM layers -> attention over all -> one score;
    the sum of its and the others' mean."""

    def __init__(self, voices, window, hidden, layers, heads, patch, dropout):
        super().__init__()
        self.patch, pairs = patch, voices * (voices - 1) // 2
        features = voices * (data.SYMBOLS + 2 * SPAN + 1) + pairs * (25 + 12) + 4 * 12 + METRE
        self.inp = nn.Linear(features, hidden)
        self.near = nn.Linear(4 * hidden, hidden)
        self.near_out = nn.Linear(hidden, 1)
        self.lstm = nn.LSTM(patch * hidden, hidden, layers, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.attend = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def features(self, voices):
        """Windows as one-hot voices (B, T, V, 89) -> what the critic reads (B, T, features): the
        voices; their motions; intervals between two, and those kept in parallel motion; pitch
        classes above the bass, above the bass before, and above those of 8 frames, and of all; the
        place in the metre."""
        T, V = voices.shape[1:3]
        steps = torch.arange(-SPAN, 25, device=voices.device)
        high, low = torch.triu_indices(V, V, 1, device=voices.device)  # all pairs
        sound = F.pad(voices[..., 1:], (1, 24))  # no rests, and room for intervals
        motion = intervals(before(sound), sound, steps)  # (B, T, V, 49)
        chord = intervals(sound[:, :, low], sound[:, :, high], steps[SPAN:])  # (B, T, pairs, 25)
        folded = F.pad(chord, (0, 11)).unflatten(-1, (3, 12)).sum(-2)
        kept = folded * before(folded) * (1 - motion[:, :, low, SPAN:SPAN + 1])
        classes = F.pad(voices[..., 1:], (0, 8)).unflatten(-1, (8, 12)).sum(-2)  # (B, T, V, 12)
        bass, classes = classes[:, :, -1], classes.sum(2)
        around = [classes.unflatten(1, (-1, n)).mean(2).repeat_interleave(n, 1) for n in (8, T)]
        roots = torch.stack([bass, before(bass), *around], 2)  # (B, T, 4, 12)
        shifted = torch.cat([classes, classes[..., :11]], -1).unfold(-1, 12, 1)  # [c, d]: c + d
        place = F.one_hot(torch.arange(T, device=voices.device) % METRE, METRE)
        parts = voices, motion, chord, kept, roots @ shifted, place.expand(len(voices), -1, -1)
        return torch.cat([part.flatten(2) for part in parts], -1)

    def forward(self, features):
        """features (B, window, features) -> scores (B,)."""
        x = self.dropout(F.leaky_relu(self.inp(features), 0.2))  # (B, window, H)
        near = self.near(x.unfold(1, 4, 1).transpose(2, 3).flatten(2))  # (B, window - 3, H)
        near = self.near_out(self.dropout(F.leaky_relu(near, 0.2))).mean(1)
        x, _ = self.lstm(x.unflatten(1, (-1, self.patch)).flatten(2))  # (B, window / patch, H)
        x = x + self.attend(x, x, x)[0]  # with its weights: the fused one has no second derivatives
        x = self.dropout(F.leaky_relu(self.mix(torch.cat([x.mean(1), x[:, -1]], -1)), 0.2))
        return (self.out(x) + near)[:, 0]


@torch.backends.cudnn.flags(enabled=False)  # its LSTM has no second derivatives
@torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)  # oneDNN's takes long for them
def gradient_penalty(critic, real, fake):
    """E[(|grad f(y)| - 1)^2] over points y on lines between real and fake features (B, T, .)."""
    part = torch.rand(len(real), 1, 1, device=real.device)
    between = (part * real + (1 - part) * fake).requires_grad_()
    gradient, = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class WGAN(nn.Module):
    """Generator, critic, and the running average of the generator's weights, which samples.
    voices: V; window: frames that the critic sees; z: Z; patch: frames that its LSTM reads at once;
    loss: "wasserstein", "minimax", or "printed", with the paper's sign; gp: lambda."""

    def __init__(self, voices=4, window=32, z=64, hidden=128, layers=1, heads=4, critic_layers=1,
                 critic_heads=4, patch=4, dropout=0.3, loss="wasserstein", gp=10.0, batch=32,
                 restart=0.25):
        super().__init__()
        if hidden % heads or hidden % critic_heads or window % patch or window % 8:
            raise data.InputError("--heads and --critic-heads must divide --hidden, --patch and 8 "
                                  "must divide --window")
        self.voices, self.window, self.loss, self.gp = voices, window, loss, gp
        self.generator = Generator(voices, window, z, hidden, layers, heads)
        self.critic = Critic(voices, window, hidden, critic_layers, critic_heads, patch, dropout)
        self.restart = restart
        for name, x in zip(GOING, self.generator.begin(batch)):
            self.register_buffer(name, x.detach())
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def play(self, n):
        """Windows of the n pieces that G has under way, one-hot (n, window, V, 89), with the
        gradient of the voices' probabilities: the heads work these out again, all frames at once.
        A share `restart` of the pieces ends before it, and others begin."""
        going = [getattr(self, name)[data.RANK::data.WORLD][:n] for name in GOING]
        again = torch.rand(n, device=self.z.device) < self.restart
        begun = [torch.where(again.view(-1, *[1] * (x.dim() - 1)), y, x)
                 for x, y in zip(going, self.generator.begin(n))]
        frames, going = self.generator.play(begun, self.window)
        for name, x in zip(GOING, going):
            getattr(self, name)[data.RANK::data.WORLD][:n] = x
        p = self.generator(begun, frames)
        return F.one_hot(frames[:, 1:], data.SYMBOLS) + (p - p.detach())  # the bracket is 0

    def features(self, frames):
        """What the critic reads of frames (B, T, 88)."""
        voices = F.one_hot(data.to_voices(frames, self.voices), data.SYMBOLS)
        return self.critic.features(voices.to(self.critic.inp.weight.dtype))

    def forward(self, frames, mask, played=None):
        """The critic's loss on full windows (B, window, 88) and as many that the generator plays,
        or has played, one-hot (B, window, V, 89); and its parts for the log."""
        played = self.play(len(frames)) if played is None else played
        real, fake = self.features(frames), self.critic.features(played.detach())
        real_score, fake_score = self.critic(torch.cat([real, fake])).chunk(2)
        gap = real_score.mean() - fake_score.mean()
        loss = gap if self.loss == "printed" else -gap
        if self.loss == "minimax":  # Goodfellow et al. 2014: the score is the log-odds of real
            loss = F.softplus(-real_score).mean() + F.softplus(fake_score).mean()
        parts = {"critic_loss": loss.detach(), "critic_gap": gap.detach()}
        if self.gp:
            penalty = gradient_penalty(self.critic, real, fake)
            loss = loss + self.gp * penalty
            parts["penalty"] = penalty.detach()
        return loss, parts

    def generator_loss(self, n, played=None):
        """The generator's loss on n windows, or on those played, and it for the log."""
        played = self.play(n) if played is None else played
        score = self.critic(self.critic.features(played))
        loss = -F.softplus(score).mean() if self.loss == "minimax" else -score.mean()
        return loss, {"generator_loss": loss.detach()}

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.95):
        """n new pieces as bool (n, length, 88); temperature, top_p: see data.sample_symbols."""
        begun = self.average.begin(n, generator)
        voices, _ = self.average.play(begun, length, generator, temperature=temperature,
                                      top_p=top_p)
        return data.from_voices(voices[:, 1:])


def changes(rolls):
    """Changes of chords in rolls (T, 88), counted: two different chords in a row, each as pitch
    classes above its bass, and the step between the basses."""
    count = Counter()
    for roll in rolls:
        keys = [np.flatnonzero(frame) for frame in roll if frame.any()]
        chords = [(frame[0], frozenset((frame - frame[0]) % 12)) for frame in keys]
        count.update((a[1], b[1], b[0] - a[0]) for a, b in pairwise(chords) if a != b)
    return count


@torch.no_grad()
def evaluate(model, pieces):
    """Of 64 samples beside held-out pieces (bool (T, 88)): critic_gap, E[f(x)] - E[f(G(z))];
    change_distance, divergence of the changes of chords; silent, share of silent frames; alike,
    largest share of frames that two samples have in common (mode collapse)."""
    model.eval()
    window, device = model.window, model.critic.inp.weight.device
    generator = torch.Generator(device).manual_seed(0)
    rolls = model.sample(64, window * max(1, 128 // window), generator)
    frames, _ = next(data.Windows(pieces, window, device, window, full=True).chunks(1024))
    real, fake = model.features(frames), model.features(rolls.reshape(-1, window, data.KEYS))
    gap = model.critic(real).mean() - model.critic(fake).mean()
    common = (rolls[:, None] == rolls).all(-1).float().mean(-1).fill_diagonal_(0)  # (64, 64)
    model.train()
    want, have = changes(pieces), changes(rolls.cpu().numpy())
    both = np.array([(want[change], have[change]) for change in want | have])
    return {"critic_gap": gap.item(), "change_distance": data.divergence(*both.T),
            "silent": (~rolls.any(2)).float().mean().item(), "alike": common.max().item()}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    model = WGAN(**data.config(WGAN, args)).to(args.device)
    # Betas are Gulrajani's; rates are constant: as they fall, the critic outruns G.
    optimizer = torch.optim.Adam(model.generator.parameters(), args.lr, (0.0, 0.9))
    critic_optimizer = torch.optim.Adam(model.critic.parameters(), args.critic_lr, (0.0, 0.9))
    windows = data.Windows(corpus.train, args.window, args.device, full=True)
    for pieces in (corpus.valid, corpus.test):  # they need a full window too: said now
        data.Windows(pieces, args.window, full=True)
    run = data.Run("wgan", args, model, corpus, optimizer=optimizer, critic=critic_optimizer)

    for step in run.steps(args.steps):
        for _ in range(args.n_critic):
            frames, mask = windows.sample(args.batch, args.transpose)
            played = model.play(len(frames))
            loss, parts = model(frames, mask, played)
            critic_optimizer.zero_grad()
            loss.backward()
            run.average_gradients(model.critic, mask)
            critic_optimizer.step()
            for weight in model.critic.parameters() if args.clip else []:
                weight.data.clamp_(-args.clip, args.clip)  # keeps f Lipschitz, the crude way
        loss, generator_parts = model.generator_loss(len(frames), played)  # the last: half the time
        optimizer.zero_grad()
        loss.backward(inputs=list(model.generator.parameters()))
        run.average_gradients(model.generator, mask)
        optimizer.step()
        with torch.no_grad():  # the average follows the first steps closely
            for mean, weight in zip(model.average.parameters(), model.generator.parameters()):
                mean.lerp_(weight, 1 - min(args.average, step / (step + 10)))
        run.add({**parts, **generator_parts}, mask.repeat(args.n_critic, 1))
        if step % args.eval_every == 0 or step == args.steps:
            valid = evaluate(model, corpus.valid)
            collapsed = valid["alike"] > 0.5  # distances count once the samples differ
            run.log(args.steps, valid, best=valid["change_distance"] + collapsed)

    run.load_best()
    run.finish(evaluate(model, corpus.test))


def main(argv=None):
    parser = data.Parser(__doc__, run="wgan", log=(
        "gap, score of Bach less score of samples; alike: largest share two samples share"))
    add = parser.add_argument
    add("--window", type=data.positive_int, default=32, help="frames of a training window")
    add("--steps", type=data.positive_int, default=1000, help="generator steps")
    add("--batch", type=data.positive_int, default=32, help="windows per step")
    add("--lr", type=data.positive, default=1e-3, help="learning rate of the generator")
    add("--eval-every", type=data.positive_int, default=100, help="steps between checkpoints")
    add("--z", type=data.positive_int, default=64, help="dimensions of a whole piece's noise")
    add("--hidden", type=data.positive_int, default=128, help="units of each layer")
    add("--layers", type=data.positive_int, default=1, help="LSTM layers of the generator")
    add("--heads", type=data.positive_int, default=4, help="attention heads of the generator")
    add("--critic-layers", type=data.positive_int, default=1, help="LSTM layers of the critic")
    add("--critic-heads", type=data.positive_int, default=4, help="attention heads of the critic")
    add("--patch", type=data.positive_int, default=4, help="frames the critic's LSTM reads at once")
    add("--dropout", type=data.dropout, default=0.3, help="share of the critic's units dropped")
    add("--loss", choices=["wasserstein", "minimax", "printed"], default="wasserstein",
        help="minimax: Goodfellow's, tried first in the paper; printed: with the paper's sign")
    add("--gp", type=data.non_negative, default=10.0, help="weight of the gradient penalty")
    add("--clip", type=data.non_negative, default=0.0, help="largest weight of the critic; 0: any")
    add("--n-critic", type=data.positive_int, default=1, help="critic steps per generator step")
    add("--critic-lr", type=data.positive, default=2e-3, help="learning rate of the critic")
    add("--average", type=data.decay, default=0.997, help="how slowly the averaged weights follow")
    add("--restart", type=data.probability, default=0.25, help="x")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
