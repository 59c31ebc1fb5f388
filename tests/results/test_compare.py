"""Runs side by side, on planted runs whose answers are known."""
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from planted import planted_run, steps

from bizzaroworld.files import write_table
from bizzaroworld.results.compare import (compare, comparison_lines, concentration_table, crossing_table, depth_curves, drift,
                                          model_table, names, pair_states, seed_spread)
from bizzaroworld.results.effects import AnalysisError, curve
from bizzaroworld.results.heads import concentration
from bizzaroworld.results.quantities import QUANTITIES, difference, heads_for_half, quantity
from bizzaroworld.study.runs import open_run


def run(folder, leaves, n_layers=8, **options): return planted_run(folder, steps(leaves, n_layers), **options)


def drop(folder, *rows):
    "Say that pairs were dropped, as (pair, reason, replaced_by), and open the run."
    write_table(folder / "excluded.csv", pd.DataFrame(rows, columns=["pair_id", "reason", "replaced_by"]))
    return open_run(folder)


@pytest.fixture
def two(tmp_path):
    "Eight layers and twelve; the second lacks the last pair, does not know the first, and has one more of its own."
    small = run(tmp_path / "small", [3, 3, 4, 4, 5, 5])
    run(tmp_path / "large", [6, 6, 6, 7, 8], 12, preferred=[False, True, True, True, True])
    return small, drop(tmp_path / "large", ("pair-05", "length_differs", "none"), ("gone", "length_differs", "pair-04"))


@pytest.mark.parametrize("means, heads", [([4, 2, 1, 1], 1), ([1, 1, 1, 1], 2), ([-9, 0, 0, 0], 0.5), ([3, -1], 2 / 3), ([1, 2, 1], 1)])
def test_heads_for_half(means, heads):
    assert heads_for_half(np.array([means], float)) == pytest.approx([heads])


def test_heads_for_half_agrees_with_the_whole_number_of_the_analysis():
    means = np.random.default_rng(3).normal(size=(50, 20))
    whole = [concentration(pd.DataFrame({"mean": m, "name": "x"})).heads for m in means]
    assert np.ceil(heads_for_half(means)).tolist() == whole
    assert np.isnan(heads_for_half(np.zeros((1, 5)))).all()


def test_a_depth_is_a_fraction_of_the_models_own_layers(tmp_path):
    for n_layers, leaves in ((8, 4), (18, 9)):
        found = run(tmp_path / str(n_layers), [leaves] * 5, n_layers)
        for key in ("leaves", "arrives"): assert quantity(found, key).value == pytest.approx((leaves - 0.5) / n_layers)
    table = crossing_table([found])
    assert table.blocks.tolist() == pytest.approx([8.5, 8.5]) and table.depth.tolist() == pytest.approx([8.5 / 18] * 2)
    assert table.blocks_low.tolist() == pytest.approx([8.5, 8.5]) and table.n.tolist() == [5, 5]
    with pytest.raises(AnalysisError, match="Unknown quantity 'depth'"): quantity(found, "depth")


def test_a_quantity_of_some_pairs(tmp_path):
    found = run(tmp_path, [2, 2, 6, 6])
    assert quantity(found, "leaves", ["pair-00", "pair-01"]).value == pytest.approx(1.5 / 8)
    assert quantity(found, "leaves", ["pair-02", "not there"]).n == 1
    nothing = quantity(found, "leaves", [])
    assert nothing.value is None and nothing.n == 0


def test_a_difference_is_paired(tmp_path):
    "What differs between pairs, and is the same in both models, is no uncertainty of the difference."
    rng = np.random.default_rng(0)
    curves = np.clip(steps([3] * 30) + rng.normal(0, 0.2, (30, 8)), -1, 1.4)
    a = planted_run(tmp_path / "a", curves)
    b = planted_run(tmp_path / "b", np.hstack([np.ones((30, 1)), curves[:, :-1]]))
    pairs = a.pairs()
    found = difference(a, b, "leaves", pairs)
    assert found.value == pytest.approx(1 / 8, abs=0.01) and found.n == 30
    apart = [quantity(x, "leaves") for x in (a, b)]
    assert found.high - found.low < 0.2 * sum(x.high - x.low for x in apart)
    back = difference(b, a, "leaves", pairs)
    assert (back.value, back.low) == pytest.approx((-found.value, -found.high), abs=1e-3)


def test_a_difference_rests_on_the_pairs_given_that_both_have(two):
    small, large = two
    assert difference(small, large, "leaves", ["pair-00", "pair-05"]).n == 1
    found = difference(small, large, "leaves", ["pair-00", "pair-01"])
    assert found.value == pytest.approx(5.5 / 12 - 2.5 / 8)


