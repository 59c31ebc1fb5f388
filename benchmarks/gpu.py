"""The whole study of 60 pairs on an accelerator, at the shapes of Gemma-2B and Gemma-3-12B, with random weights in bf16.

Speed does not depend on what the weights are. The pairs are random tokens, as long as the prompts of the battery (one
token for each word, and one in front) with the entity in the middle. The stock loop, one `run_with_hooks` for each
patch, would take hours: it is timed on `--stock` patches, taken evenly from the study of the first pairs, and scaled up
to the number of patches of all; the record says so. Reported beside the times: the largest difference between the two, in
logits and as a part of the largest effect (in bf16 a product may be rounded differently when more rows are computed at once).
"""
import argparse
import resource
import time
from importlib.metadata import version
from pathlib import Path

import torch
from patching import OUT, by_plain_loop, hardware
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import TokenPair
from bizzaroworld.files import write_json
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.study.experiments import interventions_of

# As published in the configuration of google/gemma-2b and of the text model of google/gemma-3-12b-it.
SHAPES = {
    "Gemma-2B": (GemmaForCausalLM, GemmaConfig, dict(
        vocab_size=256_000, hidden_size=2048, intermediate_size=16_384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256)),
    "Gemma-3-12B": (Gemma3ForCausalLM, Gemma3TextConfig, dict(
        vocab_size=262_208, hidden_size=3840, intermediate_size=15_360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256, sliding_window=1024)),
}


def build(name: str, device: torch.device, layers: int | None, width: int | None):
    """A random model of a published shape, or of one with fewer layers or another width (its MLP and heads scaled)."""
    model_class, config_class, shape = SHAPES[name]
    if layers: shape = shape | {"num_hidden_layers": layers}
    if width:
        part = width / shape["hidden_size"]
        shape = shape | {"hidden_size": width, "intermediate_size": int(shape["intermediate_size"] * part),
                         "head_dim": max(8, int(shape["head_dim"] * part)), "vocab_size": 4096}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device: return model_class(config_class(**shape)), shape
    finally: torch.set_default_dtype(before)


def random_pairs(n: int, vocabulary: int) -> list[TokenPair]:
    """Pairs of random tokens with the lengths of the battery's prompts."""
    g, out = torch.Generator().manual_seed(0), []
    for words in load_battery()[:n]:
        length = len(words.clean_prompt.split()) + 1
        clean, middle = torch.randint(10, min(vocabulary, 4000), (length,), generator=g).tolist(), length // 2
        corrupt = clean[:middle] + [clean[middle] + 1] + clean[middle + 1:]
        out.append(TokenPair(words, tuple(clean), tuple(corrupt), 7, 11, (middle, middle + 1)))
    return out


def timed(run, device: torch.device) -> tuple[float, object]:
    """Seconds and result, with the device's queue empty before and after."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def peak_bytes(device: torch.device) -> int:
    """The most memory held at once: on the device, or by the process."""
    if device.type == "cpu": return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


@torch.no_grad()
def measure(name: str, options) -> dict:
    """Time, peak memory and the ratio to the stock loop, for one shape."""
    hf_model, shape = build(name, options.device, options.layers, options.width)
    model = load_model(hf_model)
    pairs, study = random_pairs(options.pairs, shape["vocab_size"]), interventions_of(model)
    sweep(model, pairs[:1], study, progress=False)
    if options.device.type != "cpu": torch.accelerator.reset_peak_memory_stats(options.device)
    seconds, result = timed(lambda: sweep(model, pairs, study, progress=False), options.device)
    peak = peak_bytes(options.device)
    few = range(min(3, len(pairs)))
    some = list(range(0, len(study), max(1, len(few) * len(study) // options.stock)))
    by_plain_loop(model, pairs[0], study[:1])
    stock, values = timed(lambda: [by_plain_loop(model, pairs[p], [study[i] for i in some]) for p in few], options.device)
    gap = (torch.tensor(values) - torch.tensor(result.patched[:len(few)][:, some, 0])).abs().max().item()
    effect = abs(result.patched - result.clean[:, None]).max()
    timed_patches, patches = len(few) * len(some), len(pairs) * len(study)
    whole = stock / timed_patches * patches
    return {"shape": shape, "dtype": "bfloat16", "pairs": len(pairs), "interventions": len(study), "patches": patches,
            "seconds": round(seconds, 3), "peak_gib": round(peak / 2**30, 2), "stock_patches_timed": timed_patches,
            "stock_seconds_scaled_up": round(whole, 1), "times_faster_than_plain_loop": round(whole / seconds, 1),
            "largest_difference": float(f"{gap:.1e}"), "of_the_largest_effect": float(f"{gap / effect:.1e}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="default: the accelerator that is there")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: all of them")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--stock", type=int, default=200, help="how many patches of the stock loop are timed")
    parser.add_argument("--layers", type=int, help="fewer layers, for a trial run")
    parser.add_argument("--width", type=int, help="a smaller width, for a trial run")
    parser.add_argument("--out", type=Path, default=OUT / "gpu.json", help="where the results go")
    options = parser.parse_args()
    found = torch.accelerator.current_accelerator(check_available=True)
    if options.device is None and found is None:
        return print("There is no accelerator here, so nothing is measured. For a trial run on the CPU: "
                     "--device cpu --layers 4 --width 64 --pairs 4 --out trial.json")
    options.device = torch.device(options.device or found)
    results = {}
    for name in options.shape or SHAPES:
        results[name] = measure(name, options)
        print(name, results[name], flush=True)
    chip = hardware() | {"device": options.device.type if options.device.type == "cpu" else
                         torch.get_device_module(options.device).get_device_name(options.device)}
    write_json(options.out, {"command": "python benchmarks/gpu.py", "hardware": chip, "results": results,
                             "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}})


if __name__ == "__main__":
    main()
