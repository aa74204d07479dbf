"""MIDI, the corpus, windows, sampling of symbols, runs."""

import io
import json
import random
import struct
import subprocess
import sys
import time
import types

import mido
import numpy as np
import pytest
import torch

import data
from conftest import ROOT


def write_midi(path, tracks, ticks=480, kind=1):
    """tracks: lists of (type, absolute tick, fields); sorted into a MIDI file."""
    midi = mido.MidiFile(ticks_per_beat=ticks, type=kind)
    for events in tracks:
        track, now = mido.MidiTrack(), 0
        for kind_, tick, fields in sorted(events, key=lambda e: e[1]):
            make = mido.MetaMessage if kind_ == "set_tempo" else mido.Message
            track.append(make(kind_, time=tick - now, **fields))
            now = tick
        midi.tracks.append(track)
    midi.save(path)
    return path


def note(start, end, pitch, channel=0):
    return [("note_on", start, dict(note=pitch, velocity=80, channel=channel)),
            ("note_off", end, dict(note=pitch, velocity=0, channel=channel))]


# --------------------------------------------------------------------------------------------------------------- MIDI

@pytest.mark.parametrize("step", [0.25, 0.5, 1 / 3, 1.0])
def test_roll_to_midi_and_back(corpus, tmp_path, step):
    for roll in corpus.train[:3]:
        data.roll_to_midi(roll, step).write(str(tmp_path / "x.mid"))
        back, got = data.midi_to_roll(tmp_path / "x.mid", step)
        assert got == step and np.array_equal(back, roll)


def test_midi_to_roll_keeps_long_pauses(tmp_path):
    roll = np.zeros((40, 88), bool)
    roll[3, 40] = roll[30, 41] = True
    data.roll_to_midi(roll, 0.5).write(str(tmp_path / "x.mid"))
    assert np.array_equal(data.midi_to_roll(tmp_path / "x.mid", 0.5)[0], roll[:31])
    assert len(data.cut_silence(roll)) == 1 + 4 + 1


def test_tempo_changes_do_not_matter(tmp_path):
    notes = note(0, 480, 60) + note(480, 960, 62) + note(960, 1920, 64)
    tempi = [("set_tempo", t, dict(tempo=tempo)) for t, tempo in ((0, 200_000), (480, 1), (700, 16_000_000), (960, 250_000))]
    plain, _ = data.midi_to_roll(write_midi(tmp_path / "a.mid", [notes]))
    changing, step = data.midi_to_roll(write_midi(tmp_path / "b.mid", [tempi, notes]))
    assert step == 1 and np.array_equal(plain, changing) and plain.sum(0)[[39, 41, 43]].tolist() == [1, 1, 2]


def test_types_overlaps_and_empty_notes(tmp_path):
    notes = note(0, 960, 60) + note(480, 1440, 60) + note(240, 240, 70) + note(0, 480, 48, 1) + note(480, 960, 50, 1)
    one, _ = data.midi_to_roll(write_midi(tmp_path / "1.mid", [notes[:6], notes[6:]], kind=1), 1)
    zero, _ = data.midi_to_roll(write_midi(tmp_path / "0.mid", [notes], kind=0), 1)
    assert np.array_equal(one, zero)
    assert one[:, 49].sum() == 0  # a note of no length
    assert one[:2, 39].all() and one[:, 27].tolist()[:2] == [True, False] and one[1, 29]


def test_grid_samples_a_quarter_into_the_step(tmp_path):
    notes = note(0, 60, 60) + note(120, 180, 62) + note(190, 240, 64) + note(243, 478, 65)  # step 120 ticks
    roll, _ = data.midi_to_roll(write_midi(tmp_path / "x.mid", [notes]), 0.25)
    assert roll[0, 39] and roll[1, 41] and not roll[:, 43].any() and roll[2:4, 44].all()


