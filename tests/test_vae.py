"""vae.py and hvae.py: the bounds, chained voices, what the decoder reads, padding, training."""

import math

import pytest
import torch

import data
import hvae
import vae
from conftest import ROOT

PAPER = dict(features=0, feed="softmax", drop=0.0)


@pytest.fixture(params=[vae.VAE, hvae.HVAE])
def kind(request):
    return request.param


def small(kind, **more):
    """An untrained model whose z matters, in double precision."""
    torch.manual_seed(0)
    sizes = dict(window=32, segment=8, hidden=16, latent=8, features=8, dropout=0.0)
    model = kind(**sizes | more).double().eval()
    with torch.no_grad():
        for weights in (model.encode.out.weight, model.views.weight, *(
                part for head in model.heads.heads for part in (head[0].weight, head[3].weight))):
            weights.mul_(2)
        model.prior[-1].weight.normal_()
        model.encode.out.bias.zero_()  # a wide posterior
    return model


@pytest.fixture
def real(batch):
    """Eight windows of real music in double precision, the last two padded."""
    return batch[0].double(), batch[1].double()


@torch.no_grad()
def test_bounds_of_a_likelihood_that_can_be_summed(kind, real):
    model = small(kind, latent=2, window=8, segment=4)
    frames, mask = real[0][:4, :8], real[1][:4, :8]
    grid = torch.cartesian_prod(*[torch.linspace(-5, 5, 41).double()] * 2)  # two shares of z
    exact = []
    for window in zip(frames, mask):
        nll, m, logs = model.score(*(part.expand(len(grid), *part.shape) for part in window), grid)
        prior = torch.distributions.Normal(m, (logs / 2).exp()).log_prob(grid).sum(1)
        exact.append(-(prior - nll.sum(1) + 2 * math.log(0.25)).logsumexp(0))  # -log p(x)
    exact = torch.stack(exact)
    weights = model.log_weights(frames, mask, 300)
    assert torch.allclose(math.log(300) - weights.logsumexp(0), exact, atol=0.3)
    bound = torch.stack([model.nll(frames, mask) for _ in range(300)])
    assert (bound.mean(0) + weights.mean(0)).abs().max() < 6 * bound.std(0).max() / 300 ** 0.5
    assert (bound.mean(0) > exact - 0.1).all() and (bound.mean(0) > exact + 0.3).any()


@torch.no_grad()
def test_kl_is_the_closed_form(kind, real):
    model = small(kind)
    mu, logvar = model.encode(*real)
    torch.manual_seed(1)
    _, kl, _ = model.terms(*real)
    torch.manual_seed(1)
    z = mu + (logvar / 2).exp() * torch.randn_like(mu)
    _, m, logs = model.score(*real, z)
    q, p = (torch.distributions.Normal(a, (b / 2).exp()) for a, b in ((mu, logvar), (m, logs)))
    assert torch.allclose(kl, torch.distributions.kl_divergence(q, p))
    assert not m[:, :2].any() and not logs[:, :2].any()  # of the first share: N(0, I)


@torch.no_grad()
def test_the_prior_knows_only_what_is_written_before(kind, monkeypatch):
    """The shares of z that are drawn while a window is written have the mean and deviation that
    training scores them with; neither knows the share nor its segment's frames."""
    model, shares, first = small(kind, drop=0.0), [], torch.randn(4, 2).double()
    randn, noise = torch.randn, [first]
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noise.append(randn(*a, **k)) or noise[-1])
    wrapped, model.plan = model.plan, lambda z: shares.append(z) or wrapped(z)
    roll = model.decode(first, temperature=0).double()
    model.plan, z, whole = wrapped, shares[-1].flatten(1), torch.ones(4, 32)
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
def test_windows_told_by_z_alone_read_nothing(kind, real):
    model, (frames, mask), z = small(kind), real, torch.randn(8, 8).double()
    other = frames.clone()
    other[:, 5] = frames[:, 5].roll(1, -1)
    seen = torch.arange(8)[:, None, None] >= 3
    before, after = (model.score(x, torch.ones(8, 32), z, seen)[0] for x in (frames, other))
    assert torch.equal(before[:3, 6:], after[:3, 6:]) and not torch.equal(before[3, 6:], after[3, 6:])


@torch.no_grad()
def test_frames_have_probability_one_together(kind, real):
    """All frames of at most two notes, after a real first frame: exact, no tuple is wasted."""
    model = small(kind, voices=2)
    low, high = torch.tril_indices(88, 88)
    frames = torch.zeros(len(low) + 1, 2, 88).double()
    frames[:, 0] = real[0][0, 0]
    frames[range(len(low)), 1, low] = frames[range(len(low)), 1, high] = 1  # the last one is silent
    z = torch.randn(1, 8).double().expand(len(frames), -1)
    nll = model.score(frames, torch.ones(frames.shape[:2]), z)[0]
    assert (-nll[:, 1]).exp().sum().item() == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_sampling_draws_from_what_training_scores(kind, real):
    """The logits from which a window was drawn frame by frame give its likelihood; voices neither
    cross nor double, however wild the draw."""
    model, z, steps, logits = small(kind), torch.randn(4, 8).double(), [], None
    drawn, wrapped = [], model.heads.logits

    def spy(i, x, last, voices):
        logits = wrapped(i, x, last, voices)
        drawn.append(logits[:, 0].log_softmax(-1))
        return logits
    model.heads.logits = spy
    roll = model.decode(z, generator=torch.Generator().manual_seed(0), temperature=1.5)
    model.heads.logits = wrapped
    voices = data.to_voices(roll, 4)[..., model.heads.order].flatten(1).T  # in the order drawn
    steps = [-p.gather(1, v[:, None])[:, 0] for p, v in zip(drawn, voices, strict=True)]
    nll = torch.stack(steps).unflatten(0, (-1, 4)).sum(1).T
    assert torch.allclose(nll, model.score(roll.double(), torch.ones(4, 32), z)[0])
    assert roll.shape == (4, 32, 88) and roll.dtype == torch.bool


