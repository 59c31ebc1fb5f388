"""Noise in place of a corrupted prompt: held against TransformerLens with the same noise put in by hand, and against identities."""
from dataclasses import replace
from itertools import cycle, product

import numpy as np
import pytest
import torch
from tiny import random_pair, tiny_model
from transformer_lens import utilities  # noqa: F401  (the oracle below is its bridge)
from weekly import mostly

from bizzaroworld.model.hooked import SITES
from bizzaroworld.patch.interventions import Edit, Intervention, grid, positions_of
from bizzaroworld.patch.noise import Noise, embedding_deviation, embedding_scale
from bizzaroworld.patch.sweep import sweep

ARCHITECTURES = ("gemma", "gemma3", "gpt2")


def by_hand(model, tp, edit, direction, added):
    """The logit difference of one patched run, by TransformerLens: noise enters with the stream, one activation is overwritten."""
    entry, name = "blocks.0.hook_resid_pre", f"blocks.{edit.layer}.{SITES[edit.site]}"

    def noise(act, hook):
        act[0, list(added.positions)] += added.values
        return act
    ids, noisy = torch.tensor([tp.clean_ids]), [(entry, noise)]
    noised_base = direction == "denoising"
    seen = {}
    def keep(act, hook): seen[0] = act.detach().clone()
    model.bridge.run_with_hooks(ids, fwd_hooks=([] if noised_base else noisy) + [(name, keep)])
    at = [slice(None), list(positions_of(edit.position, tp))]
    if edit.head is not None: at = [*at, edit.head] if edit.site not in ("pattern", "scores") else [slice(None), edit.head, at[1]]
    elif edit.site in ("pattern", "scores"): at = [slice(None), slice(None), at[1]]

    def put(act, hook):
        act[tuple(at)] = seen[0][tuple(at)]
        return act
    logits = model.bridge.run_with_hooks(ids, fwd_hooks=(noisy if noised_base else []) + [(name, put)])[0, -1]
    return (logits[tp.clean_target_id] - logits[tp.corrupt_target_id]).item()


@pytest.mark.parametrize("name, direction", mostly(product(ARCHITECTURES, ["noising", "denoising"]), zip(ARCHITECTURES, cycle(["denoising", "noising"]))))
@torch.no_grad()
def test_agrees_with_transformer_lens_at_every_site(name, direction):
    model, pairs, noise = tiny_model(name), [random_pair(1), random_pair(2)], Noise(draws=3, seed=4)
    interventions = grid(model, model.sites, ["final", "entity"])
    done = sweep(model, pairs, interventions, direction, noise=noise)
    resolved = noise.measured(model, pairs)
    tp = pairs[1]
    for column, intervention in enumerate(interventions):
        wanted = np.mean([by_hand(model, tp, intervention.edits[0], direction, resolved.on(tp, d)) for d in range(3)])
        assert abs(done.patched[1, column, 0] - wanted) < 1e-5, intervention
    assert np.abs(done.patched - (done.clean if direction == "noising" else done.corrupt)[:, None]).max() > 0.05, "nothing was changed"


def test_windows_and_whole_prompts_agree(name="gemma3"):
    """Several layers at once, and a head at all positions, against the same edits made one by one in a hand-made run."""
    model, tp, noise = tiny_model(name), random_pair(3), Noise(draws=1).measured(tiny_model(name), [random_pair(3)])
    window = Intervention(Edit("mlp_out", layer, "entity") for layer in (0, 1, 2))
    heads = Intervention(Edit("z", 1, "all", head=2))
    done = sweep(model, tp, [window, heads], "denoising", noise=noise)
    added, ids, seen = noise.on(tp, 0), torch.tensor([tp.clean_ids]), {}
    names = {f"blocks.{e.layer}.{SITES[e.site]}" for i in (window, heads) for e in i.edits}
    with torch.no_grad():
        model.bridge.run_with_hooks(ids, fwd_hooks=[(n, lambda act, hook: seen.update({hook.name: act.clone()})) for n in names])

        def noise_in(act, hook):
            act[0, list(added.positions)] += added.values
            return act

        def one(act, hook):
            act[:, tp.entity] = seen[hook.name][:, tp.entity]
            return act

        def whole(act, hook):
            act[:, :, 2] = seen[hook.name][:, :, 2]
            return act
        entry = ("blocks.0.hook_resid_pre", noise_in)
        for column, hooks in enumerate(([(f"blocks.{layer}.hook_mlp_out", one) for layer in (0, 1, 2)], [("blocks.1.attn.hook_z", whole)])):
            logits = model.bridge.run_with_hooks(ids, fwd_hooks=[entry, *hooks])[0, -1]
            assert abs(done.patched[0, column, 0] - (logits[tp.clean_target_id] - logits[tp.corrupt_target_id]).item()) < 1e-5


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_no_noise_is_the_clean_run(direction):
    model = tiny_model("gemma3")
    done = sweep(model, [random_pair(1), random_pair(2)], grid(model, model.sites, ["entity", "final"]), direction,
                 noise=Noise(scale=0.0, draws=2), metrics=("ld", "kl"))
    assert np.abs(done.patched - done.clean[:, None]).max() < 1e-5 and np.abs(done.corrupt - done.clean).max() < 1e-5


