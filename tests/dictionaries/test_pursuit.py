"""Pursuit: planted codes are found, the step is the exact one, and no encoder does better with the same directions."""
from dataclasses import replace

import pytest
import torch
from scipy.optimize import minimize_scalar, nnls

from bizzaroworld.dictionaries.learning import Held, train_sae
from bizzaroworld.dictionaries.pursuit import WAYS, _stepped, coders, frontier, gradient_pursuit, matching_pursuit, random_dictionary, reconstructions, target_of
from bizzaroworld.dictionaries.recipes import Recipe, first_parameters
from bizzaroworld.dictionaries.saes import DictionaryError, perfect


def planted(n=200, features=60, d=48, k=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    D = torch.randn(features, d, generator=rng)
    D *= (0.5 + torch.rand(features, 1, generator=rng)) / D.norm(dim=1, keepdim=True)  # of several lengths
    codes = torch.zeros(n, features).scatter(1, torch.rand(n, features, generator=rng).topk(k).indices, 1 + torch.rand(n, k, generator=rng))
    return D, codes, codes @ D


def left(x, codes, D): return float((x - codes @ D).square().sum() / x.square().sum())


def test_planted_codes_are_recovered():
    D, codes, x = planted()
    found = gradient_pursuit(x, D, 3)
    whole = ((found > 0) == (codes > 0)).all(1)
    assert whole.float().mean() > 0.9 and (found >= 0).all() and ((found > 0).sum(1) <= 3).all()
    more = gradient_pursuit(x, D, 12)  # with a few features more the sizes settle
    assert left(x, more, D) < 1e-3


@pytest.mark.parametrize("pursue", [gradient_pursuit, matching_pursuit])
def test_orthonormal_directions_are_exact(pursue):
    D = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    codes = torch.rand(30, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(pursue(codes @ D, D, 16), codes, rtol=1e-4, atol=1e-5)


def test_the_step_is_the_one_that_a_search_finds():
    D, codes, x = planted(5)
    on = torch.tensor([[0, 7, 31]]).expand(5, -1)
    sizes = torch.full((5, 3), 10.0)  # far from zero, so that no clipping hides the step
    some = D[on]
    x = x + (sizes[:, :, None] * some).sum(1)
    residual = x - (sizes[:, :, None] * some).sum(1)
    there = torch.tensor([[True, True, False]]).expand(5, -1)
    found = _stepped(x, some, sizes, there, residual)
    for i in range(5):
        g = (some[i] @ residual[i]) * there[i]
        best = minimize_scalar(lambda a: float((residual[i].double() - a * (g.double() @ some[i].double())).square().sum()), options={"xtol": 1e-12}).x
        torch.testing.assert_close(found[i], sizes[i] + best * g, rtol=1e-4, atol=1e-4)


def test_sizes_come_near_to_the_best_for_their_features():
    D, _, x = planted(40, k=6)
    found = gradient_pursuit(x, D, 8)
    for i in range(10):
        on = torch.nonzero(found[i])[:, 0]
        _, best = nnls(D[on].T.double().numpy(), x[i].double().numpy())
        own = float((x[i] - found[i] @ D).norm())
        assert best - 1e-6 <= own <= best + 0.15 * float(x[i].norm())


def test_more_features_lose_less_and_the_first_choice_is_the_same():
    D, _, x = planted(60, k=6)
    lost = [left(x, gradient_pursuit(x, D, k), D) for k in (1, 2, 4, 8, 16)]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.2 * lost[0]
    torch.testing.assert_close(gradient_pursuit(x, D, 1), matching_pursuit(x, D, 1), rtol=1e-5, atol=1e-6)
    assert all(left(x, gradient_pursuit(x, D, k), D) < left(x, matching_pursuit(x, D, k), D) for k in (4, 8, 16))


def test_the_first_two_steps_of_both_pursuits_are_the_same():
    "After the first, nothing of the first direction is left over, so its size has no gradient; after the second it has."
    D, _, x = planted(60, k=6)
    for k in (1, 2): torch.testing.assert_close(gradient_pursuit(x, D, k), matching_pursuit(x, D, k), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(gradient_pursuit(x, D, 3), matching_pursuit(x, D, 3), atol=0.01)


def test_nothing_is_made_of_nothing():
    D = torch.eye(4)
    assert gradient_pursuit(-torch.ones(2, 4), D, 3).eq(0).all() and matching_pursuit(torch.zeros(2, 4), D, 2).eq(0).all()


@pytest.fixture(scope="module")
def trained():
    x = planted(600, k=4)[2] + 3  # a mean that the bias has to hold
    return train_sae(Held(x), Recipe("topk", n_features=80, k=4, steps=200, batch=256), progress=False)[0], x


def test_pursuit_is_on_the_frontier_of_every_dictionary(trained):
    sae, x = trained
    table = frontier(sae, x, [2, 4, 8]).set_index(["method", "k"])
    assert set(table.index.get_level_values(0)) == set(WAYS)
    for k in (2, 4, 8):
        assert table.unexplained["gradient pursuit", k] <= table.unexplained["largest of the encoder", k]
        assert k == 2 or table.unexplained["gradient pursuit", k] < 0.9 * table.unexplained["random directions", k]
        assert table.l0["gradient pursuit", k] <= k
    assert table.unexplained["largest of the encoder", 4] == pytest.approx(table.unexplained["encoder", 0], abs=1e-6)
    by_hand = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert table.unexplained["encoder", 0] == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("norm", ["none", "scale", "token_norm", "layer_norm"])
def test_the_units_of_every_norm_are_put_back(norm):
    "With enough features every activation is given back, whatever is taken off and put back around them."
    x = planted(20)[2] + 3
    sae = replace(perfect(48), norm=norm, scale=2.5, b_dec=torch.linspace(-1, 1, 48))
    torch.testing.assert_close(reconstructions(sae, [48])["matching pursuit 48"](x), x, rtol=1e-3, atol=1e-3)
    one, code = coders(sae, [3])["gradient pursuit", 3]
    torch.testing.assert_close(reconstructions(sae, [3])["gradient pursuit 3"](x[:5]), one.decode(code(x[:5]), x[:5]))


def test_random_directions_are_as_long(trained):
    sae = trained[0]
    other = random_dictionary(sae, 1)
    torch.testing.assert_close(other.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))
    assert (torch.nn.functional.cosine_similarity(other.W_dec, sae.W_dec).abs() < 0.6).all() and not torch.equal(other.W_dec, random_dictionary(sae, 2).W_dec)


def test_random_directions_are_not_those_that_a_toy_or_a_training_begins_with():
    "A toy and a training that draw with the same seed must not have drawn the control."
    D, _, x = planted(features=60, d=48)
    sae = replace(perfect(48), W_enc=D.T.contiguous(), W_dec=D, b_enc=torch.zeros(60))
    for others in (D, first_parameters(Recipe("topk", n_features=60, k=4), x)["W_dec"].detach()):
        assert torch.nn.functional.cosine_similarity(random_dictionary(sae, 0).W_dec, others).abs().max() < 0.7
    assert torch.nn.functional.cosine_similarity(first_parameters(Recipe("topk", n_features=60, k=4), x)["W_dec"].detach(), D).abs().max() < 0.7


def test_what_cannot_be_pursued_is_refused():
    x = torch.zeros(2, 4)
    with pytest.raises(DictionaryError, match="give 1 to 8"): gradient_pursuit(x, torch.zeros(8, 4), 9)
    with pytest.raises(DictionaryError, match="2 x 4 and directions of 5"): matching_pursuit(x, torch.zeros(8, 5), 2)
    with pytest.raises(DictionaryError, match="transcoder"): target_of(replace(perfect(4), writes=("mlp_out", 0)), x)
