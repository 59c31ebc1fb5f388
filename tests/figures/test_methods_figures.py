"""Figures of the grid of methods: what is drawn are the tables, every figure fits, and captions say what is shown."""
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawn import clipped, legend_texts, lines, overlapping, smallest
from matplotlib.colors import to_hex
from planted_grid import plant

from bizzaroworld.figures.methods_figures import (MOST, SIGNS, draw_corruptions, draw_detections, draw_multiverse, draw_position_maps,
                                                  draw_position_ratios, draw_windows, methods_plates)
from bizzaroworld.methods.detections import component_table
from bizzaroworld.methods.multiverse import agreement, layer_curves, multiverse, peak_ratios, position_ratios, variance_explained, window_sums

RNG = np.random.default_rng(0)
METRICS, DIRECTIONS = ("ld", "prob", "kl"), ("noising", "denoising")


def bump(at, n=12): return np.exp(-0.5 * (np.arange(n) - at) ** 2)


def layers(windows=(1, 3, 5), positions=("entity", "subject_middle", "final"), n=6):
    return pd.concat([plant({"STR": 1, "GN": 2}[c] * w ** 0.5 * bump({"entity": 7, "subject_middle": 4, "final": 10}[p]) / (1 + (p != "entity")) + RNG.normal(0, 0.05, (n, 12)),
                            corruption=c, metric=m, direction=d, window=w, position=p)
                      for c, m, d, w, p in itertools.product(("STR", "GN"), METRICS, DIRECTIONS, windows, positions)], ignore_index=True)


def heads(n=8, controls=("", "unrelated"), corruptions=("STR", "GN"), strong=1.0):
    means = np.zeros((12, 4))
    means[9, 2], means[10, 3], means[3, 0] = strong, -0.7 * strong, 0.35 * strong
    return pd.concat([plant((means if not k else 0) + RNG.normal(0, 0.3, (n, 12, 4)), corruption=c, metric=m, direction=d, site="z", position="all", control=k)
                      for c, m, d, k in itertools.product(corruptions, METRICS, DIRECTIONS, controls)], ignore_index=True)


@pytest.fixture(scope="module")
def grid(): return layers()


@pytest.fixture(scope="module")
def head_rows(): return heads()


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def fits(figure):
    assert clipped(figure) == [] and overlapping(figure) == [] and smallest(figure) > 5


def test_curves_are_the_table(grid):
    curves = layer_curves(grid.query("position == 'entity' and direction == 'noising' and window == 1"))
    figure = draw_corruptions(curves)
    assert [ax.get_title() for ax in figure.axes] == list(METRICS) and legend_texts(figure) == ["STR", "GN"]
    for ax in figure.axes:
        for corruption, drawn in lines(ax).items():
            np.testing.assert_allclose(drawn.get_ydata(), curves[(curves.metric == ax.get_title()) & (curves.corruption == corruption)]["mean"])
    assert lines(figure.axes[0])["STR"].get_linestyle() != lines(figure.axes[0])["GN"].get_linestyle()
    fits(figure)


def test_maps_are_the_table_on_one_scale(grid):
    curves = layer_curves(grid.query("corruption == 'GN' and direction == 'denoising' and window == 1"))
    figure = draw_position_maps(curves)
    maps = figure.axes[:3]
    for ax in maps:
        rows = curves[(curves.metric == ax.get_title())].pivot(index="position", columns="layer", values="mean")
        np.testing.assert_allclose(ax.images[0].get_array(), rows.loc[["entity", "subject_middle", "final"]])
    assert len({ax.images[0].norm.vmax for ax in maps}) == 1 and maps[0].images[0].norm.vmin == -maps[0].images[0].norm.vmax
    fits(figure)


def test_windows_and_sums_are_both_drawn_with_the_peak_ratio(grid):
    rows = grid.query("position == 'entity' and direction == 'denoising' and metric == 'kl' and corruption == 'STR'")
    sums, ratios = window_sums(rows), peak_ratios(rows)
    figure = draw_windows(sums, ratios)
    for ax, width in zip(figure.axes, (3, 5)):
        window, total = lines(ax).values()
        np.testing.assert_allclose(window.get_ydata(), sums[sums.window == width]["effect"])
        np.testing.assert_allclose(total.get_ydata(), sums[sums.window == width]["sum"])
        assert f"{ratios[(ratios.window == width) & (ratios.place == 'all')].ratio.iloc[0]:.2f}" in ax.get_title()
    fits(figure)


def test_ratios_stand_at_their_values_and_an_open_interval_reaches_the_edge(grid):
    ratios = position_ratios(grid[grid.window == 1])
    ax, = draw_position_ratios(ratios.assign(high=np.inf)).axes
    drawn = np.concatenate([c.lines[0].get_xdata() for c in ax.containers])
    np.testing.assert_allclose(sorted(drawn), sorted(ratios.ratio))
    ends = [segment[:, 0].max() for c in ax.containers for segment in c.lines[2][0].get_segments()]
    assert min(ends) > ax.get_xlim()[1], "no end is drawn where there is none"
    fits(ax.figure)
    ax, = draw_position_ratios(ratios.assign(ratio=ratios.ratio.where(ratios.corruption == "STR"), low=np.nan, high=np.nan)).axes
    assert sum(len(c.lines[0].get_xdata()) for c in ax.containers) == 6 and np.isfinite(ax.get_xlim()).all()


