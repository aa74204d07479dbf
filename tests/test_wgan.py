"""wgan.py: penalty, clipping, gradients through discrete keys, a critic that learns, samples."""

import numpy as np
import pytest
import torch

import data
import wgan
from conftest import silence, train

GPU = pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU and BACH_TEST_CUDA=1"))


def small(**more):
    torch.manual_seed(0)
    sizes = dict(hidden=16, heads=2, critic_heads=2, z=4, noise=3, dropout=0.0)
    return wgan.WGAN(**{**sizes, **more})


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_penalty_of_a_linear_critic(slope, batch):
    real, fake = batch[0], batch[0].flip(0)
    w = torch.randn(real[0].numel())
    w *= slope / w.norm()
    penalty = wgan.gradient_penalty(lambda x: x.flatten(1) @ w, real, fake)
    assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-4)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_penalty_has_second_derivatives_in_every_weight(device, batch):
    model, frames = small().to(device), batch[0].to(device)
    fake = model.fake(len(frames))[0].detach()
    wgan.gradient_penalty(model.critic, frames, fake).backward()
    for name, weight in model.critic.named_parameters():
        # a shift behind the last curved function moves no gradient
        flat = name in ("attention.out.bias", "mix.bias", "out.bias")
        assert flat or weight.grad.abs().sum() > 0, name


def test_penalty_is_the_gradient_of_finite_differences(batch):
    model = small()
    real, fake = batch[0].double(), model.fake(8)[0].detach().double()
    weight = model.double().critic.lstm.weight_hh_l0

    def penalty():
        torch.manual_seed(1)
        return wgan.gradient_penalty(model.critic, real, fake)
    slope, = torch.autograd.grad(penalty(), weight)
    direction = torch.randn_like(weight)
    weight.data += 1e-5 * direction
    up = penalty()
    weight.data -= 2e-5 * direction
    difference = (up - penalty()) / 2e-5
    assert difference.item() == pytest.approx((slope * direction).sum().item(), rel=1e-4)


def test_clipping_keeps_every_weight_of_the_critic_within_the_bound(scores, tmp_path, monkeypatch):
    silence(monkeypatch, data)
    paper = "--clip 0.01 --gp 0 --noise 0 --optimizer rmsprop --critic-lr 0.1"
    train("wgan", scores, tmp_path, *paper.split(), steps=2)
    weights = data.load_checkpoint(tmp_path / "last.pt")["parts"]["model"]
    largest = {name.split(".")[0]: 0.0 for name in weights}
    for name, weight in weights.items():
        network = name.split(".")[0]
        largest[network] = max(largest[network], weight.abs().max().item())
    assert largest["critic"] == pytest.approx(0.01) and largest["generator"] > 0.1


def test_keys_are_binary_and_pass_the_gradient_on_to_the_first_layer():
    model = small(entropy=0.0)
    keys, entropy = model.fake(4)
    assert keys.shape == (4, 32, 88) and set(keys.unique().tolist()) == {0.0, 1.0}
    assert 1 <= keys.sum(-1).max() <= 4 and 0 < entropy < np.log(89)
    model.generator_loss(4)[0].backward()
    for name, weight in model.generator.named_parameters():
        assert weight.grad.abs().sum() > 0, name


def test_the_hold_moves_the_entropy_towards_its_value():
    model, distances = small(entropy=1.0), []
    optimizer = torch.optim.Adam(model.generator.parameters(), 1e-2)
    for _ in range(30):
        loss, parts = model.generator_loss(4)
        distances.append(abs(parts["entropy"].item() - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distances[-1] < 0.3 < distances[0]


@pytest.mark.parametrize("loss, rises", [
    ("wasserstein", True), ("minimax", True), ("printed", False)])
def test_the_gap_on_a_fixed_batch_rises_unless_the_loss_is_as_printed(loss, rises, batch):
    model, gaps = small(loss=loss, gp=10.0 if loss == "wasserstein" else 0.0), []
    fake = model.fake(8)[0].detach()
    model.fake = lambda n: (fake, None)
    optimizer = torch.optim.Adam(model.critic.parameters(), 1e-3, betas=(0.0, 0.9))
    for _ in range(20):
        loss, parts = model(*batch)
        gaps.append(parts["critic_gap"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (gaps[-1] > gaps[0] + 0.1) if rises else (gaps[-1] < gaps[0] - 0.1)


def test_samples_follow_the_seed_and_do_not_depend_on_the_length_asked_for():
    model = small()

    def draw(seed, length=70):
        return model.sample(3, length, torch.Generator().manual_seed(seed))
    assert draw(0).dtype == torch.bool and draw(0).shape == (3, 70, 88)
    assert torch.equal(draw(0), draw(0)) and torch.equal(draw(0)[:, :40], draw(0, 40))
    assert not torch.equal(draw(0), draw(1))


def test_going_on_window_by_window_writes_what_one_long_window_would():
    generator = small().generator
    z, noise = torch.randn(2, 4), torch.randn(2, 96, 3)
    whole, parts, state = generator(z, noise)[0], [], None
    for first in (0, 32, 64):
        keys, _, state = generator(z, noise[:, first:first + 32], first, state)
        parts.append(keys)
    assert torch.equal(whole, torch.cat(parts, 1))


def test_intervals_by_hand_and_in_another_key():
    frames, changes = torch.zeros(2, 1, 2, 88)
    frames[0, 0, [30, 37]] = frames[0, 1, [32, 37, 61]] = 1
    changes[0, 1] = frames[0, 1] - frames[0, 0]
    have = wgan.intervals(frames, changes)[0]  # 1..24 that sound, 0..12 up, 1..12 down
    assert have[0].nonzero().flatten().tolist() == [7 - 1]
    # 37 - 32 and 61 - 37 sound; 30 moves to 32 (to 61 is too far)
    assert have[1].nonzero().flatten().tolist() == [5 - 1, 24 - 1, 24 + 2]
    assert torch.equal(wgan.intervals(frames.roll(20, -1), changes.roll(20, -1))[0], have)


def test_figures_of_bach_against_himself_and_of_noise(corpus):
    model, piece = small(), corpus.test[0][:64]
    assert 0.2 < wgan.evaluate(model, corpus.test)["texture_distance"] <= 1  # untrained
    bach = torch.from_numpy(piece).repeat(1, 2, 1)
    model.sample = lambda n, length, *_: bach[:, :length].expand(n, -1, -1)
    figures = wgan.evaluate(model, list(bach.numpy()))
    assert figures["texture_distance"] == pytest.approx(0, abs=1e-9) and figures["alike"] == 1
    assert figures["silent"] == pytest.approx((~piece.any(1)).mean())
