"""Workers on a Ray cluster: the rows of one sweep, whatever ends on the way, and nothing left of them."""
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest

ray = pytest.importorskip("ray", reason="the extra [ray]")

from recipes import failing, killing, lengths, strange  # noqa: E402

from bizzaroworld.battery.formats import load_battery  # noqa: E402
from bizzaroworld.battery.tokens import align  # noqa: E402
from bizzaroworld.model.load import ModelError, load_model  # noqa: E402
from bizzaroworld.patch.interventions import grid  # noqa: E402
from bizzaroworld.scale.processes import Source  # noqa: E402
from bizzaroworld.scale.ray import RayCrew, crew_of  # noqa: E402
from bizzaroworld.scale.units import read_pairs, sweep_missing, swept  # noqa: E402
from bizzaroworld.scale.workers import CrewError  # noqa: E402

pytestmark = pytest.mark.slow
SOURCE = Source("bizzaro-nano")
REPO = Path(__file__).resolve().parents[2]
PATIENCE = 500  # seconds; a cluster begins in 5 on a quiet machine, and in a minute on a busy one


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def pairs(model): return [align(model, pair) for pair in load_battery()[:8]]


@pytest.fixture(scope="module")
def recipe(model): return partial(swept, interventions=grid(model, ["resid_pre", "z"], "entity"))


@pytest.fixture(scope="module")
def two(model):
    """Two workers that serve most tests of this file."""
    said = []
    with crew_of("ray:2", SOURCE, model, said.append) as crew:
        crew.said = said
        yield crew


def slow(model, folder):
    """A recipe that takes a second for each unit, and leaves a mark."""
    def sweep(unit):
        (Path(folder) / f"at-{os.getpid()}").touch()
        time.sleep(1)
        return lengths(model)(unit)
    return sweep


