"""wgan.py: penalty, clipping, gradients through chosen symbols, networks that learn, figures."""

import pytest
import torch

import data
import wgan
from conftest import GPU, small


def test_penalty_of_a_linear_critic(batch):
    w = torch.nn.functional.normalize(torch.randn(batch[0][0].numel()), dim=0)
    for slope in (1, 3):
        penalty = wgan.gradient_penalty(
            lambda x: x.flatten(1) @ w * slope, batch[0], batch[0].flip(0))
        assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_the_penalty_has_second_derivatives_in_every_weight(device, batch):
    model = small("wgan", batch=8).to(device)
    real, fake = (model.critic.features(x).detach() for x in (batch[0].to(device), model.play()))
    wgan.gradient_penalty(model.critic, real, fake).backward()
    assert all(weight.grad.any() for weight in model.critic.parameters() if weight.dim() > 1)


def linear_critic(model, slope):
    """A critic that is the sum of slope times voices (B, T, V, 89); a list of those it gets."""
    played = []
    model.critic.features = lambda voices: played.append(voices.detach()) or voices
    model.critic.forward = lambda voices: (voices * slope).sum((1, 2, 3))
    return played


def test_voices_are_one_hot_legal_and_pass_the_gradient_of_probabilities_to_every_weight():
    model = small("wgan")
    played = linear_critic(model, torch.ones(data.SYMBOLS))
    model.generator_loss(model.play())[0].backward()
    for weight in model.generator.parameters():
        assert weight.grad.abs().max() < 1e-4  # probabilities sum to one, whatever the weights
    symbols = played[0].argmax(-1)
    assert torch.equal(played[0], torch.nn.functional.one_hot(symbols, 89).float())
    assert torch.equal(data.to_voices(data.from_voices(symbols)), symbols)  # none cross or double
    model = small("wgan", batch=4, restart=1.0)  # so that what begins them counts
    model.generator_loss(model.play())[0].backward()
    assert all(weight.grad.abs().max() > 1e-5 for weight in model.generator.parameters())


@pytest.mark.parametrize("kind", ["wasserstein", "minimax", "printed"])
def test_the_gap_on_a_fixed_batch_rises_unless_the_loss_is_as_printed(kind, batch):
    model = small("wgan", batch=8, loss=kind, gp=10.0 if kind == "wasserstein" else 0.0)
    with torch.no_grad():
        played, gaps = model.play(), []
    optimizer = torch.optim.Adam(model.critic.parameters(), 1e-3, betas=(0.0, 0.9))
    for _ in range(20):
        loss, parts = model(*batch, played)
        gaps.append(parts["critic_gap"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rise = gaps[-1] - gaps[0]
    assert rise < -0.1 if kind == "printed" else rise > 0.1


def test_the_generator_learns_what_a_critic_likes():
    model, top = small("wgan", batch=8), torch.tensor([[1.0], [0], [0], [0]])
    played = linear_critic(model, top * torch.arange(data.SYMBOLS) / data.KEYS)  # high ones
    optimizer = torch.optim.Adam(model.generator.parameters(), 1e-2)
    for _ in range(20):
        model.generator_loss(model.play())[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    first, last = (voices[:, :, 0].argmax(-1).float().mean() for voices in (played[0], played[-1]))
    assert last > first + 15


def test_pieces_go_on_from_step_to_step_unless_they_begin_anew(monkeypatch):
    model = small("wgan", batch=3, restart=0.0)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(data, "sample_symbols", lambda logits, **_: logits.argmax(-1))  # no chance
        whole, _ = model.generator.play([x.clone() for x in model.buffers(recurse=False)], 32)
        parts = [model.play().argmax(-1) for _ in range(2)]  # each begins with the frame before
        assert torch.equal(torch.cat([parts[0], parts[1][:, 1:]], 1), whole)
    for model.restart in (0, 1):
        one, two = (model.play() for _ in range(2) if torch.manual_seed(0))
        assert torch.equal(one, two) == (model.restart == 1)


def test_what_the_critic_reads_but_the_notes_themselves_is_the_same_in_every_key(batch):
    model = small("wgan")
    here, there = (model.critic.features(x) for x in (batch[0], batch[0].roll(3, -1)))
    differs = (here != there).any(1).any(0)
    assert 0 < differs.sum() <= 4 * data.SYMBOLS and here[:, :, ~differs].any()


def test_figures_of_bach_against_himself_and_of_noise(corpus):
    model, piece = small("wgan"), corpus.test[0][:64]
    noise = wgan.evaluate(model, corpus.test)
    bach = torch.from_numpy(piece).repeat(1, 2, 1)
    model.sample = lambda n, length, *_: bach[:, :length].expand(n, -1, -1)
    figures = wgan.evaluate(model, list(bach.numpy()))
    assert figures["alike"] == 1 and figures["silent"] == pytest.approx((~piece.any(1)).mean())
    assert figures["change_distance"] < 1e-3 and noise["change_distance"] > 0.2
