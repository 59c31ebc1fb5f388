"""`bizzaroworld lookup`, end to end on a lookup that was written by hand: the folder, going on with it, and what is refused."""
import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from bizzaroworld.cli import app
from bizzaroworld.commands.lookup_run import _no_lookup, lookup_lines, reader_of, run_lookup
from bizzaroworld.lookup.asking import Asked
from bizzaroworld.lookup.people import PeopleError, knowing, whom
from bizzaroworld.lookup.stages import Effective
from bizzaroworld.planted.lookups import PROMPTS, plant_lookup
from bizzaroworld.study.runs import RunError

TABLES = ("people curves components effective stages halves probes first_step paths excess parallelograms lengths own_parts neurons resampled one_attribute facts predictions").split()


@pytest.fixture(scope="module")
def planted(): return plant_lookup("single_step")


@pytest.fixture(scope="module")
def folder(planted, tmp_path_factory):
    return run_lookup(planted.model, people=planted.people, prompt=PROMPTS["one_shot"], out=tmp_path_factory.mktemp("lookup") / "run", most=48, words=False)


@pytest.mark.slow
def test_a_run_finds_what_was_planted(planted, folder):
    assert {f"{name}.csv" for name in TABLES} <= {path.name for path in folder.iterdir()}
    parts = json.loads((folder / "effective.json").read_text())
    assert parts == {"concatenated": 1, "lookup": [2, 2], "extraction": [[6, 2]], "readout": False}
    assert json.loads((folder / "verdicts.json").read_text()) == {"single_step": "holds", "hash_lookup": "falls", "additive": "falls"}
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert {path.name for path in (folder / "figures").glob("*.png")} == set(captions) and len(captions) == 8 and all(c["caption"] and c["alt"] for c in captions.values())
    text = "\n".join(lookup_lines(folder))
    assert "right on 100%" in text and "heads L6H2" in text and "single step: holds" in text


@pytest.mark.slow
def test_a_run_that_was_stopped_makes_only_what_is_missing(planted, folder):
    kept = {name: (folder / f"{name}.csv").read_bytes() for name in TABLES}
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.csv") if path.stem != "predictions"}
    for name in ("halves", "neurons"): (folder / f"{name}.csv").unlink()
    told = []
    run_lookup(planted.model, people=planted.people, prompt=PROMPTS["one_shot"], out=folder, most=48, words=False, progress=lambda done, total, what: told.append(what))
    assert told == ["halves", "neurons"]
    assert {name: (folder / f"{name}.csv").read_bytes() for name in TABLES} == kept
    assert all(path.stat().st_mtime_ns == at for path, at in made.items() if path.stem not in ("halves", "neurons"))
    with pytest.raises(RunError, match="margin"): run_lookup(planted.model, people=planted.people, prompt=PROMPTS["one_shot"], out=folder, most=48, margin=2)


def test_nothing_is_asked_of_a_model_that_knows_nobody(planted, tmp_path):
    wrong = planted.people.assign(answer=planted.people["answer"].map({"baseball": "football", "football": "basketball", "basketball": "baseball"}))
    wrong = pd.concat([wrong, pd.DataFrame([["Xylophonia", "Zed", "football"]], columns=["first", "last", "answer"])])
    folder = run_lookup(planted.model, people=wrong, prompt=PROMPTS["one_shot"], out=tmp_path / "run")
    assert "1 names are not two tokens there and were left out" in json.loads((folder / "ability.json").read_text())["sentence"]
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"run.json", "people.csv", "whole.json", "ability.json"}
    assert "nothing else is asked" in "\n".join(lookup_lines(folder))


def test_known_is_right_by_a_margin_and_lucky_guesses_are_counted():
    people = pd.DataFrame({"first": ["A"] * 100, "last": [f"B{i}" for i in range(100)], "answer": ["golf", "chess"] * 50})
    found = pd.DataFrame({"said": "golf", "right": [True] * 60 + [False] * 40, "ld": 1.0, "lead": [2.0] * 30 + [0.5] * 60 + [2.0] * 10, "loss": 1.0})
    table, told = knowing(Asked(people, "{name}", None, 1, 2, ("chess", "golf"), (0, 1)), found, 1.0)
    assert table.known.sum() == told["known"] == 30 and told["right"]["value"] == 0.6 and told["right_where_sure"]["value"] == 0.75 and told["can_do"]
    assert not knowing(Asked(people, "{name}", None, 1, 2, ("chess", "golf"), (0, 1)), found.assign(right=[True, False] * 50), 1.0)[1]["can_do"]
    always = people.assign(answer=["golf"] * 80 + ["chess"] * 20)  # says golf to everybody
    assert not knowing(Asked(always, "{name}", None, 1, 2, ("chess", "golf"), (0, 1)), found.assign(right=[True] * 80 + [False] * 20, lead=2.0), 1.0)[1]["can_do"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b.replace(b"1", b"2", 1)], ids=["cut", "emptied", "changed"])
