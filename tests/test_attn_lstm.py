"""attn_lstm.py: an exact likelihood, a chain that does not look ahead, state carried, melodies kept, loop and resume."""

import itertools

import pytest
import torch

import attn_lstm
import data


def small(**more):
    torch.manual_seed(0)
    return attn_lstm.AttnLSTM(**{**dict(hidden=16, window=32, attention_heads=2), **more}).eval()


KINDS = [dict(heads=heads, attention=attention, relations=relations)
         for heads, attention, relations in itertools.product(["chained", "parallel"], ["on", "off"], ["on", "off"])]


def chain_probability(model, known, voices):
    """Probability of each of voices (n, V) as the next frame, as the heads give it one by one."""
    logits = [model.voice_logits(i, known, voices[:, None]).log_softmax(-1)[:, 0] for i in range(model.voices)]
    return sum(l.gather(1, voices[:, v, None])[:, 0] for l, v in zip(logits, model.order)).exp()


def expanded(known, n):
    return {name: x[:, -1:].expand(n, *x[:, -1:].shape[1:]) if name not in attn_lstm.PAST else x.expand(n, -1, -1)
            for name, x in known.items()}


@pytest.mark.parametrize("relations", ["on", "off"])
@pytest.mark.parametrize("voices", [1, 2])
def test_all_frames_together_have_probability_one(voices, relations, batch):
    """Not only all voice tuples: all of the mass is on tuples that a frame reads as."""
    model = small(voices=voices, relations=relations)
    known, _ = model.read(data.to_voices(batch[0][:1, :9], voices))
    keys = torch.eye(89, 88)  # each key alone, and the rest
    frames = keys if voices == 1 else torch.cat([keys, *(keys[i + 1:88] + keys[i] for i in range(87))])
    symbols = data.to_voices(frames, voices)
    assert len(symbols.unique(dim=0)) == len(frames) == (89 if voices == 1 else 1 + 88 + 88 * 87 // 2)
    assert chain_probability(model, expanded(known, len(symbols)), symbols).sum().item() == pytest.approx(1, abs=1e-4)


def test_three_chained_voices_never_cross_double_or_skip_a_voice(batch):
    """From the heads' masks: bass below soprano, alto between them, none below a voice that rests."""
    model = small(voices=3)
    known, _ = model.read(data.to_voices(batch[0][:1, :9], 3))
    cases = torch.tensor([[0, 0, 0], [1, 0, 0], [50, 0, 0], [50, 0, 49], [50, 0, 40], [2, 0, 1]])  # alto is chosen last
    bass, alto = (model.voice_logits(i, expanded(known, len(cases)), cases[:, None])[:, 0].isfinite() for i in (1, 2))
    assert bass.sum(1).tolist() == [1, 1, 50, 50, 50, 2] and bass[2, :50].all()
    assert alto.sum(1).tolist() == [1, 1, 1, 1, 10, 1] and alto[4, [0, *range(41, 50)]].all()


def test_parallel_heads_spread_probability_over_all_voice_tuples(batch):
    model = small(voices=2, heads="parallel")
    known, _ = model.read(data.to_voices(batch[0][:1, :9], 2))
    tuples = torch.cartesian_prod(torch.arange(89), torch.arange(89))
    assert chain_probability(model, expanded(known, len(tuples)), tuples).sum().item() == pytest.approx(1, abs=1e-4)
    possible = data.to_voices(data.from_voices(tuples), 2)
    assert chain_probability(model, expanded(known, len(tuples)), tuples)[(possible == tuples).all(1)].sum() < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_draws_from_what_training_scores(kind, batch):
    """nll of the training path = the log-probabilities step by step, with carried state, past the attended window."""
    model = small(window=7, **kind).double()
    frames, mask = batch[0].double(), batch[1].double()
    voices = data.to_voices(frames, 4)
    known, state = model.read(voices[:, :0])
    steps = []
    for t in range(voices.shape[1]):
        steps.append(-chain_probability(model, known, voices[:, t]).log())
        known, state = model.read(voices[:, t:t + 1], state)
    assert torch.allclose(torch.stack(steps, 1) * mask, model.frame_nll(frames, mask), atol=1e-6)
    assert torch.allclose(model.nll(frames, mask), model.frame_nll(frames, mask).sum(1))


@pytest.mark.parametrize("cut", [0, 1, 8, 31])
def test_chunks_in_which_state_is_carried_change_nothing(cut, batch):
    model = small(window=10).double()
    voices = data.to_voices(batch[0], 4)
    whole, _ = model.read(voices)
    first, state = model.read(voices[:, :cut])
    rest, _ = model.read(voices[:, cut:], state)
    assert torch.allclose(whole["context"], torch.cat([first["context"], rest["context"]], 1))


def test_padding_and_batch_change_no_likelihood(batch):
    model = small().double()
    frames, mask = batch[0].double(), batch[1].double()
    together = model.frame_nll(frames, mask)
    for i in range(len(frames)):
        length = int(mask[i].sum())
        alone = model.frame_nll(frames[i:i + 1, :length], mask[i:i + 1, :length])[0]
        assert torch.allclose(together[i, :length], alone) and together[i, length:].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS[::3])
