"""Exact likelihoods, nothing ahead, padding, sampling, learning, and what a memory is good for."""

import inspect
import math
from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

import attn_lstm
import data
from conftest import MODELS, MODULES, fit, small


def each(*cases):
    """Parametrize over models, each as "name flag=value flag=value": name and {flag: value}."""
    def read(case):
        name, *flags = case.split()
        pairs = (flag.split("=") for flag in flags)
        values = {flag: int(value) if value.isdigit() else value for flag, value in pairs}
        return name, values | {flag: values[flag].split("+") for flag in {"without"} & {*values}}
    return pytest.mark.parametrize("name, options", [*map(read, cases)], ids=cases)


def frame_nll(model, frames, mask, z=None, kind=None):
    """-log p of each frame (B, T); of its codes too at a pattern's first; given z, or its mean;
    given a kind, or the one that fits."""
    kind = None if kind is None else kind.expand(len(frames))
    if isinstance(model, attn_lstm.AttnLSTM):
        return model.frame_nll(frames, mask, kind=kind)
    if hasattr(model, "frame_nll"):
        return model.frame_nll(frames, mask)
    if hasattr(model, "score"):
        return model.score(frames, mask, model.encode(frames, mask)[0] if z is None else z)[0]
    with pytest.MonkeyPatch.context() as patch:
        if kind is not None:  # it has probability 1
            patch.setattr(data, "kind", lambda *_: kind)
            model.kinds = F.one_hot(kind[0], 48).float()
        _, terms = model.terms(frames, mask)
    terms["reconstruction"][:, ::model.pattern] += terms["prior"]
    return terms["reconstruction"]


@each("lstm voices=1", "lstm voices=2", "attn_lstm voices=1", "attn_lstm voices=2",
      "attn_lstm voices=2 heads=parallel without=relations",
      "vae voices=2 window=12 segment=6", "hvae voices=2 window=12 segment=6",
      "vqvae voices=2 codes=1 pattern=1 codebook=1", "vqvae voices=2 codes=1 pattern=1 codebook=3")
@torch.no_grad()
def test_all_frames_together_have_probability_one(name, options, batch):
    """Less, a bound, where voices may cross, or a frame's code is not its only one."""
    model = small(name, **options)
    every = [keys for n in range(model.voices + 1) for keys in combinations(range(88), n)]
    past = torch.cat([batch[0][0, :8], batch[0][0, :3]])
    frames = past.new_zeros(len(every), 12, 88)
    frames[:, :11] = data.from_voices(data.to_voices(past, model.voices))
    for frame, keys in zip(frames[:, 11], every):
        frame[list(keys)] = 1
    z = torch.randn(8).expand(len(every), -1)
    nll = frame_nll(model, frames, torch.ones(len(every), 12), z, torch.tensor(15))[:, 11]
    total = nll.neg().exp().sum().item()
    crosses = model.voices > 1 and (name == "lstm" or "heads" in options)
    if crosses or options.get("codebook", 1) > 1:
        assert 0.01 < total < 0.98
    else:
        assert total == pytest.approx(1, abs=1e-4)


@each("lstm voices=2", "attn_lstm window=7", "attn_lstm without=attention",
      "attn_lstm without=relations", "attn_lstm heads=parallel voices=1", "attn_lstm voices=8",
      "vae", "vae voices=2", "hvae", "hvae voices=1", "vqvae", "vqvae codes=2",
      "vqvae codes=1 pattern=4")
