"""The engine against TransformerLens's own patching, against plain PyTorch hooks, and against identities."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import BUILDERS, LAYERS, random_pair, tiny_hf, tiny_model
from transformer_lens.patching import generic_activation_patch

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.model.load import load_model
from bizzaroworld.patch import engine
from bizzaroworld.patch.interventions import Edit, Intervention, grid, positions_of
from bizzaroworld.patch.means import mean_values
from bizzaroworld.patch.sweep import sweep


@pytest.fixture(scope="module")
def gemma(): return tiny_model("gemma")


def ids(tp, side): return torch.tensor([getattr(tp, f"{side}_ids")])


def sides(direction): return ("clean", "corrupt") if direction == "noising" else ("corrupt", "clean")


def ld(tp): return lambda logits: logits[0, -1, tp.clean_target_id] - logits[0, -1, tp.corrupt_target_id]


PATTERNS = ("pattern", "scores")


def stock(model, tp, edits, direction):
    """One run per edit, by TransformerLens. Without gradients: with them it patches a copy, which misses resid_mid."""
    base, donor = sides(direction)
    _, cache = model.bridge.run_with_cache(ids(tp, donor))
    rows = pd.DataFrame([{"layer": e.layer, "pos": positions_of(e.position, tp)[0],
                          "head": -1 if e.head is None else e.head} for e in edits])

    def set_value(act, index, other):
        where = (slice(None), index[1]) + ((index[2],) if index[2] >= 0 else ())
        if edits[0].site in PATTERNS: where = (slice(None), index[2], index[1])
        act[where] = other[where]
        return act
    return generic_activation_patch(model.bridge, ids(tp, base), cache, ld(tp), set_value,
                                    {"scores": "attn_scores"}.get(edits[0].site, edits[0].site), index_df=rows)


@pytest.mark.parametrize("name, direction", [(n, "noising") for n in BUILDERS] +
                         [(n, "denoising") for n in ("gemma", "gemma3", "gpt2")])
@torch.no_grad()
def test_agrees_with_transformer_lens_at_every_site(name, direction):
    """Two pairs share the passes; the second is checked, whose rows are not where they would be alone."""
    model, pairs = tiny_model(name), [random_pair(1), random_pair(2)]
    interventions = grid(model, model.sites, ["final", "entity"])
    result = sweep(model, pairs, interventions, direction)
    base = (result.clean if direction == "noising" else result.corrupt)[1, 0]
    for site in model.sites:
        index = [i for i, x in enumerate(interventions) if x.edits[0].site == site]
        theirs = stock(model, pairs[1], [interventions[i].edits[0] for i in index], direction)
        ours = torch.tensor(result.patched[1, index, 0], dtype=torch.float32)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert (ours - base).abs().max() > 1e-4, f"{site}: patching changes nothing, so agreement shows nothing"


@torch.no_grad()
def test_agrees_with_plain_pytorch_hooks():
    """No TransformerLens on this side at all: forward hooks on a bare Hugging Face Llama."""
    bare, model, tp = tiny_hf("llama"), tiny_model("llama"), random_pair(3)
    def run(side, hooks=()):
        handles = [add(hook) for add, hook in hooks]
        try: return ld(tp)(bare(ids(tp, side)).logits).item()
        finally: [h.remove() for h in handles]
    def output(module, seen): return module.register_forward_hook, lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o)
    for site, module in {"resid_post": lambda l: l, "mlp_out": lambda l: l.mlp, "attn_out": lambda l: l.self_attn}.items():
        for layer in range(LAYERS):
            seen, target = [], module(bare.model.layers[layer])
            run("corrupt", [output(target, seen)])
            def patch(m, i, o):
                t = (o[0] if isinstance(o, tuple) else o).clone()
                t[:, tp.final] = seen[0][:, tp.final]
                return (t, *o[1:]) if isinstance(o, tuple) else t
            theirs = run("clean", [(target.register_forward_hook, patch)])
            ours = sweep(model, [tp], [Intervention((Edit(site, layer, "final"),))]).patched[0, 0, 0]
            assert abs(ours - theirs) < 1e-5, (site, layer)


@pytest.mark.parametrize("name", ["gemma", "gemma3", "gpt2"])
@torch.no_grad()
def test_several_edits_in_one_run(name):
    """A window of layers, a span of tokens, all heads, and zero, against one TransformerLens run with several hooks."""
    model, tp = tiny_model(name), random_pair(4)
    edits = (Edit("mlp_out", 0, "entity_span"), Edit("z", 1, "final"), Edit("attn_out", 2, -2, source="zero"))
    _, cache = model.bridge.run_with_cache(ids(tp, "corrupt"))
    def put(where, zero=False):
        def hook(act, hook):
            act[:, where] = 0 if zero else cache[hook.name][:, where]
            return act
        return hook
    logits = model.bridge.run_with_hooks(ids(tp, "clean"), fwd_hooks=[
        ("blocks.0.hook_mlp_out", put([3, 4])), ("blocks.1.attn.hook_z", put([tp.final])),
        ("blocks.2.hook_attn_out", put([tp.final - 1], zero=True))])
    ours = sweep(model, [tp], [Intervention(edits)]).patched[0, 0, 0]
    assert abs(ours - ld(tp)(logits).item()) < 1e-5


@torch.no_grad()
def test_donor_of_another_length(gemma):
    """Named positions are found in the donor's own prompt; baselines stay the pair's own."""
    tp, donor = random_pair(5), random_pair(6, length=12, entity=(6, 8))
    _, cache = gemma.bridge.run_with_cache(ids(donor, "corrupt"))
    def hook(act, hook):
        act[:, tp.entity] = cache[hook.name][:, donor.entity]
        return act
    theirs = ld(tp)(gemma.bridge.run_with_hooks(ids(tp, "clean"), fwd_hooks=[("blocks.1.hook_resid_pre", hook)])).item()
    result = sweep(gemma, [tp], [Intervention((Edit("resid_pre", 1, "entity"),))], donors=[donor])
    assert abs(result.patched[0, 0, 0] - theirs) < 1e-5
    own = sweep(gemma, [tp], [Intervention((Edit("resid_pre", 1, "entity"),))])
    np.testing.assert_allclose([result.clean, result.corrupt], [own.clean, own.corrupt], atol=1e-6)


@torch.no_grad()
def test_a_donor_whose_entity_is_elsewhere_changes_what_both_prompts_share(gemma):
    """After a value of another token, a later token differs from the donor's though all prompts are one: its value is put there, not dropped."""
    tp = replace(one := random_pair(5), corrupt_ids=one.clean_ids)
    donor, later = replace(tp, entity_span=(1, 2)), tp.entity + 2
    _, cache = gemma.bridge.run_with_cache(ids(tp, "clean"))
    def moved(act, hook): act[:, tp.entity] = cache[hook.name][:, donor.entity]
    def put(act, hook): act[:, later] = cache[hook.name][:, later]
    hooks = [("blocks.0.hook_resid_pre", moved), ("blocks.1.hook_resid_post", put)]
    theirs = [ld(tp)(gemma.bridge.run_with_hooks(ids(tp, "clean"), fwd_hooks=some)).item() for some in (hooks[:1], hooks)]
    first = Edit("resid_pre", 0, "entity")
    ours = sweep(gemma, tp, [first, Intervention((first, Edit("resid_post", 1, later)))], donors=[donor]).patched[0, :, 0]
    assert np.abs(ours - theirs).max() < 1e-5 < abs(theirs[0] - theirs[1])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), length=st.integers(4, 12), data=st.data())
