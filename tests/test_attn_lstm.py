"""attn_lstm.py: an exact likelihood, a chain that does not look ahead, state carried, memory,
melodies kept."""

import itertools

import pytest
import torch

import attn_lstm
import data


def small(**more):
    torch.manual_seed(0)
    model = attn_lstm.AttnLSTM(**{**dict(hidden=16, window=32, attention_heads=2), **more}).eval()
    for weights in model.parameters():  # larger ones, so that every part of the logits counts
        weights.data.add_(0.1 * torch.randn_like(weights))
    return model


KINDS = [dict(heads=heads, attention=attention, relations=relations)
         for heads, attention, relations in itertools.product(
             ["chained", "parallel"], ["on", "off"], ["on", "off"])]


def chain_probability(model, known, voices):
    """Probability of each of voices (n, V) as the next frame, as the heads give it one by one."""
    logits = [model.voice_logits(i, known, voices[:, None]).log_softmax(-1)[:, 0]
              for i in range(model.voices)]
    return sum(l.gather(1, voices[:, v, None])[:, 0] for l, v in zip(logits, model.order)).exp()


def at_the_end(known, n):
    """What is known when the frame after the last is chosen, n times."""
    known = {name: x if name in attn_lstm.SEEN else x[:, -1:] for name, x in known.items()}
    return {name: x.expand(n, *x.shape[1:]) for name, x in known.items()}


@pytest.mark.parametrize("relations", ["on", "off"])
@pytest.mark.parametrize("voices", [1, 2])
def test_all_frames_together_have_probability_one(voices, relations, batch):
    """Not only all voice tuples: all of the mass is on tuples that a frame reads as."""
    model = small(voices=voices, relations=relations)
    past = data.to_voices(batch[0][:1, :9].repeat(1, 3, 1), voices)  # there is something to recall
    known, _ = model.read(past)
    keys = torch.eye(89, 88)  # each key alone, and the rest
    pairs = [keys[i + 1:88] + keys[i] for i in range(87)]
    frames = keys if voices == 1 else torch.cat([keys, *pairs])
    symbols = data.to_voices(frames, voices)
    assert len(symbols.unique(dim=0)) == len(frames) == (89 if voices == 1 else 89 + 88 * 87 // 2)
    assert relations == "off" or known["match"][0, -1] >= 0
    sums = chain_probability(model, at_the_end(known, len(symbols)), symbols).sum()
    assert sums.item() == pytest.approx(1, abs=1e-4)


def test_three_chained_voices_never_cross_double_or_skip_a_voice(batch):
    """The heads' masks: bass below soprano, alto between them, none below a voice that rests."""
    model = small(voices=3)
    known, _ = model.read(data.to_voices(batch[0][:1, :9], 3))
    cases = torch.tensor([[0, 0, 0], [1, 0, 0], [50, 0, 0], [50, 0, 49], [50, 0, 40], [2, 0, 1]])
    bass, alto = (model.voice_logits(i, at_the_end(known, len(cases)), cases[:, None])[:, 0]
                  .isfinite() for i in (1, 2))  # the alto is chosen last
    assert bass.sum(1).tolist() == [1, 1, 50, 50, 50, 2] and bass[2, :50].all()
    assert alto.sum(1).tolist() == [1, 1, 1, 1, 10, 1] and alto[4, [0, *range(41, 50)]].all()


def test_parallel_heads_spread_probability_over_all_voice_tuples(batch):
    model = small(voices=2, heads="parallel")
    known, _ = model.read(data.to_voices(batch[0][:1, :9], 2))
    tuples = torch.cartesian_prod(torch.arange(89), torch.arange(89))
    p = chain_probability(model, at_the_end(known, len(tuples)), tuples)
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    possible = data.to_voices(data.from_voices(tuples), 2)
    assert p[(possible == tuples).all(1)].sum() < 0.9


@pytest.mark.parametrize("kind", [*KINDS, dict(voices=1), dict(voices=2), dict(voices=8)])
def test_steps_with_carried_state_score_what_training_scores(kind, batch):
    """nll of the training path = the log-probabilities step by step, past the attended window."""
    model = small(window=7, **kind).double()
    frames, mask = (x[:2, :14].double().repeat(1, 2, *[1] * (x.ndim - 2)) for x in batch)
    voices = data.to_voices(frames, model.voices)
    known, state = model.read(voices[:, :0])
    steps = []
    for t in range(voices.shape[1]):
        steps.append(-chain_probability(model, known, voices[:, t]).log())
        known, state = model.read(voices[:, t:t + 1], state)
    whole = model.frame_nll(frames, mask)
    assert torch.allclose(torch.stack(steps, 1) * mask, whole, atol=1e-6)
    assert torch.allclose(model.nll(frames, mask), whole.sum(1))


@pytest.mark.parametrize("cut", [0, 1, 8, 31])
def test_chunks_in_which_state_is_carried_change_nothing(cut, batch):
    model = small(window=10).double()
    voices = data.to_voices(batch[0].repeat(1, 2, 1), 4)
    whole, _ = model.read(voices)
    first, state = model.read(voices[:, :cut])
    rest, _ = model.read(voices[:, cut:], state)
    for name in whole.keys() - {"weights", *attn_lstm.SEEN}:
        assert torch.allclose(whole[name], torch.cat([first[name], rest[name]], 1)), name


def test_padding_and_batch_change_no_likelihood(batch):
    model = small().double()
    frames, mask = batch[0].double(), batch[1].double()
    together = model.frame_nll(frames, mask)
    for i in range(len(frames)):
        length = int(mask[i].sum())
        alone = model.frame_nll(frames[i:i + 1, :length], mask[i:i + 1, :length])[0]
        assert torch.allclose(together[i, :length], alone)
        assert together[i, length:].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS[::3])
