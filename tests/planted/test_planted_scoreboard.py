"""The scoreboard: its arithmetic on known answers, and what the exact engine finds in every planted circuit."""
import math
from itertools import cycle, product

import numpy as np
import pandas as pd
import pytest
from weekly import mostly

from bizzaroworld.patch.interventions import Edit, grid
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.planted.scoreboard import (QUESTIONS, as_edge_scores, as_scores, asked, auroc, board, change, edges_from_nodes, edges_of, exact, exact_edges, exact_given, exact_scores, nodes_of,
                                             noise_for, places, score, scoreboard)
from bizzaroworld.planted.truth import Edge, truth_of
from bizzaroworld.planted.variants import VARIANTS, plant


@pytest.fixture(scope="module")
def zoo():
    return {name: plant(name, n=2) for name in VARIANTS}


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, true = rng.integers(0, 5, 30), rng.random(30) < 0.3
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[true] for b in scores[~true]]
        assert auroc(scores, true) == pytest.approx(np.mean(pairs))
    assert math.isnan(auroc([1, 2], [True, True]))


def test_auroc_is_that_of_scikit_learn():
    metrics, rng = pytest.importorskip("sklearn.metrics"), np.random.default_rng(1)
    scores, true = rng.integers(0, 9, 100), rng.random(100) < 0.2
    assert auroc(scores, true) == pytest.approx(metrics.roc_auc_score(true, scores))


def test_a_score_counts():
    s = score({"a": -1.0, "b": 0.09, "c": 0.1}, {"a", "b"}, list("abcd"))
    assert (s.found, s.missed, s.extra) == (("a",), ("b",), ("c",)) and (s.precision, s.recall, s.exact, str(s)) == (0.5, 0.5, False, "1/2 +1")
    assert s.auroc == 0.75
    perfect, nothing = score({"a": 1}, {"a"}, "ab"), score({}, {"a"}, "ab")
    assert perfect.exact and perfect.auroc == 1 and (nothing.recall, nothing.auroc) == (0, 0.5) and math.isnan(nothing.precision)
    assert score({"a": 4e-4, "b": 2e-4}, {"a"}, "ab").auroc == 0.5  # below what is arithmetic


@pytest.mark.parametrize("scores, true, told", [({"x": 1.0}, {"a"}, "x is not among"), ({}, {"z"}, "z is not among"), ({"a": float("nan")}, {"a"}, "not a number")])
def test_scores_of_something_else_are_refused(scores, true, told):
    with pytest.raises(ValueError, match=told): score(scores, true, "ab")


def test_every_place_and_component_is_scored(zoo):
    p = zoo["plain"]
    assert places(p.pairs[0]) == [0, 1, "entity_first", "entity", 4, "final"]
    assert len(set(nodes_of(p.model, p.pairs))) == 6 * 6 * 5 and len(nodes_of(p.model, p.pairs, ("q", "k", "v"))) == 6 * 6 * 8
    edges = edges_of(p.model, p.pairs)
    def layer(n): return 2 * n.layer + (n.site in ("mlp_out", "mlp_in")) - (n.site == "embed")
    assert all(layer(e.sender) < layer(e.receiver) and e.sender.position == e.receiver.position for e in edges)
    per_layer = sum(1 + 5 * l for l in range(6)) * 8 + sum(1 + 5 * l + 4 for l in range(6))  # into q, k, v; into MLPs
    assert len(edges) == 6 * per_layer + 1 + 5 * 6


def test_every_question_finds_what_it_must(zoo):
    table = asked(zoo.values())
    assert len(table) == len(VARIANTS) * len(QUESTIONS)
    wrong = table[~table.right]
    assert wrong.empty, wrong.to_string()
    nothing = 8 + 3 + 2  # experiment 4 of all; the heads of the backup; 2B and 3 where the fact is early
    assert (table.must.map(len) == 0).sum() == nothing and table[table.question == "4"].found.map(len).sum() == 0


