"""A pair that is too large for one unit is cut, and what comes of it is what would have come of it whole."""
import json
import re
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import lengths

from bizzaroworld import pipeline
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.circuits.attribution import each_token
from bizzaroworld.circuits.paths import edges, sweep_paths
from bizzaroworld.commands.circuits_run import sweep_nodes
from bizzaroworld.methods.grid import Part, Settings, each_head, places_in, run_grid
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.forecast import forecast
from bizzaroworld.patch.interventions import grid
from bizzaroworld.pipeline import run_study
from bizzaroworld.scale import units
from bizzaroworld.scale.folders import pair_file
from bizzaroworld.scale.processes import Source
from bizzaroworld.scale.ray import crew_of
from bizzaroworld.scale.units import Alone, Share, Slice, noted, part_of, read_pairs, size_by, sweep_missing, swept, units_of
from bizzaroworld.study.controls import CONTROLS, asked_of, controls_of
from bizzaroworld.study.experiments import interventions_of, sweep_experiments
from bizzaroworld.tasks.registry import make_task

EXACT = dict(check_exact=False, rtol=0, atol=3e-5)


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def pairs(model): return [align(model, pair) for pair in load_battery()[:4]]


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ordered(rows):
    rows = rows.drop(columns="recovery", errors="ignore")  # in an untrained model the swing is near 0
    return rows.sort_values([c for c in rows if rows[c].dtype.kind not in "fc"], kind="stable").reset_index(drop=True)


class Some(Alone):
    """This process, which ends after so many units."""
    def __init__(self, model, n): super().__init__(model); self.n_left = n
    def run(self, recipe, units):
        for outcome in super().run(recipe, units):
            if not self.n_left: raise KeyboardInterrupt
            self.n_left -= 1
            yield outcome


class Noting(Alone):
    """This process, which notes what it was given."""
    def run(self, recipe, units):
        self.given = list(units)
        yield from super().run(recipe, self.given)


@given(st.lists(st.floats(0, 4, allow_nan=False), max_size=20), st.integers(1, 5))
def test_units_hold_no_more_than_a_unit_and_all_of_every_pair(sizes, at_once):
    things, size = list(range(len(sizes))), sizes.__getitem__
    found = units_of(things, at_once, by_length=False, size=size)
    assert list(dict.fromkeys(tp for unit in found for tp in unit)) == things
    for unit in found:
        if isinstance(unit, Slice): assert len(unit) == 1 and unit.of == np.ceil(sizes[unit[0]]) > 1
        else: assert 1 <= len(unit) <= at_once and (sum(map(size, unit)) <= 1 + 1e-9)
    for i in things: assert [u.which for u in found if isinstance(u, Slice) and u[0] == i] == (list(range(1, int(np.ceil(sizes[i])) + 1)) if sizes[i] > 1 else [])
    if max(sizes, default=0) == 0: assert found == units_of(things, at_once, by_length=False)


@given(st.integers(0, 40), st.integers(1, 50))
def test_slices_have_everything_once_and_in_order(n, of):
    assert [x for which in range(1, of + 1) for x in part_of(Slice("p", which, of), range(n))] == list(range(n)) == list(part_of(["p"], range(n)))


@pytest.mark.parametrize("asked, before, after", [("study", 0, 0), ("study", 900, 0), ("study", 0, 900), ("heads everywhere", 0, 0), ("heads everywhere", 900, 0), ("nodes", 0, 0), ("nodes", 900, 0)])
def test_a_size_is_what_a_sweep_runs(model, pairs, asked, before, after):
    """Within two fifths; a long prompt is much before its entity or after it, and the size knows which."""
    pad, tp = (5,), pairs[0]
    def padded(ids): return pad * before + ids[:-1] + pad * after + ids[-1:]
    tp = replace(tp, clean_ids=padded(tp.clean_ids), corrupt_ids=padded(tp.corrupt_ids), entity_span=tuple(before + i for i in tp.entity_span), places=())
    made = {"study": interventions_of(model), "heads everywhere": [p.intervention for p in each_head(model, "all")], "nodes": each_token(model, tp, ["z", "mlp_out"])}[asked]
    blocks = sum(p.numel() for p in model.hf.model.layers.parameters()) + model.hf.model.norm.weight.numel()
    runs = forecast(model, tp, made).token_layers / model.n_layers * 2 * blocks / units.UNIT
    assert size_by(model, made)(tp) == pytest.approx(runs, rel=0.4) and size_by(model, lambda _: made, 10)(tp) == pytest.approx(10 * size_by(model, made)(tp))