def test_every_detection_has_its_mark(head_rows):
    found = component_table(head_rows)
    figure = draw_detections(found)
    top, below = figure.axes
    names = [t.get_text() for t in top.get_yticklabels()]
    assert {"L9H2", "L10H3"} <= set(names) == set(found.name[found.sign != ""])
    marks = [(to_hex(c.get_edgecolor()[0]).upper(), len(c.get_facecolor()), s, x, y) for c in top.collections for (x, y), s in zip(c.get_offsets(), np.resize(c.get_sizes(), len(c.get_offsets())))]
    for sign in SIGNS:
        detected = [m for m in marks if m[0] == SIGNS[sign]["color"] and m[1]]
        assert len(detected) == (found.sign == sign).sum() > 0
    shown = {(names[int(m[4])], int(m[3])): m[2] for m in marks if m[1]}
    columns = found.drop_duplicates(["corruption", "metric", "direction", "window"]).reset_index()
    row = found[(found.name == "L9H2") & (found.metric == "kl") & (found.corruption == "GN") & (found.direction == "noising")].iloc[0]
    at = columns.index[(columns.metric == "kl") & (columns.corruption == "GN") & (columns.direction == "noising")][0]
    assert shown[("L9H2", at)] == max(s for s in shown.values()) and row.share == 1
    assert [t.get_text() for t in below.get_yticklabels()] == ["STR", "GN", *METRICS, *DIRECTIONS], "the window does not vary"
    assert len(below.patches) == 3 * len(columns)
    fits(figure)


def test_many_detections_are_cut_to_the_most_frequent_and_none_is_no_error():
    many = component_table(plant(np.repeat(RNG.standard_t(2, (1, 30, 40)), 5, 0), site="z"))
    assert (many.sign != "").sum() > MOST
    assert len(draw_detections(many).axes[0].get_yticks()) == MOST
    none = component_table(plant(np.tile([[1.0, -1.0]], (5, 10, 1)), site="z"))
    assert len(draw_detections(none).axes[0].get_yticks()) == 0


def test_the_multiverse_marks_what_agrees(grid):
    rows = grid.query("position == 'entity'").assign(patched=lambda t: t.patched.where((t.corruption == "STR") | (t.layer != 7), t[["clean", "corrupt"]].mean(axis=1) * 0))
    found, variance = multiverse(rows), variance_explained(rows, unit=["layer"], permutations=20)
    figure = draw_multiverse(found, variance)
    top, middle, below = figure.axes
    told = agreement(found).query("of > 0")
    assert len(top.get_yticks()) == 2, "no heads, no conclusions about heads"
    counts = [len(c) for c in top.containers]
    assert {bar.get_height() for c in top.containers[::2] for bar in c} != {bar.get_height() for c in top.containers[1::2] for bar in c}
    assert counts == [n for r in told.itertuples() for n in (r.holds, r.of - r.holds)]
    assert f"({told.share.iloc[0]:.0%})" in top.get_yticklabels()[0].get_text()
    np.testing.assert_allclose([bar.get_width() for bar in below.patches], variance.share[:-1])
    fits(figure)


@pytest.fixture(scope="module")
def found(grid, head_rows): return {p.name: p for p in methods_plates(pd.concat([grid, head_rows]), "toy 1M")}


def test_every_plate_has_its_words(found):
    assert list(found) == ["corruptions", "position_maps", "windows", "position_ratios", "detections", "multiverse"]
    for plate in found.values():
        assert "Model: toy 1M; task: t." in plate.full_caption and "positive" in plate.full_caption and "0:" in plate.full_caption and "1:" in plate.full_caption
        assert "n = " in plate.caption and len(plate.alt) > 60 and "nan" not in plate.caption + plate.alt
        fits(plate.figure)
    for name in ("corruptions", "position_maps", "windows", "detections", "multiverse"):
        assert "metric" in found[name].caption and "noising" in found[name].caption
    assert "n = 6 pairs" in found["corruptions"].caption and "n = 8 pairs" in found["detections"].caption
    assert "control unrelated has" in found["detections"].caption and "beyond" in found["detections"].caption
    assert "L9H2 in 12" in found["detections"].alt


def test_what_the_table_lacks_is_left_out(grid, head_rows):
    assert [p.name for p in methods_plates(head_rows, "m")] == ["detections", "multiverse"]
    assert [p.name for p in methods_plates(grid[(grid.window == 1) & (grid.position == "entity")], "m")] == ["corruptions", "multiverse"]
    with pytest.raises(ValueError, match="One task"): methods_plates(pd.concat([grid, grid.assign(task="u")]), "m")
    with pytest.raises(ValueError, match="attn_out at entity"): methods_plates(grid, "m", site="attn_out")


def test_holes_are_said_in_the_caption(grid):
    holed = grid[~((grid.metric == "kl") & (grid.corruption == "GN") & (grid.window == 5))]
    caption = {p.name: p for p in methods_plates(holed, "m")}["multiverse"].caption
    assert "left out" in caption
    assert "left out" not in {p.name: p for p in methods_plates(grid, "m")}["multiverse"].caption
