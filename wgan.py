"""A Wasserstein GAN of windows of music (section 5.7 of the paper).

A generator G writes windows x of T frames from noise z (Z), reading what it has played; a critic f
gives a window one score. f learns to score Bach above G, and G to be scored high:

    h_t = attention(LSTM(x_<t, z))                                           (H), z ~ N(0, I)
    x_t ~ prod_v p(voice v | h_t, x_t-1, the voices chosen before v)         (V, 89), one-hot
    L_C = E[f(G(z))] - E[f(x)] + lambda E[(|grad f(y)| - 1)^2]
    L_G = - E[f(G(z))]

E[f(x)] - E[f(G(z))] estimates the Wasserstein distance between the two as far as f is 1-Lipschitz
in what it reads, fixed features of a window: by the penalty, at points y between Bach's features
and G's (--gp, Gulrajani et al. 2017), or by clipping its weights (--clip, Arjovsky et al. 2017).

    python wgan.py                                                          # default run
    python wgan.py --layers 4 --critic-layers 2 --heads 8 --hidden 1024 --patch 1 \\
        --dropout 0 --batch 1024 --lr 1e-4 --critic-lr 2e-4 --gp 0 --clip 0.01 \\
        --average 0 --steps 41                                              # the paper's 20 epochs

Differences from the paper:
- It prints L_C = E[f(x)] - E[f(G(z))], whose minimum teaches both to score G above Bach (--loss
  printed). The loss it tried first is --loss minimax. Clipping hardly learns at this size.
- G reads what it has played and draws a frame's voices one after the other.
- A voice is one-hot, with the gradient of its probabilities (straight-through, Bengio et al. 2013):
  G learns how f would change, to first order, had it drawn another symbol and all else stayed.
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

METRE = 16  # frames: training windows begin at multiples of 16
SPAN = 24  # semitones: the largest interval that the heads tell apart
STEPS = 2 * SPAN + 2  # classes of intervals, the last where one of the two rests


class Attention(nn.Module):
    """Multi-head self-attention over frames, added to its input."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(hidden)
        self.query, self.memory = nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x, past):
        """Frames x (B, T, H) see each other and P frames before them, whose keys and values are
        past (B, P, 2 H) -> (B, T, H), and the keys and values of all (B, P + T, 2 H)."""
        memory = torch.cat([past, self.memory(self.norm(x))], 1)
        q = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = memory.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out: the fused attention has no second derivatives, which the penalty needs.
        scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, heads, T, P + T)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), memory


class Heads(nn.Module):
    """The voices of a frame, chosen one after the other, outer voices first, a head each. A head
    scores symbols, intervals from its voice's last note and from each chosen voice, and the note
    that would move in parallel with a chosen voice, by the interval between the two. Notes that
    cross or double a chosen voice get no mass."""

    def __init__(self, voices, hidden):
        super().__init__()
        self.order = [0, voices - 1, *range(1, voices - 1)][:voices]
        self.register_buffer("turn", torch.tensor(self.order), persistent=False)
        self.hidden = nn.Linear(hidden, voices * hidden)
        self.chosen = nn.ModuleList(  # what the others hear of it
            nn.Embedding(data.SYMBOLS, voices * hidden) for _ in range(voices - 1))
        for embedding in self.chosen:
            nn.init.normal_(embedding.weight, std=0.3)
        self.sizes = [(data.SYMBOLS, STEPS * (1 + i), 12 * i) for i in range(voices)]
        self.out = nn.ModuleList(nn.Linear(hidden, sum(sizes)) for sizes in self.sizes)
        symbols = torch.arange(data.SYMBOLS)
        steps = (symbols - symbols[:, None]).clamp(-SPAN, SPAN) + SPAN  # up from a row's symbol
        steps[0], steps[:, 0] = STEPS - 1, STEPS - 1
        self.register_buffer("steps", steps, persistent=False)

    def logits(self, i, hidden, last, chosen):
        """Logits (B, T, 89) of the i-th voice in order, from its hidden units (B, T, H), the voices
        of the frame before, last (B, T, V), and those chosen, in order (B, T, i)."""
        v, symbols = self.order[i], torch.arange(data.SYMBOLS, device=last.device)
        own, now = last[..., v, None], chosen[..., None]
        then = last.index_select(-1, self.turn[:i])
        scores = self.out[i](F.leaky_relu(hidden, 0.2))
        logits, relative, parallel = scores.split(self.sizes[i], -1)
        steps = self.steps[torch.cat([own, chosen], -1)]  # (B, T, 1 + i, 89)
        logits = logits + relative.unflatten(-1, (1 + i, STEPS)).gather(-1, steps).sum(-2)
        along = (own + chosen - then).clamp(0, data.KEYS)  # the notes that keep intervals
        moves = (chosen > 0) & (then > 0) & (own > 0) & (chosen != then)
        parallel = parallel.unflatten(-1, (i, 12)).gather(-1, (then - own)[..., None] % 12)
        logits = logits.scatter_add(-1, along, parallel[..., 0] * moves)
        higher = self.turn[:i, None] < v
        fits = torch.where(higher, symbols < now, (symbols > now) & (now > 0)).all(-2)
        return logits.masked_fill(~fits & (symbols > 0), -torch.inf)  # a rest always fits

    def forward(self, x, last, voices=None, **how):
        """What is known, x (B, T, H), and the frames before, last (B, T, V) -> voices (B, T, V), if
        not given drawn, see data.sample_symbols, and their probabilities (B, T, V, 89)."""
        hidden, drawn, p = self.hidden(x), torch.zeros_like(last), {}
        for i, v in enumerate(self.order):
            own = hidden.chunk(len(self.order), -1)[i]
            chosen = drawn.index_select(-1, self.turn[:i])
            logits = self.logits(i, own, last, chosen)
            symbol = data.sample_symbols(logits, **how) if voices is None else voices[..., v]
            drawn[..., v], p[v] = symbol, logits.softmax(-1)
            if i < len(self.chosen):  # all heads hear of the choice
                hidden = hidden + self.chosen[i](symbol)
        return drawn, torch.stack([p[v] for v in sorted(p)], -2)


