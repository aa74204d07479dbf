"""New music from a trained model, and the comparison of all of them.

    python sample.py runs/vqvae                         # 8 pieces as MIDI, WAV and picture, in runs/vqvae/samples/
    python sample.py runs/attn_lstm --prime start.mid   # go on from a beginning
    python sample.py runs/attn_lstm --melody tune.mid   # keep the top voice, write the others under it
    python sample.py runs/hvae --interpolate a.mid b.mid
    python sample.py runs/vqvae --reconstruct a.mid
    python sample.py --compare runs/*                   # one table for all models, runs/compare.md and .png

The statistics of style are here too: what they compare is said at each of them.
"""

import csv
import importlib
import inspect
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import data

MODELS = {"lstm": "LSTM", "attn_lstm": "AttnLSTM", "vae": "VAE", "hvae": "HVAE", "vqvae": "VQVAE", "wgan": "WGAN"}


def load_model(run, device="cpu"):
    """A run folder's best model, ready to sample from, and its checkpoint. Only the six known files are ever imported."""
    path = Path(run) / "model.pt"
    held = data.load_checkpoint(path)
    try:
        kind = MODELS[held["model"]]  # a KeyError for any other name
        model = getattr(importlib.import_module(held["model"]), kind)(**held["config"])
        model.load_state_dict(held["parts"]["model"])
        held |= {"data": held["args"]["data"], "data_step": held["args"]["time_step"], "step": held["time_step"]}
    except (AssertionError, KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        why = (str(error) or "parts are missing").splitlines()[0][:100]
        raise data.InputError(f"{path}: does not fit the model files here ({why})") from None
    return model.to(device).eval(), held


def refuse_unless(able, held, what):
    """Raise InputError naming the models that can do `what`, a test of model classes, if this run's cannot."""
    def can(name):
        return able(getattr(importlib.import_module(name), MODELS[name]))

    if not can(held["model"]):
        raise data.InputError(f"{held['model']} cannot do {what}; these can: "
                              + (", ".join(filter(can, MODELS)) or "none of the models"))


def takes(option):
    """A test whether a model class's sample() takes this option."""
    return lambda model: option in inspect.signature(model.sample).parameters


# ---------------------------------------------------------------------------------------------------------------- style

# How well each pitch class fits C major and C minor: Krumhansl and Kessler 1982, as in Krumhansl 1990, p. 30.
MAJOR = np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88])
MINOR = np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17])


def pitch_classes(roll):
    """Sounding frames of each pitch class, C first: (T, 88) -> (12,)."""
    return np.bincount((np.nonzero(roll)[1] + data.LOWEST) % 12, minlength=12)


def tonic(roll):
    """The tonic 0..11 (C is 0) of the major or minor key whose profile correlates best with the roll's pitch classes
    (Krumhansl and Schmuckler's algorithm)."""
    have = pitch_classes(roll)
    if not have.any():
        return 0
    scores = [max(np.corrcoef(np.roll(profile, key), have)[0, 1] for profile in (MAJOR, MINOR)) for key in range(12)]
    return int(np.nan_to_num(scores, nan=-1).argmax())


def chords(roll):
    """The different chords of a roll in a row: bass keys (N,), pitch-class sets above the bass as 12 bits (N,), and those
    sets for every sounding frame."""
    roll = roll[roll.any(1)]
    t, key = np.nonzero(roll)
    bass = roll.argmax(1)
    sets = np.zeros(len(roll), int)
    np.bitwise_or.at(sets, t, 1 << ((key - bass[t]) % 12))
    new = np.r_[True, (sets[1:] != sets[:-1]) | (bass[1:] != bass[:-1])][:len(roll)]
    return bass[new], sets[new], sets


