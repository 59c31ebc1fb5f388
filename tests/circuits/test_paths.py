"""Path patching against plain hooks on the bare model and against TransformerLens, and its identities."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from bare_paths import BarePaths
from tiny import LAYERS, random_pair, tiny_hf, tiny_model
from transformer_lens.patching import get_act_patch_direct_path
from transformers import LlamaConfig, LlamaForCausalLM

from bizzaroworld.circuits.paths import edges, path_effects, receivers_of, senders_of
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.hops import as_node, as_path, follow, two_runs
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep

FAMILIES = ("llama", "gemma", "gemma2", "gemma3", "gpt2", "qwen3")
SIDES = {"noising": ("clean_ids", "corrupt_ids"), "denoising": ("corrupt_ids", "clean_ids")}


def by_hand(name, tp, paths, direction="noising", beside=()):
    "Logit differences of paths, and the largest logit."
    bare = BarePaths(tiny_hf(name), name, *(getattr(tp, side) for side in SIDES[direction]), beside)
    logits = [bare.logits(path) for path in paths]
    return np.array([float(x[tp.clean_target_id] - x[tp.corrupt_target_id]) for x in logits]), max(float(x.abs().max()) for x in logits)


def some_heads(model): return [as_node(f"L{l}H{h}.{s}") for l in range(1, LAYERS) for h in (0, 3) for s in "kv"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_edge_is_that_of_the_bare_model(name):
    model, tp = tiny_model(name), random_pair(1)
    paths = edges(model) + edges(model, None, some_heads(model)) + edges(model, ["embed", "L0H1", "L1.mlp"], ["L2H2", "L1H0"])
    for direction, some in (("noising", paths), ("denoising", paths[::5])):
        ours = path_effects(model, tp, some, direction)
        theirs, size = by_hand(name, tp, ours.paths, direction)
        assert np.abs(ours.patched[0, :, 0] - theirs).max() < 3e-6 * size
        assert (np.abs(ours.effects()[0]) > 1e-4 * size).mean() > 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_longer_paths_are_those_of_the_bare_model(name):
    model, tp = tiny_model(name), random_pair(2)
    paths = ["embed -> L0H1.v -> L2H0.q", "L0H2 -> L0.mlp -> L1H3.k -> logits", "L0.mlp -> L1H1 -> L1.mlp -> L2.mlp -> logits", "embed -> L0.mlp -> logits",
             "L0H0 -> L1H2.q -> logits", "L0H0 -> L1H2.q -> L2H2", "L1.mlp -> L2H3.v", "L0H0 -> L1H2.k -> L1.mlp"]
    if model.n_kv_heads < model.n_heads: paths += ["L0.mlp -> L1KV0.v -> L2.mlp", "embed -> L1KV0.k -> L2KV0.v -> logits"]
    ours = path_effects(model, tp, paths)
    theirs, size = by_hand(name, tp, ours.paths)
    assert np.abs(ours.patched[0, :, 0] - theirs).max() < 3e-6 * size
    assert (np.abs(ours.effects()[0]) > 2e-5 * size).sum() > 5


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("beside", [[("z", 1, 5, 2), ("mlp_out", 0, 8, None)], [("mlp_out", 1, 7, None)], [("z", 0, 8, None), ("z", 2, 8, 3)]], ids=["head and MLP", "an MLP", "a layer's heads"])
def test_edges_beside_what_is_patched_already_are_those_of_the_bare_model(name, beside):
    """Effects are counted from the run with the other edits alone; which keep their places, whatever reads or writes there."""
    model, tp = tiny_model(name), random_pair(1)
    others, bare = [Edit(*b) for b in beside], [("mlp" if site == "mlp_out" else site, layer, at, head) for site, layer, at, head in beside]
    paths = edges(model, None, [*receivers_of(model), *some_heads(model)][::4]) + ["embed -> L0H1.v -> L1H2.q -> L2.mlp", "L0H2 -> L0.mlp -> L1.mlp -> logits", "L0.mlp -> L1H2 -> L2H3", "embed -> L1.mlp"]
    for direction, paths in (("noising", paths), ("denoising", paths[::4])):
        ours = path_effects(model, tp, paths, direction, beside=others)
        theirs, size = by_hand(name, tp, ours.paths, direction, bare)
        assert np.abs(ours.patched[0, :, 0] - theirs).max() < 3e-6 * size
        start = sweep(model, tp, Intervention(others), direction, progress=False).patched[0, 0, 0]
        assert ours.start.item() == pytest.approx(start, abs=1e-5) and ours.effects()[0] == pytest.approx(theirs - start, abs=1e-4 * size)
        assert np.abs(ours.effects() - path_effects(model, tp, paths, direction).effects()).max() > 1e-5 * size, "they make a difference"
        assert ours.to_frame().effect.to_numpy() == pytest.approx(ours.effects()[0]) and ours.to_frame().clean.iloc[0] == path_effects(model, tp, paths[:1], direction).clean[0, 0]


def test_what_is_patched_already_sends_and_reads_no_more():
    model, tp, other = tiny_model("gemma3"), random_pair(1), random_pair(5)
    head, mlp = Edit("z", 1, "all", 2), Edit("mlp_out", 1, "all")
    assert path_effects(model, tp, edges(model, "L1H2"), beside=head).effects() == pytest.approx(0, abs=1e-5)
    assert path_effects(model, tp, edges(model, None, ["L1H2.q", "L1.mlp", "L1H2"]), beside=[head, mlp]).effects() == pytest.approx(0, abs=1e-5)
    theirs = path_effects(model, tp, "embed -> L2.mlp", beside=mlp, donors=[other])  # all that was patched already comes from the donor, too
    assert theirs.patched == pytest.approx(path_effects(model, replace(tp, corrupt_ids=other.corrupt_ids), "embed -> L2.mlp", beside=mlp).patched, abs=1e-5)
    assert np.abs(theirs.start - path_effects(model, tp, "embed -> L2.mlp", beside=mlp).start) > 1e-3
    for wrong, why in ((Edit("resid_pre", 0, "all"), "beside what heads"), (Edit("z", 0, "final", 1, "zero"), "beside what heads"), (Edit("heads", 0), "Unknown site")):
        with pytest.raises(ValueError, match=why): path_effects(model, tp, "embed -> L2.mlp", beside=wrong)


@pytest.mark.parametrize("name, reads", [("gpt2", "qkv"), ("gemma-mha", "qkv"), ("llama", "q"), ("qwen3", "q")])
def test_transformer_lens_agrees(name, reads):
    """Its direct paths from two heads, where it does not refuse."""
    model, tp = tiny_model(name), random_pair(1)
    clean, corrupt = (torch.tensor([ids]) for ids in (tp.clean_ids, tp.corrupt_ids))
    caches = [model.bridge.run_with_cache(ids)[1] for ids in (clean, corrupt)]
    def metric(logits): return logits[0, -1, tp.clean_target_id] - logits[0, -1, tp.corrupt_target_id]
    for (layer, head) in ((0, 1), (1, 3)):
        for s in reads:
            with torch.no_grad(): theirs = get_act_patch_direct_path(model.bridge, corrupt, *caches, metric, layer, head, s, verbose=False)
            receivers = [f"L{l}H{h}.{s}" for l in range(layer + 1, LAYERS) for h in range(4)]
            ours = path_effects(model, tp, edges(model, [f"L{layer}H{head}"], receivers), "denoising")
            gap, largest = np.abs(ours.patched[0, :, 0] - theirs[layer + 1:].flatten().numpy()).max(), np.abs(ours.effects()).max()
            assert gap < 1e-5 and gap < 0.02 * largest


def test_where_transformer_lens_refuses():
    """It is the plain hooks above that these are held against."""
    tp = random_pair(1)
    for name, s in (("gemma2", "q"), ("gemma3", "q"), ("gemma", "k"), ("llama", "v")):
        model = tiny_model(name)
        caches = [model.bridge.run_with_cache(torch.tensor([ids]))[1] for ids in (tp.clean_ids, tp.corrupt_ids)]
        with pytest.raises(ValueError, match="unsupported"):
            get_act_patch_direct_path(model.bridge, torch.tensor([tp.corrupt_ids]), *caches, lambda x: x.sum(), 0, 0, s, verbose=False)


def expanded(hf):
    "The Llama whose heads have keys and values of their own: copies of those that they shared."
    config = LlamaConfig(**{**hf.config.to_dict(), "num_key_value_heads": hf.config.num_attention_heads})
    twin, state = LlamaForCausalLM(config), hf.state_dict()
    times = hf.config.num_attention_heads // hf.config.num_key_value_heads
    for key in state:
        if "k_proj" in key or "v_proj" in key: state[key] = state[key].view(-1, hf.config.head_dim, state[key].shape[-1]).repeat_interleave(times, 0).flatten(0, 1)
    twin.load_state_dict(state)
    return twin


def test_keys_as_one_head_reads_them_are_those_of_a_model_that_shares_none():
    """And the shared ones are all of their readers' at once, which the sum of effects need not be."""
    grouped, tp = tiny_model("llama"), random_pair(1)
    apart = load_model(expanded(tiny_hf("llama")))
    paths = edges(grouped, None, some_heads(grouped))
    assert np.abs(path_effects(grouped, tp, paths).patched - path_effects(apart, tp, paths).patched).max() < 1e-4
    longer = [f"{' -> '.join(map(str, p))} -> logits" for p in paths[::3]]
    assert np.abs(path_effects(grouped, tp, longer).patched - path_effects(apart, tp, longer).patched).max() < 1e-4


