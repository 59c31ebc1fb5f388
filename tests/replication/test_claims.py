"""Claims on planted runs: what satisfies a claim replicates, what violates it does not, and what is missing is named."""
import json
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from planted import planted_run, steps

from bizzaroworld.files import write_json, write_table
from bizzaroworld.replication.claims import Claim, study_claims
from bizzaroworld.replication.numbers import (alike_categories, category_depths, chance_share, dropped_by_one, late_sublayers,
                                              layer_before, layer_from, r_if_unrelated, release_share, remaining, scale_difference,
                                              worst_head_share)
from bizzaroworld.replication.verdicts import (ASKS_OTHER, BY_CONSTRUCTION, CANNOT, DOES_NOT, FAILS, HOLDS, LACKING, REPLICATES,
                                               UNDECIDED, check_claims, claims_lines, claims_table, judge, kind, label, obstacle,
                                               scope, shown, tally)
from bizzaroworld.results.effects import AnalysisError
from bizzaroworld.results.estimates import Estimate
from bizzaroworld.study.runs import DamagedError, open_run

PAIRS, LAYERS, HEADS = 20, 18, 8
MODES = [f"{key}.{mode}" for key in ("release.share", "worst", "confidence", "swing") for mode in "ABC"]
KEYS = {"storage.held", "storage.released", "release.depth", "residual.attention", "residual.mlp", "readout.held", "readout.idle",
        "heads.entity", "heads.final", "worst_head.entity.A", "worst_head.entity.C", "worst_head.final.C", "categories", "scale.depth",
        "scale.heads.entity", "scale.heads.final", "drift", *MODES}
CLAIMS = study_claims()
TWO = {c.key for c in CLAIMS if c.partner}


def heads_of(size=0.05, layers=LAYERS, same=False):
    """One head of layer 1 has an effect on each pair: another head for each pair, or the same."""
    z = np.zeros((PAIRS, layers, HEADS))
    z[np.arange(PAIRS), 1, 0 if same else np.arange(PAIRS) % HEADS] = size
    return z


def rising(leaves, peak=16, layers=LAYERS):
    """The final token's curve: one minus the entity's, and a little more at its worst layer."""
    curve = 1 - steps(leaves, layers)
    curve[:, peak] += 0.02
    return curve


def edit(folder, file, **columns):
    """Write columns of a run's table anew."""
    write_table(folder / file, pd.read_csv(folder / file).assign(**columns))


