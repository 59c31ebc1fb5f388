"""Ways to look for nodes, on functions of sets whose effects are known, and on a tiny model."""
import numpy as np
import pandas as pd
import pytest
from tiny import random_pair, tiny_model

from bizzaroworld.circuits.attribution import attribution, beside
from bizzaroworld.circuits.search_baselines import (
    Search, Sets, blocks, bounds_of, by_size, contrasts, cost_table, coverage, drawn_sets, hierarchical, in_order, iterative, missed, overlooked, random_order, redrawn, subsampling)
from bizzaroworld.patch.interventions import Intervention, grid
from bizzaroworld.patch.sweep import sweep


class Additive:
    """Effects that add up, and how often it was asked."""
    def __init__(self, effects): self.effects, self.runs = np.asarray(effects), 0

    def __call__(self, sets):
        self.runs += len(sets)
        return np.array([self.effects[list(s)].sum() for s in sets])


def sparse(n=200, at=(17, 60, 130), seed=0):
    effects = np.random.default_rng(seed).normal(0, 0.01, n)
    effects[list(at)] = (3.0, -2.0, 1.0)
    return effects


def test_what_verification_costs():
    effects = np.array([0.1, -5.0, 0.2, 3.0])
    assert in_order("x", [3, 1, 0, 2], 7).when.tolist() == [10, 9, 11, 8]
    found = by_size("x", np.array([0.0, 2.0, -3.0, 2.0]), 2)
    assert found.when.tolist() == [6, 4, 3, 5] and [found.runs_for(effects, k) for k in (1, 2, 3, 4)] == [4, 5, 5, 6]
    assert iterative(4).when.tolist() == [1, 2, 3, 4] and sorted(random_order(4, 3).when) == [1, 2, 3, 4]
    table = cost_table([found, iterative(4)], effects, (1, 2, 9))
    assert table.loc["x"].to_dict() == {1: 4, 2: 5} and table.loc["iterative", 2] == 4


@pytest.mark.parametrize("look", [lambda m, n: subsampling(m, n, 64), lambda m, n: blocks(m, n, 8), lambda m, n: hierarchical(m, n, 4)])
def test_every_way_finds_a_few_large_effects_among_many(look):
    """In far fewer runs than one by one, by its own count; and every node is verified in the end, once."""
    effects = sparse()
    measure = Additive(effects)
    found = look(measure, 200)
    assert found.runs_for(effects, 3) < 110 and np.mean([random_order(200, s).runs_for(effects, 3) for s in range(200)]) == pytest.approx(150, abs=8)
    assert len(set(found.when)) == 200 and (found.when > 0).all()
    if found.method == "hierarchical":
        assert measure.runs == found.when.max() and found.runs_for(effects, 1) < 30
    else: assert found.when.min() == measure.runs + 1 and found.when.max() == measure.runs + 200
    assert blocks(Additive(effects), 200, 8).when[17] <= 25 + 8 and blocks(Additive(sparse(203)), 203, 8).when.max() == 26 + 203


def test_contrasts_are_the_effects_where_they_add_up():
    effects = sparse()
    member = drawn_sets(200, 4000, 0.5, 0)
    assert abs(member.mean() - 0.5) < 0.01 and not np.array_equal(member, drawn_sets(200, 4000, 0.5, 1))
    found, error, df = contrasts(member, Additive(effects)([np.flatnonzero(row) for row in member]))
    np.testing.assert_array_less(np.abs(found - effects), 5 * error)
    assert np.abs((found - effects) / error).std() < 1.2 and df.min() > 3000
    for k in range(3): assert found[(17, 60, 130)[k]] == pytest.approx((3.0, -2.0, 1.0)[k], abs=5 * error[k])


@pytest.mark.parametrize("confidence", [0.9, 0.5])
def test_the_bound_holds_as_often_as_it_says(confidence):
    """Effects that add up, where one node is by far the largest of what is left: then the bound is that node's, and holds in about that share of trials."""
    rng, held = np.random.default_rng(0), []
    for trial in range(400):
        effects = rng.normal(0, 0.2, 30)
        effects[7] = 5.0
        bound = missed(Additive(effects), range(30), 24, confidence, seed=trial)
        held.append(bound.value >= 5.0 - 1e-9)
    assert np.mean(held) == pytest.approx(confidence, abs=0.07)
    assert "30 nodes left, 24 sets" in str(bound) and bound.confidence == confidence


