"""Training by two processes, as torchrun starts them (gloo, on the CPU). As a program, what each of
them does: torchrun --nproc_per_node=2 tests/test_processes.py DATA OUT"""

import subprocess
import sys

import pytest
import torch

from conftest import CLOCK, MODULES, silence, train  # first: it finds data.py
import data

# Where nothing is random but the batch, a share of it computes what it does in the whole batch.
EXACT = {"lstm": "--dropout 0", "vae": "--latent 0 --dropout 0 --drop 0",
         "attn_lstm": "--dropout-input 0 --dropout 0 --dropout-heads 0"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def trainings(flags, corpus, out, monkeypatch):
    """Train these models, {name: flags}, and resume lstm; in all processes they end alike."""
    silence(monkeypatch)
    finish = data.Run.finish

    def finish_alike(run, test):
        for name, tensor in run.model.state_dict().items():
            first = data.from_first_process(tensor.clone())
            assert torch.equal(tensor, first), f"{run.name}: {name} differs"
        finish(run, test)
    monkeypatch.setattr(data.Run, "finish", finish_alike)
    for name, more in flags.items():
        train(name, corpus, f"{out}/{name}", "--batch", 7, *more.split(), steps=3, eval_every=9)
    MODULES["lstm"].main(["--out", f"{out}/lstm", "--resume", "--steps", "5"])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
def test_two_processes_do_what_one_does(brief, tmp_path, monkeypatch):
    command = [*TORCHRUN, __file__, brief, tmp_path / "two"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as two:
        try:
            trainings(EXACT, brief, tmp_path / "one", monkeypatch)
            said, errors = two.communicate(timeout=300)
        finally:
            two.terminate()
    assert two.returncode == 0, errors
    assert said.count("test: ") == 6  # five trainings and one resumed, each said once
    for name in EXACT:  # the same losses
        logs = [data.load_checkpoint(tmp_path / count / name / "last.pt")["rows"]
                for count in ("one", "two")]
        assert len(logs[0]) == len(logs[1]) == (2 if name == "lstm" else 1)
        for a, b in zip(*logs):
            a, b = ({k: v for k, v in row.items() if k not in CLOCK} for row in (a, b))
            assert a == pytest.approx(b, rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    every = EXACT | {"vqvae": "", "wgan": ""}
    data.cli(lambda: trainings(every, *sys.argv[1:], pytest.MonkeyPatch()))
