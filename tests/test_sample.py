"""sample.py: people's own tunes come back note for note; statistics of style with known answers."""

import shutil
from collections import Counter
from pathlib import Path

import mido
import numpy as np
import pretty_midi
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
    """With rests, repeated notes, one off the model's grid, and changes of tempo and metre."""
    meta, path = mido.MetaMessage, tmp_path_factory.mktemp("tunes") / "tune.mid"
    notes = [(1, 2, 67), (2, 3, 67), (3, 3.5, 75), (3.5, 3.75, 74), (3.75, 4, 75), (6, 7, 65),
             (7, 8, 65), (8, 9.5, 63), (9.5, 10, 63)]
    events = [(0, meta("time_signature", numerator=3)), (0, meta("key_signature", key="Eb")),
              (0, meta("set_tempo", tempo=600_001)), (4, meta("set_tempo", tempo=700_000)),
              (4, meta("time_signature", numerator=6, denominator=8))]
    sample.parts_to_midi({"": notes}, events=events, ticks=96).save(path)
    return path


def call(*argv):
    """sample.py with these arguments."""
    sample.main([str(word) for word in argv])


def read(path):
    """{track: [(start, end, pitch)]} and [(time, kind, message)] of a file, in quarter notes."""
    score, now, events, parts = pretty_midi.PrettyMIDI(str(path)), 0, [], {}
    for message in mido.merge_tracks(mido.MidiFile(path).tracks):
        now += message.time
        if message.is_meta and message.type not in ("track_name", "end_of_track"):
            events.append((now / score.resolution, message.type, message.dict() | {"time": 0}))
    for part in score.instruments:
        parts[part.name] = [(*(score.time_to_tick(at) / score.resolution for at in (
            note.start, note.end)), note.pitch) for note in part.notes]
    return parts, sorted(events, key=lambda event: event[:2])


def test_a_tune_comes_back_note_for_note_and_nothing_is_above_it(runs, tune, tmp_path, capsys):
    call(runs / "lstm", "--melody", tune, "-n", 2, "--out", tmp_path, "--no-wav")
    assert "keep 8 of its 9 notes" in capsys.readouterr().out
    (given,), changes = read(tune)[0].values(), read(tune)[1]
    for i in (1, 2):
        parts, events = read(tmp_path / f"melody-tune-seed0-{i:02}.mid")
        assert list(parts) == ["soprano", "alto", "tenor", "bass"]
        assert parts.pop("soprano") == given and events == changes
        for notes in parts.values():
            assert all(a[1] <= b[0] for a, b in zip(notes, notes[1:]))  # one note at a time
            for start, end, pitch in notes:
                last = [note for note in given if note[0] <= start][-1]  # it starts with the tune
                assert all(pitch <= other[2] for other in [last, *given]
                           if other == last or other[0] < end and other[1] > start)


def test_harmonies_that_close_best_are_kept(runs, corpus, tune, tmp_path, monkeypatch):
    """Bach's last chords are triads in root position, most of them the tonic's."""
    ends = [sample.closes(roll, sample.tonic(roll)) for roll in corpus.train]
    assert min(ends) > 0 and 2 * ends.count(2) > len(ends)
    kept, real = [], sample.closes
    monkeypatch.setattr(sample, "closes", lambda *args: kept.append(real(*args)) or kept[-1])
    call(runs / "lstm", "--melody", tune, "-n", 2, "--out", tmp_path, "--no-wav")
    key, best = sample.tonic(data.midi_to_roll(tune)[0]), []
    for i in (1, 2):
        roll = data.midi_to_roll(tmp_path / f"melody-tune-seed0-{i:02}.mid")[0]
        best.append(real(roll, key))
    assert len(kept) == 16 and best == sorted(kept)[:-3:-1]


@pytest.mark.parametrize("length, frames", [("2", 12), ("7frames", 7)])  # two bars of 3/4
def test_a_beginning_goes_on_with_its_metre_and_a_marker(runs, scores, tmp_path, length, frames):
    file = scores / "bwv269.mid"
    call(runs / "lstm", "--prime", file, "--prime-length", length, "--length", 16, "-n", 1,
         "--time-step", "1/8", "--out", tmp_path, "--no-wav", "--skip-top", 1)
    parts, events = read(tmp_path / "prime-bwv269-seed0-skiptop1-01.mid")
    assert [at for at, kind, _ in events if kind == "marker"] == [frames / 2]
    kinds = ("set_tempo", "time_signature", "key_signature")
    assert [event for event in events if event[1] != "marker"] == [
        event for event in read(file)[1] if event[0] < frames / 2 and event[1] in kinds]
    roll = data.notes_to_roll(np.concatenate([*map(np.array, parts.values())]), 0.5)
    assert np.array_equal(roll[:frames], data.midi_to_roll(file, 0.5)[0][:frames])
    assert len(roll) <= frames + 16


