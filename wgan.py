"""A Wasserstein GAN of windows of music (section 5.7 of the paper).

A generator G writes windows x of T frames from noise z (Z), reading what it has played; a critic f
gives a window one score. f learns to score Bach above G, and G to be scored high:

    h_t = attention(LSTM(x_<t, z))                                           (H), z ~ N(0, I)
    x_t ~ prod_v p(voice v | h_t, x_t-1, the voices chosen before v)         (V, 89), one-hot
    L_C = E[f(G(z))] - E[f(x)] + lambda E[(|grad f(y)| - 1)^2]
    L_G = - E[f(G(z))]

The gap E[f(x)] - E[f(G(z))] estimates the Wasserstein distance between the two as far as f is
1-Lipschitz in what it reads, fixed features of a window (Critic.features): by the penalty, at
points y between Bach's features and G's (--gp, Gulrajani et al. 2017), or by clipping its weights
(--clip, Arjovsky et al. 2017). G learns from f alone; it never sees Bach.

    python wgan.py                                                          # default run
    python wgan.py --layers 4 --critic-layers 2 --heads 8 --hidden 1024 --patch 1 \\
        --dropout 0 --batch 1024 --lr 1e-4 --critic-lr 2e-4 --gp 0 --clip 0.01 \\
        --average 0 --steps 41                                              # the paper's 20 epochs

Differences from the paper:
- It prints L_C = E[f(x)] - E[f(G(z))]. Minimised as printed, critic and generator both learn to
  score G above Bach (--loss printed). The loss it tried first is --loss minimax.
- Gradient penalty, not clipping, which hardly learns at this size.
- G reads what it has played and draws a frame's voices one after the other (class Heads): written
  at once, from noise alone, notes do not follow from each other.
- A voice is one-hot, with the gradient of its probabilities (straight-through, Bengio et al. 2013):
  G learns how f would change, to first order, had it drawn another symbol and all else stayed.
- f reads intervals and pitch classes, counted alike in all keys: chords are learnt in minutes. It
  also scores every four frames, for chords and leading.
- Dropout in f: a critic too sure drives the generator about instead of teaching it.
- Averaged generator weights, and of them those that come nearest to the validation pieces.
"""

import copy
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data

METRE = 16  # frames: training windows begin at multiples of 16
SPAN = 24  # semitones: the largest interval that the heads tell apart


