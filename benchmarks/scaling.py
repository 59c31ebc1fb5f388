"""How the time and memory of a sweep grow: with layers, prompt length, interventions and pairs.

Each setting runs in a process of its own, so that its peak memory is its own. Time is the processor's, on one thread:
waiting for other programs does not count. It is the median of three sweeps, of fewer where these take seconds. Each setting runs twice:
glibc keeps freed blocks of some megabytes in pieces that later ones do not fit into, so a second process gives them back at once
(MALLOC_MMAP_THRESHOLD_). Its peak is what the sweep holds; the first one's is what the process takes as it comes. Beside them stands what `forecast` says before: token-layers (for each row of each pass, the positions that are run times the blocks from its
first edit on, and the base runs), rows, passes, and the memory of a pass, for a budget of 256 MiB. If nothing else cost
anything, time would be proportional to the token-layers. Longer prompts get fewer interventions, as each setting says.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from patching import OUT, hardware
from transformers import GemmaConfig, GemmaForCausalLM

from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.battery.tokens import TokenPair
from bizzaroworld.files import write_json
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.forecast import _same_as, forecast
from bizzaroworld.patch.interventions import Intervention, grid
from bizzaroworld.patch.sweep import sweep

USUAL = {"layers": 18, "length": 16, "interventions": 200, "pairs": 2}
GROW = {"layers": (6, 18, 48), "length": (8, 32, 128, 512, 1000), "interventions": (10, 100, 1000, 20_000), "pairs": (1, 8, 60)}
FEWER = {512: 50, 1000: 25}  # interventions on prompts of so many tokens
BUDGET = 2**28


def settings() -> list[dict]:
    """The usual setting with one number changed at a time."""
    return [{"grows": what, **USUAL, "interventions": FEWER.get(value, USUAL["interventions"]), what: value}
            for what, values in GROW.items() for value in values]


def random_pairs(n: int, length: int) -> list[TokenPair]:
    """Pairs of random prompts that differ in the token in the middle."""
    g = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(n):
        clean = torch.randint(3, 4000, (length,), generator=g).tolist()
        corrupt = clean[:length // 2] + [clean[length // 2] + 1] + clean[length // 2 + 1:]
        words = PromptPair("a b", "a c", " d", " e", "b", "c", f"random-{i}", "random")
        pairs.append(TokenPair(words, tuple(clean), tuple(corrupt), 7, 11, (length // 2, length // 2 + 1)))
    return pairs


def asked_for(model, length: int, n: int) -> list[Intervention]:
    """Evenly from everything that can be patched at up to 128 positions, each state of the stream once; then two edits at a time."""
    single = list(dict.fromkeys(_same_as(model, i) for source in ("donor", "zero")
                                for i in grid(model, model.sites, range(0, length, -(-length // 128)), source=source)))
    everything = single + [Intervention(a.edits + b.edits) for a, b in zip(single, single[1:])] * (n > len(single))
    return [everything[i * len(everything) // n] for i in range(n)]


@torch.no_grad()
def measure(s: dict) -> dict:
    """Time and memory of one setting; interventions are taken evenly from everything that can be patched at any position."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = load_model(GemmaForCausalLM(GemmaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=s["layers"], num_attention_heads=4,
        num_key_value_heads=1, head_dim=64)))
    pairs = random_pairs(s["pairs"], s["length"])
    interventions = asked_for(model, s["length"], s["interventions"])
    sweep(model, random_pairs(1, 8), asked_for(model, 8, 10), memory=BUDGET, progress=False)  # small: what it takes is not counted
    before, seconds = psutil.Process().memory_info().rss, []
    while len(seconds) < 3 and sum(seconds) < 3:
        start = time.process_time()
        sweep(model, pairs, interventions, memory=BUDGET, progress=False)
        seconds.append(time.process_time() - start)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.process_time()
    said = forecast(model, pairs, interventions, memory=BUDGET)
    return {**s, "seconds": round(statistics.median(seconds), 3), "planning": round(time.process_time() - start, 3),
            "peak_mib": round((peak - before) / 2**20), "forecast_mib": round(said.bytes_a_pass / 2**20),
            "rows": said.rows, "passes": said.passes, "token_layers": said.token_layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT / "scaling-cpu.json", help="where the results go")
    options = parser.parse_args()
    if options.one: return print(json.dumps(measure(options.one)))
    results = []
    for s in settings():
        def run(**env): return json.loads(subprocess.run([sys.executable, __file__, "--one", json.dumps(s)], capture_output=True, text=True, check=True,
                                                         env={**os.environ, **env}).stdout.splitlines()[-1])
        usual, tidy = run(), run(MALLOC_MMAP_THRESHOLD_="262144")
        results.append({**usual, "peak_mib": tidy["peak_mib"], "process_mib": usual["peak_mib"]})
        print(results[-1], flush=True)
    write_json(options.out, {"command": "python benchmarks/scaling.py", "hardware": hardware() | {"threads": 1}, "budget_mib": BUDGET // 2**20, "results": results,
                             "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}})


if __name__ == "__main__":
    main()
