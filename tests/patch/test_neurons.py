"""Single neurons, against plain hooks on the bare model, and against identities."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import bare
from tiny import LAYERS, random_pair, tiny_hf, tiny_model

from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention, grid
from bizzaroworld.patch.means import mean_values
from bizzaroworld.patch.sweep import sweep

# The MLP of phi3 is one that TransformerLens computes itself, so that it always runs all tokens.
SHAPES = ("llama", "gemma", "gemma2", "gemma3", "gpt2", "pythia", "phi3")
DOWN = {"gpt2": ("transformer.h", "mlp.c_proj"), "pythia": ("gpt_neox.layers", "mlp.dense_4h_to_h")}


class Bare:
    """A Hugging Face model without TransformerLens, and what its MLPs' projections down read."""
    def __init__(self, name):
        self.hf = bare(name) if name == "phi3" else tiny_hf(name)
        blocks, down = DOWN.get(name, ("model.layers", "mlp.down_proj"))
        self.down = [block.get_submodule(down) for block in self.hf.get_submodule(blocks)]

    @property
    def layers(self): return range(len(self.down))

    @torch.no_grad()
    def ld(self, tp, side, hooks=()):
        handles = [self.down[layer].register_forward_pre_hook(hook) for layer, hook in hooks]
        try: logits = self.hf(torch.tensor([getattr(tp, f"{side}_ids")])).logits[0, -1]
        finally: [h.remove() for h in handles]
        return (logits[tp.clean_target_id] - logits[tp.corrupt_target_id]).item()

    def activations(self, tp, side):
        seen = {}
        self.ld(tp, side, [(l, lambda m, args, l=l: seen.__setitem__(l, args[0].clone())) for l in self.layers])
        return seen

    def patched(self, tp, direction, edits):
        base, other = ("clean", "corrupt") if direction == "noising" else ("corrupt", "clean")
        theirs = self.activations(tp, other)
        def put(layer, position, neuron):
            def hook(m, args):
                x = args[0].clone()
                x[0, position, neuron if neuron is not None else slice(None)] = theirs[layer][0, position, neuron if neuron is not None else slice(None)]
                return (x,)
            return hook
        return self.ld(tp, base, [(l, put(l, p, n)) for l, p, n in edits])


def loaded(name): return load_model(bare(name)) if name == "phi3" else tiny_model(name)


