"""The sweep against patching one intervention at a time, side by side: `make bench`.

Every task is run by three contestants in turn: the sweep; `transformer_lens.patching.generic_activation_patch`, as its
documentation shows it; and the plain loop of the original study, one `run_with_hooks` for each patch. Their numbers
must agree within 1e-4 before any time is printed. Each round times all three, so that a slow moment of the machine
hits all of them; the ratio is taken within rounds, and its median, smallest and largest value are reported.
"""
import argparse
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from transformer_lens import patching
from transformers import GemmaConfig, GemmaForCausalLM

from bizzaroworld.experiments import interventions_of
from bizzaroworld.files import write_json
from bizzaroworld.hooked import SITES
from bizzaroworld.interventions import grid, positions_of
from bizzaroworld.models import load_model
from bizzaroworld.pairs import PromptPair, load_battery
from bizzaroworld.sweep import sweep
from bizzaroworld.tokens import TokenPair, align

TOLERANCE = 1e-4
OUT = Path(__file__).resolve().parent.parent / "data" / "benchmarks"
patching.tqdm = lambda rows: rows  # its progress bar is not what is measured


def random_gemma():
    """Gemma-1's shape in small: 18 layers, 8 query heads, 1 key-value head."""
    torch.manual_seed(0)
    return load_model(GemmaForCausalLM(GemmaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=64)))


def random_pair(length: int = 12, entity: int = 5) -> TokenPair:
    """A random prompt and one that differs from it in a single token."""
    g = torch.Generator().manual_seed(0)
    clean = torch.randint(3, 30_000, (length,), generator=g).tolist()
    corrupt = clean[:entity] + [clean[entity] + 1] + clean[entity + 1:]
    words = PromptPair("random", "random", "random", "a b", "a c", " d", " e", "b", "c")
    return TokenPair(words, tuple(clean), tuple(corrupt), 7, 11, (entity, entity + 1))


def subjects():
    """The two models and a pair for each."""
    nano = load_model("bizzaro-nano")
    return {"random Gemma, 18 layers": (random_gemma(), random_pair()), "bizzaro-nano": (nano, align(nano, load_battery()[0]))}


def tasks(model, pair: TokenPair) -> dict:
    """Interventions by task."""
    sets = {"1 + 2A": ["1", "2A"], "3 + 2B": ["3", "2B"], "4": ["4"], "4F": ["4F"]}
    out = {f"experiment {name}": interventions_of(model, names) for name, names in sets.items()}
    out["resid_pre, every position"] = grid(model, "resid_pre", range(len(pair.clean_ids)))
    return out | {"the whole study of one pair": interventions_of(model)}


def ld(pair: TokenPair):
    return lambda logits: logits[0, -1, pair.clean_target_id].float() - logits[0, -1, pair.corrupt_target_id].float()


def where(pair: TokenPair, edit) -> tuple:
    position = positions_of(edit.position, len(pair.clean_ids), pair.entity_span)[0]
    return (slice(None), position) + (() if edit.head is None else (edit.head,))


def by_sweep(model, pair, interventions) -> list[float]:
    return sweep(model, [pair], interventions, progress=False).patched[0, :, 0].tolist()


def donor_cache(model, pair, interventions):
    """The corrupted run's activations at the sites that are patched, and no others."""
    names = {f"blocks.{layer}.{SITES[i.edits[0].site]}" for i in interventions for layer in range(model.n_layers)}
    return model.bridge.run_with_cache(torch.tensor([pair.corrupt_ids], device=model.device), names_filter=lambda n: n in names)[1]


