"""What exact effects and edges cost beside estimates of them, in one run on one model: `make bench`.

For each pair, in turn and in every round:

- *exact*: the effect of all queries, keys, values and head outputs, of every layer and head at every position (`sweep`);
- *AtP*, *AtP**: estimates of the same nodes (`attribution`, `atp_star`), with the share of the exact sweep's time that they take, within a
  round, and the rank correlation of their sizes with the exact ones over the nodes that can change;
- *every edge*: the effect of each edge of the model, from the embedding, heads and MLPs to queries, keys, values, MLPs and logits (`path_effects`).

Some nodes and some edges, drawn over all kinds, are run again one at a time with plain hooks and whole prompts, an edge in three runs: what the sender writes, what
the receiver makes of it, what follows. They must agree within 1e-4 logits before a time is written, and the estimates must start from the same two runs.

A time is wall time and processor time of one call, after a small call that is not counted; of up to `--tries` calls the one counts in which other programs used
least of the machine, and how much that was is in the record. Bars, set before: 20 s for all nodes of a pair, 60 s for all edges, on two cores.
"""
import argparse
import os
import random
import statistics
from importlib.metadata import version
from pathlib import Path

import torch
from patching import OUT, QUIET, TOLERANCE, by_plain_loop, hardware, ld, used
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import TokenPair, align
from bizzaroworld.circuits.atp_star import atp_star
from bizzaroworld.circuits.attribution import attribution, beside
from bizzaroworld.circuits.paths import edges, name_of, path_effects
from bizzaroworld.files import write_json
from bizzaroworld.model.hooked import SITES
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch.sweep import sweep

NODES = ("q", "k", "v", "z")
EXACT, EDGES, ESTIMATES = "exact", "every edge", {"AtP": attribution, "AtP*": atp_star}
BARS = {EXACT: 20, EDGES: 60}  # seconds of one pair on two cores
BARS_OF_EXACT = {"AtP": 0.2, "AtP*": 0.75}  # of the exact sweep's processor time; an estimate that costs more is not worth its error


def contestants(model, pair: TokenPair) -> dict:
    """What is timed, by name."""
    nodes, paths = grid(model, NODES, range(len(pair.clean_ids))), edges(model)
    def exactly(some=nodes): return sweep(model, pair, some, progress=False)
    def by_edges(some=paths): return path_effects(model, pair, some)
    return {EXACT: exactly, **{name: lambda f=f: f(model, pair, sites=NODES) for name, f in ESTIMATES.items()}, EDGES: by_edges}


class ByHand:
    """Paths of one hop, one at a time, in whole prompts with plain hooks on TransformerLens's bridge."""
    def __init__(self, model, pair: TokenPair):
        self.model, self.pair = model, pair
        self.clean, self.donor = (self.run(torch.tensor([ids]), {})[1] for ids in (pair.clean_ids, pair.corrupt_ids))

    def at(self, site: str, layer: int) -> str: return f"blocks.{layer}.{SITES[site]}"

    def run(self, ids, changes: dict):
        """The logit difference and all activations, after functions that change one in place."""
        seen = {}
        def at(name):
            def touch(act, hook):
                if name in changes: changes[name](act)
                seen[name] = act.clone()
                return act
            return name, touch
        names = [self.at(site, layer) for layer in range(self.model.n_layers) for site in ("resid_pre", *NODES, "resid_mid", "mlp_out", "resid_post")]
        logits = self.model.bridge.run_with_hooks(ids, fwd_hooks=[at(name) for name in names])
        return ld(self.pair)(logits).item(), seen

    def put(self, name: str, value, head: int | None = None):
        """The clean run with another value at a place, or at one head of it."""
        def change(act): act[(slice(None), slice(None)) if head is None else (slice(None), slice(None), head)] = value
        return self.run(torch.tensor([self.pair.clean_ids]), {name: change})

    def sent(self, node):
        """What the stream changes by if the sender writes what it writes in the corrupted run."""
        if node.kind == "embed": return self.donor[self.at("resid_pre", 0)] - self.clean[self.at("resid_pre", 0)]
        if node.kind == "mlp": return self.donor[self.at("mlp_out", node.layer)] - self.clean[self.at("mlp_out", node.layer)]
        z, mid = self.at("z", node.layer), self.at("resid_mid", node.layer)
        return self.put(z, self.donor[z][:, :, node.head], node.head)[1][mid] - self.clean[mid]

    def value(self, path) -> float:
        """The logit difference when the receiver alone gets the sender's message."""
        sender, receiver = path
        last = receiver.kind == "logits"
        read = self.at("resid_post", self.model.n_layers - 1) if last else self.at("resid_mid" if receiver.kind == "mlp" else "resid_pre", receiver.layer)
        told, seen = self.put(read, self.clean[read] + self.sent(sender))
        if last: return told
        written = self.at("mlp_out" if receiver.kind == "mlp" else receiver.kind, receiver.layer)
        return self.put(written, seen[written] if receiver.head is None else seen[written][:, :, receiver.head], receiver.head)[0]


def drawn(some: list, kind, count: int) -> list:
    """So many of each kind, or all that there are."""
    kinds, rng = {}, random.Random(0)
    for one in some: kinds.setdefault(kind(one), []).append(one)
    return [one for group in kinds.values() for one in rng.sample(group, min(count, len(group)))]


def check_equal(gap: float, what: str) -> float:
    if not gap < TOLERANCE: raise SystemExit(f"{what}: the numbers disagree by {gap:.1e}: no time means anything.")
    return float(f"{gap:.1e}")


