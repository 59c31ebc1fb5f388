"""Gradients against finite differences of the exact sweep, against autograd on the bare model, and the model given back."""
import pytest
import torch
from families import LOADED, bare
from tiny import LAYERS, random_pair, tiny_hf, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from bizzaroworld.circuits.gradients import NODES, gradients, nodes_of
from bizzaroworld.model.hooked import by_head
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit
from bizzaroworld.patch.sweep import sweep

SHAPES = ("llama", "gemma", "gemma2", "gemma3", "gpt2")


def slope_by_steps(model, tp, found, metric, edits, side, eps=2e-2):
    """Of each edit: the derivative along a random direction, by a central difference of the exact sweep, and by the gradient."""
    values, theirs = {}, []
    g = torch.Generator().manual_seed(0)
    for edit, sign in edits:
        act, slope = (by_head(edit.site, x[edit.site, edit.layer])[0, edit.position] for x in (found.acts, found.slopes))
        if edit.head is not None: act, slope = act[edit.head], slope[edit.head]
        step = torch.randn(act.shape, generator=g)
        step = step / step.norm() * (act.norm() + 0.1)
        values[edit] = act, step
        theirs.append((slope * step).sum().item())
    def swept(sign): return sweep(model, tp, list(values), {"clean": "noising", "corrupt": "denoising"}[side], metrics=[metric],
                                  values={e: act + sign * eps * step for e, (act, step) in values.items()}, progress=False).patched[0, :, 0]
    return torch.tensor((swept(1) - swept(-1)) / (2 * eps)), torch.tensor(theirs)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("metric, side", [("ld", "clean"), ("logprob", "corrupt")])
def test_gradient_is_what_small_steps_say(name, metric, side):
    """At every site, in every layer, of the second of two pairs that run together."""
    model, pairs = tiny_model(name), [random_pair(1), random_pair(2)]
    found = gradients(model, pairs, metric, side)
    assert nodes_of(model) == NODES
    found = type(found)(found.pair_ids[1:], metric, side, found.values[1:], *({k: x[1:] for k, x in d.items()} for d in (found.acts, found.slopes)))
    edits = [(Edit(site, l, p, None if not model.shape.heads(site) else (l + p) % model.shape.heads(site), "given"), 1)
             for site in NODES for l in range(LAYERS) for p in (3, 6, 8)]
    steps, ours = slope_by_steps(model, pairs[1], found, metric, edits, side)
    torch.testing.assert_close(ours.double(), steps.double(), rtol=0.02, atol=2e-4 * steps.abs().max().item() + 2e-4)
    for site in NODES: assert max(abs(s) for (e, _), s in zip(edits, steps) if e.site == site) > 1e-3, f"{site}: no step changes anything"


def bare_parts(hf, name):
    blocks = hf.get_submodule("transformer.h" if name == "gpt2" else "model.layers")
    for l, block in enumerate(blocks):
        post = name in ("gemma2", "gemma3")
        yield ("resid_post", l), block
        yield ("mlp_out", l), block.post_feedforward_layernorm if post else block.mlp
        yield ("attn_out", l), block.post_attention_layernorm if post else block.attn if name == "gpt2" else block.self_attn


@pytest.mark.parametrize("name", SHAPES)
def test_gradient_is_the_bare_models_own(name):
    """No TransformerLens on this side: forward hooks keep what a plain model made, and autograd goes back to it."""
    hf, tp, seen = tiny_hf(name), random_pair(3), {}
    def keep(key): return lambda m, i, o: seen.__setitem__(key, o[0] if isinstance(o, tuple) else o)
    handles = [module.register_forward_hook(keep(key)) for key, module in bare_parts(hf, name)]
    logits = hf(torch.tensor([tp.clean_ids])).logits[0, -1]
    theirs = torch.autograd.grad(logits[tp.clean_target_id] - logits[tp.corrupt_target_id], list(seen.values()))
    for h in handles: h.remove()
    ours = gradients(tiny_model(name), tp)
    for key, slope in zip(seen, theirs): torch.testing.assert_close(ours.slopes[key], slope, atol=1e-5, rtol=1e-4)


