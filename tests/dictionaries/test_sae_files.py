"""Dictionaries in the layouts of others: a tiny file of each, written by hand, against the formula of its source."""
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bizzaroworld.dictionaries.sae_files import hook_place, load_sae, save_sae
from bizzaroworld.dictionaries.saes import SAE, DictionaryError, folded

D, N, OUT = 8, 24, 6


def drawn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights(d_out=D, **more):
    return {"W_enc": drawn(D, N), "W_dec": drawn(N, d_out, seed=1), "b_enc": 0.3 * drawn(N, seed=2), "b_dec": drawn(d_out, seed=3), **more}


X = 3 * drawn(2, 5, D, seed=9) + 1
NEW = {"sae_lens_version": "6.5.0", "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre"}


def saelens(folder, parts, metadata=None, **cfg):
    "A folder in SAELens' layout. With `metadata` in the format since version 6."
    save_file({name: part.contiguous() for name, part in parts.items()}, folder / "sae_weights.safetensors")
    if metadata is not None: cfg["metadata"] = metadata
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": N, "dtype": "float32", **cfg}))
    return folder


def agree(sae, f, out, x=X, atol=1e-5):
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-5, atol=atol)
    torch.testing.assert_close(sae(x), out, rtol=1e-5, atol=10 * atol)
    assert 0 < (f > 0).float().mean() < 1  # the formula says something


def pre_of(w, x, b=0): return (x - b) @ w["W_enc"] + w["b_enc"]


def test_names_of_hooks():
    assert hook_place("blocks.0.hook_resid_mid") == ("resid_mid", 0) and hook_place("blocks.11.hook_mlp_out") == ("mlp_out", 11)
    assert hook_place("blocks.11.hook_attn_out") == ("attn_out", 11) and hook_place("blocks.2.attn.hook_z") == ("z", 2) and hook_place("blocks.2.mlp.hook_post") == ("neurons", 2)
    assert {hook_place(f"blocks.4.{hook}") for hook in ("hook_mlp_in", "mlp.hook_in")} == {("mlp_in", 4)} == {hook_place("model.layers.4.pre_feedforward_layernorm.output")}
    assert hook_place("blocks.4.ln2.hook_normalized") == ("mlp_normed", 4)  # before the gain: another place
    assert hook_place("model.layers.9.output") == ("resid_post", 9) and hook_place("model.language_model.layers.9.self_attn.o_proj.input") == ("z", 9)
    assert hook_place("model.layers.9.post_feedforward_layernorm.output") == ("mlp_out", 9)
    for name in ("hook_embed", "blocks.1.attn.hook_q", "blocks.x.hook_resid_pre", "model.layers.1.mlp.down_proj", "", None):
        with pytest.raises(DictionaryError, match="at no site"): hook_place(name)


@pytest.mark.parametrize("takes_off", [True, False])
def test_an_old_standard_dictionary(tmp_path, takes_off):
    w = weights()
    sae = load_sae(saelens(tmp_path, w, hook_point="blocks.7.hook_resid_post", hook_point_layer=7, hook_point_head_index=None, model_name="gpt2-small", apply_b_dec_to_input=takes_off, normalize_activations=False))
    f = pre_of(w, X, w["b_dec"] * takes_off).relu()
    agree(sae, f, f @ w["W_dec"] + w["b_dec"])
    assert (sae.reads, sae.writes, sae.model, sae.kind, sae.norm) == (("resid_post", 7), ("resid_post", 7), "gpt2-small", "relu", "none")


def test_what_an_old_file_leaves_out_has_its_old_meaning(tmp_path):
    w = weights()
    sae = load_sae(saelens(tmp_path, w, hook_name="blocks.7.hook_resid_post"))
    f = pre_of(w, X, w["b_dec"]).relu()
    agree(sae, f, f @ w["W_dec"] + w["b_dec"])


