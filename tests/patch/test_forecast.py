"""A forecast counts what the sweep then runs; planning keeps to the budget, and finds the passes it always found."""
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import random_pair, tiny_model

from bizzaroworld.patch import engine, sweep as sweep_room, telling as room
from bizzaroworld.patch.forecast import Asked, as_asked, forecast, kept_bytes, parts_of, plan_of
from bizzaroworld.patch.interventions import Edit, Intervention, grid
from bizzaroworld.patch.noise import Noise
from bizzaroworld.patch.passes import ALIKE, SMALL, Row, Write, as_interventions, passes_of
from bizzaroworld.patch.sweep import sweep


@pytest.fixture(scope="module")
def gemma(): return tiny_model("gemma")


def counted(monkeypatch) -> SimpleNamespace:
    """What the engine runs from now on, counted where it is run: in the shapes that go through the model."""
    seen = SimpleNamespace(rows=0, passes=0, token_layers=0, parts=0)
    real_pass, real_base = engine._run_pass, sweep_room.base_run

    def run_pass(model, base, the_pass, bank):
        blocks = [the_pass.n_base + sum(row.layer <= layer for row in the_pass.rows) for layer in range(model.n_layers)]
        seen.rows, seen.passes = seen.rows + len(the_pass.rows), seen.passes + 1
        seen.token_layers += the_pass.tail * sum(blocks)
        return real_pass(model, base, the_pass, bank)

    def base_run(model, sequences, n, rows, added=()):
        seen.parts += 1
        seen.token_layers += len(sequences) * max(map(len, sequences)) * model.n_layers
        return real_base(model, sequences, n, rows, added)
    monkeypatch.setattr(engine, "_run_pass", run_pass)
    monkeypatch.setattr(sweep_room, "base_run", base_run)
    return seen


PAIRS = [random_pair(1), random_pair(2, 12, (4, 6)), random_pair(3, 7, (2, 3)), random_pair(4, 7, (2, 3))]
CASES = {"plain": {}, "denoising": {"direction": "denoising"}, "donors": {"donors": PAIRS[::-1]}, "noise": {"noise": Noise(draws=3)},
         "few rows": {"max_rows": 5}, "pairs by themselves": {"max_pairs": 1}, "little memory": {"memory": 1_000_000}, "less": {"memory": 20_000}}


@pytest.mark.parametrize("case", CASES)
def test_a_forecast_counts_what_is_run(gemma, monkeypatch, case):
    asked = grid(gemma, ["resid_pre", "resid_mid", "resid_post", "z", "v", "mlp_out"], ["final", "entity"]) + grid(gemma, ["z"], "all", source="zero")
    asked += asked[:5]
    options = {"memory": 2**28} | CASES[case]
    said = forecast(gemma, PAIRS, asked, **options)
    seen = counted(monkeypatch)
    sweep(gemma, PAIRS, asked, progress=False, **options)
    assert (said.rows, said.passes, said.token_layers) == (seen.rows, seen.passes, seen.token_layers)
    assert (said.pairs, said.interventions) == (4, len(asked)) and 0 < said.rows < 3 * 4 * len(asked)
    assert (seen.parts > 4) == (case == "less"), "base runs are repeated only where one pair's interventions do not fit"


def test_a_forecast_by_hand(gemma):
    """One pair of 9 tokens that differ from the fourth on, 3 layers: one row of the final token from layer 1, one row of the first tokens that changes nothing."""
    tp = random_pair(1)
    first = next(i for i, (a, b) in enumerate(zip(tp.clean_ids, tp.corrupt_ids)) if a != b)
    asked = [Edit("z", 1, "final", 0), Edit("z", 1, "final", 0), Edit("resid_pre", 0, first - 1)]
    said = forecast(gemma, tp, asked, memory=2**28)
    assert (said.pairs, said.interventions, said.rows, said.passes) == (1, 3, 1, 1)
    assert said.token_layers == 2 * len(tp.clean_ids) * 3 + (3 + 2) * 1
    assert repr(said).startswith(f"1 pair x 3 interventions: 1 row in 1 pass, {said.token_layers} token-layers, up to about ")


def test_a_forecast_runs_nothing_of_the_sweep(gemma, monkeypatch):
    gemma.mid_is_post  # tried out once on a model
    monkeypatch.setattr(type(gemma), "run", lambda *a, **k: pytest.fail("something was run"))
    forecast(gemma, PAIRS, grid(gemma, ["resid_pre"], "all"))


