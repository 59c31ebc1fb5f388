"""Steering: against the other run, plain hooks on the bare model, and what cannot do anything."""
from dataclasses import replace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from bizzaroworld.dictionaries.harvest import blocks, documents
from bizzaroworld.dictionaries.saes import SAE, DictionaryError, perfect
from bizzaroworld.features.steering import (Steering, activation_difference, added_loss, answer_differences, as_long_as, at_cost, at_place, each, feature_direction, held_out, nearest_feature, other_wordings, pareto, project_out, random_like,
                                            require_ability, steer, steered_answers, turned_round)
from bizzaroworld.model.load import load_model
from bizzaroworld.model.names import embedded_models
from bizzaroworld.tasks.registry import make_task

PLACE, LAST = ("resid_post", 5), ("resid_post", 7)


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def bare(): return AutoModelForCausalLM.from_pretrained(embedded_models()["bizzaro-nano"], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def split(model): return held_out(make_task("paired_facts", model, n=300).pairs)


@pytest.fixture(scope="module")
def text(model): return blocks(model, documents("facts", 200), 8 * 31, 32)


def difference_of(logits, tp): return logits[tp.corrupt_target_id] - logits[tp.clean_target_id]


@torch.no_grad()
def by_hand(bare, ids, layer, change):
    "Logits at all positions of the bare model, with what a layer puts out changed by a plain hook."
    def hook(module, args, out):
        changed = change((out[0] if isinstance(out, tuple) else out).clone())
        return (changed, *out[1:]) if isinstance(out, tuple) else changed
    handle = bare.model.layers[layer].register_forward_hook(hook)
    try: return bare(torch.tensor(ids)).logits
    finally: handle.remove()


def test_pairs_that_are_tried_share_no_prompt_with_any_other(model, split):
    made_of, tried = split
    def prompts(pairs): return [ids for tp in pairs for ids in (tp.clean_ids, tp.corrupt_ids)]
    assert len(tried) > 15 and not set(prompts(made_of)) & set(prompts(tried)) and len(set(prompts(tried))) == 2 * len(tried)
    told = {answer for tp in made_of for answer in tp.answers}
    assert all(answer in told for tp in tried for answer in tp.answers)
    assert held_out([*made_of, *tried], 5) == held_out([*made_of, *tried], 5) and len(held_out([*made_of, *tried], 5)[1]) == 5
    with pytest.raises(ValueError, match="None of 1 pairs"): held_out(tried[:1])


def test_other_wordings_are_of_the_same_facts_and_no_prompt_that_is_tried(model, split):
    tried = split[1]
    found, by_facts = other_wordings(model, tried), {(tp.pair.clean_entity, tp.pair.corrupt_entity): tp for tp in tried}
    seen = {ids for tp in tried for ids in (tp.clean_ids, tp.corrupt_ids)}
    assert len(found) > 2 * len(tried) and len(other_wordings(model, tried[:1], most=1)) == 1 and not seen & {ids for tp in found for ids in (tp.clean_ids, tp.corrupt_ids)}
    for tp in found:
        assert tp.answers == by_facts[tp.pair.clean_entity, tp.pair.corrupt_entity].answers and tp.pair.clean_entity in tp.pair.clean_prompt and tp.pair.corrupt_entity in tp.pair.corrupt_prompt
    told = {answer for tp in found for answer in tp.answers}
    some = [tp for tp in tried if all(answer in told for answer in tp.answers)]  # a relation may have one wording that fits both entities
    assert len(some) > 0.8 * len(tried) and set(answer_differences(model, found, some, PLACE)) == {tp.id for tp in some}
    assert other_wordings(model, [replace(tried[0], pair=replace(tried[0].pair, relation="none"))]) == []


def test_strength_0_changes_nothing_at_all(model, split, text):
    tried, push = split[1][:6], Steering(torch.randn(128, generator=torch.Generator().manual_seed(0)))
    table = steered_answers(model, tried, PLACE, {"a": push, "b": Steering(push.vectors, True)}, [0, 1])
    plain = [float(difference_of(model.logits(torch.tensor([tp.clean_ids]))[0].detach().cpu(), tp)) for tp in tried]
    at_0 = table[table.strength == 0]
    assert at_0.ld[at_0.method == "a"].tolist() == at_0.ld[at_0.method == "b"].tolist() == pytest.approx(plain, abs=1e-4)
    assert (table.ld[(table.strength == 1)].to_numpy() != at_0.ld.to_numpy()).all()
    assert (added_loss(model, PLACE, {"a": push}, [0], text)[["loss", "later"]] == 0).all(axis=None)
    alone = steered_answers(model, tried, PLACE, {"a": Steering({tp.id: push.vectors for tp in tried}, True)}, [0])
    assert alone.ld.tolist() == pytest.approx(plain, abs=1e-4)
    small = steered_answers(model, tried, PLACE, {"a": push}, [0, 1e-12])  # through the engine, and still nothing
    assert small.ld[:6].tolist() == pytest.approx(small.ld[6:].tolist(), abs=1e-4)


@pytest.mark.parametrize("position", ["final", "entity"])
def test_the_whole_difference_of_a_pair_at_the_last_layer_is_the_other_run(model, split, position):
    tried = split[1][:4]
    own = {tp.id: activation_difference(model, [tp], LAST, position) for tp in tried}
    found = steered_answers(model, tried, LAST, {"own": Steering(own)}, [1], position)
    logits = [model.logits(torch.tensor([tp.corrupt_ids if position == "final" else tp.clean_ids]))[0].detach().cpu() for tp in tried]  # at an earlier token the last layer tells nobody
    assert found.ld.tolist() == pytest.approx([float(difference_of(l, tp)) for l, tp in zip(logits, tried)], abs=1e-3)
    assert found["rank"].tolist() == [int((l > l[tp.corrupt_target_id]).sum()) for l, tp in zip(logits, tried)]


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("by_pair", [False, True])
def test_a_steered_run_is_that_of_a_plain_hook_on_the_bare_model(model, bare, split, text, project, by_pair):
    tried, strength = split[1][:3], 4.0 if project else 0.7
    vectors = {tp.id: 2 * torch.randn(128, generator=torch.Generator().manual_seed(i)) for i, tp in enumerate(tried)}
    way = Steering(vectors if by_pair else vectors[tried[0].id], project)
    def changed(x, v): return x - strength * (x @ v)[..., None] * v / (v @ v) if project else x + strength * v
    found = steered_answers(model, tried, PLACE, {"way": way}, [strength], "entity_span")
    for tp, ld, rank in zip(tried, found.ld, found["rank"]):
        v, (start, stop) = vectors[tp.id if by_pair else tried[0].id], tp.entity_span
        def change(out):
            out[:, start:stop] = changed(out[:, start:stop], v)
            return out
        logits = by_hand(bare, [tp.clean_ids], 5, change)[0, -1]
        assert ld == pytest.approx(float(difference_of(logits, tp)), abs=1e-4) and rank == int((logits > logits[tp.corrupt_target_id]).sum())
    found = added_loss(model, PLACE, {"way": way}, [strength], text, positions=None)
    costs, at = found.loss, text.lead + (text.ids.shape[1] - text.lead) // 4
    for row, cost, later in zip((0, 1, 2, 3), costs, found.later):
        v = list(vectors.values())[row % 3 if by_pair else 0]
        def change(out):
            out[:, text.lead:] = changed(out[:, text.lead:], v)
            return out
        def loss(change): return torch.nn.functional.cross_entropy(by_hand(bare, text.ids[row:row + 1].tolist(), 5, change)[0, text.lead:-1], text.ids[row, text.lead + 1:])
        assert cost == pytest.approx(float(loss(change) - loss(lambda out: out)), abs=1e-4)
        def change_one(out):
            out[:, at] = changed(out[:, at], v)
            return out
        def after(change): return torch.nn.functional.cross_entropy(by_hand(bare, text.ids[row:row + 1].tolist(), 5, change)[0, at + 1:-1], text.ids[row, at + 2:])
        assert later == pytest.approx(float(after(change_one) - after(lambda out: out)), abs=1e-4)
    assert costs.abs().max() > 1e-2 and found.later.abs().max() > 1e-4


def test_projecting_out_twice_is_once_and_leaves_nothing_along_it():
    rng = torch.Generator().manual_seed(0)
    v, x = 7 * torch.randn(16, generator=rng), torch.randn(3, 5, 16, generator=rng)
    once = project_out(v)(x)
    torch.testing.assert_close(project_out(v)(once), once, rtol=0, atol=1e-6)
    assert (once @ v).abs().max() < 1e-4 < (x @ v).abs().max() and not torch.allclose(once, x)
    torch.testing.assert_close(project_out(v, 2)(x) @ v, -(x @ v), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(project_out(v, 0)(x), x)
    assert project_out(v)(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="length 0"): project_out(torch.zeros(3))


def test_vectors_are_what_averages_by_hand_are(model, split):
    made_of, tried = split
    acts = at_place(model, [(tp, tp.clean_ids) for tp in made_of[:7]], PLACE, "entity_span")
    for act, tp in zip(acts, made_of[:7]):
        kept = []
        with model.hooked([(*PLACE, lambda act: kept.append(act.clone()))]): model.run(torch.tensor([tp.clean_ids]))
        torch.testing.assert_close(act, kept[0][0, slice(*tp.entity_span)].mean(0).cpu(), rtol=0, atol=1e-4)
    tp, runs = tried[0], {ids: (pair, answer) for pair in made_of for ids, answer in zip((pair.clean_ids, pair.corrupt_ids), pair.answers)}
    def mean(answer): return at_place(model, [(pair, ids) for ids, (pair, own) in runs.items() if own == answer], PLACE).mean(0)
    torch.testing.assert_close(answer_differences(model, made_of, tried, PLACE)[tp.id], mean(tp.answers[1]) - mean(tp.answers[0]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no other prompt has the answer"): answer_differences(model, made_of[:1], tried, PLACE)
    with pytest.raises(ValueError, match="cancel at resid_post of layer 5"): activation_difference(model, [tp, turned_round(tp)], PLACE)


def test_pairs_turned_round_answer_with_the_other_set(model):
    tp = make_task("greater_than", model, n=4).pairs[0]  # sets of answers
    there = turned_round(tp)
    assert len(tp.answers[0]) > 1 and there.answers == tp.answers[::-1] and (there.clean_ids, there.corrupt_ids) == (tp.corrupt_ids, tp.clean_ids) and turned_round(there) == tp


def test_controls_have_the_length_and_not_the_direction():
    v = {"a": torch.arange(1.0, 65), "b": torch.ones(64)}
    found = random_like(v, seed=3)
    for key in v: assert found[key].norm().item() == pytest.approx(v[key].norm().item(), rel=1e-5) and abs(torch.cosine_similarity(found[key], v[key], dim=0)) < 0.5
    assert not torch.equal(random_like(v["a"], 0), random_like(v["a"], 1)) and torch.equal(random_like(v["a"], 1), random_like(v["a"], 1))
    assert abs(torch.cosine_similarity(found["a"], found["b"], dim=0)) < 0.5
    torch.testing.assert_close(as_long_as(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])), torch.tensor([1.2, 1.6]))
    assert each(lambda x, y: x + y, {"a": 1}, 2) == {"a": 3}


def test_features_write_their_rows_in_the_models_units():
    sae = replace(perfect(4, layer=5), norm="scale", scale=3.0)
    x = torch.tensor([[1.0, 0, 0, 0]])
    torch.testing.assert_close(sae.decode(torch.eye(8)[2:3], x) - sae.decode(torch.zeros(1, 8), x), feature_direction(sae, 2)[None])
    assert nearest_feature(sae, torch.tensor([0.1, 0.0, -5.0, 1.0])) == 6
    with pytest.raises(DictionaryError, match="no feature 8"): feature_direction(sae, 8)


def test_a_random_direction_does_worse_than_the_difference(model, split, text):
    made_of, tried = split
    difference = answer_differences(model, made_of, tried, PLACE)
    table = steer(model, tried, PLACE, {"difference": Steering(difference), "random": Steering(random_like(difference)), "project out": Steering(difference, True)}, (0, 0.5, 1), text=text).set_index(["method", "strength"])
    assert table.success["difference", 1] > 0.9 and table.success["random", 1] < 0.15 and table.low["difference", 1] > table.high["random", 1]
    assert table["first"]["difference", 1] > 0.7 and (table["first"] <= table.success).all() and (table.n == len(tried)).all() and (table.blocks == len(text.ids)).all()
    assert table.loss["difference", 1] > table.loss["difference", 0.5] > table.loss["difference", 0] == 0 and table.success["difference", 0] == table.success["random", 0]
    assert ((table.low <= table.success) & (table.success <= table.high) & (table.loss_low <= table.loss + 1e-12) & (table.loss <= table.loss_high + 1e-12)).all()
    assert table.loss["project out", 1] < table.loss["random", 1] / 2


def test_a_model_that_cannot_do_the_task_is_not_steered(model):
    pairs = make_task("ioi", model, n=40).pairs
    with pytest.raises(ValueError, match="cannot do who got it .*is not steered"): steer(model, pairs, PLACE, {"a": Steering(torch.ones(128))}, name="who got it")
    require_ability(model, make_task("facts", model, n=20).pairs)


@pytest.mark.parametrize("place, says", [(("z", 3), "has heads"), (("neurons", 3), "heads or neurons"), (("resid_post", 8), "its layers are 0 to 7"), (("resid", 3), "Unknown site")])
def test_places_where_nothing_can_be_added(model, split, place, says):
    with pytest.raises(ValueError, match=says): steered_answers(model, split[1], place, {"a": Steering(torch.ones(128))}, [1])
    with pytest.raises(ValueError, match="nothing to steer with"): steer(model, split[1], PLACE, {})


def test_the_front_is_what_nothing_dominates():
    table = pd.DataFrame({"method": list("aabbc"), "success": [0.0, 0.8, 0.8, 0.5, 0.9], "later": [0.0, 1.0, 0.5, 0.6, 2.0]})
    assert pareto(table).front.tolist() == [True, False, True, False, True]
    assert pareto(pd.concat([table.iloc[2:3]] * 2)).front.tolist() == [True, True]  # equals do not dominate each other
    assert at_cost(table, 0.7)[["method", "success"]].values.tolist() == [["a", 0.0], ["b", 0.8]]
    assert at_cost(table, 5)["success"].tolist() == [0.8, 0.8, 0.9] and at_cost(table, -1).empty
