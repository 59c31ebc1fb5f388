"""Inside a lookup: paths, neurons and other names, against what the same thing done by hand gives."""
import numpy as np
import pandas as pd
import pytest
import torch

from bizzaroworld.lookup.asking import answers, as_pairs, ask, final_states, means_at, read
from bizzaroworld.lookup.crossed import (_outside, choice_weights, crossed, direct_weights, excess_of, lengths, one_attribute, other_halves, own_parts, parallelograms, renamed,
                                         with_shuffled_mlps)
from bizzaroworld.lookup.inside import difference_of, fact_correlations, mlp_paths, neuron_estimates, neurons, resampled, told_by, without_paths
from bizzaroworld.lookup.nonlinear import isotropic_share
from bizzaroworld.lookup.probes import head_directions
from bizzaroworld.patch.interventions import Edit
from bizzaroworld.planted.lookups import PROMPTS, plant_lookup


@pytest.fixture(scope="module")
def planted(): return plant_lookup("hash_lookup")


@pytest.fixture(scope="module")
def asked(planted): return ask(planted.model, planted.people, PROMPTS["one_shot"])


@pytest.fixture(scope="module")
def single(): return plant_lookup("single_step")


@pytest.fixture(scope="module")
def known(single): return ask(single.model, single.people, PROMPTS["one_shot"])


def mlp(model, layer, stream):
    block = model.hf.model.layers[layer]
    return block.mlp(block.post_attention_layernorm(stream)).detach()


def test_a_path_that_is_taken_away_is_what_doing_it_by_hand_gives(planted, asked):
    model, places = planted.model, [("mlp_out", 1), ("mlp_out", 2), ("resid_mid", 3)]
    there = read(model, asked, places)
    stream = there["resid_mid", 3] - there["mlp_out", 1] + there["mlp_out", 1].mean(0)
    by_hand = final_states(model, asked, {Edit("mlp_out", 3, "last", source="given"): mlp(model, 3, stream)})
    torch.testing.assert_close(without_paths(model, asked, {3: [1]}, at_once=20)[0], by_hand, rtol=0, atol=1e-3)


def test_paths_into_several_mlps_follow_each_other(planted, asked):
    "MLP 3 is told of what MLP 2 writes once MLP 2 has lost what MLP 1 told it."
    model = planted.model
    there = read(model, asked, [("mlp_out", 1), ("mlp_out", 2), ("resid_mid", 2)])
    means = {l: there["mlp_out", l].mean(0) for l in (1, 2)}
    second = mlp(model, 2, there["resid_mid", 2] - there["mlp_out", 1] + means[1])
    changed = {Edit("mlp_out", 2, "last", source="given"): second}
    third = read(model, asked, [("resid_mid", 3)], values=changed)["resid_mid", 3] - there["mlp_out", 1] - second + means[1] + means[2]
    by_hand = final_states(model, asked, changed | {Edit("mlp_out", 3, "last", source="given"): mlp(model, 3, third)})
    states, kept = without_paths(model, asked, {2: [1], 3: [1, 2]}, ("mlp_out", 3))
    torch.testing.assert_close(states, by_hand, rtol=0, atol=1e-3)
    torch.testing.assert_close(kept, mlp(model, 3, third), rtol=0, atol=1e-3)


def test_a_path_replaced_by_what_it_carries_changes_nothing(planted, asked):
    "The mean over one person is that person's."
    one = asked.only([5])
    torch.testing.assert_close(without_paths(planted.model, one, {3: [1, 2], 2: [1]})[0], final_states(planted.model, one), rtol=0, atol=1e-4)


def test_only_the_planted_path_matters(planted, asked):
    table = mlp_paths(planted.model, asked, [1, 2, 3], seeds=3).set_index("path")
    assert table.loc["nothing"].kept == 1 and table.loc["nothing"].kl == 0
    assert {name for name in table.index if table.kept[name] < 0.9} == {"L1 > L3", "all > L3", "all > all"}
    assert (table.kl[table.kept < 0.9] > 1).all() and (table.probe[table.kept < 0.9] < 0.5).all() and (table.probe[table.kept > 0.9] > 0.8).all()
    assert mlp_paths(planted.model, asked, [3], seeds=3).path.tolist() == ["nothing"]


