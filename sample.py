"""New music from a trained model, and the comparison of several.

    python sample.py runs/vqvae                         # 8 pieces as MIDI, WAV and picture
    python sample.py runs/attn_lstm --prime start.mid   # go on from a beginning
    python sample.py runs/attn_lstm --melody tune.mid   # write other voices under a tune
    python sample.py runs/hvae --interpolate a.mid b.mid
    python sample.py runs/vqvae --reconstruct a.mid
    python sample.py --compare runs/* some_midi_folder  # one table: runs/compare.md and .png

Files go to samples/ in the run's folder, or to --out; nothing there is ever replaced.
"""

import contextlib
import glob
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction
from itertools import combinations, islice
from pathlib import Path

import mido
import numpy as np
import pretty_midi
import torch

import data

# What each model can do. A model file of your own is taken to do what lstm.py does.
ABLE = {
    "lstm": ("temperature", "top_p", "skip_top", "prime", "melody"),
    "attn_lstm": ("temperature", "top_p", "prime", "melody"),
    "vae": ("temperature", "top_p", "prime", "interpolate", "reconstruct"),
    "hvae": ("temperature", "top_p", "prime", "interpolate", "reconstruct"),
    "vqvae": ("temperature", "top_p", "prime", "reconstruct"),
    "wgan": ("temperature", "top_p"),
}


def able(held, what, insist=False):
    """Whether the model of a checkpoint can do `what`, a name in ABLE; if not, insisting raises
    InputError with the names of those that can."""
    can = what in ABLE.get(held["model"], ABLE["lstm"])
    if insist and not can:
        raise data.InputError(f"{held['model']} cannot do --{what.replace('_', '-')}; these can: "
                              + ", ".join(name for name in ABLE if what in ABLE[name]))
    return can


def load_run(folder, device="cpu"):
    """A run's model with its best weights so far, ready to sample from, and its checkpoint, which
    names the model's file: only a NAME.py beside this one is ever imported."""
    folder = Path(folder)
    path = folder / "model.pt"
    if folder.is_dir() and not path.exists():
        raise data.InputError(f"{folder}: no model.pt; training writes it at the first validation "
                              "(see --eval-every), and a stopped training goes on by --resume")
    held = data.load_checkpoint(path)
    file = f"{held['model']}.py"
    if not file[:-3].isidentifier() or not Path(__file__).with_name(file).is_file():
        raise data.InputError(f"{path}: made by {file}, which does not lie beside sample.py")
    try:
        model = getattr(importlib.import_module(held["model"]), held["class"])(**held["config"])
        model.load_state_dict(held["parts"]["model"])
        held["voices"] = held["config"].get("voices", 4)
        held["args"]["data"], held["args"]["time_step"], float(held["time_step"])
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        why = str(error).splitlines()[:2][-1].strip()[:90]  # load_state_dict's first line says less
        raise data.InputError(f"{path} does not fit {file} as it is now ({why}); use the file that "
                              "it was trained with, or train again") from None
    return model.to(device).eval(), held


def load_model(folder, device="cpu"):
    """The model of a run folder, ready to sample from: load_model("runs/lstm").sample(8, 256)."""
    return load_run(folder, device)[0]