class Heads(nn.Module):
    """The voices of a frame, chosen one after the other, outer voices first, a head each.

    A head scores symbols, intervals from its voice's last note and from each chosen voice, and the
    note that would move in parallel with a chosen voice, by the interval between the two. Notes
    that cross or double a chosen voice get no mass.
    """

    def __init__(self, voices, hidden):
        super().__init__()
        self.order = [0, voices - 1, *range(1, voices - 1)][:voices]
        self.hidden = nn.Linear(hidden, voices * hidden)
        self.chosen = nn.ModuleList(  # what the others hear of a choice
            nn.Embedding(data.SYMBOLS, voices * hidden) for _ in range(voices - 1))
        for embedding in self.chosen:
            nn.init.normal_(embedding.weight, std=0.3)
        steps = 2 * SPAN + 2  # intervals, and that one of the two rests
        self.out = nn.ModuleList(
            nn.Linear(hidden, data.SYMBOLS + steps * (1 + i) + 12 * i) for i in range(voices))
        # Tables with a row per symbol: where its intervals' scores stand, and what it leaves free.
        k, never = torch.arange(data.SYMBOLS), torch.tensor(-torch.inf)
        apart = (k - k[:, None]).clamp(-SPAN, SPAN) + SPAN
        seats = data.SYMBOLS + apart.where((k > 0) & (k[:, None] > 0), steps - 1)
        below, above = k < k[:, None], (k > k[:, None]) & (k[:, None] > 0)
        self.register_buffer("seats", seats + steps * torch.arange(voices)[:, None, None], False)
        self.register_buffer("below", torch.where(below | (k == 0), 0, never), False)
        self.register_buffer("above", torch.where(above | (k == 0), 0, never), False)

    def logits(self, i, hidden, last, voices):
        """Logits (B, T, 89) of the i-th voice in order, from its hidden units (B, T, H), the voices
        of the frame before, last (B, T, V), and the chosen ones in voices (B, T, V)."""
        v, chosen = self.order[i], self.order[:i]
        scores = self.out[i](F.leaky_relu(hidden, 0.2))
        known = [last[..., v], *(voices[..., u] for u in chosen)]
        seats = torch.stack([table[symbol] for table, symbol in zip(self.seats, known)], 2)
        relative = scores.gather(-1, seats.flatten(2)).view(seats.shape)  # (B, T, 1 + i, 89)
        logits = scores[..., :data.SYMBOLS] + relative.sum(2)
        if i:
            own, now = known[0][..., None], torch.stack(known[1:], -1)
            then = torch.stack([last[..., u] for u in chosen], -1)
            moves = (now > 0) & (then > 0) & (own > 0) & (now != then)
            parallel = scores[..., -12 * i:].unflatten(-1, (i, 12))
            parallel = parallel.gather(-1, ((then - own) % 12)[..., None])[..., 0] * moves
            along = (own + now - then).clamp(0, data.KEYS)  # the note that keeps the interval
            logits = logits.scatter_add(-1, along, parallel)
            logits = logits + self.below[voices[..., 0 if i == 1 else v - 1]]
        return logits + self.above[voices[..., -1]] if i > 1 else logits

    def forward(self, x, last, choose):
        """What is known, x (B, T, H), and the frame before, last (B, T, V) -> voices (B, T, V):
        choose(v, logits) gives symbols (B, T) of voice v."""
        voices, hidden = torch.zeros_like(last), self.hidden(x)
        for i, v in enumerate(self.order):
            if i:  # all heads hear of the voice just chosen
                hidden = hidden + self.chosen[i - 1](symbol)
            own = hidden.unflatten(-1, (len(self.order), -1))[:, :, i]
            voices[..., v] = symbol = choose(v, self.logits(i, own, last, voices))
        return voices


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

    def forward(self, x, past):
        """x (B, T, H), keys and values of P frames before it, past (B, P, 2 H) -> (B, T, H), and
        the keys and values of all (B, P + T, 2 H)."""
        memory = torch.cat([past, self.memory(self.norm(x))], 1)
        q = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = memory.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out: the fused attention has no second derivatives, which the penalty needs.
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, T, P + T)
        if self.window:
            place = torch.arange(memory.shape[1], device=x.device)
            ago = place[-x.shape[1]:, None] - place  # (T, P + T)
            scores = scores.masked_fill((ago < 0) | (ago >= self.window), -torch.inf)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), memory


class Generator(nn.Module):
    """z and the frames before -> LSTM layers -> attention over the last `window` -> heads."""

    def __init__(self, voices, window, z, hidden, layers, heads):
        super().__init__()
        self.voices, self.window = voices, window
        self.place = nn.Parameter(0.3 * torch.randn(METRE, 32))  # where in the metre a frame stands
        self.start = nn.Linear(z, 2 * layers * hidden)
        self.lstm = nn.LSTM(data.KEYS + z + 32, hidden, layers, batch_first=True)
        nn.init.normal_(self.lstm.weight_ih_l0[:, :data.KEYS], std=0.3)  # four of 88 are on
        self.attention = Attention(hidden, heads, window)
        self.heads = Heads(voices, hidden)

    def read(self, z, last, state=None):
        """z (B, Z), frames as voices, each the one before, last (B, T, V) -> what the heads know
        (B, T, H), and the state to go on with."""
        batch, length = last.shape[:2]
        if state is None:
            start = self.start(z).tanh().view(batch, 2, self.lstm.num_layers, -1)
            h, c = (part.contiguous() for part in start.permute(1, 2, 0, 3))
            state = 0, (h, c), z.new_zeros(batch, 0, 2 * h.shape[-1])
        first, lstm_state, memory = state
        place = self.place[torch.arange(first, first + length, device=z.device) % METRE]
        h, lstm_state = self.lstm(torch.cat([
            data.from_voices(last).to(z.dtype), z[:, None].expand(-1, length, -1),
            place.expand(batch, -1, -1)], -1), lstm_state)  # (B, T, H)
        x, memory = self.attention(h, memory)
        return x, (first + length, lstm_state, memory[:, -self.window:])

    def play(self, z, length, choose):
        """Frames one by one, each from those before: voices (B, length, V); choose as for Heads."""
        voices, state = [z.new_zeros(len(z), 1, self.voices, dtype=torch.long)], None
        for _ in range(length):
            x, state = self.read(z, voices[-1], state)
            voices.append(self.heads(x, voices[-1], choose))
        return torch.cat(voices[1:], 1)

    def forward(self, z, voices):
        """z (B, Z) and what play drew from it, voices (B, T, V) -> the same one-hot (B, T, V, 89),
        with the gradient of their probabilities, and the choices' entropy in nats per voice."""
        last, p = F.pad(voices[:, :-1], (0, 0, 1, 0)), [None] * self.voices

        def choose(v, logits):
            p[v] = logits.softmax(-1)
            return voices[..., v]
        self.heads(self.read(z, last)[0], last, choose)
        p = torch.stack(p, 2)
        entropy = -torch.special.xlogy(p.detach(), p.detach()).sum(-1).mean()
        return F.one_hot(voices, data.SYMBOLS) + (p - p.detach()), entropy  # the bracket is 0


