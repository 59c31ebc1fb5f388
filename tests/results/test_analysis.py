"""Analysis and summary, on runs whose answers were planted."""
import json
import re

import numpy as np
import pandas as pd
import pytest
from planted import planted_run, steps
from scipy import stats

from bizzaroworld.files import write_table
from bizzaroworld.results.correlations import correlations, pearson, spearman
from bizzaroworld.results.effects import AnalysisError, curve, effect_matrix, ratios, run_direction
from bizzaroworld.results.estimates import Estimate
from bizzaroworld.results.heads import Concentration, concentration, head_table
from bizzaroworld.results.layers import crossing, depth_below, onset_layer, release_layer, worst_layer
from bizzaroworld.results.summary import cautions, findings, summarize
from bizzaroworld.study.runs import RunError, open_run

RNG = np.random.default_rng(3)


def noisy(leaves, sd=0.02, **options):
    """Step curves with a little noise, so that intervals have a width."""
    clean = steps(leaves, **options)
    return clean + RNG.normal(0, sd, clean.shape)


# --- values ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("direction, sign", [("noising", -1), ("denoising", 1)])
def test_values_of_both_directions(tmp_path, direction, sign):
    fractions, swings = RNG.uniform(-0.2, 1.1, (5, 4)), np.array([8.0, 16.0, 4.0, 2.0, 32.0])
    run = planted_run(tmp_path, fractions, swings=swings, direction=direction)
    order = np.argsort(-swings)
    assert run_direction(run) == direction
    got = {v: effect_matrix(run, "3", value=v) for v in ("effect", "moved", "fraction")}
    assert got["effect"].index.tolist() == [f"pair-{i:02d}" for i in order] and got["effect"].columns.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(got["fraction"], fractions[order])
    np.testing.assert_allclose(got["moved"], (fractions * swings[:, None])[order])
    np.testing.assert_allclose(got["effect"], sign * got["moved"])
    recovery = run.select("3").pivot(index="pair_id", columns="layer", values="recovery").loc[got["fraction"].index]
    np.testing.assert_allclose(got["fraction"], 1 - recovery if direction == "noising" else recovery)


def test_pairs_without_a_swing_have_no_fraction_but_an_effect(tmp_path):
    run = planted_run(tmp_path, steps([3, 3, 3, 3]), swings=[20, 10, 0.5, -4], final=steps([3, 3, 3, 3]))
    assert effect_matrix(run, "3").shape == (4, 8)
    assert effect_matrix(run, "3", value="fraction").index.tolist() == ["pair-00", "pair-01"]
    assert set(curve(run, "3").n) == {4} and set(curve(run, "3", value="fraction").n) == {2}
    assert crossing(run).n == 2


def told(summary: dict) -> list[str]:
    """The findings without the cautions that a small planted run deserves."""
    return [line for line in findings(summary) if not line.startswith("Caution:")]


def test_a_run_of_which_no_pair_has_a_swing_is_summarized_without_numbers(tmp_path):
    summary = summarize(planted_run(tmp_path, steps([3, 3]), swings=[0.5, 0.2], known=[False, False]))
    mode = summary["modes"]["C"]
    assert mode["crossing"]["entity"] == {"value": None, "low": None, "high": None, "n": 0}
    assert mode["curves"]["3"]["resid_pre"]["fraction"]["mean"] == [None] * 8
    assert len(told(summary)) == 2 and "prefers the right answer on 2 of 2 pairs, ranks it first among its kind on 0, first of all on 0" in told(summary)[0]
    assert "Only 0 prefer both answers by 2 logits" in findings(summary)[0] and "no evidence of storage" in findings(summary)[0]


# --- curves ---------------------------------------------------------------------------------------------------------

def test_curve_is_the_mean_over_the_pairs_of_the_mode(tmp_path):
    fractions, swings = RNG.uniform(0, 1, (20, 8)), np.linspace(30, 11, 20)
    run = planted_run(tmp_path, fractions, swings=swings)
    a, c = curve(run, "3", "A"), curve(run, "3", "C")
    np.testing.assert_allclose(a["mean"], -(fractions * swings[:, None])[:15].mean(0))
    np.testing.assert_allclose(c["mean"], -(fractions * swings[:, None]).mean(0))
    assert a.n.unique().tolist() == [15] and curve(run, "3", "B").n.unique().tolist() == [4]
    assert ((c.low < c["mean"]) & (c["mean"] < c.high)).all()
    assert c.site.unique().tolist() == ["resid_pre"] and c.layer.tolist() == list(range(8))


