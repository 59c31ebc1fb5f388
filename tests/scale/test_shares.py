"""Work in shares, by processes that only have a folder in common: each unit once, nothing that follows too early, the same numbers in the end; and its way to Slurm."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pandas as pd
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import failing, lengths
from typer.testing import CliRunner
from weekly import mostly

from bizzaroworld.battery.builder import build_battery, questions_of
from bizzaroworld.battery.facts import load_facts
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.commands.circuits_run import run_attribution, run_circuit, run_paths
from bizzaroworld.cli import app
from bizzaroworld.methods.grid import Settings
from bizzaroworld.commands.methods_run import run_methods
from bizzaroworld.model.load import load_model
from bizzaroworld.pipeline import run_study
from bizzaroworld.scale.folders import BusyError, held, pair_file
from bizzaroworld.scale.processes import Processes, Source
from bizzaroworld.scale.slurm import Command, Job, _undisturbed, asked_of, checked, submit
from bizzaroworld.scale.units import Alone, Share, end_of_share, sweep_missing, units_of
from bizzaroworld.scale.workers import CrewError, ShareDone


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def pairs(model): return [align(model, pair) for pair in load_battery()[:8]]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A battery file of five pairs."""
    path = tmp_path_factory.mktemp("battery") / "five.json"
    path.write_text(json.dumps([asdict(pair) for pair in load_battery()[:5]]))
    return path


def ids(pairs): return [tp.id for tp in pairs]


@given(st.integers(0, 20), st.integers(1, 7), st.integers(1, 5))
def test_shares_are_all_units_and_each_of_them_once(n, of, at_once):
    units = [list(range(i, min(i + at_once, n))) for i in range(0, n, at_once)]
    shares = [Share(None, which, of).mine(units) for which in range(1, of + 1)]
    assert sorted(i for share in shares for unit in share for i in unit) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("by_length, grows", [(True, False), (False, False), (False, True)])
def test_a_share_sweeps_its_units_and_all_of_them_are_the_whole(model, pairs, tmp_path, by_length, grows):
    told = []
    def go(crew): return sweep_missing(pairs, tmp_path, lengths, crew, at_once=3, by_length=by_length, grows=grows, advance=lambda *how: told.append(how))
    units = units_of(pairs, 3, by_length)
    there = []
    for which in (2, 1):
        assert go(Share(model, which, 2)) == {}
        there += ids(tp for unit in units[which - 1::2] for tp in unit)
        assert {tp.id for tp in pairs if pair_file(tmp_path, tp.id).exists()} == set(there) and told[-1][0] == told[-1][1]
    class Nobody(Alone):
        def run(self, recipe, units):
            assert not units, "something was left"
            yield from ()
    assert go(Nobody(model)) == {} and go(Share(model, 9, 9)) == {}


def test_a_share_counts_its_own_failures(model, pairs, tmp_path):
    mine = ids(sum(Share(model, 1, 2).mine(units_of(pairs, 2)), []))
    bad = partial_failing([mine[0]])
    assert set(sweep_missing(pairs, tmp_path, bad, Share(model, 1, 2), at_once=2)) == {mine[0]}
    assert sweep_missing(pairs, tmp_path, bad, Share(model, 2, 2), at_once=2) == {}


def test_a_share_in_which_all_fails_goes_on_to_what_is_next(model, pairs, tmp_path):
    """It sees too few to say that nothing works: it names them, and does not fail; the whole command judges."""
    mine, said = ids(sum(Share(model, 1, 2).mine(units_of(pairs, 2)), [])), []
    failed = sweep_missing(pairs, tmp_path, partial_failing(mine), Share(model, 1, 2), at_once=2, say=said.append)
    assert list(failed) == mine and set(failed.values()) == {"RuntimeError: no such luck"} and said == ["This share gives up pairs: RuntimeError: no such luck"]
    assert sweep_missing(pairs, tmp_path, lengths, Share(model, 1, 2), at_once=2, part="controls/x") == {}, "what is next"
    with pytest.raises(RuntimeError, match="no such luck"): sweep_missing(pairs, tmp_path, partial_failing(ids(pairs)), Alone(model), at_once=2)
    def full(model): raise OSError(28, "No space left on device")
    with pytest.raises(OSError): sweep_missing(pairs, tmp_path, full, Share(model, 1, 2), part="other")