def draw(v, logits):
    """A symbol from each row of logits (B, T, 89), by PyTorch's own generator: (B, T)."""
    reached = logits.softmax(-1).cumsum(-1)
    part = torch.rand_like(reached[..., :1]) * reached[..., -1:] * (1 - 1e-6)
    return torch.searchsorted(reached, part, right=True)[..., 0]


def turned(a, b):
    """How often b (..., 12) has a class that lies d above one of a: (..., 12), d from 0 to 11."""
    shifted = torch.cat([b, b[..., :11]], -1).unfold(-1, 12, 1)  # (..., 12, 12), [c, d]: b[c + d]
    return (a[..., None, :] @ shifted)[..., 0, :]


class Critic(nn.Module):
    """Features of frames -> a score of every four; LSTM layers -> attention over all -> one score;
    the sum of its and the others' mean."""

    def __init__(self, voices, window, hidden, layers, heads, patch, dropout):
        super().__init__()
        if window % patch or window % 8:
            raise data.InputError(f"--patch {patch} and 8 must divide --window {window}")
        self.patch = patch
        pairs = torch.combinations(torch.arange(voices))
        self.register_buffer("high", pairs[:, 0], False)
        self.register_buffer("low", pairs[:, 1], False)
        k = torch.arange(data.SYMBOLS)[:, None]
        for name, apart in (("motions", torch.arange(-12, 13)), ("chords", torch.arange(25))):
            for way, seats in (("from", k + apart), ("to", k - apart)):  # symbols so far apart
                seats = seats * ((k > 0) & (seats > 0) & (seats < data.SYMBOLS))
                self.register_buffer(f"{name}_{way}", seats, False)
        features = voices * (data.SYMBOLS + 25) + len(pairs) * (25 + 12) + 4 * 12
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

    def interval(self, name, a, b):
        """Voices a and b, one-hot (..., 89) -> the interval from a up to b, one-hot (..., 25), with
        gradients for both."""
        up = b.gather(-1, getattr(self, f"{name}_from")[a.argmax(-1)])
        down = a.gather(-1, getattr(self, f"{name}_to")[b.argmax(-1)])
        return up + down - down.detach()

    def features(self, voices):
        """Windows as one-hot voices (B, T, V, 89) -> what the critic reads (B, T, features): the
        voices; their motions; intervals between two, and those kept in parallel motion; pitch
        classes above the bass, above the bass before, and above those of 8 frames, and of all."""
        def shifted(x):  # a frame later, nothing first
            return F.pad(x, (0, 0) * (x.dim() - 2) + (1, 0))

        sound = F.pad(voices[..., 1:], (1, 0))  # no rests
        high, low = sound.index_select(2, self.high), sound.index_select(2, self.low)
        motion = shifted(self.interval("motions", sound[:, :-1], sound[:, 1:]))  # (B, T, V, 25)
        chord = self.interval("chords", low, high)  # (B, T, pairs, 25)
        folded = F.pad(chord, (0, 11)).unflatten(-1, (3, 12)).sum(-2)
        kept = folded * shifted(folded[:, :-1]) * (1 - motion[..., 12:13].index_select(2, self.low))
        classes = F.pad(voices[..., 1:], (0, 8)).unflatten(-1, (8, 12)).sum(-2)  # (B, T, V, 12)
        bass, classes = classes[:, :, -1], classes.sum(2)
        around = [classes.unflatten(1, (-1, n)).mean(2).repeat_interleave(n, 1)
                  for n in (8, classes.shape[1])]
        above = [turned(a, classes) for a in (bass, shifted(bass[:, :-1]), *around)]
        return torch.cat([*(x.flatten(2) for x in (voices, motion, chord, kept)), *above], -1)

    def forward(self, features):
        """features (B, window, features) -> scores (B,)."""
        batch, length = features.shape[:2]
        metre = self.metre[torch.arange(length, device=features.device) % METRE]
        x = self.dropout(F.leaky_relu(self.inp(features) + metre, 0.2))  # (B, window, H)
        near = torch.cat([x[:, i:length - 3 + i] for i in range(4)], -1)  # (B, window - 3, 4 H)
        near = self.dropout(F.leaky_relu(self.near(near), 0.2))
        x, _ = self.lstm(x.unflatten(1, (-1, self.patch)).flatten(2))  # (B, window / patch, H)
        x, _ = self.attention(x + self.place, x.new_zeros(batch, 0, 2 * x.shape[-1]))
        x = self.dropout(F.leaky_relu(self.mix(torch.cat([x.mean(1), x[:, -1]], -1)), 0.2))
        return self.out(x)[:, 0] + self.near_out(near)[..., 0].mean(1)


