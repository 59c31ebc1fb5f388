"""The whole study of 60 pairs on an accelerator, at the shapes of Gemma-2B and Gemma-3-12B, with random weights in bf16.

Speed does not depend on what the weights are. The pairs are random tokens, as long as the prompts of the battery (one
token for each word, and one in front) with the entity in the middle. The rivals would take minutes or hours, so they are timed
on a part of the study, that of three pairs (a short one, a middling one, a long one), and scaled up to all patches; the
record says on how many:

- the expert's loop (expert.py), 32 patched prompts in one forward of the bare Hugging Face model, with its attention as it is
  loaded; and the same loop with `--wide` prompts in a forward, since an accelerator has room for more;
- the stock loop, one `run_with_hooks` for each patch, on `--stock` patches.

Before any time counts, all of them must agree within 1e-3 on those patches in float32, all blocks run, with the same weights. In bf16 they
cannot: a product may be rounded differently when other rows are computed at once. So the record holds how far each is from float32,
in logits (root mean square), beside the root mean square of the effects.

Counted beside the times: token-layers (positions times blocks) of the expert's loop and of the sweep, and the operations that no exact
program avoids (floor.py) as a part of what a matrix product of the MLP's shape reaches here.
"""
import argparse
import gc
import resource
import time
from collections import Counter
from importlib.metadata import version
from os.path import commonprefix
from pathlib import Path

import expert
import torch
from floor import operations
from patching import OUT, by_plain_loop, hardware
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import TokenPair
from bizzaroworld.files import write_json
from bizzaroworld.model.hooked import free_bytes
from bizzaroworld.model.load import checked
from bizzaroworld.patch.interventions import positions_of
from bizzaroworld.patch.passes import rows_of
from bizzaroworld.patch.sweep import _same_as, sweep
from bizzaroworld.study.experiments import interventions_of

TOLERANCE = 1e-3  # logits, in float32
# As published in the configuration of google/gemma-2b and of the text model of google/gemma-3-12b-it.
SHAPES = {
    "Gemma-2B": (GemmaForCausalLM, GemmaConfig, dict(
        vocab_size=256_000, hidden_size=2048, intermediate_size=16_384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256)),
    "Gemma-3-12B": (Gemma3ForCausalLM, Gemma3TextConfig, dict(
        vocab_size=262_208, hidden_size=3840, intermediate_size=15_360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256, sliding_window=1024)),
}
KERNELS = {"matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "wgmma", "gemv"), "copies and indexing": ("copy", "cat", "index", "gather", "memcpy", "memset", "scatter"),
           "norms, activations, sums, softmax": ("elementwise", "reduce", "softmax", "vectorized")}


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
        with device: return model_class(config_class(**shape)).eval(), shape
    finally: torch.set_default_dtype(before)


def become(hf_model, dtype: torch.dtype) -> None:
    """Give the weights another type, one after the other; what else a model holds keeps its own."""
    for p in hf_model.parameters(): p.data = p.data.to(dtype)
    gc.collect()
    if p.device.type != "cpu": torch.get_device_module(p.device).empty_cache()


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
    wait = torch.get_device_module(device).synchronize if device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def peak_bytes(device: torch.device) -> int:
    """The most memory held at once: on the device, or by the process."""
    if device.type == "cpu": return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated(device)


def with_hooks(hf_model):
    """The model with hooks, without a hash of its weights: `load_model` makes one, which takes a while for 24 GB."""
    return checked(hf_model, None, type(hf_model).__name__)


def by_expert(hf_model, pairs, study, size: int = 32) -> torch.Tensor:
    """What the expert's loop gives, `pair intervention`."""
    def edits(pair): return [(e.site, e.layer, positions_of(e.position, pair)[0], e.head) for e in (i.edits[0] for i in study)]
    before, expert.SIZE = expert.SIZE, size
    try: return torch.tensor([expert.patch(hf_model, p.clean_ids, p.corrupt_ids, (p.clean_target_id, p.corrupt_target_id), edits(p)) for p in pairs])
    finally: expert.SIZE = before


def by_sweep(model, pairs, study, **limits):
    return sweep(model, pairs, study, progress=False, **limits)


def patched(result) -> torch.Tensor: return torch.tensor(result.patched[:, :, 0])


def by_stock(model, pairs, study) -> torch.Tensor: return torch.tensor([by_plain_loop(model, p, study) for p in pairs])


