"""vae.py and hvae.py: the bounds, the KL, the prior of each share of z, what the decoder reads."""

import math

import pytest
import torch

import vae
from conftest import CLASSES, fit, small

pytestmark = pytest.mark.parametrize("name", ["vae", "hvae"])


def wide(name, **more):
    """A small model in double precision with a wide posterior, far from the prior."""
    model = small(name, **more).double()
    model.encode.out.weight.data.mul_(4)
    torch.nn.init.zeros_(model.encode.out.bias)
    return model


@pytest.fixture
def real(batch):
    return [x.double() for x in batch]


def normal(mean, logvar):
    return torch.distributions.Normal(mean, (logvar / 2).exp())


@torch.no_grad()
def test_bounds_of_a_likelihood_that_can_be_summed(name, real):
    """-log p(x), summed over a grid of z, is below the bound."""
    model, n = wide(name, latent=2, window=8, segment=4), 300
    frames, mask = (x[:3, :8] for x in real)
    grid = torch.cartesian_prod(*[torch.linspace(-5, 5, 31).double()] * 2)  # two shares of z
    many = [x[:, None].expand(-1, len(grid), *x.shape[1:]).flatten(0, 1) for x in (frames, mask)]
    nll, m, logs = model.score(*many, grid.repeat(3, 1))
    log_p = normal(m, logs).log_prob(grid.repeat(3, 1)).sum(1) - nll.sum(1) + 2 * math.log(1 / 3)
    exact = -log_p.view(3, -1).logsumexp(1)
    bound = model.nll(frames.repeat(n, 1, 1), mask.repeat(n, 1)).view(n, 3)
    assert (bound.mean(0) > exact - 0.1).all() and (bound.mean(0) > exact + 0.1).any()


@torch.no_grad()
def test_kl_is_the_closed_form(name, real):
    model = wide(name)
    torch.manual_seed(1)
    kl, q = model.terms(*real)[1], normal(*model.encode(*real))
    torch.manual_seed(1)
    _, m, logs = model.score(*real, q.mean + q.stddev * torch.randn_like(q.mean))
    assert torch.allclose(kl, torch.distributions.kl_divergence(q, normal(m, logs)))
    assert not m[:, :2].any() and not logs[:, :2].any() and m.any()  # the first share's: N(0, I)


@torch.no_grad()
def test_the_prior_knows_only_what_is_written_before(name, monkeypatch):
    """The shares of z that are drawn while a window is written have the mean and deviation that
    training scores them with; neither knows the share nor its segment's frames."""
    model, shares, first = wide(name, drop=0.0), [], torch.randn(4, 2).double()
    noise, plan = [first], model.plan

    def normal(mean, deviation, generator=None):
        noise.append(torch.randn(mean.shape).double())
        return mean + deviation * noise[-1]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "normal", normal)
        patch.setattr(model, "plan", lambda z: shares.append(z) or plan(z))
        roll = model.decode(first, temperature=0).double()
    z, whole = shares[-1].flatten(1), torch.ones(4, 32)
    _, m, logs = model.score(roll, whole, z)
    noise = torch.cat([part.view(4, 2) for part in noise], 1)
    assert torch.allclose((z - m) / (logs / 2).exp(), noise) and z.shape == (4, 8)
    for u in range(1, 4):
        other, changed = z.clone(), roll.clone()
        other[:, 2 * u:] += 1
        changed[:, 8 * u:] = changed[:, 8 * u:].roll(1, -1)
        again = model.score(changed, whole, other)[1]
        assert torch.equal(again[:, :2 * u + 2], m[:, :2 * u + 2])
    assert torch.equal(roll > 0, model.decode(z, temperature=0))


@torch.no_grad()
def test_windows_told_by_z_alone_read_nothing(name, real):
    model, z, seen = wide(name), torch.randn(8, 8).double(), torch.arange(8)[:, None, None] >= 3
    other = real[0].clone()
    other[:, 4] = real[0][:, 4].roll(1, -1)
    before, after = (model.score(x, torch.ones(8, 32), z, seen)[0] for x in (real[0], other))
    changed = (before != after)[:, 5:].any(1)
    assert not changed[:3].any() and changed[3:].all()


def test_gradients_and_a_loss_as_printed(name, real):
    for more in ({}, {"features": 0, "feed": "softmax", "drop": 0.0}, {"rec_mean": True}):
        model = wide(name, **more).train()
        loss, parts = model(*real)
        kl, nll = parts["kl"] * len(real[0]) / real[1].sum(), parts["reconstruction"]
        if model.rec_mean:  # the study's code
            kl, nll = parts["kl"], nll / 4
        assert torch.isclose(loss, nll + model.beta * kl)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.numel())
        assert model.encode.out.weight.grad.abs().sum() > 0  # through z


def test_a_few_steps_put_the_music_into_z(name, batch):
    torch.manual_seed(0)
    model = CLASSES[name](window=32, segment=8, hidden=64, latent=64, features=32, dropout=0.0,
                          drop=0.5, beta=0.05)
    fit(lambda: model(*batch)[0], model, 60, 1e-2)
    pieces = [frames[mask > 0].numpy() > 0 for frames, mask in zip(*batch)]
    figures = vae.evaluate(model, pieces)
    assert figures["note_f1"] > 0.75 and figures["kl"] > 10 and figures["used_dims"] > 10
