import json
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bizzaroworld.battery.formats import BatteryError, battery_sha256, load_battery, load_spares, pairs_from_rows, read_pairs
from bizzaroworld.battery.pairs import PromptPair, counterpart, differences, entity_spans, occurrences, review, spaced, stretch
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
    ({"clean_target": " "}, ["'clean_target'", "empty", "fill it in"]),
    ({"corrupt_prompt": ""}, ["'corrupt_prompt'", "empty"]),
    ({"corrupt_target": " Lima"}, ["'clean_target'", "'corrupt_target'", "both"]),
    ({"corrupt_target": "Lima"}, ["'clean_target'", "'corrupt_target'", "both"]),
    ({"clean_target": " Bogotá", "corrupt_target": " Bogota\u0301"}, ["'clean_target'", "two Unicode forms (NFC and NFD)", "NFC"]),
    ({"clean_prompt": "The capital of Perú is", "clean_entity": "Peru\u0301"}, ["'clean_entity'", "two Unicode forms (NFD and NFC)"]),
    ({"corrupt_prompt": "The capital of Peru is"}, ["are both", "another entity"]),
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


@pytest.mark.parametrize("missing", ["clean_prompt", "corrupt_prompt", "clean_target", "corrupt_target"])
def test_refuses_a_missing_field(missing):
    row = asdict(PERU)
    del row[missing]
    text = refused([row])
    assert f"row 1: field '{missing}' is missing; add it" in text and "1 problem\n" in text


def test_suggests_the_name_that_was_meant():
    row = asdict(PERU)
    row["clean_promt"] = row.pop("clean_prompt")
    assert "rename it to 'clean_prompt'" in refused([row])
    assert "rename it to 'corrupt_entity'" in refused([{**{k: v for k, v in asdict(PERU).items() if k != "corrupt_entity"}, "corupt_entity": "Cuba"}])
    assert "rename" not in refused([{**asdict(PERU), "entity_token": "Peru"}])


@pytest.mark.parametrize("rows, said", [({}, "an object"), ("x", "text"), ([], "empty list"), (None, "null"), (3, "a number"),
                                        (["x"], "row 1: is text"), ([None], "row 1: is null")])
def test_refuses_what_is_not_a_list_of_objects(rows, said):
    assert said in refused(rows)


def test_one_complaint_of_many_rows_is_said_once():
    rows = [{**asdict(PERU), "id": f"p{i}", "clean_target": "", "corrupt_entity": "Cub"} for i in range(1000)] + ["x"]
    rows[7] = {**rows[7], "clean_target": " Lima"}
    with pytest.raises(BatteryError) as e:
        pairs_from_rows(rows, "b.json")
    assert len(e.value.problems) == 1001 and e.value.problems[0].startswith("row 1: field 'clean_target' is empty")
    assert str(e.value).splitlines() == [
        "b.json: 1001 problems", "  row 1: field 'clean_target' is empty; fill it in (and in 998 more rows: 2, 3, 4, ...)",
        "  row 8: field 'corrupt_entity' is 'Cub', which is only inside a longer word in 'corrupt_prompt' ('The capital of Cuba is'); "
        "copy whole words from there", '  row 1001: is text, not an object with fields; write {"clean_prompt": ..., ...}']


def test_ten_kinds_of_problem_are_shown():
    with pytest.raises(BatteryError) as e:
        pairs_from_rows([{**asdict(PERU), **{f"extra-{i}": "" for i in range(14)}}])
    assert len(e.value.problems) == 14 and str(e.value).count("not known") == 10 and "and 4 more kinds" in str(e.value)


def test_problems_come_in_the_order_of_the_rows():
    text = refused([asdict(PERU), {**asdict(PERU), "clean_target": " "}, asdict(PERU), "x"])
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


def test_the_hash_of_the_shipped_battery_is_that_of_the_committed_runs():
    for name in ("bizzaro-nano", "bizzaro-micro"):
        info = json.loads(data_path("runs", name, "run.json").read_text(encoding="utf-8"))
        assert battery_sha256(load_battery()) == info["battery_sha256"]


def test_four_texts_are_a_pair():
    pair = PromptPair("The capital of France is", "The capital of Italy is", " Paris", " Rome")
    assert (pair.clean_entity, pair.corrupt_entity, pair.category, pair.relation) == ("France", "Italy", "pairs", "pairs")
    assert pair.id.startswith("france-italy-") and pair == replace(pair) == PromptPair(*list(asdict(pair).values())[:4])
    assert replace(pair, category="capitals", relation="").relation == "capitals"
    other = PromptPair("The anthem of France is", "The anthem of Italy is", " Paris", " Rome")
    assert other.id.startswith("france-italy-") and other.id != pair.id
    assert PromptPair("1 + 2 =", "1 - 2 =", " 3", " -1").id.startswith("pair-")