def style(rolls):
    """Histograms of a set of rolls (T, 88), each a Counter:

    pitch and pitch class, after the excerpt is moved to C by its key; notes at once, over all frames; note length in
    frames, up to 16; melodic interval of the top and of the bottom line in semitones, up to an octave, where the line
    moves; chord, the pitch-class set above the bass, over sounding frames; chord change, two different chords in a row
    with the interval between their basses.
    """
    names = ("pitch", "pitch class", "notes at once", "note length", "top interval", "bottom interval", "chord",
             "chord change")
    out = {name: Counter() for name in names}
    for roll in rolls:
        roll = np.asarray(roll, bool)
        down = (tonic(roll) + 6) % 12 - 6  # -6..5 semitones
        key = np.nonzero(roll)[1] + data.LOWEST - down
        out["pitch"].update(key.tolist())
        out["pitch class"].update((key % 12).tolist())
        out["notes at once"].update(roll.sum(1).tolist())
        edges = np.diff(np.pad(roll, ((1, 1), (0, 0))).astype(np.int8), axis=0).T
        out["note length"].update(np.minimum(np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1], 16).tolist())
        sounding = roll[roll.any(1)]
        if not len(sounding):
            continue
        for name, line in (("top interval", data.KEYS - 1 - sounding[:, ::-1].argmax(1)),
                           ("bottom interval", sounding.argmax(1))):
            moves = np.diff(line)
            out[name].update(np.clip(moves[moves != 0], -13, 13).tolist())
        bass, changed, every = chords(roll)
        out["chord"].update(every.tolist())
        motion = np.clip(np.diff(bass), -13, 13)
        out["chord change"].update(zip(changed[:-1].tolist(), changed[1:].tolist(), motion.tolist()))
    return out


def divergence(a, b):
    """Jensen-Shannon divergence of two Counters, base 2: 0 the same .. 1 disjoint."""
    keys = list(a.keys() | b.keys())
    return data.divergence(*(np.array([counts[k] for k in keys], float) for counts in (a, b)))


def style_distance(rolls, reference):
    """Divergence of each of style()'s histograms between rolls and a reference's style(), and their mean ("style")."""
    have = style(rolls)
    each = {name: divergence(have[name], reference[name]) for name in reference}
    return {"style": float(np.mean(list(each.values()))), **each}


def parallels(rolls):
    """Parallel fifths and octaves between two of four voices per 100 frames: both voices move the same way and are a
    fifth, or an octave, apart (up to octaves) before and after."""
    count = frames = 0
    for roll in rolls:
        voice = data.to_voices(torch.as_tensor(np.asarray(roll, bool)), 4).numpy()
        before, after = voice[:-1], voice[1:]
        frames += len(roll)
        for i in range(4):
            for j in range(i + 1, 4):
                sounding = (before[:, [i, j]] > 0).all(1) & (after[:, [i, j]] > 0).all(1)
                move = after - before
                together = (move[:, i] != 0) & (np.sign(move[:, i]) == np.sign(move[:, j]))
                first, second = before[:, i] - before[:, j], after[:, i] - after[:, j]
                perfect = np.isin(first % 12, (0, 7)) & (first % 12 == second % 12) & (first > 0) & (second > 0)
                count += int((sounding & together & perfect).sum())
    return 100 * count / max(1, frames)


def distinct_frames(roll):
    """A roll without silence and with held chords counted once."""
    roll = np.asarray(roll, bool)
    roll = roll[roll.any(1)]
    return roll[np.r_[True, (roll[1:] != roll[:-1]).any(1)][:len(roll)]]


def copied_runs(rolls, training):
    """For each roll the longest run of different chords that stands in a training roll in any transposition."""
    rolls, training = [distinct_frames(r) for r in rolls], [distinct_frames(r) for r in training]
    longest, alive, length = np.zeros(len(rolls), int), list(range(len(rolls))), 1
    while alive:
        known = set().union(*(data.run_hashes(roll, length) for roll in training))
        alive = [i for i in alive if known & set(data.run_hashes(rolls[i], length))]
        longest[alive] = length
        length += 1
    return longest


def describe(rolls):
    """Plain figures of a set of rolls, means over rolls: silent frames in %, notes at once where any sound, pitch range
    in semitones, pitch classes used, and scale consistency, the largest share of notes (runs of frames) that lie in one
    major or natural minor scale; the last four as MusPy defines them (Dong et al. 2020, metrics)."""
    scale = np.isin(np.arange(12), (0, 2, 4, 5, 7, 9, 11))
    figures = []
    for roll in rolls:
        roll = np.asarray(roll, bool)
        used = np.flatnonzero(roll.any(0))
        onsets = roll & ~np.pad(roll, ((1, 0), (0, 0)))[:-1]
        classes = pitch_classes(onsets)
        sounding = roll.any(1)
        in_scale = max(classes[np.roll(scale, key)].sum() for key in range(12))
        figures.append((100 * (1 - sounding.mean()), roll.sum() / max(1, sounding.sum()), np.ptp(used) if len(used) else 0,
                        (classes > 0).sum(), in_scale / max(1, classes.sum())))
    names = ("silent %", "polyphony", "range", "pitch classes", "scale consistency")
    return dict(zip(names, np.mean(figures, 0).tolist()))


