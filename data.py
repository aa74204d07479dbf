"""Everything the six models share that is not a model: MIDI, the corpus, batches, sampling of symbols, runs, pictures.

    MIDI file -> pretty_midi -> piano roll -> windows -> model -> piano roll -> MIDI, WAV, picture

    python data.py                 # fetch the default corpus if it is not there, and say what it holds
    python data.py --data DIR      # the same for any folder of MIDI files

A piano roll is a bool array (T, 88): frame t, key k = MIDI pitch 21 + k. It has no velocities and no onsets: a note that
is struck again while it sounds runs on. A frame's length (its "step") is a note value and differs from piece to piece.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
import wave
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mido  # comes with pretty_midi, which reads files through it
import numpy as np
import pretty_midi
import torch
from torch import distributed

KEYS = 88
LOWEST = 21  # MIDI pitch of key 0, a piano's lowest A
SYMBOLS = KEYS + 1  # what one voice can do in a frame: 0 rests, k + 1 sounds key k
BACH = Path(__file__).resolve().parent / "midi" / "bach"
RULES = 2  # version of the reading rules below: a change of what a corpus holds must change it
FORMAT = "bach-rolls 2"  # of checkpoints
RIGHTS = ("Rights: the music is in the public domain. The encodings of the default corpus come with music21; "
          "see the licence note of its corpus.")


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, why, and what to do."""


# ---------------------------------------------------------------------------------------------------------------- MIDI

# Usual note lengths in quarter notes: plain, dotted and triplet values from the whole note down to the 1/32.
NOTE_VALUES = np.array([4, 3, 2, 1.5, 4 / 3, 1, 0.75, 2 / 3, 0.5, 0.375, 1 / 3, 0.25, 1 / 6, 0.125])
MAX_BYTES = 600_000  # a longer MIDI file is sooner damaged or no score; reading one would take many seconds
MAX_QUARTERS = 20_000  # as is one that claims to last for hours; no memory is taken on the strength of a claim


def read_notes(path):
    """The notes of a MIDI file, whatever its tempo.

    Returns (notes, drums): notes is a float array (N, 3) of start and end in quarter notes and MIDI pitch; drums is how
    many drum notes were left out. Raises InputError with the reason if the file cannot be read or has no notes.
    """
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise InputError(f"{size / 1000:,.0f} kB, more than the {MAX_BYTES / 1000:.0f} kB that a score may have")
        with open(path, "rb") as file:
            content = file.read()
        if re.search(rb"[\x80-\xff]{256}", content):  # read as one number, it would take hours and all memory
            raise InputError("damaged: 256 bytes in a row that are no MIDI data")
        midi = mido.MidiFile(file=io.BytesIO(content), charset="latin1")
        if midi.ticks_per_beat <= 0:
            raise InputError("its time is in SMPTE frames or has no unit; only ticks per quarter note are read")
        # Keep the notes alone. Without tempo events pretty_midi's seconds are ticks at 120 quarter notes a minute.
        tracks, longest = [], 0
        for track in midi.tracks:
            kept, now, last = mido.MidiTrack(), 0, 0
            for message in track:
                now += message.time
                if message.type in ("note_on", "note_off"):
                    kept.append(message)
                    message.time, last = now - last, now
            if kept:
                tracks.append(kept)
                longest = max(longest, last)
        if not tracks:
            raise InputError("no notes")
        if longest > MAX_QUARTERS * midi.ticks_per_beat:
            raise InputError(f"claims to last over {MAX_QUARTERS} quarter notes")
        midi.tracks = tracks
        coarser = 1 + longest // int(pretty_midi.pretty_midi.MAX_TICK - 1)  # finer ticks than pretty_midi's limit allows
        if coarser > 1:
            for track in tracks:
                now = last = 0
                for message in track:
                    now += message.time
                    message.time, last = now // coarser - last, now // coarser
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score = pretty_midi.PrettyMIDI(mido_object=midi)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make the two readers raise almost anything
        raise InputError(f"no readable MIDI file ({type(error).__name__}: {str(error)[:80] or 'no details'})") from None
    drums = sum(len(part.notes) for part in score.instruments if part.is_drum)
    notes = np.array([(n.start, n.end, n.pitch) for part in score.instruments if not part.is_drum for n in part.notes])
    if not len(notes):
        raise InputError("only drums" if drums else "no notes")
    ticks = np.rint(notes[:, :2] * 2 * midi.ticks_per_beat)  # two quarter notes a second
    notes[:, :2] = ticks * coarser / midi.ticks_per_beat
    return notes, drums


def usual_step(notes):
    """The time step of a piece, in quarter notes: the shortest usual note value that more than 20 % of the notes have,
    else the commonest (the paper's rule)."""
    lengths = np.maximum(notes[:, 1] - notes[:, 0], 1e-3)
    nearest = np.abs(np.log(lengths[:, None] / NOTE_VALUES)).argmin(1)
    share = np.bincount(nearest, minlength=len(NOTE_VALUES)) / len(notes)
    often = np.flatnonzero(share > 0.2)
    return float(NOTE_VALUES[often[-1] if len(often) else share.argmax()])


def notes_to_roll(notes, step):
    """(N, 3) notes as read_notes gives them -> (roll (T, 88), number of notes outside the 88 keys).

    Frame t is what sounds a quarter of a step after its start: so a note that fills the first half of a step is kept, a
    passing note in the second half is dropped, and a release or an onset a few ticks off does no harm.
    """
    first, last = np.ceil(notes[:, :2].T / step - 0.25 - 1e-6).astype(int)
    key = notes[:, 2].astype(int) - LOWEST
    inside = (key >= 0) & (key < KEYS)
    roll = np.zeros((last.max(initial=0), KEYS), bool)
    for a, b, k in zip(first[inside].clip(0), last[inside], key[inside]):
        roll[a:b, k] = True
    return roll, int((~inside).sum())


