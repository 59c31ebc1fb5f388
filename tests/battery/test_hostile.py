"""Batteries that mean no good: any bytes, any JSON, any text. They load, or are refused in a message that fits a screen."""
import csv
import io
import json
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bizzaroworld.battery.formats import FIELDS, NEEDED, BatteryError, battery_sha256, pairs_from_rows, read_pairs
from bizzaroworld.battery.layouts import layout_of
from bizzaroworld.battery.pairs import LONGEST, PromptPair, differences, entity_spans, occurrences, review, stretch, words
from bizzaroworld.files import plain, quoted, write_table
from bizzaroworld.study.runs import _read

GOOD = {"clean_prompt": "The capital of Peru is", "corrupt_prompt": "The capital of Cuba is", "clean_target": " Lima", "corrupt_target": " Havana"}
FACTS = [{"requested_rewrite": {"prompt": "The capital of {} is", "subject": s, "target_true": {"str": a}, "relation_id": "P36"}} for s, a in (("Peru", "Lima"), ("Cuba", "Havana"))]
KNOWN = [{"subject": s, "attribute": a, "template": "The capital of {} is", "prompt": f"The capital of {s} is", "relation_id": "P36"} for s, a in (("Peru", "Lima"), ("Cuba", "Havana"))]
LAMA = [{"sub_label": s, "obj_label": a, "template": "The capital of [X] is [Y] .", "predicate_id": "P36"} for s, a in (("Peru", "Lima"), ("Cuba", "Havana"))]


def is_short(message: str) -> bool:
    """Fits a screen, can be printed, can be written to a log."""
    message.encode("utf-8")
    return len(message) <= 2000 and all(c.isprintable() or c == "\n" for c in message)