def test_a_table_that_something_else_has_changed_is_made_again(planted, folder, damage):
    kept = {name: (folder / f"{name}.csv").read_bytes() for name in TABLES}
    for name in ("people", "halves", "effective"): (folder / f"{name}.csv").write_bytes(damage(kept[name]))
    run_lookup(planted.model, people=planted.people, prompt=PROMPTS["one_shot"], out=folder, most=48, words=False)
    assert {name: (folder / f"{name}.csv").read_bytes() for name in TABLES} == kept


def test_nothing_is_judged_that_does_not_hold_of_the_other_half():
    def why(parts, head, right_low, kept_high):
        worth = pd.DataFrame([{"replaced": "all but it", "stage": "everything", "right_low": right_low, "kept_high": 1.0}, {"replaced": "it alone", "stage": "lookup", "right_low": 0.1, "kept_high": kept_high}]).set_index(["replaced", "stage"])
        return _no_lookup(parts, head, worth, 1 / 3)
    found = Effective(1, (1, 2), ((6, 2),))
    assert why(found, (6, 2), 0.8, 0.5) == ""
    assert "without any MLP" in why(Effective(1, None, ((6, 2),)), (6, 2), 0.8, 0.5) and "no head" in why(found, None, 0.8, 0.5)
    assert "do not answer" in why(found, (6, 2), 0.3, 0.5) and "as before" in why(found, (6, 2), 0.8, 1.02)


def test_the_head_that_is_asked_reads_after_the_lookup():
    "The one that helps most of those; none where nothing is looked up, or none reads after it."
    single = pd.DataFrame([{"site": "z", "way": "mean", "layer": 1, "head": 0, "mean": -2.0}, {"site": "z", "way": "mean", "layer": 6, "head": 2, "mean": -1.0}])
    assert reader_of(None, Effective(1, None, ((6, 2),)), single) is None
    assert reader_of(None, Effective(1, (1, 2), ((1, 0), (6, 2))), single) == (6, 2) == reader_of(None, Effective(1, (1, 2), ((1, 0),)), single)
    assert reader_of(None, Effective(1, (1, 6), ((1, 0),)), single) is None


def test_who_cannot_be_asked_is_named(planted, tmp_path):
    with pytest.raises(PeopleError, match="no column 'answer'"): whom(planted.people[["first", "last"]])
    with pytest.raises(PeopleError, match="in the table twice"): whom(pd.concat([planted.people, planted.people[:1]]))
    with pytest.raises(PeopleError, match="None of 1 names are two tokens"): run_lookup(planted.model, people=pd.DataFrame({"first": ["Xy"], "last": ["Zw"], "answer": ["golf"]}), prompt=PROMPTS["one_shot"], out=tmp_path / "e")
    with pytest.raises(PeopleError, match="cannot be read"): whom(tmp_path / "nobody.csv")
    with pytest.raises(PeopleError, match="nothing to tell apart"): run_lookup(planted.model, people=planted.people[planted.people["answer"] == "football"], prompt=PROMPTS["bare"], out=tmp_path / "a")
    with pytest.raises(PeopleError, match="Row 2 .* has no answer"): whom(planted.people.assign(answer=["football", " ", *planted.people["answer"][2:]]))
    with pytest.raises(PeopleError, match="Row 1 .* has no last"): whom(planted.people.assign(last=[None, *planted.people["last"][1:]]))
    with pytest.raises(PeopleError, match="no rows"): whom(planted.people[:0])
    with pytest.raises(PeopleError, match="given as list"): whom([("A", "B", "golf")])
    with pytest.raises(PeopleError, match="at least 12"): run_lookup(planted.model, people=planted.people, prompt=PROMPTS["bare"], out=tmp_path / "d", most=3)
    with pytest.raises(PeopleError, match="ends in the name"): run_lookup(planted.model, people=planted.people, prompt="Fact: {name}", out=tmp_path / "c")
    with pytest.raises(PeopleError, match="holds {name} once"): run_lookup(planted.model, people=planted.people, prompt="plays", out=tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_the_command_says_what_is_wrong_and_nothing_else(tmp_path):
    done = CliRunner().invoke(app, ["lookup", "--model", "bizzaro-nano", "--people", str(tmp_path / "nobody.csv"), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and "cannot be read" in done.output and "Traceback" not in done.output