def test_what_a_sweep_refuses_is_refused(gemma):
    for wrong, words in (({"direction": "both"}, "Unknown direction"), ({"donors": PAIRS[:1]}, "1 donors for 4 pairs")):
        with pytest.raises(ValueError, match=words): forecast(gemma, PAIRS, Edit("resid_pre", 0), **wrong)
    with pytest.raises(ValueError, match="nothing was given"): forecast(gemma, PAIRS, Edit("resid_pre", 0, source="given"))


def asked_of(model, interventions, memory, pairs=PAIRS, noise=None) -> Asked:
    return as_asked(model, pairs, as_interventions(interventions), "noising", pairs, None, noise, 2048, 64, memory)


@pytest.mark.parametrize("limit, wrong", [("max_rows", 0), ("max_rows", -1), ("max_rows", True), ("max_rows", 8.5), ("max_pairs", 0), ("memory", 0), ("memory", float("nan")), ("memory", "8 GB")])
def test_a_limit_that_leaves_no_room_is_refused(gemma, limit, wrong):
    """It is not read as the least, nor as none."""
    for run in (sweep, forecast):
        with pytest.raises(ValueError, match=f"{limit} is .*: give a number of .* 1 or more"): run(gemma, PAIRS[0], grid(gemma, "z"), **{limit: wrong})


def test_numbers_of_numpy_are_numbers(gemma):
    plain, theirs = (sweep(gemma, PAIRS[:2], grid(gemma, "resid_pre", at(3), layers=[at(1), at(2)]), max_rows=at(7), max_pairs=at(1), memory=at(10**6), progress=False) for at in (int, np.int64))
    assert (plain.patched == theirs.patched).all() and plain.to_frame().equals(theirs.to_frame())