# ----------------------------------------------------------------------------------- people's files
def read_score(path, bpm=None):
    """A MIDI file: its notes as of data.read_notes; its changes of tempo, metre and key as a list
    of (quarter note, mido.MetaMessage); ticks per quarter note to write both with.

    bpm: quarter notes per minute instead of the file's tempo.
    """
    notes, _ = data.read_notes(path)
    midi = mido.MidiFile(path, charset="latin1")
    kinds = ("set_tempo", "time_signature", "key_signature")
    events = {(0, kind): mido.MetaMessage(kind) for kind in kinds[:2]}  # what MIDI takes for given
    for track in midi.tracks:
        tick = 0
        for message in track:
            tick += message.time
            if message.type in kinds:
                events[tick / midi.ticks_per_beat, message.type] = message
    if bpm:
        events = {at: message for at, message in events.items() if at[1] != "set_tempo"}
        events[0, "set_tempo"] = mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(bpm))
    end = notes[:, 1].max()
    events = [(at, events[at, kind]) for at, kind in sorted(events) if at < end]
    return notes, events, midi.ticks_per_beat * -(-480 // midi.ticks_per_beat)


def to_grid(path, notes, held, args):
    """Notes as the model reads them: (roll (T, 88), time step in quarter notes). Says how."""
    time_step = args.time_step or held["time_step"]
    roll = torch.from_numpy(data.notes_to_roll(notes, time_step))
    roll = data.from_voices(data.to_voices(roll, held["voices"])).numpy()
    kept = int((np.diff(np.ceil(notes[:, :2] / time_step - 0.25 - 1e-6)) > 0).sum())
    print(f"{path}: the model reads it in time steps of {note_name(time_step)} ("
          + ("--time-step" if args.time_step else "its own; --time-step sets another")
          + f"), which keep {kept} of its {len(notes)} notes")
    if not roll.any():
        raise data.InputError(f"{path}: no note on the 88 keys that fills half a time step; "
                              "give a finer --time-step, such as 1/32")
    return roll, time_step


def note_name(quarters):
    """0.5 -> "1/8"."""
    return str(Fraction(quarters / 4).limit_denominator(96))


def bar_starts(events):
    """Where bars start by the time signatures of read_score, in quarter notes, without end."""
    quarter = 0
    while True:
        yield quarter
        metre = [m for at, m in events if m.type == "time_signature" and at <= quarter][-1]
        quarter += 4 * metre.numerator / metre.denominator


def top_line(notes):
    """The tune of a score (N, 3): the notes with none above them, each until the next: (M, 3)."""
    line = []
    for start, end, pitch in notes[np.lexsort((-notes[:, 2], notes[:, 0]))]:
        then = start + (end - start) / 4  # by then notes that merely overlap the next are over
        above = (notes[:, 0] <= then) & (notes[:, 1] > then) & (notes[:, 2] > pitch)
        if above.any() or line and line[-1][0] == start:
            continue
        if line:
            line[-1][1] = min(line[-1][1], start)
        line.append([start, end, pitch])
    return np.array(line)


def keep_below(notes, tune, tolerance):
    """Notes (N, 3) of a lower voice, by octaves lower where the tune goes below them between two
    frames or has rested on a lower note; tolerance: overlap in quarter notes that does no harm."""
    kept = []
    for start, end, pitch in notes:
        first = max(0, np.searchsorted(tune[:, 0], start + tolerance, side="right") - 1)
        last = max(first + 1, np.searchsorted(tune[:, 0], end - tolerance))
        while pitch > tune[first:last, 2].min():
            pitch -= 12
        if pitch >= data.LOWEST:
            kept.append((start, end, pitch))
    return np.array(kept, float).reshape(-1, 3)


# ------------------------------------------------------------------------------------------- verbs
def draw(model, held, args, length, time_step, events=None, times=1, **given):
    """Sample as the flags say, and say how much that is: bool (times * n, length, 88). given: prime
    or melody; events: of the piece, for its metre and tempo; times: to choose n from."""
    for name in (*args.options, *given):
        able(held, name, insist=True)
    now = {message.type: message for _, message in events or ()}
    metre = now.get("time_signature", mido.MetaMessage("time_signature"))
    bpm = mido.tempo2bpm(now["set_tempo"].tempo) if now else args.bpm or 80
    n, quarters = args.n or 8, length * time_step
    print(f"writing {n} of {length} frames of {note_name(time_step)} each: "
          f"{quarters * metre.denominator / 4 / metre.numerator:.4g} bars of {metre.numerator}/"
          f"{metre.denominator}, {quarters * 60 / bpm:.0f} seconds", flush=True)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    return model.sample(times * n, length, generator, **args.options, **given).cpu().numpy()


def to_parts(roll, time_step, voices):
    """A roll as a line per voice, {"soprano": (N, 3), ...}, notes as data.read_notes gives them."""
    score = data.roll_to_midi(roll, time_step, 60, voices)  # whose seconds are quarter notes
    return {part.name: np.array([(n.start, n.end, n.pitch) for n in part.notes]).reshape(-1, 3)
            for part in score.instruments}


def parts_to_midi(parts, bpm=80, events=None, ticks=480):
    """to_parts's lines as a mido.MidiFile, a track per voice, with `ticks` per quarter note; on a
    first track events, [(quarter note, message)], or bpm and 4/4. pretty_midi, which data.py writes
    with, knows neither markers nor the ticks of a given file."""
    tempo = mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(bpm))
    tracks = [events or [(0, tempo), (0, mido.MetaMessage("time_signature"))]]  # 4/4
    for i, (name, notes) in enumerate(parts.items()):
        channel = i % 15 + (i % 15 > 8)  # never 9, which is for drums
        tracks.append([(0, mido.MetaMessage("track_name", name=name))] + [
            (when, mido.Message("note_on", note=int(pitch), velocity=velocity, channel=channel))
            for *times, pitch in notes for when, velocity in zip(times, (80, 0))])
    file = mido.MidiFile(ticks_per_beat=ticks)
    for track in tracks:
        track = [message.copy(time=round(quarter * ticks)) for quarter, message in track]
        track.sort(key=lambda m: (m.time, getattr(m, "velocity", 0)))  # releases first
        before = [0] + [message.time for message in track]
        file.tracks.append(mido.MidiTrack(m.copy(time=m.time - b) for m, b in zip(track, before)))
    return file


