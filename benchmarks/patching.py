"""The sweep against patching one intervention at a time, side by side: `make bench`.

Every task is run by five contestants in turn: the sweep; `transformer_lens.patching.generic_activation_patch`, as its
documentation shows it; the plain loop of the original study, one `run_with_hooks` for each patch; the loop that an
expert writes (expert.py), 32 patched prompts in a forward of the bare model and the logits of the final position only; and nnsight with batched invokes
(with_nnsight.py), a process in its own environment, left out where that environment is not there.
Their numbers must agree within 1e-4 before any time is printed. Each round times all of them, so that a slow moment of
the machine hits all; the ratio is taken within rounds, and its median, smallest and largest value are reported. Beside
the times stands the floor: what the sweep cannot avoid (floor.py).

A time is taken over at least half a second. Wall time is taken on all cores, up to `--tries` times, until other
programs used less than a twentieth of the machine meanwhile; how much they used in the try that counts is in the record.
Where that does not happen, `--clock processor` counts the processor's time for each contestant on one thread: waiting for
other programs does not count, though they still take their part of the caches and of the memory's bandwidth.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import expert
import pandas as pd
import psutil
import torch
from floor import floor, machine
from rich.console import Console
from rich.table import Table
from transformer_lens import patching
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.battery.tokens import TokenPair, align
from bizzaroworld.files import write_json
from bizzaroworld.model.gguf import gguf_config, gguf_model, read_gguf
from bizzaroworld.model.hooked import SITES
from bizzaroworld.model.load import embedded_models, load_model
from bizzaroworld.model.names import ModelError, locate
from bizzaroworld.patch.interventions import grid, positions_of
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.study.experiments import interventions_of

TOLERANCE = 1e-4
QUIET = 0.05  # of all cores, used by other programs
HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "data" / "benchmarks"
NNSIGHT = HERE.parent / ".venv-nnsight"
GEMMA, NANO, REAL = "random Gemma, 18 layers", "bizzaro-nano", "gemma-3-270m"
# How many times faster than TransformerLens's stock loop the sweep has to be, on two CPU cores.
BARS = {GEMMA: {"experiment 1 + 2A": 30, "experiment 3 + 2B": 15, "experiment 4": 15, "experiment 4F": 15,
                "the whole study of one pair": 20}}
patching.tqdm = lambda rows: rows  # its progress bar is not what is measured


def random_gemma() -> GemmaForCausalLM:
    """Gemma-1's shape in small: 18 layers, 8 query heads, 1 key-value head."""
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=64))


def random_pair(length: int = 12, entity: int = 5) -> TokenPair:
    """A random prompt and one that differs from it in a single token."""
    g = torch.Generator().manual_seed(0)
    clean = torch.randint(3, 30_000, (length,), generator=g).tolist()
    corrupt = clean[:entity] + [clean[entity] + 1] + clean[entity + 1:]
    words = PromptPair("a b", "a c", " d", " e", "b", "c", "random", "random")
    return TokenPair(words, tuple(clean), tuple(corrupt), 7, 11, (entity, entity + 1))


def bare(subject: str):
    """A subject's model without hooks; the real one is dequantized."""
    if subject == GEMMA: return random_gemma().eval()
    if subject == NANO: return AutoModelForCausalLM.from_pretrained(embedded_models()[NANO], dtype=torch.float32).eval()
    file = read_gguf(Path(locate(REAL)))
    return gguf_model(file, gguf_config(file), torch.float32).eval()


def subjects(only: str = ""):
    """The models whose names begin like `only`, with a pair for each, one at a time. The real one is left out where it is not installed."""
    def of_battery(name):
        model = load_model(name)
        return model, align(model, load_battery()[0])
    if GEMMA.startswith(only): yield GEMMA, (load_model(random_gemma()), random_pair())
    if NANO.startswith(only): yield NANO, of_battery(NANO)
    if REAL.startswith(only):
        try: yield REAL, of_battery(REAL)
        except ModelError as error: print(f"{REAL} is left out: {error}", flush=True)


