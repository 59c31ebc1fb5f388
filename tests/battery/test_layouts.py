"""Battery files as people have them: every format gives the same pairs, every published layout gives pairs."""
import csv
import io
import json
import warnings
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bizzaroworld.battery.formats import FIELDS, NEEDED, BatteryError, load_battery, pairs_from_rows, read_pairs
from bizzaroworld.battery.layouts import LAYOUTS, layout_of, pair_up
from bizzaroworld.battery.pairs import PromptPair

FOUR = [("The capital of France is", "The capital of Italy is", " Paris", " Rome"),
        ("The currency of Japan, today, is the", "The currency of India, today, is the", " yen", " rupee")]
PAIRS = [PromptPair(*four) for four in FOUR]


def table(rows, separator=",", header=NEEDED, **options) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=separator, **options).writerows([header, *rows] if header else rows)
    return out.getvalue()


def saved(tmp_path, name, text, encoding="utf-8"):
    (tmp_path / name).write_bytes(text.encode(encoding))
    return tmp_path / name


TEXTS = {
    "json": ("b.json", json.dumps([dict(zip(NEEDED, f)) for f in FOUR])),
    "lists": ("b.json", json.dumps(FOUR)),
    "no suffix": ("b", json.dumps(FOUR)),
    "jsonl": ("b.jsonl", "\n".join(json.dumps(dict(zip(NEEDED, f))) for f in FOUR) + "\n\n"),
    "ndjson, CRLF": ("b.ndjson", "\r\n".join(json.dumps(dict(zip(NEEDED, f))) for f in FOUR)),
    "csv, CRLF": ("b.csv", table(FOUR)),
    "csv, LF": ("B.CSV", table(FOUR, lineterminator="\n")),
    "csv, quoted": ("b.csv", table(FOUR, quoting=csv.QUOTE_ALL)),
    "csv, semicolons": ("b.csv", table(FOUR, ";")),
    "csv, no header": ("b.csv", table(FOUR, header=None)),
    "csv, another order": ("b.csv", table([f[::-1] for f in FOUR], header=NEEDED[::-1])),
    "csv, empty cells and lines": ("b.csv", table([(*f, "", "") for f in FOUR], header=(*NEEDED, "category", "id")) + "\n,,,,,\n"),
    "csv, pandas's index": ("b.csv", table([(i, *f) for i, f in enumerate(FOUR)], header=("", *NEEDED))),
    "tsv": ("b.tsv", table(FOUR, "\t")),
    "tsv in a csv": ("b.csv", table(FOUR, "\t")),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", TEXTS)
def test_four_columns_are_a_battery_in_every_format(name, encoding, tmp_path):
    assert load_battery(saved(tmp_path, *TEXTS[name], encoding)) == PAIRS


def test_spaces_after_commas_are_no_part_of_the_cells(tmp_path):
    text = 'clean_prompt, corrupt_prompt, clean_target, corrupt_target\n"So, Peru is", "So, Cuba is", "Lima", " Havana"\n'
    assert read_pairs(saved(tmp_path, "b.csv", text)) == [PromptPair("So, Peru is", "So, Cuba is", "Lima", " Havana")]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
WORDS = st.lists(st.sampled_from(["Peru", "so", 'a "word"', "it's", "a,b", "x;y", "né", "日本", "two\nlines", "tab\there", "\r\n"]), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, TEXT, TEXT, TEXT), min_size=1, max_size=3))
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv"])
def test_a_battery_goes_through_every_format_unchanged(kind, tmp_path_factory, drawn):
    pairs = []
    for i, (before, after, entity, category, target) in enumerate(drawn):
        clean, corrupt = (" ".join([*before, e, *after]) for e in ("Ada", "Bo"))
        texts = [t if t.strip() else "x" for t in (target, category)]
        pairs.append(PromptPair(clean, corrupt, texts[0] + "1", texts[0] + "2", "Ada", "Bo", f"{i}", texts[1], entity if entity.strip() else "r"))
    rows = [asdict(p) for p in pairs]
    text = {"json": lambda: json.dumps(rows, ensure_ascii=False), "jsonl": lambda: "\n".join(json.dumps(r) for r in rows),
            "csv": lambda: table([r.values() for r in rows], header=FIELDS), "tsv": lambda: table([r.values() for r in rows], "\t", FIELDS)}[kind]()
    assert read_pairs(saved(tmp_path_factory.mktemp("b"), f"b.{kind}", text)) == pairs


