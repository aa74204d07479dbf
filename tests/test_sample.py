"""sample.py: people's own tunes come back note for note; statistics of style with known answers."""

import shutil
import sys
from collections import Counter

import mido
import numpy as np
import pytest

import data
import sample
from conftest import ROOT, silence, train


@pytest.fixture(scope="module")
def runs(scores, tmp_path_factory):
    """A folder with a briefly trained LSTM's and a VAE's run."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        silence(patch)
        train("lstm", scores, folder / "lstm", steps=10, eval_every=10)
        train("vae", scores, folder / "vae", "--latent", 8, steps=10, eval_every=10)
    return folder


@pytest.fixture(scope="module")
def tune(tmp_path_factory):
    """A tune with a rest before it and one inside, repeated notes, a note off the model's grid, and
    changes of tempo and metre."""
    meta = mido.MetaMessage
    track = mido.MidiTrack([
        meta("time_signature", numerator=3, denominator=4), meta("key_signature", key="Eb"),
        meta("set_tempo", tempo=600_001)])
    wait = 96
    for pitch, length in [(67, 96), (67, 96), (75, 48), (74, 24), (75, 24), (0, 192), (65, 96),
                          (65, 96), (63, 144), (63, 48)]:
        if pitch:
            track.append(mido.Message("note_on", note=pitch, velocity=70, time=wait))
            track.append(mido.Message("note_off", note=pitch, time=length))
        wait = 0 if pitch else length
        if pitch == 0:
            track += [meta("set_tempo", tempo=700_000),
                      meta("time_signature", numerator=6, denominator=8)]
    path = tmp_path_factory.mktemp("tunes") / "tune.mid"
    mido.MidiFile(tracks=[track], ticks_per_beat=96).save(path)
    return path


def call(*argv):
    """sample.py with these arguments, as the command line runs it; returns the exit status."""
    try:
        data.cli(lambda: sample.main([str(word) for word in argv]))
    except SystemExit as stop:
        return stop.code
    return 0


def read(path):
    """A MIDI file by mido alone, times in quarter notes: {track name: [(start, end, pitch)]},
    [(time, meta message as a dict)]."""
    file, parts, events = mido.MidiFile(path), {}, []
    for track in file.tracks:
        now, name, on = 0, "", {}
        for message in track:
            now += message.time
            quarter = now / file.ticks_per_beat
            if message.type == "track_name":
                name = message.name
            elif message.type == "note_on" and message.velocity:
                on[message.note] = quarter
            elif message.type in ("note_on", "note_off"):
                parts.setdefault(name, []).append((on.pop(message.note), quarter, message.note))
            elif message.type != "end_of_track":
                events.append((quarter, {**vars(message), "time": 0}))
    return parts, sorted(events, key=lambda event: (event[0], event[1]["type"]))


# ------------------------------------------------------------------------------- people's own files

def test_a_tune_comes_back_note_for_note_and_nothing_is_above_it(runs, tune, tmp_path, capsys):
    assert call(runs / "lstm", "--melody", tune, "-n", 2, "--out", tmp_path, "--no-wav") == 0
    assert "keep 8 of its 9 notes" in capsys.readouterr().out
    (given,), changes = read(tune)[0].values(), read(tune)[1]
    for i in (1, 2):
        parts, events = read(tmp_path / f"melody-tune-seed0-{i:02}.mid")
        assert list(parts) == ["soprano", "alto", "tenor", "bass"]
        assert parts["soprano"] == given and events == changes
        for name in ("alto", "tenor", "bass"):
            for (_, before, _), (start, *_) in zip(parts[name], parts[name][1:]):
                assert before <= start  # one note at a time
            for start, end, pitch in parts[name]:
                assert start >= 1  # as the tune
                last = [note for note in given if note[0] <= start][-1]
                assert all(pitch <= other[2] for other in [last, *given]
                           if other == last or other[0] < end and other[1] > start)


def test_a_beginning_goes_on_with_its_metre_and_a_marker(runs, scores, tmp_path):
    file = scores / "bwv269.mid"
    for length, frames in (("2", 12), ("7frames", 7)):
        out = tmp_path / length
        assert call(runs / "lstm", "--prime", file, "--prime-length", length, "--length", 16,
                    "-n", 1, "--time-step", "1/8", "--out", out, "--no-wav", "--skip-top", 1) == 0
        parts, events = read(out / "prime-bwv269-seed0-skiptop1-01.mid")
        marks = [at for at, event in events if event["type"] == "marker"]
        assert marks == [frames / 2]  # two bars of 3/4
        kinds = ("set_tempo", "time_signature", "key_signature")
        assert [e for e in events if e[1]["type"] != "marker"] == [
            e for e in read(file)[1] if e[0] < frames / 2 and e[1]["type"] in kinds]
        roll = data.notes_to_roll(np.concatenate([*map(np.array, parts.values())]), 0.5)[0]
        assert np.array_equal(roll[:frames], data.midi_to_roll(file, 0.5)[0][:frames])
        assert len(roll) <= frames + 16


def test_the_top_line_of_a_score():
    notes = np.array([(0, 1.02, 72), (0, 4, 60), (1, 2, 71), (1.5, 3, 64), (2, 4, 74), (5, 6, 50)])
    assert sample.top_line(notes).tolist() == [[0, 1, 72], [1, 2, 71], [2, 4, 74], [5, 6, 50]]


def test_nothing_is_overwritten_and_nothing_half_written(runs, tmp_path, monkeypatch, capsys):
    flags = [runs / "lstm", "-n", 1, "--length", 8, "--no-wav", "--out", tmp_path / "out"]
    assert [call(*flags), call(*flags), call(*flags, "--temperature", 0.5)] == [0, 0, 0]
    names = ["sample-seed0-01", "sample-seed0-02", "sample-seed0-temperature0.5-01"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        f"{name}.{end}" for name in names for end in ("mid", "png"))
    assert read(tmp_path / "out/sample-seed0-01.mid") == read(tmp_path / "out/sample-seed0-02.mid")

    def ctrl_c(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "draw_rows", ctrl_c)
    capsys.readouterr()
    assert call(*flags[:-1], tmp_path / "new") != 0 and not (tmp_path / "new").exists()
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_what_a_vae_does(runs, scores, tmp_path, capsys):
    a, b = sorted(scores.glob("*.mid"))[:2]
    assert call(runs / "vae", "--reconstruct", a, "--out", tmp_path, "--no-wav") == 0
    assert call(runs / "vae", "--interpolate", a, b, "-n", 3, "--out", tmp_path, "--no-wav") == 0
    assert "end to end" in capsys.readouterr().out
    assert len(list(tmp_path.glob("interpolate-*"))) == 2 and len(list(tmp_path.glob("rec*"))) == 2


@pytest.mark.parametrize("argv, says", [
    (["vae", "--melody", "TUNE"], "vae cannot do --melody; these can: lstm, attn_lstm"),
    (["lstm", "--reconstruct", "TUNE"], "lstm cannot do --reconstruct"),
    (["vae", "--skip-top", "2"], "vae cannot do --skip-top; these can: lstm"),
    (["none"], "none"), (["lstm", "vae"], "one run folder"), (["lstm", "-n", "0"], "-n"),
    (["lstm", "--prime", "TUNE", "--reconstruct", "TUNE"], "only one of"),
    (["lstm", "--prime", "no.mid"], "no.mid"),
    (["lstm", "--prime", "TUNE", "--prime-length", "2 beats"], "4bars"),
    (["lstm", "--soundfont", "no.sf2"], "--soundfont"),
    (["lstm", "--melody", "TUNE", "--skip-top", "1"], "--skip-top")])
def test_what_cannot_be_done_is_one_line(runs, tune, capsys, argv, says, tmp_path):
    words = {"TUNE": tune, **{name: runs / name for name in ("lstm", "vae", "none")}}
    assert call(*(words.get(word, word) for word in argv), "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- runs

def test_a_model_file_of_ones_own(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "lstm", tmp_path / "gru")
    held = data.load_checkpoint(tmp_path / "gru/model.pt")
    data.save_checkpoint(tmp_path / "gru/model.pt", held | {"model": "gru", "class": "GRU"})
    with pytest.raises(data.InputError, match="gru.py, which does not lie beside sample.py"):
        sample.load_model(tmp_path / "gru")
    text = (ROOT / "lstm.py").read_text().replace("class LSTM", "class GRU")
    (tmp_path / "gru.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sample, "__file__", str(tmp_path / "sample.py"))
    model = sample.load_model(tmp_path / "gru")
    assert type(model).__name__ == "GRU" and not model.training
    assert model.sample(2, 5).shape == (2, 5, 88)
    sys.modules.pop("gru")


def test_broken_runs_are_one_line(runs, tmp_path, capsys):
    whole = (runs / "lstm/model.pt").read_bytes()
    held = data.load_checkpoint(runs / "lstm/model.pt")
    for name in ("cut", "bytes", "shape", "evil"):
        (tmp_path / name).mkdir()
    (tmp_path / "cut/model.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "bytes/model.pt").write_bytes(whole[:5000] + b"x" * 50 + whole[5050:])
    narrow = held | {"config": held["config"] | {"hidden": 8}}
    data.save_checkpoint(tmp_path / "shape/model.pt", narrow)
    data.save_checkpoint(tmp_path / "evil/model.pt", held | {"model": "os", "class": "system"})
    shutil.copytree(runs / "lstm", tmp_path / "early", ignore=lambda *_: ["model.pt"])
    for name, says in (("cut", "damaged"), ("bytes", "damaged"), ("shape", "does not fit lstm.py"),
                       ("evil", "os.py"), ("early", "first validation")):
        assert call(tmp_path / name, "-n", 1) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and says in said


def test_compare(runs, scores, tmp_path, capsys):
    shutil.copytree(runs / "lstm", tmp_path / "stopped", ignore=lambda *_: ["result.json"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/model.pt").write_bytes(b"junk")
    assert call("--compare", runs / "*", tmp_path / "stopped", tmp_path / "broken", scores,
                "-n", 4, "--length", 48, "--out", tmp_path) == 0
    said = capsys.readouterr()
    for row in ("lstm", "vae", "stopped", "chorales", "chorales, training", "independent keys"):
        assert f"| {row} |" in said.out
    assert "unfinished: step 10 of 10" in said.out and "Bach" not in said.out
    assert "left out" in said.err and "returns" in said.out
    assert (tmp_path / "compare.md").read_text() == said.out
    assert (tmp_path / "compare.png").exists() and (tmp_path / "curves.png").exists()


# ------------------------------------------------------------------------------------------- style

def test_divergence_of_known_sets():
    assert sample.divergence(Counter("aabb"), Counter("aaabbb")) == pytest.approx(0)
    assert sample.divergence(Counter("aa"), Counter("b")) == pytest.approx(1)
    entropy = -0.75 * np.log2(0.75) - 0.25 * np.log2(0.25)  # of (1/2, 1/2) and (1, 0) mixed
    assert sample.divergence(Counter("ab"), Counter("a")) == pytest.approx(entropy - 0.5)
    assert sample.divergence(Counter(), Counter("a")) == 1


def test_style_of_equal_transposed_and_disjoint_sets(corpus):
    reference = sample.style(corpus.test)
    assert max(sample.style_distance(corpus.test, reference).values()) < 1e-9
    a, b = sample.style(corpus.test[:1]), sample.style([np.roll(corpus.test[0], 5, 1)])
    assert all(a[name] == b[name] for name in a if name != "pitch")
    low, high = np.zeros((2, 64, 88), bool)
    low[:, 10] = True
    high[::2, [60, 63, 67, 70, 75]] = True
    apart = sample.style_distance([low], sample.style([high]))
    for name in ("pitch", "notes at once", "note length", "chord"):
        assert apart[name] == pytest.approx(1)
    assert sample.tonic(np.eye(88, dtype=bool)[[39, 43, 46, 39, 41, 44, 50, 51]]) == 0  # C major


def test_shuffled_frames_and_random_notes_stand_apart_from_bach(corpus):
    rng = np.random.default_rng(0)
    reference = sample.style(corpus.train)
    bach = sample.style_distance(corpus.test, reference)
    shuffled = sample.style_distance([rng.permutation(roll) for roll in corpus.test], reference)
    assert shuffled["chord change"] > bach["chord change"] + 0.1
    assert shuffled["note length"] > bach["note length"] + 0.05
    noise = sample.style_distance(rng.random((2, 128, 88)) < 0.05, reference)
    assert noise["style"] > shuffled["style"] + 0.1


def chords(*keys):
    """A roll of these chords, a frame each."""
    roll = np.zeros((len(keys), 88), bool)
    for frame, chord in zip(roll, keys):
        frame[list(chord)] = True
    return roll


def test_hand_made_parallels():
    assert sample.parallels([chords((30, 37), (32, 39))]) == 50  # one parallel fifth in two frames
    assert sample.parallels([chords((30, 42), (28, 40))]) == 50  # an octave
    assert sample.parallels([chords((30, 49), (32, 51))]) == 50  # a twelfth
    assert sample.parallels([chords((30, 37), (30, 37), (32, 36))]) == 0  # held, then a third
    assert sample.parallels([chords((30, 42), (25, 44))]) == 0  # contrary motion
    assert sample.parallels([chords((30, 37, 42), (32, 39, 44))]) == 100  # a fifth and an octave


def test_hand_made_returns():
    a, b, c, d = (30,), (32, 40), (35,), (37,)
    assert sample.returns(chords(a, b, c, d)) == 0
    assert sample.returns(chords(a, b, b, c, d, a, a, b, c)) == 4  # a b b c
    assert sample.returns(chords(a, b, a, b, a, b)) == 2  # (a b) (a b): no overlap
    assert sample.returns(chords(a, (), a)) == 0  # one held chord
    assert sample.returns(chords(())) == 0


def test_a_planted_quotation_is_found(corpus):
    training = corpus.train[2]
    training = training[training.any(1)]
    quoted = training[sample.changes(training)][7:27]  # 20 different chords
    noise = np.random.default_rng(0).random((30, 88)) < 0.05
    piece = np.concatenate([noise[:15], np.repeat(np.roll(quoted, 3, 1), 2, 0), noise[15:]])
    where = sample.positions(corpus.train)
    assert sample.copied_run(piece, where) in (20, 21) and sample.copied_run(noise, where) < 5
    every = sample.chord_changes(corpus.train[0])
    assert sample.copied_run(corpus.train[0], where) == len(every) + 1


def test_figures_as_muspy_defines_them():
    roll = chords(*[(39, 43, 46)] * 4, (40,), (40,), (), ())  # C E G four times, C sharp twice
    assert sample.describe([roll]) == pytest.approx({
        "silent %": 25, "polyphony": 14 / 6, "range": 7, "pitch classes": 4,
        "scale consistency": 3 / 4})
