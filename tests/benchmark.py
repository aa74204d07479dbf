"""Speed, on whatever device is there: python tests/benchmark.py [--device cpu] [--steps 30] [--files 410] [--only PART]

For each model: frames a second of its real training loop, as `python MODEL.py` runs it, against a bare loop over the same
module, batch and optimiser with fixed tensors and nothing else. Then the LSTM against a large matrix product, sampling
against bare LSTM steps, and reading the corpus against pretty_midi alone. Not a test: pytest does not collect it.
"""

import argparse
import contextlib
import io
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pretty_midi
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attn_lstm  # noqa: E402
import data  # noqa: E402
import hvae  # noqa: E402
import lstm  # noqa: E402
import vae  # noqa: E402
import vqvae  # noqa: E402
import wgan  # noqa: E402


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(function, device, repeats):
    """Median seconds of a call."""
    times = []
    for i in range(repeats + 2):
        wait(device)
        started = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[repeats // 2]


def training(module, device, steps):
    """(real, bare): median seconds of a step of the module's loop, and of the same step on fixed tensors."""
    times, held = [], {}
    add, begin = data.Run.add, data.Run.__init__

    def timed_begin(self, name, args, model, corpus, **parts):
        begin(self, name, args, model, corpus, **parts)
        held.update(model=model, args=args, **parts)

    def timed_add(self, values, mask):
        held.update(mask=mask)
        wait(device)
        times.append(time.perf_counter())
        add(self, values, mask)
        if self.step == steps + 3:
            raise Stop

    class Stop(Exception):
        pass

    data.Run.__init__, data.Run.add, data.Run.log = timed_begin, timed_add, lambda *_, **__: None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Stop):
        module.main(["--out", folder, "--steps", str(steps + 3), "--device", device])
    gaps = sorted(b - a for a, b in zip(times[2:], times[3:]))

    model, args = held["model"], held["args"]
    corpus = data.load_corpus()
    windows = data.Windows(corpus.train, args.window, device, full=module is wgan)
    frames, mask = windows.sample(args.batch, held["generator"])

    def step():
        if module is wgan:
            for _ in range(args.n_critic):
                loss, _ = model(frames, mask)
                held["critic_optimizer"].zero_grad()
                loss.backward()
                held["critic_optimizer"].step()
            loss, _ = model.generator_loss(args.batch)
        else:
            loss, _ = model(frames, mask)
        held["optimizer"].zero_grad()
        loss.backward(inputs=list(model.generator.parameters()) if module is wgan else None)
        if module is not wgan:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        held["optimizer"].step()
    return gaps[len(gaps) // 2], seconds(step, device, steps), args.batch * args.window * getattr(args, "n_critic", 1)


def loops(device, steps):
    """Each model's training loop."""
    begin, add, log = data.Run.__init__, data.Run.add, data.Run.log
    for module in (lstm, attn_lstm, vae, hvae, vqvae, wgan):
        try:
            real, bare, frames = training(module, device, steps)
        finally:
            data.Run.__init__, data.Run.add, data.Run.log = begin, add, log
        print(f"{module.__name__}: {frames / real:,.0f} frames/s trained, bare {frames / bare:,.0f}: {bare / real:.2f}")


def kernels(device):
    """The LSTM against a matrix product."""
    a = torch.randn(2048, 2048, device=device)
    product = 2 * 2048 ** 3 / seconds(lambda: a @ a, device, 10)
    net, x = nn.LSTM(512, 512, 2, batch_first=True).to(device), torch.randn(32, 96, 512, device=device)
    rate = 3 * 2 * 32 * 96 * 2 * 4 * 512 * 1024 / seconds(lambda: net(x)[0].sum().backward(), device, 10)
    print(f"LSTM, forward and backward: {rate / 1e9:,.0f} GFLOP/s; matrix product {product / 1e9:,.0f}: {rate / product:.2f}")


def sampling(device):
    """Sampling against bare LSTM steps, and early against late."""
    model = lstm.LSTM().to(device).eval()
    for n in (1, 64):
        generator = torch.Generator(device).manual_seed(0)
        sampled = seconds(lambda: model.sample(n, 200, generator), device, 5) / 200

        def bare_steps():
            frame, state = torch.zeros(n, 1, data.KEYS, device=device), None
            for _ in range(200):
                _, state = model.lstm(frame, state)
        usual = seconds(torch.no_grad()(bare_steps), device, 5) / 200
        fastest = seconds(data.sampling()(bare_steps), device, 5) / 200
        print(f"lstm sampling {n} at once: {n / sampled:,.0f} frames/s; LSTM steps alone {n / usual:,.0f}: {usual / sampled:.2f}; "
              f"with PyTorch's own LSTM, as when sampling, {n / fastest:,.0f}: {fastest / sampled:.2f}")
    for model, long in ((model, 10_000), (attn_lstm.AttnLSTM().to(device).eval(), 2_000)):
        rates = [length / seconds(lambda: model.sample(1, length), device, 1) for length in (100, long)]
        print(f"{type(model).__name__} sampling 100 frames: {rates[0]:,.0f} frames/s; {long:,}: {rates[1]:,.0f}")


def altered(source, path, seed):
    """Write a piece of its own, made from a real one: every note moved by the same random interval, a tenth of them by
    a step more, a tenth left out."""
    random = np.random.default_rng(seed)
    midi = pretty_midi.PrettyMIDI(str(source))
    up = int(random.integers(-5, 6))
    for part in midi.instruments:
        part.notes = [note for note in part.notes if random.random() < 0.9]
        for note in part.notes:
            note.pitch = min(108, max(21, note.pitch + up + int(random.random() < 0.1)))
    midi.write(str(path))
    return path


def corpus(count):
    """Reading so many files."""
    data.load_corpus()
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(data.BACH.glob("*.mid"))
        if count != len(files):
            files = [altered(files[i % len(files)], Path(folder) / f"{i}.mid", i) for i in range(count)]
            print(f"wrote {len(files)} altered pieces", flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            started = time.perf_counter()
            for file in files:
                pretty_midi.PrettyMIDI(str(file))
        alone = time.perf_counter() - started
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        started = time.perf_counter()
        held = data.load_corpus(files[0].parent, cache=False)
        cold = time.perf_counter() - started
        data.load_corpus(files[0].parent)
        warm = seconds(lambda: data.load_corpus(files[0].parent), "cpu", 5)
        frames = sum(len(piece) for part in (held.train, held.valid, held.test) for piece in part)
        print(f"corpus of {len(files):,} files, {frames:,} frames: cold {cold:.1f} s, pretty_midi alone {alone:.1f} s: "
              f"{cold / alone:.2f}; warm {warm:.3f} s; memory {before:,.0f} MB before, "
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:,.0f} MB at most")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=30, help="training steps timed for each model")
    parser.add_argument("--files", type=int, default=410, help="size of the corpus: 410 is the default one")
    parser.add_argument("--only", choices=["loops", "kernels", "sampling", "corpus"], help="leave out the rest")
    args = parser.parse_args()
    device = args.device
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    parts = {"loops": lambda: loops(device, args.steps), "kernels": lambda: kernels(device),
             "sampling": lambda: sampling(device), "corpus": lambda: corpus(args.files)}
    for part in [args.only] if args.only else parts:
        parts[part]()


if __name__ == "__main__":
    main()
