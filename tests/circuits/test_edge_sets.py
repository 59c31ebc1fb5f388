"""Many edges at once: what they must come to where an ordinary sweep, or a run, says it."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LAYERS, random_pair, tiny_model

from bizzaroworld.circuits.edge_sets import edge_sets
from bizzaroworld.circuits.paths import edges, path_effects, receivers_of, senders_of
from bizzaroworld.patch.hops import as_node, end_of
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep

FAMILIES = ("llama", "gemma", "gemma2", "gemma3", "gpt2", "pythia", "qwen3")
MODELS = {name: tiny_model(name) for name in FAMILIES}
SITES = {"head": "z", "mlp": "mlp_out", "embed": "resid_pre"}


def patched(model, pairs, sets, direction="noising"):
    "Of each pair and set."
    found = edge_sets(model, pairs, dict(enumerate(sets)), direction)
    return found.patched.to_numpy().reshape(-1, len(sets)), found


def swept(model, pairs, interventions, direction="noising"): return sweep(model, pairs, interventions, direction, progress=False).patched[:, :, 0]


def sender_edit(node): return Edit(SITES[node.kind], max(node.layer, 0), "all", node.head)


def receiver_edit(model, node):
    if node.kind == "logits": return Edit("resid_post", LAYERS - 1, "final")
    return Edit(end_of(model, node)[0], node.layer, "all", node.head)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_edge_is_path_patching(name):
    model, tp = MODELS[name], random_pair(1)
    some = edges(model)[::3]
    for direction in ("noising", "denoising"):
        ours, _ = patched(model, tp, [[e] for e in some], direction)
        assert ours[0] == pytest.approx(path_effects(model, tp, some, direction).patched[0, :, 0], abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sender_to_all_receivers_is_the_senders_whole_effect(name):
    model, pairs = MODELS[name], [random_pair(1), random_pair(2, 12, (8, 9))]
    senders = senders_of(model)
    for direction in ("noising", "denoising"):
        ours, found = patched(model, pairs, [edges(model, [s]) for s in senders], direction)
        assert ours == pytest.approx(swept(model, pairs, [sender_edit(s) for s in senders], direction), abs=1e-5)
        assert (found.effect.abs() > 1e-3).mean() > 0.3


@pytest.mark.parametrize("name", FAMILIES)
def test_all_senders_to_a_receiver_are_the_receivers_whole_effect(name):
    """It reads the donor's stream, and so does what it does in the donor's run."""
    model, pairs = MODELS[name], [random_pair(1), random_pair(2, 12, (8, 9))]
    receivers = receivers_of(model)
    for direction in ("noising", "denoising"):
        ours, found = patched(model, pairs, [edges(model, None, [r]) for r in receivers], direction)
        assert ours == pytest.approx(swept(model, pairs, [receiver_edit(model, r) for r in receivers], direction), abs=2e-5)
        assert (found.effect.abs() > 1e-3).mean() > 0.2


@settings(max_examples=12)
@given(name=st.sampled_from(FAMILIES), seed=st.integers(0, 10**6))
def test_several_senders_and_receivers_are_patched_together(name, seed):
    """All edges out of some senders and into some receivers: the sweep that patches all of these."""
    model, tp, rng = MODELS[name], random_pair(3), np.random.default_rng(seed)
    senders, receivers = senders_of(model)[1:], [r for r in receivers_of(model) if r.kind not in ("mlp", "logits")]
    out = [senders[i] for i in rng.choice(len(senders), 3, replace=False)]
    into = [receivers[i] for i in rng.choice(len(receivers), 3, replace=False)]
    ours, _ = patched(model, tp, [edges(model, out) + edges(model, None, into)])
    whole = Intervention([sender_edit(s) for s in out] + [receiver_edit(model, r) for r in into])
    assert ours == pytest.approx(swept(model, tp, whole), abs=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_edge_is_the_run_and_all_edges_are_the_other_run(name):
    model, pairs = MODELS[name], [random_pair(1), random_pair(2, 12, (8, 9))]
    for direction, base, other in (("noising", "clean", "corrupt"), ("denoising", "corrupt", "clean")):
        ours, found = patched(model, pairs, [[], edges(model)], direction)
        assert ours[:, 0] == pytest.approx(found[found.set == 0][base].to_numpy(), abs=1e-5)
        assert ours[:, 1] == pytest.approx(found[found.set == 1][other].to_numpy(), abs=2e-5)
        assert found.edges.tolist() == [0, len(edges(model))] * 2 and found.recovery.to_numpy() == pytest.approx([1.0, 0.0] * 2 if direction == "noising" else [0.0, 1.0] * 2, abs=1e-4)


def test_sets_do_not_see_each_other():
    """Many random sets in one pass, and in small passes, are what each is alone."""
    model, tp, rng = MODELS["gemma3"], random_pair(1), np.random.default_rng(0)
    every = edges(model)
    sets = {f"set {k}": [every[i] for i in np.flatnonzero(rng.random(len(every)) < k / 8)] for k in range(9)}
    together = edge_sets(model, tp, sets, metrics=("ld", "kl"))
    assert edge_sets(model, tp, sets, metrics=("ld", "kl"), at_once=1).patched.to_numpy() == pytest.approx(together.patched.to_numpy(), abs=1e-5)
    for name, some in sets.items():
        assert edge_sets(model, tp, {name: some}, metrics=("ld", "kl")).patched.to_numpy() == pytest.approx(together[together.set == name].patched.to_numpy(), abs=1e-5)
    assert together.patched.round(4).nunique() > 14


def test_what_is_refused():
    model, tp = MODELS["gemma3"], random_pair(1)
    for some, why in ((["L0H0 -> L1H2.k"], r"^L0H0 -> L1H2.k: a set .* names by the key-value head: L1KV1.k.$"), ([(as_node("embed"), as_node("L1H0.v"))], "^embed -> L1H0.v: .* L1KV0.v.$"), (["embed -> L1H0"], "a set is of edges"), (["embed -> L0.mlp -> logits"], "a set is of edges"), (["L2H0 -> L0.mlp"], "no path")):
        with pytest.raises(ValueError, match=why): edge_sets(model, tp, {"": some})
    with pytest.raises(ValueError, match="Unknown direction"): edge_sets(model, tp, {}, "up")
    with pytest.raises(ValueError, match="No sets: give one or more"): edge_sets(model, tp, {})
    with pytest.raises(ValueError, match="No pairs: give one or more"): edge_sets(model, [], {"": ["embed -> logits"]})
    one, (path,) = edge_sets(model, tp, {"one": ["embed -> L1KV1.k"]}), edges(model, "embed", "L1KV1.k")
    for alone in ("embed -> L1KV1.k", path): assert edge_sets(model, tp, {"one": alone}).equals(one), "one edge is a set of one"
    assert str(as_node("L1KV0.k")) == "L1KV0.k" and edge_sets(MODELS["gpt2"], tp, {"one": ["L0H0 -> L1H2.k"]}).edges.tolist() == [1]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_control_takes_what_is_sent_from_another_pair(name):
    """All edges: the donor's run, read at this pair's answers. A pair that differs from its start on; the ends stay the pair's own."""
    model, tp, other = MODELS[name], random_pair(1), random_pair(5)
    sets = {"all": edges(model), "some": edges(model, ["embed", "L0H1"], ["L1H2.q", "L2.mlp", "logits"]), "one": edges(model)[40:41]}
    for direction, side in (("noising", "corrupt_ids"), ("denoising", "clean_ids")):
        plain, own = edge_sets(model, tp, sets, direction), edge_sets(model, tp, sets, direction, donors=[tp])
        assert own.equals(plain)
        found = edge_sets(model, tp, sets, direction, donors=[other])
        assert found[["clean", "corrupt"]].equals(plain[["clean", "corrupt"]])
        end = sweep(model, replace(tp, clean_ids=getattr(other, side), corrupt_ids=getattr(other, side)), Edit("resid_pre", 0, "final"), progress=False).clean[0, 0]
        assert found.patched[0] == pytest.approx(end, abs=1e-5) and abs(end - plain.patched[0]) > 1e-2
        assert found.patched[2] == pytest.approx(path_effects(model, tp, sets["one"], direction, donors=[other]).patched[0, 0, 0], abs=1e-5)
    with pytest.raises(ValueError, match="0 donors for 1 pairs"): edge_sets(model, tp, sets, donors=[])
    with pytest.raises(ValueError, match="9 tokens and its donor pair-2 has 12"): edge_sets(model, tp, sets, donors=[random_pair(2, 12, (8, 9))])
