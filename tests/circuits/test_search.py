"""Searching for circuits: what is found in planted models, and that speed changes nothing."""
import functools
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from test_faithfulness import as_edges
from tiny import random_pair, tiny_model
from weekly import mostly

from bizzaroworld.circuits.faithfulness import EdgeCircuits, NodeCircuits, areas, curve, nodes_at
from bizzaroworld.circuits.paths import edges, path_effects
from bizzaroworld.circuits.search import by_category, circuit_of_each, clusters, jaccard, membership, prune, ranked, scores_of
from bizzaroworld.patch.hops import as_path
from bizzaroworld.patch.interventions import Edit, positions_of
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.planted.scoreboard import places
from bizzaroworld.planted.truth import truth_of
from bizzaroworld.planted.variants import VARIANTS, plant

PAIRS = (random_pair(1), random_pair(2), random_pair(5, 9, (2, 4)))


@functools.cache
def planted(name, family="llama"): return plant(name, n=6, family=family)


def nodes_of(p, ablation="noising", metric="ld"): return NodeCircuits(p.model, p.pairs, nodes_at(p.model, places(p.pairs[0])), ablation, metric)


# What pruning need not keep, and why: a backup is silent when its turn comes; what MLP 5 undoes is not missed, and then MLP 5 is not; two of three layers still vote.
NOT_MISSED = {"backup": {"L4H2"}, "cancelled": {"L4H2", "L5"}, "spread": {"L2"}}
AFTER_ONE_ROUND = NOT_MISSED | {"cancelled": {"L4H2"}}  # MLP 5 had its turn before


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("ablation, metric, rounds", mostly([("noising", "ld", 1), ("noising", "kl", 2), ("mean", "ld", 2)], [("noising", "ld", 1), ("mean", "ld", 2)]))
def test_exactly_the_planted_nodes_are_found(name, ablation, metric, rounds):
    p = planted(name)
    found, spared = nodes_of(p, ablation, metric), (AFTER_ONE_ROUND if rounds == 1 else NOT_MISSED).get(name, set())
    expected = {n for n in truth_of(p.variant).nodes if str(n).split()[0] not in spared}
    result = prune(found, rounds=rounds)
    assert set(result.circuit) == expected
    assert found.faithfulness([result.circuit]) == pytest.approx([1], abs=1e-2)


@pytest.mark.parametrize("name, family", [*((name, "llama") for name in VARIANTS), ("saturated", "gemma2"), ("plain", "gemma3")])
def test_exactly_the_planted_edges_are_found(name, family):
    p = planted(name, family)
    spared = NOT_MISSED.get(name, set())
    def gone(e): return {str(n).split(".")[0] for n in e} & spared or {e[1].kind in "qkv" and f"L{e[1].layer}H2" in spared} == {True}
    expected = {e for e in as_edges(p.model, truth_of(p.variant)) if not gone(e)}
    assert set(prune(EdgeCircuits(p.model, p.pairs[:2], edges(p.model)), rounds=2).circuit) == expected


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_nodes_of_planted_gemmas_are_found(family):
    p = planted("plain", family)
    assert set(prune(nodes_of(p)).circuit) == set(truth_of(p.variant).nodes)


# --- the search itself

def one_by_one(circuits, threshold, rounds=1):
    "Greedy pruning as it is written down: one part, one run."
    kept = list(circuits.parts)
    for _ in range(rounds):
        before = len(kept)
        for part in [p for p in circuits.order() if p in kept]:
            (now,), (then,) = circuits.distance([kept]), circuits.distance([[p for p in kept if p != part]])
            if then - now < threshold: kept.remove(part)
        if len(kept) == before: break
    return set(kept)


@functools.cache
def random_circuits(kind, family="gemma3"):
    model = tiny_model(family)
    if kind == "nodes": return NodeCircuits(model, PAIRS, nodes_at(model))
    if kind == "places": return NodeCircuits(model, PAIRS[:2], nodes_at(model, ("entity", "final")), "mean", reference=PAIRS)
    return EdgeCircuits(model, PAIRS[:2], edges(model, ["embed", "L0H1", "L0.mlp", "L1H0", "L1.mlp"]))


@pytest.mark.parametrize("kind, threshold, at_once, rounds", [("nodes", 0.03, 64, 1), ("nodes", 0.2, 3, 2), ("places", 0.1, 1, 2), ("places", 0.02, 64, 1), ("edges", 0.05, 64, 1)])
def test_many_at_once_are_one_by_one(kind, threshold, at_once, rounds):
    circuits = random_circuits(kind)
    found = prune(circuits, threshold, rounds, at_once=at_once)
    assert set(found.circuit) == one_by_one(circuits, threshold, rounds)
    assert threshold < 0.04 or len(found.circuit) < len(circuits.parts)


