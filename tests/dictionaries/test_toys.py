"""Activations whose features are known, and how it is counted what was found of them."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from bizzaroworld.dictionaries.learning import Held, train_sae
from bizzaroworld.dictionaries.saes import KINDS, DictionaryError
from bizzaroworld.dictionaries.toys import compiled, cosines, mmcs, nearest, recovery_grid, superposed, toy_recipe, toy_results, weight_grid


@pytest.fixture(scope="module")
def toy(): return superposed()


def test_a_toy_is_the_sum_of_its_features():
    toy = superposed(20, 9, 0.3, n=4000)
    torch.testing.assert_close(toy.x, sum(toy.codes[:, [i]] * toy.directions[i] for i in range(20)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(toy.directions.norm(dim=1), torch.ones(20))
    on = toy.codes > 0
    assert abs(on.float().mean() - 0.3) < 0.01 and toy.codes[on].min() >= 0.5 and toy.codes[on].max() <= 1.5 and abs(toy.codes[on].mean() - 1) < 0.01
    together = torch.corrcoef(on.float().T).fill_diagonal_(0)
    assert together.abs().max() < 0.08  # independent


def test_noise_is_added_to_everything():
    quiet, loud = superposed(8, 5, 0.2, 5000), superposed(8, 5, 0.2, 5000, noise=0.5)
    rest = loud.x - loud.codes @ loud.directions
    assert torch.equal(quiet.codes, loud.codes) and abs(rest.std() - 0.5) < 0.01 and abs(rest.mean()) < 0.01


def test_a_toy_depends_on_its_seed():
    assert torch.equal(superposed(n=50).x, superposed(n=50).x) and not torch.equal(superposed(n=50).directions, superposed(n=50, seed=1).directions)


def brute(learned, true):
    "Mean maximal cosine similarity, one pair at a time."
    def cos(a, b): return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    best = [max(cos(t, l) for l in learned) for t in true]
    return {"recall": np.mean(best), "precision": np.mean([max(cos(t, l) for t in true) for l in learned]), "found": sum(b > 0.9 for b in best), "of": len(true)}


def test_mmcs_is_its_definition():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(7, 5))
    learned = np.concatenate([3 * true[:3] + 0.1 * rng.normal(size=(3, 5)), rng.normal(size=(9, 5))])
    found = mmcs(torch.tensor(learned), torch.tensor(true))
    assert found == pytest.approx(brute(learned, true)) and 3 <= found["found"] < 7


def test_recall_and_precision_are_not_the_same():
    "Every true direction among the learned ones: recall 1; half of the learned ones are the opposite of a true one: a direction is not its opposite."
    true = torch.eye(6)
    found = mmcs(torch.cat([true, -true]), true)
    assert found["recall"] == pytest.approx(1) and found["precision"] == pytest.approx(0.5) and found["found"] == found["of"] == 6
    half = mmcs(true[:3], true)
    assert half["recall"] == pytest.approx(0.5) and half["precision"] == pytest.approx(1) and half["found"] == 3


def test_a_direction_of_no_length_is_near_nothing():
    found = cosines(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
    assert found.tolist() == [[0.0, 1.0]]


def test_nearest_tells_who_shares():
    known = superposed(3, 40, 0.5, 10)
    table = nearest(torch.stack([known.directions[0] + known.directions[1], known.directions[2]]), known)
    by_hand = (1 + known.directions[0] @ known.directions[1]).item() / (known.directions[0] + known.directions[1]).norm().item()
    assert table["learned"].tolist() == [0, 0, 1] and table["shared_by"].tolist() == [2, 2, 1] and table["cosine"].tolist() == pytest.approx([by_hand, by_hand, 1]) and table["name"].tolist() == list(known.names)


@pytest.mark.parametrize("kind", KINDS)
def test_training_recovers_planted_features(kind, toy):
    "The requirement: mean maximal cosine at least 0.9 within a minute; random directions have half of that."
    sae, _ = train_sae(Held(toy.x), toy_recipe(kind, 64, 3.2, steps=1000), progress=False)
    assert mmcs(sae.W_dec, toy.directions)["recall"] >= 0.9 and mmcs(torch.randn(64, 32, generator=torch.Generator().manual_seed(5)), toy.directions)["recall"] < 0.5


def test_features_that_are_always_on_together_are_learned_as_their_sum(toy):
    codes = toy.codes.clone()
    codes[:, 1] = codes[:, 0]
    sae, _ = train_sae(Held(codes @ toy.directions), toy_recipe("topk", 64, 3.2, steps=800), progress=False)
    both, apart = (cosines(sae.W_dec, some).max(1).values for some in (normalize(toy.directions[:2].sum(0), dim=0)[None], toy.directions[:2]))
    assert both.item() > 0.95 and apart.max() < 0.85


def test_the_grid_has_a_row_for_each_case():
    grid = recovery_grid(["topk", "random"], [8, 16], [0.1], n_features=16, d=12, steps=150, seeds=(0, 1))
    assert len(grid) == 8 and grid[["kind", "width", "active", "seed"]].drop_duplicates().shape[0] == 8
    trained, random = (grid[grid["kind"] == kind] for kind in ("topk", "random"))
    assert random["l0"].isna().all() and trained["l0"].between(0.5, 2).all() and (grid["on"] == 1.6).all()
    assert trained[trained["width"] == 16]["recall"].min() > random["recall"].max() + 0.1 and (trained[trained["width"] == 8]["found"] <= 8).all()
    again = recovery_grid(["topk"], [16], [0.1], n_features=16, d=12, steps=150, seeds=(1,))
    pd.testing.assert_frame_equal(again, trained[(trained["width"] == 16) & (trained["seed"] == 1)].reset_index(drop=True))


def test_the_table_that_ships_is_what_the_grid_gives():
    "One row of it, made again."
    table = toy_results()
    assert set(table["kind"]) == {*KINDS, "random"} and len(table) == 6 * 3 * 3 * 2
    again = recovery_grid(["topk"], [64], [0.05], seeds=(1,)).iloc[0]
    row = table.query("kind == 'topk' and width == 64 and active == 0.05 and seed == 1").iloc[0]
    assert again["recall"] == pytest.approx(row["recall"], abs=0.02) and again["unexplained"] == pytest.approx(row["unexplained"], abs=0.02)
    assert table.query("active == 0.05 and width == 64 and kind != 'random'")["recall"].min() > 0.85


def test_the_table_of_weights_that_ships_is_what_the_grid_gives():
    "One row of it, made again; and what it shows: the weight decides."
    table = toy_results("weights")
    assert len(table) == 3 * 5 * 2
    again, row = weight_grid([64], [3.0], seeds=(1,)).iloc[0], table.query("width == 64 and sparsity == 3 and seed == 1").iloc[0]
    assert again["mmcs"] == pytest.approx(row["mmcs"], abs=0.02) and again["l0"] == pytest.approx(row["l0"], rel=0.05) and list(again.index) == list(row.index)
    recall = table.query("width == 64").groupby("sparsity")["mmcs"].mean()
    assert recall[3.0] > 0.9 > 0.6 > max(recall[0.1], recall[10.0])


# --- compiled models -------------------------------------------------------------------------------------------------------------------------------

def test_the_codes_of_a_compiled_model_are_what_its_weights_say():
    "At the last name: that name, the first name that a head carried there, and the sport of those who have one."
    known = compiled(background=False)
    assert known.x.shape[0] == 144 and len(known.names) == 27
    of = {part: [i for i, name in enumerate(known.names) if name.startswith(part)] for part in ("carried", "last", "sport")}
    for part in ("carried", "last"): torch.testing.assert_close(known.codes[:, of[part]].sum(1), torch.ones(144), atol=0.05, rtol=0)
    assert known.codes[:, of["last"]].argmax(1).tolist() == list(range(12)) * 12 and known.codes[:, of["carried"]].argmax(1).tolist() == [i for i in range(12) for _ in range(12)]
    assert (known.codes[:, of["sport"]].sum(1) > 0.5).sum() == 96
    torch.testing.assert_close(known.codes @ known.directions - (known.codes @ known.directions).mean(0), known.x, atol=0.02, rtol=0)  # nothing else varies


def test_the_background_is_larger_than_what_is_known():
    known = compiled()
    rest = known.x - known.x @ known.directions.T @ known.directions
    assert rest.var(0).sum() > 2 * (known.x - rest).var(0).sum()


def test_what_is_found_of_a_compiled_model():
    "Without the background all directions are found, up to the constant that twelve of them add up to; with it, none."
    found = {}
    for background in (False, True):
        known = compiled(background=background)
        sae, table = train_sae(Held(known.x), toy_recipe("topk", 64, 3, steps=600), progress=False)
        found[background] = nearest(sae.W_dec, known)["cosine"]
        assert table["unexplained"].iloc[-1] < 0.15
    assert found[False].min() > 0.8 and found[False].mean() > 0.88 and found[True].mean() < 0.6


def test_names_and_their_kind_are_one_feature_over_all_tokens():
    known = compiled(where="all tokens", background=False)
    assert known.x.shape[0] == 144 * 7 and "kind 2" in known.names
    sae, _ = train_sae(Held(known.x), replace(toy_recipe("relu", 64, 3, steps=1000), sparsity=1.0), progress=False)
    of = {what: known.directions[[i for i, name in enumerate(known.names) if name.startswith(what)]] for what in ("first", "kind 1", "kind 2")}
    assert cosines(sae.W_dec, of["first"] + of["kind 2"] - of["kind 1"]).max(1).values.min() > 0.9 and cosines(sae.W_dec, of["first"]).max(1).values.mean() < 0.75
    first = known.codes[:, [i for i, name in enumerate(known.names) if name.startswith("first")]]
    assert torch.equal(first.sum(1) > 0.5, known.codes[:, known.names.index("kind 2")] > 0.5)  # always together


@pytest.mark.parametrize("call, match", [(lambda: superposed(active=0), "probability"), (lambda: superposed(active=1.5), "probability"), (lambda: superposed(n=0), "0 tokens"), (lambda: superposed(noise=-1), "noise -1"),
                                         (lambda: mmcs(torch.ones(3, 8), torch.ones(3, 9)), "as many dimensions"), (lambda: mmcs(torch.ones(0, 8), torch.ones(3, 8)), "as many"), (lambda: mmcs(torch.ones(8), torch.ones(3, 8)), "as many"),
                                         (lambda: compiled(where="first name"), "last name, or all tokens"), (lambda: recovery_grid(["vq"]), "Unknown kinds"), (lambda: toy_results("all"), "kinds, weights")])
def test_what_cannot_be_is_refused(call, match):
    with pytest.raises(DictionaryError, match=match): call()


def test_an_unknown_lookup_is_refused():
    with pytest.raises(ValueError, match="single_step"): compiled("none")
