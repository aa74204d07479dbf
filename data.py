"""What the six models share: MIDI and piano rolls, the corpus, batches, run folders, pictures.

    python data.py --data DIR  # say what a folder of MIDI files holds; music21's Bach by default

A piano roll is a bool array (T, 88): frame t, key k = MIDI pitch 21 + k. It has no velocities and
no onsets: a note struck again while it sounds becomes one long note. A frame lasts one time step,
a note value counted in quarter notes: 0.5 is an eighth.
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
import tempfile
import time
import wave
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import mido  # comes with pretty_midi
import numpy as np
import pretty_midi
import torch
from torch import distributed
from torch.nn import functional as F

KEYS = 88
LOWEST = 21  # MIDI pitch of key 0, a piano's lowest A
SYMBOLS = KEYS + 1  # what one voice can do in a frame: 0 rests, k + 1 sounds key k
BACH = Path(__file__).resolve().parent / "midi" / "bach"
PARTS = ("train", "valid", "test")
RANK = int(os.environ.get("RANK", 0))  # of this process among WORLD, which torchrun says
WORLD = int(os.environ.get("WORLD_SIZE", 1))
# Usual note lengths in quarter notes: plain, dotted and triplet values, whole note to 1/32.
NOTE_VALUES = np.array([4, 3, 2, 1.5, 4/3, 1, 3/4, 2/3, 1/2, 3/8, 1/3, 1/4, 1/6, 1/8])


class InputError(argparse.ArgumentTypeError, ValueError):
    """Bad input. Its message is one line: what cannot be used, why, and what to do."""


# -------------------------------------------------------------------------------------------- MIDI
def read_notes(path):
    """A MIDI file's notes, float (N, 3): start and end in quarter notes, MIDI pitch; and how many
    drum notes were left out. Raises InputError. (pretty_midi's seconds depend on the tempo.)"""
    notes, drums = [], []
    try:
        content = Path(path).read_bytes()
        if len(content) > 600_000 or re.search(rb"[\x80-\xff]{256}", content):  # hours to read
            raise ValueError("damaged, or larger than the 600 kB that a score may have")
        midi = mido.MidiFile(file=io.BytesIO(content), charset="latin1")
        if midi.ticks_per_beat <= 0:
            raise ValueError("its time is in SMPTE frames; only ticks per quarter note are read")
        for track in midi.tracks:
            now, sounding = 0, {}
            for message in track:
                now += message.time
                if message.type == "note_on" and message.velocity:
                    sounding.setdefault((message.channel, message.note), []).append(now)
                elif message.type in ("note_on", "note_off"):
                    starts = sounding.pop((message.channel, message.note), [])
                    ended = [(start, now, message.note) for start in starts if start < now]
                    if ended and starts[-1] == now:  # struck again before the old note was let go
                        sounding[message.channel, message.note] = [now]
                    (drums if message.channel == 9 else notes).extend(ended)
        if not notes:
            raise ValueError("only drums" if drums else "no notes")
        notes = np.array(notes, float) / [midi.ticks_per_beat, midi.ticks_per_beat, 1]
        if notes[:, 1].max() > 20_000:  # no memory is taken on the strength of a claim
            raise ValueError("it claims to last over 20,000 quarter notes")
    except Exception as error:  # on a damaged file mido can raise almost anything
        raise InputError(f"{path}: not readable: {str(error) or repr(error)}") from None
    return notes, len(drums)


def usual_time_step(notes):
    """A piece's time step in quarter notes: the shortest usual note value that over 20 % of its
    notes have, else the commonest (the paper's rule)."""
    lengths = np.maximum(notes[:, 1] - notes[:, 0], 1e-3)
    nearest = np.abs(np.log(lengths[:, None] / NOTE_VALUES)).argmin(1)
    share = np.bincount(nearest, minlength=len(NOTE_VALUES)) / len(notes)
    often = np.flatnonzero(share > 0.2)
    return float(NOTE_VALUES[often[-1] if len(often) else share.argmax()])


def notes_to_roll(notes, time_step):
    """Notes as of read_notes -> roll (T, 88), less those off the 88 keys. Frame t is what sounds a
    quarter of a step after its start, so that a few ticks do no harm."""
    first, last = np.ceil(notes[:, :2].T / time_step - 0.25 - 1e-6).astype(int)
    roll = np.zeros((last.max(initial=0), 128), bool)  # of all pitches
    for a, b, pitch in zip(first.clip(0), last, notes[:, 2].astype(int)):
        roll[a:b, pitch] = True
    return roll[:, LOWEST:LOWEST + KEYS]


def midi_to_roll(path, time_step=None):
    """A MIDI file -> (roll (T, 88), time_step). time_step: in quarter notes or as "1/8"; None for
    the piece's own. Raises InputError with the file's name and the reason."""
    notes, _ = read_notes(path)
    time_step = usual_time_step(notes) if time_step is None else note_value(time_step)
    return notes_to_roll(notes, time_step), time_step


def cut_silence(roll, longest=4):
    """The roll (T, 88) without silence at its ends, and never over `longest` silent frames."""
    sounding = np.flatnonzero(roll.any(1))
    gaps = np.diff(sounding, append=sounding[-1:] + 1)  # from each to the next
    return roll[[i for a, gap in zip(sounding, gaps) for i in range(a, a + min(gap, longest + 1))]]


# ------------------------------------------------------------------------------ voices and symbols
def to_voices(frames, voices=4):
    """The symbol of each voice: frames (..., 88) -> long (..., V), 0 a rest, k + 1 key k. The last
    voice has the lowest of several notes, the others have the highest, from the top downwards."""
    symbols = (frames > 0) * torch.arange(1, SYMBOLS, device=frames.device)  # 0 where a key is off
    lowest = symbols.masked_fill(symbols == 0, SYMBOLS).amin(-1, keepdim=True)
    lowest = lowest * (lowest < symbols.amax(-1, keepdim=True))  # 0 where there are not several
    others = symbols.masked_fill(symbols == lowest, 0).topk(max(1, voices - 1), -1).values
    return torch.cat([others, lowest], -1)[..., :voices]


def from_voices(voices):
    """The roll of voices: long (..., V) symbols -> bool (..., 88), their union."""
    out = torch.zeros(*voices.shape[:-1], SYMBOLS, dtype=torch.bool, device=voices.device)
    return out.scatter_(-1, voices, True)[..., 1:]


@contextlib.contextmanager
def sampling():
    """Decorates sampling: no gradients, and no oneDNN: its LSTM prepares weights in every call."""
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        yield


def sample_symbols(logits, generator=None, temperature=1.0, top_p=1.0, draws=None):
    """Draw a symbol from each row of logits (..., S) -> long (...), or several -> (..., draws).
    temperature: 0 takes the likeliest. top_p: of the fewest that have it (Holtzman et al. 2020)."""
    top_p = top_p if temperature else 0  # the likeliest alone, however near the next one is
    p, order = (logits.detach() / max(temperature, 1e-20)).softmax(-1).sort(-1, descending=True)
    reached = p.cumsum(-1)
    last = ((reached - p < max(top_p, 1e-9)) & (p > 0)).sum(-1, keepdim=True) - 1  # that is kept
    drawn = torch.rand(*p.shape[:-1], draws or 1, generator=generator, device=p.device)
    drawn = torch.searchsorted(reached, drawn * reached.gather(-1, last), right=True)
    symbols = order.gather(-1, drawn.minimum(last))
    return symbols if draws else symbols[..., 0]


PROFILES = torch.stack([F.layer_norm(torch.tensor(x), (12,)).roll(i) for x in (  # (24, 12)
    (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)) for i in range(12)])


def kind(frames, mask=1):
    """The kind of piece that rolls (..., T, 88) are: key, 0..11 for C major and up, 12..23 for C
    minor and up (Krumhansl and Kessler 1982); 24 more if a frame of mask (..., T) is silent."""
    count = F.pad(frames.sum(-2).float(), (LOWEST % 12, 11)).unflatten(-1, (-1, 12)).sum(-2)
    key = (count @ PROFILES.T.to(count.device)).argmax(-1)
    return key + 24 * ((frames.any(-1) == 0) & (mask > 0)).any(-1)


# ------------------------------------------------------------------------------------------ corpus
def progress(items, what):
    """Go through a list; on a terminal a line says how far."""
    for done, item in enumerate(items):
        if sys.stderr.isatty():
            print(f"\r{what}: {done} of {len(items)} ", end="\r", file=sys.stderr, flush=True)
        yield item


def export_bach(folder=BACH, names=None):
    """Write music21's 410 Bach scores (or those called `names`) as MIDI files, all or none."""
    try:
        from music21 import converter, corpus
    except ImportError:
        raise InputError("the default corpus needs music21: install it, or give --data") from None
    sources = sorted(path for path in corpus.getComposer("bach") if path.parent.name == "bach"
                     and path.suffix in (".mxl", ".xml") and (not names or path.stem in names))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        (part := Path(part, "midi")).mkdir()
        for source in progress(sources, f"writing music21's Bach scores to {folder}"):
            score = converter.parse(source, forceSource=True, storePickle=False)
            score.write("midi", part / f"{source.stem}.mid")
        if not folder.exists():  # else another process was faster
            part.rename(folder)


def load_corpus(folder=None, time_step=None, voices=4):
    """The MIDI files below a folder, parsed once, then cached. folder: None for the default corpus;
    time_step: of every piece, in quarter notes; None for each piece's own. Returns a namespace:
    train, valid, test: lists of pieces, bool (T, 88), less notes beyond the voices; names: {part:
    file stems}; time_step: the commonest in training; name; report: lines. Raises InputError."""
    root = Path(BACH if folder is None else folder)
    if folder is None and not root.is_dir():
        export_bach()
    files = sorted(Path(where, name) for where, _, names in os.walk(root, followlinks=True)
                   for name in names if name.lower().endswith((".mid", ".midi")))
    if not files:
        raise InputError(f"--data {root}: no folder with .mid or .midi files")
    # The name of the cache changes with the files, and with the rules of reading: this file.
    stamps = [(str(file), file.exists() and file.stat().st_mtime_ns) for file in files]
    name = repr((Path(__file__).read_bytes(), str(root.resolve()), time_step, voices, stamps))
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(cache, "bach-rolls", hashlib.md5(name.encode()).hexdigest() + ".pt")
    if not (held := load_zip(path)):
        held = read_corpus(root, files, time_step, voices)
        with contextlib.suppress(OSError, InputError):  # without a cache it is only slower
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, held)
    return argparse.Namespace(**held | {part: [p.numpy() for p in held[part]] for part in PARTS})