def test_steps_tell_what_happened():
    circuits = random_circuits("nodes")
    found = prune(circuits, 0.1)
    assert found.steps.part.tolist() == list(map(str, circuits.order()))
    assert found.steps.part[found.steps.kept].tolist() == list(map(str, found.circuit))
    assert (found.steps.after - found.steps.before >= 0.1).tolist() == found.steps.kept.tolist()
    gone = found.steps[~found.steps.kept]
    assert gone.after.iloc[-1] == pytest.approx(circuits.distance([found.circuit])[0], abs=1e-5) and gone.before.iloc[0] == pytest.approx(0, abs=1e-6)
    assert len(gone) + len(found.circuit) == len(circuits.parts) == 15 and found.runs >= len(gone) and "parts of 15" in repr(found)


def test_parts_outside_are_ablated_from_the_start():
    circuits = random_circuits("nodes")
    some = circuits.parts[::2]
    found = prune(circuits, 1e9, within=some)
    assert found.circuit == () and len(found.steps) == len(some)
    assert found.steps.before.iloc[0] == pytest.approx(circuits.distance([some])[0]) and found.steps.after.iloc[-1] == pytest.approx(1, abs=1e-5)


def test_what_nobody_hears_changes_nothing():
    "An edge that goes without a run: taking it out is exactly as good."
    circuits, rng, checked = EdgeCircuits(tiny_model("gemma3"), PAIRS[:1], edges(tiny_model("gemma3"))), np.random.default_rng(0), 0
    for _ in range(3):
        kept = [e for e in circuits.parts if rng.random() < 0.2]
        senders = Counter(e[0] for e in kept)
        quiet = [e for e in kept if circuits.unheard(e, senders)]
        checked += len(quiet)
        assert circuits.values([kept]) == pytest.approx(circuits.values([[e for e in kept if e not in quiet]]), abs=1e-5)
        heard = [e for e in kept if e not in quiet and e[1].kind != "logits"]
        assert all(circuits.unheard(e, Counter()) for e in heard)
    assert checked > 5


def test_who_sends_through_edges_that_are_no_parts_is_heard():
    circuits = random_circuits("edges")
    assert not circuits.unheard(as_path(circuits.model, "embed -> L0H0.q"), Counter()) and circuits.unheard(as_path(circuits.model, "embed -> L0H1.q"), Counter())
    assert not circuits.unheard(as_path(circuits.model, "embed -> L0KV0.k"), Counter())  # L0H0 reads it, too


def test_the_order_is_that_of_the_model_reversed():
    circuits = random_circuits("nodes")
    order = circuits.order()
    assert [(e.layer, e.site) for e in order[:6]] == [(2, "mlp_out"), *[(2, "z")] * 4, (1, "mlp_out")] and len(set(order)) == len(circuits.parts)
    wires = EdgeCircuits(circuits.model, PAIRS[:1], edges(circuits.model))
    place = {"embed": -1, "logits": 99}
    def time(n): return place.get(n.kind, 2 * n.layer + (n.kind == "mlp"))
    order = wires.order()
    assert [time(e[1]) for e in order] == sorted((time(e[1]) for e in order), reverse=True) and set(order) == set(wires.parts)
    for receiver in dict.fromkeys(e[1] for e in order):  # one receiver after the other, its late senders first
        own = [i for i, e in enumerate(order) if e[1] == receiver]
        assert own == list(range(own[0], own[0] + len(own))) and (np.diff([time(order[i][0]) for i in own]) <= 0).all()


def test_a_threshold_of_nothing_is_refused():
    for nothing in (0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"): prune(random_circuits("nodes"), nothing)


# --- rankings

@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_scores_are_shares_of_the_way_and_positive_where_a_part_helps(direction):
    circuits = random_circuits("nodes")
    swept = sweep(circuits.model, PAIRS, circuits.parts, direction, progress=False)
    scores = scores_of(swept.to_frame(), circuits)
    base, other = (swept.clean, swept.corrupt) if direction == "noising" else (swept.corrupt, swept.clean)
    expected = (swept.patched[:, :, 0] - base).mean(0) / (other - base).mean()
    assert [scores[p] for p in circuits.parts] == pytest.approx(expected.tolist())
    p = planted("plain")
    sure = scores_of(sweep(p.model, p.pairs, list(truth_of(p.variant).nodes), "noising", progress=False).to_frame(), NodeCircuits(p.model, p.pairs, truth_of(p.variant).nodes))
    assert list(sure.values()) == pytest.approx([1, 0.5, 0.5], abs=1e-2)


def test_tokens_one_by_one_add_up_to_a_part_of_several():
    circuits = NodeCircuits(tiny_model("llama"), PAIRS, [Edit("mlp_out", 1, "all"), Edit("z", 2, "entity", 1)])
    table = sweep(circuits.model, PAIRS, nodes_at(circuits.model, range(9)), progress=False).to_frame()
    way = (table.corrupt - table.clean).mean()
    by_hand = [table[(table.site == "mlp_out") & (table.layer == 1)].effect.sum() / 3 / way,
               np.mean([table[(table.pair_id == tp.id) & (table.intervention == f"L2H1 z @{positions_of('entity', tp)[0]}")].effect.item() for tp in PAIRS]) / way]
    assert list(scores_of(table, circuits).values()) == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="no intervention L1 mlp_out @all of pair-1"): scores_of(table[table.position != "4"], circuits)
    with pytest.raises(ValueError, match="several values of metric"): scores_of(pd.concat([table, table.assign(metric="kl")]), circuits)