def midi_to_roll(path, step=None):
    """Read a MIDI file as a piano roll.

    path: a .mid or .midi file; step: a frame's length in quarter notes, None for the piece's own (usual_step).
    Returns (roll, step): bool (T, 88), quarter notes. Raises InputError naming the file and the reason.
    """
    try:
        notes, _ = read_notes(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    step = step or usual_step(notes)
    return notes_to_roll(notes, step)[0], step


def roll_to_midi(roll, step=0.5, step_seconds=0.3):
    """A piano roll as a pretty_midi.PrettyMIDI (write it with .write(path)).

    roll: (T, 88), not zero where a key sounds; step: a frame's length in quarter notes, written into the score;
    step_seconds: how long it sounds. Runs of frames become held notes.
    """
    score = pretty_midi.PrettyMIDI(resolution=480, initial_tempo=60 * step / step_seconds)
    piano = pretty_midi.Instrument(program=0)
    edges = np.diff(np.pad(np.asarray(roll, bool), ((1, 1), (0, 0))).astype(np.int8), axis=0).T  # (88, T + 1)
    for key, starts, ends in zip(*np.nonzero(edges == 1), np.nonzero(edges == -1)[1]):
        piano.notes.append(pretty_midi.Note(80, int(key) + LOWEST, starts * step_seconds, ends * step_seconds))
    score.instruments.append(piano)
    return score


def cut_silence(roll, longest=4):
    """The roll without silence at either end and with no more than `longest` silent frames in a row."""
    silent = ~roll.any(1)
    frame = np.arange(len(roll))
    last_sound = np.maximum.accumulate(np.where(silent, -1, frame))
    keep = (frame - last_sound <= longest) & (last_sound >= 0)
    roll = roll[keep]
    return roll[:len(roll) - int((~roll.any(1))[::-1].cumprod().sum())]


# -------------------------------------------------------------------------------------------------------------- voices

def to_voices(frames, voices=4):
    """What each voice does in each frame: (..., 88) -> long (..., voices), 0 a rest, k + 1 key k.

    The lowest of several notes is the last voice, the others fill from voice 0 downwards, highest first: n = 1 -> voice
    0; n = 2 -> 0 and V-1; n = 3 -> 0, 1 and V-1. With more notes than voices the top V-1 and the lowest stay; with
    voices = 1 the top note alone.
    """
    on = frames > 0
    above = on.flip(-1).cumsum(-1).flip(-1) - 1  # notes above a sounding one
    below = on.cumsum(-1) - 1
    voice = torch.where((below == 0) & (above > 0), voices - 1 if voices > 1 else voices, above)
    voice = voice.masked_fill(~on | ((above >= voices - 1) & (below > 0) & (above > 0)), voices)  # dropped
    symbols = torch.arange(1, SYMBOLS, device=on.device).expand(on.shape)
    out = torch.zeros(*on.shape[:-1], voices + 1, dtype=torch.long, device=on.device)
    return out.scatter_(-1, voice, symbols)[..., :voices]


def from_voices(voices):
    """The roll of voices: long (..., V) symbols -> bool (..., 88), their union."""
    out = torch.zeros(*voices.shape[:-1], SYMBOLS, dtype=torch.bool, device=voices.device)
    return out.scatter_(-1, voices, True)[..., 1:]


def is_frame(voices):
    """Whether symbols (..., V) are what to_voices gives for some frame: none cross or double, and they are filled in its
    order. The same as to_voices(from_voices(voices), V) == voices, in a few small steps: bool (...)."""
    upper, lowest = voices[..., :-1], voices[..., -1:]
    if not upper.shape[-1]:
        return lowest[..., 0] >= 0
    first, inner = upper[..., :1], upper[..., 1:]
    fits = ((upper > lowest) | (upper == 0)) & ((lowest == 0) | (first > 0))
    if inner.shape[-1]:
        falls = (inner < upper[..., :-1]) | (inner == 0)
        fits = fits & falls.all(-1, keepdim=True) & ((inner[..., :1] == 0) | (lowest > 0))
    return fits.all(-1)


@contextlib.contextmanager
def sampling():
    """Decorates what runs a network step by step: no gradients and, on the CPU, PyTorch's own LSTM. oneDNN's prepares its
    weights anew in every call, which for a single step takes several times as long as the step."""
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        yield


def sample_symbols(logits, generator=None, temperature=1.0, top_p=1.0, skip_top=0, draws=None):
    """Draw one symbol from each row of logits (..., S) -> long (...), or several, independently -> long (..., draws).

    temperature 0 takes the likeliest; top_p keeps the fewest symbols whose probabilities reach it (nucleus sampling,
    Holtzman et al. 2020); skip_top first leaves out the likeliest skip_top symbols (the paper's section 6.1).
    """
    if skip_top:
        logits = logits.scatter(-1, logits.topk(skip_top, -1).indices, -torch.inf)
    if temperature == 0:
        symbols = logits.argmax(-1, keepdim=True).expand(*logits.shape[:-1], draws or 1)
    else:
        p = (logits / temperature).softmax(-1).detach()
        symbols = (torch.from_numpy(np.argsort(-p.numpy(), -1)) if p.device.type == "cpu"  # NumPy's is much faster there
                   else p.argsort(-1, descending=True))
        p = p.gather(-1, symbols)
        reached = p.cumsum(-1)
        last = (reached - p < max(top_p, 1e-9)).logical_and_(p > 0).sum(-1, keepdim=True) - 1  # the last that is kept
        drawn = torch.rand(*p.shape[:-1], draws or 1, generator=generator, device=p.device) * reached.gather(-1, last)
        symbols = symbols.gather(-1, torch.searchsorted(reached, drawn, right=True).minimum(last))
    return symbols if draws else symbols[..., 0]


def sample_voices(logits, generator=None, temperature=1.0, top_p=1.0, skip_top=0, draws=16):
    """Draw all voices of frames from logits (..., V, 89), independently of each other -> long (..., V).

    Voices that cross or double are no frame (to_voices never gives them): the first of several draws that is one is
    taken, which samples the voices' distribution given that they are a frame. Where none is, the first draw stands.
    """
    voices = sample_symbols(logits, generator, temperature, top_p, skip_top, draws).transpose(-1, -2)  # (..., draws, V)
    first = is_frame(voices).int().argmax(-1)  # of equals, argmax gives the first
    return voices.take_along_dim(first[..., None, None], -2)[..., 0, :]


# -------------------------------------------------------------------------------------------------------------- corpus

@dataclasses.dataclass
class Corpus:
    """Pieces as bool arrays (T, 88) of notes that `voices` voices can hold, split by work."""
    name: str
    train: list
    valid: list
    test: list
    names: dict  # split -> the pieces' file stems, in the order of the lists
    steps: dict  # split -> the pieces' steps in quarter notes
    report: list  # lines for people: what it holds, what was dropped or skipped, and why

    @property
    def step(self):
        """The training pieces' commonest step in quarter notes: what a sampled frame is taken to last."""
        values, counts = np.unique(self.steps["train"], return_counts=True)
        return float(values[counts.argmax()])


def split_works(works):
    """Split names of works: {"test": the first tenth, rounded up, in the order of their MD5; "valid": the next tenth;
    "train": the rest}. The same on every machine and for any seed."""
    works = sorted(set(works), key=lambda work: hashlib.md5(work.encode()).hexdigest())
    tenth = math.ceil(len(works) / 10)
    return {"test": works[:tenth], "valid": works[tenth:2 * tenth], "train": works[2 * tenth:]}


def run_hashes(roll, length=32):
    """One uint64 for each run of `length` frames, equal for equal runs in any transposition: (T - length + 1,).

    A frame counts as its intervals above its lowest note and that note's motion since the frame before; a run's hash is
    a polynomial in them modulo 2^64, from differences of one running sum.
    """
    if len(roll) < length:
        return np.zeros(0, np.uint64)
    random = np.random.default_rng(0).integers(1, 2**63, (4, 256), dtype=np.uint64)
    sounding = roll.any(1)
    lowest = np.where(sounding, roll.argmax(1), -1)
    last = lowest[np.maximum.accumulate(np.where(sounding, np.arange(len(roll)), 0))]  # of the last frame that sounded
    t, key = np.nonzero(roll)
    shape = np.zeros(len(roll), np.uint64)
    np.add.at(shape, t, random[0, key - lowest[t]])
    motion = np.where(sounding[1:], random[1, (last[1:] - last[:-1]) % 256], random[2, 0])  # (T - 1,)
    base = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2^64
    inverse = np.uint64(pow(int(base), -1, 2**64))
    powers = np.multiply.accumulate(np.r_[np.uint64(1), np.full(len(roll) - 1, base)])
    inverses = np.multiply.accumulate(np.r_[np.uint64(1), np.full(len(roll) - 1, inverse)])
    sums = np.r_[np.uint64(0), np.add.accumulate(shape * powers)]
    moves = np.r_[np.uint64(0), np.add.accumulate(motion * powers[:-1])]
    n = len(roll) - length + 1
    return ((sums[length:] - sums[:n]) * inverses[:n] * random[3, 0]
            + (moves[length - 1:length - 1 + n] - moves[:n]) * inverses[:n] * random[3, 1])


def merge_works(works, rolls):
    """Give one name to works that share a run of 32 or more frames in any transposition (settings that reappear)."""
    parent = {work: work for work in works}

    def root(work):
        while parent[work] != work:
            parent[work] = work = parent[parent[work]]
        return work

    hashes = [np.unique(run_hashes(roll)) for roll in rolls]
    owner = np.repeat(np.arange(len(rolls)), [len(h) for h in hashes])
    hashes = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for a, b in np.unique(owner[order][np.stack([same, same + 1], 1)], axis=0):
        a, b = sorted((root(works[a]), root(works[b])))
        parent[b] = a
    return [root(work) for work in works]


def _export_score(source, folder):
    """Write one music21 score as MIDI; runs in a process of its own."""
    import music21

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = music21.converter.parse(source, forceSource=True, storePickle=False)
        score.write("midi", os.path.join(folder, Path(source).stem + ".mid"))


def export_bach(folder=BACH, names=None):
    """Write music21's 410 Bach scores (or those called `names`) as MIDI files into `folder`, all or nothing.

    Shows progress on stderr. Raises InputError where music21 is missing or the folder cannot be written.
    """
    try:
        import music21
    except ImportError:
        raise InputError("the default corpus comes with music21, which is not installed: "
                         "pip install music21, or give a folder of MIDI files by --data") from None
    sources = sorted(str(p) for p in music21.corpus.getComposer("bach") if p.suffix in (".mxl", ".xml")
                     and (names is None or p.stem in names))
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".part-") as part:
            part = os.path.join(part, "midi")
            os.mkdir(part)
            with ProcessPoolExecutor(min(os.cpu_count() or 1, 8, len(sources))) as pool:
                for done, _ in enumerate(pool.map(_export_score, sources, [part] * len(sources), chunksize=4), 1):
                    if names is None and (done % 10 == 0 or done == len(sources)):
                        print(f"\rwriting the Bach scores of music21 to {folder}: {done} of {len(sources)}",
                              end="" if done < len(sources) else "\n", file=sys.stderr, flush=True)
            if not folder.exists():  # else another process was faster
                os.rename(part, folder)
    except OSError as error:
        raise InputError(f"cannot write the default corpus to {folder}: {error.strerror}") from None


