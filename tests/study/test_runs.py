"""Run folders: nothing half-written, nothing mixed up, nothing done twice."""
import csv
import os
import re
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bizzaroworld.files import data_path, replacing, write_json, write_table
from bizzaroworld.scale.folders import pair_file
from bizzaroworld.study.runs import (Run, RunError, _read, claim, control_run, filled, open_run, output, read_info, shipped_runs, slim)

from planted import planted_run, steps

INFO = {"model": {"name": "m", "weights_sha256": "aa"}, "battery_sha256": "bb", "options": {"direction": "noising"},
        "versions": {"pandas": "1"}}


@pytest.mark.parametrize("before", ["what was there", None])
def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path, before):
    path = tmp_path / "file.txt"
    if before: path.write_text(before)
    with pytest.raises(KeyboardInterrupt):
        with replacing(path) as tmp:
            tmp.write_text("half of it")
            raise KeyboardInterrupt
    assert (path.read_text() if path.exists() else None) == before
    assert [p.name for p in tmp_path.iterdir()] == (["file.txt"] if before else [])


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device"), r"^\[Errno 28\] No space left on device: '{path}'$"),
    (OSError(28, "No space left on device", ".out.json.1.tmp", None, "out.json"), r"^\[Errno 28\] No space left on device: '{path}'$"),
    (RuntimeError("writer: No space left on device (os error 28)"), r"^\[Errno 28\] No space left on device: '{path}'$"),
    (PermissionError(13, "Permission denied"), r"^\[Errno 13\] Permission denied: '{path}'$"),
    (OSError("the stream is closed"), r"^{path}: the stream is closed$")])
def test_an_error_names_the_file_that_was_to_be_and_says_what_it_said(tmp_path, error, said):
    path = tmp_path / "out.json"
    with pytest.raises(OSError, match=said.format(path=re.escape(str(path)))) as raised:
        with replacing(path): raise error
    assert raised.value.errno == getattr(error, "errno", 28) and isinstance(raised.value, PermissionError) == isinstance(error, PermissionError)


def test_tables_survive_the_round_trip(tmp_path):
    frame = pd.DataFrame({"layer": pd.array([0, None], "Int64"), "effect": [0.1 + 0.2, -1e-9], "site": ["z", "k"]})
    write_table(tmp_path / "t.parquet", frame)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), frame)
    write_table(tmp_path / "t.csv", frame)
    assert pd.read_csv(tmp_path / "t.csv").effect.tolist() == frame.effect.tolist()


@pytest.mark.parametrize("text", ["a\rb", "a\r\nb", "\r", 'a\r"b, c"', "a\nb", "plain"])
def test_text_with_line_ends_survives_a_csv(tmp_path, text):
    frame = pd.DataFrame({"pair_id": ["1", text, "NA"], "clean_prompt": [text, "x", "y\r"], "rank": [1, 2, 3], "p": [0.5, None, 1e-9], "known": [True, False, True],
                          "first": pd.array([True, None, False], "boolean")})
    write_table(tmp_path / "triage.csv", frame)
    write_table(tmp_path / "triage.parquet", frame)
    found, whole = _read(tmp_path / "triage.csv"), _read(tmp_path / "triage.parquet")
    for name in frame: assert found[name].astype(object).where(found[name].notna(), None).tolist() == whole[name].astype(object).where(whole[name].notna(), None).tolist()
    assert found.known.dtype == bool and found["rank"].dtype == "int64"


@pytest.mark.parametrize("given", [None, 3, pd.DataFrame()])
def test_what_is_no_run_is_told_what_to_give(given):
    with pytest.raises(RunError, match=f"A {type(given).__name__} is no run. Give a run folder.*bizzaro-nano"): open_run(given)


def test_a_folder_is_one_run(tmp_path):
    folder = tmp_path / "run"
    claim(folder, INFO)
    claim(folder, INFO | {"versions": {"pandas": "2"}})
    assert read_info(folder)["versions"] == {"pandas": "1"}, "the first run's record stays"
    for key, other in [("model", {"name": "m", "weights_sha256": "cc"}), ("battery_sha256", "dd"),
                       ("options", {"direction": "denoising"})]:
        with pytest.raises(RunError, match=key): claim(folder, INFO | {key: other})


