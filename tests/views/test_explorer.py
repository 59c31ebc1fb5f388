"""The explorer's page: its numbers are the run's, and nothing that stands in a run can break out of it."""
import json
import math
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from planted import planted_run, steps

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.pairs import entity_spans
from bizzaroworld.figures.style import SITE_COLORS
from bizzaroworld.files import write_json, write_table
from bizzaroworld.results.effects import SITES
from bizzaroworld.results.estimates import estimate
from bizzaroworld.study.experiments import EXPERIMENTS
from bizzaroworld.study.runs import open_run
from bizzaroworld.views.explorer import (LOOKS, QUESTIONS, embed, experiment_data, explorer_data, explorer_fragment, explorer_page,
                                         open_view, pair_data, pieces, write_explorer)

HOSTILE = '</script><b id="out">"&<!--'


def made(folder, leave_out=()):
    """Eight pairs, six layers, two heads, no two numbers alike; the last pair has too little swing for a fraction."""
    heads = np.random.default_rng(0).normal(size=(8, 6, 2))
    curve = steps([1, 2, 3, 4, 1, 2, 3, 4], 6) + np.random.default_rng(1).normal(scale=0.1, size=(8, 6))
    return planted_run(folder, curve, heads_final=heads, swings=[20, 12, 18, 16, 14, 19, 10, 0.5], controls={"unrelated": 0.1 * curve},
                       leave_out=leave_out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All experiments; not to be changed."""
    return made(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def data(run):
    """What the page knows of the run."""
    return explorer_data(run)


@pytest.fixture
def small(tmp_path):
    """A run to write to, of experiments 3 and 4F alone."""
    return made(tmp_path / "run", ("1", "2A", "2B", "4"))


@pytest.fixture
def hostile(small):
    """A run of a model and with prompts that would like to be markup."""
    run = small
    table = pd.read_csv(run.folder / "triage.csv").drop(columns="category")
    pairs = [{f"{side}_{k}": v for side, name in (("clean", "Ann"), ("corrupt", "Bob")) for k, v in
              {"prompt": f"{name} {i} says {HOSTILE} to", "entity": name, "target": f" {HOSTILE}{name}"}.items()} for i in range(len(table))]
    table = table.join(pd.DataFrame(pairs)).assign(relation="r", category=HOSTILE)
    for name in ("triage", "golden_A", "golden_C"): write_table(run.folder / f"{name}.csv", table)
    write_json(run.folder / "run.json", {**run.info, "model": {**run.info["model"], "name": HOSTILE}})
    return open_run(run.folder)


def raw(run, experiment, site, pair, layer, head=None):
    """The effect in the run's file."""
    e = run.effects
    found = e[(e.experiment == experiment) & (e.site == site) & (e.pair_id == pair) & (e.layer == layer)]
    return (found if head is None else found[found["head"] == head]).effect.item()


def test_every_number_of_every_pair_is_the_one_in_the_effects(run, data):
    swing, seen = run.triage.set_index("pair_id").total_swing, 0
    for name, experiment in data["experiments"].items():
        for site, found in experiment["sites"].items():
            for pair, effects, fractions in zip(data["pairs"], found["effect"], found["fraction"], strict=True):
                where = [(layer, head) for layer in found["layers"] for head in found["heads"] or [None]]
                for (layer, head), effect, fraction in zip(where, effects, fractions, strict=True):
                    truth = raw(run, name, site, pair["id"], layer, head)
                    assert effect == pytest.approx(truth, abs=5.1e-4)
                    if pair["swing"] < data["min_swing"]: assert fraction is None
                    else: assert fraction == pytest.approx(-truth / swing[pair["id"]], abs=5.1e-4)
                    seen += 1
    assert seen == (run.effects.metric == "ld").sum()


@pytest.mark.parametrize("mode, n", [("A", 8), ("B", 4), ("C", 8)])
def test_means_are_over_the_mode_with_intervals_from_estimates(run, data, mode, n):
    found = data["experiments"]["4F"]["sites"]["z"]
    effect, fraction = (found["means"][mode][k] for k in ("effect", "fraction"))
    assert (effect["n"], fraction["n"]) == (n, n - (mode != "B"))
    members = run.pairs(mode)
    for cell, (layer, head) in enumerate((l, h) for l in range(6) for h in range(2)):
        truth = estimate(np.array([raw(run, "4F", "z", p, layer, head) for p in members]))
        shown = [effect[k][cell] for k in ("mean", "low", "high")]
        assert shown[0] == pytest.approx(truth.value, abs=5.1e-4)
        assert shown[1:] == pytest.approx([truth.low, truth.high], abs=0.03 * (truth.high - truth.low))  # drawn in another order


def test_modes_list_the_golden_pairs_in_their_order(run, data):
    assert {m: [data["pairs"][i]["id"] for i in numbers] for m, numbers in data["modes"].items()} == {m: run.pairs(m) for m in "ABC"}


def test_fewer_modes_hold_only_their_pairs(small):
    data = explorer_data(small, modes="B")
    assert [p["id"] for p in data["pairs"]] == small.pairs("B") and list(data["modes"]) == ["B"]
    assert data["experiments"]["3"]["sites"]["resid_pre"]["effect"] == [
        [pytest.approx(raw(small, "3", "resid_pre", p, layer), abs=5.1e-4) for layer in range(6)] for p in small.pairs("B")]


def test_controls_come_with_their_means(data):
    site = data["experiments"]["3"]["sites"]["resid_pre"]
    controls, real = site["controls"], site["means"]
    assert list(controls) == ["unrelated"]
    assert controls["unrelated"]["C"]["effect"]["mean"] == pytest.approx([0.1 * x for x in real["C"]["effect"]["mean"]], abs=1e-3)
    assert data["experiments"]["2B"]["sites"]["attn_out"]["controls"] == {}


def test_controls_of_a_mode_are_of_its_pairs(run, data):
    controls = data["experiments"]["3"]["sites"]["resid_pre"]["controls"]["unrelated"]
    assert {mode: means["effect"]["n"] for mode, means in controls.items()} == {mode: len(run.pairs(mode)) for mode in "ABC"}
    assert controls["B"]["effect"]["mean"] != controls["C"]["effect"]["mean"]


def test_a_run_without_controls_has_none(tmp_path):
    run = planted_run(tmp_path, steps([1, 2], 4))
    assert experiment_data(run, "3")["sites"]["resid_pre"]["controls"] == {}


def test_one_pair_has_means_without_intervals(tmp_path):
    run = planted_run(tmp_path, steps([2], 4), swings=[10])
    assert "NaN" not in explorer_page(run)
    means = explorer_data(run)["experiments"]["3"]["sites"]["resid_pre"]["means"]["C"]["effect"]
    assert means == {"mean": [-10, -10, 0, 0], "low": [None] * 4, "high": [None] * 4, "n": 1}


def test_nothing_has_a_fraction_where_no_pair_swings(tmp_path):
    run = planted_run(tmp_path, steps([1, 2], 4), swings=[0.5, 0.25])
    fraction = experiment_data(run, "3")["sites"]["resid_pre"]["means"]["C"]["fraction"]
    assert fraction["n"] == 0 and fraction["mean"] == [None] * 4


def test_denoising_moves_are_positive(tmp_path):
    data = explorer_data(planted_run(tmp_path, steps([2, 2], 4), swings=[10, 10], direction="denoising"))
    found = data["experiments"]["3"]["sites"]["resid_pre"]
    assert data["direction"] == "denoising" and found["effect"][0] == [10, 10, 0, 0] and found["fraction"][0] == [1, 1, 0, 0]


class Page(HTMLParser):
    """The elements of a page, the text of its scripts, and what is never closed."""
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.open, self.attributes = [], [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if "id" in (found := dict(attributes)): self.attributes[found["id"]] = found
        if tag not in ("meta", "link"): self.open.append(tag)
        if tag == "script": self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script": self.scripts[-1] += data


def test_hostile_tokens_stay_text(hostile):
    page = Page(explorer_page(hostile))
    assert "b" not in page.tags and "out" not in page.attributes and page.open == [] and len(page.scripts) == 2
    data = json.loads(page.scripts[0])
    assert data == explorer_data(hostile) and data["model"] == HOSTILE
    assert data["pairs"][0]["prompts"][1]["target"] == f"{HOSTILE}Bob"
    assert page.attributes["explorer"]["aria-label"].endswith(HOSTILE)


def test_a_fragment_can_stand_twice_in_a_page(hostile):
    page = Page(explorer_fragment(hostile, "one", "A") + explorer_fragment(hostile, 'two"><b>', "A"))
    assert set(page.attributes) == {"one", "one-data", 'two"><b>', 'two"><b>-data'} and page.open == []


def test_the_page_asks_for_nothing_and_says_so(small):
    page = explorer_page(small)
    assert "://" not in page and "@import" not in page and "url(" not in page
    assert "default-src 'none'" in page and "{{" not in page.split("</head>")[0]


def test_the_same_run_gives_the_same_bytes(small):
    first, again = embed(small), embed(open_run(small.folder))
    assert first.html == again.html == again._repr_html_()


def test_the_page_is_written_beside_the_run_or_where_one_says(small, tmp_path):
    assert write_explorer(small) == small.folder / "explorer.html"
    assert write_explorer(small, tmp_path / "new" / "x.html").read_text("utf-8") == explorer_page(small)


@pytest.mark.parametrize("there", [True, False])
def test_view_opens_the_page_or_says_where_it_is(small, monkeypatch, capsys, there):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or there)
    path = open_view(small)
    assert opened == [path.resolve().as_uri()] and path.is_file()
    assert (str(path) in capsys.readouterr().out) != there


def test_no_torch_is_needed():
    code = "import sys, bizzaroworld.views.explorer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_questions_and_looks_are_those_of_the_experiments_and_figures():
    assert QUESTIONS == {e.name: e.question for e in EXPERIMENTS.values()}
    assert {s: look["color"] for s, look in LOOKS.items()} == SITE_COLORS and set(SITES) <= set(LOOKS)
    assert len({(look["dash"], look["mark"], look["fill"] == "#ffffff") for look in LOOKS.values()}) == len(LOOKS)


def test_pieces_of_every_prompt_join_to_it_and_name_entity_and_end():
    for pair in load_battery():
        for prompt, entity, span in zip((pair.clean_prompt, pair.corrupt_prompt), (pair.clean_entity, pair.corrupt_entity), entity_spans(pair)):
            found = pieces(prompt, span)
            assert "".join(text for text, _ in found) == prompt
            assert "".join(text for text, name in found if name.startswith("entity")) == entity
            assert "".join(text for text, name in found if name.endswith("final")) == prompt.split()[-1]


def test_a_row_without_prompts_or_with_a_hole_has_none():
    row = {"pair_id": "p", "category": "c", "total_swing": math.nan, "ld_clean": 1.0, "ld_corrupt": -1.0}
    assert pair_data(row) == {"id": "p", "category": "c", "swing": None, "clean": 1.0, "corrupt": -1.0}
    assert "prompts" not in pair_data(row | {"clean_prompt": "x", "corrupt_target": math.nan})
