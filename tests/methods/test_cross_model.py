"""Cross-model activation patching against plain hooks on two bare models, against weights that are exchanged, and on planted pairs of models."""
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from bare_mixed import blocks, logits_with, seen
from tiny import LAYERS, random_pair, tiny_hf, tiny_model

from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.battery.tokens import align
from bizzaroworld.methods.cross_model import ModelsDiffer, check_alike, cross_patch, own_values
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention, grid, positions_of
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.planted.scoreboard import places
from bizzaroworld.planted.truth import truth_of
from bizzaroworld.planted.variants import VARIANTS, plant
from bizzaroworld.planted.weights import part, tokenizer

SHAPES = ("llama", "gemma", "gemma2", "gemma3", "gpt2")
PAIRS = [random_pair(0), random_pair(1, 12, (4, 6)), random_pair(2), random_pair(3, 9, (2, 3))]
IDS = {"clean": lambda tp: tp.clean_ids, "corrupt": lambda tp: tp.corrupt_ids}


@torch.no_grad()
def tuned_hf(name, but=(), seed=0):
    """The tiny model after a step in a random direction of all weights, but those whose name holds one of these."""
    hf, g = tiny_hf(name, seed), torch.Generator().manual_seed(1)
    hf.set_attn_implementation("eager")
    for key, p in hf.named_parameters():
        step = torch.randn(p.shape, generator=g) * 0.03
        if not any(b in key for b in but): p.add_(step)
    return hf


def base_hf(name):
    hf = tiny_hf(name)
    hf.set_attn_implementation("eager")
    return hf


READOUT = ("lm_head", "model.norm", "ln_f", "embed_tokens", "wte")
HEADS_READ = (*READOUT, "o_proj", "c_proj", "post_", "pre_feedforward")


def interventions(model):
    one = grid(model, ("z", "k", "v", "q", "mlp_out", "attn_out", "resid_pre", "resid_post"), ("final", "entity"))
    several = [Intervention([Edit("z", 0, "entity_span", 1), Edit("mlp_out", 1, "final"), Edit("z", 2, "all", 3)]), Intervention(Edit("mlp_out", 1, "all")),
               Intervention(Edit("z", 1, "final")), Intervention(Edit("z", 1, "entity_span"))]
    return one + several


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_and_itself_differ_in_nothing(name):
    a, b = tiny_model(name), tiny_model(name)
    for local in (False, True):
        asked = [i for i in interventions(a) if not (local and i.edits[0].site.startswith("resid"))]
        found = cross_patch(a, b, PAIRS, asked, local=local)
        np.testing.assert_allclose(found.patched, np.broadcast_to(found.own[:, None], found.patched.shape), atol=1e-5)
        np.testing.assert_allclose(found.own, found.other, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("side", ["clean", "corrupt"])
def test_everything_that_is_written_together_is_the_other_model(name, side):
    """Where the readout is the same: what attention and MLPs write, and the embedding; heads, where their weights of output are the same, too."""
    base = load_model(base_hf(name))
    for sites, same in ((("attn_out", "mlp_out"), READOUT), (("z", "mlp_out"), HEADS_READ)):
        tuned = load_model(tuned_hf(name, same))
        whole = Intervention([*(i.edits[0] for i in grid(base, sites, "all")), Edit("resid_pre", 0, "all")])
        for into, out_of in ((base, tuned), (tuned, base)):
            found = cross_patch(into, out_of, PAIRS, whole, side, metrics=("ld", "logprob"))
            np.testing.assert_allclose(found.patched[:, 0], found.other, atol=2e-5)
            assert np.abs(found.own - found.other).min() > 1e-3 and found.shares() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("side", ["clean", "corrupt"])
def test_every_patch_is_that_of_two_bare_models(name, side):
    """No TransformerLens on this side; pairs of several lengths run together, at positions of one token and of several."""
    base, tuned = base_hf(name), tuned_hf(name)
    a, b = load_model(deepcopy(base)), load_model(deepcopy(tuned))
    asked = [i for i in interventions(a) if all(e.site in ("z", "attn_out", "mlp_out") or (e.site, e.layer) == ("resid_pre", 0) for e in i.edits)]
    found, moved = cross_patch(a, b, PAIRS, asked, side), 0
    for n, tp in enumerate(PAIRS):
        acts, theirs = seen(tuned, IDS[side](tp))
        _, ours = seen(base, IDS[side](tp))
        assert found.own[n, 0] == pytest.approx((ours[7] - ours[11]).item(), abs=1e-5) and found.other[n, 0] == pytest.approx((theirs[7] - theirs[11]).item(), abs=1e-5)
        for k, one in enumerate(asked):
            with torch.no_grad(): logits = logits_with(base, IDS[side](tp), [(e, p, acts[e.site, e.layer], 1) for e in one.edits for p in positions_of(e.position, tp)])
            assert found.patched[n, k, 0] == pytest.approx((logits[7] - logits[11]).item(), abs=1e-5), (tp.id, str(one))
            moved += abs(found.patched[n, k, 0] - found.own[n, 0]) > 1e-4
    assert moved > 0.6 * len(PAIRS) * len(asked)  # not what nobody reads: the last MLP at the entity, what lies outside a window


def exchanged(name, layer, which):
    """The base model with the tuned model's attention or MLP of one layer, and the norms about it."""
    base, tuned = base_hf(name), tuned_hf(name)
    norms = {"gpt2": ({"attn": ("ln_1",), "mlp": ("ln_2",)}), "llama": {"attn": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}}
    norms["gemma"] = norms["llama"]
    norms["gemma2"] = norms["gemma3"] = {"attn": ("input_layernorm", "post_attention_layernorm"), "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm")}
    ours, theirs = blocks(base)[layer], blocks(tuned)[layer]
    for part_of in (("attn" if name == "gpt2" else "self_attn") if which == "attn" else "mlp", *norms[name][which]):
        getattr(ours, part_of).load_state_dict(getattr(theirs, part_of).state_dict())
    return base


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_component_changed_itself_is_an_exchange_of_its_weights(name):
    base, tuned = load_model(base_hf(name)), load_model(tuned_hf(name))
    asked = [Intervention(Edit(site, l, "all")) for l in range(LAYERS) for site in ("attn_out", "mlp_out")]
    found = cross_patch(base, tuned, PAIRS, asked, local=True)
    carried = cross_patch(base, tuned, PAIRS, asked)
    for k, one in enumerate(asked):
        hf = exchanged(name, one.edits[0].layer, one.edits[0].site.removesuffix("_out"))
        for n, tp in enumerate(PAIRS):
            with torch.no_grad(): logits = hf(torch.tensor([tp.clean_ids])).logits[0, -1]
            assert found.patched[n, k, 0] == pytest.approx((logits[7] - logits[11]).item(), abs=1e-5), (tp.id, str(one))
    assert np.abs(found.patched - carried.patched).max() > 1e-2


