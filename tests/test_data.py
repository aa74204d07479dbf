"""MIDI, the corpus, windows, sampling of symbols, files."""

import hashlib
import os
import re
import struct
import sys

import mido
import numpy as np
import pretty_midi
import pytest
import torch

import data
import sample
from conftest import copy


def write_midi(path, *tracks, ticks=480, events=None, channel=None):
    """A MIDI file of tracks of notes (start, end, pitch), times in ticks."""
    parts = {f"{i}": np.array(notes) / [ticks, ticks, 1] for i, notes in enumerate(tracks)}
    midi = sample.parts_to_midi(parts, events=events, ticks=ticks)
    for message in midi.tracks[1][1:] if channel else []:
        message.channel = channel
    midi.save(path)
    return path


@pytest.mark.parametrize("given, step", [(0.25, 0.25), (1 / 3, 1 / 3), ("1/16", 0.25), (None, 0.5)])
def test_roll_to_midi_and_back(corpus, tmp_path, given, step):
    pause = np.zeros((40, 88), bool)
    pause[3, 40] = pause[30, 41] = True
    for roll in [*corpus.train[:2], pause[:31]]:
        data.roll_to_midi(roll, step).write(str(tmp_path / "x.mid"))
        back, got = data.midi_to_roll(tmp_path / "x.mid", given)
        assert got == step and np.array_equal(back, roll)
    assert len(data.cut_silence(pause)) == 1 + 4 + 1 and len(data.cut_silence(pause[:2])) == 0


