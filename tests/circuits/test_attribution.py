"""Attribution patching: exact where the model is linear and where the donor is near, and a table that joins the sweep's."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import bare
from linear import linear_hf
from tiny import LAYERS, random_pair, tiny_model

from bizzaroworld.circuits.atp_star import atp_star
from bizzaroworld.circuits.attribution import attribution, beside, relevance
from bizzaroworld.circuits.gradients import NODES, gradients, nodes_of
from bizzaroworld.model.hooked import by_head
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, grid
from bizzaroworld.patch.sweep import sweep

SHAPES = ("llama", "gemma", "gemma2", "gemma3", "gpt2")
STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("method", ["atp", "ig", "relp"])
def test_exact_on_a_linear_model(direction, method):
    """Every node of every site, neurons included, at every position. Its queries and keys do nothing, and so are no sites."""
    model, pairs = load_model(linear_hf()), [random_pair(1), random_pair(2, 7, (1, 2))]
    sites = nodes_of(model)
    assert sites == tuple(s for s in NODES if s not in "qk")
    for tp in pairs:
        n = len(tp.clean_ids)
        exact = sweep(model, tp, grid(model, sites, range(n)), direction, progress=False)
        table = beside(exact, found := attribution(model, tp, direction, method=method, steps=3))
        assert len(table) == len(found.to_frame()) and table[found.method].notna().all()
        np.testing.assert_allclose(table[found.method], table.effect, atol=3e-5 * max(1, table.effect.abs().max()))
        assert (table.groupby("site").effect.apply(lambda x: x.abs().max()) > 0.01).all()
        alone, frame = exact.clean if direction == "noising" else exact.corrupt, found.to_frame()
        np.testing.assert_allclose(frame.patched - frame.effect, alone[0, 0], atol=1e-5)
        assert list(exact.to_frame().columns) == list(frame.columns)[:-1] and (exact.to_frame().dtypes == frame.dtypes[:-1]).all()
    both = attribution(model, pairs, direction, method=method, steps=3)
    for i, tp in enumerate(pairs):
        alone = attribution(model, tp, direction, method=method, steps=3)
        for site in sites: np.testing.assert_allclose(both.estimates[i][site], alone.estimates[0][site], atol=1e-6)
        np.testing.assert_allclose([both.clean[i], both.corrupt[i]], [alone.clean[0], alone.corrupt[0]], atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_exact_for_a_donor_that_is_near(name):
    """The error of the estimate falls with the square of the donor's distance: ten times nearer, and what is left of the effect's share is a tenth."""
    model, tp = tiny_model(name), random_pair(2)
    base, donor = gradients(model, tp, sites=NODES), gradients(model, tp, side="corrupt", sites=NODES)
    ends = attribution(model, tp)
    places = [(s, l, p, (l + p) % model.shape.heads(s) if model.shape.heads(s) else None) for s in NODES for l in range(LAYERS) for p in (3, 8)]
    def value(x, s, l, p, h): return by_head(s, x.acts[s, l])[0, p] if h is None else by_head(s, x.acts[s, l])[0, p, h]
    estimate = np.array([ends.estimates[0][s][(l, p) if h is None else (l, p, h)] for s, l, p, h in places])
    def share(eps):
        values = {Edit(*place, "given"): value(base, *place) + eps * (value(donor, *place) - value(base, *place)) for place in places}
        found = sweep(model, tp, list(values), values=values, progress=False)
        return (found.patched[0, :, 0] - found.clean[0, 0]) / eps
    error = {eps: np.abs(share(eps) - estimate) for eps in (0.3, 0.03)}
    assert (np.abs(estimate) > 1e-3).sum() > 20
    bent = error[0.3] > 2e-3
    assert bent.sum() > 10, "the model is not linear there, so that the test can fail"
    assert (error[0.03] < 0.2 * error[0.3])[bent].mean() > 0.9 and error[0.03].max() < 0.15 * error[0.3].max()


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_integrated_gradients_are_complete(name, direction):
    """What enters the first block has estimates that add up to the whole change, as more points are taken; a single gradient's do not."""
    model, tp = tiny_model(name), random_pair(3)
    def gap(steps):
        found = attribution(model, tp, direction, metric="logprob", method="ig" if steps else "atp", steps=steps, sites=["resid_pre"])
        whole = (found.corrupt[0] - found.clean[0]) * (1 if direction == "noising" else -1)
        return abs(found.estimates[0]["resid_pre"][0].sum() - whole) / abs(whole)
    assert gap(0) > 0.05 and gap(32) < 2e-3 and gap(32) < gap(2)


