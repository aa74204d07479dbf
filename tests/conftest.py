"""Real music for the tests: a dozen chorales out of music21, written once a session."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the model files are imported from the repository's root

import data  # noqa: E402

CHORALES = ["bwv10.7", "bwv101.7", "bwv14.5", "bwv153.1", "bwv16.6", "bwv253", "bwv269", "bwv277", "bwv3.6", "bwv304",
            "bwv66.6", "bwv84.5"]


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
    """The twelve chorales as a data.Corpus: 8 pieces to train on, 2 to validate, 2 to test."""
    return data.load_corpus(scores)


@pytest.fixture(scope="session")
def batch(corpus):
    """Eight windows of 32 frames of real music: frames (8, 32, 88), mask (8, 32); the last ones are padded."""
    windows = data.Windows(corpus.train, 32)
    frames, mask = windows.sample(8, torch.Generator().manual_seed(0), transpose=True)
    mask[-1, 20:] = mask[-2, 5:] = 0
    return frames * mask[..., None], mask