BROKEN = [
    ("b.csv", table([FOUR[0][:3]], header=NEEDED[:3]), ["row 1: field 'corrupt_target' is missing; add it", "below the header"]),
    ("b.csv", table([FOUR[0], (*FOUR[1][:3], "")]), ["row 2: field 'corrupt_target' is empty; fill it in"]),
    ("b.csv", table([(*FOUR[0], "x")] * 3, header=(*NEEDED, "id")), ["row 2: field 'id' is 'x', as in row 1; give it another (and in 1 more row: 3)"]),
    ("b.csv", table([FOUR[0]] * 2), ["row 2", "the two ask the same, remove one"]),
    ("b.csv", table([(*FOUR[0], "x")]), ["line 2: 5 cells under 4 columns; quote"]),
    ("b.csv", table([FOUR[0]]) + '"open,', ["not CSV", "quote that is not closed"]),
    ("b.csv", table([FOUR[0]], header=("clean_prompt", "corrupt_prompt", "clean_target", "clean_target")), ["two columns are called 'clean_target'"]),
    ("b.csv", "", ["empty list"]),
    ("b.csv", "a,b\n1,2\n", ["none of the fields of a pair", "clean_prompt, corrupt_prompt"]),
    ("b.jsonl", json.dumps(dict(zip(NEEDED, FOUR[0]))) + "\n{oops}", ["line 2, column 2: not JSON"]),
    ("b.json", "{}\n{}", ["name the file .jsonl"]),
    ("b.xlsx", "PK", [".xlsx is not read", ".csv"]),
]


@pytest.mark.parametrize("name, text, said", BROKEN)
def test_what_is_wrong_is_said_with_a_remedy(name, text, said, tmp_path):
    with pytest.raises(BatteryError) as e: read_pairs(saved(tmp_path, name, text))
    for words in (name, *said): assert words in str(e.value)


# --- layouts with one prompt a row

CITIES = {"Peru": "Lima", "Cuba": "Havana", "Costa Rica": "San José", "El Salvador": "San Salvador"}


def counterfact(subject, answer, prompt="The capital of {} is"):
    return {"case_id": 1, "pararel_idx": 2, "requested_rewrite": {"prompt": prompt, "relation_id": "P36", "subject": subject,
            "target_new": {"str": "Rome", "id": "Q2"}, "target_true": {"str": answer, "id": "Q1"}}, "paraphrase_prompts": []}


def known(subject, answer, prompt="The capital of {} is"):
    return {"known_id": 0, "subject": subject, "attribute": answer, "template": "The capital of {}", "prediction": "...",
            "prompt": prompt.format(subject), "relation_id": "P36"}


def lama(subject, answer, template="The capital of [X] is [Y] ."):
    return {"uuid": "1", "predicate_id": "P36", "sub_label": subject, "obj_label": answer, "template": template}


@pytest.mark.parametrize("name, row", [("CounterFact", counterfact), ("known facts", known), ("LAMA", lama)])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_published_layouts_are_paired_up(name, row, suffix, tmp_path):
    rows = [row(*fact) for fact in CITIES.items()]
    assert all(layout_of(r) == name for r in rows) and name in LAYOUTS
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = load_battery(saved(tmp_path, f"b{suffix}", text))
    assert [(p.clean_prompt, p.corrupt_prompt, p.clean_target, p.corrupt_target) for p in pairs] == [
        ("The capital of Peru is", "The capital of Cuba is", " Lima", " Havana"),
        ("The capital of Costa Rica is", "The capital of El Salvador is", " San José", " San Salvador")]
    assert [(p.clean_entity, p.corrupt_entity, p.category, p.relation) for p in pairs] == [
        ("Peru", "Cuba", "P36", "P36"), ("Costa Rica", "El Salvador", "P36", "P36")]