def test_paths_that_no_model_has_are_refused(planted, asked):
    with pytest.raises(ValueError, match="MLP 1 reads only MLPs before it"): without_paths(planted.model, asked, {1: [2]})


def test_estimates_are_slopes_times_steps(single, known):
    some, model = known.only(range(6)), single.model
    found, acts = neuron_estimates(model, some, [2], at_once=4)[2], read(model, some, [("neurons", 2)])["neurons", 2]
    read_off = difference_of(model, some, torch.arange(6))
    for neuron in (int(found.abs().sum(0).argmax()), 3):
        def at(step): return read_off(final_states(model, some, {Edit("neurons", 2, "last", neuron, "given"): acts[:, neuron] + step})).detach()
        slope = (at(1e-2) - at(-1e-2)) / 2e-2
        torch.testing.assert_close(found[:, neuron], (acts[:, neuron].mean(0) - acts[:, neuron]) * slope, rtol=5e-2, atol=5e-3)


def test_neurons_of_people_are_found_and_replaced_exactly(single, known):
    some = known.only(range(0, 96, 6))
    table, model = neurons(single.model, some, [1, 2, 3], top=16), single.model
    own = single.neurons.merge(some.people, on=["first", "last"])
    assert {(l, n) for l, n, why in zip(table.layer, table.neuron, table.chosen) if why == "largest"} == set(zip(own.layer, own.neuron))
    assert (table[table.chosen == "largest"].helps == 1 / 16).all()  # its own person's
    pairs = as_pairs(model, some)
    ids = torch.tensor([tp.answers[0] + tp.answers[1] for tp in pairs])
    edit = Edit("neurons", 2, "last", int(table.neuron[0]), "given")
    def difference(states): return (model.readout(states, ids) @ torch.tensor([1.0, -1.0])).detach()
    change = difference(final_states(model, some, means_at(model, some, [edit]))) - difference(final_states(model, some))
    assert table["mean"][0] == pytest.approx(change.mean().item(), abs=1e-3)


def test_resampling_is_the_mean_over_donors(single, known):
    some, model = known.only(range(0, 96, 12)), single.model
    neuron = int(single.neurons.neuron[(single.neurons["first"] == some.people["first"][0]) & (single.neurons["last"] == some.people["last"][0])].iloc[0])
    found = resampled(model, some, [(2, neuron)], donors=64).iloc[0]  # all 7 others
    assert resampled(model, some.only(range(4)), [(2, neuron)], some, donors=5).iloc[0].donors == 5
    acts, pairs = read(model, some, [("neurons", 2)])["neurons", 2][:, neuron], as_pairs(model, some)
    ids = torch.tensor([tp.answers[0] + tp.answers[1] for tp in pairs])
    def difference(states): return (model.readout(states, ids) @ torch.tensor([1.0, -1.0])).detach()
    base, edit = difference(final_states(model, some)), Edit("neurons", 2, "last", neuron, "given")
    by_donor = torch.stack([difference(final_states(model, some, {edit: acts.roll(k)})) - base for k in range(1, 8)])
    assert found.donors == 7 and found["mean"] == pytest.approx(by_donor.mean().item(), abs=1e-3) and found.spread == pytest.approx(by_donor.std(0, correction=0).mean().item(), abs=1e-3)