def test_a_difference_leaves_out_what_one_run_has_no_fraction_of(tmp_path):
    a, b = run(tmp_path / "a", [3, 4, 5]), run(tmp_path / "b", [6, 5, 6], swings=[0.5, 9, 8])
    found = difference(a, b, "leaves", a.pairs())
    assert found.n == 2 and found.value == pytest.approx((5.0 - 4.0) / 8)


def test_heads_are_counted_as_a_share_of_all_heads(tmp_path):
    heads = np.zeros((5, 8, 4))
    heads[:, 2] = 0.1
    found = planted_run(tmp_path, steps([3] * 5), heads_entity=heads, heads_final=heads)
    for key in ("half_entity", "half_final"): assert quantity(found, key).value == pytest.approx(2 / 32)
    for key in ("top_entity", "top_final"): assert quantity(found, key).value == pytest.approx(1 / 4)


def test_pair_states(two):
    table = pair_states(two).set_index("pair_id")
    assert table.columns.tolist() == ["small", "large", "common"]
    assert table.loc["pair-00", ["small", "large"]].tolist() == ["first of all", "not preferred"]
    assert table.loc["pair-05", ["small", "large"]].tolist() == ["first of all", "dropped"]
    assert table.loc["gone", ["small", "large"]].tolist() == ["not asked", "dropped"]
    assert table.index[table.common].tolist() == ["pair-01", "pair-02", "pair-03", "pair-04"]


def test_the_same_id_for_other_prompts_is_another_pair(tmp_path):
    made = [run(tmp_path / name, [3, 3, 4]) for name in "abc"]
    for found, prompt in zip(made[:2], ("one", "two")):
        prompts = {"clean_prompt": [prompt, "same", "same"], "corrupt_prompt": "x"}
        write_table(found.folder / "triage.csv", found.triage.assign(**prompts))
    table = pair_states([open_run(r.folder) for r in made]).set_index("pair_id")
    assert table.loc["pair-00"].tolist() == ["first of all", "other prompts", "first of all", False] and table.common.tolist() == [False, True, True]


def test_drift_and_models(two):
    rows = drift(two).set_index("run")
    assert rows.loc["small"].tolist() == [6, 0, 0, 6, ""]
    assert rows.loc["large"].tolist() == [5, 2, 1, 5, "length_differs 2"]
    rows = model_table(two).set_index("run")
    assert rows.loc["large", ["layers", "heads", "ranked", "preferred", "first_of_kind", "first_of_all", "verdicts", "dropped", "replaced"]].tolist() == [
        12, 2, 5, 4, 4, 4, 4, 2, 1]


def test_curves_share_their_depths_and_keep_what_was_measured(two):
    table = depth_curves(two)
    grids = [part.depth.tolist() for _, part in table.groupby(["run", "position"])]
    assert all(grid == grids[0] for grid in grids) and len(grids) == 4
    assert len(grids[0]) == 9 + 13 - 5  # 0, 1/4, 1/2, 3/4 and 1 are depths of both
    for found, name in zip(two, ("small", "large")):
        for position, experiment in (("entity", "3"), ("final", "1")):
            rows = table[(table.run == name) & (table.position == position)]
            own = curve(found, experiment, "C", "fraction")
            for column in ("mean", "low", "high"):
                assert rows[rows.measured][column].to_numpy() == pytest.approx(own[column].to_numpy())
            assert rows["mean"].iloc[-1] == (0 if position == "entity" else 1) and not rows.measured.iloc[-1]
            assert set(rows.n) == {len(found.pairs())}
    between = table[(table.run == "small") & (table.position == "entity") & np.isclose(table.depth, 7 / 12)]["mean"].item()
    assert between == pytest.approx(2 / 6 * (1 - (7 / 12 * 8 - 4)), abs=1e-6)  # layers 4 and 5: 2 and 0 of 6 pairs


def test_concentration(tmp_path):
    heads = np.zeros((4, 8, 2))
    heads[:, 2, 1], heads[:, 5, 0], heads[:, 6, 0] = [0.3, 0.34, 0.26, 0.3], -0.2, 0.1
    found = planted_run(tmp_path, steps([4] * 4), heads_final=heads, swings=[10] * 4)
    entity, final = concentration_table([found]).to_dict("records")
    assert (final["heads"], final["of"], final["top"]) == (1, 16, "L2H1")
    assert final["share"] == pytest.approx(1 / 16) and final["top_share"] == pytest.approx(0.5)
    assert 0.45 < final["top_share_low"] < 0.5 < final["top_share_high"] < 0.55
    assert pd.isna(entity["heads"]) and np.isnan(entity["share"]) and entity["top"] == ""


