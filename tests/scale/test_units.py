"""A unit of work is done once, whoever does it and whatever happens on the way."""
import gc
import operator
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from recipes import failing, killing, lengths, strange

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.model.load import ModelError, load_model
from bizzaroworld.patch.interventions import grid
from bizzaroworld.scale.processes import Processes, Source, source_of
from bizzaroworld.scale.ray import crew_of
from bizzaroworld.scale.units import Alone, Outcome, UnitError, read_pairs, sweep_missing, swept, units_of
from bizzaroworld.scale.workers import CrewError

SOURCE = Source("bizzaro-nano")


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def pairs(model): return [align(model, pair) for pair in load_battery()[:8]]


@pytest.fixture(scope="module")
def recipe(model): return partial(swept, interventions=grid(model, ["resid_pre", "z"], "entity"))


@pytest.fixture(scope="module")
def two(model):
    """Two workers that serve all tests of this file."""
    with crew_of(2, SOURCE, model) as crew: yield crew


def overflowing(model, bad): return lambda unit: lengths(model)(unit).assign(patched=lambda t: t.patched.where(~t.pair_id.isin(bad), np.inf))


class Unreadable:
    "A recipe that can be written and not read, as one that was defined in a notebook."
    def __call__(self, model): raise NotImplementedError
    def __reduce__(self): return operator.methodcaller("no_such_name"), ("text",)


def test_units_follow_from_the_pairs_alone_and_hold_each_once(pairs):
    units = units_of(pairs, 3)
    assert sorted(map(len, units)) == [2, 3, 3] and sorted(tp.id for unit in units for tp in unit) == sorted(tp.id for tp in pairs)
    assert units_of(pairs[::-1], 3) == units or {len(tp.clean_ids) for tp in pairs} != {len(tp.clean_ids) for tp in set(pairs)}
    assert [tp for unit in units_of(pairs, 3, by_length=False) for tp in unit] == pairs


@pytest.mark.parametrize("workers", [1, 2])
def test_every_crew_gives_the_rows_of_one_sweep(model, pairs, recipe, two, tmp_path, workers):
    crew = Alone(model) if workers == 1 else two
    assert sweep_missing(pairs, tmp_path, recipe, crew, at_once=3) == {}
    found, whole = read_pairs(tmp_path, pairs), recipe(model)(pairs)
    keys = ["pair_id", "intervention"]
    pd.testing.assert_frame_equal(found.sort_values(keys, ignore_index=True), whole.sort_values(keys, ignore_index=True), atol=1e-5)


def test_a_second_recipe_is_followed_and_not_the_first_again(pairs, recipe, two, tmp_path):
    sweep_missing(pairs[:2], tmp_path, recipe, two, at_once=1)
    sweep_missing(pairs[:2], tmp_path, lengths, two, at_once=1, part="lengths")
    assert read_pairs(tmp_path, pairs[:2], "lengths").patched.tolist() == [len(tp.clean_ids) for tp in pairs[:2]]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pair_that_always_fails_is_reported_and_does_not_stop_the_rest(model, pairs, two, tmp_path, workers):
    crew, bad, said = Alone(model) if workers == 1 else two, pairs[4].id, []
    failed = sweep_missing(pairs, tmp_path, partial(failing, bad=[bad]), crew, at_once=4, say=said.append)
    assert failed == {bad: "RuntimeError: no such luck"} and said == [f"{bad} is left out: RuntimeError: no such luck"]
    assert read_pairs(tmp_path, pairs).pair_id.tolist() == [tp.id for tp in pairs if tp.id != bad]
    assert sweep_missing(pairs, tmp_path, lengths, crew, at_once=4) == {} and len(read_pairs(tmp_path, pairs)) == len(pairs)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_fails_everywhere_is_raised_as_it_is(model, pairs, two, tmp_path, workers):
    crew = Alone(model) if workers == 1 else two
    with pytest.raises(ValueError, match="not like this"): sweep_missing(pairs, tmp_path, partial(failing, bad=[tp.id for tp in pairs], error=ValueError("not like this")), crew, at_once=2)
    assert not list(tmp_path.rglob("*.parquet"))
    assert sweep_missing(pairs, tmp_path, lengths, crew) == {}, "the crew goes on after an error"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pair_that_overflows_is_left_out_by_itself(model, pairs, two, tmp_path, workers):
    crew, bad = Alone(model) if workers == 1 else two, pairs[0].id
    failed = sweep_missing(pairs, tmp_path, partial(overflowing, bad=[bad]), crew)
    assert list(failed) == [bad] and "not finite" in failed[bad] and np.isfinite(read_pairs(tmp_path, pairs).patched).all()


def test_a_pair_that_failed_and_is_asked_again_alone_changes_nothing_else(model, pairs, tmp_path):
    """Three pairs of one unit are left out; asked again they fail again, which stops nothing, and those of their unit that were there stay and are not named."""
    bad = [tp.id for tp in units_of(pairs, 4)[0][:3]]
    broken = partial(failing, bad=bad)
    for _ in range(2): assert set(sweep_missing(pairs, tmp_path, broken, Alone(model), at_once=4)) == set(bad)
    assert len(read_pairs(tmp_path, pairs)) == 5


