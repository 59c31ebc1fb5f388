"""Detections from planted tables: the rule, its sign, its bootstrap, its controls, and the two warnings."""
import numpy as np
import pandas as pd
import pytest
from planted_grid import alike, at_z, plant

from bizzaroworld.methods.detections import (METHOD, component_table, control_counts, detection_table, detections, moved, support,
                                             support_matrix, warnings_of)

HEADS, LAYERS = ("layer", "head"), ("layer",)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("metric", ["ld", "logprob", "prob", "kl", "rank"])
def test_support_is_positive_where_a_component_supports_the_clean_answer(metric, direction):
    planted = np.array([[[0.5, -0.2], [0.1, 0.0]]])
    t = plant(planted, metric=metric, direction=direction)
    np.testing.assert_allclose(support(t), planted.ravel())
    np.testing.assert_allclose(moved(t), planted.ravel() / 4)


def test_support_by_hand():
    def one(metric, direction, clean, corrupt, patched): return support(pd.DataFrame(dict(metric=[metric], direction=direction, clean=clean, corrupt=corrupt, patched=patched)))[0]
    assert one("ld", "denoising", 3, -1, 1) == 2 and one("ld", "noising", 3, -1, 1) == 2, "halfway is half of the swing in both directions"
    assert one("kl", "denoising", 0, 5, 1) == 4 and one("kl", "noising", 0, 5, 1) == 1, "a KL that falls restores the clean run; one that rises left it"
    assert one("rank", "denoising", 0, 9, 12) == -3
    assert one("ld", "noising", 3, -1, 4) == -1, "the patch helped the clean answer, so the component spoke against it"


def test_a_metric_of_ones_own_says_which_way_is_better():
    t = plant(alike([1.0, 2.0], 2)).assign(metric="surprise")
    with pytest.raises(ValueError, match="surprise.*better"): support(t)
    np.testing.assert_allclose(support(t.assign(better=-1)), [-1, -2, -1, -2])
    with pytest.raises(ValueError, match="sideways"): support(t.assign(better=1, direction="sideways"))


