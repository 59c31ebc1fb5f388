"""Edits by a function of what is there, by a value for each pair, and the metrics: identities and known answers."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_pair, tiny_model

from bizzaroworld.model.readout import Readout
from bizzaroworld.patch.interventions import Edit, Intervention, grid
from bizzaroworld.patch.means import mean_values
from bizzaroworld.patch.metrics import METRICS, answers_of, measured
from bizzaroworld.patch.sweep import sweep

SITES = ("resid_pre", "attn_out", "mlp_out", "z", "q", "v", "scores")


def patched(*args, **kwargs): return sweep(*args, **kwargs).patched


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("position", ["entity", "final", "all"])
def test_functions_that_are_other_sources(site, position):
    """The identity changes nothing; times zero is zero; plus a vector is that vector added. All in one sweep, on two pairs."""
    model, pairs = tiny_model("gemma3"), [random_pair(1), random_pair(2)]
    edits = [replace(i.edits[0], source="function") for i in grid(model, site, position)][:6]
    zero, added = ([replace(e, source=s) for e in edits] for s in ("zero", "added"))
    size = len(pairs[0].clean_ids) if site == "scores" else model.d_head if site in ("z", "q", "v") else model.d_model
    vector = torch.linspace(-1, 1, size)
    base = sweep(model, pairs, edits, values={e: (lambda x: x) for e in edits})
    assert np.abs(base.patched - base.clean[:, None]).max() < 1e-5
    for others, values, function in ((added, {e: vector for e in added}, lambda x: x + vector), *[(zero, {}, lambda x: 0 * x)] * (site != "scores")):
        asked = [*edits, *others]
        found = patched(model, pairs, asked, values={**values, **{e: function for e in edits}})
        assert np.abs(found[:, :len(edits)] - found[:, len(edits):]).max() < 1e-5
        assert np.abs(found - base.clean[:, None]).max() > 1e-3


def test_a_function_beside_edits_of_other_kinds():
    """In one layer and site, a donor, a zero and two functions keep apart; each is what it is alone."""
    model, pairs = tiny_model("gemma"), [random_pair(1), random_pair(2)]
    half, cap = Edit("resid_pre", 1, "final", source="function"), Edit("resid_pre", 1, "entity", source="function")
    functions = {half: lambda x: x / 2, cap: lambda x: x * (0.5 / x.norm(dim=-1, keepdim=True)).clamp(max=1)}
    asked = [half, Edit("resid_pre", 1, "final"), Edit("resid_pre", 1, "entity", source="zero"), cap, Intervention((half, cap))]
    together = patched(model, pairs, asked, values=functions)
    for column, one in enumerate(asked): assert np.abs(together[:, column] - patched(model, pairs, one, values=functions)[:, 0]).max() < 1e-5
    assert len({round(float(x), 4) for x in together[0, :, 0]}) == len(asked)


def test_a_direction_projected_out_is_gone():
    model, tp = tiny_model("gpt2"), random_pair(1)
    direction = torch.nn.functional.normalize(torch.linspace(-1, 2, model.d_model), dim=0)
    edit, seen = Edit("resid_post", 1, "entity", source="function"), []
    def out(x): return x - (x @ direction)[:, None] * direction
    with model.hooked([("resid_pre", 2, lambda act: seen.append(act.clone()))]): sweep(model, tp, edit, values={edit: out}, progress=False)
    parts = torch.cat([s.flatten(0, 1) @ direction for s in seen[-1:]])
    assert parts.abs().min() < 1e-5 < parts.abs().max()


def test_a_value_for_each_pair_is_its_donors():
    """Each pair is given its own corrupted activation, which is what a donor does."""
    model, pairs = tiny_model("gemma3"), [random_pair(1), random_pair(2)]
    for edit in (Edit("resid_pre", 1, "entity", source="given"), Edit("z", 2, "final", source="given"), Edit("k", 1, "entity", 0, source="given")):
        values = {edit: {tp.id: mean_values(model, tp, edit, "corrupt")[edit] for tp in pairs}}
        wanted = patched(model, pairs, replace(edit, source="donor"))
        assert np.abs(patched(model, pairs, edit, values=values) - wanted).max() < 1e-5
        with pytest.raises(ValueError, match="nothing was given for the pair pair-2"):
            sweep(model, pairs, edit, values={edit: {"pair-1": values[edit]["pair-1"]}})


def test_what_does_not_fit_is_refused():
    model, tp = tiny_model("gemma"), random_pair(1)
    function, value = Edit("resid_pre", 1, source="function"), Edit("resid_pre", 1, source="given")
    with pytest.raises(ValueError, match="nothing was given.*function"): sweep(model, tp, function)
    with pytest.raises(ValueError, match="given as Tensor, where a function is needed"): sweep(model, tp, function, values={function: torch.zeros(32)})
    with pytest.raises(ValueError, match="given as function, where a tensor is needed"): sweep(model, tp, value, values={value: lambda x: x})
    with pytest.raises(ValueError, match="resid_pre in layer 1: the function made .*must keep the shape"):
        sweep(model, tp, function, values={function: lambda x: x[:, :3]})
    with pytest.raises(ValueError, match="given as vectors of 5, where one of 32 is needed"):
        sweep(model, tp, [Edit("resid_pre", 1), value], values={value: torch.zeros(5)})


def test_a_donors_value_undoes_what_came_before():
    """At a token where both prompts still agree a donor's value changes nothing, unless the same intervention changed what it stands on."""
    model, tp = tiny_model("gemma"), random_pair(1)
    early, p = Edit("resid_pre", 0, 1, source="zero"), tp.entity_span[0] - 1
    assert p > 1
    undo = Intervention((early, *(Edit("resid_pre", 2, q) for q in range(1, p + 1))))
    done = sweep(model, tp, [early, undo, Edit("resid_pre", 2, p)])
    alone, undone, nothing = done.patched[0, :, 0] - done.clean[0, 0]
    assert nothing == 0 and abs(alone - undone) > 1e-4


