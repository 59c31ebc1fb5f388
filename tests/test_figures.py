"""Figures: what is drawn is what the tables say, the texts are complete, and the files are the same each time."""
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from planted import planted_run, steps

from bizzaroworld.analysis import crossing, curve, head_table, worst_layer
from bizzaroworld.estimates import Estimate
from bizzaroworld.figures import (CAPTIONS, CROSSING_COLOR, KNOWN, SITE_COLORS, SITE_MARKS, about, caption, draw_crossing,
                                  draw_heads, draw_residual, draw_sites, draw_triage, draw_worst, plates, save_figures)
from bizzaroworld.runs import RunError

NAMES = ["residual", "sites", "crossing", "worst", "heads", "triage"]


def make(folder, n=20, n_layers=8, heads=4, **options):
    """A run with noise on everything, so that no two numbers agree by chance."""
    rng = np.random.default_rng(n + n_layers)
    curves = steps(rng.integers(2, n_layers - 1, n), n_layers) * 0.9 + rng.normal(0, 0.05, (n, n_layers))
    z = rng.normal(0, 0.05, (2, n, n_layers, heads))
    sub = {s: rng.normal(0.1, 0.05, (n, n_layers)) for s in ("attn_out", "resid_mid", "mlp_out", "resid_post")}
    known = np.arange(n) % 7 != 3
    final = 1 - steps(rng.integers(1, n_layers - 2, n), n_layers) * 0.9 + rng.normal(0, 0.05, (n, n_layers))
    return planted_run(folder, curves, final=final, heads_entity=z[0], heads_final=z[1], sublayers=sub, known=known, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run") / "r")


def lines(ax):
    """The curves of a panel: those that are in the legend."""
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles))


def band(ax, i):
    """Lower and upper edge of the i-th band, by layer."""
    points = pd.DataFrame(ax.collections[i].get_paths()[0].vertices, columns=["x", "y"]).groupby("x").y
    return points.min().to_numpy(), points.max().to_numpy()


# --- what is drawn --------------------------------------------------------------------------------------------------

def test_residual_curves_are_the_tables(run):
    tables = {e: {m: curve(run, e, m) for m in "ABC"} for e in ("3", "1")}
    figure = draw_residual(tables["3"], tables["1"], about(run))
    assert [ax.get_title() for ax in figure.axes] == ["mode A (n = 15)", "mode B (n = 4)", "mode C (n = 20)"]
    for ax, mode in zip(figure.axes, "ABC"):
        for i, (position, e) in enumerate((("entity", "3"), ("final", "1"))):
            line, table = lines(ax)[f"{position} token"], tables[e][mode]
            np.testing.assert_array_equal(line.get_xdata(), table.layer)
            np.testing.assert_array_equal(line.get_ydata(), table["mean"])
            for edge, k in zip(band(ax, i), ("low", "high")): np.testing.assert_array_equal(edge, table[k])
        looks = [(l.get_linestyle(), l.get_markerfacecolor()) for l in lines(ax).values()]
        assert len(set(looks)) == 2 and {l.get_color() for l in lines(ax).values()} == {SITE_COLORS["resid_pre"]}
    assert len({ax.get_ylim() for ax in figure.axes}) == 1


def test_sites_are_the_tables_in_their_colors(run):
    tables = [curve(run, e, value="fraction") for e in ("2B", "2A")]
    figure = draw_sites(*tables, about(run))
    for ax, table, position in zip(figure.axes, tables, ("entity", "final")):
        assert position in ax.get_title() and list(lines(ax)) == ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
        for i, (site, line) in enumerate(lines(ax).items()):
            rows = table[table.site == site]
            np.testing.assert_array_equal(line.get_ydata(), rows["mean"])
            np.testing.assert_array_equal(band(ax, i)[0], rows["low"])
            assert line.get_color() == SITE_COLORS[site] and line.get_marker() == SITE_MARKS[site]["marker"]


def test_crossing_marks_the_depths(run):
    tables, depths = [curve(run, e, value="fraction") for e in ("3", "1")], {"entity": crossing(run), "final": Estimate(3.25, n=9)}
    figure = draw_crossing(*tables, depths, about(run))
    (ax,) = figure.axes
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [f"entity token: {depths['entity']:.2f}", "final token: 3.25 [no interval]"]
    for line, table in zip(lines(ax).values(), tables): np.testing.assert_array_equal(line.get_ydata(), table["mean"])
    marks = [l.get_xdata()[0] for l in ax.lines if l.get_color() == CROSSING_COLOR]
    assert marks == [depths["entity"].value, 3.25]
    (span,) = ax.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == pytest.approx((depths["entity"].low, depths["entity"].high))
    ends = [l.get_ydata()[-1] for l in ax.lines if list(l.get_xdata()) == [7, 8]]
    assert ends == [0, 1]