def partial_failing(bad): return lambda model: failing(model, bad)


def test_what_follows_needs_all(model):
    assert end_of_share(Alone(model)) is None
    with pytest.raises(ShareDone, match="Share 2 of 3 is done.*same command without --workers share"): end_of_share(Share(model, 2, 3))


HOLD = """
import sys, time
from bizzaroworld.scale.folders import held
with held(sys.argv[1], (int(sys.argv[2]), 3)):
    print("in", flush=True)
    sys.stdin.read()
"""


def holding(folder, which):
    """A process that holds a share of a folder until its input ends."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(which)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    return process


def test_shares_hold_a_folder_together_and_nobody_beside_them(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    half = tmp_path / ".a.parquet.123.tmp"
    half.write_text("half")
    others = [holding(tmp_path, which) for which in (1, 2)]
    try:
        with held(tmp_path, (3, 3)): assert half.exists(), "it may be another share's"
        with pytest.raises(BusyError, match="Another process is working"), held(tmp_path, (2, 3)): pass
        with pytest.raises(BusyError, match="Another process is working"), held(tmp_path): pass
        assert half.exists()
    finally:
        for process in others: process.communicate("")
    with held(tmp_path): assert not half.exists() and not list(tmp_path.glob(".lock-*"))
    with held(tmp_path, (1, 3)): pass


def test_a_share_waits_for_another_that_comes_in_and_not_for_a_whole_command(tmp_path, monkeypatch):
    monkeypatch.setattr("bizzaroworld.scale.folders.ENTERING", 0.2)
    whole = subprocess.Popen([sys.executable, "-c", HOLD.replace(", (int(sys.argv[2]), 3)", ""), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert whole.stdout.readline() == "in\n"
    before = time.monotonic()
    with pytest.raises(BusyError), held(tmp_path, (1, 2)): pass
    assert 0.2 <= time.monotonic() - before
    whole.communicate("")


COMMANDS = {
    "study": lambda **how: run_study("bizzaro-nano", controls=["unrelated"], anyway=True, **how),
    "methods": lambda battery, **how: run_methods("bizzaro-nano", "facts", n=6, settings=Settings(metrics=("ld",), directions=("noising",), widths=(1,), controls=("unrelated",), draws=2, group=2), **how),
    "paths": lambda **how: run_paths("bizzaro-nano", receivers=["logits"], n=4, known="all", **how),
    "attribute": lambda **how: run_attribution("bizzaro-nano", methods=["atp"], sites=["z"], exact=True, n=4, known="all", **how),
    "circuit": lambda **how: run_circuit("bizzaro-nano", at=["final"], n=4, known="all", **how)}
RESULTS = {"study": ["effects.parquet", "controls.parquet", "summary.json"], "methods": ["grid.parquet", "detections.csv"], "paths": ["paths.parquet", "paths.csv"],
           "attribute": ["attribution.parquet", "audit.csv"], "circuit": ["circuit.csv", "curve.csv"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(COMMANDS, ["attribute", "paths", "circuit"]))
def test_every_command_can_be_shared_and_comes_to_the_same(name, few, tmp_path, monkeypatch):
    command, whole, shared = COMMANDS[name], tmp_path / "whole", tmp_path / "shared"
    command(battery=few, out=whole)
    for which in (1, 2):
        with pytest.raises(ShareDone, match=f"Share {which} of 2"): command(battery=few, out=shared, workers=f"share:{which}/2")
        assert not any((shared / file).exists() for file in RESULTS[name]) and not (shared / "left_out.csv").exists()
    parts = {str(p.relative_to(whole)) for p in whole.rglob("*.parquet") if p.parent != whole} - {str(p.relative_to(whole)) for p in (whole / "circuits").rglob("*")}
    assert parts == {str(p.relative_to(shared)) for p in shared.rglob("*.parquet")} and parts
    before = {p: p.stat().st_mtime_ns for p in shared.rglob("*.parquet")}
    command(battery=few, out=shared)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "the last one sweeps nothing"
    for file in RESULTS[name]:
        one, two = whole / file, shared / file
        if one.suffix == ".json": assert json.loads(one.read_text()) == json.loads(two.read_text())
        else: pd.testing.assert_frame_equal(*(pd.read_parquet(f) if f.suffix == ".parquet" else pd.read_csv(f) for f in (one, two)))


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(COMMANDS, ["attribute"]))
def test_every_command_has_workers_and_comes_to_the_same(name, few, tmp_path, monkeypatch):
    """The processes do all of it: this one sweeps nothing."""
    more = {"each": True} if name == "circuit" else {}
    COMMANDS[name](battery=few, out=tmp_path / "alone", **more)
    def nobody(self, recipe, units): raise AssertionError("swept by the process that has the workers")
    monkeypatch.setattr(Alone, "run", nobody)
    COMMANDS[name](battery=few, out=tmp_path / "two", workers=2, **more)
    for file in [*RESULTS[name], *["circuits.csv", "clusters.csv"] * (name == "circuit")]:
        one, two = tmp_path / "alone" / file, tmp_path / "two" / file
        if one.suffix == ".json": assert json.loads(one.read_text()) == json.loads(two.read_text())
        else: pd.testing.assert_frame_equal(*(pd.read_parquet(f) if f.suffix == ".parquet" else pd.read_csv(f) for f in (one, two)), atol=1e-4)


def test_only_commands_with_units_are_shared_and_what_is_wrong_is_said_before_any_job():
    with pytest.raises(CrewError, match="one of study, methods"): checked(["triage"])
    with pytest.raises(CrewError, match="one of study, methods"): checked([])
    with pytest.raises(CrewError, match="Leave --workers out"): checked(["study", "--workers=2"])
    assert asked_of(["qos=long", "--gres = gpu:a100:1"]) == {"qos": "long", "gres": "gpu:a100:1"}
    for wrong in ("qos", "qos=", "=long", "two words=x", "Q=1"):
        with pytest.raises(CrewError, match="NAME=VALUE"): asked_of([wrong])
    for ours in ("array=0-9", "--dependency=x", "signal=USR1"):
        with pytest.raises(CrewError, match="is decided here"): asked_of([ours])
    assert "mem_gb" not in Job(options={"mem-per-cpu": "3G"}).parameters() and Job().parameters()["mem_gb"] == 32
    for words, why in ((["study", "--modle", "x"], "No such option"), (["study", "--battery", "absent.json"], "does not exist"), (["triage"], "one of study")):
        result = CliRunner().invoke(app, ["slurm", "--cluster", "local", *words])
        assert result.exit_code == 2 and why in result.output


def fake_slurm(folder, monkeypatch):
    """`sbatch` keeps each script and gives it a number."""
    for name, text in {"sbatch": 'n=$(ls "$0".d | wc -l); cp "$1" "$0".d/$n; echo "Submitted batch job 10$n"', "srun": "exit 1"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "sbatch.d").mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    def scripts(): return [path.read_text() for path in sorted((folder / "sbatch.d").iterdir())]
    return scripts


def test_slurm_gets_an_array_and_a_job_after_it(tmp_path, monkeypatch):
    scripts = fake_slurm(tmp_path, monkeypatch)
    result = CliRunner().invoke(app, ["slurm", "-j", "3", "--at-once", "2", "--gpus", "2", "--hours", "1.5", "--partition", "gpu", "--account", "me", "--option", "qos=long", "--logs", str(tmp_path / "logs"),
                                      "study", "--model", "bizzaro-nano", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "3 shares are job 100; job 101 begins when they have ended" in result.output and "scancel 100 101" in result.output
    array, last = scripts()
    for line in ("--array=0-2%2", "--gpus-per-node=2", "--time=90", "--partition=gpu", "--account=me", "--qos=long", "--mem=32GB", "--job-name=bizzaroworld-study"): assert line in array
    assert all("srun" in script and "--signal=USR2@90" in script for script in (array, last)), "without a step nobody is told that the time is over"
    assert "--array" not in last and "--dependency=afterany:100" in last and "--dependency" not in array
    sent = [Command(*args) for args in jobs_in(tmp_path / "logs")]
    asked = ["study", "--model", "bizzaro-nano", "--out", str(tmp_path / "run")]
    assert sorted(sent, key=lambda c: c.share) == [Command(asked), *(Command(asked, f"share:{i}/3") for i in (1, 2, 3))]


def test_where_the_last_job_is_refused_the_shares_are_taken_back(tmp_path, monkeypatch):
    fake_slurm(tmp_path, monkeypatch)
    (tmp_path / "sbatch").write_text((tmp_path / "sbatch").read_text().replace("n=$(", '[ -e "$0".d/0 ] && echo "too many jobs" >&2 && exit 1\nn=$('))
    (tmp_path / "scancel").write_text('#!/bin/sh\necho "$@" >> "$0".log\n')
    (tmp_path / "scancel").chmod(0o755)
    with pytest.raises(CrewError, match="could not be submitted"): submit(["study"], 2, logs=tmp_path / "logs")
    assert (tmp_path / "scancel.log").read_text().split() == ["100_0", "100_1"]


def jobs_in(logs):
    """What was submitted into a folder of logs."""
    from submitit.core.utils import DelayedSubmission
    found = [DelayedSubmission.load(path).function for path in logs.rglob("*submitted.pkl")]
    return [(f.arguments, f.share) for f in found]


def test_a_ray_cluster_is_one_job_on_several_machines(tmp_path, monkeypatch):
    scripts = fake_slurm(tmp_path, monkeypatch)
    (job,) = submit(["methods", "--task", "ioi"], 4, Job(gpus=8), ray=True, logs=tmp_path / "logs")
    (script,) = scripts()
    for line in ("--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8"): assert line in script
    assert job.job_id == "100" and "srun" in script


def test_without_slurm_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CrewError, match="no srun.*--cluster local"): submit(["study"], logs=tmp_path)
    with pytest.raises(CrewError, match="0 jobs"): submit(["study"], 0, logs=tmp_path, cluster="local")


def test_a_job_fails_with_its_command_and_is_queued_again_as_it_was(tmp_path, few):
    command = Command(["study", "--battery", str(few), "--model", str(tmp_path / "absent")], "share:1/2")
    with pytest.raises(RuntimeError, match="study ended with code 2"): command()
    assert command.checkpoint().function == command


def test_a_command_of_a_job_goes_on_when_an_end_is_announced():
    code = "import os, signal\nfrom bizzaroworld.console import reported\nwith reported(False): [os.kill(os.getpid(), told) for told in (signal.SIGUSR2, signal.SIGTERM)]\nprint('on')"
    ended = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=how) for how in (_undisturbed, None)]
    assert ended[0].stdout == "on\n" and ended[0].returncode == 0
    assert ended[1].stdout == "" and ended[1].returncode != 0


@pytest.mark.slow
def test_a_study_as_jobs_of_this_machine_is_the_study(few, tmp_path):
    asked = ["study", "--battery", str(few), "--no-report", "--anyway", "--out"]
    done = CliRunner().invoke(app, ["slurm", "--cluster", "local", "-j", "2", "--gpus", "0", "--logs", str(tmp_path / "logs"), *asked, str(tmp_path / "shared")])
    assert done.exit_code == 0 and "3 jobs ended here" in done.output and "summary.json" in done.output and "scancel" not in done.output, done.output
    logs = "".join(path.read_text() for path in (tmp_path / "logs").rglob("*.out"))
    assert "Share 1 of 2 is done" in logs and "Share 2 of 2 is done" in logs
    assert CliRunner().invoke(app, [*asked, str(tmp_path / "whole")]).exit_code == 0
    for name in ("effects.parquet", "controls.parquet"): pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / run / name) for run in ("shared", "whole")))


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_jobs_of_this_machine_are_stopped_in_a_line(few, tmp_path):
    """Ctrl-C goes to everybody at the terminal: to the command, to submitit's processes, to the jobs and what they began."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from bizzaroworld.cli import main; main()"
    asked = ["slurm", "--cluster", "local", "-j", "2", "--gpus", "0", "--logs", str(tmp_path / "logs"), "study", "--battery", str(few), "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-c", code, *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    def begun(): return [path for path in (tmp_path / "logs").rglob("*.out") if "bizzaroworld study" in path.read_text()]
    until = time.monotonic() + 100
    while len(begun()) < 2 and process.poll() is None and time.monotonic() < until: time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "Stopped. What is finished is kept: the same command goes on from there.\n") and process.returncode == 130
    def left(): return [p for p in psutil.process_iter() if p.status() != psutil.STATUS_ZOMBIE and os.getsid(p.pid) == process.pid]
    while left() and time.monotonic() < until: time.sleep(0.05)
    assert left() == []


