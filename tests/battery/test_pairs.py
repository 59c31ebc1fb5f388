import json
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bizzaroworld.battery.formats import BatteryError, battery_sha256, load_battery, load_spares, pairs_from_rows, read_pairs
from bizzaroworld.battery.pairs import PromptPair, counterpart, differences, entity_spans, review
from bizzaroworld.files import data_path

PERU = PromptPair("The capital of Peru is", "The capital of Cuba is", " Lima", " Havana", "Peru", "Cuba",
                  id="capitals-01", category="capitals", relation="capital")
STUDY = {"category": "animals", "clean_prompt": "A heron is a kind of", "corrupt_prompt": "A perch is a kind of",
         "clean_target": " bird", "corrupt_target": " fish", "entity_token": "heron"}


def refused(rows) -> str:
    with pytest.raises(BatteryError) as e:
        pairs_from_rows(rows, "b.json")
    return str(e.value)


def test_pair_is_frozen():
    with pytest.raises(FrozenInstanceError):
        PERU.id = "other"


def test_reads_own_format(tmp_path):
    file = tmp_path / "b.json"
    file.write_text(json.dumps([asdict(PERU)]), encoding="utf-8")
    assert read_pairs(file) == load_battery(file) == load_spares(str(file)) == [PERU]


def test_reads_the_studys_format():
    rows = [STUDY, {**STUDY, "category": "sums", "clean_prompt": "One plus two equals", "corrupt_prompt": "One plus six equals",
                    "clean_target": " three", "corrupt_target": " seven", "entity_token": "two"}, STUDY]
    pairs = pairs_from_rows(rows)
    assert [p.id for p in pairs] == ["animals-01", "sums-01", "animals-02"]
    assert [p.relation for p in pairs] == ["animals", "sums", "animals"]
    assert [(p.clean_entity, p.corrupt_entity) for p in pairs] == [("heron", "perch"), ("two", "six"), ("heron", "perch")]


@pytest.mark.parametrize("entity, clean, corrupt, expected", [
    ("Peru", "The capital of Peru is", "The capital of Cuba is", "Cuba"),
    ("Steve", "Steve Jobs founded", "Bill Gates founded", "Bill"),          # a part of what differs: the same part
    ("Steve Jobs", "Steve Jobs founded", "Bill Gates founded", "Bill Gates"),
    ("Peru", "In Peru, one eats", "In Costa Rica, one eats", "Costa Rica"),  # more words: the whole stretch
    ("New York", "In New York, one eats", "In Rome, one eats", "Rome"),
    ("two", "two and two make", "two and six make", "six"),                   # the occurrence that differs
    ("cat", "An education for a cat is", "An education for a dog is", "dog"),
    ("make", "two and two make", "two and six make", "make"),
    ("Paris", "Is Paris, then,", "Is Rome, then,", "Rome"),
    ("plus two", "One plus two equals", "One less six equals", "less six"),
])
def test_counterpart(entity, clean, corrupt, expected):
    assert counterpart(entity, clean, corrupt) == expected


def test_counterpart_that_does_not_exist():
    text = refused([{**STUDY, "clean_prompt": "A heron here is", "corrupt_prompt": "A heron is", "entity_token": "here"}])
    assert "row 1" in text and "entity_token" in text and "corrupt_entity" in text


def test_entity_spans_prefer_what_differs():
    pair = replace(PERU, clean_prompt="two and two make", corrupt_prompt="two and six make", clean_entity="two", corrupt_entity="six")
    assert entity_spans(pair) == ((8, 11), (8, 11))
    same = replace(pair, clean_entity="and", corrupt_entity="and")
    assert entity_spans(same) == ((4, 7), (4, 7))


def test_differences_are_blocks_of_words():
    assert differences("a b c d", "a x y d") == [("b c", "x y")]
    assert differences("a b c d", "x b c y") == [("a", "x"), ("d", "y")]
    assert differences("a b c", "a b") == [("c", "")]
    assert differences("a b", "a b") == []