def read_corpus(root, files, time_step, voices):
    """Parse a corpus's files: what load_corpus returns as a dict, pieces as bool tensors."""
    pieces, skipped, left_out = [], [], np.zeros(3, int)
    for file in progress(files, f"reading {root}"):
        try:
            notes, drums = read_notes(file)
            step = time_step or usual_time_step(notes)
            off_keys = (~np.isin(notes[:, 2] - LOWEST, range(KEYS))).sum()
            full = torch.from_numpy(cut_silence(notes_to_roll(notes, step)))
            if not len(full):
                raise InputError(f"{file}: no note on the 88 keys")
            roll = from_voices(to_voices(full, voices))
            pieces.append(argparse.Namespace(path=file.relative_to(root), step=step, roll=roll))
            left_out += drums, off_keys, int(full.sum() - roll.sum())
        except InputError as error:
            skipped.append(f"skipped {error}")
    if not pieces:
        raise InputError(f"--data {root}: none of its MIDI files can be read; {skipped[0]}")
    parts, note = split_pieces(root, pieces)
    steps = Counter(piece.step for some in parts.values() for piece in some)
    sounding = torch.cat([piece.roll for piece in pieces]).sum(1).double()
    drums, off_keys, crowded = left_out
    report = [
        *(f"{part}: {len(some)} pieces, {sum(len(piece.roll) for piece in some)} frames"
          for part, some in parts.items()),
        "time steps: " + ", ".join(f"{Fraction(step / 4).limit_denominator(96)} in {n} pieces"
                                   for step, n in sorted(steps.items())),
        f"{sounding.mean():.2f} notes at once; {(sounding == 0).double().mean():.1%} of the frames "
        f"silent; left out: {crowded / (crowded + sounding.sum()):.1%} of the sounding keys, more "
        f"than {voices} at once; {drums} drum notes; {off_keys} notes off the 88 keys", note]
    return {**{part: [piece.roll for piece in some] for part, some in parts.items()},
            "names": {part: [piece.path.stem for piece in some] for part, some in parts.items()},
            "time_step": Counter(piece.step for piece in parts["train"]).most_common(1)[0][0],
            "name": "music21 Bach" if root.resolve() == BACH.resolve() else root.resolve().name,
            "report": report + skipped}