def test_a_crossing_that_is_not_defined_is_not_marked(run):
    tables = [curve(run, e, value="fraction") for e in ("3", "1")]
    figure = draw_crossing(*tables, {"entity": Estimate(None), "final": Estimate(None)}, about(run))
    assert not [l for l in figure.axes[0].lines if l.get_color() == CROSSING_COLOR] and not figure.axes[0].patches
    assert "entity token: not defined" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_worst_layers_are_the_counts(run):
    worst = {m: worst_layer(run, "1", m) for m in "ABC"}
    for ax, found in zip(draw_worst(worst, about(run)).axes, worst.values()):
        assert {round(b.get_x() + b.get_width() / 2): b.get_height() for b in ax.patches} == found.counts.to_dict()
        assert [t.get_text() for t in ax.texts if t.get_text()] == [str(n) for n in found.counts if n]


def test_head_maps_share_a_scale_centered_on_zero(run):
    tables = [head_table(run, e) for e in ("4", "4F")]
    figure = draw_heads(*tables, about(run))
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
    for ax, table in zip(draw_heads(*tables, about(run)).axes, tables):
        top = table.loc[table["mean"].abs().idxmax()]
        assert not ax.texts and f"{top['name']} {top['mean']:+.2f}" in ax.get_xlabel()


def test_heads_without_any_effect_can_be_drawn(tmp_path):
    tables = [head_table(planted_run(tmp_path, steps([3, 3])), e) for e in ("4", "4F")]
    figure = draw_heads(*tables, about(planted_run(tmp_path / "b", steps([3, 3]))))
    assert {t.get_text() for t in figure.axes[0].texts} == {"0"}


def test_triage_tells_the_unknown(run):
    (ax,) = draw_triage(run.triage, about(run)).axes
    known = run.triage.set_index("rank").known
    for bar in ax.patches:
        rank = round(bar.get_x() + bar.get_width() / 2)
        assert bar.get_height() == run.triage.total_swing[rank - 1]
        assert bool(bar.get_hatch()) == (not known[rank])
    assert len(ax.patches) == 20 and {"known (17)", "not known (3)", "end of mode A"} == set(lines(ax))
    assert KNOWN[True] != KNOWN[False]


def test_one_pair_is_drawn_without_bands(tmp_path):
    run = make(tmp_path, n=1)
    figure = draw_residual({m: curve(run, "3", m) for m in "ABC"}, {m: curve(run, "1", m) for m in "ABC"}, about(run))
    assert all(not ax.collections for ax in figure.axes) and len(lines(figure.axes[0])) == 2
    assert len(plates(run)) == 6


# --- how it looks ---------------------------------------------------------------------------------------------------

def test_every_site_can_be_told_apart_with_and_without_color():
    sites = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z"]
    assert list(SITE_COLORS) == list(SITE_MARKS) == sites
    assert len(set(SITE_COLORS.values())) == 6 and len({m["marker"] for m in SITE_MARKS.values()}) == 6
    assert len({str(m["ls"]) for site, m in SITE_MARKS.items() if site != "z"}) == 5, "z is never drawn as a line with others"
    assert CROSSING_COLOR not in SITE_COLORS.values()


