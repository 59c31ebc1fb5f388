"""Toys: networks written by hand come out at the ends of every scale, each measure is that of a loop, and training learns by heart."""
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from bizzaroworld.files import data_path
from bizzaroworld.lookup.lookup_figures import BY_HAND, SHOWN, TOY_SCALES, draw_toys
from bizzaroworld.lookup.memorisation import (SCALES, Toy, _weights, ablations, additive, against_width, and_ness, and_toy, draw_facts, everywhere,
                                              four_of, hash_toy, held_out, learned, look_inside, own_variance, participation, sum_toy, together,
                                              toy_curves, train_toy, written_by_hand)
from bizzaroworld.lookup.nonlinear import excess

RNG = np.random.default_rng(11)


@pytest.fixture(scope="module")
def seen():
    return {name: look_inside(make(120, 20)) for name, make in {"and": and_toy, "sum": sum_toy, "hash": hash_toy}.items()}


@pytest.fixture(scope="module")
def toys():
    return {"one": train_toy(24, 60, 12, seed=3), "two": train_toy(16, 60, 12, layers=2, act="gelu", residual=True, seed=4)}


# the ends of the scales

def test_all_networks_written_by_hand_know_their_facts(seen):
    assert all(row["accuracy"] == 1 for row in seen.values())


@pytest.mark.parametrize("scale", ["excess_share", "net_share", "parallelogram", "and_ness", "own_variance"])
def test_sums_have_nothing_of_their_own_and_ands_and_the_hash_have_nearly_all(seen, scale):
    assert abs(seen["sum"][scale]) < 1e-5
    assert seen["and"][scale] > 0.85 and seen["hash"][scale] > 0.8


def test_a_fact_has_one_and_in_the_and_toy_and_many_neurons_in_the_hash(seen):
    assert seen["and"]["neurons_per_fact"] == pytest.approx(1, abs=0.03) and seen["and"]["facts_per_neuron"] == pytest.approx(1 / 120, abs=1e-3)
    assert seen["and"]["broken"] == 1 and seen["and"]["together"] > 0.95
    assert seen["hash"]["neurons_per_fact"] > 10 and seen["hash"]["facts_per_neuron"] > 0.1
    assert seen["hash"]["broken"] < 0.2 and abs(seen["hash"]["together"]) < 0.15
    assert seen["sum"]["facts_per_neuron"] > 0.2 and seen["sum"]["broken"] > 1


def test_labels_are_a_direction_in_sums_alone(seen):
    assert seen["sum"]["probe"] > 0.9 and seen["sum"]["probe_before"] > 0.9 and seen["sum"]["additive"] == 1
    for name in ("and", "hash"): assert 0.35 < seen[name]["probe"] < 0.65 and seen[name]["additive"] < 0.95


def test_the_and_toy_fires_for_its_fact_alone():
    toy = and_toy(30, 9)
    grid = everywhere(toy)
    for j, (a, b) in enumerate(toy.pairs.tolist()):
        assert grid[a, b, j] == 1 and grid[..., j].sum() == 1
    assert torch.equal(toy.logits(toy.pairs), toy.labels)


def test_the_hash_is_a_random_function_of_the_pair():
    grid = everywhere(hash_toy(40, 15)).reshape(225, -1)
    assert (np.unique(grid, axis=0).shape[0]) == 225 and (grid > 0).mean() == pytest.approx(0.5, abs=0.05)
    alike, pairs = np.corrcoef(grid), np.array([*product(range(15), range(15))])
    half = (pairs[:, None] == pairs[None]).sum(-1) == 1
    assert abs(alike[half].mean()) < 0.01 and abs(alike[~half & ~np.eye(225, dtype=bool)].mean()) < 0.01  # a half in common is nothing in common


# each measure against a loop

def test_the_four_are_means_over_all_other_halves():
    grid, pairs = RNG.normal(size=(5, 5, 3)), torch.tensor([[0, 1], [4, 4], [2, 0]])
    ab, b_only, a_only, neither = four_of(grid, pairs)
    for row, (i, j) in enumerate(pairs.tolist()):
        others, lasts = [a for a in range(5) if a != i], [b for b in range(5) if b != j]
        np.testing.assert_allclose(ab[row], grid[i, j])
        np.testing.assert_allclose(b_only[row], grid[others, j].mean(0))
        np.testing.assert_allclose(a_only[row], grid[i, lasts].mean(0))
        np.testing.assert_allclose(neither[row], np.mean([grid[a, b] for a in others for b in lasts], 0))