def _cache_file(key):
    """Where the parsed corpus of this key is kept: in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return Path(base or Path.home() / ".cache") / "bach-rolls" / (hashlib.md5(repr(key).encode()).hexdigest() + ".npz")


def load_corpus(folder=None, step=None, voices=4, cache=True):
    """Read a folder of MIDI files, searched below, as a Corpus.

    folder: None for the default corpus, which is written first where it is missing. step: quarter notes for every piece,
    None for each piece's own. voices: notes that no voice can hold are dropped, and their share reported. Where the
    folder has train/, valid/ and test/ they are the split, taken as they are; otherwise exact repeats are kept once
    and the split is by work. Raises InputError if nothing can be read or there are fewer than three works.
    """
    with first_process_first():
        if folder is None and not BACH.is_dir():
            export_bach()
    root = Path(BACH if folder is None else folder)
    if not root.is_dir():
        raise InputError(f"--data {root}: no such folder; give a folder that holds .mid or .midi files")
    files = sorted((Path(where) / name for where, _, names in os.walk(root, followlinks=True) for name in names
                    if name.lower().endswith((".mid", ".midi"))), key=lambda file: file.relative_to(root).as_posix())
    if not files:
        raise InputError(f"--data {root}: no file below it ends in .mid or .midi")
    stats = [file.stat() for file in files]
    key = (RULES, str(root.resolve()), step, voices,
           [(str(f.relative_to(root)), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats)])
    path = _cache_file(key)
    with first_process_first():
        held = _read_cache(path) if cache else None
        if held is None:
            held = _read_corpus(root, files, step, voices)
            if cache:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with io.BytesIO() as buffer:
                        np.savez(buffer, **held)
                        write_atomic(path, buffer.getvalue())
                except (OSError, InputError):
                    pass  # a cache that cannot be written is only slower
    rolls = np.unpackbits(held["rolls"], axis=1, count=KEYS).view(bool)
    pieces = np.split(rolls, np.cumsum(held["lengths"])[:-1])
    parts = {part: np.flatnonzero(held["split"] == part).tolist() for part in ("train", "valid", "test")}
    return Corpus("music21 Bach" if root.resolve() == BACH else root.resolve().name,
                  **{part: [pieces[i] for i in at] for part, at in parts.items()},
                  names={part: [str(held["names"][i]) for i in at] for part, at in parts.items()},
                  steps={part: [float(held["steps"][i]) for i in at] for part, at in parts.items()},
                  report=[str(line) for line in held["report"]])


def _read_cache(path):
    """The arrays of a cache file, or None where it is missing or broken."""
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in ("rolls", "lengths", "split", "names", "steps", "report")}
        assert held["rolls"].shape == (held["lengths"].sum(), KEYS // 8) and held["rolls"].dtype == np.uint8
        assert len(held["lengths"]) == len(held["split"]) == len(held["names"]) == len(held["steps"]) > 0
        return held
    except Exception:  # whatever is wrong with it, it is rebuilt
        return None


def _read_corpus(root, files, step, voices):
    """Parse the files of a corpus; see load_corpus. Returns arrays that np.savez can hold."""
    names, rolls, steps, skipped, drums, outside, before = [], [], [], [], 0, 0, 0
    shown = time.time()
    for i, file in enumerate(files):
        if sys.stderr.isatty() and time.time() - shown > 1:
            shown = time.time()
            print(f"\rreading {root}: {i} of {len(files)} files", end="", file=sys.stderr, flush=True)
        try:
            notes, file_drums = read_notes(file)
            file_step = step or usual_step(notes)
            roll, file_outside = notes_to_roll(notes, file_step)
            roll = cut_silence(roll)
            if not len(roll):
                raise InputError("no note on the 88 keys")
        except InputError as error:
            skipped.append(f"skipped {file.relative_to(root)}: {error}")
            continue
        drums, outside, before = drums + file_drums, outside + file_outside, before + int(roll.sum())
        names.append(file.relative_to(root))
        rolls.append(from_voices(to_voices(torch.from_numpy(roll), voices)).numpy())
        steps.append(file_step)
    if not rolls:
        raise InputError(f"--data {root}: none of its {len(files)} MIDI files can be read; the first: "
                         + skipped[0].removeprefix("skipped "))
    lengths = [len(roll) for roll in rolls]
    report = []
    folders = [name.parts[0] if len(name.parts) > 1 else "" for name in names]
    stems = [name.stem for name in names]
    if {"train", "valid", "test"} <= set(folders):
        kept = [i for i, part in enumerate(folders) if part in ("train", "valid", "test")]
        split = [folders[i] for i in kept]
        if len(kept) < len(folders):
            report.append(f"{len(folders) - len(kept)} files outside train/, valid/ and test/ left out")
    else:
        seen, kept = set(), []
        for i, roll in enumerate(rolls):  # equal in any transposition: same frames from the lowest key up
            same = np.packbits(np.roll(roll, -np.flatnonzero(roll.any(0))[0], axis=1)).tobytes()
            if same not in seen:
                seen.add(same)
                kept.append(i)
        works = [re.match(r"bwv\d+(\.\d+)?|.*", stems[i])[0] if root.resolve() == BACH else stems[i] for i in kept]
        merged = merge_works(works, [rolls[i] for i in kept])
        if len(set(merged)) < 3:
            raise InputError(f"--data {root}: {len(set(merged))} different works are too few to split; give at least 3, "
                             "or put the files into train/, valid/ and test/ below it")
        part_of = {work: part for part, group in split_works(merged).items() for work in group}
        split = [part_of[work] for work in merged]
        report.append(f"{len(set(merged))} works; {len(rolls) - len(kept)} exact repeats left out, "
                      f"{len(set(works)) - len(set(merged))} works merged that share 32 or more frames")
    split = np.array(split)
    counts = {part: (int((split == part).sum()), sum(lengths[i] for i, s in zip(kept, split) if s == part))
              for part in ("train", "valid", "test")}
    sounding = np.concatenate([roll.sum(1) for roll in rolls])
    values, often = np.unique([steps[i] for i in kept], return_counts=True)
    report = [
        f"{len(kept)} pieces, {sum(lengths[i] for i in kept)} frames: "
        + ", ".join(f"{part} {n} pieces, {frames} frames" for part, (n, frames) in counts.items()),
        "steps in whole notes: " + ", ".join(f"{_fraction(v / 4)} in {n} pieces" for v, n in zip(values, often)),
        f"{sounding.mean():.2f} notes at once, {100 * (sounding == 0).mean():.1f} % of the frames silent",
        f"{100 * (1 - sounding.sum() / before):.1f} % of the sounding keys dropped: more than {voices} at once",
        f"left out: {drums} drum notes, {outside} notes outside the 88 keys",
        *report, *skipped]
    return {"rolls": np.concatenate([np.packbits(rolls[i], axis=1) for i in kept]),
            "lengths": np.array([lengths[i] for i in kept]), "split": split, "names": np.array([stems[i] for i in kept]),
            "steps": np.array([steps[i] for i in kept]), "report": np.array(report)}


def _fraction(value):
    """0.125 -> '1/8', 1/6 -> '1/6', 0.375 -> '3/8'."""
    top, bottom = min(((n, d) for d in (1, 2, 4, 8, 16, 32, 3, 6, 12, 24, 48) for n in (1, 3)),
                      key=lambda f: (round(abs(f[0] / f[1] - value), 6), f[1]))
    return f"{top}/{bottom}"


# ------------------------------------------------------------------------------------------------------------- batches

class Windows:
    """Windows of fixed length over pieces, all of them held as one uint8 tensor on the device.

    pieces: list of (T, 88) arrays; window and hop in frames. A piece's last window, and a piece shorter than one, is
    padded with silence and masked; full=True leaves such windows out. Raises InputError if no window is left.
    """

    def __init__(self, pieces, window, device="cpu", hop=16, full=False):
        self.window, hop = window, min(hop, window)
        starts, lengths, offset = [], [], 0
        for piece in pieces:
            for start in range(0, max(len(piece) - window, 0) + hop, hop):
                if not full or start + window <= len(piece):
                    starts.append(offset + start)
                    lengths.append(min(window, len(piece) - start))
            offset += len(piece)
        if not starts:
            raise InputError(f"--window {window}: no piece of this corpus has so many frames; take a shorter window")
        frames = np.concatenate([*pieces, np.zeros((window, KEYS), bool)]).view(np.uint8)
        self.frames = torch.from_numpy(frames).to(device)
        self.starts, self.lengths = torch.tensor(starts, device=device), torch.tensor(lengths, device=device)

    def __len__(self):
        return len(self.starts)

    def _gather(self, which):
        time = torch.arange(self.window, device=self.frames.device)
        mask = (time < self.lengths[which, None]).float()
        return self.frames[self.starts[which, None] + time] * mask[..., None], mask

    def sample(self, n, generator, transpose=True):
        """n random windows: frames (n, window, 88) of 0. and 1., mask (n, window), 1. where a frame is real.

        Each window moves by a random -6..+5 semitones where it stays on the keyboard. generator: on this device. Of
        several processes each gets its share of the n, if their generators agree.
        """
        device, (rank, world) = self.frames.device, processes()
        if n < world:
            raise InputError(f"--batch {n} leaves some of {world} processes without a window; raise it")
        frames, mask = self._gather(torch.randint(len(self), (n,), generator=generator, device=device)[rank::world])
        if transpose:
            shift = torch.randint(-6, 6, (n, 1), generator=generator, device=device)[rank::world]
            used = frames.amax(1)
            lowest, highest = used.argmax(1, keepdim=True), KEYS - 1 - used.flip(1).argmax(1, keepdim=True)
            shift = shift * ((lowest + shift >= 0) & (highest + shift < KEYS))
            source = (torch.arange(KEYS, device=device) - shift) % KEYS  # (n, 88): the key that each key comes from
            frames = frames.gather(2, source[:, None].expand_as(frames))
        return frames, mask

    def chunks(self, n):
        """All windows in order, n at a time, as sample() gives them; never transposed."""
        for which in torch.arange(len(self), device=self.frames.device).split(n):
            yield self._gather(which)


def whole_pieces(pieces, n, device="cpu"):
    """Whole pieces, n at a time, shortest first: frames (<= n, T, 88) padded to the longest, mask (<= n, T)."""
    pieces = sorted(pieces, key=len)
    for i in range(0, len(pieces), n):
        group = pieces[i:i + n]
        yield next(Windows(group, len(group[-1]), device, hop=len(group[-1])).chunks(n))


def divergence(a, b):
    """Jensen-Shannon divergence of two histograms, arrays of counts, base 2: 0 the same .. 1 disjoint."""
    if not a.any() or not b.any():
        return float(a.any() != b.any())

    def entropy(x):
        return -(x[x > 0] * np.log2(x[x > 0])).sum()
    p, q = a / a.sum(), b / b.sum()
    return float(max(0, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2))


# ----------------------------------------------------------------------------------------------------------- processes

# `torchrun --nproc_per_node=N MODEL.py` starts N processes. All have the same weights and draw the same batch; each
# computes its share of it, and Run.average_gradients makes one step of them. The first alone writes and prints.

def processes():
    """(rank of this process, how many there are): (0, 1) unless torchrun started several."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def sum_over_processes(x):
    """A tensor's sum over all processes, the same in each."""
    if processes()[1] > 1:
        x = x.clone()
        distributed.all_reduce(x)
    return x


