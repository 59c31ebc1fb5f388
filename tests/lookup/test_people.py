"""People: the tables are what they say for the tokenizers at hand, and who is made up is nobody, the same each time."""
from collections import Counter

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bizzaroworld.files import data_path
from bizzaroworld.lookup.people import (ATTRIBUTES, CONTEXTS, PROMPTS, SPORTS, Names, athletes, attributes, gemma_answers, known_names, made_up,
                                        names_of, planted_people, two_tokens, values_of)

GENERAL = {"pronoun", "profession", "field", "country", "nationality", "continent", "language", "capital", "money", "birth_month", "known_for", "sport"}


def pairs(table): return list(table[["first", "last"]].itertuples(index=False, name=None))


@pytest.fixture(scope="module")
def gemma_3(tokenizer_folders):
    if "gemma-3" not in tokenizer_folders: pytest.skip("no tokenizer gemma-3")
    return AutoTokenizer.from_pretrained(tokenizer_folders["gemma-3"])


@pytest.fixture(scope="module")
def planted(): return planted_people()


def test_every_athlete_has_one_name_and_one_sport():
    table = athletes()
    assert set(table.answer) == set(SPORTS) and table.answer.value_counts().min() > 200 and table.real.all()
    assert len(set(pairs(table))) == len(table) > 800
    assert all(name.isalpha() and name[0].isupper() for pair in pairs(table) for name in pair)


def test_namesakes_are_no_athletes_and_nobody_twice():
    others = pd.read_csv(data_path("people", "namesakes.csv"), keep_default_na=False)
    assert not set(pairs(others)) & set(pairs(athletes())) and len(set(pairs(others))) == len(others)
    assert known_names() >= set(pairs(others)) | set(pairs(athletes())) | set(pairs(attributes()))


def test_prompts_end_before_the_sport_and_name_none():
    assert {"one_shot", "bare", *CONTEXTS} == set(PROMPTS)
    for prompt in PROMPTS.values():
        assert prompt.endswith("{name} plays the sport of") and prompt.count("{name}") == 1 and not any(s in prompt for s in SPORTS)


