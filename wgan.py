"""A Wasserstein GAN of windows of music (section 5.7 of the paper).

A generator G writes music x from noise z (Z), reading what it has played; a critic f gives a window
of T frames one score. f learns to score Bach above G, and G to be scored high:

    h_t = LSTM(x_<t, z)                                                  (H), z ~ N(0, I)
    x_t ~ prod_v p(voice v | h_t, attention(h_t), x_t-1, the voices chosen before v)   (V, 89)
    L_C = E[f(G(z))] - E[f(x)] + lambda E[(|grad f(y)| - 1)^2]          L_G = -E[f(G(z))]

If no slope of f is over 1, the least L_C is minus the Wasserstein distance of Bach and G: hence the
penalty on slopes at points y between the two (--gp, Gulrajani et al. 2017) or a bound for weights
(--clip, Arjovsky et al. 2017). A drawn voice has its probabilities' gradient (straight-through).

    python wgan.py    # default run; the paper's 20 epochs:
    python wgan.py --layers 4 --critic-layers 2 --heads 8 --hidden 1024 --dropout 0 --restart 1 \\
        --gp 0 --clip 0.01 --lr 1e-4 --critic-lr 2e-4 --patch 1 --average 0 --batch 1024 --steps 41

Differences from the paper:
- Its L_C has the other sign (--loss printed), by which both learn to score G above Bach.
- G's pieces go on from step to step, so that f sees, and G learns, what becomes of them; a share
  begins anew (--restart 1: all). G's weights are averaged, its voices chosen in turn.
- f reads intervals too and scores every four frames. Dropout: if too sure, it does not teach G.
"""

import copy
from collections import Counter

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data

METRE = 16  # frames: training windows begin at multiples of 16
SPAN = 24  # semitones: the largest interval that heads and critic tell apart


class Heads(nn.Module):
    """As in vae.py: a frame's voices, chosen in turn, outer ones first. A head each scores symbols,
    intervals, and notes in parallel motion. What crosses or doubles a chosen voice gets no mass."""

    def __init__(self, voices, inputs, hidden):
        super().__init__()
        self.order = [0, voices - 1, *range(1, voices - 1)][:voices]
        self.pitch, self.interval = nn.Embedding(data.SYMBOLS, 32), nn.Embedding(2 * data.KEYS, 32)
        self.sizes = [[data.SYMBOLS, 2 * SPAN + 1, *[2 * SPAN + 1, 12] * i] for i in range(voices)]
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Linear(inputs + 32 * (voices - 1) + 96 * i, hidden), nn.LeakyReLU(0.2),
            nn.Linear(hidden, sum(out))) for i, out in enumerate(self.sizes))

    def step(self, a, b):
        """What is read of the interval from symbols b up to a; a row of its own if one rests."""
        return self.interval(torch.where((a > 0) & (b > 0), a - b + data.KEYS, 0))

    def relative(self, scores, symbol):
        """Scores (..., 2 * SPAN + 1) of intervals from symbol (...), none if a rest: (..., 89)."""
        symbols = torch.arange(data.SYMBOLS, device=symbol.device)
        steps = (symbols - symbol[..., None]).clamp(-SPAN, SPAN) + SPAN
        return scores.gather(-1, steps) * ((symbols > 0) & (symbol[..., None] > 0))

    def forward(self, x, last, voices=None, **draw):
        """Frames after last (B, T, V), from what is known, x (B, T, .): voices (B, T, V), given or
        drawn, see data.sample_symbols; and the probabilities of their symbols (B, T, V, 89)."""
        symbols, chosen, p = torch.arange(data.SYMBOLS, device=x.device), {}, {}
        for v, head, sizes in zip(self.order, self.heads, self.sizes):
            own = last[..., v]
            known = [x, *(self.step(last[..., u], own) for u in self.order if u != v)]
            for u, now in chosen.items():  # its pitch, its motion, its interval from v's last note
                known += [self.pitch(now), self.step(now, last[..., u]), self.step(now, own)]
            logits, motion, *pairs = head(torch.cat(known, -1)).split(sizes, -1)
            logits = logits + self.relative(motion, own)
            for (u, now), harmony, parallel in zip(chosen.items(), pairs[::2], pairs[1::2]):
                logits, then = logits + self.relative(harmony, now), last[..., u]
                along = (own + now - then).clamp(0, data.KEYS)  # the note that keeps the interval
                moves = (now > 0) & (then > 0) & (own > 0) & (now != then)
                score = parallel.gather(-1, ((then - own) % 12)[..., None]) * moves[..., None]
                logits = logits.scatter_add(-1, along[..., None], score)
                fits = ((symbols - now[..., None]) * (u - v) > 0) & (now > 0)[..., None]
                logits = logits.masked_fill(~fits & (symbols > 0), -torch.inf)  # a rest always fits
            chosen[v] = data.sample_symbols(logits, **draw) if voices is None else voices[..., v]
            p[v] = logits.softmax(-1)
        return (torch.stack([chosen[v] for v in sorted(chosen)], -1),
                torch.stack([p[v] for v in sorted(p)], -2))


