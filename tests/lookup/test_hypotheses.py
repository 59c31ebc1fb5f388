"""What a hypothesis predicts, and the verdict: on numbers made up for it, and on lookups written by hand."""
import numpy as np
import pandas as pd
import pytest

from bizzaroworld.lookup.asking import ask
from bizzaroworld.lookup.hypotheses import (BORNE_OUT, CONTRADICTED, FALLS, HOLDS, HYPOTHESES, OPEN, Prediction, evidence, excess, first_gain, halves, judged, pair_only, predictions, same_person, verdicts,
                                            without_any_path)
from bizzaroworld.lookup.stages import Effective
from bizzaroworld.planted.lookups import LOOKUPS, PROMPTS, plant_lookup
from bizzaroworld.results.estimates import Estimate

AT_LEAST = Prediction("", lambda found: None, (), low=0.5)
AT_MOST = Prediction("", lambda found: None, (), high=0.5)


@pytest.mark.parametrize("low, high, least, most", [(0.6, 0.9, BORNE_OUT, CONTRADICTED), (0.1, 0.4, CONTRADICTED, BORNE_OUT), (0.4, 0.6, OPEN, OPEN), (0.5, 0.7, BORNE_OUT, OPEN), (0.3, 0.5, OPEN, BORNE_OUT)])
def test_the_whole_interval_decides(low, high, least, most):
    value = Estimate((low + high) / 2, low, high, 10)
    assert (judged(AT_LEAST, value), judged(AT_MOST, value)) == (least, most)


@pytest.mark.parametrize("value", [Estimate(None), Estimate(0.9, n=1)])
def test_a_number_without_interval_decides_nothing(value): assert judged(AT_LEAST, value) == judged(AT_MOST, value) == OPEN


def rows(*words): return pd.DataFrame({"hypothesis": "it", "verdict": words})


@pytest.mark.parametrize("words, verdict", [((BORNE_OUT, BORNE_OUT), HOLDS), ((BORNE_OUT, OPEN), OPEN), ((BORNE_OUT, CONTRADICTED, OPEN), FALLS), ((BORNE_OUT, "not asked"), HOLDS), (("not asked",), OPEN)])
def test_all_of_its_predictions_make_a_hypothesis(words, verdict): assert verdicts(rows(*words)) == {"it": verdict}


def test_what_was_not_measured_is_not_judged():
    table = predictions({})
    assert set(table.verdict) == {"not asked"} and len(table) == sum(map(len, HYPOTHESES.values())) and set(verdicts(table).values()) == {OPEN}


def test_numbers_are_read_off_the_right_rows():
    def path(name, kept): return {"path": name, "kept": kept, "kept_low": kept - 0.1, "kept_high": kept + 0.1, "n": 7}
    assert without_any_path({"paths": pd.DataFrame([path("nothing", 1), path("L1 > L2", 0.9), path("all > all", 0.2)])}).value == 0.2
    assert without_any_path({"paths": pd.DataFrame([path("nothing", 1)])}) == Estimate(1.0, 1.0, 1.0, 7)
    table = pd.DataFrame([{"layer": layer, "acts": acts, "net": net, "net_low": net, "net_high": net, "n": 3} for layer, acts, net in (("2", "post", 0.1), ("all", "pre", 0.2), ("all", "post", 0.3))])
    assert excess({"excess": table}).value == 0.3
    table = pd.DataFrame([{"half": half, "kept": kept, "kept_low": kept - 0.1, "kept_high": kept + 0.1, "n": 5} for half, kept in (("first", 0.1), ("last", 0.2), ("neither", 0.3), ("pair only", 0.4))])
    assert pair_only({"halves": table}) == Estimate(0.4, pytest.approx(0.3), pytest.approx(0.5), 5)
    assert first_gain({"first_step": pd.DataFrame([{"value": 0.3, "low": 0.2, "high": 0.4, "n": 9}])}) == Estimate(0.3, 0.2, 0.4, 9)
    assert first_gain({"first_step": pd.DataFrame([{"value": np.nan, "low": np.nan, "high": np.nan, "n": 9}])}) == Estimate(None, n=9)
    facts = pd.DataFrame({"difference": [0.1, 0.3, 0.2, 0.5, 0.5, np.nan], "low": [-0.1, 0.2, 0.1, 0.4, 0.4, np.nan], "high": [0.2, 0.4, 0.3, 0.6, 0.6, np.nan], "n": [5, 7, 9, 4, 9, 2], "told": [False, False, False, False, True, False]})
    assert same_person({"facts": facts}).value == pytest.approx(2 / 3) and same_person({"facts": facts}).n == 3  # not the one of four people, nor the one whose answers tell each other
    assert same_person({"facts": facts[4:]}).value is None


@pytest.mark.parametrize("name, share", [("single_step", 1), ("hash_lookup", 1), ("linear", 0)])
def test_what_the_answer_has_for_the_pair_only(name, share):
    "All of it where a pair is looked up, nothing where the first name says it."
    it = plant_lookup(name)
    table = halves(it.model, ask(it.model, it.people, PROMPTS["one_shot"])).set_index("half")
    assert table.kept["pair only"] == pytest.approx(share, abs=0.05)
    assert table.kept["first"] > 0.95 if name == "linear" else table.kept["first"] < 0.2


MUST = {"single_step": (HOLDS, FALLS, FALLS), "hash_lookup": (FALLS, HOLDS, FALLS), "spread": (HOLDS, FALLS, FALLS), "linear": (FALLS, FALLS, HOLDS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_that_were_written_by_hand_get_the_verdicts_that_they_must(name):
    "On other people than those of the page on which the borders are explained."
    it = plant_lookup(name, seed=2)
    asked = ask(it.model, it.people, PROMPTS["one_shot"])
    parts = Effective(1, (min(it.truth.mlps), max(it.truth.mlps)), (it.truth.extracts,))
    found = verdicts(predictions({table: make() for table, make in evidence(it.model, asked, parts, it.truth.extracts).items()}))
    assert tuple(found[h] for h in ("single_step", "hash_lookup", "additive")) == MUST[name]
    assert {h: found[h] == HOLDS for h in it.truth.says} == dict(it.truth.says)
