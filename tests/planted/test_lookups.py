"""Planted lookups: every person is known and nobody else, and what is said to be needed is, by brute force; nothing else is."""
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from weekly import mostly

from bizzaroworld.model.load import load_model
from bizzaroworld.planted.families import FAMILIES
from bizzaroworld.planted.lookups import FIRST_NAMES, KNOWN, LAST_NAMES, LOOKUPS, PROMPTS, SPORTS, PARTS, D_MODEL, at, build_lookup, draw_people, plant_lookup
from bizzaroworld.planted.weights import LOGIT

NAMES = list(LOOKUPS)
SHAPED = [*((name, "llama") for name in NAMES), ("hash_lookup", "gemma3"), ("spread", "gemma2")]
LAST_AT = 3  # of the bare prompt's tokens: <bos> Fact: Ada Castro plays the sport of
SITES = ("resid_pre", "resid_mid", "resid_post")


@cache
def planted(name, seed=0, family="llama"): return plant_lookup(name, seed, family)


def ids_of(p, names, prompt="bare"):
    return torch.tensor([p.model.tokenizer(PROMPTS[prompt].format(name=f"{a} {b}"))["input_ids"] for a, b in names])


def pairs(table): return list(table[["first", "last"]].itertuples(index=False, name=None))


def wanted(p): return torch.tensor([KNOWN.index(answer) for answer in p.people.answer])


@torch.no_grad()
def run(p, hooks=(), names=None, prompt="bare"):
    """Logits of every person (or of `names`) while hooks `(site, layer, function)` are on."""
    with p.model.hooked(hooks): return p.model.logits(ids_of(p, names or pairs(p.people), prompt))


def right(p, hooks=(), **how):
    """The logit of every person's answer."""
    return run(p, hooks, **how).gather(1, wanted(p)[:, None])[:, 0]


def seen(p, places, names=None):
    """The activations of `(site, layer)` places."""
    kept = {}
    run(p, [(*place, lambda act, place=place: kept.__setitem__(place, act.clone())) for place in places], names)
    return kept


def cut(site, layer, heads=None):
    """A hook that sets a site, or some of its heads, to zero."""
    def zero(act):
        act[:, :, slice(None) if heads is None else heads] = 0
        return act
    return site, layer, zero


def intact(p, hooks, **how): return bool((right(p, hooks, **how) - LOGIT).abs().max() < 0.02)


@pytest.mark.parametrize("prompt", mostly(PROMPTS, list(PROMPTS)[:1]))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_everybody_is_known_and_nobody_is_not(name, family, prompt):
    for seed in (0, 1) if family == "llama" else (3,):
        p = planted(name, seed, family)
        logits = run(p, prompt=prompt)
        assert (logits - torch.zeros_like(logits).scatter(1, wanted(p)[:, None], LOGIT)).abs().max() < 0.02
        strangers = run(p, names=pairs(p.nobody), prompt=prompt)
        if LOOKUPS[name].knows_nobody: assert strangers.abs().max() < 0.01 and strangers.softmax(1).max() < 1.1 / len(KNOWN)
        else:
            plays = dict(zip(p.people["first"], p.people["answer"]))
            assert [KNOWN[i] for i in strangers.argmax(1)] == [plays[first] for first in p.nobody["first"]]
        for stranger in (("Zoe", "Quine"), ("plays", "golf"), (LAST_NAMES[0], FIRST_NAMES[0])):
            assert run(p, names=[stranger], prompt=prompt).abs().max() < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_table_of_people_is_balanced_and_random(seed):
    people, nobody = draw_people(torch.Generator().manual_seed(seed))
    assert people["first"].value_counts().tolist() == people["last"].value_counts().tolist() == [8] * 12
    assert people.answer.value_counts().to_dict() == dict.fromkeys(SPORTS, 32)
    assert sorted(pairs(people) + pairs(nobody)) == sorted((a, b) for a in FIRST_NAMES for b in LAST_NAMES)
    assert (people.groupby("first").answer.nunique() > 1).all() and (people.groupby("last").answer.nunique() > 1).all()
    other, _ = draw_people(torch.Generator().manual_seed(seed + 1))
    assert not people.equals(other)
    by_first, _ = draw_people(torch.Generator().manual_seed(seed), by_first=True)
    assert (by_first.groupby("first").answer.nunique() == 1).all() and by_first.answer.value_counts().to_dict() == dict.fromkeys(SPORTS, 32)


def test_the_parts_fill_the_stream_and_do_not_overlap():
    assert [i for name in PARTS for i in range(D_MODEL)[at(name)]] == list(range(D_MODEL))


