"""lstm.py: likelihood, state carried, nothing ahead, primes, the paper's sampling."""

import pytest
import torch

import data
import lstm


def small(**more):
    torch.manual_seed(0)
    return lstm.LSTM(**{**dict(hidden=16), **more}).eval()


def probability(logits, voices):
    """Probability of voices (n, V) under logits (n, V, 89)."""
    return logits.log_softmax(-1).gather(2, voices[..., None]).sum((1, 2)).exp()


@pytest.mark.parametrize("voices", [1, 2])
def test_all_voice_tuples_together_have_probability_one(voices, batch):
    logits, _ = small(voices=voices).logits(batch[0][:1, :9])
    tuples = torch.cartesian_prod(*[torch.arange(89)] * voices).view(-1, voices)
    total = probability(logits[:, -1].expand(len(tuples), -1, -1), tuples).sum()
    assert total.item() == pytest.approx(1, abs=1e-4)


def test_sampling_draws_from_what_training_scores(batch):
    model = small().double()
    frames, mask = batch[0].double(), batch[1].double()
    voices, state, steps = data.to_voices(frames, 4), None, []
    previous = model.start.expand(len(frames), 1, -1)
    for t in range(frames.shape[1]):
        logits, state = model.logits(previous, state)
        steps.append(-probability(logits[:, 0], voices[:, t]).log())
        previous = frames[:, t:t + 1]
    assert torch.allclose(torch.stack(steps, 1) * mask, model.frame_nll(frames, mask), atol=1e-6)
    assert torch.allclose(model.nll(frames, mask), model.frame_nll(frames, mask).sum(1))


def test_nothing_looks_ahead_and_padding_and_batch_change_nothing(batch):
    model = small().double()
    frames, mask = batch[0].double(), batch[1].double()
    before = model.frame_nll(frames, mask)
    other = frames.clone()
    other[:, 20:] = frames[:, 5:17]
    assert torch.equal(before[:, :20], model.frame_nll(other, mask)[:, :20])
    for one, its_mask, nll in zip(frames, mask, before):
        length = int(its_mask.sum())
        alone = model.frame_nll(one[None, :length], its_mask[None, :length])[0]
        assert torch.allclose(nll[:length], alone) and nll[length:].abs().sum() == 0


@pytest.mark.parametrize("length", [0, 1, 5, 40])
def test_a_prime_of_any_length_is_gone_on_from(length, batch):
    model = small()
    prime = batch[0][0].repeat(2, 1)[:length].bool().numpy()
    roll = model.sample(2, 6, temperature=0, prime=prime)
    assert roll.shape == (2, 6, 88) and roll.dtype == torch.bool
    past = torch.cat([model.start[None, None], torch.from_numpy(prime)[None].float()], 1)
    first = data.from_voices(model.logits(past)[0][:, -1].argmax(-1))
    assert torch.equal(roll[0, 0], first[0]) and torch.equal(roll[0], roll[1])


def test_samples_follow_the_seed_and_leave_out_the_likeliest_symbols():
    model = small()
    drawn = [model.sample(2, 30, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    one = small(voices=1)
    logits, _ = one.logits(one.start.expand(1, 1, -1))
    ranked = logits[0, 0, 0].argsort(descending=True)
    frame = one.sample(1, 1, temperature=0, skip_top=2)[0]
    assert data.to_voices(frame, 1)[0, 0] == ranked[2]


def test_two_pieces_can_be_learnt_by_heart(batch):
    model = small(hidden=64, dropout=0.0).train()
    frames, mask = batch[0][:2, :16], batch[1][:2, :16]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2, weight_decay=0)
    for _ in range(250):
        loss, parts = model(frames, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert parts["nll"] < 0.3  # from 18


def test_figures_count_every_frame_once(batch):
    model = small(window=8)
    pieces = [batch[0][0].bool().numpy(), batch[0][1, :9].bool().numpy()]
    figures = lstm.evaluate(model, pieces)
    model.eval()

    def nll(frames):
        return model.frame_nll(frames[None], torch.ones(1, len(frames)))[0]
    rolls = [torch.from_numpy(piece).float() for piece in pieces]
    each = torch.cat([nll(roll) for roll in rolls])
    later = torch.cat([nll(roll)[1:] for roll in rolls])
    tiled = torch.cat([nll(part) for roll in rolls for part in roll.split(8)])
    assert len(each) == len(tiled) == 41 and len(later) == 39
    assert figures["nll"] == pytest.approx(each.mean().item(), rel=1e-5)
    assert figures["nll_after_first"] == pytest.approx(later.mean().item(), rel=1e-5)
    assert figures["nll_tiled"] == pytest.approx(tiled.mean().item(), rel=1e-5)
    notes = sum(roll.sum().item() for roll in rolls)
    assert figures["nll_per_note"] == pytest.approx(each.sum().item() / notes, rel=1e-5)