def excerpts(pieces, n, length, rng):
    """n random excerpts of `length` frames (whole pieces where all are shorter)."""
    pieces = [p for p in pieces if len(p) >= length] or pieces
    chosen = [pieces[i] for i in rng.integers(len(pieces), size=n)]
    return [p[(o := int(rng.integers(max(1, len(p) - length + 1)))):o + length] for p in chosen]


def yardsticks(corpus, reference, n, length):
    """The same figures of known sets of n rolls of `length` frames: {name: rolls}, and the style distances of 20 draws
    of training Bach. Training frames shuffled in time keep the chords and lose the music; independent keys lose both."""
    rng = np.random.default_rng(0)
    draws = [style_distance(excerpts(corpus.train, n, length, rng), reference) for _ in range(20)]
    frames = np.concatenate(corpus.train)
    return draws, {
        "Bach (training)": excerpts(corpus.train, n, length, rng), "Bach (test)": excerpts(corpus.test, n, length, rng),
        "shuffled frames": [rng.permutation(roll) for roll in excerpts(corpus.train, n, length, rng)],
        "independent keys": [rng.random((length, data.KEYS)) < frames.mean(0) for _ in range(n)]}


# ------------------------------------------------------------------------------------------------------------- commands

def compare(runs, args):
    """Print a Markdown table over runs, beside Bach and two kinds of noise; write it to compare.md next to the runs, with
    a picture, compare.png, and the curves of the runs' logs, curves.png. Broken runs and runs on other corpora than the
    first one's are named and left out."""
    found, left_out = [], []
    for run in runs:
        if not Path(run).is_dir():
            continue  # runs/* also matches runs/compare.md
        try:
            model, held = load_model(run, args.device)
            try:
                result = json.loads((Path(run) / "result.json").read_text())
            except (OSError, ValueError):
                raise data.InputError(f"{run}: has no result.json; let its training end") from None
            if found and (held["corpus"], held["data_step"]) != (found[0][2]["corpus"], found[0][2]["data_step"]):
                raise data.InputError(f"{run}: was trained on another corpus ({held['corpus']}) than {found[0][0]}")
            found.append((run, model, held, result))
        except data.InputError as error:
            left_out.append(f"left out {error}")
            print(left_out[-1], file=sys.stderr)
    if not found:
        raise data.InputError("--compare: none of these folders holds a finished run; train some models first")
    n, length = args.n or 64, args.length or 128
    corpus = data.load_corpus(found[0][2]["data"], found[0][2]["data_step"])
    reference = style(corpus.test)
    draws, known = yardsticks(corpus, reference, n, length)
    floor, spread = np.mean([d["style"] for d in draws]), np.std([d["style"] for d in draws])
    rows, details, bars = [], [], {}
    for name, model, result in [*((k, None, {}) for k in known), *((Path(r).name, m, t) for r, m, _, t in found)]:
        seconds = None
        if model is None:
            rolls = known[name]
        else:
            print(f"sampling {n} pieces of {length} frames from {name} ...", file=sys.stderr)
            options = {k: getattr(args, k) for k in ("temperature", "top_p", "skip_top")
                       if getattr(args, k) is not None and takes(k)(type(model))}
            started = time.time()
            rolls = model.sample(n, length, torch.Generator(args.device).manual_seed(args.seed), **options).cpu().numpy()
            seconds = time.time() - started
        distance = style_distance(rolls, reference)
        copied = copied_runs(rolls, corpus.train) if name not in ("Bach (training)", "shuffled frames") else None
        bars[name] = distance
        nll = result.get("test", {}).get("nll")
        rows.append([name, f"{result['params'] / 1e6:.2f} M" if result else "", "" if nll is None else f"{nll:.2f}",
                     f"{distance['style']:.3f}", f"{distance['chord change']:.3f}", f"{parallels(rolls):.2f}",
                     "" if copied is None else f"{np.median(copied):.0f} / {copied.max()}",
                     f"{result['train_seconds'] / 60:.1f} min" if result else "",
                     f"{n * length / seconds:,.0f}" if seconds else ""])
        details.append([name, *(f"{v:.3f}" for k, v in distance.items() if k not in ("style", "chord change")),
                        *(f"{v:.2f}" for v in describe(rolls).values())])
    heads = ["", "parameters", "test nats a frame", "style distance", "chord change", "parallels / 100 frames",
             "copied run, median / longest", "training", "frames sampled / s"]
    text = "\n".join([
        markdown(heads, rows), "",
        f"{n} samples of {length} frames a model, seed {args.seed}, against the {len(corpus.test)} test pieces of "
        f"{corpus.name}. Style distance of {n} excerpts of training Bach: {floor:.3f} +- {spread:.3f} (20 draws).", "",
        markdown(["divergence from test Bach", *(k for k in draws[0] if k not in ("style", "chord change")),
                  *describe(rolls)], details), *left_out]) + "\n"
    print(text)
    folder = Path(args.out or Path(found[0][0]).parent)
    folder.mkdir(parents=True, exist_ok=True)
    data.write_atomic(folder / "compare.md", text)
    draw_comparison(bars, floor, folder / "compare.png")
    data.draw_curves({Path(run).name: read_log(run) for run, *_ in found}, folder / "curves.png")


