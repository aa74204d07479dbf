"""A small share of torture.py: kills, damaged files and checkpoints, a full disk, odd flags."""

import random

import pytest

pytest.importorskip("resource", reason="needs fork")
import torture  # noqa: E402


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_killed_run_ends_as_the_uninterrupted_one(scores, folder):
    torture.kills("vqvae", scores, folder, 1, random.Random(1))


def test_damaged_midi_is_read_or_refused(scores, folder):
    torture.midi(sorted(scores.glob("*.mid")), folder, 40, random.Random(0))


def test_damaged_checkpoints_are_refused_or_work(scores, folder):
    torture.MODELS["lstm"].main(["--data", str(scores), "--out", str(folder / "run"), "--steps", "3", *torture.TINY])
    torture.checkpoints(folder / "run", folder, 8, random.Random(0))


def test_a_full_disk_keeps_the_older_checkpoint(scores, folder):
    torture.disk("lstm", scores, folder / "run")


@pytest.mark.parametrize("name", [*torture.MODELS, "data"])
def test_odd_values_of_every_flag_are_one_line(name, scores, folder):
    torture.flags(name, scores, folder, random.Random(0), values=["-1"])
