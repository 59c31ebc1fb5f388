"""Runs to draw, and a look at what was drawn: curves, bands, texts that are cut off or lie on each other."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from planted import planted_run, steps

from bizzaroworld.files import write_table


def make(folder, n=20, n_layers=8, heads=4, **options):
    """A run with noise on everything, so that no two numbers agree by chance."""
    rng = np.random.default_rng(n + n_layers)
    curves = steps(rng.integers(2, n_layers - 1, n), n_layers) * 0.9 + rng.normal(0, 0.05, (n, n_layers))
    z = rng.normal(0, 0.05, (2, n, n_layers, heads))
    sub = {s: rng.normal(0.1, 0.05, (n, n_layers)) for s in ("attn_out", "resid_mid", "mlp_out", "resid_post")}
    known = np.arange(n) % 7 != 3
    final = 1 - steps(rng.integers(1, n_layers - 2, n), n_layers) * 0.9 + rng.normal(0, 0.05, (n, n_layers))
    return planted_run(folder, curves, final=final, heads_entity=z[0], heads_final=z[1], sublayers=sub, known=known, **options)


def add_controls(run):
    """Controls that keep a known part of the effect: `unrelated` a third, `shuffled` a tenth, `untrained` nothing."""
    rows = run.effects[run.effects.experiment.isin(["1", "3"])]
    parts = [rows.assign(control=c, effect=rows.effect * k, patched=rows.clean + rows.effect * k)
             for c, k in (("unrelated", 1 / 3), ("shuffled", 0.1), ("untrained", 0.0))]
    write_table(run.folder / "controls.parquet", pd.concat(parts, ignore_index=True))
    return run


def lines(ax):
    """The curves of a panel by their labels: those that a legend shows."""
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles))


def band(ax, i):
    """Lower and upper edge of the i-th band, by layer."""
    points = pd.DataFrame(ax.collections[i].get_paths()[0].vertices, columns=["x", "y"]).groupby("x").y
    return points.min().to_numpy(), points.max().to_numpy()


def legend_texts(figure):
    """What the legend above the panels says."""
    return [t.get_text() for t in figure.legends[0].get_texts()]


def texts_of(figure):
    """The visible texts of a drawn figure and the boxes that they fill."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    unseen = [label for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)
              for label, at in zip(axis.get_ticklabels(), axis.get_ticklocs()) if not min(axis.get_view_interval()) <= at <= max(axis.get_view_interval())]
    unseen += [t for ax in figure.axes if not ax.axison for t in ax.findobj(plt.Text)]
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


def smallest(figure):
    """The height of the smallest letters, in points, when the figure is printed in half a column (3.25 inches)."""
    return min(t.get_fontsize() for t in figure.findobj(plt.Text) if t.get_visible() and t.get_text().strip()) * 3.25 / figure.get_figwidth()