def test_a_finetuned_factor_multiplies_directions_and_not_features(tmp_path):
    w, factor = weights(), drawn(N, seed=5).abs() + 0.1
    common = dict(hook_name="blocks.7.hook_resid_post", activation_fn_str="relu")
    sae = load_sae(saelens(tmp_path, w | {"scaling_factor": factor}, finetuning_scaling_factor=True, **common))
    f = pre_of(w, X, w["b_dec"]).relu()
    agree(sae, f, (f * factor) @ w["W_dec"] + w["b_dec"])
    torch.testing.assert_close(load_sae(saelens(tmp_path, w | {"scaling_factor": torch.ones(N)}, **common))(X), f @ w["W_dec"] + w["b_dec"])
    with pytest.raises(DictionaryError, match="fine-tuning alone"): load_sae(saelens(tmp_path, w | {"scaling_factor": factor}, finetuning_scaling_factor=False, **common))


@pytest.mark.parametrize("new", [True, False])
def test_topk_old_and_new(tmp_path, new):
    w = weights()
    folder = saelens(tmp_path, w, NEW, architecture="topk", k=3, apply_b_dec_to_input=True) if new else saelens(tmp_path, w, hook_name="blocks.3.hook_resid_pre", architecture="standard", activation_fn_str="topk", activation_fn_kwargs={"k": 3})
    pre = pre_of(w, X, w["b_dec"])
    best = pre.topk(3, -1)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    sae = load_sae(folder)
    agree(sae, f, f @ w["W_dec"] + w["b_dec"])
    assert sae.kind == "topk" and sae.k == 3 and sae.reads == ("resid_pre", 3)


def test_features_in_units_of_their_directions_lengths(tmp_path):
    w = weights()
    w["W_dec"] = w["W_dec"] * torch.linspace(0.1, 4, N)[:, None]
    lengths = w["W_dec"].norm(dim=-1)
    pre = pre_of(w, X, w["b_dec"]) * lengths
    best = pre.topk(3, -1)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    agree(load_sae(saelens(tmp_path, w, NEW, architecture="topk", k=3, rescale_acts_by_decoder_norm=True)), f, (f / lengths) @ w["W_dec"] + w["b_dec"], atol=1e-4)
    f = pre.relu() * (pre > 1.5)  # a checkpoint of training: the threshold is in those units
    sae = load_sae(saelens(tmp_path, w | {"topk_threshold": torch.tensor(1.5, dtype=torch.float64)}, NEW, architecture="batchtopk", k=3.0, rescale_acts_by_decoder_norm=True))
    agree(sae, f, (f / lengths) @ w["W_dec"] + w["b_dec"], atol=1e-4)
    assert sae.kind == "batchtopk" and sae.threshold.unique().tolist() == [1.5]


def test_jumprelu_and_gated(tmp_path):
    w, threshold = weights(), drawn(N, seed=4)  # some are negative: relu and threshold both count
    pre = pre_of(w, X)
    f = pre.relu() * (pre > threshold)
    agree(load_sae(saelens(tmp_path, w | {"threshold": threshold}, NEW, architecture="jumprelu", apply_b_dec_to_input=False)), f, f @ w["W_dec"] + w["b_dec"])
    g = {name: w[name] for name in ("W_enc", "W_dec", "b_dec")} | {"b_gate": drawn(N, seed=6), "r_mag": 0.4 * drawn(N, seed=7), "b_mag": drawn(N, seed=8)}
    x = X - g["b_dec"]
    f = ((x @ g["W_enc"] + g["b_gate"]) > 0) * (x @ (g["W_enc"] * g["r_mag"].exp()) + g["b_mag"]).relu()
    agree(load_sae(saelens(tmp_path, g, NEW, architecture="gated", apply_b_dec_to_input=True)), f, f @ g["W_dec"] + g["b_dec"])


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_transcoders(tmp_path, jump, skip):
    w, threshold, W_skip = weights(OUT), drawn(N, seed=4).abs(), drawn(OUT, D, seed=5)  # W_skip is d_out x d_in there
    architecture = "jumprelu_" * jump + "skip_" * skip + "transcoder"
    parts = w | ({"threshold": threshold} if jump else {}) | ({"W_skip": W_skip} if skip else {})
    sae = load_sae(saelens(tmp_path, parts, NEW | {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}, architecture=architecture, d_out=OUT, apply_b_dec_to_input=False))
    pre = pre_of(w, X)
    f = pre.relu() * (pre > threshold) if jump else pre.relu()
    agree(sae, f, f @ w["W_dec"] + w["b_dec"] + (X @ W_skip.T if skip else 0))
    assert sae.reads == ("mlp_normed", 3) and sae.writes == ("mlp_out", 3) and sae.is_transcoder


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_inputs_that_are_scaled_by_token(tmp_path, norm):
    w = weights()
    sae = load_sae(saelens(tmp_path, w, NEW, architecture="standard", normalize_activations=norm, apply_b_dec_to_input=True))
    mean, std = (X.mean(-1, keepdim=True), X.std(-1, keepdim=True)) if norm == "layer_norm" else (0, X.norm(dim=-1, keepdim=True) / D ** 0.5)
    x = (X - mean) / (std + 1e-5 * (norm == "layer_norm"))
    f = pre_of(w, x, w["b_dec"]).relu()
    torch.testing.assert_close(sae.encode(X), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(X), (f @ w["W_dec"] + w["b_dec"]) * std + mean, rtol=1e-4, atol=1e-3)  # out again it leaves away the 1e-5


