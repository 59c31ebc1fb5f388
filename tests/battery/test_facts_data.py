"""The fact tables in data/facts: shape, consistency, grammar that a program can check."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "data" / "facts"
COLUMNS = ["relation", "entity", "given", "answer"]
PLACEHOLDERS = {"{e}", "{b}", "{a}", "{L}", "{x}", "{y}", "{N1}", "{N2}", "{O}"}
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()


def read_facts() -> list[dict[str, str]]:
    with (FOLDER / "facts.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


FACTS = read_facts()
TABLE = json.loads((FOLDER / "relations.json").read_text(encoding="utf-8"))
RELATIONS = TABLE["relations"]
BY_RELATION = defaultdict(list)
for _fact in FACTS:
    BY_RELATION[_fact["relation"]].append(_fact)


def fill(template: str, fact: dict[str, str], other: dict[str, str], label: str) -> str:
    """The sentence of one fact in one template, the answer included."""
    values = {
        "{e}": fact["entity"], "{b}": fact["given"], "{a}": fact["answer"], "{L}": label,
        "{x}": other["entity"], "{y}": other["answer"],
        "{N1}": TABLE["fillers"]["N1"][0], "{N2}": TABLE["fillers"]["N2"][0],
        "{O}": TABLE["fillers"]["O"][0],
    }
    text = re.sub(r"\{\w+\}", lambda match: values[match.group()], template)
    return text if "{a}" in template else f"{text} {fact['answer']}"


def sentences():
    """Every (relation, template, fact, sentence) of the tables."""
    for name, relation in RELATIONS.items():
        templates = relation["templates"] + (TABLE["generic_templates"] if relation["generic"] else [])
        facts = BY_RELATION[name]
        for template in templates:
            for index, fact in enumerate(facts):
                yield name, template, fact, fill(template, fact, facts[index - 1], relation["label"])


def test_columns_and_size():
    with (FOLDER / "facts.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == COLUMNS
    assert len(FACTS) >= 2000
    assert len(RELATIONS) >= 60


def test_relations_and_facts_name_each_other():
    assert {fact["relation"] for fact in FACTS} == set(RELATIONS)


def test_no_fact_is_given_twice():
    counts = Counter((fact["relation"], fact["entity"], fact["given"]) for fact in FACTS)
    assert [key for key, count in counts.items() if count > 1] == []


def test_given_is_filled_for_all_facts_of_a_relation_or_none():
    mixed = [name for name, facts in BY_RELATION.items() if len({bool(f["given"]) for f in facts}) > 1]
    assert mixed == []


def test_ascii_and_no_stray_whitespace():
    cells = [value for fact in FACTS for value in fact.values()]
    cells += [t for relation in RELATIONS.values() for t in relation["templates"]]
    cells += [relation["label"] for relation in RELATIONS.values()] + TABLE["generic_templates"]
    bad = [c for c in cells if not c.isascii() or c != " ".join(c.split())]
    assert bad == []
    assert [fact for fact in FACTS if not fact["entity"] or not fact["answer"]] == []


def test_relation_entries_are_complete():
    for name, relation in RELATIONS.items():
        assert set(relation) == {"label", "generic", "category", "templates"}, name
        assert len(relation["templates"]) >= 6, name
        assert len(set(relation["templates"])) == len(relation["templates"]), name
        assert relation["label"] or not relation["generic"], name


@pytest.mark.parametrize("name", sorted(RELATIONS))
def test_placeholders_are_known_and_needed(name):
    has_given = any(fact["given"] for fact in BY_RELATION[name])
    for template in RELATIONS[name]["templates"]:
        used = set(re.findall(r"\{[^}]*\}", template))
        assert used <= PLACEHOLDERS - {"{L}"}, template
        assert "{e}" in used, template
        assert ("{b}" in used) == has_given, template
        assert ("{x}" in used) == ("{y}" in used), template
        assert template.count("{e}") == 1, template
    for placeholder in PLACEHOLDERS:
        assert any(placeholder in key.split() for key in TABLE["_about"]), placeholder


def test_generic_templates_hold_entity_and_label():
    for template in TABLE["generic_templates"]:
        assert set(re.findall(r"\{[^}]*\}", template)) - {"{a}"} == {"{e}", "{L}"}, template


def test_sentences_fill_without_leftovers():
    bad = [text for *_, text in sentences() if re.search(r"[{}]|  |^\s|\s$", text)]
    assert bad == []


def test_indefinite_articles():
    vowel = re.compile(r"\b[Aa] (?!one|uni|use|eu)[aeiouAEIOU]\w+")
    consonant = re.compile(r"\b[Aa]n (?!hour|honest)[^aeiouAEIOU\W\d]\w+")
    doubled = re.compile(r"\b(?:the|The|a|A|an|any|each|every|one) (?:the|a|an)\b")
    texts = [text for name, *_, text in sentences() if name != "quantity_letter"]  # "the letter a"
    bad = [t for t in texts if vowel.search(t) or consonant.search(t) or doubled.search(t)]
    assert bad == []


def test_one_prompt_has_one_answer():
    answers = defaultdict(set)
    for _, template, fact, text in sentences():
        if "{a}" not in template:
            answers[text[: -len(fact["answer"]) - 1]].add(fact["answer"])
    assert {prompt: found for prompt, found in answers.items() if len(found) > 1} == {}


def test_sums_are_right():
    for fact in BY_RELATION["addition"]:
        total = NUMBERS.index(fact["entity"]) + NUMBERS.index(fact["given"])
        assert fact["answer"] == NUMBERS[total], fact


@pytest.mark.parametrize("relation", ["paint_mixing", "light_mixing", "ink_mixing"])
def test_mixing_does_not_depend_on_the_order(relation):
    mixed = {(fact["entity"], fact["given"]): fact["answer"] for fact in BY_RELATION[relation]}
    assert [pair for pair in mixed if mixed.get(pair[::-1]) != mixed[pair]] == []


def test_opposite_colors_are_mutual():
    opposite = {fact["entity"]: fact["answer"] for fact in BY_RELATION["opposite_color"]}
    opposite.pop("violet")  # a second name of purple
    assert [color for color, other in opposite.items() if opposite[other] != color] == []