def test_a_model_is_the_same_where_its_weights_are_whatever_its_folder_is_called(tmp_path):
    claim(tmp_path / "run", INFO)
    claim(tmp_path / "run", INFO | {"model": {"name": "moved", "weights_sha256": "aa"}})
    with pytest.raises(RunError, match="name 'm', not 'other'"): claim(tmp_path / "run", INFO | {"model": {"name": "other", "weights_sha256": "cc"}})
    claim(tmp_path / "unhashed", INFO | {"model": {"name": "m", "weights_sha256": ""}})
    with pytest.raises(RunError, match="name 'm', not 'other'"): claim(tmp_path / "unhashed", INFO | {"model": {"name": "other", "weights_sha256": ""}})


def test_the_refusal_names_what_differs(tmp_path):
    claim(tmp_path / "run", INFO)
    with pytest.raises(RunError, match="weights_sha256 'aa', not 'cc'.*--out"):
        claim(tmp_path / "run", INFO | {"model": {"name": "m", "weights_sha256": "cc"}})


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not empty"): claim(tmp_path, INFO)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_is_no_run_is_not_opened(tmp_path):
    with pytest.raises(RunError, match="not a run folder"): open_run(tmp_path)
    write_json(tmp_path / "run.json", INFO)
    with pytest.raises(RunError, match="not finished"): open_run(tmp_path)
    (tmp_path / "run.json").write_text('{"model":')
    with pytest.raises(RunError, match="damaged"): open_run(tmp_path)


def test_selecting_an_experiment_and_a_mode(tmp_path):
    claim(tmp_path, INFO)
    ids = [f"p{i}" for i in range(4)]
    write_table(tmp_path / "triage.csv", pd.DataFrame({"pair_id": ids, "total_swing": [9.0, 8, 7, 6]}))
    for mode, n in {"A": 1, "B": 2, "C": 4}.items():
        write_table(tmp_path / f"golden_{mode}.csv", pd.DataFrame({"pair_id": ids[:n]}))
    rows = [{"experiment": e, "pair_id": p, "metric": m, "effect": i} for i, p in enumerate(ids)
            for e in ("1", "3") for m in ("ld", "kl")]
    write_table(tmp_path / "effects.parquet", pd.DataFrame(rows))
    run = open_run(tmp_path)
    got = run.select("3", "B")
    assert got.pair_id.tolist() == ["p0", "p1"] and got.total_swing.tolist() == [9, 8] and set(got.metric) == {"ld"}
    with pytest.raises(RunError, match="no experiment '4', only 1, 3"): run.select("4")
    with pytest.raises(RunError, match="mode 'D'"): run.pairs("D")


def test_nothing_is_written_into_the_package(tmp_path):
    made = Run(tmp_path / "mine", {})
    assert output(made, "report.html") == tmp_path / "mine" / "report.html"
    for name in shipped_runs(): assert output(open_run(name), "page.html") == Path(f"{Path(name).name}-page.html")


@pytest.mark.parametrize("name, damage", [
    ("effects.parquet", b""), ("effects.parquet", b"PAR1 and no more"), ("controls.parquet", b"PAR1"), ("triage.csv", b""),
    ("triage.csv", b"a,b\n1,2\n"), ("triage.csv", b"\xff\xfe\x00"), ("golden_A.csv", b""), ("excluded.csv", b"")])
def test_a_damaged_table_is_named_with_what_to_do(tmp_path, name, damage):
    run = planted_run(tmp_path, steps([2] * 3), controls={"unrelated": steps([2] * 3)})
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(RunError, match=f"{name} is damaged.*Run the same study again"):
        run.triage, run.excluded, run.effects, run.controls, run.pairs("A")


def test_a_pair_may_be_called_anything(tmp_path):
    run = planted_run(tmp_path, steps([2] * 4), controls={"unrelated": steps([2] * 4)})
    names = dict(zip(run.pairs(), ["1", "NA", "007", "null"]))
    for path in tmp_path.iterdir():
        if path.suffix == ".json": continue
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        write_table(path, table.assign(pair_id=table.pair_id.map(names), category="None", clean_target=" 5"))
    run = open_run(tmp_path)
    assert run.pairs() == run.triage.pair_id.tolist() == list(names.values())
    assert set(run.triage.category) == {"None"} and set(run.triage.clean_target) == {" 5"}
    assert len(run.select("1")) == 4 * 8 and control_run(run, "unrelated").pairs() == run.pairs()


