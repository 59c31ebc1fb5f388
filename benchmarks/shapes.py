"""The sweep against the loop that an expert writes, on three shapes of model, beside the ratio that can be counted.

Both have random weights and one thread, and the processor's time counts. Their numbers must agree within 1e-4 before a time
is printed. The counts are of token-layers, positions times blocks:

- the loop runs all blocks at all positions for each intervention, and for the donor;
- *counted* divides that by what an exact engine has to run if each intervention were one of its own: the positions from its
  own on, in the blocks from its own on;
- *counted with names and starts* knows two things more: a state of the stream that has several names is patched once, and up
  to the first token that differs a patch changes nothing. It also counts the two runs of the pair, which a ratio of times has
  in it. This one cannot be beaten by more than what is saved inside a block.

Sweeps take `--pairs` pairs at once, the loop one after the other; *one pair* is the sweep of a pair by itself, as one meets it
in a notebook, where the fixed cost of a pass weighs most.
"""
import argparse
import copy
import json
import statistics
import time
from importlib.metadata import version
from os.path import commonprefix
from pathlib import Path

import expert
import torch
from patching import OUT, TOLERANCE, hardware
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, Gemma3ForCausalLM, Gemma3TextConfig, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.battery.tokens import TokenPair
from bizzaroworld.files import write_json
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid, positions_of
from bizzaroworld.patch.passes import rows_of
from bizzaroworld.patch.sweep import _same_as, sweep
from bizzaroworld.study.experiments import interventions_of

# The model, the tokens of a prompt, and where its entity is.
SHAPES = {
    "Llama-like, 12 x 768, 40 tokens": (lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12)), 40, 19),
    "Gemma-3-like, 18 x 640, 14 tokens": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=32_000, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256)), 14, 6),
    "GPT-2 small, 12 x 768, 20 tokens": (lambda: GPT2LMHeadModel(GPT2Config()), 20, 9),
}
TASKS = {"final token (1 + 2A)": ["1", "2A"], "heads at the final token (4F)": ["4F"], "entity (3 + 2B)": ["3", "2B"],
         "heads at the entity (4)": ["4"], "resid_pre, every position": None, "the whole study": []}
FINAL, SHARE = 15, 0.85  # the bars: times faster at the final token; elsewhere a share of what is counted


def random_pair(seed: int, length: int, entity: int) -> TokenPair:
    """A random prompt and one that differs from it in the entity, a single token."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, 30_000, (length,), generator=g).tolist()
    corrupt = clean[:entity] + [clean[entity] + 1] + clean[entity + 1:]
    words = PromptPair("a b", "a c", " d", " e", "b", "c", f"random-{seed}", "random")
    return TokenPair(words, tuple(clean), tuple(corrupt), 7, 11, (entity, entity + 1))


def counts(model, pair: TokenPair, interventions) -> dict[str, float]:
    """The two ratios that can be counted, for one pair."""
    layers, length = model.n_layers, len(pair.clean_ids)
    def work(asked, shared=None): return sum(r.tail * (layers - r.layer) for r in rows_of(model.shape, [pair], [pair], asked, shared))
    once = list(dict.fromkeys(_same_as(model, i) for i in interventions))
    run, n = layers * length, len(interventions)
    alike = [len(commonprefix([pair.clean_ids, pair.corrupt_ids]))]
    return {"counted": n * run / work(interventions), "counted_with_names_and_starts": (n + 1) * run / (work(once, alike) + 2 * run)}


def seconds(run, least: int) -> tuple[list[float], float]:
    """What `run` returns, and the processor's seconds: the median of several runs."""
    times = []
    while len(times) < least or (len(times) < 9 and sum(times) < 2):
        start = time.process_time()
        values = run()
        times.append(time.process_time() - start)
    return values, statistics.median(times)


def race(model, bare, pairs, interventions) -> dict:
    """Times and ratios of one task, after a check that both agree."""
    edits = [(e.site, e.layer, positions_of(e.position, pairs[0])[0], e.head) for e in (i.edits[0] for i in interventions)]
    def ours(some): return sweep(model, some, interventions, progress=False).patched[:, :, 0].ravel().tolist()
    def theirs(some): return [x for p in some for x in expert.patch(bare, p.clean_ids, p.corrupt_ids, (7, 11), edits)]
    ours(pairs[:1]), theirs(pairs[:1])
    values, alone = seconds(lambda: ours(pairs[:1]), 5)
    _, together = seconds(lambda: ours(pairs), 3)
    wanted, loop = seconds(lambda: theirs(pairs[:2]), 1)
    loop /= 2
    gap = max(abs(a - b) for a, b in zip(ours(pairs[:2]), wanted, strict=True))
    if not gap < TOLERANCE: raise SystemExit(f"The sweep and the loop disagree by {gap:.1e}: no time means anything.")
    return {"interventions": len(interventions), "largest_difference": float(f"{gap:.1e}"), "loop_seconds_a_pair": round(loop, 4),
            "sweep_seconds_a_pair": round(together / len(pairs), 4), "sweep_seconds_one_pair": round(alone, 4),
            "times_faster": round(loop * len(pairs) / together, 2), "times_faster_one_pair": round(loop / alone, 2),
            **{k: round(v, 2) for k, v in counts(model, pairs[0], interventions).items()}}


@torch.no_grad()
def measure(name: str, n_pairs: int) -> dict:
    build, length, entity = SHAPES[name]
    torch.manual_seed(0)
    hf_model = build().eval()
    bare = copy.deepcopy(hf_model)
    model, pairs, results = load_model(hf_model), [random_pair(k, length, entity) for k in range(n_pairs)], {}
    for task, experiments in TASKS.items():
        asked = (grid(model, "resid_pre", range(length)) if experiments is None else
                 interventions_of(model, experiments) if experiments else interventions_of(model))
        done = race(model, bare, pairs, asked)
        bar = FINAL if "final" in task else round(SHARE * done["counted"], 2)
        results[task] = done | {"bar": bar}
        print(json.dumps({name: {task: results[task]}}), flush=True)
    return results


def show(results: dict) -> Table:
    table = Table(title="Times faster than the expert's loop")
    for head in ("shape", "task", "patches a pair", "times faster", "bar", "one pair", "counted", "with names and starts"): table.add_column(head)
    for name, tasks in results.items():
        for task, r in tasks.items():
            table.add_row(name, task, str(r["interventions"]), f"{r['times_faster']:.1f}x", f"{r['bar']:.1f}x", f"{r['times_faster_one_pair']:.1f}x",
                          f"{r['counted']:.1f}x", f"{r['counted_with_names_and_starts']:.1f}x")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a sweep")
    parser.add_argument("--only", default="", help="only shapes with this in their name; use another --out then")
    parser.add_argument("--out", type=Path, default=OUT / "shapes-cpu.json", help="where the results go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, options.pairs) for name in SHAPES if options.only in name}
    write_json(options.out, {"command": "python benchmarks/shapes.py", "hardware": hardware(), "pairs": options.pairs, "results": results,
                             "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}})
    Console(width=150).print(show(results))


if __name__ == "__main__":
    main()