@pytest.mark.parametrize("tracks, ticks, given, step, frames", [
    ([[(0, 480, 60), (480, 960, 62), (960, 1920, 64)]], 480, None, 1, [[39], [41], [43], [43]]),
    # overlaps, and a note of no length
    ([[(0, 960, 60), (240, 240, 70), (480, 1440, 60)], [(0, 480, 48), (480, 960, 50)]], 480, 1, 1,
     [[27, 39], [29, 39]]),
    # what sounds a quarter into a step of 120 ticks
    ([[(0, 60, 60), (120, 180, 62), (190, 240, 64), (243, 478, 65)]], 480, "1/16", 0.25,
     [[39], [41], [44], [44]]),
    # triplets and fine ticks, which pretty_midi alone refuses
    ([[(i * 1024 // 3, (i + 1) * 1024 // 3, 60 + i) for i in range(9)]], 1024, None, 1 / 3,
     [[39 + i] for i in range(9)]),
    ([[(i * 32767, (i + 1) * 32767, 60) for i in range(400)]], 32767, None, 1, [[39]] * 400)])
def test_frames_of_notes(tmp_path, tracks, ticks, given, step, frames):
    """Whatever the tempo, and the tracks joined to one."""
    tempi = [(quarter, mido.MetaMessage("set_tempo", tempo=tempo)) for quarter, tempo in
             ((0, 200_000), (1, 1), (1.5, 16_000_000), (2, 250_000))]
    plain = write_midi(tmp_path / "a.mid", *tracks, ticks=ticks)
    one = mido.merge_tracks(mido.MidiFile(plain).tracks)
    mido.MidiFile(type=0, tracks=[one], ticks_per_beat=ticks).save(tmp_path / "b.mid")
    for file in (plain, tmp_path / "b.mid",
                 write_midi(tmp_path / "c.mid", *tracks, ticks=ticks, events=tempi)):
        roll, found = data.midi_to_roll(file, given)
        assert found == pytest.approx(step)
        assert [frame.nonzero()[0].tolist() for frame in roll] == frames


@pytest.mark.parametrize("lengths, step", [
    ([480] * 8 + [240] * 2, 1), ([480] * 7 + [240] * 3, 0.5), ([720] * 5 + [180] * 5, 0.375),
    ([480, 960, 240, 120, 60], 2)])  # each exactly 20 %, not more: the commonest, first of equals
def test_usual_time_step_is_the_shortest_that_a_fifth_of_the_notes_have(lengths, step):
    ends = np.cumsum(lengths) / 480
    notes = np.stack([ends - np.array(lengths) / 480, ends, np.full(len(ends), 60)], 1)
    assert data.usual_time_step(notes) == step


def test_a_track_for_each_voice_and_their_union_is_the_roll(corpus, tmp_path):
    roll, file = corpus.test[0], tmp_path / "x.mid"
    data.write_music(tmp_path / "x", roll, 0.5, bpm=100)
    score = pretty_midi.PrettyMIDI(str(file))
    assert [part.name for part in score.instruments] == ["soprano", "alto", "tenor", "bass"]
    two = data.roll_to_midi(roll, voices=2).instruments
    assert [part.name for part in two] == ["soprano", "bass"]
    assert score.get_tempo_changes()[1].tolist() == pytest.approx([100])
    assert np.array_equal(data.midi_to_roll(file, 0.5)[0], roll)
    assert (tmp_path / "x.png").stat().st_size > 5000
    length = len(roll) * 0.5 * 0.6  # seconds
    assert length <= (tmp_path / "x.wav").stat().st_size / 2 / 22050 < length + 2


@pytest.mark.parametrize("keys, voices", [
    ([], [0, 0, 0, 0]), ([50], [51, 0, 0, 0]), ([30, 50], [51, 0, 0, 31]),
    ([30, 40, 50], [51, 41, 0, 31]), ([20, 30, 40, 50], [51, 41, 31, 21]),
    ([10, 20, 30, 40, 50, 60], [61, 51, 41, 11]), ([30, 40, 50], [51, 31]), ([50], [51, 0]),
    ([30, 40, 50], [51]), ([0], [1]), ([], [0])])
def test_voices_of_a_frame(keys, voices):
    frame = torch.zeros(88)
    frame[keys] = 1
    assert data.to_voices(frame, len(voices)).tolist() == voices


def test_sample_symbols():
    generator = torch.Generator().manual_seed(0)
    logits, first = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4), [1, 0, 0, 0]
    for options, want in (({}, [0.5, 0.3, 0.15, 0.05]), ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
                          ({"temperature": 0}, first),
                          ({"temperature": 0.5}, (2 * logits[0]).softmax(0).tolist()),
                          ({"temperature": 1e-40}, first), ({"top_p": 0}, first)):
        drawn = data.sample_symbols(logits, generator, **options)
        shares = torch.bincount(drawn, minlength=4) / 20000
        assert shares.tolist() == pytest.approx(want, abs=0.02 * (want is not first))
    near = torch.tensor([0.0, 1e-6]).expand(500, 2)
    assert data.sample_symbols(near, temperature=0).all()  # the likeliest, however near the next


def test_kind_of_known_pieces(corpus):
    """A piece's key moves with it; whether it pauses does not."""
    major, minor = torch.zeros(8, 88), torch.zeros(8, 88)
    for scale, low, keys in ((major, 15, [0, 2, 4, 5, 7, 9, 11]),
                             (minor, 12, [0, 2, 3, 5, 7, 8, 11])):
        scale[:7, [low + key for key in keys]] = torch.eye(7)
        scale[7, [low + key for key in keys[:5:2]]] = 1  # its triad
    assert data.kind(torch.stack([major, minor])).tolist() == [0, 12 + 9]  # C major, A minor
    for piece in map(torch.from_numpy, corpus.train):
        low, high = (int(data.kind(piece.roll(shift, 1))) for shift in (-5, 0))
        assert (low % 12 + 5) % 12 == high % 12 and low // 12 == high // 12
    pauses = torch.cat([major[:4], 0 * major[:1], major[4:]])
    assert data.kind(pauses) == 24 and data.kind(pauses, pauses.sum(1)) == 0


def test_split_is_by_work_and_pinned():
    works = [f"bwv{i}" for i in range(253, 303)]
    parts, count = data.split_works(works + works[::-1], [])
    assert count == 50 and parts == parts[::-1] and parts[:50].count("valid") == 5
    assert [253 + i for i in range(50) if parts[i] == "test"] == [253, 254, 263, 266, 272]  # by MD5
    assert sorted(data.split_works("abc", [])[0]) == ["test", "train", "valid"]


def test_shared_runs_merge_works_in_any_transposition(corpus):
    a, b, c, d = (roll[:64] for roll in corpus.train[:4])

    def quoting(frames):
        return np.concatenate([b[:20], np.roll(a, -3, 1)[10:10 + frames], b[20:]])
    parts, count = data.split_works("abcd", [a, quoting(32), c, d])
    assert count == 3 and parts[0] == parts[1] and {*parts} == {*data.PARTS}
    assert data.split_works("ab", [a, quoting(31)])[1] == 2


def test_default_corpus_is_pinned():
    if not data.BACH.is_dir():
        pytest.skip("the default corpus has not been written yet: python data.py")
    corpus = data.load_corpus()
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [323, 42, 40]
    assert sum(map(len, corpus.train + corpus.valid + corpus.test)) == 51732
    names = hashlib.md5(" ".join(sorted(corpus.names["test"])).encode()).hexdigest()
    assert names == "07a10bbf4f7595c7a9f36cca94c2a3d6"
    training = {run for roll in corpus.train for run in data.run_hashes(roll)}
    assert not any(training & set(data.run_hashes(roll)) for roll in corpus.test)


def test_only_bach_is_exported_wherever_music21_lies(tmp_path, monkeypatch):
    other = tmp_path / "bach/.venv/music21/corpus/beethoven/opus132.mxl"
    monkeypatch.setattr("music21.corpus.getComposer", lambda _: [other])  # any path with the word
    data.export_bach(tmp_path / "midi")
    assert not list((tmp_path / "midi").iterdir())


def test_folders_are_the_split_and_links_are_followed(scores, tmp_path):
    files = sorted(scores.glob("*.mid"))
    for part, file in zip(("train", "valid", "elsewhere"), files):
        copy([file], tmp_path / part)
    (tmp_path / "test").symlink_to(tmp_path / "elsewhere")
    corpus = data.load_corpus(tmp_path)
    assert corpus.names == {part: [file.stem] for part, file in zip(data.PARTS, files)}
    assert "1 files outside train/, valid/ and test/ left out" in corpus.report


def test_bad_files_are_named_and_transposed_repeats_kept_once(scores, tmp_path):
    files = sorted(scores.glob("*.mid"))[:4]
    copy(files, tmp_path)
    roll, step = data.midi_to_roll(files[0])
    data.roll_to_midi(np.roll(roll, 2, 1), step).write(str(tmp_path / "up.mid"))
    (tmp_path / "empty.mid").touch()
    (tmp_path / "text.midi").write_text("not music")
    write_midi(tmp_path / "drums.mid", [(0, 480, 36)], channel=9)
    write_midi(tmp_path / "long.mid", [(0, 480 * 10**6, 60)])
    smpte = bytearray(write_midi(tmp_path / "smpte.mid", [(0, 480, 60)]).read_bytes())
    smpte[12:14] = struct.pack(">h", -25 * 256 + 40)
    (tmp_path / "smpte.mid").write_bytes(smpte)
    (tmp_path / "slow.mid").write_bytes(
        b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk\0\1\0\0" + b"\xff" * 60000)
    corpus = data.load_corpus(tmp_path)
    report = "\n".join(corpus.report)
    for says in ("4 works; 1 exact repeats left out", "drums.mid: not readable: only drums",
                 "empty.mid: ", "text.midi: ", "long.mid: .*claims to last", "slow.mid: .*damaged",
                 "smpte.mid: .*its time is in SMPTE"):
        assert re.search(says, report)
    assert sorted(sum(corpus.names.values(), [])) == sorted(file.stem for file in files)


def test_cache_is_used_and_never_trusted(scores, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy(scores.glob("*.mid"), tmp_path / "music")
    first = data.load_corpus(tmp_path / "music")
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_notes", None)  # a second reading would fail
        again = data.load_corpus(tmp_path / "music")
        assert all(map(np.array_equal, first.train, again.train)) and again.report == first.report
    kept, = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    whole = kept.read_bytes()
    for broken in (whole[:1000], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], b""):
        kept.write_bytes(broken)
        assert len(data.load_corpus(tmp_path / "music").train) == 8 and kept.read_bytes() != broken
    next((tmp_path / "music").iterdir()).unlink()  # other files, another cache
    assert len(sum(data.load_corpus(tmp_path / "music").names.values(), [])) == 11


def test_useless_folders(tmp_path):
    def refused(says, folder=tmp_path):
        with pytest.raises(data.InputError, match=says):
            data.load_corpus(folder)
    refused("none: no .*folder", tmp_path / "none")
    refused("no .*file")
    (tmp_path / "x.mid").write_bytes(b"bad")
    refused("files can be read")
    write_midi(tmp_path / "x.mid", [(0, 480, 60)])
    refused("too few works to split")


def test_windows_tile_and_mask():
    pieces = [np.eye(88, dtype=bool)[np.arange(n) % 88] for n in (10, 32, 33, 80)]
    windows = data.Windows(pieces, 32, hop=32)
    frames, mask = next(windows.chunks(100))
    assert mask.sum(1).tolist() == [10, 32, 32, 1, 32, 32, 16] and not frames[mask == 0].any()
    assert torch.equal(frames[mask > 0], torch.from_numpy(np.concatenate(pieces)).float())
    assert len(data.Windows(pieces, 32)) == 1 + 1 + 2 + 4
    assert len(data.Windows(pieces, 32, full=True)) == 1 + 1 + 4
    with pytest.raises(data.InputError, match="--window 100"):
        data.Windows(pieces, 100, full=True)
    for wrong in (np.zeros((9, 87)), np.zeros(88), np.full((9, 88), 0.5), np.full((9, 88), -1)):
        with pytest.raises(data.InputError, match="^a piano roll is .* is not$"):
            data.Windows([np.zeros((9, 88), bool), wrong], 4)
    whole = [(frames.shape, mask.sum(1).tolist()) for frames, mask in data.whole_pieces(pieces, 3)]
    assert whole == [((3, 33, 88), [10, 32, 33]), ((1, 80, 88), [80])]


def test_transposition_stays_on_the_keyboard():
    low, high = np.zeros((2, 32, 88), bool)
    low[:, [2, 40]] = high[:, [40, 86]] = True
    windows = data.Windows([low, high], 32)

    def drawn(n, **more):
        torch.manual_seed(0)  # all is drawn by torch's own seed
        frames = windows.sample(n, **more)[0]
        assert (frames == frames[:, :1]).all()
        return [tuple(frame.nonzero().flatten().tolist()) for frame in frames[:, 0]]
    want = {(k, k + 38) for k in range(0, 8)} | {(k, k + 46) for k in range(34, 42)}
    assert {*drawn(2000)} == want and drawn(99) == drawn(99)
    assert {*drawn(50, transpose=False)} == {(2, 40), (40, 86)}


class Hack:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("content", [{"args": Hack()}, {"weights": torch.zeros(3)}, "text"])
def test_foreign_checkpoints_are_refused_and_run_no_code(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "x.pt")
    with pytest.raises(data.InputError, match="x.pt: .*no checkpoint of this project"):
        data.load_checkpoint("x.pt")
    assert not (tmp_path / "hacked").exists()


def test_data_program(scores, one_line, capsys, monkeypatch):
    data.main(["--data", str(scores)])
    said = capsys.readouterr().out
    assert "train: 8 pieces" in said and "notes at once" in said and "1/8 in" in said
    monkeypatch.setattr(sys, "argv", ["/some/data.py", "--data", "nowhere"])
    assert one_line(data.main).startswith("data.py: --data nowhere: no")