def draw_rows(rows, path, *timing):
    """Draw {title: parts} one above the other, with bars and beats; what lies before a marker is
    shaded. timing: bpm, events and ticks as of parts_to_midi."""
    files = [parts_to_midi(parts, *timing) for parts in rows.values()]
    scores = [pretty_midi.PrettyMIDI(mido_object=file) for file in files]
    end = max(score.get_end_time() for score in scores) or 1
    with data.picture(path, len(rows), 1, (min(16, 4 + end / 8), 2.8)) as axes:
        for axis, (title, parts), score, file in zip(axes, rows.items(), scores, files):
            heard = {part.name: part for part in score.instruments}  # a silent one keeps its colour
            score.instruments = [heard.get(name) or pretty_midi.Instrument(0, name=name)
                                 for name in parts]
            data.draw_score(axis, title, score)
            bars = score.get_downbeats()
            some = slice(None, None, 1 + len(bars) // 24)
            axis.set_xticks(bars[some], range(1, len(bars) + 1)[some])
            axis.set_xticks(score.get_beats(), minor=True)
            axis.set(xlabel="bar", xlim=(0, end))
            tick = 0
            for message in file.tracks[0]:
                tick += message.time
                if message.type == "marker":
                    axis.axvspan(0, score.tick_to_time(tick), color="0.9", zorder=0)
                    axis.axvline(score.tick_to_time(tick), color="black")


def write(stem, parts, args, events=None, ticks=480, rows=None):
    """Write a piece as MIDI, WAV and picture under the next number that is free in the folder, all
    of it at the end or nothing. rows: what the picture shows, if not these parts alone."""
    folder, timing = Path(args.out or args.run / "samples"), (args.bpm or 80, events, ticks)
    taken = {file.stem for file in folder.glob("*")}
    name = next(f"{stem}-{i:02}" for i in range(1, 10**9) if f"{stem}-{i:02}" not in taken)
    with tempfile.TemporaryDirectory() as part:
        path = Path(part, name)
        midi = parts_to_midi(parts, *timing)
        midi.save(f"{path}.mid")
        draw_rows(rows or {name: parts}, f"{path}.png", *timing)
        if not args.no_wav:
            score = pretty_midi.PrettyMIDI(mido_object=midi)
            data.write_wav(f"{path}.wav", score, args.soundfont and score.fluidsynth(
                22050, synthesizer=args.soundfont))
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(part).iterdir():
            shutil.move(file, folder)
    print(f"wrote {folder / name}.mid" + ", .wav" * (not args.no_wav) + ", .png")


def sample(model, held, args):
    """New pieces."""
    time_step = args.time_step or held["time_step"]
    for roll in draw(model, held, args, args.length or 256, time_step):
        write("sample" + args.settings, to_parts(roll, time_step, held["voices"]), args)


def prime(model, held, args):
    """Go on from a file, or from its first bars; a marker stands where the new music starts."""
    notes, events, ticks = read_score(args.prime, args.bpm)
    end = notes[:, 1].max()
    if args.prime_length:
        length, unit = args.prime_length
        frame, bar = args.time_step or held["time_step"], bar_starts(events)
        end = min(end, next(islice(bar, length, None)) if unit == "bars" else length * frame)
        notes = notes[notes[:, 0] < end].clip(max=(end, end, 127))
    roll, time_step = to_grid(args.prime, notes, held, args)
    roll = np.pad(roll, ((0, int(np.ceil(end / time_step - 1e-6)) - len(roll)), (0, 0)))
    new = len(roll) * time_step
    events = [(quarter, message) for quarter, message in events if quarter < new]
    tempos = [message for _, message in events if message.type == "set_tempo"]
    if tempos[-1].tempo != tempos[0].tempo:  # after a ritardando, for one
        events.append((new, tempos[0]))
    rolls = draw(model, held, args, args.length or 256, time_step, events,
                 prime=roll[roll.any(1).argmax():])
    for rest in rolls:
        parts = to_parts(np.concatenate([roll, rest]), time_step, held["voices"])
        write(f"prime-{Path(args.prime).stem}" + args.settings, parts, args,
              [*events, (new, mido.MetaMessage("marker", text="new music"))], ticks)


def melody(model, held, args):
    """Other voices under a file's top line, which stays note for note as it is; drawn forwards they
    do not know that it ends, so of eight times as many those that close best are written."""
    if held["voices"] == 1:
        raise data.InputError(f"--melody: {args.run} writes one voice; nothing goes under it")
    notes, events, ticks = read_score(args.melody, args.bpm)
    tune = top_line(notes)
    roll, time_step = to_grid(args.melody, tune, held, args)
    start = roll.any(1).argmax()
    rolls = draw(model, held, args, len(roll) - start, time_step, events, 8, melody=roll[start:])
    key = tonic(roll)
    best = sorted(rolls, key=lambda new: closes(new, key), reverse=True)
    for new in best[:len(rolls) // 8]:
        lower = np.concatenate([roll[:start], new & ~roll[start:]])
        lower = to_parts(lower, time_step, held["voices"] - 1).values()
        lower = [keep_below(part, tune, time_step / 4) for part in lower]
        parts = dict(zip(to_parts(roll, time_step, held["voices"]), [tune, *lower]))
        write(f"melody-{Path(args.melody).stem}" + args.settings, parts, args, events, ticks)


@torch.no_grad()
def latents(model, roll):
    """The codes of the windows that tile a roll: posterior means or code indices (windows, ...)."""
    device = next(model.parameters()).device
    z = model.encode(*next(data.Windows([roll], model.window, device, model.window).chunks(10**6)))
    return z[0] if isinstance(z, tuple) else z


def decode(model, held, z):
    """Codes (n, ...) as the likeliest rolls, bool (n, window, 88)."""
    options = {"temperature": 0} if able(held, "interpolate") else {}  # vqvae.py has none
    return model.decode(z, **options).cpu().numpy()


def reconstruct(model, held, args):
    """Encode a file and decode it again; the picture has both."""
    able(held, "reconstruct", insist=True)
    notes, events, ticks = read_score(args.reconstruct, args.bpm)
    roll, time_step = to_grid(args.reconstruct, notes, held, args)
    start = roll.any(1).argmax()
    windows = decode(model, held, latents(model, roll[start:]))
    rebuilt = np.concatenate([roll[:start], *windows])[:len(roll)]
    parts = to_parts(rebuilt, time_step, held["voices"])
    write(f"reconstruct-{Path(args.reconstruct).stem}", parts, args, events, ticks,
          {Path(args.reconstruct).name: to_parts(roll, time_step, held["voices"]),
           f"rebuilt, F1 of the notes {note_f1(roll, rebuilt):.3f}": parts})


def interpolate(model, held, args):
    """The way from one file's first window to another's through z."""
    able(held, "interpolate", insist=True)
    ends = []
    for path in args.interpolate:
        roll, time_step = to_grid(path, read_score(path)[0], held, args)
        ends.append(latents(model, roll[roll.any(1).argmax():])[0])
    rolls = decode(model, held, slerp(*ends, args.n or 9))
    for i, (a, b) in enumerate(zip(rolls, rolls[1:])):
        print(f"{i} to {i + 1}: {100 * (1 - note_f1(a, b)):.0f} % of the notes differ")
    print(f"end to end: {100 * (1 - note_f1(rolls[0], rolls[-1])):.0f} %")
    parts = [to_parts(roll, time_step, held["voices"]) for roll in rolls]
    write("interpolate-" + "-".join(Path(path).stem for path in args.interpolate),
          to_parts(np.concatenate(rolls), time_step, held["voices"]), args,
          rows={f"{i} of {len(rolls) - 1}": part for i, part in enumerate(parts)})


def note_f1(a, b):
    """F1 of the sounding cells of two rolls of one shape."""
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


def slerp(a, b, n):
    """n points from a to b (Z,) along the great circle, lengths in between (White 2016): (n, Z)."""
    t = torch.linspace(0, 1, n, device=a.device)[:, None]
    angle = torch.acos(torch.clamp(torch.dot(a, b) / (a.norm() * b.norm() + 1e-9), -1, 1))
    if angle < 1e-4:
        return a + t * (b - a)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


# ------------------------------------------------------------------------------------------- style
def pitch_classes(roll):
    """Sounding frames of each pitch class, C first: (T, 88) -> (12,)."""
    return np.bincount((np.nonzero(roll)[1] + data.LOWEST) % 12, minlength=12)


def tonic(roll):
    """The tonic 0..11 (C is 0) of the key of a roll (T, 88)."""
    return int(data.kind(torch.as_tensor(roll)) % 12)


def closes(roll, key):
    """How well a piece (T, 88) ends, if key is its tonic: 1 on a triad in root position, 2 on the
    tonic's, else 0."""
    keys = np.flatnonzero(roll[roll.any(1)][-1])
    chord = {*(keys - keys[0]) % 12}
    triad = chord <= {0, 4, 7} or chord <= {0, 3, 7}
    return triad * (1 + ((keys[0] + data.LOWEST) % 12 == key))


def changes(rows):
    """Where a row of an array (T, N) differs from the one before: bool (T,), True first."""
    return np.r_[True, (rows[1:] != rows[:-1]).any(1)][:len(rows)]


def style(rolls):
    """Histograms of a set of rolls (T, 88), each a Counter:

    pitch and pitch class, after the excerpt is moved to C by its key; notes at once, over all
    frames; note length in frames, up to 16; melodic interval of the top and of the bottom line in
    semitones, up to an octave, where it moves; chord, the pitch-class set above the bass, over
    sounding frames; chord change, two different chords in a row with their basses' interval.
    """
    names = ("pitch", "pitch class", "notes at once", "note length", "top interval",
             "bottom interval", "chord", "chord change")
    out = {name: Counter() for name in names}
    for roll in rolls:
        down = (tonic(roll) + 6) % 12 - 6  # -6..5 semitones
        pitch = np.nonzero(roll)[1] + data.LOWEST - down
        out["pitch"].update(pitch.tolist())
        out["pitch class"].update((pitch % 12).tolist())
        out["notes at once"].update(roll.sum(1).tolist())
        edges = np.diff(np.pad(roll, ((1, 1), (0, 0))).astype(np.int8), axis=0).T
        lengths = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
        out["note length"].update(lengths.clip(max=16).tolist())
        roll = roll[roll.any(1)]
        if not len(roll):
            continue
        top, bass = data.KEYS - 1 - roll[:, ::-1].argmax(1), roll.argmax(1)
        for name, line in (("top interval", top), ("bottom interval", bass)):
            moves = np.diff(line)
            out[name].update(moves[moves != 0].clip(-13, 13).tolist())
        frame, key = np.nonzero(roll)
        chord = np.zeros(len(roll), int)  # a bit for each pitch class above the bass
        np.bitwise_or.at(chord, frame, 1 << (key - bass[frame]) % 12)
        out["chord"].update(chord.tolist())
        new = changes(np.stack([chord, bass], 1))
        motion = np.diff(bass[new]).clip(-13, 13).tolist()
        out["chord change"].update(zip(chord[new][:-1].tolist(), chord[new][1:].tolist(), motion))
    return out


def style_distance(rolls, reference):
    """The divergence of each of style()'s histograms between rolls and a reference's style(), and
    their mean ("style")."""
    have = style(rolls)
    each = {name: data.divergence(have[name], reference[name]) for name in reference}
    return {"style": float(np.mean(list(each.values()))), **each}


def parallels(rolls):
    """Parallel fifths and octaves per 100 frames: of two of four voices, both move the same way and
    are a fifth, or an octave, apart (up to octaves) before and after."""
    count = frames = 0
    for roll in rolls:
        frames += len(roll)
        voice = data.to_voices(torch.as_tensor(roll), 4).numpy()
        before, after = voice[:-1], voice[1:]
        for i, j in combinations(range(4), 2):
            sound = (before[:, [i, j]] > 0).all(1) & (after[:, [i, j]] > 0).all(1)
            move = np.sign(after - before)
            together = (move[:, i] != 0) & (move[:, i] == move[:, j])
            first, then = before[:, i] - before[:, j], after[:, i] - after[:, j]
            perfect = np.isin(first % 12, (0, 7)) & (first % 12 == then % 12)
            count += int((sound & together & perfect & (first > 0) & (then > 0)).sum())
    return 100 * count / max(1, frames)


def chord_changes(roll):
    """A number for each change from one chord to another, held chords counted once, the same in
    every transposition: (T, 88) -> list."""
    roll = roll[roll.any(1)]
    return data.run_hashes(roll[changes(roll)], 2)


def positions(rolls):
    """Where each of chord_changes() stands in these rolls, put in a row: {number: [position]}."""
    where, at = {}, 0
    for roll in rolls:
        for at, change in enumerate(chord_changes(roll), at + 2):  # a gap between two rolls
            where.setdefault(change, []).append(at)
    return where


def copied_run(roll, where):
    """The longest run of different chords of a roll that stands in the rolls of positions(), in
    any transposition."""
    longest, runs = 0, {}
    for change in chord_changes(roll):
        runs = {at: runs.get(at - 1, 0) + 1 for at in where.get(change, ())}
        longest = max(longest, *runs.values(), 0)
    return longest + 1


def returns(roll):
    """The longest passage that stands twice in a roll (T, 88) without overlap, its chords the same
    whatever their lengths: frames of the first one."""
    roll = roll[roll.any(1)]
    starts = np.flatnonzero(changes(roll))
    chords = [frame.tobytes() for frame in roll[starts]]
    starts = np.append(starts, len(roll))
    longest = 0
    for lag in range(1, len(chords)):
        run = 0
        for i in range(len(chords) - lag):
            run = min(run + 1, lag) if chords[i] == chords[i + lag] else 0
            longest = max(longest, int(starts[i + 1] - starts[i + 1 - run]))
    return longest


def describe(rolls):
    """Plain figures of a set of rolls, means over rolls: silent frames in %, notes at once where
    any sound, pitch range in semitones, pitch classes used, and scale consistency, the largest
    share of notes that lie in one major or natural minor scale; the last four as MusPy defines them
    (Dong et al. 2020, metrics)."""
    scale, figures = np.isin(np.arange(12), (0, 2, 4, 5, 7, 9, 11)), []
    for roll in rolls:
        used, sounding = np.flatnonzero(roll.any(0)), roll.any(1).sum()
        classes = pitch_classes(roll & ~np.pad(roll, ((1, 0), (0, 0)))[:-1])  # of onsets
        in_scale = max(classes[np.roll(scale, key)].sum() for key in range(12))
        figures.append((100 * (1 - sounding / len(roll)), roll.sum() / max(1, sounding),
                        np.ptp(used) if len(used) else 0, (classes > 0).sum(),
                        in_scale / max(1, classes.sum())))
    names = ("silent %", "polyphony", "range", "pitch classes", "scale consistency")
    return dict(zip(names, np.mean(figures, 0).tolist()))


def excerpts(pieces, n, length, rng):
    """n random excerpts of `length` frames (whole pieces where all are shorter)."""
    pieces = [piece for piece in pieces if len(piece) >= length] or pieces
    chosen = [pieces[i] for i in rng.integers(len(pieces), size=n)]
    starts = [int(rng.integers(max(1, len(piece) - length + 1))) for piece in chosen]
    return [piece[start:start + length] for piece, start in zip(chosen, starts)]


# -------------------------------------------------------------------------------------- comparison
def read_sets(args):
    """What --compare was given: runs on one corpus as {name: (path, model, checkpoint)}, folders of
    MIDI files as {name: files}, and a line for each that was left out."""
    runs, folders, left_out = {}, {}, []
    for path in (Path(p) for text in args.runs for p in sorted(glob.glob(text)) or [text]):
        files = sorted(path.rglob("*.[mM][iI][dD]")) + sorted(path.rglob("*.[mM][iI][dD][iI]"))
        name = path.name if path.name not in {**runs, **folders} else str(path)
        try:
            if (path / "model.pt").exists() or (path / "last.pt").exists():
                model, held = load_run(path, args.device)
                runs[name] = path, model, held
                corpora = {(h["corpus"], h["args"]["time_step"]) for _, _, h in runs.values()}
                if len(corpora) > 1:
                    del runs[name]
                    raise data.InputError(f"{path}: its corpus, {held['corpus']}, or its time step "
                                          "is another than the runs' before it")
            elif any(path.glob("*/model.pt")):
                raise data.InputError(f"{path}: holds runs; write {path}/*")
            elif files:
                folders[name] = files
            elif path.is_dir() or not path.exists():  # runs/* matches runs/compare.md as well
                raise data.InputError(f"{path}: holds neither a run nor MIDI files")
        except data.InputError as error:
            left_out.append(f"left out {error}")
            print(left_out[-1], file=sys.stderr)
    if not runs and not folders:
        raise data.InputError("--compare: nothing to compare; give folders of runs or MIDI files")
    return runs, folders, left_out


def yardsticks(corpus, n, length):
    """Sets of n rolls of `length` frames to measure by, {name: rolls}: the corpus's own; its frames
    shuffled in time, which keeps the chords and loses the music; independent keys."""
    rng = np.random.default_rng(0)
    often = np.concatenate(corpus.train).mean(0)  # of each key
    return {
        f"{corpus.name}, training": excerpts(corpus.train, n, length, rng),
        f"{corpus.name}, test": excerpts(corpus.test, n, length, rng),
        "shuffled frames": [rng.permutation(x) for x in excerpts(corpus.train, n, length, rng)],
        "independent keys": [rng.random((length, data.KEYS)) < often for _ in range(n)]}


def read_rolls(name, files, time_step):
    """The rolls of MIDI files, in four voices; those that cannot be read are left out."""
    rolls = []
    for file in data.progress(files, f"reading {name}"):
        with contextlib.suppress(data.InputError):
            roll = torch.from_numpy(data.cut_silence(data.midi_to_roll(file, time_step)[0]))
            rolls.append(data.from_voices(data.to_voices(roll, 4)).numpy())
    if not rolls:
        raise data.InputError(f"{name}: none of its {len(files)} MIDI files can be read")
    return rolls


def measure(rolls, reference, where=None):
    """Figures of a set of rolls against style() of the test pieces and positions() of the training
    pieces: all style distances; two rows of strings, {column: figure}."""
    distance = style_distance(rolls, reference)
    row = {"style distance": f"{distance['style']:.3f}",
           "chord change": f"{distance['chord change']:.3f}",
           "parallels / 100 frames": f"{parallels(rolls):.2f}", "copied run, median / longest": "",
           "returns, frames": f"{np.mean([returns(roll) for roll in rolls]):.1f}"}
    if where:
        copied = [copied_run(roll, where) for roll in rolls]
        row["copied run, median / longest"] = f"{np.median(copied):.0f} / {max(copied)}"
    details = {name: f"{value:.3f}" for name, value in distance.items()
               if name not in ("style", "chord change")}  # which stand in the row
    return distance, row, details | {name: f"{v:.2f}" for name, v in describe(rolls).items()}


def sample_run(path, model, held, n, length, args):
    """Rolls of a run for the table, and what its row says before and after their figures."""
    print(f"sampling {n} pieces of {length} frames from {path}", file=sys.stderr)
    options = {name: value for name, value in args.options.items() if able(held, name)}
    started, generator = time.time(), torch.Generator(args.device).manual_seed(args.seed)
    rolls = model.sample(n, length, generator, **options).cpu().numpy()
    speed = n * length / (time.time() - started)
    try:
        result = json.loads((path / "result.json").read_text())
        nll, trained = result["test"].get("nll"), f"{result['train_seconds'] / 60:.1f} min"
    except (OSError, ValueError, KeyError):
        nll, trained = None, f"unfinished: step {held['step']} of {held['args']['steps']}"
    size, nll = sum(p.numel() for p in model.parameters()), "" if nll is None else f"{nll:.2f}"
    before = {"parameters": f"{size / 1e6:.2f} M", "test nats per frame": nll}
    return rolls, before, {"training": trained, "frames sampled / s": f"{speed:,.0f}"}


def compare(args):
    """Print a table of runs and folders of MIDI files beside their corpus, and write it next to the
    first: compare.md, compare.png and the runs' curves.png, which replace earlier ones."""
    runs, folders, left_out = read_sets(args)
    n, length, rng = args.n or 64, args.length or 128, np.random.default_rng(1)
    none = {"data": None, "time_step": None}
    trained = next((held["args"] for _, _, held in runs.values()), none)
    corpus = data.load_corpus(trained["data"], trained["time_step"])
    reference, where = style(corpus.test), positions(corpus.train)
    draws = [excerpts(corpus.train, n, length, rng) for _ in range(20)]
    floor = [style_distance(draw, reference)["style"] for draw in draws]
    sets = {name: (rolls, {}, {}) for name, rolls in yardsticks(corpus, n, length).items()}
    for name, files in folders.items():
        rolls = read_rolls(name, files, trained["time_step"])
        sets[name] = excerpts(rolls, n, length, rng), {}, {}
    known = len(sets)
    sets |= {name: sample_run(*run, n, length, args) for name, run in runs.items()}
    distances, rows, details = {}, {}, {}
    for i, (name, (rolls, before, after)) in enumerate(sets.items()):
        own = i in (0, 2)  # training music, shuffled or not, would copy itself
        distances[name], row, details[name] = measure(rolls, reference, None if own else where)
        rows[name] = before | row | after
    text = "\n".join([
        markdown(rows), "",
        f"{n} samples of {length} frames each, seed {args.seed}, against the {len(corpus.test)} "
        f"test pieces of {corpus.name}. Style distance of {n} excerpts of its training pieces: "
        f"{np.mean(floor):.3f} +- {np.std(floor):.3f} (20 draws).", "",
        markdown(details), *left_out])
    print(text)
    folder = Path(args.out or next(iter(runs.values()), [Path("runs/x")])[0].parent)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.md").write_text(text + "\n")
    draw_comparison(distances, np.mean(floor), known, folder / "compare.png")
    logs = {name: (data.load_zip(path / "last.pt") or held)["rows"]  # model.pt's end at its step
            for name, (path, _, held) in runs.items()}
    data.draw_curves(logs, folder / "curves.png")


def markdown(rows):
    """A Markdown table of {name: {column: text}}; the last row has all columns."""
    columns = list(list(rows.values())[-1])
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_comparison(distances, floor, known, path):
    """Draw style and chord-change distance of each set as bars, the first `known` in grey, and the
    floor of the training pieces as a line."""
    with data.picture(path, 1, 2, (5.5, 0.4 * len(distances) + 1.2)) as axes:
        for axis, what in zip(axes, ("style", "chord change")):
            axis.barh(list(distances), [each[what] for each in distances.values()],
                      color=["0.6" if i < known else "C0" for i in range(len(distances))])
            axis.set(title=f"{what}: distance to the test pieces")
            axis.grid(axis="x", alpha=0.4)
            axis.invert_yaxis()
            if what == "style":
                axis.axvline(floor, color="black")


# ------------------------------------------------------------------------------------ command line
def prime_length(text):
    """"4" or "4bars" -> (4, "bars"); "32frames" -> (32, "frames")."""
    match = re.fullmatch(r"([1-9]\d{0,4}) ?(bars?|frames?)?", text)
    if not match:
        raise data.InputError(f"{text} is no length; write 4bars or 32frames")
    return int(match[1]), (match[2] or "bars").rstrip("s") + "s"


def soundfont(path):
    """A path that FluidSynth can play from; checked before anything is sampled."""
    try:
        import fluidsynth  # noqa: F401
    except ImportError as error:
        raise data.InputError(f"needs FluidSynth and pip install pyfluidsynth ({error}); leave it "
                              "out for the built-in sound") from None
    if not Path(path).is_file() or Path(path).open("rb").read(4) != b"RIFF":
        raise data.InputError(f"{path} is no .sf2 file")
    return path


def flags():
    """The parser of the command line."""
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", help="run folder of a trained model; with --compare several, and "
        "folders of MIDI files")
    add("--compare", action="store_true", help="one table for all of these, beside their corpus")
    add("--prime", metavar="FILE", help="MIDI file to go on from")
    add("--prime-length", type=prime_length, metavar="N", help="keep so much of the --prime: 4bars "
        "or 32frames (default: all)")
    add("--melody", metavar="FILE", help="MIDI file whose top line the others are written under")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="MIDI files whose first windows are "
        "joined by a path in z")
    add("--reconstruct", metavar="FILE", help="MIDI file to encode and decode again")
    add("-n", type=data.positive_int, help="how many pieces (default: 8; steps of --interpolate 9, "
        "--compare 64)")
    add("--length", type=data.positive_int, help="frames of a piece (default: 256; --compare 128)")
    add("--time-step", type=data.note_value, help="of your files, as 1/16 (default: the model's)")
    add("--temperature", type=data.non_negative, help="lower is safer, higher bolder (default: "
        "the model's own, 0.85 or 1)")
    add("--top-p", type=data.probability, help="draw from the likeliest symbols that reach this "
        "probability (default: the model's own, 0.8 to 0.95)")
    add("--skip-top", type=data.number(int, 0, data.KEYS), help="leave out so many of the "
        "likeliest symbols of each voice (default: 0)")
    add("--seed", type=data.natural, default=0, help="another seed, other music")
    add("--bpm", type=data.number(float, 4, 1000), help="quarter notes per minute (default: your "
        "file's, or 80)")
    add("--out", help="folder to write to (default: samples/ in the run's folder)")
    add("--no-wav", action="store_true", help="write no WAV files, which are large")
    add("--soundfont", type=soundfont, metavar="FILE", help=".sf2 file for FluidSynth to play with")
    add("--device", type=data.device_name, default="auto", help="cpu or cuda; auto: cuda if any")
    return parser


