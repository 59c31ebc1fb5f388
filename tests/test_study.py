"""The study end to end on the embedded models: complete, resumable, and able to tell two circuits apart."""
import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

from bizzaroworld import pipeline as study_module
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.model.load import load_model
from bizzaroworld.pipeline import closing_lines, run_study
from bizzaroworld.study.runs import RunError, open_run, pair_file


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("battery") / "few.json"
    path.write_text(json.dumps([dataclasses.asdict(p) for p in load_battery()[::12]]))
    return path


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


def test_only_what_is_missing_is_done_again(nano, few, tmp_path, monkeypatch):
    folder = run_study(nano, battery=few, out=tmp_path / "run")
    before = pd.read_parquet(folder / "effects.parquet")
    gone = before.pair_id.unique()[2]
    pair_file(folder, gone).unlink()
    swept, original = [], study_module.run_experiments
    def watched(model, pairs, *args, **kwargs):
        swept.extend(tp.id for tp in pairs)
        return original(model, pairs, *args, **kwargs)
    monkeypatch.setattr(study_module, "run_experiments", watched)
    run_study(nano, battery=few, out=folder)
    assert swept == [gone]
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "effects.parquet"), before, atol=1e-5)


def test_an_interrupted_study_goes_on_where_it_stopped(nano, few, tmp_path):
    calls = []
    def stop(done, total, note):
        calls.append(done)
        if done >= 2: raise KeyboardInterrupt
    def sweeper(): return lambda group: study_module.run_experiments(nano, group, progress=False)
    pairs = study_module.load_battery(few)
    result = study_module.triage(nano, pairs)
    with pytest.raises(KeyboardInterrupt):
        study_module.sweep_missing(result.golden("C"), tmp_path, sweeper, at_once=2, advance=stop)
    assert len(list((tmp_path / "pairs").glob("*.parquet"))) == 2 and calls == [0, 2]
    assert study_module.sweep_missing(result.golden("C"), tmp_path, sweeper, at_once=2) == len(pairs) - 2
    assert study_module.sweep_missing(result.golden("C"), tmp_path, None) == 0, "with nothing to do no model is built"


def test_another_model_or_battery_is_refused_and_nothing_is_touched(nano, few, tmp_path):
    folder = run_study(nano, battery=few, out=tmp_path / "run")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="name 'bizzaro-nano', not 'bizzaro-nano-local'"):
        run_study("bizzaro-nano-local", battery=few, out=folder)
    with pytest.raises(RunError, match="battery_sha256"): run_study(nano, out=folder)
    with pytest.raises(RunError, match="direction"): run_study(nano, battery=few, out=folder, direction="denoising")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_study_is_repeatable_and_independent_of_memory(nano, few, tmp_path):
    one = run_study(nano, battery=few, out=tmp_path / "one")
    two = run_study(nano, battery=few, out=tmp_path / "two", max_rows=7)
    a, b = (pd.read_parquet(f / "effects.parquet") for f in (one, two))
    pd.testing.assert_frame_equal(a, b, atol=1e-4, rtol=0)


def test_the_controls_are_swept_once_and_can_be_left_out(nano, few, tmp_path, monkeypatch):
    folder = run_study(nano, battery=few, out=tmp_path / "run")
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


def test_the_paper_reads_the_run_that_the_environment_names(nano, few, tmp_path, monkeypatch):
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