def markdown(head, rows):
    """A Markdown table of strings."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def read_log(run):
    """The rows of a run's log.csv, numbers as floats; none where it cannot be read."""
    try:
        with open(Path(run) / "log.csv", newline="") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except (OSError, ValueError):
        return []


def draw_comparison(bars, floor, path):
    """Draw style and chord-change distance of each set as bars, with the floor of training Bach as a line."""
    figure, axes = data.figure(1, 2, (5.5, 0.4 * len(bars) + 1.2))
    if not figure:
        return
    for axis, what in zip(axes, ("style", "chord change")):
        axis.barh(list(bars), [d[what] for d in bars.values()], color=["#999" if "Bach" in b or " " in b else "C0" for b in bars])
        axis.set_title(what + " distance to test Bach (0 same, 1 disjoint)", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].axvline(floor, color="k", linewidth=1)
    axes[0].invert_yaxis()
    axes[1].invert_yaxis()
    figure.savefig(path)


def read_roll(path, held):
    """A user's MIDI file as the model's corpus was read: (roll, step in quarter notes)."""
    roll, step = data.midi_to_roll(path, held["data_step"])
    voices = held["config"].get("voices", 4)
    roll = data.from_voices(data.to_voices(torch.from_numpy(roll), voices)).numpy()
    if not len(roll):
        raise data.InputError(f"{path}: no note on the 88 keys")
    return roll, step


def latents(model, roll):
    """The codes of the windows that tile a roll: posterior means or code indices, (windows, ...), and the frames."""
    window, device = model.window, next(model.parameters()).device
    z = model.encode(*next(data.Windows([roll], window, device, hop=window).chunks(10**6)))
    return z[0] if isinstance(z, tuple) else z


def continuous(model):
    """Whether a model class has a continuous latent, and so a decoder to sample from."""
    return hasattr(model, "decode") and "temperature" in inspect.signature(model.decode).parameters


def decode(model, z):
    """Latents (n, ...) as the likeliest rolls, bool (n, window, 88)."""
    return model.decode(z, temperature=0) if continuous(type(model)) else model.decode(z)


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