def test_names_and_answers_are_single_tokens_for_gemma_3(gemma_3):
    def one(word): return len(gemma_3(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    assert len(two_tokens(gemma_3, athletes())) == len(athletes())
    facts = attributes()
    assert len(two_tokens(gemma_3, facts)) == len(facts)
    assert all(map(one, {*SPORTS, *facts.answer, *(v for relation in ATTRIBUTES for v in values_of(relation))}))


@pytest.mark.parametrize("prompt", [name for name in PROMPTS if name != "bare"])
def test_prompts_have_as_many_tokens_and_the_name_is_two_of_them(gemma_3, prompt):
    some = [gemma_3(PROMPTS[prompt].format(name=f"{first} {last}"))["input_ids"] for first, last in pairs(athletes())[::25]]
    assert len({len(ids) for ids in some}) == 1
    assert {sum(a != b for a, b in zip(some[0], ids)) for ids in some[1:]} <= {1, 2}


def test_two_tokens_judges_names_in_context(tokenizer_folders):
    table = pd.DataFrame([("Michael", "Jordan"), ("Giannis", "Antetokounmpo"), ("Michael", "Antetokounmpo"), ("Zzyzx", "Jordan")], columns=["first", "last"])
    for folder in tokenizer_folders.values():
        assert pairs(two_tokens(AutoTokenizer.from_pretrained(folder), table)) == [("Michael", "Jordan")]


def test_common_names_are_single_tokens_and_in_one_list_only(tokenizer_folders):
    everything = names_of(most=1000)
    assert not set(everything.first) & set(everything.last) and min(map(len, everything)) >= 120
    for folder in tokenizer_folders.values():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        names = names_of(tokenizer)
        assert [len(part) for part in names] == [100, 100] and set(names.first) <= set(everything.first) and set(names.last) <= set(everything.last)
        for name in (*names.first, *names.last): assert len(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) == 1


@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(0, 40))
def test_planted_people_are_nobody_balanced_and_the_same_each_time(seed, n, full):
    table = planted_people(n=n, seed=seed, full=full)
    assert table.equals(planted_people(n=n, seed=seed, full=full)) and len(table) == n
    assert len(set(pairs(table))) == n and not set(pairs(table)) & known_names() and not table.real.any()
    counts = table.answer.value_counts().reindex(SPORTS, fill_value=0)
    assert counts.max() - counts.min() <= 1
    for relation in ATTRIBUTES:
        said = table[relation]
        assert (said[min(full, n):] == "").all() and set(said[:min(full, n)]) <= set(values_of(relation))


def test_another_seed_is_other_people(planted):
    other = planted_people(seed=1)
    assert len(set(pairs(planted)) & set(pairs(other))) < 400
    assert planted_people(n=30, seed=0).answer.tolist() != planted_people(n=30, seed=1).answer.tolist()


def test_neither_name_alone_gives_the_sport_away(planted):
    "The best guess from one part of the name is little better than chance, and what it gains is what fifteen fair draws gain."
    for part in ("first", "last"):
        assert (planted.groupby(part).answer.agg(lambda s: s.value_counts().iloc[0]).sum() / len(planted)) < 0.52
        assert planted.groupby(part).size().between(3, 30).all()


def test_attributes_of_planted_people_are_independent_of_the_sport_and_each_other(planted):
    some = planted[planted.country != ""]
    assert len(some) == 150 and len(ATTRIBUTES) >= 9
    for relation in ATTRIBUTES:
        counts = Counter(some[relation])
        assert max(counts.values()) - min(counts.values()) <= 1, relation
        if relation != "country": assert some.groupby("country")[relation].nunique().min() > 1
    facts = attributes(planted)
    assert len(facts) == 150 * len(ATTRIBUTES) and list(facts.columns) == list(attributes().columns)
    assert (facts[facts.relation == "pet"].answer.tolist()) == some.pet.tolist()


def test_real_attributes_are_nine_or_more_for_each_of_many_people():
    facts = attributes()
    assert not facts.duplicated(["first", "last", "relation"]).any() and (facts != "").all(axis=None)
    assert facts.groupby(["first", "last"]).size().min() >= 9 and len(set(pairs(facts))) >= 25
    assert set(facts.relation) == GENERAL and not facts.ending.str.endswith(" ").any()
    both = facts[facts.relation == "sport"].merge(athletes(), on=["first", "last"])
    assert len(both) >= 5 and (both.answer_x == both.answer_y).all()


def test_made_up_names_are_shuffled_or_unknown_and_nobodys(planted):
    known = athletes()
    shuffled, unknown = made_up(None, known, 500), made_up(names_of(), planted, 500)
    assert set(shuffled["first"]) <= set(known["first"]) and set(shuffled["last"]) <= set(known["last"])
    for table, avoid in ((shuffled, known), (unknown, planted)):
        assert len(set(pairs(table))) == 500 and not set(pairs(table)) & (set(pairs(avoid)) | known_names()) and (table.answer == "").all()
    assert made_up(None, known, 500).equals(shuffled) and not made_up(None, known, 500, seed=1).equals(shuffled)


def test_too_few_names_say_so():
    few = Names(("James", "Mary"), ("Smith", "Hill"))
    assert len(planted_people(few, 4)) == 4
    with pytest.raises(ValueError, match=r"2 first and 2 last names make 4 names .*Ask for n=4"): planted_people(few, 5)
    with pytest.raises(ValueError, match="Ask for n=0 or fewer"): made_up(few, planted_people(few, 4), 1)


def test_what_gemma_says_is_of_these_people():
    said = gemma_answers()
    sports = said[said.prompt != "ending"]
    assert set(sports.prompt) == set(PROMPTS) and all(pairs(rows) == pairs(athletes()) for _, rows in sports.groupby("prompt"))
    asked, facts = said[said.prompt == "ending"], attributes()
    key = ["first", "last", "relation"]
    assert sorted(asked[key].itertuples(index=False, name=None)) == sorted(facts[key].itertuples(index=False, name=None))
    assert said.p.between(0, 1).all() and (said["rank"] >= 1).all() and ((said.p <= 0.5) | (said["rank"] == 1)).all()
    assert (said.share >= said.p - 1e-4).all() and said[said.share > 0.5].right.all()
    assert said[(said["rank"] == 1)].right.all()
    assert said[said.prompt == "one_shot"].right.sum() >= 300


@pytest.mark.slow
def test_what_gemma_says_is_what_it_says(gemma):
    from bizzaroworld.battery.tokens import continuation, encode
    some = gemma_answers().query("prompt == 'one_shot'")[::90]
    for row in some.itertuples():
        prompt = encode(gemma.tokenizer, PROMPTS["one_shot"].format(name=f"{row.first} {row.last}"))
        logits = gemma.logits(torch.tensor([prompt.ids]))[0].float()
        ids = {sport: continuation(gemma.tokenizer, prompt, f" {sport}")[0] for sport in SPORTS}
        answer = athletes().set_index(["first", "last"]).answer[row.first, row.last]
        assert logits.softmax(0)[ids[answer]].item() == pytest.approx(row.p, abs=2e-3)
        assert (max(ids, key=lambda sport: logits[ids[sport]]) == answer) == row.right