def in_float32(hf_model, few, study, some) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The largest difference between sweep and rivals in float32, what the sweep gives, and the effects in it.

    Ends the program if they differ by too much."""
    become(hf_model, torch.float32)
    asked = [study[i] for i in some]
    theirs = by_expert(hf_model, few, asked)
    with with_hooks(hf_model) as model:
        result = by_sweep(model, few, study)
        ours, stock = patched(result), by_stock(model, few, asked)
    gap = max((ours[:, some] - other).abs().max().item() for other in (theirs, stock))
    if not gap < TOLERANCE: raise SystemExit(f"Sweep and rivals disagree by {gap:.1e} in float32: no time means anything.")
    become(hf_model, torch.bfloat16)
    return gap, ours, ours - torch.tensor(result.clean)


def token_layers(model, pairs, study) -> dict[str, int]:
    """Positions times blocks, of the expert's loop and of the sweep, both with the runs of the pairs."""
    once = list(dict.fromkeys(_same_as(model, i) for i in study))
    alike = [len(commonprefix([p.clean_ids, p.corrupt_ids])) for p in pairs]
    runs = sum(len(p.clean_ids) for p in pairs) * model.n_layers
    rows = rows_of(model.shape, pairs, pairs, once, alike)
    return {"loop": (len(study) + 1) * runs, "sweep": sum(r.tail * (model.n_layers - r.layer) for r in rows) + 2 * runs}


def product_rate(model, rows: int = 8192) -> float:
    """Operations per second of the MLP's matrix product on random numbers: the median of many."""
    a, b = (torch.randn(shape, device=model.device).to(model.dtype) for shape in ((rows, model.d_model), (model.d_model, model.shape.d_mlp)))
    def ten():
        for _ in range(10): a @ b
    return 20 * a.numel() * b.shape[1] / sorted(timed(ten, model.device)[0] for _ in range(15))[7]


def shares(run, device: torch.device) -> dict[str, float]:
    """Where a run's seconds go: kernels by kind, and the time in which the device does nothing, as shares of the whole."""
    kind = ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[kind]) as seen: whole, _ = timed(run, device)
    seconds = Counter()
    for event in seen.key_averages():
        group = next((g for g, words in KERNELS.items() if any(w in event.key.lower() for w in words)), "other kernels")
        seconds[group] += (event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total) / 1e6
    return {g: round(s / whole, 3) for g, s in seconds.items()} | {"idle": round(max(0.0, 1 - seconds.total() / whole), 3)}


def rms(x) -> float: return float(f"{x.double().square().mean().sqrt().item():.2g}")


def rivals_of(hf_model, few, study, options) -> dict[str, tuple[float, torch.Tensor]]:
    """Seconds and results of the expert's loop on a few pairs, 32 and more prompts a forward."""
    out = {}
    for size in (32, options.wide):
        by_expert(hf_model, few, study[:size], size)
        out[f"expert_{size}"] = timed(lambda: by_expert(hf_model, few, study, size), options.device)
    return out


