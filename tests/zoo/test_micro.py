"""bizzaro-micro as it ships: what it is, what it knows, what its tokenizer loses."""
import dataclasses
import json
import math

import pytest
import torch

from bizzaroworld.battery.facts import load_facts
from bizzaroworld.battery.formats import load_battery, load_spares
from bizzaroworld.files import data_path
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.zoo import micro, nano
from bizzaroworld.zoo.corpus import held_out, split
from bizzaroworld.zoo.micro import NAME, OPTIONS, aligned, build, measure_micro, model_card, tokenizer_of, train_micro
from bizzaroworld.zoo.nano import entity_effects, load_shipped, questions
from bizzaroworld.zoo.training import evaluate_pairs, recalled

FOLDER = data_path("models", NAME)
RECORD = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs(): return load_battery() + load_spares()


@pytest.fixture(scope="module")
def parts(pairs): return split(load_facts(), pairs)


@pytest.fixture(scope="module")
def shipped(): return load_shipped(FOLDER)


@pytest.fixture(scope="module")
def table(shipped): return evaluate_pairs(*shipped, aligned(shipped[1], load_battery()))


def test_the_bar(shipped, parts, table):
    assert len(table) == 50
    assert ((table.ld_clean > 0) & (table.ld_corrupt < 0)).sum() >= 48
    assert ((table.rank_clean == 1) & (table.rank_corrupt == 1)).sum() >= 46
    asked = held_out(parts)[::6]
    right = recalled(*shipped, asked)
    assert len(right) > 250 and sum(right) / len(right) >= 0.95


def test_the_record_agrees_with_the_pairs(table):
    kept = RECORD["accuracy"]["battery"]
    new = {"n": len(table), "signs_right": int(((table.ld_clean > 0) & (table.ld_corrupt < 0)).sum()),
           "both_first": int(((table.rank_clean == 1) & (table.rank_corrupt == 1)).sum())}
    assert all(abs(kept[key] - new[key]) <= 1 for key in new) and kept["n"] == new["n"]


def engine_effects(model, tokenizer, pairs):
    "`nano.entity_effects` by the exact engine, all pairs and layers at once."
    engine = load_model(NAME, device="cpu")
    found = sweep(engine, pairs, grid(engine, ["resid_pre"], ["entity_span"]), progress=False)
    return torch.tensor((found.clean[:, None] - found.patched) / (found.clean - found.corrupt)[:, None])[..., 0]