def split_pieces(root, pieces):
    """Pieces, by folder or else by work -> {part: its pieces}, a line on what was left out."""
    of = [piece.path.parts[0] for piece in pieces]  # the part of each
    note = f"{sum(map(of.count, {*of} - {*PARTS}))} files outside train/, valid/ and test/ left out"
    if not set(PARTS) <= set(of):
        first = {run_hashes(p.roll.numpy(), len(p.roll))[0]: p for p in reversed(pieces)}
        repeats, pieces = len(pieces) - len(first), sorted(first.values(), key=lambda p: p.path)
        bach = r"bwv\d+(\.\d+)?|" * (root.resolve() == BACH.resolve())  # 248.23-s is of 248.23
        works = [re.match(bach + ".*", piece.path.stem)[0] for piece in pieces]
        of, count = split_works(works, [piece.roll.numpy() for piece in pieces])
        if count < 3:
            raise InputError(f"{root}: too few works to split; give 3, or train/, valid/, test/")
        note = f"{count} works; {repeats} exact repeats left out"
    return {part: [p for p, its in zip(pieces, of) if its == part] for part in PARTS}, note


def run_hashes(roll, length=32):
    """A number for each run of `length` frames of (T, 88), equal for runs equal but transposed."""
    runs = [roll[i:i + length] for i in range(len(roll) - length + 1)]
    return [hash(np.roll(run, -run.any(0).argmax(), 1).tobytes()) for run in runs]


