"""The multiverse from planted tables: conclusions, factors with known shares, windows against sums."""
import itertools

import numpy as np
import pandas as pd
import pytest
from planted_grid import alike, grid, plant

from bizzaroworld.methods.multiverse import (CONCLUSIONS, FACTORS, agreement, layer_curves, multiverse, one_head_holds_half, peak_layer, peak_ratios,
                                             peak_third, position_ratios, profiles, strongest_head, third, variance_explained,
                                             window_layers, window_sums)


def bump(at, n=12): return np.exp(-0.5 * (np.arange(n) - at) ** 2)


# --- conclusions ----------------------------------------------------------------------------------------------------

def test_conclusions_of_one_combination():
    layers = plant(alike(bump(7)))
    assert peak_layer(layers) == 7 and peak_third(layers) == "middle" and strongest_head(layers) is None and one_head_holds_half(layers) is None
    heads = np.zeros((6, 4))
    heads[3, 2], heads[1, 1] = 1.9, -3
    t = plant(alike(heads), site="z")
    assert strongest_head(t) == "L3H2" and one_head_holds_half(t) is False and peak_layer(t) is None
    assert one_head_holds_half(plant(alike(heads + 0.2), site="z")) is True, "2.1 of 4"


@pytest.mark.parametrize("n, expected", [(12, "eeeemmmmllll"), (18, "e" * 6 + "m" * 6 + "l" * 6), (4, "eeml"), (5, "eemml"), (1, "e")])
def test_thirds(n, expected):
    assert "".join(third(layer, n)[0] for layer in range(n)) == expected


def test_the_modal_value_and_its_share():
    t = grid(lambda corruption, direction, **_: bump(3 if corruption == "GN" and direction == "noising" else 8))
    found = multiverse(t)
    assert found.groupby("conclusion").size().to_dict() == {name: 48 for name in CONCLUSIONS} and set(FACTORS) < set(found.columns)
    rows = agreement(found).set_index("conclusion")
    row = rows.loc["layer of the peak"]
    assert (row.value, row.holds, row["of"], row.share) == (8, 36, 48, 0.75)
    assert rows.loc["third of the peak", "value"] == "late"
    assert rows.loc["strongest head", "of"] == 0 and rows.loc["strongest head", "undefined"] == 48
    parts = agreement(found, by="corruption").set_index(["conclusion", "corruption"])
    assert parts.loc[("layer of the peak", "GN"), "share"] == 0.5 and parts.loc[("layer of the peak", "GN"), "tied"] == 1
    assert parts.loc[("layer of the peak", "STR"), "share"] == 1


def test_ones_own_conclusions_and_controls_left_out():
    t = grid(lambda **_: bump(8), wording=("a",), window=(1,))
    both = pd.concat([t, t.assign(control="untrained", patched=9.0)])
    found = multiverse(both, {"pairs": lambda rows: rows.pair_id.nunique()})
    assert found.value.tolist() == [4] * 12


# --- variance -------------------------------------------------------------------------------------------------------

A, B, C = (np.array([1, -1, 0, 0, 0, 0.0]), np.array([0, 0, 1, -1, 0, 0.0]), np.array([0, 0, 0, 0, 1, -1.0]))


def test_a_factor_gets_the_share_that_was_planted():
    """Profiles of one length, so that standardizing scales all alike: common part, a corruption effect, an effect of wording half its size."""
    t = grid(lambda corruption, wording, **_: 5 + 3 * C + {"STR": 2, "GN": -2}[corruption] * A + {"a": 1, "b": -1}[wording] * B)
    rows = variance_explained(t, unit=("layer",)).set_index("factor")
    assert rows.share["corruption"] == pytest.approx(0.8) and rows.share["wording"] == pytest.approx(0.2)
    np.testing.assert_allclose(rows.share[["metric", "direction", "window", "rest"]], 0, atol=1e-12)
    assert rows.of_all["common"] == pytest.approx(9 / 14) and rows.of_all["corruption"] == pytest.approx(4 / 14)
    assert rows.of_all.sum() == pytest.approx(1) and rows.levels.to_dict()["metric"] == 3


def test_an_interaction_is_no_main_effect():
    t = grid(lambda corruption, direction, **_: 3 * C + (2 if (corruption == "GN") == (direction == "noising") else -2) * A)
    rows = variance_explained(t, unit=("layer",)).set_index("factor")
    assert rows.share["rest"] == pytest.approx(1) and rows.share.drop(["rest", "common"]).max() < 1e-12