def processes_of_ray():
    """The servers of Ray and its workers on this machine, by their ids. (Agents of its own notice by and by that their server is gone.)"""
    found = {p.pid: (p.info["name"], " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["name", "cmdline"])}
    return {pid for pid, (name, line) in found.items() if name in ("raylet", "gcs_server") or "ray::" in line and "Agent" not in line}


def gone(pids, seconds=60):
    """Whether these processes have ended, now or soon."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids): time.sleep(0.2)
    return not any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids)


def test_a_cluster_that_is_not_there_is_named():
    """First of all tests: what is found automatically could be that of the others."""
    code = "from types import SimpleNamespace as S\nfrom bizzaroworld.scale.processes import Source\nfrom bizzaroworld.scale.ray import crew_of\n" \
           "for a in ('127.0.0.1:1', 'auto'):\n try:\n  with crew_of('ray:' + a, Source('m'), S(weights_sha256='')): print('?')\n except Exception as e: print(type(e).__name__, e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(REPO)})
    first, second = done.stdout.splitlines()
    assert first.startswith("CrewError No Ray cluster answers at 127.0.0.1:1") and second.startswith("CrewError Ray cannot join the cluster at auto: ")


def test_two_actors_give_the_rows_of_one_sweep(model, pairs, recipe, two, tmp_path):
    assert two.n == 2 and sweep_missing(pairs, tmp_path, recipe, two, at_once=3) == {}
    found, whole, keys = read_pairs(tmp_path, pairs), recipe(model)(pairs), ["pair_id", "intervention"]
    pd.testing.assert_frame_equal(found.sort_values(keys, ignore_index=True), whole.sort_values(keys, ignore_index=True), atol=1e-5)


def test_each_unit_comes_back_once_and_both_work(pairs, two, tmp_path):
    units = [[tp] for tp in pairs]
    outcomes = list(two.run(partial(slow, folder=str(tmp_path)), units))
    assert sorted(o.pairs[0].id for o in outcomes) == sorted(tp.id for tp in pairs) and all(o.pairs in units and o.rows.pair_id.tolist() == [o.pairs[0].id] for o in outcomes)
    pids = {int(o.rows.pid[0]) for o in outcomes}
    assert len(pids) == 2 and os.getpid() not in pids


def test_a_second_recipe_is_followed_and_not_the_first_again(pairs, recipe, two, tmp_path):
    sweep_missing(pairs[:2], tmp_path, recipe, two, at_once=1)
    sweep_missing(pairs[:2], tmp_path, lengths, two, at_once=1, part="lengths")
    assert read_pairs(tmp_path, pairs[:2], "lengths").patched.tolist() == [len(tp.clean_ids) for tp in pairs[:2]]


def test_a_pair_that_always_fails_is_reported_and_does_not_stop_the_rest(pairs, two, tmp_path):
    bad = pairs[4].id
    assert sweep_missing(pairs, tmp_path, partial(failing, bad=[bad]), two, at_once=4) == {bad: "RuntimeError: no such luck"}
    assert read_pairs(tmp_path, pairs).pair_id.tolist() == [tp.id for tp in pairs if tp.id != bad]


def test_an_error_that_cannot_travel_says_the_same(pairs, two, tmp_path):
    with pytest.raises(RuntimeError, match="Unpicklable: this and that"): sweep_missing(pairs[:1], tmp_path, strange, two)


def test_a_run_that_is_given_up_does_not_disturb_the_next(pairs, two, tmp_path):
    for outcome in two.run(partial(slow, folder=str(tmp_path)), [[tp] for tp in pairs]): break
    found = list(two.run(lengths, [[tp] for tp in pairs]))
    assert len(found) == len(pairs) and all(o.error is None and o.rows.patched[0] == len(o.pairs[0].clean_ids) for o in found)


def ended(crew):
    """What was said of workers that ended; that none is ready yet may be said too, on a busy machine."""
    return [line for line in crew.said if line.startswith("A worker ended: ")]


def test_an_actor_that_dies_is_replaced_and_its_unit_done(pairs, two, tmp_path):
    """Killed once over one unit: done by another. Killed over it again and again: reported, and the rest is there."""
    marks = tmp_path / "marks"
    marks.mkdir()
    two.said.clear()
    assert sweep_missing(pairs, tmp_path / "a", partial(killing, bad=[pairs[2].id], folder=str(marks), times=1), two, at_once=2) == {}
    assert len(read_pairs(tmp_path / "a", pairs)) == len(pairs) and len(list(marks.iterdir())) == 1
    (said,) = ended(two)
    assert "Another takes its place" in said and len(said) < 300
    failed = sweep_missing(pairs[:3], tmp_path / "b", partial(killing, bad=[pairs[2].id], folder=str(marks), times=99), two, at_once=1)
    assert list(failed) == [pairs[2].id] and "3 workers ended over it" in failed[pairs[2].id] and len(read_pairs(tmp_path / "b", pairs)) == 2


def test_an_actor_killed_from_outside_is_replaced(pairs, two, tmp_path):
    """Whoever kills it, and whenever."""
    found, killed = [], None
    two.said.clear()
    for outcome in two.run(partial(slow, folder=str(tmp_path)), [[tp] for tp in pairs]):
        found.append(outcome)
        if not killed:
            killed = sorted(int(p.name[3:]) for p in tmp_path.glob("at-*"))[0]
            os.kill(killed, signal.SIGKILL)
    assert sorted(o.pairs[0].id for o in found) == sorted(tp.id for tp in pairs) and all(o.error is None for o in found)
    assert len(ended(two)) == 1 and gone([killed])


def test_what_cannot_be_loaded_is_raised_as_it_is(pairs, two, tmp_path):
    """In the cluster that is already there, which these crews do not end."""
    two._end(two.hands)  # so that there is room
    with RayCrew(Source("no-such-model"), 1) as crew, pytest.raises(ModelError, match="no-such-model"): list(crew.run(lengths, [pairs]))
    with RayCrew(Source("bizzaro-nano", weights_sha256="another"), 1) as crew, pytest.raises(CrewError, match="weights have changed"): list(crew.run(lengths, [pairs]))
    assert ray.is_initialized() and len(list(two.run(lengths, [pairs]))) == 1


BEGINS = """
import os, sys, time
from bizzaroworld.model.load import load_model
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.scale.processes import Source
from bizzaroworld.scale.ray import crew_of
from test_ray import slow, processes_of_ray
model = load_model("bizzaro-nano")
pairs = [align(model, pair) for pair in load_battery()[:30]]
from functools import partial
try:
    with crew_of("ray:1", Source("bizzaro-nano"), model) as crew:
        for outcome in crew.run(partial(slow, folder=sys.argv[1]), [[tp] for tp in pairs]):
            print("at work", flush=True)
            if len(sys.argv) > 2: break
except KeyboardInterrupt: print("stopped", flush=True)
import ray
print("initialized:", ray.is_initialized())
"""


def begin(tmp_path, *args, **options):
    return subprocess.Popen([sys.executable, "-c", BEGINS, str(tmp_path), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests"), str(Path(__file__).parent)])}, **options)


def test_a_cluster_of_our_own_ends_with_the_block_and_says_nothing(tmp_path):
    before, folders = processes_of_ray(), set(Path("/tmp").glob("ray-*"))
    process = begin(tmp_path, "once")
    said, complained = process.communicate(timeout=PATIENCE)
    assert (said.splitlines(), complained, process.returncode) == (["at work", "initialized: False"], "", 0)
    assert gone(processes_of_ray() - before) and set(Path("/tmp").glob("ray-*")) <= folders


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_no_process_behind(tmp_path, how):
    """Ctrl-C goes to all processes of the terminal; kill -9 to the one that began."""
    before = processes_of_ray()
    process = begin(tmp_path, start_new_session=True)
    assert process.stdout.readline() == "at work\n", process.communicate()[1]
    new = processes_of_ray() - before
    assert new
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    said, _ = process.communicate(timeout=PATIENCE)
    if how == signal.SIGINT: assert "stopped" in said and "initialized: False" in said and process.returncode == 0
    assert gone(new | (processes_of_ray() - before))


CLUSTER = """
import sys, time
from functools import partial
from pathlib import Path
from ray.cluster_utils import Cluster
from bizzaroworld.model.load import load_model
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.scale.processes import Source
from bizzaroworld.scale.ray import crew_of
from test_ray import slow
import ray
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
model = load_model("bizzaro-nano")
pairs = [align(model, pair) for pair in load_battery()[:8]]
said, found, lost = [], [], False
with crew_of(f"ray:{cluster.address}", Source("bizzaro-nano"), model, said.append) as crew:
    crew.n = 2
    for outcome in crew.run(partial(slow, folder=sys.argv[1]), [[tp] for tp in pairs]):
        found.append(outcome)
        if len({int(p.name[3:]) for p in Path(sys.argv[1]).glob("at-*")}) == 2 and not lost:
            lost = True
            cluster.remove_node(nodes[0], allow_graceful=False)
print("lost:", lost, "done:", sorted(o.pairs[0].id for o in found) == sorted(tp.id for tp in pairs), "errors:", sum(o.error is not None for o in found), "said:", len(said))
ray.init(address=cluster.address, log_to_driver=False)
print("still there:", sum(node["Alive"] for node in ray.nodes()) >= 2)
ray.shutdown()
cluster.shutdown()
"""


def test_a_lost_node_loses_no_unit_and_a_joined_cluster_is_left_running(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests"), str(Path(__file__).parent)])}
    before = processes_of_ray()
    done = subprocess.run([sys.executable, "-c", CLUSTER, str(tmp_path)], capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert "lost: True done: True errors: 0 said: 1" in done.stdout and "still there: True" in done.stdout, done.stdout + done.stderr
    assert gone(processes_of_ray() - before)