def split_works(works, rolls):
    """The part of each of these works (N,), and their number: any that share 32 frames, transposed
    or not, are one. By the MD5 of the names a tenth is test, the next valid, the rest train."""
    name, owner = {work: work for work in works}, {}
    for work, roll in zip(works, rolls):
        for run in run_hashes(roll):
            keep, drop = sorted((name[work], name[owner.setdefault(run, work)]))
            if keep != drop:
                name = {other: keep if held == drop else held for other, held in name.items()}
    order = sorted(set(name.values()), key=lambda work: hashlib.md5(work.encode()).hexdigest())
    tenth = math.ceil(len(order) / 10)
    part = dict(zip(order, ["test"] * tenth + ["valid"] * tenth + ["train"] * len(order)))
    return [part[name[work]] for work in works], len(order)


# ----------------------------------------------------------------------------------------- batches
class Windows:
    """Windows of `window` frames over pieces (T, 88), one every `hop` frames, held as one uint8
    tensor on the device. What reaches past a piece's end is padded with silence and masked, or left
    out (full=True). Raises InputError."""

    def __init__(self, pieces, window, device="cpu", hop=16, full=False):
        self.window, hop, spans, end = window, min(hop, window), [], 0
        for piece in map(np.asarray, pieces):
            if piece.shape[1:] != (KEYS,) or not np.isin(piece, (0, 1)).all():
                raise InputError(f"a piano roll is (T, 88), all 0 or 1; this {piece.shape} is not")
            end += len(piece)
            for left in range(len(piece), min(len(piece), window) - hop, -hop):  # to its end
                if left >= window or not full:
                    spans.append((end - left, left))
        if not spans:
            raise InputError(f"--window {window}: no piece is so long; take a shorter window")
        frames = np.concatenate([*pieces, np.zeros((window, KEYS))]).astype(np.uint8)
        self.frames = torch.from_numpy(frames).to(device)
        self.starts, self.left = torch.tensor(spans, device=device).T

    def __len__(self):
        return len(self.starts)

    def _gather(self, which):
        """Frames and mask, as sample() gives them, of the windows of these numbers (n,)."""
        time = torch.arange(self.window, device=self.frames.device)
        mask = (time < self.left[which, None]).float()
        return self.frames[self.starts[which, None] + time] * mask[..., None], mask

    def sample(self, n, transpose=1.0):
        """n random windows: frames (n, window, 88) of 0. and 1., mask (n, window), 1. where real;
        a share `transpose` moved by -6..+5 semitones where they stay on the keyboard. Of several
        processes, which draw alike, each gets its share."""
        device = self.frames.device
        if n < WORLD:
            raise InputError(f"--batch {n}: fewer windows than the {WORLD} processes; raise it")
        which = torch.randint(len(self), (n,), device=device)[RANK::WORLD]
        shift = torch.randint(-6, 6, (n, 1), device=device)
        shift = (shift * (torch.rand(n, 1, device=device) < transpose))[RANK::WORLD]
        frames, mask = self._gather(which)
        source = torch.arange(6, 6 + KEYS, device=device) - shift  # of each key, among 6+88+6
        moved = F.pad(frames, (6, 6)).gather(2, source[:, None].expand_as(frames))
        whole = moved.sum((1, 2), keepdim=True) == frames.sum((1, 2), keepdim=True)
        return torch.where(whole, moved, frames), mask

    def chunks(self, n):
        """All windows in order, n at a time, as sample() gives them, untransposed."""
        return map(self._gather, torch.arange(len(self), device=self.frames.device).split(n))