@torch.no_grad()
def test_sampling_draws_from_what_training_scores(name, options, batch, monkeypatch):
    """After a prime, with state carried past what attention sees: what was drawn has the roll's
    likelihood. So it does not cross or double. (vqvae.py draws codes, not notes.)"""
    model, scores, drawn, codes, leaves = small(name, **options), [], [], [], None
    real = data.sample_symbols

    def spy(logits, *args, **more):
        nonlocal leaves
        symbols = real(logits, *args, **more)
        scores.append(logits.log_softmax(-1))
        p = scores[-1].gather(-1, symbols.view(*logits.shape[:-1], -1))[..., 0]
        if leaves is not None:  # the choice just drawn was whether a note is left for this one
            p = torch.where(leaves > 0, p, 0)
        leaves = symbols if logits.shape[-1] == 2 else None
        codes.extend([symbols] * (logits.shape[-1] == 16))
        drawn.append(p.view(3, -1).sum(1))
        return symbols
    monkeypatch.setattr(data, "sample_symbols", spy)
    past = data.from_voices(data.to_voices(batch[0][:1, :12], model.voices))
    draw = {"generator": torch.Generator().manual_seed(0), "temperature": 1.0, "top_p": 1.0}
    z = None
    if name in ("vae", "hvae"):
        z = torch.randn(3, 8)
        roll = model.decode(z, 32, past=past.expand(3, -1, -1), **draw)
        drawn = drawn[12 * model.voices:]
    else:
        roll = torch.cat([past.expand(3, -1, -1), model.sample(3, 20, prime=past[0], **draw)], 1)
    mask = torch.ones(3, 32)
    if name == "lstm":  # which of the draws it took, the roll says
        taken = data.to_voices(roll[:, 12:], model.voices)[..., None]
        drawn = [torch.stack(scores, 1).gather(-1, taken).flatten(1).sum(1)]
    if name == "vqvae":  # the codes that were drawn, not those that encode what was written
        given, _ = model.terms(past.expand(3, -1, -1).float(), mask[:, :12])
        codes = torch.cat([given, torch.stack(codes, 1).unflatten(1, (-1, model.codes))], 1)
        monkeypatch.setattr(model.quantizer, "forward",
                            lambda *_: (codes, model.quantizer.entries[codes]))
        notes = data.to_voices(roll, model.voices)[..., model.turn].unbind(-1)
        notes = [x.unflatten(1, (-1, model.pattern)) for x in notes]  # certain, given the codes
        monkeypatch.setattr(model, "note_logits", lambda *_: 1e9 * F.one_hot(notes.pop(0), 89))
    nll = frame_nll(model, roll.float(), mask, z, data.kind(past))[:, 12:].sum(1)
    assert torch.allclose(-sum(drawn), nll, atol=1e-3) and roll[:, 12:].any()


def test_lstm_draws_the_distribution_of_real_frames():
    """Two voices over three keys: the pairs that are frames, their probabilities scaled to one."""
    logits, model = torch.full((2, 89), -torch.inf), small("lstm", voices=2)
    logits[:, [0, 40, 41, 42]] = torch.tensor([[0.5, 0.0, 1.0, 0.3], [0.2, 1.0, 0.4, -0.5]])
    pairs = torch.cartesian_prod(*[torch.tensor([0, 40, 41, 42])] * 2)
    pairs = pairs[(data.to_voices(data.from_voices(pairs), 2) == pairs).all(1)]
    assert len(pairs) == 1 + 3 + 3  # silence, the top voice alone, two different keys in order
    want = logits[[0, 1], pairs].sum(1).softmax(0)
    model.logits = lambda *_: (logits.expand(10000, 1, 2, 89), None)
    have = (model.sample(10000, 1, top_p=1.0) == data.from_voices(pairs)).all(-1).float().mean(0)
    assert torch.allclose(have, want, atol=0.015)


def test_lstm_can_leave_out_the_likeliest():
    logits, model = torch.full((1, 89), -torch.inf), small("lstm", voices=1)
    logits[0, [40, 41, 42, 43]] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    model.logits = lambda *_: (logits.expand(10000, 1, 1, 89), None)
    drawn = model.sample(10000, 1, top_p=1.0, skip_top=2).float().mean((0, 1))
    assert drawn[39:43].tolist() == pytest.approx([0, 0, 0.75, 0.25], abs=0.02)