def test_where_most_of_it_fails_the_error_is_raised_and_the_rest_is_kept(model, pairs, tmp_path):
    with pytest.raises(RuntimeError, match="no such luck"): sweep_missing(pairs, tmp_path, partial(failing, bad=[tp.id for tp in pairs[:5]]), Alone(model), at_once=1, by_length=False)
    assert len(read_pairs(tmp_path, pairs)) == 3


def test_a_failed_pass_is_let_go_of_before_the_next_begins(model, pairs, tmp_path):
    alive = []
    class Pass: pass
    def recipe(model):
        def sweep(unit):
            held = Pass()
            alive.append(sum(type(o) is Pass for o in gc.get_objects()))
            if unit[0] is not pairs[0]: raise MemoryError("no room")
            return lengths(model)(unit)
        return sweep
    with pytest.raises(MemoryError): sweep_missing(pairs, tmp_path, recipe, Alone(model), at_once=1, by_length=False)
    assert set(alive) == {1}


def test_what_a_worker_cannot_read_is_told_and_the_worker_stays(pairs, two, tmp_path):
    with pytest.raises(AttributeError, match="no_such_name"): sweep_missing(pairs[:1], tmp_path, Unreadable(), two)
    assert sweep_missing(pairs[:1], tmp_path, lengths, two) == {}


@pytest.mark.slow
@pytest.mark.weekly
def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from bizzaroworld.pipeline import run_study\nrun_study('bizzaro-nano', out='run', workers=2)\n")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.rstrip().splitlines()[-1].endswith("for each of them reads the script too.")


def test_where_no_pair_is_finite_there_is_nothing_to_go_on_with(model, pairs, tmp_path):
    with pytest.raises(UnitError, match="None of 3 pairs could be swept; .*not finite"): sweep_missing(pairs[:3], tmp_path, partial(overflowing, bad=[tp.id for tp in pairs]), Alone(model))


def test_rows_that_do_not_come_back_are_missed(model, pairs, tmp_path):
    class Loses:
        def run(self, recipe, units): return (Outcome(unit, lengths(None)(unit[1:])) for unit in units)
    assert sweep_missing(pairs[:4], tmp_path, lengths, Loses(), by_length=False) == {pairs[0].id: "no rows came back"}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_worker_that_dies_is_replaced_and_its_unit_done(model, pairs, tmp_path):
    """Killed once over one unit: done by another. Killed over it again and again: reported, and the rest is there."""
    said, marks = [], tmp_path / "marks"
    marks.mkdir()
    with crew_of(2, SOURCE, model, said.append) as crew:
        assert sweep_missing(pairs, tmp_path / "a", partial(killing, bad=[pairs[2].id], folder=str(marks), times=1), crew, at_once=2) == {}
        assert len(read_pairs(tmp_path / "a", pairs)) == len(pairs) and len(said) == 1 and "signal 9" in said[0]
        failed = sweep_missing(pairs[:3], tmp_path / "b", partial(killing, bad=[pairs[2].id], folder=str(marks), times=99), crew, at_once=1)
    assert list(failed) == [pairs[2].id] and "workers ended over it" in failed[pairs[2].id] and len(read_pairs(tmp_path / "b", pairs)) == 2


def test_an_error_that_cannot_travel_says_the_same(pairs, two, tmp_path):
    with pytest.raises(RuntimeError, match="Unpicklable: this and that"): sweep_missing(pairs[:1], tmp_path, strange, two)


@pytest.mark.slow
@pytest.mark.weekly
def test_workers_end_with_the_crew(model, pairs, tmp_path):
    with crew_of(2, SOURCE, model) as crew:
        sweep_missing(pairs, tmp_path, lengths, crew, at_once=2)
        processes = [worker.process for worker in crew.workers]
        assert 1 <= len(processes) <= 2 and all(p.is_alive() for p in processes)
    assert not any(p.is_alive() for p in processes)


def test_a_crew_that_cannot_be_had_is_refused_in_words(model, pairs, tmp_path):
    with pytest.raises(CrewError, match="0 workers"): source_of("bizzaro-nano", 0)
    with pytest.raises(CrewError, match="give it by name"): source_of(model, 2)
    assert source_of(model, None) is None and source_of("bizzaro-nano", 2, "cpu") == Source("bizzaro-nano", "cpu") == source_of(Path("bizzaro-nano"), 1, "cpu")
    assert isinstance(crew_of(1, None, model).__enter__(), Alone) and isinstance(crew_of(None, None, model).__enter__(), Alone)
    with crew_of(2, Source("no-such-model"), model) as crew:
        with pytest.raises(ModelError, match="no-such-model"): sweep_missing(pairs, tmp_path, lengths, crew)
    with Processes(Source("bizzaro-nano", weights_sha256="another"), 1) as crew:
        with pytest.raises(CrewError, match="weights have changed"): sweep_missing(pairs, tmp_path, lengths, crew)


def test_workers_take_the_gpus_in_turn():
    assert [Source("m").on(i, 0) for i in range(3)] == [None] * 3 == [Source("m").on(i, 1) for i in range(3)]
    assert [Source("m", "cpu").on(i, 4) for i in range(2)] == ["cpu"] * 2
