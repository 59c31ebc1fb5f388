"""A run's identity: the hash is of what was loaded, the same for the same model, and never of nothing."""
import hashlib
import json
import shutil
import tempfile

import pytest
import torch
from tiny import BUILDERS, random_pair, tiny_hf
from transformers import AutoTokenizer

from bizzaroworld.model import adapters, devices
from bizzaroworld.model.identity import sha256_files, sha256_tensors, weight_files
from bizzaroworld.model.load import load_model
from bizzaroworld.model.names import ModelError, embedded_models


def folder_of(hf, path, **options):
    hf.save_pretrained(path, **options)
    AutoTokenizer.from_pretrained(embedded_models()["bizzaro-nano"]).save_pretrained(path)
    return path


def as_bin(hf, path):
    """A checkpoint as PyTorch saves it."""
    folder_of(hf, path)
    (path / "model.safetensors").unlink()
    torch.save(hf.state_dict(), path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("name", BUILDERS)
def test_a_model_in_memory_is_the_same_model_with_and_without_hooks(name):
    hf = tiny_hf(name)
    bare, first = sha256_tensors(hf), load_model(hf)
    second = load_model(hf)
    assert bare == first.weights_sha256 == second.weights_sha256 == load_model(first.bridge).weights_sha256
    ids = torch.arange(3, 12)[None]
    assert second.bridge is first.bridge and torch.equal(first.logits(ids), second.logits(ids))
    with torch.no_grad(): next(iter(hf.parameters())).add_(1e-3)
    assert load_model(hf).weights_sha256 != bare


def test_a_bridge_whose_weights_were_processed_is_refused():
    bridge = load_model(tiny_hf("gpt2")).bridge
    bridge.compatibility_mode = True
    with pytest.raises(ModelError, match="were processed"): load_model(bridge)
    with pytest.raises(ModelError, match="Linear is no Hugging Face"): load_model(torch.nn.Linear(2, 2))


def test_a_pytorch_checkpoint_has_the_hash_of_its_file(tmp_path):
    a, b = (load_model(str(as_bin(tiny_hf("gemma", seed), tmp_path / str(seed))), device="cpu", allow_pickle=True) for seed in (0, 1))
    assert a.weights_sha256 == hashlib.sha256((tmp_path / "0" / "pytorch_model.bin").read_bytes()).hexdigest() != b.weights_sha256


def test_a_pickle_is_refused_unless_asked_for(tmp_path, monkeypatch):
    folder = as_bin(tiny_hf("gemma"), tmp_path / "p")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model.bin\).*safetensors.*allow_pickle=True"): load_model(str(folder), device="cpu")


def test_no_token_in_a_message(monkeypatch):
    from bizzaroworld.model import load
    monkeypatch.setenv("HF_TOKEN", "hf_marker0123456789")
    def failing(*args, **kwargs): raise OSError("401 for url https://x, headers Authorization: Bearer hf_marker0123456789")
    monkeypatch.setattr(load, "locate", failing)
    with pytest.raises(ModelError, match="401") as error: load_model("some/model")
    assert "hf_marker" not in str(error.value)


def test_shards_are_those_of_the_index_and_other_files_do_not_count(tmp_path):
    folder_of(tiny_hf("gemma"), tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and weight_files(str(tmp_path)) == shards
    expected = hashlib.sha256("\n".join(hashlib.sha256(s.read_bytes()).hexdigest() for s in shards).encode()).hexdigest()
    shutil.copy(shards[0], tmp_path / "other.safetensors")
    assert load_model(str(tmp_path), device="cpu").weights_sha256 == expected == sha256_files(shards)


def test_nothing_has_no_hash():
    with pytest.raises(ModelError, match="No weights"): sha256_files([])
    with pytest.raises(ModelError, match="no tensors"): sha256_tensors(torch.nn.Module())


def test_the_embedded_models_are_those_of_the_committed_runs(repo):
    for name in embedded_models():
        if name == "bizzaro-people": continue  # it cannot be asked the battery
        run = json.loads((repo / "data" / "runs" / name / "run.json").read_text("utf-8"))
        assert load_model(name, device="cpu").weights_sha256 == run["model"]["weights_sha256"]


@pytest.fixture
def adapted(tmp_path):
    """A base, a LoRA adapter for it that changes much, and the base's folder with the adapter in it."""
    peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")
    base = folder_of(tiny_hf("llama"), tmp_path / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_hf("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "both")
    for file in (tmp_path / "adapter").glob("adapter_*"): shutil.copy(file, tmp_path / "both")
    return tmp_path, model.merge_and_unload()


@pytest.mark.parametrize("folder", ["adapter", "both"])
def test_an_adapter_is_merged(folder, adapted):
    path, expected = adapted
    model, base, ids = load_model(str(path / folder), device="cpu"), load_model(str(path / "base"), device="cpu"), torch.arange(3, 12)[None]
    with torch.no_grad(): torch.testing.assert_close(model.logits(ids), expected(ids).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert (model.logits(ids) - base.logits(ids)).abs().max() > 0.1
    assert model.weights_sha256 != base.weights_sha256 and model.weights_note == "adapter merged"


@pytest.mark.parametrize("folder", ["adapter", "both"])
def test_an_adapter_is_refused_without_peft(folder, adapted, monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"holds an adapter.*bizzaroworld\[peft\]"): load_model(str(adapted[0] / folder))


def test_the_device_is_never_mps_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *a, **k: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.as_device(None) == torch.device("cpu") and devices.as_device("mps") == torch.device("mps")


def test_a_device_that_is_not_trusted_is_held_against_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "UNSURE", ("cpu",))
    with pytest.warns(UserWarning, match="agrees with the CPU on one prompt"): devices.moved(tiny_hf("gemma"), torch.device("cpu"))
    hf = tiny_hf("gemma")
    def wrong(device):
        with torch.no_grad(): hf.get_output_embeddings().weight.mul_(1.01)
        return hf
    hf.to = wrong
    with pytest.raises(ModelError, match="differ from the CPU's.*device='cpu'"): devices.moved(hf, torch.device("cpu"))


def test_quantized_checkpoints_are_refused_by_name(tmp_path):
    folder_of(tiny_hf("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="bitsandbytes 4-bit, which runs on a CUDA device only.*GGUF"): load_model(str(tmp_path), device="cpu")


def test_a_model_that_torchao_quantized_in_memory_is_swept_and_told_apart():
    """Eight bits, through transformers: the numbers are near those of the model that it was, and its name and hash say that it is another."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import AutoModelForCausalLM, TorchAoConfig
    from bizzaroworld.patch.interventions import Edit
    from bizzaroworld.patch.sweep import sweep
    with tempfile.TemporaryDirectory() as folder:
        tiny_hf("llama").save_pretrained(folder)
        quantized = load_model(AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), dtype=torch.float32))
    whole, edits = load_model(tiny_hf("llama")), [Edit("resid_pre", 1, "final"), Edit("z", 1, "entity", 0)]
    assert quantized.weights_note == "quantized with torchao" and quantized.weights_sha256 != whole.weights_sha256
    one, other = (sweep(m, [random_pair(1), random_pair(2, 11)], edits, progress=False).patched for m in (quantized, whole))
    assert 0 < abs(one - other).max() < 0.05 * abs(other).max()