def test_triplets(tmp_path):
    notes = sum((note(round(i * 1024 / 3), round((i + 1) * 1024 / 3), 60 + i % 5) for i in range(12)), [])
    roll, step = data.midi_to_roll(write_midi(tmp_path / "x.mid", [notes], ticks=1024))
    assert step == pytest.approx(1 / 3) and roll.sum() == 12 and (roll.sum(1) == 1).all()


@pytest.mark.parametrize("lengths, step", [([480] * 8 + [240] * 2, 1), ([480] * 7 + [240] * 3, 0.5),
                                           ([720] * 5 + [180] * 5, 0.375), ([480, 960, 240, 120, 60], 1.0)])
def test_usual_step_is_the_shortest_that_a_fifth_of_the_notes_have(lengths, step):
    ends = np.cumsum(lengths) / 480
    notes = np.stack([ends - np.array(lengths) / 480, ends, np.full(len(ends), 60)], 1)
    if lengths[-1] == 60:  # five values, each exactly 20 %, not more: the commonest (the first of equals)
        assert data.usual_step(notes) == 2.0
    else:
        assert data.usual_step(notes) == step


def test_fine_ticks_and_smpte(tmp_path):
    quarters = 400  # at 32767 ticks a quarter pretty_midi alone refuses this file
    notes = sum((note(i * 32767, (i + 1) * 32767, 60 + i % 3) for i in range(quarters)), [])
    roll, step = data.midi_to_roll(write_midi(tmp_path / "fine.mid", [notes], ticks=32767))
    assert step == 1 and len(roll) == quarters and (roll.sum(1) == 1).all()
    content = bytearray((tmp_path / "fine.mid").read_bytes())
    content[12:14] = struct.pack(">h", -25 * 256 + 40)
    (tmp_path / "smpte.mid").write_bytes(content)
    with pytest.raises(data.InputError, match="smpte.mid: its time is in SMPTE"):
        data.midi_to_roll(tmp_path / "smpte.mid")


def test_lengths_that_are_only_claimed_take_no_memory(tmp_path):
    days = [("note_on", 0, dict(note=60, velocity=80)), ("note_off", 480 * 10**6, dict(note=60, velocity=0))]
    with pytest.raises(data.InputError, match="claims to last"):
        data.midi_to_roll(write_midi(tmp_path / "x.mid", [days]))
    (tmp_path / "y.mid").write_bytes(b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk\0\1\0\0" + b"\xff" * 60000)
    with pytest.raises(data.InputError, match="damaged"):
        data.midi_to_roll(tmp_path / "y.mid")


def test_damaged_files_are_read_or_named(scores, tmp_path):
    rng = random.Random(0)
    originals = [file.read_bytes() for file in sorted(scores.glob("*.mid"))]
    for _ in range(60):
        content = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 3, 30))):
            at = rng.randrange(len(content))
            what = rng.randrange(4)
            if what == 0:
                del content[at:at + rng.randrange(1, 200)]
            elif what == 1:
                content[at] ^= 1 << rng.randrange(8)
            elif what == 2:
                content[at:at] = rng.randbytes(rng.randrange(1, 50))
            else:
                content[at:at + 4] = b"\xff\xff\xff\x7f"
        (tmp_path / "x.mid").write_bytes(content)
        started = time.time()
        try:
            roll, _ = data.midi_to_roll(tmp_path / "x.mid")
            assert roll.shape[1] == 88 and len(roll) <= data.MAX_QUARTERS * 8
        except data.InputError as error:
            assert "x.mid: " in str(error) and "\n" not in str(error)
        assert time.time() - started < 5


# ------------------------------------------------------------------------------------------------------------- voices

