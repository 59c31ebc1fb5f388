"""What is said to be true of planted circuits, against brute force: surgery, every edge on the bare model, gradients."""
from dataclasses import replace

import pytest
import torch
from bare_planted import bare, edge_effects, gradients, heads, ld

from bizzaroworld.circuits.paths import edges, path_effects
from bizzaroworld.methods.attention import Head, attention_to
from bizzaroworld.patch.interventions import Edit
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.planted.scoreboard import as_edge_scores, edges_of, exact, nodes_of
from bizzaroworld.planted.truth import Edge, outside, truth_of, wiring, without
from bizzaroworld.planted.variants import VARIANTS, plant
from bizzaroworld.planted.weights import LOGIT, Lookup, Mover, Plan

NAMES = list(VARIANTS)
_PLANTED = {}


def planted(name):
    if name not in _PLANTED: _PLANTED[name] = plant(name, n=2, seed=3)
    return _PLANTED[name]


def clean_ld(p):
    """The clean runs' logit differences, least and greatest."""
    values = sweep(p.model, p.pairs, Edit("resid_pre", 0, "final")).clean
    return values.min(), values.max()


@torch.no_grad()
def after_surgery(p, cuts):
    """On the bare model: the least and greatest logit difference after each cut, a list of (layer, head, MLP or neuron) whose output weights are zero."""
    hf, ids = bare(p), torch.tensor([tp.clean_ids for tp in p.pairs])
    for cut in cuts:
        before = hf.state_dict()
        before = {name: w.clone() for name, w in before.items() if "o_proj" in name or "down_proj" in name}
        for n in cut:
            out = hf.model.layers[n.layer].self_attn.o_proj.weight if n.site == "z" else hf.model.layers[n.layer].mlp.down_proj.weight
            out[:, heads(n) if n.site == "z" else slice(None) if n.head is None else n.head] = 0
        found = torch.stack([ld(row, tp) for row, tp in zip(hf(input_ids=ids).logits, p.pairs)])
        hf.load_state_dict(before, strict=False)
        yield found.min().item(), found.max().item()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_circuit_matters(name):
    p, truth = planted(name), truth_of(VARIANTS[name])
    rest = outside(p, truth)
    assert len([n for n in rest if n.site == "z"]) == 24 - len(truth.phases["routing"])
    cuts = [rest, *([n] for n in rest)]  # all together, and each alone: two that cancel each other would not be seen together
    for cut, (low, high) in zip(cuts, after_surgery(p, cuts)): assert LOGIT - 3e-3 < low <= high < LOGIT + 3e-3, cut[:1]
    assert clean_ld(without(p, rest)) == pytest.approx((LOGIT, LOGIT), abs=3e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_the_circuit_is_needed_unless_it_is_masked(name):
    p, truth = planted(name), truth_of(VARIANTS[name])
    neurons = [Edit("neuron", layer, "all", i) for layer, i in truth.neurons]
    cuts = [*([n] for n in truth.nodes), neurons]
    for cut, (low, high) in zip(cuts, after_surgery(p, cuts)):
        if cut[0] in truth.masked: assert low > LOGIT - 3e-3, cut
        else: assert high < LOGIT / 2 + 3e-3, cut
    assert clean_ld(without(p, neurons))[1] < LOGIT / 2


def test_masked_parts_are_needed_together():
    for name, both in {"spread": [0, 1], "backup": [(3, 1), (4, 2)]}.items():
        nodes = [Edit("mlp_out", x, "entity") if isinstance(x, int) else Edit("z", x[0], "final", x[1]) for x in both]
        assert set(nodes) <= truth_of(VARIANTS[name]).masked
        assert clean_ld(without(planted(name), nodes))[1] < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_the_edges_are_those_of_brute_force(name):
    p, truth = planted(name), truth_of(VARIANTS[name])
    edges = edges_of(p.model, p.pairs)
    assert len(set(edges)) == len(edges) > 4000 and set(truth.edges) <= set(edges)
    effects = dict(zip(edges, edge_effects(p, edges, p.pairs[0])))
    alone = set(truth.edges) - truth.masked
    assert {str(e) for e, effect in effects.items() if abs(effect) > 0.1} == {str(e) for e in alone}
    assert max(abs(effect) for e, effect in effects.items() if e not in alone) < 1e-3
    tp, masked = p.pairs[0], [e for e in truth.edges if e in truth.masked]
    if masked:  # and as little in denoising: no question about one edge sees it
        assert max(map(abs, edge_effects(p, masked, replace(tp, clean_ids=tp.corrupt_ids, corrupt_ids=tp.clean_ids)))) < 1e-3


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if any(isinstance(x, Edge) for x in truth_of(VARIANTS[name]).masked) else (pytest.mark.slow, pytest.mark.weekly)) for name in NAMES])
def test_beside_the_right_node_every_edge_is_seen_and_no_other(name):
    """Brute force in the runs in which one node of the circuit is patched already: path effects are the same numbers, and the edges that do something in one of them are the circuit's."""
    p, truth, found = planted(name), truth_of(VARIANTS[name]), set()
    tp, every = p.pairs[0], edges_of(p.model, p.pairs[:1])
    some = [e for e in every if e.sender.position in ("entity_first", "entity", "final")]
    for node in truth.nodes:
        effects, ours = dict(zip(some, edge_effects(p, some, tp, node))), {}
        for at in ("entity_first", "entity", "final"):
            asked = [path for path in edges(p.model) if at == "final" or path[-1].kind != "logits"]
            ours |= as_edge_scores(path_effects(p.model, tp, asked, sender_at=at, receiver_at=at, beside=node).to_frame(), p.model, at)
        assert set(ours) == set(some) and max(abs(ours[e] - effects[e]) for e in some) < 1e-3
        shown = {e for e, effect in effects.items() if abs(effect) > 0.1}
        assert max(abs(effect) for e, effect in effects.items() if e not in shown) < 1e-2
        found |= shown
    alone = {e for e in truth.edges if e not in truth.masked}
    assert found | alone == set(truth.edges) and {e for e in truth.masked if isinstance(e, Edge)} <= found