def from_first_process(x):
    """The first process's value of a tensor, in each."""
    if processes()[1] > 1:
        x = x.contiguous()
        distributed.broadcast(x, 0)
    return x


def wait_for_all():
    """Go on when all processes are here."""
    sum_over_processes(torch.zeros(1))


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block alone, then the others do: they find the files that it wrote."""
    if processes()[0]:
        wait_for_all()
    yield
    if not processes()[0]:
        wait_for_all()


# ----------------------------------------------------------------------------------------------------------- arguments

class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, and bad input in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        fail(message, self.prog)

    def parse(self, argv=None):
        """parse_args; with --resume, flags that are not given have the values the run was started with, and a given
        one that contradicts them is an error (--steps, --prior-steps, --device, --eval-every, --out, --data may differ)."""
        args = self.parse_args(argv)
        if not getattr(args, "resume", False):
            return args
        unset = object()  # argparse fills in no default where the namespace has a value already
        probe = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
        saved = load_checkpoint(Path(args.out) / "last.pt").get("args")
        if not isinstance(saved, dict):
            raise InputError(f"{Path(args.out) / 'last.pt'}: does not say how it was trained")
        for name, value in vars(probe).items():
            if name in ("resume", "force", "out") or name not in saved or (name == "device" and value is unset):
                continue
            if value is unset:
                setattr(args, name, saved[name])
            elif value != saved[name] and name not in ("steps", "prior_steps", "device", "eval_every", "data"):
                flag = "--" + name.replace("_", "-")
                self.error(f"{flag} {value}: the run in {args.out} was started with {saved[name]}; leave {flag} out "
                           "to go on with it, or take another --out")
        return args


def _number(kind, low, high, what):
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value
    return convert


positive_int = _number(int, 1, 10**9, "a whole number from 1 to 1000000000")
natural = _number(int, 0, 10**9, "a whole number from 0 to 1000000000")
positive = _number(float, 1e-30, 1e30, "a number above 0")
non_negative = _number(float, 0, 1e30, "a number, 0 or above")
probability = _number(float, 0, 1, "a number from 0 to 1")
dropout = _number(float, 0, 0.99, "a number from 0 to 0.99")
decay = _number(float, 0, 0.9999, "a number from 0 to 0.9999")
skip_count = _number(int, 0, KEYS, f"a whole number from 0 to {KEYS}: one symbol must be left")
voice_count = _number(int, 1, KEYS, f"a whole number from 1 to {KEYS}")


def note_value(text):
    """'1/16' -> 0.25: a fraction of a whole note, in quarter notes."""
    match = re.fullmatch(r"(\d{1,3})/(\d{1,3})", text)
    if not match or not 0 < int(match[1]) <= 4 * int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is no note value; write a fraction of a whole note such as 1/16")
    return 4 * int(match[1]) / int(match[2])


def device_name(text):
    """'auto' -> 'cuda' where there is one, of several processes each its own, else 'cpu'; any other device is checked
    to be there."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and processes()[1] > 1:
        text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({str(error).splitlines()[0][:80]}); "
                                         "take cpu, or leave it out") from None
    return text


