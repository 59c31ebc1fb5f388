"""The study end to end on the embedded models: complete, resumable, and able to tell two circuits apart."""
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bizzaroworld import pipeline as study_module
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.files import write_table
from bizzaroworld.model.load import load_model
from bizzaroworld.patch import telling
from bizzaroworld.pipeline import closing_lines, run_study
from bizzaroworld.scale.folders import pair_file
from bizzaroworld.scale.processes import CrewError
from bizzaroworld.scale.units import Alone, sweep_missing
from bizzaroworld.study import experiments
from bizzaroworld.study.runs import RunError, open_run


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("battery") / "few.json"
    path.write_text(json.dumps([dataclasses.asdict(p) for p in load_battery()[::12]]))
    return path


@pytest.fixture(scope="module")
def finished(nano, few, tmp_path_factory):
    """A study of the few pairs; what is not to be written into is a copy of it."""
    return run_study(nano, battery=few, out=tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def copied(finished, tmp_path): return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def undrawn(monkeypatch):
    """Where nothing is asked of the figures: `whole` has them."""
    monkeypatch.setattr(study_module, "save_figures", lambda *_: None)


@pytest.fixture(scope="module")
def whole(nano, tmp_path_factory): return run_study(nano, out=tmp_path_factory.mktemp("whole") / "run")


def test_the_whole_battery_over_all_experiments(whole, nano):
    run = open_run(whole)
    counts = run.effects.groupby("experiment").pair_id.nunique().to_dict()
    assert counts == {e: 60 for e in ("1", "2A", "2B", "3", "4", "4F")}
    assert {len(run.pairs(mode)) for mode in "AB"} == {15, 20} and len(run.pairs("C")) == 60
    assert run.info["model"]["embedded"] and run.info["model"]["weights_sha256"] == nano.weights_sha256
    assert len(list((whole / "pairs").glob("*.parquet"))) == 60
    assert not list(whole.rglob("*.tmp"))
    assert run.triage.total_swing.is_monotonic_decreasing
    assert run.effects.category.notna().all() and run.effects.category.nunique() == 20


def test_effects_agree_with_the_triage(whole):
    run = open_run(whole)
    merged = run.effects.merge(run.triage, on="pair_id")
    assert (merged.clean - merged.ld_clean).abs().max() < 1e-4
    assert (merged.corrupt - merged.ld_corrupt).abs().max() < 1e-4


def test_the_summary_is_json_and_the_lines_are_six(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert "NaN" not in (whole / "summary.json").read_text() and summary
    lines = closing_lines(whole)
    assert lines.index("") == 6 and any("effects.parquet" in line for line in lines)
    assert list((whole / "figures").glob("*.png"))


def test_only_the_unit_with_what_is_missing_is_done_again_to_the_last_bit(nano, few, copied, monkeypatch, undrawn):
    folder = copied
    before = pd.read_parquet(folder / "effects.parquet")
    gone = before.pair_id.unique()[2]
    pair_file(folder, gone).unlink()
    swept, original = [], experiments.run_experiments
    def watched(model, pairs, *args, **kwargs):
        swept.append([tp.id for tp in pairs])
        return original(model, pairs, *args, **kwargs)
    monkeypatch.setattr(experiments, "run_experiments", watched)
    run_study(nano, battery=few, out=folder)
    assert len(swept) == 1 and gone in swept[0]
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "effects.parquet"), before, check_exact=True)


def test_an_interrupted_study_goes_on_where_it_stopped(nano, few, tmp_path):
    calls = []
    def stop(done, total, note):
        calls.append(done)
        if done >= 2: raise KeyboardInterrupt
    def recipe(model): return lambda unit: experiments.run_experiments(model, unit, progress=False)
    pairs = study_module.triage(nano, study_module.load_battery(few)).golden("C")
    with pytest.raises(KeyboardInterrupt): sweep_missing(pairs, tmp_path, recipe, Alone(nano), at_once=2, advance=stop)
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "pairs").glob("*.parquet")}
    assert len(there) == 2 and calls == [2]
    assert sweep_missing(pairs, tmp_path, recipe, Alone(nano), at_once=2) == {} and all(p.stat().st_mtime_ns == t for p, t in there.items())
    assert len(list((tmp_path / "pairs").glob("*.parquet"))) == len(pairs)
    assert sweep_missing(pairs, tmp_path, None, Alone(nano), at_once=2) == {}, "with nothing to do no recipe is followed"


def test_what_is_to_come_is_said_before_it_begins(nano, few, tmp_path, monkeypatch, undrawn):
    """Rows, passes and time of what is missing, controls included; nothing where it is short or nothing is missing."""
    said, told = [], []
    monkeypatch.setattr(telling, "PART", 1e9), monkeypatch.setattr(telling, "LONG", 0.0)
    run_study(nano, battery=few, out=tmp_path / "run", say=lambda line: said.append((line, len(told))), progress=lambda *at: at[2] in ("tokens", "triage") or told.append(at))
    assert len(said) == 1 and said[0][1] == 0 and re.match(r"5 pairs x [\d,]+ interventions: [\d,]+ rows in .*; about \d+ second", said[0][0])
    run_study(nano, battery=few, out=tmp_path / "run", say=lambda line: said.append(line))
    assert len(said) == 1


