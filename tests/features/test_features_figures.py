"""Figures of the wing: what is drawn are the tables, and nothing is cut off."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawn import clipped, legend_texts, lines, overlapping, smallest

from bizzaroworld.features.features_figures import (FEATURE_FIGURES, draw_effects, draw_frequencies, draw_frontier, draw_phases, draw_steering, draw_toy_grid, draw_training, feature_plate, feature_plates)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def fits(figure): assert clipped(figure) == [] and overlapping(figure) == [] and smallest(figure) > 5


def effects(n=120, seed=0):
    rng = np.random.default_rng(seed)
    guess = rng.normal(0, 1, n)
    return pd.DataFrame({"pair_id": [f"p{i % 9}" for i in range(n)], "feature": rng.permutation(n) + 1000, "flip": rng.random(n) < 0.5, "how": "ablate", "attribution": guess, "effect": guess * 1.5 + rng.normal(0, 0.1, n)}, index=range(7, n + 7))


def phase_rows(positions=("entity", "final"), layers=(0, 3, 7, 11), controls=("dictionary", "random directions", "shuffled"), tops=(1, 4, 16), sites=("resid_post", "z")):
    rng = np.random.default_rng(1)
    whats = ["site", "features", "error", "flipped", *(f"{kind} {k}" for kind in ("others", "own") for k in tops)]
    rows = [{"site": s, "layer": l, "position": p, "control": c, "what": w, "n": 40, "of_swing": v, "of_swing_low": v - 0.05, "of_swing_high": v + 0.05} for s in sites for l in layers[::-1] for p in positions for c in controls for w in whats for v in [rng.uniform(0, 1)]]
    return pd.DataFrame(rows)


def frontier():
    rng = np.random.default_rng(2)
    return pd.DataFrame([{"method": m, "l0": k, "unexplained": u, "loss_change": c, "low": c - 0.1, "high": c + 0.1} for m in ("topk", "relu", "gated", "jumprelu", "batchtopk", "pursuit") for k in (40, 10, 80, 20) for u, c in [rng.uniform(0.1, 0.9, 2)]])


def history(n=20, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"step": 50 * np.arange(1, n + 1), "loss": 1.0, "unexplained": rng.uniform(0, 1, n), "l0": rng.uniform(10, 90, n), "dead": rng.uniform(0, 0.3, n)})


def histogram(seed=0, least=-6):
    rng, edges = np.random.default_rng(seed), np.arange(least, 0.5, 0.5)
    return pd.DataFrame({"low": [-np.inf, *edges[:-1]], "high": [-np.inf, *edges[1:]], "features": rng.integers(1, 200, len(edges))})


def steering(name="pareto"):
    rng, rows = np.random.default_rng(3), []
    for m in ("difference", "feature", "random"):
        for s in (4.0, 0.5, 2.0, 1.0, 0.0):
            w = rng.uniform(0.1, 0.9)
            rows.append({"method": m, "strength": s, "success": w, "low": w - 0.1, "high": w + 0.1, "n": 30, "later": 0.01 * s ** 2 * rng.uniform(1, 2) - 0.001, "later_low": -0.01, "later_high": 0.4})
    return pd.DataFrame(rows).assign(**{name: [i % 4 == 0 for i in range(len(rows))]})


def toys(): return pd.DataFrame([{"width": w, "sparsity": s, "mmcs": v} for w in (32, 512, 128) for s in (0.1, 0.001, 0.01) for v in [0.9 if (w, s) == (128, 0.1) else 0.01 + w / 1000 + s]])


TABLES = {"effects": {"entity": effects(), "final token": effects(seed=1)}, "phases": phase_rows(), "frontier": frontier(), "training": {"one": history(), "other": history(seed=1)}, "frequencies": {"one": histogram(), "other": histogram(1, -4)}, "steering": steering(), "toys": toys()}


def test_points_are_the_effects():
    figure = draw_effects(TABLES["effects"], name=2)
    fits(figure)
    for ax, (title, table) in zip(figure.axes, TABLES["effects"].items()):
        drawn = lines(ax)
        assert ax.get_title() == title and list(drawn) == ["on in one of the two runs", "on in both"]
        for label, flip in zip(drawn, (True, False)):
            rows = table[table.flip == flip]
            assert drawn[label].get_xdata().tolist() == rows.attribution.tolist() and drawn[label].get_ydata().tolist() == rows.effect.tolist()
        largest = {f"F{f}" for f in table.feature[table.effect.abs().nlargest(2).index]}
        assert {t.get_text() for t in ax.texts} <= largest and ax.texts


def test_lines_are_the_phases():
    table = TABLES["phases"]
    figure = draw_phases(table)
    fits(figure)
    named = {"whole site": ("dictionary", "site"), "all features": ("dictionary", "features"), "the error alone": ("dictionary", "error"), "1 own feature": ("dictionary", "own 1"), "4 own features": ("dictionary", "own 4"), "16 own features": ("dictionary", "own 16"), "16 of other pairs": ("dictionary", "others 16"),
             "random directions": ("random directions", "features")}
    assert [ax.get_title() for ax in figure.axes] == ["entity", "final token"] and legend_texts(figure) == list(named)
    for ax, position in zip(figure.axes, ("entity", "final")):
        for label, (control, what) in named.items():
            rows = table[(table.site == "resid_post") & (table.position == position) & (table.control == control) & (table.what == what)].sort_values("layer")
            assert lines(ax)[label].get_xdata().tolist() == [0, 3, 7, 11] and lines(ax)[label].get_ydata().tolist() == rows.of_swing.tolist()
    assert legend_texts(draw_phases(table[table.control == "dictionary"], "z"))[-1] == "16 of other pairs" and len(draw_phases(phase_rows(("final",))).axes) == 1
    with pytest.raises(ValueError, match="the table has resid_post, z"): draw_phases(table, "attn_out")


def test_frontiers_are_the_tables():
    table = TABLES["frontier"]
    figure = draw_frontier(table)
    fits(figure)
    for ax, of in zip(figure.axes, ("unexplained", "loss_change")):
        for method, rows in table.groupby("method"):
            rows = rows.sort_values("l0")
            assert lines(ax)[method].get_xdata().tolist() == [10, 20, 40, 80] and lines(ax)[method].get_ydata().tolist() == rows[of].tolist()
    assert [len(ax.collections) for ax in figure.axes] == [0, 6]
    both = draw_frontier(table.assign(unexplained_low=0.0, unexplained_high=1.0, loss_change_low=0.0, loss_change_high=9.0))
    assert [len(ax.collections) for ax in both.axes] == [6, 6] and both.axes[1].get_ylim()[1] > 8
    assert len(draw_frontier(table.drop(columns="loss_change")).axes) == 1


def test_histories_are_the_tables():
    figure = draw_training(TABLES["training"])
    fits(figure)
    for ax, of in zip(figure.axes, ("unexplained", "l0", "dead")):
        for name, table in TABLES["training"].items(): assert lines(ax)[name].get_ydata().tolist() == table[of].tolist()
        assert ax.get_ylim()[0] == 0


def test_frequencies_are_the_counts():
    figure = draw_frequencies(TABLES["frequencies"])
    fits(figure)
    (ax,) = figure.axes
    stairs = [p for p in ax.patches if hasattr(p, "get_data")]
    bars = [p.get_height() for p in ax.patches if not hasattr(p, "get_data")]
    for one, bar, table in zip(stairs, bars, TABLES["frequencies"].values()):
        values, edges, _ = one.get_data()
        assert list(values) == table.features[1:].tolist() and edges[0] == table.low[1] and edges[-1] == 0 and bar == table.features[0]
    assert [t.get_text() for t in ax.get_xticklabels()][:2] == ["never", "0.000001"] and ax.get_xticklabels()[-1].get_text() == "1" and legend_texts(figure) == ["one", "other"]


@pytest.mark.parametrize("column", ["pareto", "front"])
def test_steering_is_drawn_from_weak_to_strong_with_its_front(column):
    table = steering(column)
    figure = draw_steering(table)
    fits(figure)
    (ax,) = figure.axes
    drawn = lines(ax)
    for method, rows in table.groupby("method"):
        rows = rows.sort_values("strength")
        assert drawn[method].get_xdata().tolist() == rows.later.tolist() and drawn[method].get_ydata().tolist() == rows.success.tolist()
    assert sorted(drawn["on the front"].get_xdata()) == sorted(table.later[table[column]])
    assert {t.get_text() for t in ax.texts} <= {f"{s:g}" for s in table.strength[table[column]] if s} and ax.texts
    assert not any("$" in t.get_text() for t in ax.get_xticklabels())


def test_both_prices_of_steering_have_a_panel():
    table = steering("front")
    table = table.assign(loss=10 * table.later + 1, loss_low=0.0, loss_high=9.0, front_all=table.strength == 1)
    left, right = draw_steering(table).axes
    for ax, cost, front in ((left, "later", "front"), (right, "loss", "front_all")):
        assert sorted(lines(ax)["on the front"].get_xdata()) == sorted(table[cost][table[front]])
    assert (left.get_title(), right.get_title()) == ("later tokens", "all tokens")


def test_a_toy_grid_has_its_numbers_in_their_fields():
    figure = draw_toy_grid(toys())
    fits(figure)
    ax = figure.axes[0]
    columns, rows = ([t.get_text() for t in labels] for labels in (ax.get_xticklabels(), ax.get_yticklabels()))
    assert columns == ["32", "128", "512"] and rows == ["0.1", "0.01", "0.001"]
    there = {(columns[round(t.get_position()[0])], rows[round(t.get_position()[1])]): t.get_text() for t in ax.texts}
    assert there == {(f"{r.width:g}", f"{r.sparsity:g}"): f"{r.mmcs:.2f}" for r in toys().itertuples()}
    frame = ax.patches[0]
    assert (round(frame.get_x() + 0.47), round(frame.get_y() + 0.47)) == (1, 0)


def test_plates_say_what_was_measured():
    plates = {p.name: p for p in feature_plates({**dict(reversed(TABLES.items()))}, "made-up")}
    assert list(plates) == list(FEATURE_FIGURES) == list(TABLES)
    for name, plate in plates.items(): assert len(plate.alt) > 20 and plate.caption.endswith(".") and ("made-up" in plate.full_caption) == (name != "toys")
    assert "entity: 120 features of 9 pairs" in plates["effects"].caption and "taken away alone" in plates["effects"].caption and "n = 40 pairs" in plates["phases"].caption and "n = 30 pairs" in plates["steering"].caption
    table, never = histogram(), histogram().features[0]
    assert f"one: {never} of {table.features.sum():,} never fired" in plates["frequencies"].alt and "largest 0.90 at 128 features and a weight of 0.1" in plates["toys"].alt
    best = TABLES["phases"].query("site == 'resid_post' and control == 'dictionary' and what == 'site' and position == 'entity'")
    assert f"entity, whole site: {best.of_swing.max():.2f} at layer {best.layer[best.of_swing.idxmax()]}" in plates["phases"].alt
    with pytest.raises(ValueError, match="Unknown figure 'toy'"): feature_plates({"toy": toys()}, "m")
    with pytest.raises(ValueError, match="Unknown figure 'toy'"): feature_plate("toy", toys(), "m")
