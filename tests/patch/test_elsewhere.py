"""Nothing is made on the wrong device: sweeps and estimates with the model on a second device that only seems to be one. The numbers are the CPU's."""
import numpy as np
import pytest
import torch
from elsewhere import Elsewhere, MeetError, is_there, put
from tiny import random_pair, tiny_hf

from bizzaroworld.battery.builder import read_answers
from bizzaroworld.circuits.atp_star import atp_star
from bizzaroworld.circuits.attribution import attribution
from bizzaroworld.circuits.paths import edges, path_effects
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention, grid
from bizzaroworld.patch.noise import Noise
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.study.experiments import interventions_of


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """A GPU's free memory cannot be asked here."""
    for room in ("patch.forecast", "circuits.gradients"): monkeypatch.setattr(f"bizzaroworld.{room}.free_bytes", lambda device: 2**30)


def both(name, work):
    """What some work gives on the CPU, and there."""
    model = load_model(tiny_hf(name))
    here = work(model)
    put(model.hf)
    with Elsewhere() as mode:
        assert model.device.type == "cuda"
        there = work(model)
    assert mode.calls > 100
    return here, there


def test_the_second_device_notices():
    with Elsewhere():
        a, b = torch.ones(3, device="cuda"), torch.ones(3)
        assert a.device.type == "cuda" and (a + a).device.type == "cuda" and b.device.type == "cpu" and a.to("cpu").device.type == "cpu" and b.to(a.device).device.type == "cuda"
        for wrong in (lambda: a + b, lambda: torch.cat([a, b]), lambda: a.numpy(), lambda: torch.where(b > 0, a, a)):
            with pytest.raises(MeetError): wrong()
        c = torch.zeros(3)
        c.copy_(a)
        assert not is_there(c) and a[torch.tensor([0, 1])].device.type == "cuda" and (a * torch.tensor(2.0)).device.type == "cuda"


NAMES = ["gemma", "gemma2", "gemma3", "llama", "mistral", "qwen3", "olmo2", "gpt2", "pythia"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_study_of_pairs_of_two_lengths(name, direction):
    pairs = [random_pair(1), random_pair(2, 11), random_pair(3)]
    here, there = both(name, lambda model: sweep(model, pairs, interventions_of(model), direction, metrics=["ld", "kl", "rank", "prob"], progress=False).patched)
    np.testing.assert_allclose(here, there, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma3", "llama", "gpt2"])
def test_every_source_and_site(name):
    def work(model):
        wide = ("resid_pre", "attn_out", "mlp_out")
        edits = [Edit(site, 1, "entity", source=source) for site in model.all_sites for source in ("donor", "zero", *["given", "added"] * (site in wide))]
        asked = [Intervention(e) for e in edits] + [Intervention((edits[0], edits[-1]))] + grid(model, ["resid_pre", "z"], "final")
        values = {e: torch.full((model.d_model,), 0.3) for e in edits if e.source in ("given", "added")}
        return sweep(model, [random_pair(1), random_pair(2)], asked, values=values, metrics=["ld", "logprob"], progress=False).patched
    np.testing.assert_allclose(*both(name, work), atol=1e-6)


@pytest.mark.parametrize("name", ["gemma3", "pythia"])
def test_noise_estimates_and_paths(name):
    pairs = [random_pair(1), random_pair(2)]
    def work(model):
        noisy = sweep(model, pairs, grid(model, ["z"], "entity"), "denoising", noise=Noise("entity", 3.0, 3).measured(model, pairs), metrics=["ld", "kl"], progress=False).patched
        return noisy, attribution(model, pairs).to_frame().effect, atp_star(model, pairs).to_frame().effect, path_effects(model, pairs[0], edges(model)[:20]).to_frame().effect
    for here, there in zip(*both(name, work)): np.testing.assert_allclose(here, there, atol=1e-6)


def test_questions_of_a_battery():
    here, there = both("llama", lambda model: read_answers(model, [[3, 4, 5], [6, 7]], [8, 9]))
    for one, two in zip(here, there): np.testing.assert_allclose(one, two, atol=1e-6)