@torch.no_grad()
def test_a_trained_attn_lstm_thinks_nothing_impossible(batch):
    """Symbols that fit share a part of the probability, however sure the network is."""
    model, frames, mask = small("attn_lstm"), *(x[:2] for x in batch)
    most = model.voices * math.log(data.SYMBOLS / attn_lstm.EVEN)
    for layer in model.scores:
        layer.weight.mul_(1000)
    kind = data.kind(frames, mask)
    assert (model.frame_nll(frames, mask, kind=kind) < most).all()
    model.train()  # training sees the whole surprise
    assert (model.frame_nll(frames, mask, kind=kind) > most).any()


@torch.no_grad()
def test_the_kind_that_fits_bounds_what_all_kinds_together_say(batch):
    model, (frames, mask) = small("attn_lstm"), batch
    model.kinds.uniform_(0.1, 9)
    chances = model.kinds / model.kinds.sum()
    every = torch.stack([chances[k].log() - frame_nll(model, frames, mask, kind=torch.tensor(k))
                         .sum(1) for k in range(48)])
    assert (every.logsumexp(0) > -model.nll(frames, mask) - 1e-3).all()
    fits = every.gather(0, data.kind(frames, mask)[None])[0]
    assert torch.allclose(fits, -model.nll(frames, mask), rtol=1e-4)


def test_samples_have_kinds_as_drawn_or_that_of_what_is_given(corpus, monkeypatch):
    model, kinds = small("attn_lstm"), []
    real = attn_lstm.tonality
    monkeypatch.setattr(attn_lstm, "tonality", lambda past, T, kind: (
        kinds.append(kind), real(past, T, kind))[1])
    model.kinds.zero_()[[3, 41]] = 1.0
    for given in ({}, {"prime": corpus.test[0]}, {"melody": corpus.test[1]}):
        kinds.clear()
        model.sample(40, 2, torch.Generator().manual_seed(0), **given)
        want = {int(data.kind(torch.as_tensor(roll))) for roll in given.values()} or {3, 41}
        assert {*torch.stack(kinds).flatten().tolist()} == want


@torch.no_grad()
def test_attn_lstm_reads_the_frame_before_a_window_and_does_not_score_it(batch):
    model, frames, mask = small("attn_lstm"), batch[0][:2], torch.ones(2, 32)
    silent = model.frame_nll(frames, mask, torch.zeros(2, 1, 88))
    assert torch.equal(silent, model.frame_nll(frames, mask))
    later, real = frames[:, 1:], mask[:, 1:]
    after, alone = model.frame_nll(later, real, frames[:, :1]), model.frame_nll(later, real)
    assert after.shape == (2, 31) and not torch.isclose(after[:, 0], alone[:, 0]).any()


@each("lstm", "attn_lstm", "attn_lstm heads=parallel without=attention",
      "attn_lstm without=relations", "vae", "hvae", "vqvae",
      "vae features=0 feed=softmax drop=0", "hvae features=0 feed=softmax drop=0")
@torch.no_grad()
def test_nothing_looks_ahead(name, options, batch):
    model, frames, mask = small(name, **options), batch[0][:2].clone(), torch.ones(2, 32)
    frames[:, 16:] = frames[:, :16].clone()  # there is something to recall
    other, z = frames.clone(), torch.randn(2, 8)
    other[:, 20] = frames[:, 20].roll(1, -1)
    one, two = (frame_nll(model, x, mask, z, torch.tensor(20)) for x in (frames, other))
    changed = (one != two).any(0)
    assert changed[20] and not changed[:20].any()
    assert changed[22] == ("feed" not in options)


