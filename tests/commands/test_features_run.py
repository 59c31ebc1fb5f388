"""`bizzaroworld features`, end to end on an embedded model: the folder, going on with it, what is refused."""
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.cli import app
from bizzaroworld.commands.features_run import POSITIONS, Features, _named, features_lines, given_dictionary, known_facts, run_features, to_steer
from bizzaroworld.dictionaries.recipes import Recipe
from bizzaroworld.dictionaries.saes import DictionaryError, perfect
from bizzaroworld.dictionaries.sae_files import load_sae, save_sae
from bizzaroworld.dictionaries.shipped import shipped
from bizzaroworld.model.load import load_model
from bizzaroworld.study.runs import RunError

ALSO = [("attn_out", 4), ("resid_post", 5)]
SMALL = {"tokens": 20_000, "most": 8, "layer": 1}


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def folder(nano, tmp_path_factory):
    return run_features(nano, out=tmp_path_factory.mktemp("features") / "run", also=[shipped("bizzaro-nano", *place) for place in ALSO], **SMALL)


@pytest.mark.slow
def test_a_run_leaves_every_table_the_page_and_the_figures(nano, folder):
    there = {path.name for path in folder.iterdir()}
    names = {"scores", "controls", "frequency", "axes", "frontier", "agreement", "attention", "phases", "enough", "steering"} | {f"{t}_{p}" for p in POSITIONS for t in ("ablate", "patch", "joint", "flips")}
    assert {f"{n}.csv" for n in names} | {"features.html", "about.json", "run.json"} <= there
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert {path.name for path in (folder / "figures").glob("*.png")} == set(captions) and len(captions) >= 4 and all(c["caption"] and c["alt"] for c in captions.values())
    joint = pd.read_csv(folder / "joint_entity.csv").set_index(["dictionary", "what"])
    assert joint.share["dictionary", "site"] == pytest.approx(1) and abs(joint.share["dictionary", "features"]) > abs(joint.share["random directions", "features"])
    told = "\n".join(features_lines(folder))
    assert "of held-out text" in told and "features for each token explain" in told and json.loads((folder / "about.json").read_text())["unseen"] is True
    assert set(joint.index.unique("dictionary")) == {"dictionary", "random directions", "shuffled", "untrained model"} and abs(joint.share["dictionary", "features"]) > abs(joint.share["untrained model", "features"])
    controls, scores = pd.read_csv(folder / "controls.csv").set_index(["dictionary", "score"]), pd.read_csv(folder / "scores.csv").set_index("score")
    assert all(controls.value["dictionary", name] == scores.value[name] for name in ("explained", "change", "recovered", "l0")) and set(controls.index.unique("dictionary")) == set(joint.index.unique("dictionary"))
    assert controls.value["dictionary", "explained"] > controls.value["untrained model", "explained"] > controls.value["random directions", "explained"] and controls.value["dictionary", "recovered"] > controls.value["untrained model", "recovered"]
    assert f"untrained model {controls.value['untrained model', 'explained']:.2f} [" in told and f"({controls.value['untrained model', 'change']:+.3f} nats)" in told
    (without := folder.parent / "older").mkdir()
    for name in ("about.json", "scores.csv", *(f"joint_{p}.csv" for p in POSITIONS)): (without / name).write_bytes((folder / name).read_bytes())
    assert not any("its controls explain" in line for line in features_lines(without)), "a folder that was made before has no such table"
    phases, heads = pd.read_csv(folder / "phases.csv"), pd.read_csv(folder / "attention.csv")
    assert set(zip(phases.site, phases.layer)) == {("resid_post", 1), *ALSO} and set(zip(heads.site, heads.layer)) == {ALSO[0]} and heads.total.abs().is_monotonic_decreasing


@pytest.mark.slow
@pytest.mark.weekly
def test_a_run_that_was_stopped_makes_only_what_is_missing(nano, folder):
    before = {path: path.read_bytes() for path in folder.glob("*.csv")}
    for name in ("flips_final", "frontier"): (folder / f"{name}.csv").unlink()
    told = []
    run_features(nano, out=folder, progress=lambda done, total, what: told.append(what), also=[shipped("bizzaro-nano", *place) for place in ALSO], **SMALL)
    assert told == ["frontier", "flips_final"] and {path: path.read_bytes() for path in folder.glob("*.csv")} == before
    with pytest.raises(RunError, match="options"): run_features(nano, out=folder, **SMALL | {"most": 9})


