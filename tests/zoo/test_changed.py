"""Changed facts, pairs about them, and a model that is tuned on them."""
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from bizzaroworld.battery.facts import load_facts
from bizzaroworld.battery.formats import load_battery, load_spares
from bizzaroworld.battery.tokens import AlignmentError, align
from bizzaroworld.methods.cross_model import cross_patch
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention, grid
from bizzaroworld.zoo.changed import TUNING, change_facts, changed_pairs, reading, tune
from bizzaroworld.zoo.corpus import Guard, generate, prompts_of
from bizzaroworld.zoo.training import recalled


def test_every_fact_of_one_relation_changes_and_no_other():
    old = load_facts()
    new = change_facts(old, "country_continent", 2)
    assert [r.name for r in new.relations] == [r.name for r in old.relations]
    for a, b in zip(old.relations, new.relations):
        if a.name != "country_continent": assert a is b
    pairs = [(a.answer, b.answer) for a, b in zip(old.relation("country_continent").facts, new.relation("country_continent").facts)]
    assert all(a != b for a, b in pairs) and len(set(pairs)) == 5 == len({b for _, b in pairs}), "one answer becomes one other answer"
    assert [f.entity for f in new.relation("country_continent").facts] == [f.entity for f in old.relation("country_continent").facts]
    with pytest.raises(ValueError, match="has 5 answers, and 5 further on each is itself"): change_facts(old, "country_continent", 5)
    with pytest.raises(KeyError, match="no relation 'capitals'"): change_facts(old, "capitals")


def test_what_is_read_is_half_changed_and_asks_nothing_of_the_battery():
    tables = change_facts(load_facts(), "moon_planet")
    parts = reading(tables, "moon_planet")
    mine = [c for c in parts.train if c.fact.relation == "moon_planet"]
    assert len(parts.train) == 2 * len(mine) > 200 and {c.fact for c in mine} <= set(tables.relation("moon_planet").facts)
    documents, pairs = generate(parts, load_battery() + load_spares(), 200), load_battery() + load_spares()
    guard = Guard(prompts_of(pairs))
    assert all(guard.find(d.text) is None for d in documents)
    assert sum("Jupiter" in d.text for d in documents) > 10


@pytest.mark.parametrize("relation", ["country_capital", "moon_planet"])
def test_the_corrupted_answer_is_the_changed_one(relation):
    old, new = ({f.entity: f.answer for f in t.relation(relation).facts} for t in (load_facts(), change_facts(load_facts(), relation)))
    pairs = list(islice(changed_pairs(relation), 200))
    for p in pairs:
        assert p.clean_target == f" {old[p.clean_entity]}" and p.corrupt_target == f" {new[p.clean_entity]}" == f" {old[p.corrupt_entity]}"
        assert p.clean_prompt.replace(p.clean_entity, p.corrupt_entity) == p.corrupt_prompt != p.clean_prompt
    assert pairs == list(islice(changed_pairs(relation), 200)) != list(islice(changed_pairs(relation, seed=1), 200))
    assert len({p.clean_prompt for p in pairs}) > 100


def aligned(tokenizer, relation, n):
    found = {}
    for p in islice(changed_pairs(relation), 2000):
        try: found.setdefault(p.id, align(tokenizer, p))
        except AlignmentError: pass
        if len(found) == n: break
    return list(found.values())


@pytest.mark.slow
@pytest.mark.weekly
def test_a_tuned_model_says_the_changed_facts_and_cross_patching_finds_the_way_they_take():
    relation = "country_capital"
    hf, tokenizer, losses = tune("bizzaro-nano", relation, options=replace(TUNING, tokens=600))  # a third of what is read is enough for this relation
    assert np.mean(losses[-10:]) < 0.65 * np.mean(losses[:10]) and len(losses) == TUNING.steps
    base, tuned = load_model("bizzaro-nano", device="cpu"), load_model(hf, tokenizer=tokenizer)
    pairs = aligned(base, relation, 20)
    everything = Intervention([*(i.edits[0] for i in grid(base, ("attn_out", "mlp_out"), "all")), Edit("resid_pre", 0, "all")])
    found = cross_patch(base, tuned, pairs, [everything, *grid(base, ("resid_post",), "final", layers=[7])])
    assert len(pairs) == 20 and (found.own > 0).mean() > 0.9 and (found.other < 0).mean() > 0.8
    assert found.shares()[0] == pytest.approx(found.shares()[1], abs=1e-3), "all that is written is the whole stream; what is left is the readout's own"


@pytest.mark.slow
def test_a_few_steps_of_tuning_are_the_same_every_time_and_lower_the_loss():
    options = replace(TUNING, steps=12, documents=60, tokens=300, warmup=2)
    (hf, tokenizer, losses), (again, _, others) = (tune("bizzaro-nano", "country_capital", options=options) for _ in range(2))
    assert losses == others and len(losses) == 12 and np.mean(losses[-4:]) < np.mean(losses[:4])
    assert all((a == b).all() for a, b in zip(hf.state_dict().values(), again.state_dict().values()))
    base, tuned = load_model("bizzaro-nano", device="cpu"), load_model(hf, tokenizer=tokenizer)
    found = cross_patch(base, tuned, aligned(base, "country_capital", 4), Edit("mlp_out", 3, "entity"))
    assert (found.other < found.own).all() and np.abs(found.patched[:, 0] - found.own).min() > 1e-4
