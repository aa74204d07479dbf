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
    return model


@pytest.fixture
def real(batch):
    """Eight windows of real music in double precision, the last two padded."""
    return batch[0].double(), batch[1].double()


@torch.no_grad()
def test_bounds_of_a_likelihood_that_can_be_summed(kind, real):
    model = small(kind, latent=1, window=8)
    frames, mask = real[0][:4, :8], real[1][:4, :8]
    grid = torch.linspace(-5, 5, 51).double()
    joint = torch.stack([-model.frame_nll(frames, mask, z.expand(4, 1)).sum(1) for z in grid])
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(grid) + math.log(0.2)
    exact = -(joint + prior[:, None]).logsumexp(0)  # -log p(x), z summed over a fine grid
    weights = model.log_weights(frames, mask, 200)
    assert torch.allclose(math.log(200) - weights.logsumexp(0), exact, atol=0.3)
    bound = torch.stack([model.nll(frames, mask) for _ in range(200)])
    assert (bound.mean(0) + weights.mean(0)).abs().max() < 6 * bound.std(0).max() / 200 ** 0.5
    assert (bound.mean(0) > exact - 0.1).all() and (bound.mean(0) > exact + 0.3).any()


@torch.no_grad()
def test_kl_is_the_closed_form(kind, real):
    model = small(kind)
    mu, logvar = model.encode(*real)
    q, p = torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose(model.posterior(*real)[1], torch.distributions.kl_divergence(q, p))


@torch.no_grad()
def test_frames_have_probability_one_together(kind, real):
    """All frames of at most two notes, after a real first frame: exact, no tuple is wasted."""
    model = small(kind, voices=2)
    low, high = torch.tril_indices(88, 88)
    frames = torch.zeros(len(low) + 1, 2, 88).double()
    frames[:, 0] = real[0][0, 0]
    frames[range(len(low)), 1, low] = frames[range(len(low)), 1, high] = 1  # the last one is silent
    z = torch.randn(1, 8).double().expand(len(frames), -1)
    nll = model.frame_nll(frames, torch.ones(frames.shape[:2]), z)
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
    assert torch.allclose(nll, model.frame_nll(roll.double(), torch.ones(4, 32), z))
    assert roll.shape == (4, 32, 88) and roll.dtype == torch.bool


@torch.no_grad()
def test_the_decoder_listens_to_z_and_never_looks_ahead(kind, real):
    frames, mask, z = real[0][:2], torch.ones(2, 32), torch.randn(2, 8).double()
    for wiring in ({}, PAPER):
        model = small(kind, **wiring)
        before = model.frame_nll(frames, mask, z)
        assert not torch.allclose(before, model.frame_nll(frames, mask, z + 1))
        other = frames.clone()
        other[:, 21] = frames[:, 5].roll(1, -1)
        changed = (model.frame_nll(other, mask, z) != before).any(0)
        assert changed[21] and not changed[:21].any()
        assert changed[22] == (not wiring) and not (kind is hvae.HVAE and changed[25:].any())


@torch.no_grad()
def test_padding_and_batch_change_nothing(kind, real):
    model, (frames, mask) = small(kind), real
    noise = frames + (1 - mask[..., None]) * torch.randint(0, 2, frames.shape)
    mu, logvar = model.encode(noise, mask)
    before = model.frame_nll(noise, mask, mu)
    for i in range(len(frames)):
        length = int(mask[i].sum())
        alone = frames[i:i + 1, :length], mask[i:i + 1, :length]
        for a, b in zip(model.encode(*alone), (mu, logvar)):
            assert torch.allclose(a[0], b[i])
        assert torch.allclose(model.frame_nll(*alone, mu[i:i + 1])[0], before[i, :length])
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
    for more in ({}, PAPER, dict(free_nats=1e6), dict(rec_mean=True)):
        model = small(kind, **more).train()
        loss, parts = model(*real)
        kl = parts["kl"].clamp(min=model.free_nats) * len(real[0]) / real[1].sum()
        shown = parts["reconstruction"] + model.beta * kl
        if model.rec_mean:
            shown = parts["reconstruction"] / 4 + model.beta * parts["kl"]
        assert torch.isclose(loss, shown)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.numel())
        assert model.encode.out.weight.grad.abs().sum() > 0


def test_a_few_steps_put_the_music_into_z(kind, batch):
    torch.manual_seed(0)
    model = kind(window=32, segment=8, hidden=64, latent=64, features=32, dropout=0.0, beta=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
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