def gradient_penalty(critic, real, fake):
    """E[(|grad f(y)| - 1)^2] over points y on lines between real and fake features (B, T, .).
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

    voices: V; window: frames that the critic sees; z: noise of a piece; patch: frames that the
    critic's LSTM reads at once; loss: "wasserstein", "minimax", or "printed", with the paper's
    sign; gp: weight of the gradient penalty.
    """

    def __init__(self, voices=4, window=32, z=64, hidden=128, layers=1, heads=4, critic_layers=1,
                 critic_heads=4, patch=4, dropout=0.3, loss="wasserstein", gp=10.0):
        super().__init__()
        for name, count in (("heads", heads), ("critic-heads", critic_heads)):
            if hidden % count:
                raise data.InputError(f"--{name} {count} does not divide --hidden {hidden}")
        self.voices, self.window, self.z, self.loss, self.gp = voices, window, z, loss, gp
        self.generator = Generator(voices, window, z, hidden, layers, heads)
        self.critic = Critic(voices, window, hidden, critic_layers, critic_heads, patch, dropout)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    @data.sampling()
    def play(self, n):
        """n windows that the generator plays now: their z (n, Z) and voices (n, window, V)."""
        z = torch.randn(n, self.z, device=self.generator.place.device)
        return z, self.generator.play(z, self.window, draw)

    def features(self, voices):
        """What the critic reads of voices (B, T, V)."""
        return self.critic.features(F.one_hot(voices, data.SYMBOLS).to(self.critic.place.dtype))

    def forward(self, frames, mask, played=None):
        """The critic's loss on full windows (B, window, 88), and its parts for the log; played: as
        play gives it."""
        _, voices = played or self.play(len(frames))
        real, fake = self.features(data.to_voices(frames, self.voices)), self.features(voices)
        real_score, fake_score = self.critic(torch.cat([real, fake])).chunk(2)
        gap = real_score.mean() - fake_score.mean()
        if self.loss == "minimax":  # Goodfellow et al. 2014: the score is the log-odds of real
            loss = F.softplus(-real_score).mean() + F.softplus(fake_score).mean()
        else:
            loss = gap if self.loss == "printed" else -gap
        parts = {"critic_loss": loss.detach(), "critic_gap": gap.detach()}
        if self.gp:
            penalty = gradient_penalty(self.critic, real, fake)
            loss = loss + self.gp * penalty
            parts["penalty"] = penalty.detach()
        return loss, parts

    def generator_loss(self, n, played=None):
        """The generator's loss on n windows, or on those played, and its parts."""
        voices, entropy = self.generator(*(played or self.play(n)))
        score = self.critic(self.critic.features(voices))
        loss = -F.softplus(score).mean() if self.loss == "minimax" else -score.mean()
        return loss, {"generator_loss": loss.detach(), "entropy": entropy}

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.2, top_p=0.9):
        """n pieces as bool (n, length, 88). G is surer than Bach of its notes: hence 1.2; stray
        ones are rare but far off: hence 0.9. They are likeliest where there is nothing to go on
        from yet: the first METRE frames are left out."""
        z = torch.randn(n, self.z, generator=generator, device=self.average.place.device)
        voices = self.average.play(
            z, METRE + length, lambda v, x: data.sample_symbols(x, generator, temperature, top_p))
        return data.from_voices(voices[:, METRE:])


