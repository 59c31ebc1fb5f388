"""Several runs side by side: each keeps its look, and estimates stand where their values are."""
import numpy as np
import pandas as pd
import pytest
from drawn import clipped, legend_texts, lines, overlapping, smallest

from bizzaroworld.figures.comparisons import KINDS, draw_concentration, draw_depths, draw_rows, draw_seeds
from bizzaroworld.figures.style import RUN_LOOKS

RUNS = ["bizzaro-nano", "bizzaro-nano-local", "bizzaro-micro", "google/gemma-2b"]


def fits(figure):
    assert clipped(figure) == [] and overlapping(figure) == [] and smallest(figure) > 5


def curves(runs):
    rng, parts = np.random.default_rng(0), []
    for k, run in enumerate(runs):
        for position in ("entity", "final"):
            n = 9 + 20 * k
            mean = rng.random(n)
            parts.append(pd.DataFrame({"run": run, "position": position, "depth": np.arange(n) / (n - 1), "mean": mean, "low": mean - 0.1,
                                       "high": mean + 0.2, "n": 60 - k, "measured": (np.arange(n) < n - 1) & (np.arange(n) % 2 == 0)}))
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_runs_are_their_curves_over_one_depth(k):
    table = curves(RUNS[:k])
    figure = draw_depths(table)
    assert legend_texts(figure) == [f"{run} (n = {60 - i})" for i, run in enumerate(RUNS[:k])]
    for ax, position in zip(figure.axes, ("entity", "final")):
        assert ax.get_title() == f"{position} token" and len(ax.collections) == k
        for i, (run, drawn) in enumerate(zip(RUNS, lines(ax).values())):
            rows = table[(table.run == run) & (table.position == position)].reset_index(drop=True)
            np.testing.assert_array_equal(drawn.get_xydata(), rows[["depth", "mean"]])
            assert (drawn.get_color(), drawn.get_marker()) == (RUN_LOOKS[i]["color"], RUN_LOOKS[i]["marker"])
            marked = rows.index[rows.measured]
            assert set(drawn.get_markevery()) <= set(marked) and len(marked) / 2 - 1 <= len(drawn.get_markevery()) <= 18
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    fits(figure)


def spans(ax):
    """The intervals drawn, and the height at which they stand."""
    return [(p.vertices[0, 0], p.vertices[1, 0], p.vertices[0, 1]) for c in ax.collections for p in c.get_paths()]


def test_rows_are_the_estimates():
    table = pd.DataFrame({"row": ["a", "b", "all"], "kind": ["pairs", "pairs", "seeds"], "value": [0.5, 0.4, 0.45], "low": [0.4, np.nan, 0.1], "high": [0.6, np.nan, 0.9]})
    figure = draw_rows(table, "Depth", (0, 1))
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "all"] and ax.get_xlabel() == "Depth" and ax.get_xlim() == (0, 1)
    np.testing.assert_allclose(sorted(spans(ax)), [(0.1, 0.9, 2), (0.4, 0.4, 1), (0.4, 0.6, 0)])
    assert legend_texts(figure) == [KINDS[k]["label"] for k in ("pairs", "seeds")]
    fits(figure)


def test_two_positions_stand_apart_and_what_is_not_defined_is_not_drawn():
    table = pd.DataFrame({"row": ["a", "a", "b", "b"], "kind": ["entity", "final"] * 2, "value": [0.5, 0.5, np.nan, 0.7], "low": 0.4, "high": 0.8})
    (ax,) = draw_rows(table, "Depth").axes
    heights = sorted(y for _, _, y in spans(ax))
    assert len(heights) == 3 and heights[0] < 0 < heights[1] and round(heights[2]) == 1
    fits(ax.figure)


def test_differences_have_a_line_at_zero():
    table = pd.DataFrame({"row": ["a"], "kind": "difference", "value": 0.2, "low": 0.1, "high": 0.3})
    (ax,) = draw_rows(table, "b minus a").axes
    assert [0, 0] in [list(l.get_xdata()) for l in ax.lines] and not ax.figure.legends
    (other,) = draw_rows(table.assign(kind="pairs"), "x").axes
    assert [0, 0] not in [list(l.get_xdata()) for l in other.lines]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_trainings_stand_beside_their_spread(k):
    keys = ["leaves", "arrives", "half_entity", "half_final"][:k]
    runs = pd.DataFrame([{"run": f"bizzaro-nano-s{i}", "quantity": q, "value": i / 10 + j, "low": i / 10 + j - 0.1, "high": i / 10 + j + 0.1}
                         for i in range(4) for j, q in enumerate(keys)])
    spread = pd.DataFrame([{"quantity": q, "mean": j + 0.15, "lowest": j + 0.0, "highest": j + 0.3} for j, q in enumerate(keys)])
    figure = draw_seeds(runs, spread, {q: f"a long name of quantity {q} (share)" for q in keys})
    for j, ax in enumerate(figure.axes[:k]):
        np.testing.assert_allclose(sorted(spans(ax), key=lambda s: s[2]), [(i / 10 + j - 0.1, i / 10 + j + 0.1, i) for i in range(4)] + [(j, j + 0.3, 4)], atol=1e-12)
        assert keys[j].replace("_", " ") in ax.get_xlabel()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [*(f"bizzaro-nano-s{i}" for i in range(4)), "all"]
    assert legend_texts(figure) == [KINDS[q]["label"] for q in ("pairs", "seeds")]
    fits(figure)


def test_concentration_is_the_share_with_its_interval_and_numbers():
    table = pd.DataFrame({"run": np.repeat(RUNS[:3], 2), "position": ["entity", "final"] * 3, "heads": pd.array([5, 3, 4, None, 72, 12], "Int64"),
                          "of": [32, 32, 32, 32, 144, 144], "share": [0.15, 0.09, 0.12, np.nan, 0.5, 0.08]})
    table = table.assign(share_low=table.share - 0.02, share_high=table.share + 0.04)
    figure = draw_concentration(table)
    for ax, said in zip(figure.axes, (["5 of 32", "4 of 32", "72 of 144"], ["3 of 32", "no effect", "12 of 144"])):
        assert [t.get_text().strip() for t in ax.texts] == said
    assert [b.get_width() for b in figure.axes[0].patches] == [0.15, 0.12, 0.5]
    np.testing.assert_allclose(spans(figure.axes[0]), [(0.13, 0.19, 0), (0.1, 0.16, 1), (0.48, 0.54, 2)])
    fits(figure)
    fits(draw_concentration(table.assign(share=np.nan, share_low=np.nan, share_high=np.nan, heads=pd.NA)))
