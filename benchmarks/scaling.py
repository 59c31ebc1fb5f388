"""How the time and memory of a sweep grow: with layers, prompt length, interventions and pairs.

Each setting runs in a process of its own, so that its peak memory is its own. Time is the processor's, on one thread:
waiting for other programs does not count. It is the median of three sweeps, of fewer where these take seconds. Beside it
stands the number of token-layers that the sweep cannot avoid: for each row, the positions it runs times the blocks from
its first edit on, plus two whole runs of each pair. If nothing else cost anything, time would be proportional to it.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import psutil
import torch
from patching import OUT, hardware
from transformers import GemmaConfig, GemmaForCausalLM

from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.battery.tokens import TokenPair
from bizzaroworld.files import write_json
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch.passes import rows_of
from bizzaroworld.patch.sweep import _same_as, sweep

USUAL = {"layers": 18, "length": 16, "interventions": 200, "pairs": 2}
GROW = {"layers": (6, 12, 24, 48), "length": (8, 16, 32, 64, 128), "interventions": (10, 100, 1000, 10_000),
        "pairs": (1, 2, 8, 60)}


def settings() -> list[dict]:
    """The usual setting with one number changed at a time."""
    return [{"grows": what, **USUAL, what: value} for what, values in GROW.items() for value in values]


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


def token_layers(model, pairs, interventions) -> int:
    """Positions times blocks that have to be computed."""
    rows = rows_of(model.shape, pairs, pairs, interventions)
    return sum(r.tail * (model.n_layers - r.layer) for r in rows) + sum(2 * len(p.clean_ids) * model.n_layers for p in pairs)


@torch.no_grad()
def measure(s: dict) -> dict:
    """Time and memory of one setting; interventions are taken evenly from everything that can be patched at any position."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = load_model(GemmaForCausalLM(GemmaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=s["layers"], num_attention_heads=4,
        num_key_value_heads=1, head_dim=64)))
    pairs = random_pairs(s["pairs"], s["length"])
    # A state of the stream has several names; each intervention is taken once.
    everything = list(dict.fromkeys(_same_as(model, i) for source in ("donor", "zero")
                                    for i in grid(model, model.sites, range(s["length"]), source=source)))
    step = max(1, len(everything) // s["interventions"])
    interventions = list(islice(everything, 0, None, step))[:s["interventions"]]
    sweep(model, pairs[:1], interventions[:10], progress=False)
    before, seconds = psutil.Process().memory_info().rss, []
    while len(seconds) < 3 and sum(seconds) < 3:
        start = time.process_time()
        sweep(model, pairs, interventions, progress=False)
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**s, "interventions": len(interventions), "seconds": round(statistics.median(seconds), 3),
            "peak_mib": round((peak - before) / 2**20), "token_layers": token_layers(model, pairs, interventions)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT / "scaling-cpu.json", help="where the results go")
    options = parser.parse_args()
    if options.one: return print(json.dumps(measure(options.one)))
    results = []
    for s in settings():
        done = subprocess.run([sys.executable, __file__, "--one", json.dumps(s)], capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    write_json(options.out, {"command": "python benchmarks/scaling.py", "hardware": hardware() | {"threads": 1}, "results": results,
                             "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}})


if __name__ == "__main__":
    main()
