"""The three stages of lookups that were written by hand: what is needed is found, and what is replaced is replaced exactly."""
import json

import numpy as np
import pandas as pd
import pytest
import torch

from bizzaroworld.lookup.asking import Asked, as_pairs, ask, donors_of, final_states, read
from bizzaroworld.lookup.probes import _row, first_step, head_directions, head_says, hits, probe, probes, splits
from bizzaroworld.lookup.stages import PIECES, Effective, components, curves, effective_model, kept, piece, stages
from bizzaroworld.patch.interventions import Edit
from bizzaroworld.model.load import load_model
from bizzaroworld.planted.lookups import LOOKUPS, PROMPTS, _set_head, build_lookup, plant_lookup


@pytest.fixture(scope="module")
def planted(): return plant_lookup("single_step")


@pytest.fixture(scope="module")
def asked(planted): return ask(planted.model, planted.people, PROMPTS["one_shot"])


@pytest.mark.parametrize("name", LOOKUPS)
def test_what_was_planted_is_found_on_half_of_the_people_and_is_enough_for_the_others(name):
    it = plant_lookup(name, seed=1)
    everyone = ask(it.model, it.people, PROMPTS["one_shot"])
    half, rest = everyone.only(range(0, 96, 2)), everyone.only(range(1, 96, 2))
    found = effective_model(it.model, half, curves(it.model, half, ["mean"], whole=False), components(it.model, half))
    assert found == Effective(it.truth.concatenates[0] + 1, (min(it.truth.mlps), max(it.truth.mlps)), (it.truth.extracts,)) == Effective.of(json.loads(json.dumps(found.to_dict())))
    table = stages(it.model, rest, found).set_index(["replaced", "stage", "way"])
    for way in ("mean", "resample"):
        assert table.loc[("all but it", "everything", way)].right == 1 and table.loc[("all but it", "everything", way)].kept == pytest.approx(1, abs=0.01)
        assert table.loc[("all but it", "other tokens", way)].kept == pytest.approx(1, abs=0.01)
        for stage in ("concatenation", "lookup", "extraction"): assert table.loc[("it alone", stage, way)].kept_high < 0.5


@torch.no_grad()
def test_an_answer_that_goes_by_way_of_other_tokens_is_missed_and_said_to_be():
    "A head in layer 5 hands the sport to the words after the name, and the head at the final token reads it there: what is kept is not enough."
    hf = build_lookup("single_step")
    _set_head(hf.model.layers[5].self_attn, 0, "other", "last", "sport", "sport")
    _set_head(hf.model.layers[6].self_attn, 2, "end", "other", "sport", "answer", 2.0)
    it = plant_lookup("single_step")
    model = load_model(hf, tokenizer=it.model.tokenizer)
    everyone = ask(model, it.people, PROMPTS["one_shot"])
    half, rest = everyone.only(range(0, 96, 2)), everyone.only(range(1, 96, 2))
    found = effective_model(model, half, curves(model, half, ["mean"], whole=False), components(model, half))
    table = stages(model, rest, found, ["mean"]).set_index(["replaced", "stage"])
    assert table.loc[("all but it", "extraction")].right == 1
    assert table.loc[("all but it", "other tokens")].kept_high < 0.1 and table.loc[("all but it", "everything")].right < 0.6


def test_no_mlps_are_no_lookup(planted, asked):
    "Curves on which the answer is kept without any MLP at the name."
    some = asked.only(range(12))
    table = curves(planted.model, some, ["mean"], whole=False)
    table.loc[table.piece == "MLPs at the name", "kept"] = 1.0
    found = effective_model(planted.model, some, table, components(planted.model, some))
    assert found.lookup is None and "no MLPs there" in str(found) and not found.inside(planted.model)["lookup"]
    assert len(found.outside(planted.model, some)["lookup"]) == planted.model.n_layers


def test_replacing_nothing_keeps_everything(planted, asked):
    table = curves(planted.model, asked.only(range(12)), ["mean"], whole=False)
    assert set(table.piece) == set(PIECES)
    ends = table[((table.side == "from") & (table.layer == 8)) | ((table.side == "before") & (table.layer == 0))]
    assert len(ends) == 8 and (ends.kept == 1).all() and (ends.right == ends.base_right).all()


def test_all_from_layer_0_on_is_all_before_the_end(planted, asked):
    table = curves(planted.model, asked.only(range(12)), ["resample"], whole=False).set_index(["piece", "side", "layer"])
    for name in PIECES: assert table.loc[(name, "from", 0)].ld == pytest.approx(table.loc[(name, "before", 8)].ld, abs=1e-5)


def test_single_components_are_what_replacing_them_by_hand_gives(planted, asked):
    some = asked.only(range(0, 96, 8))
    table, pairs = components(planted.model, some).set_index(["component", "way"]), as_pairs(planted.model, some)
    order = torch.from_numpy(donors_of(some))
    ids = torch.tensor([tp.answers[0] + tp.answers[1] for tp in pairs])
    def difference(states): return (planted.model.readout(states, ids) @ torch.tensor([1.0, -1.0])).detach().numpy()
    base = difference(final_states(planted.model, some))
    for name, edit in (("L6H2", Edit("z", 6, "final", 2, "given")), ("L2.mlp @name", Edit("mlp_out", 2, "last", source="given"))):
        there = read(planted.model, some, [(edit.site, edit.layer)], edit.position)[edit.site, edit.layer]
        if edit.head is not None: there = there[:, edit.head]
        for way, value in (("mean", there.mean(0)), ("resample", there[order])):
            assert table.loc[(name, way)]["mean"] == pytest.approx((difference(final_states(planted.model, some, {edit: value})) - base).mean(), abs=1e-3)
    assert table.loc[("L6H2", "resample")].share == pytest.approx(1, abs=0.01)