def tasks(model, pair: TokenPair) -> dict:
    """Interventions by task."""
    sets = {"1 + 2A": ["1", "2A"], "3 + 2B": ["3", "2B"], "4": ["4"], "4F": ["4F"]}
    out = {f"experiment {name}": interventions_of(model, names) for name, names in sets.items()}
    if model.d_vocab < 2**17: out["resid_pre, every position"] = grid(model, "resid_pre", range(len(pair.clean_ids)))  # else it takes the rivals minutes
    return out | {"the whole study of one pair": interventions_of(model)}


def ld(pair: TokenPair):
    return lambda logits: logits[0, -1, pair.clean_target_id].float() - logits[0, -1, pair.corrupt_target_id].float()


def where(pair: TokenPair, edit) -> tuple:
    position = positions_of(edit.position, pair)[0]
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


def by_experts_loop(bare):
    """What an expert writes (expert.py), on the bare Hugging Face model."""
    def run(model, pair, interventions) -> list[float]:
        edits = [(e.site, e.layer, where(pair, e)[1], e.head) for e in (i.edits[0] for i in interventions)]
        return expert.patch(bare, pair.clean_ids, pair.corrupt_ids, (pair.clean_target_id, pair.corrupt_target_id), edits)
    return run


def nnsight_version() -> str | None:
    """The version in nnsight's environment; None if the environment is not there, or not whole."""
    python = NNSIGHT / "bin" / "python"
    if not python.exists(): return None
    asked = [python, "-c", "from importlib.metadata import version; print(version('nnsight'))"]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    return done.stdout.strip() if done.returncode == 0 else None


@contextmanager
def nnsight(folder: Path):
    """A contestant in another process, which has loaded a model folder; its time includes the pipe's fraction of a millisecond."""
    command = [NNSIGHT / "bin" / "python", HERE / "with_nnsight.py", folder, str(torch.get_num_threads())]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet) as process:
        def answer():
            line = process.stdout.readline()
            if not line: raise SystemExit("The nnsight process ended; its message stands above.")
            return json.loads(line)

        def by_nnsight(model, pair, interventions) -> list[float]:
            edits = [[e.site, e.layer, where(pair, e)[1], e.head] for e in (i.edits[0] for i in interventions)]
            request = {"clean": pair.clean_ids, "corrupt": pair.corrupt_ids, "edits": edits,
                       "targets": [pair.clean_target_id, pair.corrupt_target_id]}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return answer()
        answer()
        try: yield by_nnsight
        finally: process.stdin.close()


@contextmanager
def contestants(subject: str):
    """Who takes part, by name; nnsight gets the same weights in a folder."""
    found = {"sweep": by_sweep, "transformer_lens": by_transformer_lens, "plain_loop": by_plain_loop, "batched_loop": by_experts_loop(bare(subject))}
    with ExitStack() as stack:
        if nnsight_version():
            folder = embedded_models().get(subject)
            if folder is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                bare(subject).save_pretrained(folder)
            found["nnsight"] = stack.enter_context(nnsight(folder))
        yield found


def used() -> tuple[float, float, float]:
    """Seconds: on the clock, of the processors by this program and those it started, and of the processors by all."""
    parts = psutil.cpu_times()
    children = [c.cpu_times() for c in psutil.Process().children(recursive=True)]
    own = time.process_time() + sum(c.user + c.system for c in children)
    return time.perf_counter(), own, sum(parts) - parts.idle - getattr(parts, "iowait", 0.0)


def timed(run, clock: str, tries: int) -> tuple[list[float], float, float]:
    """What `run` returns, its seconds, and the share of the machine that other programs had; the quietest of the tries."""
    best = None
    for _ in range(tries):
        before, repeats = used(), 0
        while not repeats or time.perf_counter() - before[0] < 0.5: values, repeats = run(), repeats + 1
        wall, own, everyone = (b - a for a, b in zip(before, used()))
        others = max(0.0, everyone - own) / (wall * os.cpu_count())
        if best is None or others < best[2]: best = values, (wall if clock == "wall" else own) / repeats, others
        if others < QUIET or clock == "processor": break
    return best


def check_equal(values: dict[str, list[float]]) -> float:
    """The largest difference between the sweep and another contestant; ends the program if it is too large."""
    gap = max(abs(a - b) for theirs in values.values() for a, b in zip(theirs, values["sweep"], strict=True))
    if not gap < TOLERANCE: raise SystemExit(f"The contestants disagree by {gap:.1e}: no time means anything.")
    return gap


