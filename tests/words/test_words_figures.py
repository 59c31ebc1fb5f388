"""Figures of the wing: what is drawn are the tables, and nothing is cut off."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawn import clipped, legend_texts, lines, overlapping, smallest

from bizzaroworld.files import data_path
from bizzaroworld.words.local import ELSEWHERE, ITSELF, KINDS, UNRELATED
from bizzaroworld.words.words_figures import AGAINST, PLACE_LOOKS, RULES, draw_kinds, draw_local, draw_offsets, draw_place, kinds_plate, local_plate, offsets_plate, place_plate


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def fits(figure):
    assert clipped(figure) == [] and overlapping(figure) == [] and smallest(figure) > 5


def medians(n_layers=6, seed=0):
    """A `locality_table` of random medians."""
    rng, rows = np.random.default_rng(seed), []
    for against, kind, context in [(ITSELF, k, c) for k in ("all", *KINDS) for c in (0, 1, 3, 10)] + [(ELSEWHERE, "all", 10), (UNRELATED, "all", pd.NA)]:
        for layer in range(n_layers):
            m = rng.uniform(0, 0.95)
            rows.append({"against": against, "kind": kind, "layer": layer, "context": context, "median": m, "low": m - 0.05, "high": m + 0.05, "n": 40 if kind == "all" else 7, "texts": 5})
    return pd.DataFrame(rows).astype({"context": "Int64"})


def test_the_names_of_the_controls_are_those_of_the_tables():
    assert list(AGAINST) == [ELSEWHERE, UNRELATED]


def test_local_lines_are_the_medians():
    tables = {"one": medians(), "other": medians(seed=1)}
    figure = draw_local(tables)
    fits(figure)
    for ax, table in zip(figure.axes, tables.values()):
        drawn = lines(ax)
        for context in (0, 1, 3, 10):
            rows = table[(table.against == ITSELF) & (table.kind == "all") & (table.context == context)]
            assert drawn[f"{context} before it"].get_ydata().tolist() == rows["median"].tolist()
        assert drawn["same token"].get_ydata().tolist() == table[table.against == ELSEWHERE]["median"].tolist() and drawn["any token"].get_ydata().tolist() == table[table.against == UNRELATED]["median"].tolist()
    plate = local_plate(tables, "made-up")
    assert "n = 40 tokens of 5 texts, made-up" in plate.caption and "1: what is further back makes no difference; 0: " in plate.caption and "made-up" in plate.full_caption


def test_kinds_are_lines_of_one_context():
    table = medians()
    figure = draw_kinds(table, 3)
    fits(figure)
    drawn = lines(figure.axes[0])
    assert set(drawn) == {f"{k} (7)" for k in KINDS}
    for kind in KINDS: assert drawn[f"{kind} (7)"].get_ydata().tolist() == table[(table.kind == kind) & (table.context == 3)]["median"].tolist()
    assert "with 3 tokens of context" in kinds_plate(table, "made-up", 3).caption


def test_bars_are_the_accuracies_where_the_first_word_is_left_out():
    rng = np.random.default_rng(0)
    table = pd.DataFrame([{"relation": r, "rule": rule, "allowed": allowed, "accuracy": a, "low": a - 0.1, "high": a + 0.1, "chance": 4e-6, "n": 50}
                          for r in ("capital", "plural", "space", "capital letter") for rule in RULES for allowed in (False, True) for a in [rng.uniform(0.2, 0.8)]])
    figure = draw_offsets(table)
    fits(figure)
    heights = {round(bar.get_height(), 9) for bar in figure.axes[0].patches}
    assert heights == set(table[~table.allowed].accuracy.round(9)) and legend_texts(figure) == list(RULES.values())
    assert "capital 50, plural 50" in offsets_plate(table, "made-up").caption and "chance 4e-06" in offsets_plate(table, "made-up").caption


def test_place_lines_are_the_accuracies():
    rng = np.random.default_rng(0)
    table = pd.DataFrame([{"design": d, "labels": r, "layer": l, "accuracy": a, "low": a - 0.05, "high": a + 0.05, "chance": 1 / 3, "space_alone": 1 / 3, "position_alone": 1.0, "n": 1200, "groups": 40}
                          for d, r in PLACE_LOOKS for l in range(5) for a in [rng.uniform(0.3, 0.9)]])
    figure = draw_place(table)
    assert clipped(figure) == [] and smallest(figure) > 5 and [ax.get_title() for ax in figure.axes] == ["phrases", "pieces of words"]
    drawn = lines(figure.axes[0]) | lines(figure.axes[1])
    for (design, labels), label in zip(PLACE_LOOKS, drawn): assert drawn[label].get_ydata().tolist() == table[(table.design == design) & (table.labels == labels)].accuracy.tolist()
    assert len(draw_place(table[table.design == "controlled"]).axes) == 1
    assert "controlled 1,200 of 40" in place_plate(table, "made-up").caption


@pytest.mark.parametrize("model", ("gemma-3-270m",))
def test_the_figures_of_the_paper_fit(model):
    local, scaled, offsets, place = (pd.read_csv(data_path("words", model, f"{name}.csv")) for name in ("local", "scaled", "offsets", "place"))
    for plate in (local_plate({"mean removed": local, "and scaled": scaled}, model), kinds_plate(local, model, 10), offsets_plate(offsets, model)): fits(plate.figure)
    figure = place_plate(place, model).figure
    assert clipped(figure) == []
    for ax in figure.axes:  # a legend inside the panel: no curve runs through it
        box = ax.get_legend().get_window_extent()
        assert not any(box.contains(*point) for line in lines(ax).values() for point in ax.transData.transform(line.get_xydata()))