def test_curve_of_five_sites_keeps_them_apart(tmp_path):
    run = planted_run(tmp_path, steps([4, 4]), sublayers={"mlp_out": np.full((2, 8), 0.25)})
    assert curve(run, "2B").site.unique().tolist() == ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    found = curve(run, "2B", value="fraction").set_index(["site", "layer"])["mean"].unstack()
    np.testing.assert_allclose(found.loc["mlp_out"], 0.25)
    np.testing.assert_allclose(found.loc["resid_pre"], steps([4])[0])
    np.testing.assert_allclose(curve(run, "2A", value="fraction").set_index("site").loc["resid_pre", "mean"], 1 - steps([4])[0])
    np.testing.assert_allclose(effect_matrix(run, "2B", value="fraction", site="mlp_out"), 0.25)


# --- one layer for each pair ----------------------------------------------------------------------------------------

def test_release_is_where_it_was_planted(tmp_path):
    run = planted_run(tmp_path, steps([5] * 6))
    for value in ("effect", "fraction"):
        found = release_layer(run, value=value)
        assert found.table.layer.tolist() == [5] * 6 and found.count() == 6 and not found.table.returns.any()
        assert found.mean == Estimate(5.0, 5.0, 5.0, 6) and found.counts.tolist() == [0, 0, 0, 0, 0, 6, 0, 0]


def test_pairs_that_do_not_release_are_counted_and_not_in_the_mean(tmp_path):
    curves = np.vstack([steps([3, 5, 8, 0]), [1, 1, 0, 0, 1, 0, 0, 0]])
    found = release_layer(planted_run(tmp_path, curves, swings=[20, 19, 18, 17, 16]))
    assert found.table.status.tolist() == ["found", "found", "never", "from the start", "found"]
    assert found.table.layer.tolist()[:2] == [3, 5] and found.table.layer.isna().tolist() == [False, False, True, True, False]
    assert found.table.layer[4] == 2 and found.table.returns.tolist() == [False, False, False, False, True]
    assert found.mean.value == pytest.approx(10 / 3) and found.mean.n == 3
    assert found.count("never") == found.count("from the start") == 1 and found.counts.sum() == 3


def test_release_is_below_and_onset_at_the_threshold(tmp_path):
    curves = [[1, 0.2, 0.19, 0]]
    assert release_layer(planted_run(tmp_path / "a", curves, swings=[10.0])).table.layer.tolist() == [2]
    run = planted_run(tmp_path / "b", 1 - np.array([[0, 0.49, 0.5, 1]]), swings=[10.0], final=[[0, 0.49, 0.5, 1]])
    assert onset_layer(run).table.layer.tolist() == [2] == onset_layer(run, value="fraction").table.layer.tolist()
    assert onset_layer(run, threshold=5.1).table.layer.tolist() == [3]
    assert release_layer(run, value="fraction", threshold=0.51).table.layer.tolist() == [2]
    never = onset_layer(run, threshold=99.0)
    assert never.count("never") == 1 and never.mean == Estimate(None, n=0)


def test_onset_at_the_first_layer_is_an_answer(tmp_path):
    found = onset_layer(planted_run(tmp_path, steps([4, 4]), final=np.ones((2, 8))))
    assert found.table.layer.tolist() == [0, 0] and found.count() == 2


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_worst_layer_is_the_largest_move_and_of_equal_ones_the_first(tmp_path, direction):
    final = np.array([[0, 0.2, 0.9, 0.1], [0, 0.7, 0.7, 0.7], [0, -0.9, 0, 0], [0, -0.9, 0, 0.1]])
    found = worst_layer(planted_run(tmp_path, 1 - final, final=final, direction=direction), "1")
    assert found.table.layer.tolist()[:2] == [2, 1] and found.table.layer[3] == 3
    assert found.table.status.tolist() == ["found", "found", "never", "found"]
    assert found.mean.value == 2.0 and found.counts.tolist() == [0, 1, 1, 1]


