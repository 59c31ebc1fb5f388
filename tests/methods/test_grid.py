"""The grid of methods: what it patches, that it is what single sweeps give, and that it can be stopped."""
import json
import pickle
import random
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import random_pair
from typer.testing import CliRunner

from bizzaroworld.cli import app
from bizzaroworld.methods.grid import (
    GridError, Part, Settings, Work, parts_of, places_of, run_grid, sweep_part, unrelated, widths_of, windows, wordings)
from bizzaroworld.commands.methods_run import grid_tables, methods_lines, run_methods
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch import telling
from bizzaroworld.patch.noise import Noise
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.tasks.registry import make_task

SMALL = Settings(metrics=("ld", "prob"), widths=(1, 3), draws=2, group=2)


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def task(model): return make_task("facts", model, n=5)


@pytest.fixture(scope="module")
def made(model, task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    return folder, run_grid(model, task, folder, SMALL)


def test_a_window_of_one_is_a_single_layer_and_windows_are_centred(model):
    assert [p.intervention for p in windows(model, "mlp_out", "entity", 1)] == grid(model, "mlp_out", "entity")
    wide = [[e.layer for e in p.intervention.edits] for p in windows(model, "attn_out", "final", 3)]
    assert wide[0] == [0, 1] and wide[3] == [2, 3, 4] and wide[-1] == [6, 7]
    assert widths_of(8, (1, 0.5, 20)) == [1, 4, 8] and widths_of(18, (0.1,)) == [2]
    with pytest.raises(ValueError, match="window of 0 layers"): widths_of(8, (0,))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_rows_are_what_single_sweeps_give(model, task, made, direction):
    """Each row of the table, found by its columns, against a sweep of that one intervention."""
    _, table = made
    tp = task.pairs[3]
    noise = Noise(task.noised, draws=2).measured(model, task.pairs)
    for place in (places_of(model)[5], places_of(model, (1, 3), few=True)[-2], places_of(model)[-1]):
        for corruption in ("STR", "GN"):
            head = table["head"].isna() if place.head is None else table["head"] == place.head
            rows = table[(table.pair_id == tp.id) & (table.corruption == corruption) & (table.direction == direction) & (table.control == "") & head
                         & (table.site == place.site) & (table.layer == place.layer) & (table.position == place.position) & (table.window == place.window)]
            if corruption == "GN" and not len(rows): continue  # noise is put to fewer places
            one = sweep(model, tp, place.intervention, direction, metrics=("ld", "prob"), noise=noise if corruption == "GN" else None)
            for column, metric in enumerate(("ld", "prob")):
                (row,) = rows[rows.metric == metric].to_dict("records")
                assert row["patched"] == pytest.approx(one.patched[0, 0, column], abs=1e-4)
                assert (row["clean"], row["corrupt"]) == (pytest.approx(one.clean[0, column], abs=1e-4), pytest.approx(one.corrupt[0, column], abs=1e-4))


def test_every_place_has_one_row_for_each_pair_and_metric(made, model, task):
    _, table = made
    key = ["pair_id", "corruption", "metric", "direction", "control", "window", "site", "layer", "head", "position"]
    assert not table.duplicated(key).any()
    sizes = table.groupby(["corruption", "control", "direction", "metric"]).size()
    assert sizes["STR", "", "noising", "ld"] == 5 * len(places_of(model, (1, 3), task.places)) and sizes["GN", "", "noising", "ld"] == 5 * len(places_of(model, (1, 3), few=True))
    assert set(table[table.corruption == "GN"].metric) == {"ld", "prob", "ld_of_mean", "prob_of_mean"} and set(table[table.corruption == "STR"].metric) == {"ld", "prob"}
    assert set(table.control) == {"", "unrelated", "untrained"} and set(table[table.control != ""].corruption) == {"STR"}
    assert set(wordings(task).values()) == {"all"}


def test_a_grid_that_was_stopped_goes_on(model, task, made, tmp_path):
    """Stopped in the second part, after a unit of two pairs; what is there is kept, and the whole is the same table."""
    _, whole = made

    def stop(done, total, part):
        if done == 7: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_grid(model, task, tmp_path, SMALL, progress=stop)
    parts = sorted((tmp_path / "parts").rglob("*.parquet"))
    assert len(parts) == 7 and not (tmp_path / "grid.parquet").exists()
    before = {p: p.stat().st_mtime_ns for p in parts}
    again = run_grid(model, task, tmp_path, SMALL)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "what was there was swept again"
    pd.testing.assert_frame_equal(again, whole, check_exact=False, atol=1e-5)
    assert pd.read_parquet(tmp_path / "grid.parquet").equals(again)


def test_every_part_can_be_sent_to_another_process(model, task, made):
    """A recipe that was pickled gives the rows that the grid has."""
    _, whole = made
    work = Work(model, task, SMALL, Noise(task.noised, SMALL.scale, SMALL.draws, SMALL.seed).measured(model, task.pairs), unrelated(task.pairs, SMALL.seed), 8192)
    for part in work.parts:
        if not (pairs := work.pairs(part)[:1]): continue
        rows = pickle.loads(pickle.dumps(work.recipe(part)))(model)(pickle.loads(pickle.dumps(pairs)))
        mine = whole[(whole.pair_id == pairs[0].id) & (whole.corruption == part.corruption) & (whole.direction == part.direction) & (whole.control == part.control)]
        pd.testing.assert_frame_equal(rows, mine.reset_index(drop=True), check_exact=False, atol=1e-4)


def test_what_is_left_of_a_grid_is_said_first(model, task, tmp_path, monkeypatch):
    monkeypatch.setattr(telling, "PART", 1e9), monkeypatch.setattr(telling, "LONG", 0.0)
    said, told = [], []
    run_grid(model, task, tmp_path, SMALL, say=lambda line: said.append((line, len(told))), progress=lambda *at: told.append(at))
    assert len(said) == 1 and said[0][1] == 0 and re.match(r"5 pairs x [\d,]+ interventions: [\d,]+ rows in .*; about \d+ second", said[0][0])
    assert told[-1][0] == told[-1][1] and len({total for _, total, _ in told}) == 1
    run_grid(model, task, tmp_path, SMALL, say=said.append)
    assert len(said) == 1


def test_a_folder_holds_one_grid(model, task, made):
    folder, _ = made
    with pytest.raises(GridError, match="another settings"): run_grid(model, task, folder, Settings(metrics=("ld",), widths=(1, 3), draws=2, group=2))
    with pytest.raises(GridError, match="another pairs"): run_grid(model, make_task("facts", model, n=4, seed=1), folder, SMALL)


@pytest.mark.parametrize("n, words", [(1, 1), (40, 30), (60, 500), (50, 4)])
def test_unrelated_donors_are_those_of_the_definition(n, words):
    """Every pair against every other, of as many tokens, as it was first written: grids that are there keep their donors."""
    drawn = random.Random(n)
    fields = ("clean_target", "corrupt_target", "clean_entity", "corrupt_entity")
    def made(i):
        tp = random_pair(i % 50, 9 + i % 3)
        return replace(tp, pair=replace(tp.pair, id=f"p{i}", **{f: f"w{drawn.randrange(words)}" for f in fields}))
    some = [made(i) for i in range(n)]
    def named(tp): return {getattr(tp.pair, f) for f in fields}
    others = {tp.id: [o for o in some if len(o.clean_ids) == len(tp.clean_ids) and not named(tp) & named(o)] for tp in some}
    assert unrelated(some, 3) == {i: random.Random(f"unrelated 3 {i}").choice(those) for i, those in others.items() if those}


def test_unrelated_donors_share_nothing(model):
    pairs = make_task("facts", model, n=40).pairs
    donors = unrelated(pairs)
    assert len(donors) > 20
    for tp in pairs:
        if tp.id not in donors: continue
        a, b = ({p.pair.clean_target, p.pair.corrupt_target, p.pair.clean_entity, p.pair.corrupt_entity} for p in (tp, donors[tp.id]))
        assert not a & b and len(tp.clean_ids) == len(donors[tp.id].clean_ids)
    assert unrelated(pairs) == donors != unrelated(pairs, seed=1)


def test_controls_are_what_they_say(model, task):
    """With its own pair as donor the unrelated control would be the real run; with the donor that it has, it is another."""
    part, places = Part("STR", "noising", "unrelated"), dict(metrics=["ld"], widths=(1,))
    real = sweep_part(model, task, Part("STR", "noising"), **places)(task.pairs)
    own = sweep_part(model, task, part, donors={tp.id: tp for tp in task.pairs}, **places)(task.pairs)
    same = real.merge(own, on=["pair_id", "site", "layer", "head", "position", "window"])
    assert len(same) == len(own) and np.allclose(same.patched_x, same.patched_y, atol=1e-4)


def test_tables_and_figures_of_a_small_grid(model, tmp_path):
    folder = run_methods(model, "facts", out=tmp_path, n=8, settings=SMALL)
    names = {p.name for p in folder.iterdir()}
    assert {"ability.json", "grid.json", "grid.parquet", "detections.csv", "components.csv", "controls.csv", "warnings.csv", "conclusions.csv", "agree.csv",
            "variance_heads.csv", "variance_layers.csv", "windows.csv", "figures"} <= names
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert len(captions) >= 4 and all("n = 8 pairs" in c["caption"] for c in captions.values())
    found = grid_tables(pd.read_parquet(folder / "grid.parquet"))
    assert len(found["detections"]) == 2 * 2 + 4 * 2  # STR: metrics x directions; noise also has each metric of the mean logits
    told = methods_lines(folder)
    assert "can do facts" in told[0] and any("strongest head" in line for line in told)


def test_what_a_model_cannot_do_is_said_and_nothing_else(tmp_path):
    done = CliRunner().invoke(app, ["methods", "--task", "greater_than", "--pairs", "20", "--out", str(tmp_path)])
    assert done.exit_code == 0 and "cannot do greater_than" in done.output and len(done.output.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["ability.json"]


@pytest.mark.parametrize("options, told", [
    (["--task", "capitals"], "Unknown task 'capitals'"), (["--corruptions", "XX"], "Unknown corruption 'XX'"), (["--metrics", "loss"], "Unknown metric 'loss'"),
    (["--windows", "a,b"], "is no list of numbers"), (["--directions", "up"], "Unknown direction 'up'"), (["--corruptions", ""], "at least one corruption"),
    (["--replace", "S9"], "Unknown corruption of facts 'S9'"), (["--windows", "0"], "window of 0")])
def test_bad_options_are_named(options, told, tmp_path):
    done = CliRunner().invoke(app, ["methods", "--out", str(tmp_path / "new"), *options])
    assert done.exit_code == 2 and told in done.output and not (tmp_path / "new").exists()


def test_parts_are_named():
    assert [str(p) for p in parts_of(("STR",), ("denoising",))] == ["STR denoising", "STR denoising unrelated", "STR denoising untrained"]
    assert [str(p) for p in parts_of(("GN",), ("denoising",))] == ["GN denoising"]


@pytest.mark.parametrize("asked", [
    dict(metrics=("ld",), directions=("noising",), corruptions=("STR",), widths=(1, 3)),                                # one way to patch
    dict(metrics=("kl",), directions=("noising",), corruptions=("GN",), widths=(3,), draws=1),                          # two that are one
    dict(metrics=("ld", "ld"), directions=("noising", "noising"), corruptions=("STR", "STR"), widths=(5, 3), draws=1),  # named twice; no single layers
])
def test_a_grid_with_little_to_compare_has_its_other_tables_and_figures(model, tmp_path, asked):
    folder = run_methods(model, "facts", n=4, out=tmp_path / "g", settings=Settings(**asked, controls=()))
    assert not pd.read_parquet(folder / "grid.parquet").duplicated().any()
    assert len(pd.read_csv(folder / "detections.csv")) == (2 if asked["corruptions"] == ("GN",) else 1)
    assert not (folder / "variance_heads.csv").exists() and (folder / "windows.csv").exists() == (1 in asked["widths"])
    assert (folder / "figures" / "detections.png").exists() and (folder / "figures" / "multiverse.png").exists() == (len(asked["widths"]) > 1)
    assert "combinations of methods" in "".join(methods_lines(folder)) and "explains most" not in "".join(methods_lines(folder))


@pytest.mark.parametrize("asked, says", [(dict(widths=(float("inf"),)), "window of inf layers"), (dict(metrics=("ld", "ld_of_mean")), "name it without")])
def test_settings_that_no_sweep_can_have_are_refused_at_once(asked, says):
    with pytest.raises(GridError, match=says): Settings(**asked)


def test_long_subjects_give_the_ratio_of_last_to_middle_token(model, tmp_path):
    folder = run_methods(model, "long_facts", n=4, known=True, out=tmp_path / "g",
                         settings=Settings(metrics=("ld",), directions=("denoising",), corruptions=("STR",), widths=(1,), controls=()))
    told = json.loads((folder / "ability.json").read_text())["sentence"]
    assert "Chosen: of 32 pairs the first 4 whose clean answer it ranks first" in told
    ratio, table = pd.read_csv(folder / "positions.csv"), pd.read_parquet(folder / "grid.parquet")
    assert ratio["n"].tolist() == [4] and ratio["site"].tolist() == ["mlp_out"]
    def peak(position): return max(t.groupby("layer").apply(lambda l: (l.patched - l.corrupt).mean()).max() for t in [table[(table.site == "mlp_out") & (table.position == position)]])
    assert ratio["last"][0] / ratio["middle"][0] == pytest.approx(peak("entity") / peak("subject_middle"), rel=1e-4)


def test_known_pairs_are_ranked_first(model, monkeypatch):
    """A pool is as large as the task allows; of it only pairs that are right stay, in their order."""
    from bizzaroworld.commands.methods_run import _made
    from bizzaroworld.tasks import ability as room
    real = room._runs
    monkeypatch.setattr(room, "_runs", lambda *asked: real(*asked).assign(first=lambda t: t.index % 3 == 1))  # the embedded model knows them all
    made, said = _made(model, "paired_facts", 6, 0, None, True)
    pool = make_task("paired_facts", model, 48)
    assert [tp.id for tp in made.pairs] == [tp.id for tp in pool.pairs][1::3][:6] and said.startswith(" Chosen: of 48 pairs the first 6")