@pytest.mark.parametrize("clean, corrupt, entities", [
    ("The capital of Costa Rica is", "The capital of Peru is", ("Costa Rica", "Peru")),
    ("Two and two make", "Six and six make", ("Two and two", "Six and six")),     # all that differs
    ("In old Peru one eats", "In Peru one eats", ("old Peru", "Peru")),           # a word more: the one beside it stands for the place
    ("He is very tall", "He is tall", ("very tall", "tall")),
    ("He ran home", "He ran", ("ran home", "ran")),
    ("日本の首都は", "中国の首都は", ("日本", "中国")),
    ("法国的首都是", "德国的首都是", ("法", "德")),
    ("スペインの首都は", "イランの首都は", ("スペイン", "イラン")),                    # a run of katakana is one word
    ("프랑스의 수도는", "독일의 수도는", ("프랑스의", "독일의")),
    ("Le Pe\u0301rou est", "Le Chili est", ("Pe\u0301rou", "Chili")),              # an accent belongs to its letter
])
def test_entities_are_what_differs(clean, corrupt, entities):
    pair = PromptPair(clean, corrupt, " a", " b")
    assert (pair.clean_entity, pair.corrupt_entity) == entities
    for (start, stop), prompt, entity in zip(entity_spans(pair), (clean, corrupt), entities): assert prompt[start:stop] == entity


def test_one_entity_gives_the_other():
    assert PromptPair("two and two make", "two and six make", " four", " eight", "two").corrupt_entity == "six"
    assert PromptPair("two and two make", "two and six make", " four", " eight", corrupt_entity="six").clean_entity == "two"


@pytest.mark.parametrize("clean, corrupt, said", [("So it is", "So it is", "the same"), ("", "So it is", "empty"), ("...", "...", "the same")])
def test_without_a_difference_there_is_no_entity(clean, corrupt, said):
    with pytest.raises(ValueError, match=said): PromptPair(clean, corrupt, " a", " b")


@pytest.mark.parametrize("entity, prompt, found", [
    ("cat", "an education", []), ("日本", "今日本人は", [(1, 3)]), ("프랑스", "프랑스의 수도", [(0, 3)]), ("Apple", "Appleの本社", [(0, 5)]),
    ("Apple", "Apples", []), ("e", "e\u0301t", []), ("é", "été", []), ("กรุงเทพ", "เมืองกรุงเทพคือ", [(5, 12)])])
def test_whole_words_where_there_are_spaces(entity, prompt, found):
    assert occurrences(entity, prompt) == found


@pytest.mark.parametrize("prompt, target, expected", [
    ("The capital is", "Paris", True), ("The capital is ", " Paris", True), ("Answer:\n", "Paris", False), ("首都は", "東京", False),
    ("The city is", "東京", False), ("from 1732 to 17", "52", None), ("The answer is (", "A", None), ("It equals", "5", None)])
def test_the_space_that_one_writes(prompt, target, expected):
    assert spaced(prompt, target) is expected


def test_spaces_are_reviewed_not_refused():
    rows = [{**asdict(PERU), "id": "target", "clean_target": "Lima"}, {**asdict(PERU), "id": "more", "corrupt_target": " Havana "},
            {**asdict(PERU), "id": "prompt", "corrupt_prompt": "The capital of Cuba is "},
            {**asdict(PERU), "id": "line", "clean_prompt": "The capital of Peru is\n", "clean_target": "Lima"}]
    pairs = pairs_from_rows(rows)
    assert pairs[0].clean_target == "Lima" and pairs[2].corrupt_prompt.endswith(" ") and pairs[1].corrupt_target == " Havana "
    table = review(pairs)
    assert [(r.pair_id, r.rule) for r in table.itertuples() if r.rule.endswith("space")] == [
        ("target", "target_space"), ("more", "target_space"), ("prompt", "prompt_space")]
    assert review([PromptPair("日本の首都は", "中国の首都は", "東京", "北京"), PromptPair("from 1732 to 17", "from 1744 to 17", "52", "61", "1732", "1744")
                   ]).query("rule in ('target_space', 'prompt_space')").empty
    forms = PromptPair("Le Pérou, so", "Le Pe\u0301rou, so", " a", " b")
    assert "unicode_forms" in set(review([forms]).rule)


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


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_what_is_found_to_differ_holds_all_that_differs(clean, corrupt):
    """Taken out of both prompts, the entities leave the same words before and after."""
    clean, corrupt = " ".join(clean), " ".join(corrupt)
    if clean == corrupt: return
    pair = PromptPair(clean, corrupt, " a", " b")
    assert (pair.clean_entity, pair.corrupt_entity) == stretch(clean, corrupt) and pair.clean_entity and pair.corrupt_entity
    rests = {(f" {p} ".partition(f" {e} ")[0], f" {p} ".partition(f" {e} ")[2]) for p, e in ((clean, pair.clean_entity), (corrupt, pair.corrupt_entity))}
    if clean.count(pair.clean_entity) == 1 == corrupt.count(pair.corrupt_entity): assert len(rests) == 1
    assert pair.id == PromptPair(clean, corrupt, " a", " b").id != PromptPair(corrupt, clean, " a", " b").id