def test_patching_from_itself_changes_nothing(gemma, seed, length, data):
    start = data.draw(st.integers(0, length - 1))
    tp = random_pair(seed, length, (start, data.draw(st.integers(start + 1, length))))
    same = type(tp)(tp.pair, tp.clean_ids, tp.clean_ids, tp.clean_target_id, tp.corrupt_target_id, tp.entity_span)
    frame = sweep(gemma, [same], grid(gemma, gemma.sites, ["final", "entity", "all", 0])).to_frame()
    assert frame.effect.abs().max() < 1e-5


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), length=st.integers(4, 12))
def test_patching_everything_gives_the_donor_run(gemma, seed, length):
    tp = random_pair(seed, length, (1, 3))
    everything = [Intervention((Edit("resid_pre", 0, p),)) for p in ("all", "entity_span")]
    for direction, donor in (("noising", "corrupt"), ("denoising", "clean")):
        result = sweep(gemma, [tp], everything, direction)
        np.testing.assert_allclose(result.patched[0, :, 0], getattr(result, donor)[0, 0], atol=1e-5)


@pytest.mark.parametrize("name", [n for n in BUILDERS if n != "pythia"])
def test_the_stream_is_one_stream(name):
    """An MLP sees one position: resid_mid carries all of it to resid_post, which is the next layer's resid_pre."""
    model = tiny_model(name)
    vars(model)["mid_is_post"] = False  # else resid_mid would be run under the name of resid_post, and show nothing
    result = sweep(model, [random_pair(7)], grid(model, ["resid_mid", "resid_post", "resid_pre"], "final"))
    mid, post, pre = result.patched[0, :, 0].reshape(3, LAYERS)
    np.testing.assert_allclose(mid, post, atol=1e-5)
    np.testing.assert_allclose(post[:-1], pre[1:], atol=1e-5)
    assert np.ptp(post) > 1e-3


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(24)), max_rows=st.integers(1, 30), max_pairs=st.integers(1, 4))
def test_the_result_does_not_depend_on_how_it_is_run(gemma, order, max_rows, max_pairs):
    pairs = [random_pair(1), random_pair(2), random_pair(3, length=7), random_pair(4, entity=(1, 3))]
    interventions = grid(gemma, ["resid_pre", "z", "mlp_out"], "entity") + grid(gemma, ["k", "resid_mid"], "final")
    reference = sweep(gemma, pairs, interventions).patched
    shuffled = sweep(gemma, pairs, [interventions[i] for i in order], max_rows=max_rows, max_pairs=max_pairs).patched
    np.testing.assert_allclose(shuffled, reference[:, order], atol=1e-5)


