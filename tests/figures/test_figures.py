"""Figures: what is drawn is what the tables say, in the fixed colors, and nothing is cut off or covered."""
import numpy as np
import pandas as pd
import pytest
from drawn import band, clipped, legend_texts, lines, make, overlapping, smallest
from matplotlib.colors import to_hex
from planted import planted_run, steps

from bizzaroworld.figures.layers import (draw_categories, draw_controls, draw_crossing, draw_heads, draw_pairs, draw_residual,
                                         draw_sites)
from bizzaroworld.figures.pairs import (DRIFT, beside, draw_damage, draw_drift, draw_head_frequency, draw_release,
                                        draw_release_damage, draw_triage, draw_worst, farthest)
from bizzaroworld.figures.style import ACCENT, CONTROLS, KNOWN, SITE_COLORS, SITE_MARKS
from bizzaroworld.results.effects import curve, effect_matrix
from bizzaroworld.results.estimates import Estimate
from bizzaroworld.results.heads import head_table
from bizzaroworld.results.layers import Layers, crossing, release_layer, worst_layer

CATEGORIES = ("anatomy_organs animal_taxonomy astronomy_planets chemistry_symbols colors_mixing geography_capitals geography_continents "
              "history_dates literature_authors materials_composition mathematics_addition mathematics_geometry mythology_roman_greek "
              "physics_constants pop_culture_bands sports_equipment technology_founders translation_french translation_spanish units_measurement").split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run") / "r")


def a_curve(n_layers=8, seed=0, **more):
    """A hand-made curve table."""
    rng = np.random.default_rng(seed)
    mean = np.sort(rng.random(n_layers))[::-1]
    return pd.DataFrame({"layer": range(n_layers), "mean": mean, "low": mean - rng.random(n_layers) / 9, "high": mean + rng.random(n_layers) / 9,
                         "n": 20, **more})


def fits(figure):
    assert clipped(figure) == [] and overlapping(figure) == [] and smallest(figure) > 5


def test_a_name_is_no_formula():
    figure = draw_categories(pd.concat([a_curve(category=c) for c in (r"$\bad{x}$", "$x^2$ and more $")]))
    figure.draw_without_rendering()
    assert [ax.get_title().replace("\n", " ") for ax in figure.axes] == [r"$\bad{x}$ (20)", "$x^2$ and more $ (20)"]
    assert not any(t.get_parse_math() for ax in figure.axes for t in ax.texts + [ax.title, *ax.get_xticklabels()])


# --- curves ---------------------------------------------------------------------------------------------------------

def test_residual_curves_are_the_tables(run):
    tables = {e: {m: curve(run, e, m) for m in "ABC"} for e in ("3", "1")}
    figure = draw_residual(tables["3"], tables["1"])
    assert [ax.get_title() for ax in figure.axes] == ["mode A (n = 15)", "mode B (n = 4)", "mode C (n = 20)"]
    for ax, mode in zip(figure.axes, "ABC"):
        for i, (position, e) in enumerate((("entity", "3"), ("final", "1"))):
            drawn, table = lines(ax)[f"{position} token"], tables[e][mode]
            np.testing.assert_array_equal(drawn.get_xdata(), table.layer)
            np.testing.assert_array_equal(drawn.get_ydata(), table["mean"])
            for edge, k in zip(band(ax, i), ("low", "high")): np.testing.assert_array_equal(edge, table[k])
        looks = [(l.get_linestyle(), l.get_markerfacecolor()) for l in lines(ax).values()]
        assert len(set(looks)) == 2 and {l.get_color() for l in lines(ax).values()} == {SITE_COLORS["resid_pre"]}
    assert len({ax.get_ylim() for ax in figure.axes}) == 1


def test_sites_are_the_tables_in_their_colors(run):
    tables = [curve(run, e, value="fraction") for e in ("2B", "2A")]
    figure = draw_sites(*tables)
    for ax, table, position in zip(figure.axes, tables, ("entity", "final")):
        assert position in ax.get_title() and list(lines(ax)) == ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
        for i, (site, drawn) in enumerate(lines(ax).items()):
            rows = table[table.site == site]
            np.testing.assert_array_equal(drawn.get_ydata(), rows["mean"])
            np.testing.assert_array_equal(band(ax, i)[0], rows["low"])
            assert drawn.get_color() == SITE_COLORS[site] and drawn.get_marker() == SITE_MARKS[site]["marker"]


