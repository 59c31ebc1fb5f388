"""Estimates: what is drawn, what the bounds are, and what is said when the data do not tell."""
import numpy as np
import pytest
from scipy import stats

from bizzaroworld.results import estimates as room
from bizzaroworld.results.estimates import Estimate, estimate, estimate_means, estimate_share, mean, number

RNG = np.random.default_rng(7)


def ratio(data):
    return data[..., 0].mean(1) / data[..., 1].mean(1)


def test_the_interval_of_a_mean_is_close_to_students():
    data = RNG.normal(3.0, 2.0, 60)
    found = estimate(data)
    expected = stats.t.interval(0.95, 59, data.mean(), data.std(ddof=1) / np.sqrt(60))
    assert found.value == pytest.approx(data.mean()) and found.n == 60
    assert (found.low, found.high) == pytest.approx(expected, abs=0.12)


def test_many_means_are_the_same_as_one_by_one_and_are_repeatable():
    data = RNG.exponential(1.0, size=(20, 3))
    many, again = estimate_means(data), estimate_means(data)
    for k in many: np.testing.assert_array_equal(many[k], again[k])
    for j in range(3):
        one = estimate(data[:, j])
        assert (one.value, one.low, one.high) == pytest.approx([many[k][j] for k in ("mean", "low", "high")])


def test_a_pair_is_drawn_as_a_whole():
    a = RNG.normal(size=40)
    opposite = np.column_stack([a, -a])
    assert estimate(a).high - estimate(a).low > 0.3
    total = estimate(opposite, lambda d: d.sum(-1).mean(1))
    assert total.low == pytest.approx(0) and total.high == pytest.approx(0)


@pytest.mark.parametrize("draw, truth, n, least", [
    (lambda size: RNG.normal(5, 2, size), 5, 15, 0.88), (lambda size: RNG.normal(5, 2, size), 5, 60, 0.92),
    (lambda size: RNG.exponential(1, size), 1, 60, 0.90)])
def test_intervals_cover_about_as_often_as_they_say(draw, truth, n, least):
    found = estimate_means(draw((n, 600)))
    assert least < ((found["low"] <= truth) & (truth <= found["high"])).mean() < 0.98


def test_the_interval_of_a_ratio_covers():
    hits = 0
    for _ in range(60):
        found = estimate(RNG.gamma(4, [2.0, 1.0], size=(40, 2)), ratio)
        hits += found.low <= 2.0 <= found.high
    assert 50 <= hits


def test_what_the_data_do_not_tell_is_none():
    assert estimate([]) == Estimate(None, None, None, 0)
    assert estimate([2.5]) == Estimate(2.5, None, None, 1)
    assert estimate([2.5, 2.5, 2.5]) == Estimate(2.5, 2.5, 2.5, 3)
    assert estimate(np.zeros((4, 2)), ratio) == Estimate(None, None, None, 4)
    sometimes = np.array([[1.0, 1.0], [2.0, 0.0], [3.0, 0.0]])  # two resamples of 27 in three have no denominator
    assert estimate(sometimes, ratio) == Estimate(6.0, None, None, 3)


def test_means_of_too_few_pairs_and_of_equal_pairs():
    none, one = estimate_means(np.zeros((0, 2))), estimate_means(np.array([[1.0, 2.0]]))
    assert np.isnan(none["mean"]).all() and none["low"].shape == (2,)
    assert one["mean"].tolist() == [1, 2] and np.isnan(one["low"]).all() and np.isnan(one["high"]).all()
    mixed = estimate_means(np.array([[1.0, 5.0], [1.0, 6.0], [1.0, 9.0]]))
    assert mixed["low"][0] == mixed["high"][0] == 1.0 and mixed["low"][1] < 20 / 3 < mixed["high"][1]


def test_shares_are_never_certain():
    everyone = estimate_share(15, 15)
    assert everyone.value == 1.0 and 0.75 < everyone.low < 0.85 and everyone.high == pytest.approx(1.0)
    found = estimate_share(6, 15)
    assert (found.low, found.high) == pytest.approx((0.198, 0.643), abs=2e-3)
    assert estimate_share(0, 0) == Estimate(None)


def test_text_and_json():
    found = Estimate(0.41239, 0.19999, 0.64, 15)
    assert str(found) == "0.41 [0.20, 0.64] (n = 15)" and f"{found:.0%}" == "41% [20%, 64%]"
    assert found.to_dict() == {"value": 0.4124, "low": 0.2, "high": 0.64, "n": 15}
    assert str(Estimate(1.0, n=1)) == "1.00 [no interval] (n = 1)" and f"{Estimate(None)}" == "not defined"
    assert [number(x) for x in (-0.001, -0.006, 0.0, -10.0)] == ["0.00", "-0.01", "0.00", "-10.00"]
    assert number(-0.001, ".0%") == "0%" and f"{Estimate(-1e-9, -0.3, 1e-9, 5)}" == "0.00 [-0.30, 0.00]"
    assert str(Estimate(-0.00001, n=1).to_dict()["value"]) == "0.0"


def test_mean_is_over_pairs():
    data = RNG.normal(size=(3, 5, 2))
    np.testing.assert_allclose(mean(data), data.mean(1))


def test_means_of_many_pairs_have_the_interval_of_scipy():
    rng = np.random.default_rng(3)
    n = room.MANY + 7
    data = np.column_stack([rng.normal(0.3, 1, n), rng.exponential(2, n) ** 3, rng.integers(0, 2, n), np.full(n, 0.1)])
    found, one = estimate_means(data), estimate(data[:, 1])
    for cell in range(3):
        known = stats.bootstrap((data[:, cell],), np.mean, n_resamples=room.RESAMPLES, batch=room.BATCH, rng=np.random.default_rng(room.SEED)).confidence_interval
        np.testing.assert_allclose([found["low"][cell], found["high"][cell]], known, rtol=1e-10)
    assert (one.low, one.high) == (found["low"][1], found["high"][1]) and found["low"][0] < 0.3 < found["high"][0]
    np.testing.assert_allclose([found["low"][3], found["high"][3]], 0.1, rtol=1e-12)
