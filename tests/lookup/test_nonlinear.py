"""What is left when the parts are taken away: linear layers give 0, a hash gives 1, and each number is that of a loop."""
from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bizzaroworld.lookup.nonlinear import (QUAD, attribute_neurons, excess, excess_share, isotropic_share, linearity, net_share, norms_by,
                                           orthogonal_part, parallelogram, quadruples, rise, shuffled_weights)

RNG = np.random.default_rng(5)
SEEDS = st.integers(0, 2 ** 31 - 1)


def halves(rng, n=6, d=9, width=7):
    """Pre-activations of all pairs of `n` first and `n` last names in a random linear layer, `first last neuron`."""
    return (rng.normal(size=(n, 1, d)) + rng.normal(size=(1, n, d))) @ rng.normal(size=(d, width)) + rng.normal(size=width)


def asked(grid):
    """Of a grid `first last neuron` the four that `excess` takes, for every name: others are all other halves."""
    n, m, width = grid.shape
    ab, b_only, a_only, neither = [], [], [], []
    for i, j in product(range(n), range(m)):
        rest, last = [k for k in range(n) if k != i], [k for k in range(m) if k != j]
        ab.append(grid[i, j]), b_only.append(grid[rest, j]), a_only.append(grid[i, last])
        neither.append(grid[np.ix_(rest, last)].reshape(-1, width))
    return [np.array(x) for x in (ab, b_only, a_only, neither)]


# excess

@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_linear_layer_has_no_excess_and_no_share(seed):
    rng = np.random.default_rng(seed)
    four = asked(halves(rng))
    found, total = excess(*four), rise(four[0], four[3])
    assert np.abs(found).max() < 1e-12 * np.abs(four[0]).max() * 100
    assert np.abs(total).max() > 0.1
    assert np.nanmax(excess_share(found, total, rng.normal(size=7))) < 1e-9


def test_single_precision_and_tensors_give_the_same():
    four = asked(halves(RNG))
    exact, single = excess(*four), excess(*(torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in four))
    assert isinstance(single, np.ndarray) and np.abs(single - exact).max() < 1e-5
    shares = excess_share(torch.tensor(single), torch.tensor(rise(four[0], four[3])), torch.ones(7))
    assert np.nanmax(shares) < 1e-5
    np.testing.assert_allclose(excess(*(torch.tensor(x).bfloat16() for x in four)), exact, atol=0.2)


def test_the_excess_is_that_of_a_loop():
    grid = np.maximum(halves(RNG), 0)
    found = excess(*asked(grid))
    for row, (i, j) in enumerate(product(range(6), range(6))):
        for k in range(7):
            b = np.mean([grid[a, j, k] for a in range(6) if a != i])
            a = np.mean([grid[i, b_, k] for b_ in range(6) if b_ != j])
            none = np.mean([grid[a_, b_, k] for a_ in range(6) for b_ in range(6) if a_ != i and b_ != j])
            assert found[row, k] == pytest.approx(grid[i, j, k] - b - a + none)
    assert np.abs(found).max() > 0.1


def test_one_other_name_needs_no_axis_and_shapes_are_checked():
    a, b, c, d = RNG.normal(size=(4, 5, 3))
    np.testing.assert_allclose(excess(a, b, c, d), a - b - c + d)
    np.testing.assert_allclose(excess(a, b[:, None], c, np.repeat(d[:, None], 4, 1)), a - b - c + d)
    with pytest.raises(ValueError, match=r"\(3,\).*person neuron"): excess(a[0], b, c, d)


def test_the_clamp_comes_before_the_mean_and_makes_pre_activations_those_of_a_relu():
    four = asked(halves(RNG))
    after = [np.maximum(x, 0) for x in four]
    np.testing.assert_allclose(excess(*four, clamp=True), excess(*after))
    np.testing.assert_allclose(rise(four[0], four[3], clamp=True), rise(after[0], after[3]))
    assert np.abs(excess(*four, clamp=True)).max() > 0.1


# the share

GATES = {"and": (1, 0, 0, 0), "or": (1, 1, 1, 0), "first": (1, 0, 1, 0), "sum": (2, 1, 1, 0), "nand": (0, 1, 1, 1), "xor": (0, 1, 1, 0)}


def share(*gates, weights=None, of=excess_share):
    four = np.array([GATES[g] for g in gates], float).T[:, None]
    return of(excess(*four), rise(four[0], four[3]), np.ones(len(gates)) if weights is None else np.array(weights, float))[0]


