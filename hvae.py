"""A hierarchical recurrent variational autoencoder (section 5.3 of the paper, after MusicVAE).

As vae.py, but a conductor LSTM reads the shares of z, one per segment, and gives an embedding of
each, from which a lower LSTM writes S frames afresh. Only z, and the key, reach beyond them:

    e_u = conductor(z_1, ..., z_u)                  (H)
    h_t = LSTM(x_t', e_u)                           x_t': segment u's frames before t, and one more
    p(z_u | z_<u) = N(m(e_u-1), diag s(e_u-1)^2)    p(z_1) = N(0, I)

    python hvae.py    # default run; --paper --voices 1: the paper's
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import data

SPAN = 24  # semitones: the largest interval that the heads tell apart
FADE = 0.98  # what is left after a frame of how often a pitch class has sounded


def interval(a, b):
    """Interval from symbols b up to symbols a as a class: 88 is the same key, 0: one rests."""
    return torch.where((a > 0) & (b > 0), a - b + data.KEYS, 0)


def relative(scores, symbol):
    """Scores (..., 2 * SPAN + 1) of intervals from symbol (...), none if a rest -> (..., 89)."""
    symbols = torch.arange(data.SYMBOLS, device=symbol.device)
    steps = (symbols - symbol[..., None]).clamp(-SPAN, SPAN) + SPAN
    return scores.gather(-1, steps) * ((symbols > 0) & (symbol[..., None] > 0))


def often(past, T):
    """How often each pitch class has sounded, lately most, by each of the last T frames of past
    (B, S, V): the key, more or less. (B, T, 12), logarithms less that of the mean."""
    time = torch.arange(past.shape[1], device=past.device)
    fade = (FADE ** (time[-T:, None] - time)).tril(len(time) - T)  # (T, S), 0 for later frames
    tally = fade @ (F.one_hot(past % 12, 12) * (past > 0)[..., None]).sum(2).float()
    return (tally + 1).log() - (tally.mean(-1, keepdim=True) + 1).log()


class Heads(nn.Module):
    """The voices of a frame, chosen one after the other, outer ones first, a head each. It scores
    symbols, intervals from its voice's last note and from each chosen voice, and the note that
    moves in parallel with a chosen one. What crosses or doubles a chosen voice gets no mass."""

    def __init__(self, voices, inputs, hidden, dropout):
        super().__init__()
        self.order = [0, voices - 1, *range(1, voices - 1)][:voices]
        self.pitch, self.interval = nn.Embedding(data.SYMBOLS, 32), nn.Embedding(2 * data.KEYS, 32)
        self.sizes = [[data.SYMBOLS, 2 * SPAN + 1, *[2 * SPAN + 1, 12] * i] for i in range(voices)]
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Linear(inputs + 12 + 32 * (voices - 1) + 96 * i, hidden), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(hidden, sum(out))) for i, out in enumerate(self.sizes))

    def forward(self, x, past, voices=None, **draw):
        """Frames after the last T of past (B, S, V), from what the decoder knows, x (B, T, .):
        voices (B, T, V), given or drawn; their -log p (B, T); each key's chance (B, T, 88)."""
        last, x = past[:, -x.shape[1]:], torch.cat([x, often(past, x.shape[1])], -1)
        symbols, chosen, nll, silent = torch.arange(data.SYMBOLS, device=x.device), {}, 0, 1
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
            nll = nll + F.cross_entropy(logits.mT, chosen[v], reduction="none")
            silent = silent * (1 - logits.softmax(-1)[..., 1:])
        return torch.stack([chosen[v] for v in sorted(chosen)], -1), nll, 1 - silent


