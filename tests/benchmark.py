"""Speed, wherever it runs: python tests/benchmark.py [--device cpu] [--steps 30] [--only PART]

Each model's training loop against a bare one on the same module, batch and optimizer; reading a
corpus against pretty_midi.
"""

import argparse
import contextlib
import os
import resource
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

os.environ["BACH_TEST_CUDA"] = "1"
from conftest import MODULES  # first: it finds data.py
import numpy as np
import pretty_midi
import torch

import data
import sample


def now(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def median(times):
    """Seconds between two times, the first two left out."""
    return float(np.median(np.diff(times)[2:]))


def loops(args):
    for name, module in MODULES.items():
        times, runs = [], []

        def add(run, *_):
            runs.append(run)
            times.append(now(args.device))
            if len(times) > args.steps + 2:
                raise KeyboardInterrupt
        with (patch.object(data.Run, "add", add), contextlib.redirect_stdout(None),
              tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt)):
            module.main(["--out", folder, "--device", args.device, "--eval-every", "10000"])
        run, bare = runs[0], []
        model, adam, n = run.model, run.parts["optimizer"], run.args.batch
        window = model.window + 16 * (name == "wgan")  # its critic sees the frame before too
        batch = data.Windows(run.corpus.train, window, args.device, full=True).sample(n)
        losses = [(lambda: model(*batch), adam, model)]
        if name == "wgan":
            losses = [(lambda: model(*batch, model.play()), run.parts["critic"], model.critic),
                      (lambda: model.generator_loss(model.play()), adam, model.generator)]
        while len(bare) < len(times):
            for loss, optimizer, network in losses:
                optimizer.zero_grad()
                loss()[0].backward(inputs=[*network.parameters()])
                optimizer.step()
            bare.append(now(args.device))
        real, bare = (batch[1].numel() / median(x) for x in (times, bare))
        print(f"{name}: {real:,.0f} frames/s trained, bare {bare:,.0f}: {real / bare:.2f}")


def corpus(args):
    data.load_corpus()  # writes the default one where it is missing
    files, rng = sorted(data.BACH.glob("*.mid")), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for i in range(args.files):  # pieces of their own: moved, a tenth of their notes left out
            notes, _ = data.read_notes(files[i % len(files)])
            notes = notes[rng.random(len(notes)) < 0.9] + [0, 0, rng.integers(-5, 6)]
            sample.parts_to_midi({"notes": notes}).save(f"{folder}/{i}.mid")
        times = [now("cpu")]
        for file in Path(folder).glob("*.mid"):
            pretty_midi.PrettyMIDI(str(file))
        for _ in range(2):
            times.append(now("cpu"))
            data.load_corpus(folder)
    alone, cold, warm = np.diff([*times, now("cpu")])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"corpus of {args.files:,} files: cold {cold:.1f} s, pretty_midi alone {alone:.1f} s: "
          f"{cold / alone:.2f}; warm {warm:.3f} s; memory {memory:,.0f} MB at most")


def main():
    parts = {part.__name__: part for part in (loops, corpus)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=30, help="training steps timed")
    parser.add_argument("--files", type=int, default=410, help="size of the corpus that is read")
    parser.add_argument("--only", choices=parts, help="leave out the rest")
    args = parser.parse_args()
    print(f"{args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in [args.only] if args.only else parts:
        parts[part](args)


if __name__ == "__main__":
    main()
