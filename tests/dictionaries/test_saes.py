"""What a sparse autoencoder reads and writes, against formulas written out by hand, under every norm."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from bizzaroworld.dictionaries.saes import KINDS, NORMS, SAE, DictionaryError, directions, error, features_of, perfect, pre_activations, shift_and_scale

PLACE = ("resid_post", 3)
D, N = 8, 20


def made(kind="relu", norm="none", d_out=D, **parts):
    rng = torch.Generator().manual_seed(0)
    def draw(*shape): return torch.randn(*shape, generator=rng, dtype=torch.float64)
    given = dict(W_enc=draw(D, N), b_enc=draw(N) / 4, W_dec=draw(N, d_out), b_dec=draw(d_out), b_in=draw(D), threshold=draw(N).abs(), k=3, r_mag=draw(N) / 4, b_mag=draw(N) / 4)
    return SAE(kind, reads=PLACE, norm=norm, scale=2.5, **{"writes": PLACE, **given, **parts})


@pytest.fixture
def x(): return 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1


def by_hand(sae, x):
    "Features of one token, in numpy."
    x, W, b = x.numpy(), sae.W_enc.numpy(), sae.b_enc.numpy()
    shift = {"layer_norm": x.mean()}.get(sae.norm, 0)
    scale = {"none": 1, "scale": 2.5, "token_norm": np.sqrt((x ** 2).mean()), "layer_norm": x.std(ddof=1) + 1e-5}[sae.norm]
    read = ((x - shift) / scale - sae.b_in.numpy()) @ W
    pre = read + b
    if sae.kind == "relu": f = np.maximum(pre, 0)
    if sae.kind in ("jumprelu", "batchtopk"): f = np.where(pre > sae.threshold.numpy(), pre, 0)
    if sae.kind == "topk": f = np.where(pre >= np.sort(pre)[-sae.k], np.maximum(pre, 0), 0)
    if sae.kind == "gated": f = np.where(pre > 0, np.maximum(read * np.exp(sae.r_mag.numpy()) + sae.b_mag.numpy(), 0), 0)
    return f, (f @ sae.W_dec.numpy() + sae.b_dec.numpy()) * scale + shift


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_under_each_norm_is_its_formula(kind, norm, x):
    sae = made(kind, norm)
    f, out = (np.stack(parts) for parts in zip(*(by_hand(sae, token) for token in x)))
    np.testing.assert_allclose(sae.encode(x).numpy(), f, atol=1e-10)
    np.testing.assert_allclose(sae(x).numpy(), out, atol=1e-10)
    assert 0 < (f > 0).mean() < 1


@pytest.mark.parametrize("norm", NORMS)
def test_the_shares_of_the_features_add_up(norm, x):
    "What the features write, one by one, with the bias in the token's units, is what the dictionary makes of the token; without one of them it is that of the others."
    sae = made("relu", norm)
    f, each = sae.encode(x), directions(sae, x)
    shift, scale = shift_and_scale(sae, x)
    torch.testing.assert_close((f[..., None] * each).sum(1) + sae.b_dec * scale + shift, sae(x))
    which = f.argmax(1)
    less = f.scatter(1, which[:, None], 0)
    share = f.gather(1, which[:, None]) * directions(sae, x, which)
    torch.testing.assert_close(sae(x) - share, sae.decode(less, x))
    assert share.norm(dim=1).min() > 0.1
    torch.testing.assert_close(directions(sae, x, which), each[torch.arange(len(x)), which])


@pytest.mark.parametrize("norm", ["token_norm", "layer_norm"])
def test_what_norms_each_token_does_not_see_its_length(norm, x):
    sae = made("jumprelu", norm)
    torch.testing.assert_close(sae.encode(5 * x), sae.encode(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made("jumprelu").encode(5 * x), made("jumprelu").encode(x), atol=0.1)


def test_tokens_are_read_one_by_one(x):
    for kind in KINDS:
        sae = made(kind, "layer_norm")
        torch.testing.assert_close(sae.encode(x.view(5, 10, D))[2, 3], sae.encode(x[23]))


def test_topk_keeps_no_more_than_k_and_nothing_negative(x):
    sae = made("topk", b_enc=torch.full((N,), -8.0, dtype=torch.float64))
    f = sae.encode(x)
    on = (f > 0).sum(1)
    assert f.min() == 0 and on.max() <= 3 and on.min() < 3  # where fewer than k are positive, fewer are on


def test_a_perfect_dictionary_gives_back_everything_exactly(x):
    sae = perfect(D, "z", 2, heads=4).to(dtype=torch.float64)
    assert torch.equal(sae(x), x) and torch.equal(error(sae, x), torch.zeros_like(x)) and sae.heads == 4 and sae.reads == sae.writes == ("z", 2)
    assert (sae.encode(x) > 0).sum(1).eq(D).all()


def test_the_error_is_what_is_left(x):
    sae = made()
    torch.testing.assert_close(error(sae, x) + sae(x), x)


def test_a_transcoder_writes_elsewhere(x):
    sae = made(writes=("mlp_out", 3), d_out=5, W_skip=torch.randn(D, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    y = torch.zeros(50, 5, dtype=torch.float64)
    f = features_of(sae, x)
    torch.testing.assert_close(sae(x), f @ sae.W_dec + sae.b_dec + x @ sae.W_skip)
    torch.testing.assert_close(error(sae, x, y), -sae(x))
    with pytest.raises(DictionaryError, match="give y"): error(sae, x)
    assert sae.is_transcoder and sae.d_out == 5 and repr(sae).startswith("transcoder") and "resid_post of layer 3 to mlp_out of layer 3" in repr(sae)


def test_to_moves_every_part():
    half = made("gated").to(dtype=torch.float16)
    assert {part.dtype for part in vars(half).values() if isinstance(part, torch.Tensor)} == {torch.float16} and half.k == 3 and half.kind == "gated"


def test_pre_activations_are_what_the_decision_is_made_on(x):
    sae = made("jumprelu")
    assert torch.equal(sae.encode(x) > 0, pre_activations(sae, x) > sae.threshold)


@pytest.mark.parametrize("change, match", [
    ({"kind": "vq"}, "Unknown kind of dictionary 'vq': use relu"), ({"norm": "batch"}, "Unknown norm"),
    ({"kind": "jumprelu", "threshold": None}, "needs threshold"), ({"kind": "topk", "k": None}, "needs k"), ({"kind": "gated", "r_mag": None}, "needs r_mag"),
    ({"b_enc": torch.zeros(N + 1)}, "b_enc is 21, where"), ({"W_dec": torch.zeros(N - 1, D)}, r"W_dec is 19 x 8.*20 x 8"), ({"b_in": torch.zeros(D + 1)}, "b_in is 9"), ({"W_enc": torch.zeros(D)}, "both are matrices"),
    ({"W_enc": torch.zeros(D, 0), "W_dec": torch.zeros(0, D), "b_enc": torch.zeros(0), "threshold": None, "r_mag": None, "b_mag": None, "k": None}, "has features"),
    ({"k": 0}, "k is 0"), ({"k": N + 1}, "k is 21"), ({"heads": 3}, "3 heads of one size"), ({"heads": 0}, "0 heads"), ({"scale": 0.0}, "must be positive"), ({"scale": float("nan")}, "must be positive"),
])
def test_what_does_not_fit_is_refused(change, match):
    with pytest.raises(DictionaryError, match=match): replace(made(), **change)


def test_activations_and_features_of_another_size_are_refused(x):
    with pytest.raises(DictionaryError, match="5 dimensions cannot be read by a dictionary of 8"): made().encode(torch.zeros(2, 5))
    with pytest.raises(DictionaryError, match="7 features cannot be written by a dictionary of 20"): made().decode(torch.zeros(50, 7, dtype=torch.float64), x)


def test_numbers_that_are_not_finite_are_refused():
    sae = perfect(8)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        part = getattr(sae, name).clone()
        part.view(-1)[3] = float("nan")
        with pytest.raises(DictionaryError, match=f"{name} holds 1 numbers that are not finite"): replace(sae, **{name: part})