class Generator(nn.Module):
    """z and the frames before -> LSTM layers -> attention to their last outputs -> heads."""

    def __init__(self, voices, window, z, hidden, layers, heads):
        super().__init__()
        self.voices, self.window, self.z = voices, window, z
        self.start = nn.Linear(z, 2 * layers * hidden)
        self.lstm = nn.LSTM(data.KEYS + z + METRE, hidden, layers, batch_first=True)
        nn.init.normal_(self.lstm.weight_ih_l0[:, :data.KEYS], std=0.3)  # four of 88 are on
        self.attend = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.heads = Heads(voices, 2 * hidden + 12, hidden)

    def begin(self, n, generator=None):
        """What n new pieces go on from: the last frame (n, 1, V), z (n, 1, Z), the LSTM's h and c
        (n, 2 * layers, H) and last outputs (n, window, H), pitch classes' counts (n, 1, 12)."""
        z = torch.randn(n, 1, self.z, generator=generator, device=self.start.weight.device)
        state = self.start(z).tanh().view(n, 2 * self.lstm.num_layers, -1)
        silence, none = z.new_zeros(n, 1, self.voices).long(), z.new_zeros(n, 1, 12)
        return silence, z, state, z.new_zeros(n, self.window, state.shape[-1]), none

    def forward(self, frames, z, state, heard, tally, t=0, voices=None, **draw):
        """Read frames t, t + 1, ... of pieces (n, T, V), the rest as from begin(); what follows
        each, and its probabilities, as from Heads; and the rest to go on from."""
        n, T = frames.shape[:2]
        place = F.one_hot(torch.arange(t, t + T, device=z.device) % METRE, METRE)
        x = [data.from_voices(frames), z.expand(-1, T, -1), place.expand(n, -1, -1)]
        x, state = self.lstm(torch.cat(x, -1), state.transpose(0, 1).contiguous().chunk(2))
        heard = torch.cat([heard, x], 1)  # (n, window + T, H)
        unseen = x.new_ones(T, heard.shape[1]).tril(self.window).triu(1) == 0  # but the last ones
        found, _ = self.attend(x, heard, heard, attn_mask=unseen, need_weights=False)
        sound = (F.one_hot(frames % 12, 12) * (frames > 0)[..., None]).sum(2)
        time = torch.arange(T + 1, device=z.device)
        fade = (0.98 ** (time[1:, None] - time)).tril(1)  # (T, 1 + T): what is left of counts
        tally = fade @ torch.cat([tally, sound], 1)
        often = (tally + 1).log() - (tally.mean(-1, keepdim=True) + 1).log()  # the key
        voices, p = self.heads(torch.cat([x, found, often], -1), frames, voices, **draw)
        return voices, p, (z, torch.cat(state).transpose(0, 1), heard[:, T:], tally[:, -1:])

    @torch.no_grad()
    def play(self, piece, length, **draw):
        """Pieces go on: the last frame and `length` more (n, 1 + length, V); what to go on from."""
        frames = [piece[0]]
        for t in range(length):
            frame, _, rest = self(*piece, t, **draw)
            frames, piece = [*frames, frame], (frame, *rest)
        return torch.cat(frames, 1), piece


def intervals(a, b):
    """Notes a and b (..., 156), one-hot with 36 and 32 zeros around the 88 keys, all zero in a rest
    -> the interval from a up to b as one-hot of -SPAN .. SPAN, all zero if it is none of them or
    one rests: (..., 49), with the gradients of sum_k a_k b_k+d."""
    steps = torch.arange(-SPAN, SPAN + 1, device=a.device)
    up = b.gather(-1, (a.argmax(-1, keepdim=True) + steps) % 156)  # of a rest: 0
    down = a.gather(-1, (b.argmax(-1, keepdim=True) - steps) % 156)  # equals up
    return up + down - down.detach()


