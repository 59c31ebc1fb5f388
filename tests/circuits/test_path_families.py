"""Edges of every family that has heads to follow: the identities that need no oracle."""
import numpy as np
import pytest
import torch
from families import LOADED, bare
from tiny import random_pair

from bizzaroworld.circuits.edge_sets import edge_sets
from bizzaroworld.circuits.paths import edges, path_effects, receivers_of, senders_of
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.hops import end_of
from bizzaroworld.patch.interventions import Edit
from bizzaroworld.patch.sweep import sweep

pytestmark = pytest.mark.slow
OTHER_WAYS = ("gemma4-per_layer_inputs", "laguna", "afmoe")  # inputs to each layer; gates on what heads write
NEEDED = ("z", "q", "k", "v", "mlp_out")


def edit_of(model, node, sends):
    if node.kind in ("embed", "logits"): return Edit("resid_pre", 0, "all") if sends else Edit("resid_post", model.n_layers - 1, "final")
    if node.kind == "mlp": return Edit("mlp_out", node.layer, "all")
    return Edit("z" if sends else end_of(model, node)[0], node.layer, "all", node.head)


@pytest.mark.parametrize("name", LOADED)
def test_edges_add_up_to_what_sweeps_say(name):
    """A sender to all, all to a receiver, everything; and one edge at a time by the two ways there are. Families without such sites are refused."""
    model, tp = load_model(bare(name)), random_pair(1)
    if name in OTHER_WAYS:
        with pytest.raises(ValueError, match="paths that no edge stands for"): path_effects(model, tp, edges(model))
        return
    if missing := [s for s in NEEDED if s not in model.sites]:
        with pytest.raises(ValueError, match=f"has no ({'|'.join([*missing, 'resid_mid'])})|no edge stands for"): path_effects(model, tp, edges(model))
        return
    size = model.logits(torch.tensor([tp.clean_ids])).abs().max().item()
    senders, receivers = senders_of(model), receivers_of(model)
    sets = [edges(model, [s]) for s in senders] + [edges(model, None, [r]) for r in receivers]
    whole = [edit_of(model, s, True) for s in senders] + [edit_of(model, r, False) for r in receivers]
    expected = sweep(model, tp, whole, progress=False)
    found = edge_sets(model, tp, dict(enumerate(sets)))
    assert found.patched.to_numpy() == pytest.approx(expected.patched[0, :, 0], abs=1e-5 * size)
    single = edges(model)[::7]
    one_by_one = edge_sets(model, tp, {i: [e] for i, e in enumerate(single)}).patched.to_numpy()
    assert path_effects(model, tp, single).patched[0, :, 0] == pytest.approx(one_by_one, abs=1e-5 * size)
    assert np.abs(one_by_one - expected.clean.item()).max() > 1e-4 * size
