"""A hierarchical recurrent variational autoencoder (section 5.3 of the paper, after MusicVAE).

As vae.py, but the decoder has two levels: a conductor LSTM reads the shares of z, one per segment,
and gives an embedding of each; the lower LSTM starts afresh from it and writes S frames:

    e_u = conductor(z_1, ..., z_u)                  (H)
    h_t = LSTM(x_t', e_u)                           x_t': the frames of segment u before t, and the
                                                    last one before u
    p(z_u | z_<u) = N(m(e_u-1), diag s(e_u-1)^2)    p(z_1) = N(0, I)

What reaches beyond S frames must go through z. In training all segments are one LSTM call.

    python hvae.py                          # default run
    python hvae.py --paper --voices 1       # the paper's; --rec-mean: as its code had it

New against vae.py, all in HVAE: conductor, restart and a bias in __init__, plan and begin (from z
to embeddings and views, and on to states), read by segments, a restart every S frames in decode;
the prior reads the conductor, not the frames. All else is vae.py's, line for line; so are the
differences from the paper.
"""

import copy
import math
import sys
import warnings

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # semitones: the largest interval that the heads tell apart


def interval(a, b):
    """Interval from symbols b up to symbols a as a class: 88 is the same key, 0: one rests."""
    return torch.where((a > 0) & (b > 0), a - b + data.KEYS, 0)


def relative(scores, symbol):
    """Scores of intervals from a symbol (..., 2 * SPAN + 1), -SPAN first -> scores of all symbols
    (..., 89): none for the rest, none at all where the symbol (...) is a rest."""
    symbols = torch.arange(data.SYMBOLS, device=symbol.device)
    steps = (symbols - symbol[..., None]).clamp(-SPAN, SPAN) + SPAN
    return scores.gather(-1, steps) * ((symbols > 0) & (symbol[..., None] > 0))


class Heads(nn.Module):
    """The voices of a frame, chosen one after the other, outer voices first, a head each. It
    scores symbols, intervals from its voice's last note and from each chosen voice, and the note
    that would move in parallel with a chosen voice, by the interval between the two. What crosses
    or doubles a chosen voice gets no mass, so the likelihood of a frame is exact."""

    def __init__(self, voices, inputs, hidden, dropout):
        super().__init__()
        self.order = [0, voices - 1, *range(1, voices - 1)][:voices]
        self.pitch, self.interval = nn.Embedding(data.SYMBOLS, 32), nn.Embedding(2 * data.KEYS, 32)
        self.sizes = [[data.SYMBOLS, 2 * SPAN + 1, *[2 * SPAN + 1, 12] * i] for i in range(voices)]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs + 96 * i, hidden), nn.ReLU(), nn.Dropout(dropout),
                          nn.Linear(hidden, sum(sizes))) for i, sizes in enumerate(self.sizes))

    def logits(self, i, x, last, voices):
        """Logits (B, T, 89) of the i-th voice in order, from what the decoder knows, x (B, T, .),
        the voices of the frame before, last (B, T, V), and the chosen ones in voices (B, T, V)."""
        v, chosen = self.order[i], self.order[:i]
        own = last[..., v]
        for u in chosen:  # each one's pitch, motion, and interval from this voice's last note
            x = torch.cat([x, self.pitch(voices[..., u]),
                           self.interval(interval(voices[..., u], last[..., u])),
                           self.interval(interval(voices[..., u], own))], -1)
        logits, motion, *pairs = self.heads[i](x).split(self.sizes[i], -1)
        logits = logits + relative(motion, own)
        for u, harmony, parallel in zip(chosen, pairs[::2], pairs[1::2]):
            now, then = voices[..., u], last[..., u]
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
        """Voices of frames, drawn (B, T, V), and the chance of each key that some voice has it,
        given those drawn before it (B, T, 88): the decoder's softmax as a frame."""
        voices, silent = torch.zeros_like(last), 1.0
        for i, v in enumerate(self.order):
            logits = self.logits(i, x, last, voices.clone())
            voices[..., v] = data.sample_symbols(logits, generator, temperature, top_p)
            silent = silent * (1 - logits.softmax(-1)[..., 1:])
        return voices, 1 - silent