@pytest.mark.slow
def test_a_dictionary_is_trained_where_none_is_there_and_used_again(nano, tmp_path):
    recipe = Recipe("relu", 64, sparsity=0.5, steps=30, batch=256)
    few = {"site": "mlp_out", "layer": 2, "recipe": recipe, "out": tmp_path / "run", "tokens": 10_000, "most": 6, "also": [shipped("bizzaro-nano", "resid_post", 4)], "untrained": True}
    folder = run_features(nano, **few)
    assert "untrained model" in set(pd.read_csv(folder / "joint_final.csv").dictionary) and not torch.equal(*(load_sae(folder / name).W_dec for name in ("sae", "sae-untrained")))
    assert (folder / "sae" / "cfg.json").exists() and pd.read_csv(folder / "history.csv").step.tolist() == [30]
    made = (folder / "sae" / "sae_weights.safetensors").stat().st_mtime_ns
    run_features(nano, **few)
    assert (folder / "sae" / "sae_weights.safetensors").stat().st_mtime_ns == made


def test_a_dictionary_that_does_not_fit_is_refused_before_anything_is_written(nano, tmp_path):
    save_sae(perfect(16, "resid_post", 2), tmp_path / "small")
    with pytest.raises(DictionaryError, match="16"): run_features(nano, sae=tmp_path / "small", layer=2, out=tmp_path / "run", tokens=5_000)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DictionaryError, match="layers are 0 to 7"): run_features(nano, layer=77, out=tmp_path / "run", tokens=5_000)
    with pytest.raises(DictionaryError, match="6 or more"): run_features(nano, most=5, out=tmp_path / "run")
    with pytest.raises(DictionaryError, match="MODEL/SOURCE"): run_features(nano, public="x", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@torch.no_grad()
def test_a_dictionary_says_where_it_belongs_and_another_one_is_another_run(nano, tmp_path):
    save_sae(shipped("bizzaro-nano", "attn_out", 6), tmp_path / "saved")
    assert given_dictionary(nano, tmp_path / "saved", None, None).writes == ("attn_out", 6)
    with pytest.raises(DictionaryError, match="Leave the layer out"): given_dictionary(nano, tmp_path / "saved", None, 2)
    sae = shipped("bizzaro-nano", "resid_post", 4)
    others = [replace(sae, k=4), replace(sae, scale=2 * sae.scale), replace(sae, kind="relu", k=None), replace(sae, b_in=None)]
    assert len({_named(one) for one in (sae, *others)}) == 5 and _named(sae) == _named(replace(sae, source="elsewhere"))


def test_facts_are_those_that_the_model_knows(nano):
    "Both answers preferred, by the bare model's own logits; a pair with its answers exchanged is not known."
    pairs = load_battery()
    facts = known_facts(nano, [*pairs[:12], *(replace(p, id=f"{p.id}-wrong", clean_target=p.corrupt_target, corrupt_target=p.clean_target) for p in pairs[:12])], 99)
    def ld(tp, ids): return (lambda logits: float(logits[tp.clean_target_id] - logits[tp.corrupt_target_id]))(nano.hf(torch.tensor([ids])).logits[0, -1])
    assert len(facts) >= 8 and not any(tp.id.endswith("-wrong") for tp in facts) and all(ld(tp, tp.clean_ids) > 0 > ld(tp, tp.corrupt_ids) for tp in facts)
    swings = [ld(tp, tp.clean_ids) - ld(tp, tp.corrupt_ids) for tp in facts]
    assert swings == sorted(swings, reverse=True) and [tp.id for tp in known_facts(nano, pairs[:12], 5)] == [tp.id for tp in facts[:5]]


@pytest.mark.slow
@pytest.mark.weekly
def test_where_too_few_facts_share_answers_vectors_are_made_of_other_wordings(nano, monkeypatch):
    facts = known_facts(nano, load_battery(), 20)
    run = Features(nano, None, shipped("bizzaro-nano", "resid_post", 4), [], None, None, facts)
    assert to_steer(run)[2] == "paired facts"
    def none(*args, **kwargs): raise ValueError("none")
    monkeypatch.setattr("bizzaroworld.commands.features_run.held_out", none)
    made_of, tried, name = to_steer(run)
    assert "other wordings" in name and len(tried) >= 6 and {tp.id for tp in tried} <= {tp.id for tp in facts}
    assert not {tp.clean_ids for tp in made_of} & {tp.clean_ids for tp in tried} and {a for tp in tried for a in tp.answers} <= {a for tp in made_of for a in tp.answers}
    with pytest.raises(ValueError, match="too few facts right in other wordings"): to_steer(replace(run, facts=facts[:2]))


def test_the_command_says_in_a_sentence_what_is_wrong(tmp_path):
    def say(*args): return " ".join(CliRunner().invoke(app, ["features", "--out", str(tmp_path / "r"), *args]).output.split())
    assert "Unknown kind of dictionary 'deep'" in say("--train", "--kind", "deep")
    assert "There is no text at" in say("--text", str(tmp_path / "nothing"))
