"""The common look: everything can be told apart with and without color, and names find room or are left out."""
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawn import clipped, overlapping, smallest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from bizzaroworld.figures.style import (ACCENT, CONTROLS, KNOWN, POSITIONS, RUN_LOOKS, SITE_COLORS, SITE_MARKS, SMALL, STYLE, WIDTH,
                                        layer_axis, line, name_points, panels, words)


def test_every_site_can_be_told_apart_with_and_without_color():
    sites = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z"]
    assert list(SITE_COLORS) == list(SITE_MARKS) == sites
    assert len(set(SITE_COLORS.values())) == 6 and len({m["marker"] for m in SITE_MARKS.values()}) == 6
    assert len({str(m["ls"]) for site, m in SITE_MARKS.items() if site != "z"}) == 5, "z is never drawn as a line with others"
    assert len({str(look) for look in POSITIONS.values()}) == 2 and len({str(look) for look in KNOWN.values()}) == 4


@pytest.mark.parametrize("looks", [list(CONTROLS.values()), list(RUN_LOOKS)], ids=["controls", "runs"])
def test_lines_that_share_a_panel_differ_in_dashes_marker_and_color(looks):
    for what in ("color", "ls", "marker"): assert len({str(look[what]) for look in looks}) == len(looks), what


def test_controls_that_coincide_are_both_seen():
    over, under = CONTROLS["untrained"], CONTROLS["shuffled"]
    assert list(CONTROLS)[-1] == "untrained" and over["mfc"] == "none" and over["ms"] > STYLE["lines.markersize"] >= under.get("ms", 0)


def test_a_color_of_a_site_means_that_site():
    others = {look["color"] for look in RUN_LOOKS} | {c["color"] for name, c in CONTROLS.items() if name != "none"} | {ACCENT}
    assert not others & set(SITE_COLORS.values()) and CONTROLS["none"]["color"] == SITE_COLORS["resid_pre"]
    assert all(re.fullmatch("#[0-9A-F]{6}", c) for c in others | set(SITE_COLORS.values()))


def dichromat(color, kind):
    """A color as it looks to the color-blind (Vienot, Brettel and Mollon 1999), as linear RGB."""
    rgb = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)])
    matrix = {"protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
              "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]}[kind]
    return np.array(matrix) @ rgb


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_sites_differ_to_the_color_blind(kind):
    seen = [dichromat(c, kind) for c in SITE_COLORS.values()]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[i + 1:]) > 0.12, "light; the nearest two are 0.14 apart"


@pytest.mark.parametrize("kind, twin", [("protan", "#006400"), ("deutan", "#00AC00")])
def test_the_simulation_confuses_what_the_color_blind_confuse(kind, twin):
    assert np.linalg.norm(dichromat("#FF0000", kind) - dichromat(twin, kind)) < 0.05 < np.linalg.norm(np.subtract(to_rgb("#FF0000"), to_rgb(twin)))


def test_letters_are_legible_at_half_the_width_of_a_page():
    assert SMALL * 3.25 / WIDTH > 5 and STYLE["font.size"] > SMALL


def test_a_line_is_the_table_with_its_band():
    table = pd.DataFrame({"depth": [0, 0.5, 1], "mean": [3.0, 2, 1], "low": [2.5, 1, 0], "high": [4.0, 3, 1]})
    figure, (ax,) = panels(1, 3)
    line(ax, table, "x", {"color": "red", "ls": ":"}, x="depth")
    (drawn,), (shade,) = ax.lines, ax.collections
    np.testing.assert_array_equal(drawn.get_xydata(), table[["depth", "mean"]])
    vertices = {tuple(v) for v in shade.get_paths()[0].vertices}
    assert {(x, y) for k in ("low", "high") for x, y in table[["depth", k]].itertuples(index=False)} <= vertices
    assert (drawn.get_color(), drawn.get_linestyle(), drawn.get_label()) == ("red", ":", "x")
    line(ax, table.assign(low=np.nan, high=np.nan), "y", {"color": "red"}, x="depth")
    assert len(ax.collections) == 1 and len(ax.lines) == 2


def test_panels_above_a_free_cell_keep_their_axis():
    figure, axes = panels(5, 4, columns=3)
    assert len(axes) == 5 and [ax.xaxis.get_tick_params()["labelbottom"] for ax in axes] == [False, False, True, True, True]
    assert len({ax.get_ylim() for ax in axes}) == 1 and figure.get_figwidth() == WIDTH


@pytest.mark.parametrize("n, most, expected", [(8, 9, list(range(8))), (18, 6, [0, 3, 6, 9, 12, 15]), (48, 9, [0, 6, 12, 18, 24, 30, 36, 42]), (1, 6, [0])])
def test_layers_are_whole_and_begin_at_zero(n, most, expected):
    _, (ax,) = panels(1, 3)
    layer_axis(ax, n, most=most)
    assert ax.get_xticks().tolist() == expected


def test_names_are_wrapped_at_words():
    assert words("mythology_roman_greek") == "mythology\nroman greek" and words("x") == "x"


def test_names_stay_inside_and_off_points_and_each_other():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 40))
    figure, (ax,) = panels(1, 3, 4)
    ax.scatter(x, y)
    limits = ax.get_xlim(), ax.get_ylim()
    found = name_points(ax, x, y, {i: f"pair-{i:02d}" for i in range(40)})
    assert 5 < len(found) < 40 and (ax.get_xlim(), ax.get_ylim()) == limits
    assert overlapping(figure) == [] and clipped(figure) == []
    at = ax.transData.transform(np.column_stack([x, y]))
    for note in found:
        box = note.get_window_extent()
        assert not box.count_contains(at) and ax.get_window_extent().containsx(box.x0) and ax.get_window_extent().containsx(box.x1)
        assert tuple(note.xy) == (x[int(note.get_text()[-2:])], y[int(note.get_text()[-2:])])


def test_a_name_without_room_is_left_out():
    figure, (ax,) = panels(1, 3, 4)
    assert name_points(ax, [0.5], [0.5], {0: "a name that is much too long for any panel of this small a figure"}) == []
    assert not ax.texts


def test_the_checks_of_looks_see_what_they_look_for():
    figure = Figure(figsize=(6.5, 3))
    figure.text(0.5, 0.5, "one", fontsize=8), figure.text(0.51, 0.5, "two"), figure.text(0.98, 0.9, "far out")
    assert clipped(figure) == ["far out"] and overlapping(figure) == [("one", "two")] and smallest(figure) == 4
    plt.close("all")
