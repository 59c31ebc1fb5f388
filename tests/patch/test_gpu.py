"""What only a GPU can show: the same numbers as on the CPU, in every type; memory that runs out; what is given back.

Products of float32 are computed in float32 here, as PyTorch does unless it is told otherwise (TF32 would err in the fourth digit).
"""
import gc
import warnings

import pytest
import torch
from tiny import BUILDERS, VOCAB, random_pair, tiny_hf
from transformers import LlamaConfig, LlamaForCausalLM

from bizzaroworld.model.hooked import free_bytes
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention, grid
from bizzaroworld.patch.sweep import sweep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
DEVICE = "cuda"
FAMILIES = ("gemma", "gemma-mha", "gemma2", "gemma3", "llama", "gpt2", "qwen3", "pythia")


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 is float32: other settings are put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def swept(name, device, dtype=torch.float32, pairs=None, **limits):
    model = load_model(tiny_hf(name).to(dtype).to(device))
    pairs = pairs or [random_pair(1), random_pair(2)]
    return sweep(model, pairs, grid(model, model.sites, ["final", "entity", 0]), progress=False, **limits)


def largest(a, b): return abs(a - b).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gpu_gives_what_the_cpu_gives_at_every_site(name):
    there, here = swept(name, DEVICE), swept(name, "cpu")
    assert there.interventions == here.interventions
    assert largest(there.patched, here.patched) < 1e-4 and largest(there.clean, here.clean) < 1e-4 and largest(there.corrupt, here.corrupt) < 1e-4
    assert largest(here.patched, here.clean[:, None]) > 0.01, "nothing changes, so agreement shows nothing"


@pytest.mark.parametrize("name", ["gemma", "gemma3", "gpt2"])
def test_prompts_of_several_lengths_and_other_donors(name):
    """Padding on the left, and donors that are longer than what they are put into."""
    pairs = [random_pair(1, 9), random_pair(2, 12, (4, 6)), random_pair(3, 7, (2, 4))]
    alone = [swept(name, DEVICE, pairs=[p]) for p in pairs]
    for limits in ({}, {"max_rows": 7}, {"max_pairs": 2}):
        together = swept(name, DEVICE, pairs=pairs, **limits)
        assert largest(together.patched, swept(name, "cpu", pairs=pairs).patched) < 1e-4
        for k, one in enumerate(alone): assert largest(together.patched[k], one.patched[0]) < 1e-4
    asked, found = [Intervention((Edit(s, 1, "final"),)) for s in ("resid_pre", "z", "mlp_out")], []
    for device in (DEVICE, "cpu"):
        found.append(sweep(load_model(tiny_hf(name).to(device)), pairs, asked, "denoising", donors=pairs[::-1], progress=False).patched)
    assert largest(*found) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "llama", "gpt2"])
def test_half_precision_is_near_float32(name, dtype):
    """bf16 has three digits, fp16 four. Padded batches too: what is masked gives no NaN."""
    pairs = [random_pair(1, 9), random_pair(2, 12, (4, 6))]
    half, whole = swept(name, DEVICE, dtype, pairs), swept(name, "cpu", pairs=pairs)
    def rms(x): return (x**2).mean()**0.5
    assert rms(half.patched - whole.patched) < (0.03 if dtype == torch.bfloat16 else 0.003) * rms(whole.patched)


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_values_that_are_given_or_added(name):
    """A vector made on the CPU goes where the model is."""
    vector, found = torch.randn(32, generator=torch.Generator().manual_seed(0)), []
    edits = [Edit("resid_mid", 1, "final", source=source) for source in ("given", "added", "zero")]
    for device in (DEVICE, "cpu"):
        model = load_model(tiny_hf(name).to(device))
        found.append(sweep(model, [random_pair(1)], edits, values={e: vector for e in edits[:2]}, metrics=("ld", "kl"), progress=False).patched)
    assert largest(*found) < 1e-4


def wide_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=1024, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=8,
                                        num_key_value_heads=8)).eval()


def test_what_does_not_fit_is_run_in_halves():
    """A pass that asks for more than there is gives the same numbers in parts, with a warning, and only then."""
    model, pairs = load_model(wide_llama().to(DEVICE)), [random_pair(k, 24, (3, 5)) for k in range(16)]
    asked = grid(model, ["resid_pre", "z", "mlp_out"], [3, "final"])
    def run(): return sweep(model, pairs, asked, max_rows=10**6, memory=2**50, progress=False).patched
    expected = sweep(model, pairs, asked, max_rows=64, progress=False).patched
    gc.collect(), torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert largest(run(), expected) < 1e-4
    peak = torch.cuda.max_memory_reserved()
    gc.collect(), torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held + (peak - held) * 0.4) / total)
    try:
        with pytest.warns(UserWarning, match="do not fit into memory; trying half as many"): assert largest(run(), expected) < 1e-4
    finally: torch.cuda.set_per_process_memory_fraction(1.0)


def test_where_nothing_fits_the_error_is_torchs_own_and_the_model_lives_on():
    model, pair = load_model(wide_llama().to(DEVICE)), random_pair(1, 24, (3, 5))
    asked = grid(model, ["resid_pre"], ["final"])
    expected = sweep(model, pair, asked, progress=False).patched
    gc.collect(), torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError): sweep(model, random_pair(2, 4096, (3, 5)), asked, progress=False)
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    assert largest(sweep(model, pair, asked, progress=False).patched, expected) < 1e-6


def test_free_memory_counts_what_torch_holds_and_does_not_use():
    gc.collect(), torch.cuda.empty_cache()
    device = torch.device(DEVICE)
    before, size = free_bytes(device), 2**28
    held = torch.empty(size, dtype=torch.uint8, device=device)
    during = free_bytes(device)
    del held
    assert abs(before - during - size) < 2**25 and abs(before - free_bytes(device)) < 2**25
    assert 0 < before <= torch.cuda.get_device_properties(0).total_memory


def test_a_model_is_loaded_onto_the_gpu():
    there, by_itself = load_model("bizzaro-nano", device=DEVICE), load_model("bizzaro-nano")
    assert {m.device.type for m in (there, by_itself)} == {DEVICE} and load_model("bizzaro-nano", device="cpu").device.type == "cpu"
    assert there.weights_sha256 == load_model("bizzaro-nano", device="cpu").weights_sha256
    ids = torch.tensor([[2, 10, 11]])
    torch.testing.assert_close(there.logits(ids).cpu(), load_model("bizzaro-nano", device="cpu").logits(ids), atol=1e-4, rtol=0)
    assert load_model(tiny_hf("llama").to(DEVICE)).weights_sha256 == load_model(tiny_hf("llama")).weights_sha256


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_a_model_on_the_gpu_is_given_back(name):
    hf_model, ids = tiny_hf(name).to(DEVICE), torch.tensor([[5, 9, 11, 20]], device=DEVICE)
    before, names = hf_model(ids).logits, list(hf_model.state_dict())
    with load_model(hf_model) as model: sweep(model, [random_pair(1)], grid(model, ["resid_pre", "z"], ["final"]), progress=False)
    assert list(hf_model.state_dict()) == names and all(p.device.type == DEVICE for p in hf_model.parameters())
    assert torch.equal(hf_model(ids).logits, before)


def test_all_families_are_known():
    assert set(FAMILIES) <= set(BUILDERS)
