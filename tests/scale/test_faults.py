"""Runs that are killed, stopped, damaged and started again end as one that nothing happened to."""
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from weekly import mostly

from bizzaroworld import pipeline
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.model.load import load_model
from bizzaroworld.pipeline import run_study
from bizzaroworld.scale.folders import pair_file

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and forks")


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Drawing takes most of the time of a small study, and nothing here is about it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "save_figures", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("battery") / "few.json"
    path.write_text(json.dumps([dataclasses.asdict(p) for p in load_battery()[::10]]))
    return path


@pytest.fixture(scope="module")
def undisturbed(nano, few, tmp_path_factory): return run_study(nano, battery=few, out=tmp_path_factory.mktemp("whole") / "run")


def same(folder, whole):
    "That a run holds what another does, to the last bit, and nothing that is half-written."
    for name in ("effects.parquet", "controls.parquet"): pd.testing.assert_frame_equal(pd.read_parquet(folder / name), pd.read_parquet(whole / name), check_exact=True)
    assert json.loads((folder / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())
    files = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert files == {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--unit", "1e8", "--no-figures")], ids=["", "in slices"])
def test_a_study_that_is_killed_at_random_moments_ends_as_one_that_was_not(more):
    """`benchmarks/faults.py` does it two hundred times; here a few."""
    done = subprocess.run([sys.executable, REPO / "benchmarks" / "faults.py", "--kills", "6", "--pairs", "2", "--seed", "1", *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] == 6 and json.loads(done.stdout)["studies_that_ended"] >= 1


def test_damaged_files_are_made_again(nano, few, undisturbed, tmp_path):
    """Cut off, emptied, a flipped bit: in files of pairs and in all that is made of them."""
    folder = run_study(nano, battery=few, out=tmp_path / "run")
    def damaged(path, damage): path.write_bytes(damage(path.read_bytes()))
    cut, empty, flipped, *_ = sorted((folder / "pairs").iterdir())
    damaged(cut, lambda raw: raw[:len(raw) // 2]), damaged(empty, lambda raw: b""), damaged(flipped, lambda raw: raw[:900] + bytes([raw[900] ^ 16]) + raw[901:])
    damaged(next((folder / "controls" / "untrained").iterdir()), lambda raw: raw[:-4])
    for name in ("effects.parquet", "controls.parquet", "triage.csv", "golden_B.csv", "summary.json", "excluded.csv"): damaged(folder / name, lambda raw: raw[:len(raw) // 3])
    run_study(nano, battery=few, out=folder)
    same(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", mostly([(signal.SIGINT, 130), (signal.SIGTERM, 143)], [(signal.SIGTERM, 143)]))
def test_a_study_that_is_stopped_says_so_and_goes_on(few, undisturbed, tmp_path, number, code):
    """As a user would: the command, a signal once the first pair is there, and the same command again."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from bizzaroworld import cli, pipeline; pipeline.save_figures = lambda *_: None; cli.main()", "study", "--battery", str(few), "--out", str(folder), "--no-report", "--rows", "1"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "golden_C.csv").exists() and first.poll() is None: time.sleep(0.01)
    first.send_signal(number)
    out, err = first.communicate(timeout=120)
    assert (first.returncode, out) == (code, "") and err.splitlines()[-1] == "Stopped. What is finished is kept: the same command goes on from there."
    assert "Traceback" not in err and not (folder / "effects.parquet").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "effects.parquet"), pd.read_parquet(undisturbed / "effects.parquet"), atol=1e-4)


@pytest.mark.slow
def test_a_study_that_is_stopped_while_figures_are_drawn_says_so(few, tmp_path):
    """The summary is there then, and stays."""
    code = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); from bizzaroworld import cli, pipeline; pipeline.save_figures = lambda *_: time.sleep(100); cli.main()"
    process = subprocess.Popen([sys.executable, "-c", code, "study", "--battery", str(few), "--out", str(tmp_path / "run"), "--no-report"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "summary.json").exists() and process.poll() is None: time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "") and err.splitlines()[-1] == "Stopped. What is finished is kept: the same command goes on from there." and "Traceback" not in err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["modes"]


def test_a_folder_that_is_in_use_is_refused_and_nothing_in_it_changes(nano, few, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    held = subprocess.Popen([sys.executable, "-c", f"import time\nfrom bizzaroworld.scale.folders import held\nwith held({str(folder)!r}): print('held', flush=True); time.sleep(60)"],
                            stdout=subprocess.PIPE, text=True)
    held.stdout.readline()
    with pytest.raises(ValueError, match="Another process is working on"): run_study(nano, battery=few, out=folder)
    held.kill()
    held.wait()
    assert [p.name for p in folder.iterdir()] == [".lock"] and not pair_file(folder, "p").parent.exists()


def test_the_page_of_faults_names_tests_that_are_there():
    cells = json.loads((REPO / "nbs" / "faults.ipynb").read_text("utf-8"))["cells"]
    named = re.findall(r"tests/[\w/]+\.py", "".join("".join(c["source"]) for c in cells))
    assert len(set(named)) > 8 and [name for name in named if not (REPO / name).is_file()] == []