def test_voices_of_a_frame():
    def voices(keys, v):
        frame = torch.zeros(88)
        frame[keys] = 1
        return data.to_voices(frame, v).tolist()

    assert voices([], 4) == [0, 0, 0, 0]
    assert voices([50], 4) == [51, 0, 0, 0]
    assert voices([30, 50], 4) == [51, 0, 0, 31]
    assert voices([30, 40, 50], 4) == [51, 41, 0, 31]
    assert voices([20, 30, 40, 50], 4) == [51, 41, 31, 21]
    assert voices([10, 20, 30, 40, 50, 60], 4) == [61, 51, 41, 11]
    assert voices([30, 40, 50], 2) == [51, 31] and voices([50], 2) == [51, 0]
    assert voices([30, 40, 50], 1) == [51] and voices([0], 1) == [1] and voices([], 1) == [0]


def test_frames_and_voices_are_one_to_one(corpus):
    for roll in corpus.train + corpus.test:
        roll = torch.from_numpy(roll)
        assert torch.equal(data.from_voices(data.to_voices(roll, 4)), roll)


def test_sample_symbols():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4)

    def shares(**options):
        return torch.bincount(data.sample_symbols(logits, generator, **options), minlength=4) / 20000

    assert torch.allclose(shares(), logits[0].exp(), atol=0.02)
    assert torch.allclose(shares(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.allclose(shares(skip_top=2), torch.tensor([0, 0, 0.75, 0.25]), atol=0.02)
    assert shares(temperature=0)[0] == 1 and shares(top_p=0)[0] == 1
    assert torch.allclose(shares(temperature=0.5), (2 * logits[0]).softmax(0), atol=0.02)
    several = data.sample_symbols(logits[:1], generator, top_p=0.7, draws=20000)
    assert several.shape == (1, 20000) and abs((several == 0).float().mean() - 0.625) < 0.02
    assert (several[:, 1:] != several[:, :-1]).float().mean() > 0.4  # 0.47 where draws are independent


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_is_frame(count):
    voices = torch.cartesian_prod(*[torch.arange(count + 2)] * count).view(-1, count)
    assert torch.equal(data.is_frame(voices), (data.to_voices(data.from_voices(voices), count) == voices).all(-1))


def test_sample_voices_draws_the_distribution_of_real_frames():
    """Two voices over three keys: draws have the probabilities of the pairs that are frames, scaled to one."""
    logits = torch.full((2, 89), -torch.inf)
    logits[:, [0, 40, 41, 42]] = torch.tensor([[0.5, 0.0, 1.0, 0.3], [0.2, 1.0, 0.4, -0.5]])
    pairs = torch.cartesian_prod(*[torch.tensor([0, 40, 41, 42])] * 2)
    legal = (data.to_voices(data.from_voices(pairs), 2) == pairs).all(1)
    assert legal.sum() == 1 + 3 + 3  # silence, the top voice alone, two different keys in order
    want = (logits[0].log_softmax(0)[pairs[:, 0]] + logits[1].log_softmax(0)[pairs[:, 1]]).exp() * legal
    drawn = data.sample_voices(logits.expand(20000, 2, 89), torch.Generator().manual_seed(0))
    have = (drawn[:, None] == pairs).all(-1).float().mean(0)
    assert torch.allclose(have, want / want.sum(), atol=0.01)


# ------------------------------------------------------------------------------------------------------------- corpus

def test_split_is_by_work_and_pinned():
    works = [f"bwv{i}" for i in range(253, 303)]
    split = data.split_works(works + works[::-1])
    assert sorted(sum(split.values(), [])) == works
    assert split["test"] == ["bwv272", "bwv254", "bwv266", "bwv263", "bwv253"]  # by MD5: the same on every machine
    assert [len(split[part]) for part in ("train", "valid", "test")] == [40, 5, 5]
    assert [len(v) for v in data.split_works("abc").values()] == [1, 1, 1]


def test_corpus_of_chorales(corpus):
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [8, 2, 2]
    assert corpus.step == 0.5 and all(roll.any(1)[[0, -1]].all() for roll in corpus.train)
    text = "\n".join(corpus.report)
    assert "12 pieces" in text and "notes at once" in text and "1/8" in text


def test_repeats_are_kept_once_and_shared_runs_merge_works(corpus):
    a, b, c, d = (roll[:64] for roll in corpus.train[:4])
    up = np.roll(a, 5, 1)
    assert set(data.run_hashes(a)) == set(data.run_hashes(up)) and not set(data.run_hashes(a)) & set(data.run_hashes(b))
    quoting = np.concatenate([b[:20], np.roll(a, -3, 1)[10:42], b[20:]])
    assert data.merge_works(["a", "b", "c", "d"], [a, quoting, c, d]) == ["a", "a", "c", "d"]
    shorter = np.concatenate([b[:20], np.roll(a, -3, 1)[10:41], b[20:]])  # 31 frames are no run of 32
    assert data.merge_works(["a", "b"], [a, shorter]) == ["a", "b"]


def test_transposed_repeats_are_kept_once(scores, tmp_path):
    for file in sorted(scores.glob("*.mid"))[:4]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data.roll_to_midi(np.roll(data.midi_to_roll(file)[0], 2, 1), data.midi_to_roll(file)[1]).write(str(tmp_path / "up.mid"))
    report = "\n".join(data.load_corpus(tmp_path).report)
    assert "4 pieces" in report and "4 works; 1 exact repeats left out" in report


def test_no_run_of_the_test_set_stands_in_training(corpus):
    training = set(np.concatenate([data.run_hashes(roll) for roll in corpus.train]).tolist())
    assert not any(training & set(data.run_hashes(roll).tolist()) for roll in corpus.test + corpus.valid)


def test_default_corpus_is_pinned():
    if not data.BACH.is_dir():
        pytest.skip("the default corpus has not been written yet: python data.py")
    corpus = data.load_corpus()
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [323, 42, 40]
    assert sum(map(len, corpus.train + corpus.valid + corpus.test)) == 51732
    assert sorted(corpus.names["test"]) == TEST_PIECES
    training = np.unique(np.concatenate([data.run_hashes(roll) for roll in corpus.train]))
    for roll in corpus.test:
        assert not np.isin(data.run_hashes(roll), training).any()


TEST_PIECES = (
    "bwv113.8 bwv116.6 bwv123.6 bwv153.5 bwv157.5 bwv178.7 bwv180.7 bwv184.5 bwv245.17 bwv245.40 bwv253 bwv254 "
    "bwv263 bwv266 bwv27.6 bwv272 bwv28.6 bwv294 bwv314 bwv321 bwv331 bwv341 bwv352 bwv359 bwv372 bwv38.6 bwv384 "
    "bwv393 bwv407 bwv409 bwv414 bwv423 bwv425 bwv435 bwv5.7 bwv67.7 bwv73.5 bwv74.8 bwv88.7 bwv92.9").split()


def test_folders_are_the_split(scores, tmp_path):
    files = sorted(scores.glob("*.mid"))
    for part, file in zip(("train", "valid", "test", "train"), files):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / file.name).write_bytes(file.read_bytes())
    corpus = data.load_corpus(tmp_path)
    assert corpus.names == {"train": [files[0].stem, files[3].stem], "valid": [files[1].stem], "test": [files[2].stem]}


def test_bad_files_are_named_and_skipped(scores, tmp_path):
    for file in sorted(scores.glob("*.mid"))[:3]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "empty.mid").touch()
    (tmp_path / "text.midi").write_text("not music")
    write_midi(tmp_path / "drums.mid", [note(0, 480, 36, channel=9)])
    report = "\n".join(data.load_corpus(tmp_path).report)
    assert "3 pieces" in report and "skipped drums.mid: only drums" in report
    assert "skipped empty.mid: " in report and "skipped text.midi: " in report