def checked(model, pair: TokenPair, found: dict, count: int) -> dict:
    """The largest differences from plain runs of one at a time, of `count` of each kind; ends the program if they are too large."""
    exact, by_edges = found[EXACT], found[EDGES]
    row = dict(zip((i.edits[0] for i in exact.interventions), exact.patched[0, :, 0]))
    nodes = drawn([i for i in exact.interventions if i.edits[0].position >= min(pair.differing)], lambda i: i.edits[0].site, count)
    gap = max(abs(a - row[i.edits[0]]) for a, i in zip(by_plain_loop(model, pair, nodes), nodes, strict=True))
    hand, value = ByHand(model, pair), dict(zip(by_edges.paths, by_edges.patched[0, :, 0]))
    paths = drawn(list(by_edges.paths), lambda path: (path[0].kind, path[1].kind), count)
    ends = max(abs(getattr(found[name], side)[0] - getattr(exact, side)[0, 0]) for name in ESTIMATES for side in ("clean", "corrupt"))
    return {EXACT: {"largest_difference": check_equal(gap, "nodes"), "checked": len(nodes)},
            EDGES: {"largest_difference": check_equal(max(abs(hand.value(path) - value[path]) for path in paths), "edges"), "checked": len(paths)},
            **{name: {"largest_difference": check_equal(ends, "both runs of the estimates"), "checked": 2} for name in ESTIMATES}}


def correlations(pair: TokenPair, found: dict) -> dict[str, float]:
    """The rank correlation of the sizes of estimates with exact ones, over nodes from the first token on that differs."""
    table = beside(found[EXACT], *(found[name] for name in ESTIMATES))
    table = table[table.position.astype(int) >= min(pair.differing)]
    return {name: round(float(spearmanr(table.effect.abs(), table[found[name].method].abs()).statistic), 4) for name in ESTIMATES}


def timed(run, tries: int) -> tuple[object, dict[str, float]]:
    """What `run` returns, and its seconds by both clocks with the share of the machine that others had; the quietest of the tries."""
    best = None
    for _ in range(tries):
        before = used()
        value = run()
        wall, own, everyone = (b - a for a, b in zip(before, used()))
        took = {"wall": wall, "processor": own, "others": max(0.0, everyone - own) / (wall * os.cpu_count())}
        if best is None or took["others"] < best["others"]: best = took
        if took["others"] < QUIET: break
    return value, best


def spread(x: list[float]) -> dict[str, float]: return {"median": round(statistics.median(x), 3), "min": round(min(x), 3), "max": round(max(x), 3)}


@torch.no_grad()
def measure(model, pair: TokenPair, rounds: int, tries: int, count: int = 3) -> dict:
    """Times of one pair, after a check that the numbers agree."""
    running, found, took = contestants(model, pair), {}, {}
    running[EXACT](grid(model, NODES, "final")), running[EDGES](edges(model, receivers=["logits"]))
    for name in ESTIMATES: running[name]()
    for _ in range(rounds):
        for name, run in running.items():
            found[name], one = timed(run, tries)
            took.setdefault(name, []).append(one)
    equal, ranks = checked(model, pair, found, count), correlations(pair, found)
    many = {name: len(found[EXACT].interventions) for name in running} | {EDGES: len(found[EDGES].paths)}
    out = {name: {"asked": many[name], **equal[name], "other_programs": round(max(t["others"] for t in times), 2),
                  "seconds": {clock: spread([t[clock] for t in times]) for clock in ("wall", "processor")}, "bar": BARS.get(name)} for name, times in took.items()}
    for name in ESTIMATES:
        out[name]["of_exact"] = {clock: spread([a[clock] / b[clock] for a, b in zip(took[name], took[EXACT])]) for clock in ("wall", "processor")}
        out[name] |= {"rank_correlation": ranks[name], "bar_of_exact": BARS_OF_EXACT[name]}
    largest = found[EDGES].paths[int(abs(found[EDGES].effects()[0]).argmax())]
    return {"tokens": len(pair.clean_ids), "changed_tokens": len(pair.clean_ids) - min(pair.differing), "largest_edge": name_of(largest), "tasks": out}


def show(results: dict) -> Table:
    """The table that is printed."""
    table = Table(title="Seconds of one pair (median, smallest to largest of the rounds)")
    for head in ("pair", "what", "asked", "wall", "bar", "processor", "of exact (processor)", "rank correlation", "difference", "others"): table.add_column(head)
    for pair, done in results.items():
        for name, r in done["tasks"].items():
            clock = {c: f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})" for c, s in r["seconds"].items()}
            table.add_row(pair, name, str(r["asked"]), clock["wall"], str(r["bar"] or ""), clock["processor"], f"{r['of_exact']['processor']['median']:.0%}" if "of_exact" in r else "",
                          f"{r['rank_correlation']:.3f}" if "rank_correlation" in r else "", f"{r['largest_difference']:.0e}", f"{r['other_programs']:.0%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m", help="a model by name")
    parser.add_argument("--pairs", type=int, default=2, help="how many pairs of the battery, each by itself")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    parser.add_argument("--tries", type=int, default=3, help="how often a time is taken at most, for a quiet moment")
    parser.add_argument("--out", type=Path, default=OUT / "circuits-cpu.json", help="where the results go")
    options = parser.parse_args()
    model = load_model(options.model, device="cpu")
    results = {pair.id: measure(model, align(model, pair), options.rounds, options.tries) for pair in load_battery()[:options.pairs]}
    write_json(options.out, {"command": f"python benchmarks/circuits.py --model {options.model} --pairs {options.pairs} --rounds {options.rounds}", "model": options.model,
                             "hardware": hardware(), "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}, "results": results})
    Console(width=190).print(show(results))


if __name__ == "__main__":
    main()