def texts_of(figure):
    """The visible texts of a drawn figure and the boxes that they fill."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    unseen = [label for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)
              for label, at in zip(axis.get_ticklabels(), axis.get_ticklocs()) if not axis.get_view_interval().min() <= at <= axis.get_view_interval().max()]
    inside = [t for t in figure.findobj(plt.Text) if t.get_visible() and t.get_text().strip() and t not in unseen]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in inside]


def clipped(figure):
    """Texts that reach over the edge of the figure."""
    page = figure.bbox
    return [t for t, box in texts_of(figure) if box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y0 < page.y0 - 1 or box.y1 > page.y1 + 1]


def overlapping(figure):
    """Pairs of texts that lie on each other."""
    found = texts_of(figure)
    return [(a, b) for i, (a, p) in enumerate(found) for b, q in found[i + 1:]
            if min(p.x1, q.x1) - max(p.x0, q.x0) > 1 and min(p.y1, q.y1) - max(p.y0, q.y0) > 1]


@pytest.mark.parametrize("shape", [dict(), dict(n=60, n_layers=18, heads=8), dict(n=6, n_layers=48, heads=16, direction="denoising")])
def test_no_text_is_clipped_or_covered_and_letters_are_large(tmp_path, shape):
    for plate in plates(make(tmp_path, **shape)):
        assert clipped(plate.figure) == [] and overlapping(plate.figure) == [], plate.name
        points = {t.get_fontsize() * 6.5 / plate.figure.get_figwidth() for t in plate.figure.findobj(plt.Text) if t.get_text().strip()}
        assert min(points) > 7.5, "on a page of 6.5 inches, and half of it in half a column"


def test_the_checks_of_looks_see_what_they_look_for():
    figure = Figure(figsize=(4, 3))
    figure.text(0.5, 0.5, "one"), figure.text(0.51, 0.5, "two"), figure.text(0.98, 0.9, "far out")
    assert clipped(figure) == ["far out"] and overlapping(figure) == [("one", "two")]


# --- texts ----------------------------------------------------------------------------------------------------------

def test_every_figure_has_a_caption_that_stands_alone_and_a_text(run):
    found = plates(run)
    assert [p.name for p in found] == NAMES == list(CAPTIONS)
    for p in found:
        assert p.caption == caption(p.name, about(run)) and "{" not in p.caption
        assert "embedded model planted" in p.caption and "ld" in p.caption and "20" in p.caption and "0: " in p.caption
        assert ("noising" in p.caption or "unpatched runs" in p.caption) and len(p.alt) > 60 and "nan" not in p.alt
        if p.name in ("sites", "crossing"): assert "1: the answer is that of the run the patch came from" in p.caption and "(n = 20 of 20 pairs)" in p.caption
        if p.name in ("residual", "sites", "crossing"): assert "95% bootstrap intervals over pairs" in p.caption
    texts = {p.name: p.alt for p in found}
    c = curve(run, "3", value="fraction")
    assert f"starts at {c['mean'].iloc[0]:.2f}, ends at 0.00" in texts["crossing"] and crossing(run) != crossing(run, experiment="1")
    assert re.findall(r"one half at (.*?\])", texts["crossing"]) == [f"{crossing(run)}", f"{crossing(run, experiment='1')}"]
    assert "3 of 20 pairs are not known" in texts["triage"]
    assert "by construction" in found[0].caption and "Nearly an identity" in found[3].caption


def test_captions_follow_the_direction_and_the_kind_of_model(tmp_path):
    what = about(make(tmp_path, direction="denoising", embedded=False))
    text = caption("residual", what)
    assert "repair is positive" in text and "damage" not in text and "embedded" not in text and "planted" in text


def test_pairs_without_a_fraction_are_not_counted_in_it(tmp_path):
    run = make(tmp_path, n=6, swings=[9.0, 8, 7, 6, 0.5, -2])
    found = {p.name: p for p in plates(run)}
    assert about(run).n == {"A": 6, "B": 4, "C": 6, "fraction": 4}
    assert all("n = 4 of 6" in found[name].caption for name in ("sites", "crossing")) and "6 pairs" in found["heads"].caption
    assert all("(n = 4)" in ax.get_title() for ax in found["sites"].figure.axes)
    assert set(curve(run, "2B", value="fraction").n) == {4}


# --- files ----------------------------------------------------------------------------------------------------------

def test_files_are_the_same_each_time_whatever_the_readers_settings(run, tmp_path):
    first = save_figures(run, tmp_path / "a")
    with plt.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 40, "savefig.transparent": True, "hatch.linewidth": 9}):
        second = save_figures(run, tmp_path / "b")
    assert [p.name for p in first] == [f"{n}.png" for n in NAMES]
    for a, b in zip(first, second): assert a.read_bytes() == b.read_bytes(), a.name
    assert plt.get_fignums() == [] and sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([*(p.name for p in first), "captions.json"])


def test_files_hold_their_texts_and_no_trace_of_the_machine(run, tmp_path):
    found = {f"{p.name}.png": p for p in plates(run)}
    stored = json.loads((save_figures(run, tmp_path)[0].parent / "captions.json").read_text("utf-8"))
    assert set(stored) == set(found)
    for name, plate in found.items():
        with Image.open(tmp_path / name) as image:
            assert set(image.info) == {"dpi", "Title", "Description"} and round(image.info["dpi"][0]) == 150
            assert image.info["Title"] == plate.caption == stored[name]["caption"]
            assert image.info["Description"] == plate.alt == stored[name]["alt"]
            assert len(image.convert("RGB").getcolors(1 << 20)) > 3


def test_a_figure_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    def broken(self, path, **options):
        path.write_bytes(b"half an image")
        raise OSError("disk full")
    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"): save_figures(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_experiment_is_named(tmp_path):
    with pytest.raises(RunError, match="'4F'"): save_figures(make(tmp_path / "r", leave_out=("4F",)), tmp_path / "f")
    assert not (tmp_path / "f").exists()