@torch.no_grad()
def test_the_decoder_listens_to_z_and_never_looks_ahead(kind, real):
    frames, mask, z = real[0][:2], torch.ones(2, 32), torch.randn(2, 8).double()
    for wiring in ({}, PAPER):
        model = small(kind, **wiring)
        before = model.score(frames, mask, z)[0]
        assert not torch.allclose(before, model.score(frames, mask, z + 1)[0])
        other = frames.clone()
        other[:, 21] = frames[:, 5].roll(1, -1)
        changed = (model.score(other, mask, z)[0] != before).any(0)
        assert changed[21] and not changed[:21].any()
        assert changed[22] == (not wiring) and not (kind is hvae.HVAE and changed[25:].any())


@torch.no_grad()
def test_padding_and_batch_change_nothing(kind, real):
    model, (frames, mask) = small(kind), real
    noise = frames + (1 - mask[..., None]) * torch.randint(0, 2, frames.shape)
    mu, logvar = model.encode(noise, mask)
    before = model.score(noise, mask, mu)[0]
    for i in range(len(frames)):
        length = int(mask[i].sum())
        alone = frames[i:i + 1, :length], mask[i:i + 1, :length]
        for a, b in zip(model.encode(*alone), (mu, logvar)):
            assert torch.allclose(a[0], b[i])
        assert torch.allclose(model.score(*alone, mu[i:i + 1])[0][0], before[i, :length])
        assert not before[i, length:].any()
    rolls = model.decode(mu, temperature=0)
    assert torch.equal(rolls[3:4, :9], model.decode(mu[3:4], 9, temperature=0))


@torch.no_grad()
def test_samples_of_any_length_go_on_from_primes(kind, corpus):
    model = small(kind).float()

    def draw(seed=0, length=70, **more):
        return model.sample(2, length, torch.Generator().manual_seed(seed), **more)
    rolls = draw()
    assert rolls.shape == (2, 70, 88) and rolls.dtype == torch.bool
    assert torch.equal(rolls, draw()) and not torch.equal(rolls, draw(1))
    assert torch.equal(rolls[:, :20], draw(length=20))
    assert not torch.equal(rolls[0], rolls[1])
    for length in (0, 1, 7, 50):
        assert draw(prime=corpus.test[0][:length]).shape == (2, 70, 88)
    assert draw(temperature=0, top_p=0.5).any()


def test_gradients_and_a_loss_as_printed(kind, real):
    for more in ({}, PAPER, dict(rec_mean=True)):
        model = small(kind, **more).train()
        loss, parts = model(*real)
        kl = parts["kl"] * len(real[0]) / real[1].sum()
        shown = parts["reconstruction"] + model.beta * kl
        if model.rec_mean:
            shown = parts["reconstruction"] / 4 + model.beta * parts["kl"]
        assert torch.isclose(loss, shown)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.numel())
        assert model.encode.out.weight.grad.abs().sum() > 0


def test_a_few_steps_put_the_music_into_z(kind, batch):
    torch.manual_seed(0)
    model = kind(window=32, segment=8, hidden=64, latent=64, features=32, dropout=0.0, drop=0.5,
                 beta=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(*batch)[0].backward()
        optimizer.step()
    figures = vae.evaluate(model.eval(), [f[m > 0].numpy() > 0 for f, m in zip(*batch)], samples=8)
    assert figures["note_f1"] > 0.75 and figures["kl"] > 10
    assert figures["nll_iw8"] < figures["nll"] and figures["used_dims"] > 10


def test_both_files_are_alike():
    """Encoder and heads are the same text, and hvae.py names what is new in it."""
    def part(name):
        text = (ROOT / name).read_text()
        return text[text.index("import math"):text.index("VAE(nn.Module)") - len("class H")].strip()
    assert part("vae.py") == part("hvae.py").removesuffix("class").strip()


def test_the_papers_settings_train(kind, scores, tmp_path):
    module = {vae.VAE: vae, hvae.HVAE: hvae}[kind]
    flags = ["--hidden", "16", "--window", "8", "--segment", "4", "--steps", "2", "--device", "cpu"]
    folders = ["--data", str(scores), "--out", str(tmp_path / "run")]
    module.main(["--paper", "--voices", "1", *flags, *folders])
    config = data.load_checkpoint(tmp_path / "run" / "model.pt")["config"]
    assert (config["hidden"], config["latent"], config["features"]) == (16, 32, 0)
    assert (config["feed"], config["drop"], config["beta"]) == ("softmax", 0.0, 1.0)


def test_segments_must_fit(kind):
    with pytest.raises(data.InputError, match="--segment 5 must divide --window 32"):
        kind(window=32, segment=5)