@pytest.mark.parametrize("metric", ["ld", "kl"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("z, sign", [(2.5, "positive"), (-2.5, "negative"), (1.5, ""), (-1.5, ""), (2.001, "positive"), (1.999, "")])
def test_the_rule_is_two_standard_deviations(z, sign, direction, metric):
    t = plant(alike(at_z(z)), direction=direction, metric=metric, site="z")
    found = component_table(t).set_index("name")
    assert found.z["L5H1"] == pytest.approx(z) and found["mean"]["L5H1"] == pytest.approx(at_z(z)[5, 1])
    assert found.sign["L5H1"] == sign and (found.sign.drop("L5H1") == "").all() and len(found) == 32
    listed = detections(t)
    assert list(listed.name) == ["L5H1"] * bool(sign) and set(METHOD) < set(listed.columns)


def test_the_standard_deviation_is_over_components_not_over_prompts():
    rng = np.random.default_rng(0)
    data = alike(at_z(2.5), 50) + (noise := rng.normal(0, 3, (50, 8, 4))) - noise.mean(0)
    assert component_table(plant(data, site="z")).set_index("name").z["L5H1"] == pytest.approx(2.5)


def test_a_scale_per_combination_changes_no_detection():
    t = plant(np.random.default_rng(3).normal(0, 1, (30, 6, 4)) + at_z(2.5, (6, 4)) * 20, site="z")
    z = {v: component_table(t, value=v).z for v in ("support", "fraction", "moved")}
    np.testing.assert_allclose(z["support"], z["fraction"]), np.testing.assert_allclose(z["support"], z["moved"])
    with pytest.raises(ValueError, match="'recovery'"): component_table(t, value="recovery")


def test_layers_and_head_positions_are_units_too():
    by_layer = component_table(plant(alike(at_z(2.5, (12,), (7,)))), unit=LAYERS)
    assert by_layer.name[by_layer.sign == "positive"].tolist() == ["L7"]
    t = pd.concat([plant(alike(part), site="z", position=p) for p, part in zip(("final", "S2"), at_z(-2.5, (2, 6, 3), (1, 2, 0)))])
    found = detections(t, unit=("layer", "head", "position"))
    assert found.name.tolist() == ["L2H0 @S2"] and found.sign.tolist() == ["negative"]
    with pytest.raises(ValueError, match="position"): detections(t)


def test_each_combination_has_its_own_rule():
    t = pd.concat([plant(alike(at_z(2.5)), site="z"), plant(alike(at_z(2.5, place=(2, 2)) * 50), corruption="GN", site="z")])
    assert detections(t)[["corruption", "name"]].values.tolist() == [["STR", "L5H1"], ["GN", "L2H2"]]


def test_rows_of_layers_do_not_disturb_heads():
    t = pd.concat([plant(alike(at_z(2.5)), site="z"), plant(alike(np.full(8, 99.0))), plant(alike(np.full(8, 99.0)), window=3)])
    assert detections(t).name.tolist() == ["L5H1"] and set(component_table(t).window) == {1}
    with pytest.raises(ValueError, match="with a head"): detections(plant(alike(np.ones(8))))


def test_mixed_rows_are_refused_by_name():
    t = plant(alike(at_z(2.5)), site="z")
    with pytest.raises(ValueError, match="wording"): detections(pd.concat([t, t.assign(wording="other")]))
    with pytest.raises(ValueError, match="task"): detections(pd.concat([t, t.assign(task="other")]))
    other = pd.concat([t, t.assign(wording="other", pair_id="o" + t.pair_id)])
    assert component_table(other).n.iloc[0] == 40, "other pairs of another wording are more pairs"


def test_too_few_components_can_hold_no_detection():
    with pytest.raises(ValueError, match="5 components"): component_table(plant(alike([0, 0, 0, 0, 99.0])), unit=LAYERS)
    assert component_table(plant(alike([0, 0, 0, 0, 0, 99.0])), unit=LAYERS).sign.iloc[-1] == "positive"


def test_no_effect_at_all_is_no_detection():
    found = component_table(plant(np.zeros((5, 8, 4)), site="z"))
    assert (found.z == 0).all() and (found.sign == "").all() and (found.share == 0).all()


def test_a_pair_that_lacks_a_component_is_left_out_and_counted():
    t = plant(alike(at_z(2.5), 10), site="z")
    assert component_table(t.drop(index=3)).n.unique().tolist() == [9]
    with pytest.raises(ValueError, match="No pair"): component_table(t[(t.layer > 0) | (t["head"] > 0) | t.pair_id.isin(["p1"])].query("not (pair_id == 'p1' and layer == 2)"))


# --- bootstrap ------------------------------------------------------------------------------------------------------

def noisy(z, sd, n=60, seed=1):
    noise = np.random.default_rng(seed).normal(0, sd, (n, 12, 12))
    return plant(alike(at_z(z, (12, 12)), n) + noise - noise.mean(0), site="z")


def test_a_huge_effect_is_detected_in_every_resample_and_a_small_one_in_none():
    found = component_table(noisy(8, 0.05)).set_index("name")
    assert found.share["L5H1"] == 1 and found.share.drop("L5H1").max() < 0.05


def test_at_the_border_it_is_a_coin():
    assert 0.35 < component_table(noisy(2.0, 0.05)).set_index("name").share["L5H1"] < 0.65
    assert 0.35 < component_table(noisy(-2.0, 0.05)).set_index("name").share["L5H1"] < 0.65, "the share is of the side on which it lies"


def test_the_bootstrap_is_the_loop_that_one_would_write():
    t = noisy(2.1, 0.2, n=15)
    data, rng, hits = support_matrix(t, HEADS).to_numpy(), np.random.default_rng(0), 0
    for weights in rng.multinomial(15, np.full(15, 1 / 15), 1000):
        means = np.repeat(data, weights, axis=0).mean(0)
        hits += means[61] > means.mean() + 2 * means.std()
    assert component_table(t).set_index("name").share["L5H1"] == hits / 1000 and 0.2 < hits / 1000 < 0.9
    assert component_table(t).equals(component_table(t)) and not component_table(t, seed=1).share.equals(component_table(t).share)


def test_two_pairs_are_too_few_to_resample():
    assert component_table(plant(alike(at_z(2.5), 2), site="z")).share.isna().all()


# --- controls -------------------------------------------------------------------------------------------------------

def controlled():
    real = plant(alike(at_z(2.5)), site="z")
    small = plant(alike(at_z(3, place=(1, 1)) / 100), site="z", control="unrelated")
    large = plant(alike(at_z(-3, place=(1, 2)) * 3), site="z", control="untrained")
    return pd.concat([real, small, large])


def test_controls_are_counted_by_their_own_rule_and_by_the_real_runs():
    counts = control_counts(controlled()).set_index("control")
    assert counts.detected.to_dict() == {"unrelated": 1, "untrained": 1}
    assert counts.beyond["unrelated"] == 0, "a hundredth of the real effects is beyond no bound of the real run"
    bounds = component_table(controlled())[["low", "high"]].iloc[0]
    expected = ((3 * at_z(-3, place=(1, 2)) < bounds.low) | (3 * at_z(-3, place=(1, 2)) > bounds.high)).sum()
    assert counts.beyond["untrained"] == expected > 1
    np.testing.assert_allclose(counts.spread["unrelated"], at_z(3).std() / at_z(2.5).std() / 100)


def test_controls_stand_beside_the_detections_and_are_none_of_them():
    found = detections(controlled())
    assert found[["name", "unrelated", "unrelated_beyond", "untrained"]].values.tolist() == [["L5H1", 1, 0, 1]]
    assert "unrelated" not in detections(plant(alike(at_z(2.5)), site="z"))
    only = control_counts(pd.concat([controlled(), plant(alike(at_z(2.5)), site="z", corruption="GN")]))
    assert set(only.corruption) == {"STR"}


def test_the_table_is_laid_out_as_in_the_paper():
    t = pd.concat([controlled(), plant(alike(at_z(-2.5)), site="z", corruption="GN"), plant(alike(at_z(1.5)), site="z", metric="prob")])
    table = detection_table(component_table(t), control_counts(t))
    assert list(table.index.names) == list(METHOD) and list(table.columns) == ["positive", "negative", "unrelated", "untrained"]
    assert table.loc[("STR", "ld", "denoising", 1), ["positive", "negative", "unrelated"]].tolist() == ["L5H1 100%", "", "1 (0)"]
    assert table.loc[("GN", "ld", "denoising", 1), ["positive", "negative", "unrelated"]].tolist() == ["", "L5H1 100%", ""]
    assert table.loc[("STR", "prob", "denoising", 1), ["positive", "negative"]].tolist() == ["", ""], "a combination without detections has its row"


# --- warnings -------------------------------------------------------------------------------------------------------

def test_a_ratio_over_nearly_nothing_is_counted_and_has_no_value():
    clean = np.array([4.0] * 9 + [0.3])
    t = plant(alike(at_z(2.5), 10), site="z", clean=clean)
    row = warnings_of(t).query("warning == 'denominator'").iloc[0]
    assert (row["count"], row["of"], row.names) == (1, 10, "p9") and row.threshold == pytest.approx(0.4)
    assert moved(t)[t.pair_id == "p9"].isna().all() and moved(t)[t.pair_id != "p9"].notna().all()
    assert component_table(t, value="moved").n.iloc[0] == 9 and component_table(t).n.iloc[0] == 10
    assert warnings_of(plant(alike(at_z(2.5)), site="z"))["count"].tolist() == [0]
    zero = plant(alike(at_z(2.5), 4), site="z", clean=0.0)
    assert moved(zero).isna().all() and warnings_of(zero).iloc[0]["count"] == 4


def two_metrics(direction, prob_of_negative, clean, corrupt):
    """Heads L5H1 positive and L2H0 negative under ld; under probability L2H0 does what `prob_of_negative` says."""
    ld, prob = np.random.default_rng(0).uniform(-0.05, 0.05, (2, 8, 4))
    ld[5, 1], ld[2, 0], prob[5, 1], prob[2, 0] = 1, -1, 0.2, prob_of_negative
    prob[0, 0], prob[0, 1] = 0.15, 0.15
    kinds = dict(direction=direction, site="z")
    return pd.concat([plant(alike(ld), **kinds), plant(alike(prob), metric="prob", clean=clean, corrupt=corrupt, **kinds)])


@pytest.mark.parametrize("direction, clean, corrupt", [("denoising", 0.6, 0.03), ("noising", 0.97, 0.2)])
def test_probability_has_no_room_for_a_negative_component(direction, clean, corrupt):
    t = two_metrics(direction, -0.03, clean, corrupt)
    found = component_table(t)
    assert found[found.sign == "negative"][["metric", "name"]].values.tolist() == [["ld", "L2H0"]]
    row = warnings_of(t).query("warning == 'floor'").iloc[0]
    assert (row.metric, row["count"], row["of"], row.names) == ("prob", 1, 1, "L2H0")
    assert row.room == pytest.approx(0.03) and row.threshold == pytest.approx(-found[found.metric == "prob"].low.iloc[0]) and row.threshold > 0.03


def test_with_room_nothing_is_hidden_by_the_floor():
    wide = warnings_of(two_metrics("denoising", -0.03, 0.9, 0.5)).query("warning == 'floor'").iloc[0]
    assert (wide["count"], wide["of"]) == (0, 1), "it was missed, and not for want of room"
    seen = warnings_of(two_metrics("denoising", -0.2, 0.9, 0.25)).query("warning == 'floor'").iloc[0]
    assert (seen["count"], seen["of"], seen.names) == (0, 1, "")
    alone = two_metrics("denoising", -0.03, 0.6, 0.03).query("metric == 'prob'")
    assert pd.isna(warnings_of(alone).query("warning == 'floor'")["count"].iloc[0]), "without ld nothing can be said"