def test_keys_and_values_sum_over_the_heads_that_share_them():
    """A model with two key-value heads, and the one with four in which each is there twice, are the same function."""
    model, tp = tiny_model("llama"), random_pair(1)
    found = gradients(model, tp, sites=["q", "k", "v"])
    narrow = tiny_hf("llama")
    wide = LlamaForCausalLM(LlamaConfig(**narrow.config.to_dict() | {"num_key_value_heads": 4})).eval()
    wide.load_state_dict({name: w.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) if "k_proj" in name or "v_proj" in name else w
                          for name, w in narrow.state_dict().items()})
    apart = gradients(load_model(wide), tp, sites=["q", "k", "v"])
    for l in range(LAYERS):
        torch.testing.assert_close(found.slopes["q", l], apart.slopes["q", l], atol=1e-5, rtol=1e-4)
        for site in ("k", "v"):
            assert found.slopes[site, l].shape == (1, 9, 2, 8) and apart.slopes[site, l].shape == (1, 9, 4, 8)
            torch.testing.assert_close(found.slopes[site, l], apart.slopes[site, l].unflatten(2, (2, 2)).sum(3), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_a_set_of_answers_and_kl(name):
    from dataclasses import replace
    model, tp = tiny_model(name), replace(random_pair(4), clean_answers=(7, 20), corrupt_answers=(11, 30, 31))
    for metric, side in (("ld", "clean"), ("prob_diff", "clean"), ("kl", "corrupt")):
        found = gradients(model, tp, metric, side, sites=["z", "resid_mid"])
        edits = [(Edit("z", 1, 8, 2, "given"), 1), (Edit("resid_mid", 1, 8, None, "given"), 1), (Edit("resid_mid", 0, 4, None, "given"), 1)]
        steps, ours = slope_by_steps(model, tp, found, metric, edits, side)
        torch.testing.assert_close(ours.double(), steps.double(), rtol=0.03, atol=1e-4)
        assert steps.abs().max() > 1e-4


def test_the_model_is_given_back_as_it_was():
    """No gradient on its parameters, no hook, nothing that asks for gradients afterwards; frozen parameters do not matter."""
    hf = tiny_hf("gemma3")
    model, tp = load_model(hf), random_pair(1)
    before = gradients(model, tp)
    assert all(p.grad is None and p.requires_grad for p in hf.parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.points.values())
    assert not model.run(torch.tensor([tp.clean_ids])).requires_grad
    for p in hf.parameters(): p.requires_grad_(False)
    with torch.no_grad(): frozen = gradients(model, tp)
    for key in before.slopes: torch.testing.assert_close(before.slopes[key], frozen.slopes[key])
    assert not any(x.requires_grad for x in (*before.acts.values(), *before.slopes.values(), before.values))


def test_what_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="'rank' has no gradient: use one of ld"): gradients(model, random_pair(1), "rank")
    with pytest.raises(ValueError, match="one length, and these have 9, 12"): gradients(model, [random_pair(1), random_pair(2, 12)])
    with pytest.raises(ValueError, match="Unknown side"): gradients(model, random_pair(1), side="both")
    with pytest.raises(ValueError, match="Unknown site"): gradients(model, random_pair(1), sites="heads")
    with pytest.raises(ValueError, match="Give one site or more: resid_pre, attn_out"): gradients(model, random_pair(1), sites=[])
    with pytest.raises(ValueError, match="No pairs: give one or more"): gradients(model, [])
    for site in ("pattern", "scores"):
        with pytest.raises(ValueError, match=f"{site} is no site of nodes, .* use resid_pre, .*z, q, k, v, neurons"): nodes_of(model, ["z", site])
        assert gradients(model, random_pair(1), sites=[site]).slopes[site, 0].shape == (1, 4, 9, 9), "a gradient has its own axes"


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_every_family_has_gradients_at_its_sites(name):
    """By one step along the gradient at each site."""
    model, tp = load_model(bare(name)), random_pair(1)
    found = gradients(model, tp)
    edits = [(Edit(site, 1, 8, 1 % model.shape.heads(site) if model.shape.heads(site) else None, "given"), 1) for site in nodes_of(model)]
    steps, ours = slope_by_steps(model, tp, found, "ld", edits, "clean", eps=1e-3)  # some have kinks
    torch.testing.assert_close(ours.double(), steps.double(), rtol=0.05, atol=1e-3 * steps.abs().max().item() + 1e-3)
