"""What must not break, at scale: python tests/torture.py [kills] [midi] [checkpoints] [disk]

Trainings killed at random moments and resumed, damaged MIDI files, damaged checkpoints, a full
disk. Prints what was tried and what survived; any failure ends it. Needs a system with fork. Not a
test: pytest does not collect it, but test_torture.py runs a small share.
"""

import argparse
import importlib
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from conftest import CHORALES, MODELS, outcome, train  # first: it finds data.py, hides the GPU
import torch

import data
import sample


FORK = multiprocessing.get_context("fork")


def child(function, seconds=60.0):
    """Run a function in a forked process, as a program's main(), and kill it after so many seconds:
    (exit status, what it said on stderr). The status is -9 if it was killed."""
    def run():
        os.dup2(said.fileno(), 2)
        sys.stdout, sys.stderr = open(os.devnull, "w"), os.fdopen(2, "w")
        data.write_music = data.draw_curves = lambda *_, **__: None  # slow
        data.cli(function)

    with tempfile.TemporaryFile("w+") as said:
        process = FORK.Process(target=run)
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        said.seek(0)
        return process.exitcode, said.read()


def trainer(name, corpus, out, *more, steps=9):
    """A tiny training, to be called."""
    return lambda: train(name, corpus, out, *more, steps=steps, eval_every=3)


def kills(name, corpus, folder, n, rng):
    """Kill n trainings at a random moment each, resume them, kill some again: all must end as the
    uninterrupted run. Returns how many went on from a checkpoint."""
    started, resumed = time.time(), 0
    status, said = child(trainer(name, corpus, folder / "whole"))
    assert status == 0, said
    took, whole = time.time() - started, outcome(folder / "whole")
    for out in (folder / f"cut{i}" for i in range(n)):
        more = []
        for moment in [rng.uniform(0, took) for _ in range(rng.choice([1, 1, 2, 3]))]:
            child(trainer(name, corpus, out, *more), moment)
            for file in out.glob("*.pt"):
                data.load_checkpoint(file, name)  # never half written
            more = ["--resume"] if (out / "last.pt").exists() else ["--force"]
        resumed += more == ["--resume"]
        status, said = child(trainer(name, corpus, out, *more))
        assert status == 0, said
        assert outcome(out) == whole, f"{out} ended otherwise"
        assert not list(out.glob(".*")), "a temporary file was left"
    return resumed