def test_the_excess_over_a_whole_grid_is_the_interaction_of_an_analysis_of_variance():
    grid = RNG.normal(size=(6, 6, 4))
    pairs = torch.tensor([*product(range(6), range(6))])
    found = excess(*four_of(grid, pairs)).reshape(6, 6, 4)
    left = grid - grid.mean(0) - grid.mean(1)[:, None] + grid.mean((0, 1))
    np.testing.assert_allclose(found, left * (6 / 5) ** 2)
    np.testing.assert_allclose(own_variance(grid), (left ** 2).sum((0, 1)) / ((grid - grid.mean((0, 1))) ** 2).sum((0, 1)))


def test_and_ness_is_that_of_the_highest_pair_and_the_scale_is_fixed():
    n = 8
    one, first, both = np.zeros((3, n, n))
    one[2, 5], first[3] = 1, 1
    both += first
    both[3, 4] += 1  # half of the rise is a sum's
    found = and_ness(np.stack([one, first, np.arange(n)[:, None] + np.arange(n) + 0.0, np.ones((n, n)), both], -1))
    np.testing.assert_allclose(found[:3], [1, 0, 0], atol=1e-12)
    assert np.isnan(found[3]) and found[4] == pytest.approx(0.5, abs=0.01)
    assert np.isnan(own_variance(np.ones((n, n, 1)))[0])


@pytest.mark.parametrize("name, layer", [("one", -1), ("two", 0), ("two", 1), ("two", -1)])
def test_ablations_are_those_of_a_loop(toys, name, layer):
    toy = toys[name]
    found, (read, neurons) = ablations(toy, layer), (x.detach() for x in toy.run(toy.pairs, layer))
    for j in (0, 5, 11):
        put = neurons.clone()
        put[:, j] = put[:, j].mean()
        x = read + put @ toy.layers[layer][2] if toy.residual else put @ toy.layers[layer][2]
        for w, b, back in (toy.layers[1:] if len(toy.layers) == 2 and layer == 0 else ()):
            x = x + torch.nn.functional.gelu(x @ w + b) @ back
        lost = (toy.logits(toy.pairs) - x @ toy.out) * toy.labels
        np.testing.assert_allclose(found[:, j], lost.detach().numpy(), atol=1e-4)
    assert np.abs(found).max() > 0.1


def test_a_residual_stream_goes_around_every_layer(toys):
    toy = toys["two"]
    x = toy.first[toy.pairs[:, 0]] + toy.last[toy.pairs[:, 1]]
    for layer, (w, b, back) in enumerate(toy.layers):
        read, neurons = toy.run(toy.pairs, layer)
        torch.testing.assert_close(read, x)
        torch.testing.assert_close(neurons, torch.nn.functional.gelu(x @ w + b))
        x = x + neurons @ back
    torch.testing.assert_close(toy.logits(toy.pairs), x @ toy.out)


def test_what_was_wrong_before_is_not_broken():
    toy = and_toy(30, 9)
    wrong = toy.labels.clone()
    wrong[:10] *= -1
    assert look_inside(Toy(toy.pairs, wrong, toy.first, toy.last, toy.layers, toy.out))["broken"] == pytest.approx(20 / 30)


def test_weights_are_exact_in_the_last_layer_and_gradients_before(toys):
    toy = toys["two"]
    last, exact = _weights(toy, -1), (toy.layers[1][2] @ toy.out)[None] * toy.labels[:, None]
    np.testing.assert_allclose(last, exact.numpy(), rtol=1e-4, atol=1e-5)
    first, (read, neurons) = _weights(toy, 0), (x.detach().double() for x in toy.run(toy.pairs, 0))
    double = Toy(toy.pairs, toy.labels.double(), toy.first.double(), toy.last.double(), tuple(tuple(w.double() for w in l) for l in toy.layers),
                 toy.out.double(), toy.act, toy.residual)
    for j in (0, 7):
        step = torch.zeros_like(neurons)
        step[:, j] = 1e-5
        slope = (double.finish(0, read, neurons + step) - double.finish(0, read, neurons - step)) / 2e-5 * double.labels
        np.testing.assert_allclose(first[:, j], slope.numpy(), atol=1e-4)


