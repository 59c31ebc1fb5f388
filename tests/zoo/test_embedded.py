"""The shipped checkpoints: what they know, what they are, and that the loop that made them can be repeated."""
import dataclasses
import hashlib
import json
from collections import Counter

import pytest
import torch

from bizzaroworld.battery.facts import load_facts
from bizzaroworld.battery.formats import battery_sha256, load_battery, load_spares
from bizzaroworld.battery.knowing import counts
from bizzaroworld.files import data_path
from bizzaroworld.model.load import embedded_models
from bizzaroworld.paper.chapters import PAPER, WIDE
from bizzaroworld.study.runs import open_run, shipped_runs
from bizzaroworld.zoo.corpus import generate, held_out, split
from bizzaroworld.zoo.nano import RECIPES, load_shipped, measure, model_card, thin
from bizzaroworld.zoo.training import (TrainingOptions, batches, build_model, build_tokenizer, collate, encode, evaluate_pairs,
                                       local_attention, local_mask, recalled, single_words, step_loss, train)

NAMES = sorted(RECIPES)


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
def shipped(): return {name: load_shipped(data_path("models", name)) for name in NAMES}


def record(name): return json.loads(data_path("models", name, "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(shipped, parts): return {name: measure(*shipped[name], parts) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_bar(name, shipped):
    table = evaluate_pairs(*shipped[name], load_battery())
    assert len(table) == 60
    assert ((table.ld_clean > 0) & (table.ld_corrupt < 0)).sum() >= 58
    assert ((table.rank_clean == 1) & (table.rank_corrupt == 1)).sum() >= 56


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("name", NAMES)
def test_the_bar_of_what_was_never_read(name, measured):
    held = measured[name]["held_out"]  # the other numbers are held against the record, below
    assert held["n"] > 500 and held["right"] / held["n"] >= 0.97


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("name", NAMES)
def test_record_agrees_with_a_new_measurement(name, measured):
    kept, new = record(name)["accuracy"], measured[name]
    assert kept.keys() == new.keys()
    for key in ("trained", "held_out", "new_wordings", "indirect_objects", "digit_sums"):
        assert kept[key]["n"] == new[key]["n"] and abs(kept[key]["right"] - new[key]["right"]) <= 2, key
    for key in ("battery", "spares"):
        assert all(abs(kept[key][count] - new[key][count]) <= 1 for count in ("n", "signs_right", "both_first")), key
    assert kept["entity_effect_by_layer"] == pytest.approx(new["entity_effect_by_layer"], abs=0.005)


def test_recall_can_fail(shipped, parts):
    "The measure is no rubber stamp: with the answers of other facts hardly anything is right."
    asked = held_out(parts)[:200]
    wrong = [dataclasses.replace(s, answer=other.answer) for s, other in zip(asked, asked[37:] + asked[:37])]
    assert sum(recalled(*shipped["bizzaro-nano"], wrong)) < 20


@pytest.mark.parametrize("name", NAMES)
def test_record_and_sheet_belong_together(name):
    kept = record(name)
    assert kept["name"] == name and kept["options"] == dataclasses.asdict(RECIPES[name])
    assert len(kept["loss"]) <= 100 and kept["loss"][-1][0] == kept["options"]["steps"]
    assert kept["loss"][-1][1] < kept["loss"][0][1] / 3
    assert data_path("models", name, "README.md").read_text(encoding="utf-8") == model_card(kept)


def test_the_two_models_read_the_same_and_route_in_different_layers():
    tokenizers = [data_path("models", name, "tokenizer.json").read_bytes() for name in NAMES]
    assert tokenizers[0] == tokenizers[1]
    assert record(NAMES[0])["corpus"] == record(NAMES[1])["corpus"]
    plain, local = (record(name)["accuracy"]["entity_effect_by_layer"] for name in ("bizzaro-nano", "bizzaro-nano-local"))
    assert plain[0] == local[0] == 1  # the whole entity is exchanged
    assert plain[3] > 0.8 and plain[4] < 0.2  # the fact leaves in layer 3
    assert local[4] > 0.8 and local[6] < 0.2  # the fact leaves in layers 4 and 5


def test_sizes():
    files = [f for name in NAMES for f in data_path("models", name).iterdir()]
    assert sum(f.stat().st_size for f in files) < 12_000_000
    assert {f.suffix for f in files} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("name", NAMES)
def test_config_is_gemma_with_one_key_value_head(name):
    config = json.loads(data_path("models", name, "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gemma" and config["architectures"] == ["GemmaForCausalLM"]
    assert config["num_attention_heads"] == 4 and config["num_key_value_heads"] == 1
    assert config["dtype"] in ("bfloat16", "float16")


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_puts_bos_first_and_survives_loading(name, shipped, parts, pairs):
    tokenizer = shipped[name][1]
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("Hello", add_special_tokens=False)["input_ids"][0] != tokenizer.bos_token_id
    made = build_tokenizer(parts, pairs)
    for text in (*(p.clean_prompt for p in pairs), "naïve café 日本 \n two  spaces", "x = y, z ="):
        assert tokenizer(text)["input_ids"] == made(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(tokenizer) == shipped[name][0].config.vocab_size


def test_entities_and_targets_are_single_tokens_in_context(shipped, pairs):
    tokenizer = shipped["bizzaro-nano"][1]
    for pair in pairs:
        for prompt in (pair.clean_prompt, pair.corrupt_prompt):
            ids = tokenizer(prompt)["input_ids"]
            for target in (pair.clean_target, pair.corrupt_target):
                assert tokenizer(prompt + target)["input_ids"][:-1] == ids, (pair.id, target)
        clean, corrupt = (tokenizer(p)["input_ids"] for p in (pair.clean_prompt, pair.corrupt_prompt))
        assert sum(a != b for a, b in zip(clean, corrupt, strict=True)) == 1, pair.id
    others = {" " + f.entity for f in load_facts().facts} - set(single_words(pairs))
    assert sum(len(tokenizer.tokenize(e)) > 1 for e in others) > len(others) / 2


# The runs that ship: of these weights and this battery, and of further seeds.

@pytest.mark.parametrize("name", sorted(set(embedded_models()) - {"bizzaro-people"}))  # which cannot be asked the battery
def test_the_shipped_run_is_of_the_shipped_weights(name):
    info = open_run(name).info
    weights = (embedded_models()[name] / "model.safetensors").read_bytes()
    assert info["model"]["name"] == name and info["model"]["embedded"]
    assert info["model"]["weights_sha256"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize("name", [name for name in shipped_runs() if name != WIDE])
def test_a_shipped_run_is_of_the_shipped_pairs(name):
    run = open_run(name)
    assert run.info["battery_sha256"] == battery_sha256(load_battery())
    assert run.info["options"]["spares_sha256"] == battery_sha256(load_spares())
    pairs = {pair.id for pair in load_battery() + load_spares()}
    assert set(run.pairs()) == set(run.effects.pair_id) == set(run.controls.pair_id) and set(run.pairs()) <= pairs
    assert run.model_name == name.split("/")[-1]  # neither a path nor another model's run


def test_the_wide_run_is_of_the_battery_beside_it_and_was_chosen_as_it_says():
    """Every pair prefers both answers by 2 logits, no fact is used twice, and it has the size that was asked for."""
    run = open_run(WIDE)
    pairs = load_battery(run.folder / "battery.json")
    assert run.info["battery_sha256"] == battery_sha256(pairs) and {p.id for p in pairs} == set(run.effects.pair_id)
    assert run.info["model"] == open_run(PAPER).info["model"], "the same weights as the run of the 60 pairs"
    known = counts(run.triage)
    assert known["preferred"] == len(pairs) == len(run.that_knows().triage) >= 800 and known["first_of_all"] >= 250
    asked = Counter((p.clean_prompt, p.clean_target) for p in pairs) + Counter((p.corrupt_prompt, p.corrupt_target) for p in pairs)
    assert max(asked.values()) == 1 and asked.total() == 2 * len(pairs)
    assert sum(f.stat().st_size for f in run.folder.iterdir()) < 5e6


def test_further_seeds_are_other_trainings_of_a_shipped_recipe():
    seeds = [open_run(name) for name in shipped_runs() if name.startswith("seeds/")]
    assert seeds
    for run in seeds:
        recipe, seed = run.model_name.rsplit("-s", 1)
        assert int(seed) != RECIPES[recipe].seed
        shipped = open_run(recipe).info["model"]
        same = {key: value for key, value in run.info["model"].items() if key not in ("name", "embedded", "weights_sha256")}
        assert same == {key: shipped[key] for key in same}
    weights = [open_run(name).info["model"]["weights_sha256"] for name in shipped_runs() if name != WIDE]
    assert len(set(weights)) == len(weights)


# The loop, on a model small enough for a test.

OPTIONS = TrainingOptions(seed=3, steps=12, tokens=400, warmup=3, local_layers=1, local_until=0.5)


@pytest.fixture(scope="module")
def small(parts, pairs):
    tokenizer = build_tokenizer(parts, pairs)
    return tokenizer, encode(tokenizer, generate(parts, pairs, 300))


def tiny(tokenizer): return build_model(tokenizer, seed=3, n_layers=2, d_model=32)


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_same_seed_same_weights_whatever_torch_drew_before(small):
    tokenizer, encoded = small
    first = tiny(tokenizer)
    train(first, encoded, OPTIONS)
    torch.rand(7)
    second = tiny(tokenizer)
    train(second, encoded, OPTIONS)
    assert torch.equal(weights(first), weights(second))
    third = tiny(tokenizer)
    train(third, encoded, dataclasses.replace(OPTIONS, seed=4))
    assert not torch.equal(weights(first), weights(third))


def test_a_resumed_run_equals_an_uninterrupted_one(small, tmp_path):
    tokenizer, encoded = small
    whole = tiny(tokenizer)
    losses = train(whole, encoded, OPTIONS)
    train(tiny(tokenizer), encoded, OPTIONS, state=tmp_path / "state.safetensors", every=4, until=9)  # last saved after step 8
    resumed = tiny(tokenizer)
    assert train(resumed, encoded, OPTIONS, state=tmp_path / "state.safetensors", every=4) == losses
    assert torch.equal(weights(whole), weights(resumed))
    for other in ((encoded, dataclasses.replace(OPTIONS, lr=1e-3)), (encoded[:-1], OPTIONS)):
        with pytest.raises(ValueError, match="other options or documents"):
            train(tiny(tokenizer), *other, state=tmp_path / "state.safetensors")


def test_the_loss_goes_down(small):
    tokenizer, encoded = small
    losses = train(tiny(tokenizer), encoded, dataclasses.replace(OPTIONS, steps=60, warmup=5))
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_the_local_window_is_what_it_says(small):
    "Behind the window a change is felt by nobody in a local layer, except through <bos>."
    assert (local_mask(5, 3)[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]
    model = tiny(small[0])
    ids = torch.tensor([[2, 300, 301, 302, 303, 304, 305, 306]])
    other = ids.clone()
    other[0, 1] = 999

    def last(tokens): return model(input_ids=tokens).logits[0, -1]
    with torch.no_grad():
        with local_attention(model, 2, 3): assert torch.equal(last(ids), last(other))
        assert not torch.equal(last(ids), last(other))
        with local_attention(model, 1, 3): assert not torch.equal(last(ids), last(other))


def test_loss_counts_answers_always_and_padding_never(small):
    tokenizer, _ = small
    model = tiny(tokenizer)
    ids, marks = collate([([2, 300, 301, 1], [False, False, True, False]), ([2, 302, 1], [False, True, False])])
    assert marks.tolist() == [[1, 1, 2, 1], [1, 2, 1, 0]]
    logits = model(input_ids=ids).logits.log_softmax(-1)
    expected = -(logits[0, 1, 301] + logits[1, 0, 302]) / 2
    assert step_loss(model, ids, marks, 0.0, seed=0).item() == pytest.approx(expected.item(), rel=1e-5)
    every = -(logits[0, 0, 300] + logits[0, 1, 301] + logits[0, 2, 1] + logits[1, 0, 302] + logits[1, 1, 1]) / 5
    assert step_loss(model, ids, marks, 1.0, seed=0).item() == pytest.approx(every.item(), rel=1e-5)


def test_batches_cover_everything_and_keep_the_size():
    lengths = [5 + i % 17 for i in range(500)]
    stream, seen = batches(lengths, 100, seed=1), []
    while len(seen) < 500:
        batch = next(stream)
        assert len(batch) * max(lengths[i] for i in batch) <= 100
        seen += batch
    assert sorted(seen) == list(range(500))


def test_thin_keeps_the_mean():
    losses = [float(i) for i in range(250)]
    points = thin(losses)
    assert len(points) <= 100 and points[-1][0] == 250 and points[0] == [3, 1.0]