def test_what_is_only_counted_runs_everything(model, pairs):
    blocks = sum(p.numel() for p in model.hf.model.layers.parameters()) + model.hf.model.norm.weight.numel()
    length, parts = len(pairs[0].clean_ids), min(pairs[0].differing)
    assert parts > 2 and size_by(model, 100)(pairs[0]) == pytest.approx((100 * (length - parts) + 2 * length) * 2 * blocks / 2e13)
    assert size_by(model, 100, strangers=True)(pairs[0]) == pytest.approx(102 * length * 2 * blocks / 2e13)


@pytest.mark.parametrize("before, most", [(0, 1.8), (900, 1)])
def test_base_runs_are_never_most_of_the_work(model, pairs, monkeypatch, before, most):
    """However large the model is: slices repeat base runs, and find fewer rows alike. Where base runs are nearly all, nothing is cut."""
    monkeypatch.setattr(units, "UNIT", 1.0)
    asked, pad, tp = interventions_of(model), (5,) * before, pairs[0]
    tp = replace(tp, clean_ids=pad + tp.clean_ids, corrupt_ids=pad + tp.corrupt_ids, entity_span=tuple(before + i for i in tp.entity_span), places=())
    cut = units_of([tp], size=size_by(model, asked))
    assert (len(cut) > 1) == (before == 0)
    assert sum(forecast(model, tp, part_of(unit, asked)).token_layers for unit in cut) <= most * forecast(model, tp, asked).token_layers


def test_many_large_pairs_are_cut():
    assert len(units_of(range(20_000), by_length=False, size=lambda tp: 10)) == 200_000


def recipe_of(model, name, pairs):
    """A recipe, and a pair that it takes."""
    if name in CONTROLS:
        control = controls_of(pairs, [name])[0]
        return control.recipe, control.token_pairs[:1]
    return {"swept": partial(swept, interventions=grid(model, ["resid_pre", "z"], ["entity", "final"])), "study": partial(sweep_experiments, direction="noising", max_rows=8192),
            "nodes": partial(sweep_nodes, direction="noising", metric="ld", sites=("z", "mlp_out"), max_rows=8192),
            "paths": partial(sweep_paths, paths=edges(model, ["L0.mlp", "L1H0"]), direction="denoising")}[name], pairs[:1]


@pytest.mark.parametrize("name", ["swept", "study", *CONTROLS, "nodes", "paths"])
def test_a_recipe_that_is_cut_gives_what_it_gives_whole(model, name):
    recipe, pair = recipe_of(model, name, [align(model, pair) for pair in load_battery()[:30]])
    sweeper = recipe(model)
    whole, cut = sweeper(pair), pd.concat([sweeper(Slice(pair, which, 5)) for which in range(1, 6)], ignore_index=True)
    assert len(whole) >= 10
    pd.testing.assert_frame_equal(ordered(whole), ordered(cut), **EXACT)


@pytest.mark.parametrize("name", CONTROLS)
def test_no_control_is_cut_finer_than_what_it_asks(model, name):
    recipe, pair = recipe_of(model, name, [align(model, pair) for pair in load_battery()[:30]])
    n = len(asked_of(model, name))
    assert all(len(recipe(model)(Slice(pair, which, n))) for which in (1, n)), "an empty slice"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_crew_puts_slices_together(model, pairs, tmp_path, workers):
    recipe = partial(swept, interventions=grid(model, ["resid_pre", "z"], "entity"))
    def size(tp): return 2.5 if tp is pairs[1] else 0.3
    noting = []
    with crew_of(workers, Source("bizzaro-nano"), model) as crew:
        assert sweep_missing(pairs, tmp_path, recipe, crew, size=size, advance=lambda *how: noting.append(how)) == {}
    pd.testing.assert_frame_equal(read_pairs(tmp_path, pairs), recipe(model)(pairs), **EXACT)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {pair_file(tmp_path, tp.id).name for tp in pairs}, "slices are left"
    assert noting[-1][:2] == (4, 4) and sum(f", {i} of 3" in note for _, _, note in noting for i in (1, 2, 3)) == 3 and [done for done, *_ in noting] == sorted(done for done, *_ in noting)


