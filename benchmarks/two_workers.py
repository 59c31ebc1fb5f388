"""Two workers against one on this machine: the same units of a study, each worker with one thread, in turn, and what the simulation says of it.

A unit is two pairs with all experiments of the study. Workers are there, and have the model, before the clock starts; how long that took is in the record. The
numbers of all rounds must be the same to 1e-4 logits before a ratio is written. The units' seconds, from one worker, go into `scale.simulate`, which knows of no
worker that is in another's way: what is missing from its ratio is the price of shared memory and caches.
"""
import argparse
import statistics
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from patching import OUT, hardware

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.triage import triage
from bizzaroworld.files import write_json
from bizzaroworld.model.load import load_model
from bizzaroworld.scale.processes import Processes, Source
from bizzaroworld.scale.simulate import Cluster, simulate
from bizzaroworld.scale.units import read_pairs, sweep_missing
from bizzaroworld.study.experiments import sweep_experiments

TOLERANCE, AT_ONCE, WORKERS = 1e-4, 2, (1, 2)


def timed(crew, pairs, recipe) -> tuple[dict, object]:
    """Seconds until the workers have swept a pair each, seconds of all units, when each unit was done, and the rows."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        for _ in crew.run(recipe, [[tp] for tp in pairs[:crew.n]]): pass
        ready, moments = time.perf_counter(), []
        sweep_missing(pairs, Path(folder), recipe, crew, at_once=AT_ONCE, advance=lambda *_: moments.append(time.perf_counter()))
        return {"begin": ready - begin, "seconds": moments[-1] - ready, "units": [b - a for a, b in zip([ready, *moments], moments[:-1])]}, read_pairs(Path(folder), pairs)


def measure(name: str, n: int, rounds: int) -> dict:
    """All rounds: one worker, then two."""
    model = load_model(name, device="cpu")
    pairs = triage(model, load_battery()).golden("C")[:n]
    recipe, found, first = partial(sweep_experiments, direction="noising", max_rows=8192), {w: [] for w in WORKERS}, None
    for _ in range(rounds):
        for w in WORKERS:
            torch.set_num_threads(w)  # they share these
            with Processes(Source(name, "cpu", weights_sha256=model.weights_sha256), w) as crew: took, rows = timed(crew, pairs, recipe)
            first = rows if first is None else first
            difference = float((rows.patched - first.patched).abs().max())
            assert difference < TOLERANCE and (rows.intervention == first.intervention).all(), f"{w} workers give other numbers: {difference}"
            found[w].append(took | {"difference": difference})
            print(f"{w} workers: {took['seconds']:.1f} s", flush=True)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(found[1], found[2])]
    units = [statistics.median(r["units"][i] for r in found[1]) for i in range(len(found[1][0]["units"]))]
    one, two = (simulate(units, Cluster(w)).makespan for w in WORKERS)
    return {"model": name, "pairs": len(pairs), "units": len(units), "rows": len(first), "begin": {w: [round(r["begin"], 1) for r in found[w]] for w in WORKERS},
            "seconds": {w: [round(r["seconds"], 2) for r in found[w]] for w in WORKERS}, "difference": max(r["difference"] for some in found.values() for r in some),
            "times_faster": {"median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2), "max": round(max(ratios), 2)}, "simulated": round(one / two, 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m", help="a model by name")
    parser.add_argument("--pairs", type=int, default=16, help="how many pairs of the battery")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    parser.add_argument("--out", type=Path, default=OUT / "workers-cpu.json", help="where the record goes")
    args = parser.parse_args()
    record = {"command": "python benchmarks/two_workers.py", "hardware": hardware() | {"threads": "one for each worker"},
              "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}, **measure(args.model, args.pairs, args.rounds)}
    write_json(args.out, record)
    print(record["times_faster"], "simulated", record["simulated"])
