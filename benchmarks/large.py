"""A large battery, read, and studied to the end: seconds, memory, and how long nothing is said.

    python benchmarks/large.py --pairs 10000

Pairs are drawn from the facts that come along, such as the model's tokenizer can use, so many that few questions are asked twice in one wording; the same, with a number before each
prompt, fill a file of about 100 MB, which is read and checked. The study is without controls (each of them is a sweep more), on one thread. Time is the processor's: waiting for
other programs does not count. A silence is the time between two words of progress, the longest in each stage.
"""
from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from patching import OUT, hardware

from bizzaroworld.battery.builder import questions_of
from bizzaroworld.battery.facts import load_facts
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.files import write_json
from bizzaroworld.model.load import load_model
from bizzaroworld.pipeline import run_study
from bizzaroworld.study.runs import open_run
from bizzaroworld.views.explorer import write_explorer


def peak() -> int: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def pairs_for(tokenizer, n: int, seed: int = 0) -> list[PromptPair]:
    """`n` pairs of two questions of one wording, whose prompts have the same number of tokens and whose answers are one."""
    lengths = {}
    def ids(text):
        if text not in lengths: lengths[text] = tokenizer(text)["input_ids"]
        return lengths[text]
    alike = defaultdict(list)
    for q in questions_of(load_facts()):
        before, whole = ids(q.prompt), ids(q.prompt + q.answer)
        if whole[:-1] == before: alike[q.relation, q.template, len(before)].append(q)
    every = [(a, b) for some in alike.values() for a, b in itertools.permutations(some, 2) if a.answer != b.answer and a.given == b.given]
    if len(every) < n: raise SystemExit(f"There are {len(every)} such pairs: ask for fewer.")
    return [PromptPair(a.prompt, b.prompt, a.answer, b.answer, a.entity, b.entity, id=f"p{i:06}", category=a.category, relation=a.relation)
            for i, (a, b) in enumerate(random.Random(seed).sample(every, n))]


def reading(pairs: list[PromptPair], megabytes: float, folder: Path) -> dict:
    """Seconds to read and check a file of so many megabytes."""
    texts = [json.dumps(asdict(p)) for p in pairs]
    times, path = max(1, round(megabytes * 1e6 / sum(map(len, texts)))), folder / "large.json"
    with path.open("w") as file:
        file.write("[")
        for k in range(times):
            for i, p in enumerate(pairs):
                told = asdict(p) | {"id": f"{p.id}-{k}", "clean_prompt": f"Note {k}: {p.clean_prompt}", "corrupt_prompt": f"Note {k}: {p.corrupt_prompt}"}
                file.write("," * (k + i > 0) + json.dumps({name: value for name, value in told.items() if value}))
        file.write("]")
    size, start = path.stat().st_size, time.process_time()
    n = len(load_battery(path))
    return {"megabytes": round(size / 1e6, 1), "pairs": n, "seconds": round(time.process_time() - start, 1), "peak_mib": peak()}


class Stages:
    """What is told of progress, by stage: seconds, the longest silence, and the most memory up to its end."""
    def __init__(self): self.now, self.last, self.done = "before the triage", time.process_time(), {}

    def __call__(self, done: int, total: int, note: str = "") -> None:
        moment, stage = time.process_time(), "triage" if note == "tokens" else next((name for name in ("triage", "summary", "figures") if note.startswith(name)), "sweep")
        self.heard(moment)
        if stage != self.now: print(f"{self.now}: {self.done[self.now]}", flush=True)
        self.now = stage

    def heard(self, moment: float) -> None:
        """Something is said: the time since the last word goes to the stage that it was in."""
        was = self.done.get(self.now, {"seconds": 0.0, "silence": 0.0})
        quiet, self.last = moment - self.last, moment
        self.done[self.now] = {"seconds": was["seconds"] + quiet, "silence": max(was["silence"], quiet), "peak_mib": peak()}

    def of(self, name: str, work) -> None:
        """A stage that tells nothing."""
        self.heard(time.process_time())
        self.now = name
        work()
        self.heard(time.process_time())


def measure(name: str, n: int, megabytes: float) -> dict:
    """All of it, in this process."""
    torch.set_num_threads(1)
    model = load_model(name, device="cpu")
    pairs = pairs_for(model.tokenizer, n)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        read = reading(pairs, megabytes, folder)
        print(read, flush=True)
        write_json(folder / "battery.json", [{k: v for k, v in vars(p).items() if v} for p in pairs])
        stages = Stages()
        run = open_run(run_study(model, battery=folder / "battery.json", out=folder / "run", controls=(), progress=stages, say=lambda line: print(line, flush=True)))
        stages.of("explorer", lambda: write_explorer(run, folder / "explorer.html"))
        files = [p for p in run.folder.rglob("*") if p.is_file()]
        return {"model": name, "pairs": n, "swept": len(run.triage), "rows": len(run.effects), "read": read, "files": len(files), "disk_mib": round(sum(p.stat().st_size for p in files) / 2**20, 1),
                "explorer_mib": round((folder / "explorer.html").stat().st_size / 2**20, 2),
                "stages": {stage: {k: round(v, 1) for k, v in done.items()} for stage, done in stages.done.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bizzaro-nano", help="a model by name")
    parser.add_argument("--pairs", type=int, default=10_000, help="how many pairs")
    parser.add_argument("--megabytes", type=float, default=100, help="how large the file is that is read only")
    parser.add_argument("--out", type=Path, default=OUT / "large-cpu.json", help="where the record goes")
    args = parser.parse_args()
    record = {"command": "python benchmarks/large.py", "clock": "processor", "hardware": hardware() | {"threads": 1}, **measure(args.model, args.pairs, args.megabytes),
              "versions": {p: version(p) for p in ("torch", "transformers", "transformer-lens")}}
    write_json(args.out, record)
    print(json.dumps(record, indent=1))