def race(running: dict, model, pair, interventions, rounds: int, options) -> dict:
    """Times and ratios of one task, after a check that all contestants agree."""
    values, seconds, others = {}, {name: [] for name in running}, 0.0
    for contestant in running.values(): contestant(model, pair, interventions[:2])
    by_sweep(model, pair, interventions)
    for _ in range(rounds):
        for name, contestant in running.items():
            values[name], took, busy = timed(lambda: contestant(model, pair, interventions), options.clock, options.tries)
            seconds[name].append(took)
            others = max(others, busy)
    gap = check_equal(values)
    ratios = {name: [s / ours for s, ours in zip(seconds[name], seconds["sweep"])] for name in running if name != "sweep"}
    spread = lambda x: {"median": round(statistics.median(x), 4), "min": round(min(x), 4), "max": round(max(x), 4)}
    return {"interventions": len(interventions), "largest_difference": float(f"{gap:.1e}"), "other_programs": round(others, 2),
            "seconds": {n: spread(s) for n, s in seconds.items()}, "times_faster_than": {n: spread(r) for n, r in ratios.items()}}


def tested(subject: str, model, pair, options) -> dict:
    """The tasks of a subject, with their bars and floors."""
    can, results = machine(model), {}
    rounds = 1 if subject == REAL else options.rounds  # the rivals take minutes there
    with contestants(subject) as running:
        for task, interventions in tasks(model, pair).items():
            if options.only not in f"{subject}: {task}": continue
            done = race(running, model, pair, interventions, rounds, options)
            print(f"{subject}, {task}: done", flush=True)
            bar = 10 if subject == NANO else BARS.get(subject, {}).get(task)
            results[task] = done | {"bar": bar, "floor": floor(model, [pair], interventions, done["seconds"]["sweep"]["median"], can)}
    return {"machine": {k: float(f"{v:.3g}") for k, v in can.items()}, "tasks": results}


def hardware() -> dict:
    """What the numbers were measured on; no names of machines or people."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    return {"processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system()}


def show(results: dict) -> Table:
    """The table that is printed."""
    table = Table(title="Times faster than one run per intervention (median, smallest to largest of the rounds)")
    for head in ("model", "task", "patches", "sweep (s)", "TransformerLens", "bar", "plain loop", "expert's loop", "nnsight", "difference", "of the floor"):
        table.add_column(head)
    for subject, done in results.items():
        for task, r in done["tasks"].items():
            ratio = {n: f"{v['median']:.0f}x ({v['min']:.0f} to {v['max']:.0f})" for n, v in r["times_faster_than"].items()}
            table.add_row(subject, task, str(r["interventions"]), f"{r['seconds']['sweep']['median']:.3f}",
                          ratio["transformer_lens"], str(r["bar"] or ""), ratio["plain_loop"], ratio["batched_loop"], ratio.get("nnsight", "not run"),
                          f"{r['largest_difference']:.0e}", f"{r['floor']['fraction_of_floor']:.0%}")
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant runs each task")
    parser.add_argument("--tries", type=int, default=5, help="how often a time is taken at most, for a quiet moment")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="wall time on all cores, or processor time on one")
    parser.add_argument("--out", type=Path, help="where the results go, unless into data/benchmarks")
    parser.add_argument("--only", default="", help="only tasks with this in 'model: task'; use another --out then")
    options = parser.parse_args()
    if options.clock == "processor": torch.set_num_threads(1)
    console = Console(width=170)
    versions = {p: version(p) for p in ("torch", "transformers", "transformer-lens")}
    if nnsight_version(): versions["nnsight"] = nnsight_version()
    else: console.print(f"nnsight is left out: there is no environment {NNSIGHT.name} with it (`make bench` makes one).")
    results = {name: tested(name, model, pair, options) for name, (model, pair) in subjects(options.only.partition(":")[0])}
    command = (f"python benchmarks/patching.py --rounds {options.rounds}" + (" --clock processor" if options.clock == "processor" else "")
               + (f" --only '{options.only}'" if options.only else ""))
    out = options.out or OUT / ("patching-cpu.json" if options.clock == "wall" else "patching-processor.json")
    write_json(out, {"command": command, "clock": options.clock, "hardware": hardware(), "versions": versions, "results": results})
    console.print(show(results))


if __name__ == "__main__":
    main()
