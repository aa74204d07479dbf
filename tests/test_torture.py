"""Killed trainings, damaged files, a full disk (needs fork): a few of each; with BACH_TORTURE=50
50 kills and pairs of checkpoints of every model, and 2,000 MIDI files."""

import importlib
import multiprocessing
import os
import random
import sys
import tempfile
import time

import pytest
import torch

import data
from conftest import MODELS, outcome, silence, train

resource = pytest.importorskip("resource")
N = int(os.environ.get("BACH_TORTURE", 0))
some = pytest.mark.parametrize("name", MODELS if N else ["vqvae"])


def child(function, seconds=600.0):
    """Run a function as main() of a fork, killed after so many seconds: exit status, stderr."""
    def run():
        os.dup2(said.fileno(), 2)
        sys.stdout, sys.stderr = open(os.devnull, "w"), os.fdopen(2, "w")
        silence(pytest.MonkeyPatch())
        data.cli(function)

    with tempfile.TemporaryFile("w+") as said:
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        said.seek(0)
        return process.exitcode, said.read()


@some
def test_killed_runs_end_as_the_uninterrupted_one(name, brief, tmp_path):
    def trainer(out, *more):
        return lambda: train(name, brief, out, *more, steps=9, eval_every=3)
    started, rng = time.time(), random.Random(1)
    assert child(trainer(tmp_path / "whole")) == (0, "")
    took, whole = time.time() - started, outcome(tmp_path / "whole")
    for i in range(N or 1):
        out, more = tmp_path / f"cut{i}", []
        for _ in range(rng.choice([1, 1, 2, 3])):
            child(trainer(out, *more), rng.uniform(0, took))
            for file in out.glob("*.pt"):
                data.load_checkpoint(file, name)  # never half written
            more = ["--resume"] if (out / "last.pt").exists() else ["--force"]
        assert child(trainer(out, *more)) == (0, "")
        assert outcome(out) == whole and not list(out.glob(".*"))


def damage(content, rng):
    """A MIDI file's bytes, damaged in one of many ways."""
    content, some = bytearray(content), rng.randint(1, 200)
    end, where = len(content), rng.randrange(14, len(content))
    notes = b"\x00\x90\x3c\x40\x01\x80\x3c\x40" * 100_000 + b"\x00\xff\x2f\x00"
    first, last, new = rng.choice([
        (where, end, b""), (where, where + some, b""), (where, where, rng.randbytes(some)),
        (where, where + some, rng.randbytes(some)), (where, where + 300, rng.randbytes(1) * 300),
        (18, 22, rng.randbytes(4)), (8, 14, rng.randbytes(6)),  # lies about lengths and ticks
        (22, 22, b"\x00\xff\x51\x03" + rng.randbytes(3)),  # a tempo
        (0, end, bytes(10_000_000)), (14, end, b"MTrk" + len(notes).to_bytes(4, "big") + notes),
        (where, where, b"\xff\xff\xff\x7f\x90\x40\x40\xff\xff\xff\x7f\x80\x40\x40")])  # days
    content[first:last] = new
    for _ in range(rng.choice([0, 0, 1, 50])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def test_damaged_midi_is_read_or_refused_in_seconds_and_in_a_gigabyte(brief, tmp_path):
    rng, file, count = random.Random(0), tmp_path / "x.mid", 40 * N or 60
    originals = [score.read_bytes() for score in sorted(brief.glob("*.mid"))]

    def read():
        good, slowest = 0, 0.0
        for _ in range(count):
            file.write_bytes(damage(rng.choice(originals), rng))
            started = time.process_time()
            try:
                good += data.midi_to_roll(file)[0].shape[1:] == (88,)
            except data.InputError as error:
                assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            slowest = max(slowest, time.process_time() - started)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        assert good and slowest < 5 and memory < 1000, (good, slowest, memory)
    assert child(read) == (0, "")


def damaged(content, held, rng):
    """A checkpoint's bytes, damaged, or its content, such that it makes no sense."""
    where, key, parts = rng.randrange(len(content)), rng.choice([*held]), held["parts"]
    weight, before = {rng.choice([*parts["model"]]): torch.zeros(5)}, content[:where]
    return rng.choice([
        before, before + bytes([content[where] ^ 1 << rng.randrange(8)]) + content[where + 1:],
        before + rng.randbytes(500) + content[where + 500:],
        {name: value for name, value in held.items() if name != key},
        held | {key: rng.choice([None, "text", -1, [], {}, torch.zeros(3)])},
        held | {"parts": parts | {"model": parts["model"] | weight}}])


@some
def test_damaged_checkpoints_are_refused_or_work(name, brief, tmp_path):
    rng = random.Random(0)
    assert child(lambda: train(name, brief, tmp_path, steps=3, eval_every=3)) == (0, "")
    files = [(x, x.read_bytes(), data.load_checkpoint(x)) for x in tmp_path.glob("*.pt")]
    draw = f"{tmp_path} -n 1 --length 4 --no-wav --out {tmp_path / 'samples'}"
    for i in range(N or 6):
        for file, *whole in files:
            new = damaged(*whole, rng)
            file.write_bytes(new) if isinstance(new, bytes) else torch.save(new, file)
        for program, argv in (("sample", draw + str(i)), (name, f"--out {tmp_path} --resume")):
            status, said = child(lambda: importlib.import_module(program).main(argv.split()))
            assert status == 0 or status == 2 and said.count("\n") == 1, said


@some
def test_a_full_disk_keeps_the_older_checkpoint(name, brief, tmp_path):
    assert child(lambda: train(name, brief, tmp_path, steps=2)) == (0, "")
    before = (tmp_path / "last.pt").read_bytes()

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
        train(name, brief, tmp_path, "--resume")
    status, said = child(full)
    assert status == 2 and said.count("\n") == 1 and "cannot write" in said, (status, said)
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob(".*"))
