"""Single features: against plain hooks, against what they add up to, and against one sweep for each."""
import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.dictionaries.learning import Held, train_sae
from bizzaroworld.dictionaries.recipes import Recipe
from bizzaroworld.dictionaries.sae_files import load_sae, save_sae
from bizzaroworld.dictionaries.saes import SAE, DictionaryError, perfect
from bizzaroworld.features.effects import (agreement, attributed, by_feature, carried, changes, controls_of, exact_effects, feature_effects, feature_values, flips, in_place_of, joint, random_directions, shuffled, slots_of, steps_of, swept, wholes)
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit
from bizzaroworld.patch.sweep import sweep

LAYER = 2


@pytest.fixture(scope="module")
def model(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def pairs(model):
    "Ten pairs, of several lengths."
    found = [align(model, pair) for pair in load_battery()[::6]]
    assert len({len(tp.clean_ids) for tp in found}) > 2
    return found


def tied(d, n=300, site="resid_post", layer=LAYER, seed=0, k=12, writes=None, **more):
    "A dictionary nobody trained: random directions of several lengths, read by themselves."
    rng = torch.Generator().manual_seed(seed)
    W = torch.randn(n, d, generator=rng) / d ** 0.5
    return SAE("topk", W.T.contiguous(), torch.zeros(n), W * (0.5 + torch.rand(n, 1, generator=rng)), 0.1 * torch.randn(d, generator=rng), (site, layer), writes or (site, layer), k=k, **more)


def lds(model, tp, side="clean", hook=None, place=("resid_post", LAYER)):
    "The logit difference of one prompt, with a plain hook at a place."
    with torch.no_grad(), model.hooked([(*place, hook)] if hook else []): logits = model.logits(torch.tensor([getattr(tp, f"{side}_ids")]))[0]
    return float(logits[tp.clean_target_id] - logits[tp.corrupt_target_id])


def at(tp, position): return tp.entity if position == "entity" else tp.final


def activation(model, tp, side, position, place=("resid_post", LAYER)):
    kept = []
    with torch.no_grad(), model.hooked([(*place, lambda act: kept.append(act[0, at(tp, position)].clone()))]): model.run(torch.tensor([getattr(tp, f"{side}_ids")]))
    return kept[0].flatten()


def setting(tp, position, new):
    def hook(act):
        act[0, at(tp, position)] = new.view_as(act[0, at(tp, position)])
        return act
    return hook


@pytest.mark.parametrize("position, direction", [("entity", "noising"), ("final", "denoising")])
def test_ablating_a_coordinate_is_setting_it_to_zero(model, pairs, position, direction):
    tp, side = pairs[3], "clean" if direction == "noising" else "corrupt"
    table = feature_effects(model, perfect(128, "resid_post", LAYER), [tp], position, direction=direction, most=6)
    x, base = activation(model, tp, side, position), lds(model, tp, side)
    assert len(table) == 6 and table["size"].tolist() == sorted(table["size"], reverse=True)
    for row in table.itertuples():
        new = x.clone()
        new[row.feature % 128] = 0
        assert row.effect == pytest.approx(lds(model, tp, side, setting(tp, position, new)) - base, abs=1e-4)
        assert (x[row.feature % 128] > 0) == (row.feature < 128) and row.size == pytest.approx(abs(float(x[row.feature % 128])), abs=1e-5)
    assert table.effect.abs().max() > 0.1


def test_patching_a_coordinate_gives_it_the_other_runs_part(model, pairs):
    tp = pairs[3]
    table = feature_effects(model, perfect(128, "resid_post", LAYER), [tp], "entity", "patch")
    x, other, base = activation(model, tp, "clean", "entity"), activation(model, tp, "corrupt", "entity"), lds(model, tp)
    seen = set()
    for row in table.head(12).itertuples():
        sign, c = (1 if row.feature < 128 else -1), row.feature % 128
        new = x.clone()
        new[c] += sign * ((sign * other[c]).relu() - (sign * x[c]).relu())
        seen.add(bool(row.flip))
        assert row.effect == pytest.approx(lds(model, tp, hook=setting(tp, "entity", new)) - base, abs=1e-4) and row.flip == ((x[c] > 0) != (other[c] > 0))
        assert (row.value, row.other) == pytest.approx((float((sign * x[c]).relu()), float((sign * other[c]).relu())), abs=1e-5)
    assert seen == {True, False}


@pytest.mark.parametrize("norm", ["none", "scale", "token_norm", "layer_norm"])
def test_ablation_takes_away_what_is_decoded_from_a_feature(model, pairs, norm):
    "In the units of the model, whatever the dictionary makes of its input."
    sae, tp = tied(128, norm=norm, scale=2.5), pairs[5]
    x, base = activation(model, tp, "clean", "entity"), lds(model, tp)
    f = sae.encode(x[None])
    for row in feature_effects(model, sae, [tp], "entity").head(3).itertuples():
        without = f.clone()
        without[0, row.feature] = 0
        new = x - (sae.decode(f, x[None]) - sae.decode(without, x[None]))[0]
        assert row.effect == pytest.approx(lds(model, tp, hook=setting(tp, "entity", new)) - base, abs=1e-4) and row.size == pytest.approx(float((x - new).norm()), rel=1e-4)


@pytest.mark.parametrize("norm", ["none", "scale", "token_norm", "layer_norm"])
def test_features_and_error_are_the_site(model, pairs, norm):
    sae = tied(128, norm=norm, scale=2.5)
    values = feature_values(model, sae, pairs)
    vectors = wholes(values)
    torch.testing.assert_close(vectors["features"] + vectors["error"], values.there["corrupt"] - values.there["clean"], rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors["flipped"] + vectors["graded"], vectors["features"], rtol=0, atol=1e-5)
    if norm in ("none", "scale"): torch.testing.assert_close(vectors["error"], (values.there["corrupt"] - sae(values.there["corrupt"])) - (values.there["clean"] - sae(values.there["clean"])), rtol=0, atol=1e-4)
    torch.testing.assert_close(values.there["clean"] + vectors["without error"], sae(values.there["clean"]), rtol=0, atol=1e-4)
    assert all(vectors[name].norm(dim=1).max() > 0.1 for name in vectors)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("position", ["entity", "final"])
def test_patching_the_site_is_what_the_sweep_does(model, pairs, position, direction):
    exact = sweep(model, pairs, Edit("resid_post", LAYER, position), direction, metrics=("ld", "prob"), progress=False).to_frame()
    table = joint(model, perfect(128, "resid_post", LAYER), pairs, position, direction, ("ld", "prob"))
    for what in ("site", "features"):
        found = table[table.what == what].merge(exact, on=["pair_id", "metric"])
        assert len(found) == 2 * len(pairs) and np.allclose(found.effect_x, found.effect_y, atol=2e-4) and np.allclose(found.recovery_x, found.recovery_y, atol=1e-3)
    assert table[table.what.isin(["error", "without error"])].effect.abs().max() < 2e-4 and table[(table.what == "site") & (table.metric == "ld")].effect.abs().max() > 5


@pytest.mark.parametrize("position", ["entity", "final"])
def test_all_features_and_the_error_patched_together_are_the_site(model, pairs, position):
    values = feature_values(model, tied(128), pairs, position)
    vectors = wholes(values)
    found = changes(swept(model, values, torch.stack([vectors["features"] + vectors["error"], vectors["site"], vectors["features"]], 1), ["both", "site", "features"]))
    assert np.allclose(found[:, 0], found[:, 1], atol=2e-4) and np.abs(found[:, 2] - found[:, 1]).max() > 0.1


@pytest.mark.parametrize("site, position", [("z", "final"), ("attn_out", "final"), ("mlp_out", "entity")])
def test_other_sites(model, pairs, site, position):
    exact = sweep(model, pairs, Edit(site, LAYER, position), progress=False).to_frame().effect
    sae = perfect(128, site, LAYER, heads=4 if site == "z" else 1)
    table = joint(model, sae, pairs, position)
    assert np.allclose(table[table.what == "features"].effect, exact, atol=2e-4) and exact.abs().max() > 0.01
    one = feature_effects(model, sae, pairs[:1], position, most=1).iloc[0]
    x = activation(model, pairs[0], "clean", position, (site, LAYER))
    x[one.feature % 128] = 0
    assert one.effect == pytest.approx(lds(model, pairs[0], hook=setting(pairs[0], position, x), place=(site, LAYER)) - lds(model, pairs[0]), abs=1e-4)


def test_a_transcoder_is_read_at_one_place_and_changed_at_another(model, pairs):
    sae, tp = tied(128, site="resid_mid", writes=("mlp_out", LAYER)), pairs[2]
    read, there = (activation(model, tp, "clean", "entity", (site, LAYER)) for site in ("resid_mid", "mlp_out"))
    row = feature_effects(model, sae, [tp], most=1).iloc[0]
    new = there - sae.encode(read[None])[0, row.feature] * sae.W_dec[row.feature]
    assert row.effect == pytest.approx(lds(model, tp, hook=setting(tp, "entity", new), place=("mlp_out", LAYER)) - lds(model, tp), abs=1e-4) and abs(row.effect) > 1e-2
    values = feature_values(model, sae, [tp])
    torch.testing.assert_close(wholes(values)["without error"][0], sae(read[None])[0] - there, rtol=0, atol=1e-4)


def test_a_transcoder_that_reads_behind_the_norm(model, pairs):
    "What its MLP reads is made of the stream before the norm."
    sae, tp, got = tied(128, site="mlp_in", writes=("mlp_out", LAYER)), pairs[2], []
    handle = model.bridge.blocks[LAYER].mlp.original_component.register_forward_pre_hook(lambda mlp, args: got.append(args[0][0, tp.entity].clone()))
    with torch.no_grad(): model.run(torch.tensor([tp.clean_ids]))
    handle.remove()
    row = feature_effects(model, sae, [tp], most=1).iloc[0]
    assert row.value == pytest.approx(float(sae.encode(got[0][None])[0, row.feature]), abs=1e-4) and row.value > 0.1


@pytest.mark.parametrize("how", ["ablate", "patch"])
def test_slots_are_one_sweep_for_each_feature(model, pairs, how, monkeypatch):
    "Also where a pair has fewer features than another, and slots come in several sweeps."
    monkeypatch.setattr("bizzaroworld.features.effects.AT_ONCE", 5)
    sae = replace(tied(128), kind="jumprelu", k=None, threshold=torch.full((300,), 0.9))
    table = feature_effects(model, sae, pairs, how=how)
    on = {tp.id: [int(((sae.encode(activation(model, tp, side, "entity")[None]) > 0).sum())) for side in ("clean", "corrupt")] for tp in pairs}
    counts = table.pair_id.value_counts()
    if how == "ablate": assert {i: n for i, (n, _) in on.items() if n} == counts.to_dict() and len(set(counts)) > 3
    else: assert all(counts[i] >= max(two) for i, two in on.items() if max(two))
    for feature in table.groupby("feature").pair_id.nunique().nlargest(4).index:
        edit, mine = Edit("resid_post", LAYER, "entity", source="added"), table[table.feature == feature].set_index("pair_id")
        by_hand = {tp.id: ((sae.encode(activation(model, tp, "corrupt", "entity")) if how == "patch" else torch.zeros(300)) - sae.encode(activation(model, tp, "clean", "entity")))[feature] * sae.W_dec[feature] for tp in pairs}
        alone = sweep(model, pairs, edit, values={edit: by_hand}, progress=False).to_frame().set_index("pair_id").effect
        assert len(mine) > 1 and np.allclose(mine.effect, alone[mine.index], atol=2e-4)
        assert np.allclose(alone.drop(mine.index), 0, atol=2e-4)


def test_a_pair_alone_and_among_others(model, pairs):
    sae = tied(128)
    alone = pd.concat([feature_effects(model, sae, [tp]) for tp in pairs[:3]], ignore_index=True)
    together = feature_effects(model, sae, pairs)
    together = together[together.pair_id.isin(alone.pair_id)].reset_index(drop=True)
    assert together.feature.tolist() == alone.feature.tolist() and np.allclose(together.effect, alone.effect, atol=2e-4) and np.allclose(together.attribution, alone.attribution, atol=1e-4)


def test_empty_slots_are_not_numbers(model, pairs):
    values = feature_values(model, replace(tied(128), kind="jumprelu", k=None, threshold=torch.full((300,), 0.9)), pairs)
    steps = steps_of(values)
    which, there = slots_of(values, steps)
    found = exact_effects(model, values, steps, which, there)
    assert np.array_equal(np.isnan(changes(found)), ~there.numpy()) and not there.all() and len(found.interventions) == which.shape[1]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_attribution_is_the_limit_of_small_steps(model, pairs, direction):
    values = feature_values(model, tied(128), pairs)
    steps, errors = steps_of(values, "patch", direction), []
    for size in (1, 0.1, 0.01):
        which, there = slots_of(values, steps, 10)
        exact = changes(exact_effects(model, values, size * steps, which, there, direction))
        guess = attributed(model, values, size * steps, direction).gather(1, which).numpy()
        errors.append(np.abs(guess - exact).sum() / np.abs(exact).sum())
    assert errors[0] > 0.1 and errors[1] < errors[0] / 3 and errors[2] < 0.02


def test_metrics_each_have_their_rows(model, pairs):
    table = feature_effects(model, tied(128), pairs, metrics=("ld", "rank", "kl"), most=4)
    assert table.metric.value_counts().to_dict() == dict.fromkeys(("ld", "rank", "kl"), 4 * len(pairs))
    by = {m: rows.reset_index(drop=True) for m, rows in table.groupby("metric")}
    assert by["rank"].attribution.isna().all() and by["ld"].attribution.abs().max() > 0.1 and by["kl"].attribution.abs().max() < 1e-3  # the clean run is a minimum of KL
    alone = feature_effects(model, tied(128), pairs, metrics="ld", most=4)
    pd.testing.assert_frame_equal(by["ld"], alone, check_exact=False, atol=1e-4)


def test_identical_runs_have_no_flips_and_no_effects(model, pairs):
    same = [replace(tp, corrupt_ids=tp.clean_ids) for tp in pairs]
    table = flips(model, tied(128), same).iloc[0]
    assert table.only_clean == table.only_corrupt == 0 and table.both == table.on_clean == 12 and table.site == table.value == 0 and np.isnan(table["share"])
    assert len(feature_effects(model, tied(128), same, how="patch")) == 0 and (joint(model, tied(128), same).query("what == 'site'").effect == 0).all()


def test_flips_are_counted(model, pairs):
    sae = tied(128)
    table = flips(model, sae, pairs).set_index("category")
    on = [[set(sae.encode(activation(model, tp, side, "entity")).nonzero()[:, 0].tolist()) for side in ("clean", "corrupt")] for tp in pairs]
    first = table.loc["all"]
    assert (first.only_clean, first.only_corrupt, first.both) == pytest.approx(tuple(np.mean([len(x) for x in some]) for some in ([a - b for a, b in on], [b - a for a, b in on], [a & b for a, b in on])))
    assert first.n == len(pairs) and table.index[1:].tolist() == list(dict.fromkeys(tp.pair.category for tp in pairs)) and 0 < first.only_clean < 12
    whole = carried(joint(model, sae, pairs)).set_index("what")
    assert first["value"] == pytest.approx(whole.value["flipped"]) and first["share"] == pytest.approx(whole.share["flipped"]) and first.site == pytest.approx(whole.value["site"])
    one = table.iloc[1]
    assert one["share"] == pytest.approx(one["value"] / one.site)


def test_controls_are_as_long_and_keep_the_values(model, pairs):
    sae = tied(128)
    assert list(controls_of(sae)) == ["dictionary", "random directions", "shuffled"]
    for control in (random_directions(sae, 1), shuffled(sae, 1)):
        torch.testing.assert_close(control.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))
        cosines = torch.cosine_similarity(control.W_dec, sae.W_dec)
        assert cosines.abs().max() < 0.6
        mine, theirs = (feature_effects(model, one, pairs, most=5) for one in (sae, control))
        assert mine.feature.tolist() == theirs.feature.tolist() and np.allclose(mine["size"], theirs["size"], rtol=1e-4) and np.allclose(mine.value, theirs.value) and not np.allclose(mine.effect, theirs.effect, atol=0.01)
    unit = torch.nn.functional.normalize
    moved = unit(shuffled(sae, 1).W_dec, dim=1) @ unit(sae.W_dec, dim=1).T > 0.999
    assert moved.sum(0).tolist() == moved.sum(1).tolist() == [1] * 300 and not moved.diagonal().any()
    assert torch.equal(random_directions(sae, 1).W_dec, random_directions(sae, 1).W_dec) and not torch.equal(random_directions(sae, 1).W_dec, random_directions(sae, 2).W_dec)