def test_facts_of_one_person_are_told_from_those_of_two():
    rng, names = np.random.default_rng(0), [f"P{i}" for i in range(20)]
    person = rng.normal(size=(20, 200))
    alike = {"a": (names, person + 0.1 * rng.normal(size=person.shape)), "b": (names[::-1], (2 * person + 0.1 * rng.normal(size=person.shape))[::-1])}
    row = fact_correlations(alike).iloc[0]
    assert row.same > 0.95 and abs(row.other) < 0.1 and row.low > 0.8 and row.n == 20
    apart = fact_correlations({"a": (names, person), "b": (names, rng.normal(size=person.shape))}).iloc[0]
    assert abs(apart.difference) < 0.1
    shared = fact_correlations({"a": (names, person + 5 * person[0]), "b": (names, person[::-1] + 5 * person[0])}).iloc[0]  # the same for everybody: no person's own
    assert shared.same > 0.8 and abs(shared.difference) < 0.05
    assert fact_correlations({"a": (names, person), "b": (["else"], person[:1])}).empty
    silent = fact_correlations({"a": (names, person * (np.arange(20) > 0)[:, None]), "b": (names, person)}).iloc[0]
    assert silent.n == 19 and silent.same > 0.95  # one of whom no neuron does anything


def test_facts_that_are_one_fact_are_told_apart():
    rng = np.random.default_rng(0)
    country = rng.choice(list("ABCDE"), 60)
    assert told_by(country, [c + "-town" for c in country]) and told_by(["x"] * 60, country) and told_by(country, ["x"] * 60)
    assert not told_by(country, rng.choice(list("uv"), 60)) and not told_by(rng.choice(list("uv"), 60), country)
    names, acts = [f"P{i}" for i in range(60)], rng.normal(size=(60, 30))
    said = {"country": dict(zip(names, country)), "capital": dict(zip(names, [c + "-town" for c in country])), "pet": dict(zip(names, rng.choice(list("uv"), 60)))}
    table = fact_correlations({name: (names, acts) for name in said}, said).set_index(["one", "two"])
    assert table.told["country", "capital"] and not table.told["country", "pet"] and not table.told["capital", "pet"]


def test_other_halves_share_nothing_and_make_no_known_name(known):
    people, others = known.people, other_halves(known.people, 4)
    there = set(zip(people["first"], people["last"]))
    for i, row in enumerate(others):
        assert len(set(row)) == 4 and (people["first"][row] != people["first"][i]).all() and (people["last"][row] != people["last"][i]).all()
    made = [((people["first"][j], people["last"][i]) in there) + ((people["first"][i], people["last"][j]) in there) for i, row in enumerate(others) for j in row]
    assert np.mean(made) < 0.5  # a third of all names is nobody's
    with pytest.raises(ValueError, match="people share no half"): other_halves(people[:5], 8)


