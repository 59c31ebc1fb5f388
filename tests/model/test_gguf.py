"""GGUF files: what is loaded equals what was written, and what cannot be read whole is refused."""
import hashlib
import re
import struct

import numpy as np
import pytest
import torch
from tiny_gguf import BPE, BUILDERS, SPM, tiny_for_gguf, write_gguf

from bizzaroworld.battery.tokens import encode
from bizzaroworld.model import gguf as room
from bizzaroworld.model.gguf import read_gguf
from bizzaroworld.model.load import load_model, load_tokenizer
from bizzaroworld.model.names import ModelError, locate
from bizzaroworld.pipeline import describe

IDS = torch.tensor([[2, 40, 50, 60, 70, 80, 90, 100, 110, 120]])


@pytest.mark.parametrize("name", BUILDERS)
def test_the_model_in_a_file_is_the_one_that_was_written(name, tmp_path):
    hf = tiny_for_gguf(name)
    model = load_model(str(write_gguf(tmp_path / "m.gguf", name, hf)), device="cpu")
    with torch.no_grad(): expected = hf(IDS).logits[:, -1]
    torch.testing.assert_close(model.logits(IDS), expected, atol=1e-5, rtol=1e-4)
    assert model.hf.config.hidden_size == 32 and {"z", "resid_post"} <= set(model.sites)
    assert not hasattr(model.hf.config, "quantization_config") and not hasattr(model.hf, "hf_quantizer")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_the_tokenizer_in_a_file(name, tmp_path):
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", name)))
    ids = encode(tokenizer, "the cat of Rome").ids
    bos = {"llama": 2, "gemma3": 2, "gpt2": 260, "qwen3": None}[name]  # Qwen names a BOS and never uses it
    assert (ids[0] == bos and bos not in ids[1:]) if bos is not None else 260 not in ids
    vocabulary = SPM if bos == 2 else BPE
    assert ids[bos is not None:][:1] == (vocabulary.index("the"),) or name == "llama"  # Llama puts a space before a text
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "the cat of Rome" and len(tokenizer) == len(vocabulary)


def test_quantized_weights_are_dequantized_and_that_is_said(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", quantize=True)
    model, full = load_model(str(path), device="cpu"), tiny_for_gguf("llama")
    with torch.no_grad(): gap = (model.logits(IDS) - full(IDS).logits[:, -1]).abs().max()
    assert 0 < gap < 0.2 and model.dtype == torch.float32
    assert model.weights_note == "Q8_0, dequantized to float32" and "Q8_0, dequantized to float32" in repr(model)
    assert describe(model)["weights_note"] == model.weights_note
    assert describe(model)["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_model(str(path), device="cpu", dtype="bfloat16").weights_note == "Q8_0, dequantized to bfloat16"


def test_a_folder_with_one_file_is_that_file_and_one_with_two_is_refused(tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama")
    assert load_model(str(tmp_path), device="cpu").weights_note == "F32, read as float32"
    write_gguf(tmp_path / "b.gguf", "llama")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files.*a\.gguf.*b\.gguf"): load_model(str(tmp_path))


def test_a_file_on_the_hub(tmp_path, monkeypatch):
    asked = []
    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        return str(write_gguf(tmp_path / file, "llama"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: None)
    model = load_model("someone/tiny-GGUF:tiny.Q8_0.gguf", device="cpu", revision="v1")
    assert asked == [("someone/tiny-GGUF", "tiny.Q8_0.gguf", "v1")] and model.name == "someone/tiny-GGUF:tiny.Q8_0.gguf"


def test_a_file_on_the_hub_that_is_not_there():
    with pytest.raises(ModelError, match="Hub could not be reached"): load_model("someone/tiny-GGUF:tiny.gguf")


def test_without_gguf_the_remedy_is_named(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", "llama")
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=re.escape("pip install 'bizzaroworld[gguf]'")): load_model(str(path))


@pytest.mark.parametrize("share", [0.999, 0.6, 0.02, 0.001])
def test_a_partial_file_is_refused(share, tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", "llama").read_bytes()
    part = tmp_path / "part.gguf"
    part.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(ModelError, match="damaged|not whole"): read_gguf(part)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"PK\x03\x04 a zip file", b"GGUF" + struct.pack("<IQQ", 9, 1, 1),
                                  b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1 << 40)])
def test_a_damaged_file_is_refused(data, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="damaged"): load_model(str(tmp_path / "m.gguf"))


def test_an_architecture_that_transformers_cannot_read(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lfama"))
    with pytest.raises(ModelError, match="architecture 'lfama'"): load_model(str(path), device="cpu")


def test_a_missing_tensor_would_be_random_and_is_refused(tmp_path):
    with pytest.raises(ModelError, match="would be random"):
        load_model(str(write_gguf(tmp_path / "m.gguf", "llama", leave_out="layers.1.mlp.down_proj")), device="cpu")


def test_a_tensor_that_transformers_leaves_out_is_refused(tmp_path):
    bias = {"blk.0.attn_q.bias": np.ones(32, np.float32)}
    with pytest.raises(ModelError, match=r"it holds .* numbers, and the model"):
        load_model(str(write_gguf(tmp_path / "m.gguf", "llama", more=bias)), device="cpu")


def test_rotary_embeddings_stretched_in_another_way_are_refused(tmp_path):
    other = {"rope_factors_long.weight": np.ones(4, np.float32)}
    with pytest.raises(ModelError, match="rope_factors_long"):
        load_model(str(write_gguf(tmp_path / "m.gguf", "llama", more=other)), device="cpu")
    strange = {"rope_freqs.weight": np.array([1, 9, 2, 8], np.float32)}
    with pytest.raises(ModelError, match="rope_freqs"):
        load_model(str(write_gguf(tmp_path / "n.gguf", "llama", more=strange)), device="cpu")


def test_a_tokenizer_that_does_not_give_texts_back_is_refused(tmp_path):
    file = read_gguf(write_gguf(tmp_path / "m.gguf", "gpt2"))
    tokenizer = room.gguf_tokenizer(file)
    tokenizer.add_tokens(["capital"])
    with pytest.raises(ModelError, match="261 tokens|263 tokens"): room.check_tokenizer(tokenizer, file)
    with pytest.raises(ModelError, match="its BOS is 5"): room.check_tokenizer(_Other(room.gguf_tokenizer(file), bos_token_id=5), file)
    lossy = _Other(room.gguf_tokenizer(file), decode=lambda ids, **_: "the capital of germany")
    with pytest.raises(ModelError, match="into 'the capital of germany'"): room.check_tokenizer(lossy, file)


class _Other:
    """An object with some attributes of another."""
    def __init__(self, base, **other): self.base, self.other = base, other
    def __getattr__(self, name): return self.other[name] if name in self.other else getattr(self.base, name)
    def __len__(self): return len(self.base)
    def __call__(self, *args, **kwargs): return self.base(*args, **kwargs)


def test_an_adapter_beside_a_file_is_not_passed_over(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter beside a GGUF file"): locate(str(tmp_path))
    assert locate(str(tmp_path / "a.gguf")).endswith("a.gguf")