def test_metrics_of_a_sweep(gemma):
    """Probability and KL come from the whole vocabulary; all three metrics agree with the model's own logits."""
    tp = random_pair(8)
    result = sweep(gemma, [tp], [Intervention((Edit("resid_pre", 0, "all"),))], metrics=["ld", "prob", "kl"])
    clean, corrupt = gemma.logits(ids(tp, "clean"))[0], gemma.logits(ids(tp, "corrupt"))[0]
    kl = torch.nn.functional.kl_div(corrupt.log_softmax(-1), clean.softmax(-1), reduction="sum").item()
    expected = [(x[7] - x[11]).item() for x in (corrupt,)] + [corrupt.softmax(-1)[7].item(), kl]
    np.testing.assert_allclose(result.patched[0, 0], expected, atol=1e-5)
    np.testing.assert_allclose(result.clean[0], [(clean[7] - clean[11]).item(), clean.softmax(-1)[7].item(), 0], atol=1e-5)
    frame = result.to_frame()
    np.testing.assert_allclose(frame.recovery, 0, atol=1e-4)
    np.testing.assert_allclose(frame.effect, frame.patched - frame.clean)


def test_the_table(gemma):
    pairs = [random_pair(1), random_pair(2)]
    frame = sweep(gemma, pairs, grid(gemma, ["resid_pre", "z"], ["final", 2]), "denoising").to_frame()
    assert list(frame.columns[:11]) == ["pair_id", "site", "layer", "head", "position", "metric", "clean", "corrupt",
                                        "patched", "effect", "recovery"]
    assert len(frame) == 2 * 2 * (LAYERS + LAYERS * 4)
    assert frame[frame.site == "resid_pre"]["head"].isna().all() and frame[frame.site == "z"]["head"].notna().all()
    assert set(frame.position) == {"final", "2"}
    np.testing.assert_allclose(frame.effect, frame.patched - frame.corrupt)


