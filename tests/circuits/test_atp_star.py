"""AtP*: the QK fix where it is exact, against one key at a time and against its known slips; GradDrop against autograd on the bare model."""
import numpy as np
import pytest
import torch
from families import bare
from linear import linear_hf
from tiny import LAYERS, random_pair, tiny_hf, tiny_model

from bizzaroworld.circuits.atp_star import atp_star, heads_apart, key_effects, patched_attention
from bizzaroworld.circuits.attribution import attribution, beside, ends_of
from bizzaroworld.circuits.gradients import NODES, gradients, keys_of, nodes_of
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch.sweep import sweep

SHAPES = ("llama", "gemma", "gemma2", "gemma3", "gpt2")


def saturated(name, sharpness):
    """A tiny model whose attention is sharp, and in which nothing after the last layer's attention is bent: its MLP writes nothing, the norms after it only scale."""
    gpt2 = name == "gpt2"
    hf = linear_hf("gelu_new", 1.0) if gpt2 else tiny_hf(name)
    last = (hf.transformer.h if gpt2 else hf.model.layers)[-1]
    norms = [] if gpt2 else [hf.model.norm] + [getattr(last, n) for n in ("post_attention_layernorm", "post_feedforward_layernorm")
                                                                 if name in ("gemma2", "gemma3")]
    with torch.no_grad():
        for norm in norms:
            for eps in ("eps", "variance_epsilon"):
                if hasattr(norm, eps): setattr(norm, eps, 1e12)
            norm.weight.fill_(1e6 - (name.startswith("gemma")))
        for p in (last.mlp.c_proj if gpt2 else last.mlp.down_proj).parameters(): p.zero_()
        if gpt2: last.attn.c_attn.weight *= torch.tensor([sharpness, 1.0, 8.0]).repeat_interleave(32)
        else: last.self_attn.v_proj.weight *= 8
        if not gpt2 and name != "gemma3": last.self_attn.q_proj.weight *= sharpness
        if name == "gemma2": hf.config.final_logit_softcapping = None
        if name == "gemma3": last.self_attn.q_norm.weight += sharpness
    return load_model(hf)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_exact_for_queries_and_keys_whose_pattern_is_read_linearly(name, direction):
    """Saturated attention: attribution patching is far off, the QK fix is the exact sweep, with groups of heads, soft-caps, norms of queries and windows."""
    model, tp = saturated(name, {"gpt2": 300.0, "gemma2": 60.0}.get(name, 12.0)), random_pair(2)
    exact = sweep(model, tp, grid(model, ["q", "k"], range(9), layers=[LAYERS - 1]), direction, progress=False)
    table = beside(exact, attribution(model, tp, direction, sites=["q", "k"]), atp_star(model, tp, direction, sites=["q", "k"], grad_drop=False))
    size = table.effect.abs().max()
    assert size > 0.05
    np.testing.assert_allclose(table.atp_qk, table.effect, atol=5e-4 * size)
    for site in "qk":
        rows = table[table.site == site]
        assert (rows.atp - rows.effect).abs().max() > 0.1 * rows.effect.abs().max(), f"{site}: not saturated"


@pytest.mark.parametrize("name", [*SHAPES, "pythia", "qwen3", "olmo2"])
def test_keys_one_at_a_time(name):
    """Every key of every layer, by a run in which it alone is the donor's: the pattern of that run times the slope. No formula on this side."""
    model, tp = tiny_model(name), random_pair(3)
    assert heads_apart(model) == (name != "olmo2")
    keys = keys_of(model, ["q", "k", "pattern", "scores", "resid_pre"])
    ends, here = ends_of(model, [tp], "noising", "ld", keys), gradients(model, tp, sites=["pattern", "resid_pre"])
    found = atp_star(model, tp, sites=["q", "k"], grad_drop=False).estimates[0]
    ids = torch.tensor([tp.clean_ids])
    for site, heads in (("q", model.n_heads), ("k", model.n_kv_heads)):
        theirs = np.zeros((model.n_layers, 9, heads))
        for l, t, h in np.ndindex(theirs.shape):
            seen = []
            def put(act):
                act[0, t, h] = ends.there[site, l][0, t, h]
                return act
            def enter(act):
                act[:] = here.acts["resid_pre", l]
                return act
            with model.hooked([("resid_pre", l, enter), (site, l, put), ("pattern", l, lambda a: seen.append(a.clone()))]): model.run(ids)
            theirs[l, t, h] = ((seen[0] - here.acts["pattern", l]) * here.slopes["pattern", l]).sum()
        np.testing.assert_allclose(found[site], theirs, atol=1e-5)
        assert np.abs(theirs).max() > 5e-3


