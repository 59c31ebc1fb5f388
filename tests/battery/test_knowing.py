"""The three sets of pairs that a model knows: nested, counted, said."""
import numpy as np
import pandas as pd
import pytest

from bizzaroworld.battery.knowing import DEGREES, KnowingError, counts, degrees, highest, known_words, pairs_that, set_words
from bizzaroworld.study.runs import open_run, shipped_runs


def table(**columns):
    """Four pairs, one of each degree, the best first."""
    return pd.DataFrame({"pair_id": list("abcd"), "total_swing": [9.0, 5.0, 2.0, 3.0], "ld_clean": [5.0, 3.0, 1.0, -1.0],
                         "ld_corrupt": [-4.0, -2.0, -1.0, -4.0], "known": [True, False, False, False],
                         "first_of_kind": [True, True, False, False]} | columns)


def nested(found):
    """Whether each set lies within the one before, where both are told."""
    a, b, c = (found[name].astype("boolean") for name in DEGREES)
    return not (b & ~a).fillna(False).any() and not (c & ~b).fillna(False).any()


def test_the_sets_and_their_counts():
    assert degrees(table()).astype(int).values.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert counts(table()) == {"preferred": 3, "first_of_kind": 2, "first_of_all": 1}
    assert highest(table()).tolist() == ["first of all", "first among its kind", "preferred", "not preferred"]


def test_what_an_older_run_did_not_measure_is_missing_unless_it_follows():
    old = table().drop(columns="first_of_kind")
    assert degrees(old).first_of_kind.tolist() == [True, pd.NA, pd.NA, False] and nested(degrees(old))
    assert counts(old) == {"preferred": 3, "first_of_kind": None, "first_of_all": 1}
    assert highest(old).tolist() == ["first of all", "preferred", "preferred", "not preferred"]
    with pytest.raises(KnowingError, match="before 'first among its kind' was measured"): pairs_that(old, "first_of_kind")
    assert pairs_that(old) == ["a", "b", "c"]
    assert counts(old.assign(known=True, ld_clean=1.0))["first_of_kind"] == 4


@pytest.mark.parametrize("name", shipped_runs())
def test_the_runs_that_come_along_can_be_read(name):
    triage = open_run(name).triage
    assert nested(degrees(triage)) and counts(triage)["first_of_all"] == triage.known.sum() and counts(triage)["preferred"] == triage.sign_ok.sum()


def test_a_verdict_takes_two_logits_and_not_less():
    assert pairs_that(table()) == ["a", "b", "c"] and pairs_that(table(total_swing=[9.0, 5.0, 1.999, 3.0])) == ["a", "b"]
    assert pairs_that(table(), min_swing=5) == ["a", "b"] and pairs_that(table(), "first_of_all", 0) == ["a"]
    with pytest.raises(KnowingError, match="'known': use preferred, first_of_kind, first_of_all"): pairs_that(table(), "known")


@pytest.mark.parametrize("change", [{"ld_clean": [0.0, 3, 1, -1]}, {"ld_corrupt": [0.0, -2, -1, -4]}])
def test_a_tie_is_not_preferred(change):
    assert not degrees(table(known=False, first_of_kind=False, **change)).preferred[0]


@pytest.mark.parametrize("found, total, words", [
    ((40, 36, 16), 60, "prefers the right answer on 40 of 60 pairs, ranks it first among its kind on 36, first of all on 16"),
    ((40, None, 16), 60, "prefers the right answer on 40 of 60 pairs, ranks it first of all on 16"),
    ((None, None, 16), 60, "ranks the right answer first of all on 16 of 60 pairs"),
    ((60, 60, 60), 60, "ranks the right answer first of all on 60 of 60 pairs"), ((1, 1, 1), 1, "ranks the right answer first of all on 1 of 1 pair"),
    ((0, 0, 0), 4, "prefers the right answer on 0 of 4 pairs, ranks it first among its kind on 0, first of all on 0")])
def test_the_words(found, total, words):
    assert known_words(dict(zip(DEGREES, found)), total) == words


def test_the_words_of_a_set():
    assert set_words() == "preferred on both prompts, with a TotalSwing of 2 logits or more"
    assert set_words("first_of_kind", 0.5) == "first among its kind on both prompts, with a TotalSwing of 0.5 logits or more"


def test_a_run_restricted_to_pairs_holds_these_everywhere(tmp_path):
    from planted import planted_run, steps
    from bizzaroworld.results.effects import control_curves, effect_matrix
    from bizzaroworld.study.runs import control_run
    run = planted_run(tmp_path, steps([2, 3, 4, 5] * 5), preferred=np.arange(20) > 3, controls={"unrelated": steps([1] * 20)})
    some = run.that_knows()
    assert some.pairs() == run.pairs()[4:] == some.triage.pair_id.tolist() and some.pairs("A") == run.pairs("A")[4:] and len(some.pairs("A")) == 11
    assert set(some.effects.pair_id) == set(some.controls.pair_id) == set(control_run(some, "unrelated").effects.pair_id) == set(some.pairs())
    assert effect_matrix(some, "3").equals(effect_matrix(run, "3").iloc[4:]) and set(control_curves(some).n) == {16}
    assert some.restricted(["pair-05", "pair-00"]).pairs() == ["pair-05"] and run.pairs() == [f"pair-{i:02d}" for i in range(20)]