def test_crossing_marks_the_depths(run):
    tables, depths = [curve(run, e, value="fraction") for e in ("3", "1")], {"entity": crossing(run), "final": Estimate(3.25, n=9)}
    figure = draw_crossing(*tables, depths)
    (ax,) = figure.axes
    assert legend_texts(figure) == [f"entity token: {depths['entity']:.2f}", "final token: 3.25 [no interval]"]
    for drawn, table in zip(lines(ax).values(), tables): np.testing.assert_array_equal(drawn.get_ydata(), table["mean"])
    assert [l.get_xdata()[0] for l in ax.lines if l.get_color() == ACCENT] == [depths["entity"].value, 3.25]
    (span,) = ax.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == pytest.approx((depths["entity"].low, depths["entity"].high))
    assert [l.get_ydata()[-1] for l in ax.lines if list(l.get_xdata()) == [7, 8]] == [0, 1]


def test_a_crossing_that_is_not_defined_is_not_marked(run):
    figure = draw_crossing(*(curve(run, e, value="fraction") for e in ("3", "1")), {"entity": Estimate(None), "final": Estimate(None)})
    assert not [l for l in figure.axes[0].lines if l.get_color() == ACCENT] and not figure.axes[0].patches
    assert "entity token: not defined" in legend_texts(figure)


def test_controls_stand_beside_the_real_curve():
    tables = [pd.concat([a_curve(seed=10 * k + i, control=c) for i, c in enumerate(("untrained", "none", "shuffled"))]) for k in (0, 1)]
    figure = draw_controls(*tables)
    assert legend_texts(figure) == ["real patch", "other position", "untrained model"], "real first, a control that is not there is not shown"
    for ax, table in zip(figure.axes, tables):
        for control in ("none", "shuffled", "untrained"):
            drawn, rows = lines(ax)[CONTROLS[control]["label"]], table[table.control == control]
            np.testing.assert_array_equal(drawn.get_ydata(), rows["mean"])
            assert (drawn.get_color(), drawn.get_marker()) == (CONTROLS[control]["color"], CONTROLS[control]["marker"])
        assert len(ax.collections) == 3
    fits(figure)


@pytest.mark.parametrize("n_layers", [8, 18, 48])
def test_categories_have_a_panel_each_on_one_scale(n_layers):
    table = pd.concat([a_curve(n_layers, i, category=c) for i, c in enumerate(CATEGORIES)]).assign(n=3)
    figure = draw_categories(table)
    assert [ax.get_title().replace("\n", " ") for ax in figure.axes] == [f"{c.replace('_', ' ')} (3)" for c in CATEGORIES]
    for ax, (_, rows) in zip(figure.axes, table.groupby("category", sort=False)):
        (drawn,) = lines(ax).values()
        np.testing.assert_array_equal(drawn.get_ydata(), rows["mean"])
        assert drawn.get_color() == SITE_COLORS["resid_pre"]
    assert len({ax.get_ylim() for ax in figure.axes}) == len({ax.get_xlim() for ax in figure.axes}) == 1
    fits(figure)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_single_pairs_are_their_rows(run, k):
    entity, final = (effect_matrix(run, e).head(k) for e in ("3", "1"))
    figure = draw_pairs(entity, final, {i: f"A rather long entity {i}/Another" for i in entity.index})
    for ax, pair_id in zip(figure.axes[:k], entity.index):
        assert pair_id in ax.get_title()
        np.testing.assert_array_equal(lines(ax)["entity token"].get_ydata(), entity.loc[pair_id])
        np.testing.assert_array_equal(lines(ax)["final token"].get_ydata(), final.loc[pair_id])
    fits(figure)


def test_one_pair_is_drawn_without_bands(tmp_path):
    run = make(tmp_path, n=1)
    figure = draw_residual({m: curve(run, "3", m) for m in "ABC"}, {m: curve(run, "1", m) for m in "ABC"})
    assert all(not ax.collections for ax in figure.axes) and len(lines(figure.axes[0])) == 2


# --- heads ----------------------------------------------------------------------------------------------------------

