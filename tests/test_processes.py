"""Training by two processes, as torchrun starts them (gloo, on the CPU)."""

import subprocess
import sys

import pytest
import torch

import data
import several_processes
from conftest import CLOCK

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
def test_two_processes_do_what_one_does(brief, tmp_path, monkeypatch):
    for owner, name in ((data.Run, "finish"), (data, "write_music"), (data, "draw_curves")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be restored
    command = [*TORCHRUN, several_processes.__file__, brief, tmp_path / "two"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as two:
        try:
            several_processes.trainings(several_processes.EXACT, brief, tmp_path / "one")
            said, errors = two.communicate(timeout=300)
        finally:
            two.terminate()
    assert two.returncode == 0, errors
    assert said.count("test: ") == 6  # five trainings and one resumed, each said once
    for name in several_processes.EXACT:  # the same losses
        logs = [data.load_checkpoint(tmp_path / count / name / "last.pt")["rows"]
                for count in ("one", "two")]
        assert len(logs[0]) == len(logs[1]) == (2 if name == "lstm" else 1)
        for a, b in zip(*logs):
            a, b = ({k: v for k, v in row.items() if k not in CLOCK} for row in (a, b))
            assert a == pytest.approx(b, rel=1e-5)