def linear_llama():
    "A Llama whose norms are linear: their epsilon drowns what they read."
    hf = tiny_hf("llama")
    for module in hf.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e8
            module.weight.data *= 1e4
    return hf


def test_direct_effects_add_up_to_the_whole_where_the_last_norm_is_linear():
    """The embedding, all heads and all MLPs: what the logits read is what these write, and nothing else."""
    model, tp = load_model(linear_llama()), random_pair(1)
    for direction, sign in (("noising", 1), ("denoising", -1)):
        direct = path_effects(model, tp, edges(model, None, ["logits"]), direction)
        assert len(direct.paths) == len(senders_of(model))
        assert direct.effects().sum() == pytest.approx(sign * (direct.corrupt - direct.clean).item(), abs=1e-3)
        assert np.abs(direct.effects()).sum() > 2 * abs(direct.effects().sum()), "these would add up by chance"


@pytest.mark.parametrize("name", ["llama", "gemma3", "pythia"])
def test_the_last_blocks_mlp_and_heads_have_no_other_way_than_the_direct_one(name):
    """So that their direct effects are what patching them everywhere changes. In a parallel block this holds of its heads too."""
    model, tp = tiny_model(name), random_pair(1)
    last, parallel = LAYERS - 1, name == "pythia"
    paths = [f"L{last}.mlp -> logits"] + [f"L{last}H{h} -> logits" for h in range(4)] * parallel
    whole = [Edit("mlp_out", last, "all")] + [Edit("z", last, "all", h) for h in range(4)] * parallel
    found = path_effects(model, tp, paths)
    assert np.abs(found.patched - sweep(model, tp, whole, progress=False).patched).max() < 1e-4
    assert np.abs(found.effects()).max() > 1e-2


