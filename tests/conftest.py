"""Real music, small models and tiny trainings for the tests."""

import importlib
import os
import shutil
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
MODULES = {name: importlib.import_module(name) for name in MODELS}
CLASSES = {name: next(value for key, value in vars(module).items()
                      if key.lower() == name.replace("_", "")) for name, module in MODULES.items()}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and BACH_TEST_CUDA=1")
TINY = ["--hidden", "16", "--window", "32", "--batch", "2", "--device", "cpu"]
CLOCK = ("seconds", "frames_per_second")  # the columns of a log that differ from run to run
VAE = {"hidden": 16, "window": 32, "segment": 8, "latent": 8, "features": 8, "dropout": 0.0}
SIZES = {"lstm": {"hidden": 16, "window": 32}, "vae": VAE, "hvae": VAE,
         "attn_lstm": {"hidden": 16, "window": 32, "attention_heads": 2},
         "vqvae": {"codebook": 16, "dim": 8, "hidden": 32, "dropout": 0.0},
         "wgan": {"window": 16, "hidden": 16, "heads": 2, "z": 4, "dropout": 0}}


@pytest.fixture(scope="session", autouse=True)
def scores(tmp_path_factory):
    """A folder with twelve chorales as MIDI. The user's cache stays as it is."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)  # small models need no more
    folder = tmp_path_factory.mktemp("corpus") / "chorales"
    data.export_bach(folder, CHORALES)
    return folder


@pytest.fixture(scope="session")
def corpus(scores):
    """The twelve chorales: 8 to train on, 2 to validate, 2 to test."""
    return data.load_corpus(scores)


@pytest.fixture(scope="session")
def brief(corpus, tmp_path_factory):
    """A folder with the first 64 frames of six chorales."""
    folder = tmp_path_factory.mktemp("brief")
    for i, roll in enumerate(corpus.train[:6]):
        data.roll_to_midi(roll[:64]).write(str(folder / f"{i}.mid"))
    return folder


@pytest.fixture(scope="session")
def batch(corpus):
    """Windows of real music, the last two padded: frames (8, 32, 88), mask (8, 32)."""
    torch.manual_seed(0)
    frames, mask = data.Windows(corpus.train, 32).sample(8)
    mask[-1, 20:] = mask[-2, 5:] = 0
    return frames * mask[..., None], mask


def copy(files, folder):
    folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copy(file, folder)


def small(name, **more):
    """An untrained model whose every part counts."""
    torch.manual_seed(0)
    model = CLASSES[name](**SIZES[name] | more).eval()
    for weights in model.parameters():
        weights.data.add_(0.1 * torch.randn_like(weights))
    return model


def fit(loss, model, steps, lr):
    """Train a model for so many steps on loss()."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def train(name, corpus, out, *more, steps=6, eval_every=2):
    """A tiny training by a model file's own main(), which `more` flags may change."""
    flags = ["--data", corpus, "--out", out, "--steps", steps, "--eval-every", eval_every]
    importlib.import_module(name).main([*map(str, flags), *TINY, *map(str, more)])


def silence(monkeypatch, module=data):
    """No music, sound and pictures at the end of a run, which take long."""
    finish = module.Run.finish

    def finish_soon(run, evaluate):
        def test(model, pieces):
            figures = evaluate(model, pieces)
            model.sample = lambda *_: torch.zeros(1, 8, 88)
            return figures
        finish(run, test)
    monkeypatch.setattr(module.Run, "finish", finish_soon)
    monkeypatch.setattr(module, "write_music", lambda *_, **__: None)
    monkeypatch.setattr(module, "draw_curves", lambda *_: None)


@pytest.fixture
def no_music(monkeypatch):
    silence(monkeypatch)


@pytest.fixture
def one_line(capsys):
    """Runs a program that must end with status 2 and one line, which is returned."""
    def run(program, *args):
        with pytest.raises(SystemExit) as stop:
            data.cli(lambda: program(*args))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.strip().count("\n") == 0, said
        return said
    return run


def outcome(folder):
    """What a run has come to, clock apart: step, best figure, log, states and best weights."""
    def plain(x):
        if isinstance(x, dict):
            return {name: plain(value) for name, value in x.items() if name not in CLOCK}
        if isinstance(x, list | tuple):
            return [*map(plain, x)]
        return x.tolist() if isinstance(x, torch.Tensor) else x
    both = [data.load_checkpoint(folder / name) for name in ("last.pt", "model.pt")]
    return plain([[held[key] for key in ("step", "best", "rows", "parts")] for held in both])
