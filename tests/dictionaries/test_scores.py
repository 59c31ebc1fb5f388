"""Scores of dictionaries: where they are known, and what the same done by hand on the bare model gives."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from bizzaroworld.dictionaries.harvest import activations, blocks, documents
from bizzaroworld.dictionaries.saes import SAE, DictionaryError, perfect
from bizzaroworld.dictionaries.scores import (along_one, encoder_decoder_cosines, frequencies, frequency_histogram, frontier_with_loss, ignored_shares, kurtosis, loss_with, neuron_basis,
                                              nullspace_ablation, one_direction, pairwise_cosine, participation, read_basis, score, score_beside)
from bizzaroworld.dictionaries.splicing import sampled
from bizzaroworld.model.load import load_model
from bizzaroworld.model.names import embedded_models

LAYER = 3


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def bare(): return AutoModelForCausalLM.from_pretrained(embedded_models()["bizzaro-nano"], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text(model): return blocks(model, documents("facts", 60), context=32, held=0.25)


def random_sae(d, site, writes=None, heads=1, n=None, seed=0, **parts):
    g = torch.Generator().manual_seed(seed)
    def r(*shape): return torch.randn(shape, generator=g)
    n = n or 2 * d
    return SAE("relu", r(d, n) / d ** 0.5, r(n) - 2, r(n, d) / d ** 0.5, r(d) * 0.1, (site, LAYER), writes or (site, LAYER), heads=heads, **parts)


def scored(*args, **kwargs):
    table = score(*args, **kwargs).set_index("score")
    assert (table.n == len(args[2])).all()
    return table


@pytest.mark.parametrize("sae", [perfect(128, "resid_post", LAYER), perfect(128, "z", LAYER, heads=4), perfect(512, "neurons", LAYER)], ids=lambda sae: sae.reads[0])
def test_a_perfect_dictionary(model, text, sae):
    table = scored(model, sae, text.held, text.lead)
    assert table.value["change"] == pytest.approx(0, abs=1e-5) and table.value[["recovered", "recovered_mean", "explained", "cosine"]].tolist() == pytest.approx([1] * 4, abs=1e-4)
    assert table.value["loss"] == pytest.approx(table.value["loss_spliced"], abs=1e-5) and table.value["loss_zero"] > table.value["loss"]


@pytest.mark.parametrize("site, heads, d", [("resid_post", 1, 128), ("z", 4, 128), ("mlp_out", 1, 128)])
def test_a_dictionary_that_writes_nothing_is_zero_ablation_and_one_that_writes_the_mean_is_mean_ablation(model, text, site, heads, d):
    sae = random_sae(d, site, heads=heads)
    nothing = replace(sae, W_dec=sae.W_dec * 0, b_dec=sae.b_dec * 0)
    y = activations(model, text.held, [(site, LAYER)], text.lead)[site, LAYER].flatten(0, 1)
    table, of_mean = scored(model, nothing, text.held, text.lead), scored(model, replace(nothing, b_dec=y.mean(0)), text.held, text.lead)
    assert table.value["loss_spliced"] == table.value["loss_zero"] and table.value["recovered"] == 0 and table.low["recovered"] == table.high["recovered"] == 0
    assert table.value["explained"] == pytest.approx(1 - (y.pow(2).sum() / (y - y.mean(0)).pow(2).sum()).item(), rel=1e-4) and table.value["explained"] < 0
    assert of_mean.value["recovered_mean"] == pytest.approx(0, abs=1e-5) and of_mean.value["explained"] == pytest.approx(0, abs=1e-5)
    assert of_mean.value["loss_mean"] == of_mean.value["loss_spliced"] != of_mean.value["loss_zero"]


def by_hand(bare, ids, module, which, function):
    "Losses of `row pos` of the bare model with the input or the output of a module changed at every token but the first."
    def change(x): return torch.cat([x[:, :1], function(x[:, 1:])], 1)
    if which == "in": handle = module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    else: handle = module.register_forward_hook(lambda m, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out))
    with torch.no_grad(), handle: logits = bare(ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@pytest.mark.parametrize("site, path, which, d, heads", [("resid_post", "", "out", 128, 1), ("z", "self_attn.o_proj", "in", 128, 4), ("neurons", "mlp.down_proj", "in", 512, 1)])
def test_scores_are_what_plain_hooks_give(model, bare, text, site, path, which, d, heads):
    sae, ids, block, seen = random_sae(d, site, heads=heads), text.held, bare.model.layers[LAYER], []
    module = block.get_submodule(path) if path else block
    table = scored(model, sae, ids, text.lead, positions=9, seed=4)
    by_hand(bare, ids, module, which, lambda x: seen.append(x.clone()) or x)
    x = seen[0].flatten(0, 1)
    made, f, mean = sae(x), sae.encode(x), x.mean(0)
    functions = {"loss": lambda x: x, "loss_spliced": sae, "loss_zero": torch.zeros_like, "loss_mean": lambda x: mean.expand_as(x)}
    where = sampled(ids, 1, 9, 4)
    loss = {name: by_hand(bare, ids, module, which, function).gather(1, where).mean().item() for name, function in functions.items()}
    assert table.value[list(loss)].tolist() == pytest.approx(list(loss.values()), abs=1e-4)
    assert table.value["change"] == pytest.approx(loss["loss_spliced"] - loss["loss"], abs=1e-4)
    assert table.value["recovered"] == pytest.approx(1 - (loss["loss_spliced"] - loss["loss"]) / (loss["loss_zero"] - loss["loss"]), rel=1e-2)
    assert table.value["recovered_mean"] == pytest.approx(1 - (loss["loss_spliced"] - loss["loss"]) / (loss["loss_mean"] - loss["loss"]), rel=1e-2)
    assert table.value["explained"] == pytest.approx(1 - ((x - made) ** 2).sum().item() / ((x - mean) ** 2).sum().item(), rel=1e-4)
    assert table.value["cosine"] == pytest.approx(torch.cosine_similarity(x, made).mean().item(), abs=1e-4)
    assert table.value["l0"] == pytest.approx((f > 0).sum(1).float().mean().item(), abs=1e-3) and table.value["dead"] == pytest.approx(1 - (f > 0).any(0).float().mean().item(), abs=1e-6)
    for name in ("change", "explained", "l0"): assert table.low[name] < table.value[name] < table.high[name]


def test_a_transcoder_is_scored_on_what_it_writes(model, bare, text):
    sae, ids, block, seen = random_sae(128, "mlp_in", ("mlp_out", LAYER)), text.held, bare.model.layers[LAYER], {}
    table = scored(model, sae, ids, text.lead, positions=None)
    by_hand(bare, ids, block.mlp, "in", lambda x: seen.update(x=x.clone()) or x)
    by_hand(bare, ids, block.mlp, "out", lambda y: seen.update(y=y.clone()) or y)
    x, y = seen["x"].flatten(0, 1), seen["y"].flatten(0, 1)
    spliced = by_hand(bare, ids, block.mlp, "out", lambda y: sae(seen["x"]))[:, 1:].mean().item()
    assert table.value["loss_spliced"] == pytest.approx(spliced, abs=1e-4) and abs(table.value["change"]) > 1e-3
    assert table.value["explained"] == pytest.approx(1 - ((y - sae(x)) ** 2).sum().item() / ((y - y.mean(0)) ** 2).sum().item(), rel=1e-4)


def test_any_reconstruction_is_measured_as_a_dictionary_is(model, text):
    for sae in (random_sae(128, "z", heads=4), random_sae(128, "mlp_in", ("mlp_out", LAYER))):
        table = scored(model, sae, text.held, text.lead)
        shapes = []
        def zero(x): return shapes.append(x.shape) or torch.zeros(len(x), sae.d_out)
        found = frontier_with_loss(model, sae, {"itself": sae, 0: zero}, text.held, text.lead).set_index(["reconstruction", "score"])
        for name in ("change", "recovered", "recovered_mean"): assert found.value["itself", name] == pytest.approx(table.value[name], abs=1e-6)
        assert found.value[0, "recovered"] == 0 and {shape[1] for shape in shapes} == {sae.d_in}
        assert loss_with(model, sae, sae, text.held, text.lead).double().mean().item() == pytest.approx(table.value["loss_spliced"], abs=1e-6)


# --- frequencies and directions

def test_dictionaries_beside_each_other_are_scored_as_each_alone(model, text):
    sae = random_sae(128, "resid_post")
    both = {"dictionary": sae, "nothing": replace(sae, W_dec=sae.W_dec * 0, b_dec=sae.b_dec * 0), "perfect": perfect(128, "resid_post", LAYER)}
    table = score_beside(model, both, text.held, text.lead, positions=8)
    for name, one in both.items():
        alone = score(model, one, text.held, text.lead, positions=8)
        pd.testing.assert_frame_equal(table[table.dictionary == name].drop(columns="dictionary").reset_index(drop=True), alone[alone.score.isin(table.score)].reset_index(drop=True))
    assert set(table.score) == {"change", "recovered", "recovered_mean", "explained", "cosine", "l0", "dead"}
    for wrong in ({}, both | {"elsewhere": perfect(128, "resid_post", LAYER + 1)}):
        with pytest.raises(DictionaryError, match="give one or more, all of one place"): score_beside(model, wrong, text.held, text.lead)


def test_frequencies_are_counted():
    sae, x = perfect(3), torch.tensor([[1.0, 0, -1], [1, 0, 0], [1, 2, 0], [1, 0, 0]]).repeat(200, 1)
    found = frequencies(sae, x)
    assert found.tolist() == [1, 0.25, 0, 0, 0, 0.25]
    table = frequency_histogram(found)
    assert table.features.sum() == 6 and table.features[0] == 3 and table.low[0] == -np.inf
    assert table.set_index("low").features[[-1.0, -0.5]].tolist() == [2, 1] and table.high.iloc[-1] == 0  # a quarter is 10 ** -0.6; always is in the last
    assert frequency_histogram(np.zeros(4)).features.tolist() == [4] and frequency_histogram(np.ones(2)).features.sum() == 2


def test_rare_features_that_are_one_direction_are_found():
    g = torch.Generator().manual_seed(0)
    sae = random_sae(64, "resid_post", n=300)
    frequency = np.r_[np.zeros(10), np.full(20, 1e-6), 1e-4, np.full(269, 0.01)]
    plain = one_direction(sae, frequency).set_index("side")
    assert plain.rare.tolist() == [30, 30] and (plain.cosine.abs() < 0.05).all() and (plain.along_one < 0.2).all()
    W = sae.W_enc.clone()
    W[:, :30] = torch.randn(64, 1, generator=g) * torch.rand(30, generator=g) + 0.01 * torch.randn(64, 30, generator=g)
    found = one_direction(replace(sae, W_enc=W), frequency).set_index("side")
    assert found.cosine["encoder"] > 0.9 > 0.1 > found.most["encoder"] and found.along_one["encoder"] > 0.9 and found.loc["decoder"].equals(plain.loc["decoder"])
    assert (found.least <= found.others).all() and (found.others <= found.most).all()
    with pytest.raises(DictionaryError, match="1 of 300 features fire on less"): one_direction(sae, np.r_[0, np.full(299, 0.1)])


def test_cosines_of_pairs_are_those_of_all_pairs():
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    cosines = torch.stack([torch.cosine_similarity(rows[i], rows[j], dim=0) for i in range(7) for j in range(7) if i != j])
    assert pairwise_cosine(rows) == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert along_one(torch.eye(4)) == pytest.approx(0.25) and along_one(torch.tensor([[1.0, 2], [-3, -6]])) == pytest.approx(1)


def test_cosines_of_encoder_and_decoder():
    sae = perfect(4)
    assert encoder_decoder_cosines(sae) == pytest.approx(1)
    turned = replace(sae, W_dec=torch.cat([3 * sae.W_dec[:4], sae.W_dec[:4]]))
    assert encoder_decoder_cosines(turned) == pytest.approx([1] * 4 + [-1] * 4)
    with pytest.raises(DictionaryError, match="A transcoder reads one space"): encoder_decoder_cosines(random_sae(8, "mlp_in", ("mlp_out", 3)))


def test_axes_and_random_directions_are_told_apart():
    g, d = torch.Generator().manual_seed(0), 400
    normal, laplace = torch.randn(50, d, generator=g), torch.distributions.Laplace(0.0, 1.0)
    torch.manual_seed(0)
    assert kurtosis(normal).mean() == pytest.approx(3, abs=0.1) and kurtosis(laplace.sample((400, d))).mean() == pytest.approx(6, abs=0.5)
    assert participation(torch.eye(d)).tolist() == pytest.approx([1 / d] * d) and participation(torch.ones(1, d) * -2).item() == pytest.approx(1)
    assert participation(normal).mean() == pytest.approx(1 / 3, abs=0.02) and participation(normal).mean() == pytest.approx(participation(7 * normal).mean())
    sae = replace(random_sae(d, "neurons", n=50), W_dec=torch.eye(d)[:50])
    table = neuron_basis(sae).set_index("directions")
    assert table.on_axes.tolist() == [1, 0, 0] and table.beyond["decoder"] == 1 and table.beyond[["encoder", "random"]].max() < 0.1
    turned = replace(sae, W_dec=sae.W_dec @ torch.linalg.qr(torch.randn(d, d, generator=g)).Q)
    assert neuron_basis(turned).set_index("directions")["kurtosis"]["decoder"] == pytest.approx(3, abs=0.3)
    assert neuron_basis(replace(sae, W_dec=torch.eye(d)[:50] * (torch.arange(50) < 20)[:, None])).n.tolist() == [20, 50, 50]


# --- what the projection down ignores

@pytest.mark.parametrize("name", ["bizzaro-nano", "gpt2", "gemma2", "pythia"])
def test_what_is_ignored_costs_nothing(name):
    "Whatever stands behind the projection: a bias, a norm, or nothing; and however its weight is stored."
    model = load_model(name) if "-" in name else tiny_model(name)
    layer, d, ids = model.n_layers // 2, model.shape.d_mlp, torch.arange(3, 93).view(6, 15)
    sae = replace(random_sae(d, "neurons"), reads=("neurons", layer), writes=("neurons", layer))
    table = nullspace_ablation(model, sae, ids, 1, positions=None).set_index(["of", "part"])
    for of in ("error", "activation"):
        assert abs(table.change[of, "ignored"]) < 1e-5 and table.change[of, "read"] == pytest.approx(table.change[of, "all"], abs=1e-5) and abs(table.change[of, "all"]) > 1e-3
        assert table["share"][of, "read"] + table["share"][of, "ignored"] == pytest.approx(1, abs=1e-4) and 0.05 < table["share"][of, "ignored"] < 0.95
        assert table.by_chance[of, "ignored"] == pytest.approx(1 - model.d_model / d)
    table = score(model, sae, ids, 1, positions=None).set_index("score")
    assert table.value["change"] == pytest.approx(nullspace_ablation(model, sae, ids, 1, positions=None)["change"][0], abs=1e-5)


def test_the_ignored_share_of_each_direction(model, bare):
    down = bare.model.layers[LAYER].mlp.down_proj.weight.detach()  # d_model neuron
    kernel = torch.linalg.svd(down, full_matrices=True).Vh[128:]
    assert (down @ kernel.T).abs().max() < 1e-4
    sae, rows = random_sae(512, "neurons", n=30), torch.cat([kernel[:10], 3 * down[:10], kernel[:10] / kernel[:10].norm(dim=1, keepdim=True) + down[:10] / down[:10].norm(dim=1, keepdim=True)])
    assert ignored_shares(model, replace(sae, W_dec=rows)) == pytest.approx([1] * 10 + [0] * 10 + [0.5] * 10, abs=1e-4)
    assert read_basis(model, sae).shape == (512, 128)


def test_a_projection_of_lower_rank_reads_less():
    model = tiny_model("llama")
    sae = replace(random_sae(48, "neurons"), reads=("neurons", 1), writes=("neurons", 1))
    assert read_basis(model, sae).shape == (48, 32)
    with torch.no_grad(): model.hf.model.layers[1].mlp.down_proj.weight[10:] = model.hf.model.layers[1].mlp.down_proj.weight[0]
    assert read_basis(model, sae).shape == (48, 10)


def test_other_sites_have_no_nullspace(model, text):
    for sae, match in ((random_sae(128, "mlp_out"), "of mlp_out: give one of the site neurons"), (random_sae(128, "mlp_in", ("mlp_out", LAYER)), "of mlp_in and mlp_out")):
        with pytest.raises(DictionaryError, match=match): ignored_shares(model, sae)
        with pytest.raises(DictionaryError, match=match): nullspace_ablation(model, sae, text.held, text.lead)