def whole_pieces(pieces, n, device="cpu"):
    """Whole pieces, shortest first, as frames (<= n, T, 88) and mask (<= n, T), padded."""
    pieces = sorted(pieces, key=len)
    for some in (pieces[i:i + n] for i in range(0, len(pieces), n)):
        yield next(Windows(some, len(some[-1]), device).chunks(n))


def divergence(a, b):
    """Jensen-Shannon divergence of two Counters, base 2: 0 the same .. 1 disjoint."""
    if not a or not b:
        return float(bool(a) != bool(b))
    p, q = (np.array([counts[key] for key in a | b]) / counts.total() for counts in (a, b))
    entropy = [-(x[x > 0] * np.log2(x[x > 0])).sum() for x in (p, q, (p + q) / 2)]
    return max(0.0, float(entropy[2] - (entropy[0] + entropy[1]) / 2))


# ------------------------------------------------------------------- processes and the command line
def sum_over_processes(x):
    """A tensor's sum over all processes, the same in each."""
    if WORLD > 1:
        distributed.all_reduce(x := x.clone())
    return x


class Parser(argparse.ArgumentParser):
    """argparse, with InputError for bad flags. run: a model's name, for the flags of what this file
    does for it; "" for those of a corpus alone. log: what the names in the log mean."""

    def __init__(self, about, run=None, log=None):
        super().__init__(description=about.splitlines()[0], epilog=log and f"In the log: {log}.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
        add = self.add_argument
        if run is not None:
            add("--data", help="folder of MIDI files, searched below (default: music21's Bach)")
            add("--time-step", type=note_value, help="of all pieces, as 1/16 (default: its own)")
            add("--voices", type=number(int, 1, KEYS), default=4, help="notes at once; 1: the top")
        if run:
            add("--transpose", type=probability, default=1.0, help="share in other keys, at first")
            add("--out", default=f"runs/{run}", help="run folder")
            add("--seed", type=natural, default=0, help="of weights, batches and samples")
            add("--device", type=device_name, default="auto", help="cpu or cuda; auto: cuda if any")
            add("--resume", action="store_true", help="go on with the run in --out, its own flags")
            add("--force", action="store_true", help="replace the run in --out")

    def format_help(self):
        """argparse's, less the defaults that say nothing."""
        return re.sub(r"\s+\(default:\s+(None|False)\)", "", super().format_help())

    def error(self, message):
        raise InputError(message)

    def parse(self, argv=None):
        """parse_args; with --resume, unspecified flags take the original run's values."""
        args = self.parse_args(argv)
        if args.resume:
            held = load_checkpoint(Path(args.out) / "last.pt")["args"]
            self.set_defaults(**held | ({} if held["device"] == "cpu" else {"device": args.device}))
        return self.parse_args(argv)


def number(kind, low, high):
    """An argparse type: an int or a float from low to high."""
    def number(text):  # its name is in argparse's message
        if not low <= kind(text) <= high:
            raise InputError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)
    return number


positive_int, natural = number(int, 1, 10**9), number(int, 0, 10**9)
positive, non_negative = number(float, 1e-30, 1e30), number(float, 0, 1e30)
probability, dropout, decay = (number(float, 0, high) for high in (1, 0.99, 0.9999))


def note_value(value):
    """A time step in quarter notes: "1/16", a fraction of a whole note, -> 0.25; numbers stay."""
    quarters = 4 * Fraction(value) if re.fullmatch(r"\d{1,3}/[1-9]\d{0,2}", str(value)) else value
    if isinstance(quarters, str) or not 0 < quarters <= 16:
        raise InputError(f"{value} is no time step; write a fraction of a whole note such as 1/16")
    return float(quarters)


def device_name(text):
    """"auto" -> "cuda" where there is one, else "cpu". Each of several processes has its own."""
    text = text.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        if text == "cuda" and WORLD > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        (torch.ones(1, device=text) + 1).item()  # a build without this GPU's kernels fails here
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{text} cannot be used: {str(error).splitlines()[0][:90]}") from None
    torch.backends.cudnn.allow_tf32 = False  # plain float32 for all models, as on the CPU
    return text


