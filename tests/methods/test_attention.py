"""What heads attend to under each corruption: held against TransformerLens's own runs, and against identities."""
import numpy as np
import pytest
import torch
from tiny import random_pair, tiny_model

from bizzaroworld.methods.attention import attention_to
from bizzaroworld.patch.noise import Noise

HEADS, RESTORED = [(2, 1), (1, 3)], [(0, 2), (1, 0)]


@pytest.mark.parametrize("name", ["gemma", "gemma3", "gpt2"])
@torch.no_grad()
def test_agrees_with_transformer_lens(name):
    model, pairs, noise = tiny_model(name), [random_pair(1), random_pair(2)], Noise(draws=2)
    found = attention_to(model, pairs, HEADS, ["entity", "final"], RESTORED, noise).set_index(["pair_id", "run", "head", "place"]).sort_index().weight
    tp, resolved = pairs[1], noise.measured(model, pairs)
    clean, corrupt = (torch.tensor([ids]) for ids in (tp.clean_ids, tp.corrupt_ids))
    _, cache = model.bridge.run_with_cache(clean)

    def restore(act, hook):
        for layer, head in RESTORED:
            if f".{layer}." in hook.name: act[:, :, head] = cache[hook.name][:, :, head]
        return act

    def weights(ids, hooks):
        seen = {}
        names = {f"blocks.{layer}.attn.hook_pattern": layer for layer, _ in HEADS}
        def look(act, hook): seen[names[hook.name]] = act.clone()
        model.bridge.run_with_hooks(ids, fwd_hooks=hooks + [(n, look) for n in names])
        return {f"L{layer}H{head}": seen[layer][0, head, -1] for layer, head in HEADS}
    back = [(f"blocks.{layer}.attn.hook_z", restore) for layer in (0, 1)]

    def noisy(draw):
        def put(act, hook):
            act[0, list(resolved.on(tp, draw).positions)] += resolved.on(tp, draw).values
            return act
        return [("blocks.0.hook_resid_pre", put)]
    wanted = {"clean": [weights(clean, [])], "STR": [weights(corrupt, [])], "STR restored": [weights(corrupt, back)],
              "GN": [weights(clean, noisy(d)) for d in (0, 1)], "GN restored": [weights(clean, noisy(d) + back) for d in (0, 1)]}
    for run, draws in wanted.items():
        for layer, head in HEADS:
            for place, at in (("entity", tp.entity), ("final", tp.final)):
                assert found[tp.id, run, f"L{layer}H{head}", place] == pytest.approx(np.mean([float(d[f"L{layer}H{head}"][at]) for d in draws]), abs=1e-5)
    assert abs(found[tp.id, "GN"] - found[tp.id, "clean"]).max() > 1e-3 and abs(found[tp.id, "GN restored"] - found[tp.id, "GN"]).max() > 1e-5


def test_everything_restored_is_the_clean_run():
    """With the outputs of all heads of all layers before, and prompts that differ only in a token that a head's own pattern cannot see but through them."""
    model, tp = tiny_model("gemma"), random_pair(1)
    found = attention_to(model, [tp], [(2, 1)], ["all"], [(layer, head) for layer in range(3) for head in range(4)], Noise(scale=0.0, draws=1))
    assert found.weight.to_numpy() == pytest.approx(1, abs=1e-5), "attention sums to one over all tokens"
    still = attention_to(model, [tp], [(2, 1)], ["entity"], [(0, 0)], Noise(scale=0.0, draws=1)).set_index("run").weight
    assert still["GN"] == pytest.approx(still["clean"], abs=1e-6) == pytest.approx(still["GN restored"], abs=1e-6)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="Unknown position 'IO' in pair-1"): attention_to(tiny_model("gemma"), [random_pair(1)], [(0, 0)], ["IO"])