def test_a_process_that_ends_loses_a_slice_and_no_more(model, pairs, tmp_path):
    recipe, size = partial(swept, interventions=grid(model, ["resid_pre", "z"], "entity")), {pairs[0]: 4, pairs[2]: 2}.get
    def go(folder, crew): return sweep_missing(pairs, folder, recipe, crew, size=lambda tp: size(tp, 0.5), by_length=False)
    go(tmp_path / "whole", Alone(model))
    for n in (1, 0, 2, 1):
        with pytest.raises(KeyboardInterrupt): go(tmp_path / "often", Some(model, n))
    last = Noting(model)
    assert go(tmp_path / "often", last) == {}
    assert [(u[0].id, getattr(u, "which", 0)) for u in last.given] == [(pairs[1].id, 0), (pairs[2].id, 1), (pairs[2].id, 2), (pairs[3].id, 0)][1 * (len(last.given) == 3):]
    assert files(tmp_path / "often") == files(tmp_path / "whole")


def test_one_that_ends_before_slices_are_put_together_leaves_that_to_the_next(model, pairs, tmp_path, monkeypatch):
    recipe = partial(swept, interventions=grid(model, ["resid_pre"], "entity"))
    with monkeypatch.context() as patch:
        patch.setattr(units, "_put_together", lambda *_: None)
        with pytest.raises(KeyboardInterrupt): sweep_missing(pairs[:2], tmp_path, recipe, Some(model, 3), size={pairs[0]: 3, pairs[1]: 1}.get, by_length=False)
    assert not pair_file(tmp_path, pairs[0].id).exists()
    nobody = Noting(model)
    assert sweep_missing(pairs[:1], tmp_path, recipe, nobody, size=lambda tp: 3) == {} and not hasattr(nobody, "given")
    pd.testing.assert_frame_equal(read_pairs(tmp_path, pairs[:1]), recipe(model)(pairs[:1]), **EXACT)


def test_a_slice_that_fails_leaves_its_pair_out_and_the_others_stay_for_the_next_time(model, pairs, tmp_path):
    asked = grid(model, ["resid_pre"], "entity")
    def bad(model):
        def sweep(unit):
            if isinstance(unit, Slice) and unit.which == 2: raise RuntimeError("no such luck")
            return swept(model, asked)(unit)
        return sweep
    def go(recipe, crew): return sweep_missing(pairs, tmp_path, recipe, crew, size=lambda tp: 3 if tp is pairs[3] else 0.1)
    assert go(bad, Alone(model)) == {pairs[3].id: "RuntimeError: no such luck"} and not pair_file(tmp_path, pairs[3].id).exists()
    again = Noting(model)
    assert go(partial(swept, interventions=asked), again) == {} and [(u.which, u.of) for u in again.given] == [(2, 3)]


def test_slices_of_a_pair_go_when_it_is_whole_though_another_is_left_out(model, pairs, tmp_path):
    def bad(model): return lambda unit: lengths(model)(unit).assign(patched=float("inf") if unit[0] is pairs[0] and unit.which == 2 else 1.0)
    assert list(sweep_missing(pairs[:2], tmp_path, bad, Alone(model), size=lambda tp: 2)) == [pairs[0].id]
    assert {p for p in tmp_path.rglob("*.parquet")} == {pair_file(tmp_path, pairs[1].id), pair_file(tmp_path, pairs[0].id, "pairs/slices/1-of-2")}


def test_a_slice_that_is_damaged_while_others_are_made_is_named(model, pairs, tmp_path):
    """Its pair is not lost without a word, and the next start makes that slice again."""
    recipe = partial(swept, interventions=grid(model, ["resid_pre"], "entity"))
    def go(crew, advance=None): return sweep_missing(pairs[:2], tmp_path, recipe, crew, size=lambda tp: 3, by_length=False, advance=advance)
    def damage(done, total, note):
        if note.endswith("2 of 3") and not done: pair_file(tmp_path, pairs[0].id, "pairs/slices/1-of-3").write_bytes(b"")
    failed = go(Alone(model), damage)
    assert list(failed) == [pairs[0].id] and failed[pairs[0].id].endswith("was damaged: the same command makes it again")
    again = Noting(model)
    assert go(again) == {} and [(u[0].id, u.which) for u in again.given] == [(pairs[0].id, 1)] and len(read_pairs(tmp_path, pairs[:2])) == 2 * model.n_layers