def test_head_maps_share_a_scale_centered_on_zero(run):
    tables = [head_table(run, e) for e in ("4", "4F")]
    figure = draw_heads(*tables)
    images = [ax.images[0] for ax in figure.axes[:2]]
    for ax, image, table in zip(figure.axes, images, tables):
        np.testing.assert_array_equal(image.get_array(), table["mean"].to_numpy().reshape(8, 4))
        assert image.origin == "lower" and len(ax.texts) == 32
        written = {t.get_position(): float(t.get_text()) for t in ax.texts}
        assert all(abs(written[h, l] - m) <= 0.005 + 1e-9 for l, h, m in zip(table.layer, table["head"], table["mean"]))
    limit = max(t["mean"].abs().max() for t in tables)
    assert [(i.norm.vmin, i.norm.vmax) for i in images] == [(-limit, limit)] * 2


def test_large_head_maps_name_the_largest_instead(tmp_path):
    run = make(tmp_path, n=4, n_layers=12, heads=16)
    tables = [head_table(run, e) for e in ("4", "4F")]
    for ax, table in zip(draw_heads(*tables).axes, tables):
        top = table.loc[table["mean"].abs().idxmax()]
        assert not ax.texts and f"{top['name']} {top['mean']:+.2f}" in ax.get_xlabel()


def test_heads_without_any_effect_can_be_drawn(tmp_path):
    figure = draw_heads(*(head_table(planted_run(tmp_path / e, steps([3, 3])), e) for e in ("4", "4F")))
    assert {t.get_text() for t in figure.axes[0].texts} == {"0"}


def test_frequent_heads_are_bars_with_their_intervals():
    table = pd.DataFrame({"name": [f"L{i}H0" for i in range(9)], "share": [0.4, 0.3, 0.1, 0.1, 0.05, 0, 0, 0, 0], "n": 20, "chance": 1 / 9})
    table = table.assign(low=table.share / 2, high=table.share + 0.2)
    figure = draw_head_frequency({"a": table, "b": table.assign(share=0.0)})
    ax, empty = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"L{i}H0" for i in range(5)], "a head that is never worst has no bar"
    assert [b.get_width() for b in ax.patches] == table.share[:5].tolist() and not empty.patches
    assert {b.get_facecolor()[:3] for b in ax.patches} == {tuple(int(SITE_COLORS["z"][i:i + 2], 16) / 255 for i in (1, 3, 5))}
    assert [l.get_xdata()[0] for l in ax.lines if l.get_color() == ACCENT] == [1 / 9] and legend_texts(figure) == ["all heads alike"]
    ends = np.array([s.get_paths()[0].vertices[:, 0] for s in [ax.collections[0]]])
    np.testing.assert_allclose(ends[0], table.loc[0, ["low", "high"]].astype(float))
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and ax.get_title() == "a\nn = 20" and ax.get_xlim() == empty.get_xlim()
    fits(figure)


# --- pairs ----------------------------------------------------------------------------------------------------------

def bars(ax):
    """Heights of bars by the place where they stand."""
    return {round(b.get_x() + b.get_width() / 2, 6): b.get_height() for b in ax.patches}


def test_worst_layers_are_the_counts_with_their_mean(run):
    worst = {m: worst_layer(run, "1", m) for m in "ABC"}
    figure = draw_worst(worst)
    for ax, (mode, found) in zip(figure.axes, worst.items()):
        assert bars(ax) == found.counts.to_dict() and all(b.get_facecolor()[:3] == (0, 0, 0) for b in ax.patches)
        (point,) = [l for l in ax.lines if l.get_marker() == "D"]
        assert point.get_xdata()[0] == pytest.approx(found.mean.value) and f"mean {found.mean:.1f}" in ax.get_title()
        ends = ax.collections[0].get_paths()[0].vertices[:, 0]
        np.testing.assert_allclose(ends, [found.mean.low, found.mean.high])
    fits(figure)