@pytest.mark.parametrize("name", NAMES)
def test_nodes_and_inputs_alone(name):
    p, truth = planted(name), truth_of(VARIANTS[name])
    scores = exact(sites=("z", "mlp_out", "q", "k", "v"))(p.model, p.pairs)
    expected = {n for n in (*truth.nodes, *truth.inputs) if n not in truth.masked}
    assert {n for n, s in scores.items() if abs(s) > 0.1} == expected
    assert max(abs(s) for n, s in scores.items() if n not in expected) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_is_blind_where_it_is_said_to_be(name):
    p, truth = planted(name), truth_of(VARIANTS[name])
    nodes = [Edit(n.site, n.layer, n.position, n.head) for n in nodes_of(p.model, p.pairs, ("z", "mlp_out", "q", "k", "v"))]
    estimates = gradients(p, nodes, p.pairs[0])
    wanted = set(truth.nodes) | set(truth.inputs)
    assert {n for n in nodes if abs(estimates[n]) > 0.1} == wanted - truth.blind
    assert max(abs(estimates[n]) for n in nodes if n not in wanted - truth.blind) < 5e-3


def test_a_gradient_that_does_not_pass_the_flat_mlp_sees_what_is_before_it():
    p, truth = planted("flat"), truth_of(VARIANTS["flat"])
    with_all, dropped = (gradients(p, truth.nodes, p.pairs[0], stop) for stop in ((), (4,)))
    assert all(abs(e) < 5e-3 for e in with_all.values()) and all(abs(abs(e) - 1) < 1e-2 for e in dropped.values())


def test_what_the_cancelled_head_does_directly_is_twice_the_answer():
    p, edge = planted("cancelled"), Edge(Edit("z", 4, "final", 2), Edit("logits", 6, "final"))
    assert edge_effects(p, [edge], p.pairs[0]) == pytest.approx([2], abs=1e-3)
    assert abs(exact()(p.model, p.pairs)[edge.sender]) < 1e-3


def test_the_decoy_looks_at_the_entity_as_the_circuit_does():
    p = planted("decoy")
    table = attention_to(p.model, p.pairs, [Head(3, 1), Head(4, 2)], ["entity"])
    assert set(table["head"]) == {"L3H1", "L4H2"} and (table.weight > 0.999).all()
    assert Edit("z", 3, "final", 1) in truth_of(VARIANTS["decoy"]).nodes and len(truth_of(VARIANTS["decoy"]).nodes) == 2


def test_wiring_leaves_out_what_is_not_read():
    plan = VARIANTS["decoy"].plan
    assert not any("L4" in str(e.sender) or "L2" in str(e.sender) for e in wiring(plan))
    assert wiring(Plan((Lookup(3, "last", "fact"),), (Mover(3, 1, "fact", "answer"),))) == ()  # the head reads before the MLP of its layer writes
    assert len(wiring(Plan((Lookup(2, "last", "fact"),), (Mover(3, 1, "fact", "answer"),)))) == 3


def test_what_cannot_be_asked_or_taken_out_is_refused():
    with pytest.raises(ValueError, match="Unknown question '5'"): truth_of(VARIANTS["plain"]).finds("5")
    with pytest.raises(ValueError, match="can be taken out"): without(planted("plain"), [Edit("resid_pre", 0)])