@pytest.mark.parametrize("noise", [None, Noise(draws=4)])
def test_what_is_kept_does_not_grow_with_what_is_asked(gemma, noise):
    """Twenty times the interventions and more pairs: more parts, none of them larger than a quarter of the budget."""
    memory, sizes = 2**21, []
    everything = [Intervention((Edit(s, l, p, h, "zero"),)) for s in ("resid_pre", "mlp_out") for l in range(3) for p in range(7) for h in [None]]
    for repeat in (1, 20):
        many = [Intervention((i.edits[0], Edit("attn_out", 2, -1 - n % 7, None, "donor"), Edit("z", n % 3, n % 5, n // 5 % 4, "zero")))
                for i in everything for n in range(repeat)]
        for pairs in (PAIRS, PAIRS * 4):
            asked = asked_of(gemma, many, memory, pairs, noise)
            parts = list(parts_of(asked))
            assert all(part.kept <= memory // 4 for part in parts)
            cover = np.zeros((len(pairs), len(asked.once)), int)
            for part in parts: cover[part.pairs, part.columns.start:part.columns.stop] += 1
            assert (cover == 1).all(), "each pair and intervention once"
            sizes.append(len(parts))
    assert sizes[0] < sizes[1] < sizes[3] or noise is None and sizes[0] <= sizes[1] < sizes[3]


def test_the_bytes_of_the_bank_are_no_more_than_expected(gemma):
    """What the base run really banks, against what was planned for it."""
    asked = asked_of(gemma, grid(gemma, ["resid_pre", "z", "pattern", "k"], range(7)), 2**28)
    (part,) = parts_of(asked)
    plan = plan_of(asked, part)
    _, bank, _ = sweep_room.base_run(gemma, plan.prompts, plan.n, plan.rows, plan.added)
    values = sum(vectors.nbytes for _, vectors in bank.values())
    assert 0 < values <= part.kept and sum(kept_bytes(asked)[1]) > values / len(PAIRS)


def old_passes(rows, fit):
    """The definition: rows are counted one by one."""
    left = sorted(rows, key=lambda row: (-row.tail, row.pair))
    def alike(start): return sum(row.tail >= ALIKE * left[start].tail for row in left[start:])
    while left:
        tail, n = left[0].tail, alike(0)
        while n < len(left) and (n + alike(n)) * tail <= SMALL: n += alike(n)
        together = left[:min(fit(tail), n)]
        yield tuple(sorted(together, key=lambda row: row.layer)), tail
        left = left[len(together):]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from([1, 2, 3, 17, 20, 34, 40, 100, 400, 1000])), max_size=80),
       st.integers(1, 3000))
def test_passes_are_those_of_the_definition(told, tokens):
    rows = [Row(pair, i, (Write("z", layer, -tail, 0, None),), layer, tail) for i, (pair, layer, tail) in enumerate(told)]
    def fit(tail): return max(1, tokens // tail)
    assert [(p.rows, p.tail) for p in passes_of(rows, fit)] == list(old_passes(rows, fit))


def test_a_pass_has_room_for_its_base_runs(gemma):
    """Many pairs with a row or two each: rows and base runs together stay within the budget."""
    asked = asked_of(gemma, grid(gemma, ["resid_pre"], "final"), 2**20, [random_pair(i) for i in range(64)])
    for part in parts_of(asked):
        plan = plan_of(asked, part)
        for p in plan.passes():
            assert part.kept + 4 * (len(p.rows) + p.n_base - 1) * gemma.shape.row_values(p.tail, plan.length) <= asked.memory


class Terminal(io.StringIO):
    def isatty(self): return True


@pytest.mark.parametrize("is_terminal, long, says", [(True, 0.0, True), (True, 1e9, False), (False, 0.0, False)])
def test_a_long_sweep_is_announced_on_a_terminal_only(gemma, monkeypatch, is_terminal, long, says):
    """Time does not matter here: every sweep is long or is not. It is said before anything of the sweep is run."""
    monkeypatch.setattr(room, "PART", 1e9)
    monkeypatch.setattr(room, "LONG", long)
    screen = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    asked = grid(gemma, ["resid_pre", "z"], ["final", "entity"])
    line, before, real = f"{forecast(gemma, PAIRS, asked, memory=2**28)!r}; about ", [], sweep_room.base_run
    monkeypatch.setattr(sweep_room, "base_run", lambda *a: before.append(screen.getvalue()) or real(*a))
    sweep(gemma, PAIRS, asked, memory=2**28)
    assert before[0].count(line) == says == screen.getvalue().count(line)
    assert ("100%" in screen.getvalue()) == is_terminal


def test_a_short_sweep_is_not_timed_first(gemma, monkeypatch):
    monkeypatch.setattr(room, "seconds_each", lambda *_: pytest.fail("the trial is a large part of this sweep"))
    monkeypatch.setattr(sys, "stderr", Terminal())
    sweep(gemma, PAIRS, Edit("resid_pre", 0))


def test_forecasts_add_and_scale(gemma):
    """Two sweeps are the sum of what they come to; a few pairs stand for many of the same kind."""
    final, entity = (forecast(gemma, PAIRS, grid(gemma, ["resid_pre"], at), memory=2**28) for at in ("final", "entity"))
    both = final + entity
    assert (both.rows, both.token_layers, both.pairs) == (final.rows + entity.rows, final.token_layers + entity.token_layers, 2 * len(PAIRS)) and both.bytes_a_pass == max(final.bytes_a_pass, entity.bytes_a_pass)
    alike = [PAIRS[0]] * 12
    whole, part = (forecast(gemma, some, grid(gemma, ["resid_pre"], "final"), memory=2**28) for some in (alike, alike[:3]))
    assert part.of(12).rows == whole.rows and part.of(12).pairs == 12 and part.of(3) == part


def test_a_bar_that_is_not_shown_plans_nothing_twice(gemma, monkeypatch):
    monkeypatch.setattr(room, "forecast_of", lambda asked: pytest.fail("planned for a bar that nobody sees"))
    sweep(gemma, PAIRS, Edit("resid_pre", 0), progress=False)


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_the_guess_is_what_a_clock_says_that_ticks_with_every_token_of_a_block(name, monkeypatch):
    model, ticks = tiny_model(name), [0]
    def tick(block, args, kwargs, out):
        hidden = out[0] if isinstance(out, tuple) else out
        ticks[0] += len(hidden) * hidden.shape[1]
    blocks = next(m for m in model.hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == model.n_layers)
    for block in blocks: block.register_forward_hook(tick, with_kwargs=True)
    monkeypatch.setattr(room, "perf_counter", lambda: ticks[0] * 0.25)
    pairs, asked = [random_pair(i, 30, (10, 12)) for i in range(3)], grid(model, model.sites, range(30))
    foreseen = forecast(model, pairs, asked, memory=2**28).token_layers
    with torch.no_grad(): assert room.seconds_each(model, pairs[0].clean_ids) == 0.25
    ticks[0] = 0
    sweep(model, pairs, asked, memory=2**28, progress=False)
    assert 10**4 < foreseen <= ticks[0] < 1.01 * foreseen, "more than the check of the first pass"