def test_what_cannot_be_is_refused():
    model, tp = tiny_model("gemma3"), random_pair(1)
    for path, why in (("L1.mlp -> L1H0.q", "no path from L1.mlp to L1H0.q"), ("L2H0 -> L1.mlp", "no path"), ("L1H0 -> L1H1", "no path"), ("L1H0 -> embed", "no path"),
                      ("logits -> L1.mlp", "a path leads from"), ("L0H0.q -> logits", "a path leads from"), ("L0H0", "a path leads from"), ("L0H7 -> logits", "4 heads"),
                      ("L0.mlp -> L1KV2.k", "2 key-value heads"), ("L9.mlp -> logits", "layers 0 to 2"), ("L0.attn -> logits", "no component"), ("L0KV0.q -> logits", "no component")):
        with pytest.raises(ValueError, match=why): path_effects(model, tp, path)
    with pytest.raises(ValueError, match="Unknown norms"): path_effects(model, tp, "embed -> logits", norms="folded")
    with pytest.raises(ValueError, match="Unknown direction"): path_effects(model, tp, "embed -> logits", "down")
    with pytest.raises(ValueError, match="nothing changes from senders at 0"): path_effects(model, tp, "embed -> logits", sender_at=0)
    with pytest.raises(ValueError, match="2 donors for 1 pairs"): path_effects(model, tp, "embed -> logits", donors=[tp, tp])
    with pytest.raises(ValueError, match="tokens and its donor"): path_effects(model, tp, "embed -> logits", donors=[random_pair(2, 10)])
    with pytest.raises(ValueError, match="no component"): edges(model, ["L0.x"])
    with pytest.raises(ValueError, match="No pairs: give one or more"): path_effects(model, [], "embed -> logits")
    with pytest.raises(ValueError, match="No paths: give one or more"): path_effects(model, tp, [])
    found = path_effects(model, tp, "embed -> logits", metrics=["ld", "prob"])
    for asked in (found.effects, lambda metric: found.matrix(metric=metric)):
        with pytest.raises(ValueError, match="'nope' was not asked for: use ld, prob"): asked("nope")
    with pytest.raises(ValueError, match="'nope' is none of the pairs: pair-1"): found.matrix("nope")
    assert found.effects("prob").tolist() != found.effects("ld").tolist() == found.effects().tolist()
    assert edges(model, "L0.mlp", "logits") == edges(model, ["L0.mlp"], ["logits"]) and len(edges(model, "L0.mlp", "logits")) == 1
    assert as_path(model, "L1H0 -> L1.mlp")  # this one does exist: the MLP reads what its block's heads wrote
    with pytest.raises(ValueError, match="no path"): as_path(tiny_model("pythia"), "L1H0 -> L1.mlp")


