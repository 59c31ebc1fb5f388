"""Gemma 3 270M as it comes from the package index: put together, loaded, and swept as TransformerLens patches."""
import hashlib

import pytest
import torch
from transformer_lens import patching

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align, encode
from bizzaroworld.model import names
from bizzaroworld.model.names import PACKAGED, ModelError, Packaged, assemble, cache_folder, locate
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch.sweep import sweep

NAME = "gemma-3-270m"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A packaged model of two parts, and a cache of its own."""
    files = [tmp_path / f"toy.gguf.part0{i}" for i in range(2)]
    for i, file in enumerate(files): file.write_bytes(bytes([i]) * 5)
    whole = b"".join(f.read_bytes() for f in files)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(names, "parts_of", lambda model: files)
    return Packaged("toy", "toys", r"toy\.gguf\.part\d\d", hashlib.sha256(whole).hexdigest(), 10, "Terms of Toys"), files, whole


def test_a_packaged_model_is_put_together_once_and_its_terms_are_named_once(parts, recwarn):
    model, files, whole = parts
    path = assemble(model)
    assert path.read_bytes() == whole and path.parent == cache_folder() and "Terms of Toys" in str(recwarn.pop(UserWarning).message)
    files[0].write_bytes(b"other")
    assert assemble(model).read_bytes() == whole and not recwarn.list
    path.write_bytes(b"cut off")
    with pytest.raises(ModelError, match="bizzaroworld.toys.*force-reinstall"), pytest.warns(UserWarning): assemble(model)
    assert path.read_bytes() == b"cut off" and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_packaged_model_that_is_not_installed_names_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(names, "distributions", lambda: [])
    with pytest.raises(ModelError, match=r"not installed. Run: pip install 'bizzaroworld\[gemma\]'"): locate(NAME)


@pytest.mark.real
def test_gemma_is_the_file_that_is_known(gemma):
    assert gemma.weights_sha256 == PACKAGED[NAME].sha256 and gemma.weights_note == "Q4_K_M, dequantized to float32"
    assert (gemma.n_layers, gemma.n_heads, gemma.n_kv_heads, gemma.d_vocab) == (18, 4, 1, 262_144) and not gemma.limits
    ids = encode(gemma, "The capital of Germany is the city of").ids
    assert ids[0] == 2 and 2 not in ids[1:]
    assert gemma.tokenizer.decode(gemma.logits(torch.tensor([ids])).argmax().item()) == " Berlin"


@pytest.mark.real
def test_its_tokenizer_is_gemma_3s_own(gemma, tokenizer_folders):
    if "gemma-3" not in tokenizer_folders: pytest.skip("Gemma 3's tokenizer is not here")
    from transformers import AutoTokenizer
    own = AutoTokenizer.from_pretrained(tokenizer_folders["gemma-3"])
    texts = [text for pair in load_battery() for text in (pair.clean_prompt + pair.clean_target, pair.corrupt_prompt + pair.corrupt_target)]
    assert [encode(gemma, t).ids for t in [*texts, "Émile  Zola\n🙂"]] == [encode(own, t).ids for t in [*texts, "Émile  Zola\n🙂"]]


@pytest.mark.real
def test_a_sweep_of_gemma_is_transformer_lens_own_patching(gemma):
    for pair in load_battery()[:2]:
        tp = align(gemma, pair)
        swept = sweep(gemma, [tp], grid(gemma, ["resid_pre", "attn_out", "mlp_out"], "final"), "noising", progress=False).to_frame()
        clean, corrupt = (torch.tensor([ids]) for ids in (tp.clean_ids, tp.corrupt_ids))
        wanted = [f"blocks.{l}.{s}" for l in (5, 12) for s in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")]
        with torch.no_grad(): _, cache = gemma.bridge.run_with_cache(corrupt, names_filter=lambda name: name in wanted)
        for name in wanted:
            _, layer, site = name.split(".")
            def put(act, hook, donor=cache[name]): return patching.layer_pos_patch_setter(act.clone(), (int(layer), tp.final), donor)
            with torch.no_grad(): logits = gemma.bridge.run_with_hooks(clean, fwd_hooks=[(name, put)])[0, -1].float()
            ld = (logits[tp.clean_target_id] - logits[tp.corrupt_target_id]).item()
            row = swept[(swept.site == site.removeprefix("hook_")) & (swept.layer == int(layer))]
            assert len(row) == 1 and abs(row.patched.item() - ld) < 1e-3, name