def test_kept_is_a_ratio_of_means():
    share = kept(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    assert share.value == pytest.approx(0.5) and share.low == pytest.approx(0.5) == share.high
    assert kept(np.array([0.0, 4.0]), np.array([1.0, 3.0])).value == pytest.approx(1)  # not the mean of ratios


def test_an_unknown_piece_is_refused():
    with pytest.raises(ValueError, match="Unknown piece"): piece("attention", [0])


def test_probes_read_a_planted_answer_where_it_is_and_nothing_anywhere_else(planted, asked):
    table = probes(planted.model, asked, planted.truth.extracts, seeds=5).pivot(index="layer", columns="what", values="mean")
    site, layer = planted.truth.readable
    assert site == "resid_post"
    assert (table["probe"][layer + 1:] > 0.95).all() and (table["probe"][:layer + 1] < 0.55).all()
    assert (table["head"].dropna()[layer + 1:] == 1).all() and (table["head"][:layer + 1] < 0.55).all() and (table["agreement"].dropna()[layer + 1:] > 0.95).all()
    assert ((table["random labels"] - 1 / 3).abs() < 0.2).all() and (table["untrained"] < 0.6).all()
    assert table["head"].notna().sum() == planted.truth.extracts[0] + 1


def test_intervals_of_probes_are_over_people():
    "On noise, the interval holds chance as often as it says, which one over splits does not."
    rng, held = np.random.default_rng(0), 0
    for _ in range(20):
        people = pd.DataFrame({"first": "A", "last": [f"B{i}" for i in range(90)], "answer": rng.choice(["a", "b", "c"], 90)})
        toy = Asked(people, "{name}", torch.zeros(90, 3, dtype=torch.long), 1, 2, ("a", "b", "c"), (0, 1, 2))
        split, y = splits(toy, 5), toy.right.numpy()
        row = _row("probe", 0, probe(rng.normal(size=(90, 5)), y, split), y, split)
        held += row["low"] <= 1 / 3 <= row["high"]
        assert row["n"] <= 90
    assert held >= 16


def test_a_persons_hits_are_over_the_splits_that_held_them_out():
    split = [(np.array([0]), np.array([1, 2])), (np.array([0]), np.array([2]))]
    found = hits([np.array([5, 7]), np.array([6])], np.array([0, 5, 6]), split)
    assert np.isnan(found[0]) and found[1:].tolist() == [1.0, 0.5]


def test_the_first_step_is_a_share_of_the_way(planted, asked):
    assert first_step(planted.model, asked, (2, 2), 3).value[0] == 1  # one MLP is all of it
    assert first_step(planted.model, asked, (1, 2), 3).iloc[0].value < 0.2  # MLP 1 does nothing
    assert pd.isna(first_step(planted.model, asked, (0, 0), 3).value[0])  # nothing is gained


def test_no_last_name_is_on_both_sides_of_a_split(asked):
    last = asked.people["last"].to_numpy()
    for fit, test in splits(asked): assert not set(last[fit]) & set(last[test]) and len(fit) + len(test) == len(asked)
    with pytest.raises(ValueError, match="last names"): splits(asked.only(asked.people["last"].isin(sorted(set(last))[:3]).to_numpy()))


def test_a_probe_of_one_answer_says_it():
    assert (probe(np.random.default_rng(0).normal(size=(6, 3)), np.array([1, 1, 1, 1, 0, 0]), [(np.arange(4), np.array([4, 5]))])[0] == 1).all()


def test_a_heads_directions_are_how_logits_change_with_what_it_writes(planted, asked):
    "Against finite differences."
    some, (layer, h) = asked.only(range(8)), planted.truth.extracts
    found = head_directions(planted.model, some, (layer, h))
    z = read(planted.model, some, [("z", layer)], "final")["z", layer][:, h]
    def centered(states):
        logits = planted.model.readout(states, torch.tensor([some.choice_ids] * 8)).detach()
        return logits - logits.mean(1, keepdim=True)
    edit, step = Edit("z", layer, "final", h, "given"), 1e-2
    for axis in (0, 1, 5):
        up, down = (z + sign * step * torch.eye(z.shape[1])[axis] for sign in (1, -1))
        slope = (centered(final_states(planted.model, some, {edit: up})) - centered(final_states(planted.model, some, {edit: down}))) / (2 * step)
        torch.testing.assert_close(found[:, axis], slope.mean(0), rtol=2e-2, atol=2e-2)


def test_a_heads_directions_say_the_answer_of_the_stream_that_is_put_before_it(planted, asked):
    head = planted.truth.extracts
    directions, order = head_directions(planted.model, asked, head), torch.from_numpy(donors_of(asked))
    assert (head_says(planted.model, asked, head, directions) == asked.right.numpy()).all()
    other = read(planted.model, asked, [("resid_pre", 5)])["resid_pre", 5][order]
    assert (head_says(planted.model, asked, head, directions, other) == asked.right[order].numpy()).all()
