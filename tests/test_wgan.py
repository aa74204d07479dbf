"""wgan.py: penalty, clipping, gradients through chosen symbols, a critic that learns, samples."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import wgan
from conftest import silence, train

GPU = pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU and BACH_TEST_CUDA=1"))


def small(**more):
    torch.manual_seed(0)
    return wgan.WGAN(**{**dict(hidden=16, heads=2, critic_heads=2, z=4, dropout=0.0), **more})


def read(model, frames):
    """What the critic reads of frames (B, T, 88)."""
    return model.features(data.to_voices(frames, model.voices))


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
    fake = model.features(model.play(len(frames))[1])
    wgan.gradient_penalty(model.critic, read(model, frames), fake).backward()
    for name, weight in model.critic.named_parameters():
        # a shift behind the last curved function moves no gradient
        flat = name in ("attention.out.bias", "mix.bias", "out.bias", "near_out.bias", "near.bias")
        assert flat or weight.grad.abs().sum() > 0, name


def test_penalty_is_the_gradient_of_finite_differences(batch):
    model = small()
    voices, weight = model.play(8)[1], model.double().critic.lstm.weight_hh_l0
    real, fake = read(model, batch[0]), model.features(voices)

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
    paper = "--clip 0.01 --gp 0 --optimizer rmsprop --critic-lr 0.1"
    train("wgan", scores, tmp_path, *paper.split(), steps=2)
    weights = data.load_checkpoint(tmp_path / "last.pt")["parts"]["model"]
    largest = {name.split(".")[0]: 0.0 for name in weights}
    for name, weight in weights.items():
        network = name.split(".")[0]
        largest[network] = max(largest[network], weight.abs().max().item())
    assert largest["critic"] == pytest.approx(0.01) and largest["generator"] > 0.1


def test_voices_are_one_hot_legal_and_pass_the_gradient_on_to_every_weight():
    model = small()
    z, voices = model.play(4)
    assert voices.shape == (4, 32, 4)
    assert torch.equal(data.to_voices(data.from_voices(voices)), voices)  # none cross or double
    onehot, entropy = model.generator(z, voices)
    assert torch.equal(onehot, F.one_hot(voices, data.SYMBOLS)) and 0 < entropy < np.log(89)
    model.generator_loss(4)[0].backward()
    for name, weight in model.generator.named_parameters():
        assert weight.grad.abs().sum() > 0, name


def test_the_gradient_is_that_of_the_expected_score_where_the_critic_is_linear():
    """d/dtheta sum_k p(k) c(k), with c the critic's slope, for a choice that nothing follows."""
    model = small(voices=1, window=8)
    z, voices = model.play(3)
    model, z = model.double(), z.double()
    slope = torch.randn(3, 8, 1, data.SYMBOLS, dtype=torch.double)
    slope[:, :-1] = 0
    weight = model.generator.heads.out[0].bias
    onehot, _ = model.generator(z, voices)
    have, = torch.autograd.grad((onehot * slope).sum(), weight)
    last = F.pad(voices[:, :-1], (0, 0, 1, 0))
    probabilities = []
    model.generator.heads(model.generator.read(z, last)[0], last, lambda v, logits: (
        probabilities.append(logits.softmax(-1)), voices[..., v])[1])
    want, = torch.autograd.grad((probabilities[0][:, -1] * slope[:, -1, 0]).sum(), weight)
    assert torch.allclose(have, want) and want.abs().sum() > 0


@pytest.mark.parametrize("loss, rises", [
    ("wasserstein", True), ("minimax", True), ("printed", False)])