def tried(read, *args) -> list[PromptPair] | None:
    """The pairs, or None where they are refused as they should be."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try: pairs = read(*args)
        except BatteryError as error:
            assert is_short(str(error)) and all(is_short(p) for p in error.problems)
            return None
    assert all(is_short(str(w.message)) for w in said)
    return pairs


def comes_back(pairs: list[PromptPair], folder: Path) -> None:
    """What is loaded can be used: hashed, reviewed, located, written in every format and read again."""
    assert pairs and len({p.id for p in pairs}) == len(pairs)
    battery_sha256(pairs), [entity_spans(p) for p in pairs]
    assert all(is_short(text) for text in review(pairs).warning)
    rows = [asdict(p) for p in pairs]
    assert pairs_from_rows(rows) == pairs
    (folder / "b.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    assert read_pairs(folder / "b.json") == pairs
    table = _read_table(folder, pairs)
    assert table == [list(r.values()) for r in rows]


def _read_table(folder: Path, pairs: list[PromptPair]) -> list[list[str]]:
    import pandas as pd
    frame = pd.DataFrame([asdict(p) for p in pairs]).rename(columns={"id": "pair_id"})
    write_table(folder / "triage.csv", frame)
    return _read(folder / "triage.csv").to_numpy().tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("hostile")


DEEP = "[" * 100_000
BYTES = [b"", b"\xff\xfe", b"null", b"{}", b"[]", b"[[]]", b"[null]", b"\xef\xbb\xbf", DEEP.encode(), b'[{"a":' * 50_000, b"[" + b"9" * 5000 + b"]", b'["\\ud800"]',
         b"a,b\n" * 3, b'"', b"\0", b"\n" * 9, b"[NaN, Infinity, -1e999]", b'{"clean_prompt": "a", "clean_prompt": "b"}', json.dumps({"x" * 10_000: 1}).encode() + b"x",
         (",".join(NEEDED) + "\n" + "x" * 200_000).encode(), (",".join(f"c{i}" for i in range(5000)) + "\n1").encode(), ("clean_prompt," * 3).encode()]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ""])
@pytest.mark.parametrize("data", BYTES, ids=range(len(BYTES)))
def test_files_known_to_be_bad(data, suffix, folder):
    (folder / f"b{suffix}").write_bytes(data)
    assert tried(read_pairs, folder / f"b{suffix}") is None


FRAGMENTS = st.lists(st.one_of(st.binary(max_size=8), st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\t", b";", b"\0", b"\\ud800", b"null", b" Lima",
    *(k.encode() for k in (*NEEDED, "id", "entity_token", "subject")), json.dumps([GOOD]).encode(), json.dumps(GOOD).encode(), ",".join(NEEDED).encode()])), max_size=12).map(b"".join)


@settings(max_examples=500)
@given(st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]), st.one_of(st.binary(max_size=200), FRAGMENTS))
def test_any_bytes(folder, suffix, data):
    (folder / f"any{suffix}").write_bytes(data)
    if pairs := tried(read_pairs, folder / f"any{suffix}"): comes_back(pairs, folder)


KEYS = st.sampled_from([*FIELDS, "entity_token", "subject", "attribute", "prompt", "template", "requested_rewrite", "sub_label", "obj_label", "target_true", "str", "relation_id", "predicate_id"])
ANY = st.text(st.characters(), max_size=12)  # surrogates too
LONG = st.builds(lambda t, n: t * n, st.text(st.characters(), min_size=1, max_size=3), st.sampled_from([100, 5000]))
HARD = st.sampled_from(["", " ", "\0", "\ud800", "\udfff x", "a\udc80", "שלום עולם", "مرحبا", "‮abc‬", "👩‍👩‍👧‍👦", "🇵🇪", "e\u0301", "a" + "\u0316\u0300" * 400, "日本", "ー", "!", "'s", "a!", "{}", "[X] [Y]",
                        "\x1c", "\u2028", "\ufeff", "=1+1", "'=1", "x\ry", "x\r\ny", "\t", "NA", "1", "\U000e0001", "<script>"])
TEXT = st.one_of(HARD, ANY, LONG, st.builds(" ".join, st.lists(st.one_of(HARD, st.sampled_from(["The", "capital", "of", "Peru", "Cuba", "is"])), min_size=1, max_size=6)))
JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT), lambda inner: st.one_of(
    st.lists(inner, max_size=5), st.dictionaries(st.one_of(KEYS, TEXT), inner, max_size=6)), max_leaves=25)


@settings(max_examples=500)
@given(st.one_of(JSON, st.lists(st.dictionaries(KEYS, st.one_of(TEXT, JSON), max_size=11), max_size=4)))
@example([[["x"] * 4] * 3])
@example([GOOD | {"category": {"a": [1] * 9}}, GOOD])
@example([FACTS[0] | {"requested_rewrite": FACTS[0]["requested_rewrite"] | {"relation_id": 10 ** 5000}}, FACTS[1]])
def test_any_json(folder, value):
    if pairs := tried(pairs_from_rows, value): comes_back(pairs, folder)


@settings(max_examples=600)
@given(st.dictionaries(st.sampled_from([*FIELDS, "entity_token"]), TEXT, min_size=1, max_size=4), st.booleans())
@example({"id": "\ud800"}, False)
@example({"clean_prompt": "Is \ud800 this Peru"}, True)
@example({"clean_prompt": "Hello a! he", "corrupt_prompt": "Hello a? he"}, False)
@example({"clean_prompt": "日\u0301 is", "corrupt_prompt": "月\u0301 is"}, False)
@example({"clean_target": "=1", "id": "'=1", "category": "@x"}, True)
def test_any_text_in_every_field(folder, drawn, two):
    rows = [GOOD | drawn, *([{**GOOD, "clean_target": " Quito", "id": "other"}] if two else [])]
    if pairs := tried(pairs_from_rows, rows): comes_back(pairs, folder)


@settings(max_examples=400)
@given(st.sampled_from([FACTS, KNOWN, LAMA]), st.data())
def test_any_text_in_every_layout(folder, rows, data):
    rows = json.loads(json.dumps(rows))
    place = rows[0].get("requested_rewrite", rows[0])
    for key in data.draw(st.lists(st.sampled_from(sorted(place)), min_size=1, max_size=3)): place[key] = data.draw(st.one_of(TEXT, JSON))
    assert layout_of(rows[0])
    if pairs := tried(pairs_from_rows, rows): comes_back(pairs, folder)


# --- one place bounds what a message quotes

@settings(max_examples=300)
@given(st.one_of(TEXT, JSON))
def test_what_is_quoted_fits_a_line(value):
    for told in (quoted(value), plain(value if isinstance(value, str) else repr(value))):
        assert len(told) <= 80 and told.isprintable()
        told.encode("utf-8")


def test_quotes_are_those_of_python_where_they_are_short():
    for text in ("Peru", "it's", 'a "b"', "", "é", "שלום", "\n", "\ud800"): assert quoted(text) == repr(text)
    assert quoted("x" * 1000) == "'" + "x" * 75 + "'..." and plain("a\nb") == "a\\nb" and quoted("\u202e") == "'\\u202e'"


@pytest.mark.parametrize("field", [*FIELDS, "entity_token", "unknown"])
def test_fifty_megabytes_in_a_field_are_a_message_of_a_few_lines(field):
    start = time.process_time()
    assert tried(pairs_from_rows, [GOOD | {field: "x y " * 12_500_000}]) is None
    assert tried(pairs_from_rows, [GOOD | {"x" * 50_000_000: "x"}]) is None
    assert time.process_time() - start < 10


def test_a_row_with_a_hundred_thousand_unknown_fields():
    start = time.process_time()
    assert tried(pairs_from_rows, [GOOD | {f"clean_{i}": "x" for i in range(100_000)}] * 3) is None
    assert time.process_time() - start < 5


def test_many_kinds_of_problem_are_counted():
    with pytest.raises(BatteryError) as e: pairs_from_rows([{**GOOD, "id": f"{i}", f"field_{i}": "x" * 500} for i in range(1000)], "b.json")
    assert str(e.value).startswith("b.json: 1000 problems") and "more kinds of problem" in str(e.value) and is_short(str(e.value)) and len(e.value.problems) == 1000


@pytest.mark.parametrize("name", ["b\n\x1b[31m.json", "b\udcff.json", "x" * 200 + ".json"])
def test_a_file_s_name_is_no_way_around(name, tmp_path):
    if sys.platform == "win32": pytest.skip("no such names there")
    (tmp_path / name).write_text("[]", "utf-8")
    with pytest.raises(BatteryError) as e: read_pairs(tmp_path / name)
    assert is_short(str(e.value))


@pytest.mark.parametrize("change, said", [({"id": "a\ud800"}, "half of a character"), ({"clean_prompt": "\udfff"}, "half of a character"),
                                          ({"clean_prompt": "x " * LONGEST}, "characters"), ({"clean_target": "a" + "\u0301" * 40}, "accents")])
def test_what_no_file_can_hold_is_refused_in_python_too(change, said):
    with pytest.raises(ValueError, match=said) as e: PromptPair(**{**GOOD, **change})
    assert is_short(str(e.value))
    with pytest.raises(BatteryError, match=said): pairs_from_rows([GOOD | change])


def test_deep_json_is_refused_in_words(tmp_path):
    (tmp_path / "b.json").write_text('[{"a":' * 100_000)
    with pytest.raises(BatteryError, match="too deep"): read_pairs(tmp_path / "b.json")


# --- as quick as the size of the file

def seconds(make, *args) -> float:
    start = time.process_time()
    make(*args)
    return time.process_time() - start


@pytest.mark.parametrize("given", [(), ("clean_entity", "corrupt_entity", "id"), ("entity_token",)])
def test_thousands_of_pairs_are_read_in_a_second(given):
    rows = []
    for i in range(6000):
        a, b = f"Peru{i}", f"Cuba{i}"
        row = {"clean_prompt": f"The capital of {a} is the city of", "corrupt_prompt": f"The capital of {b} is the city of", "clean_target": " Lima", "corrupt_target": " Havana"}
        rows.append(row | {k: v for k, v in {"clean_entity": a, "corrupt_entity": b, "id": f"{i}", "entity_token": a}.items() if k in given})
    assert seconds(pairs_from_rows, rows) < 3  # it was a minute with entities given


@pytest.mark.parametrize("clean, corrupt", [("a " * 20_000, "a " * 20_001), ("a b " * 20_000, "b a " * 19_999), (" ".join(map(str, range(30_000))), " ".join(map(str, range(1, 30_002))))])
def test_long_prompts_of_different_lengths_are_compared_in_a_moment(clean, corrupt):
    assert seconds(differences, clean, corrupt) < 5
    found = stretch(clean, corrupt)
    assert found[0] in clean and found[1] in corrupt


@settings(max_examples=300)
@given(st.text(st.sampled_from("aB é\u0301日ア東ー한글!'-_ .\n\t\u0e01"), max_size=14), st.text(st.sampled_from("aé\u0301日ア한!'_"), min_size=1, max_size=3))
def test_occurrences_are_what_the_pattern_says(prompt, entity):
    """The search by hand against the regular expression that it took the place of, which took 10 ms to compile for each entity."""
    import re
    from bizzaroworld.battery.pairs import ACCENT, UNBOUND
    letter, free = rf"[^\W{UNBOUND}]|{ACCENT}", rf"[{UNBOUND}]"
    before = "" if re.match(free, entity) else rf"(?<!{letter})"
    after = rf"(?!{ACCENT})" if re.match(free, entity[-1:]) else rf"(?!{letter})"
    assert occurrences(entity, prompt) == [m.span() for m in re.finditer(before + re.escape(entity) + after, prompt)]


@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_words_are_what_the_pattern_says(text):
    import re
    from bizzaroworld.battery.pairs import ACCENT, KATAKANA, UNSPACED
    pattern = rf"[{KATAKANA}]+|[{UNSPACED}]|(?:[^\W{UNSPACED}]|{ACCENT})+|[^\w\s]"
    assert words(text) == [m.span() for m in re.finditer(pattern, text)]
    assert all(any(i <= at < j for i, j in words(text)) != c.isspace() for at, c in enumerate(text))