@pytest.mark.parametrize("name", MODELS[:5])
@torch.no_grad()
def test_padding_and_batch_change_nothing(name, batch):
    model, (frames, mask) = small(name), batch
    together = frame_nll(model, frames, mask)
    for i in range(len(frames)):
        length = int(mask[i].sum()) + 1 & ~1  # whole patterns
        alone = frame_nll(model, frames[i:i + 1, :length], mask[i:i + 1, :length])[0]
        assert torch.allclose(alone, together[i, :length], atol=1e-4)
    if name == "vqvae":  # what fills the last pattern counts, so that its codes may know of it
        mask = mask[:, ::2].repeat_interleave(2, 1)
    assert (together[mask > 0] > 0).all() and not together[mask == 0].any()


@pytest.mark.parametrize("name", MODELS)
def test_samples_follow_the_seed_and_the_prime(name, corpus):
    model = small(name, dropout=0.5)

    def draw(seed=0, length=40, training=False, **more):
        generator = torch.Generator().manual_seed(seed)
        return model.train(training).sample(2, length, generator, **more)
    rolls = draw()
    assert rolls.shape == (2, 40, 88) and rolls.dtype == torch.bool and rolls.sum(-1).max() <= 4
    assert torch.equal(rolls, draw(training=True)) and torch.equal(rolls[:, :20], draw(length=20))
    assert not torch.equal(rolls, draw(seed=1)) and not torch.equal(*rolls)
    if "prime" in inspect.signature(model.sample).parameters:
        primed = [draw(length=21, prime=corpus.test[0][:n]) for n in (0, 2, 7, 50)]
        assert torch.equal(primed[0], rolls[:, :21]) and primed[2].shape == (2, 21, 88)
        assert not torch.equal(primed[0], primed[1]) and not torch.equal(primed[2], primed[3])


@each("lstm", "attn_lstm", "attn_lstm voices=1", "attn_lstm heads=parallel")
def test_the_melody_comes_back_note_for_note(name, options, corpus):
    """And where it rests, the other voices stay below its last note."""
    piece = corpus.test[0][:20].copy()
    piece[10:14] = False
    tune = data.to_voices(torch.from_numpy(piece), 1)[:, 0]
    generator = torch.Generator().manual_seed(0)
    for roll in small(name, **options).sample(3, 20, generator, melody=piece):
        top = data.to_voices(roll, 1)[:, 0]
        assert torch.equal(top[tune > 0], tune[tune > 0]) and (top[10:14] <= tune[9]).all()


@each("lstm hidden=64 dropout=0", "vqvae codebook=64 hidden=64", *(
    f"attn_lstm hidden=48 heads={heads} dropout_input=0 dropout=0 dropout_heads=0"
    for heads in ("chained", "parallel")))
def test_two_pieces_can_be_learnt_by_heart(name, options, batch):
    model, (frames, mask) = small(name, **options).train(), (x[:2, :16] for x in batch)
    steps = 250 if name == "lstm" else 60
    fit(lambda: model(frames, mask)[0], model, steps, 2e-2)
    if name == "vqvae":  # its prior, once the codes stand
        model.quantizer.eval()
        model.encoder.requires_grad_(False)
        fit(lambda: model(frames, mask)[0], model, steps, 2e-2)
        rebuilt = model.eval().decode(model.encode(frames))
        assert (rebuilt & (frames > 0)).sum() > 0.8 * frames.sum()
    assert model.eval().nll(frames, mask).sum() / mask.sum() < 0.5