def fail(message, program=None):
    """Say in one line why the program cannot do what it was told, and end it with status 2."""
    if processes()[0]:
        time.sleep(3)  # torchrun ends all when one fails: if the first says the same, once is enough
    print(f"{program or Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def cli(main):
    """Run a program's main(), in one process or in each of torchrun's; bad input ends it with one line and exit status
    2, a bug with its traceback."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        nccl = torch.cuda.is_available() and distributed.is_nccl_available()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
        if processes()[0]:
            sys.stdout = open(os.devnull, "w")
    try:
        main()
    except InputError as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "t allocate memory" in str(error):
            fail("not enough memory; take a smaller --batch, --window or --hidden, or fewer pieces (-n)")
        if processes()[1] > 1 and ("gloo" in str(error) or isinstance(error, distributed.DistError)):
            fail(f"lost another process ({str(error).splitlines()[0][:80]}); go on with --resume")
        raise
    except BrokenPipeError:
        sys.stderr.close()
    finally:
        if processes()[1] > 1:
            distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------- runs

def write_atomic(path, content):
    """Write bytes or str to a temporary file, flush it to disk, rename it: the file is whole or as it was before."""
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; what was there before is kept") from None


def fingerprint(content):
    """MD5 of nested dicts and lists of tensors and plain values, in hexadecimal: the same for the same values."""
    digest = hashlib.md5()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            digest.update(f"{len(value)} values".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            digest.update(f"{type(value).__name__} {value!r}".encode())
    add(content)
    return digest.hexdigest()


def save_checkpoint(path, content):
    """torch.save, whole or not at all, with a fingerprint."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content, "fingerprint": fingerprint(content)}, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path, model=None):
    """A checkpoint written by save_checkpoint, as a dict of tensors and plain values on the CPU.

    weights_only: a file cannot run code when loaded. model: the name that it must have. Raises InputError with the
    reason if it is missing, broken, or not ours.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; train a model first, or give its folder") from None
    except Exception as error:
        raise InputError(f"{path}: damaged or no checkpoint of this project ({type(error).__name__})") from None
    if not isinstance(held, dict) or held.pop("format", None) != FORMAT:
        raise InputError(f"{path}: no checkpoint of this project")
    if held.pop("fingerprint", None) != fingerprint(held):
        raise InputError(f"{path}: damaged: its content is not what was written; train again, or take a copy")
    if model and held.get("model") != model:
        raise InputError(f"{path}: holds a model of {held.get('model')}.py, not of {model}.py")
    return held


def warmup_cosine(step, steps):
    """Factor of the learning rate: up from 0 over the first twentieth of the steps, then down to 0 as half a cosine."""
    warmup = max(1, steps // 20)
    return min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, max(0, step - warmup) / max(1, steps - warmup))))


class Run:
    """A training run and its folder: log.csv, last.pt to go on from, model.pt with the best weights, result.json.

    name: of the model file; args: its flags; model: has .config, its constructor's arguments; corpus: what it learns;
    parts: what else a resumed run needs and has state_dict() or get_state(), as optimizer=..., generator=...
    Raises InputError if the folder holds a run and neither --resume nor --force is given, or cannot be written.
    """

    FILES = ("model.pt", "last.pt", "log.csv", "result.json", "curves.png", "sample.mid", "sample.wav", "sample.png")

    def __init__(self, name, args, model, corpus, **parts):
        self.name, self.args, self.model, self.corpus = name, args, model, corpus
        self.parts = {"model": model, **parts}
        self.folder, self.step, self.best, self.rows = Path(args.out), 0, math.inf, []
        self.seconds, self.sums, self.interrupted, self.asked = 0.0, {}, False, 0
        self.rank, self.world = processes()
        for tensor in model.state_dict().values():
            tensor.copy_(from_first_process(tensor))
        if self.world > 1:
            torch.manual_seed(args.seed + self.rank)  # dropout and noise of its own; batches come from the generator
        if args.resume:
            self._restore(load_checkpoint(self.folder / "last.pt", name))
        if not self.rank:
            self._take_folder()
        wait_for_all()
        try:
            signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:
            pass  # only the main thread may; elsewhere Ctrl-C is the caller's business
        self.started = self.shown = time.time()
        size = sum(p.numel() for p in model.parameters())
        print(f"{name}: {size:,} parameters on {args.device}"
              + (f" and {self.world - 1} more" if self.world > 1 else "") + f"; run folder {self.folder}"
              + (f", going on from step {self.step}" if self.step else ""), flush=True)

    def _take_folder(self):
        """Make the folder ready for this run, unless it holds another."""
        held = [] if self.args.resume else [file for file in self.FILES if (self.folder / file).exists()]
        if held and not self.args.force:
            raise InputError(f"--out {self.folder} holds a run already: go on with it by --resume, "
                             "choose another --out, or replace it by --force")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in held:
                (self.folder / file).unlink()
            for file in self.FILES:  # what a killed run was writing
                for part in self.folder.glob(f".{file}.*"):
                    part.unlink()
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise InputError(f"--out {self.folder} cannot be written: {error.strerror}") from None

    def _interrupt(self, *_):
        if self.interrupted and self.world == 1:  # torchrun passes Ctrl-C on, so its processes hear it twice
            raise KeyboardInterrupt
        self.interrupted = True
        if not self.rank:
            print("\nstopping after this step" + "; press Ctrl-C again to stop at once" * (self.world == 1), file=sys.stderr)

    def _restore(self, held):
        try:
            kinds = {"step": int, "best": float, "rows": list, "seconds": float, "rng": list, "sums": dict}
            wrong = [name for name, kind in kinds.items() if not isinstance(held[name], kind)]
            if wrong or held["step"] < 0 or not held["rng"] or not all(isinstance(row, dict) for row in held["rows"]):
                raise ValueError(f"no sound {(wrong or ['step, rows or random state'])[0]}")
            for name, part in self.parts.items():
                state = held["parts"][name]
                part.set_state(state) if isinstance(state, torch.Tensor) else part.load_state_dict(state)
            self.step, self.best, self.rows, self.seconds = held["step"], held["best"], held["rows"], held["seconds"]
            self.sums = {k: v.to(self.args.device) / self.world for k, v in held["sums"].items()}
            torch.set_rng_state(held["rng"][self.rank % len(held["rng"])])
            if "cuda_rng" in held and torch.cuda.is_available():
                torch.cuda.set_rng_state(held["cuda_rng"][self.rank % len(held["cuda_rng"])], self.args.device)
        except (KeyError, TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"{self.folder / 'last.pt'}: does not fit this model, or not this device: it comes from "
                             f"{held.get('args', {}).get('device')} ({str(error).splitlines()[0][:100]})") from None

    def _rng(self, state):
        """The states of a random generator of all processes, from this one's."""
        if self.world == 1:
            return [state]
        states = [torch.empty_like(state) for _ in range(self.world)]
        distributed.all_gather(states, state)
        return states

    def save(self):
        """Write last.pt: everything that a resumed run needs to end bit for bit where this one would."""
        now = time.time()
        self.seconds, self.started = self.seconds + now - self.started, now
        sums = {name: sum_over_processes(total) for name, total in self.sums.items()}
        rng = {"rng": self._rng(torch.get_rng_state())}
        if str(self.args.device).startswith("cuda"):
            rng["cuda_rng"] = self._rng(torch.cuda.get_rng_state(self.args.device))
        if not self.rank:
            state = {name: part.state_dict() if hasattr(part, "state_dict") else part.get_state()
                     for name, part in self.parts.items()}
            save_checkpoint(self.folder / "last.pt", {
                "model": self.name, "config": self.model.config, "args": vars(self.args), "parts": state,
                "step": self.step, "best": self.best, "rows": self.rows, "seconds": self.seconds, "sums": sums, **rng})

    def average_gradients(self, module, mask):
        """With several processes, make a module's gradients those of the whole batch: the mean over the processes'
        shares, weighted by their real frames (mask). With one process, nothing."""
        if self.world == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        weight = mask.sum()
        sums = sum_over_processes(torch.cat([*(g.flatten() * weight for g in gradients), weight[None],
                                             weight.new_tensor([self.interrupted])]))
        for gradient, mean in zip(gradients, sums.split([*(g.numel() for g in gradients), 2])):
            gradient.copy_(mean.view_as(gradient) / sums[-2])
        self.asked = sums[-1]  # how many processes were told to stop: they must stop together

    def add(self, values, mask):
        """Count a training step: its losses (0-dimensional tensors, averaged over frames until the next log line) and
        frames."""
        self.step += 1
        frames = mask.sum().double()
        for name, value in {**values, "frames": torch.ones_like(frames)}.items():
            self.sums[name] = self.sums.get(name, 0) + value.double() * frames  # stays on the device

    def stopped(self):
        """Whether the loop should end, after Ctrl-C; last.pt has then been written."""
        stop = self.interrupted
        if self.world > 1:  # together; reading `asked` makes a GPU wait, so not at each step there
            stop = (self.step % 10 == 0 or self.args.device == "cpu") and bool(self.asked)
        if stop:
            self.save()
            print(f"stopped after step {self.step}; go on with the same command and --resume", flush=True)
        return stop

    def log(self, steps, valid, best=None):
        """Write a line to the screen and to log.csv, last.pt, and, if `best` is the lowest yet, model.pt.

        steps: how many the run has; valid: dict of validation figures. Raises InputError if a loss is not finite.
        """
        means = dict(zip(self.sums, sum_over_processes(torch.stack(list(self.sums.values()))).tolist()))
        frames = means.pop("frames")
        means = {name: total / frames for name, total in means.items()}
        seconds = self.seconds + time.time() - self.started
        broken = [name for name, value in [*means.items(), *valid.items()] if not math.isfinite(value)]
        if broken:
            raise InputError(f"{broken[0]} is no longer finite at step {self.step}: the last good checkpoint stays in "
                             f"{self.folder}; try a smaller --lr")
        rate = frames / (time.time() - self.shown)
        row = {"step": self.step, "seconds": round(seconds, 1), "frames_per_second": round(rate), **means,
               **{"valid_" + name: value for name, value in valid.items()}}
        self.rows.append(row)
        self.sums, self.shown = {}, time.time()
        left = seconds / self.step * (steps - self.step)
        print(f"step {self.step} of {steps}: "
              + ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in row.items()
                          if isinstance(v, float) and k != "seconds")
              + f", {rate:,.0f} frames/s, {left / 60:.1f} min left", flush=True)
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with io.StringIO() as text:
            table = csv.DictWriter(text, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)
            if not self.rank:
                write_atomic(self.folder / "log.csv", text.getvalue())
        if best is not None and best < self.best:
            self.best = best
            if not self.rank:
                save_checkpoint(self.folder / "model.pt", {
                    "model": self.name, "config": self.model.config, "state": self.model.state_dict(),
                    "trained": self.step, "corpus": self.corpus.name, "step": self.corpus.step, "data": self.args.data,
                    "data_step": self.args.step})
        self.save()

    def load_best(self):
        """Put the weights of the best validation step (model.pt) into the model."""
        wait_for_all()
        path = self.folder / "model.pt"
        try:
            self.model.load_state_dict(load_checkpoint(path, self.name)["state"])
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise InputError(f"{path}: does not fit this model ({str(error).splitlines()[0][:100]})") from None

    def finish(self, test):
        """Write result.json with the test figures, curves.png, and a first piece: sample.mid, .wav, .png."""
        if self.rank:
            return
        steps, args = self.step, vars(self.args)
        frames = sum(row["frames_per_second"] * (row["seconds"] - before["seconds"])
                     for before, row in zip([{"seconds": 0}, *self.rows], self.rows))
        write_atomic(self.folder / "result.json", json.dumps({
            "model": self.name, "params": sum(p.numel() for p in self.model.parameters()), "steps": steps,
            "train_seconds": round(self.seconds, 1),
            "frames_per_second": round(frames / max(self.rows[-1]["seconds"], 1)),
            "corpus": self.corpus.name, "step": self.corpus.step,
            "config": {k: v for k, v in args.items() if k not in ("resume", "force")}, "test": test}, indent=1) + "\n")
        print("test: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in test.items()), flush=True)
        self.model.eval()
        roll = self.model.sample(1, 256, torch.Generator(self.args.device).manual_seed(self.args.seed))[0].cpu().numpy()
        draw_curves({self.name: self.rows}, self.folder / "curves.png")
        write_music(self.folder / "sample", roll, self.corpus.step)
        print(f"wrote {self.folder}/sample.mid, .wav and .png; more: python sample.py {self.folder}", flush=True)


# ------------------------------------------------------------------------------------------------------ music, pictures

def write_music(stem, roll, step=0.5, step_seconds=0.3, sound=True, title=None):
    """Write a roll (T, 88) as stem.mid, stem.png and, if sound, stem.wav (22,050 Hz, mono, organ-like)."""
    score = roll_to_midi(roll, step, step_seconds)
    buffer = io.BytesIO()
    score.write(buffer)
    write_atomic(f"{stem}.mid", buffer.getvalue())
    if sound:
        def pipe(x):  # a fundamental with a few overtones is kinder to the ear than a bare sine
            return np.sin(x) + 0.4 * np.sin(2 * x) + 0.15 * np.sin(3 * x) + 0.08 * np.sin(4 * x)
        samples = score.synthesize(22050, wave=pipe) if roll.any() else np.zeros(22050)
        samples = np.int16(30000 * samples / max(1e-9, np.abs(samples).max()))
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(22050)
            file.writeframes(samples.astype("<i2").tobytes())
        write_atomic(f"{stem}.wav", buffer.getvalue())
    draw_rolls({title or Path(stem).name: roll}, f"{stem}.png")


def pyplot():
    """matplotlib.pyplot without a screen, or None, said once, where it is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot
        return matplotlib.pyplot
    except ImportError:
        if not getattr(pyplot, "said", False):
            print("no pictures: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        pyplot.said = True
        return None


def save_figure(figure, path):
    """Write a figure as PNG and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight", metadata={"Software": None})
    pyplot().close(figure)
    write_atomic(path, buffer.getvalue())


def draw_rolls(rolls, path):
    """Draw piano rolls {title: (T, 88)} one above the other: time to the right, pitch upwards, lines at each C."""
    plt = pyplot()
    if not plt or not rolls:
        return
    longest = max(len(roll) for roll in rolls.values())
    figure, axes = plt.subplots(len(rolls), 1, figsize=(min(16, 3 + longest / 16), 2.4 * len(rolls)), squeeze=False)
    for (title, roll), axis in zip(rolls.items(), axes[:, 0]):
        axis.imshow(np.asarray(roll).T, origin="lower", aspect="auto", cmap="Greys", interpolation="nearest",
                    extent=(0, len(roll), LOWEST - 0.5, LOWEST + KEYS - 0.5))
        used = np.flatnonzero(np.asarray(roll).any(0)) + LOWEST
        axis.set_ylim(min(36, used.min(initial=36)) - 1, max(84, used.max(initial=84)) + 1)
        axis.set_yticks(range(36, 85, 12), [f"C{octave}" for octave in range(2, 7)])
        axis.set_xticks(range(0, len(roll) + 1, 16 if len(roll) <= 512 else 128))
        axis.grid(alpha=0.3)
        axis.set_title(title, fontsize=9, loc="left")
    figure.tight_layout()
    save_figure(figure, path)


def draw_curves(runs, path):
    """Draw log rows {run: [{"step": ..., name: value}]}: one panel a logged quantity, training dashed, validation full;
    on a logarithmic scale where it spans more than a factor of a thousand."""
    plt = pyplot()
    names = dict.fromkeys(name.removeprefix("valid_") for rows in runs.values() for row in rows for name in row
                          if name not in ("step", "seconds", "frames_per_second"))
    if not plt or not names:
        return
    width = min(3, len(names))
    height = -(-len(names) // width)
    figure, axes = plt.subplots(height, width, figsize=(4.2 * width, 2.8 * height), squeeze=False)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    for name, axis in zip(names, axes.flat):
        seen = []
        for i, (run, rows) in enumerate(runs.items()):
            for column, style in ((name, "--"), ("valid_" + name, "-")):
                points = [(row["step"], row[column]) for row in rows if row.get(column) not in (None, "")]
                seen += [value for _, value in points]
                if points:
                    axis.plot(*zip(*points), style, color=f"C{i % 10}", linewidth=1.2,
                              label=(run if len(runs) > 1 else "validation" if style == "-" else "training"))
        if seen and max(seen) > 1000 * min(seen) > 0:
            axis.set_yscale("log")
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.tight_layout()
    save_figure(figure, path)


def main(argv=None):
    parser = Parser("Say what a corpus of MIDI files holds; fetch the default corpus where it is missing.")
    parser.add_argument("--data", help="folder of .mid or .midi files, searched below (default: Bach from music21)")
    parser.add_argument("--step", type=note_value, help="time step of all pieces, such as 1/16 (default: each its own)")
    parser.add_argument("--voices", type=voice_count, default=4, help="notes kept at once")
    args = parser.parse_args(argv)
    corpus = load_corpus(args.data, args.step, args.voices)
    print(corpus.name, *corpus.report, RIGHTS, sep="\n")


if __name__ == "__main__":
    cli(main)
