"""`bizzaroworld features`, end to end on an embedded model: the folder, going on with it, what is refused."""
import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.cli import app
from bizzaroworld.commands.features_run import POSITIONS, features_lines, known_facts, run_features
from bizzaroworld.dictionaries.recipes import Recipe
from bizzaroworld.dictionaries.saes import DictionaryError, perfect
from bizzaroworld.dictionaries.sae_files import save_sae
from bizzaroworld.model.load import load_model
from bizzaroworld.study.runs import RunError

SMALL = {"tokens": 20_000, "most": 8}


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def folder(nano, tmp_path_factory):
    return run_features(nano, out=tmp_path_factory.mktemp("features") / "run", **SMALL)


@pytest.mark.slow
def test_a_run_leaves_every_table_the_page_and_the_figures(nano, folder):
    there = {path.name for path in folder.iterdir()}
    names = {"scores", "frequency", "one_direction", "axes", "frontier", "agreement", "phases", "steering"} | {f"{t}_{p}" for p in POSITIONS for t in ("ablate", "patch", "joint", "flips")}
    assert {f"{n}.csv" for n in names} | {"features.html", "about.json", "run.json"} <= there
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert {path.name for path in (folder / "figures").glob("*.png")} == set(captions) and len(captions) >= 4 and all(c["caption"] and c["alt"] for c in captions.values())
    joint = pd.read_csv(folder / "joint_entity.csv").set_index(["dictionary", "what"])
    assert joint.share["dictionary", "site"] == pytest.approx(1) and abs(joint.share["dictionary", "features"]) > abs(joint.share["random directions", "features"])
    assert "features for each token explain" in "\n".join(features_lines(folder))
    phases = pd.read_csv(folder / "phases.csv")
    assert phases.layer.nunique() >= 6


@pytest.mark.slow
def test_a_run_that_was_stopped_makes_only_what_is_missing(nano, folder):
    before = {path: path.read_bytes() for path in folder.glob("*.csv")}
    for name in ("flips_final", "frontier"): (folder / f"{name}.csv").unlink()
    told = []
    run_features(nano, out=folder, progress=lambda done, total, what: told.append(what), **SMALL)
    assert told == ["frontier", "flips_final"] and {path: path.read_bytes() for path in folder.glob("*.csv")} == before
    with pytest.raises(RunError, match="options"): run_features(nano, out=folder, tokens=20_000, most=9)


@pytest.mark.slow
def test_a_dictionary_is_trained_where_none_is_there_and_used_again(nano, tmp_path):
    recipe = Recipe("relu", 64, sparsity=0.5, steps=30, batch=256)
    folder = run_features(nano, site="mlp_out", layer=2, recipe=recipe, out=tmp_path / "run", tokens=10_000, most=6)
    assert (folder / "sae" / "cfg.json").exists() and pd.read_csv(folder / "history.csv").step.tolist() == [30]
    made = (folder / "sae" / "sae_weights.safetensors").stat().st_mtime_ns
    run_features(nano, site="mlp_out", layer=2, recipe=recipe, out=tmp_path / "run", tokens=10_000, most=6)
    assert (folder / "sae" / "sae_weights.safetensors").stat().st_mtime_ns == made


def test_a_dictionary_that_does_not_fit_is_refused_before_anything_is_written(nano, tmp_path):
    save_sae(perfect(16, "resid_post", 2), tmp_path / "small")
    with pytest.raises(DictionaryError, match="16"): run_features(nano, sae=tmp_path / "small", layer=2, out=tmp_path / "run", tokens=5_000)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DictionaryError, match="MODEL/SOURCE"): run_features(nano, public="x", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_facts_are_those_that_the_model_knows(nano):
    facts = known_facts(nano, load_battery(), 5)
    assert len(facts) == 5 and len({tp.id for tp in facts}) == 5


def test_the_command_says_in_a_sentence_what_is_wrong(tmp_path):
    def say(*args): return " ".join(CliRunner().invoke(app, ["features", "--out", str(tmp_path / "r"), *args]).output.split())
    assert "Unknown kind of dictionary 'deep'" in say("--train", "--kind", "deep")
    assert "There is no text at" in say("--text", str(tmp_path / "nothing"))
