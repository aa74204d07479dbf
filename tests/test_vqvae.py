"""The VQ-VAE: gradients, moving averages, the prior's likelihood, sampling."""

import itertools
import sys

import pytest
import torch

import data
import vqvae


def small(**options):
    torch.manual_seed(0)
    return vqvae.VQVAE(**dict(window=32, codebook=16, codes=4, dim=8, hidden=64, prior_hidden=32, dropout=0.0) | options)


def trained(batch, steps=60, **options):
    """A small codec whose codebooks stand."""
    model = small(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*batch)[0].backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def model(batch):
    return trained(batch, 250)


def test_gradients_pass_the_quantiser_straight_through(batch):
    model = trained(batch, 5)
    z = model.vectors(batch[0]).detach().requires_grad_()
    _, entries = model.quantize(z)
    straight = z + (entries - z).detach()
    assert torch.allclose(straight, entries, atol=1e-6)
    weights = torch.randn_like(straight)
    (straight * weights).sum().backward()
    assert torch.equal(z.grad, weights)  # as if the decoder had read z


def test_commitment_pulls_the_encoder_alone(batch):
    model = trained(batch, 5)
    model.train()
    model.beta = 1.0
    assert not {"codebook", "counts", "sums"} & {name for name, _ in model.named_parameters()}
    before = model.codebook.clone()
    loss, parts = model(*batch)
    for p in model.decoder.parameters():
        p.requires_grad_(False)
    loss.backward()
    assert parts["commitment"] > 0 and model.cells.grad.abs().sum() > 0 and not torch.equal(before, model.codebook)


def test_moving_averages_follow_what_chose_an_entry():
    model = small(codes=1, codebook=2, dim=2, decay=0.5).train()
    model.codebook.copy_(torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]))
    model.counts.fill_(4.0)
    model.sums.copy_(model.codebook * 4)
    z = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[9.0, 9.0]], [[100.0, 100.0]]])
    codes, entries = model.quantize(z)
    model.follow(z, codes, entries, torch.tensor([1.0, 1.0, 1.0, 0.0]))  # the last is padding
    assert codes[:, 0].tolist() == [0, 0, 1, 1] and entries[0, 0].tolist() == [0, 0]
    # N <- (4 + 2) / 2, m <- (0 + [4, 0]) / 2, e = m / N;  N <- (4 + 1) / 2, m <- ([40, 40] + [9, 9]) / 2
    assert torch.allclose(model.codebook[0], torch.tensor([[2 / 3, 0.0], [9.8, 9.8]]), atol=1e-3)


def test_codebooks_start_from_data_and_dead_entries_restart(batch):
    model = small(decay=0.9).train()
    model(*batch)
    z = model.vectors(batch[0])
    model.codebook[:, 3] = 1e6  # nothing will ever choose it
    for _ in range(120):
        model(*batch)
    assert (model.codebook.abs() < 1e3).all()
    assert torch.cdist(model.codebook, z.transpose(0, 1)).min(-1).values.median() < z.std()


def test_padding_counts_nowhere(batch, model):
    frames, mask = batch
    louder = torch.where(mask[..., None] > 0, frames, torch.rand_like(frames).round())
    for a, b in zip(model.bound(frames, mask), model.bound(louder * mask[..., None], mask)):
        assert torch.equal(a, b)
    short = model.nll(frames[-2:-1, :8], mask[-2:-1, :8])
    assert torch.allclose(short, model.nll(frames, mask)[-2:-1], atol=1e-3)
    states = []
    for padded in (frames, torch.cat([frames, torch.zeros_like(frames)], 1)):
        copy = small()
        copy.load_state_dict(model.state_dict())
        copy.train()
        torch.manual_seed(1)
        copy(padded, torch.cat([mask, torch.zeros_like(mask)], 1)[:, :padded.shape[1]])
        states.append(copy.counts)
    assert torch.allclose(*states, atol=1e-4)


@pytest.mark.parametrize("context", [0, 2])
def test_prior_sums_to_one(context):
    model = small(codebook=3, codes=3, context=context).double().eval()
    past = torch.randint(3, (1, 2, 3))
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))[:, None]  # 27 patterns
    sequences = torch.cat([past.expand(27, -1, -1), every], 1)
    assert model.prior_nll(sequences)[:, -1].neg().exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("context", [0, 4])