def test_one_number_for_all_is_asked_for_where_no_file_says_it(tmp_path):
    w, factor = weights(), 0.25
    folder = saelens(tmp_path, w, NEW, architecture="standard", normalize_activations="expected_average_only_in", apply_b_dec_to_input=True)
    with pytest.raises(DictionaryError, match=r"cfg\.json .*Give scale="): load_sae(folder)
    f = pre_of(w, X * factor, w["b_dec"]).relu()
    agree(load_sae(folder, scale=1 / factor), f, (f @ w["W_dec"] + w["b_dec"]) / factor, atol=1e-4)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    assert load_sae(folder).scale == 4.0
    folder = saelens(tmp_path, w, hook_point="blocks.1.hook_resid_pre", normalize_activations=True)  # the oldest way to say it
    assert load_sae(folder).norm == "scale"


def test_activations_of_a_model_whose_weights_were_centred(tmp_path):
    w = weights()
    folder = saelens(tmp_path, w, NEW | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}, architecture="standard", apply_b_dec_to_input=True)
    with pytest.raises(DictionaryError, match="centred=True"): load_sae(folder)
    f = pre_of(w, X - X.mean(-1, keepdim=True), w["b_dec"]).relu()
    agree(load_sae(folder, centred=True), f, f @ w["W_dec"] + w["b_dec"], atol=1e-4)
    torch.testing.assert_close(load_sae(folder, centred=False).encode(X), pre_of(w, X, w["b_dec"]).relu())
    g = {name: w[name] for name in ("W_enc", "W_dec", "b_dec")} | {"b_gate": drawn(N, seed=6), "r_mag": 0.4 * drawn(N, seed=7), "b_mag": drawn(N, seed=8)}
    sae = load_sae(saelens(tmp_path, g, NEW, architecture="gated", apply_b_dec_to_input=True), centred=True)
    x = X - X.mean(-1, keepdim=True) - g["b_dec"]
    f = ((x @ g["W_enc"] + g["b_gate"]) > 0) * (x @ (g["W_enc"] * g["r_mag"].exp()) + g["b_mag"]).relu()
    agree(sae, f, f @ g["W_dec"] + g["b_dec"], atol=1e-4)