def test_a_missing_table_is_named_with_what_to_do(tmp_path):
    run = planted_run(tmp_path, steps([2] * 3))
    (tmp_path / "golden_B.csv").unlink()
    with pytest.raises(RunError, match="has no golden_B.csv. Run the same study again"): run.pairs("C")


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"model": "m"}', b'{"model": "\xe9"}'])
def test_a_damaged_run_json_is_named_with_what_to_do(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(RunError, match="run.json is damaged.*run the study again"): open_run(tmp_path)


IDS = st.one_of(st.text(max_size=20), st.sampled_from(["con", "NUL", "com1.x", "aux.", "a.", "a ", " a", ".", "..", "../a", "a/b", "A", "a", "é", "e\u0301", "x" * 300, "x" * 119, "\ud800", "", "~", "a~0", "-a"]),
                st.builds(lambda t, n: t * n, st.text(min_size=1, max_size=3), st.sampled_from([1, 100, 5000])))


@settings(max_examples=500)
@given(IDS, IDS)
def test_a_pair_s_file_can_be_made_on_every_system_and_is_its_own(a, b):
    folder = Path("run")
    found = [pair_file(folder, i) for i in (a, b)]
    for path in found:
        assert path.parent == folder / "pairs" and path.name.isascii() and len(path.name) <= 130 and path.name[0] not in ". -"
        assert not set(path.name) & set('<>:"/\\|?*\0') and path.name == path.name.lower()
        stem = path.name.removesuffix(".parquet")
        assert stem and stem[-1] not in ". " and stem.partition(".")[0].rstrip() not in {"con", "prn", "aux", "nul", *(f"{k}{n}" for k in ("com", "lpt") for n in range(10))}
    assert (found[0] == found[1]) == (a == b)


def test_a_folder_with_a_link_that_leads_out_is_refused(tmp_path):
    claim(tmp_path / "run", INFO)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "pairs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="link to a place outside"): claim(tmp_path / "run", INFO)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis").write_text("years of work")
    for name in ("run.json", f".run.json.{os.getpid()}.tmp"): (tmp_path / "run" / name).symlink_to(tmp_path / "thesis")
    write_json(tmp_path / "run" / "run.json", {})
    assert (tmp_path / "thesis").read_text() == "years of work" and not (tmp_path / "run" / "run.json").is_symlink()


@settings(max_examples=300)
@given(st.lists(st.builds(lambda a, b: a + b, st.sampled_from(["", "=", "+", "-", "@", "\t", "\r", "'", "''", "'=", "＝", " ="]), st.text(st.characters(codec="utf-8"), max_size=8)).filter(bool), min_size=1, max_size=4))
@example(["=cmd|' /C calc'!A0", "'=1", "''-1", "-5", "x"])
def test_no_cell_is_a_formula_and_all_come_back(texts):
    frame = pd.DataFrame({"pair_id": texts, "clean_target": texts[::-1], "effect": [-1.5] * len(texts)})
    with tempfile.TemporaryDirectory() as folder:
        write_table(path := Path(folder) / "t.csv", frame)
        with path.open(encoding="utf-8", newline="") as file: rows = list(csv.reader(file))[1:]
        assert all(cell[0] not in "=+-@\t\r" for row in rows for cell in row[:2]) and all(row[2] == "-1.5" for row in rows)
        found = _read(path)
    assert found.pair_id.tolist() == texts and found.clean_target.tolist() == texts[::-1]


def test_a_folder_of_that_name_without_a_run_does_not_hide_a_shipped_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bizzaro-nano").mkdir()  # of a model, say
    assert open_run("bizzaro-nano").model_name == "bizzaro-nano"
    write_json(tmp_path / "bizzaro-nano" / "run.json", INFO)
    with pytest.raises(RunError, match="not finished"): open_run("bizzaro-nano")


def test_a_run_is_restricted_to_a_list_of_ids():
    run = open_run("bizzaro-nano")
    with pytest.raises(RunError, match="give a list of ids"): run.restricted(run.pairs()[0])
    assert run.restricted(run.pairs()[:1]).pairs() == run.pairs()[:1]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_slim_table_is_the_whole_one_when_read(tmp_path, direction):
    """Of a real run: nothing but the name of the intervention is lost, to the last digit."""
    whole = open_run("bizzaro-nano").effects
    if direction == "denoising":  # the same numbers read the other way round
        whole = whole.assign(direction=direction, effect=whole.patched - whole.corrupt)
    slim(whole).to_parquet(tmp_path / "effects.parquet", index=False)
    back = filled(pd.read_parquet(tmp_path / "effects.parquet"))
    assert set(whole) - set(back) == {"intervention"}
    pd.testing.assert_frame_equal(back[[c for c in whole if c in back]], whole.drop(columns="intervention"), check_exact=True)
    assert (tmp_path / "effects.parquet").stat().st_size < 0.4 * (data_path("runs", "bizzaro-nano", "effects.parquet")).stat().st_size
