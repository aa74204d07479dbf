"""The recurrent VAEs: the KL and the bounds, what the decoder depends on, padding, batches, and runs that are resumed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import hvae
import vae
from conftest import ROOT

WIRINGS = {"default": dict(drop=0.0), "blind": dict(drop=1.0),
           "paper": dict(features=0, feed="softmax", drop=0.0, free_nats=0.0)}


def small(kind, wiring="default", **options):
    torch.manual_seed(0)
    sizes = dict(hidden=24, latent=6, features=0 if wiring == "paper" else 5, dropout=0.0)
    return getattr({"VAE": vae, "HVAE": hvae}[kind], kind)(**sizes | WIRINGS[wiring] | options).eval()


@pytest.fixture(params=[(kind, wiring) for kind in ("VAE", "HVAE") for wiring in WIRINGS], ids="-".join)
def model(request):
    return small(*request.param)


@pytest.fixture(params=["VAE", "HVAE"])
def kind(request):
    return request.param


def test_kl_is_the_closed_form_and_what_monte_carlo_finds(kind, batch):
    model = small(kind)
    mu, logvar = model.encode(*batch)
    _, kl = model.posterior(*batch)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    p = torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose(kl, torch.distributions.kl_divergence(q, p), atol=1e-5)
    z = q.sample((20_000,))
    ratio = q.log_prob(z) - p.log_prob(z)
    assert ((kl - ratio.mean(0)).abs() < 6 * ratio.std(0) / 20_000 ** 0.5 + 1e-5).all() and kl.max() > 0.001


def test_weights_are_log_p_of_x_and_z_over_q(kind, batch):
    """With one decoder for all z, log p(x, z) / q(z | x) averages to log p(x), whatever the encoder says."""
    model = small(kind, latent=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("first", "views", "context.")) or name == "conductor.weight_ih_l0":
                parameter.zero_()  # z no longer reaches the decoder
    exact = -model.frame_nll(*batch, torch.zeros(len(batch[0]), 1)).sum(1)
    weights = model.log_weights(batch[0][:4], batch[1][:4], 400)
    assert torch.allclose(weights.logsumexp(0) - np.log(400), exact[:4], atol=0.1)


@torch.no_grad()
def test_the_bound_is_not_below_the_importance_weighted_one(model, batch):
    torch.manual_seed(1)
    weights = model.log_weights(*batch, 64)
    tighter = np.log(64) - weights.logsumexp(0)
    assert (-weights.mean(0) >= tighter - 1e-3).all()
    bound = torch.stack([model.nll(*batch) for _ in range(64)]).mean(0)
    assert (bound >= tighter - 0.1).all()
    assert torch.allclose(bound, -weights.mean(0), rtol=0.02)  # two estimates of one number


@torch.no_grad()
def test_the_decoder_listens_to_z_and_not_to_the_future(model, batch):
    frames, mask = batch[0][:2], torch.ones(2, 32)
    z = torch.randn(2, 6)
    nll = model.frame_nll(frames, mask, z)
    assert not torch.allclose(nll, model.frame_nll(frames, mask, z + 1))
    later = frames.clone()
    later[:, 20] = later[:, 20].roll(3, -1)
    changed = (model.frame_nll(later, mask, z) - nll).abs().amax(0) > 1e-6
    assert changed[20] and not changed[:20].any()
    assert changed[21:].any() == (model.feed == "teacher" and model.drop < 1)  # the frames after it have read it


def test_segments_start_afresh_from_the_frame_before(batch):
    model = small("HVAE", "default")
    frames, mask, z = batch[0][:1], torch.ones(1, 32), torch.randn(1, 6)
    changed = frames.clone()
    changed[:, 9] = changed[:, 9].roll(3, -1)
    moved = (model.frame_nll(changed, mask, z) - model.frame_nll(frames, mask, z))[0].abs() > 1e-6
    assert moved.nonzero().flatten().tolist() == [9, 10, 11]
    changed = frames.clone()
    changed[:, 11] = changed[:, 11].roll(3, -1)
    moved = (model.frame_nll(changed, mask, z) - model.frame_nll(frames, mask, z))[0].abs() > 1e-6
    assert moved.nonzero().flatten().tolist() == [11, 12, 13, 14, 15]


def test_segments_must_fill_the_window():
    with pytest.raises(data.InputError, match="--segment 5 does not divide --window 32"):
        hvae.HVAE(window=32, segment=5)


@torch.no_grad()
def test_padding_changes_nothing(model, batch):
    frames, mask = batch
    garbage = frames + (1 - mask[..., None]) * torch.randint(0, 2, frames.shape)
    torch.manual_seed(2)
    nll = model.nll(frames, mask)
    torch.manual_seed(2)
    assert torch.equal(nll, model.nll(garbage, mask))
    short = frames[-1:, :20]  # as long as it is: nothing to pad
    mu, logvar = model.encode(short, torch.ones(1, 20))
    padded = model.encode(frames[-1:], mask[-1:])
    assert torch.allclose(mu, padded[0], atol=1e-6) and torch.allclose(logvar, padded[1], atol=1e-6)
    assert torch.allclose(model.frame_nll(short, torch.ones(1, 20), mu),
                          model.frame_nll(frames[-1:], mask[-1:], mu)[:, :20], atol=1e-4)


@torch.no_grad()
def test_a_batch_encodes_and_decodes_as_one_by_one_does(model, batch):
    model, batch = model.double(), [x.double() for x in batch]  # in floats, near ties fall either way
    mu, logvar = model.encode(*batch)
    single = [model.encode(frames[None], mask[None]) for frames, mask in zip(*batch)]
    assert torch.allclose(mu, torch.cat([m for m, _ in single]), atol=1e-5)
    assert torch.allclose(logvar, torch.cat([v for _, v in single]), atol=1e-5)
    rolls = model.decode(mu, temperature=0)
    assert rolls.shape == (8, 32, 88) and rolls.dtype == torch.bool
    assert torch.equal(rolls, torch.cat([model.decode(m, temperature=0) for m, _ in single]))
    assert torch.equal(model.decode(mu, 12, temperature=0), rolls[:, :12])


@torch.no_grad()
def test_decoding_takes_the_steps_that_the_likelihood_scores(model):
    """Among a window's symbols, each decoded one is the likeliest by the logits that frame_nll computes."""
    z, seen, logits = torch.randn(4, 6), [], model.logits

    def spy(*args):
        seen.append(logits(*args))
        return seen[-1]
    model.logits = spy
    rolls = model.decode(z, temperature=0)
    stepped = torch.cat([step for step, _ in seen], 1)  # (4, 32, V, 89)
    seen.clear()
    model.frame_nll(rolls.float(), torch.ones(4, 32), z)
    assert torch.equal(rolls, data.from_voices(stepped.argmax(-1)))
    scored = torch.cat([step for step, _ in seen], 1).view_as(stepped)
    assert torch.allclose(scored, stepped, atol=1e-4)


