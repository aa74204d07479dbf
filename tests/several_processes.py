"""Brief trainings in each process of torchrun, for test_processes.py:
torchrun --nproc_per_node=2 tests/several_processes.py DATA OUT"""

import importlib
import sys

import pytest
import torch

from conftest import silence, train  # first: it finds data.py
import data

# Where nothing is random but the batch, a share of it computes what it does in the whole batch.
EXACT = {"lstm": "--dropout 0", "vae": "--latent 0 --dropout 0 --drop 0",
         "attn_lstm": "--dropout-input 0 --dropout 0 --dropout-heads 0"}


def trainings(flags, corpus, out):
    """Train these models, {name: flags}, and resume lstm; in all processes they end alike."""
    silence(pytest.MonkeyPatch())
    finish = data.Run.finish

    def finish_alike(run, test):
        for name, tensor in run.model.state_dict().items():
            first = data.from_first_process(tensor.clone())
            assert torch.equal(tensor, first), f"{run.name}: {name} differs"
        finish(run, test)
    data.Run.finish = finish_alike
    for name, more in flags.items():
        train(name, corpus, f"{out}/{name}", "--batch", 7, *more.split(), steps=3, eval_every=9)
    importlib.import_module("lstm").main(["--out", f"{out}/lstm", "--resume", "--steps", "5"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    data.cli(lambda: trainings(EXACT | {"vqvae": "", "wgan": ""}, *sys.argv[1:]))