@pytest.mark.parametrize("name", SHAPES)
def test_neurons_agree_with_plain_hooks_on_the_bare_model(name):
    """In every layer, among rows of other sites whose MLPs run some tokens only; two pairs share the passes."""
    model, oracle, pairs = loaded(name), Bare(name), [random_pair(1), random_pair(2)]
    where = [(l, p, n) for l in oracle.layers for p in (3, 4, 6, 8) for n in (0, 5, 47)]
    last = oracle.layers[-1]
    several = [((0, 4, 1), (1, 8, 2), (last, 8, 3)), ((1, 5, None),), ((last, 3, None),), ((last, 8, None), (0, 4, 3))]
    asked = [Intervention(Edit("neurons", l, p, n) for l, p, n in some) for some in (*((w,) for w in where), *several)]
    others = grid(model, ["z", "mlp_out", "resid_pre", "k"], [4, 8])
    for direction in ("noising", "denoising"):
        ours = sweep(model, pairs, asked + others, direction, progress=False).patched[1, :, 0]
        theirs = np.array([oracle.patched(pairs[1], direction, some) for some in (*((w,) for w in where), *several)])
        np.testing.assert_allclose(ours[:len(asked)], theirs, atol=1e-5)
        alone = oracle.ld(pairs[1], "clean" if direction == "noising" else "corrupt")
        assert np.sort(np.abs(theirs - alone))[-4:].min() > 1e-3, "patches change the prediction"
        np.testing.assert_allclose(ours[len(asked):], sweep(model, pairs, others, direction, progress=False).patched[1, :, 0], atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_all_neurons_of_a_token_are_its_mlp(name):
    """What the projection down reads, all of it, is what it writes."""
    model, tp = loaded(name), random_pair(3)
    def swept(site): return sweep(model, tp, [Edit(site, l, p) for l in range(model.n_layers) for p in (4, "final", "all")], progress=False).patched[0, :, 0]
    np.testing.assert_allclose(swept("neurons"), swept("mlp_out"), atol=2e-5)


def test_neurons_where_every_mlp_runs_every_token(monkeypatch):
    model, tp = tiny_model("gemma3"), random_pair(4)
    asked = [Edit("neurons", l, p, n) for l in range(LAYERS) for p in (3, 8) for n in (2, 9)]
    spared = sweep(model, tp, asked, progress=False).patched
    monkeypatch.setitem(vars(model), "mlp_by_token", False)
    np.testing.assert_allclose(spared, sweep(model, tp, asked, progress=False).patched, atol=1e-6)


def test_values_from_elsewhere():
    """Zero, a number, a vector of all neurons, a mean, something on top, and a function."""
    model, oracle, tp = tiny_model("llama"), Bare("llama"), random_pair(5)
    own = oracle.activations(tp, "clean")
    def theirs(layer, value, neuron):
        def hook(m, args):
            x = args[0].clone()
            x[0, 4, neuron] = value
            return (x,)
        return oracle.ld(tp, "clean", [(layer, hook)])
    vector, one = torch.linspace(-1, 1, 48), Edit("neurons", 1, 4, 7, "given")
    rest = {Edit("neurons", 0, 4, None, "given"): vector, Edit("neurons", 1, 4, 6, "added"): torch.tensor([2.0]),
            Edit("neurons", 0, 4, 5, "function"): lambda there: there * 3}
    values = {one: torch.tensor(0.5), **rest}
    ours = sweep(model, tp, [Edit("neurons", 1, 4, 3, "zero"), *values], values=values, progress=False).patched[0, :, 0]
    expected = [theirs(1, 0.0, 3), theirs(1, 0.5, 7), theirs(0, vector, slice(None)), theirs(1, own[1][0, 4, 6] + 2, 6), theirs(0, own[0][0, 4, 5] * 3, 5)]
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    means = mean_values(model, [tp, random_pair(6)], [one, Edit("neurons", 1, 4)], "corrupt")
    mean = torch.stack([oracle.activations(p, "corrupt")[1][0, 4] for p in (tp, random_pair(6))]).mean(0)
    torch.testing.assert_close(means[Edit("neurons", 1, 4)].flatten(), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(means[one].flatten(), mean[[7]], atol=1e-5, rtol=0)
    given = {one: means[one], replace(Edit("neurons", 1, 4), source="given"): means[Edit("neurons", 1, 4)]}
    np.testing.assert_allclose(sweep(model, tp, list(given), values=given, progress=False).patched[0, :, 0],
                               [theirs(1, mean[7], 7), theirs(1, mean, slice(None))], atol=1e-5)
    with pytest.raises(ValueError, match="48 heads|a vector"): sweep(model, tp, rest, values={**rest, next(iter(rest)): vector[:5]}, progress=False)


def test_neurons_are_asked_for_by_name():
    """What goes over all sites does not meet thousands of neurons; the site is there, and is refused where it is not."""
    model = tiny_model("gemma3")
    assert "neurons" not in model.sites and model.all_sites == (*model.sites, "neurons") and not model.limits and not model.no_neurons
    assert len(grid(model, "neurons", 3, layers=[1])) == model.shape.d_mlp == 48
    with pytest.raises(ValueError, match="48 heads"): sweep(model, random_pair(1), Edit("neurons", 0, 3, 48), progress=False)
    mixture = load_model(bare("mixtral"))
    assert mixture.all_sites == mixture.sites and not any(s == "neurons" for s, _ in mixture.points)
    with pytest.raises(ValueError, match="has no neurons: nothing can be reached.*mixture of experts.*Use mlp_out"): grid(mixture, "neurons")


def test_prompts_of_several_lengths_and_other_donors():
    """In one sweep, whose rows are padded on the left, what each pair has alone; a donor of another length gives what is at its own end."""
    model, oracle = tiny_model("gemma3"), Bare("gemma3")
    pairs = [random_pair(1, 6, (1, 3)), random_pair(2, 12, (8, 9)), random_pair(3, 9)]
    asked = [Edit("neurons", l, p, n) for l in range(LAYERS) for p in ("entity", "final", 2) for n in (0, 9)] + [Edit("neurons", 1, "final"), Edit("resid_pre", 1)]
    together = sweep(model, pairs, asked, progress=False).patched
    for i, tp in enumerate(pairs): np.testing.assert_allclose(together[i], sweep(model, tp, asked, progress=False).patched[0], atol=1e-5)
    donor, tp = pairs[1], pairs[0]
    theirs = oracle.activations(donor, "corrupt")[2][0, -1, 9]
    def put(m, args):
        x = args[0].clone()
        x[0, -1, 9] = theirs
        return (x,)
    found = sweep(model, tp, Edit("neurons", 2, "final", 9), donors=[donor], progress=False)
    assert found.patched[0, 0, 0] == pytest.approx(oracle.ld(tp, "clean", [(2, put)]), abs=1e-5) and abs(found.patched - found.clean).max() > 1e-4
