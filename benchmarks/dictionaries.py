"""Dictionaries of one model at many places, of many kinds, and what their features do to facts: the tables of data/features.

    python benchmarks/dictionaries.py --model gemma-3-270m --text FOLDER --out runs/dictionaries

Trains, on the same blocks of text: one dictionary for each place (`places.csv`), one for each way to revive dead features at
one place (`revivals.csv`), each scored on the blocks that are held out; and one of an untrained model, as a control. Then `bizzaroworld features`
on the one at `--main`, with all others along the depth. Everything that takes minutes on a GPU takes hours on a processor: `--places`,
`--steps` and `--parts` make it smaller. The dictionaries stay in the output folder: whose model it is decides whether they may go further.
"""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.commands.features_run import known_facts, run_features
from bizzaroworld.dictionaries.harvest import Blocks, activations, blocks, documents
from bizzaroworld.dictionaries.learning import Held, train_sae
from bizzaroworld.dictionaries.recipes import Recipe
from bizzaroworld.dictionaries.sae_files import load_sae, save_sae
from bizzaroworld.dictionaries.scores import score
from bizzaroworld.files import write_json, write_table
from bizzaroworld.model.load import load_model, untrained

PARTS = ("places", "revivals", "untrained", "features")


def text_for(model, options) -> Blocks:
    """The blocks of text: cut from documents and sentences of facts, or as a file of this program has them."""
    if options.text.suffix == ".pt":
        ids = torch.load(options.text, weights_only=True)
        return Blocks(ids["ids"].long(), ids["held"].long(), ids["lead"])
    lines = [document.split("\n") for document in documents(options.text)]
    pieces = ["\n".join(some[i:i + 40]) for some in lines for i in range(0, len(some), 40)]
    facts = documents("facts", options.facts, seed=1)
    return blocks(model, pieces + ["\n".join(facts[i:i + 8]) for i in range(0, len(facts), 8)], options.tokens, options.context)


def revivals_of(recipe: Recipe) -> dict[str, Recipe]:
    """Each way to revive dead features, and the ablations of ghost gradients."""
    ghost = replace(recipe, revive="ghost")
    return {"nothing": replace(recipe, revive="none"), "resampled": replace(recipe, revive="resample"), "ghost gradients": ghost,
            "ghost gradients, not scaled": replace(ghost, ghost_scaled=False), "ghost gradients, for all in 100 steps": replace(ghost, ghost_all=100),
            "ghost gradients, for all always": replace(ghost, ghost_all=recipe.steps), "ghost gradients, batchtopk": replace(ghost, kind="batchtopk")}


def first_direction(y: torch.Tensor) -> float:
    """The share of the variance of activations (`token d`) that lies along one direction, the one with the most of it."""
    y = (y - y.mean(0)).double()
    spectrum = torch.linalg.eigvalsh(y.T @ y)
    return (spectrum[-1] / spectrum.sum()).item()


def in_groups(places: list, n: int) -> list[list]: return [places[i:i + n] for i in range(0, len(places), n)]