@pytest.mark.parametrize("name", MODELS[:5])
@torch.no_grad()
def test_figures_count_every_frame_once(name, batch):
    model = small(name, **{"window": 8} if name == "lstm" else {})
    pieces = [batch[0][0].bool().numpy(), batch[0][1, :9].bool().numpy()]
    torch.manual_seed(0)
    figures = MODULES[name].evaluate(model.train(), pieces)
    assert model.training
    torch.manual_seed(0)  # the VAEs' z
    windows = data.Windows(pieces, model.window, hop=model.window)
    tiled = model.eval().nll(*next(windows.chunks(99))).sum().item() / 41
    assert figures["nll_tiled" if name == "lstm" else "nll"] == pytest.approx(tiled, rel=1e-4)
    notes = sum(int(piece.sum()) for piece in pieces)
    assert figures["nll_per_note"] == pytest.approx(figures["nll"] * 41 / notes)
    if "nll_after_first" in figures:
        each = torch.cat([frame_nll(model, torch.from_numpy(piece)[None].float(),
                                    torch.ones(1, len(piece)))[0] for piece in pieces])
        later = each[torch.arange(41) % 32 > 0]
        assert figures["nll"] == pytest.approx(each.mean().item(), rel=1e-4)
        assert figures["nll_after_first"] == pytest.approx(later.mean().item(), rel=1e-4)
    else:
        assert 0 < figures["reconstruction"] < figures["nll"] and 0 <= figures["note_f1"] <= 1


def voices_nll(model, *voices):
    """-log p of each frame of voices (B, T, V), one part after the other: (B, T)."""
    frames = data.from_voices(torch.cat(voices, 1)).float()
    return model.frame_nll(frames, torch.ones(frames.shape[:2]))


def with_and_without(part, music, voices):
    """attn_lstm.py trained on batches of music(), with this part as its only help, and without."""
    parts = {"attention", "memory", "tonality", "parallels"}
    for without in (parts - {part}, parts):
        torch.manual_seed(0)
        model = small("attn_lstm", hidden=32, voices=voices, without=without,
                      dropout_input=0, dropout=0, dropout_heads=0).train()
        pieces = data.from_voices(torch.cat([music() for _ in range(20)]))
        model.kinds += data.kind(pieces).bincount(minlength=48)  # as train does
        fit(lambda: voices_nll(model, music()).mean(), model, 40, 1e-2)
        yield model.eval().requires_grad_(False)


def test_a_passage_that_returns_raises_the_probability_of_what_followed_it():
    """Of several the longest, the latest of equals; without memory there is no such thing."""
    def chords(length):
        low = 20 + torch.rand(16, 24).argsort(1)[:, :length, None]  # no chord stands twice
        return torch.cat([low + torch.randint(1, 24, (16, length, 1)), low], -1)
    memory, none = with_and_without("memory", lambda: chords(12).repeat(1, 2, 1), 2)
    music = chords(12).repeat(1, 2, 1)
    first, again = voices_nll(memory, music).split(12, 1)
    assert again[:, 1:].mean() < first.mean() - 4
    assert voices_nll(none, music)[:, 13:].mean() > first.mean() - 1
    a, b, c, d, e, f, more, most = chords(24).split([1] * 6 + [9] * 2, 1)
    past = a, b, c, more, e, b, d, most  # after b alone the latest says d
    for now, follows, not_that in ((a, c, d), (f, d, c)):
        likely, unlikely = (voices_nll(memory, *past, now, b, what)[:, -1]
                            for what in (follows, not_that))
        assert (likely < unlikely - 4).all()


def test_memory_knows_that_a_passage_was_just_stated_twice_in_a_row():
    a, b = torch.arange(20, 34).view(1, -1, 1).split([12, 2], 1)
    for past, known in ((torch.cat([a, a, b], 1), [23]), (torch.cat([a, b, a], 1), [])):
        match = MODULES["attn_lstm"].recall(past, 26)[1]
        twice = match > len(MODULES["attn_lstm"].LENGTHS) + 1
        assert twice[0].nonzero().flatten().tolist() == known


def test_a_key_that_is_known_tells_the_notes():
    def melodies():
        scale = torch.tensor([0, 2, 4, 5, 7, 9, 11])
        return torch.randint(34, 46, (16, 1, 1)) + scale[torch.randint(7, (16, 32, 1))]
    models, music = with_and_without("tonality", melodies, 1), torch.cat([melodies(), melodies()])
    tonality, none = (voices_nll(model, music)[:, 16:].mean() for model in models)
    assert tonality < none - 0.2