# --- metrics

class Given(Readout):
    """Hidden states are the logits, and pass by in parts of five."""
    def __call__(self, x, columns=None): return x if columns is None else x.gather(-1, columns)
    def slices(self, x): yield from x.split(5, -1)
    def weighted(self, weights): return None


READOUT = Given(None)


def direct(logits, clean, corrupt, reference):
    """Every metric of one row of logits, spelled out."""
    p, q = logits.softmax(-1), reference.softmax(-1)
    a, b = p[list(clean)].sum(), p[list(corrupt)].sum()
    return {"ld": (a / b).log(), "prob": a, "logprob": a.log(), "prob_diff": a - b, "rank": float(sum(logits > logits[list(clean)].max())),
            "kl": (q * (q / p).log()).sum()}


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_metrics_of_sets(seed, a, b):
    """Sets of any sizes beside each other, in one call, against every metric spelled out; sets of one are the plain targets."""
    g = torch.Generator().manual_seed(seed)
    logits, clean_run = torch.randn(2, 12, generator=g) * 3, torch.randn(2, 12, generator=g)
    order = torch.randperm(12, generator=g).tolist()
    tp = replace(random_pair(1), clean_answers=tuple(order[:a]), corrupt_answers=tuple(order[a:a + b]))
    single = replace(random_pair(2), clean_target_id=order[0], corrupt_target_id=order[1])
    names = list(METRICS)
    found = measured(READOUT, logits[:, None], answers_of([tp, single]), clean_run[:, None], names)
    for row, (clean, corrupt) in zip(range(2), (tp.answers, single.answers)):
        wanted = direct(logits[row], clean, corrupt, clean_run[row])
        assert found[row].tolist() == pytest.approx([float(wanted[m]) for m in names], abs=1e-4, rel=1e-4)
    only = measured(READOUT, logits[:, None], answers_of([tp, single]), clean_run[:, None], ["ld"])
    assert torch.allclose(only[:, 0], found[:, names.index("ld")], atol=1e-5), "two columns and the whole vocabulary disagree"
    assert found[1, names.index("ld")].item() == pytest.approx((logits[1, order[0]] - logits[1, order[1]]).item(), abs=1e-5)


def test_sets_of_one_in_a_sweep_equal_the_targets():
    model, tp = tiny_model("gemma3"), random_pair(1)
    same = replace(tp, clean_answers=(tp.clean_target_id,), corrupt_answers=(tp.corrupt_target_id,))
    asked = grid(model, ["resid_pre", "z"], ["entity", "final"])
    one, other = (sweep(model, p, asked, metrics=tuple(METRICS)) for p in (tp, same))
    assert np.array_equal(one.patched, other.patched) and np.array_equal(one.clean, other.clean)


@pytest.mark.parametrize("direction, sign", [("noising", 1), ("denoising", -1)])
def test_kl_is_positive_away_from_the_clean_run(direction, sign):
    """It is zero on the clean run. Patching into it can only raise it; putting all of the clean run into the corrupted one takes all of it away."""
    model, tp = tiny_model("gemma"), random_pair(1)
    done = sweep(model, tp, Edit("resid_post", model.n_layers - 1, "final"), direction, metrics=("kl",))
    effect = (done.patched[0, 0] - (done.clean if direction == "noising" else done.corrupt)[0])[0]
    assert abs(done.clean[0, 0]) < 1e-6 and done.corrupt[0, 0] > 1e-4 and effect == pytest.approx(sign * done.corrupt[0, 0], abs=1e-5)


def test_a_metric_named_twice_is_measured_twice():
    model, tp = tiny_model("gemma"), random_pair(1)
    found = sweep(model, tp, Edit("resid_pre", 1, "entity"), metrics=("ld", "kl", "ld", "kl_of_mean", "kl_of_mean"))
    assert (found.patched[..., [0, 3]] == found.patched[..., [2, 4]]).all() and found.clean[0, 0] == found.clean[0, 2] != 0


def test_a_token_named_twice_is_once_in_a_set():
    model, tp, edit, metrics = tiny_model("gemma"), random_pair(1), Edit("resid_pre", 1, "entity"), ("ld", "prob", "rank")
    once, twice = (sweep(model, replace(tp, clean_answers=a), edit, metrics=metrics).patched for a in ((5, 9), (5, 9, 5)))
    assert np.abs(once - twice).max() < 1e-6


class Halves:
    """Like a dataclass: what compares by value has no hash."""
    __hash__ = None
    def __call__(self, x): return x / 2


def test_what_can_be_called_need_not_be_hashable_and_must_make_a_tensor():
    model, tp, edit = tiny_model("gpt2"), random_pair(1), Edit("attn_out", 1, "final", source="function")
    given = replace(edit, source="given")
    assert np.abs(patched(model, tp, edit, values={edit: Halves()}) - patched(model, tp, edit, values={edit: lambda x: x / 2})).max() == 0
    with pytest.raises(ValueError, match="the function made NoneType, where a tensor"): sweep(model, tp, edit, values={edit: lambda x: None})
    with pytest.raises(ValueError, match="the function made ndarray, where a tensor"): sweep(model, tp, edit, values={edit: lambda x: x.numpy()})
    with pytest.raises(ValueError, match="= given: given as list, where a tensor"): sweep(model, tp, given, values={given: [0.0] * 32})