def test_what_is_worked_out_after_the_sweep_is_said_too(nano, few, copied, monkeypatch):
    """With thousands of pairs it takes minutes: each of its parts is named, whatever the listener answers, and the summary is the same."""
    told, before = [], json.loads((copied / "summary.json").read_text())
    monkeypatch.setattr(study_module, "save_figures", lambda run, folder, say: [say(name) for name in ("triage", "heads")])
    run_study(nano, battery=few, out=copied, progress=lambda done, total, note: told.append(note) or note)
    for mode in "ABC": assert all(f"summary: mode {mode}, {part}" in told for part in ("curves of experiment 3", "release", "heads of experiment 4F", "correlations"))
    assert told[-3:] == ["summary: controls", "figures: triage", "figures: heads"] and json.loads((copied / "summary.json").read_text()) == before


def test_two_workers_give_the_study_of_one(nano, few, finished, tmp_path, undrawn):
    alone, together = finished, run_study("bizzaro-nano", battery=few, out=tmp_path / "two", workers=2)
    for name in ("effects.parquet", "controls.parquet"): pd.testing.assert_frame_equal(pd.read_parquet(alone / name), pd.read_parquet(together / name), atol=1e-4)
    with pytest.raises(CrewError, match="give it by name"): run_study(nano, battery=few, out=tmp_path / "three", workers=2)


def test_a_pair_that_overflows_is_left_out_and_named(nano, few, tmp_path, monkeypatch):
    """One infinite logit difference: the pair is in no mode, no mean and no figure, and the closing lines say so; mended, it is back."""
    original, bad = experiments.run_experiments, study_module.load_battery(few)[1].id
    def overflows(model, pairs, *args, **kwargs):
        rows = original(model, pairs, *args, **kwargs)
        hit = (rows.pair_id == bad) & (rows.layer == 3)
        return rows.assign(patched=rows.patched.where(~hit, np.inf), effect=rows.effect.where(~hit, -np.inf))
    with monkeypatch.context() as patched:
        patched.setattr(experiments, "run_experiments", overflows)
        folder = run_study(nano, battery=few, out=tmp_path / "run", controls=())
    run = open_run(folder)
    assert bad not in run.pairs() and len(run.pairs()) == 4 and bad not in set(run.effects.pair_id) and run.left_out.pair_id.tolist() == [bad]
    assert any(line.startswith(f"Left out: {bad} (not finite") for line in closing_lines(folder))
    assert "Infinity" not in (folder / "summary.json").read_text() and "NaN" not in (folder / "summary.json").read_text()
    mended = open_run(run_study(nano, battery=few, out=folder, controls=()))
    assert len(mended.pairs()) == 5 and not len(mended.left_out) and not any("Left out" in line for line in closing_lines(folder))


def test_an_infinite_number_in_a_pairs_file_moves_nothing(nano, few, tmp_path, undrawn):
    folder = run_study(nano, battery=few, out=tmp_path / "run", controls=())
    before, path = pd.read_parquet(folder / "effects.parquet"), next((folder / "pairs").glob("*.parquet"))
    write_table(path, pd.read_parquet(path).assign(effect=np.inf))
    run_study(nano, battery=few, out=folder, controls=())
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "effects.parquet"), before, check_exact=True)


def test_another_model_or_battery_is_refused_and_nothing_is_touched(nano, few, copied):
    folder = copied
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="name 'bizzaro-nano', not 'bizzaro-nano-local'"):
        run_study("bizzaro-nano-local", battery=few, out=folder)
    with pytest.raises(RunError, match="battery_sha256"): run_study(nano, out=folder)
    with pytest.raises(RunError, match="direction"): run_study(nano, battery=few, out=folder, direction="denoising")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_study_is_repeatable_and_independent_of_memory(nano, few, finished, tmp_path, undrawn):
    two = run_study(nano, battery=few, out=tmp_path / "two", max_rows=7)
    a, b = (pd.read_parquet(f / "effects.parquet") for f in (finished, two))
    pd.testing.assert_frame_equal(a, b, atol=1e-4, rtol=0)


def test_the_controls_are_swept_once_and_can_be_left_out(nano, few, copied, tmp_path, monkeypatch, undrawn):
    folder = copied
    controls = open_run(folder).controls
    assert set(controls.control) == {"unrelated", "shuffled", "untrained"}
    monkeypatch.setattr("bizzaroworld.study.controls.sweep", None)  # nothing may be swept any more
    run_study(nano, battery=few, out=folder)
    pd.testing.assert_frame_equal(open_run(folder).controls, controls)
    for fewer in (("shuffled",), ()):
        run_study(nano, battery=few, out=folder, controls=fewer)
        pd.testing.assert_frame_equal(open_run(folder).controls, controls)
    bare = open_run(run_study(nano, battery=few, out=tmp_path / "bare", controls=()))
    with pytest.raises(RunError, match="holds no controls"): bare.controls


def test_the_paper_reads_the_run_that_the_environment_names(nano, few, tmp_path, monkeypatch, undrawn):
    for name in ("BIZZARO_RUN", "BIZZARO_MODEL"): monkeypatch.delenv(name, raising=False)
    assert study_module.paper_run().model_name == "gemma-3-270m"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_module, "run_study", lambda model, out: run_study(nano, battery=few, out=out, controls=()))
    monkeypatch.setenv("BIZZARO_MODEL", "some/model")
    assert study_module.paper_run().folder == Path("runs/model")
    monkeypatch.setattr(study_module, "run_study", None)
    assert len(study_module.paper_run().triage) == len(json.loads(few.read_text())), "a finished study is not run again"
    monkeypatch.setenv("BIZZARO_RUN", "bizzaro-nano-local")
    assert study_module.paper_run().model_name == "bizzaro-nano-local"
