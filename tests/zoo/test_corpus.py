"""The corpus of the shipped models: what was read, and what was not."""
import random

import pytest

from bizzaroworld.battery.facts import FactsError, is_prompt, load_facts
from bizzaroworld.battery.formats import load_battery, load_spares
from bizzaroworld.files import data_path
from bizzaroworld.zoo.corpus import (Composition, Document, Guard, Sentence, compositions, document, find_compositions, generate,
                                     held_out, new_wordings, normalize, prompts_of, render, split)


@pytest.fixture(scope="module")
def tables(): return load_facts()


@pytest.fixture(scope="module")
def pairs(): return load_battery() + load_spares()


@pytest.fixture(scope="module")
def parts(tables, pairs): return split(tables, pairs)


@pytest.fixture(scope="module")
def corpus(parts, pairs):
    "Every document that the shipped models read."
    import json
    record = json.loads(data_path("models", "bizzaro-nano", "training.json").read_text(encoding="utf-8"))
    return generate(parts, pairs, record["options"]["documents"])


def occurring(prompts, documents):
    "The prompts that occur in a document, whatever the case and the white space; plain substring search, no index."
    text = "\n".join(normalize(d.text) for d in documents)
    return [p for p in prompts if normalize(p) in text]


def test_no_prompt_of_battery_or_spares_is_read(corpus, pairs):
    assert len(prompts_of(pairs)) >= 200
    assert occurring(prompts_of(pairs), corpus) == []


def test_no_held_out_prompt_is_read(corpus, parts):
    assert len(parts.held_out) > 500
    assert occurring([s.prompt for s in held_out(parts)], corpus) == []


@pytest.mark.parametrize("change", [str, str.upper, lambda s: s.replace(" ", "  "), lambda s: s.replace(" ", "\n\t", 1)])
def test_the_proof_would_catch_a_planted_prompt(corpus, pairs, change):
    prompt = pairs[7].corrupt_prompt
    planted = [*corpus[:50], Document(f"Note: {change(prompt)} it.", ()), *corpus[50:100]]
    assert occurring(prompts_of(pairs), planted) == [prompt]
    assert Guard(prompts_of(pairs)).find(planted[50].text) == normalize(prompt)


def test_each_prompt_is_a_composition_that_is_reserved(parts, tables, pairs):
    for prompt, some in find_compositions(tables, prompts_of(pairs)).items():
        assert some, f"{prompt!r} fits no template and fact"
        assert set(some) <= set(parts.reserved)


def test_each_battery_fact_is_read_in_other_wordings_and_each_wording_with_other_facts(parts, tables, pairs):
    facts, templates = {}, {}
    for c in parts.train:
        if is_prompt(c.template): facts.setdefault(c.fact, set()).add(c.template)
        templates.setdefault(c.template, set()).add(c.fact)
    for prompt, some in find_compositions(tables, prompts_of(pairs)).items():
        for c in some:
            assert len(facts[c.fact] - {c.template}) >= 2, prompt
            assert len(templates[c.template] - {c.fact}) >= 2, prompt


def test_what_is_read_really_has_the_facts_and_templates(corpus, parts, pairs, tables):
    "The bookkeeping is about texts that exist: a battery fact's other wordings do occur."
    text = "\n".join(d.text for d in corpus)
    fact = find_compositions(tables, [pairs[0].clean_prompt])[pairs[0].clean_prompt][0].fact
    told = [render(c, tables, random.Random(0)) for c in parts.train if c.fact == fact and is_prompt(c.template)]
    assert len(told) >= 5
    assert all(s.prompt + s.answer + "." in text for s in told)


def test_parts_are_disjoint_and_complete(parts, tables):
    train, held, reserved = set(parts.train), set(parts.held_out), set(parts.reserved)
    assert not train & held and not train & reserved and not held & reserved
    assert train | held | reserved == set(compositions(tables))


