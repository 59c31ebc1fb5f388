"""Where the time of a sweep goes: a handful of rows for each model, from PyTorch's profiler and from Python's.

One thread; times are the processor's, or of the fastest of several runs, so that other programs show little. Operators
are grouped by what they are; what is left of the whole is Python: modules, hook points and the sweep's own bookkeeping
(the profiler's overhead is in it too). Python's profiler then says in whose functions that part was spent, as shares,
since it slows them all down.
"""
import argparse
import cProfile
import json
import pstats
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from patching import OUT, by_sweep, hardware, subjects, tasks
from torch.profiler import ProfilerActivity, profile

from bizzaroworld.files import write_json

GROUPS = {
    "matrix products of weights": ("mm", "addmm"),
    "attention": ("bmm", "baddbmm", "_softmax"),
    "norms, activations, sums": ("mul", "add", "gelu", "pow", "mean", "rsqrt", "neg", "div", "sub", "sum", "tanh", "sqrt"),
    "copies and indexing": ("copy_", "cat", "index", "_index_put_impl_", "clone", "index_put_", "gather", "index_select"),
}
TASKS = ("experiment 3 + 2B", "the whole study of one pair")


def profiled(run) -> tuple[float, list]:
    """The seconds of one run under PyTorch's profiler, and what it saw."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        run()
        whole = time.perf_counter() - start
    return whole, seen.key_averages()


def by_operator(run, tries: int = 15) -> dict[str, float]:
    """Shares of the whole, by kind of operator, in the fastest of some runs: the one that other programs disturbed least."""
    whole, events = min((profiled(run) for _ in range(tries)), key=lambda done: done[0])
    group = {f"aten::{op}": name for name, ops in GROUPS.items() for op in (*ops, *(f"{o}_" for o in ops))}
    seconds = Counter()
    for event in events: seconds[group.get(event.key, "other operators")] += event.self_cpu_time_total / 1e6
    seconds["Python"] = max(0.0, whole - seconds.total())
    return {name: round(seconds[name] / seconds.total(), 3) for name in (*GROUPS, "other operators", "Python")}


def by_package(run) -> dict[str, float]:
    """Shares of the time in Python functions, by the package that they are in; C functions and operators are left out."""
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(run)
    seconds = Counter()
    for (file, _, _), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():
        package = next((p for p in ("bizzaroworld", "transformer_lens", "transformers", "accelerate", "torch") if f"/{p}/" in file), None)
        if package or file.endswith(".py"): seconds[package or "others"] += own
    return {name: round(s / seconds.total(), 3) for name, s in seconds.most_common()}


def median_seconds(run, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return sorted(times)[repeats // 2]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT / "profile-cpu.json", help="where the results go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for subject, (model, pair) in subjects():
        for task, interventions in tasks(model, pair).items():
            if task not in TASKS: continue
            def run(): by_sweep(model, pair, interventions)
            run()
            results.append({"model": subject, "task": task, "processor_seconds": round(median_seconds(run), 4),
                            "operators": by_operator(run), "python": by_package(run)})
            print(json.dumps(results[-1]), flush=True)
    write_json(options.out, {"command": "python benchmarks/where_time_goes.py", "hardware": hardware(), "results": results,
                             "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}})


if __name__ == "__main__":
    main()
