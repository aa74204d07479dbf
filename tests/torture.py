"""What must not break, at scale: python tests/torture.py [kills] [midi] [checkpoints] [disk] [flags] [-n 50] [--data DIR]

Trainings killed at random moments and resumed, damaged MIDI files, damaged checkpoints, a full disk, every flag with
values that make no sense. Prints what was tried and what survived; any failure ends it. Needs a system with fork. Not a
test: pytest does not collect it, but test_torture.py runs a small share.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attn_lstm  # noqa: E402
import data  # noqa: E402
import hvae  # noqa: E402
import lstm  # noqa: E402
import sample  # noqa: E402
import vae  # noqa: E402
import vqvae  # noqa: E402
import wgan  # noqa: E402

MODELS = {module.__name__: module for module in (lstm, attn_lstm, vae, hvae, vqvae, wgan)}
TINY = ["--hidden", "16", "--window", "32", "--batch", "2", "--eval-every", "3", "--device", "cpu"]
PRIOR = {"vqvae": ["--prior-steps", "9", "--prior-hidden", "16"]}  # its second stage


def no_music(*_, **__):
    """Instead of data.write_music and data.draw_curves, which are slow and no part of what is tried here."""


def child(function, seconds=60.0, memory=None, kill_after=None):
    """Run a function in a forked process, as a program's main(): (exit status or -signal, what it said on stderr).

    seconds: it is ended after them, with status -14. memory: bytes that it may have. kill_after: SIGKILL after so many.
    """
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.dup2(said.fileno(), 2)
                sys.stdout, sys.stderr = open(os.devnull, "w"), os.fdopen(2, "w")
                data.write_music = data.draw_curves = no_music
                if memory:
                    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                data.cli(function)
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read()


def outcome(folder):
    """What a finished run has come to, clock apart: fingerprints of its weights, states and log."""
    held = data.load_checkpoint(folder / "last.pt")
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "frames_per_second")} for row in held["rows"]]
    return {"model": data.fingerprint(data.load_checkpoint(folder / "model.pt")), "rows": rows,
            **{k: data.fingerprint(held[k]) for k in ("parts", "step", "best", "rng")}}


def kills(name, corpus, folder, n, rng, steps=9):
    """Kill n trainings at a random moment each, resume them, kill some again: all must end as the uninterrupted run."""
    argv = ["--data", str(corpus), "--steps", str(steps), *TINY, *PRIOR.get(name, [])]

    def train(out, *more):
        return lambda: MODELS[name].main([*argv, "--out", str(out), *more])
    started = time.time()
    assert child(train(folder / "whole"))[0] == 0
    took, whole, resumed = time.time() - started, outcome(folder / "whole"), 0
    for i in range(n):
        out, more = folder / f"cut{i}", []
        for _ in range(rng.choice([1, 1, 2, 3])):
            child(train(out, *more), kill_after=rng.uniform(0, took))
            for file in ("last.pt", "model.pt"):
                if (out / file).exists():
                    data.load_checkpoint(out / file, name)  # never half written
            more = ["--resume"] if (out / "last.pt").exists() else ["--force"]
        resumed += more == ["--resume"]
        status, said = child(train(out, *more))
        assert status == 0, said
        assert outcome(out) == whole, f"{name}: run {i} ended otherwise"
        assert not [file.name for file in out.iterdir() if file.name.startswith(".")], "a temporary file was left"
    return resumed


def damage(content, rng):
    """A MIDI file's bytes, damaged in one of many ways."""
    content = bytearray(content)
    kind, where = rng.randrange(12), rng.randrange(14, len(content))
    if kind == 0:
        return bytes(content[:where])
    if kind == 1:
        for _ in range(rng.randint(1, 50)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content[where:where] = rng.randbytes(rng.randint(1, 200))
    elif kind == 3:
        del content[where:where + rng.randint(1, 200)]
    elif kind == 4:  # lies about the length of a track
        at = content.find(b"MTrk") + 4
        content[at:at + 4] = rng.randbytes(4)
    elif kind == 5:  # about ticks and tracks
        content[8:14] = rng.randbytes(6)
    elif kind == 6:  # about the tempo
        content[22:22] = b"\x00\xff\x51\x03" + rng.randbytes(3)
    elif kind == 7:
        return bytes(10_000_000)
    elif kind == 8:  # a hundred thousand tiny notes
        return content[:14] + b"MTrk" + (800_004).to_bytes(4, "big") + b"\x00\x90\x3c\x40\x01\x80\x3c\x40" * 100_000 + b"\x00\xff\x2f\x00"
    elif kind == 9:  # waits of days
        content[where:where] = b"\xff\xff\xff\x7f\x90\x40\x40\xff\xff\xff\x7f\x80\x40\x40"
    elif kind == 10:
        content[where:where + 300] = bytes([rng.randrange(256)]) * 300
    else:
        other = bytearray(rng.randbytes(len(content)))
        content[:] = bytes(a if rng.random() < 0.9 else b for a, b in zip(content, other))
    return bytes(content)


def midi(files, folder, n, rng):
    """Read n damaged MIDI files: each is read or refused in one line, in 5 seconds and 1 GB. Returns how many were read,
    the slowest's seconds, and the largest memory that a reading process took, in MB."""
    paths = []
    for i in range(n):
        paths.append(folder / f"{i}.mid")
        paths[-1].write_bytes(damage(rng.choice(files).read_bytes(), rng))

    def read(group):
        def run():
            good, slowest = 0, 0.0
            for path in group:
                started = time.time()
                try:
                    roll, _ = data.midi_to_roll(path)
                    good += roll.dtype == bool and roll.ndim == 2
                except data.InputError as error:
                    assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                slowest = max(slowest, time.time() - started)
            print(good, slowest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, file=sys.stderr)
        return run
    good = slowest = memory = 0
    for i in range(0, n, 100):
        status, said = child(read(paths[i:i + 100]), seconds=500)
        assert status == 0, said
        figures = [float(x) for x in said.split()]
        good, slowest, memory = good + int(figures[0]), max(slowest, figures[1]), max(memory, figures[2])
    assert slowest < 5 and memory < 1000, (slowest, memory)
    return good, slowest, memory


def checkpoints(run, folder, n, rng):
    """Damage a run's checkpoints in n ways: resuming and sampling must refuse them in one line, or work."""
    name = data.load_checkpoint(run / "model.pt")["model"]
    refused = 0
    for i in range(n):
        out = folder / f"damaged{i}"
        out.mkdir()
        for file in ("model.pt", "last.pt"):
            content, held = bytearray((run / file).read_bytes()), data.load_checkpoint(run / file)
            kind = rng.randrange(6)
            if kind == 0:
                content = content[:rng.randrange(len(content))]
            elif kind == 1:
                for _ in range(rng.randint(1, 20)):
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            elif kind == 2:
                where = rng.randrange(len(content))
                content[where:where + 500] = rng.randbytes(500)
            else:
                key = rng.choice(list(held))
                if kind == 3:
                    del held[key]
                elif kind == 4:
                    held[key] = rng.choice([None, "text", -1, [], {}, torch.zeros(3)])
                else:
                    weights = held["state"] if "state" in held else held["parts"]["model"]
                    weights[rng.choice(list(weights))] = torch.zeros(5)
                data.save_checkpoint(out / file, held)
                continue
            (out / file).write_bytes(content)
        for call in (lambda: sample.main([str(out), "-n", "1", "--length", "4", "--no-wav", "--out", str(out)]),
                     lambda: MODELS[name].main(["--out", str(out), "--resume"])):
            status, said = child(call)
            assert status == 0 or (status == 2 and said.count("\n") == 1), f"damaged{i}: {status} {said}"
            refused += status == 2
    return refused


def disk(name, corpus, folder):
    """Save to a disk that is full: one line, and the older checkpoint stays whole."""
    argv = ["--data", str(corpus), "--out", str(folder), *TINY, *(["--prior-steps", "3"] if name == "vqvae" else [])]
    assert child(lambda: MODELS[name].main([*argv, "--steps", "3"]))[0] == 0
    before = (folder / "last.pt").read_bytes()

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
        MODELS[name].main([*argv, "--steps", "6", "--resume"])
    status, said = child(full)
    assert status == 2 and said.count("\n") == 1 and "cannot write" in said, (status, said)
    assert (folder / "last.pt").read_bytes() == before
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]