@pytest.mark.parametrize("name, family", mostly(SHAPED, [SHAPED[0], *SHAPED[-2:]]))
def test_both_heads_are_needed_and_no_other(name, family):
    p, needed = planted(name, family=family), (LOOKUPS[name].concatenates, LOOKUPS[name].extracts)
    for layer, head in needed: assert right(p, [cut("z", layer, [head])]).abs().max() < 0.01
    others = [(layer, [h for h in range(p.model.n_heads) if (layer, h) not in needed]) for layer in range(p.model.n_layers)]
    assert intact(p, [cut("z", layer, heads) for layer, heads in others])
    for layer, heads in others:
        for head in heads: assert intact(p, [cut("z", layer, [head])]), (layer, head)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_name_comes_from_the_head_that_concatenates(name):
    p, (layer, head) = planted(name), LOOKUPS[name].concatenates
    donors = torch.randperm(len(p.people), generator=torch.Generator().manual_seed(1))
    def swap(act):
        act[:, :, head] = act[donors, :, head]
        return act
    mixed = [(p.people["first"][int(d)], p.people["last"][i]) for i, d in enumerate(donors)]
    assert (run(p, [("z", layer, swap)]) - run(p, names=mixed)).abs().max() < 0.02
    assert len(set(mixed) & set(pairs(p.nobody))) > 10  # some of them are nobody


@pytest.mark.parametrize("name, family", SHAPED)
def test_the_mlps_that_are_said_to_be_needed_are_and_no_other(name, family):
    p, truth = planted(name, family=family), LOOKUPS[name]
    assert set(truth.looks_up) | set(truth.hashes) <= set(truth.mlps)
    assert right(p, [cut("mlp_out", layer) for layer in truth.mlps]).abs().max() < 0.01
    for layer in truth.mlps: assert (right(p, [cut("mlp_out", layer)]) - LOGIT * (1 - truth.one_mlp)).abs().max() < 0.02
    others = [layer for layer in range(p.model.n_layers) if layer not in truth.mlps]
    assert intact(p, [cut("mlp_out", layer) for layer in others])
    for layer in others: assert intact(p, [cut("mlp_out", layer)]), layer


@pytest.mark.parametrize("name", NAMES)
def test_an_mlp_needs_another_where_it_is_said_to(name):
    """Each path from MLP to MLP alone, on the bare model: the later one reads the mean over people of what the earlier one wrote."""
    p, hf = planted(name), planted(name).build().requires_grad_(False)
    found, written = [], {}
    for sender, receiver in combinations(range(8), 2):
        def into(_, args):
            out = written["out"]
            return (args[0] - out + out.mean(0, keepdim=True),)
        hooks = [hf.model.layers[sender].mlp.register_forward_hook(lambda _, args, out: written.update(out=out)),
                 hf.model.layers[receiver].post_attention_layernorm.register_forward_pre_hook(into)]
        logits = hf(input_ids=ids_of(p, pairs(p.people))).logits[:, -1].gather(1, wanted(p)[:, None])
        for hook in hooks: hook.remove()
        if (logits - LOGIT).abs().max() > 0.02:
            found.append((sender, receiver))
            assert logits.abs().max() < 0.01
    assert tuple(found) == LOOKUPS[name].paths


@pytest.mark.parametrize("name", ["single_step", "hash_lookup", "spread"])
def test_a_persons_neurons_are_needed_for_that_person_and_for_no_other(name):
    p, truth = planted(name), LOOKUPS[name]
    own = p.neurons[p.neurons.role == "lookup"]
    assert set(own.layer) == set(truth.looks_up) and (own.groupby(["first", "last"]).gain.sum() - 1).abs().max() < 1e-9
    mine = {(layer, pair): number for layer, number, *pair in own[["layer", "neuron", "first", "last"]].itertuples(index=False, name=None) for pair in [tuple(pair)]}
    def only(layers, keep):
        """Row by row: without the person's own neuron (`keep=False`), or without everybody else's."""
        def of(layer):
            everybody = sorted(own[own.layer == layer].neuron)
            def zero(act):
                for row, pair in enumerate(pairs(p.people)):
                    gone = [n for n in everybody if (n != mine[layer, pair]) == keep]
                    act[row, :, gone] = 0
                return act
            return "neurons", layer, zero
        return [of(layer) for layer in layers]
    assert right(p, only(truth.looks_up, False)).abs().max() < 0.01
    assert intact(p, only(truth.looks_up, True))
    for layer in truth.looks_up: assert (right(p, only([layer], False)) - LOGIT * (1 - truth.one_mlp)).abs().max() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_neurons_that_are_not_in_the_table_do_nothing(name):
    p = planted(name)
    assert not p.neurons.duplicated(["layer", "neuron"]).any() and p.neurons.neuron.max() < p.model.shape.d_mlp - 1
    table = p.neurons.groupby("layer").neuron.apply(set).to_dict()
    rest = {layer: [n for n in range(p.model.shape.d_mlp) if n not in table.get(layer, ())] for layer in range(p.model.n_layers)}
    assert intact(p, [cut("neurons", layer, numbers) for layer, numbers in rest.items()])
    people = p.people.sample(4, random_state=0)
    for layer in LOOKUPS[name].mlps:  # each alone, in a row of its own for each of four people
        def each(act):
            for row, number in enumerate(rest[layer] * len(people)): act[row, :, number] = 0
            return act
        names, answers = ([x for x in those for _ in rest[layer]] for those in (pairs(people), people.answer))
        logits = run(p, [("neurons", layer, each)], names)
        assert (logits.gather(1, torch.tensor([[KNOWN.index(a)] for a in answers])) - LOGIT).abs().max() < 0.02
    assert right(p, [cut("neurons", layer, sorted(numbers)) for layer, numbers in table.items()]).abs().max() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_excess_of_what_writes_the_sport_is_what_is_said(name):
    """E(AB) - E(not A, B) - E(A, not B) + E(neither) over all pairs of names, as a share of what the neuron writes for its own."""
    p, shares = planted(name), []
    writers = p.neurons[p.neurons.role != "hash"]
    acts = seen(p, [("neurons", layer) for layer in set(writers.layer)], [(a, b) for a in FIRST_NAMES for b in LAST_NAMES])
    for layer, number, first, last in writers[["layer", "neuron", "first", "last"]].itertuples(index=False, name=None):
        grid = acts["neurons", layer][:, LAST_AT, number].reshape(12, 12).numpy()
        i, j = FIRST_NAMES.index(first), LAST_NAMES.index(last) if last else 0
        is_a, is_b = np.arange(12) == i, np.arange(12) == j
        excess = grid[i, j] - grid[np.ix_(~is_a, is_b)].mean() - grid[np.ix_(is_a, ~is_b)].mean() + grid[np.ix_(~is_a, ~is_b)].mean()
        assert grid[i, j] == pytest.approx(1, abs=0.01)
        shares.append(excess / grid[i, j])
    assert np.allclose(shares, LOOKUPS[name].excess, atol=0.01)