def test_experiment_4_misses_the_heads_that_4f_finds(zoo):
    table = asked([zoo["plain"]]).set_index("question").found
    assert table["4"] == () and [(e.layer, e.head) for e in table["4F"]] == [(3, 1), (4, 2)]


def test_denoising_answers_the_questions_alike(zoo):
    assert asked([zoo["plain"], zoo["early"], zoo["saturated"]], ("1", "2A", "2B", "3", "4", "4F"), "denoising").right.all()


def test_patched_alone_nodes_are_found_unless_they_are_masked(zoo):
    table = scoreboard({"noising": exact(), "denoising": exact("denoising")}, zoo.values())
    assert not table.extra.map(len).any()
    for _, row in table.iterrows(): assert set(row.missed) == {n for n in truth_of(VARIANTS[row.variant]).nodes if n in truth_of(VARIANTS[row.variant]).masked}
    masked = {"backup", "cancelled", "spread"}
    assert {row.variant for _, row in table.iterrows() if not row.exact} == masked
    assert (table[~table.variant.isin(masked)].auroc == 1).all() and (table[~table.variant.isin(masked)].phases == 3).all()
    assert board(table, "phases").loc["noising", list(masked)].tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ["backup", "cancelled", "spread"])
def test_the_right_question_finds_every_circuit(zoo, name):
    p = plant(name, n=1)
    row = scoreboard({"given": exact_given(at=("entity", "final"))}, [p]).iloc[0]
    assert row.exact and (row.precision, row.recall, row.auroc, row.phases) == (1, 1, 1, 3)


@pytest.mark.parametrize("name", mostly(["backup", "cancelled", "spread"], ["cancelled"]))
def test_edges_that_do_nothing_alone_are_found_beside_the_nodes(name):
    p, truth = plant(name, n=1), truth_of(VARIANTS[name])
    alone, beside = (scoreboard({"paths": exact_edges(beside=nodes)}, [p], "edges").iloc[0] for nodes in (None, lambda model, pairs: dict.fromkeys(truth.nodes, 1.0)))
    assert not alone.extra and set(alone.missed) == {e for e in truth.edges if e in truth.masked}
    assert beside.exact and beside.auroc == 1