class Encoder(nn.Module):
    """q(z | x): frames (B, T, 88), mask (B, T), T <= window -> mu, log sigma^2, each (B, Z). A
    linear layer reads each segment; features 0: the LSTM's two last states (the paper's)."""

    def __init__(self, window, segment, hidden, latent, features):
        super().__init__()
        self.window, self.segments = window, window // segment if features else 1
        self.lstm = nn.LSTM(data.KEYS, hidden, batch_first=True, bidirectional=True)
        for weight in (self.lstm.weight_ih_l0, self.lstm.weight_ih_l0_reverse):
            nn.init.normal_(weight, std=0.5)  # four of 88 inputs are on; PyTorch expects all
        self.reduce = nn.Linear(2 * hidden + data.KEYS, features) if features else None
        self.out = nn.Linear(segment * features or 2 * hidden, 2 * latent // self.segments)

    def forward(self, frames, mask):
        frames = F.pad(frames * mask[..., None], (0, 0, 0, self.window - frames.shape[1]))
        h, (last, _) = self.lstm(frames)  # (B, N, 2E), (2, B, E)
        h = self.reduce(torch.cat([h, frames], -1)).relu() if self.reduce else last.transpose(0, 1)
        mu, logvar = self.out(h.reshape(len(frames), self.segments, -1)).chunk(2, -1)  # (B, U, D)
        return mu.flatten(1), logvar.flatten(1)


class HVAE(nn.Module):
    """Encoder, conductor, the prior that reads it, lower LSTM, heads. voices: V; window: N;
    segment: S; hidden: units of conductor and lower LSTM, the encoder has half of them each way;
    latent: Z; features: numbers per frame between LSTMs and z, 0 for the paper's wiring; dropout:
    before and in the heads; feed, drop, beta, rec_mean: as the flags in main."""

    def __init__(self, voices=4, window=64, segment=16, hidden=192, latent=256, features=64,
                 dropout=0.4, feed="teacher", drop=0.3, beta=0.85, rec_mean=False):
        super().__init__()
        if window % segment or (features and latent % (window // segment)):
            raise data.InputError(f"--segment {segment} must divide --window {window}, and the "
                                  f"number of segments --latent {latent}")
        self.voices, self.window, self.latent, self.features = voices, window, latent, features
        self.feed, self.drop, self.beta, self.rec_mean = feed, drop, beta, rec_mean
        warnings.filterwarnings("ignore", "Initializing zero-element")  # --latent 0, --features 0
        self.encode = Encoder(window, segment, (hidden + 1) // 2, latent, features)
        self.shape = self.encode.segments, latent // self.encode.segments  # of z: U, D
        with torch.no_grad():  # segments that start from noise teach the lower LSTM to ignore e
            self.encode.out.bias[self.shape[1]:] -= 4  # so z has little noise at first
        self.segment = segment
        self.prior = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(),
                                   nn.Linear(hidden, 2 * self.shape[1], bias=False))
        nn.init.zeros_(self.prior[-1].weight)  # N(0, I), at first
        self.start = nn.Parameter(torch.zeros(data.KEYS))  # stands for the frame before the first
        self.first = nn.Linear(self.shape[1], 2 * hidden)
        self.conductor = nn.LSTM(self.shape[1], hidden, batch_first=True)
        self.restart = nn.Linear(hidden, 2 * hidden)
        self.views = nn.Linear(self.shape[1] + hidden, segment * features)
        views = features or hidden
        rows = 2 * data.KEYS * torch.tensor([0] * voices + [1] * voices + [2] * (voices - 1))
        self.register_buffer("rows", rows, persistent=False)  # of symbols, motions, intervals
        self.facts = nn.Embedding(6 * data.KEYS, 16)
        self.lstm = nn.LSTM(data.KEYS + 16 * len(rows) + views, hidden, batch_first=True)
        nn.init.normal_(self.lstm.weight_ih_l0[:, :data.KEYS], std=0.5)
        self.dropout = nn.Dropout(dropout)
        self.heads = Heads(voices, hidden + views, hidden // 2, dropout)

    def plan(self, z):
        """z or its first shares (B, K, D) -> embeddings (B, U, H), a share of one segment each, and
        what they and z say to each frame, (B, U * S, features); of the paper's wiring, where one
        share is for all segments, the embedding itself, (B, U * S, H)."""
        h, c = self.first(z[:, 0])[None].chunk(2, -1)
        z = z.repeat_interleave(self.window // self.segment // self.shape[0], 1)
        e, _ = self.conductor(z, (h.tanh().contiguous(), c.contiguous()))
        if self.features:
            return e, self.views(torch.cat([z, e], -1)).view(len(z), -1, self.features)
        return e, e.repeat_interleave(self.segment, 1)

    def begin(self, e):
        """Embeddings (..., H) -> the states from which their segments start, two of (1, ., H)."""
        h, c = self.restart(e.reshape(1, -1, e.shape[-1])).chunk(2, -1)
        return h.tanh().contiguous(), c.contiguous()

    def read(self, previous, past, views, state):
        """Read frames (B, T, 88), the voices of these and of one more before, past (B, T + 1, V),
        and what z said to them (B, T, features) -> h of the frames after (B, T, H), next state."""
        now = past[:, 1:]
        facts = [now, interval(now, past[:, :-1]), interval(now[..., :-1], now[..., 1:])]
        facts = self.facts(torch.cat(facts, -1) + self.rows).flatten(2)
        x = torch.cat([previous, facts, views], -1)
        h, state = self.lstm(x.reshape(state[0].shape[1], -1, x.shape[-1]), state)  # by segments
        return h.reshape(len(x), -1, h.shape[-1]), state

    def score(self, frames, mask, z, seen=True):
        """-log p(x_t | x_<t, z) of each frame, summed over voices, (B, T) nats, 0 if masked, and
        the prior's m and log s^2, (B, Z) each. seen (B, 1, 1): not if z alone tells it."""
        (e, views), T = self.plan(z.view(len(z), *self.shape)), mask.shape[1]
        frames = F.pad(frames * mask[..., None], (0, 0, 0, self.window - T))  # (B, N, 88)
        voices = data.to_voices(frames, self.voices)
        previous, past = self.start.expand(len(frames), 1, -1), F.pad(voices[:, :-1], (0, 0, 2, 0))
        if self.feed == "softmax":
            h, past = [], torch.zeros_like(past)
            for t, view in enumerate(views.split(1, 1)):
                state = self.begin(e[:, t // self.segment]) if t % self.segment == 0 else state
                now, state = self.read(previous, past[:, :2], view, state)
                x, h = torch.cat([now, view], -1), [*h, now]
                previous = self.heads.draw(x, past[:, :1], temperature=0)[1]
            h = torch.cat(h, 1)
        else:
            previous, past = torch.cat([previous, frames[:, :-1]], 1) * seen, past * seen
            h, _ = self.read(previous, past, views, self.begin(e))  # (B, N, H)
        h, e = self.dropout(h), self.dropout(e)
        m, logs = F.pad(self.prior(e[:, :self.shape[0] - 1]), (0, 0, 1, 0)).chunk(2, -1)
        x = torch.cat([h, views], -1)
        nll = sum(F.cross_entropy(self.heads.logits(i, x, past[:, 1:], voices).transpose(1, 2),
                                  voices[..., v], reduction="none")
                  for i, v in enumerate(self.heads.order))
        return mask * nll[:, :T], m.flatten(1), logs.flatten(1)

    def terms(self, frames, mask, seen=True):
        """With one z drawn from q(z | x): -log p(x_t | x_<t, z) of each frame (B, T); the KL of
        each of z's dimensions from its prior (B, Z), and log p(z) / q(z | x) of this z (B, Z)."""
        mu, logvar = self.encode(frames, mask)
        noise = torch.randn_like(mu)
        z = mu + (logvar / 2).exp() * noise
        nll, m, logs = self.score(frames, mask, z, seen)
        ratio = (noise ** 2 + logvar - (z - m) ** 2 / logs.exp() - logs) / 2
        return nll, (((mu - m) ** 2 + logvar.exp()) / logs.exp() + logs - logvar - 1) / 2, ratio

    def nll(self, frames, mask):
        """Upper bound on -log p of each window in nats, with one z drawn: (B,)."""
        nll, kl, _ = self.terms(frames, mask)
        return nll.sum(1) + kl.sum(1)

    def log_weights(self, frames, mask, samples):
        """log p(x, z) / q(z | x) of `samples` draws from q: (samples, B). Their mean is a lower
        bound on log p(x), the log of their exponentials' mean a tighter one (Burda et al. 2016)."""
        draws = (self.terms(frames, mask) for _ in range(samples))
        return torch.stack([ratio.sum(1) - nll.sum(1) for nll, _, ratio in draws])

    def forward(self, frames, mask):
        """frames (B, T, 88), mask (B, T) -> loss in nats per frame, and its parts for the log."""
        seen = torch.rand_like(mask[:, :1, None]) >= self.drop * self.training  # (B, 1, 1)
        nll, kl, _ = self.terms(frames, mask, seen)
        nll, kl = nll.sum() / mask.sum(), (kl * seen[:, 0]).sum() / seen.sum().clamp(min=1)
        loss = nll + self.beta * kl * len(frames) / mask.sum()
        if self.rec_mean:  # as the study's code: nats per note, but per window
            loss = nll / self.voices + self.beta * kl
        return loss, {"reconstruction": nll.detach(), "kl": kl.detach()}

    @data.sampling()
    def decode(self, z, length=None, generator=None, temperature=1.0, top_p=1.0, past=None):
        """Latents or their first shares (n, K * D) -> bool (n, length, 88), the decoder reading
        what it wrote, more shares drawn from the prior. length: a window if not given; past: bool
        (n, P, 88), the first frames, where they are given.

        temperature 0 takes the likeliest notes; after training with --drop given z alone, since the
        decoder's own guesses would lead it astray.
        """
        n, D, alone, roll = len(z), self.shape[1], temperature == 0 and self.drop > 0, []
        z = z.view(n, z.shape[1] // max(1, D) or 1, D)
        (e, views), frame = self.plan(z), self.start.expand(n, 1, -1) * (not alone)
        last = torch.zeros(n, 2, self.voices, dtype=torch.long, device=z.device)
        for t in range(self.window if length is None else length):
            if t == z.shape[1] * self.window // self.shape[0]:
                m, logs = self.prior(e[:, -1:]).chunk(2, -1)  # (n, 1, D)
                noise = torch.randn(m.shape, generator=generator, device=m.device, dtype=m.dtype)
                z = torch.cat([z, m + (logs / 2).exp() * noise], 1)
                e, views = self.plan(z)
            view = views[:, t:t + 1]
            state = state if t % self.segment else self.begin(e[:, t // self.segment])
            h, state = self.read(frame, last, view, state)
            voices, soft = self.heads.draw(torch.cat([h, view], -1), last[:, 1:], generator,
                                           temperature, top_p)
            if past is not None and t < past.shape[1]:
                voices = data.to_voices(past[:, t:t + 1], self.voices)
            roll.append(data.from_voices(voices))  # (n, 1, 88)
            if self.feed == "softmax":
                frame = soft
            elif not alone:
                frame, last = roll[-1].float(), torch.cat([last[:, 1:], voices], 1)
        return torch.cat(roll, 1)

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.85, prime=None):
        """n new pieces as bool (n, length, 88), share after share of z drawn from the prior; with
        prime, a bool (T, 88) roll, what follows it, z drawn from q(z | its last window)."""
        self.eval()
        prime = torch.zeros(0, data.KEYS) if prime is None else torch.as_tensor(prime)
        segment = self.window // self.shape[0]
        first = max(0, len(prime) - self.window + segment - 1) // segment * segment
        past, P = prime[first:].to(self.start.device).float().expand(n, -1, -1), len(prime) - first
        z = torch.randn(n, self.latent, generator=generator, device=past.device)
        if P:
            mu, logvar = self.encode(past, torch.ones_like(past[..., 0]))
            z = mu + (logvar / 2).exp() * z
        z = z[:, :max(1, -(-P // segment)) * self.shape[1]]
        return self.decode(z, P + length, generator, temperature, top_p, past)[:, P:]


@torch.no_grad()
def evaluate(model, pieces, samples=0):
    """Figures on held-out pieces (bool (T, 88)), over windows that tile them: the bound (nll) in
    nats per frame and per note; kl in nats per window; used_dims, with a mean KL above 0.1 nat; F1
    of the notes rebuilt from mu, and of windows' last quarters; the bound of `samples` weights."""
    model.eval()
    windows, sums = data.Windows(pieces, model.window, model.start.device, hop=model.window), []
    for frames, mask in windows.chunks(64):
        nll, kl, _ = model.terms(frames, mask)
        rebuilt = model.decode(model.encode(frames, mask)[0], temperature=0) * mask[..., None]
        hits = torch.stack([2 * rebuilt * frames, rebuilt + frames]).sum((1, 3))  # (2, N)
        weights = model.log_weights(frames, mask, samples) if samples else nll.new_zeros(1, 1)
        weighted = math.log(max(1, samples)) - weights.logsumexp(0)
        sums.append((nll.sum(), kl.sum(0), hits, weighted.sum()))
    model.train()
    nll, kl, hits, weighted = (sum(parts) for parts in zip(*sums))
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
    average = HVAE(**data.config(HVAE, args))  # weights' running average: tested, kept
    model = copy.deepcopy(average).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    average.to(args.device)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("hvae", args, average, corpus, trained=model, optimizer=optimizer)

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
        with torch.no_grad():  # a shorter average at first, when the weights are still far off
            for mean, weight in zip(average.parameters(), model.parameters()):
                mean.lerp_(weight, 1 - min(args.average, step / (step + 10)))
        run.add(parts, mask)
        if step % args.eval_every == 0 or step == args.steps:
            valid = evaluate(average, corpus.valid)
            loss = args.beta * valid["nll"] + (1 - args.beta) * valid["reconstruction"]
            run.log(args.steps, valid, best=loss)

    run.load_best()
    run.finish(evaluate(average, corpus.test, samples=64))


def main(argv=None):
    parser = data.Parser(__doc__, run="hvae", log=(
        "nll, the bound in nats per frame; kl, nats per window; f1 of notes rebuilt from z"))
    add = parser.add_argument
    add("--window", type=data.positive_int, default=64, help="frames of a window, N")
    add("--steps", type=data.positive_int, default=2400, help="training steps")
    add("--batch", type=data.positive_int, default=16, help="windows per step")
    add("--lr", type=data.positive, default=5e-3, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=100, help="steps between checkpoints")
    add("--segment", type=data.positive_int, default=16, help="frames per embedding, S")
    add("--hidden", type=data.positive_int, default=192, help="units of both LSTMs")
    add("--latent", type=data.positive_int, default=256, help="numbers in z")
    add("--features", type=data.natural, default=64, help="between LSTMs and z; 0: the paper's")
    add("--dropout", type=data.dropout, default=0.4, help="before and in the heads")
    add("--feed", choices=["teacher", "softmax"], default="teacher", help="true frames or its own")
    add("--drop", type=data.probability, default=0.3, help="share of windows told by z alone")
    add("--beta", type=data.non_negative, default=0.85, help="weight of the KL; less: z holds more")
    add("--anneal", type=data.natural, default=2200, help="steps over which beta rises from 0")
    add("--rec-mean", action="store_true", help="average the reconstruction over notes")
    add("--weight-decay", type=data.non_negative, default=0.3, help="AdamW's decoupled decay")
    add("--average", type=data.decay, default=0.98, help="share of the averaged weights kept")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    add("--paper", action="store_true", help="the paper's settings, where flags do not say others")
    if "--paper" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(hidden=512, latent=32, features=0, dropout=0.0, feed="softmax",
                            drop=0.0, beta=1.0, anneal=0, lr=1e-3, weight_decay=0.0, average=0.0)
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
