"""Attention knockout against another mask on the bare model, and its identities."""
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import LAYERS, random_pair, tiny_hf, tiny_model

from bizzaroworld.circuits.knockout import Cut, cuts_of, knockout, windows_of
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep

FAMILIES = ("llama", "gemma", "gemma2", "gemma3", "gpt2", "qwen3", "mistral")


@torch.no_grad()
def masked(hf, ids, layers, head, queries, keys):
    "Logits of the bare model whose attention masks have more in them."
    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"].expand(1, 4, -1, -1).clone()
        for q in queries: mask[0, slice(None) if head is None else head, q, keys] = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask}
    blocks = hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers
    with ExitStack() as stack:
        for l in layers:
            attn = blocks[l].attn if hasattr(blocks[l], "attn") else blocks[l].self_attn
            stack.callback(attn.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_another_mask_of_the_bare_model(name):
    """In windows, layer by layer and head by head; from the final token and from two; with pairs of other lengths beside it."""
    model, hf, pairs = tiny_model(name), tiny_hf(name), [random_pair(1), random_pair(2, 11, (5, 8)), random_pair(3, 9, (2, 4))]
    hf.set_attn_implementation("eager")
    cuts = [*cuts_of(model), *cuts_of(model, 2), *cuts_of(model, 1, by_head=True)]
    for looks, seen, side in (("final", "entity_span", "clean"), ("final", ["entity", -2], "corrupt"), (-2, "entity_span", "clean"), ("entity", 1, "clean")):
        found, largest = knockout(model, pairs, cuts, looks=looks, seen=seen, side=side, metrics="ld"), 0
        for tp in pairs:
            n, (a, b) = len(tp.clean_ids), tp.entity_span
            queries = {"final": [n - 1], -2: [n - 2], "entity": [b - 1]}[looks]
            keys = {"entity_span": list(range(a, b)), 1: [1]}[seen] if not isinstance(seen, list) else [b - 1, n - 2]
            ids, mine = getattr(tp, f"{side}_ids"), found[found.pair_id == tp.id]
            for (layers, head, _), patched, effect in zip(cuts, mine.patched, mine.effect):
                logits = masked(hf, ids, layers, head, queries, keys)
                size = float(logits.abs().max())
                assert patched == pytest.approx(float(logits[tp.clean_target_id] - logits[tp.corrupt_target_id]), abs=1e-5 * size)
                largest = max(largest, abs(effect) / size)
        assert largest > 1e-4


def test_everything_but_the_first_token():
    """A token that sees nothing but the first token gets the first token's values, whatever its queries and keys: the run in which they are put there is the same."""
    model, tp = tiny_model("llama"), random_pair(1)
    seen = {}
    with model.hooked([("v", l, lambda act, l=l: seen.__setitem__(l, act[0, 0].repeat_interleave(2, 0).clone())) for l in range(LAYERS)]): model.run(torch.tensor([tp.clean_ids]))
    for l in range(LAYERS):
        edit = Edit("z", l, "final", source="given")
        put = sweep(model, tp, Intervention(edit), values={edit: seen[l]}, progress=False)
        cut = knockout(model, tp, [Cut((l,))], seen=list(range(1, 9)), metrics="ld")
        assert cut.patched.item() == pytest.approx(put.patched.item(), abs=1e-5) and abs(cut.effect.item()) > 1e-4


def test_what_is_not_seen_anyway_cannot_be_cut():
    """Beyond a sliding window, and after the token itself, attention is zero: nothing changes. Within the window it does."""
    model, tp = tiny_model("gemma3"), random_pair(1)  # layers 0 and 2 see four tokens back
    far, near = (knockout(model, tp, seen=places, metrics="ld") for places in ([1, 2, 3], [6]))
    assert far.effect.abs().tolist()[::2] == pytest.approx([0, 0], abs=1e-6) and abs(far.effect[1]) > 1e-4
    assert near.effect.abs().min() > 1e-4
    later = knockout(model, tp, looks="entity", seen=[6, 7, 8], metrics="ld")
    assert later.effect.abs().max() < 1e-6


@pytest.mark.parametrize("name, blind", [("gemma3", 0), ("gemma2", 0), ("mistral", 0), ("gemma3-multimodal", 0), ("llama", None)])
def test_a_window_is_not_cut_whole(name, blind):
    """What is masked is not minus infinity: with all else cut, a softmax would spread over it, the future included."""
    model, pairs = tiny_model(name), [random_pair(2, 12, (8, 9)), random_pair(1)]  # the second is the shorter
    whole = dict(seen=[5, 6, 7, 8], metrics="ld")
    if blind is None: return np.testing.assert_array_less(1e-4, knockout(model, pairs[1], **whole).effect.abs())
    for some in (pairs, pairs[1]):
        with pytest.raises(ValueError, match=f"pair-1: token 8 would see nothing at all in layer {blind}, whose window ends before what is left: leave it a token nearby, or choose other layers"):
            knockout(model, some, **whole)
    with pytest.raises(ValueError, match="in layer 2, whose window"): knockout(model, pairs[1], [Cut((2,), 3)], **whole)
    if name.startswith("gemma3"): assert abs(knockout(model, pairs[1], [Cut((1,))], **whole).effect.item()) > 1e-4, "the layer between sees the whole prompt"
    with pytest.raises(ValueError, match="token 6 would see nothing at all in layer 0"): knockout(model, pairs[1], [Cut((0,), 1)], looks=-3, seen=[3, 4, 5, 6])
    near = knockout(model, pairs[1], seen=[5, 6, 8], metrics="ld")
    assert near.patched.notna().all() and near.effect.abs().max() > 1e-4


def test_windows_and_their_table():
    assert windows_of(5, 1) == [(0,), (1,), (2,), (3,), (4,)]
    assert windows_of(5, 3) == [(0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4)]
    assert windows_of(5, 2) == [(0,), (0, 1), (1, 2), (2, 3), (3, 4)] and windows_of(3, 9) == [(0, 1, 2)] * 3
    model, pairs = tiny_model("gemma3"), [random_pair(1), random_pair(2, 12, (8, 9))]
    found = knockout(model, pairs, cuts_of(model, 3, by_head=True))
    assert len(found) == 2 * LAYERS * 4 * 2 and found.metric.tolist()[:2] == ["ld", "prob"] and found.layer.tolist()[:8] == [0] * 8
    assert found.effect.to_numpy() == pytest.approx((found.patched - found.base).to_numpy()) and found.relative.to_numpy() == pytest.approx((found.effect / found.base).to_numpy())
    one = knockout(model, pairs[1], [Cut((0, 1, 2), 3, 1)])
    same = found[(found.pair_id == pairs[1].id) & (found.layer == 1) & (found["head"] == 3)]
    assert one.patched.to_numpy() == pytest.approx(same.patched.to_numpy(), abs=1e-6)


def test_what_is_refused():
    model, tp = tiny_model("llama"), random_pair(1)
    with pytest.raises(ValueError, match="token 8 would see nothing"): knockout(model, tp, seen="all")
    with pytest.raises(ValueError, match="window of 0"): cuts_of(model, 0)
    with pytest.raises(ValueError, match="Unknown side"): knockout(model, tp, side="noising")
    with pytest.raises(ValueError, match="same id"): knockout(model, [tp, replace(random_pair(2), pair=tp.pair)])
    with pytest.raises(ValueError, match="layers 0 to 2"): knockout(model, tp, [((5,), None)])
    with pytest.raises(ValueError, match="No pairs: give one or more"): knockout(model, [])
    with pytest.raises(ValueError, match="No cuts: give one or more"): knockout(model, tp, [])
    with pytest.raises(ValueError, match="no scores"): knockout(model.without(["scores"]), tp)
    assert np.isfinite(knockout(model, tp, metrics="ld").patched).all()