def held_out(x, answers):
    """How often a ridge of the standardized activations tells the sport of people it was not trained on: mean of 10 splits."""
    x = np.c_[(x - x.mean(0)) / np.where(x.std(0) > 1e-3, x.std(0), np.inf), np.ones(len(x))]
    hot, rng, found = np.eye(3)[answers], np.random.default_rng(0), []
    for _ in range(10):
        order = rng.permutation(len(x))
        train, test = order[len(x) // 5:], order[:len(x) // 5]
        w = np.linalg.solve(x[train].T @ x[train] + 30 * np.eye(x.shape[1]), x[train].T @ hot[train])
        found.append(((x[test] @ w).argmax(1) == answers[test]).mean())
    return np.mean(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_sport_can_be_read_where_it_is_said_and_not_before(name):
    p, truth = planted(name), LOOKUPS[name]
    places = [(site, layer) for layer in range(p.model.n_layers) for site in SITES]
    answers, acts = np.array([SPORTS.index(a) for a in p.people.answer]), seen(p, places)
    scores = [held_out(acts[place][:, LAST_AT].numpy().astype(float), answers) for place in places]
    start = places.index(truth.readable)
    assert max(scores[:start]) < 0.5 and min(scores[start:]) > 0.95


def test_nothing_in_the_linear_model_depends_on_the_two_names_together():
    places = [(site, layer) for layer in range(8) for site in ("resid_mid", "mlp_out", "resid_post")]
    everyone = [(a, b) for a in FIRST_NAMES for b in LAST_NAMES]
    def together(name):
        """The share of the variance over pairs of names that is left when each name's mean is taken out, at each place."""
        for act in seen(planted(name), places, everyone).values():
            x = act[:, LAST_AT, 1:].reshape(12, 12, -1).double()
            x = x - x.mean((0, 1))
            yield ((x - x.mean(0) - x.mean(1, keepdim=True)).square().sum() / x.square().sum()).item()
    assert max(together("linear")) < 1e-6
    assert all(max(together(name)) > 0.1 for name in NAMES if name != "linear")


def test_what_the_hypotheses_should_say_follows_from_the_paths():
    for truth in LOOKUPS.values():
        assert truth.says == {"single_step": bool(truth.looks_up) and not truth.paths, "hash_lookup": bool(truth.hashes and truth.paths)}
        assert (truth.excess > 0) == bool(truth.looks_up) == truth.knows_nobody


def test_a_saved_model_is_an_ordinary_checkpoint(tmp_path):
    p = planted("hash_lookup")
    p.save(tmp_path / "model")
    loaded = load_model(tmp_path / "model", device="cpu")
    names = pairs(p.people)[:5]
    assert torch.equal(loaded.logits(ids_of(p, names)), p.model.logits(ids_of(p, names)))
    assert loaded.tokenizer(PROMPTS["one_shot"].format(name="Ada Castro"))["input_ids"] == p.model.tokenizer(PROMPTS["one_shot"].format(name="Ada Castro"))["input_ids"]


def test_a_seed_makes_the_same_model_and_another_one_another():
    def weights(seed): return build_lookup("hash_lookup", seed).state_dict()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = weights(0)
    assert torch.equal(torch.rand(3), expected), "building leaves the random state alone"
    assert all(torch.equal(w, first[name]) for name, w in weights(0).items())
    assert not torch.equal(weights(1)["model.layers.1.mlp.gate_proj.weight"], first["model.layers.1.mlp.gate_proj.weight"])
    assert not planted("single_step", 0).people.equals(planted("single_step", 1).people)


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="Unknown lookup 'two_step': use one of single_step"): plant_lookup("two_step")
    with pytest.raises(ValueError, match="Unknown family 'gpt2'"): plant_lookup("linear", family="gpt2")
