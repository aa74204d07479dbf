"""Real music for the tests: a dozen chorales out of music21, written once a session."""

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the model files are imported from the repository's root
if not os.environ.get("BACH_TEST_CUDA"):  # the tests fork, which CUDA does not survive
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402

CHORALES = ["bwv10.7", "bwv101.7", "bwv14.5", "bwv153.1", "bwv16.6", "bwv253", "bwv269", "bwv277",
            "bwv3.6", "bwv304", "bwv66.6", "bwv84.5"]
MODELS = ("lstm", "attn_lstm", "vae", "hvae", "vqvae", "wgan")
TINY = ["--hidden", "16", "--window", "32", "--batch", "2", "--device", "cpu"]
CLOCK = ("seconds", "frames_per_second")  # the columns of a log that differ from run to run


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep the tests out of the user's cache; one thread: small models need no more."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scores(tmp_path_factory):
    """A folder with twelve chorales as MIDI."""
    folder = tmp_path_factory.mktemp("corpus") / "chorales"
    data.export_bach(folder, CHORALES)
    return folder


@pytest.fixture(scope="session")
def corpus(scores):
    """The twelve chorales as data.load_corpus gives them: 8 pieces to train on, 2 to validate,
    2 to test."""
    return data.load_corpus(scores)


@pytest.fixture(scope="session")
def brief(corpus, tmp_path_factory):
    """A folder with the beginnings of six chorales, 64 frames each, for trainings that only have to
    run: 4 pieces to train on, 1 to validate, 1 to test."""
    folder = tmp_path_factory.mktemp("brief")
    for i, roll in enumerate(corpus.train[:6]):
        data.roll_to_midi(roll[:64]).write(str(folder / f"{i}.mid"))
    return folder


@pytest.fixture(scope="session")
def batch(corpus):
    """Eight windows of 32 frames of real music: frames (8, 32, 88), mask (8, 32); the last two are
    padded."""
    torch.manual_seed(0)
    frames, mask = data.Windows(corpus.train, 32).sample(8)
    mask[-1, 20:] = mask[-2, 5:] = 0
    return frames * mask[..., None], mask


def copy(files, folder):
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())


def train(name, corpus, out, *more, steps=6, eval_every=2):
    """A tiny training by a model file's own main(), which `more` flags may change."""
    prior = ["--prior-steps", 4, "--prior-hidden", 16] if name == "vqvae" else []  # a second stage
    flags = ["--data", corpus, "--out", out, "--steps", steps, "--eval-every", eval_every, *prior]
    importlib.import_module(name).main([*map(str, flags), *TINY, *map(str, more)])


def silence(monkeypatch, module=data):
    """What is slow at the end of a run: no pictures, no sound, 8 frames of music."""
    finish = module.Run.finish

    def finish_soon(run, test):
        sample = run.model.sample
        run.model.sample = lambda n, _, *more: sample(n, 8, *more)
        finish(run, test)
        del run.model.sample
    monkeypatch.setattr(module.Run, "finish", finish_soon)
    for function in ("write_music", "draw_curves"):
        monkeypatch.setattr(module, function, lambda *_, **__: None)


def outcome(folder):
    """What a run has come to, clock apart: step, best figure, log, states and best weights."""
    def plain(x):
        if isinstance(x, torch.Tensor):
            return x.shape, x.numpy().tobytes()
        if isinstance(x, dict):
            return {name: plain(value) for name, value in x.items()}
        return [plain(value) for value in x] if isinstance(x, list | tuple) else x
    last, best = (data.load_checkpoint(folder / name) for name in ("last.pt", "model.pt"))
    rows = [{name: value for name, value in row.items() if name not in CLOCK}
            for row in last["rows"]]
    return plain([last["step"], last["best"], rows, last["parts"], best["step"], best["parts"]])