def main(argv=None):
    """Read the flags; sample, or do what one of them asks for."""
    parser = flags()
    args = parser.parse_args(argv)
    args.options = {name: getattr(args, name) for name in ("temperature", "top_p", "skip_top")
                    if getattr(args, name) is not None}
    args.settings = f"-seed{args.seed}" + "".join(  # a part of a file's name
        f"-{name.replace('_', '')}{value:g}" for name, value in args.options.items())
    verbs = [verb for verb in (compare, prime, melody, interpolate, reconstruct)
             if getattr(args, verb.__name__)]
    if len(verbs) > 1:
        parser.error("only one of " + ", ".join(f"--{verb.__name__}" for verb in verbs))
    if args.melody and (args.length or args.skip_top):
        parser.error("--melody sets length and top notes; leave out --length and --skip-top")
    out = Path(args.out or ".").absolute()
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        parser.error(f"--out {args.out}: {there} is no folder that can be written to")
    if verbs == [compare]:
        return compare(args)
    if len(args.runs) > 1:
        parser.error(f"give one run folder, not {len(args.runs)}; several go with --compare")
    args.run = Path(args.runs[0])
    if args.run.name == "model.pt":
        args.run = args.run.parent
    model, held = load_run(args.run, args.device)
    (verbs or [sample])[0](model, held, args)


if __name__ == "__main__":
    data.cli(main, "stopped; pieces that were written are whole")
