"""vqvae.py: gradients around the quantiser, the moving codebook, what the prior reads."""

import pytest
import torch

import data
import vqvae
from conftest import small, train


def watched(**options):
    """A small model, and what its quantiser gets and gives: z (B, N, C, D), k, entries."""
    model, seen = small("vqvae", **options), []
    model.quantizer.register_forward_hook(lambda _, z, out: seen.append((z[0], *out)))
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
        model.quantizer.forward = lambda *_: (k, (codebook + step * slope / slope.norm())[k])
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


@torch.no_grad()
def test_samples_are_what_the_decoder_says_of_codes_drawn(monkeypatch):
    """But a piece whose kind does not pause has no silent frame."""
    model, drawn, real = small("vqvae"), [], data.sample_symbols
    model.kinds[:24] = 0
    monkeypatch.setattr(data, "sample_symbols", lambda logits, *args, **more: (
        drawn.append(real(logits, *args, **more)), drawn[-1])[1])
    roll = model.sample(3, 20, torch.Generator().manual_seed(0))
    assert torch.equal(model.decode(torch.stack(drawn[1:], -1).unflatten(1, (10, 4))), roll)
    model.decoder[0].out[-1].bias[::vqvae.STEPS] += 1e3  # it would rather rest
    assert not model.sample(3, 20).any()
    model.kinds = model.kinds.flip(0)
    assert model.sample(3, 20).any(-1).all()


def test_kinds_have_the_chances_of_training_pieces(brief, tmp_path, no_music):
    train("vqvae", brief, tmp_path, "--force")
    held = data.load_checkpoint(tmp_path / "model.pt")["parts"]["model"]["kinds"]
    pieces = [data.kind(torch.from_numpy(piece)) for piece in data.load_corpus(brief).train]
    assert torch.allclose(held, 0.1 + torch.stack(pieces).bincount(minlength=48))


@torch.no_grad()
def test_the_kind_that_fits_bounds_what_all_kinds_together_say(batch, monkeypatch):
    model, (frames, mask) = small("vqvae"), batch
    model.kinds.uniform_(0.1, 9)
    bound, fits, every = -model.nll(frames, mask), data.kind(frames, mask), []
    for kind in range(48):
        monkeypatch.setattr(data, "kind", lambda *_: torch.full((len(frames),), kind))
        every.append(-model.nll(frames, mask))
    assert (torch.stack(every).logsumexp(0) > bound - 1e-3).all()
    assert torch.allclose(torch.stack(every).gather(0, fits[None])[0], bound, rtol=1e-5)


@torch.no_grad()
def test_the_prior_reads_codes_of_all_patterns_before(batch):
    model, _ = watched()
    frames, mask = batch[0][:2], torch.ones(2, 32)
    k, terms = model.terms(frames, mask)
    other = k.clone()
    other[:, 5] = (k[:, 5] + 1) % 16
    model.quantizer.forward = lambda *_: (other, model.quantizer.entries[other])
    changed = (model.terms(frames, mask)[1]["prior"] != terms["prior"]).any(0)
    assert changed[5:].all() and not changed[:5].any()