def test_known_facts_come_as_a_table_too(tmp_path):
    rows = [known(*fact) for fact in CITIES.items()]
    text = table([r.values() for r in rows], header=rows[0])
    assert read_pairs(saved(tmp_path, "known.csv", text)) == pair_up(rows)


def test_a_template_says_whether_there_is_a_space():
    [pair] = pair_up([lama("日本", "東京", "[X]の首都は[Y]。"), lama("中国", "北京", "[X]の首都は[Y]。")])
    assert (pair.clean_prompt, pair.clean_target) == ("日本の首都は", "東京")


MISSING = [
    ([counterfact("Peru", "Lima"), {"requested_rewrite": {"prompt": "{} is", "subject": "x"}}], ["row 2", "'requested_rewrite.target_true.str' is missing"]),
    ([counterfact("Peru", "Lima", "The capital is")], ["requested_rewrite.prompt' has no {}"]),
    ([counterfact("Peru", "Lima"), "x"], ["row 2", "requested_rewrite.prompt"]),
    ([known("Peru", " "), known("Cuba", "Havana")], ["row 1: field 'attribute' is empty; fill it in"]),
    ([known("Peru", "Lima"), {**known("Cuba", "Havana"), "subject": "Kuba"}], ["row 2", "'Kuba'", "copy it from there"]),
    ([{k: v for k, v in lama(*fact).items() if k != "template"} for fact in CITIES.items()],
     ["row 1: field 'template' is missing", "relations.jsonl", "(and in 3 more rows: 2, 3, 4)"]),
    ([lama(*fact, "[Y] is the capital of [X] .") for fact in CITIES.items()], ["end in [Y]", "3 more rows"]),
    ([known("Peru", "Lima"), known("Rio", "Lima")], ["no two of the 2 rows share a template and differ", "same template", "corrupt_target"]),
    ([known("Peru", "Lima"), known("Peru", "Spanish", "In {} one speaks")], ["no two of the 2 rows"]),
]


@pytest.mark.parametrize("rows, said", MISSING)
def test_what_a_layout_lacks_is_said(rows, said):
    with pytest.raises(BatteryError) as e: pairs_from_rows(rows, "b.json")
    for words in said: assert words in str(e.value)


def test_rows_without_a_partner_are_counted():
    rows = [known(*fact) for fact in CITIES.items()] + [known("Goya", "Spain", "{} was born in")]
    with pytest.warns(UserWarning, match="mine.json: 1 of 5 rows are not used"):
        assert len(pairs_from_rows(rows, "mine.json")) == 2


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz"), st.booleans()), min_size=2, max_size=16))
def test_pairing_up(drawn):
    """No row twice, one template a pair, different answers; and as many pairs as there can be."""
    rows = [known(f"S{i}" + " more" * long, answer, f"In {{}} {template} one") for i, (answer, template, long) in enumerate(drawn)]
    possible = 0
    for template in "xyz":
        answers = Counter(a for a, t, _ in drawn if t == template)
        possible += min(answers.total() // 2, answers.total() - max(answers.values(), default=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: pairs = pair_up(rows)
        except BatteryError: pairs = []
        else: assert pair_up(rows) == pairs
    prompts = [p for pair in pairs for p in (pair.clean_prompt, pair.corrupt_prompt)]
    assert len(set(prompts)) == len(prompts) and set(prompts) <= {r["prompt"] for r in rows}
    for pair in pairs:
        assert pair.clean_target != pair.corrupt_target
        assert pair.clean_prompt.replace(pair.clean_entity, "{}") == pair.corrupt_prompt.replace(pair.corrupt_entity, "{}")
    assert bool(pairs) == bool(possible) and len(pairs) <= possible
    if len({long for *_, long in drawn}) == 1: assert len(pairs) == possible