def timed_sweeps(model, pairs, study, device, limits: dict, times: int) -> tuple[dict, torch.Tensor]:
    """The sweep of all pairs within some limits: seconds (the median after a first run), the peak of memory, the results."""
    by_sweep(model, pairs, study, **limits)
    if device.type != "cpu": torch.get_device_module(device).reset_peak_memory_stats(device)
    done = [timed(lambda: by_sweep(model, pairs, study, **limits), device) for _ in range(times)]
    seconds = sorted(s for s, _ in done)
    return {"seconds": round(seconds[len(seconds) // 2], 3), "slowest": round(seconds[-1], 3), "peak_gib": round(peak_bytes(device) / 2**30, 2)}, done[0][1]


def compared(model, pairs, study, ours, stock, loops, which, some, exact) -> dict:
    """Ratios of times, counts, and how far each is from float32."""
    patches, in_few = len(pairs) * len(study), len(which) * len(study)
    (stock_seconds, stock_values), (result, ours) = stock, ours
    timed_patches = {n: in_few for n in loops} | {"stock": len(which) * len(some)}
    whole = {n: s / timed_patches[n] * patches for n, s in ({n: s for n, (s, _) in loops.items()} | {"stock": stock_seconds}).items()}
    counted, rate = token_layers(model, pairs, study), product_rate(model)
    least = operations(model, pairs, study) / rate
    off = {"sweep": patched(result)[which] - exact, "stock": stock_values - exact[:, some]} | {n: v - exact for n, (_, v) in loops.items()}
    return {"pairs": len(pairs), "interventions": len(study), "patches": patches, **ours, "patches_timed": timed_patches,
            "seconds_scaled_up": {n: round(s, 1) for n, s in whole.items()},
            "times_faster_than": {n: round(s / ours["seconds"], 1) for n, s in whole.items()},
            "token_layers": counted | {"ratio": round(counted["loop"] / counted["sweep"], 2)},
            "product_operations_per_second": float(f"{rate:.3g}"), "floor_seconds": round(least, 3),
            "of_the_floor": round(least / ours["seconds"], 3), "rms_from_float32": {n: rms(x) for n, x in off.items()}}


@torch.no_grad()
def measure(name: str, options, note, save) -> None:
    """Times, peak memory, differences and ratios for one shape; saved as they come."""
    device = options.device
    hf_model, shape = build(name, device, options.layers, options.width)
    pairs = random_pairs(options.pairs, shape["vocab_size"])
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].clean_ids))
    which = sorted({order[len(order) * k // 10] for k in (1, 5, 9)})
    few = [pairs[i] for i in which]
    with with_hooks(hf_model) as model: study = interventions_of(model)
    some = list(range(0, len(study), max(1, len(few) * len(study) // options.stock)))
    note(f"{name}: built, {len(study)} interventions")
    gap, exact, effects = in_float32(hf_model, few, study, some)
    note(f"in float32 all agree within {gap:.1e}")
    loops = rivals_of(hf_model, few, study, options)
    note({n: s for n, (s, _) in loops.items()})
    model = with_hooks(hf_model)
    ours, result = timed_sweeps(model, pairs, study, device, {}, options.times)
    note(ours)
    by_plain_loop(model, pairs[0], study[:1])
    stock = timed(lambda: by_stock(model, few, [study[i] for i in some]), device)
    done = compared(model, pairs, study, (result, ours), stock, loops, which, some, exact)
    done = {"shape": shape, "dtype": "bfloat16", **done, "largest_difference_in_float32": float(f"{gap:.1e}"), "rms_of_effects": rms(effects)}
    note(done)
    save(name, done)
    for more in (shares_of, limits_of):
        done |= more(model, pairs, study, device)
        note(list(done.items())[-1])
        save(name, done)


def shares_of(model, pairs, study, device) -> dict:
    """Where the seconds of a sweep go."""
    return {"shares": shares(lambda: by_sweep(model, pairs, study), device)}


def limits_of(model, pairs, study, device) -> dict:
    """What passes of other sizes cost."""
    free = free_bytes(device)
    limits = {"512 rows": {"max_rows": 512}, "2048 rows": {"max_rows": 2048}, "60% of the memory": {"memory": int(0.6 * free)}}
    return {"limits": {words: timed_sweeps(model, pairs, study, device, limit, 1)[0] for words, limit in limits.items()}}


def card(device: torch.device) -> dict:
    """What the device is, and how it computes float32."""
    if device.type == "cpu": return {"device": "cpu"}
    facts = torch.get_device_module(device).get_device_properties(device)
    return {"device": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1), "cuda": torch.version.cuda,
            "float32_products": torch.get_float32_matmul_precision()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="default: the accelerator that is there")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: all of them")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--stock", type=int, default=200, help="how many patches of the stock loop are timed")
    parser.add_argument("--wide", type=int, default=256, help="prompts in a forward of the expert's second loop")
    parser.add_argument("--times", type=int, default=3, help="how often the sweep is timed")
    parser.add_argument("--layers", type=int, help="fewer layers, for a trial run")
    parser.add_argument("--width", type=int, help="a smaller width, for a trial run")
    parser.add_argument("--out", type=Path, default=OUT / "gpu.json", help="where the results go")
    options = parser.parse_args()
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if options.device is None and found is None:
        return print("There is no accelerator here, so nothing is measured. For a trial run on the CPU: "
                     "--device cpu --layers 4 --width 64 --pairs 4 --out trial.json")
    options.device = torch.device(options.device or found)
    results, start = {}, time.perf_counter()
    def note(what): print(f"[{time.perf_counter() - start:.0f} s]", what, flush=True)
    def save(name, done):
        results[name] = done
        write_json(options.out, {"command": "python benchmarks/gpu.py", "hardware": hardware() | card(options.device), "results": results,
                                 "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}})
    for name in options.shape or SHAPES:
        measure(name, options, note, save)
        gc.collect()
        if options.device.type != "cpu": torch.get_device_module(options.device).empty_cache()


if __name__ == "__main__":
    main()
