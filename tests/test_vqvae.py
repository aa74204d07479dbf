"""The VQ-VAE: its gradients, moving averages, the bound, the prior's probabilities, sampling."""

import itertools
import sys

import pytest
import torch

import data
import vqvae


def small(**options):
    torch.manual_seed(0)
    sizes = dict(window=32, codebook=16, dim=8, hidden=32, prior_hidden=32, dropout=0.0)
    return vqvae.VQVAE(**sizes | options)


def trained(batch, steps, **options):
    """A small codec and its prior after so many steps each, and their last losses."""
    model, losses = small(**options), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for loss_of in (model, model.prior_loss):
        for _ in range(steps):
            loss, parts = loss_of(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses |= parts
    return model.eval(), losses


@pytest.fixture(scope="module")
def model(batch):
    """Trained for a moment, so that codes and notes are not random."""
    return trained(batch, 20)[0]


def test_straight_through_and_stop_gradient(batch, model, monkeypatch):
    """The decoder's gradient reaches the encoder as it is; the commitment's reaches nothing else."""
    kept, vectors, reconstruction = {}, model.vectors, model.reconstruction
    monkeypatch.setattr(model, "vectors", lambda *a: kept.setdefault("z", vectors(*a)))
    monkeypatch.setattr(model, "reconstruction",
                        lambda entries, *a: reconstruction(kept.setdefault("read", entries), *a))
    monkeypatch.setattr(model, "beta", 0.0)
    loss, _ = model(*batch)
    k, entries = model.quantizer(kept["z"])
    assert torch.allclose(kept["read"], entries, atol=1e-5) and not torch.equal(kept["z"], entries)
    assert torch.equal(entries, model.quantizer.entries[k])
    grads = torch.autograd.grad(loss, (kept["read"], kept["z"]))
    assert grads[0].abs().sum() > 0 and torch.equal(*grads)
    monkeypatch.setattr(model, "vectors", vectors)
    monkeypatch.setattr(model, "reconstruction", lambda entries, *a: torch.zeros(batch[1].shape))
    monkeypatch.setattr(model, "beta", 1.0)
    model.zero_grad()
    model(*batch)[0].backward()
    drawn = {name.split(".")[0] for name, p in model.named_parameters()
             if p.grad is not None and p.grad.abs().sum() > 0}
    assert drawn == {"encoder"}


def test_the_nearest_entry_is_the_nearest(batch, model):
    z = model.vectors(*model.read(batch[0])[:2])
    k, entries = model.quantizer(z)
    distance = (z[..., None, :] - model.quantizer.entries).norm(dim=-1)  # (B, N, C, K)
    assert torch.allclose(distance.gather(-1, k[..., None])[..., 0], distance.amin(-1), atol=1e-4)
    assert torch.allclose((z - entries).norm(dim=-1), distance.amin(-1), atol=1e-4)


def test_moving_averages_follow_the_formula():
    quantizer = vqvae.Quantizer(codebook=2, dim=2, decay=0.5, restart=0)
    quantizer.entries.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    quantizer.counts.fill_(4.0)
    quantizer.sums.copy_(quantizer.entries * 4)
    z = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0], [100.0, 100.0]])
    k, _ = quantizer(z)
    assert k.tolist() == [0, 0, 1, 1]
    quantizer.update(z, torch.tensor([0, 0, 1, -1]), torch.ones(4))  # the last is padding
    # N <- (4 + 2) / 2, m <- ([0, 0] + [4, 0]) / 2;  N <- (4 + 1) / 2, m <- ([40, 40] + [9, 9]) / 2
    assert torch.allclose(quantizer.entries, torch.tensor([[2 / 3, 0.0], [9.8, 9.8]]))


@pytest.mark.parametrize("restart", [0.1, 0])
def test_dead_entries_restart_unless_told_not_to(batch, restart):
    model = small()
    quantizer = model.quantizer
    quantizer.restart, quantizer.decay = restart, 0.9
    model(*batch)
    quantizer.entries[3] = 1e6  # nothing chooses it
    quantizer.sums[3] = 1e6 * quantizer.counts[3]
    for _ in range(50):
        model(*batch)
    assert (quantizer.entries[3].abs() < 1e3).all() == (restart > 0)


def test_the_bound_is_prior_plus_reconstruction(batch, model):
    frames, mask = batch
    prior, reconstruction, _ = model.halves(frames, mask)
    assert (prior.sum(1) > 0).all() and (reconstruction.sum(1) > 0).all()
    assert not reconstruction[mask == 0].any()
    assert torch.equal(model.nll(frames, mask), prior.sum(1) + reconstruction.sum(1))
    pieces = [x[:int(n)].numpy() > 0 for x, n in zip(frames, mask.sum(1))]
    figures = vqvae.evaluate(model, pieces)
    model.eval()
    nll = model.nll(frames, mask).sum().item() / mask.sum().item()
    assert figures["nll"] == pytest.approx(nll, rel=1e-4)
    assert figures["nll"] == pytest.approx(figures["prior_nll"] + figures["reconstruction"])
    assert 0 < figures["note_f1"] <= 1 <= figures["codebook_perplexity"] <= 16


def fix_codes(monkeypatch, model, k):
    """Codes k (B, N, C) instead of the nearest ones."""
    monkeypatch.setattr(model.quantizer, "forward", lambda z: (k, model.quantizer.entries[k]))