def config(model_class, args):
    """The arguments of a model's constructor, by name, out of the flags."""
    return {name: getattr(args, name) for name in inspect.signature(model_class).parameters}


def cli(main, stopped="stopped; the same command with --resume goes on from the last log line"):
    """Run a program's main(), in one process or in each of torchrun's. Bad input ends it with one
    line and exit status 2, Ctrl-C with the line `stopped`; a bug shows its traceback."""
    try:
        if WORLD > 1:
            nccl = torch.cuda.is_available() and distributed.is_nccl_available()
            distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
            if RANK:
                sys.stdout = open(os.devnull, "w")
        main()
        if WORLD > 1:
            distributed.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # in an orderly exit gloo's threads abort now and then
    except (KeyboardInterrupt, InputError, OSError, MemoryError, RuntimeError) as error:
        message = str(error) or stopped  # Ctrl-C says nothing
        if re.search("MemoryError|ALLOC_FAILED|(out of|allocate) memory", repr(error)):
            message = "not enough memory; take a smaller --batch, --window, --hidden or -n"
        elif isinstance(error, RuntimeError):
            raise
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)


# -------------------------------------------------------------------------------------------- runs
def save_checkpoint(path, content):
    """torch.save; what stands at path is always whole, new or old. Raises InputError."""
    part, buffer = Path(path).with_name(f".{Path(path).name}.part"), io.BytesIO()
    torch.save(content, buffer)
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; what was there stays") from None


