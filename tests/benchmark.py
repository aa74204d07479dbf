"""Speed, wherever it runs: python tests/benchmark.py [--device cpu] [--steps 30] [--only PART]

Each model's real training loop against a bare one over the same module, batch and optimizer; the
LSTM against a matrix product; sampling against bare LSTM steps; reading a corpus against
pretty_midi alone. Not a test: pytest does not collect it.
"""

import argparse
import contextlib
import importlib
import io
import os
import resource
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

os.environ["BACH_TEST_CUDA"] = "1"
from conftest import MODELS  # first: it finds data.py
import numpy as np
import pretty_midi
import torch

import data
import lstm
import sample


class Stop(Exception):
    pass


def now(device):
    torch.cuda.synchronize() if device.startswith("cuda") else None
    return time.perf_counter()


def seconds(function, device="cpu", repeats=5):
    """Median seconds of a call, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        started = now(device)
        function()
        times.append(now(device) - started)
    return sorted(times[2:])[repeats // 2]


def training(module, device, steps):
    """Median seconds of a step of the module's loop and of the same on fixed tensors; frames."""
    times, runs = [], []

    def timed(run, _):
        runs.append(run)
        for step in range(1, steps + 4):
            times.append(now(device))
            yield step
        raise Stop

    quiet = contextlib.redirect_stdout(io.StringIO())
    with patch.multiple(data.Run, steps=timed, log=lambda *_, **__: None), quiet, \
            tempfile.TemporaryDirectory() as folder, contextlib.suppress(Stop):
        module.main(["--out", folder, "--device", device])
    real = sorted(b - a for a, b in zip(times[2:], times[3:]))[steps // 2]
    run, = runs
    model, args, wgan = run.model, run.args, hasattr(run.model, "critic")
    windows = data.Windows(run.corpus.train, args.window, device, full=wgan)
    frames, mask = windows.sample(args.batch)
    bare = [(lambda: model(frames, mask), run.parts["optimizer"], [*model.parameters()])]
    if wgan:
        bare = [(lambda: model(frames, mask), run.parts["critic"], [*model.critic.parameters()])]
        bare = bare * args.n_critic + [(lambda: model.generator_loss(args.batch),
                                        run.parts["optimizer"], [*model.generator.parameters()])]

    def step():
        for loss, optimizer, weights in bare:
            optimizer.zero_grad()
            loss()[0].backward(inputs=weights)
            optimizer.step()
    return real, seconds(step, device, steps), mask.numel() * max(1, len(bare) - 1)


def loops(args):
    for name in MODELS:
        real, bare, frames = training(importlib.import_module(name), args.device, args.steps)
        print(f"{name}: {frames / real:,.0f} frames/s trained, bare {frames / bare:,.0f}: "
              f"{bare / real:.2f}", flush=True)


def kernels(args):
    a = torch.randn(2048, 2048, device=args.device)
    net = torch.nn.LSTM(512, 512, 2, batch_first=True).to(args.device)
    x = torch.randn(32, 96, 512, device=args.device)
    product = 2 * 2048**3 / seconds(lambda: a @ a, args.device) / 1e9
    step = seconds(lambda: net(x)[0].sum().backward(), args.device)
    rate = 3 * 2 * 32 * 96 * 2 * 4 * 512 * 1024 / step / 1e9
    print(f"LSTM, forward and backward: {rate:,.0f} GFLOP/s; matrix product {product:,.0f}: "
          f"{rate / product:.2f}")


def sampling(args):
    model = lstm.LSTM().to(args.device).eval()
    for n in (1, 64):
        def bare_steps():
            frame, state = torch.zeros(n, 1, data.KEYS, device=args.device), None
            for _ in range(200):
                _, state = model.lstm(frame, state)
        sampled = seconds(lambda: model.sample(n, 200), args.device) / 200
        bare = seconds(data.sampling()(bare_steps), args.device) / 200
        print(f"lstm sampling {n} at once: {n / sampled:,.0f} frames/s; LSTM steps alone "
              f"{n / bare:,.0f}: {bare / sampled:.2f}", flush=True)
    early, late = (length / seconds(lambda: model.sample(1, length), args.device, 1)
                   for length in (100, 10_000))
    print(f"lstm sampling 100 frames: {early:,.0f} frames/s; 10,000: {late:,.0f}")


def corpus(args):
    data.load_corpus()  # writes the default one where it is missing
    files, rng = sorted(data.BACH.glob("*.mid")), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        music = Path(folder, "music")
        music.mkdir()
        for i in range(args.files):  # pieces of their own: moved, a tenth of their notes left out
            notes, _ = data.read_notes(files[i % len(files)])
            notes = notes[rng.random(len(notes)) < 0.9] + [0, 0, rng.integers(-5, 6)]
            sample.parts_to_midi({"notes": notes}).save(music / f"{i}.mid")
        started = now("cpu")
        for file in sorted(music.iterdir()):
            pretty_midi.PrettyMIDI(str(file))
        alone, started = now("cpu") - started, now("cpu")
        data.load_corpus(music)
        cold, warm = now("cpu") - started, seconds(lambda: data.load_corpus(music))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"corpus of {args.files:,} files: cold {cold:.1f} s, pretty_midi alone {alone:.1f} s: "
          f"{cold / alone:.2f}; warm {warm:.3f} s; memory {memory:,.0f} MB at most")


def main():
    parts = {part.__name__: part for part in (loops, kernels, sampling, corpus)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--steps", type=int, default=30, help="training steps timed for each model")
    add("--files", type=int, default=410, help="size of the corpus: 410 is the default one")
    add("--only", choices=parts, help="leave out the rest")
    args = parser.parse_args()
    print(f"{args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in [args.only] if args.only else parts:
        parts[part](args)


if __name__ == "__main__":
    main()
