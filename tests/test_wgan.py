"""wgan.py: penalty, clipping, gradients through chosen symbols, networks that learn, figures."""

import pytest
import torch

import data
import wgan
from conftest import GPU, small


def heard(model, batch):
    """What the critic reads of a batch and of what the generator plays: (B, T, features) each."""
    seen = []
    hook = model.critic.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(*batch)
    hook.remove()
    return seen[0].detach().chunk(2)


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_penalty_of_a_linear_critic(slope, batch):
    w = torch.randn(batch[0][0].numel())
    w *= slope / w.norm()
    penalty = wgan.gradient_penalty(lambda x: x.flatten(1) @ w, batch[0], batch[0].flip(0))
    assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_the_penaltys_gradient_is_that_of_finite_differences(device, batch):
    model = small("wgan").to(device)
    real, fake = (x.double() for x in heard(model, [x.to(device) for x in batch]))
    critic = model.critic.double()

    def penalty(step=0.0):
        torch.manual_seed(1)
        with torch.no_grad():
            critic.lstm.weight_hh_l0 += step * direction
        return wgan.gradient_penalty(critic, real, fake)
    torch.manual_seed(0)
    direction = torch.randn_like(critic.lstm.weight_hh_l0)
    penalty().backward()
    assert all(weight.grad.any() for weight in critic.parameters() if weight.dim() > 1)
    slope = (critic.lstm.weight_hh_l0.grad * direction).sum().item()
    up, down = penalty(1e-5).item(), penalty(-2e-5).item()
    assert (up - down) / 2e-5 == pytest.approx(slope, rel=1e-4)


def linear_critic(model, slope):
    """In place of a model's critic, sum_k slope_k v_k over its voices v (B, T, V, 89); a list of
    those that it gets."""
    played = []
    model.critic.features = lambda voices: played.append(voices.detach()) or voices
    model.critic.forward = lambda voices: (voices * slope).sum((1, 2, 3))
    return played


def test_voices_are_one_hot_legal_and_pass_the_gradient_of_probabilities_to_every_weight():
    model = small("wgan")
    played = linear_critic(model, torch.ones(data.SYMBOLS))
    model.generator_loss(4)[0].backward()
    flat = [weight.grad.abs().max() for weight in model.generator.parameters()]
    assert max(flat) < 1e-4  # probabilities sum to one, whatever the weights
    symbols = played[0].argmax(-1)
    assert played[0].shape == (4, 32, 4, 89)
    assert torch.equal(played[0], torch.nn.functional.one_hot(symbols, 89).float())
    assert torch.equal(data.to_voices(data.from_voices(symbols)), symbols)  # none cross or double
    model = small("wgan")
    model.generator_loss(4)[0].backward()
    assert all(weight.grad.abs().max() > 1e-5 for weight in model.generator.parameters())


@pytest.mark.parametrize("loss, rises", [
    ("wasserstein", True), ("minimax", True), ("printed", False)])
def test_the_gap_on_a_fixed_batch_rises_unless_the_loss_is_as_printed(loss, rises, batch):
    torch.manual_seed(0)
    model = small("wgan", loss=loss, gp=10.0 if loss == "wasserstein" else 0.0)
    with torch.no_grad():
        played, gaps = model.play(8), []
    optimizer = torch.optim.Adam(model.critic.parameters(), 1e-3, betas=(0.0, 0.9))
    for _ in range(20):
        loss, parts = model(*batch, played)
        gaps.append(parts["critic_gap"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (gaps[-1] > gaps[0] + 0.1) if rises else (gaps[-1] < gaps[0] - 0.1)


def test_the_generator_learns_what_a_critic_likes():
    """Of one that likes high top voices."""
    model, slope = small("wgan"), torch.zeros(4, data.SYMBOLS)
    slope[0] = torch.arange(data.SYMBOLS) / data.KEYS
    played = linear_critic(model, slope)
    optimizer = torch.optim.Adam(model.generator.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model.generator_loss(8)[0].backward()
        optimizer.step()
    first, last = (voices[:, :, 0].argmax(-1).float().mean() for voices in (played[0], played[-1]))
    assert last > first + 15


def test_what_the_critic_reads_but_the_notes_themselves_is_the_same_in_every_key(batch):
    model = small("wgan")
    here, there = (heard(model, (x, batch[1]))[0] for x in (batch[0], batch[0].roll(3, -1)))
    differs = (here != there).any(1).any(0)
    assert 0 < differs.sum() <= 4 * data.SYMBOLS and here[:, :, ~differs].any()


def test_figures_of_bach_against_himself_and_of_noise(corpus):
    def distances(figures):
        return [value for name, value in figures.items() if name.endswith("_distance")]
    model, piece = small("wgan"), corpus.test[0][:64]
    untrained = distances(wgan.evaluate(model, corpus.test))
    assert untrained and min(untrained) > 0.2
    bach = torch.from_numpy(piece).repeat(1, 2, 1)
    model.sample = lambda n, length, *_: bach[:, :length].expand(n, -1, -1)
    figures = wgan.evaluate(model, list(bach.numpy()))
    assert distances(figures) == pytest.approx([0] * len(untrained), abs=1e-3)
    assert figures["alike"] == 1 and figures["silent"] == pytest.approx((~piece.any(1)).mean())