def test_pairs_without_a_layer_are_seen():
    table = pd.DataFrame({"pair_id": list("abcdef"), "layer": pd.array([2, 2, 3, None, None, None], "Int64"),
                          "status": ["found"] * 3 + ["never", "never", "from the start"]})
    none = Layers(table.assign(layer=pd.array([None] * 6, "Int64"), status="never"), 8)
    figure = draw_release({"x": Layers(table, 8), "y": none})
    first, second = figure.axes
    assert bars(first) == {**{l: 0 for l in range(8)}, 2: 2, 3: 1, -1.5: 1, 8.5: 2}
    assert [bool(b.get_hatch()) for b in first.patches] == [False] * 8 + [True] * 2
    assert first.get_xlabel() == "Release layer\nhatched: from the start (1)\nnever (2)" and second.get_xlabel() == "Release layer\nhatched: never (6)"
    assert "(3 of 6)" in first.get_title() and "not defined (0 of 6)" in second.get_title() and not second.lines
    assert first.get_xlim()[0] < -1.9 and first.get_xlim()[1] > 8.9
    fits(figure)


def points_of(n=30, seed=0):
    rng = np.random.default_rng(seed)
    swing = rng.uniform(5, 30, n)
    fraction = rng.normal(1, 0.02, n)
    return pd.DataFrame({"pair_id": [f"p{i}" for i in range(n)], "label": [f"clean {i}/corrupt {i}" for i in range(n)], "mode_a": np.arange(n) < 15,
                         "ld_clean": swing * 0.5, "total_swing": swing, "damage": -swing * fraction, "fraction": fraction, "entity": -swing,
                         "release": rng.integers(2, 6, n).astype(float)})


def offsets(ax):
    """The points of a cloud, pairs of mode C alone before those of mode A."""
    return np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])


def test_clouds_are_the_points_with_their_correlation():
    points, r = points_of(), {"damage": Estimate(-0.87, -0.9, -0.8, 30), "fraction": Estimate(0.1, -0.2, 0.3, 29)}
    points.loc[29, "damage"] = -1.0
    points.loc[4, "fraction"] = np.nan
    figure = draw_damage(points, "ld_clean", "Clean ld (logits)", r)
    ordered = pd.concat([points[~points.mode_a], points[points.mode_a]])
    for ax, y in zip(figure.axes, ("damage", "fraction")):
        np.testing.assert_array_equal(np.ma.filled(offsets(ax), np.nan), ordered[["ld_clean", y]])
        assert ax.get_title() == f"r = {r[y]:.2f}\nn = {r[y].n} pairs" and ax.get_xlabel() == "Clean ld (logits)"
        faces = [tuple(c.get_facecolor()[0][:3]) for c in ax.collections]
        assert faces == [(1, 1, 1), (0, 0, 0)] and legend_texts(figure) == ["other pairs", "mode A"]
    assert "clean 29/corrupt 29" in [t.get_text() for t in figure.axes[0].texts] and len(figure.axes[0].texts) <= 3
    assert not figure.axes[1].texts, "what is within a tenth of the axis has no name"
    assert figure.axes[1].get_ylim()[0] == 0
    fits(figure)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_whole_swing_is_a_line(sign):
    points = points_of().assign(damage=lambda t: sign * t.total_swing)
    figure = draw_damage(points, "total_swing", "TotalSwing (logits)", {"damage": Estimate(None), "fraction": Estimate(None)})
    (whole,) = [l for l in figure.axes[0].lines if l.get_label() == "whole swing"]
    np.testing.assert_allclose(whole.get_ydata(), sign * whole.get_xdata())
    assert figure.axes[0].get_title() == "r = not defined\nn = 0 pairs"


def test_the_farthest_points_are_named_and_no_others():
    x = pd.Series(np.arange(20.0))
    y = 2 * x + pd.Series([0.0] * 20).mask(x == 7, 9).mask(x == 12, -5).mask(x == 3, 0.1)
    assert farthest(x, y, 1.0) == [7, 12] and farthest(x, y, 1.0, k=1) == [7] and farthest(x, 2 * x, 0.5) == []
    assert farthest(x[:2], y[:2], 0) == [] and farthest(x * 0, y, 0) == []


def test_pairs_of_a_layer_stand_side_by_side_and_nearer_to_it_than_to_the_next():
    layer, y = pd.Series([2.0] * 40 + [5.0]), pd.Series(np.arange(41.0)[::-1])
    x = beside(layer, y)
    assert (x.round() == layer).all() and x.iloc[-1] == 5 and x[:40].nunique() == 5
    assert abs(np.corrcoef(x[:40], y[:40])[0, 1]) < 0.2, "the spread is no trend"