def test_gates():
    assert share("and") == 1 and share("sum") == share("first") == share("or") == 0
    assert share("nand", weights=[-1]) == 1  # what is switched off by the name, and pushes away from the answer
    assert share("and", "and", "sum") == pytest.approx(0.5) and share("and", "sum", weights=[2, 1]) == pytest.approx(0.5)
    assert np.isnan(share("and", weights=[-1])) and np.isnan(share("xor")) and np.isnan(share("and", weights=[0]))
    assert share("and", "and", weights=[1, -5]) == 1  # what pushes away counts for nothing
    assert share("and", "or", of=net_share) == 0 and share("and", "and", weights=[2, -1], of=net_share) == 1


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_the_share_is_that_of_a_loop_and_lies_between_0_and_1(seed):
    rng = np.random.default_rng(seed)
    x, t = rng.normal(size=(2, 4, 6))
    w = rng.normal(size=[(6,), (4, 6)][seed % 2])
    found = excess_share(x, t, w)
    for person in range(4):
        part = whole = 0.0
        for j in range(6):
            weight = w[j] if w.ndim == 1 else w[person, j]
            if weight * t[person, j] > 0:
                whole += weight * t[person, j]
                part += min(max(weight * x[person, j], 0), weight * t[person, j])
        if whole == 0: assert np.isnan(found[person])
        else: assert found[person] == pytest.approx(part / whole)
    assert ((found >= 0) & (found <= 1) | np.isnan(found)).all()
    np.testing.assert_allclose(excess_share(3 * x, 3 * t, 2 * w), found)
    np.testing.assert_allclose(excess_share(x, t, np.broadcast_to(w, x.shape)), found)


def test_noise_gives_a_share_but_no_net_share():
    t = 1 + np.abs(RNG.normal(size=(400, 300)))
    x = RNG.normal(0, 0.3, t.shape)
    assert excess_share(x, t, np.ones(300)).mean() > 0.05
    assert abs(net_share(x, t, np.ones(300)).mean()) < 0.002


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="weights"): excess_share(np.ones((2, 3)), np.ones((2, 3)), np.ones(2))
    with pytest.raises(ValueError, match="person neuron"): excess_share(np.ones((2, 3)), np.ones((1, 3)), np.ones(3))


# quadruples and parallelograms

def people(places):
    return pd.DataFrame([(f"F{i}", f"L{j}") for i, j in places], columns=["first", "last"])


@pytest.mark.parametrize("places, n", [(list(product(range(12), range(12))), 30),
                                       ([p for p in product(range(15), range(15)) if sum(p) % 3], 20)])
def test_quadruples_are_what_they_say(places, n):
    table = people([places[k] for k in RNG.permutation(len(places))])
    quads = quadruples(table, n, seed=3)
    assert list(quads) == list(QUAD) and len(quads) == n
    for row in quads.itertuples(index=False):
        (a, b), (c, d), (a2, d2), (c2, b2), (e, f), (g, h) = (tuple(table.iloc[k]) for k in row)
        assert (a, d, c, b) == (a2, d2, c2, b2) and a != c and b != d
        assert len({a, c, e, g}) == len({b, d, f, h}) == 4
    four = quads[list(QUAD[:4])].to_numpy().ravel()
    assert len(set(four)) == len(four)
    pd.testing.assert_frame_equal(quads, quadruples(table, n, seed=3))
    assert not quads.equals(quadruples(table, n, seed=4))


def test_all_quadruples_of_a_small_grid_are_equally_likely():
    table = people(product(range(4), range(4)))
    counts = pd.Series([frozenset(quadruples(table, 1, seed).iloc[0, :4]) for seed in range(1500)]).value_counts()
    assert len(counts) == 36 and stats.chisquare(counts).pvalue > 0.001


def test_the_one_quadruple_among_others_is_found_and_its_absence_is_said():
    table = people([(9, 9), (8, 8), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 2)])
    (row,) = quadruples(table, 5).to_numpy()
    assert set(row[:4]) == {2, 3, 4, 5} and set(row[4:]) == {0, 1}
    with pytest.raises(ValueError, match="share halves"): quadruples(table.drop(index=3), 5)
    with pytest.raises(ValueError, match="no half"): quadruples(table.iloc[2:6], 5)