def test_the_top_line_of_a_score():
    notes = np.array([(0, 1.02, 72), (0, 4, 60), (1, 2, 71), (1.5, 3, 64), (2, 4, 74), (5, 6, 50)])
    assert sample.top_line(notes).tolist() == [[0, 1, 72], [1, 2, 71], [2, 4, 74], [5, 6, 50]]


def test_nothing_is_overwritten_and_nothing_half_written(runs, tmp_path, monkeypatch, one_line):
    flags = [runs / "lstm", "-n", 1, "--length", 8, "--no-wav", "--out", tmp_path / "out"]
    for more in ([], [], ["--temperature", 0.5]):
        call(*flags, *more)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"sample-seed0-{name}.{end}" for name in ("01", "02", "temperature0.5-01")
        for end in ("mid", "png")}
    assert read(tmp_path / "out/sample-seed0-01.mid") == read(tmp_path / "out/sample-seed0-02.mid")

    def ctrl_c(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "draw_rows", ctrl_c)
    one_line(call, *flags[:-1], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_a_vae_does(runs, scores, tmp_path, capsys):
    a, b = sorted(scores.glob("*.mid"))[:2]
    call(runs / "vae", "--reconstruct", a, "--out", tmp_path, "--no-wav")
    call(runs / "vae", "--interpolate", a, b, "-n", 3, "--out", tmp_path, "--no-wav")
    assert "end to end" in capsys.readouterr().out
    assert len(list(tmp_path.glob("interpolate-*"))) == 2 and len(list(tmp_path.glob("rec*"))) == 2


@pytest.mark.parametrize("argv, says", [
    ("vae --melody TUNE", "vae cannot do --melody; these can: lstm, attn_lstm"),
    ("lstm --reconstruct TUNE", "lstm cannot do --reconstruct"),
    ("vae --skip-top 2", "vae cannot do --skip-top; these can: lstm"), ("none", "none"),
    ("lstm vae", "one run folder"), ("lstm -n 0", "-n"), ("lstm --prime no.mid", "no.mid"),
    ("lstm --prime TUNE --reconstruct TUNE", "only one of"),
    ("lstm --prime TUNE --prime-length 2beats", "4bars"),
    ("lstm --soundfont no.sf2", "--soundfont"), ("lstm --melody TUNE --skip-top 1", "--skip-top")])
def test_what_cannot_be_done_is_one_line(runs, tune, one_line, argv, says, tmp_path):
    words = {"TUNE": tune, **{name: runs / name for name in ("lstm", "vae", "none")}}
    words = [words.get(word, word) for word in argv.split()]
    assert says in one_line(call, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_file_of_ones_own(brief, tmp_path, monkeypatch, no_music):
    """gru.py, made of lstm.py as the README says, is trained beside data.py and sampled from."""
    text = (ROOT / "lstm.py").read_text().replace("nn.LSTM", "nn.GRU").replace('"lstm"', '"gru"')
    (tmp_path / "gru.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    train("gru", brief, tmp_path / "run", steps=2)
    with pytest.raises(data.InputError, match="gru.py, which does not lie beside sample.py"):
        sample.load_model(tmp_path / "run")
    monkeypatch.setattr(sample, "__file__", str(tmp_path / "sample.py"))
    model = sample.load_model(tmp_path / "run")
    assert model.sample(2, 5).shape == (2, 5, 88) and not model.training
    call(tmp_path / "run", "-n", 1, "--length", 8, "--no-wav", "--skip-top", 1)


def test_broken_runs_are_one_line(runs, tmp_path, one_line):
    path = Path(shutil.copytree(runs / "lstm", tmp_path / "run")) / "model.pt"
    held = data.load_checkpoint(path)
    for wrong, says in (({"config": held["config"] | {"hidden": 8}}, "does not fit lstm.py"),
                        ({"model": "os", "class": "system"}, "os.py"), ({"step": 0.5}, "damaged")):
        data.save_checkpoint(path, held | wrong)
        assert says in one_line(call, path.parent, "-n", 1)
    path.unlink()
    assert "first validation" in one_line(call, path.parent, "-n", 1)


def test_compare(runs, scores, tmp_path, capsys):
    shutil.copytree(runs / "lstm", tmp_path / "stopped", ignore=lambda *_: ["result.json"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/model.pt").write_bytes(b"junk")
    call("--compare", runs / "*", tmp_path / "stopped", tmp_path / "broken", scores,
         "-n", 4, "--length", 48, "--out", tmp_path)
    said = capsys.readouterr()
    for text in ("| lstm |", "| vae |", "| stopped |", "| chorales |", "| chorales, training |",
                 "| independent keys |", "unfinished: step 10 of 10", "returns"):
        assert text in said.out
    assert "left out" in said.err and "Bach" not in said.out
    assert (tmp_path / "compare.md").read_text() == said.out
    assert (tmp_path / "compare.png").exists() and (tmp_path / "curves.png").exists()


def chords(*keys):
    """A roll of these chords, a frame each."""
    roll = np.zeros((len(keys), 88), bool)
    for frame, chord in zip(roll, keys):
        frame[list(chord)] = True
    return roll


def test_style_of_equal_transposed_and_disjoint_sets(corpus):
    mixed = -0.75 * np.log2(0.75) - 0.25 * np.log2(0.25) - 0.5  # of (1/2, 1/2) and (1, 0)
    for a, b, want in (("aabb", "aaabbb", 0), ("aa", "b", 1), ("", "a", 1), ("ab", "a", mixed)):
        assert data.divergence(Counter(a), Counter(b)) == pytest.approx(want)
    reference = sample.style(corpus.test)
    assert max(sample.style_distance(corpus.test, reference).values()) < 1e-9
    a, b = sample.style(corpus.test[:1]), sample.style([np.roll(corpus.test[0], 5, 1)])
    assert all(a[name] == b[name] for name in a if name != "pitch")
    low, high = chords(*[(10,)] * 64), chords(*[(60, 63, 67, 70, 75), ()] * 32)
    apart = sample.style_distance([low], sample.style([high]))
    for name in ("pitch", "notes at once", "note length", "chord"):
        assert apart[name] == pytest.approx(1)
    assert sample.tonic(chords(*[(k,) for k in (39, 43, 46, 39, 41, 44, 50, 51)])) == 0  # C major


def test_shuffled_frames_and_random_notes_stand_apart_from_bach(corpus):
    rng = np.random.default_rng(0)
    reference = sample.style(corpus.train)
    bach = sample.style_distance(corpus.test, reference)
    shuffled = sample.style_distance([rng.permutation(roll) for roll in corpus.test], reference)
    assert shuffled["chord change"] > bach["chord change"] + 0.1
    assert shuffled["note length"] > bach["note length"] + 0.05
    noise = sample.style_distance(rng.random((2, 128, 88)) < 0.05, reference)
    assert noise["style"] > shuffled["style"] + 0.1


@pytest.mark.parametrize("frames, per_100", [
    ([(30, 37), (32, 39)], 50), ([(30, 42), (28, 40)], 50), ([(30, 49), (32, 51)], 50),
    ([(30, 37), (30, 37), (32, 36)], 0),  # a fifth held, then a third
    ([(30, 42), (25, 44)], 0),  # contrary motion
    ([(30, 37, 42), (32, 39, 44)], 100)])  # a fifth and an octave
def test_hand_made_parallels(frames, per_100):
    assert sample.parallels([chords(*frames)]) == per_100


@pytest.mark.parametrize("passage, frames", [
    ("abcd", 0), ("abbcdaabc", 4), ("ababab", 2), ("a-a", 0), ("-", 0)])  # abbc; no overlap; held
def test_hand_made_returns(passage, frames):
    keys = {"a": (30,), "b": (32, 40), "c": (35,), "d": (37,), "-": ()}
    assert sample.returns(chords(*(keys[name] for name in passage))) == frames


def test_a_planted_quotation_is_found(corpus):
    training = corpus.train[2]
    training = training[training.any(1)]
    quoted = training[sample.changes(training)][7:27]  # 20 different chords
    noise = np.random.default_rng(0).random((30, 88)) < 0.05
    piece = np.concatenate([noise[:15], np.repeat(np.roll(quoted, 3, 1), 2, 0), noise[15:]])
    where = sample.positions(corpus.train)
    assert sample.copied_run(piece, where) in (20, 21) and sample.copied_run(noise, where) < 5


def test_figures_as_muspy_defines_them():
    roll = chords(*[(39, 43, 46)] * 4, (40,), (40,), (), ())  # C E G four times, C sharp twice
    assert sample.describe([roll]) == pytest.approx({
        "silent %": 25, "polyphony": 14 / 6, "range": 7, "pitch classes": 4,
        "scale consistency": 3 / 4})