def stored_elsewhere(planted, layer=1, by=1):
    """The planted model whose MLP stores for everybody the city that many places further on."""
    hf = planted.build()
    rows = hf.model.layers[layer].mlp.down_proj.weight.data
    rows[part("fact")] = rows[part("fact")].roll(by, 0)
    return load_model(hf, tokenizer=tokenizer())


@pytest.mark.parametrize("name, family", [(v, "llama") for v in VARIANTS] + [("plain", "gemma2"), ("plain", "gemma3")])
def test_a_fact_that_is_stored_differently_is_found_where_it_is(name, family):
    """In both directions: the MLP that stores it moves the whole answer, and is the only one that changed; what carries it is of the circuit; nothing else moves anything."""
    p, truth = plant(name, n=6, family=family), truth_of(VARIANTS[name])
    layer, where = 3 if name == "spread" else 1, "entity_first" if name == "early" else "entity"
    tuned = stored_elsewhere(p, layer)
    # what the tuned model says is the corrupted answer of these pairs; the corrupted prompt plays no part
    nodes = grid(p.model, ("z", "mlp_out"), places(p.pairs[0]))
    for into, out_of in ((p.model, tuned), (tuned, p.model)):
        found, own = (cross_patch(into, out_of, p.pairs, nodes, local=local) for local in (False, True))
        shares, local = ({i.edits[0]: s for i, s in zip(nodes, x.shares())} for x in (found, own))
        store = Edit("mlp_out", layer, where)
        assert (found.own[:, 0] * found.other[:, 0] < 0).all()
        assert shares[store] == pytest.approx(1, abs=2e-3) and local[store] == pytest.approx(1, abs=2e-3)
        assert {e for e, s in local.items() if abs(s) > 2e-3} == {store}
        assert {e for e, s in shares.items() if abs(s) > 2e-3} <= set(truth.nodes)
        if name == "plain": assert {str(e): round(s, 2) for e, s in shares.items() if abs(s) > 2e-3} == {"L3H1 z @final": 0.5, "L4H2 z @final": 0.5, "L1 mlp_out @entity": 1}