def vectors(n=30, d=16, first=1.0, last=1.0, own=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = first * rng.normal(size=(n, 1, d)) + last * rng.normal(size=(1, n, d)) + own * rng.normal(size=(n, n, d)) + 7
    return people(product(range(n), range(n))), x.reshape(n * n, d)


def test_sums_give_0_and_a_hash_gives_1():
    table, x = vectors()
    quads = quadruples(table, 150)
    assert linearity(x, quads).ratio[0] < 1e-12 and linearity(x.astype("float32"), quads).ratio[0] < 1e-5
    (row,) = linearity(vectors(first=0, last=0, own=1)[1], quads).itertuples()
    assert row.low < 1 < row.high and row.high - row.low < 0.15 and row.n == 150


@pytest.mark.parametrize("first, last, own", [(1, 1, 1), (2, 1, 1), (0.5, 0.5, 1)])
def test_the_square_of_the_ratio_is_the_share_of_variance_that_is_a_names_own(first, last, own):
    table, x = vectors(60, 40, first, last, own)
    (row,) = linearity(torch.tensor(x), quadruples(table, 400)).itertuples()
    assert row.ratio == pytest.approx(np.sqrt(own ** 2 / (first ** 2 + last ** 2 + own ** 2)), abs=0.03)
    assert row.low < row.ratio < row.high < row.low + 0.1


def test_the_lengths_are_those_of_a_loop_and_layers_do_not_mix():
    six = RNG.normal(size=(6, 8, 3, 5)) * np.array([1, 10, 100])[:, None]
    found = parallelogram(*six)
    for layer in range(3):
        ab, cd, ad, cb, ef, gh = six[:, :, layer]
        near = [sum(((ab[q] + cd[q] - ad[q] - cb[q]) / 2) ** 2) for q in range(8)]
        far = [sum(((ab[q] + cd[q] - ef[q] - gh[q]) / 2) ** 2) for q in range(8)]
        assert found.related[layer] == pytest.approx(np.mean(near) ** 0.5)
        assert found.unrelated[layer] == pytest.approx(np.mean(far) ** 0.5)
        assert found.ratio[layer] == pytest.approx((np.mean(near) / np.mean(far)) ** 0.5)
    alone = parallelogram(*six[:, :, 1])
    assert alone.ratio[0] == found.ratio[1] and alone.low[0] == pytest.approx(found.low[1])


def test_vectors_that_do_not_differ_have_no_ratio():
    assert np.isnan(parallelogram(*np.ones((6, 4, 3))).ratio[0])


# lengths

def test_lengths_are_told_apart_and_equal_ones_are_not():
    known, unknown = RNG.normal(size=(60, 2, 8)), RNG.normal(size=(50, 2, 8))
    known[:, 1] *= 1.5
    found = norms_by({"known": known, "unknown": unknown}, 499).set_index(["layer", "group"])
    assert list(found.n) == [60, 50] * 2 and list(found.index.get_level_values(0)) == [0, 0, 1, 1]
    assert found["mean"][1, "known"] == pytest.approx(np.mean([sum(v ** 2) ** 0.5 for v in known[:, 1]]))
    assert found.p[1, "unknown"] < 0.01 and found.longer[1, "unknown"] < 0.2
    assert found.difference[1, "unknown"] == pytest.approx(found["mean"][1, "unknown"] - found["mean"][1, "known"])
    assert found.p[0, "unknown"] > 0.01 and found[["difference", "p", "longer"]].xs("known", level=1).isna().all(axis=None)
    pairs = [(np.linalg.norm(a), np.linalg.norm(b)) for a in unknown[:, 0] for b in known[:, 0]]
    assert found.longer[0, "unknown"] == pytest.approx(np.mean([a > b for a, b in pairs]))


def test_p_is_uniform_where_nothing_differs():
    p = norms_by({"a": RNG.normal(size=(12, 200, 4)), "b": RNG.normal(size=(12, 200, 4))}, 199).p.dropna()
    assert stats.kstest(p, "uniform").pvalue > 0.001 and len(p) == 200


# the part of one's own

@pytest.mark.parametrize("n, d, rank", [(5, 8, 5), (8, 8, 8), (12, 8, 8), (9, 20, 4), (1, 3, 1)])
def test_what_is_outside_the_span_of_the_others_is_that_of_least_squares(n, d, rank):
    x = RNG.normal(size=(n, rank)) @ RNG.normal(size=(rank, d))
    x = np.vstack([x, RNG.normal(size=d)]) if rank < min(n, d) else x  # one that is outside the span, among many that are not
    found = orthogonal_part(x)
    for i, row in enumerate(x):
        others = np.delete(x, i, 0)
        left = row - others.T @ np.linalg.lstsq(others.T, row, rcond=1e-8)[0] if len(others) else row
        assert found[i] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(row), abs=1e-6)
        assert orthogonal_part(row[None], others)[0] == pytest.approx(found[i], abs=1e-6) or not len(others)