def damage(content, rng):
    """A MIDI file's bytes, damaged in one of many ways."""
    content, some = bytearray(content), rng.randint(1, 200)
    end, where = len(content), rng.randrange(14, len(content))
    notes = b"\x00\x90\x3c\x40\x01\x80\x3c\x40" * 100_000 + b"\x00\xff\x2f\x00"
    first, last, new = rng.choice([
        (where, end, b""), (where, where + some, b""), (where, where, rng.randbytes(some)),
        (where, where + some, rng.randbytes(some)),
        (where, where + 300, bytes([rng.randrange(256)]) * 300),
        (18, 22, rng.randbytes(4)), (8, 14, rng.randbytes(6)),  # lies about lengths and ticks
        (22, 22, b"\x00\xff\x51\x03" + rng.randbytes(3)),  # a tempo
        (0, end, bytes(10_000_000)), (14, end, b"MTrk" + len(notes).to_bytes(4, "big") + notes),
        (where, where, b"\xff\xff\xff\x7f\x90\x40\x40\xff\xff\xff\x7f\x80\x40\x40")])  # days
    content[first:last] = new
    for _ in range(rng.choice([0, 0, 1, 50])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def midi(files, folder, n, rng):
    """Read n damaged MIDI files: each is read or refused in one line, in 5 seconds and 1 GB.
    Returns how many were read, the slowest's seconds, and the most memory taken, in MB."""
    paths = [folder / f"{i}.mid" for i in range(n)]
    for path in paths:
        path.write_bytes(damage(rng.choice(files).read_bytes(), rng))

    def read(group):
        good, slowest = 0, 0.0
        for path in group:
            started = time.time()
            try:
                roll, _ = data.midi_to_roll(path)
                good += roll.dtype == bool and roll.ndim == 2
            except data.InputError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            slowest = max(slowest, time.time() - started)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(good, slowest, memory, file=sys.stderr)
    good = slowest = memory = 0
    for i in range(0, n, 100):
        status, said = child(lambda: read(paths[i:i + 100]), seconds=500)
        assert status == 0, said
        figures = [float(x) for x in said.split()]
        good, slowest, memory = good + int(figures[0]), *map(max, (slowest, memory), figures[1:])
    assert slowest < 5 and memory < 1000, (slowest, memory)
    return good, slowest, memory


def damage_checkpoint(path, rng):
    """Damage a checkpoint, or write one whose content makes no sense."""
    content, held, kind = bytearray(path.read_bytes()), data.load_checkpoint(path), rng.randrange(6)
    where, key = rng.randrange(len(content)), rng.choice(list(held))
    if kind == 0:
        del content[where:]
    elif kind == 1:
        content[where] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content[where:where + 500] = rng.randbytes(500)
    elif kind == 3:
        del held[key]
    elif kind == 4:
        held[key] = rng.choice([None, "text", -1, [], {}, torch.zeros(3)])
    else:
        weights = held["parts"]["model"]
        weights[rng.choice(list(weights))] = torch.zeros(5)
    path.write_bytes(content) if kind < 3 else torch.save(held, path)


def checkpoints(run, folder, n, rng):
    """Damage a run's checkpoints in n ways: resuming and sampling must refuse them in one line, or
    work. Returns how many were refused."""
    model, refused = data.load_checkpoint(run / "model.pt")["model"], 0
    for out in (folder / f"damaged{i}" for i in range(n)):
        shutil.copytree(run, out)
        for file in ("model.pt", "last.pt"):
            damage_checkpoint(out / file, rng)
        draw = [str(out), "-n", "1", "--length", "4", "--no-wav", "--out", str(out / "samples")]
        resume = ["--out", str(out), "--resume"]
        for program, argv in ((sample, draw), (importlib.import_module(model), resume)):
            status, said = child(lambda: program.main(argv))
            fine = status == 0 or status == 2 and said.count("\n") == 1
            assert fine, f"{out}: {status} {said}"
            refused += status == 2
    return refused


def disk(name, corpus, folder):
    """Save to a disk that is full: one line, and the older checkpoint stays whole."""
    status, said = child(trainer(name, corpus, folder, steps=3))
    assert status == 0, said
    before = (folder / "last.pt").read_bytes()

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
        trainer(name, corpus, folder, "--resume", steps=6)()
    status, said = child(full)
    assert status == 2 and said.count("\n") == 1 and "cannot write" in said, (status, said)
    assert (folder / "last.pt").read_bytes() == before and not list(folder.glob(".*"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", nargs="*", default=["kills", "midi", "checkpoints", "disk"])
    add("--models", nargs="+", choices=MODELS, default=MODELS, help="leave out the others")
    add("--data", type=Path, help="folder of MIDI files to train on (default: twelve chorales)")
    add("-n", type=int, default=50, help="kills per model; 40 times as many MIDI files")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    n, rng = args.n, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        corpus = args.data or folder / "chorales"
        if args.data is None:
            data.export_bach(corpus, CHORALES)
        data.load_corpus(corpus)
        for what, name in itertools.product(args.what, args.models):
            where = folder / f"{what}-{name}"
            where.mkdir()
            if what == "kills":
                print(f"{name}: {n} runs killed at random all ended as the uninterrupted one; "
                      f"{kills(name, corpus, where, n, rng)} went on from a checkpoint", flush=True)
            elif what == "checkpoints":
                assert child(trainer(name, corpus, where / "run", steps=3))[0] == 0
                print(f"{name}: {n} pairs of damaged checkpoints, sampled from and resumed: "
                      f"{checkpoints(where / 'run', where, n, rng)} of {2 * n} refused in one "
                      "line, the others work", flush=True)
            elif what == "disk":
                disk(name, corpus, where)
                print(f"{name}: a full disk is one line, the checkpoint stays", flush=True)
            elif name == args.models[0]:
                figures = midi(sorted(Path(corpus).rglob("*.mid")), where, 40 * n, rng)
                print("{} damaged MIDI files: {} read, the others refused; slowest {:.1f} s, "
                      "memory {:.0f} MB".format(40 * n, *figures), flush=True)


if __name__ == "__main__":
    main()