def test_nothing_looks_ahead(kind, batch):
    model = small(**kind)
    voices = data.to_voices(batch[0][:2], 4)
    other = voices.clone()
    other[:, 20:] = voices[:, 5:17].clamp(min=1) - 1

    def logits(past, chosen):
        known, _ = model.read(past[:, :-1])
        return [model.voice_logits(i, known, chosen) for i in range(4)]
    before, after = logits(voices, voices), logits(other, other)
    assert all(torch.equal(a[:, :20], b[:, :20]) for a, b in zip(before, after))
    assert not torch.equal(before[0][:, 21:], after[0][:, 21:])
    for i, v in enumerate(model.order):  # a voice of the frame moves no logit of itself or of those chosen before it
        moved = voices.clone()
        moved[..., v] = (moved[..., v] + 1) % 89
        changed = [not torch.equal(a, b) for a, b in zip(before, logits(voices, moved))]
        assert changed == [kind["heads"] == "chained" and j > i for j in range(4)]


def test_tonality_counts_the_pitch_classes_so_far(batch):
    model, roll = small(), batch[0][:1, :20]
    known, state = model.read(data.to_voices(roll[:, :12], 4))
    for t in (0, 5, 12):
        counts = torch.stack([roll[0, :t, (c - 1) % 12::12].sum() for c in range(12)])  # symbol c is key c - 1
        assert torch.allclose(known["tonality"][0, t], ((counts + 1) / (counts.mean() + 1)).log(), atol=1e-6)
    later, _ = model.read(data.to_voices(roll[:, 12:], 4), state)
    whole, _ = model.read(data.to_voices(roll, 4))
    assert torch.equal(later["tonality"], whole["tonality"][:, 13:])


def test_no_chained_sample_crosses_and_greedy_repeats_itself(batch):
    model = small()
    greedy = [model.sample(2, 20, torch.Generator().manual_seed(seed), temperature=0) for seed in (0, 1)]
    assert torch.equal(*greedy) and torch.equal(greedy[0][0], greedy[0][1])
    drawn = [model.sample(3, 40, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0].shape == (3, 40, 88) and drawn[0].dtype == torch.bool and drawn[0].sum(-1).max() <= 4
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.isfinite(model.nll(drawn[0].float(), torch.ones(3, 40))).all()


@pytest.mark.parametrize("length", [0, 1, 6, 50])
def test_a_prime_of_any_length_is_gone_on_from(length, batch):
    model = small(window=16)
    prime = batch[0][0].repeat(2, 1)[:length].bool().numpy()
    roll = model.sample(2, 5, torch.Generator().manual_seed(0), prime=prime)
    assert roll.shape == (2, 5, 88)
    if length:  # what follows is what the whole would have been
        whole = torch.cat([torch.from_numpy(prime), model.sample(1, 1, temperature=0, prime=prime)[0]])
        known, _ = model.read(data.to_voices(whole[None, :-1], 4))
        known = expanded(known, 1)
        assert model.voice_logits(0, known, torch.zeros(1, 1, 4, dtype=torch.long)).argmax() == data.to_voices(whole, 4)[-1, 0]


@pytest.mark.parametrize("heads", ["chained", "parallel"])
def test_the_melody_comes_back_note_for_note(heads, corpus):
    model, piece = small(heads=heads), corpus.test[0][:40].copy()
    piece[10:14] = False
    top = data.to_voices(torch.from_numpy(piece), 1)[:, 0]
    for roll in model.sample(3, 44, torch.Generator().manual_seed(0), melody=piece):
        written = data.to_voices(roll, 1)[:, 0]
        assert torch.equal(written[:40][top > 0], top[top > 0]) and roll.sum() > (top > 0).sum()


@pytest.mark.parametrize("heads", ["chained", "parallel"])
def test_two_pieces_can_be_learnt_by_heart(heads, batch):
    model = small(hidden=48, heads=heads, dropout_input=0, dropout_lstm=0, dropout=0).train()
    frames, mask = batch[0][:2, :24], batch[1][:2, :24]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    for _ in range(120):
        loss, parts = model(frames, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["nll"] < 0.3  # from 18


def test_figures_count_every_frame_once(batch):
    """evaluate() counts every frame once, the first included, and masks padding."""
    model = small()
    pieces = [batch[0][0].bool().numpy(), batch[0][1, :9].bool().numpy()]
    figures = attn_lstm.evaluate(model, pieces)
    model.eval()
    each = [model.frame_nll(torch.from_numpy(piece)[None].float(), torch.ones(1, len(piece)))[0] for piece in pieces]
    assert figures["nll"] == pytest.approx(sum(e.sum().item() for e in each) / 41, rel=1e-5)
    assert figures["nll_after_first"] == pytest.approx(sum(e[1:].sum().item() for e in each) / 39, rel=1e-5)


def test_attention_heads_that_do_not_divide_are_refused():
    with pytest.raises(data.InputError, match="--attention-heads 3"):
        attn_lstm.AttnLSTM(hidden=16, attention_heads=3)