def test_nothing_looks_ahead(kind, batch):
    model = small(**kind)
    voices = data.to_voices(batch[0][:2], 4)
    voices[:, 16:] = voices[:, :16].clone()  # there is something to recall
    other = voices.clone()
    other[:, 20:] = voices[:, 5:17].clamp(min=1) - 1

    def logits(past, chosen):
        known, _ = model.read(past[:, :-1])
        return [model.voice_logits(i, known, chosen) for i in range(4)]
    before, after = logits(voices, voices), logits(other, other)
    assert all(torch.equal(a[:, :20], b[:, :20]) for a, b in zip(before, after))
    assert not torch.equal(before[0][:, 21:], after[0][:, 21:])
    for i, v in enumerate(model.order):  # no logit hangs on its own voice or a later one
        moved = voices.clone()
        moved[..., v] = (moved[..., v] + 1) % 89
        changed = [not torch.equal(a, b) for a, b in zip(before, logits(voices, moved))]
        assert changed == [kind["heads"] == "chained" and j > i for j in range(4)]


def test_tonality_counts_the_pitch_classes_so_far(batch):
    model, roll = small(), batch[0][:1, :20]
    known, _ = model.read(data.to_voices(roll, 4))
    for t in (0, 5, 12):
        counts = torch.stack([roll[0, :t, (c - 1) % 12::12].sum() for c in range(12)])
        logs = (counts + 1).log() - (counts.mean() + 1).log()  # symbol c is key c - 1
        assert torch.allclose(known["often"][0, t, 0], logs, atol=1e-6)
    assert torch.allclose(known["turn"].sum(-1), torch.ones(1, 21, 12), atol=1e-5)


def test_degrees_of_the_key_move_with_the_music(batch):
    """A piece three semitones higher has the same degrees."""
    model, voices = small(), data.to_voices(batch[0][:2, :20], 4)
    higher = torch.where(voices > 0, voices + 3, 0)
    degrees = [attn_lstm.degrees(v, attn_lstm.tonality(v, 20, model.scale)[1])
               for v in (voices, higher)]
    assert torch.allclose(*degrees, atol=1e-5)


def test_memory_is_the_longest_earlier_passage_the_latest_of_several():
    torch.manual_seed(1)
    past = torch.randint(1, 3, (3, 60, 2))
    follows, kind = attn_lstm.recall(past, 60)
    lengths = torch.tensor(attn_lstm.LENGTHS)
    for b, t in itertools.product(range(3), range(60)):
        runs = {}
        for back in range(attn_lstm.NEAR, t + 1):
            same = (past[b, back:t + 1] == past[b, :t + 1 - back]).all(1).flip(0)
            runs[back] = int(same.long().cumprod(0).sum())
        longest = max(runs.values(), default=0)
        if not longest:
            assert kind[b, t] == -1
            continue
        back = min(back for back, run in runs.items() if run == longest)
        again = sum(run >= attn_lstm.PHRASE for run in runs.values()) > 1
        assert follows[b, t].tolist() == past[b, t + 1 - back].tolist()
        assert kind[b, t] == (lengths <= longest).sum() + again * (len(lengths) + 1)