def by_transformer_lens(model, pair, interventions) -> list[float]:
    """`generic_activation_patch`, one call for each site."""
    cache, clean, out = donor_cache(model, pair, interventions), torch.tensor([pair.clean_ids], device=model.device), {}
    for site in dict.fromkeys(i.edits[0].site for i in interventions):
        edits = [i.edits[0] for i in interventions if i.edits[0].site == site]
        def put(act, index, other):
            at = (slice(None), index[1]) + (() if index[2] < 0 else (index[2],))
            act[at] = other[at]
            return act
        rows = pd.DataFrame([(e.layer, where(pair, e)[1], -1 if e.head is None else e.head) for e in edits],
                            columns=["layer", "pos", "head"])
        values = patching.generic_activation_patch(model.bridge, clean, cache, ld(pair), put, site, index_df=rows)
        out |= dict(zip(edits, values.tolist()))
    return [out[i.edits[0]] for i in interventions]


def by_plain_loop(model, pair, interventions) -> list[float]:
    """One `run_with_hooks` for each patch, as in the original study."""
    cache, clean, out = donor_cache(model, pair, interventions), torch.tensor([pair.clean_ids], device=model.device), []
    for edit in (i.edits[0] for i in interventions):
        name, at = f"blocks.{edit.layer}.{SITES[edit.site]}", where(pair, edit)
        def put(act, hook):
            act[at] = cache[name][at]
            return act
        out.append(ld(pair)(model.bridge.run_with_hooks(clean, fwd_hooks=[(name, put)])).item())
    return out


CONTESTANTS = {"sweep": by_sweep, "transformer_lens": by_transformer_lens, "plain_loop": by_plain_loop}


def race(model, pair, interventions, rounds: int) -> dict:
    """Times and ratios of one task, after a check that all contestants agree."""
    values, seconds = {}, {name: [] for name in CONTESTANTS}
    by_sweep(model, pair, interventions)
    for _ in range(rounds):
        for name, contestant in CONTESTANTS.items():
            start = time.perf_counter()
            values[name] = contestant(model, pair, interventions)
            seconds[name].append(time.perf_counter() - start)
    gap = max(abs(a - b) for name in values for a, b in zip(values[name], values["sweep"]))
    if not gap < TOLERANCE: raise SystemExit(f"The contestants disagree by {gap:.1e}: no time means anything.")
    ratios = {name: [s / ours for s, ours in zip(seconds[name], seconds["sweep"])] for name in CONTESTANTS if name != "sweep"}
    spread = lambda x: {"median": round(statistics.median(x), 4), "min": round(min(x), 4), "max": round(max(x), 4)}
    return {"interventions": len(interventions), "largest_difference": float(f"{gap:.1e}"),
            "seconds": {n: spread(s) for n, s in seconds.items()}, "times_faster_than": {n: spread(r) for n, r in ratios.items()}}


def hardware() -> dict:
    """What the numbers were measured on; no names of machines or people."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    return {"processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system()}


def show(results: dict) -> Table:
    """The table that is printed."""
    table = Table(title="Times faster than one run per intervention (median, smallest to largest of the rounds)")
    for head in ("model", "task", "patches", "sweep (s)", "TransformerLens", "plain loop", "difference"): table.add_column(head)
    for subject, done in results.items():
        for task, r in done.items():
            ratio = [f"{v['median']:.0f}x ({v['min']:.0f} to {v['max']:.0f})" for v in r["times_faster_than"].values()]
            table.add_row(subject, task, str(r["interventions"]), f"{r['seconds']['sweep']['median']:.3f}", *ratio,
                          f"{r['largest_difference']:.0e}")
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant runs each task")
    parser.add_argument("--out", type=Path, default=OUT / "patching-cpu.json", help="where the results go")
    options = parser.parse_args()
    results = {name: {task: race(model, pair, interventions, options.rounds) for task, interventions in tasks(model, pair).items()}
               for name, (model, pair) in subjects().items()}
    record = {"command": f"python benchmarks/patching.py --rounds {options.rounds}", "hardware": hardware(),
              "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}, "results": results}
    write_json(options.out, record)
    Console(width=140).print(show(results))


if __name__ == "__main__":
    main()