class Critic(nn.Module):
    """Features (B, window, .) -> scores (B,), of every four frames and, by an LSTM, of all."""

    def __init__(self, voices, window, hidden, layers, patch, dropout):
        super().__init__()
        self.voices, self.window, self.patch = voices, window, patch
        relu, drop = nn.LeakyReLU(0.2), nn.Dropout(dropout)
        features = self.features(torch.zeros(1, 1 + window, data.KEYS)).shape[-1]
        self.inp = nn.Sequential(nn.Linear(features, hidden), relu, drop)
        self.near = nn.Sequential(nn.Linear(4 * hidden, hidden), relu, drop, nn.Linear(hidden, 1))
        self.lstm = nn.LSTM(patch * hidden, hidden, layers, batch_first=True)
        self.attend = nn.MultiheadAttention(hidden, 4, batch_first=True)
        self.far = nn.Sequential(nn.Linear(2 * hidden, hidden), relu, drop, nn.Linear(hidden, 1))

    def features(self, voices):
        """Windows after other frames, as frames (B, . + T, 88) or one-hot voices (B, . + T, V, 89)
        -> what is read (B, T, .): the voices and what follows here, the same in all keys."""
        if voices.dim() == 3:
            voices = F.one_hot(data.to_voices(voices, self.voices), data.SYMBOLS).float()
        T, V, voices = self.window, voices.shape[2], voices[:, -1 - self.window:]
        high, low = torch.triu_indices(V, V, 1, device=voices.device)  # all pairs
        notes = F.pad(voices[..., 1:], (36, 32))  # (B, 1 + T, V, 156)
        motion = intervals(notes[:, :-1], notes[:, 1:])  # of each voice (B, T, V, 49)
        chord = intervals(notes[:, :, low], notes[:, :, high])[..., SPAN:]  # (B, 1 + T, pairs, 25)
        folded = F.pad(chord, (0, 11)).unflatten(-1, (3, 12)).sum(-2)  # within an octave
        kept = folded[:, 1:] * folded[:, :-1] * (1 - motion[:, :, low, SPAN:SPAN + 1])  # parallels
        classes = notes.unflatten(-1, (13, 12)).sum(-2)  # pitch classes (B, 1 + T, V, 12)
        bass, classes = classes[:, :, -1], classes[:, 1:].sum(2)
        around = [classes.unflatten(1, (-1, n)).mean(2).repeat_interleave(n, 1) for n in (8, T)]
        roots = torch.stack([bass[:, 1:], bass[:, :-1], *around], 2)  # (B, T, 4, 12)
        above = torch.cat([classes, classes[..., :11]], -1).unfold(-1, 12, 1)  # [c, d]: c + d
        place = F.one_hot(torch.arange(T, device=voices.device) % METRE, METRE)
        place = place.expand(len(voices), -1, -1)
        parts = voices[:, 1:], motion, chord[:, 1:], kept, roots @ above, place
        return torch.cat([part.flatten(2) for part in parts], -1)

    def forward(self, features):
        x = self.inp(features)  # (B, window, H)
        near = self.near(x.unfold(1, 4, 1).transpose(2, 3).flatten(2))  # (B, window - 3, 1)
        x, _ = self.lstm(x.unflatten(1, (-1, self.patch)).flatten(2))  # (B, window / patch, H)
        x = x + self.attend(x, x, x)[0]  # with its weights: the fused one has no second derivatives
        return (self.far(torch.cat([x.mean(1), x[:, -1]], -1)) + near.mean(1))[:, 0]