def test_a_note_says_which_slice_it_is():
    told = []
    for note, was in (("control", "people, 2 of 7"), ("", "people, 2 of 7"), ("control", "people"), ("", "")): noted(lambda *how: told.append(how), note, 1, 3, was)
    assert told == [(1, 3, "control, 2 of 7"), (1, 3, "2 of 7"), (1, 3, "control"), (1, 3, "")]


def test_a_slice_that_is_not_finite_leaves_its_pair_out(model, pairs, tmp_path):
    def bad(model): return lambda unit: lengths(model)(unit).assign(patched=float("inf") if getattr(unit, "which", 0) == 2 else 1.0)
    failed = sweep_missing(pairs, tmp_path, bad, Alone(model), size=lambda tp: 2 if tp is pairs[0] else 0.1)
    assert list(failed) == [pairs[0].id] and "not finite" in failed[pairs[0].id] and not pair_file(tmp_path, pairs[0].id).exists()


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shares_divide_a_pair(model, pairs, tmp_path, order):
    recipe, one = partial(swept, interventions=grid(model, ["resid_pre", "z"], "entity")), pairs[:1]
    def go(folder, crew): return sweep_missing(one, folder, recipe, crew, size=lambda tp: 4)
    for which in order:
        assert not pair_file(tmp_path, one[0].id).exists()
        assert go(tmp_path, Share(model, which, 3)) == {}
    nobody = Noting(model)
    assert go(tmp_path, nobody) == {} and not hasattr(nobody, "given")
    go(tmp_path / "alone", Alone(model))
    assert read_pairs(tmp_path, one).equals(read_pairs(tmp_path / "alone", one))


def test_a_grid_is_cut_by_rows_draws_counted(model, tmp_path, monkeypatch):
    task, settings = make_task("facts", model, n=3), Settings(metrics=("ld", "prob"), widths=(1,), draws=2, controls=("unrelated",))
    whole = run_grid(model, task, tmp_path / "whole", settings)
    asked = [place.intervention for place in places_in(model, task, Part("GN", "noising"), (1,))]
    monkeypatch.setattr(units, "UNIT", 2e13 * max(map(size_by(model, asked, 2), task.pairs)) / 2)
    assert any(isinstance(unit, Slice) for unit in units_of(task.pairs, 6, False, size_by(model, asked, 2)))
    pd.testing.assert_frame_equal(whole, run_grid(model, task, tmp_path / "cut", settings), **EXACT)
    assert not list((tmp_path / "cut").rglob("slices"))


@pytest.mark.slow
def test_a_study_of_slices_is_the_study(tmp_path, monkeypatch):
    """Stopped and gone on with it has the same files; beside the study that nothing is cut of, the same numbers."""
    few = tmp_path / "few.json"
    few.write_text(json.dumps([asdict(pair) for pair in load_battery()[:2]]))
    monkeypatch.setattr(pipeline, "save_figures", lambda *_: None)
    def go(name, **more): return run_study("bizzaro-nano", battery=few, out=tmp_path / name, **more)
    go("whole")
    monkeypatch.setattr(units, "UNIT", 2.5e8)
    monkeypatch.setattr(units, "BASES", 0.5)
    go("cut")
    told = []
    def stop(done, total, note):
        if not re.search(r", \d+ of \d+$", note): return
        told.append(note)
        if len(told) % 3 == 0: raise KeyboardInterrupt
    for _ in range(50):
        try: go("stopped", progress=stop)
        except KeyboardInterrupt: continue
        break
    else: raise AssertionError("it does not come to an end")
    assert len(told) > 5 and any(", 2 of " in note for note in told), told
    for file in ("effects.parquet", "controls.parquet"):
        whole, cut, stopped = (pd.read_parquet(tmp_path / name / file) for name in ("whole", "cut", "stopped"))
        pd.testing.assert_frame_equal(cut, stopped)
        pd.testing.assert_frame_equal(ordered(whole), ordered(cut), **EXACT)
    assert not list((tmp_path / "stopped").rglob("slices"))