def test_the_slip_of_keys_beside_a_patched_query():
    """Keys' scores from a run whose queries are the donor's too are another estimate: the test above would see it."""
    model, tp = tiny_model("llama"), random_pair(3)
    keys = keys_of(model, ["q", "k", "pattern", "scores", "resid_pre"])
    ends, here = ends_of(model, [tp], "noising", "ld", keys), gradients(model, tp, sites=["pattern", "scores", "resid_pre"])
    _, right = patched_attention(model, ends, here.acts)
    both = {}
    def put(value):
        def hook(act):
            act[:] = value
            return act
        return hook
    with model.hooked([x for l in range(LAYERS) for x in (("resid_pre", l, put(here.acts["resid_pre", l])), ("q", l, put(ends.there["q", l])), ("k", l, put(ends.there["k", l])),
                                                          ("scores", l, lambda a, l=l: both.__setitem__(l, a.clone())))]): model.run(torch.tensor([tp.clean_ids]))
    gap = [(key_effects(here.acts["scores", l], x[l], here.slopes["pattern", l], 2)) for x in (right, both) for l in range(LAYERS)]
    assert max((a - b).abs().max() for a, b in zip(gap[:LAYERS], gap[LAYERS:])) > 1e-2


def test_keys_of_attention_that_is_all_on_one():
    """Scores of any size, in fp32, against a softmax for each key in fp64; the first query sees one key only."""
    g = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0, 30.0, 300.0):
        s, new, slope = (torch.randn(2, 4, 7, 7, generator=g) * x for x in (scale, scale, 1.0))
        mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
        s, new = (x.masked_fill(mask, torch.finfo(torch.float32).min) for x in (s, new))
        theirs = torch.zeros(2, 4, 7, dtype=torch.float64)
        for t in range(7):
            one = s.double().clone()
            one[..., t] = new[..., t].double()
            theirs[..., t] = ((one.softmax(-1) - s.double().softmax(-1)) * slope).sum((-1, -2))
        ours = key_effects(s, new, slope, 2)
        torch.testing.assert_close(ours.double(), theirs.unflatten(1, (2, 2)).sum(2).transpose(1, 2), atol=2e-5, rtol=1e-4)
        assert theirs.abs().max() > 1e-2


def written(hf, name):
    for l, block in enumerate(hf.get_submodule("transformer.h" if name == "gpt2" else "model.layers")):
        post = name in ("gemma2", "gemma3")
        yield l, "attn_out", block.post_attention_layernorm if post else block.attn if name == "gpt2" else block.self_attn
        yield l, "mlp_out", block.post_feedforward_layernorm if post else block.mlp
        yield l, "resid_post", block


@pytest.mark.parametrize("name", SHAPES)
def test_grad_drop_is_the_mean_of_runs_with_stopped_layers(name):
    """On the bare model: one run for each layer, in which what its attention and MLP write is detached."""
    hf, tp, donor = tiny_hf(name), random_pair(3), {}
    def tensor(o): return o[0] if isinstance(o, tuple) else o
    def run(side, seen, stop=None):
        def keep(l, site):
            def hook(m, i, o):
                seen[site, l] = tensor(o)
                if l != stop or site == "resid_post": return None
                return (tensor(o).detach(), *o[1:]) if isinstance(o, tuple) else o.detach()
            return hook
        handles = [module.register_forward_hook(keep(l, site)) for l, site, module in written(hf, name)]
        logits = hf(torch.tensor([getattr(tp, f"{side}_ids")])).logits[0, -1]
        for h in handles: h.remove()
        return logits[tp.clean_target_id] - logits[tp.corrupt_target_id]
    run("corrupt", donor)
    total = 0
    for stop in range(LAYERS):
        seen = {}
        slopes = torch.autograd.grad(run("clean", seen, stop), list(seen.values()), allow_unused=True)
        total = total + torch.stack([torch.zeros(9) if s is None else ((donor[key] - seen[key]) * s).sum(-1)[0].detach().abs() for key, s in zip(seen, slopes)])
    ours = atp_star(tiny_model(name), tp, sites=["attn_out", "mlp_out", "resid_post"], qk_fix=False)
    assert not ours.signed and ours.method == "atp_drop" and ours.to_frame().patched.isna().all()
    for (site, l), theirs in zip(seen, total):
        np.testing.assert_allclose(ours.estimates[0][site][l], theirs / (LAYERS if site == "resid_post" else LAYERS - 1), atol=1e-5, rtol=1e-4)