def test_hold_out_ignores_fillers(parts, tables):
    "A held-out composition with fillers is never rendered with any: its regular expression matches no trained sentence."
    with_fillers = [c for c in (*parts.held_out, *parts.reserved) if "{x}" in c.template or "{O}" in c.template]
    assert len(with_fillers) > 20
    assert not set(with_fillers) & set(parts.train)
    for c in with_fillers:
        prompts = [render(c, tables, random.Random(seed)).prompt for seed in range(3)]
        assert all(c in some for some in find_compositions(tables, prompts).values())


def test_same_seed_same_corpus_other_seed_another(parts, pairs):
    assert generate(parts, pairs, 300, seed=5) == generate(parts, pairs, 300, seed=5)
    assert generate(parts, pairs, 300, seed=5) != generate(parts, pairs, 300, seed=6)
    assert generate(parts, pairs, 300, seed=5)[:100] == generate(parts, pairs, 100, seed=5)


def test_order_of_pairs_does_not_matter(tables, pairs):
    assert split(tables, pairs) == split(tables, pairs[::-1])


def test_answers_are_where_the_spans_say(corpus):
    for doc in corpus[:2000]:
        for start, stop in doc.answers:
            assert doc.text[start] == " " and doc.text[stop] == "." and doc.text[start + 1:stop].strip()


def test_document_spans_follow_the_opening():
    doc = document([Sentence("A is", " b"), Sentence("It rains", ""), Sentence("C is", " d e")], "Note:")
    assert doc.text == "Note: A is b. It rains. C is d e."
    assert [doc.text[a:b] for a, b in doc.answers] == [" b", " d e"]


def test_guard_needs_the_whole_prompt():
    guard = Guard(["The capital of France is", "Gold ="])
    assert guard.find("The capital of France was") is None
    assert guard.find("I say:  the CAPITAL of\nFrance  is it") == "the capital of france is"
    assert guard.find("Marigold = flower") == "gold ="


def test_new_wordings_are_new(tables, corpus):
    known = {c.template for c in compositions(tables)}
    new = new_wordings(tables)
    assert not {c.template for c in new} & known
    assert len({c.template for c in new}) >= 25
    sample = [render(c, tables, random.Random(0)).prompt for c in new[::10]]
    assert occurring(sample, corpus) == []


def test_statements_have_no_answer_to_ask_for(tables):
    fact = tables.facts[0]
    assert render(Composition("{a} is what {e} has", fact), tables, random.Random(0)).answer == ""


def test_tables_are_large_enough(tables):
    assert len(tables.facts) >= 2000 and len(tables.relations) >= 60


HEADER = "relation,entity,given,answer\n"
SPEC = '{"generic_templates": [], "fillers": {"N1": ["A", "B"], "N2": ["C", "D"], "O": ["e", "f"]}, "relations": {"r": {"label": "", "generic": false, "templates": %s}}}'
FOUR = '["{e} is", "The {e} is", "A {e} is", "My {e} is"]'


@pytest.mark.parametrize("rows, templates, says", [
    ("r,a,,\n", FOUR, "row 2, field 'answer'"),
    ("r,a,,b\nq,a,,b\n", FOUR, "row 3, field 'relation'"),
    ("r,a,,b\nr,a,,c\n", FOUR, "row 3, field 'entity'"),
    ("r,a, ,b\n", FOUR, "row 2, field 'given'"),
    ("r,a,,b,c\n", FOUR, "row 2"),
    ("r,a,,b\nr,c,d,b\n", FOUR, "some facts fill 'given'"),
    ("r,a,x,b\n", FOUR, "must have {b}"),
    ("r,a,,b\n", '["{e} is", "The {e} is", "A {e} is"]', "write at least 4"),
    ("r,a,,b\n", FOUR.replace("My {e}", "My {f}"), "unknown placeholder"),
    ("r,a,,b\n", FOUR.replace("My {e}", "My {L} {e}"), "needs a label"),
    ("", FOUR, "no fact"),
])
def test_slips_in_the_tables_are_named(tmp_path, rows, templates, says):
    (tmp_path / "facts.csv").write_text(HEADER + rows, encoding="utf-8")
    (tmp_path / "relations.json").write_text(SPEC % templates, encoding="utf-8")
    with pytest.raises(FactsError) as error: load_facts(tmp_path)
    assert says in str(error.value)