def load_zip(path):
    """What save_checkpoint wrote, on the CPU; None if missing or damaged (the CRC is checked)."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:
        if file.testzip() is None and not any(e.external_attr for e in file.infolist()):
            return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, model=None, parts=()):
    """A run's model.pt or last.pt as Run writes it. model: the name it must have; parts: modules
    and optimizers {name: part} that take their states from it. Raises InputError."""
    kinds = {"model": str, "class": str, "config": dict, "args": dict, "parts": dict, "rows": list,
             "step": int, "best": float, "time_step": float, "corpus": str}
    if not Path(path).exists():
        raise InputError(f"{path}: no such file; train a model first, or give its folder")
    held = load_zip(path)
    fits = isinstance(held, dict) and {name: type(held[name]) for name in held} == kinds
    if not fits or not held["rows"] or not held["args"]:
        raise InputError(f"{path}: damaged, or no checkpoint of this project; train again")
    if model and held["model"] != model:
        raise InputError(f"{path}: holds a model of {held['model']}.py, not of {model}.py")
    try:
        for name in parts:
            parts[name].load_state_dict(held["parts"][name])
    except Exception as error:  # the checkpoint of another version may hold anything
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{path} does not fit these files and flags: {why}") from None
    return held


def warmup_cosine(step, steps):
    """Factor of the learning rate: a linear rise over 1/20 of the steps, half a cosine to 0."""
    warmup = max(1, steps // 20)
    done = min(1, max(0, step - warmup) / max(1, steps - warmup))
    return min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * done))


class Run:
    """A training run and its folder: log.csv, last.pt to go on from, model.pt with the best
    weights, result.json, curves.png and a first sample. name: of the model file; parts: what else
    a resumed run needs, as optimizer=... Raises InputError if the folder holds a run already."""

    def __init__(self, name, args, model, corpus, **parts):
        self.name, self.args, self.model, self.corpus = name, args, model, corpus
        self.about = {"model": name, "corpus": corpus.name, "time_step": corpus.time_step}
        self.parts = {"model": model, **parts}
        self.folder, self.rows, self.sums = Path(args.out), [], Counter()
        self.step, self.best, self.seconds, self.started = 0, math.inf, 0.0, time.time()
        self.params = sum(p.numel() for p in model.parameters())
        if args.resume:
            held = load_checkpoint(self.folder / "last.pt", name, self.parts)
            self.step, self.best, self.rows = held["step"], held["best"], held["rows"]
            self.seconds = self.rows[-1]["seconds"]
        elif not RANK:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()  # what cannot be written fails now
            for file in ("model.pt", "last.pt", "log.csv", "result.json", "curves.png",
                         "sample.mid", "sample.wav", "sample.png"):
                if not args.force and (self.folder / file).exists():
                    raise InputError(f"{args.out} holds a run: --resume, --force, or another --out")
                (self.folder / file).unlink(missing_ok=True)  # of a run, by force, these alone go
        print(f"{name}: {self.params:,} parameters on {args.device}; run folder {self.folder}"
              + f", going on from step {self.step}" * (self.step > 0), flush=True)

    def steps(self, last):
        """The steps left; each seeds all its randomness, so that a resumed run draws the same."""
        for self.step in range(self.step + 1, last + 1):
            torch.manual_seed(self.args.seed * 10**9 + self.step)
            yield self.step

    def average_gradients(self, module, mask):
        """With several processes, make a module's gradients those of the whole batch."""
        if WORLD > 1:  # means of the processes', weighted by their real frames
            weight = mask.sum() / sum_over_processes(mask.sum())
            for parameter in (p for p in module.parameters() if p.grad is not None):
                parameter.grad = sum_over_processes(parameter.grad * weight)

    def add(self, values, mask):
        """Count a step's losses, tensors () that stay on the device, for the next log line."""
        frames = mask.sum()
        self.sums.update({name: value * frames for name, value in values.items()}, frames=frames)

    def log(self, steps, valid, best=None):
        """Print a line and write log.csv, last.pt, and model.pt if `best` is the lowest yet. valid:
        dict of validation figures. Raises InputError if a loss is not finite."""
        *totals, frames = sum_over_processes(torch.stack(list(self.sums.values()))).tolist()
        losses = {name: total / frames for name, total in zip(self.sums, totals)}
        losses |= {"valid_" + name: value for name, value in valid.items()}
        if not all(abs(value) < 1e9 for value in losses.values()):  # nan is not either
            raise InputError(f"diverged by step {self.step}; try --resume with a smaller --lr")
        seconds, self.started, self.sums = time.time() - self.started, time.time(), Counter()
        self.seconds += seconds
        print(f"step {self.step} of {steps}:", *(f"{k} {v:.3f}," for k, v in losses.items()),
              f"{frames / seconds:,.0f} frames/s,",
              f"{self.seconds / self.step * (steps - self.step) / 60:.1f} min left", flush=True)
        self.rows.append({"step": self.step, "seconds": round(self.seconds, 1),
                          "frames_per_second": round(frames / seconds), **losses})
        if not RANK:
            names = dict.fromkeys(name for row in self.rows for name in row)
            lines = [names, *([str(row.get(name, "")) for name in names] for row in self.rows)]
            (self.folder / "log.csv").write_text("".join(",".join(x) + "\n" for x in lines))
            files = {"last.pt": self.parts}
            if best is not None and best < self.best:
                self.best, files = best, {"model.pt": {"model": self.model}, **files}
            for file, parts in files.items():
                save_checkpoint(self.folder / file, self.about | {
                    "class": type(self.model).__name__, "args": vars(self.args), "step": self.step,
                    "config": config(type(self.model), self.args), "best": self.best,
                    "rows": self.rows, "parts": {key: parts[key].state_dict() for key in parts}})
        sum_over_processes(torch.zeros(1))  # the others wait until the first has written it

    def finish(self, evaluate):
        """Load the best step's weights, evaluate(model, pieces) them on the test pieces, write
        result.json, curves.png and a first piece."""
        load_checkpoint(self.folder / "model.pt", self.name, {"model": self.model})
        test = evaluate(self.model, self.corpus.test)
        print("test:", *(f"{name} {value:.3f}" for name, value in test.items()), flush=True)
        if RANK:
            return
        speed = np.mean([row["frames_per_second"] for row in self.rows])
        result = self.about | {
            "params": self.params, "steps": self.step, "test": test, "config": vars(self.args),
            "train_seconds": round(self.seconds, 1), "frames_per_second": round(speed)}
        (self.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        draw_curves({self.name: self.rows}, self.folder / "curves.png")
        generator = torch.Generator(self.args.device).manual_seed(self.args.seed)
        roll = self.model.sample(1, 256, generator)[0].cpu().numpy()
        write_music(self.folder / "sample", roll, self.corpus.time_step, voices=self.args.voices)
        print(f"wrote {self.folder}/sample.mid, .wav, .png; more: python sample.py {self.folder}")


# ---------------------------------------------------------------------------------- music, pictures
def roll_to_midi(roll, time_step=0.5, bpm=80, voices=4):
    """A roll (T, 88) as a PrettyMIDI, an instrument a voice; time_step and bpm in quarter notes."""
    score, frame = pretty_midi.PrettyMIDI(resolution=480, initial_tempo=bpm), time_step * 60 / bpm
    names = ["soprano", "alto", "tenor", *(f"voice {v}" for v in range(4, voices))]
    names[voices - 1:] = ["bass"] if voices > 1 else ["soprano"]
    for name, line in zip(names, to_voices(torch.as_tensor(roll), voices).numpy().T):
        edges = np.flatnonzero(np.diff(line, prepend=0, append=0))  # where a note starts or ends
        part = pretty_midi.Instrument(0, name=name)
        part.notes = [pretty_midi.Note(80, int(line[a]) - 1 + LOWEST, a * frame, b * frame)
                      for a, b in zip(edges, edges[1:]) if line[a]]
        score.instruments.append(part)
    return score


def write_music(stem, roll, time_step=0.5, bpm=80, voices=4):
    """Write a roll as stem.mid, stem.wav and stem.png; see roll_to_midi."""
    score = roll_to_midi(roll, time_step, bpm, voices)
    score.write(f"{stem}.mid")
    write_wav(f"{stem}.wav", pretty_midi.PrettyMIDI(f"{stem}.mid"))  # without silent instruments
    with picture(f"{stem}.png") as axes:
        for axis in axes:
            draw_score(axis, Path(stem).name, score)


def write_wav(path, score, samples=None):
    """A PrettyMIDI as a WAV file, 22,050 Hz, mono; samples: (N,), instead of an organ's sound."""
    if samples is None:
        samples = score.synthesize(22050, lambda x: sum(np.sin(n * x) / n**2 for n in range(1, 5)))
    samples = 30000 * samples / max(1e-9, np.abs(samples).max(initial=0))
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 22050, 0, "NONE", ""))  # mono, 16 bits
        file.writeframes(samples.astype("<i2").tobytes())