LAWS = {"uniform": lambda rng, n: rng.uniform(-1, 1, n), "heavy-tailed": lambda rng, n: rng.standard_t(1.2, n)}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_redrawn_bounds_hold_as_often_as_known(law, confidence):
    """Effects that add up, drawn from a law: the bound of the largest node alone holds as often as it says; the largest of all bounds at least as often."""
    rng, n, tables = np.random.default_rng(5), 40, []
    for trial in range(60):
        effects, member = LAWS[law](rng, n), drawn_sets(n, 400, 0.5, trial)
        tables.append(redrawn(member, member @ effects, effects, 40, (confidence,)))
    found = pd.concat(tables)
    assert len(found) == 600 and found.own.mean() == pytest.approx(confidence, abs=3 * (confidence * (1 - confidence) / 600) ** 0.5 + 0.01)
    assert found.covered.mean() >= found.own.mean() and (found.covered | ~found.own).all() and (found.covered == (found.bound >= found.largest - 1e-6)).all()
    if law == "heavy-tailed": assert found.covered.mean() < 0.5 + confidence / 2 + 0.04, "where one node is far above the others, hardly any other bound is above its effect"
    else: assert found.covered.mean() == 1, "among many of one size some bound is always above the largest effect"


def test_redrawn_bounds_are_those_of_each_group():
    effects = sparse(60, (17, 40, 50))
    member = drawn_sets(60, 100, 0.5, 3)
    found = redrawn(member, member @ effects, effects, 30)
    assert found.draw.tolist() == [0] * 3 + [1] * 3 + [2] * 3 and (found.samples == 30).all() and (found.largest == 3.0).all()
    for i, row in found[found.confidence == 0.95].iterrows():
        some = slice(30 * row.draw, 30 * row.draw + 30)
        assert 0 < row.bound == pytest.approx(bounds_of(member[some], member[some] @ effects).max())
    assert (found.groupby("draw").bound.diff().dropna() > 0).all(), "more confidence, a larger bound"
    any_of = member[:, :40].any(1).astype(float)
    assert not redrawn(member[:, :40], any_of, np.ones(40), 50).covered.any(), "nodes that stand in for one another hide from it"
    for sets, samples in ((20, 30), (20, 7)):
        with pytest.raises(ValueError, match="eight samples"): redrawn(member[:sets], any_of[:sets], effects, samples)


def test_the_bound_is_for_what_is_left_and_for_effects_that_add_up():
    effects = sparse()
    small = missed(Additive(effects), np.setdiff1d(np.arange(200), [17, 60, 130]), 200)
    whole = missed(Additive(effects), np.arange(200), 200)
    assert np.abs(np.delete(effects, [17, 60, 130])).max() < small.value < 0.15 and 3.0 <= whole.value < 4.5
    assert (coverage(Additive(effects), effects, [[17], [17, 60], range(100)], 100).covered).all()

    def any_of(sets): return np.array([float(len(s) > 0) for s in sets])  # each node alone does all of it, and so does any other
    held = coverage(any_of, np.ones(40), [[0], [1], [2]], 60)
    assert not held.covered.any() and (held.largest == 1).all(), "nodes that stand in for one another hide from it"
    never = missed(Additive(effects), range(200), 8, share=0.001)
    assert never.value == float("inf"), "a node that was in no set can be anything"


def test_sets_are_interventions_of_a_model():
    """Alone each node has the sweep's effect, together that of one intervention; an empty set takes no run."""
    model, tp = tiny_model("gemma3"), random_pair(1)
    nodes = grid(model, ["z", "mlp_out"], [4, 8])
    for direction in ("noising", "denoising"):
        measure, exact = Sets(model, tp, nodes, direction, "logprob"), sweep(model, tp, nodes, direction, metrics=["logprob"], progress=False).to_frame()
        found = measure([[i] for i in range(len(nodes))] + [[], [0, 5, 7]])
        np.testing.assert_allclose(found[:-2], exact.effect, atol=1e-5)
        together = sweep(model, tp, Intervention(e for i in (0, 5, 7) for e in nodes[i].edits), direction, metrics=["logprob"], progress=False).to_frame()
        assert found[-2] == 0 and found[-1] == pytest.approx(together.effect[0], abs=1e-5) and measure.runs == len(nodes) + 1
    verified = hierarchical(measure, len(nodes))
    assert isinstance(verified, Search) and sorted(verified.when)[-1] == measure.runs - len(nodes) - 1


def test_what_was_overlooked_has_a_name():
    model, tp = tiny_model("llama"), random_pair(2)
    table = beside(sweep(model, tp, grid(model, ["q", "z"], range(9)), progress=False), attribution(model, tp, sites=["q", "z"]))
    order = table.effect.abs().rank(ascending=False, method="first")
    table.loc[order == 2, "atp"] = 0.0
    found = overlooked(table, "atp", 5, within=len(table) // 2)
    assert found.intervention.tolist() == table.intervention[order == 2].tolist() and found["rank"].tolist() == [2]
    assert overlooked(table.assign(atp=table.effect), "atp", 5).empty


def test_what_is_refused():
    with pytest.raises(ValueError, match="3 samples"): subsampling(Additive(np.ones(4)), 4, 3)
    with pytest.raises(ValueError, match="1 parts"): hierarchical(Additive(np.ones(4)), 4, 1)
    with pytest.raises(ValueError, match="0 nodes"): missed(Additive(np.ones(4)), [])
