"""Training by two processes, as torchrun starts them (gloo, on the CPU)."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("several_processes.py")


def rows(folder):
    """The figures of a run's log, without the clock's."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if k not in ("seconds", "frames_per_second")}
                for row in csv.DictReader(file)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_do_what_one_does(scores, tmp_path):
    one = subprocess.Popen([sys.executable, SCRIPT, scores, tmp_path / "one"], stderr=subprocess.PIPE, text=True)
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT,
                          scores, tmp_path / "two"], capture_output=True, text=True, timeout=100)
    assert one.wait(100) == 0, one.stderr.read()
    assert two.returncode == 0, two.stderr  # the script has checked that both processes end with the same weights
    for name in ("lstm", "attn_lstm", "vae"):  # the same batch, so the same losses
        assert len(rows(tmp_path / "one" / name)) == 2
        for a, b in zip(rows(tmp_path / "one" / name), rows(tmp_path / "two" / name)):
            assert a == pytest.approx(b, rel=1e-5)
    for processes in ("one", "two"):  # noise and dropout of every process go on where they were
        assert rows(tmp_path / processes / "cut") == rows(tmp_path / processes / "whole")
    assert two.stdout.count("lstm: ") == 2  # lstm and attn_lstm, said once