def test_participation_counts():
    assert participation(np.array([0., 3, 0]), 0) == 1 and participation(-np.ones(7), 0) == pytest.approx(7)
    assert np.isnan(participation(np.zeros((2, 3)), 0)).all()
    assert 1 < participation(np.array([3., 1, 1]), 0) < 3


def test_together_is_the_correlation_over_facts():
    lost = RNG.normal(size=(40, 5, 3))
    pairs = [np.corrcoef(lost[:, j, k], lost[:, j, l])[0, 1] for j in range(5) for k in range(3) for l in range(k)]
    assert together(lost) == pytest.approx(np.mean(pairs))
    assert together(np.repeat(lost[..., :1], 2, 2)) == pytest.approx(1) and np.isnan(together(lost[..., :1]))
    assert together(np.concatenate([np.repeat(lost[..., :1], 2, 2), np.ones((40, 2, 2))], 1)) == pytest.approx(1)  # neurons that do nothing are left out


def test_a_probe_does_not_learn_by_heart():
    labels = np.sign(RNG.normal(size=(150, 2)))
    assert held_out(RNG.normal(size=(150, 200)), labels) < 0.62  # more numbers than facts: the fit itself is perfect
    assert held_out(labels + 0.1 * RNG.normal(size=(150, 2)), labels) > 0.97
    assert np.isnan(held_out(RNG.normal(size=(150, 2)), np.ones((150, 1))))


def test_the_probe_is_the_mean_over_folds():
    x, y = RNG.normal(size=(60, 4)), np.sign(RNG.normal(size=60))
    right = []
    for fit, test in StratifiedKFold(5, shuffle=True, random_state=0).split(x, y):
        scaled = (x - x[fit].mean(0)) / x[fit].std(0)
        right.append((LogisticRegression().fit(scaled[fit], y[fit]).predict(scaled[test]) == y[test]).mean())
    assert held_out(x, y[:, None]) == pytest.approx(np.mean(right)) and np.std(right) > 0


def test_additive_is_what_sums_can_do():
    pairs = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    xor, one = torch.tensor([[1.], [-1], [-1], [1]]), torch.tensor([[1.], [1], [-1], [-1]])
    toy = and_toy(4, 2)
    assert additive(Toy(pairs, one, toy.first, toy.last, toy.layers, toy.out)) == 1
    assert additive(Toy(pairs, xor, toy.first, toy.last, toy.layers, toy.out)) <= 0.75
    assert additive(sum_toy(150, 16)) == 1 > additive(and_toy(150, 16))


# training

def test_facts_are_different_pairs_and_labels_fair():
    pairs, labels = draw_facts(400, 25, 3, seed=2)
    assert len({tuple(p) for p in pairs.tolist()}) == 400 and 0 <= pairs.min() and pairs.max() == 24
    assert set(labels.flatten().tolist()) == {1, -1} and abs(labels.mean()) < 0.1
    assert torch.equal(pairs, draw_facts(400, 25, 3, seed=2)[0]) and not torch.equal(pairs, draw_facts(400, 25, 3, seed=3)[0])
    with pytest.raises(ValueError, match="26 facts of 25"): draw_facts(26, 5)


@pytest.mark.parametrize("options", [{}, {"act": "gelu"}, {"layers": 2}, {"residual": True}, {"layers": 2, "residual": True, "act": "gelu", "labels": 1}])
def test_every_kind_learns_by_heart(options):
    toy = train_toy(24, 60, 12, **options)
    assert toy.accuracy == 1 and 0 < toy.steps < 500 and len(toy.layers) == options.get("layers", 1)
    assert toy.labels.shape == (60, options.get("labels", 2)) and toy.residual == options.get("residual", False) and not toy.out.requires_grad
    assert train_toy(24, 60, 12, steps=0, **options).accuracy < 0.75


def test_training_goes_on_until_all_is_known():
    assert train_toy(24, 60, 12, loss=10).accuracy == 1


def test_a_network_without_a_nonlinearity_learns_what_sums_can_and_no_more():
    toy = train_toy(24, 200, 16, act="linear", steps=600)
    assert toy.accuracy == pytest.approx(additive(toy), abs=0.03) and toy.accuracy < 0.85
    row = look_inside(toy)
    assert row["excess_share"] < 1e-4 and row["parallelogram"] < 1e-5 and row["own_variance"] < 1e-8


