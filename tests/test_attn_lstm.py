"""attn_lstm.py: what its memory and its sense of the key do for music it was not trained on."""

import torch

import data
from conftest import fit, small


def trained(music, voices, steps, *without):
    """A model that has seen so many batches of music(), voices (B, T, V)."""
    torch.manual_seed(0)
    model = small("attn_lstm", hidden=32, voices=voices, attention="off", without=without,
                  dropout_input=0, dropout=0, dropout_heads=0).train()

    fit(lambda: nll(model, music()).mean(), model, steps, 1e-2)
    return model.eval().requires_grad_(False)


def nll(model, voices):
    """-log p of each frame of voices (B, T, V): (B, T)."""
    return model.frame_nll(data.from_voices(voices).float(), torch.ones(voices.shape[:2]))


def test_a_passage_that_returns_raises_the_probability_of_what_followed_it():
    """Of several the longest, the latest of equals; without memory there is no such thing."""
    def chords(length, n=16):
        low = 20 + torch.rand(n, 24).argsort(1)[:, :length, None]  # no chord stands twice
        return torch.cat([low + torch.randint(1, 24, (n, length, 1)), low], -1)

    def twice():
        return chords(12).repeat(1, 2, 1)
    with_it, without = (trained(twice, 2, 40, "tonality", "parallels", *more)
                        for more in ((), ("memory",)))
    first, again = nll(with_it, music := twice()).split(12, 1)
    assert again[:, 1:].mean() < first.mean() - 4
    assert nll(without, music)[:, 13:].mean() > first.mean() - 1

    a, b, c, d, e, f, more, most = chords(24).split([1] * 6 + [9] * 2, 1)
    past = torch.cat([a, b, c, more, e, b, d, most], 1)  # after b the latest says d
    for now, follows, not_that in ((a, c, d), (f, d, c)):
        likely, unlikely = (nll(with_it, torch.cat([past, now, b, what], 1))[:, -1]
                            for what in (follows, not_that))
        assert (likely < unlikely - 4).all()


def test_the_key_is_found_from_what_has_sounded():
    scale = torch.tensor([0, 2, 4, 5, 7, 9, 11])

    def melodies(n=16):
        return torch.randint(34, 46, (n, 1, 1)) + scale[torch.randint(7, (n, 32, 1))]
    with_it, without = (trained(melodies, 1, 40, "memory", "parallels", *more)
                        for more in ((), ("tonality",)))
    music = melodies(64)
    assert nll(with_it, music)[:, 16:].mean() < nll(without, music)[:, 16:].mean() - 0.2
