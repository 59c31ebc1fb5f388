"""Interactions and Shapley values: identities, known answers, and the definition by brute force."""
from itertools import permutations

import numpy as np
import pytest
import torch
from tiny import LAYERS, random_pair, tiny_hf, tiny_model

from bizzaroworld.circuits.interactions import REST, Interactions, as_components, drawn, interactions, shapley
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep


def linear_heads():
    "A Llama whose norms are linear (their epsilon drowns what they read) and whose last MLP writes nothing: its last heads add up."
    hf = tiny_hf("llama")
    for module in hf.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e8
            module.weight.data *= 1e4
    hf.model.layers[-1].mlp.down_proj.weight.data.zero_()
    return load_model(hf)


def test_components_that_add_up_do_not_interact():
    model, pairs = linear_heads(), [random_pair(1), random_pair(2)]
    found = interactions(model, pairs, [f"L{LAYERS - 1}H{h}" for h in range(4)])
    assert np.abs(found.values()).max() < 2e-6 < 1e-3 < np.abs(found.alone).max()
    parts = found.parts()
    assert parts.together.to_numpy() == pytest.approx(parts.alone.to_numpy(), abs=5e-6) and np.abs(parts.higher).max() < 5e-6
    shares = shapley(model, pairs, [f"L{LAYERS - 1}H{h}" for h in range(4)], orders=4)
    assert shares.values[:, :4] == pytest.approx(found.alone, abs=5e-6) and np.abs(shares.errors).max() < 5e-6, "each has the share that it has alone, in any order"


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_it_is_what_it_says(name):
    """Against sweeps of one intervention at a time, in both directions."""
    model, pairs, names = tiny_model(name), [random_pair(1), random_pair(2)], ["L0H1", "L1.mlp", "L2H3"]
    e = [Edit("z", 0, "all", 1), Edit("mlp_out", 1, "all"), Edit("z", 2, "all", 3)]
    for direction in ("noising", "denoising"):
        def effect(*edits):
            s = sweep(model, pairs, Intervention(edits), direction, progress=False)
            return s.patched[:, 0, 0] - (s.clean if direction == "noising" else s.corrupt)[:, 0]
        found = interactions(model, pairs, names, direction)
        for column, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
            expected = effect(e[i], e[j]) - effect(e[i]) - effect(e[j])
            assert found.values()[:, column, 0] == pytest.approx(expected, abs=1e-5)
            rows = found.to_frame()[lambda t: (t["first"] == names[i]) & (t.second == names[j])]
            assert rows.interaction.to_numpy() == pytest.approx(expected, abs=1e-5) and list(rows.pair_id) == [tp.id for tp in pairs]
        parts = found.parts()
        assert parts.together.to_numpy() == pytest.approx(effect(*e), abs=1e-5)
        assert parts[["alone", "pairwise", "higher"]].sum(axis=1).to_numpy() == pytest.approx(parts.together.to_numpy(), abs=1e-5)
        assert np.abs(found.values()).max() > 1e-3


def test_cuts_one_after_the_other():
    """Each of three cuts through the whole stream is all there is to lose: a conjunction, with a known number at every order."""
    model, tp = tiny_model("llama"), random_pair(1)
    cuts = {f"before {l}": Edit("resid_pre", l, "all") for l in range(3)}
    for direction, kind in (("noising", "conjunction"), ("denoising", "backup")):
        found = interactions(model, tp, cuts, direction)
        swing = found.swing.item()
        assert found.alone[0, :, 0] == pytest.approx(swing, abs=1e-4) and found.values()[0, :, 0] == pytest.approx(-swing, abs=1e-4)
        assert found.parts().iloc[0][["together", "alone", "pairwise", "higher"]].tolist() == pytest.approx([swing, 3 * swing, -3 * swing, swing], abs=1e-4)
        assert set(found.to_frame().kind) == {kind}


@pytest.mark.parametrize("direction, sign, kinds", [("noising", -1, ["backup", "conjunction", ""]), ("denoising", 1, ["conjunction", "backup", ""])])
def test_a_backup_is_told_from_a_conjunction(direction, sign, kinds):
    """a and b: neither alone, all together. a and c: each alone is all there is to lose. b and c: they add up."""
    alone, both = sign * np.array([0.25, 0.25, 3.0]), sign * np.array([3.0, 3.0, 3.25])
    found = Interactions(("one",), ("a", "b", "c"), ("ld",), direction, np.array([[sign * 4.0]]), alone[None, :, None], both[None, :, None], np.array([[sign * 3.0]]))
    table = found.to_frame()
    assert table.kind.tolist() == kinds and table.interaction.tolist() == [sign * 2.5, sign * -0.25, 0.0]
    against = Interactions(("one",), ("a", "b"), ("ld",), direction, np.array([[sign * 4.0]]), sign * np.array([[[-2.0], [3.0]]]), sign * np.array([[[3.0]]]), sign * np.array([[3.0]]))
    assert against.to_frame().kind.tolist() == [""] and against.values().tolist() == [[[sign * 2.0]]]


