"""Controls: what they must not touch, what they must reproduce, and that they differ from the real thing."""
import random
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny import random_pair, tiny_hf, tiny_model

from bizzaroworld.methods.donors import strangers, words_of
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.study import controls
from bizzaroworld.study.controls import (CONTROLLED, CONTROLS, controls_of, default_controls, shuffled_positions, sweep_shuffled,
                                         sweep_unrelated, sweep_untrained, unrelated_donors, untrained)
from bizzaroworld.study.experiments import run_experiments

WORDS = ("clean_target", "corrupt_target", "clean_entity", "corrupt_entity")
KEYS = ["experiment", "pair_id", "site", "layer", "head"]


def pair(seed, category, word, **where):
    """A random pair with a category, entities and answers of its own."""
    tp = random_pair(seed, **where)
    return replace(tp, pair=replace(tp.pair, id=f"pair-{seed}", category=category, clean_entity=f"{word}a", corrupt_entity=f"{word}b",
                                    clean_target=f" {word}c", corrupt_target=f" {word}d"))


@pytest.fixture(scope="module")
def model(): return tiny_model("gemma3")


@pytest.fixture(scope="module")
def pairs():
    """Six pairs of three categories; of different lengths, with the entity at different places."""
    return [pair(0, "x", "i"), pair(1, "x", "j", length=11), pair(2, "y", "k", entity=(1, 2)), pair(3, "y", "l", length=8, entity=(2, 6)),
            pair(4, "z", "m", length=10, entity=(2, 4)), pair(5, "z", "n", entity=(3, 8))]


@pytest.fixture(scope="module")
def real(model, pairs): return run_experiments(model, pairs, progress=False)


def same_rows(real, control):
    """The real rows of the experiments that a control is made for."""
    return real[real.experiment.isin(CONTROLLED[control])].reset_index(drop=True)


def effects(frame): return frame.set_index(KEYS).effect.sort_index()


def apart(one, other): return (effects(one) - effects(other)).abs().dropna()


# --- donors ---------------------------------------------------------------------------------------------------------

def test_a_donor_shares_neither_category_nor_words(pairs):
    by_word = pair(6, "w", "q")
    by_word = replace(by_word, pair=replace(by_word.pair, corrupt_target=pairs[0].pair.clean_target))
    for seed in range(20):
        donors = unrelated_donors([*pairs, by_word], seed)
        assert all(donors[tp.id].pair.category != tp.pair.category for tp in [*pairs, by_word])
        assert donors["pair-0"].id != "pair-6" and donors["pair-6"].id != "pair-0"


def test_donors_are_drawn_once_and_for_all(pairs):
    def ids(donors): return {k: d.id for k, d in donors.items()}
    assert ids(unrelated_donors(pairs)) == ids(unrelated_donors(pairs)) == ids(unrelated_donors(pairs[::-1])), "whatever the order"
    assert len({tuple(ids(unrelated_donors(pairs, seed)).values()) for seed in range(10)}) > 1


@pytest.mark.parametrize("n, categories, words", [(1, 1, 1), (40, 3, 30), (60, 40, 25), (60, 60, 500), (50, 2, 4)])
def test_donors_are_those_of_the_definition_at_any_size(n, categories, words):
    """Every pair against every other, as it was first written; ten thousand in a few seconds instead of minutes."""
    drawn = random.Random(n)
    def made(i):
        return replace(random_pair(i % 50), pair=replace(random_pair(0).pair, id=f"p{drawn.random()}", category=f"c{drawn.randrange(categories)}", **{f: f"w{drawn.randrange(words)}" for f in WORDS}))
    some = [made(i) for i in range(n)]
    def related(a, b): return a.pair.category == b.pair.category or bool({getattr(a.pair, f) for f in WORDS} & {getattr(b.pair, f) for f in WORDS})
    others = {tp.id: [o for o in sorted(some, key=lambda tp: tp.id) if not related(tp, o)] for tp in some}
    wanted = {i: random.Random(f"unrelated 3 {i}").choice(those) for i, those in others.items() if those}
    assert unrelated_donors(some, 3) == wanted


def test_ten_thousand_pairs_are_asked_once_each_and_not_about_every_other():
    some = [replace(random_pair(0), pair=replace(random_pair(0).pair, id=f"p{i}", **{f: f"w{(7 * i + j) % 400}" for j, f in enumerate(WORDS)})) for i in range(10_000)]
    asked = Counter()
    def kin(tp):
        asked[tp.id] += 1
        return words_of(tp)
    assert len(strangers(some, kin)) == 10_000 and max(asked.values()) == 2


def test_a_pair_related_to_all_others_has_no_donor(pairs):
    assert unrelated_donors(pairs[:2]) == {}
    assert set(unrelated_donors(pairs[:3])) == {"pair-0", "pair-1", "pair-2"}


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_pair_as_its_own_donor_is_the_study(model, pairs, direction):
    itself = sweep_unrelated(model, {tp.id: tp for tp in pairs}, direction, 1024)(pairs)
    study = run_experiments(model, pairs, CONTROLLED["unrelated"], direction=direction, progress=False)
    pd.testing.assert_frame_equal(itself, study, atol=1e-5)