@pytest.mark.parametrize("metric", ["ld", "logprob", "prob_diff"])
def test_a_set_of_answers_and_both_ends(metric):
    """Clean and corrupted values are the sweep's."""
    model, tp = tiny_model("gemma3"), replace(random_pair(4), clean_answers=(7, 20), corrupt_answers=(11, 30, 31))
    for direction in ("noising", "denoising"):
        found = attribution(model, tp, direction, metric=metric, sites="z")
        exact = sweep(model, tp, grid(model, "z", range(9)), direction, metrics=[metric], progress=False)
        np.testing.assert_allclose([found.clean[0], found.corrupt[0]], [exact.clean[0, 0], exact.corrupt[0, 0]], atol=1e-5)
        table = beside(exact, found)
        late = table[(table.layer == LAYERS - 1) & (table.effect != 0)]
        assert np.corrcoef(late.effect, late.atp)[0, 1] > 0.7, "of the last layer's heads little comes after"


def test_kl_and_what_is_refused():
    model, tp = tiny_model("llama"), random_pair(5)
    assert attribution(model, tp, "denoising", metric="kl", sites="z").corrupt[0] == pytest.approx(
        sweep(model, tp, Edit("z", 0), "denoising", metrics=["kl"], progress=False).corrupt[0, 0], abs=1e-5)
    for wrong, text in ((dict(direction="both"), "Unknown direction"), (dict(sites="heads"), "Unknown site"), (dict(metric="rank"), "no gradient"),
                        (dict(method="ig", steps=0), "0 steps"), (dict(method="eap"), "Unknown method")):
        with pytest.raises(ValueError, match=text): attribution(model, tp, **wrong)
    for how in (attribution, atp_star):
        for wrong, text in ((dict(sites=["pattern"]), "pattern is no site of nodes"), (dict(sites=["z", "scores"]), "scores is no site of nodes"), (dict(sites=[]), "Give one site or more")):
            with pytest.raises(ValueError, match=text): how(model, tp, **wrong)
        with pytest.raises(ValueError, match="No pairs: give one or more"): how(model, [])
    with pytest.raises(ValueError, match="is in the sweep"): beside(sweep(model, tp, grid(model, "z", "final"), progress=False), attribution(model, tp, sites="z"))
    with pytest.raises(ValueError, match="column 'atp' already"): beside(sweep(model, tp, grid(model, "z", range(9)), progress=False), *[attribution(model, tp, sites="z")] * 2)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3", "qwen3", "phi3"])
def test_relevance_is_conserved(name):
    """Without biases, what is left when norms, patterns and ratios are held is linear: in every layer, activations times slopes are the logit difference."""
    model, tp = load_model(bare(name)) if name == "phi3" else tiny_model(name), random_pair(3)
    plain = gradients(model, tp, sites=["resid_pre", "resid_post", "resid_mid"])
    with relevance(model): held = gradients(model, tp, sites=["resid_pre", "resid_post", "resid_mid"])
    assert held.values.item() == pytest.approx(plain.values.item(), rel=1e-4), "nothing is changed"
    def total(x): return torch.stack([(x.acts[key] * x.slopes[key]).sum() for key in x.slopes])
    torch.testing.assert_close(total(held), held.values.expand(3 * model.n_layers), rtol=1e-3, atol=1e-3)
    assert (total(plain) - plain.values).abs().max() > 0.05


class _Silu(torch.nn.Module):
    """An activation that nobody knows as one."""
    def forward(self, x): return x * torch.sigmoid(x)


def test_relevance_leaves_nothing_behind():
    """And of queries and keys it says nothing; a model whose activations cannot be held is refused."""
    model, tp = tiny_model("llama"), random_pair(3)
    before = attribution(model, tp, sites=["z", "q"])
    found = attribution(model, tp, method="relp", sites=["z", "q", "neurons"])
    assert not found.estimates[0]["q"].any() and np.abs(found.estimates[0]["z"] - before.estimates[0]["z"]).max() > 1e-3
    np.testing.assert_allclose(attribution(model, tp, sites=["z", "q"]).estimates[0]["z"], before.estimates[0]["z"], atol=1e-6)
    with pytest.raises(ValueError, match="has no neurons"): attribution(load_model(bare("mixtral")), tp, method="relp")
    for block in model.hf.model.layers[:1]: block.mlp.original_component.act_fn = _Silu()
    with pytest.raises(ValueError, match="2 of its 3 MLPs"): attribution(model, tp, method="relp")