def test_crossed_names_are_read_as_names(single, known):
    some = known.only(range(0, 96, 12))
    found = crossed(single.model, some, [("neurons", 2)], k=2)["neurons", 2]
    others = other_halves(some.people, 2)
    i, j = 3, others[3][1]
    for kind, first, last in (("b_only", j, i), ("a_only", i, j)):
        name = renamed(single.model, some, [some.people["first"][first]], [some.people["last"][last]])
        torch.testing.assert_close(found[kind][i, 1], read(single.model, name, [("neurons", 2)])["neurons", 2][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["ab"], read(single.model, some, [("neurons", 2)])["neurons", 2])


def test_direct_weights_are_what_the_head_reads_of_a_neuron(single, known):
    "Against a step of the neuron, put into the stream just before the head."
    some, model, head = known.only(range(6)), single.model, single.truth.extracts
    directions = head_directions(model, some, head)
    found, stream = direct_weights(model, some, head, [2], directions, at_once=4)[2], read(model, some, [("resid_pre", head[0])])["resid_pre", head[0]]
    def score(x):
        v = read(model, some, [("v", head[0])], values={Edit("resid_pre", head[0], "last", source="given"): x})["v", head[0]][:, head[1] * 2 // 4]
        return (v * directions[some.right]).sum(1)
    for neuron in single.neurons.neuron[:3]:
        column = model.hf.model.layers[2].mlp.down_proj.weight[:, int(neuron)].detach()
        slope = (score(stream + 0.01 * column) - score(stream - 0.01 * column)) / 0.02
        torch.testing.assert_close(found[:, int(neuron)], slope, rtol=2e-2, atol=1e-3)
    with pytest.raises(ValueError, match="before MLP 6 has written"): direct_weights(model, some, head, [6], directions)


def test_the_excess_is_all_of_a_lookup_and_nothing_of_a_sum(single, known):
    table = excess_of(single.model, known.only(range(0, 96, 3)), single.truth.extracts, [2], k=4).set_index(["layer", "acts"])
    assert table.net["2", "post"] == pytest.approx(1, abs=0.1) and table.share["2", "post"] > 0.7
    it = plant_lookup("linear")
    table = excess_of(it.model, ask(it.model, it.people, PROMPTS["one_shot"]).only(range(0, 96, 3)), it.truth.extracts, [2], k=4).set_index(["layer", "acts"])
    assert table.net["2", "post"] == pytest.approx(0, abs=1e-3) and table.share["2", "post"] == pytest.approx(0, abs=1e-3)


def test_a_parallelogram_closes_where_halves_are_added(single, known):
    table = parallelograms(single.model, known, ["resid_pre", "mlp_out"], n=150).set_index(["site", "layer"])
    assert table.ratio["resid_pre", 0] == pytest.approx(0, abs=1e-6)  # the last name's own embedding
    assert table.ratio["mlp_out", 2] > 0.7 and 4 * table.n.max() <= len(known)  # nobody twice


def test_shuffled_mlps_hold_the_same_numbers_and_nothing_else_is_touched(single):
    before = single.model.hf.model.layers[2].mlp.up_proj.weight.clone()
    twin = with_shuffled_mlps(single.model)
    for (name, own), (_, other) in zip(single.model.hf.named_parameters(), twin.hf.named_parameters()):
        if ".mlp" in name and own.ndim == 2:
            assert torch.equal(own.flatten().sort().values, other.flatten().sort().values)
            if own.unique().numel() > 2: assert not torch.equal(own, other)
        else: assert torch.equal(own, other)
    assert torch.equal(before, single.model.hf.model.layers[2].mlp.up_proj.weight)


def test_lengths_and_own_parts(single, known):
    nobody = renamed(single.model, known, single.nobody["first"], single.nobody["last"])
    table = lengths(single.model, {"known": known, "nobody": nobody}, ["mlp_out"]).set_index(["group", "layer"])
    assert table["mean"]["known", 2] > 1.5 * table["mean"]["nobody", 2] and table.p["nobody", 2] < 0.01  # a neuron fires for the known
    own = own_parts(single.model, known, "resid_pre").set_index("layer")
    assert own.share[0] == pytest.approx(0, abs=1e-3)  # 12 last names, and everybody shares one
    assert ((0 <= own.share) & (own.share <= 1 + 1e-6)).all()


@pytest.mark.parametrize("people", [20, 90])
def test_a_random_vector_is_its_own_as_far_as_random_vectors_are(people):
    "And one that is a mixture of others, or a copy, is not; a mean that all share counts for nothing."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(people, 100)) + 50
    assert _outside(x).mean() == pytest.approx(isotropic_share(people - 1, 100), abs=0.03)
    mixed = np.vstack([x, 0.3 * x[0] + 0.7 * x[1]])
    assert _outside(mixed)[-1] == pytest.approx(0, abs=1e-4) and _outside(mixed)[5] > 0.1


def test_no_neuron_of_a_single_step_lookup_stands_for_a_sport(single, known):
    table = one_attribute(single.model, known.only(range(0, 96, 2)), known.only(range(1, 96, 2)), single.truth.extracts, [2], best=1)
    none = known.only((known.people["answer"] != "football").to_numpy())
    assert set(one_attribute(single.model, none, none, single.truth.extracts, [2], best=1).attribute) == {"baseball", "basketball"}
    assert set(table.attribute) == set(known.choices) and (table.loss_with < 1).all()
    weights = choice_weights(single.model, known.only(range(0, 96, 4)), single.truth.extracts, [2])[2]
    own = single.neurons
    assert [known.choices[i] for i in weights[own.neuron].argmax(1)] == own.answer.tolist()