class Work:
    """What all parts share: model, text, options, and where the clock stands."""
    def __init__(self, options):
        self.options, self.start = options, time.perf_counter()
        self.model = load_model(options.model, device=options.device)
        self.text = text_for(self.model, options)
        self.recipe = Recipe(n_features=options.width, k=options.k, steps=options.steps, batch=2048, warmup=min(100, options.steps // 2), revive=options.revive)
        options.out.mkdir(parents=True, exist_ok=True)
        self.say(f"{self.model.name} on {self.model.device}: {self.text.n_tokens:,} tokens of text, {self.text.held.shape[0]} blocks held out")

    def say(self, line: str) -> None: print(f"{time.perf_counter() - self.start:7.1f} s  {line}", flush=True)

    def read(self, model, places) -> dict:
        """Activations of all training text at some places, on the model's device."""
        there = activations(model, self.text.ids, places, self.text.lead, at_once=self.options.at_once)
        return {place: Held(act.flatten(0, 1).to(model.device), place, model.name, model.shape.heads(place[0]) or 1) for place, act in there.items()}

    def train(self, source: Held, recipe: Recipe):
        begin = time.perf_counter()
        sae, history = train_sae(source, recipe, device=self.model.device, progress=False)
        return sae, history, time.perf_counter() - begin

    def scored(self, sae, history, seconds: float) -> dict:
        """One row: the scores with their intervals, and what the training ended with."""
        table = score(self.model, sae, self.text.held[:self.options.held], self.text.lead).set_index("score")
        row = {name: table.value[name] for name in ("loss", "change", "recovered", "explained", "l0")}
        row |= {f"{name}_{end}": table[end][name] for name in ("change", "explained") for end in ("low", "high")}
        there = activations(self.model, self.text.held[:self.options.held], [sae.writes], self.text.lead)[sae.writes].flatten(0, 1)
        return row | {"first_direction": first_direction(there), "dead_held": table.value["dead"], "dead": history.dead.iloc[-1], "seconds": round(seconds, 1)}

    def saved(self, place) -> Path: return self.options.out / "saes" / f"{place[0]}-{place[1]}"


def parse_places(model, said: str) -> list[tuple[str, int]]:
    """`resid_post:0-17,z:9,z:12` as sites and layers."""
    out = []
    for one in said.split(","):
        site, _, layers = one.partition(":")
        first, _, last = layers.partition("-")
        out += [(site, l) for l in range(int(first), int(last or first) + 1) if l < model.n_layers]
    return out


def part_places(work: Work) -> None:
    rows = []
    for group in in_groups(parse_places(work.model, work.options.places), work.options.group):
        sources = work.read(work.model, group)
        work.say(f"read {', '.join(f'{s} {l}' for s, l in group)}")
        for place in group:
            sae, history, seconds = work.train(sources.pop(place), work.recipe)
            save_sae(replace(sae, source="bizzaroworld"), work.saved(place))
            rows.append({"site": place[0], "layer": place[1]} | work.scored(sae, history, seconds))
            work.say(f"{place[0]} {place[1]}: " + ", ".join(f"{k} {rows[-1][k]:.3f}" for k in ("explained", "change", "dead", "seconds")))
            write_table(work.options.out / "places.csv", pd.DataFrame(rows))


def part_revivals(work: Work) -> None:
    place, rows = work.options.main, []
    source = work.read(work.model, [place])[place]
    for name, recipe in revivals_of(work.recipe).items():
        sae, history, seconds = work.train(source, recipe)
        rows.append({"revived": name} | work.scored(sae, history, seconds))
        work.say(f"{name}: " + ", ".join(f"{k} {rows[-1][k]:.3f}" for k in ("explained", "change", "l0", "dead", "seconds")))
        write_table(work.options.out / "revivals.csv", pd.DataFrame(rows))


def part_untrained(work: Work) -> None:
    place, twin = work.options.main, untrained(work.model)
    sae, history, _ = work.train(work.read(twin, [place])[place], work.recipe)
    save_sae(replace(sae, source="bizzaroworld"), work.options.out / "saes-untrained" / f"{place[0]}-{place[1]}")
    work.say(f"untrained: unexplained {history.unexplained.iloc[-1]:.3f}, dead {history.dead.iloc[-1]:.3f}")


def part_features(work: Work) -> None:
    o, place = work.options, work.options.main
    others = [load_sae(path) for path in sorted((o.out / "saes").iterdir()) if path != work.saved(place)]
    control = o.out / "saes-untrained" / f"{place[0]}-{place[1]}"
    work.say(f"{len(known_facts(work.model, load_battery(), 60))} facts are known")
    run_features(work.model, sae=load_sae(work.saved(place)), also=others, untrained=load_sae(control) if control.exists() else False, text=work.text, context=o.context,
                 most=o.most, out=o.out / "features", progress=lambda done, of, what: work.say(f"{done}/{of} {what}"))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="bizzaro-nano")
    ask.add_argument("--device")
    ask.add_argument("--text", type=Path, required=True, help="a folder of .txt files, or blocks of token ids (.pt)")
    ask.add_argument("--facts", type=int, default=9000, help="sentences of facts that are mixed in")
    ask.add_argument("--tokens", type=int, default=1_000_000)
    ask.add_argument("--context", type=int, default=128)
    ask.add_argument("--held", type=int, default=32, help="held-out blocks that scores are of")
    ask.add_argument("--places", default="resid_post:0-3,resid_post:5,resid_post:7-9,resid_post:11,resid_post:13,resid_post:15,resid_post:17,z:9,z:12,z:15,attn_out:12,mlp_out:0,mlp_out:2,mlp_out:8")
    ask.add_argument("--main", default="resid_post:8")
    ask.add_argument("--width", type=int, default=4096)
    ask.add_argument("-k", type=int, default=32)
    ask.add_argument("--steps", type=int, default=1000)
    ask.add_argument("--revive", default="none")
    ask.add_argument("--most", type=int, default=60, help="facts")
    ask.add_argument("--group", type=int, default=6, help="places whose activations are held at once")
    ask.add_argument("--at-once", type=int, default=64, help="blocks in a forward")
    ask.add_argument("--parts", default=",".join(PARTS))
    ask.add_argument("--out", type=Path, default=Path("runs/dictionaries"))
    options = ask.parse_args()
    work = Work(options)
    options.main = parse_places(work.model, options.main)[0]
    write_json(options.out / "options.json", {k: str(v) for k, v in vars(options).items()} | {"tokens_read": work.text.n_tokens, "text_sha256": work.text.sha256, "torch": torch.__version__,
               "device_name": torch.cuda.get_device_name() if work.model.device.type == "cuda" else "processor"})
    for part in options.parts.split(","): {"places": part_places, "revivals": part_revivals, "untrained": part_untrained, "features": part_features}[part](work)
    work.say("done")


if __name__ == "__main__": main()