def test_the_engine_measures_where_the_fact_leaves_as_the_record_does(shipped):
    some = [p for p in aligned(shipped[1], load_battery()) if " " in p.clean_entity or len(shipped[1].tokenize(f" {p.clean_entity}")) > 1][:2]
    assert some and engine_effects(*shipped, some).numpy() == pytest.approx(entity_effects(*shipped, some).numpy(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.weekly
def test_the_record_agrees_with_a_new_measurement(parts, monkeypatch):
    """Questions of one length after another, and the effects by the engine: the same numbers in half the time."""
    monkeypatch.setattr(nano, "entity_effects", engine_effects)
    monkeypatch.setattr(nano, "questions", lambda parts: {k: sorted(some, key=lambda s: len(s.prompt + s.answer)) for k, some in questions(parts).items()})
    kept, new = RECORD["accuracy"], measure_micro(FOLDER, parts)
    assert kept.keys() == new.keys() and kept["lost"] == new["lost"]
    for key in ("trained", "held_out", "new_wordings", "indirect_objects", "digit_sums"):
        assert kept[key]["n"] == new[key]["n"] and abs(kept[key]["right"] - new[key]["right"]) <= 2, key
    assert kept["entity_effect_by_layer"] == pytest.approx(new["entity_effect_by_layer"], abs=0.005)


def test_record_and_sheet_belong_together():
    assert RECORD["name"] == NAME and RECORD["options"] == dataclasses.asdict(OPTIONS)
    assert RECORD["loss"][-1][0] == OPTIONS.steps and RECORD["loss"][-1][1] < RECORD["loss"][0][1] / 3
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == model_card(RECORD)


def test_it_read_what_nano_read():
    nano = json.loads(data_path("models", "bizzaro-nano", "training.json").read_text(encoding="utf-8"))["corpus"]
    assert {k: v for k, v in RECORD["corpus"].items() if k != "tokens"} == {k: v for k, v in nano.items() if k != "tokens"}


def test_the_architecture_is_gemma_3_with_windows_shorter_than_the_prompts(shipped):
    assert CONFIG["model_type"] == "gemma3_text" and CONFIG["architectures"] == ["Gemma3ForCausalLM"]
    assert [i for i, kind in enumerate(CONFIG["layer_types"]) if kind == "full_attention"] == [5, 11, 17]
    assert (CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["sliding_window"]) == (8, 2, 4)
    assert CONFIG["dtype"] == "bfloat16"
    assert min(len(shipped[1](pair.clean_prompt)["input_ids"]) for pair in load_battery()) > CONFIG["sliding_window"]


def test_a_local_layer_sees_four_tokens_and_a_global_one_all(shipped):
    "What stands behind the windows of the layers up to 4 cannot be felt there; after layer 5 it is."
    model, ids = shipped[0], torch.arange(300, 330)[None]
    other = ids.clone()
    other[0, 5] = 999
    with torch.no_grad():
        a, b = (model(input_ids=x, output_hidden_states=True).hidden_states for x in (ids, other))
    last = [torch.equal(x[0, -1], y[0, -1]) for x, y in zip(a, b)]
    assert last[:6] == [True] * 6 and not any(last[6:])  # 24 tokens away; five local layers reach fifteen
    near = [torch.equal(x[0, 5 + 4], y[0, 5 + 4]) for x, y in zip(a, b)]
    assert near[1] and not near[2]  # four tokens away: the second local layer


def test_sizes():
    files = list(FOLDER.iterdir())
    assert sum(f.stat().st_size for f in files) < 30_000_000
    assert {f.suffix for f in files} == {".json", ".safetensors", ".md"}


def test_the_tokenizer_can_be_made_again(shipped, parts, pairs):
    made, kept = (json.loads(t.backend_tokenizer.to_str())["model"] for t in (tokenizer_of(parts, pairs), shipped[1]))
    assert made["vocab"] == kept["vocab"] and made["merges"] == kept["merges"]
    assert len(kept["vocab"]) == CONFIG["vocab_size"] == 8192


def test_the_tokenizer_is_no_friend_of_the_battery(shipped, pairs):
    tokenizer = shipped[1]
    assert len(aligned(tokenizer, load_battery())) == 60 - RECORD["accuracy"]["lost"]["dropped"] == 50
    assert RECORD["accuracy"]["lost"]["replaced"] == 6
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id
    for text in (*(p.clean_prompt for p in pairs), "naïve café 日本 \n two  spaces", "x = y, z ="):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_an_entity_of_several_tokens_is_patched_as_a_whole(shipped):
    "At the input of layer 0 the whole entity is exchanged: the patched run is the corrupted run."
    tokenizer = shipped[1]
    several = [p for p in aligned(tokenizer, load_battery() + load_spares()) if sum(
        a != b for a, b in zip(tokenizer(p.clean_prompt)["input_ids"], tokenizer(p.corrupt_prompt)["input_ids"])) > 1]
    assert several
    assert entity_effects(*shipped, several[:1])[:, 0].tolist() == pytest.approx([1.0], abs=1e-3)


def test_training_begins_where_chance_is(monkeypatch, shipped):
    monkeypatch.setattr(micro, "OPTIONS", dataclasses.replace(OPTIONS, documents=300, tokens=200, steps=2))
    monkeypatch.setattr(micro, "tokenizer_of", lambda parts, pairs: shipped[1])
    done = train_micro(until=1)
    assert len(done.losses) == 1 and done.losses[0] == pytest.approx(math.log(8192), abs=0.5)
    assert done.corpus["documents"] == 300
    first, second = build(shipped[1]), build(shipped[1])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
