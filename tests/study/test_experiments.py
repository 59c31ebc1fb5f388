"""The experiments are the right grids, and shared interventions are run once."""
import pytest
from tiny import LAYERS, random_pair, tiny_model

from bizzaroworld.patch.interventions import Edit, Intervention, grid
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.study.experiments import EXPERIMENTS, interventions_of, label, run_experiments


@pytest.fixture(scope="module")
def gemma(): return tiny_model("gemma")


def test_what_each_experiment_patches(gemma):
    seen = {name: {(e.site, e.position, e.head is not None) for i in interventions_of(gemma, [name]) for e in i.edits}
            for name in EXPERIMENTS}
    five = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    assert seen == {"1": {("resid_pre", "final", False)}, "3": {("resid_pre", "entity", False)},
                    "2A": {(s, "final", False) for s in five}, "2B": {(s, "entity", False) for s in five},
                    "4": {("z", "entity", True)}, "4F": {("z", "final", True)}}
    sizes = {name: len(interventions_of(gemma, [name])) for name in EXPERIMENTS}
    assert sizes == {"1": LAYERS, "2A": 5 * LAYERS, "2B": 5 * LAYERS, "3": LAYERS, "4": 4 * LAYERS, "4F": 4 * LAYERS}


def test_shared_interventions_are_run_once_and_given_to_both(gemma):
    everything = interventions_of(gemma)
    assert len(everything) == len(set(everything)) == (5 + 4) * LAYERS * 2
    frame = run_experiments(gemma, [random_pair(1)])
    counts = frame.groupby("experiment").size().to_dict()
    assert counts == {"1": LAYERS, "2A": 5 * LAYERS, "2B": 5 * LAYERS, "3": LAYERS, "4": 4 * LAYERS, "4F": 4 * LAYERS}
    for lone, shared in (("1", "2A"), ("3", "2B")):
        both = [frame[(frame.experiment == e) & (frame.site == "resid_pre")].patched.tolist() for e in (lone, shared)]
        assert both[0] == both[1]


def test_an_experiment_alone_gives_the_same_numbers(gemma):
    pair = random_pair(2)
    together, alone = run_experiments(gemma, [pair]), run_experiments(gemma, [pair], ["4F"])
    rows = together[together.experiment == "4F"]
    assert abs(rows.patched.to_numpy() - alone.patched.to_numpy()).max() < 1e-5
    direct = sweep(gemma, [pair], [Intervention((Edit("z", 1, "final", 2),))]).patched[0, 0, 0]
    assert abs(rows[(rows.layer == 1) & (rows["head"] == 2)].patched.item() - direct) < 1e-5


def test_a_site_that_is_missing_is_left_out_of_an_experiment():
    pythia = tiny_model("pythia")
    sites = {e.site for i in interventions_of(pythia, ["2A"]) for e in i.edits}
    assert sites == {"resid_pre", "attn_out", "mlp_out", "resid_post"}


def test_unknown_experiments_are_refused(gemma):
    with pytest.raises(ValueError, match="Unknown experiment '5'"): interventions_of(gemma, ["1", "5"])
    frame = sweep(gemma, [random_pair(1)], grid(gemma, ["z"])).to_frame()
    with pytest.raises(ValueError, match="Unknown experiment"): label(frame, ["9"])
