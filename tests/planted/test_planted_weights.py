"""Planted weights: the model is right on every prompt, is an ordinary checkpoint, and its parts compute what they say."""
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bizzaroworld.battery.tokens import align
from bizzaroworld.battery.triage import triage
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.planted.weights import (BETWEEN, CITIES, D_MODEL, FIRST, LAST, LOGIT, PARTS, PLAIN, WORDS, Lookup, Mover, Plan, battery, build, part, save,
                                          tokenizer)
from bizzaroworld.planted.variants import VARIANTS, plant

SIMPLE = Plan((Lookup(1, "last", "fact"),), (Mover(3, 1, "fact", "answer"),))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_answer_has_logit_ten_and_all_else_zero(name):
    p = plant(name, n=30)
    logits = p.model.logits(torch.tensor([tp.clean_ids for tp in p.pairs])).detach()
    expected = torch.zeros_like(logits).scatter(1, torch.tensor([[tp.clean_target_id] for tp in p.pairs]), LOGIT)
    assert (logits - expected).abs().max() < 3e-3
    assert [WORDS[i] for i in logits.argmax(1)] == [CITIES[LAST.index(tp.pair.clean_entity.split()[1])] for tp in p.pairs]


def test_triage_keeps_every_pair_and_knows_every_fact():
    found = triage(plant("plain").model, battery(n=30))
    assert len(found.token_pairs) == 30 and found.excluded.empty and found.table.known.all()


def test_pairs_are_different_and_balanced():
    pairs = battery(n=30)
    assert len({p.id for p in pairs}) == len({(p.clean_prompt, p.corrupt_prompt) for p in pairs}) == 30
    for side in ("clean_entity", "corrupt_entity"): assert sorted(getattr(p, side) for p in pairs[:6]) == sorted(f"{a} {b}" for a, b in zip(FIRST, LAST))
    tp = align(tokenizer(), pairs[0])
    assert (tp.entity_span, len(tp.clean_ids)) == ((2, 4), 6)
    assert sum(p.clean_prompt.split()[1] == p.clean_target.strip() for p in battery(BETWEEN, 6)) == 3


def test_a_saved_model_is_an_ordinary_checkpoint(tmp_path):
    save(build(SIMPLE), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "model" / "model.safetensors").is_file()
    bare, words = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = words(PLAIN.format(name="Emmy Noether"), return_tensors="pt").input_ids
    assert words.decode(bare(ids).logits[0, -1].argmax()) == "Oslo"
    loaded, memory = load_model(tmp_path / "model", device="cpu"), load_model(build(SIMPLE), tokenizer=tokenizer())
    assert [s.patched.tolist() for s in (sweep(m, battery(n=2), grid(m, "z")) for m in (loaded, memory))][0] == \
        sweep(memory, battery(n=2), grid(memory, "z")).patched.tolist()


def test_the_parts_fill_the_stream_and_do_not_overlap():
    where = [i for name in PARTS for i in range(D_MODEL)[part(name)]]
    assert where == list(range(D_MODEL))


@pytest.mark.parametrize("shape, expected", [
    ("hinge", lambda x: torch.relu(2 * x - 1)), ("ramp", lambda x: ((x - 0.4) / 0.2).clamp(0, 1)), ("linear", lambda x: x)])
def test_a_lookup_is_the_function_that_it_says(shape, expected):
    it = Lookup(2, "last", "fact", shape, 0.5)
    layer = build(Plan((it,), ())).model.layers[2]
    x = torch.tensor([-0.2, 0.0, 0.2, 0.3, 0.75, 1.0, 1.2])
    stream = torch.zeros(len(x), D_MODEL)
    stream[:, part("constant")], stream[:, part("last").start + 4] = 1000.0, x
    with torch.no_grad(): out = layer.mlp(layer.post_attention_layernorm(stream))
    assert torch.allclose(out[:, part("fact").start + 4], 0.5 * expected(x), atol=2e-4)
    out[:, part("fact").start + 4] = 0
    assert out[:, :part("noise").start].abs().max() < 2e-4 and out[:, part("noise")].abs().max() > 1e-3


def test_a_mover_looks_where_it_says():
    with torch.no_grad(): out = build(SIMPLE)(input_ids=torch.tensor([align(tokenizer(), battery(n=1)[0]).clean_ids]), output_attentions=True)
    pattern = out.attentions[3][0, 1]
    assert pattern[5, 3] > 1 - 1e-6 and (pattern[:5, 0] > 1 - 1e-6).all()


def test_what_is_outside_the_circuit_runs_and_differs_between_seeds():
    a, b = (build(SIMPLE, seed).model.layers[3] for seed in (0, 1))
    assert not torch.equal(a.mlp.down_proj.weight, b.mlp.down_proj.weight)
    same = build(SIMPLE, 0).state_dict()
    assert all(torch.equal(w, same[name]) for name, w in build(SIMPLE, 0).state_dict().items())
    assert a.self_attn.q_proj.weight[:32].abs().mean() > 0.1  # head 0, which is not in the plan


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build(SIMPLE)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("make, told", [
    (lambda: Lookup(1, "lst", "fact"), "no part 'lst'"), (lambda: Lookup(1, "last", "fact", "step"), "Unknown shape"),
    (lambda: Mover(1, 0, "fact", "answer", keys="town"), "Unknown kind 'town'"), (lambda: Mover(1, 0, "fact", "answer", match=("x", "fact", 1)), "no part 'x'"),
    (lambda: Plan((), (Mover(3, 0, "fact", "answer"), Mover(3, 1, "fact", "answer"))), "share keys and values"),
    (lambda: Plan((Lookup(6, "last", "fact"),), ()), "outside"), (lambda: Plan((), (Mover(1, 4, "fact", "answer"),)), "outside"),
    (lambda: plant("nothing"), "Unknown variant")])
def test_what_cannot_be_planned_is_refused(make, told):
    with pytest.raises(ValueError, match=told): make()