def test_prior_does_not_look_ahead(context):
    model = small(context=context).double().eval()
    codes = torch.randint(16, (2, 8, 4))
    before = model.prior_nll(codes)
    changed = codes.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 16
    after = model.prior_nll(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 6], after[:, 6])
    if context:  # the paper's: four in, the fifth out
        changed = codes.clone()
        changed[:, 0] = (changed[:, 0] + 1) % 16
        after = model.prior_nll(changed)
        assert torch.equal(before[:, 5:], after[:, 5:]) and not torch.equal(before[:, 4], after[:, 4])
    embedded = model.embed_codes(codes)
    later = embedded.clone()
    later[:, :, 2] += 1
    h = torch.randn(2, 8, 32, dtype=torch.double)
    a, b = model.code_logits(h, embedded), model.code_logits(h, later)
    assert torch.equal(a[:, :, :3], b[:, :, :3]) and not torch.equal(a[:, :, 3], b[:, :, 3])


@pytest.mark.parametrize("context", [0, 3])
def test_sampling_uses_the_prior_that_is_trained(batch, context):
    model = trained(batch, 20, context=context)
    chosen = []
    real = data.sample_symbols
    try:
        def spy(logits, *args):
            symbols = real(logits, *args)
            chosen.append((symbols, logits.log_softmax(-1).gather(-1, symbols[:, None])[:, 0]))
            return symbols
        data.sample_symbols = spy
        rolls = model.sample(3, 32, torch.Generator().manual_seed(0), tries=1)
    finally:
        data.sample_symbols = real
    codes = torch.stack([symbols for symbols, _ in chosen], 1).view(3, 8, 4)
    assert torch.equal(rolls, model.decode(codes))
    assert torch.allclose(model.prior_nll(codes).sum(1), -sum(p for _, p in chosen), atol=1e-3)


def test_more_draws_contradict_themselves_less(batch):
    model = trained(batch, 60)

    def contradictions(tries):
        model.sample(16, 32, torch.Generator().manual_seed(0), top_p=1, tries=tries)
        return [model.contradictions(codes).float().mean().item() for codes in drawn[-8:]]
    drawn, decode = [], model.decode

    def spy(codes):
        drawn.extend(codes.unbind(1)) if codes.shape[1] == 8 else None
        return decode(codes)
    model.decode = spy
    once, often = contradictions(1), contradictions(8)
    assert sum(often) < sum(once)


def test_sample_is_repeatable_and_primed(batch, corpus, model):
    a, b, c = (model.sample(2, 30, torch.Generator().manual_seed(seed), prime=corpus.test[0][:prime])
               for seed, prime in ((0, 21), (0, 21), (1, 0)))
    assert a.shape == (2, 30, 88) and a.dtype == torch.bool and torch.equal(a, b) and not torch.equal(a, c)
    greedy = [model.sample(1, 16, torch.Generator().manual_seed(seed), temperature=0) for seed in (0, 1)]
    assert torch.equal(*greedy)


def test_the_bound_is_the_sum_of_its_halves(batch, model):
    prior, decoder = model.bound(*batch)
    assert torch.equal(model.nll(*batch), prior + decoder) and (prior > 0).all() and (decoder > 0).all()
    figures = vqvae.evaluate(model, [frames[:int(n)].numpy() > 0 for frames, n in zip(batch[0], batch[1].sum(1))])
    model.eval()
    total = batch[1].sum().item()
    assert figures["nll"] == pytest.approx(model.nll(*batch).sum().item() / total, rel=1e-4)
    assert figures["nll"] == pytest.approx(figures["prior_nll"] + figures["reconstruction"])


def test_one_batch_can_be_learnt_by_heart(batch):
    model = trained(batch, 200, codes=8, codebook=32, hidden=256)
    rebuilt = model.decode(model.encode(batch[0])) & (batch[1][..., None] > 0)
    assert (rebuilt == (batch[0] > 0)).float().mean() > 0.995
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss, _ = model.prior_loss(*batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.3


@pytest.mark.parametrize("flags, says", [(["--codebook", "0"], "--codebook"), (["--codebook", "-1"], "--codebook"),
                                         (["--codebook", "x"], "--codebook"), (["--codes", "9"], "--codes"),
                                         (["--window", "30"], "--window 30"), (["--data", "nowhere"], "nowhere")])
def test_bad_flags(monkeypatch, capsys, tmp_path, flags, says):
    monkeypatch.setattr(sys, "argv", ["vqvae.py", "--out", str(tmp_path / "run"), *flags])
    with pytest.raises(SystemExit) as stop:
        data.cli(vqvae.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and said.count("\n") == 1 and not (tmp_path / "run").exists()