WRONG = [
    ({"clean_target": "Lima"}, ["'clean_target'", "leading space", "' Lima'"]),
    ({"corrupt_target": "  Havana"}, ["'corrupt_target'", "one leading space", "' Havana'"]),
    ({"corrupt_target": " Havana "}, ["'corrupt_target'", "one leading space", "' Havana'"]),
    ({"corrupt_target": "\tHavana"}, ["'corrupt_target'", "leading space"]),
    ({"corrupt_target": " Lima"}, ["'clean_target'", "'corrupt_target'", "both"]),
    ({"clean_prompt": "The capital of Peru is "}, ["'clean_prompt'", "ends in whitespace", "remove"]),
    ({"corrupt_prompt": "The capital of Cuba is\n"}, ["'corrupt_prompt'", "ends in whitespace"]),
    ({"corrupt_prompt": "The capital of Peru is"}, ["the same", "another entity"]),
    ({"clean_entity": "Chile"}, ["'clean_entity'", "'Chile'", "is not in"]),
    ({"corrupt_entity": "Cub"}, ["'corrupt_entity'", "inside a longer word", "whole words"]),
    ({"corrupt_entity": " Cuba"}, ["'corrupt_entity'", "whitespace around"]),
    ({"category": ""}, ["'category'", "empty"]),
    ({"relation": "  "}, ["'relation'", "empty"]),
    ({"clean_target": 4}, ["'clean_target'", "a number", "quotes"]),
    ({"clean_target": None}, ["'clean_target'", "null"]),
    ({"clean_target": [" Lima"]}, ["'clean_target'", "a list"]),
    ({"comment": "x"}, ["'comment'", "not known", "remove it"]),
]


@pytest.mark.parametrize("change, said", WRONG)
def test_refuses_a_wrong_row(change, said):
    text = refused([{**asdict(PERU), "id": "other"}, {**asdict(PERU), **change}])
    assert "b.json: 1 problem\n" in text or change == {"corrupt_prompt": "The capital of Peru is"}
    assert "row 2" in text and "row 1:" not in text
    for word in said:
        assert word in text


@pytest.mark.parametrize("missing", ["id", "relation", "clean_entity", "corrupt_target"])
def test_refuses_a_missing_field(missing):
    row = asdict(PERU)
    del row[missing]
    text = refused([row])
    assert f"row 1: field '{missing}' is missing; add it" in text and "1 problem\n" in text


def test_suggests_the_name_that_was_meant():
    row = asdict(PERU)
    row["clean_promt"] = row.pop("clean_prompt")
    assert "rename it to 'clean_prompt'" in refused([row])
    assert "'entity_token' is missing" in refused([{k: v for k, v in STUDY.items() if k != "entity_token"}])
    assert "rename" not in refused([{**asdict(PERU), "entity_token": "Peru"}])


@pytest.mark.parametrize("rows, said", [({}, "an object"), ("x", "text"), ([], "empty list"), (None, "null"), (3, "a number"),
                                        (["x"], "row 1: is text"), ([None], "row 1: is null")])
def test_refuses_what_is_not_a_list_of_objects(rows, said):
    assert said in refused(rows)


def test_collects_all_problems_and_shows_ten():
    rows = [{**asdict(PERU), "id": f"p{i}", "clean_target": "Lima", "corrupt_target": "Havana"} for i in range(7)]
    with pytest.raises(BatteryError) as e:
        pairs_from_rows(rows)
    assert len(e.value.problems) == 14
    assert str(e.value).count("leading space") == 10 and "and 4 more" in str(e.value)


def test_problems_come_in_the_order_of_the_rows():
    text = refused([asdict(PERU), {**asdict(PERU), "clean_target": "Lima"}, asdict(PERU), "x"])
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == ["row 2", "row 3", "row 4"]
    assert "as in row 1" in text


def test_not_json_names_line_and_column(tmp_path):
    file = tmp_path / "b.json"
    file.write_text('[\n  {"id": "a"\n   "category": "b"}]', encoding="utf-8")
    with pytest.raises(BatteryError, match=r"b\.json.*\n.*line 3, column 4"):
        read_pairs(file)


def test_repeated_fields_wrong_encodings_and_marks(tmp_path):
    file = tmp_path / "b.json"
    file.write_text('[{"id": "a", "id": "b"}]', encoding="utf-8")
    with pytest.raises(BatteryError, match="'id' twice"):
        read_pairs(file)
    file.write_bytes('[{"id": "café"}]'.encode("latin-1"))
    with pytest.raises(BatteryError, match="UTF-8"):
        read_pairs(file)
    file.write_text(json.dumps([asdict(PERU)]), encoding="utf-8-sig")
    assert read_pairs(file) == [PERU]
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "none.json")


def test_hash_is_of_the_pairs_not_of_the_file(tmp_path):
    other = replace(PERU, id="capitals-02", clean_target=" Qosqo")
    tight, loose = tmp_path / "a.json", tmp_path / "b.json"
    tight.write_text(json.dumps([asdict(PERU), asdict(other)]), encoding="utf-8")
    loose.write_text(json.dumps([dict(reversed(asdict(p).items())) for p in (PERU, other)], indent=4), encoding="utf-8")
    assert battery_sha256(read_pairs(tight)) == battery_sha256(read_pairs(loose))
    assert battery_sha256([other, PERU]) != battery_sha256([PERU, other]) != battery_sha256([PERU])
    assert len(battery_sha256([PERU])) == 64