def test_samples_follow_the_probabilities(batch):
    """Holding or leaving a note first and choosing another then is the same distribution."""
    model = small(voices=2)
    for scores in model.scores:  # few symbols that are often drawn
        scores.weight.data.mul_(3)
    prime = batch[0][0, :20].bool().numpy()
    drawn = model.sample(6000, 1, torch.Generator().manual_seed(0), top_p=1.0, prime=prime)
    known, _ = model.read(data.to_voices(torch.from_numpy(prime)[None], 2))
    symbols, counts = data.to_voices(drawn[:, 0], 2).unique(dim=0, return_counts=True)
    p = chain_probability(model, at_the_end(known, len(symbols)), symbols)
    often = counts > 60
    assert often.sum() > 3 and torch.allclose(counts[often] / 6000, p[often], rtol=0.25)


def test_no_chained_sample_crosses_and_greedy_repeats_itself():
    model = small()
    greedy = [model.sample(2, 10, torch.Generator().manual_seed(seed), temperature=0)
              for seed in (0, 1)]
    assert torch.equal(*greedy) and torch.equal(greedy[0][0], greedy[0][1])
    drawn = [model.sample(3, 20, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0].shape == (3, 20, 88) and drawn[0].dtype == torch.bool
    assert drawn[0].sum(-1).max() <= 4
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.isfinite(model.nll(drawn[0].float(), torch.ones(3, 20))).all()


@pytest.mark.parametrize("length", [0, 1, 6, 50])
def test_a_prime_of_any_length_is_gone_on_from(length, batch):
    model = small(window=16)
    prime = batch[0][0].repeat(2, 1)[:length].bool().numpy()
    roll = model.sample(2, 5, torch.Generator().manual_seed(0), prime=prime)
    assert roll.shape == (2, 5, 88)
    known, _ = model.read(data.to_voices(torch.from_numpy(prime)[None], 4).view(1, -1, 4))
    p = chain_probability(model, at_the_end(known, 2), data.to_voices(roll[:, 0], 4))
    assert (p > 0).all()  # one step of it; the others are tested above


@pytest.mark.parametrize("voices, heads", [(4, "chained"), (4, "parallel"), (1, "chained")])
def test_the_melody_comes_back_note_for_note(voices, heads, corpus):
    """And where it rests, the other voices stay below its last note."""
    model, piece = small(heads=heads, voices=voices), corpus.test[0][:20].copy()
    piece[10:14] = False
    tune = data.to_voices(torch.from_numpy(piece), 1)[:, 0]
    for roll in model.sample(3, 24, torch.Generator().manual_seed(0), melody=piece):
        top = data.to_voices(roll, 1)[:, 0]
        assert torch.equal(top[:20][tune > 0], tune[tune > 0])
        assert (top[10:14] < tune[9]).all()


@pytest.mark.parametrize("heads", ["chained", "parallel"])
def test_two_pieces_can_be_learnt_by_heart(heads, batch):
    model = small(hidden=48, heads=heads, dropout_input=0, dropout=0, dropout_heads=0).train()
    frames, mask = batch[0][:2, :10], batch[1][:2, :10]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2, weight_decay=0)
    for _ in range(60):
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
    each = [model.frame_nll(torch.from_numpy(piece)[None].float(), torch.ones(1, len(piece)))[0]
            for piece in pieces]
    assert figures["nll"] == pytest.approx(sum(e.sum().item() for e in each) / 41, rel=1e-5)
    after_first = sum(e[1:].sum().item() for e in each) / 39
    assert figures["nll_after_first"] == pytest.approx(after_first, rel=1e-5)


def test_attention_heads_that_do_not_divide_are_refused():
    with pytest.raises(data.InputError, match="--attention-heads 3"):
        attn_lstm.AttnLSTM(hidden=16, attention_heads=3)
