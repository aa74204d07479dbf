"""lstm.py: likelihood, state carried, nothing ahead, primes, the paper's sampling, loop and resume."""

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
    model = small(voices=voices)
    logits, _ = model.logits(batch[0][:1, :9])
    tuples = torch.cartesian_prod(*[torch.arange(89)] * voices).view(-1, voices)
    assert probability(logits[:, -1].expand(len(tuples), -1, -1), tuples).sum().item() == pytest.approx(1, abs=1e-4)


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
    for i in range(len(frames)):
        length = int(mask[i].sum())
        alone = model.frame_nll(frames[i:i + 1, :length], mask[i:i + 1, :length])[0]
        assert torch.allclose(before[i, :length], alone) and before[i, length:].abs().sum() == 0


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
    each = [model.frame_nll(torch.from_numpy(piece)[None].float(), torch.ones(1, len(piece)))[0] for piece in pieces]
    assert figures["nll"] == pytest.approx(sum(e.sum().item() for e in each) / 41, rel=1e-5)
    assert figures["nll_after_first"] == pytest.approx(sum(e[1:].sum().item() for e in each) / 39, rel=1e-5)
    tiles = [part for piece in pieces for part in torch.from_numpy(piece).float().split(8)]
    tiled = sum(model.nll(part[None], torch.ones(1, len(part))).item() for part in tiles)
    assert figures["nll_tiled"] == pytest.approx(tiled / 41, rel=1e-5)


def test_train_resume_ends_where_the_whole_run_ends(scores, tmp_path, monkeypatch):
    flags = ["--data", str(scores), "--device", "cpu", "--batch", "4", "--window", "32", "--hidden", "16",
             "--eval-every", "2", "--steps", "4"]
    lstm.main([*flags, "--out", str(tmp_path / "whole")])
    add = data.Run.add

    def stop_after_three(self, values, mask):
        self.interrupted = self.step == 2
        return add(self, values, mask)
    monkeypatch.setattr(data.Run, "add", stop_after_three)
    lstm.main([*flags, "--out", str(tmp_path / "parts")])
    assert data.load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 3
    monkeypatch.setattr(data.Run, "add", add)
    lstm.main(["--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = (data.load_checkpoint(tmp_path / name / "last.pt", "lstm") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for name, weight in whole["parts"]["model"].items():
        assert torch.equal(weight, parts["parts"]["model"][name]), name
    best = data.load_checkpoint(tmp_path / "parts" / "model.pt", "lstm")
    lstm.LSTM(**best["config"]).load_state_dict(best["state"])
