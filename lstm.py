"""An autoregressive LSTM over piano-roll frames (section 5.1 of the paper).

A frame x_t (88 keys, 0 or 1) is read as it is and written as V voices, each one of 89 symbols:

    h_t = LSTM(x_1, ..., x_{t-1})                                        (H)
    p(x_t | x_<t) = prod_v softmax(W h_t)_v [symbol of voice v in x_t]   W: (V * 89, H)
    loss = - sum_t log p(x_t | x_<t) / T                                 nats per frame

The voices of a frame do not know of each other: attn_lstm.py chooses them one after the other.

    python lstm.py  # default run; the paper's:
    python lstm.py --hidden 512 --window 32 --dropout 0.5 --lr 1e-3 --weight-decay 0 --voices 1

Differences from the paper: four voices (--voices 1 is its one-hot melody), transposed windows,
AdamW with a schedule, a larger initialisation (inputs are sparse), the first frame predicted too.
Equation (1) has a minus sign on one side only.
"""

import torch
from torch import nn

import data


class LSTM(nn.Module):
    """Two-layer LSTM, one linear layer to the logits of all voices. voices: V; window: frames of a
    training window; hidden: H; dropout: between the LSTM's layers and on its output."""

    def __init__(self, voices=4, window=64, hidden=256, dropout=0.4):
        super().__init__()
        self.voices, self.window = voices, window
        self.start = nn.Parameter(torch.zeros(data.KEYS))  # stands for the frame before the first
        self.lstm = nn.LSTM(data.KEYS, hidden, num_layers=2, dropout=dropout, batch_first=True)
        nn.init.normal_(self.lstm.weight_ih_l0)  # four of 88 inputs are on; PyTorch expects all
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, voices * data.SYMBOLS)

    def logits(self, previous, state=None):
        """previous frames (B, T, 88) -> logits of the next ones (B, T, V, 89), LSTM state."""
        h, state = self.lstm(previous, state)  # (B, T, H)
        return self.out(self.dropout(h)).unflatten(-1, (self.voices, data.SYMBOLS)), state

    def frame_nll(self, frames, mask):
        """-log p of each frame given those before it: (B, T) nats, 0 where masked."""
        start = self.start.expand(len(frames), 1, -1)
        logits, _ = self.logits(torch.cat([start, frames[:, :-1]], 1))
        target = data.to_voices(frames, self.voices)  # (B, T, V)
        nll = nn.functional.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
        return nll.view_as(target).sum(-1) * mask

    def nll(self, frames, mask):
        """-log p of each window in nats, first frame included: (B,)."""
        return self.frame_nll(frames, mask).sum(1)

    def forward(self, frames, mask):
        """frames (B, T, 88), mask (B, T) -> loss in nats per frame, and its parts for the log."""
        loss = self.nll(frames, mask).sum() / mask.sum()
        return loss, {"nll": loss.detach()}

    @data.sampling()
    def sample(self, n, length, generator=None, temperature=1.0, top_p=0.9, skip_top=0, prime=None,
               melody=None):
        """n new pieces as bool (n, length, 88), frame by frame, drawn as data.sample_symbols says.
        prime: bool (T, 88), what they go on from. melody: bool (length, 88), whose top line voice 0
        has; the others stay below, and where it rests all stay up to its last note."""
        self.eval()
        frames, state, roll, last = self.start.expand(n, 1, -1), None, [], 0
        if prime is not None:
            prime = torch.as_tensor(prime, device=frames.device).float().expand(n, -1, -1)
            frames = torch.cat([frames, prime], 1)
        for t in data.progress(range(length), "sampling frames"):
            logits, state = self.logits(frames, state)
            logits = logits[:, -1]  # (n, V, 89)
            if melody is not None:
                top = int(data.to_voices(torch.as_tensor(melody[t]), 1))  # a symbol, 0 a rest
                last = top or last
                logits[..., last + (not top):] = -torch.inf
                v = 0 if top else max(1, self.voices - 2)  # a voice that rests with the melody
                logits[:, v] = -torch.inf
                logits[:, v, top] = 0
            if skip_top:  # leave out so many of the likeliest (section 6.1)
                logits = logits.scatter(-1, logits.topk(skip_top, -1).indices, -torch.inf)
            voices = data.sample_symbols(logits, generator, temperature, top_p, 16).mT
            drawn = data.from_voices(voices)  # (n, 16, 88): the first legal one is taken
            legal = (data.to_voices(drawn, self.voices) == voices).all(-1)  # no two cross or double
            roll.append(drawn.take_along_dim(legal.int().argmax(-1)[:, None, None], 1)[:, 0])
            frames = roll[-1][:, None].float()
        return torch.stack(roll, 1)


@torch.no_grad()
def evaluate(model, pieces):
    """Nats per frame of held-out pieces (bool (T, 88)): whole (nll), without their first frames,
    over windows that each start without context (nll_tiled); and nats per sounding note."""
    model.eval()
    whole = [model.frame_nll(*batch) for batch in data.whole_pieces(pieces, 16, model.start.device)]
    first = sum(nll[:, 0].sum().item() for nll in whole)
    total = sum(nll.sum().item() for nll in whole)
    windows = data.Windows(pieces, model.window, model.start.device, hop=model.window)
    tiled = sum(model.nll(*batch).sum().item() for batch in windows.chunks(64))
    model.train()
    frames, notes = sum(map(len, pieces)), sum(int(piece.sum()) for piece in pieces)
    return {"nll": total / frames, "nll_after_first": (total - first) / (frames - len(pieces)),
            "nll_tiled": tiled / frames, "nll_per_note": total / notes}


def train(args):
    """Train as the flags say; data.Run writes the run's folder."""
    corpus = data.load_corpus(args.data, args.time_step, args.voices)
    torch.manual_seed(args.seed)
    model = LSTM(**data.config(LSTM, args)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    windows = data.Windows(corpus.train, args.window, args.device)
    run = data.Run("lstm", args, model, corpus, optimizer=optimizer)

    for step in run.steps(args.steps):
        frames, mask = windows.sample(args.batch, args.transpose)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * data.warmup_cosine(step, args.steps)
        loss, parts = model(frames, mask)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model, mask)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        run.add(parts, mask)
        if step % args.eval_every == 0 or step == args.steps:
            valid = evaluate(model, corpus.valid)
            run.log(args.steps, valid, best=valid["nll"])

    run.finish(evaluate)


def main(argv=None):
    parser = data.Parser(__doc__, "lstm", log="nats per frame; valid: unseen; tiled: starting anew")
    add = parser.add_argument
    add("--window", type=data.positive_int, default=64, help="frames of a training window")
    add("--steps", type=data.positive_int, default=2000, help="training steps")
    add("--batch", type=data.positive_int, default=32, help="windows per step")
    add("--lr", type=data.positive, default=1e-2, help="highest learning rate")
    add("--eval-every", type=data.positive_int, default=100, help="steps between checkpoints")
    add("--hidden", type=data.positive_int, default=256, help="units of each LSTM layer")
    add("--dropout", type=data.dropout, default=0.4, help="share of the LSTM's outputs dropped")
    add("--weight-decay", type=data.non_negative, default=0.1, help="AdamW's decoupled decay")
    add("--clip", type=data.positive, default=1.0, help="largest norm of the gradient")
    train(parser.parse(argv))


if __name__ == "__main__":
    data.cli(main)
