"""Brief trainings in each process of torchrun, for test_processes.py:
torchrun --nproc_per_node=2 tests/several_processes.py DATA OUT"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attn_lstm  # noqa: E402
import data  # noqa: E402
import lstm  # noqa: E402
import vae  # noqa: E402
import vqvae  # noqa: E402
import wgan  # noqa: E402

# Where nothing is random but the batch, a share of it computes what it does in the whole batch.
EXACT = ((lstm, ["--dropout", "0"]), (attn_lstm, ["--dropout-input", "0", "--dropout-lstm", "0", "--dropout", "0"]),
         (vae, ["--latent", "0", "--dropout", "0", "--drop", "0"]))
RANDOM = ((vqvae, ["--prior-steps", "2", "--prior-hidden", "16"]), (wgan, []))


class Cut(Exception):
    pass


def main():
    folder, out = sys.argv[1:]
    log, finish = data.Run.log, data.Run.finish

    def train(module, flags, name=None):
        module.main(["--data", folder, "--out", os.path.join(out, name or module.__name__), "--steps", "4", "--batch", "7",
                     "--eval-every", "2", "--hidden", "16", "--window", "32", "--device", "cpu", *flags])

    def finish_alike(run, test):
        for name, tensor in run.model.state_dict().items():
            assert torch.equal(tensor, data.from_first_process(tensor.clone())), f"{run.name}: {name} differs"
        finish(run, test)

    def log_and_cut(run, *args, **kwargs):
        log(run, *args, **kwargs)
        raise Cut

    torch.set_num_threads(1)
    data.Run.finish = finish_alike
    data.write_music = data.draw_curves = lambda *_, **__: None  # slow, and no part of what is tried here
    for module, flags in EXACT if data.processes()[1] == 1 else EXACT + RANDOM:
        train(module, flags)
    train(vae, [], "whole")
    data.Run.log = log_and_cut
    try:
        train(vae, [], "cut")
    except Cut:
        data.Run.log = log
        data.wait_for_all()
        train(vae, ["--resume"], "cut")


if __name__ == "__main__":
    data.cli(main)