def test_release_against_damage_leaves_out_pairs_without_a_layer():
    points = points_of()
    points.loc[3, "release"] = np.nan
    figure = draw_release_damage(points, Estimate(0.2, 0.1, 0.3, 29), 8)
    (ax,) = figure.axes
    drawn, there = offsets(ax), points.drop(3)
    assert len(drawn) == 29 and sorted(drawn[:, 1]) == sorted(there.entity)
    by_effect = dict(zip(there.entity, there.release))
    assert all(round(x) == by_effect[y] for x, y in drawn) and ax.get_xlim() == (-0.6, 7.6)
    fits(figure)


def test_triage_draws_each_degree_and_counts_the_nested_sets(tmp_path):
    four = [i // 5 for i in range(20)]
    run = planted_run(tmp_path, steps([4] * 20), preferred=[k > 0 for k in four], kind=[k > 1 for k in four], known=[k > 2 for k in four])
    (ax,) = (figure := draw_triage(run.triage, 15)).axes
    assert set(lines(ax)) == {"first of all (5)", "first among its kind (10)", "preferred (15)", "not preferred (5)", "end of mode A"}
    assert len({to_hex(bar.get_facecolor()) for bar in ax.patches}) == 4 and sum(bool(bar.get_hatch()) for bar in ax.patches) == 5
    before = draw_triage(run.triage.drop(columns="first_of_kind"), 15)
    assert set(lines(before.axes[0])) == {"first of all (5)", "preferred (15)", "not preferred (5)", "end of mode A"}
    fits(figure), fits(before)


def test_triage_tells_the_unknown(run):
    figure = draw_triage(run.triage, 15)
    (ax,) = figure.axes
    triage = run.triage.set_index("rank")
    for bar in ax.patches:
        rank = round(bar.get_x() + bar.get_width() / 2)
        if rank < 0: continue  # the middle set is the smallest, too: only its name is shown
        assert bar.get_height() == run.triage.total_swing[rank - 1]
        assert to_hex(bar.get_facecolor()) == to_hex(KNOWN["first of all" if triage.known[rank] else "preferred"]["facecolor"])
    assert len(ax.patches) == 20 + 1 and set(lines(ax)) == {"first of all (17)", "first among its kind (17)", "preferred (20)", "end of mode A"}
    assert [l.get_xdata()[0] for l in ax.lines if l.get_label() == "end of mode A"] == [15.5]
    assert "end of mode A" not in lines(draw_triage(run.triage, 20).axes[0])
    fits(figure)


def test_drift_adds_up_to_the_battery():
    summary = pd.DataFrame({"tokenizer": ["kept all", "some", "many"], "pairs": 60, "usable": [60, 50, 38], "replaced": [0, 6, 20], "selected": [60, 56, 58]})
    figure = draw_drift(summary)
    (ax,) = figure.axes
    widths = np.array([b.get_width() for b in ax.patches]).reshape(3, 3)
    assert widths.tolist() == [[60, 50, 38], [0, 6, 20], [0, 4, 2]] and (widths.sum(0) == 60).all()
    starts = np.array([b.get_x() for b in ax.patches]).reshape(3, 3)
    np.testing.assert_array_equal(starts, widths.cumsum(0) - widths)
    assert [bool(b.get_linewidth()) for b in ax.patches] == [True] * 3 + [False] + [True] * 2 + [False] + [True] * 2, "a bar of no width has no edge"
    assert legend_texts(figure) == list(DRIFT) and [t.get_text() for t in ax.texts if t.get_text()] == ["60", "50", "38", "6", "20", "4", "2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == summary.tokenizer.tolist()
    fits(figure)


def test_colors_of_bars_say_the_same_everywhere():
    assert KNOWN["not preferred"]["edgecolor"] == DRIFT["lost"]["edgecolor"] == ACCENT


@pytest.mark.parametrize("criterion", ["effect", "fraction"])
def test_release_of_a_run_is_its_layers(run, criterion):
    found = release_layer(run, value=criterion)
    drawn = bars(draw_release({criterion: found}).axes[0])
    assert {l: drawn[l] for l in range(8)} == found.counts.to_dict() and sum(drawn.values()) == 20
