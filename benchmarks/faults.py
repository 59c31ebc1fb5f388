"""Kill a study at random moments and start it again, as often as asked; every one that ends is compared with one that was not disturbed.

    python benchmarks/faults.py --kills 200

A process that has loaded the model forks (Unix only) for each start, so that nothing is loaded twice; each start is killed at a moment drawn
evenly over the time that the undisturbed study takes, or (by lot) within its first seconds, unless it ends before. What is compared: all tables and the summary to the last bit, and which files there are.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

torch.set_num_threads(1)  # a fork has one thread

from bizzaroworld import pipeline
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.model.load import load_model
from bizzaroworld.pipeline import run_study
from bizzaroworld.scale import units
from patching import hardware

COMPARED = """
import json, sys
from pathlib import Path
import pandas as pd
one, two = map(Path, sys.argv[1:])
for name in ("effects.parquet", "controls.parquet"): pd.testing.assert_frame_equal(pd.read_parquet(one / name), pd.read_parquet(two / name), check_exact=True)
assert json.loads((one / "summary.json").read_text()) == json.loads((two / "summary.json").read_text())
there = [{p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} for folder in (one, two)]
assert there[0] == there[1], there[0] ^ there[1]
"""


def started(seconds: float | None, work) -> bool:
    "Do the work in a copy of this process, killed after so many seconds; whether it came to its end."
    child = os.fork()
    if not child:
        try: work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + (seconds or 1e9)
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended and status: raise SystemExit("A start failed.")
        if ended: return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--kills", type=int, default=200)
    asked.add_argument("--pairs", type=int, default=6)
    asked.add_argument("--unit", type=float, help="Operations of a unit of work: with 1e8 each pair is done in slices.")
    asked.add_argument("--no-figures", action="store_true", help="Draw none, so that most kills fall into the sweeps.")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--out", type=Path, help="Write the record to this file.")
    asked = asked.parse_args()
    if asked.unit: units.UNIT = asked.unit
    if asked.no_figures: pipeline.save_figures = lambda *_: None
    rng, kills, ends, stages = random.Random(asked.seed), 0, 0, {}
    with tempfile.TemporaryDirectory() as name:
        place, model = Path(name), load_model("bizzaro-nano")
        battery = place / "battery.json"
        battery.write_text(json.dumps([asdict(p) for p in load_battery()[::-(-60 // asked.pairs)]]))
        begin = time.monotonic()
        started(None, lambda: run_study(model, battery=battery, out=place / "undisturbed"))
        whole, folder = time.monotonic() - begin, place / "0"
        while kills < asked.kills:
            if not started(rng.uniform(0, whole) if rng.random() < 0.4 else rng.expovariate(1), lambda: run_study(model, battery=battery, out=folder)):
                kills += 1
                stage = next((what for file, what in (("summary.json", "figures"), ("controls.parquet", "summary"), ("effects.parquet", "controls"), ("pairs", "experiments"), ("triage.csv", "before the first unit"),
                                                      ("run.json", "triage")) if (folder / file).exists()), "before the folder is claimed")
                stages[stage] = stages.get(stage, 0) + 1
                continue
            ends += compared(folder, place / "undisturbed")
            folder = place / str(ends)
        started(None, lambda: run_study(model, battery=battery, out=folder))
        ends += compared(folder, place / "undisturbed")
    record = {"what": "a study of bizzaro-nano, killed (SIGKILL) at random moments and started again", "pairs": asked.pairs, "kills": kills, "studies_that_ended": ends,
              "different": 0, "killed_during": stages, "seed": asked.seed, "command": f"python benchmarks/faults.py --kills {asked.kills} --pairs {asked.pairs}" + (f" --unit {asked.unit:g}" if asked.unit else "") + " --no-figures" * asked.no_figures,
              "hardware": hardware(), "versions": {name: version(name) for name in ("bizzaroworld", "torch", "transformers", "transformer-lens")}}
    print(json.dumps(record, indent=1))
    if asked.out: asked.out.write_text(json.dumps(record, indent=1) + "\n")


def compared(folder: Path, whole: Path) -> int:
    "1, if two runs are the same; else the process ends. In another process: one that has read Parquet cannot be forked."
    if os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", COMPARED, str(folder), str(whole)]): raise SystemExit(f"{folder} differs from the run that was not disturbed.")
    return 1


if __name__ == "__main__": main()