class Found(Exception):
    """Carries a program's parser out of it."""


def flags_of(main):
    """Every flag of a program, from argparse's own list: [(flag, number of its values)]."""
    def found(parser, *_):
        raise Found(parser)
    parse_args, data.Parser.parse_args = data.Parser.parse_args, found
    try:
        main([])
    except Found as result:
        return [(action.option_strings[-1], 0 if action.nargs == 0 else action.nargs or 1)
                for action in result.args[0]._actions if action.option_strings and action.dest != "help"]
    finally:
        data.Parser.parse_args = parse_args


BAD = ["0", "-1", "1", "1000000000", "1e30", "nan", "text", "", "0.5", "/dev/null"]


def flags(name, corpus, folder, rng, values=BAD, pairs=0):
    """Give every flag of a program each of these values, and `pairs` random pairs of flags: a line, or it works (three
    steps, or a short sample). Returns how many calls were tried, and how many were refused."""
    if name in MODELS:
        main, base = MODELS[name].main, ["--data", str(corpus), *TINY]
    else:
        main, base = (sample.main, [str(folder / "run"), "-n", "1", "--length", "4", "--no-wav"]) if name == "sample" else (
            data.main, ["--data", str(corpus)])
    known = flags_of(main)
    calls = [[flag, *[value] * count] for flag, count in known for value in (values if count else values[:1])]
    for _ in range(pairs):
        (a, na), (b, nb) = rng.sample(known, 2)
        calls.append([a, *[rng.choice(values)] * na, b, *[rng.choice(values)] * nb])
    add, refused, failed = data.Run.add, 0, []

    def add_three(run, *args):
        if run.step >= 3:
            raise SystemExit(0)
        return add(run, *args)
    data.Run.add = add_three
    try:
        for i, call in enumerate(calls):
            out = [] if name == "data" or "--out" in call else ["--out", str(folder / f"{name}{i}")]
            status, said = child(lambda: main([*base, *out, *call]), seconds=40, memory=6 << 30)
            if not (status in (0, -14) or status == 2 and said.count("\n") == 1):
                failed.append(f"{name} {call}: {status} {said[-700:]}")
            refused += status == 2
    finally:
        data.Run.add = add
    assert not failed, "\n".join(failed)
    return len(calls), refused


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["kills", "midi", "checkpoints", "disk", "flags"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="leave out the other models")
    parser.add_argument("--data", type=Path, help="folder of MIDI files to train on (default: twelve chorales)")
    parser.add_argument("-n", type=int, default=50, help="kills a model, pairs of flags; 40 times as many MIDI files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        if args.data is None:
            from conftest import CHORALES
            data.export_bach(folder / "chorales", CHORALES)
        corpus = args.data or folder / "chorales"
        data.load_corpus(corpus)
        os.chdir(folder)  # values that happen to be names of files write here
        for name in args.models if "kills" in args.what else []:
            print(f"{name}: {args.n} runs killed at random, all ended as the uninterrupted one; "
                  f"{kills(name, corpus, folder / ('kills' + name), args.n, rng)} went on from a checkpoint", flush=True)
        if "midi" in args.what:
            files, where = sorted(Path(corpus).rglob("*.mid")), folder / "midi"
            where.mkdir()
            print("{} damaged MIDI files: {} read, the others refused; slowest {:.1f} s, memory {:.0f} MB".format(
                40 * args.n, *midi(files, where, 40 * args.n, rng)), flush=True)
        for name in MODELS if "checkpoints" in args.what or "flags" in args.what else []:
            argv = ["--data", str(corpus), "--out", str(folder / name / "run"), "--steps", "3", *TINY]
            argv += ["--prior-steps", "3"] if name == "vqvae" else []
            assert child(lambda: MODELS[name].main(argv))[0] == 0
        for name in args.models if "checkpoints" in args.what else []:
            (folder / name / "damaged").mkdir()
            print(f"{name}: {args.n} pairs of damaged checkpoints, sampled from and resumed: "
                  f"{checkpoints(folder / name / 'run', folder / name / 'damaged', args.n, rng)} of {2 * args.n} refused "
                  "in one line, the others work", flush=True)
        for name in args.models if "disk" in args.what else []:
            disk(name, corpus, folder / f"disk{name}")
            print(f"{name}: a full disk is one line, the checkpoint before stays", flush=True)
        for name in [*args.models, "sample", "data"] if "flags" in args.what else []:
            where = folder / ("lstm" if name == "sample" else f"flags{name}")
            print("{}: {} calls with odd flags, {} refused in one line, the others work".format(
                name, *flags(name, corpus, where, rng, pairs=args.n)), flush=True)


if __name__ == "__main__":
    main()