def test_worst_layer_of_one_site_among_several(tmp_path):
    mlp = np.zeros((3, 8))
    mlp[:, 6] = 0.3
    run = planted_run(tmp_path, steps([4] * 3), sublayers={"mlp_out": mlp})
    assert worst_layer(run, "2B", site="mlp_out").table.layer.tolist() == [6, 6, 6]
    with pytest.raises(AnalysisError, match="2B has several sites: name one of resid_pre"): worst_layer(run, "2B")
    with pytest.raises(AnalysisError, match="3 has no site 'z': name one of resid_pre"): worst_layer(run, "3", site="z")


# --- crossing -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, depth", [
    ([1, 1, 0.75, 0.25], 2.5), ([1, 0, 0, 0], 0.5), ([1, 1, 1, 1], 3.5), ([1, 0.2, 0.8, 0.2], 2.5), ([0.4, 0.4, 0.3, 0], None),
    ([0.5, 0, 0, 0], 0.0), ([1, 0.9, 0.6, 0.1], 2.2)])
def test_depth_is_interpolated_and_the_last_one(tmp_path, values, depth):
    found = depth_below(np.array([values]))[0]
    assert np.isnan(found) if depth is None else found == pytest.approx(depth)
    run = planted_run(tmp_path, [values] * 3)
    for experiment in ("3", "1"):  # the final token's curve is its mirror image
        e = crossing(run, experiment=experiment)
        assert e.n == 3 and (e.value is None if depth is None else (e.value, e.low, e.high) == pytest.approx([depth] * 3))


def test_the_crossing_is_of_the_mean_curve_and_its_interval_is_over_pairs(tmp_path):
    early, late = noisy([2] * 15 + [3] * 15, sd=0.1), noisy([6] * 30, sd=0.1)
    a, b = (crossing(planted_run(tmp_path / name, c)) for name, c in (("early", early), ("late", late)))
    assert 1.5 < a.low < a.value < a.high < 2.6 and a.high - a.low > 0.05
    assert a.high < b.low and b.value == pytest.approx(5.5, abs=0.1)


def test_two_models_that_leave_at_the_same_depth_are_not_told_apart(tmp_path):
    a, b = (crossing(planted_run(tmp_path / name, noisy([4] * 30, sd=0.1))) for name in "ab")
    assert a.low < b.high and b.low < a.high


def test_crossing_is_of_two_experiments_only(tmp_path):
    with pytest.raises(AnalysisError, match="2A"): crossing(planted_run(tmp_path, steps([2, 2])), experiment="2A")


# --- heads ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def headed(tmp_path):
    """Three pairs, four layers of three heads: L2H1 moves 0.4, L3H0 -0.3, L1H2 0.2 in two pairs and 0.6 in the third."""
    z = np.zeros((3, 4, 3))
    z[:, 2, 1], z[:, 3, 0], z[:, 1, 2] = 0.4, -0.3, [0.2, 0.2, 0.6]
    return planted_run(tmp_path, steps([2, 2, 2], n_layers=4), swings=[10, 10, 10], heads_final=z)


def test_heads_are_found_where_they_were_planted(headed):
    table = head_table(headed, "4F").set_index("name")
    assert table.shape == (12, 7) and table.index[:4].tolist() == ["L0H0", "L0H1", "L0H2", "L1H0"]
    assert table.loc["L2H1", ["mean", "low", "high"]].tolist() == pytest.approx([-4, -4, -4])
    assert table.loc["L3H0", "mean"] == pytest.approx(3) and table.loc["L1H2", "mean"] == pytest.approx(-10 / 3)
    assert table.worst.to_dict() == {n: {"L2H1": 2, "L1H2": 1}.get(n, 0) for n in table.index}
    np.testing.assert_allclose(head_table(headed, "4F", value="fraction")["mean"], -table["mean"] / 10, atol=1e-12)
    assert head_table(headed, "4").worst.sum() == 0, "a head without effect is nobody's worst"