def test_rankings_put_the_planted_circuit_first():
    p = planted("decoy")
    found, truth = nodes_of(p), truth_of(p.variant)
    order = ranked(found, scores_of(sweep(p.model, p.pairs, found.parts, progress=False).to_frame(), found))
    assert set(order[:2]) == set(truth.nodes) and areas(curve(found, order)).CMD == pytest.approx(areas(curve(found, [*truth.nodes, *order[2:]])).CMD, abs=1e-3)
    wires = EdgeCircuits(p.model, p.pairs[:2], edges(p.model))
    table = path_effects(p.model, p.pairs[:2], wires.parts).to_frame()
    assert set(ranked(wires, scores_of(table, wires))[:3]) == set(as_edges(p.model, truth))


def test_signed_and_absolute_rankings():
    circuits = random_circuits("nodes")
    a, b, c, *rest = circuits.parts
    scores = dict.fromkeys(circuits.parts, 0.0) | {a: 0.5, b: -2.0, c: 1.0}
    assert ranked(circuits, scores) == [b, c, a, *rest] and ranked(circuits, scores, absolute=False) == [c, a, *rest, b]
    for bad in (scores | {c: float("nan")}, {p: 1.0 for p in (a, b)}):
        with pytest.raises(ValueError, match=f"{str(c).replace('.', '[.]')} has no score"): ranked(circuits, bad)


def test_one_part_at_a_time_misses_the_backup_and_the_curve_does_not_mind():
    p = planted("backup")
    found, (mlp, first, second) = nodes_of(p), truth_of(p.variant).nodes
    scores = scores_of(sweep(p.model, p.pairs, found.parts, progress=False).to_frame(), found)
    assert abs(scores[first]) < 1e-2 and abs(scores[second]) < 1e-2 and scores[mlp] == pytest.approx(1, abs=1e-2)


# --- one circuit for each pair

def test_every_pair_of_a_planted_model_has_the_planted_circuit():
    p = planted("early")
    found = circuit_of_each(nodes_of(p))
    assert list(found) == [tp.id for tp in p.pairs] and set(map(frozenset, found.values())) == {frozenset(truth_of(p.variant).nodes)}
    assert (jaccard(found).to_numpy() == 0).all() and set(clusters(found)) == {1}
    wires = EdgeCircuits(p.model, p.pairs[:2], edges(p.model))
    assert set(circuit_of_each(wires).values()) == {frozenset(as_edges(p.model, truth_of(p.variant)))}


A, B, C, D, E, F = (Edit("z", layer, "all", head) for layer in range(2) for head in range(3))
SETS = {"p": {A, B}, "q": {A, B, C}, "r": {D, E}, "s": {D, E, F}, "t": {D, E}}


def test_distances_are_counted():
    table = jaccard(SETS)
    for i, a in SETS.items():
        for j, b in SETS.items(): assert table.loc[i, j] == pytest.approx(1 - len(a & b) / len(a | b))
    assert membership(SETS).columns[0] in (str(D), str(E)) and membership(SETS).sum().tolist() == [3, 3, 2, 2, 1, 1]
    assert jaccard({"a": set(), "b": set(), "c": {A}}).loc["a"].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="No circuit has a part"): jaccard({"a": set()})


def test_clusters_are_what_is_near():
    assert clusters(SETS).groupby(clusters(SETS)).groups.values().__len__() == 2
    two = clusters(SETS)
    assert two["p"] == two["q"] != two["r"] == two["s"] == two["t"]
    assert clusters(SETS, within=0.1).nunique() == 4 and clusters(SETS, within=1).nunique() == 1 and clusters({"p": {A}}).tolist() == [1]


def test_categories_are_held_against_chance():
    labels = dict(zip(SETS, "xxyyy"))
    found = by_category(SETS, labels)
    assert found[["within", "between", "n"]].tolist() == pytest.approx([(1 / 3 + 1 / 3 + 0 + 1 / 3) / 4, 1, 5])
    assert found.p == pytest.approx(1 / 10, abs=0.03)  # one of ten ways to deal two and three
    mixed = by_category(SETS, dict(zip(SETS, "xyxyx")))
    assert mixed.within > found.within and mixed.p > 0.3
    for labels in (dict.fromkeys(SETS, "x"), dict(zip(SETS, "abcde"))):
        with pytest.raises(ValueError, match="two categories or more"): by_category(SETS, labels)
