"""A model that is spread over devices and the disk is the same model; what cannot be spread is refused in words."""
import gc
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.circuits.attribution import attribution
from bizzaroworld.cli import app
from bizzaroworld.model import devices
from bizzaroworld.model.devices import main_device
from bizzaroworld.model.load import load_model
from bizzaroworld.model.names import ModelError
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch.noise import Noise
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.scale.processes import source_of
from bizzaroworld.scale.workers import CrewError

TOP = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


def layers(where): return TOP | {f"model.layers.{i}": where(i) for i in range(8)}


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where scratch folders are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def whole(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def pairs(whole): return [align(whole, pair) for pair in load_battery()[:2]]


@pytest.mark.parametrize("where", [lambda i: "cpu" if i % 2 else "disk", lambda i: "disk", lambda i: "cpu"], ids=["every other layer", "all on the disk", "none"])
def test_what_lies_on_the_disk_is_swept_as_the_rest(whole, pairs, scratch, where):
    parted = load_model("bizzaro-nano", device=layers(where))
    assert {p.is_meta for n, p in parted.hf.named_parameters() if "layers.0." in n} == {where(0) == "disk"}
    assert parted.weights_sha256 == whole.weights_sha256 and parted.dtype == whole.dtype and parted.sites == whole.sites and parted.limits == whole.limits
    asked = grid(whole, ["resid_pre", "q", "z", "mlp_out"], "entity") + grid(whole, ["resid_post"], "final")
    for direction in ("noising", "denoising"):
        one, two = (sweep(model, pairs, asked, direction, progress=False) for model in (whole, parted))
        np.testing.assert_array_equal(one.patched, two.patched)
        assert len(np.unique(one.patched.round(3))) > 50
    noise = Noise("entity", 3.0, 2).measured(whole, pairs)
    np.testing.assert_array_equal(*(sweep(model, pairs, asked[:8], "denoising", noise=noise, metrics=["kl"], progress=False).patched for model in (whole, parted)))


def test_estimates_run_back_through_it(whole, pairs, scratch):
    parted = load_model("bizzaro-nano", device=layers(lambda i: "disk" if i > 3 else "cpu"))
    one, two = (attribution(model, pairs[:2]).to_frame() for model in (whole, parted))
    np.testing.assert_allclose(one.effect, two.effect, atol=1e-5)
    assert one.effect.abs().max() > 0.1


def test_its_scratch_goes_with_it(scratch):
    before = set(scratch.iterdir())
    parted = load_model("bizzaro-nano", device=layers(lambda i: "disk"))
    assert len(set(scratch.iterdir()) - before) == 1
    parted.close()
    del parted
    gc.collect()
    assert set(scratch.iterdir()) == before


def test_auto_takes_what_there_is(whole, pairs, scratch):
    spread = load_model("bizzaro-nano", device="auto")
    asked = grid(whole, ["mlp_out"], "entity")
    np.testing.assert_array_equal(*(sweep(model, pairs, asked, progress=False).patched for model in (whole, spread)))
    assert main_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("map, why", [
    (layers(lambda i: "cpu") | {"lm_head": "disk"}, "'lm_head' would lie on the disk"), (layers(lambda i: "cpu") | {"model.embed_tokens": "disk"}, "'model.embed_tokens' would lie on the disk"),
    ({"": "disk"}, "would lie on the disk"), (layers(lambda i: "cuda:1"), "no cuda device here"), (layers(lambda i: 0), "no accelerator here that could be number 0"), ({"model": "dsk"}, "Unknown device 'dsk'"),
    ({}, "by their names"), ({1: "cpu"}, "by their names"), ({"model": ["cpu"]}, "Unknown device"), ({"": "meta"}, "Nothing can be run on meta"), ({"": None}, "Unknown device None"),
    ({"": "cpu", "nonsense": "disk"}, "'nonsense', which is no part"), ({"": "cpu", "model": "disk"}, "'model', which lies in it"),
    (TOP | {"model.layers": "cpu", "model.layers.0.self_attn": "disk"}, "which lies in it")], ids=str)
def test_maps_that_cannot_be_are_told_and_leave_nothing(scratch, map, why):
    with pytest.raises(ModelError, match=why): load_model("bizzaro-nano", device=map)
    assert not list(scratch.glob("bizzaroworld-*"))


def test_a_map_that_misses_a_part_is_told_and_leaves_nothing(scratch):
    with pytest.raises(ModelError, match="layers.7"): load_model("bizzaro-nano", device={k: v for k, v in layers(lambda i: "cpu").items() if k != "model.layers.7"})
    assert not list(scratch.glob("bizzaroworld-*"))


def test_what_else_cannot_be_spread(monkeypatch, scratch):
    with pytest.raises(CrewError, match="leaves none for another worker"): source_of("bizzaro-nano", 2, "auto")
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install accelerate"): load_model("bizzaro-nano", device="auto")


@pytest.mark.slow
def test_a_study_of_a_spread_model(scratch, tmp_path):
    battery = tmp_path / "three.json"
    battery.write_text(json.dumps([vars(pair) for pair in load_battery()[:3]]))
    done = CliRunner().invoke(app, ["study", "--device", "auto", "--battery", str(battery), "--controls", "none", "--no-report", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0 and (tmp_path / "run" / "summary.json").exists(), done.output