@torch.backends.cudnn.flags(enabled=False)  # its LSTM has no second derivatives
@torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)  # oneDNN's takes long for them
def gradient_penalty(critic, real, fake):
    """E[(|grad f(y)| - 1)^2] over points y on lines between real and fake features (B, T, .)."""
    part = torch.rand(len(real), 1, 1, device=real.device)
    between = (part * real + (1 - part) * fake).requires_grad_()
    gradient, = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class WGAN(nn.Module):
    """Generator, with its pieces under way and the average of its weights, and critic."""

    def __init__(self, voices=4, window=32, z=64, hidden=128, layers=1, heads=4, critic_layers=1,
                 patch=4, dropout=0.3, loss="wasserstein", gp=10.0, batch=32, restart=0.15):
        super().__init__()
        if hidden % heads or hidden % 4 or window % patch or window % 8:
            raise data.InputError("--heads and 4 must divide --hidden; --patch and 8, --window")
        self.window, self.loss, self.gp, self.restart = window, loss, gp, restart
        self.generator = Generator(voices, window, z, hidden, layers, heads)
        self.critic = Critic(voices, window, hidden, critic_layers, patch, dropout)
        for name, x in zip(("last", "z", "state", "heard", "tally"), self.generator.begin(batch)):
            self.register_buffer(name, x.detach())  # the pieces under way
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def play(self):
        """The frame before and the next window of each piece, one-hot (batch, 1 + window, V, 89),
        with the gradient of its probabilities. First a share `restart` ends and others begin."""
        pieces, mine = [*self.buffers(recurse=False)], slice(data.RANK, None, data.WORLD)
        ends = torch.rand(len(self.z), 1, 1, device=self.z.device) < self.restart
        begun = [torch.where(ends, new, old)[mine]  # each process has its share
                 for new, old in zip(self.generator.begin(len(self.z)), pieces)]
        frames, later = self.generator.play(begun, self.window)
        for old, new in zip(pieces, later):
            old[mine] = new
        _, p, _ = self.generator(frames[:, :-1], *begun[1:], voices=frames[:, 1:])  # for gradients
        return F.one_hot(frames, data.SYMBOLS) + F.pad(p - p.detach(), (0, 0, 0, 0, 1, 0))  # + 0

    def forward(self, frames, mask, played):
        """The critic's loss on frames (batch, METRE + window, 88) and on those of play()."""
        real, fake = self.critic.features(frames), self.critic.features(played.detach())
        f_real, f_fake = self.critic(torch.cat([real, fake])).chunk(2)
        gap = f_real.mean() - f_fake.mean()
        loss = {"wasserstein": -gap, "printed": gap,  # minimax: f is the log-odds of being real
                "minimax": F.softplus(-f_real).mean() + F.softplus(f_fake).mean()}[self.loss]
        penalty = gradient_penalty(self.critic, real, fake) if self.gp else 0 * gap
        parts = {"critic_loss": loss, "critic_gap": gap, "penalty": penalty}
        return loss + self.gp * penalty, {name: part.detach() for name, part in parts.items()}

    def generator_loss(self, played):
        """The generator's loss on windows of play(), and it for the log."""
        score = self.critic(self.critic.features(played))
        loss = -F.softplus(score).mean() if self.loss == "minimax" else -score.mean()
        return loss, {"generator_loss": loss.detach()}

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.95):
        """n new pieces as bool (n, length, 88); temperature, top_p: see data.sample_symbols."""
        voices, _ = self.average.play(self.average.begin(n, generator), length,
                                      generator=generator, temperature=temperature, top_p=top_p)
        return data.from_voices(voices[:, 1:])


def full_windows(pieces, window, device="cpu"):
    """Full windows after METRE more frames each, silent ones before a piece begins."""
    pieces = [np.pad(piece, ((METRE, 0), (0, 0))) for piece in pieces]
    return data.Windows(pieces, METRE + window, device, full=True)


def changes(rolls):
    """Changes of chords in rolls (T, 88): both as pitch classes above the bass, and its step."""
    for roll in rolls:
        keys = [np.flatnonzero(frame) for frame in roll if frame.any()]
        chords = [(frame[0], frozenset((frame - frame[0]) % 12)) for frame in keys]
        yield from ((a[1], b[1], b[0] - a[0]) for a, b in zip(chords, chords[1:]) if a != b)