def test_noise_gives_each_factor_its_chance_share():
    rng = np.random.default_rng(0)
    rows = variance_explained(grid(lambda **_: rng.normal(size=2000), n=1), unit=("layer",), permutations=20).set_index("factor")
    assert rows.chance["corruption"] == 1 / 47 and rows.chance["metric"] == 2 / 47 and rows.chance["rest"] == pytest.approx(1 - 6 / 47)
    assert rows.chance["common"] == 1 / 48
    np.testing.assert_allclose(rows.share.drop("common"), rows.chance.drop("common"), rtol=0.12)
    np.testing.assert_allclose(rows.of_all["common"], 1 / 48, rtol=0.12)


def test_the_95th_percentile_of_permutations_is_passed_one_time_in_twenty():
    passed = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rows = variance_explained(grid(lambda **_: rng.normal(size=8), window=(1,), wording=("a",), n=1), unit=("layer",), permutations=200)
        passed += (rows.share > rows.chance_95)[:3].tolist()
    assert 0.01 < np.mean(passed) < 0.1
    t = grid(lambda metric, **_: 3 * C + {"ld": 1, "prob": 0, "kl": -1}[metric] * A + rng.normal(0, 0.3, 6), window=(1,), wording=("a",))
    rows = variance_explained(t, unit=("layer",)).set_index("factor")
    assert rows.share["metric"] > 1.5 * rows.chance_95["metric"]


def test_the_scale_of_a_metric_explains_nothing():
    t = grid(lambda metric, corruption, **_: {"ld": 100, "prob": 0.01, "kl": 1}[metric] * (3 * C + {"STR": 2, "GN": -2}[corruption] * A) + 7)
    rows = variance_explained(t, unit=("layer",)).set_index("factor")
    assert rows.share["corruption"] == pytest.approx(1) and rows.share["metric"] == pytest.approx(0, abs=1e-12)
    p = profiles(t, unit=("layer",))
    np.testing.assert_allclose(p.mean(axis=1), 0, atol=1e-12), np.testing.assert_allclose(p.std(axis=1, ddof=0), 1)


def test_sums_of_squares_agree_with_a_regression_on_indicators():
    rng = np.random.default_rng(5)
    t = grid(lambda **_: rng.normal(size=7), n=1)
    p, rows = profiles(t, unit=("layer",)), variance_explained(t, unit=("layer",)).set_index("factor")
    y = p.to_numpy() - p.to_numpy().mean(0)
    full = pd.get_dummies(p.index.to_frame(index=False).astype(str)).to_numpy(float)
    for i, name in enumerate(FACTORS):
        others = pd.get_dummies(p.index.to_frame(index=False).astype(str).drop(columns=name)).to_numpy(float)
        left = [((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum() for x in (others, full)]
        assert rows.share[name] == pytest.approx((left[0] - left[1]) / (y ** 2).sum())


def test_a_hole_in_the_design_is_refused_or_cut_out():
    t = grid(lambda corruption, **_: 3 * C + {"STR": 2, "GN": -2}[corruption] * A)
    holed = t[~((t.metric == "kl") & (t.corruption == "GN") & (t.window == 3))]
    with pytest.raises(ValueError, match=r"4 of 48 combinations.*metric 'kl'"): variance_explained(holed, unit=("layer",))
    rows = variance_explained(holed, unit=("layer",), complete=True).set_index("factor")
    assert rows.share["corruption"] == pytest.approx(1) and rows.levels["metric"] == 2
    assert set(rows.combinations) == {32} and set(rows.left_out) == {12}
    with pytest.raises(ValueError, match="one level"): variance_explained(t.query("corruption == 'GN' and metric == 'ld' and direction == 'noising' and window == 1 and wording == 'a'"), unit=("layer",))


def test_a_flat_profile_and_a_missing_component_are_told():
    t = grid(lambda metric, **_: np.zeros(6) if metric == "kl" else 3 * C)
    with pytest.raises(ValueError, match="kl"): variance_explained(t, unit=("layer",))
    t = grid(lambda **_: bump(4))
    cut = t[~((t.window == 3) & t.layer.isin([0, 11]))]
    assert profiles(cut, unit=("layer",)).shape == (48, 10)


def test_a_factor_that_does_not_vary_is_left_out():
    rows = variance_explained(grid(lambda corruption, **_: 3 * C + (corruption == "GN") * A, wording=("a",)), unit=("layer",))
    assert "wording" not in set(rows.factor) and rows.chance[rows.factor == "corruption"].iloc[0] == 1 / 23


# --- windows --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, center, expected", [
    (1, 0, [0]), (1, 11, [11]), (3, 5, [4, 5, 6]), (3, 0, [0, 1]), (3, 11, [10, 11]), (5, 5, [3, 4, 5, 6, 7]), (5, 1, [0, 1, 2, 3]), (5, 11, [9, 10, 11]),
    (10, 5, list(range(10))), (10, 0, [0, 1, 2, 3, 4]), (10, 11, list(range(6, 12))), (2, 5, [4, 5]), (2, 0, [0]), (4, 5, [3, 4, 5, 6])])
