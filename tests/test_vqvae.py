"""vqvae.py: gradients around the quantiser, the moving codebook, what the prior reads."""

import pytest
import torch

from conftest import small


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
    """The nearest is chosen. N <- g N + (1 - g) n, m <- g m + (1 - g) sum z, e = m / N."""
    model, seen = watched()
    book = model.train().quantizer
    book.restart, book.decay = 0, 0.7
    counts, sums, entries = book.counts.clone(), book.sums.clone(), book.entries.clone()
    model(*batch)
    real = batch[1][:, ::model.pattern] > 0  # padding counts for nothing
    z, k = seen[0][0][real].flatten(0, 1), seen[0][1][real].flatten()
    assert torch.equal(torch.cdist(z, entries).argmin(1), k)
    chosen = torch.nn.functional.one_hot(k, len(entries)).float()
    counts = 0.7 * counts + 0.3 * chosen.sum(0)[:, None]
    sums = 0.7 * sums + 0.3 * chosen.T @ z
    assert torch.allclose(book.entries, sums / counts, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("restart", [0.1, 0])
@torch.no_grad()
def test_dead_entries_restart_unless_told_not_to(batch, restart):
    model, _ = watched()
    book = model.train().quantizer
    book.restart, book.decay, (frames, mask) = restart, 0.9, (x[:4] for x in batch)
    model(frames, mask)
    book.entries[3] = 1e6  # nothing chooses it
    book.sums[3] = 1e6 * book.counts[3]
    for _ in range(40):
        model(frames, mask)
    assert (book.entries[3].abs() < 1e3).all() == (restart > 0)


@torch.no_grad()
def test_the_prior_reads_codes_of_all_patterns_before(batch):
    model, _ = watched()
    frames, mask = batch[0][:2], torch.ones(2, 32)
    before, _, k = model.halves(frames, mask)
    other = k.clone()
    other[:, 5] = (k[:, 5] + 1) % 16
    model.quantizer.forward = lambda _: (other, model.quantizer.entries[other])
    changed = (model.halves(frames, mask)[0] != before).any(0)
    assert changed[5:].all() and not changed[:5].any()