def test_an_untrained_models_dictionary_brings_its_features_and_nothing_else(model, pairs, tmp_path):
    sae, other = replace(tied(128), norm="scale", scale=3.0, b_dec=torch.full((128,), 0.5)), replace(tied(128, seed=5), norm="scale", scale=7.0, model="untrained bizzaro-nano")
    control = controls_of(sae, untrained=other)["untrained model"]
    torch.testing.assert_close(torch.cosine_similarity(control.W_dec, other.W_dec), torch.ones(300))
    assert control.W_dec.norm(dim=1).mean() == pytest.approx(float(sae.W_dec.norm(dim=1).mean()), rel=1e-5) and (control.scale, control.model) == (3.0, sae.model) and torch.equal(control.b_dec, sae.b_dec) and "untrained" in control.source
    x = torch.randn(20, 128)
    for mine, theirs in ((sae, other), (other, sae)):  # a file holds the scale in its weights: the control is the same
        kept = [load_sae(save_sae(one, tmp_path / f"{i}{one.scale}")) for i, one in enumerate((mine, theirs))]
        for a, b in itertools.product((mine, kept[0]), (theirs, kept[1])): torch.testing.assert_close(in_place_of(b, a)(x), in_place_of(theirs, mine)(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(DictionaryError, match="has reads .*'resid_post', 5.*give one of the same place"): controls_of(sae, untrained=perfect(128, "resid_post", 5))


def test_a_trained_dictionary_carries_more_than_its_controls(model, pairs):
    there = feature_values(model, perfect(128, "resid_post", LAYER), load_battery()).there
    sae, _ = train_sae(Held(torch.cat(list(there.values())), ("resid_post", LAYER)), Recipe("topk", 256, k=16, steps=300, batch=120), progress=False)
    shares = {name: carried(joint(model, one, pairs, "entity", "denoising", ("prob",))).set_index("what").share["features"] for name, one in controls_of(sae).items()}
    assert shares["dictionary"] > 0.3 + max(shares["random directions"], shares["shuffled"])


def test_agreement_is_what_it_says():
    def table(pair, effects, guesses): return pd.DataFrame({"pair_id": pair, "effect": effects, "attribution": guesses})
    a, b = table("a", [4.0, -3, 2, 1], [4.0, -3, 2, 1]), table("b", [4.0, -3, 2, 1], [1.0, 2, -3, 4])
    found = agreement(pd.concat([a, b]), k=2).set_index("measure")
    assert found.value["spearman"] == pytest.approx(0) and found.value["top 2 found"] == 0.5 and found.value["top 2 found by chance"] == 0.5 and found.value["relative error"] == pytest.approx((0 + (3 + 5 + 5 + 3) / 10) / 2)
    assert agreement(a, k=2).set_index("measure").value["spearman"] == 1
    few = agreement(a, k=4).set_index("measure")
    assert np.isnan(few.value["top 4 found"]) and few.n["top 4 found"] == 0


def test_features_are_summed_over_pairs():
    table = pd.DataFrame({"pair_id": ["a", "a", "b"], "feature": [1, 2, 2], "flip": [True, False, True], "effect": [-1.0, 0.5, 3.5]})
    found = by_feature(table, n=4).set_index("feature")
    assert found.index.tolist() == [2, 1] and found.loc[2].tolist() == [2, 1, 2.0, 1.0] and found.loc[1].tolist() == [1, 1, -1.0, -0.25]


def test_what_cannot_be_used_is_refused(model, pairs):
    good = perfect(128, "resid_post", LAYER)
    with pytest.raises(DictionaryError, match="It reads 64 dimensions, and resid_post of layer 0 in bizzaro-nano has 128"): feature_values(model, perfect(64), pairs)
    with pytest.raises(DictionaryError, match="layer 8|0 to 7"): feature_values(model, perfect(128, "resid_post", 8), pairs)
    with pytest.raises(DictionaryError, match="features are changed at one token"): feature_values(model, good, pairs, "all")
    with pytest.raises(DictionaryError, match="There are no pairs"): feature_values(model, good, [])
    with pytest.raises(DictionaryError, match="Two pairs have one id"): feature_values(model, good, [pairs[0], pairs[0]])
    with pytest.raises(DictionaryError, match="use ablate or patch"): feature_effects(model, good, pairs[:1], how="kill")
    with pytest.raises(ValueError, match="Unknown direction"): feature_effects(model, good, pairs[:1], direction="up")
    with pytest.raises(ValueError, match="Unknown site"): feature_values(model, perfect(128, "resid_posts"), pairs)
    with pytest.raises(DictionaryError, match="no other's direction"): shuffled(tied(128, n=1, k=1))