def test_two_ways_that_cancel():
    """The second layer's MLP takes away what is in the stream. Without it the first layer's writes would go to the logits as they are, and that is what
    GradDrop reports, once over L - 1; a copy that stops the skip connection too would report nothing."""
    hf = linear_hf()
    with torch.no_grad():
        for block in hf.transformer.h[1:]:
            for p in (*block.attn.c_proj.parameters(), *block.mlp.parameters()): p.mul_(1e-4)
        one = hf.transformer.h[1].mlp
        one.c_fc.weight[:, :32], one.c_proj.weight[:32] = torch.eye(32), -torch.eye(32)
    model, tp = load_model(hf), random_pair(1)
    plain = attribution(model, tp, sites=["mlp_out"]).estimates[0]["mlp_out"][0]
    drop = atp_star(model, tp, sites=["mlp_out"]).estimates[0]["mlp_out"][0]
    ends, here = (gradients(model, tp, side=s, sites=["mlp_out"]) for s in ("corrupt", "clean"))
    last = here.slopes["mlp_out", 2][0, -1]
    direct = ((ends.acts["mlp_out", 0] - here.acts["mlp_out", 0])[0, -1] * (last - last.mean())).sum().abs().item()
    assert np.abs(plain[-1]) < 2e-3 * direct and direct > 5e-3
    assert drop[-1] == pytest.approx(direct / 2, rel=0.01)


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_parts_and_the_whole(name):
    """Sizes of both repairs together; nodes of the last layer, after which there is nothing to stop, keep their plain size; other sites do not mind the QK fix."""
    model, pairs = tiny_model(name), [random_pair(1), random_pair(2, 7, (1, 2)), random_pair(4)]
    plain, fixed, drop, both = (f(model, pairs, "denoising") for f in (
        attribution, lambda *a: atp_star(*a, grad_drop=False), lambda *a: atp_star(*a, qk_fix=False), atp_star))
    assert (plain.signed, fixed.signed, drop.signed, both.signed) == (True, True, False, False)
    assert both.method == "atp_star" and nodes_of(model) == tuple(both.estimates[1]) == NODES
    for i in range(3):
        for site in NODES:
            a, b, c, d = (x.estimates[i][site] for x in (plain, fixed, drop, both))
            if site in "qk": assert np.abs(a - b).max() > 5e-5
            else: np.testing.assert_allclose([b, d], [a, c], atol=1e-5)
            last = np.abs(b[-1])
            if site not in ("resid_pre", "resid_mid"): np.testing.assert_allclose(d[-1], last, atol=1e-5)
        alone = atp_star(model, pairs[i], "denoising")
        for site in NODES: np.testing.assert_allclose(alone.estimates[0][site], both.estimates[i][site], atol=1e-5)
    assert not any(point.fwd_hooks for point in model.points.values())


def test_what_is_refused():
    model, tp = tiny_model("gemma"), random_pair(1)
    with pytest.raises(ValueError, match="that is `attribution`"): atp_star(model, tp, qk_fix=False, grad_drop=False)
    sink = load_model(bare("gpt_oss"))
    with pytest.raises(ValueError, match="as where attention has a sink"): atp_star(sink, tp)
    assert atp_star(sink, tp, qk_fix=False).method == "atp_drop"
    blind = load_model(bare("gptj"))
    with pytest.raises(ValueError, match="has no pattern"): atp_star(blind, tp)
    assert atp_star(blind, tp, sites=["z", "v"]).estimates[0]["z"].shape == (2, 9, 4)
