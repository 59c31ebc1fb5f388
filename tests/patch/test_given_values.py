"""Values that are given: several for one place, told apart by a label, and one for each token."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LAYERS, random_pair, tiny_model

from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep

MODEL = tiny_model("gemma3")
WIDTH = {"z": 8, "q": 8, "k": 8, "v": 8}
HEADS = {"z": 4, "q": 4, "k": 2, "v": 2}


def patched(*args, **kwargs): return sweep(MODEL, *args, progress=False, **kwargs).patched[:, :, 0]


def value(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30)
@given(site=st.sampled_from(["resid_pre", "mlp_out", "resid_mid", "z", "q", "k", "v"]), layer=st.integers(0, LAYERS - 1), head=st.booleans(),
       source=st.sampled_from(["given", "added"]), position=st.sampled_from(["all", "entity_span", "final"]))
def test_a_value_for_each_token_is_an_edit_for_each_token(site, layer, head, source, position):
    tp = random_pair(1)
    places = {"all": range(9), "entity_span": (3, 4), "final": (8,)}[position]
    heads = HEADS.get(site)
    shape = ([] if heads is None or head else [heads]) + [WIDTH.get(site, 32)]
    whole, edit = value(1, len(places), *shape), Edit(site, layer, position, 1 if heads and head else None, source)
    each = [replace(edit, position=p) for p in places]
    expected = patched(tp, Intervention(each), values={e: whole[i] for i, e in enumerate(each)})
    assert patched(tp, edit, values={edit: whole}) == pytest.approx(expected, abs=1e-6)
    assert patched(tp, edit, values={edit: {tp.id: whole}}) == pytest.approx(expected, abs=1e-6)
    if position == "all" and site not in ("q", "k"): assert np.abs(patched(tp, edit, values={edit: whole.flip(0)}) - expected).max() > 1e-6


def test_labels_tell_values_for_one_place_apart():
    """In one sweep, beside each other, and on two pairs with values of their own. Each is what it is alone."""
    pairs = [random_pair(1), random_pair(2)]
    edits = [Edit(site, 1, "all", head, "given", label) for site, head in (("v", 0), ("mlp_out", None)) for label in ("", "one", "two")]
    values = {e: {tp.id: value(10 * i + j, 9, WIDTH.get(e.site, 32)) for j, tp in enumerate(pairs)} for i, e in enumerate(edits)}
    together = patched(pairs, edits, values=values)
    assert len(set(together.round(4).flatten().tolist())) == together.size
    for i, e in enumerate(edits):
        for j, tp in enumerate(pairs):
            plain = replace(e, label="")
            assert together[j, i] == pytest.approx(patched(tp, plain, values={plain: values[e][tp.id]}).item(), abs=1e-5)


def test_a_label_is_shown_and_is_no_other_place():
    one, two = Edit("z", 1, "final", 0, "given", "L0.mlp"), Edit("z", 1, "final", 0, "given", "embed")
    assert str(one) == "L1H0 z @final = given (L0.mlp)" and one != two and str(replace(one, label="")) == "L1H0 z @final = given"
    with pytest.raises(ValueError, match="edited twice"): Intervention((one, two))
    with pytest.raises(ValueError, match=r"\(embed\): nothing was given"): patched(random_pair(1), [one, two], values={one: torch.zeros(8)})


@pytest.mark.parametrize("shape", [(3, 32), (1, 9, 32), (9, 1, 32), (10, 32)])
def test_a_value_for_other_tokens_than_there_are_is_refused(shape):
    edit = Edit("mlp_out", 1, "all", source="given")
    with pytest.raises(ValueError, match=f"given as {' x '.join(map(str, shape))}, where a vector is needed, or as much for each token"):
        patched(random_pair(1), edit, values={edit: torch.zeros(shape)})
    heads = Edit("z", 1, "all", source="given")
    with pytest.raises(ValueError, match="or one for each of 4 heads, is needed, or as much for each token"): patched(random_pair(1), heads, values={heads: torch.zeros(9, 8)})


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_scores_with_nothing_left_to_see_are_no_number(name):
    """Masked scores stay masked when something goes on top: where all others are cut, attention does not spread over the future or beyond the window. With one left, it is the bare model's."""
    model, tp, e = tiny_model(name), random_pair(1), Edit("scores", 0, "final", None, "added")
    def cut(first):
        added = torch.zeros(9)
        added[first:] = -torch.inf
        return sweep(model, tp, e, values={e: added}, progress=False).patched.item()
    assert np.isnan(cut(5)) and np.isnan(cut(0)) and np.isfinite(cut(6))
