"""Profiles of planted runs: what was planted is found, and nothing is made of too few pairs."""
import numpy as np
import pandas as pd
import pytest
from planted import planted_run, steps

from bizzaroworld.files import write_table
from bizzaroworld.results.correlations import top_pairs
from bizzaroworld.results.effects import AnalysisError, beyond_control, category_curves, control_curves, peak
from bizzaroworld.results.estimates import Estimate
from bizzaroworld.results.heads import head_frequency, head_shares, top_head, worst_counts
from bizzaroworld.results.layers import crossing, depth_fraction
from bizzaroworld.results.summary import mode_agreement
from bizzaroworld.study.runs import RunError, control_run


def with_controls(run, **strength):
    """Controls whose effects are a share of the real ones; `shuffled` lacks the first pair."""
    parts = [run.effects.assign(effect=run.effects.effect * s, control=name) for name, s in strength.items()]
    parts = [p[p.pair_id != "pair-00"] if p.control.iloc[0] == "shuffled" else p for p in parts]
    write_table(run.folder / "controls.parquet", pd.concat(parts, ignore_index=True))
    return run


def test_depth_is_a_share_of_the_blocks():
    assert depth_fraction(9, 18) == 0.5
    assert depth_fraction(Estimate(9.0, 6.0, 12.0, 60), 24) == Estimate(0.375, 0.25, 0.5, 60)
    assert depth_fraction(Estimate(None, n=3), 24) == Estimate(None, n=3)


def test_categories_have_their_own_curves_and_no_interval_from_two_pairs(tmp_path):
    leaves = [2, 4, 4, 4] * 3 + [2, 4]  # category 0 leaves at layer 2, the others at 4; categories 0 and 1 have four pairs
    table = category_curves(planted_run(tmp_path, steps(leaves)))
    assert table.groupby("category").n.first().to_dict() == {"cat-0": 4, "cat-1": 4, "cat-2": 3, "cat-3": 3}
    means = table.pivot(index="category", columns="layer", values="mean")
    assert means.loc["cat-0"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0] and means.loc["cat-3"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    few = category_curves(planted_run(tmp_path / "few", steps([3] * 8)))
    assert set(few.n) == {2} and few[["low", "high"]].isna().all(axis=None) and few["mean"].notna().all()


def test_controls_stand_beside_the_real_curve(tmp_path):
    run = with_controls(planted_run(tmp_path, steps([3] * 6)), unrelated=0.5, shuffled=0.0)
    table = control_curves(run).pivot(index="layer", columns="control", values="mean")
    assert table["none"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert table["unrelated"].tolist() == [0.5] * 3 + [0] * 5 and table["shuffled"].tolist() == [0] * 8
    assert control_curves(run).groupby("control").n.first().to_dict() == {"none": 6, "unrelated": 6, "shuffled": 5}
    gap = beyond_control(run, "unrelated", layer=2)
    assert (gap.value, gap.n) == (0.5, 6) and beyond_control(run, "shuffled").n == 5
    assert crossing(control_run(run, "unrelated"), level=0.25).value == pytest.approx(crossing(run, level=0.5).value)


def test_what_is_not_there_is_said(tmp_path):
    run = planted_run(tmp_path, steps([3] * 6))
    with pytest.raises(RunError, match="holds no controls"): control_curves(run)
    with pytest.raises(RunError, match="no control 'untrained', only unrelated"): control_run(with_controls(run, unrelated=0.5), "untrained")


def test_modes_are_compared_with_all_pairs(tmp_path):
    heads = np.zeros((40, 8, 4))
    heads[:, 5, 1] = 0.3
    heads[:15, 5, 2] = 0.6  # the best pairs (mode A) use another head
    table = mode_agreement(planted_run(tmp_path, steps([3] * 15 + [5] * 25), heads_final=heads)).set_index("mode")
    assert table.n.to_dict() == {"A": 15, "B": 4, "C": 40}
    assert table.leaves["A"].value == 2.5 and 3.5 < table.leaves["C"].value < 5
    assert table.top_head.to_dict() == {"A": "L5H2", "B": "L5H2", "C": "L5H1"} and table.heads_like_C["C"] == 1
    assert table.heads_like_C["A"] < 1


def test_heads_are_counted(tmp_path):
    heads = np.zeros((10, 8, 4))
    heads[:6, 5, 1], heads[6:, 2, 3] = 0.4, 0.2
    run = planted_run(tmp_path, steps([3] * 10), swings=[10.0] * 10, heads_entity=heads)
    table = head_frequency(run, "4", "C")
    assert table.name[:2].tolist() == ["L5H1", "L2H3"] and table.share[:2].tolist() == [0.6, 0.4] and set(table.chance) == {1 / 32}
    assert table.low[0] < 0.6 < table.high[0] and table.worst.sum() == 10
    assert worst_counts(run, "4", "C").to_dict() == {1: 6, 3: 4, 0: 0, 2: 0} and worst_counts(run, "4", "C", by="layer")[5] == 6
    shares = head_shares(run, "4", "C", first=2)
    assert shares.name.tolist() == ["L5H1", "L2H3"] and shares.share.tolist() == pytest.approx([0.75, 0.25])
    assert (shares.low < shares.share).all() and (shares.share < shares.high).all()


def test_the_first_pairs_are_those_with_the_largest_swing(tmp_path):
    assert top_pairs(planted_run(tmp_path, steps([3] * 8), swings=[1, 9, 3, 8, 2, 7, 4, 6]), 3).pair_id.tolist() == ["pair-01", "pair-03", "pair-05"]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_largest_layer_and_head_are_those_that_were_planted(tmp_path, direction):
    """A head that moves most in logits, though another moves more of the swing of the pairs with small swings, is the largest in both readings."""
    sub = {"attn_out": np.tile([0, 0.1, 0.7, 0.2], (6, 1)), "mlp_out": np.tile([0, -0.6, 0.5, 0.2], (6, 1))}
    heads = np.zeros((6, 4, 3))
    heads[:, 2, 1] = [0.9, 0.9, 0.2, 0.2, 0.2, 0.2]
    heads[:, 1, 0] = 0.4
    run = planted_run(tmp_path, steps([3] * 6, 4), sublayers=sub, heads_final=heads, swings=[100, 100, 2, 2, 2, 0.5], direction=direction)
    found = peak(run, "2A", "attn_out")
    assert (found.layer, found["mean"], found.n) == (2, pytest.approx(0.7), 5)
    assert peak(run, "2B", "mlp_out").layer == 1, "a push the other way counts by its size"
    logits = -1 if direction == "noising" else 1
    assert peak(run, "2A", "attn_out", value="effect")["mean"] == pytest.approx(logits * 0.7 * 206.5 / 6)
    top = top_head(run)
    assert top["name"] == "L2H1" and top["mean"] == pytest.approx((0.9 * 2 + 0.2 * 3) / 5) and top.n == 5
    with pytest.raises(AnalysisError, match="no fraction of attn_out"): peak(planted_run(tmp_path / "flat", steps([3] * 4, 4), swings=[0.5] * 4), "2A", "attn_out")