def rules(*pairs):
    return list(review(pairs).itertuples(index=False, name=None))


def test_review_names_rules_and_pairs():
    two = replace(PERU, id="two", clean_prompt="In Peru the Andes are", corrupt_prompt="In Cuba the hills are")
    part = replace(PERU, id="part", clean_prompt="So Steve Jobs made", corrupt_prompt="So Bill Gates made", clean_entity="Steve", corrupt_entity="Bill")
    longer = replace(PERU, id="longer", clean_prompt="So in Peru is", corrupt_prompt="So in old Cuba is")
    ends = replace(PERU, id="ends", clean_prompt="Peru has", corrupt_prompt="Cuba had")
    table = review([PERU, two, part, longer, ends])
    assert list(table.columns) == ["battery_idx", "pair_id", "rule", "warning"]
    assert list(zip(table.battery_idx, table.pair_id, table.rule)) == [
        (1, "two", "several_spans"), (2, "part", "entity_too_short"), (3, "longer", "entity_too_short"),
        (4, "ends", "entity_too_short"), (4, "ends", "differs_at_start"), (4, "ends", "differs_at_end")]


def test_review_sees_words_that_only_one_prompt_has():
    def found(clean, corrupt): return [r[2] for r in rules(replace(PERU, clean_prompt=clean, corrupt_prompt=corrupt))]
    assert found("So the Peru is", "So Cuba is") == found("So Peru is", "So the Cuba is") == ["entity_too_short"]
    assert found("So Peru was here is", "So Cuba was is") == found("So Peru was is", "So Cuba was here is") == ["several_spans"]


def test_review_finds_leaked_answers_and_repeats():
    leak = replace(PERU, id="leak", clean_prompt="So LIMA in Peru is", corrupt_prompt="So LIMA in Cuba is")
    table = review([leak])
    assert list(table.rule) == ["answer_in_prompt"] * 2 and "corrupted prompt" in table.warning[1]
    assert rules(replace(PERU, clean_prompt="Limas of Peru are", corrupt_prompt="Limas of Cuba are")) == []
    again = replace(PERU, id="again", clean_prompt=PERU.corrupt_prompt, corrupt_prompt=PERU.clean_prompt, clean_target=PERU.corrupt_target,
                    corrupt_target=PERU.clean_target, clean_entity="Cuba", corrupt_entity="Peru")
    assert [r[:3] for r in rules(PERU, again)] == [(1, "again", "repeated_fact")] * 2
    same = replace(PERU, id="same", clean_entity="capital", corrupt_entity="capital")
    assert {r[2] for r in rules(same)} == {"same_entity", "several_spans"}


def test_the_shipped_batteries():
    battery, spares = load_battery(), load_spares()
    assert len(battery) == 60 and len({p.category for p in battery}) == 20
    assert len({p.id for p in battery + spares}) == len(battery) + len(spares)
    assert review(battery + spares).empty
    assert {p.category for p in spares} == {p.category for p in battery}


def test_data_path_says_what_is_missing():
    assert data_path("battery.json").is_file()
    with pytest.raises(FileNotFoundError, match="models/none.*reinstall"):
        data_path("models", "none")


WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS, WORDS, WORDS)
def test_entities_are_found_where_they_were_put(before, one, other, after):
    """Whatever is around them, the spans are the entities' text and lie on word boundaries."""
    clean, corrupt = " ".join(before + one + after), " ".join(before + other + after)
    pair = replace(PERU, clean_prompt=clean, corrupt_prompt=corrupt, clean_entity=" ".join(one), corrupt_entity=" ".join(other))
    for (start, stop), prompt, entity in zip(entity_spans(pair), (clean, corrupt), (pair.clean_entity, pair.corrupt_entity)):
        assert prompt[start:stop] == entity
        assert f" {prompt} "[start] == " " == f" {prompt} "[stop + 1]


@settings(max_examples=200, deadline=None)
@given(WORDS, st.lists(st.text("xyz", min_size=1, max_size=4), min_size=1, max_size=3), WORDS)
def test_counterpart_of_a_whole_difference_is_the_whole_difference(before, other, after):
    clean, corrupt = " ".join(before + ["K"] + after), " ".join(before + other + after)
    assert counterpart("K", clean, corrupt) == " ".join(other)
    assert differences(clean, corrupt) == [("K", " ".join(other))]