def test_edges_are_all_pairs_in_order_of_time():
    model = tiny_model("gemma3")
    n, found = model.n_layers, edges(model)
    assert len(senders_of(model)) == 1 + n * 5 and len(receivers_of(model)) == n * (4 + 2 + 2 + 1) + 1
    assert len(found) == len(set(found)) == sum(9 * (1 + 5 * l) + 4 for l in range(n)) + 1 + 5 * n
    parallel = tiny_model("pythia")
    assert len(edges(parallel)) == sum(13 * (1 + 5 * l) for l in range(n)) + 1 + 5 * n


def test_a_place_at_a_time_and_a_donor_from_another_pair():
    """Two senders' positions, one after the other, in a model that is linear from the sender on; a receiver at the final token alone; another pair's run."""
    model, tp, other = load_model(linear_llama()), random_pair(1), random_pair(5)
    paths = edges(model, ["L1.mlp", "embed"], ["logits"])
    final = path_effects(model, tp, paths, sender_at="final").effects()
    assert final == pytest.approx(path_effects(model, tp, paths).effects(), abs=1e-4), "only the final position is read"
    assert path_effects(model, tp, paths, sender_at="entity").effects() == pytest.approx(np.zeros((1, 2)), abs=1e-6)
    deep, mixed = tiny_model("gemma3"), replace(tp, corrupt_ids=other.corrupt_ids)
    asked = edges(deep, ["L1H1", "embed"], ["L2H0.q", "L2.mlp", "L1KV0.v"])
    theirs = path_effects(deep, tp, asked, donors=[other])
    assert theirs.patched == pytest.approx(path_effects(deep, mixed, asked).patched, abs=1e-5)
    assert np.abs(theirs.patched - path_effects(deep, tp, asked).patched).max() > 1e-3
    at_end = path_effects(deep, tp, asked, receiver_at="final").effects()
    assert np.abs(at_end - path_effects(deep, tp, asked).effects()).max() > 1e-3
    queries = [i for i, p in enumerate(asked) if p[1].kind == "q"]
    assert np.abs(at_end[0, queries]).max() > 1e-5 and np.abs(at_end[0] - path_effects(deep, tp, asked).effects()[0])[queries].max() < 1e-5, "the last block's queries are read at the end alone"


