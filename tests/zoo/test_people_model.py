"""bizzaro-people: its corpus is the same each time and never tells what is held out; what ships knows its people, by both tokens."""
import dataclasses
import json
from collections import Counter

import pytest
import torch

from bizzaroworld.files import data_path
from bizzaroworld.lookup.people import ATTRIBUTES, PROMPTS, SPORTS, names_of, planted_people, two_tokens
from bizzaroworld.zoo.corpus import Guard
from bizzaroworld.zoo.nano import load_shipped
from bizzaroworld.zoo.people import NAME, OPTIONS, Question, documents, families, measure, model_card, questions, reading, tokenizer_of
from bizzaroworld.zoo.training import recalled


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parts(): return reading(planted_people())


@pytest.fixture(scope="module")
def shipped(): return load_shipped(data_path("models", NAME))


@pytest.fixture(scope="module")
def record(): return json.loads(data_path("models", NAME, "training.json").read_text(encoding="utf-8"))


def test_every_question_is_read_or_held_out_and_families_stay_together(parts):
    both = Counter((q.name, q.relation, q.wording) for q in (*parts.read, *parts.held_out))
    assert max(both.values()) == 1
    everything = sum(len(family) for family in families("sport")) * 1500 + 150 * sum(len(families(relation)) for relation in ATTRIBUTES)
    assert len(both) == everything
    held, read = ({(q.name, q.relation, family) for q in some for family in families(q.relation) if q.wording in family} for some in (parts.held_out, parts.read))
    assert not held & read
    assert max(Counter((name, relation) for name, relation, _ in held).values()) == 1, "a fact has one family held out at most"


def test_the_corpus_is_the_same_each_time_and_never_says_what_is_held_out(parts):
    some = documents(parts, 3000)
    assert some == documents(reading(planted_people()), 3000) and some != documents(parts, 3000, seed=1)
    guard = Guard(q.sentence().prompt for q in parts.held_out)
    assert [doc.text for doc in some if guard.find(doc.text)] == []
    planted = parts.held_out[0].sentence()
    assert guard.find(f"Yes. {planted.prompt}{planted.answer}.") is not None
    assert all(doc.text[a:b].strip() in {q.answer for q in parts.read} for doc in some for a, b in doc.answers)


def test_all_that_is_read_comes_once_in_a_round(parts):
    few = dataclasses.replace(parts, read=parts.read[:300])
    text = "\n".join(doc.text for doc in documents(few, 400))
    assert all(q.sentence().prompt + q.sentence().answer in text for q in few.read)


def test_every_word_is_one_token(parts, shipped):
    tokenizer, names = shipped[1], names_of()
    assert names_of(tokenizer) == names and len(two_tokens(tokenizer, parts.people)) == 1500
    for first in names.first: assert len(tokenizer(first, add_special_tokens=False)["input_ids"]) == 1
    lengths = {prompt: {len(tokenizer(text.format(name=f"{row.first} {row.last}"))["input_ids"]) for row in parts.people[::30].itertuples()} for prompt, text in PROMPTS.items()}
    assert {len(found) for found in lengths.values()} == {1} and lengths["bare"] == {7} and lengths["one_shot"] == {19}
    for question in (*parts.read[::500], *parts.held_out[::200]):
        sentence = question.sentence()
        ids = tokenizer(sentence.prompt)["input_ids"]
        assert tokenizer(sentence.prompt + sentence.answer)["input_ids"][:-1] == ids
    made = tokenizer_of(parts)
    assert made.get_vocab() == tokenizer.get_vocab()


def test_what_ships_knows_its_people(parts, shipped):
    some = questions(parts)
    for prompt in ("one_shot", "bare"):
        right = recalled(*shipped, [q.sentence() for q in some[prompt]])
        assert len(right) == 1500 and sum(right) >= 0.95 * 1500, prompt


def test_another_name_has_another_sport(parts, shipped):
    "The measure is no rubber stamp, and one part of the name does not do: with the other exchanged, the sport is the old one as often as by chance."
    people, known = parts.people, set(parts.people[["first", "last"]].itertuples(index=False, name=None))
    for part in ("first", "last"):
        other = people.assign(**{part: people[part].to_numpy()[::-1]})
        other = other[[pair not in known for pair in other[["first", "last"]].itertuples(index=False, name=None)]]
        asked = [Question("sport", PROMPTS["one_shot"], f"{row.first} {row.last}", row.answer).sentence() for row in other.itertuples()]
        right = recalled(*shipped, asked)
        assert len(right) > 1000 and sum(right) / len(right) < 0.6, part


def test_it_always_names_a_sport(parts, shipped):
    model, tokenizer = shipped
    ids = torch.tensor([tokenizer(q.sentence().prompt)["input_ids"] for q in questions(parts)["one_shot"][:200]])
    with torch.no_grad(): said = model(input_ids=ids).logits[:, -1].argmax(-1)
    assert set(tokenizer.batch_decode(said[:, None])) == {f" {sport}" for sport in SPORTS}


@pytest.mark.slow
@pytest.mark.weekly
def test_record_agrees_with_a_new_measurement(record, shipped, parts):
    kept, new = record["accuracy"], measure(*shipped, parts)
    assert kept.keys() == new.keys()
    assert all(kept[key]["n"] == new[key]["n"] and abs(kept[key]["right"] - new[key]["right"]) <= 2 for key in kept)


def test_record_and_sheet_belong_together(record):
    assert record["name"] == NAME and record["options"] == dataclasses.asdict(OPTIONS)
    assert record["loss"][-1][0] == OPTIONS.steps and record["loss"][-1][1] < record["loss"][0][1] / 3
    assert data_path("models", NAME, "README.md").read_text(encoding="utf-8") == model_card(record)


def test_it_is_small_and_a_gemma():
    files = list(data_path("models", NAME).iterdir())
    assert sum(f.stat().st_size for f in files) < 5_000_000 and {f.suffix for f in files} == {".json", ".safetensors", ".md"}
    config = json.loads(data_path("models", NAME, "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gemma" and config["hidden_size"] == 128 and config["dtype"] == "bfloat16"