def by_definition(model, tp, edits, orders, cleaning=False):
    "Shapley values as the mean over orders in which players are corrupted, or cleaned; the last player is everything else."
    n, known, shares = len(edits) + 1, {}, np.zeros(len(edits) + 1)
    def v(corrupted):
        if n - 1 not in corrupted: some, direction = [edits[i] for i in sorted(corrupted)], "noising"
        else: some, direction = [edits[i] for i in range(n - 1) if i not in corrupted], "denoising"
        if some: return sweep(model, tp, Intervention(some), direction, progress=False).patched.item()
        s = sweep(model, tp, edits[0], direction, progress=False)
        return (s.clean if direction == "noising" else s.corrupt).item()
    def value(had_turn):
        c = frozenset(range(n)) - frozenset(had_turn) if cleaning else frozenset(had_turn)
        return known[c] if c in known else known.setdefault(c, v(c))
    for order in orders:
        for k, i in enumerate(order): shares[i] += value(order[:k + 1]) - value(order[:k])
    return shares / len(orders)


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_shapley_values_are_those_of_the_definition(name):
    model, tp = tiny_model(name), random_pair(1)
    edits = [Edit("z", 1, "all", 0), Edit("mlp_out", 0, "all"), Edit("mlp_out", 2, "final")]
    found = shapley(model, tp, ["L1H0", "L0.mlp", edits[2]], orders=None)
    expected = by_definition(model, tp, edits, list(permutations(range(4))))
    assert found.values[0, :, 0] == pytest.approx(expected, abs=1e-5) and np.abs(expected).min() > 1e-5
    assert found.names[-1] == REST and not found.errors.any()
    some, few = drawn(4, 6, 0), shapley(model, tp, ["L1H0", "L0.mlp", edits[2]], orders=6)
    for cleaning, sign in ((False, 1), (True, -1)): assert sign * few.values[0, :, 0] == pytest.approx(by_definition(model, tp, edits, some, cleaning), abs=1e-5)
    assert np.abs(few.values - found.values).max() > 1e-4, "six orders are not all"
    sampled = shapley(model, tp, ["L1H0", "L0.mlp", edits[2]], orders=200)
    assert (np.abs(sampled.values - found.values) <= 4 * sampled.errors + 1e-6).all() and sampled.errors.max() > 0
    assert shapley(model, tp, ["L1H0", "L0.mlp"], seed=1).values.tolist() == shapley(model, tp, ["L1H0", "L0.mlp"], seed=1).values.tolist()


@pytest.mark.parametrize("orders", [None, 2, 16])
def test_shapley_values_add_up_and_are_the_same_in_both_directions(orders):
    model, pairs = tiny_model("gemma2"), [random_pair(1), random_pair(2)]
    there, back = (shapley(model, pairs, ["L0.mlp", "L1H1", "L2.mlp", "L2H0"], d, orders=orders, metrics=("ld", "prob")) for d in ("noising", "denoising"))
    base = sweep(model, pairs, Edit("z", 0), metrics=("ld", "prob"), progress=False)
    assert there.values.sum(1) == pytest.approx(base.corrupt - base.clean, abs=1e-5)
    assert there.values == pytest.approx(-back.values, abs=1e-12) and np.array_equal(there.errors, back.errors, equal_nan=True)


def test_who_does_nothing_has_no_share_and_who_does_all_has_all():
    """What is put in place before the prompts part is what was there. A cut through the whole stream hides the prompt, whatever it is."""
    model, tp = tiny_model("llama"), random_pair(1)
    found = shapley(model, tp, {"early": Edit("mlp_out", 0, 1), "cut": Edit("resid_pre", 1, "all")}, orders=None)
    swing = found.values.sum()
    assert found.values[0, :, 0] == pytest.approx([0, swing, 0], abs=1e-4) and abs(swing) > 1e-3


def test_what_is_refused():
    model, tp = tiny_model("llama"), random_pair(1)
    with pytest.raises(ValueError, match="edited twice"): interactions(model, tp, {"a": "L0.mlp", "b": Edit("mlp_out", 0, "all")})
    with pytest.raises(ValueError, match="two components or more"): interactions(model, tp, ["L0.mlp", "L0.mlp"])
    with pytest.raises(ValueError, match="two components or more"): as_components([])
    with pytest.raises(ValueError, match="give a head"): as_components(["embed", "L0.mlp"])
    with pytest.raises(ValueError, match="even number"): shapley(model, tp, ["L0.mlp", "L1.mlp"], orders=3)
    with pytest.raises(ValueError, match="Unknown direction 'noise': use noising or denoising"): shapley(model, tp, ["L0.mlp", "L1.mlp"], "noise")
    with pytest.raises(ValueError, match="source donor"): shapley(model, tp, [Edit("mlp_out", 0, source="zero"), "L1.mlp"])


def test_values_that_are_given_reach_the_sweep():
    model, tp, mean = tiny_model("llama"), random_pair(1), torch.linspace(-1, 1, 32)
    e = [Edit("mlp_out", l, "all", source="given") for l in (0, 1)]
    found = interactions(model, tp, e, values={x: mean for x in e})
    alone = sweep(model, tp, e, values={x: mean for x in e}, progress=False)
    assert found.alone[0, :, 0] == pytest.approx(alone.patched[0, :, 0] - alone.clean.item(), abs=1e-5)