def test_values_are_those_of_each_pairs_run_and_the_table_says_what_it_is():
    a, b = (load_model(x) for x in (base_hf("gemma3"), tuned_hf("gemma3")))
    edits = [Edit("z", 1, "final", 2), Edit("k", 0, "entity", 1), Edit("mlp_out", 2, "entity"), Edit("z", 1, "entity"), Edit("z", 2, "entity_span", 1), Edit("z", 0, "entity_span")]
    values = own_values(b, PAIRS, edits)
    assert set(values) == set(edits) and all(set(v) == {tp.id for tp in PAIRS} for v in values.values())
    for tp in PAIRS:
        acts, _ = seen(tuned_hf("gemma3"), tp.clean_ids)
        torch.testing.assert_close(values[edits[0]][tp.id], acts["z", 1][0, -1, 16:24], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(values[edits[2]][tp.id], acts["mlp_out", 2][0, tp.entity], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[edits[3]][tp.id].flatten(), acts["z", 1][0, tp.entity], atol=1e-6, rtol=1e-5)
        span = slice(*tp.entity_span)
        several = (values[e][tp.id] if span.stop - span.start > 1 else values[e][tp.id][None] for e in edits[4:])
        for v, l, where in zip(several, (2, 0), (slice(8, 16), slice(None))): torch.testing.assert_close(v.flatten(1), acts["z", l][0, span, where], atol=1e-5, rtol=1e-5)
    found = cross_patch(a, b, PAIRS, edits[:4], metrics=("ld", "kl"))
    frame = found.to_frame()
    assert len(frame) == 4 * 4 * 2 and frame.pair_id.tolist()[::8] == [tp.id for tp in PAIRS]
    ld = frame[frame.metric == "ld"]
    assert ld.patched.tolist() == found.patched[..., 0].ravel().tolist()
    np.testing.assert_allclose(ld.share, (ld.patched - ld.own) / (ld.other - ld.own))
    kl = frame[frame.metric == "kl"]
    assert kl.other.isna().all() and (kl.patched.to_numpy() > 0)[(ld.effect.abs() > 0.01).to_numpy()].all() and (ld.effect.abs() > 0.01).sum() > 4
    assert found.shares() == pytest.approx((ld.effect.to_numpy().reshape(4, 4).mean(0) / (ld.other - ld.own).to_numpy().reshape(4, 4).mean(0)))
    assert repr(found).endswith("4 pairs x 4 interventions)")


def test_a_sweep_with_the_same_values_is_the_same():
    a, b, e = load_model(base_hf("llama")), load_model(tuned_hf("llama")), Edit("z", 1, "final", 2, "given")
    by_hand = sweep(a, PAIRS, e, values=own_values(b, PAIRS, [e]))
    np.testing.assert_allclose(cross_patch(a, b, PAIRS, replace(e, source="donor")).patched, by_hand.patched, atol=1e-6)


def test_models_that_are_no_variants_are_refused_by_what_differs():
    llama = tiny_model("llama")
    for other, words in (("gemma3", "architecture .LlamaForCausalLM and Gemma3ForCausalLM"), ("gpt2", "n_kv_heads .2 and 4")):
        with pytest.raises(ModelsDiffer, match=words): cross_patch(llama, tiny_model(other), PAIRS, Edit("z", 0, "final", 0))
    mha = tiny_model("gemma-mha")
    with pytest.raises(ModelsDiffer, match=r"differ in n_kv_heads \(1 and 4\)\. Patch between"): check_alike(tiny_model("gemma"), mha)
    with pytest.raises(ModelsDiffer, match="sites .only one of them has z"): check_alike(llama, llama.without(["z"]))
    p, words = plant("plain", n=2), tokenizer()
    import json
    from tokenizers import Tokenizer
    spec = json.loads(words.backend_tokenizer.to_str())
    spec["model"]["vocab"]["Rome"], spec["model"]["vocab"]["Oslo"] = spec["model"]["vocab"]["Oslo"], spec["model"]["vocab"]["Rome"]
    swapped = tokenizer()
    swapped._tokenizer = Tokenizer.from_str(json.dumps(spec))
    with pytest.raises(ModelsDiffer, match="tokenizer .2 tokens; 'Rome' is token 18 and token 20"): check_alike(p.model, load_model(p.build(), tokenizer=swapped))
    no_bos = tokenizer()
    no_bos.bos_token = None
    with pytest.raises(ModelsDiffer, match="tokenizer .'today Ada Byron lives in' is 6 tokens and 5"): check_alike(p.model, load_model(p.build(), tokenizer=no_bos), p.pairs)
    check_alike(p.model, load_model(p.build(), tokenizer=tokenizer()), p.pairs)


def test_what_else_is_refused():
    a = tiny_model("llama")
    with pytest.raises(ValueError, match="Unknown side 'both'"): cross_patch(a, a, PAIRS, Edit("z", 0), "both")
    with pytest.raises(ValueError, match="same id"): cross_patch(a, a, [PAIRS[0], PAIRS[0]], Edit("z", 0))
    with pytest.raises(ValueError, match="source is 'donor'"): cross_patch(a, a, PAIRS, Edit("z", 0, source="zero"))
    with pytest.raises(ValueError, match="stream is what components read"): cross_patch(a, a, PAIRS, Edit("resid_pre", 1), local=True)


def test_prompt_pairs_are_aligned_and_models_are_left_without_hooks():
    p = plant("plain", n=2)
    tuned = stored_elsewhere(p)
    found = cross_patch(p.model, tuned, [tp.pair for tp in p.pairs], Edit("mlp_out", 1, "entity"), local=True)
    assert found.shares() == pytest.approx(1, abs=1e-3)
    for m in (p.model, tuned): assert not any(point.fwd_hooks or point.bwd_hooks for point in m.points.values())