def test_compare(two):
    c = compare(two)
    assert c.common == ["pair-01", "pair-02", "pair-03", "pair-04"]
    q = c.quantities.set_index(["run", "quantity", "over"])
    assert len(q) == 2 * 2 * len(QUANTITIES)
    assert q.loc[("small", "leaves", "all"), "n"] == 6 and q.loc[("small", "leaves", "common"), "n"] == 4
    assert q.loc[("small", "leaves", "common"), "value"] == pytest.approx(quantity(two[0], "leaves", c.common).value)
    row = c.differences.set_index("quantity").loc["leaves"]
    assert (row.a, row.b, row.n) == ("small", "large", 4)
    values = [q.loc[(name, "leaves", "common"), "value"] for name in ("small", "large")]
    assert row.value == pytest.approx(values[1] - values[0]) and row.low <= row.value <= row.high


def test_three_runs_differ_in_three_ways(tmp_path):
    c = compare([run(tmp_path / name, [leaves] * 4) for name, leaves in (("a", 2), ("b", 4), ("c", 5))])
    found = c.differences[c.differences.quantity == "leaves"]
    assert list(zip(found.a, found.b)) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found.value.tolist() == pytest.approx([2 / 8, 3 / 8, 1 / 8])


def test_names_and_refusals(tmp_path):
    a, b = run(tmp_path / "a", [4, 4]), run(tmp_path / "b", [4, 4])
    assert names([a, b]) == ["a", "b"] and names([a]) == ["planted"]
    same = run(tmp_path / "away" / "a", [4, 4])
    assert names([a, same]) == [f"{tmp_path.name}/a", "away/a"], "two models of one name, two folders of one name"
    with pytest.raises(AnalysisError, match="cannot be told apart"): compare([a, a])
    with pytest.raises(AnalysisError, match="no run"): compare([])
    other = run(tmp_path / "c", [4, 4], direction="denoising")
    with pytest.raises(AnalysisError, match="a: noising, c: denoising"): compare([a, other])
    with pytest.raises(AnalysisError, match="b has 8 layers, 2 heads; d has 12 layers"):
        seed_spread([b, run(tmp_path / "d", [4, 4], 12)])


def test_both_directions_give_the_same_depths(tmp_path):
    found = [quantity(run(tmp_path / d, [3, 4, 5], direction=d), "leaves") for d in ("noising", "denoising")]
    assert found[0].value == pytest.approx(found[1].value) and found[0].low == pytest.approx(found[1].low)


def test_seed_spread(tmp_path):
    runs = [run(tmp_path / f"s{i}", [leaves] * 5) for i, leaves in enumerate((4, 5, 3))]
    never = planted_run(tmp_path / "s3", steps([4] * 5, before=0.3))
    found = seed_spread([*runs, never])
    row = found.spread.set_index("quantity").loc["leaves"]
    assert row.n_runs == 3 and row["mean"] == pytest.approx(3.5 / 8) and row.sd == pytest.approx(1 / 8)
    assert (row.lowest, row.highest) == pytest.approx((2.5 / 8, 4.5 / 8)) and row.over_pairs == 0
    assert found.runs[found.runs.quantity == "leaves"]["run"].tolist() == ["s0", "s1", "s2", "s3"]
    assert found.runs[found.runs["run"] == "s3"].set_index("quantity").value.isna()["leaves"]


def test_one_run_has_no_spread(tmp_path):
    found = seed_spread([run(tmp_path, [4, 5, 6])])
    row = found.spread.set_index("quantity").loc["leaves"]
    assert row.n_runs == 1 and np.isnan(row.sd) and row.over_pairs > 0


def test_the_text_says_what_stands_in_the_tables(two, tmp_path):
    text = "\n".join(comparison_lines(compare(two)))
    assert "large: dropped 2 of 5 (length_differs 2)." in text
    assert "Differences over the 4 pairs that are preferred on both prompts, with a TotalSwing of 2 logits or more in all models" in text and "large - small" in text
    entity = crossing_table(two).iloc[0]
    assert f"{entity.blocks:.2f} [{entity.blocks_low:.2f}, {entity.blocks_high:.2f}]" in text
    assert "Differences" not in "\n".join(comparison_lines(compare(two[:1])))
    strangers = run(tmp_path / "x", [4] * 3, preferred=[False] * 3)
    assert "0 pairs are preferred on both prompts, with a TotalSwing of 2 logits or more in all models: too few" in "\n".join(comparison_lines(compare([two[0], strangers])))


def test_a_reader_of_runs_needs_no_torch():
    code = "import sys, bizzaroworld.results.compare; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