@torch.no_grad()
def test_samples(model, corpus):
    def draw(seed, **options):
        return model.sample(2, 70, torch.Generator().manual_seed(seed), **options)
    rolls = draw(1)
    assert rolls.shape == (2, 70, 88) and rolls.dtype == torch.bool
    assert torch.equal(rolls, draw(1)) and not torch.equal(rolls, draw(2))
    assert not torch.equal(rolls[0], rolls[1])
    prime = corpus.test[0]
    model.out.weight.mul_(10)  # as after some training: what it reads must matter more than the dice
    for length in (5, 50):
        assert draw(1, prime=prime[:length]).shape == (2, 70, 88)
    if model.feed == "teacher" and model.drop < 1:  # it reads the prime's end
        assert not torch.equal(draw(1, prime=prime), draw(1, prime=corpus.test[1]))
    assert (draw(1, temperature=0.5, top_p=0.9).sum(-1) <= 4).all()


def test_latents_walk_smoothly():
    """walk 0 keeps z; walk 1 draws each window's z anew."""
    model = small("VAE", "blind")
    held = model.sample(1, 32 + 24, torch.Generator().manual_seed(0), temperature=0, walk=0.0)[0]
    assert torch.equal(held[32:], held[8:32])  # a blind decoder says the same of the same z


def test_both_encoders_are_one():
    def encoder(module):
        text = (ROOT / f"{module}.py").read_text()
        return text[text.index("class Encoder"):text.index(f"class {module.upper()}")]
    assert encoder("vae") == encoder("hvae")


def test_free_nats_cost_nothing(kind, batch):
    model = small(kind, free_nats=1e6)
    loss, parts = model(*batch)
    assert torch.isclose(loss, parts["reconstruction"] + 1e6 * len(batch[0]) / batch[1].sum())
    loss.backward()
    assert parts["kl"] > 0 and model.encode.out.weight.grad.abs().sum() > 0
    model = small(kind, rec_mean=True)
    loss, parts = model(*batch)
    assert torch.isclose(loss, parts["reconstruction"] / 4 + parts["kl"])


def test_training_uses_z(kind, batch):
    """A few steps on eight windows: z tells them apart, and the roll rebuilt from it comes close."""
    torch.manual_seed(0)
    model = small(kind, "blind", hidden=64, latent=16, features=16, beta=0.05, free_nats=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model(*batch)[0].backward()
        optimizer.step()
    model.eval()
    rolls = model.decode(model.encode(*batch)[0], temperature=0) * batch[1][..., None]
    f1 = 2 * (rolls * batch[0]).sum() / (rolls.sum() + batch[0].sum())
    assert f1 > 0.8


def run(kind, *flags):
    return subprocess.run([sys.executable, ROOT / f"{kind.lower()}.py", "--eval-every", "2", "--hidden", "16",
                           "--latent", "4", *map(str, flags)], capture_output=True, text=True)


def test_bad_flags_are_one_line(scores, tmp_path):
    done = run("hvae", "--segment", "5", "--data", scores, "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--segment 5" in done.stderr


def test_paper_changes_defaults_alone(scores, tmp_path):
    vae.main(["--paper", "--hidden", "16", "--steps", "1", "--data", str(scores), "--out", str(tmp_path / "run")])
    config = data.load_checkpoint(tmp_path / "run" / "model.pt")["config"]
    assert (config["hidden"], config["latent"], config["features"], config["feed"]) == (16, 32, 0, "softmax")