class Encoder(nn.Module):
    """q(z | x): frames and mask (B, T, .) -> mu, log sigma^2 (B, Z); features 0: of last states."""

    def __init__(self, window, shares, share, hidden, features):
        super().__init__()
        self.window, self.shares = window, shares
        self.lstm = nn.LSTM(data.KEYS, hidden, batch_first=True, bidirectional=True)
        for weight in (self.lstm.weight_ih_l0, self.lstm.weight_ih_l0_reverse):
            nn.init.normal_(weight, std=0.5)  # four of 88 inputs are on; PyTorch expects all
        self.reduce = nn.Linear(2 * hidden + data.KEYS, features) if features else None
        self.out = nn.Linear(window // shares * features or 2 * hidden, 2 * share)

    def forward(self, frames, mask):
        frames = F.pad(frames * mask[..., None], (0, 0, 0, self.window - frames.shape[1]))
        h, (last, _) = self.lstm(frames)  # (B, N, 2E), (2, B, E)
        h = self.reduce(torch.cat([h, frames], -1)).relu() if self.reduce else last.transpose(0, 1)
        mu, logvar = self.out(h.reshape(len(frames), self.shares, -1)).chunk(2, -1)  # (B, U, D)
        return mu.flatten(1), logvar.flatten(1)


class HVAE(nn.Module):
    """Encoder, conductor, the prior that reads it, lower LSTM, heads; flags as in main."""

    def __init__(self, voices=4, window=64, segment=16, hidden=192, latent=256, drop=0.5, beta=1.0,
                 features=64, dropout=0.4, dropout_heads=0.2, feed="teacher", rec_mean=False):
        super().__init__()
        U = window // segment if features else 1
        if window % segment or latent % U:
            raise data.InputError(f"--segment {segment} must divide --window {window}, and the "
                                  f"number of segments --latent {latent}")
        self.voices, self.window, self.latent, self.features = voices, window, latent, features
        self.feed, self.drop, self.beta, self.rec_mean = feed, drop, beta, rec_mean
        H, D, views = hidden, latent // U, features or hidden  # D: numbers in each of z's U shares
        self.shape, self.share, self.segment = (U, D), window // U, segment  # of z; frames of each
        self.encode = Encoder(window, U, D, (H + 1) // 2, features)
        self.encode.out.bias.data[D:] -= 4  # noisy z's would teach the lower LSTM to ignore e
        self.prior = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 2 * D, bias=False))
        nn.init.zeros_(self.prior[-1].weight)  # N(0, I), at first
        self.start = nn.Parameter(torch.zeros(data.KEYS))  # stands for the frame before the first
        self.first = nn.Linear(D, 2 * H)
        self.conductor = nn.LSTM(D, H, batch_first=True)
        self.restart = nn.Linear(H, 2 * H)
        self.views = nn.Linear(D + H, segment * features)
        self.facts = nn.Embedding(6 * data.KEYS, 16)  # symbols, motions, intervals
        self.lstm = nn.LSTM(data.KEYS + 16 * (3 * voices - 1) + views, H, batch_first=True)
        nn.init.normal_(self.lstm.weight_ih_l0[:, :data.KEYS], std=0.5)
        self.dropout = nn.Dropout(dropout)
        self.heads = Heads(voices, H + views, H // 2, dropout_heads)

    def plan(self, z):
        """Shares of z (B, K, D) -> embeddings of their segments, (B, ., H), and their views: what
        both say to each frame, (B, ., features), or the embedding again (features 0)."""
        h, c = self.first(z[:, 0])[None].chunk(2, -1)
        z = z.repeat_interleave(self.share // self.segment, 1)
        e, _ = self.conductor(z, (h.tanh().contiguous(), c.contiguous()))
        views = self.views(torch.cat([z, e], -1)).unflatten(-1, (self.segment, self.features))
        return e, views.flatten(1, 2) if self.features else e.repeat_interleave(self.segment, 1)

    def read(self, frames, voices, views, e, state=None):
        """Frames (B, T, 88), voices as in vae.py, views of frames after -> their h (B, T, H) and
        next state. Without a state each segment starts afresh from its embedding in e (B, ., H)."""
        now = voices[:, 1:]
        motion, chord = interval(now, voices[:, :-1]), interval(now[..., :-1], now[..., 1:])
        facts = torch.cat([now, motion + 2 * data.KEYS, chord + 4 * data.KEYS], -1)
        x = torch.cat([frames, self.facts(facts).flatten(2), views], -1)
        if state is None:
            h, c = self.restart(e.reshape(1, -1, e.shape[-1])).chunk(2, -1)
            state = h.tanh().contiguous(), c.contiguous()
        h, state = self.lstm(x.reshape(state[0].shape[1], -1, x.shape[-1]), state)
        return h.reshape(len(x), -1, h.shape[-1]), state

    def score(self, frames, mask, z, seen=True):
        """-log p(x_t | x_<t, z) of each frame, (B, T) nats, 0 if masked; the prior's m and log s^2,
        (B, Z) each. seen (B, 1, 1): whether the decoder reads frames, or z alone tells it all."""
        frames = F.pad(frames * mask[..., None], (0, 0, 0, self.window - frames.shape[1]))
        voices = data.to_voices(frames, self.voices)  # (B, N, V)
        past = F.pad(voices[:, :-1], (0, 0, 2, 0)) * seen
        e, views = self.plan(z.view(len(z), *self.shape))
        frame = self.start.expand(len(frames), 1, -1)
        if self.feed == "teacher":
            h, _ = self.read(torch.cat([frame, frames[:, :-1]], 1) * seen, past, views, e)
        else:
            h, past = [], torch.zeros_like(past)
            for t, view in enumerate(views.split(1, 1)):
                state = state if t % self.segment else None
                now, state = self.read(frame, past[:, :2], view, e[:, t // self.segment], state)
                *_, frame = self.heads(torch.cat([now, view], -1), past[:, :1], temperature=0)
                h.append(now)
            h = torch.cat(h, 1)
        h, e = self.dropout(h), self.dropout(e)  # (B, N, H), (B, U, H)
        m, logs = F.pad(self.prior(e[:, :self.shape[0] - 1]), (0, 0, 1, 0)).chunk(2, -1)
        _, nll, _ = self.heads(torch.cat([h, views], -1), past[:, 1:], voices)
        return mask * nll[:, :mask.shape[1]], m.flatten(1), logs.flatten(1)

    def terms(self, frames, mask, seen=True):
        """With a z drawn from q(z | x): score's nats (B, T), KL of each number in z (B, Z)."""
        mu, logvar = self.encode(frames, mask)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        nll, m, logs = self.score(frames, mask, z, seen)
        return nll, (((mu - m) ** 2 + logvar.exp()) / logs.exp() + logs - logvar - 1) / 2

    def nll(self, frames, mask):
        """Upper bound on -log p of each window in nats, with one z drawn: (B,)."""
        return sum(part.sum(1) for part in self.terms(frames, mask))

    def forward(self, frames, mask):
        """frames (B, T, 88), mask (B, T) -> loss in nats per frame, and its parts for the log."""
        seen = torch.rand_like(mask[:, :1, None]) >= self.drop * self.training  # (B, 1, 1)
        nll, kl = self.terms(frames, mask, seen)
        nll, kl = nll.sum() / mask.sum(), (kl * seen[:, 0]).sum() / seen.sum().clamp(min=1)
        loss = nll + self.beta * kl * len(frames) / mask.sum()
        if self.rec_mean:  # as the study's code: nats per note, but per window
            loss = nll / self.voices + self.beta * kl
        return loss, {"reconstruction": nll.detach(), "kl": kl.detach()}

    @data.sampling()
    def decode(self, z, length=None, generator=None, temperature=1.0, top_p=1.0, past=None):
        """z or its first shares (n, K * D), the rest is drawn -> bool (n, length, 88). past (n, P,
        88): how it starts. temperature 0: the likeliest notes, told by z alone if --drop is on."""
        z, roll = torch.stack(z.split(self.shape[1], 1), 1), []  # (n, K, D)
        e, views = self.plan(z)
        seen = temperature > 0 or self.drop == 0  # its own guesses would lead it astray
        frame = self.start.expand(len(z), 1, -1) * seen
        heard = torch.zeros(len(z), 2, self.voices, dtype=torch.long, device=z.device)
        for t in range(length or self.window):
            if t == views.shape[1]:
                m, logs = self.prior(e[:, -1:]).chunk(2, -1)  # (n, 1, D)
                z = torch.cat([z, torch.normal(m, (logs / 2).exp(), generator=generator)], 1)
                e, views = self.plan(z)
            state = state if t % self.segment else None
            view, start = views[:, t:t + 1], e[:, t // self.segment]
            h, state = self.read(frame, heard[:, -2:], view, start, state)
            voices, _, frame = self.heads(torch.cat([h, view], -1), heard, generator=generator,
                                          temperature=temperature, top_p=top_p)
            if past is not None and t < past.shape[1]:
                voices = data.to_voices(past[:, t:t + 1], self.voices)
            roll.append(data.from_voices(voices))  # (n, 1, 88)
            if self.feed == "teacher":
                frame, heard = roll[-1] * seen, torch.cat([heard, voices * seen], 1)
        return torch.cat(roll, 1)

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.85, prime=None):
        """n new pieces as bool (n, length, 88), share after share of z drawn from the prior; with
        prime, a bool (T, 88) roll, what follows it, z drawn from q(z | its last window)."""
        self.eval()
        prime = torch.zeros(0, data.KEYS) if prime is None else torch.as_tensor(prime)
        while len(prime) > self.window:
            prime = prime[self.share:]  # so its segments stay where they were
        past, P = prime.to(self.start.device).float().expand(n, -1, -1), len(prime)
        z = torch.randn(n, self.latent, generator=generator, device=past.device)
        if P:
            mu, logvar = self.encode(past, torch.ones_like(past[..., 0]))
            z = mu + (logvar / 2).exp() * z
        z = z[:, :max(1, -(-P // self.share)) * self.shape[1]]
        return self.decode(z, P + length, generator, temperature, top_p, past)[:, P:]


@torch.no_grad()
def evaluate(model, pieces):
    """Figures on held-out pieces (bool (T, 88)), over windows that tile them: nll, the bound; kl in
    nats per window; used_dims: numbers in z whose mean is over 0.1; F1 of notes rebuilt from mu."""
    model.eval()
    windows, sums = data.Windows(pieces, model.window, model.start.device, hop=model.window), []
    for frames, mask in windows.chunks(64):
        nll, kl = model.terms(frames, mask)
        rebuilt = model.decode(model.encode(frames, mask)[0], temperature=0) * mask[..., None]
        sums.append((nll.sum(), kl.sum(0), (2 * rebuilt * frames).sum(), (rebuilt + frames).sum()))
    model.train()
    nll, kl, hits, cells = (sum(parts) for parts in zip(*sums))
    count, notes = sum(map(len, pieces)), sum(int(piece.sum()) for piece in pieces)
    bound, kl = (nll + kl.sum()).item(), kl / len(windows)
    return {"nll": bound / count, "nll_per_note": bound / notes, "kl": kl.sum().item(),
            "reconstruction": nll.item() / count, "used_dims": (kl > 0.1).sum().item(),
            "note_f1": (hits / cells).item()}


def train(args):
    """Train as the flags say; leaves the run folder that data.Run describes."""
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    average = HVAE(**data.config(HVAE, args))  # of the weights of all steps: tested, kept
    model, average = copy.deepcopy(average).to(args.device), average.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("hvae", args, average, corpus, trained=model, optimizer=optimizer)

    for step in run.steps(args.steps):
        frames, mask = windows.sample(args.batch, args.transpose)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * data.warmup_cosine(step, args.steps)
        model.beta = args.beta * min(1, step / max(1, args.anneal))
        model.drop = args.drop * (1 - step / args.steps)
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
            run.log(args.steps, valid, best=valid["nll"])

    run.finish(evaluate)


def main(argv=None):
    parser = data.Parser(__doc__, "hvae", log="nll: bound per frame; kl: per window; f1: from z")
    parser.set_defaults(transpose=0.3333)  # most music lies where Bach's does
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
    add("--dropout", type=data.dropout, default=0.4, help="before the heads")
    add("--dropout-heads", type=data.dropout, default=0.2, help="in the heads")
    add("--feed", choices=["teacher", "softmax"], default="teacher", help="true frames or its own")
    add("--drop", type=data.probability, default=0.5, help="windows told by z alone, at first")
    add("--beta", type=data.non_negative, default=1.0, help="weight of the KL; less: z holds more")
    add("--anneal", type=data.natural, default=2200, help="steps over which beta rises from 0")
    add("--rec-mean", action="store_true", help="average the reconstruction over notes")
    add("--weight-decay", type=data.non_negative, default=0.45, help="AdamW's decoupled decay")
    add("--average", type=data.decay, default=0.98, help="share of the averaged weights kept")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    add("--paper", action="store_true", help="the paper's settings, where flags do not say others")
    if parser.parse_args(argv).paper:
        parser.set_defaults(hidden=512, latent=32, features=0, dropout=0.0, feed="softmax",
                            drop=0.0, beta=1.0, anneal=0, lr=1e-3, weight_decay=0.0, average=0.0)
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