def test_a_seed_gives_the_same_toy_and_another_gives_another():
    a, b, c = (train_toy(8, 30, 10, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.first, b.first) and torch.equal(a.out, b.out) and a.steps == b.steps
    assert not torch.equal(a.pairs, c.pairs) and not torch.equal(a.first, c.first)
    with pytest.raises(ValueError, match="relu, gelu"): train_toy(8, 30, 10, act="swish")


def test_a_toy_with_one_label_is_looked_into():
    row = look_inside(train_toy(16, 40, 10, labels=1))
    assert np.isnan(row["together"]) and 0 < row["excess_share"] < 1
    assert set(SCALES) <= set(row) and np.isnan(look_inside(train_toy(16, 40, 10, steps=0))["net_share"])


# tables

@pytest.fixture(scope="module")
def table():
    return pd.concat([against_width((8, 16), (20, 40), (0, 1), {"one layer": {}, "two layers": {"layers": 2}, "untrained": {"steps": 0}}),
                      written_by_hand((20, 40))], ignore_index=True)


def test_a_row_for_every_toy_and_layer(table):
    assert table.groupby("variant").size().to_dict() == {"one layer": 8, "two layers": 16, "untrained": 8, "one AND a fact": 2, "sums": 2, "hash": 2}
    row = table.query("variant == 'two layers' and layer == 0 and width == 16 and facts == 40 and seed == 1").iloc[0]
    again = look_inside(train_toy(16, 40, layers=2, seed=1), 0)
    assert {name: row[name] for name in again} == pytest.approx(again, nan_ok=True)


def test_curves_are_means_with_ranges_over_seeds(table):
    curves = toy_curves(table, ["excess_share", "net_share"])
    row = curves.query("instrument == 'excess_share' and variant == 'one layer' and facts == 40 and width == 8").iloc[0]
    two = table.query("variant == 'one layer' and facts == 40 and width == 8").excess_share
    assert len(two) == 2 and (row["mean"], row["low"], row["high"]) == pytest.approx((two.mean(), two.min(), two.max()))
    assert "untrained" not in set(curves.query("instrument == 'net_share'").variant)


def test_what_was_learned_is_held_against_the_same_toy_untrained(table):
    found = learned(table, scales=("excess_share", "probe", "net_share")).set_index("instrument")
    a, b = (table[table.variant == v].set_index(["width", "facts", "seed"]) for v in ("one layer", "untrained"))
    assert found.change["probe"] == pytest.approx((a.probe - b.probe).mean()) and found.n["probe"] == 8
    assert found.low["probe"] <= found.change["probe"] <= found.high["probe"] and "net_share" not in found.index


def test_what_is_shipped_is_what_the_page_says_of_it():
    shipped = pd.read_csv(data_path("lookup", "toys.csv"))
    assert shipped[shipped.variant.isin(["one layer", "untrained"])].groupby("variant").size().to_dict() == {"one layer": 48, "untrained": 48}
    assert set(SCALES) <= set(shipped) and set(BY_HAND) <= set(shipped.variant)
    row = shipped.query("variant == 'one layer' and width == 32 and facts == 256 and seed == 2").iloc[0]
    again = look_inside(train_toy(32, 256, seed=2))
    for name in ("accuracy", "additive", "excess_share", "net_share", "parallelogram", "and_ness", "probe"):
        assert row[name] == pytest.approx(again[name], abs=0.03), name


# the figure

def test_toys_are_drawn_with_a_line_for_each_number_of_facts_and_those_by_hand(table):
    curves = toy_curves(table)
    figure = draw_toys(curves)
    assert isinstance(figure, Figure) and len(figure.axes) == len(SHOWN)
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["untrained", "20 facts", "40 facts", "one AND a fact", "hash", "sums"]
    (line,) = [l for l in figure.axes[SHOWN.index("excess_share")].lines if l.get_label() == "20 facts"]
    wanted = curves.query("instrument == 'excess_share' and variant == 'one layer' and facts == 20")
    np.testing.assert_allclose(line.get_ydata(), wanted["mean"]), np.testing.assert_allclose(line.get_xdata(), [8, 16])
    assert set(TOY_SCALES) == set(SCALES)
    with pytest.raises(ValueError, match="'three layers'.*one layer"): draw_toys(curves, "three layers")