def test_the_prompt_before_the_noise_is_what_it_was():
    """A patch of a token before the first noised one changes nothing, to the last bit: it is not even run."""
    model, tp = tiny_model("gemma"), random_pair(1)
    done = sweep(model, tp, grid(model, "resid_pre", range(len(tp.clean_ids))), noise=Noise(draws=2))
    effects = (done.patched - done.clean[:, None])[0, :, 0].reshape(-1, model.n_layers)
    assert (effects[:tp.entity_span[0]] == 0).all() and (np.abs(effects[tp.entity_span[0]:]).max(0) > 0).all()


def test_draws_belong_to_the_pair():
    """The same numbers alone and in company, for one draw of three and for three."""
    model, pairs = tiny_model("gemma"), [random_pair(k) for k in range(4)]
    noise, asked = Noise(draws=3).measured(model, pairs), grid(model, "resid_pre", "entity")
    together, alone = sweep(model, pairs, asked, noise=noise), sweep(model, pairs[2], asked, noise=noise)
    assert np.abs(together.patched[2] - alone.patched[0]).max() < 1e-5
    first = sweep(model, pairs[2], asked, noise=replace(noise, draws=1))
    assert np.abs(first.patched - alone.patched).max() > 1e-3, "three draws give what one gives"
    other = sweep(model, pairs[2], asked, noise=replace(noise, seed=1))
    assert np.abs(other.patched - alone.patched).max() > 1e-3, "the seed is not used"


def test_mean_of_the_metric_and_metric_of_the_mean():
    model, tp, metrics = tiny_model("gpt2"), random_pair(1), ("ld", "ld_of_mean", "prob", "prob_of_mean", "kl", "kl_of_mean")
    noise, edit = Noise(draws=4, scale=30).measured(model, [tp]), Edit("resid_pre", 1, "entity")
    done = dict(zip(metrics, sweep(model, tp, edit, noise=noise, metrics=metrics).patched[0, 0]))
    finals = []
    for d in range(4):
        added = noise.on(tp, d)

        def put(act, hook):
            act[0, list(added.positions)] += added.values
            return act
        ids, name = torch.tensor([tp.clean_ids]), "blocks.1.hook_resid_pre"
        with torch.no_grad():
            seen = {}
            model.bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_resid_pre", put), (name, lambda act, hook: seen.update(x=act.clone()))])

            def patch(act, hook):
                act[:, tp.entity] = seen["x"][:, tp.entity]
                return act
            finals.append(model.bridge.run_with_hooks(ids, fwd_hooks=[(name, patch)])[0, -1])
    with torch.no_grad(): clean = model.bridge(torch.tensor([tp.clean_ids]))[0, -1].log_softmax(-1)
    finals = torch.stack(finals)
    def kl(x): return (clean.exp() * (clean - x.log_softmax(-1))).sum(-1)
    a, b, mean = tp.clean_target_id, tp.corrupt_target_id, finals.mean(0)
    wanted = {"ld": (finals[:, a] - finals[:, b]).mean(), "ld_of_mean": mean[a] - mean[b], "prob": finals.softmax(-1)[:, a].mean(),
              "prob_of_mean": mean.softmax(-1)[a], "kl": kl(finals).mean(), "kl_of_mean": kl(mean)}
    for name, value in wanted.items(): assert abs(done[name] - value.item()) < 1e-5, name
    assert abs(done["prob"] - done["prob_of_mean"]) > 1e-6 and abs(done["ld"] - done["ld_of_mean"]) < 1e-5


@pytest.mark.parametrize("name, scale", [("gemma", 32 ** 0.5), ("gemma3", 32 ** 0.5), ("gpt2", 1.0), ("llama", 1.0)])
def test_embeddings_are_measured_after_the_models_own_scaling(name, scale):
    model, pairs = tiny_model(name), [random_pair(k) for k in range(5)]
    weight = model.hf.get_input_embeddings().weight.detach()
    wanted = weight[[tp.clean_ids[tp.entity] for tp in pairs]].std(correction=0).item() * scale
    assert embedding_deviation(model, pairs, ["entity"]) == pytest.approx(wanted, rel=1e-4)
    assert embedding_scale(model) in (pytest.approx(scale, rel=1e-3), pytest.approx(1.0, rel=1e-3))  # Gemma 3 scales inside its embedding


def test_noise_has_the_deviation_that_it_says():
    model, tp = tiny_model("gemma"), random_pair(1)
    noise = Noise(places=("all",), draws=200).measured(model, [tp])
    values = torch.cat([noise.on(tp, d).values for d in range(200)])
    assert values.std().item() == pytest.approx(3 * embedding_deviation(model, [tp], ["all"]), rel=0.02) and abs(values.mean()) < 0.05 * values.std()


def test_a_norm_behind_the_embedding_is_seen():
    assert embedding_scale(tiny_model("bloom")) is None if "bloom" in __import__("tiny").BUILDERS else True


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least one place"): Noise(places=())
    with pytest.raises(ValueError, match="one or more"): Noise(draws=0)
    with pytest.raises(ValueError, match="0 or more"): Noise(scale=-1)
    with pytest.raises(ValueError, match="Unknown position 'S2' in pair-1"):
        sweep(tiny_model("gemma"), random_pair(1), Edit("resid_pre", 0), noise=Noise(places=("S2",)))