class Generator(nn.Module):
    """z and the frames before -> LSTM layers -> attention over the last `window` -> heads."""

    def __init__(self, voices, window, z, hidden, layers, heads):
        super().__init__()
        self.voices, self.window, self.z = voices, window, z
        self.place = nn.Parameter(0.3 * torch.randn(METRE, 32))  # where in the metre a frame stands
        self.start = nn.Linear(z, 2 * layers * hidden)
        self.lstm = nn.LSTM(data.KEYS + z + 32, hidden, layers, batch_first=True)
        nn.init.normal_(self.lstm.weight_ih_l0[:, :data.KEYS], std=0.3)  # four of 88 are on
        self.attention = Attention(hidden, heads)
        self.heads = Heads(voices, hidden)

    @torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)  # as in data.sampling
    def forward(self, n, length, generator=None, **how):
        """Play n pieces, frame by frame: voices (n, 1 + length, V), a silent frame first, and what
        the heads knew of each frame (n, length, H)."""
        z = torch.randn(n, self.z, generator=generator, device=self.place.device)
        start = self.start(z).tanh().view(n, 2 * self.lstm.num_layers, -1).transpose(0, 1)
        state, memory = start.contiguous().chunk(2), z.new_zeros(n, 0, 2 * start.shape[-1])
        frames, known = [z.new_zeros(n, 1, self.voices, dtype=torch.long)], []
        for t in range(length):
            place = self.place[t % METRE].expand(n, 1, -1)
            x = torch.cat([data.from_voices(frames[-1]).to(z.dtype), z[:, None], place], -1)
            x, state = self.lstm(x, state)  # (n, 1, H)
            x, memory = self.attention(x, memory[:, 1 - self.window:])
            known.append(x)
            with torch.no_grad():
                voices, _ = self.heads(x, frames[-1], generator=generator, **how)
            frames.append(voices)
        return torch.cat(frames, 1), torch.cat(known, 1)


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
        features = voices * (data.SYMBOLS + 25) + pairs * (25 + 12) + 4 * 12
        self.inp = nn.Linear(features, hidden)
        self.metre = nn.Parameter(0.1 * torch.randn(METRE, hidden))
        self.near = nn.Linear(4 * hidden, hidden)
        self.near_out = nn.Linear(hidden, 1)
        self.lstm = nn.LSTM(patch * hidden, hidden, layers, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.place = nn.Parameter(0.1 * torch.randn(window // patch, hidden))
        self.attention = Attention(hidden, heads)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def features(self, voices):
        """Windows as one-hot voices (B, T, V, 89) -> what the critic reads (B, T, features): the
        voices; their motions; intervals between two, and those kept in parallel motion; pitch
        classes above the bass, above the bass before, and above those of 8 frames, and of all."""
        T, V = voices.shape[1:3]
        steps = torch.arange(-12, 25, device=voices.device)
        high, low = torch.triu_indices(V, V, 1, device=voices.device)  # all pairs
        sound = F.pad(voices[..., 1:], (1, 24))  # no rests, and room for intervals
        motion = intervals(before(sound), sound, steps[:25])  # (B, T, V, 25)
        chord = intervals(sound[:, :, low], sound[:, :, high], steps[12:])  # (B, T, pairs, 25)
        folded = F.pad(chord, (0, 11)).unflatten(-1, (3, 12)).sum(-2)
        kept = folded * before(folded) * (1 - motion[:, :, low, 12:13])
        classes = F.pad(voices[..., 1:], (0, 8)).unflatten(-1, (8, 12)).sum(-2)  # (B, T, V, 12)
        bass, classes = classes[:, :, -1], classes.sum(2)
        around = [classes.unflatten(1, (-1, n)).mean(2).repeat_interleave(n, 1) for n in (8, T)]
        roots = torch.stack([bass, before(bass), *around], 2)  # (B, T, 4, 12)
        shifted = torch.cat([classes, classes[..., :11]], -1).unfold(-1, 12, 1)  # [c, d]: c + d
        parts = voices, motion, chord, kept, roots @ shifted
        return torch.cat([part.flatten(2) for part in parts], -1)

    def forward(self, features):
        """features (B, window, features) -> scores (B,)."""
        metre = self.metre[torch.arange(features.shape[1], device=features.device) % METRE]
        x = self.dropout(F.leaky_relu(self.inp(features) + metre, 0.2))  # (B, window, H)
        near = self.near(x.unfold(1, 4, 1).transpose(2, 3).flatten(2))  # (B, window - 3, H)
        near = self.near_out(self.dropout(F.leaky_relu(near, 0.2))).mean(1)
        x, _ = self.lstm(x.unflatten(1, (-1, self.patch)).flatten(2))  # (B, window / patch, H)
        x, _ = self.attention(x + self.place, x.new_zeros(len(x), 0, 2 * x.shape[-1]))
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
                 critic_heads=4, patch=4, dropout=0.3, loss="wasserstein", gp=10.0):
        super().__init__()
        if hidden % heads or hidden % critic_heads or window % patch or window % 8:
            raise data.InputError("--heads and --critic-heads must divide --hidden, --patch and 8 "
                                  "must divide --window")
        self.voices, self.window, self.loss, self.gp = voices, window, loss, gp
        self.generator = Generator(voices, window, z, hidden, layers, heads)
        self.critic = Critic(voices, window, hidden, critic_layers, critic_heads, patch, dropout)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def play(self, n):
        """n windows that G plays, one-hot (n, window, V, 89), with the gradient of the voices'
        probabilities: the heads work these out again, for all frames at once."""
        frames, known = self.generator(n, self.window)
        voices, p = self.generator.heads(known, frames[:, :-1], frames[:, 1:])
        return F.one_hot(voices, data.SYMBOLS) + (p - p.detach())  # the bracket is 0

    def features(self, frames):
        """What the critic reads of frames (B, T, 88)."""
        voices = F.one_hot(data.to_voices(frames, self.voices), data.SYMBOLS)
        return self.critic.features(voices.to(self.critic.metre.dtype))

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
    def sample(self, n, length, generator=None, temperature=1.2, top_p=0.9):
        """n pieces as bool (n, length, 88). G is surer of its notes than Bach: hence 1.2; stray
        ones are rare but far off: hence 0.9. The first METRE frames, a run-up, are left out."""
        voices, _ = self.average(
            n, METRE + length, generator, temperature=temperature, top_p=top_p)
        return data.from_voices(voices[:, 1 + METRE:])


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
    window, device = model.window, model.critic.metre.device
    generator = torch.Generator(device).manual_seed(0)
    rolls = model.sample(64, window * max(1, 128 // window), generator)
    frames, _ = next(data.Windows(pieces, window, device, window, full=True).chunks(1024))
    real, fake = model.features(frames), model.features(rolls.reshape(-1, window, data.KEYS))
    gap = model.critic(real).mean() - model.critic(fake).mean()
    common = (rolls[:, None] == rolls).all(-1).float().mean(-1).fill_diagonal_(0)  # (64, 64)
    model.train()
    want, have = changes(pieces), changes(rolls.cpu().numpy())
    return {"critic_gap": gap.item(), "change_distance": data.divergence(want, have),
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
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