@contextlib.contextmanager
def picture(path, rows=1, columns=1, size=(16, 2.8)):
    """Axes to draw on, `size` inches each, of a picture at path; without matplotlib none."""
    try:
        from matplotlib.figure import Figure  # pyplot would change a notebook's backend
    except ImportError:
        print(f"no {Path(path).name}: pip install matplotlib first", file=sys.stderr)
        yield []
        return
    figure = Figure((size[0] * columns, size[1] * rows), dpi=90, layout="tight")
    yield list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.savefig(path)


def draw_score(axis, title, score):
    """Draw a PrettyMIDI's notes, a colour per instrument."""
    axis.set_yticks(range(24, 109, 12), [f"C{octave}" for octave in range(1, 9)])
    for i, part in enumerate(score.instruments):
        a, b, pitch = np.array([(n.start, n.end, n.pitch) for n in part.notes]).reshape(-1, 3).T
        axis.barh(pitch, b - a, 1, a, color=f"C{i}", label=part.name, ec="white", lw=0.5)
    axis.set(title=title, xlabel="seconds", xlim=(0, score.get_end_time() or 1))
    axis.grid(alpha=0.4)
    axis.legend(handles=axis.containers, loc=(1.01, 0.3), ncols=1 + len(axis.containers) // 8)


def draw_curves(runs, path):
    """Draw log rows {run: [{"step": ..., name: value}]}: a panel per quantity, training dashed."""
    names = dict.fromkeys(name.removeprefix("valid_") for rows in runs.values() for row in rows
                          for name in row if name not in ("step", "seconds", "frames_per_second"))
    with picture(path, len(names) or 1, 1, (8, 2.4)) as axes:
        for name, axis in zip(names, axes):
            for i, (run, rows) in enumerate(runs.items()):
                for column, line in ((name, "--"), ("valid_" + name, "-")):
                    points = [(row["step"], row[column]) for row in rows if column in row]
                    if points:
                        axis.plot(*zip(*points), line, color=f"C{i}", label=f"{run} {column}")
            axis.set(title=name, xlabel="step")
            axis.grid(alpha=0.4)
            axis.legend(fontsize=7)


def main(argv=None):
    """Print a corpus's report."""
    args = Parser("Say what a corpus holds; write the default one if missing.", "").parse_args(argv)
    corpus = load_corpus(args.data, args.time_step, args.voices)
    print(corpus.name, *corpus.report, sep="\n")


if __name__ == "__main__":
    cli(main, "stopped")