def test_the_gap_on_a_fixed_batch_rises_unless_the_loss_is_as_printed(loss, rises, batch):
    model, gaps = small(loss=loss, gp=10.0 if loss == "wasserstein" else 0.0), []
    played = model.play(8)
    optimizer = torch.optim.Adam(model.critic.parameters(), 1e-3, betas=(0.0, 0.9))
    for _ in range(20):
        loss, parts = model(*batch, played)
        gaps.append(parts["critic_gap"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (gaps[-1] > gaps[0] + 0.1) if rises else (gaps[-1] < gaps[0] - 0.1)


def test_the_generator_learns_what_a_critic_likes():
    """Of a critic that likes high top voices."""
    model = small()
    pitch = torch.arange(data.SYMBOLS) / data.KEYS
    model.critic.features = lambda voices: voices
    model.critic.forward = lambda voices: (voices[:, :, 0] * pitch).sum((1, 2))
    optimizer, tops = torch.optim.Adam(model.generator.parameters(), 1e-2), []
    for _ in range(20):
        played = model.play(8)
        tops.append(played[1][..., 0].float().mean().item())
        optimizer.zero_grad()
        model.generator_loss(8, played)[0].backward()
        optimizer.step()
    assert tops[-1] > tops[0] + 15


def test_samples_follow_the_seed_and_do_not_depend_on_the_length_asked_for():
    model = small()

    def draw(seed, length=70):
        return model.sample(3, length, torch.Generator().manual_seed(seed))
    assert draw(0).dtype == torch.bool and draw(0).shape == (3, 70, 88)
    assert torch.equal(draw(0), draw(0)) and torch.equal(draw(0)[:, :40], draw(0, 40))
    assert not torch.equal(draw(0), draw(1))


def test_read_at_once_frame_by_frame_or_in_parts_the_heads_know_the_same():
    generator = small().generator
    z, voices = torch.randn(2, 4), torch.randint(0, 89, (2, 80, 4))
    whole = generator.read(z, voices)[0]
    for parts in ((1,) * 80, (40, 40), (3, 70, 7)):
        x, state = [], None
        for part in voices.split(parts, 1):
            now, state = generator.read(z, part, state)
            x.append(now)
        assert torch.allclose(whole, torch.cat(x, 1), atol=1e-5)


def test_the_generator_knows_only_the_past():
    generator = small().generator
    z, voices = torch.randn(2, 4), torch.randint(0, 89, (2, 32, 4))
    changed = voices.clone()
    changed[:, 20:] = torch.randint(0, 89, (2, 12, 4))
    before, after = generator.read(z, voices)[0], generator.read(z, changed)[0]
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6)
    assert not torch.allclose(before[:, 20], after[:, 20], atol=1e-3)


def test_features_by_hand_and_in_another_key():
    voices = torch.zeros(1, 8, 4, dtype=torch.long)
    voices[0, 0] = torch.tensor([56, 49, 44, 37])  # C major in root position, then all a tone up
    voices[0, 1] = voices[0, 0] + 2
    voices[0, 2] = torch.tensor([61, 0, 0, 41])

    def features(voices, size=(4 * 89, 4 * 25, 6 * 25, 6 * 12, 12, 12, 12, 12)):
        return small().features(voices)[0].split(size, -1)
    absolute, motion, chord, kept, above_bass, above_before, *around = features(voices)
    assert torch.equal(absolute[1].view(4, 89).argmax(-1), voices[0, 1])
    motion, chord, kept = motion.view(8, 4, 25), chord.view(8, 6, 25), kept.view(8, 6, 12)
    assert (motion[1].argmax(-1) == 12 + 2).all() and motion[0].sum() == 0
    assert motion[2].sum(-1).tolist() == [1, 0, 0, 1]  # who rests does not move
    assert chord[0].argmax(-1).tolist() == [7, 12, 19, 5, 12, 7]  # soprano and alto first
    assert kept[1].argmax(-1).tolist() == [7, 0, 7, 5, 0, 7] and kept[1].sum() == 6
    assert kept[0].sum() == 0 and kept[2].sum() == 0  # nothing keeps its interval there
    assert above_bass[0].nonzero().flatten().tolist() == [0, 7]
    assert above_before[1].nonzero().flatten().tolist() == [2, 9]
    for here, there in zip(features(voices)[1:], features(voices + 5 * (voices > 0))[1:]):
        assert torch.equal(here, there)


def test_figures_of_bach_against_himself_and_of_noise(corpus):
    model, piece = small(), corpus.test[0][:64]
    assert 0.2 < wgan.evaluate(model, corpus.test)["texture_distance"] <= 1  # untrained
    bach = torch.from_numpy(piece).repeat(1, 2, 1)
    model.sample = lambda n, length, *_: bach[:, :length].expand(n, -1, -1)
    figures = wgan.evaluate(model, list(bach.numpy()))
    assert figures["texture_distance"] == pytest.approx(0, abs=1e-9) and figures["alike"] == 1
    assert figures["change_distance"] == pytest.approx(0, abs=1e-9)
    assert figures["silent"] == pytest.approx((~piece.any(1)).mean())