def textures(rolls):
    """Counters over all rolls (T, 88): notes at once, note lengths in frames, steps of the top and
    of the bottom line in semitones, chords as pitch classes above the bass, and changes: two
    different chords in a row and the step between their basses."""
    total = {name: Counter() for name in ("notes", "length", "top", "bottom", "chord", "change")}
    for roll in rolls:
        edges = np.diff(np.pad(roll, ((1, 1), (0, 0))).astype(int), axis=0).T  # (88, T + 1)
        lengths = np.nonzero(edges < 0)[1] - np.nonzero(edges > 0)[1]
        total["notes"].update(roll.sum(1).tolist())
        total["length"].update(lengths.clip(max=16).tolist())
        keys = [np.flatnonzero(frame) for frame in roll if frame.any()]
        chords = [(frame[0], frozenset((frame - frame[0]) % 12)) for frame in keys]
        total["chord"].update(chord for _, chord in chords)
        total["top"].update(b[-1] - a[-1] for a, b in pairwise(keys) if a[-1] != b[-1])
        total["bottom"].update(b[0] - a[0] for a, b in pairwise(keys) if a[0] != b[0])
        total["change"].update((a[1], b[1], b[0] - a[0]) for a, b in pairwise(chords) if a != b)
    return total


@torch.no_grad()
def evaluate(model, pieces):
    """Figures against held-out pieces (bool (T, 88)): critic_gap, E[f(x)] - E[f(G(z))]; of 64
    samples the mean divergence of their textures and that of chord changes alone, the share of
    silent frames, and the largest share of frames that two have in common (mode collapse)."""
    def score(frames):
        return model.critic(model.features(data.to_voices(frames, model.voices)))

    model.eval()
    device = model.average.place.device
    generator = torch.Generator(device).manual_seed(0)
    rolls = model.sample(64, max(128, model.window), generator)
    windows = data.Windows(pieces, model.window, device, hop=model.window, full=True)
    real = torch.cat([score(frames) for frames, _ in windows.chunks(64)]).mean()
    gap = (real - score(rolls[:, :model.window]).mean()).item()
    model.train()
    rolls = rolls.cpu().numpy()
    have, want, apart = textures(rolls), textures(pieces), {}
    for name in want:
        both = [[count[name][kind] for kind in have[name] | want[name]] for count in (have, want)]
        apart[name] = data.divergence(*np.array(both, float))
    alike = max((roll == rolls[:i]).all(2).mean(1).max() for i, roll in enumerate(rolls) if i)
    return {"critic_gap": gap, "texture_distance": sum(apart.values()) / len(apart),
            "change_distance": apart["change"], "silent": float((~rolls.any(2)).mean()),
            "alike": float(alike)}


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
    add("--optimizer", choices=["adam", "rmsprop"], default="adam", help="adam has betas 0 and 0.9")
    add("--average", type=data.decay, default=0.997, help="how slowly the averaged weights follow")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
