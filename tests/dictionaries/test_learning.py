"""One loop for all kinds: planted features are found, and a run that is interrupted goes on bit for bit."""
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from bizzaroworld.dictionaries.harvest import Streamed, blocks, documents, store
from bizzaroworld.dictionaries.learning import Batches, Held, Training, learn, train_sae
from bizzaroworld.dictionaries.recipes import Recipe, first_parameters
from bizzaroworld.dictionaries.saes import KINDS, DictionaryError
from bizzaroworld.model.load import load_model

PLACE, PAID = ("resid_post", 0), {"relu": 1.5, "gated": 3.0, "jumprelu": 0.6}


def planted(n=64, d=32, p=0.05, tokens=20_000, seed=0):
    "Sums of few directions out of many: the tokens, the directions, and how many are on."
    rng = torch.Generator().manual_seed(seed)
    true = normalize(torch.randn(n, d, generator=rng), dim=1)
    f = (torch.rand(tokens, n, generator=rng) < p) * (0.5 + torch.rand(tokens, n, generator=rng))
    return f @ true, true


@dataclass(frozen=True, eq=False)
class Chunks:
    "Tokens in chunks; it can be made to fail."
    x: torch.Tensor
    size: int
    fails: int | None = None
    place: tuple = PLACE
    name: str = ""
    heads: int = 1
    asked: list = None
    def __len__(self): return -(-len(self.x) // self.size)
    def tokens(self, i): return len(self.x[i * self.size:(i + 1) * self.size])
    def chunk(self, i):
        if self.asked is not None: self.asked.append(i)
        if self.fails is not None and len(self.asked) > self.fails: raise KeyboardInterrupt
        return self.x[i * self.size:(i + 1) * self.size]


def recipe_for(kind, **parts): return Recipe(kind, **{"n_features": 64, "k": 3, "sparsity": PAID.get(kind, 0.0), "steps": 800, "batch": 512, "lr": 1e-2, **parts})


@pytest.fixture(scope="module")
def toy(): return planted()


@pytest.mark.parametrize("kind", KINDS)
def test_planted_features_are_found(kind, toy):
    "Mean maximal cosine similarity at least 0.9 from the true directions (0.85 from the learned ones), where the directions that training started from have less than 0.6."
    x, true = toy
    recipe = recipe_for(kind)
    sae, table = train_sae(Held(x), recipe, progress=False)
    cosines = true @ normalize(sae.W_dec, dim=1).T
    assert cosines.max(1).values.mean() >= 0.9 and cosines.max(0).values.mean() >= 0.85
    assert (true @ normalize(first_parameters(recipe, x)["W_dec"].detach(), dim=1).T).max(1).values.mean() < 0.6
    assert table["unexplained"].iloc[-1] < 0.25 < table["unexplained"].iloc[0] and table["step"].tolist() == list(range(50, 801, 50))
    # the table is about the data that came in: the dictionary on unscaled tokens loses as much, with as many features
    assert ((sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item() == pytest.approx(table["unexplained"].iloc[-1], rel=0.1)
    assert (sae.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(table["l0"].iloc[-1], rel=0.1)


@pytest.mark.parametrize("revive", ["ghost", "resample"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(kind, revive, tmp_path):
    "Bit for bit: parameters, thresholds and the table. It stops between two checkpoints, within a round, with dead features about."
    x, _ = planted(tokens=2_000)
    recipe = recipe_for(kind, n_features=200, steps=130, batch=128, dead_after=20, revive=revive)
    whole, table = train_sae(Chunks(x, 300), recipe, progress=False)
    with pytest.raises(KeyboardInterrupt): train_sae(Chunks(x, 300, fails=40, asked=[]), recipe, tmp_path, checkpoint_every=33, progress=False)
    assert (tmp_path / "checkpoint.safetensors").exists()
    again, table_again = train_sae(Chunks(x, 300), recipe, tmp_path, checkpoint_every=33, progress=False)
    for name, part in vars(whole).items(): assert torch.equal(part, getattr(again, name)) if isinstance(part, torch.Tensor) else part == getattr(again, name), name
    pd.testing.assert_frame_equal(table, table_again, check_exact=True)
    done, table_done = train_sae(Chunks(x, 300), recipe, tmp_path, progress=False)  # nothing is left to do
    assert torch.equal(done.W_dec, whole.W_dec) and table_done.equals(table)


def test_what_was_read_is_not_read_again(tmp_path):
    "A run that goes on asks for the first chunk (its scale) and for those that are still to come."
    x, _ = planted(tokens=2_000)
    recipe, asked = recipe_for("topk", steps=60, batch=100), []
    train_sae(Chunks(x, 300, asked=asked), recipe, progress=False)
    all_of_it, later = len(asked), []
    with pytest.raises(KeyboardInterrupt): train_sae(Chunks(x, 300, fails=all_of_it - 4, asked=[]), recipe, tmp_path, checkpoint_every=5, progress=False)
    train_sae(Chunks(x, 300, asked=later), recipe, tmp_path, progress=False)
    assert later[0] == 0 and later[-4:] == asked[-4:] and len(later) <= 1 + 8 < all_of_it


def test_a_round_sees_each_token_once():
    x = torch.arange(3_000.0)[:, None]
    source, recipe = Chunks(x, 500), recipe_for("topk", batch=100)
    seen = [batch for batch, _ in zip(Batches(source, recipe, 1.0).starting_at(0), range(60))]
    first, second = (torch.cat(seen[i:i + 30])[:, 0] for i in (0, 30))
    for round_ in (first, second): assert torch.equal(round_.sort().values, x[:, 0])
    assert not torch.equal(first, second) and not torch.equal(first, x[:, 0])
    # each round takes other chunks together: those that a round's first ten batches are of
    together = [set((seen[at][:, 0] // 500).int().tolist()) | set((seen[at + 9][:, 0] // 500).int().tolist()) for at in (0, 30)]
    assert len(together[0]) == len(together[1]) == 2 and together[0] != together[1]
    for start in (1, 29, 30, 47):
        assert all(torch.equal(a, b) for a, b in zip(Batches(source, recipe, 1.0).starting_at(start), seen[start:]))


def test_a_source_smaller_than_a_batch_is_one_batch():
    batch = next(Batches(Held(torch.ones(7, 2)), recipe_for("topk"), 2.0).starting_at(3))
    assert batch.shape == (7, 2) and (batch == 0.5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_directions_stay_within_the_unit_ball(kind, toy):
    x, _ = toy
    sae, _ = train_sae(Held(x), recipe_for(kind, steps=100), progress=False)
    assert sae.W_dec.norm(dim=1).max() <= 1 + 1e-6


@pytest.mark.parametrize("k", [2, 5])
def test_a_batchtopk_keeps_about_k_on_tokens_it_has_not_seen(toy, k):
    x, _ = toy
    sae, _ = train_sae(Held(x[:15_000]), recipe_for("batchtopk", k=k, steps=600), progress=False)
    on = (sae.encode(x[15_000:]) > 0).sum(1).float()
    assert on.mean().item() == pytest.approx(k, rel=0.1) and on.std() > 0.5  # on average, not for each token


def revived(revive, ghost_all=0):
    "Half of the features have a bias that keeps them from firing: which of them fire in the end, and training's last state."
    x, _ = planted(tokens=4_000)
    recipe = recipe_for("relu", sparsity=0.1, steps=400, dead_after=20, revive=revive, ghost_all=ghost_all, lr=1e-2)
    x = normalize(x[x.norm(dim=1) > 0], dim=1) * 32 ** 0.5  # none is so long that it could reach over the bias
    training = Training.fresh(recipe, x)
    with torch.no_grad(): training.made["b_enc"][:32] = -5
    batches = Batches(Held(x), recipe, 1.0).starting_at(0)
    for _ in range(300): learn(training, next(batches))
    return training


def test_dead_features_stay_dead_without_help_and_come_back_with_it():
    "Resampling puts all of them elsewhere at once; ghost gradients turn them towards what is left over, and after 300 steps a good part of them fires."
    none, ghost, resampled = (revived(revive).dead for revive in ("none", "ghost", "resample"))
    assert none[:32].all() and not none[32:].any() and not resampled.any() and ghost[:32].float().mean() < 0.75


def test_ghosts_for_all_at_the_start_change_the_start():
    "With the ablation all features get ghost gradients in the first steps, though none is dead yet."
    x, _ = planted(tokens=2_000)
    parts = dict(steps=10, batch=128, dead_after=100)
    plain, none, ghosts = (train_sae(Held(x), recipe_for("relu", **parts, revive=revive, ghost_all=n), progress=False)[0].W_dec for revive, n in (("ghost", 0), ("none", 0), ("ghost", 5)))
    assert torch.equal(plain, none) and not torch.equal(plain, ghosts)


def test_dead_share_and_l0_are_told(toy):
    x, _ = toy
    (_, table), (_, never) = (train_sae(Held(x[:2000]), recipe_for("topk", n_features=600, k=2, steps=120, dead_after=n, revive="none"), progress=False) for n in (30, 120))
    assert table.columns.tolist() == ["step", "loss", "unexplained", "l0", "dead"] and table["l0"].iloc[-1] == pytest.approx(2, abs=0.2)
    assert 0.1 < table["dead"].iloc[-1] < 1 and (never["dead"] == 0).all() and table["step"].tolist() == [50, 100, 120]


@pytest.mark.parametrize("change, named", [({"k": 4}, "recipe: k 3"), ({"seed": 1}, "recipe: seed 0"), ({"kind": "relu"}, "recipe: kind topk"), ({"steps": 9}, "recipe: steps 10")])
def test_another_recipe_in_the_same_folder_is_refused(toy, tmp_path, change, named):
    x, recipe = toy[0], recipe_for("topk", steps=10)
    train_sae(Held(x), recipe, tmp_path, progress=False)
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(DictionaryError, match=named): train_sae(Held(x), replace(recipe, **change), tmp_path, progress=False)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept


def test_another_source_in_the_same_folder_is_refused(toy, tmp_path):
    x, recipe = toy[0], recipe_for("topk", steps=10)
    train_sae(Held(x), recipe, tmp_path, progress=False)
    for other, named in ((Held(x, ("mlp_out", 3)), "place"), (Held(x, name="another"), "model"), (Held(2 * x), "scale"), (Held(x[:-1]), "tokens"), (Chunks(x, 5000), "chunks")):
        with pytest.raises(DictionaryError, match=named): train_sae(other, recipe, tmp_path, progress=False)


def test_a_damaged_checkpoint_is_refused(toy, tmp_path):
    x, recipe = toy[0], recipe_for("topk", steps=10)
    train_sae(Held(x), recipe, tmp_path, progress=False)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DictionaryError, match="damaged"): train_sae(Held(x), recipe, tmp_path, progress=False)


def test_activations_that_are_not_numbers_are_refused(toy):
    x = toy[0].clone()
    x[7, 3] = float("nan")
    with pytest.raises(DictionaryError, match="not all finite"): train_sae(Held(x), recipe_for("topk"), progress=False)
    late = torch.cat([toy[0][:1000], x[:1000]])
    with pytest.raises(DictionaryError, match="loss is nan at step"): train_sae(Chunks(late, 1000), recipe_for("topk", steps=20), progress=False)


def test_a_stream_from_a_model_is_learned_like_what_is_stored(tmp_path):
    model = load_model("bizzaro-nano")
    text = blocks(model, documents("texts"), context=32, n_tokens=3000)
    recipe = Recipe("topk", n_features=256, k=8, steps=60, batch=256)
    one, table = train_sae(Streamed(model, text, ("z", 3), rows=16), recipe, progress=False)
    two, _ = train_sae(store(model, text, [("z", 3)], tmp_path, rows=16)["z", 3], recipe, progress=False)
    assert torch.equal(one.W_dec, two.W_dec) and one.heads == two.heads == 4 and one.model == "bizzaro-nano" and one.reads == ("z", 3)
    assert table["unexplained"].iloc[-1] < table["unexplained"].iloc[0] < 1