def test_concentration_counts_both_signs(headed):
    found = concentration(head_table(headed, "4F"))
    assert found == Concentration(2, 12, "L2H1", pytest.approx(4 / (4 + 3 + 10 / 3)))
    assert concentration(head_table(headed, "4")) is None
    even = pd.DataFrame({"name": list("abcd"), "mean": [0.1, -0.1, 0.1, -0.1]})
    assert concentration(even).heads == 2 and concentration(even).top == "a"
    assert [concentration(pd.DataFrame({"name": range(n), "mean": 0.1})).heads for n in range(2, 40, 2)] == list(range(1, 20))
    assert concentration(pd.DataFrame({"name": ["a", "b"], "mean": [0.9, 0.1]})).heads == 1


def test_curves_and_heads_are_not_mixed_up(headed):
    with pytest.raises(AnalysisError, match="4F is over heads"): curve(headed, "4F")
    with pytest.raises(AnalysisError, match="3 is not over heads"): head_table(headed, "3")


# --- ratios and correlations ----------------------------------------------------------------------------------------

def test_ratios_are_of_the_peaks_of_the_mean_curves(tmp_path):
    attn, mlp = np.zeros((4, 8)), np.zeros((4, 8))
    attn[:, 3], mlp[:2, 1], mlp[2:, 5] = -0.05, 0.2, 0.2  # each pair peaks at 0.2, the mean curve at about 0.1
    run = planted_run(tmp_path, steps([4] * 4), swings=[13.0, 9.0, 8.0, 10.0], sublayers={"attn_out": attn, "mlp_out": mlp})
    found = ratios(run)
    assert found["attn_out"] == Estimate(pytest.approx(20), pytest.approx(20), pytest.approx(20), 4)
    assert found["mlp_out"].value == pytest.approx(40 / (0.2 * 22))
    assert 5 - 1e-9 <= found["mlp_out"].low < found["mlp_out"].value <= found["mlp_out"].high


def test_a_sublayer_without_effect_has_no_ratio(tmp_path):
    run = planted_run(tmp_path, steps([4] * 4), sublayers={"attn_out": np.zeros((4, 8))})
    assert ratios(run)["attn_out"] == Estimate(None, n=4)


def test_correlations_agree_with_scipy():
    x = RNG.normal(size=(30, 2)) @ [[1, 0.6], [0, 1]]
    x[:4, 0] = x[0, 0]  # ties
    assert pearson(x[None])[0] == pytest.approx(stats.pearsonr(*x.T).statistic)
    assert spearman(x[None])[0] == pytest.approx(stats.spearmanr(*x.T).statistic)
    stacked = np.stack([x, x[::-1] * [1, -1]])
    assert pearson(stacked)[1] == pytest.approx(-pearson(stacked)[0])


def test_the_near_identity_comes_out_as_one(tmp_path):
    found = correlations(planted_run(tmp_path, steps([4] * 10)))
    for kind in ("pearson", "spearman"):
        assert found["total_swing"][kind].value == pytest.approx(-1) == found["ld_clean"][kind].value
    mixed = planted_run(tmp_path / "m", steps([4] * 40), swings=np.linspace(40, 10, 40), final=steps([4] * 40)[:, ::-1] * RNG.uniform(0.4, 1, (40, 1)))
    e = correlations(mixed)["total_swing"]["pearson"]
    worst = effect_matrix(mixed, "1").min(axis=1)
    assert e.value == pytest.approx(stats.pearsonr(mixed.triage.total_swing, worst).statistic) and -1 < e.low < e.value < e.high < 0


def test_two_pairs_have_no_correlation(tmp_path):
    assert correlations(planted_run(tmp_path, steps([4, 4])))["ld_clean"]["pearson"] == Estimate(None, n=2)


# --- what a run cannot answer ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("experiment, ask", [
    ("1", worst_layer), ("1", onset_layer), ("3", release_layer), ("3", crossing), ("4F", head_table), ("2B", ratios),
    ("1", correlations), ("4", summarize), ("2A", summarize)])
def test_a_missing_experiment_is_named(tmp_path, experiment, ask):
    run = planted_run(tmp_path, steps([2, 2]), leave_out=(experiment,))
    with pytest.raises(RunError, match=f"'{experiment}'"): ask(run)