@torch.no_grad()
def evaluate(model, pieces):
    """Of held-out pieces (bool (T, 88)) and 64 samples: critic_gap, E[f(x)] - E[f(G(z))], and how
    far their changes of chords diverge; share of silent frames, and of those two have in common."""
    model.eval()
    real, _ = next(full_windows(pieces, model.window, model.z.device).chunks(1024))
    generator = torch.Generator(model.z.device).manual_seed(0)
    rolls = model.sample(64, model.window * max(1, 128 // model.window), generator)
    fake = F.pad(rolls, (0, 0, 1, 0)).unfold(1, 1 + model.window, model.window).flatten(0, 1).mT
    real, fake = (model.critic(model.critic.features(x)).mean() for x in (real, fake))
    common = (rolls[:, None] == rolls).all(-1).float().mean(-1).fill_diagonal_(0)  # (64, 64)
    model.train()
    want, have = Counter(changes(pieces)), Counter(changes(rolls.cpu().numpy()))
    return {"critic_gap": (real - fake).item(), "change_distance": data.divergence(want, have),
            "silent": (~rolls.any(2)).float().mean().item(), "alike": common.max().item()}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    model = WGAN(**data.config(WGAN, args)).to(args.device)
    optimizer = torch.optim.Adam(model.generator.parameters(), args.lr, (0.0, 0.9))  # Gulrajani's
    critic_optimizer = torch.optim.Adam(model.critic.parameters(), args.critic_lr, (0.0, 0.9))
    windows, *_ = [full_windows(pieces, args.window, args.device)
                   for pieces in (corpus.train, corpus.valid, corpus.test)]  # all, or stop now
    run = data.Run("wgan", args, model, corpus, optimizer=optimizer, critic=critic_optimizer)

    for step in run.steps(args.steps):
        for _ in range(args.n_critic):
            frames, mask = windows.sample(args.batch, args.transpose * (1 - step / args.steps))
            played = model.play()
            loss, parts = model(frames, mask, played)
            critic_optimizer.zero_grad()
            loss.backward()
            run.average_gradients(model.critic, mask)
            critic_optimizer.step()
            for weight in model.critic.parameters() if args.clip else []:
                weight.data.clamp_(-args.clip, args.clip)  # keeps f Lipschitz, the crude way
        loss, generator_parts = model.generator_loss(played)  # the last: half the time
        optimizer.zero_grad()
        loss.backward(inputs=list(model.generator.parameters()))
        run.average_gradients(model.generator, mask)
        optimizer.step()
        with torch.no_grad():  # a shorter average at first, when the weights are still far off
            for mean, weight in zip(model.average.parameters(), model.generator.parameters()):
                mean.lerp_(weight, 1 - min(args.average, step / (step + 10)))
        run.add({**parts, **generator_parts}, mask.repeat(args.n_critic, 1))
        if step % args.eval_every == 0 or step == args.steps:
            valid = evaluate(model, corpus.valid)
            run.log(args.steps, valid, best=valid["change_distance"] + (valid["alike"] > 0.5))

    run.finish(evaluate)


def main(argv=None):
    parser = data.Parser(__doc__, "wgan", log="gap: Bach's score less G's; alike: most of any two")
    add = parser.add_argument
    add("--window", type=data.positive_int, default=32, help="frames of a training window")
    add("--steps", type=data.positive_int, default=1000, help="generator steps")
    add("--batch", type=data.positive_int, default=32, help="windows per step")
    add("--lr", type=data.positive, default=1e-3, help="learning rate of the generator, constant")
    add("--eval-every", type=data.positive_int, default=100, help="steps between checkpoints")
    add("--z", type=data.positive_int, default=64, help="dimensions of a whole piece's noise")
    add("--hidden", type=data.positive_int, default=128, help="units of each layer")
    add("--layers", type=data.positive_int, default=1, help="LSTM layers of the generator")
    add("--heads", type=data.positive_int, default=4, help="attention heads of the generator; f: 4")
    add("--critic-layers", type=data.positive_int, default=1, help="LSTM layers of the critic")
    add("--patch", type=data.positive_int, default=4, help="frames the critic's LSTM reads at once")
    add("--dropout", type=data.dropout, default=0.3, help="share of the critic's units dropped")
    add("--loss", choices=["wasserstein", "minimax", "printed"], default="wasserstein",
        help="minimax: Goodfellow's, tried first in the paper; printed: with the paper's sign")
    add("--gp", type=data.non_negative, default=10.0, help="weight of the gradient penalty")
    add("--clip", type=data.non_negative, default=0.0, help="largest weight of the critic; 0: any")
    add("--n-critic", type=data.positive_int, default=1, help="critic steps per generator step")
    add("--critic-lr", type=data.positive, default=2e-3, help="learning rate of the critic")
    add("--average", type=data.decay, default=0.997, help="how slowly the averaged weights follow")
    add("--restart", type=data.probability, default=0.15, help="share of pieces that begin anew")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