def test_single_precision_does_not_make_room_where_there_is_none():
    first, last = RNG.normal(size=(6, 1, 100)), RNG.normal(size=(1, 6, 100))
    assert orthogonal_part((first + last).reshape(36, 100).astype("float32")).max() < 1e-5
    assert np.isnan(orthogonal_part(np.zeros((1, 3)), np.eye(3)[:1])[0])


@pytest.mark.parametrize("n, d", [(2, 2), (3, 10), (8, 10), (10, 10), (30, 50)])
def test_the_expected_share_of_random_vectors_by_simulation(n, d):
    drawn = np.array([orthogonal_part(RNG.normal(size=(n, d))).mean() for _ in range(600)])
    assert drawn.mean() == pytest.approx(isotropic_share(n, d), abs=4 * drawn.std() / np.sqrt(600))


def test_the_expected_share_at_its_ends():
    assert isotropic_share(1, 5) == 1 and isotropic_share(6, 5) == isotropic_share(50, 5) == 0
    assert isotropic_share(101, 1000) == pytest.approx(np.sqrt(0.9), abs=1e-3)


# attributes

def sports(n=30):
    return np.array(["golf", "chess", "rugby"] * n)


def test_auc_and_cosine_are_those_of_a_loop_ties_counting_half():
    acts, labels, out = RNG.integers(0, 4, (30, 5)).astype(float), sports(10), RNG.normal(size=(5, 6))
    ways = dict(zip(("golf", "chess"), RNG.normal(size=(2, 6))))
    found = attribute_neurons(torch.tensor(acts), labels, out, ways, best=5, permutations=10)
    assert len(found) == 10 and set(found.neuron) == set(range(5))
    for row in found.itertuples():
        pairs = [np.sign(a - b) for a in acts[labels == row.attribute, row.neuron] for b in acts[labels != row.attribute, row.neuron]]
        assert row.signed == pytest.approx(np.mean(pairs)) and row.auc == pytest.approx((np.mean(pairs) + 1) / 2)
        v, w = ways[row.attribute], out[row.neuron]
        assert row.cosine == pytest.approx(sum(v * w) / sum(v ** 2) ** 0.5 / sum(w ** 2) ** 0.5)
    best = found.groupby("attribute", sort=False).first()
    assert (best.signed.abs() == found.groupby("attribute", sort=False).signed.agg(lambda s: s.abs().max())).all()


def test_a_planted_neuron_is_found_and_noise_is_not_believed():
    labels, out = sports(), RNG.normal(size=(500, 8))
    acts = RNG.normal(size=(90, 500))
    acts[:, 42] -= 2 * (labels == "rugby")
    found = attribute_neurons(acts, labels, out, {"rugby": out[42], "golf": out[0]}, best=1).set_index("attribute")
    assert found.neuron["rugby"] == 42 and found.signed["rugby"] < -0.6 and found.cosine["rugby"] == pytest.approx(1) and found.p["rugby"] == 1 / 201
    assert found.p["golf"] > 0.01


def test_p_counts_the_best_of_all_neurons():
    p = [attribute_neurons(RNG.normal(size=(30, 50)), sports(10), np.ones((50, 1)), {"golf": np.ones(1)}, 1, 99, seed).p[0] for seed in range(120)]
    assert stats.kstest(p, "uniform").pvalue > 0.001


def test_neurons_that_are_off_tell_nothing_and_odd_labels_are_refused():
    (row,) = attribute_neurons(np.zeros((90, 1)), sports(), np.zeros((1, 2)), {"golf": np.ones(2)}, 1).itertuples()
    assert row.auc == 0.5 and row.p == 1 and np.isnan(row.cosine)
    for labels in (["golf"] * 4, ["chess"] * 4):
        with pytest.raises(ValueError, match="'golf'"): attribute_neurons(np.ones((4, 2)), labels, np.ones((2, 2)), {"golf": np.ones(2)})


# shuffled weights

def test_shuffled_weights_have_the_same_entries_at_other_places():
    w = torch.randn(20, 30, dtype=torch.float64)
    found = shuffled_weights(w, 1)
    assert found.shape == w.shape and found.dtype == w.dtype and torch.equal(found.flatten().sort()[0], w.flatten().sort()[0])
    assert (found == w).float().mean() < 0.05 and torch.equal(found, shuffled_weights(w, 1)) and not torch.equal(found, shuffled_weights(w, 2))
    low = torch.outer(torch.arange(1., 21), torch.arange(1., 31))
    assert torch.linalg.matrix_rank(low) == 1 and torch.linalg.matrix_rank(shuffled_weights(low)) == 20


def test_all_orders_are_drawn():
    drawn = {tuple(shuffled_weights(torch.arange(3), seed).tolist()) for seed in range(60)}
    assert drawn == set(permutations(range(3)))
