"""wgan.py: penalty, clipping, gradients through the discrete keys, a critic that learns, samples, resume."""

import numpy as np
import pytest
import torch

import data
import wgan

SMALL = dict(hidden=16, heads=2, critic_heads=2, z=4, noise=3, dropout=0.0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Models as small as these take longer on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(**more):
    torch.manual_seed(0)
    return wgan.WGAN(**{**SMALL, **more})


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_penalty_of_a_linear_critic(slope, batch):
    real, fake = batch[0], batch[0].flip(0)
    w = torch.randn(real[0].numel(), dtype=torch.float32)
    w *= slope / w.norm()
    penalty = wgan.gradient_penalty(lambda x: x.flatten(1) @ w, real, fake)
    assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
def test_penalty_has_second_derivatives_in_every_weight(device, batch):
    model = small().to(device)
    frames = batch[0].to(device)
    wgan.gradient_penalty(model.critic, frames, model.fake(len(frames))[0].detach()).backward()
    flat = {"attention.out.bias", "mix.bias", "out.bias"}  # a shift behind the last curved function moves no gradient
    for name, weight in model.critic.named_parameters():
        assert name in flat or weight.grad.abs().sum() > 0, name


def test_penalty_is_the_gradient_of_finite_differences(batch):
    model = small()
    real, fake = batch[0].double(), model.fake(8)[0].detach().double()
    model.double()
    weight = model.critic.lstm.weight_hh_l0

    def penalty():
        torch.manual_seed(1)
        return wgan.gradient_penalty(model.critic, real, fake)
    slope, = torch.autograd.grad(penalty(), weight)
    direction = torch.randn_like(weight)
    weight.data += 1e-5 * direction
    up = penalty()
    weight.data -= 2e-5 * direction
    down = penalty()
    assert ((up - down) / 2e-5).item() == pytest.approx((slope * direction).sum().item(), rel=1e-4)


def test_clipped_weights_stay_within_the_bound_after_every_step(batch):
    model = small(gp=0.0, noise=0, layers=2, critic_layers=2, patch=1)  # as in the paper
    optimizer = torch.optim.Adam(model.critic.parameters(), 1e-2)
    for _ in range(3):
        loss, _ = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert max(weight.abs().max() for weight in model.critic.parameters()) > 0.01
        wgan.clip_weights(model.critic, 0.01)
        assert max(weight.abs().max() for weight in model.critic.parameters()) <= 0.01


def test_keys_are_binary_and_pass_the_gradient_on_to_the_first_layer():
    model = small(entropy=0.0)
    keys, entropy = model.fake(4)
    assert 0 < entropy < np.log(89)
    assert keys.shape == (4, 32, 88) and set(keys.unique().tolist()) == {0.0, 1.0}
    assert 1 <= keys.sum(-1).max() <= 4
    model.generator_loss(4)[0].backward()
    for name, weight in model.generator.named_parameters():
        assert weight.grad.abs().sum() > 0, name


def test_the_hold_moves_the_entropy_towards_its_value():
    model = small(entropy=1.0)
    optimizer = torch.optim.Adam(model.generator.parameters(), 1e-2)
    distances = []
    for _ in range(30):
        loss, parts = model.generator_loss(4)
        distances.append(abs(parts["entropy"].item() - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distances[-1] < 0.3 < distances[0]


@pytest.mark.parametrize("loss, rises", [("wasserstein", True), ("minimax", True), ("printed", False)])
def test_the_gap_on_a_fixed_batch_rises_unless_the_loss_is_as_printed(loss, rises, batch):
    model = small(loss=loss, gp=10.0 if loss == "wasserstein" else 0.0)
    fake = model.fake(8)[0].detach()
    model.fake = lambda n: (fake, None)
    optimizer = torch.optim.Adam(model.critic.parameters(), 1e-3, betas=(0.0, 0.9))
    gaps = []
    for _ in range(20):
        loss, parts = model(*batch)
        gaps.append(parts["critic_gap"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (gaps[-1] > gaps[0] + 0.1) if rises else (gaps[-1] < gaps[0] - 0.1)


def test_samples_follow_the_seed_and_do_not_depend_on_the_length_asked_for():
    model = small()

    def draw(seed, length=70, n=3):
        return model.sample(n, length, torch.Generator().manual_seed(seed))
    assert draw(0).dtype == torch.bool and draw(0).shape == (3, 70, 88)
    assert torch.equal(draw(0), draw(0)) and torch.equal(draw(0)[:, :40], draw(0, 40))
    assert not torch.equal(draw(0), draw(1))


def test_going_on_window_by_window_writes_what_one_long_window_would():
    generator = small().generator
    z, noise = torch.randn(2, 4), torch.randn(2, 96, 3)
    whole, _, _ = generator(z, noise)
    parts, state = [], None
    for first in (0, 32, 64):
        keys, _, state = generator(z, noise[:, first:first + 32], first, state)
        parts.append(keys)
    assert torch.equal(whole[:, :64], torch.cat(parts, 1)[:, :64])
    assert torch.equal(whole[:, 64:], parts[2])


def test_a_critic_tells_samples_from_bach_and_figures_of_bach_against_himself_are_zero(corpus):
    have = wgan.histograms(corpus.test)
    assert all(data.divergence(counts, counts) == pytest.approx(0, abs=1e-9) for counts in have.values())
    assert data.divergence(have["top"], have["top"][::-1]) > 0
    assert data.divergence(have["notes"] * 0, have["notes"]) > 0.4
    figures = wgan.evaluate(small(), corpus.test)
    assert set(figures) == {"critic_gap", "style", "silent", "alike"} and 0.2 < figures["style"] <= 1


def test_intervals_by_hand_and_in_another_key():
    frames = torch.zeros(1, 2, 88)
    frames[0, 0, [30, 37]] = frames[0, 1, [32, 37, 61]] = 1
    changes = torch.zeros(1, 2, 88)
    changes[0, 1] = frames[0, 1] - frames[0, 0]
    have = wgan.intervals(frames, changes)[0].round(decimals=4)  # 24 that sound, 0..12 up, 12..1 down
    assert have[0].nonzero().flatten().tolist() == [6]
    assert have[1].nonzero().flatten().tolist() == [4, 23, 24 + 2]  # 37 - 32, 61 - 37; 30 moves to 32, and 31 up is too far
    assert torch.allclose(wgan.intervals(frames.roll(20, -1), changes.roll(20, -1))[0], have, atol=1e-5)


def test_histograms_by_hand():
    roll = torch.zeros(5, 88, dtype=torch.bool).numpy()
    roll[0:2, [39, 43, 46]] = roll[2:4, [38, 43, 47]] = True  # C major, then G major above its third; one silent frame
    have = wgan.histograms([roll])
    assert have["notes"][[0, 3]].tolist() == [1, 4]
    assert have["length"][[2, 4]].tolist() == [4, 1]
    assert have["top"][13 + 1] == have["bottom"][13 - 1] == 1
    assert have["chord"][1 + 2**4 + 2**7] == 2 and have["chord"][1 + 2**5 + 2**9] == 2


def test_train_resume_ends_where_the_whole_run_ends(scores, tmp_path):
    flags = ["--data", str(scores), "--device", "cpu", "--batch", "4", "--hidden", "16", "--heads", "2", "--critic-heads", "2",
             "--eval-every", "2", "--n-critic", "2", "--steps", "4"]
    wgan.main([*flags, "--out", str(tmp_path / "whole")])
    run, real = data.Run.add, []

    def stop_after_three(self, values, mask):
        self.interrupted = self.step == 2
        real.append(values)
        return run(self, values, mask)
    data.Run.add = stop_after_three
    try:
        wgan.main([*flags, "--out", str(tmp_path / "parts")])
    finally:
        data.Run.add = run
    wgan.main([*flags, "--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = (data.load_checkpoint(tmp_path / name / "last.pt", "wgan") for name in ("whole", "parts"))
    assert len(real) == 3 and whole["step"] == parts["step"] == 4
    for name, weight in whole["parts"]["model"].items():
        assert torch.equal(weight, parts["parts"]["model"][name]), name
    for name in ("model.pt", "log.csv", "result.json", "curves.png", "sample.mid"):
        assert (tmp_path / "parts" / name).exists()