def test_windows_lie_as_in_rome(width, center, expected):
    assert list(window_layers(center, width, 12)) == expected


def windowed(factor, n=12, widths=(1, 3, 10), **kinds):
    """Windows whose effect is `factor` times the sum of their layers' effects."""
    single = bump(7, n)
    return pd.concat([plant(alike([(1 if w == 1 else factor) * single[list(window_layers(i, w, n))].sum() for i in range(n)]), window=w, **kinds) for w in widths])


@pytest.mark.parametrize("factor", [0.5, 1, 1.5])
@pytest.mark.parametrize("metric, direction", [("ld", "denoising"), ("kl", "noising")])
def test_a_window_against_the_sum_of_its_layers(factor, metric, direction):
    sums = window_sums(windowed(factor, metric=metric, direction=direction))
    np.testing.assert_allclose(sums[["sum_low", "effect_high"]], sums[["sum", "effect"]])
    assert len(sums) == 24 and set(sums.window) == {3, 10} and (sums.n == 20).all()
    np.testing.assert_allclose(sums.effect, factor * sums["sum"])
    ratios = peak_ratios(windowed(factor, metric=metric, direction=direction)).set_index(["window", "place"])
    np.testing.assert_allclose(ratios[["ratio", "low", "high"]], factor)
    assert list(ratios.loc[3].index) == ["early", "middle", "late", "all"] and ratios.effect_layer[(3, "all")] == 7


def test_a_window_of_one_is_its_layer_and_pairs_are_common():
    t = windowed(1, widths=(1, 3))
    same = window_sums(pd.concat([t, t[t.window == 1].assign(window=1.0)]).drop_duplicates())
    np.testing.assert_allclose(same[same.layer == 5]["sum"], bump(7)[4:7].sum())
    assert (window_sums(t[(t.window == 1) | (t.pair_id != "p3")]).n == 19).all()
    assert (window_sums(t[(t.window == 3) | (t.pair_id != "p3")]).n == 19).all(), "only the pairs that have both"
    with pytest.raises(ValueError, match="layer 6"): window_sums(t[(t.window != 1) | (t.layer != 6)])
    with pytest.raises(ValueError, match="window"): window_sums(t[t.window == 1])


def test_the_ratio_of_last_to_middle_entity_token():
    t = pd.concat([plant(alike(3 * bump(7)), position="entity"), plant(alike(1.5 * bump(4)), position="subject_middle"),
                   plant(alike(bump(4)), position="entity", corruption="GN"), plant(alike(2 * bump(7)), position="subject_middle", corruption="GN"),
                   plant(alike(bump(4)), position="entity", corruption="other")])
    rows = position_ratios(t).set_index("corruption")
    np.testing.assert_allclose(rows.ratio[["STR", "GN"]], [2, 0.5])
    assert rows.last_layer["STR"] == 7 and rows.middle_layer["STR"] == 4 and len(rows) == 2
    with pytest.raises(ValueError, match="subject_middle"): position_ratios(t[t.position == "entity"])


def test_curves_are_means_with_the_percentiles_of_resamples():
    rng = np.random.default_rng(0)
    data = bump(7) + rng.normal(0, 0.5, (25, 12))
    found = layer_curves(pd.concat([plant(data), plant(data, metric="kl", corruption="GN")]))
    row = found[found.corruption == "STR"].set_index("layer")
    np.testing.assert_allclose(row["mean"], data.mean(0) / 4), np.testing.assert_allclose(found["mean"][:12], found["mean"][12:])
    half = 1.96 * data.std(0) / np.sqrt(25) / 4
    np.testing.assert_allclose(row.high - row.low, 2 * half, rtol=0.15)
    assert layer_curves(plant(data[:2])).low.isna().all() and (found.n == 25).all()
    with pytest.raises(ValueError, match="head"): layer_curves(plant(alike(np.ones((2, 2)))))


def test_a_ratio_of_peaks_is_uncertain_where_its_parts_are():
    rng = np.random.default_rng(1)
    t = [plant(np.abs(factor) * bump(7) + rng.normal(0, 0.5, (30, 12)), position=p) for factor, p in ((3, "entity"), (1, "subject_middle"))]
    row = position_ratios(pd.concat(t)).iloc[0]
    assert row.low < row.ratio < row.high and row.high - row.low > 0.5


def test_no_effect_at_the_middle_token_has_no_ratio():
    t = pd.concat([plant(alike(3 * bump(7)), position="entity"), plant(alike(-bump(4)), position="subject_middle")])
    assert position_ratios(t).ratio.isna().all()