def run_command(args):
    """Sample from one run, or reconstruct or interpolate with it, as the flags say."""
    if len(args.runs) != 1:
        raise data.InputError(f"give one run folder, not {len(args.runs)}; several go with --compare")
    model, held = load_model(args.runs[0], args.device)
    folder = Path(args.out or Path(args.runs[0]) / "samples")
    step, made, rows = held["step"], {}, {}
    with torch.no_grad():
        if args.reconstruct:
            refuse_unless(lambda m: hasattr(m, "decode"), held, "--reconstruct")
            roll, step = read_roll(args.reconstruct, held)
            rebuilt = decode(model, latents(model, roll)).flatten(0, 1)[:len(roll)].cpu().numpy()
            made = {f"reconstruct-{Path(args.reconstruct).stem}": rebuilt}
            rows = {f"{Path(args.reconstruct).name}": roll, f"rebuilt, F1 {note_f1(roll, rebuilt):.3f}": rebuilt}
        elif args.interpolate:
            refuse_unless(continuous, held, "--interpolate")
            ends = [read_roll(path, held) for path in args.interpolate]
            step = ends[0][1]
            z = [latents(model, roll)[0] for roll, _ in ends]
            rolls = decode(model, slerp(*z, args.n or 9)).cpu().numpy()
            made = {"interpolate-" + "-".join(Path(path).stem for path in args.interpolate): np.concatenate(rolls)}
            rows = {f"{i} of {len(rolls) - 1}": roll for i, roll in enumerate(rolls)}
            for i, (a, b) in enumerate(zip(rolls, rolls[1:])):
                print(f"step {i} to {i + 1}: {100 * (1 - note_f1(a, b)):.0f} % of the notes differ")
            print(f"end to end: {100 * (1 - note_f1(rolls[0], rolls[-1])):.0f} %")
        else:
            options = {}
            for name in ("temperature", "top_p", "skip_top"):
                if getattr(args, name) is not None:
                    refuse_unless(takes(name), held, "--" + name.replace("_", "-"))
                    options[name] = getattr(args, name)
            stem, length, before = "sample", args.length, np.zeros((0, data.KEYS), bool)
            for name in ("prime", "melody"):
                if getattr(args, name):
                    refuse_unless(takes(name), held, "--" + name)
                    options[name], step = read_roll(getattr(args, name), held)
                    stem = f"{name}-{Path(getattr(args, name)).stem}"
                    before = options[name] if name == "prime" else before
                    length = length or (len(options[name]) if name == "melody" else None)
            rolls = model.sample(args.n or 8, length or 256, torch.Generator(args.device).manual_seed(args.seed), **options)
            for i, roll in enumerate(rolls.cpu().numpy(), 1):
                made[f"{stem}-seed{args.seed}-{i:02}"] = np.concatenate([before, roll])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise data.InputError(f"--out {folder} cannot be written: {error.strerror}") from None
    for name, roll in made.items():
        data.write_music(folder / name, roll, step, 60 * step / args.step_seconds)
        if rows:
            data.draw_rolls(rows, folder / f"{name}.png")
    print(f"wrote {len(made)} piece{'s' * (len(made) > 1)} to {folder}: {', '.join(list(made)[:2])}{' ...' * (len(made) > 2)}")


def main(argv=None):
    parser = data.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", help="run folder of a trained model; several with --compare")
    add("--compare", action="store_true", help="one table for all these runs, beside Bach")
    add("--prime", metavar="FILE", help="MIDI file to go on from")
    add("--melody", metavar="FILE", help="MIDI file whose top voice is kept, the others written under it")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="MIDI files whose first windows are joined by a path in z")
    add("--reconstruct", metavar="FILE", help="MIDI file to encode and decode again")
    add("-n", type=data.positive_int, help="how many pieces (default: 8; 9 with --interpolate; 64 with --compare)")
    add("--length", type=data.positive_int, help="frames of a piece (default: 256; 128 with --compare; a melody's own)")
    add("--temperature", type=data.non_negative, help="below 1 safer, above 1 bolder, 0 the likeliest (default: 1)")
    add("--top-p", type=data.probability, help="draw from the likeliest symbols that reach this probability (default: 0.9)")
    add("--skip-top", type=data.skip_count, help="leave out so many of the likeliest symbols of each voice (default: 0)")
    add("--seed", type=data.natural, default=0, help="another seed, other music")
    add("--out", help="folder to write to (default: samples/ in the run folder)")
    add("--step-seconds", type=data.positive, default=0.3, help="how long a frame sounds")
    add("--no-wav", action="store_true", help="write no WAV files, which are large")
    add("--device", type=data.device_name, default="auto", help="cpu, cuda, cuda:1; auto takes cuda where there is one")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.compare, args.prime or args.melody, args.interpolate, args.reconstruct))) > 1:
        parser.error("--compare, --prime or --melody, --interpolate and --reconstruct exclude each other")
    if (args.interpolate or args.reconstruct) and (args.temperature, args.top_p, args.skip_top) != (None, None, None):
        parser.error("--temperature, --top-p and --skip-top are for sampling; --interpolate and --reconstruct take the likeliest")
    compare(args.runs, args) if args.compare else run_command(args)


if __name__ == "__main__":
    data.cli(main)
