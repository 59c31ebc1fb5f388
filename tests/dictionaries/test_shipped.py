"""The dictionaries that come with the package: all there, small, of the models they name, and worth having."""
import pytest
import torch

from bizzaroworld.commands.features_run import place_of
from bizzaroworld.dictionaries.recipes import Recipe
from bizzaroworld.dictionaries.sae_files import load_sae
from bizzaroworld.dictionaries.saes import DictionaryError
from bizzaroworld.dictionaries.scores import score
from bizzaroworld.dictionaries.shipped import RECIPE, SHIPPED, folder_of, layer_for, make, shipped, shipped_control, shipped_for, text_of
from bizzaroworld.dictionaries.splicing import check_fit
from bizzaroworld.files import data_path
from bizzaroworld.model.load import load_model, untrained


def test_all_are_there_and_fit_their_models():
    for name, places in SHIPPED.items():
        model = load_model(name.removeprefix("untrained "))
        for place in places:
            sae = shipped(name, *place)
            check_fit(sae, model)
            assert sae.reads == sae.writes == place and sae.kind == RECIPE.kind and sae.k == RECIPE.k and sae.n_features == RECIPE.n_features
    there = {(f.parent.parent.name, f.parent.name) for f in data_path("dictionaries").glob("*/*/cfg.json")}
    assert there == {(name.replace(" ", "-"), f"{s}-{l}") for name, places in SHIPPED.items() for s, l in places}


def test_together_they_are_small():
    assert sum(f.stat().st_size for f in data_path("dictionaries").rglob("*") if f.is_file()) < 20e6


def test_one_in_the_middle_of_nano_explains_text_it_was_not_trained_on():
    model = load_model("bizzaro-nano")
    text = text_of(model)  # the cut that it was trained on, of which a part was held out
    assert not {tuple(row) for row in text.ids.tolist()} & {tuple(row) for row in text.held.tolist()}
    sae = shipped("bizzaro-nano", "resid_post", 3)
    rows = score(model, sae, text.held[:16], text.lead, positions=8).set_index("score").value
    assert rows.explained > 0.8 and rows.l0 == pytest.approx(16, abs=0.5) and rows.recovered > 0.9


def test_one_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(DictionaryError, match="No dictionary of z of layer 3 .* resid_post of layer 0"): shipped("bizzaro-nano", "z", 3)
    with pytest.raises(DictionaryError, match="There are: none"): shipped("gemma-3-270m")
    assert shipped_for("gemma-3-270m") == []


def test_the_package_and_the_command_mean_the_same_layer_where_none_is_said():
    for name, layer in (("bizzaro-nano", 3), ("bizzaro-nano-local", 4)):
        assert shipped(name).writes == place_of(load_model(name), None, "resid_post", None) == ("resid_post", layer)
    assert shipped("bizzaro-nano", "attn_out").writes == place_of(load_model("bizzaro-nano"), None, "attn_out", None) == ("attn_out", 4)
    assert place_of(load_model("bizzaro-nano"), None, "mlp_out", None) == ("mlp_out", 3) and place_of(load_model("bizzaro-nano"), None, "mlp_out", 6) == ("mlp_out", 6)
    assert [layer_for("gemma-3-270m", "resid_post", n) for n in (18, 26, 7, 1, 0)] == [8, 12, 3, 0, None]


def test_a_control_is_there_where_one_of_the_same_place_comes_along(monkeypatch):
    control = shipped_control("bizzaro-nano", ("resid_post", 1))
    assert control.model == "untrained bizzaro-nano" == untrained(load_model("bizzaro-nano")).name and not torch.equal(control.W_dec, shipped("bizzaro-nano", "resid_post", 1).W_dec)
    assert shipped_control("bizzaro-nano", ("attn_out", 4)) is None and shipped_control("bizzaro-nano-local", ("resid_post", 1)) is None
    monkeypatch.setitem(SHIPPED, "untrained bizzaro-nano-local", [("resid_post", 6)])
    for part, instead in (("load_sae", lambda folder: folder), ("folder_of", lambda *of: of)): monkeypatch.setattr(f"bizzaroworld.dictionaries.shipped.{part}", instead)
    assert shipped_control("bizzaro-nano-local", ("resid_post", 6)) == ("untrained bizzaro-nano-local", ("resid_post", 6))


@pytest.mark.slow
def test_they_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("bizzaroworld.dictionaries.shipped.text_of", lambda model: text_of(model, 20_000))
    table = make("bizzaro-nano-local", tmp_path, [("resid_post", 4)], Recipe("topk", 64, k=4, steps=40, batch=256), progress=False)
    sae = load_sae(tmp_path / "bizzaro-nano-local" / "resid_post-4")
    assert sae.n_features == 64 and table.step.tolist() == [40] and table.layer.tolist() == [4]
    check_fit(sae, load_model("bizzaro-nano-local"))
    assert folder_of("bizzaro-nano-local", ("resid_post", 4)).is_dir() and torch.isfinite(sae.W_dec).all()
