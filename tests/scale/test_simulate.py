"""A simulated study: limits that can be worked out by hand, parts that add up, nothing slower with more workers, the same seed the same study."""
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from bizzaroworld.scale.simulate import Cluster, curve, simulate, stops_at

UNITS = [3.0, 1.0, 4.0, 1.5, 9.0, 2.5, 6.0]
HARD = Cluster(5, load=7, write=0.1, transfer=0.2, spread=0.4, death=1 / 60, replace=3)


def test_one_worker_loads_and_does_one_after_another():
    o = simulate(UNITS, Cluster(1, load=10))
    assert (o.makespan, o.speedup, o.tail, o.lost, o.writer) == (10 + sum(UNITS), 1, 0, 0, 0) and o.utilization == sum(UNITS) / (10 + sum(UNITS))


def test_more_workers_than_units_take_as_long_as_the_longest():
    assert simulate(UNITS, Cluster(len(UNITS), load=10)).makespan == simulate(UNITS, Cluster(1000, load=10)).makespan == 10 + max(UNITS)


@pytest.mark.parametrize("n, w", [(60, 4), (60, 7), (61, 4), (1000, 64), (5, 8)])
def test_equal_units_go_in_rounds(n, w):
    o = simulate([2.0] * n, Cluster(w, load=60))
    assert o.makespan == 60 + math.ceil(n / w) * 2 and o.work == pytest.approx(2 * n / w)
    assert o.tail == pytest.approx(math.ceil(n / w) * 2 - 2 * n / w)


def test_by_hand():
    """Two workers: 3 and 1, then 4 at 1, 1.5 at 3, 9 at 4.5, 2.5 at 5, 6 at 7.5; the rows of a unit take one second."""
    assert simulate(UNITS, Cluster(2)).makespan == 13.5
    o = simulate(UNITS, Cluster(2, write=1))
    assert o.makespan == 15.5 and o.writer == 2, "the units of 13.5 come together"
    assert simulate(UNITS, Cluster(2, write=1, transfer=0.5)).makespan == 16


def test_a_writer_that_is_always_busy_sets_the_pace():
    n = 500
    assert simulate([0.0] * n, Cluster(8, load=5, write=0.25)).makespan == 5 + n * 0.25
    o = simulate([1.0] * n, Cluster(100, load=5, write=0.25))
    assert o.makespan == 5 + 1 + n * 0.25 and o.why == "writer"
    assert simulate([1.0] * n, Cluster(1000, load=5, write=0.25)).makespan == o.makespan


def test_a_worker_dies_and_its_unit_is_done_again():
    """Lives known beforehand: the first unit dies after 4 of its 10 seconds; 2 until a new worker begins to load, 3 to load."""
    from bizzaroworld.scale import simulate as room

    class Lives:
        def __init__(self, *lives): self.lives = iter(lives)
        def __call__(self): return next(self.lives, math.inf)
        def loading(self, load): return load
    done, lost, deaths = room._events([10.0, 10.0], Cluster(1, load=3, replace=2), Lives(4))
    assert (done, lost, deaths) == ([3 + 4 + 2 + 3 + 10, 3 + 4 + 2 + 3 + 20], 4 + 2 + 3, 1)
    done, lost, deaths = room._events([10.0, 10.0, 1.0], Cluster(2, load=3, replace=2), Lives(4))
    assert done == [13, 22, 14], "the lost unit comes before the third, and the new worker is ready at 12, before the other is done"


def test_loading_may_fail_too():
    mean = np.mean([simulate([0.0], Cluster(1, load=10, death=0.1), seed=s).makespan for s in range(2000)])
    assert mean == pytest.approx((math.e - 1) * 10, rel=0.08), "the mean time until one lives through 10 seconds at rate 0.1: (exp(1) - 1) / 0.1"


def test_deaths_cost_what_they_should():
    """A unit of t seconds at rate r takes (exp(r t) - 1) / r in the mean where a new worker comes at once."""
    means = [simulate([20.0] * 200, Cluster(1, death=0.02), seed=s).makespan / 200 for s in range(40)]
    assert np.mean(means) == pytest.approx((math.exp(0.4) - 1) / 0.02, rel=0.03)


def test_spread_keeps_the_mean():
    o = simulate([2.0] * 100_000, Cluster(1, spread=0.5))
    assert o.work == pytest.approx(200_000, rel=0.01)
    assert simulate([2.0] * 100_000, Cluster(100, spread=0.5)).tail > simulate([2.0] * 100_000, Cluster(100)).tail == 0


@given(st.lists(st.floats(0, 50), min_size=1, max_size=40), st.integers(1, 12), st.floats(0, 30), st.floats(0, 3), st.integers(0, 5))
@settings(max_examples=60)
def test_parts_add_up_and_no_worker_is_in_the_way(units, workers, load, write, seed):
    c = Cluster(workers, load=load, write=write, spread=0.3)
    o, more = simulate(units, c, seed), simulate(units, replace(c, workers=workers + 1), seed)
    assert o.work + o.load + o.lost + o.tail + o.writer == pytest.approx(o.makespan)
    assert more.makespan <= o.makespan + 1e-9 and o.tail >= -1e-9 and o.writer >= -1e-9
    assert max(sum(units) * 0, load, write * len(units)) <= o.makespan <= o.serial + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_parts_add_up_with_deaths(seed):
    o = simulate(UNITS * 20, HARD, seed)
    assert o.deaths > 0 < o.lost and o.work + o.load + o.lost + o.tail + o.writer == pytest.approx(o.makespan)


def test_faster_in_the_mean_with_more_workers_and_fewer_deaths():
    def mean(**other): return np.mean([simulate(UNITS * 20, replace(HARD, **other), seed).makespan for seed in range(60)])
    by_workers = [mean(workers=w) for w in (1, 2, 4, 8, 16)]
    assert by_workers == sorted(by_workers, reverse=True)
    by_deaths = [mean(death=d) for d in (0, 1 / 600, 1 / 60, 1 / 30)]
    assert by_deaths == sorted(by_deaths) and by_deaths[-1] > 1.2 * by_deaths[0]


def test_the_same_seed_is_the_same_study():
    assert simulate(UNITS, HARD, 3) == simulate(UNITS, HARD, 3) != simulate(UNITS, HARD, 4)


def test_a_million_units_in_seconds():
    import time
    start = time.process_time()
    o = simulate([2.0] * 1_000_000, replace(HARD, workers=1000, death=1e-5))
    assert time.process_time() - start < 12 and o.deaths > 5 and o.why == "writer"


def test_where_it_stops():
    """60 units of 2 s, 60 s to load: 180, 120, 90 s on 1, 2, 4 workers, so that the step from 2 to 4 gains too little."""
    found = curve([2.0] * 60, [1, 2, 4, 8], Cluster(1, load=60))
    assert found.makespan.tolist() == [180, 120, 90, 76] and set(found.why) == {"load"} and stops_at(found) == 2
    assert stops_at(curve([2.0] * 64, [1, 2, 4, 8], Cluster(1))) is None
    assert set(found.columns) >= {"workers", "makespan", "speedup", "utilization", "why"} and isinstance(found, pd.DataFrame)


@pytest.mark.parametrize("wrong", [lambda: Cluster(0), lambda: Cluster(1, load=-1), lambda: simulate([], Cluster(1)), lambda: simulate([-1.0], Cluster(1))])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError): wrong()
