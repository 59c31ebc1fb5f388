"""The battery and its spares in data/: what must hold before any model is asked."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "id", "category", "relation", "clean_prompt", "corrupt_prompt", "clean_target",
    "corrupt_target", "clean_entity", "corrupt_entity",
}
CATEGORIES = {
    "geography_capitals", "geography_continents", "chemistry_symbols", "physics_constants",
    "anatomy_organs", "astronomy_planets", "mathematics_addition", "mathematics_geometry",
    "sports_equipment", "translation_spanish", "translation_french", "colors_mixing",
    "animal_taxonomy", "history_dates", "technology_founders", "units_measurement",
    "literature_authors", "mythology_roman_greek", "pop_culture_bands", "materials_composition",
}
SIDES = ("clean", "corrupt")


def read(name: str) -> list[dict[str, str]]:
    return json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8"))


BATTERY, SPARES = read("battery"), read("spares")
PAIRS = BATTERY + SPARES
RELATIONS = json.loads((ROOT / "data/facts/relations.json").read_text(encoding="utf-8"))["relations"]
with (ROOT / "data/facts/facts.csv").open(newline="", encoding="utf-8") as _file:
    FACTS = {(f["relation"], f["entity"], f["given"]): f["answer"] for f in csv.DictReader(_file)}
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=[pair["id"] for pair in PAIRS])


def as_words(text: str) -> re.Pattern:
    """Match a text as whole words."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


def frame(pair: dict[str, str], side: str) -> str:
    """The prompt with its entity replaced by {e}."""
    return as_words(pair[f"{side}_entity"]).sub("{e}", pair[f"{side}_prompt"])


def templates_of(pair: dict[str, str]) -> list[tuple[str, str]]:
    """The (template, given) of the pair's relation that its prompt is an instance of."""
    found = []
    for template in RELATIONS[pair["relation"]]["templates"]:
        if "{a}" in template:
            continue
        pattern = re.escape(template).replace(r"\{b\}", r"(?P<given>.+?)", 1)
        pattern = re.sub(r"\\\{(x|y|O|N1|N2)\\\}", ".+?", pattern)
        match = re.fullmatch(pattern, frame(pair, "clean"))
        if match:
            found.append((template, match.groupdict().get("given") or ""))
    return found


def fact_keys(pair: dict[str, str]) -> list[tuple[str, str, str]]:
    """The two facts that the pair asks for."""
    given = templates_of(pair)[0][1]
    return [(pair["relation"], pair[f"{side}_entity"], given) for side in SIDES]


@pytest.mark.parametrize("pairs", [BATTERY, SPARES], ids=["battery", "spares"])
def test_three_pairs_in_each_of_twenty_categories(pairs):
    assert Counter(pair["category"] for pair in pairs) == dict.fromkeys(CATEGORIES, 3)


def test_ids_are_unique_and_readable():
    ids = [pair["id"] for pair in PAIRS]
    assert len(set(ids)) == len(ids)
    assert [i for i in ids if not re.fullmatch(r"[a-z0-9_]+(-[a-z0-9_]+){2}", i)] == []


@each_pair
def test_keys_and_plain_text(pair):
    assert set(pair) == KEYS
    for key, value in pair.items():
        assert value.isascii() and value.strip(), key
        if not key.endswith("target"):
            assert value == " ".join(value.split()), key


@each_pair
def test_prompts_differ_in_one_contiguous_entity(pair):
    for side in SIDES:
        assert len(as_words(pair[f"{side}_entity"]).findall(pair[f"{side}_prompt"])) == 1
    assert pair["clean_entity"] != pair["corrupt_entity"]
    assert frame(pair, "clean") == frame(pair, "corrupt")
    start = frame(pair, "clean").index("{e}")
    assert 0 < start < len(frame(pair, "clean")) - len("{e}"), "entity first or last in the prompt"


@each_pair
def test_targets(pair):
    clean, corrupt = pair["clean_target"], pair["corrupt_target"]
    assert clean != corrupt
    for target in (clean, corrupt):
        assert re.fullmatch(r" \w+", target)
        for side in SIDES:
            assert not as_words(target.strip()).search(pair[f"{side}_prompt"]), "answer in the prompt"


@each_pair
def test_no_answer_hides_inside_its_own_entity(pair):
    if pair["relation"] in {"element_symbol", "quantity_letter"}:
        pytest.skip("symbols and letters are parts of names")
    for side in SIDES:
        assert pair[f"{side}_target"].strip().lower() not in pair[f"{side}_entity"].lower()


@each_pair
def test_relation_category_and_template(pair):
    assert RELATIONS[pair["relation"]]["category"] == pair["category"]
    assert len(RELATIONS[pair["relation"]]["templates"]) >= 6
    found = templates_of(pair)
    assert found, "the prompt is no instance of a template of its relation"
    assert len({given for _, given in found}) == 1, "its given is ambiguous"


@each_pair
def test_facts_are_in_the_table(pair):
    for side, key in zip(SIDES, fact_keys(pair)):
        target = pair[f"{side}_target"].strip()
        assert FACTS[key] == target or FACTS[key].startswith(target + " ")


@each_pair
def test_other_entities_train_the_template(pair):
    """The prompt itself is held out, so its template needs facts outside all pairs."""
    used = {key for other in PAIRS for key in fact_keys(other)}
    given = templates_of(pair)[0][1]
    free = [key for key in FACTS if key[0] == pair["relation"] and key not in used]
    assert len(free) >= 4
    if given:
        assert any(key[2] == given for key in free) or pair["relation"] in {"light_mixing", "ink_mixing"}


def test_no_fact_is_asked_twice():
    counts = Counter(key for pair in PAIRS for key in fact_keys(pair))
    assert [key for key, count in counts.items() if count > 1] == []


def load_tokenizer(name: str):
    folder = Path(os.environ.get("BIZZARO_TOKENIZERS", ROOT.parent / "shared" / "tokenizers")) / name
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}; set BIZZARO_TOKENIZERS to the folder that holds {name}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def misalignment(tokenizer, pair: dict[str, str]) -> str:
    """Why a tokenizer cannot use the pair, or an empty string."""
    ids = {side: tokenizer(pair[f"{side}_prompt"])["input_ids"] for side in SIDES}
    clean, corrupt = ids["clean"], ids["corrupt"]
    if len(clean) != len(corrupt):
        return "length"
    differ = [i for i, (a, b) in enumerate(zip(clean, corrupt)) if a != b]
    if not differ or differ[-1] - differ[0] + 1 != len(differ):
        return "not one span"
    for side in SIDES:
        for target in SIDES:
            longer = tokenizer(pair[f"{side}_prompt"] + pair[f"{target}_target"])["input_ids"]
            if longer[:-1] != ids[side]:
                return f"{target} target is not one token after the {side} prompt"
    return ""


@pytest.mark.parametrize("name", ["gemma-1", "gemma-3"])
def test_every_pair_is_aligned(name):
    tokenizer = load_tokenizer(name)
    refused = {pair["id"]: misalignment(tokenizer, pair) for pair in BATTERY}
    assert {key: reason for key, reason in refused.items() if reason} == {}
    assert sum(not misalignment(tokenizer, pair) for pair in SPARES) >= 56