@pytest.mark.slow
@pytest.mark.parametrize("name, family, direction", mostly(product(VARIANTS, ("llama", "gemma3"), ("noising", "denoising")), [(name, *asked) for name, asked in zip(VARIANTS, cycle([("llama", "denoising"), ("gemma3", "noising")]))]))
def test_the_right_question_finds_every_circuit_of_edges(name, family, direction):
    """Nobody tells it the nodes: it finds these by the right question, too."""
    row = scoreboard({"paths": exact_edges(direction, beside=exact_given(direction))}, [plant(name, n=1, family=family)], "edges").iloc[0]
    assert row.exact and (row.precision, row.recall, row.auroc) == (1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_the_right_question_finds_every_circuit_at_all_tokens(zoo, name):
    row = scoreboard({"given": exact_given(at=None)}, [zoo[name]]).iloc[0]
    assert row.exact and (row.precision, row.recall, row.auroc, row.phases) == (1, 1, 1, 3)


def test_log_probability_misses_half_of_an_answer(zoo):
    p, truth = zoo["plain"], truth_of(VARIANTS["plain"])
    found = exact_scores(p.model, p.pairs, truth.nodes, metrics=("ld", "logprob", "kl", "prob"))
    half = Edit("z", 3, "final", 1)
    def logprob(answer, other): return answer - math.log(math.exp(answer) + math.exp(other) + 24)  # of 26 tokens
    clean, tie, corrupt = logprob(10, 0), logprob(5, 5), logprob(0, 10)
    assert found["ld"][half] == pytest.approx(-0.5, abs=1e-3)
    assert found["logprob"][half] == pytest.approx((tie - clean) / (clean - corrupt), abs=1e-3) and abs(found["logprob"][half]) < 0.1
    assert found["prob"][half] == pytest.approx((math.exp(tie) - math.exp(clean)) / (math.exp(clean) - math.exp(corrupt)), abs=1e-3)
    assert abs(found["kl"][half]) < 0.1


def test_noise_makes_the_flat_mlp_answer(zoo):
    p, mlp = zoo["flat"], Edit("mlp_out", 4, "final")
    noise = noise_for(p, draws=10)
    assert 0.4 < noise.deviation < 0.6
    assert abs(exact(noise=noise)(p.model, p.pairs)[mlp]) > 0.1 > 1e-3 > abs(exact()(p.model, p.pairs)[mlp])


def test_what_differs_is_not_what_matters(zoo):
    row = scoreboard({"change": change}, [zoo["decoy"]]).iloc[0]
    decoy = {Edit("mlp_out", 2, "entity"), Edit("z", 4, "final", 2)}
    assert row.recall == 1 and decoy <= set(row.extra) and row.precision < 0.1
    before = [n for n in row.extra if n.position in (0, 1)]
    assert not before  # tokens before the entity are the same in both prompts


def test_edges_from_nodes_find_plain_circuits_and_invent_some(zoo):
    method = edges_from_nodes(exact(sites=("z", "mlp_out", "q", "k", "v")))
    table = scoreboard({"guess": method}, [zoo["plain"], zoo["backup"]], "edges").set_index("variant")
    assert table.recall["plain"] == 1 and table.precision["plain"] == 5 / 8 and table.recall["backup"] < 1


def test_a_method_that_knows_the_truth_is_perfect_on_every_kind(zoo):
    for kind in ("nodes", "inputs", "edges"):
        for name, p in zoo.items():
            truth = getattr(truth_of(p.variant), kind)
            row = scoreboard({"oracle": lambda model, pairs: {x: 1.0 for x in truth}}, [p], kind).iloc[0]
            assert row.exact and row.auroc == 1, (kind, name)
    with pytest.raises(ValueError, match="Unknown kind"): scoreboard({"exact": exact()}, [zoo["plain"]], "heads")


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_table_of_a_sweep_has_the_same_scores(zoo, direction):
    p = zoo["cancelled"]
    by_name, by_number = (sweep(p.model, p.pairs, grid(p.model, ("z", "mlp_out"), at), direction).to_frame() for at in (places(p.pairs[0]), list(range(6))))
    expected = exact(direction)(p.model, p.pairs)
    for table in (by_name, by_number):
        found = as_scores(table, p.pairs)
        assert set(found) == set(expected) and all(found[n] == pytest.approx(expected[n], abs=1e-5) for n in expected)
    assert {abs(round(expected[n], 2)) for n in truth_of(p.variant).nodes} == {0, 1, 2}


def test_the_table_of_path_effects_is_read(zoo):
    rows = [("L1.mlp", "L3KV0.v", -10), ("L1.mlp", "L3KV0.v", 0), ("embed", "L1.mlp", -20), ("L3H1", "L4H2.q", 5), ("L4H2", "logits", 0)]
    table = pd.DataFrame([(a, b, 10.0, -10.0, float(e)) for a, b, e in rows], columns=["sender", "receiver", "clean", "corrupt", "effect"])
    mlp, v, q = Edit("mlp_out", 1, "entity"), Edit("v", 3, "entity", 0), Edit("q", 4, "entity", 2)
    assert as_edge_scores(table, zoo["plain"].model, "entity") == {
        Edge(mlp, v): -0.25, Edge(Edit("embed", 0, "entity"), Edit("mlp_in", 1, "entity")): -1, Edge(Edit("z", 3, "entity", 1), q): 0.25,
        Edge(Edit("z", 4, "entity", 2), Edit("logits", 6, "entity")): 0}
    with pytest.raises(ValueError, match="'L1.attn' is no component"): as_edge_scores(table.assign(sender="L1.attn"), zoo["plain"].model, "entity")