def scope(file, skip=None, dtype=torch.float32, **shapes):
    "A file in the layout of Gemma Scope, 1 (npz) or 2 (safetensors)."
    w = weights(OUT if skip is not None else D)
    parts = {"w_enc": w["W_enc"], "w_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"], "threshold": drawn(N, seed=4).abs()} | ({} if skip is None else {"affine_skip_connection": skip})
    parts = {name: part.to(dtype).contiguous() for name, part in parts.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npz": np.savez(file, **{name.replace("w_", "W_"): part.numpy() for name, part in parts.items()})  # the first has capitals
    else: save_file(parts, file)
    parts = {name: part.float() for name, part in parts.items()}
    pre = X @ parts["w_enc"] + parts["b_enc"]
    f = pre * (pre > parts["threshold"])  # all thresholds are positive
    return f, f @ parts["w_dec"] + parts["b_dec"] + (0 if skip is None else X @ parts["affine_skip_connection"])


@pytest.mark.parametrize("name, reads, writes, model", [
    ("gemma-scope-2b-pt-res", ("resid_post", 12), ("resid_post", 12), "gemma-2-2b"), ("gemma-scope-9b-it-res", ("resid_post", 12), ("resid_post", 12), "gemma-2-9b-it"),
    ("models--google--gemma-scope-2b-pt-mlp", ("mlp_out", 12), ("mlp_out", 12), "gemma-2-2b"), ("gemma-scope-2b-pt-att", ("z", 12), ("z", 12), "gemma-2-2b"),
    ("gemma-scope-2b-pt-transcoders", ("mlp_normed", 12), ("mlp_out", 12), "gemma-2-2b")])
def test_gemma_scope(tmp_path, name, reads, writes, model):
    file = tmp_path / name / "snapshots" / "0" / "layer_12" / "width_16k" / "average_l0_41" / "params.npz"
    f, out = scope(file)
    for path in (file, file.parent):
        sae = load_sae(path)
        agree(sae, f, out)
        assert (sae.kind, sae.reads, sae.writes, sae.model, sae.b_in) == ("jumprelu", reads, writes, model, None)


def test_gemma_scope_out_of_its_folders(tmp_path):
    f, out = scope(tmp_path / "params.npz")
    with pytest.raises(DictionaryError, match=r"params\.npz nor its path says for which site and layer"): load_sae(tmp_path)
    with pytest.raises(DictionaryError, match="for which site it is: give site="): load_sae(tmp_path, layer=3)
    agree(load_sae(tmp_path, place=("mlp_out", 3)), f, out)
    assert load_sae(tmp_path, site="mlp_normed", layer=3, model="gemma-2-2b").writes == ("mlp_out", 3)
    scope(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "params.npz")
    with pytest.raises(DictionaryError, match="token embeddings"): load_sae(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k", layer=0)
    scope(tmp_path / "gemma-scope-2b-pt-res" / "layer_2" / "params.npz")
    with pytest.raises(DictionaryError, match="is for layer 2, and 3 is given"): load_sae(tmp_path / "gemma-scope-2b-pt-res" / "layer_2", layer=3)


@pytest.mark.parametrize("hook, reads", [("model.layers.12.output", ("resid_post", 12)), ("model.layers.12.self_attn.o_proj.input", ("z", 12)), ("model.layers.12.post_feedforward_layernorm.output", ("mlp_out", 12))])
def test_gemma_scope_2(tmp_path, hook, reads):
    f, out = scope(tmp_path / "params.safetensors", dtype=torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": hook}))
    sae = load_sae(tmp_path)
    agree(sae, f, out)
    assert (sae.reads, sae.writes, sae.model, sae.W_enc.dtype) == (reads, reads, "gemma-3-270m", torch.float32)


def test_gemma_scope_2_transcoders_add_a_linear_part_as_it_is_stored(tmp_path):
    f, out = scope(tmp_path / "params.safetensors", skip=drawn(D, OUT, seed=5))
    told = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-it", "hf_hook_point_in": "model.layers.2.pre_feedforward_layernorm.output", "hf_hook_point_out": "model.layers.2.post_feedforward_layernorm.output", "affine_connection": True}
    (tmp_path / "config.json").write_text(json.dumps(told))
    sae = load_sae(tmp_path)
    agree(sae, f, out)
    assert (sae.reads, sae.writes, sae.model) == (("mlp_in", 2), ("mlp_out", 2), "gemma-3-1b-it")
    scope(tmp_path / "params.safetensors")
    with pytest.raises(DictionaryError, match="no affine_skip_connection"): load_sae(tmp_path)


def test_gemma_scope_2_without_its_settings_is_told_by_its_folder(tmp_path):
    for folder, places in (("resid_post_all", (("resid_post", 3), ("resid_post", 3))), ("attn_out", (("z", 3), ("z", 3))), ("transcoder", (("mlp_in", 3), ("mlp_out", 3)))):
        file = tmp_path / folder / "layer_3_width_16k_l0_small" / "params.safetensors"
        f, out = scope(file)
        agree(load_sae(file), f, out)
        assert (load_sae(file).reads, load_sae(file).writes) == places
    save_file({name: drawn(3, 2, 4) for name in ("w_enc", "w_dec")} | {name: drawn(3, 2) for name in ("b_enc", "b_dec", "threshold")}, tmp_path / "params.safetensors")
    with pytest.raises(DictionaryError, match=r"params\.safetensors reads or writes several layers"): load_sae(tmp_path)


@pytest.mark.parametrize("change, says", [
    ({"architecture": "temporal"}, r"cfg\.json says architecture 'temporal': known are standard"), ({"architecture": "jumprelu"}, r"sae_weights\.safetensors has no threshold; it has W_dec, W_enc"),
    ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu'"), ({"architecture": "gated", "activation_fn_str": "topk"}, "'topk' for gated"), ({"architecture": "topk"}, "k is None"),
    ({"hook_head_index": 3}, "for head 3 alone"), ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening'"), ({"d_in": 9}, "says d_in 9, and the weights in .*have 8"),
    ({"hook_name": "hook_embed"}, "'hook_embed' is at no site"), ({"hook_name": "blocks.1.hook_mlp_in"}, "an SAE of what enters an MLP"), ({"architecture": "transcoder", "apply_b_dec_to_input": True}, "takes its output's bias off"),
    ({"architecture": "transcoder", "normalize_activations": "layer_norm"}, "undoes for no transcoder"), ({"architecture": "transcoder"}, "does not say where it writes"),
    ({"hook_name": None}, r"cfg\.json nor its path says for which site and layer")])
def test_what_is_not_known_is_refused(tmp_path, change, says):
    with pytest.raises(DictionaryError, match=says): load_sae(saelens(tmp_path, weights(), **{"hook_name": "blocks.1.hook_resid_pre"} | change))


@pytest.mark.parametrize("change, says", [
    ({"d_in": "8"}, r"says d_in '8', where a whole number is known"), ({"d_sae": True}, "says d_sae True"), ({"d_in": None}, "says d_in None"), ({"architecture": ["standard"]}, r"says architecture \['standard'\], where text is known"),
    ({"architecture": None}, "says architecture None"), ({"architecture": "topk", "k": None}, "does not say how many features are kept: k is None"), ({"architecture": "topk", "k": True}, "says k True, where a number or null is known"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": [3]}}, r"says k \[3\]"), ({"activation_fn_kwargs": 3}, "says activation_fn_kwargs 3, where settings by name or null is known"), ({"activation_fn_str": {}}, "says activation_fn_str {}"),
    ({"normalize_activations": 1}, "says normalize_activations 1, where text or true or false or null is known"), ({"normalize_activations": [1]}, "says normalize_activations"), ({"hook_name": 5}, "says hook_name 5, where text or null is known"),
    ({"hook_name": "blocks." + 5000 * "9" + ".hook_resid_pre"}, "is at no site"), ({"hook_head_index": "3"}, "says hook_head_index '3'"), ({"apply_b_dec_to_input": "no"}, "says apply_b_dec_to_input 'no', where true or false is known"),
    ({"model_name": 3}, "says model_name 3"), ({"metadata": [1]}, r"says metadata \[1\]"), ({"metadata": {"hook_name": 5}}, "says hook_name 5"), ({"bizzaroworld": "x"}, "says bizzaroworld 'x'"), ({"bizzaroworld": {"heads": 1.5}}, "says heads 1.5"),
    ({"model_from_pretrained_kwargs": ["center_writing_weights"]}, "says model_from_pretrained_kwargs"), ({"finetuning_scaling_factor": 2.0}, "says finetuning_scaling_factor 2.0")])
def test_a_setting_of_a_wrong_type_is_refused_by_file_field_and_value(tmp_path, change, says):
    with pytest.raises(DictionaryError, match=says) as told: load_sae(saelens(tmp_path, weights(), **{"hook_name": "blocks.1.hook_resid_pre"} | change))
    assert str(told.value).startswith(str(tmp_path / "cfg.json")) and (says.startswith(("does", "is at")) or str(told.value).endswith("Correct it, or download the file again."))


def test_settings_beside_the_weights_are_held_to_their_types_too(tmp_path):
    scope(tmp_path / "params.safetensors")
    for told, says in (({"architecture": 3}, "says architecture 3"), ({"affine_connection": "no"}, "says affine_connection 'no'"), ({"hf_hook_point_in": [1]}, r"says hf_hook_point_in \[1\]"), ({"hf_hook_point_in": "x"}, "hf_hook_point_in: The hook 'x' is at no site"), ({"model_name": {}}, "says model_name {}")):
        (tmp_path / "config.json").write_text(json.dumps(told))
        with pytest.raises(DictionaryError, match=rf"config\.json.*{says}"): load_sae(tmp_path, place=("resid_post", 1))
    folder = saelens(tmp_path, weights(), NEW, normalize_activations="expected_average_only_in")
    for factor in ("2", True, [2], {"a": 1}):
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        with pytest.raises(DictionaryError, match=r"activation_scaler\.json says scaling_factor"): load_sae(folder / "sae_weights.safetensors")
    for factor in (-1, 1e-320, float("nan"), float("inf"), 10 ** 400):
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        with pytest.raises(DictionaryError, match="scale is .*: it must be positive"): load_sae(folder / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(50_000 * "[" + 50_000 * "]")
    with pytest.raises(DictionaryError, match=r"cfg\.json cannot be read"): load_sae(folder / "sae_weights.safetensors")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["topk", "gated", "none", "scale", "standard", "batchtopk", "transcoder", "blocks.1.hook_resid_pre", "blocks.1.ln2.hook_normalized"]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.sampled_from(["k", "heads", "kind", "hook_name", "architecture"]), inner, max_size=3), max_leaves=6)
KEYS = ["d_in", "d_sae", "d_out", "architecture", "activation_fn", "activation_fn_str", "activation_fn_kwargs", "k", "normalize_activations", "finetuning_scaling_factor", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input", "model_name",
        "model_from_pretrained_kwargs", "metadata", "bizzaroworld", "hooks", "hook_name", "hook_name_out", "hook_point", "hook_head_index", "hook_point_head_index"]
BEGUN = {"standard": {}, "topk": {"k": 3}, "batchtopk": {"k": 3.0}, "transcoder": {"hook_name_out": "blocks.1.hook_mlp_out"}, "gated": {}}


@pytest.mark.parametrize("inside", [(), ("metadata",), ("bizzaroworld",), ("activation_fn_kwargs",), ("model_from_pretrained_kwargs",)], ids=lambda inside: "".join(inside) or "itself")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(begun=st.sampled_from(sorted(BEGUN)), changes=st.dictionaries(st.sampled_from([*KEYS, "heads", "kind", "center_writing_weights"]), JSON, min_size=1, max_size=2))
def test_whatever_a_setting_is_a_dictionary_is_read_or_refused_by_name(tmp_path, inside, begun, changes):
    parts = weights() | {"batchtopk": {"topk_threshold": torch.tensor(1.0)}}.get(begun, {})
    if begun == "gated": parts = {name: parts[name] for name in ("W_enc", "W_dec", "b_dec")} | {name: drawn(N) for name in ("b_gate", "r_mag", "b_mag")}
    told = {"architecture": begun, "hook_name": "blocks.1.hook_resid_mid", **BEGUN[begun]}
    try: sae = load_sae(saelens(tmp_path, parts, **told | ({inside[0]: changes} if inside else changes)))
    except DictionaryError as error: assert str(tmp_path) in str(error)
    else: assert isinstance(sae.model, str) and type(sae.heads) is int and (sae.k is None) == (sae.kind != "topk")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(["architecture", "affine_connection", "hf_hook_point_in", "hf_hook_point_out", "model_name"]), JSON, min_size=1, max_size=2))
@example(changes={"hf_hook_point_in": "blocks.1.hook_mlp_in", "hf_hook_point_out": 3})
def test_nor_does_gemma_scope_fall_over_a_setting(tmp_path, changes):
    scope(tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(changes))
    try: assert isinstance(load_sae(tmp_path, layer=1).model, str)
    except DictionaryError as error: assert str(tmp_path) in str(error)


def test_parts_that_are_not_known_or_do_not_fit_are_refused(tmp_path):
    cfg = dict(hook_name="blocks.1.hook_resid_pre")
    with pytest.raises(DictionaryError, match="has log_sigma besides"): load_sae(saelens(tmp_path, weights(log_sigma=drawn(N)), **cfg))
    with pytest.raises(DictionaryError, match=r"sae_weights\.safetensors: b_enc is 3"): load_sae(saelens(tmp_path, weights(b_enc=drawn(3)), **cfg))
    with pytest.raises(DictionaryError, match=r"sae_weights\.safetensors holds what is no floating-point number: W_dec \(torch\.int8\)"): load_sae(saelens(tmp_path, weights() | {"W_dec": torch.ones(N, D, dtype=torch.int8)}, **cfg))
    with pytest.raises(DictionaryError, match="k is 99, of 24"): load_sae(saelens(tmp_path, weights(), NEW, architecture="topk", k=99))
    (tmp_path / "cfg.json").write_text("[1]")
    with pytest.raises(DictionaryError, match="no settings by name"): load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(DictionaryError, match=r"cfg\.json cannot be read"): load_sae(tmp_path)


def test_files_that_are_not_whole_are_named(tmp_path):
    scope(tmp_path / "params.npz")
    whole = (tmp_path / "params.npz").read_bytes()
    for bad in (whole[:-100], whole[:40], b"", b"\x80\x04."):
        (tmp_path / "params.npz").write_bytes(bad)
        with pytest.raises(DictionaryError, match=r"params\.npz is damaged"): load_sae(tmp_path, place=("resid_post", 1))
    (tmp_path / "params.npz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DictionaryError, match=r"params\.npz is a pointer of Git LFS.*git lfs pull"): load_sae(tmp_path)
    np.savez(tmp_path / "params.npz", w_enc=np.array([{}], dtype=object))
    with pytest.raises(DictionaryError, match=r"params\.npz is damaged"): load_sae(tmp_path)  # would be unpickled
    (tmp_path / "x").mkdir()
    folder = saelens(tmp_path / "x", weights(), hook_name="blocks.1.hook_resid_pre")
    whole = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(whole[:-10])
    with pytest.raises(DictionaryError, match=r"sae_weights\.safetensors is damaged"): load_sae(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(DictionaryError, match=r"There is no file .*sae_weights\.safetensors"): load_sae(folder)


def test_pickles_and_other_files_are_refused(tmp_path):
    torch.save({}, tmp_path / "ae.pt")
    with pytest.raises(DictionaryError, match=r"ae\.pt is a pickle.*safetensors"): load_sae(tmp_path / "ae.pt")
    with pytest.raises(DictionaryError, match=r"holds no dictionary \(ae\.pt\)"): load_sae(tmp_path)
    with pytest.raises(DictionaryError, match="is not there"): load_sae(tmp_path / "nowhere")
    scope(tmp_path / "params.npz")
    scope(tmp_path / "params.safetensors")
    with pytest.raises(DictionaryError, match="several dictionaries"): load_sae(tmp_path)


PLACE = ("resid_post", 3)
def made(kind, reads=PLACE, writes=None, d_out=D, **parts):
    needs = {"jumprelu": {"threshold": drawn(N, seed=4).abs()}, "batchtopk": {"threshold": torch.full((N,), 0.7)}, "topk": {"k": 4}, "gated": {"r_mag": 0.3 * drawn(N, seed=7), "b_mag": drawn(N, seed=8)}}.get(kind, {})
    return SAE(kind, **weights(d_out), reads=reads, writes=writes or reads, **needs | parts)


TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "b_in", "r_mag", "b_mag", "W_skip")


def same(a, b):
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), name
    assert [getattr(a, f) for f in ("kind", "reads", "writes", "k", "norm", "scale", "heads", "model")] == [getattr(b, f) for f in ("kind", "reads", "writes", "k", "norm", "scale", "heads", "model")]


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk", "gated"])
@pytest.mark.parametrize("more", [{}, {"b_in": weights()["b_dec"]}, {"norm": "token_norm"}, {"norm": "layer_norm", "b_in": weights()["b_dec"]}, {"reads": ("z", 1), "heads": 2, "model": "a/model"}, {"reads": ("neurons", 2)}])
def test_saving_and_loading_changes_no_bit(tmp_path, kind, more):
    sae = made(kind, **more)
    same(sae, load_sae(save_sae(sae, tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("reads", [("mlp_in", 3), ("mlp_normed", 3), ("resid_mid", 2)])
def test_transcoders_are_saved_and_loaded(tmp_path, kind, reads):
    for skip in (None, drawn(D, OUT, seed=5)):
        sae = made(kind, reads, ("mlp_out", 3), OUT, W_skip=skip)
        same(sae, load_sae(save_sae(sae, tmp_path)))
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        assert cfg["architecture"] == "jumprelu_" * (kind != "relu") + "skip_" * (skip is not None) + "transcoder" and not cfg["apply_b_dec_to_input"] and cfg["d_out"] == OUT
        assert skip is None or load_file(tmp_path / "sae_weights.safetensors")["W_skip"].shape == (OUT, D)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk", "gated"])
@pytest.mark.parametrize("b_in", [None, "decoder's", "own"])
def test_what_the_layout_cannot_say_is_folded_in(tmp_path, kind, b_in):
    sae = made(kind, norm="scale", scale=3.7, b_in={None: None, "decoder's": weights()["b_dec"], "own": drawn(D, seed=11)}[b_in])
    again = load_sae(save_sae(sae, tmp_path))
    assert (again.norm, again.scale) == ("none", 1) and (again.b_in is None) == (b_in != "decoder's")
    agree(again, sae.encode(X), sae(X), atol=1e-4)
    same(again, load_sae(save_sae(again, tmp_path)))
    same(again, folded(again))


def test_a_scaled_transcoder_with_a_linear_part_and_a_bias_of_its_own(tmp_path):
    sae = made("jumprelu", ("mlp_in", 3), ("mlp_out", 3), OUT, W_skip=drawn(D, OUT, seed=5), norm="scale", scale=3.7, b_in=drawn(D, seed=11))
    agree(load_sae(save_sae(sae, tmp_path)), sae.encode(X), sae(X), atol=1e-4)


@pytest.mark.parametrize("sae, says", [
    (made("topk", ("mlp_in", 3), ("mlp_out", 3)), "topk transcoder"), (made("relu", ("mlp_in", 3), ("mlp_out", 3), norm="token_norm"), "norm token_norm"), (made("relu", W_skip=drawn(D, D)), "linear part"),
    (made("relu", ("q", 3)), "no name for the site q"), (made("relu", ("mlp_in", 3)), "of what enters an MLP")])
def test_what_cannot_be_folded_in_is_not_saved(tmp_path, sae, says):
    with pytest.raises(DictionaryError, match=says): save_sae(sae, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_folder_is_never_half_of_two_dictionaries(tmp_path, monkeypatch):
    save_sae(made("relu"), tmp_path)
    monkeypatch.setattr("bizzaroworld.dictionaries.sae_files.write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): save_sae(made("topk"), tmp_path)
    with pytest.raises(DictionaryError, match=r"cfg\.json"): load_sae(tmp_path)


def test_precision_and_device_are_the_callers(tmp_path):
    half = made("gated").to(dtype=torch.bfloat16)
    again = load_sae(save_sae(half, tmp_path), dtype=torch.bfloat16, device="cpu")
    same(half, again)
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == "bfloat16"
    assert load_sae(tmp_path).W_enc.dtype == torch.float32 and load_sae(tmp_path, model="other", heads=4).heads == 4 and load_sae(tmp_path, model="other").model == "other"