@pytest.mark.slow
def test_jobs_that_fail_here_fail_the_command(few, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "something.txt").touch()
    done = CliRunner().invoke(app, ["slurm", "--cluster", "local", "-j", "1", "--gpus", "0", "--logs", str(tmp_path / "logs"), "study", "--battery", str(few), "--out", str(tmp_path / "other")])
    assert done.exit_code == 2 and "is not empty and holds no run" in done.output and done.output.count("Its log:") == 2, done.output


CLAIM = """
import sys, time
from pathlib import Path
from bizzaroworld.study import runs
first = runs.write_first
def slowly(path, info):
    time.sleep(1)
    return first(path, info)
runs.write_first = slowly
try: runs.claim(Path(sys.argv[1]), {"model": {}, "battery_sha256": sys.argv[2], "options": {}})
except runs.RunError as error: sys.exit("refused: " + str(error))
"""


def test_two_that_claim_a_folder_at_once_are_one_run(tmp_path):
    """Both find it empty; the slower one looks again."""
    def both(*names):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        started = [subprocess.Popen([sys.executable, "-c", CLAIM, str(folder), name], stderr=subprocess.PIPE, text=True) for name in names]
        ends = [(process.communicate()[1], process.returncode) for process in started]
        return sorted(code for _, code in ends), "".join(said for said, _ in ends), json.loads((folder / "run.json").read_text())
    codes, said, there = both("one", "one")
    assert codes == [0, 0] and there["battery_sha256"] == "one"
    codes, said, there = both("one", "two")
    assert codes == [0, 1] and "holds another run" in said and there["battery_sha256"] in ("one", "two")


def test_a_battery_is_not_made_in_shares(tmp_path):
    done = CliRunner().invoke(app, ["battery", "--workers", "share:1/2", "--out", str(tmp_path / "b.json")])
    assert done.exit_code == 2 and "not made in shares" in done.output and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.weekly
def test_a_battery_is_the_same_whoever_asks(model, tmp_path):
    every = questions_of(load_facts())
    some = sorted({q.relation for q in every})[:6]
    questions = [q for q in every if q.relation in some]
    alone = build_battery(model, questions, facts=20)
    with Processes(Source("bizzaro-nano"), 2) as two: together = build_battery(model, questions, facts=20, crew=two)
    with_one = build_battery(model, questions, facts=20, crew=Alone(model))
    assert alone.pairs == together.pairs == with_one.pairs and len(alone.pairs) > 10
    pd.testing.assert_frame_equal(alone.table, together.table, atol=1e-4)
