"""The three phases in features: what must come out where it is known, and every choice of features against one made by hand."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.dictionaries.saes import SAE, DictionaryError, perfect
from bizzaroworld.features.effects import changes, exact_effects, feature_effects, feature_values, slots_of, steps_of, swept, wholes
from bizzaroworld.features.phases import Phases, at_one_place, attention_features, best_of_own, best_on_others, cumulative, enough_table, halves, handover, head_shares, how_few, phase_table, phases
from bizzaroworld.model.load import load_model

LAYER = 2


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def pairs(model): return [align(model, pair) for pair in load_battery()[::9]]


@pytest.fixture(scope="module")
def sae():
    "A dictionary nobody trained."
    W = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)) / 128 ** 0.5
    return SAE("topk", W.T.contiguous(), torch.zeros(300), W, torch.zeros(128), ("resid_post", LAYER), ("resid_post", LAYER), k=12)


@pytest.fixture(scope="module")
def found(model, sae, pairs): return phases(model, {("resid_post", LAYER): sae}, pairs, tops=(1, 3), seed=4)


def wide(found, control="dictionary", position="entity"):
    some = found.effects.query("control == @control and position == @position")
    return some.pivot(index="pair_id", columns="what", values="toward"), some.groupby("pair_id").swing.first()


def test_features_for_a_half_are_the_best_of_the_other():
    effects, which, half = np.array([[5.0, 1], [4.0, 2], [1.0, 9], [2.0, np.nan]]), torch.tensor([[0, 1], [0, 2], [3, 1], [3, 4]]), np.array([0, 0, 1, 1])
    assert best_on_others(effects, which, half, 6, 2).tolist() == [[1, 3], [0, 2]]
    changed = effects.copy()
    changed[:2] = -50
    assert best_on_others(changed, which, half, 6, 2)[0].tolist() == [1, 3]  # what the first half does decides nothing for itself
    assert sorted(halves(7, 3)) == [0, 0, 0, 0, 1, 1, 1] and not np.array_equal(halves(30, 0), halves(30, 1))


def test_own_features_are_those_that_change():
    assert best_of_own(torch.tensor([[9.0, -1, 3]]), torch.tensor([[0.0, 1, -2]]), 2).tolist() == [[2, 1]]


def test_how_few_is_counted_from_the_first():
    reached = np.array([[0.1, 0.5, 0.9, 1.0], [1.2, 0.2, 0.9, 1.0], [-0.5, -1, -1, -1], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.8, 1.0]])
    few = how_few(reached, np.array([1.0, 1, -1, 1, 1]))
    assert few[[0, 1, 4]].tolist() == [3, 1, 3] and np.isnan(few[[2, 3]]).all()


def test_what_is_patched_cumulatively_is_patched_together(model, sae, pairs, monkeypatch):
    monkeypatch.setattr("bizzaroworld.features.phases.AT_ONCE", 4)
    values = feature_values(model, sae, pairs)
    steps = steps_of(values, "patch")
    which, there = slots_of(values, steps)
    reached = cumulative(model, values, steps, which)
    three = torch.zeros_like(steps).scatter(1, which[:, :3], steps.gather(1, which[:, :3])) @ sae.W_dec
    six = torch.zeros_like(steps).scatter(1, which[:, :6], steps.gather(1, which[:, :6])) @ sae.W_dec
    by_hand = changes(swept(model, values, torch.stack([three, six, wholes(values)["features"]], 1), ["three", "six", "all"]))
    assert np.allclose(reached[:, [2, 5, -1]], by_hand, atol=2e-4) and np.allclose(reached[:, :1], changes(exact_effects(model, values, steps, which[:, :1], there[:, :1])), atol=2e-4)
    assert np.abs(by_hand[:, 0] - by_hand[:, 1]).max() > 0.1


@pytest.mark.parametrize("position", ["entity", "final"])
def test_chosen_features_are_those_chosen_by_hand(model, sae, pairs, found, position):
    single, values, half = feature_effects(model, sae, pairs, position, "patch"), feature_values(model, sae, pairs, position), halves(len(pairs), 4)
    sign = {tp.id: np.sign(single[single.pair_id == tp.id].eval("corrupt - clean").iloc[0]) for tp in pairs}
    single = single.assign(toward=single.effect * single.pair_id.map(sign), guess=single.attribution * single.pair_id.map(sign))
    steps, effects = steps_of(values, "patch"), wide(found, position=position)[0]
    for i, tp in enumerate(pairs):
        others = single[single.pair_id.isin([p.id for p, h in zip(pairs, half) if h != half[i]])].groupby("feature").toward.sum().nlargest(3).index
        own = single[single.pair_id == tp.id].nlargest(3, "guess").feature
        only = values.only(torch.arange(len(pairs)) == i)
        vectors = [sum(steps[i, f] * sae.W_dec[f] for f in some) for some in (others[:1], others, own[:1], own)]
        by_hand = changes(swept(model, only, torch.stack(vectors)[None], ["a", "b", "c", "d"]))[0] * sign[tp.id]
        assert np.allclose(effects.loc[tp.id, ["others 1", "others 3", "own 1", "own 3"]].astype(float), by_hand, atol=2e-4)
    assert effects["own 3"].abs().max() > 0.1


def test_how_few_is_what_the_single_effects_say(model, sae, pairs, found):
    single = feature_effects(model, sae, pairs, "entity", "patch")
    values, steps = feature_values(model, sae, pairs), steps_of(feature_values(model, sae, pairs), "patch")
    effects, swing = wide(found)
    enough = found.enough.query("control == 'dictionary' and position == 'entity'").set_index("pair_id")
    assert enough.changed.to_dict() == single.groupby("pair_id").size().to_dict()
    for i, tp in enumerate(pairs):
        rows = single[single.pair_id == tp.id]
        sign = np.sign(rows.corrupt.iloc[0] - rows.clean.iloc[0])
        order = rows.assign(toward=rows.effect * sign).sort_values("toward", ascending=False).feature.tolist()
        k = int(enough.few[tp.id])
        vectors = [sum(steps[i, f] * sae.W_dec[f] for f in order[:m]) for m in range(1, k + 1)]
        reached = changes(swept(model, values.only(torch.arange(len(pairs)) == i), torch.stack(vectors)[None], [str(m) for m in range(k)]))[0] * sign
        assert (reached[:-1] < 0.8 * effects.features[tp.id]).all() and reached[-1] >= 0.8 * effects.features[tp.id] - 1e-3


def test_of_a_perfect_dictionary_nothing_is_left_to_the_error(model, pairs):
    found = phases(model, {("resid_post", l): perfect(128, "resid_post", l) for l in (0, 7)}, pairs, tops=(1,), controls=False, most=3)
    table = phase_table(found).set_index(["layer", "position", "what"])
    for place in ((0, "entity"), (7, "final")):
        assert table.share[(*place, "features")] == pytest.approx(1, abs=1e-3) and table.value[(*place, "error")] == pytest.approx(0, abs=1e-3)
    assert table.of_swing[7, "final", "site"] == pytest.approx(1, abs=1e-3) and abs(table.of_swing[7, "entity", "site"]) < 1e-3  # the logits are read off the final token
    assert table.of_swing[0, "entity", "site"] > 0.8 and abs(table.of_swing[0, "final", "site"]) < 0.1
    first = handover(found).set_index("what").loc["site"]
    assert first.value == 7 and first.n == len(pairs)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_one_feature_that_is_the_difference_carries_all(model, pairs, direction):
    values = feature_values(model, perfect(128, "resid_post", LAYER), pairs[:1])
    u = torch.nn.functional.normalize(values.there["corrupt"] - values.there["clean"], dim=1)
    drawn = torch.nn.functional.normalize(torch.randn(4, 128, generator=torch.Generator().manual_seed(1)), dim=1)
    drawn = drawn - (drawn @ u.T) @ u  # the others read what does not change
    W = torch.cat([u, drawn])
    sae = SAE("relu", W.T.contiguous(), torch.full((5,), 100.0), W, torch.zeros(128), ("resid_post", LAYER), ("resid_post", LAYER))
    effects, enough = at_one_place(model, feature_values(model, sae, pairs[:1]), (1,), direction)
    by = effects.set_index("what").toward
    assert (by["features"], by["own 1"]) == pytest.approx((by["site"], by["site"]), abs=1e-3) and by["site"] > 1 and by["error"] == pytest.approx(0, abs=1e-3) and enough.few.item() == 1
    assert by["flipped"] == pytest.approx(0, abs=1e-4)  # it is on in both runs


def test_controls_stand_beside_and_share_the_site(model, sae, pairs, found):
    assert found.effects.control.unique().tolist() == ["dictionary", "random directions", "shuffled"] and found.effects.groupby("control").size().nunique() == 1
    mine, random = (wide(found, control)[0] for control in ("dictionary", "random directions"))
    assert np.allclose(mine.site, random.site, atol=1e-6) and not np.allclose(mine.features, random.features, atol=0.1)
    assert found.effects.what.unique().tolist() == ["site", "features", "error", "flipped", "others 1", "others 3", "own 1", "own 3"]


def synthetic(values, what="site"):
    "Phases of given effects: by position and layer a number for each pair."
    rows = [{"site": "resid_post", "layer": l, "position": p, "control": "dictionary", "what": w, "pair_id": i, "toward": v * (0.5 if w == "features" else 1), "swing": 4.0} for p, layers in values.items() for l, some in layers.items() for i, v in enumerate(some) for w in ("site", "features")]
    enough = [{"site": "resid_post", "layer": 0, "position": "entity", "control": "dictionary", "pair_id": i, "changed": 10, "few": few} for i, few in enumerate((1.0, 2.0, 6.0, np.nan))]
    return Phases(pd.DataFrame(rows), pd.DataFrame(enough))


def test_tables_are_sums():
    found = synthetic({"entity": {0: [4.0, 2.0], 1: [1.0, 1.0]}, "final": {0: [0.0, 0.0], 1: [2.0, 4.0]}})
    table = phase_table(found).set_index(["position", "layer", "what"])
    assert table.value["entity", 0, "site"] == 3 and table["share"]["entity", 0, "features"] == 0.5 and table.of_swing["entity", 0, "site"] == 6 / 8 and table.n.unique() == [2] and np.isnan(table["share"]["final", 0, "features"])
    row = enough_table(found).iloc[0]
    assert (row.value, row["median"], row.n, row.pairs, row.changed) == (3, 2, 3, 4, 10)


def test_the_handover_is_the_first_layer_where_more_happens_there():
    found = handover(synthetic({"entity": {0: [4.0, 2], 2: [3.0, 2], 5: [0.0, 0]}, "final": {0: [0.0, 0], 2: [2.0, 4], 5: [4.0, 4]}})).set_index("what")
    assert found.value["site"] == 2 and found.low["site"] == 2 and found.high["site"] == 5
    assert handover(synthetic({"entity": {0: [4.0, 2]}, "final": {0: [0.0, 0]}})).value.tolist() == [1, 1]
    with pytest.raises(DictionaryError, match="Nothing was patched at resid_post @final"): handover(synthetic({"entity": {0: [4.0, 2]}}))


def test_features_of_heads_say_who_writes_them(model, pairs):
    sae = perfect(128, "z", 3, heads=4)
    assert torch.equal(head_shares(sae)[:128].argmax(1), torch.arange(128) // 32) and (head_shares(sae).sum(1) == 1).all()
    table = attention_features(model, sae, pairs, most=5)
    assert (table["head"] == table.feature % 128 // 32).all() and (table.head_share == 1).all() and table.total.abs().is_monotonic_decreasing and table.total.abs().max() > 1e-3
    assert "head" not in attention_features(model, perfect(128, "attn_out", 3), pairs[:2], most=2)
    with pytest.raises(DictionaryError, match="give a dictionary of z"): head_shares(perfect(128))
    single = feature_effects(model, sae, pairs, "final", "patch", most=5)
    one = table.iloc[0]
    assert one.total == pytest.approx(single[single.feature == one.feature].effect.sum() / len(pairs))


def test_a_dictionary_under_another_name_is_refused(model, sae, pairs):
    with pytest.raises(DictionaryError, match="name it by where it writes"): phases(model, {("resid_post", 5): sae}, pairs)