def test_frozen_norms_are_a_linear_approximation_where_heads_go_through_a_norm():
    """There the sum of what single heads come to is what all heads together come to; nowhere else does freezing change anything."""
    tp, path = random_pair(1), ["L0H0 -> L1.mlp", "L0H1 -> L0.mlp", "L1H2 -> L2H0.v", "L1.mlp -> L2.mlp"]
    for name in ("llama", "gpt2"):
        model = tiny_model(name)
        assert path_effects(model, tp, path, norms="frozen").patched == pytest.approx(path_effects(model, tp, path).patched, abs=1e-6)
    for name in ("gemma2", "gemma3", "olmo2"):
        model = tiny_model(name)
        frozen, exact = (path_effects(model, tp, path, norms=norms).effects()[0] for norms in ("frozen", "exact"))
        assert np.abs(frozen - exact)[:3].max() > 1e-3 and frozen[3] == pytest.approx(exact[3], abs=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_frozen_norms_are_the_published_formula(name):
    """(z' - z) W_O, times the weight of the norm, divided by the base run's root mean square."""
    model, hf, tp = tiny_model(name), tiny_hf(name), random_pair(1)
    bare = BarePaths(hf, name, tp.clean_ids, tp.corrupt_ids)
    block, raw = hf.model.layers[0], []
    handle = block.self_attn.o_proj.register_forward_hook(lambda m, a, out: raw.append(out[0]))
    bare.run(tp.clean_ids)
    handle.remove()
    norm, write = block.post_attention_layernorm, block.self_attn.o_proj.weight[:, 8:16]
    with torch.no_grad(): change = (bare.donor["z", 0] - bare.clean["z", 0])[:, 1] @ write.T
    expected = change * (1 + norm.weight) / (raw[0].pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    runs = two_runs(model, tp.clean_ids, tp.corrupt_ids, range(9))
    (found,) = follow(model, runs, [as_path(model, "L0H1 -> logits")], frozen=True).values()
    assert torch.allclose(found[0], expected[-1], atol=1e-5 * expected.abs().max().item())


def test_pairs_of_several_lengths_and_their_table():
    model, pairs = tiny_model("gemma3"), [random_pair(1, 6, (1, 3)), random_pair(2, 12, (8, 9)), random_pair(3, 9)]
    paths = edges(model, ["embed", "L0.mlp"], ["L1H1.q", "L2.mlp", "logits"])
    found = path_effects(model, pairs, paths, metrics=("ld", "prob"))
    for i, tp in enumerate(pairs): assert found.patched[i] == pytest.approx(path_effects(model, tp, paths, metrics=("ld", "prob")).patched[0], abs=1e-5)
    table = found.to_frame()
    assert len(table) == 3 * len(paths) * 2 and set(table.hops) == {1}
    row = table[(table.pair_id == pairs[1].id) & (table.path == "L0.mlp -> L2.mlp") & (table.metric == "ld")].iloc[0]
    i = found.paths.index(as_path(model, "L0.mlp -> L2.mlp"))
    assert row.effect == pytest.approx(found.effects()[1, i]) and row.patched - row.clean == pytest.approx(row.effect)
    assert found.matrix(pairs[1].id).loc["L0.mlp", "L2.mlp"] == pytest.approx(row.effect)
    assert found.matrix().loc["L0.mlp", "L2.mlp"] == pytest.approx(found.effects()[:, i].mean())
    assert list(found.matrix().columns) == ["L1H1.q", "L2.mlp", "logits"]
    twice = path_effects(model, pairs[0], [paths[0], paths[1], paths[0]])
    assert twice.patched[0, 0] == twice.patched[0, 2] != twice.patched[0, 1] and twice.matrix().size == 2


def test_a_path_at_half_the_precision_is_nearly_the_same():
    model, tp = tiny_model("llama"), random_pair(1)
    coarse = load_model(tiny_hf("llama").to(torch.bfloat16))
    fine, rough = (path_effects(m, tp, edges(model, ["embed", "L0H0"], ["L1H1.q", "L2.mlp", "logits"])).effects() for m in (model, coarse))
    assert np.abs(fine - rough).max() < 0.15 * np.abs(fine).max()