def test_an_unrelated_donor_does_something_else(model, pairs, real):
    other = sweep_unrelated(model, unrelated_donors(pairs), "noising", 1024)(pairs)
    same = same_rows(real, "unrelated")
    assert len(other) == len(same) and apart(other, real).groupby("pair_id").max().min() > 0.01
    pd.testing.assert_series_equal(other.set_index(KEYS).clean.sort_index(), same.set_index(KEYS).clean.sort_index(), atol=1e-5)
    last = other[(other.experiment == "2A") & (other.site == "resid_post") & (other.layer == model.n_layers - 1)].set_index("pair_id")
    donors = unrelated_donors(pairs)
    for tp in pairs:  # the last resid_post at the final token is the whole prediction: the donor's, read at this pair's targets
        logits = model.logits(torch.tensor([donors[tp.id].corrupt_ids]))[0].detach()
        assert last.patched[tp.id] == pytest.approx(float(logits[tp.clean_target_id] - logits[tp.corrupt_target_id]), abs=1e-3)


# --- positions ------------------------------------------------------------------------------------------------------

def test_the_other_token_is_between_entity_and_final(pairs):
    for seed in range(30):
        positions = shuffled_positions(pairs, seed)
        assert set(positions) == {tp.id for tp in pairs} - {"pair-5"}, "nothing lies between entity and final token of pair 5"
        for tp in pairs[:-1]:
            n = len(tp.clean_ids)
            assert tp.entity < n + positions[tp.id] < n - 1 and n + positions[tp.id] not in range(*tp.entity_span)
    assert shuffled_positions(pairs) == shuffled_positions(pairs[::-1]) and len({*map(str, map(shuffled_positions, [pairs] * 9, range(9)))}) > 1


def test_the_shuffled_patch_is_the_patch_at_that_token(model, pairs, real):
    some, positions = pairs[:-1], shuffled_positions(pairs)
    found = sweep_shuffled(model, positions, "noising", 1024)(some)
    assert set(found.experiment) == {"1", "3"} and found.groupby("pair_id").position.nunique().max() == 1
    assert not set(found.position) & {"entity", "final"}
    for tp in some:
        mine = found[(found.pair_id == tp.id) & (found.experiment == "3")].set_index("layer").effect
        direct = sweep(model, [tp], grid(model, ["resid_pre"], positions[tp.id]), progress=False).to_frame()
        for row in direct.itertuples(): assert mine[row.layer] == pytest.approx(row.effect, abs=1e-4)
    assert apart(found, real).groupby("pair_id").max().min() > 0.01


def test_entity_and_final_token_share_the_shuffled_control(model, pairs):
    found = sweep_shuffled(model, shuffled_positions(pairs), "noising", 1024)(pairs[:2])
    one, three = (found[found.experiment == e].set_index(["pair_id", "layer"]).effect for e in ("1", "3"))
    pd.testing.assert_series_equal(one, three)
    first = three[three.index.get_level_values("layer") == 0]
    assert first.abs().max() < 1e-5, "behind the entity the embeddings of the two prompts are the same"


# --- the untrained twin ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gemma", "gemma3", "gemma3-multimodal", "gpt2", "llama"])
def test_a_twin_has_the_shape_and_other_weights(name, pairs):
    model = tiny_model(name)
    ids = torch.tensor([pairs[0].clean_ids])
    before, state = model.logits(ids), torch.get_rng_state()
    twin = untrained(model)
    assert twin.shape == model.shape and twin.dtype == model.dtype and twin.sites == model.sites and twin.hf is not model.hf
    assert not torch.allclose(twin.logits(ids), before, atol=1e-3)
    assert torch.equal(model.logits(ids), before), "the trained model stays as it was"
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are touched"
    assert torch.equal(untrained(model).logits(ids), twin.logits(ids)) and not torch.equal(untrained(model, 1).logits(ids), twin.logits(ids))


def test_a_twin_in_half_precision_is_in_half_precision(pairs):
    half = load_model(tiny_hf("gemma3").to(torch.bfloat16))
    assert untrained(half).dtype == torch.bfloat16
    assert sweep_untrained(half, "noising", 1024)(pairs[:1]).effect.abs().max() < 1e3


def test_the_untrained_control_has_its_own_baselines(model, pairs, real):
    found = sweep_untrained(model, "noising", 1024)(pairs)
    twin = untrained(model)
    row = found[found.pair_id == "pair-0"].iloc[0]
    logits = twin.logits(torch.tensor([pairs[0].clean_ids]))[0].detach()
    assert row.clean == pytest.approx(float(logits[pairs[0].clean_target_id] - logits[pairs[0].corrupt_target_id]), abs=1e-4)
    assert len(found) == len(same_rows(real, "untrained")) and apart(found, real).groupby("pair_id").max().min() > 0.01


# --- which, and when ------------------------------------------------------------------------------------------------

def test_a_large_model_gets_no_twin_unless_asked(model, monkeypatch):
    assert default_controls(model) == CONTROLS
    monkeypatch.setattr(controls, "TWIN", sum(p.numel() for p in model.hf.parameters()))
    assert default_controls(model) == ("unrelated", "shuffled")


def test_controls_come_with_the_pairs_they_can_be_made_for_and_build_nothing_yet(model, pairs, monkeypatch):
    def refuse(*_): raise AssertionError("a twin was built that nobody asked for")
    monkeypatch.setattr(controls, "untrained", refuse)
    found = {c.name: [tp.id for tp in c.token_pairs] for c in controls_of(pairs, CONTROLS)}
    everyone = [tp.id for tp in pairs]
    assert found == {"unrelated": everyone, "shuffled": everyone[:-1], "untrained": everyone}
    assert {c.name: len(c.token_pairs) for c in controls_of(pairs[:2], ["unrelated"])} == {"unrelated": 0}
    with pytest.raises(AssertionError, match="twin"): controls_of(pairs, ["untrained"])[0].recipe(model)


def test_unknown_controls_are_refused(model, pairs):
    with pytest.raises(ValueError, match="'placebo': use unrelated, shuffled, untrained"): controls_of(pairs, ["placebo"])