def test_half_precision_keeps_fp32_differences():
    model = tiny_model("gemma")
    half = type(model)(model.bridge.to(torch.bfloat16), None, "bf16", model.shape, model.readout, model.points)
    result = sweep(half, [random_pair(1)], grid(half, ["resid_pre"], "final"))
    assert result.patched.dtype == np.float64 and len(np.unique(result.patched)) == LAYERS


def test_what_does_not_fit_is_refused(gemma):
    tp, pythia = random_pair(1), tiny_model("pythia")
    with pytest.raises(ValueError, match="no resid_mid.*Use resid_pre or resid_post"): grid(pythia, ["resid_mid"])
    with pytest.raises(ValueError, match="outside pair-1, a prompt of 9 tokens"): sweep(gemma, [tp], grid(gemma, ["resid_pre"], 9))
    with pytest.raises(ValueError, match="Unknown position .last. in pair-1: use final.*or an index"): sweep(gemma, [tp], Edit("resid_pre", 0, "last"))
    with pytest.raises(ValueError, match="z has 4 heads"): sweep(gemma, [tp], [Intervention((Edit("z", 0, "final", 4),))])
    with pytest.raises(ValueError, match="Unknown direction"): sweep(gemma, [tp], grid(gemma, ["z"]), "sideways")
    with pytest.raises(ValueError, match="Unknown metric"): sweep(gemma, [tp], grid(gemma, ["z"]), metrics=["loss"])
    with pytest.raises(ValueError, match="at least one pair"): sweep(gemma, [], grid(gemma, ["z"]))
    with pytest.raises(ValueError, match="nothing was given"):
        sweep(gemma, [tp], [Intervention((Edit("z", 0, source="given"),))])
    with pytest.raises(ValueError, match="donor of the same length"):
        sweep(gemma, [tp], [Intervention((Edit("pattern", 0),))], donors=[random_pair(2, length=7)])
    with pytest.raises(ValueError, match="edited twice"): Intervention((Edit("z", 0), Edit("z", 0)))
    with pytest.raises(ValueError, match="'all' is 9 tokens in pair-1 and 7"):
        sweep(gemma, [tp], [Intervention((Edit("resid_pre", 0, "all"),))], donors=[random_pair(2, length=7)])


def test_hooks_are_gone_afterwards_even_after_an_error(gemma):
    with pytest.raises(RuntimeError, match="boom"):
        with gemma.hooked([("resid_pre", 0, lambda act: None), ("z", 1, lambda act: 1 / 0)]): raise RuntimeError("boom")
    sweep(gemma, [random_pair(1)], grid(gemma, gemma.sites))
    assert not any(p.fwd_hooks for p in gemma.points.values())


@pytest.mark.parametrize("name", BUILDERS)
def test_pairs_of_different_lengths_share_passes(name):
    """Padding and masks, also where a sliding window is shorter than the prompts."""
    model = tiny_model(name)
    pairs = [random_pair(1, 6, (1, 3)), random_pair(2, 12, (8, 9)), random_pair(3, 9)]
    interventions = grid(model, model.sites, ["final", "entity", "all"])
    together = sweep(model, pairs, interventions)
    alone = sweep(model, pairs, interventions, max_pairs=1)
    np.testing.assert_allclose(together.patched, alone.patched, atol=1e-5)
    np.testing.assert_allclose(together.corrupt, alone.corrupt, atol=1e-5)