def study_like(folder, leaves=15, *, layers=LAYERS, clean=None, target_id=1, dropped=(), **changes):
    """A run that does what the study reports, but for the changes: 20 pairs, each of its own category."""
    leaves = np.broadcast_to(leaves, PAIRS)
    entity = steps(leaves, layers)
    given = {"final": rising(leaves, layers * 16 // 18, layers), "heads_entity": heads_of(layers=layers), "heads_final": heads_of(layers=layers),
             "sublayers": {"attn_out": entity / 40, "mlp_out": entity / 18}} | changes
    planted_run(folder, entity, **given)
    triage = pd.read_csv(folder / "triage.csv")
    edit(folder, "triage.csv", category=[f"cat-{i:02d}" for i in range(PAIRS)], clean_target_id=target_id, corrupt_target_id=2,
         **({} if clean is None else {"ld_clean": clean(triage.total_swing)}))
    write_table(folder / "golden_B.csv", triage)
    write_table(folder / "excluded.csv", pd.DataFrame({"pair_id": list(dropped), "reason": "several tokens"}))
    return open_run(folder)


def deeper(folder, leaves=30, heads=None, target_id=9, dropped=("pair-90", "pair-91", "pair-92")):
    """A run twice as deep, in proportion, with effects in every head and another tokenizer."""
    heads = np.full((PAIRS, 36, HEADS), 0.05) if heads is None else heads
    return study_like(folder, leaves, layers=36, heads_entity=heads, heads_final=heads, target_id=target_id, dropped=dropped)


def found(run, others=(), keys=KEYS):
    """The verdicts on these claims by key, each of which comes once."""
    with patch("bizzaroworld.replication.verdicts.study_claims", lambda: [c for c in CLAIMS if c.key in keys]): verdicts = check_claims(run, others)
    assert len({v.claim.key for v in verdicts}) == len(verdicts)
    return {v.claim.key: v for v in verdicts}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return found(study_like(folder / "small"), [deeper(folder / "large")])


def test_every_claim_of_the_study_is_there_once():
    keys = [claim.key for claim in study_claims()]
    assert len(keys) == len(set(keys)) and set(keys) == KEYS


def test_the_published_figures_stand_beside_the_claims_in_the_unit_that_is_judged():
    figures = {claim.key: claim.reported for claim in study_claims() if claim.published}
    assert figures == {
        "storage.held": "0.87", "storage.released": "0.00", "release.share.A": "0.87", "release.share.B": "0.75", "release.share.C": "0.77",
        "release.depth": "0.67 to 0.83", "residual.attention": "40.00", "residual.mlp": "18.00",
        "worst.A": "0.90", "worst.B": "0.91", "worst.C": "0.91", "confidence.A": "-0.794", "confidence.B": "-0.870", "confidence.C": "-0.832",
        "swing.A": "-0.999", "swing.B": "-0.995", "swing.C": "-0.998", "heads.entity": "0.06", "worst_head.entity.A": "0.40",
        "worst_head.entity.C": "0.28", "scale.depth": "-0.25", "drift": "3 to 22"}


def test_the_study_s_own_figures_satisfy_every_criterion_but_one():
    outside = set()
    for claim in study_claims():
        if claim.published is None: continue
        p = claim.published
        ends = [x for x in (p.value, p.low, p.high) if x is not None]
        if not all(claim.region[0] - 1e-9 <= x <= claim.region[1] + 1e-9 for x in ends): outside.add(claim.key)
    assert outside == {"scale.depth"}  # 83% and 58% of depth are not in proportion


def test_what_holds_by_construction_or_asks_another_question_is_marked_and_explained():
    claims = study_claims()
    assert {c.key for c in claims if c.near_identity} == {k for k in MODES if not k.startswith("release")}
    assert {c.key for c in claims if c.asks_other} == {"heads.entity", "worst_head.entity.A", "worst_head.entity.C", "scale.heads.entity"}
    assert {c.key for c in claims if c.as_made} == {"drift"}
    assert all(len(c.caveat) > 40 for c in claims if c.near_identity or c.asks_other or c.as_made)
    assert all("says nothing on routing" in c.caveat for c in claims if c.asks_other)


def test_a_run_that_does_what_the_study_reports_replicates_all_of_it(good):
    assert set(good) == KEYS
    assert {k: v.reason for k, v in good.items() if v.verdict != REPLICATES} == {}
    assert kind(good["storage.held"]) == HOLDS and kind(good["worst.C"]) == BY_CONSTRUCTION and kind(good["heads.entity"]) == ASKS_OTHER


def test_the_numbers_are_the_planted_ones(good):
    values = {k: v.value.value for k, v in good.items()}
    expected = {"storage.held": 1, "storage.released": 0, "release.share.C": 1, "release.depth": 14.5 / 18, "residual.attention": 40,
                "residual.mlp": 18, "worst.C": 16 / 18, "readout.held": 1, "readout.idle": 0, "confidence.C": -1, "swing.C": -1,
                "worst_head.entity.C": 3 / 20, "worst_head.entity.A": 2 / 15, "categories": 1, "drift": 3, "scale.depth": 29.5 / 36 - 14.5 / 18}
    assert {k: values[k] for k in expected} == pytest.approx(expected)
    assert good["worst.A"].value.n == 15 and good["worst.C"].value.n == 20 and good["categories"].value.n == 20


SWINGS = np.linspace(20, 10, PAIRS)[:, None]
LOUD = {s: np.full((PAIRS, LAYERS), 0.5) for s in ("attn_out", "mlp_out")}
VIOLATIONS = {
    "leaves early": ({"leaves": 4}, ["storage.held", "release.share.A", "release.share.B", "release.share.C", "release.depth"]),
    "never leaves": ({"leaves": 18}, ["storage.released", "release.share.C", "release.depth", "readout.held"]),
    "sublayers matter": ({"sublayers": LOUD}, ["residual.attention", "residual.mlp", "readout.idle"]),
    "sublayers do nothing": ({"sublayers": {s: x / 500 for s, x in LOUD.items()}}, ["residual.attention", "residual.mlp"]),
    "worst in the middle": ({"final": np.tile(1 - abs(np.arange(LAYERS) - 8) / 10, (PAIRS, 1))},
                            ["worst.A", "worst.B", "worst.C", "readout.held"]),
    "confident without damage": ({"clean": lambda swing: 30 - swing}, ["confidence.A", "confidence.B", "confidence.C"]),
    "damage against the swing": ({"final": rising([15] * PAIRS) * 100 / SWINGS ** 2}, ["swing.A", "swing.B", "swing.C"]),
    "one strong head": ({"heads_entity": heads_of(0.5, same=True), "heads_final": heads_of(0.5, same=True)},
                        ["heads.entity", "heads.final", "worst_head.entity.A", "worst_head.entity.C", "worst_head.final.C"]),
    "categories differ": ({"leaves": np.where(np.arange(PAIRS) % 2, 15, 4)}, ["categories"])}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_run_that_violates_a_claim_does_not_replicate_it(name, tmp_path, good):
    changes, keys = VIOLATIONS[name]
    verdicts = found(study_like(tmp_path / "run", **changes), keys=keys)
    assert {k: verdicts[k].verdict for k in keys} == dict.fromkeys(keys, DOES_NOT)
    assert all(kind(verdicts[k]) == FAILS for k in keys)


def test_two_models_out_of_proportion_less_diffuse_or_without_drift(tmp_path):
    narrow = np.zeros((PAIRS, 36, HEADS))
    narrow[:, 3, 3] = 0.05
    small = study_like(tmp_path / "small", heads_entity=np.full((PAIRS, LAYERS, HEADS), 0.05), heads_final=np.full((PAIRS, LAYERS, HEADS), 0.05))
    verdicts = found(small, [deeper(tmp_path / "large", leaves=18, heads=narrow, dropped=())], TWO)
    pairwise = {k: v.verdict for k, v in verdicts.items() if v.claim.partner}
    assert pairwise == dict.fromkeys(("scale.depth", "scale.heads.entity", "scale.heads.final", "drift"), DOES_NOT)


def test_scale_is_deeper_minus_shallower_whichever_run_comes_first(tmp_path):
    small, large = study_like(tmp_path / "small"), deeper(tmp_path / "large", leaves=18)
    one, other = found(small, [large], TWO), found(large, [small], TWO)
    assert one["scale.depth"].value.value == pytest.approx(17.5 / 36 - 14.5 / 18) == other["scale.depth"].value.value
    assert (one["scale.depth"].against, one["scale.depth"].model) == ("planted (embedded model)",) * 2


@pytest.mark.parametrize("gone, keys", [("1", ["worst.A", "readout.held", "confidence.C", "swing.B", "heads.final"]), ("2A", ["readout.idle"]),
                                        ("2B", ["residual.mlp"]), ("3", ["storage.held", "release.share.A", "categories", "heads.entity"]),
                                        ("4", ["heads.entity", "worst_head.entity.A"]), ("4F", ["heads.final", "worst_head.final.C"])])
def test_a_missing_experiment_is_named_and_stops_nothing_else(gone, keys, tmp_path):
    study_like(tmp_path / "run")
    effects = pd.read_parquet(tmp_path / "run/effects.parquet")
    write_table(tmp_path / "run/effects.parquet", effects[effects.experiment != gone])
    verdicts = found(open_run(tmp_path / "run"), keys=[*keys, "release.depth" if gone != "3" else "readout.held"])
    for key in keys:
        assert verdicts[key].verdict == CANNOT and kind(verdicts[key]) == LACKING and verdicts[key].value.value is None
        assert f"no experiment '{gone}'" in verdicts[key].reason
    assert [k for k, v in verdicts.items() if v.verdict == REPLICATES] == (["readout.held"] if gone == "3" else ["release.depth"])


def test_a_second_run_is_asked_for_and_must_fit(tmp_path):
    run, twin = study_like(tmp_path / "run"), study_like(tmp_path / "twin")
    for others in ((), (twin,)):
        verdicts = found(run, others, TWO)
        assert set(verdicts) == TWO
        assert {v.verdict for v in verdicts.values()} == {CANNOT}
        assert "another depth" in verdicts["scale.depth"].reason and "another tokenizer" in verdicts["drift"].reason


def test_each_fitting_run_gets_its_own_verdict(tmp_path):
    run = study_like(tmp_path / "run")
    others = [deeper(tmp_path / "large"), study_like(tmp_path / "other", target_id=5), deeper(tmp_path / "third", leaves=18, target_id=1, dropped=())]
    with patch("bizzaroworld.replication.verdicts.study_claims", lambda: [c for c in CLAIMS if c.partner]): verdicts = check_claims(run, others)
    assert [v.verdict for v in verdicts if v.claim.key == "scale.depth"] == [REPLICATES, DOES_NOT]
    assert [v.verdict for v in verdicts if v.claim.key == "drift"] == [REPLICATES, DOES_NOT]


def test_drift_between_two_embedded_models_holds_by_construction_and_else_does_not(tmp_path, good):
    assert kind(good["drift"]) == BY_CONSTRUCTION and good["drift"].mark == "*"
    run = study_like(tmp_path / "run", embedded=False)
    verdict = found(run, [deeper(tmp_path / "large")], {"drift"})["drift"]
    assert kind(verdict) == HOLDS and verdict.mark == "" and label(run) == "planted"


def test_another_battery_is_no_drift(tmp_path):
    run, other = study_like(tmp_path / "run"), deeper(tmp_path / "other")
    info = json.loads((other.folder / "run.json").read_text("utf-8"))
    write_json(other.folder / "run.json", info | {"battery_sha256": "1"})
    other = open_run(other.folder)
    with pytest.raises(AnalysisError, match="different batteries"): dropped_by_one(run, other)
    assert found(run, [other], {"drift"})["drift"].verdict == CANNOT


def test_a_model_that_knows_too_little_or_was_denoised_decides_nothing_but_drift(tmp_path):
    ignorant = study_like(tmp_path / "ignorant", preferred=[True] * 7 + [False] * 13)
    denoised = study_like(tmp_path / "denoised", direction="denoising")
    assert obstacle(ignorant) == ("7 of 20 pairs of planted are preferred on both prompts, with a TotalSwing of 2 logits or more: "
                                  "a verdict takes at least 8.") and "denoising" in obstacle(denoised)
    assert obstacle(study_like(tmp_path / "enough", preferred=[True] * 8 + [False] * 12)) == ""
    assert obstacle(study_like(tmp_path / "unsaid", known=[False] * 20)) == ""  # the first word of all may be another
    for run in (ignorant, denoised):
        verdicts = found(run, [deeper(tmp_path / f"large-{run.folder.name}")])
        assert {k for k, v in verdicts.items() if v.verdict != CANNOT} == {"drift"}
        assert {v.reason for k, v in verdicts.items() if k != "drift"} == {obstacle(run)}
    verdicts = found(deeper(tmp_path / "knows"), [ignorant], {"scale.depth", "release.depth"})  # the obstacle may lie in the other run
    assert verdicts["scale.depth"].reason.startswith("7 of 20 pairs") and verdicts["release.depth"].verdict == REPLICATES


def test_a_model_too_shallow_for_a_claim_says_so(tmp_path):
    run = planted_run(tmp_path / "run", steps([3] * PAIRS, 4))
    keys = ("worst.C", "readout.held", "readout.idle", "storage.released")
    verdicts = found(run, keys=keys)
    for key in keys:
        assert verdicts[key].verdict == CANNOT and "No layer of a model of 4" in verdicts[key].reason
    three = planted_run(tmp_path / "three", steps([2] * PAIRS, 3))
    with pytest.raises(AnalysisError, match="No layer of a model of 3 lies at 72% to 83%"): release_share(three, 13 / 18, 15 / 18)


def test_what_remains_of_next_to_nothing_is_not_defined(tmp_path):
    entity = steps([15] * PAIRS, LAYERS, before=0.05)
    assert remaining(planted_run(tmp_path / "large", entity, swings=[30] * PAIRS), 9).value == pytest.approx(1)
    assert remaining(planted_run(tmp_path / "small", entity, swings=[10] * PAIRS), 9).value is None


def test_a_late_sublayer_that_works_against_the_answer_is_not_idle(tmp_path):
    against = np.zeros((PAIRS, LAYERS))
    against[:, 16] = -0.3
    assert late_sublayers(planted_run(tmp_path, steps([9] * PAIRS, LAYERS), sublayers={"mlp_out": against})).value == pytest.approx(0.3)


def test_scales_are_compared_over_the_pairs_that_verdicts_stand_on_in_both(tmp_path):
    small, large = study_like(tmp_path / "small", 15), planted_run(tmp_path / "large", steps([30] * 19 + [2], 36), preferred=[True] * 19 + [False])
    assert scale_difference(large, small, "leaves").n == 20
    found = scale_difference(large.that_knows(), small.that_knows(), "leaves")
    assert found.n == 19 and found.value == pytest.approx(29.5 / 36 - 14.5 / 18)


def test_a_damaged_file_is_no_missing_experiment(tmp_path):
    run = planted_run(tmp_path, steps([3] * 12))
    (tmp_path / "golden_A.csv").write_text("")
    with pytest.raises(DamagedError, match="golden_A.csv is damaged"): check_claims(run)


CLAIM = Claim("x", "X.", lambda run: Estimate(None), (0.5, 1), "Because.", "of pairs")
COUNT = Claim("y", "Y.", lambda run: Estimate(None), (1, np.inf), "Because.", "pairs", exact=True)


@pytest.mark.parametrize("value, verdict, says", [
    (Estimate(0.7, 0.5, 0.9, 8), REPLICATES, "whole interval lies in"), (Estimate(0.7, 0.49, 0.9, 60), CANNOT, "across the border"),
    (Estimate(0.9, 0.7, 1.01, 60), CANNOT, "across the border"), (Estimate(0.49, 0.3, 0.51, 60), CANNOT, "across the border"),
    (Estimate(0.3, 0.1, 0.49, 60), DOES_NOT, "whole interval lies outside"), (Estimate(1.2, 1.1, 1.3, 60), DOES_NOT, "outside"),
    (Estimate(0.7, 0.6, 0.8, 7), CANNOT, "n = 7 is too few"), (Estimate(0.7, None, None, 60), CANNOT, "no interval"),
    (Estimate(0.8, 0.2, 1.4, 60), CANNOT, "across the border"), (Estimate(None, n=60), CANNOT, "not defined")])
def test_the_whole_interval_decides(value, verdict, says):
    got, reason = judge(CLAIM, value)
    assert got == verdict and says in reason


@pytest.mark.parametrize("n, verdict", [(14, CANNOT), (15, REPLICATES)])
def test_a_correlation_takes_fifteen_pairs(n, verdict):
    correlations = [c for c in CLAIMS if c.unit == "Pearson r"]
    assert len(correlations) == 6 and all(judge(c, Estimate(-0.99, -0.995, -0.98, n))[0] == verdict for c in correlations)
    assert judge(correlations[0], Estimate(None, n=14))[1] == "n = 14 is too few: at least 15 are needed for an interval."
    assert all(c.fewest == 8 for c in CLAIMS if c not in correlations) and "n = 15 or more" in correlations[0].criterion


def mixed(folder, right, **changes):
    """A run whose first pairs do what the study reports, and the others, of which no answer is preferred, another thing."""
    return study_like(folder, [15] * right + [4] * (PAIRS - right), preferred=[True] * right + [False] * (PAIRS - right), **changes)


def test_a_verdict_stands_on_the_pairs_that_prefer_both_answers(tmp_path):
    verdicts = found(mixed(tmp_path / "run", 18), [deeper(tmp_path / "large")])
    assert {k: v.reason for k, v in verdicts.items() if v.verdict != REPLICATES and v.claim.unit != "Pearson r"} == {}
    assert {k: v.value.n for k, v in verdicts.items()} | {"drift": 20} == {
        k: 20 if k == "drift" else 15 if k.endswith(".A") else 18 for k in KEYS}
    assert verdicts["storage.held"].over == ("preferred on both prompts, with a TotalSwing of 2 logits or more: 18 of 20 of planted (embedded model)")
    assert verdicts["scale.depth"].over.endswith(": 18 of 20 of planted (embedded model), 20 of 20 of planted (embedded model)")
    assert verdicts["drift"].over == "" and claims_table(verdicts.values()).over.str.contains("18 of 20").sum() == 28
    assert verdicts["storage.held"].beside["mode A"].n == 15


@pytest.mark.parametrize("n, decided", [(7, set()), (8, {"storage.held", "release.share.C"}), (14, {"storage.held", "release.share.C"}),
                                        (15, {"storage.held", "release.share.C", "swing.C", "swing.A"})])
def test_it_takes_eight_pairs_and_fifteen_for_a_correlation(tmp_path, n, decided):
    verdicts = found(mixed(tmp_path / "run", n), keys={"storage.held", "release.share.C", "swing.C", "swing.A"})
    assert {k for k, v in verdicts.items() if v.verdict == REPLICATES} == decided
    assert {v.verdict for k, v in verdicts.items() if k not in decided} <= {CANNOT}


def test_modes_keep_their_pairs_and_lose_those_that_no_verdict_stands_on(tmp_path):
    run = study_like(tmp_path / "run", preferred=np.arange(PAIRS) % 2 == 0)  # 10 of 20, 8 of the best 15
    verdicts = found(run, keys={"release.share.A", "release.share.B", "release.share.C"})
    assert [verdicts[f"release.share.{m}"].value.n for m in "ABC"] == [8, 10, 10]


@pytest.mark.parametrize("min_swing, n", [(1, 20), (2, 15), (4, 10), (16, 0)])
def test_the_swing_that_a_verdict_takes_can_be_chosen(tmp_path, min_swing, n):
    run = study_like(tmp_path / "run", swings=[9] * 10 + [3.9] * 5 + [1.5] * 5)
    (verdict,) = [v for v in check_claims(run, min_swing=min_swing) if v.claim.key == "storage.held"]
    assert (verdict.verdict, verdict.value.n) == ((REPLICATES, n) if n else (CANNOT, 0))
    assert f"TotalSwing of {min_swing} logits or more: {n} of 20" in verdict.over


def test_another_set_can_be_chosen_and_one_that_was_not_measured_is_named(tmp_path):
    run = study_like(tmp_path / "run", known=[True] * 9 + [False] * 11, kind=[True] * 12 + [False] * 8)
    n = {known: next(v.value.n for v in check_claims(run, known=known)) for known in ("preferred", "first_of_kind", "first_of_all")}
    assert n == {"preferred": 20, "first_of_kind": 12, "first_of_all": 9}
    write_table(run.folder / "triage.csv", run.triage.drop(columns="first_of_kind"))
    old = open_run(run.folder)
    assert "before 'first among its kind' was measured" in obstacle(old, "first_of_kind") and obstacle(old) == ""
    assert {v.verdict for v in check_claims(old, known="first_of_kind") if not v.claim.exact} == {CANNOT}


@pytest.mark.parametrize("count, verdict", [(0, DOES_NOT), (1, REPLICATES), (22, REPLICATES)])
def test_a_count_is_judged_as_it_is(count, verdict):
    assert judge(COUNT, Estimate(float(count), n=3))[0] == verdict


def test_an_undecided_claim_is_told_from_one_that_lacks_something(tmp_path):
    leaves = np.where(np.arange(PAIRS) < 11, 15, 4)  # 11 of 20 release where the study's pairs do
    verdict = found(study_like(tmp_path / "run", leaves), keys={"release.share.C"})["release.share.C"]
    assert verdict.verdict == CANNOT and kind(verdict) == UNDECIDED and verdict.value.value == 0.55


def test_depths_become_layers():
    class Deep:
        def __init__(self, n): self.n_layers = n
    assert [layer_before(Deep(n), 12 / 18) for n in (8, 18, 36)] == [5, 12, 24]
    assert [layer_from(Deep(n), 15 / 18) for n in (8, 18, 36)] == [7, 15, 30]


def test_remaining_is_undefined_where_there_was_nothing(tmp_path):
    assert remaining(planted_run(tmp_path / "run", steps([15] * 9, 18, before=0.0)), 3).value is None
    assert remaining(planted_run(tmp_path / "half", np.tile([1.0, 0.5, 0.25], (9, 1))), 2).value == pytest.approx(0.25)


def test_release_that_never_happened_counts_as_outside(tmp_path):
    run = planted_run(tmp_path, steps([15] * 5 + [18] * 5 + [0] * 5, 18))
    assert release_share(run, 13 / 18, 15 / 18).value == pytest.approx(1 / 3)


def test_confidence_correlates_with_damage_without_any_relation(tmp_path):
    run = planted_run(tmp_path, steps([15] * 40, 18), swings=np.linspace(30, 5, 40))
    assert r_if_unrelated(run).value == pytest.approx(-0.6 / np.hypot(0.6, 0.4))  # ld_clean and ld_corrupt are 0.6 and -0.4 of the swing
    assert r_if_unrelated(planted_run(tmp_path / "two", steps([15] * 2, 18))).value is None


def test_worst_heads_and_chance(tmp_path):
    run = study_like(tmp_path / "run", heads_entity=heads_of(same=True))
    assert worst_head_share(run).value == 1 and worst_head_share(run, "4F", "C").value == 3 / 20
    assert chance_share(1, 8).value == 1 and chance_share(50, 1).value == 1
    assert 0.25 < chance_share(60, 4).value < 0.4 and chance_share(6000, 4).value == pytest.approx(0.25, abs=0.02)


def test_categories_of_a_fact_that_is_nowhere_are_not_alike_nor_different(tmp_path):
    run = planted_run(tmp_path, np.full((40, 18), 0.3))
    edit(tmp_path, "triage.csv", category=[f"cat-{i % 8}" for i in range(40)])
    run = open_run(tmp_path)
    assert category_depths(run).near.sum() == 0 and alike_categories(run).value is None
    verdict = found(run, keys={"categories"})["categories"]
    assert (verdict.verdict, verdict.reason) == (CANNOT, "The number is not defined on these pairs.")


def test_what_stops_most_claims_is_said_once_at_the_top(tmp_path):
    planted = {"unknown": dict(preferred=[False] * 12), "denoised": dict(direction="denoising"), "fine": {}}
    lines = {name: claims_lines(check_claims(planted_run(tmp_path / name, steps([5] * 12), **options))) for name, options in planted.items()}
    stand = "Over the pairs that are preferred on both prompts, with a TotalSwing of 2 logits or more: {} of 12 of planted (embedded model)."
    assert [lines[name][2] for name in planted] == [stand.format(n) for n in (0, 12, 12)]
    assert lines["unknown"][3].startswith("0 of 12 pairs of planted are") and "is denoising" in lines["denoised"][3]
    assert lines["fine"][3] == "" and lines["fine"][4].startswith("claim ")


def test_categories_are_counted_and_one_without_a_curve_is_not_near(tmp_path):
    run = study_like(tmp_path / "run", np.where(np.arange(PAIRS) < 3, [4, 11, 12] + [15] * 17, 15))
    table = category_depths(run).set_index("category")
    assert table.near["cat-00"] == False and table.near["cat-02"] and table.n.eq(1).all()  # noqa: E712
    assert alike_categories(run).n == 20 and alike_categories(run).value == pytest.approx(table.near.mean())
    entity = steps([15] * PAIRS, LAYERS)
    entity[0] = 0
    planted_run(tmp_path / "flat", entity)
    edit(tmp_path / "flat", "triage.csv", category=[f"cat-{i:02d}" for i in range(PAIRS)])
    assert category_depths(open_run(tmp_path / "flat")).near.tolist() == [False] + [True] * 19


def test_the_table_holds_what_the_verdicts_hold(good):
    table = claims_table(good.values())
    assert table.key.tolist() == list(good) and table[["value", "low", "high"]].dtypes.eq(float).all()
    row = table.set_index("key").loc["residual.mlp"]
    assert (row.value, row.published, row.verdict, row.n) == (pytest.approx(18), "18.00", REPLICATES, 20)
    assert table.set_index("key").by_construction["drift"] and not table.set_index("key").by_construction["scale.depth"]
    assert table[["statement", "reason", "criterion", "source", "caveat"]].map(len).gt(0).all(axis=None)
    assert claims_table(check for check in good.values() if check.claim.key == "drift").low.isna().all()


def test_the_lines_say_whom_they_speak_of_and_what_to_mind(good):
    text = "\n".join(claims_lines(list(good.values())))
    assert "checked on planted (embedded model), not Gemma-2B" in text
    assert "Of 29: 29 replicate (10 of them nearly by construction, 4 with a number that answers another question), 0 do not" in text
    assert "of depth *" in text and "of the residual stream's †" in text and "No correction is made" in text
    line = next(line for line in text.splitlines() if line.startswith("drift"))
    assert line.split()[:3] == ["drift", "replicates", "3"] and line.endswith("with planted (embedded model)") and "[" not in line
    assert "Mind:" not in text
    long = claims_lines([good["confidence.A"]], details=True)
    assert any("if clean and corrupted were unrelated -0.83" in x for x in long) and any("Mind: Damage is nearly" in x for x in long)


def test_nothing_is_claimed_to_be_gemma_that_is_not(good):
    verdict = good["storage.held"]
    for name, words in (("google/gemma-2b", "google/gemma-2b, with this battery"), ("gemma-2b", "with this battery"),
                        ("google/gemma-2b-it", "not Gemma-2B"), ("recurrentgemma-2b", "not Gemma-2B")):
        assert words in scope([type(verdict)(verdict.claim, verdict.value, verdict.verdict, verdict.reason, name)])


def test_shown_and_tally_of_what_has_no_number():
    assert shown(Estimate(None), CLAIM) == "–" and shown(Estimate(3.0, n=60), COUNT) == "3"
    assert shown(Estimate(0.5, 0.25, 0.75, 9), CLAIM) == "0.50 [0.25, 0.75]"


def test_the_shipped_runs_get_a_verdict_on_every_claim():
    verdicts = found(open_run("bizzaro-nano"), [open_run("bizzaro-micro")])
    assert set(verdicts) == KEYS and "cannot be tested here" in tally(list(verdicts.values()))
    assert not any(kind(v) == LACKING for v in verdicts.values())
    assert verdicts["drift"].value.value == 10
    assert all(v.value.low <= v.value.value <= v.value.high for v in verdicts.values() if not v.claim.exact)


@pytest.mark.slow
def test_a_real_gemma_decides_most_claims():
    """Of the 29, at least 24 get a verdict on Gemma 3 270M: by the study's number of pairs, or by as many as the model knows."""
    few, many = check_claims(open_run("gemma-3-270m"), [open_run(name) for name in ("bizzaro-nano", "bizzaro-micro")]), check_claims(open_run("gemma-3-270m-wide"), [])
    decided = {v.claim.key for v in (*few, *many) if v.verdict in ("replicates", "does not replicate")}
    assert len({v.claim.key for v in few}) == 29 and len(decided) >= 24, sorted({v.claim.key for v in few} - decided)
