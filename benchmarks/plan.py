"""What `bizzaroworld plan` says of a study, and what the study then takes: time, memory, disk.

Each model has a process of its own. First its study is planned, without weights; then it is run, with controls, tables and figures, on one
thread. Time is the processor's, for the rates that the guess is made from as for the study: waiting for other programs does not count. Memory is
the most that the process held. The tests hold the record to a factor of two for time and of 1.3 for memory.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from patching import OUT, hardware

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.files import write_json
from bizzaroworld.pipeline import run_study
from bizzaroworld.scale.needs import measured_rates
from bizzaroworld.study.foreseen import foresee

MODELS = ("bizzaro-nano", "bizzaro-micro", "gemma-3-270m")


def measure(name: str, n: int) -> dict:
    """Plan and run the study of a model on the first `n` pairs of the battery."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        battery, out = Path(folder) / "battery.json", Path(folder) / "run"
        write_json(battery, [{k: v for k, v in vars(pair).items() if v} for pair in load_battery()[:n]])
        needs = foresee(name, battery, device="cpu", rates=False)
        rates = measured_rates(needs.shape, clock=time.process_time)
        work = needs.work
        start = time.process_time()
        run_study(name, battery=battery, out=out, device="cpu")
        seconds = time.process_time() - start
        disk = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return {"parameters": needs.counts.parameters, "pairs": work.pairs, "rows": work.rows, "passes": work.passes, "token_layers": work.token_layers,
            "block": needs.counts.block, "layers": needs.shape.n_layers, "rates": {k: float(f"{v:.3g}") for k, v in vars(rates).items()},
            "predicted": {"seconds": round(rates.seconds(work.token_layers, needs.counts.block, work.passes * needs.shape.n_layers, work.rows), 1),
                          "memory_mib": round(needs.memory / 2**20), "disk_mib": round(needs.folder / 2**20, 1)},
            "measured": {"seconds": round(seconds, 1), "memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
                         "disk_mib": round(disk / 2**20, 1)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24, help="how many pairs of the battery")
    parser.add_argument("--one", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT / "plan-cpu.json", help="where the results go")
    options = parser.parse_args()
    if options.one: return print(json.dumps(measure(options.one, options.pairs)))
    results = {}
    for name in MODELS:
        done = subprocess.run([sys.executable, __file__, "--one", name, "--pairs", str(options.pairs)], capture_output=True, text=True, check=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
    write_json(options.out, {"command": "python benchmarks/plan.py", "clock": "processor", "hardware": hardware() | {"threads": 1}, "results": results,
                             "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}})


if __name__ == "__main__":
    main()