def test_it_bounds(batch, monkeypatch):
    """-log of the sum over all codes of p(k) p(x | k) is below the bound."""
    model = small(codebook=3, pattern=4).eval()
    frames, mask = batch[0][:1, :4], torch.ones(81, 4)
    bound = model.nll(frames, mask[:1]).item()
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))[:, None]  # 81 patterns
    fix_codes(monkeypatch, model, every)
    prior, reconstruction, _ = model.halves(frames.expand(81, -1, -1), mask)
    joint = prior.sum(1) + reconstruction.sum(1)
    assert -torch.logsumexp(-joint, 0).item() < bound
    # The notes being the same, not chosen after the codes, the prior's probabilities sum to one.
    assert prior.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("voices", [1, 2, 3])
def test_the_decoders_probabilities_sum_to_one(batch, voices, monkeypatch):
    """Over all frames of a keyboard of four symbols, whatever the code."""
    monkeypatch.setattr(data, "SYMBOLS", 5)
    monkeypatch.setattr(data, "KEYS", 4)
    model = small(voices=voices, codes=1, pattern=1, window=8).eval()
    model.middle.fill_(2)
    frames = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))[:, None]
    frames = frames[frames.sum((1, 2)) <= voices]
    entries = model.quantizer.entries[2].expand(len(frames), 1, 1, -1)
    p = model.reconstruction(entries, *model.read(frames)).neg().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("context", [0, 2])
def test_nothing_looks_ahead(batch, context, monkeypatch):
    model = small(context=context).eval()
    frames = batch[0][:2]
    k = model.halves(frames, torch.ones(2, 32))[2]

    def losses(frames, k):
        with monkeypatch.context() as patch:
            fix_codes(patch, model, k)
            return model.halves(frames, torch.ones(2, 32))[:2]

    before = losses(frames, k)
    changed = frames.clone()
    changed[:, 10] = changed[:, 10].roll(1, -1)
    after = losses(changed, k)
    assert torch.equal(before[1][:, :10], after[1][:, :10])
    assert torch.equal(before[0][:, :5], after[0][:, :5])
    assert not torch.equal(before[1][:, 10], after[1][:, 10])
    k = k.clone()
    k[:, 5, 3] = (k[:, 5, 3] + 1) % 16
    after = losses(frames, k)[0]
    assert torch.equal(before[0][:, :5], after[:, :5])
    assert torch.equal(before[0][:, 6:], after[:, 6:]) is False
    assert torch.equal(before[0][:, 5 + context + 1:], after[:, 5 + context + 1:]) == (context > 0)


def test_padding_changes_nothing(batch, model):
    frames, mask = batch
    short = model.nll(frames[-2:-1, :8], mask[-2:-1, :8])
    assert torch.allclose(short, model.nll(frames, mask)[-2:-1], atol=1e-3)
    counts = []
    for n in (32, 64):
        copy = small().train()
        padding = torch.zeros(len(frames), n - 32, 88)
        copy(torch.cat([frames, padding], 1), torch.cat([mask, padding[..., 0]], 1))
        counts.append(copy.quantizer.counts)
    assert torch.allclose(*counts, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"context": 2}, {"codes": 2}, {"codes": 1, "pattern": 4}])
def test_sampling_draws_from_what_training_scores(options, monkeypatch):
    model, drawn, heard = small(**options).eval(), [], []
    real, write = data.sample_symbols, model.write

    def spy(logits, *args):
        symbols = real(logits, *args)
        chosen = logits.log_softmax(-1).gather(-1, symbols[..., None])
        drawn.append(chosen.flatten(1).sum(1))
        return symbols

    monkeypatch.setattr(data, "sample_symbols", spy)
    monkeypatch.setattr(model, "write", lambda *a: heard.append(write(*a)) or heard[-1])
    roll = model.sample(3, 16, torch.Generator().manual_seed(0), top_p=1.0)
    k = torch.stack([step[0] for step in heard], 1)
    assert torch.equal(model.read(roll)[0], torch.stack([step[1] for step in heard], 1))
    fix_codes(monkeypatch, model, k)
    assert torch.allclose(model.nll(roll.float(), torch.ones(3, 16)), -sum(drawn), atol=1e-2)


def test_samples_are_repeatable_and_primed(corpus, model):
    a, b, c = (model.sample(2, 31, torch.Generator().manual_seed(0), prime=prime)
               for prime in (corpus.test[0][:21], corpus.test[0][:21], None))
    assert a.shape == (2, 31, 88) and a.dtype == torch.bool
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_one_batch_can_be_learnt_by_heart(batch):
    model, parts = trained(batch, 50, codebook=64, hidden=64)
    assert parts["prior"] < 4 and parts["reconstruction"] < 0.5
    codes, roll = model.rebuild(batch[0])
    assert torch.equal(roll, model.decode(codes)) and torch.equal(codes, model.encode(batch[0]))
    hits = roll & (batch[0] > 0) & (batch[1][..., None] > 0)
    assert hits.sum() / batch[0].sum() > 0.8


def test_the_papers_setting_trains(scores, tmp_path, monkeypatch):
    monkeypatch.setattr(data.Run, "finish", lambda run, test: figures.update(test))
    figures = {}
    vqvae.main(f"--data {scores} --out {tmp_path / 'run'} --codes 1 --pattern 4 --window 256 "
               "--context 4 --steps 1 --prior-steps 1 --batch 2 --prior-hidden 32".split())
    assert 0 < figures["prior_nll"] < figures["nll"]


@pytest.mark.parametrize("flags, says", [("--codebook 0", "--codebook"), ("--codes 3", "--codes"),
                                         ("--window 31", "--window"), ("--data nowhere", "nowhere")])
def test_bad_flags(monkeypatch, capsys, tmp_path, flags, says):
    argv = ["vqvae.py", "--out", str(tmp_path / "run"), *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        data.cli(vqvae.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and said.count("\n") == 1