@torch.no_grad()
def test_given_values(gemma):
    """A steering vector and a mean over pairs, beside a donor's value at the same site, against hooks."""
    tp, vector, heads = random_pair(5), torch.randn(32), torch.randn(4, 8)
    steer, ablate = Edit("resid_mid", 1, "entity_first", source="given"), Edit("z", 1, "final", source="given")
    both = [Intervention((steer, ablate)), Intervention((Edit("resid_mid", 1, "entity_first"),)),
            Intervention((Edit("z", 1, "final", 2, source="zero"),))]
    def put(where, value):
        def hook(act, hook):
            act[where] = value
            return act
        return hook
    def run(*hooks): return ld(tp)(gemma.bridge.run_with_hooks(ids(tp, "clean"), fwd_hooks=list(hooks))).item()
    _, cache = gemma.bridge.run_with_cache(ids(tp, "corrupt"))
    mid, z, first = "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", tp.entity_span[0]
    theirs = [run((mid, put((0, first), vector)), (z, put((0, tp.final), heads))),
              run((mid, put((0, first), cache[mid][0, first]))), run((z, put((0, tp.final, 2), 0.0)))]
    ours = sweep(gemma, [tp], both, values={steer: vector, ablate: heads}).patched[0, :, 0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_too_little_memory_halves_the_pass_and_loses_nothing(gemma, monkeypatch):
    pairs, interventions = [random_pair(1), random_pair(2, 7)], grid(gemma, ["resid_pre", "z"], ["final", "entity"])
    whole, real, sizes = sweep(gemma, pairs, interventions).patched, engine._run_pass, []
    def scarce(model, base, the_pass, bank):
        if len(the_pass.rows) > 5: raise torch.OutOfMemoryError("no room")
        sizes.append(len(the_pass.rows))
        return real(model, base, the_pass, bank)
    monkeypatch.setattr(engine, "_run_pass", scarce)
    with pytest.warns(UserWarning, match="do not fit into memory"): again = sweep(gemma, pairs, interventions).patched
    np.testing.assert_allclose(again, whole, atol=1e-5)
    assert sum(sizes) == 2 * len(interventions) and max(sizes) <= 5  # resid_pre and z: nothing has two names
    monkeypatch.setattr(engine, "_run_pass", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError): sweep(gemma, pairs, interventions)


def test_the_memory_budget_bounds_the_rows_of_a_pass(gemma, monkeypatch):
    sizes, real = [], engine._run_pass
    monkeypatch.setattr(engine, "_run_pass", lambda m, b, p, k: sizes.append((p.tail, len(p.rows))) or real(m, b, p, k))
    interventions = grid(gemma, ["resid_pre", "z"], ["final", "all"])
    budget = 200_000
    sweep(gemma, [random_pair(1)], interventions, memory=budget)
    assert len(sizes) > 2
    assert all(n == 1 or n * gemma.shape.row_values(tail, 9) * 4 <= budget for tail, n in sizes)
    assert max(n for tail, n in sizes if tail == 1) > max(n for tail, n in sizes if tail == max(sizes)[0]) and max(sizes)[0] == 6, "tokens before the entity were run"


def test_a_prefix_that_does_not_reproduce_the_base_run_is_noticed(gemma, monkeypatch):
    """The guard of every pass: with a wrong prefix the base rows differ, and the sweep stops."""
    def forgetful(self, keys, values, layer, *args, **kwargs):
        k, v = real(self, keys, values, layer, *args, **kwargs)
        return k * 0, v
    real = engine.PrefixCache.update
    monkeypatch.setattr(engine.PrefixCache, "update", forgetful)
    with pytest.raises(RuntimeError, match="does not reproduce the base run"): sweep(gemma, [random_pair(1)], grid(gemma, ["z"]))


@torch.no_grad()
def test_means_are_the_mean_of_the_activations(gemma):
    """Over pairs of different lengths, at named positions, against TransformerLens caches; and the sweep takes them."""
    pairs = [random_pair(1), random_pair(2, length=12, entity=(6, 9)), random_pair(3, length=7)]
    caches = [gemma.bridge.run_with_cache(ids(tp, "clean"))[1] for tp in pairs]
    span, final = Edit("mlp_out", 1, "entity_span", source="given"), Edit("z", 0, "final", source="given")
    one = Edit("z", 0, "final", 2, source="given")
    got = mean_values(gemma, pairs, [span, final, one], max_pairs=2)
    tokens = torch.cat([c["blocks.1.hook_mlp_out"][0, slice(*tp.entity_span)] for c, tp in zip(caches, pairs)])
    heads = torch.stack([c["blocks.0.attn.hook_z"][0, tp.final] for c, tp in zip(caches, pairs)]).mean(0)
    torch.testing.assert_close(got[span], tokens.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(got[final], heads, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[one], heads[2], atol=1e-5, rtol=0)
    result = sweep(gemma, pairs, [Intervention((final,)), Intervention((one,))], values=got)
    assert np.abs(result.patched - result.clean[:, None]).min() > 1e-6
    with pytest.raises(ValueError, match="has no mean"): mean_values(gemma, pairs, [Edit("scores", 0)])


@torch.no_grad()
def test_the_mean_of_all_heads_has_a_row_for_each_where_there_is_one_too(gemma):
    """One key and value head: all heads are one, and still a row of a table."""
    every, only = Edit("v", 1, "entity", source="given"), Edit("v", 1, "entity", 0, source="given")
    pairs = [random_pair(1), random_pair(2)]
    got = mean_values(gemma, pairs, [every, only])
    assert gemma.shape.heads("v") == 1 and got[every].shape == (1, len(got[only]))
    a, b = sweep(gemma, pairs, [Intervention((every,)), Intervention((only,))], values=got, progress=False).patched[..., 0].T
    np.testing.assert_allclose(a, b)


@torch.no_grad()
def test_what_has_several_names_is_run_once(gemma, monkeypatch):
    """resid_mid and resid_post are run as the next resid_pre, repeats once; the table still has every row asked for."""
    ran, real = [], engine._run_pass
    monkeypatch.setattr(engine, "_run_pass", lambda m, b, p, k: ran.extend(p.rows) or real(m, b, p, k))
    interventions = grid(gemma, ["resid_post", "resid_pre", "resid_mid"], "entity") * 2
    zeros = grid(gemma, ["resid_mid"], "entity", source="zero")
    result = sweep(gemma, [random_pair(1)], interventions + zeros)
    assert len(ran) == LAYERS + 1 + LAYERS and result.patched.shape[1] == 7 * LAYERS
    apart = type(gemma)(gemma.bridge, None, "apart", gemma.shape, gemma.readout, gemma.points)
    vars(apart)["mid_is_post"] = False
    ran.clear()
    np.testing.assert_allclose(sweep(apart, [random_pair(1)], interventions + zeros).patched, result.patched, atol=1e-6)
    assert len(ran) == 4 * LAYERS


@pytest.mark.parametrize("name", BUILDERS)
def test_whether_the_middle_makes_the_end_is_found_out(name):
    """Not where there is no resid_mid, and not where an MLP looks at other tokens."""
    model = tiny_model(name)
    assert model.mid_is_post == (name != "pythia")
    mixing = tiny_model(name)
    mixing.bridge.blocks[1].mlp.original_component.register_forward_hook(lambda mlp, args, out: out + out.mean(1, keepdim=True))
    assert not mixing.mid_is_post


def test_a_study_in_bfloat16_agrees_with_one_in_float32():
    """To 3% of a pair's TotalSwing for any single effect, and 0.5% for a mean over pairs."""
    pairs = [align(load_model("bizzaro-nano"), p) for p in load_battery()[::6]]
    exact, half = (sweep(m := load_model("bizzaro-nano", dtype=d), pairs, grid(m, ["resid_pre", "mlp_out", "z"], ["entity", "final"]))
                   for d in ("float32", "bfloat16"))
    swing = (exact.clean - exact.corrupt)[:, None]
    gap = ((half.patched - half.clean[:, None]) - (exact.patched - exact.clean[:, None])) / swing
    assert np.abs(gap).max() < 0.03 and np.abs(gap.mean(0)).max() < 0.005
    assert np.abs(gap).max() > 1e-6, "half precision was not used"