def test_an_incomplete_experiment_names_the_pair(tmp_path):
    run = planted_run(tmp_path, steps([2, 2, 2]))
    e = run.effects
    gone = (e.experiment == "3") & (e.pair_id == "pair-01") & (e.layer == 4)
    write_table(tmp_path / "effects.parquet", e[~gone])
    with pytest.raises(AnalysisError, match="3 is incomplete: pair-01"): curve(open_run(tmp_path), "3")
    write_table(tmp_path / "effects.parquet", e[~((e.experiment == "3") & (e.pair_id == "pair-02"))])
    with pytest.raises(AnalysisError, match="3 is incomplete: pair-02"): release_layer(open_run(tmp_path))


def test_unknown_names_are_refused(tmp_path):
    run = planted_run(tmp_path, steps([2, 2]))
    with pytest.raises(AnalysisError, match="'damage'.*moved"): curve(run, "3", value="damage")
    with pytest.raises(AnalysisError, match="'moved'.*fraction"): release_layer(run, value="moved")
    with pytest.raises(RunError, match="'D'"): curve(run, "3", "D")


def test_a_run_of_both_directions_is_refused(tmp_path):
    run = planted_run(tmp_path, steps([2, 2]))
    write_table(tmp_path / "effects.parquet", run.effects.assign(direction=["noising", "denoising"] * (len(run.effects) // 2)))
    with pytest.raises(AnalysisError, match="several directions"): run_direction(open_run(tmp_path))


# --- summary --------------------------------------------------------------------------------------------------------

@pytest.fixture
def study(tmp_path):
    """Forty pairs that leave between blocks 4 and 5, carried by L5H1; one pair is not known."""
    z, attn = np.zeros((40, 8, 4)), np.zeros((40, 8))
    z[:, 5, 1], attn[:, 5] = RNG.uniform(0.2, 0.4, 40), 0.75
    return planted_run(tmp_path, noisy([5] * 40), heads_final=z, sublayers={"attn_out": attn}, known=[True] * 39 + [False], final=1 - noisy([5] * 40))


def test_summary_holds_what_the_functions_return(study):
    summary = summarize(study)
    for mode in "ABC":
        part = summary["modes"][mode]
        assert part["n"] == len(study.pairs(mode))
        assert part["crossing"] == {"entity": crossing(study, mode).to_dict(), "final": crossing(study, mode, "1").to_dict()}
        assert part["crossing"]["entity"] != part["crossing"]["final"]
        assert part["curves"]["3"]["resid_pre"]["effect"]["mean"] == [round(x, 4) for x in curve(study, "3", mode)["mean"]]
        assert part["release"]["effect"]["counts"] == release_layer(study, mode).counts.tolist()
        assert part["heads"]["4F"]["top"][0]["head"] == "L5H1" == part["heads"]["4F"]["most_often_worst"]["head"]
        assert part["heads"]["4F"]["top"][0]["worst"] == part["n"] and part["heads"]["4"]["half_in"] is None
        assert part["worst_layer"]["1"]["mean"] == worst_layer(study, "1", mode).mean.to_dict()
    assert summary["pairs"] == {"battery": 40, "total": 40, "known": 39, "unknown": ["pair-39"], "excluded": 0, "differs_at_final": 0,
                                "preferred": 40, "first_of_kind": 39, "first_of_all": 39}
    assert summary["verdicts"]["n"] == 40 and summary["verdicts"]["crossing"] == summary["modes"]["C"]["crossing"]
    assert set(summary["modes"]["C"]["curves"]["2B"]) == {"resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"}


def test_summary_is_json_and_repeatable(study):
    summary, again = summarize(study), summarize(open_run(study.folder))
    text = json.dumps(summary, allow_nan=False)
    assert json.dumps(again, allow_nan=False) == text and json.loads(text) == summary
    assert findings(json.loads(text)) == findings(summary)


def test_every_part_of_a_mode_has_its_definition(study):
    summary = summarize(study)
    parts = set(summary["modes"]["C"]) - {"n", "known", "mean_total_swing", "curves"}
    assert parts <= set(summary["notes"]) and "nearly an identity" in summary["notes"]["worst_layer"].lower()


def test_findings_say_what_was_planted(study):
    first, stored, leaves, carried, final = findings(summarize(study))
    assert first.startswith("planted (embedded model, 8 layers, 4 heads) prefers the right answer on 40 of 40 pairs, ranks it first among its kind "
                            "on 39, first of all on 39; noising")
    assert "up to layer 4 of 0 to 7" in stored and "100%" in stored
    assert re.search(r"depth 4\.(49|50) \[4\.(49|50), 4\.5\d\] of 8", leaves) and "5.0 [5.0, 5.0]" in leaves and "40 of 40 pairs" in leaves
    assert "attention of layer 5 as a whole moves 75% [75%, 75%]" in carried and "L5H1 moves most, 30%" in carried
    assert "1 of 32 hold half" in carried
    assert "whatever the circuit" in final


def test_stored_is_up_to_the_last_layer_with_half_of_the_swing(tmp_path):
    lines = told(summarize(planted_run(tmp_path, [[1, 0.4, 0.6, 0.4, 0.2, 0]] * 3)))
    assert "up to layer 2 of 0 to 5" in lines[1] and "60% [60%, 60%]" in lines[1] and "depth 2.5" in lines[2]


def test_controls_are_compared_where_the_real_patch_last_holds(tmp_path):
    real, other = steps([3] * 12), np.tile([0.9, 0.6, 0.2, 0, 0, 0, 0, 0], (12, 1))
    summary = summarize(planted_run(tmp_path, real, controls={"unrelated": other}))["controls"]
    assert summary["layer"] == 2 and summary["fraction"]["unrelated"]["value"] == pytest.approx(0.2)
    assert summary["beyond"]["unrelated"]["value"] == pytest.approx(0.8)


def test_a_control_that_could_not_be_made_is_missed(tmp_path):
    with_it, without = (findings(summarize(planted_run(tmp_path / name, steps([3] * 12), controls={name: 0 * steps([3] * 12)})))[-1]
                        for name in ("unrelated", "shuffled"))
    assert "an unrelated donor at the entity token moves 0%" in with_it and "that control is missing" in without


def test_findings_count_the_pairs_without_a_fraction(tmp_path):
    summary = summarize(planted_run(tmp_path, noisy([3] * 5), swings=[9.0, 8, 7, 0.9, -3]))
    assert "means over 5 (fractions: 3 with a TotalSwing of 1 logit or more)" in told(summary)[0]


def test_findings_of_a_run_without_any_swing_claim_nothing(tmp_path):
    z = np.full((12, 8, 2), 0.3)
    lines = told(summarize(planted_run(tmp_path, noisy([3] * 12), swings=[0.4] * 12, heads_final=z)))
    assert lines[1].startswith("No pair has a TotalSwing of 1 logit or more") and len(lines) == 2


def test_findings_of_a_denoising_run_speak_of_what_suffices(tmp_path):
    noised, denoised = (told(summarize(planted_run(tmp_path / d, steps([3] * 12), direction=d)))[1] for d in ("noising", "denoising"))
    assert "the answer depends on the entity token" in noised and "is enough to bring the answer back" in denoised
    assert "depends" not in denoised and noised.partition(";")[2] == denoised.partition(";")[2]


def test_another_model_is_not_called_embedded(tmp_path):
    summary = summarize(planted_run(tmp_path, noisy([3] * 5), embedded=False))
    assert told(summary)[0].startswith("planted (model, 8 layers")


@pytest.mark.parametrize("curves, swings", [([[1, 1, 0, 0]], [12.0]), (np.zeros((3, 4)), [5.0, 4.0, 3.0]), (np.ones((2, 4)), [9.0, 9.0])])
def test_thin_and_flat_runs_are_summarized_honestly(tmp_path, curves, swings):
    summary = summarize(planted_run(tmp_path, curves, swings=swings))
    lines = told(json.loads(json.dumps(summary, allow_nan=False)))
    assert len(lines) == 5 and not any("nan" in line.lower() or "None" in line for line in lines)
    if len(swings) == 1: assert "[no interval]" in lines[1] and summary["modes"]["C"]["crossing"]["entity"]["low"] is None
    if not np.any(curves): assert "nothing is localized" in lines[1] and "never above half" in lines[2]
    if np.all(curves): assert "up to layer 3 of 0 to 3" in lines[1] and "0 of 2 pairs" in lines[2]


@pytest.mark.parametrize("change, said", [({"excluded": 21}, "21 of 40 pairs could not be used"),
                                          ({"total": 8, "known": 8}, "Only 8 pairs")])
def test_a_run_that_failed_a_step_says_so_first(study, change, said):
    summary = summarize(study)
    assert cautions(summary) == []
    doubtful = summary | {"pairs": summary["pairs"] | change}
    assert said in findings(doubtful)[0] and findings(doubtful)[0].startswith("Caution: ")


def halves(folder, right, n=20, **planted):
    """A run whose right pairs leave at layer 5 and whose others, of which no answer is preferred, leave at layer 3."""
    return planted_run(folder, steps([5] * right + [3] * (n - right)), preferred=[True] * right + [False] * (n - right), **planted)


def test_thin_evidence_is_named_with_what_still_holds(tmp_path):
    kind, known = ([i < k for i in range(20)] for k in (9, 6))
    (caution,) = cautions(summarize(halves(tmp_path, 12, kind=kind, known=known)))
    assert caution == ("It prefers the right answer on 12 of 20 pairs, ranks it first among its kind on 9, first of all on 6. Verdicts stand on the 12 "
                       "that prefer both answers by 2 logits of TotalSwing or more: over these alone the fact leaves the entity token at depth "
                       f"4.50 [4.50, 4.50] of 8, over all 20, as in the curves below, at {crossing(open_run(tmp_path)):.2f}.")


@pytest.mark.parametrize("right, said", [(7, "Only 7 prefer both"), (8, "Verdicts stand on the 8"), (14, "Verdicts stand on the 14"), (15, "")])
def test_the_evidence_is_thin_below_eight_pairs_or_three_quarters(tmp_path, right, said):
    found = cautions(summarize(halves(tmp_path, right)))
    assert said in found[0] if said else found == []
    assert any("no evidence of storage" in line for line in found) == (right < 8)


def test_pairs_that_prefer_by_less_than_two_logits_carry_no_verdict_and_are_counted_as_preferred(tmp_path):
    (caution,) = cautions(summarize(planted_run(tmp_path, steps([5] * 20), swings=[9] * 10 + [1.9] * 10)))
    assert caution.startswith("It ranks the right answer first of all on 20 of 20 pairs. Verdicts stand on the 10 ")


def test_few_pairs_that_are_all_known_are_few_and_nothing_else(tmp_path):
    assert [line[:4] for line in cautions(summarize(planted_run(tmp_path, steps([5] * 5))))] == ["Only"]
    assert "were swept" in cautions(summarize(open_run(tmp_path)))[0]


@pytest.mark.parametrize("known, thin", [(12, False), (9, True)])
def test_a_run_made_before_the_degrees_is_summarized_as_it_was(tmp_path, known, thin):
    run = planted_run(tmp_path, steps([5] * 20), known=[i < known for i in range(20)])
    write_table(tmp_path / "triage.csv", run.triage.drop(columns=["preferred", "first_of_kind", "first_of_all"]))
    summary = summarize(open_run(tmp_path))
    assert "verdicts" not in summary and set(summary["pairs"]) == {"battery", "total", "known", "unknown", "excluded", "differs_at_final"}
    assert cautions(summary) == [f"It ranks the right answer first of all on {known} of 20 pairs. How many it prefers was not counted when this run "
                                 "was made: run the same study again."] * thin
    assert f"ranks the right answer first of all on {known} of 20 pairs; noising" in told(summary)[0]


@pytest.mark.parametrize("name", ["bizzaro-nano", "bizzaro-nano-local", "bizzaro-micro"])
def test_the_summaries_that_come_along_are_still_those_of_their_runs(name):
    run = open_run(name)
    assert summarize(run) == json.loads((run.folder / "summary.json").read_text("utf-8"))


def test_pairs_that_differ_in_their_last_token_are_counted(tmp_path):
    run = planted_run(tmp_path, [[1, 1, 0, 0]] * 3, swings=[9.0, 8.0, 7.0])
    assert not any("last token" in line for line in cautions(summarize(run)))
    warned = run.triage.assign(warnings=["differs_outside_entity differs_at_final", None, "differs_at_final"])
    warned.to_csv(run.folder / "triage.csv", index=False)
    assert any(line.startswith("In 2 of 3 pairs the prompts differ at their last token") for line in cautions(summarize(open_run(run.folder))))
