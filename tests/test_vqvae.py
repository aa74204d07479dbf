"""vqvae.py: gradients around the quantiser, the moving codebook, what the prior reads."""

import pytest
import torch

import data
from conftest import small, train


def watched(**options):
    """A small model, and what its quantiser gets and gives: z (B, N, C, D), k, entries."""
    model, seen = small("vqvae", **options), []
    model.quantizer.register_forward_hook(lambda _, z, out: seen.append((*z, *out)))
    return model, seen


def test_straight_through_and_stop_gradient(batch):
    """The encoder gets the decoder's gradient at the entries as it is, and with --beta the
    commitment's, which nothing else gets."""
    model, seen = watched(beta=0.0)
    codebook = model.quantizer.entries.clone()

    def gradients():
        loss, weights = model(*batch)[0], [*model.decoder.parameters()]
        return torch.autograd.grad(loss, [seen[-1][0], *weights], materialize_grads=True)
    got, *decoder = gradients()
    z, k, entries = seen[0]
    assert torch.equal(entries, codebook[k]) and not entries.requires_grad
    slope = torch.zeros_like(codebook).index_add(0, k.flatten(), got.flatten(0, -2))

    def loss_at(step):  # of entries moved along the gradient that came back
        model.quantizer.forward = lambda _: (k, (codebook + step * slope / slope.norm())[k])
        return model(*batch)[0].item()
    rise = (loss_at(0.01) - loss_at(-0.01)) / 0.02
    assert rise == pytest.approx(slope.norm().item(), rel=0.01)
    del model.quantizer.forward
    model.beta = 2.0
    committed, *again = gradients()
    real = batch[1][:, ::model.pattern, None, None] / batch[1].sum()
    assert torch.allclose(committed - got, 2 * 2.0 * (z - entries) * real, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(decoder, again))


def test_the_codebook_follows_by_moving_averages_of_what_is_real(batch):
    """The nearest is chosen. e <- 0.9 e + 0.1 mean z, of the z that chose it."""
    model, seen = watched()
    book = model.train().quantizer
    entries = book.entries.clone()
    model(*batch)
    real = batch[1][:, ::model.pattern] > 0  # padding counts for nothing
    z, k = seen[0][0][real].flatten(0, 1), seen[0][1][real].flatten()
    assert torch.equal(torch.cdist(z, entries).argmin(1), k)
    for code in k.unique():
        want = 0.9 * entries[code] + 0.1 * z[k == code].mean(0)
        assert torch.allclose(book.entries[code], want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_dead_entries_start_again_beside_live_ones(batch):
    model, seen = watched()
    model.train().quantizer.entries[3] = 1e6  # nothing chooses it
    model(*batch)
    real = batch[1][:, ::model.pattern] > 0
    z, k = seen[0][0][real].flatten(0, 1), seen[0][1][real].flatten()
    means = torch.stack([z[k == code].mean(0) for code in k.unique()])
    apart = (model.quantizer.entries[3] - means).norm(dim=1).min()
    assert 0 < apart < 0.1 * 2 * means.shape[1] ** 0.5


def test_only_the_prior_learns_once_the_codes_stand(brief, tmp_path, no_music, monkeypatch):
    states, log = [], data.Run.log

    def watch(run, *args, **more):
        states.append({name: x.clone() for name, x in run.model.state_dict().items()})
        log(run, *args, **more)
    monkeypatch.setattr(data.Run, "log", watch)
    train("vqvae", brief, tmp_path, "--codebook", 16, "--force", steps=4)
    first, later, last = (states[i] for i in (0, 1, -1))  # after 2, 4 and 8 steps
    prior = {"listen", "lstm", "prior"}
    for a, b, parts in ((first, later, {"encoder", "quantizer", "decoder"} | prior),
                        (later, last, prior)):
        assert {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])} == parts


@torch.no_grad()
def test_the_prior_reads_codes_of_all_patterns_before(batch):
    model, _ = watched()
    frames, mask = batch[0][:2], torch.ones(2, 32)
    k, terms = model.terms(frames, mask)
    other = k.clone()
    other[:, 5] = (k[:, 5] + 1) % 16
    model.quantizer.forward = lambda _: (other, model.quantizer.entries[other])
    changed = (model.terms(frames, mask)[1]["prior"] != terms["prior"]).any(0)
    assert changed[5:].all() and not changed[:5].any()