def test_cache_is_used_and_never_trusted(scores, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = data.load_corpus(scores)
    kept = next(tmp_path.rglob("*.npz"))
    monkeypatch.setattr(data, "_read_corpus", None)  # a second reading would fail
    assert all(np.array_equal(a, b) for a, b in zip(first.train, data.load_corpus(scores).train))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept.write_bytes(kept.read_bytes()[:1000])
    assert len(data.load_corpus(scores).train) == 8


@pytest.mark.parametrize("make, says", [
    (lambda folder: folder / "none", "no such folder"),
    (lambda folder: folder, "no file below it"),
    (lambda folder: (folder / "x.mid").write_bytes(b"bad") and folder, "none of its 1 MIDI files can be read"),
    (lambda folder: write_midi(folder / "x.mid", [note(0, 480, 60)]).parent, "too few to split")])
def test_useless_folders(tmp_path, make, says):
    with pytest.raises(data.InputError, match=says):
        data.load_corpus(make(tmp_path))


# ------------------------------------------------------------------------------------------------------------ windows

def test_windows_tile_and_mask():
    pieces = [np.eye(88, dtype=bool)[np.arange(n) % 88] for n in (10, 32, 33, 80)]
    windows = data.Windows(pieces, 32, hop=32)
    frames, mask = next(windows.chunks(100))
    assert mask.sum(1).tolist() == [10, 32, 32, 1, 32, 32, 16] and not frames[mask == 0].any()
    assert torch.equal(frames[mask > 0], torch.from_numpy(np.concatenate(pieces)).float())
    assert len(data.Windows(pieces, 32)) == 1 + 1 + 2 + 4 and len(data.Windows(pieces, 32, full=True)) == 1 + 1 + 4
    with pytest.raises(data.InputError, match="--window 100"):
        data.Windows(pieces, 100, full=True)


def test_transposition_stays_on_the_keyboard():
    low, high = np.zeros((2, 32, 88), bool)
    low[:, [2, 40]], high[:, [40, 86]] = True, True
    windows = data.Windows([low, high], 32)
    seen = set()
    for frames in windows.sample(2000, torch.Generator().manual_seed(0))[0]:
        keys = tuple(np.flatnonzero(frames[0]).tolist())
        assert keys[1] - keys[0] in (38, 46) and (frames == frames[0]).all()
        seen.add(keys)
    assert {k[0] for k in seen if k[1] - k[0] == 38} == set(range(0, 8))
    assert {k[1] for k in seen if k[1] - k[0] == 46} == set(range(80, 88))


def test_whole_pieces(corpus):
    total = 0
    for frames, mask in data.whole_pieces(corpus.train, 3):
        total += int(mask.sum())
        assert frames.shape[:2] == mask.shape and frames.shape[1] == mask.sum(1).max()
    assert total == sum(map(len, corpus.train))


# --------------------------------------------------------------------------------------------------- arguments and runs

def parse(*argv):
    parser = data.Parser("test")
    parser.add_argument("--lr", type=data.positive, default=0.1)
    parser.add_argument("--step", type=data.note_value)
    parser.add_argument("--steps", type=data.positive_int, default=10)
    parser.add_argument("--device", type=data.device_name, default="cpu")
    parser.add_argument("--out", default="runs/x")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--force", action="store_true")
    return parser.parse(argv)


@pytest.mark.parametrize("argv", [["--lr", "0"], ["--lr", "nan"], ["--steps", "-1"], ["--steps", "many"], ["--step", "0/4"],
                                  ["--step", "x"], ["--device", "abacus"], ["--unknown"], ["--steps", "99999999999"]])
def test_bad_flags_end_with_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and argv[0] in said


def toy_run(folder, *argv):
    """A little training with every moving part of a run."""
    args = parse("--out", str(folder), *argv)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    model.config = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    generator = torch.Generator().manual_seed(0)
    args.data = None
    run = data.Run("lstm", args, model, types.SimpleNamespace(name="toy", step=0.5), optimizer=optimizer, generator=generator)
    for step in range(run.step + 1, args.steps + 1):
        loss = (model(torch.rand(4, 3, generator=generator)) + torch.rand(4, 1)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.add({"loss": loss.detach()}, torch.ones(4))
        if step % 3 == 0 or step == args.steps:
            run.log(args.steps, {"nll": loss.item()}, best=loss.item())
        run.interrupted = step == getattr(toy_run, "stop_at", None)
        if run.stopped():
            return run
    return run


@pytest.mark.parametrize("stop_at", [4, 6])  # 6: where a line is logged
def test_a_stopped_run_goes_on_bit_for_bit(stop_at, tmp_path, monkeypatch):
    whole = toy_run(tmp_path / "whole")
    monkeypatch.setattr(toy_run, "stop_at", stop_at, raising=False)
    assert toy_run(tmp_path / "cut").step == stop_at
    monkeypatch.undo()
    rest = toy_run(tmp_path / "cut", "--resume")
    assert torch.equal(whole.model.weight, rest.model.weight) and rest.step == 10

    def log(folder):  # without the clock's columns
        lines = (folder / "log.csv").read_text().splitlines()
        return [line.split(",")[:1] + line.split(",")[3:] for line in lines]
    assert log(tmp_path / "whole") == log(tmp_path / "cut")


def test_a_run_is_not_overwritten(tmp_path):
    toy_run(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(data.InputError, match="--resume.*--out.*--force"):
        toy_run(tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert toy_run(tmp_path, "--force").step == 10


def test_resume_keeps_the_flags(tmp_path, capsys):
    toy_run(tmp_path, "--lr", "0.05")
    assert toy_run(tmp_path, "--resume", "--steps", "12").args.lr == 0.05
    with pytest.raises(SystemExit):
        toy_run(tmp_path, "--resume", "--lr", "0.2")
    assert "--lr 0.2: the run in" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(data.InputError, match="no longer finite.*smaller --lr"):
        toy_run(tmp_path, "--lr", "1e29")


class Runs:
    def __reduce__(self):
        import os
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("content", [b"", b"text", "pickle", "other"])
def test_foreign_checkpoints_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content == "pickle":
        torch.save({"format": Runs()}, "x.pt")
    elif content == "other":
        torch.save({"weights": torch.zeros(3)}, "x.pt")
    else:
        (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(data.InputError, match="x.pt: .*no checkpoint of this project"):
        data.load_checkpoint("x.pt")
    assert not (tmp_path / "hacked").exists()


def test_a_checkpoint_with_other_content_than_was_written_is_refused(tmp_path):
    data.save_checkpoint(tmp_path / "x.pt", {"model": "lstm", "weights": torch.ones(3), "rows": [{"nll": 1.0}]})
    held = data.load_checkpoint(tmp_path / "x.pt", "lstm")
    assert torch.equal(held["weights"], torch.ones(3)) and held["rows"] == [{"nll": 1.0}]
    held = torch.load(tmp_path / "x.pt", weights_only=True)
    held["weights"][1] = 2
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(data.InputError, match="x.pt: damaged"):
        data.load_checkpoint(tmp_path / "x.pt")


def test_too_little_memory_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        data.cli(lambda: torch.empty(2**60))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "not enough memory" in said


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    data.write_atomic(tmp_path / "x", "old")

    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(data.InputError, match="No space left"):
        data.write_atomic(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_warmup_cosine():
    rates = [data.warmup_cosine(step, 100) for step in range(1, 101)]
    assert max(rates) == rates[4] == 1 and rates[0] == 0.2 and rates[-1] < 1e-9 and min(rates) >= 0
    assert 0 <= data.warmup_cosine(1, 1) <= 1


# ------------------------------------------------------------------------------------------------------------ programs

def run(*argv):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_data_program(scores):
    done = run("data.py", "--data", str(scores))
    assert done.returncode == 0 and "12 pieces" in done.stdout and "public domain" in done.stdout
    done = run("data.py", "--data", "nowhere")
    assert done.returncode == 2 and done.stderr == "data.py: --data nowhere: no such folder; give a folder that holds .mid or .midi files\n"
