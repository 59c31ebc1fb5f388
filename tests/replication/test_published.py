"""The published tables: they parse, agree with their sources and with each other, and a slip of the pen is refused with its row."""
import shutil

import pandas as pd
import pytest

from bizzaroworld.files import data_path
from bizzaroworld.replication.published import (OBTAINED, Published, PublishedError, load_heads, load_published, load_sources,
                                                published)

PAIRS = {"A": 15, "B": 20, "C": 60}


def counts(quantity, mode):
    """The rows of a histogram."""
    figures = load_published()
    return figures[(figures.quantity == quantity) & (figures["mode"] == mode) & (figures.model == "Gemma-2B")]


def test_every_figure_and_head_names_a_source_and_every_source_is_used():
    sources, figures, heads = load_sources(), load_published(), load_heads()
    assert set(figures.source) | set(heads.source) == set(sources.index)
    assert set(figures.obtained) <= set(OBTAINED) and sources.url.str.startswith("https://").all()
    assert (sources[["authors", "title", "year", "url"]] != "").all(axis=None)


@pytest.mark.parametrize("quantity, values", [
    ("worst_layer", (16.27, 16.40, 16.32)), ("confidence_damage_r", (-0.794, -0.870, -0.832)), ("swing_damage_r", (-0.999, -0.995, -0.998)),
    ("onset_layer", (12.8, 12.8, 13.7))])
def test_the_figures_of_the_three_modes(quantity, values):
    assert tuple(published(quantity, mode).value for mode in "ABC") == values
    assert tuple(published(quantity, mode).n for mode in "ABC") == (15, 20, 60)


@pytest.mark.parametrize("quantity, model, value", [
    ("residual_over_attention", "Gemma-2B", 40), ("residual_over_mlp", "Gemma-2B", 18), ("largest_head_effect", "Gemma-2B", -0.68),
    ("residual_effect", "Gemma-2B", -11.47), ("layers", "Gemma-2B", 18), ("layers", "Gemma-12B-IT", 48), ("dropped_pairs", "Gemma-2B", 0),
    ("dropped_pairs", "Gemma-12B-IT", 3), ("dropped_pairs", "LLaMa-70B", 22), ("categories", "Gemma-2B", 20)])
def test_the_figures_without_a_mode(quantity, model, value):
    assert published(quantity, model=model).value == value


def test_the_entity_curve_and_the_storage():
    read = {mode: [published("entity_effect", mode, layer=layer).value for layer in (0, 12, 15)] for mode in "ABC"}
    assert read == {"A": [-16, -14.6, 0], "B": [-13, -11, 0], "C": [-9.3, -8.1, 0]}
    assert f"{published('storage_layers')}, {published('storage_layers', model='Gemma-12B-IT')}" == "0 to 14, 0 to 27"
    assert f"{published('readout_layers')}, {published('readout_layers', model='Gemma-12B-IT')}" == "15 to 17, not stated"


@pytest.mark.parametrize("mode", "ABC")
def test_histograms_add_up_to_their_pairs(mode):
    for quantity in ("worst_layer_count", "release_count"):
        rows = counts(quantity, mode)
        assert rows.value.sum() == PAIRS[mode] and rows.n.eq(PAIRS[mode]).all()
    heads = [published(f"worst_head_count_H{i}", mode) for i in range(8)]
    assert sum(h.value for h in heads) == PAIRS[mode] and max(h.value for h in heads) == heads[2].value


@pytest.mark.parametrize("mode", "ABC")
def test_the_mean_worst_layer_is_that_of_its_histogram(mode):
    rows = counts("worst_layer_count", mode)
    assert (rows.layer * rows.value).sum() / rows.value.sum() == pytest.approx(published("worst_layer", mode).value, abs=0.005)


def test_the_release_in_the_text_is_that_of_the_histogram():
    rows = counts("release_count", "A")
    assert rows.value[rows.layer.between(13, 15)].sum() / 15 == pytest.approx(published("release_share", "A").value, abs=0.0005)


def test_the_heads_of_others():
    heads = load_heads()
    named = [f"{l}.{h}" for l, h in zip(heads.layer, heads["head"])]
    by = pd.Series(named).groupby([heads.task, heads.corruption, heads.metric], sort=False).agg(" ".join).to_dict()
    assert by == {("IOI", "STR of S2", "logit difference"): "5.5 7.9 8.6 8.10 9.9 10.7 11.10", ("IOI", "GN of S2", "logit difference"): "3.0",
                  ("IOI", "STR of S1 and IO", "logit difference"): "9.6 9.9 10.0 10.7 11.10", ("IOI", "STR of S1 and IO", "probability"): "9.9",
                  ("greater-than", "STR", "logit difference"): "6.9 7.10 8.11 9.1 10.4",
                  ("docstring", "STR", "logit difference"): "0.0 0.1 0.5 2.3 3.0 3.5 3.6"}


def test_the_faults_of_the_original_battery():
    faults = pd.read_csv(data_path("published", "original_battery.csv")).set_index("fault")
    assert faults.pairs[["several_spans", "entity_too_short"]].sum() == 15 and faults.of.eq(60).all()
    assert faults.pairs.drop(["several_spans", "entity_too_short"]).to_dict() == {
        "answer_in_prompt": 5, "differs_at_start": 9, "differs_at_end": 1, "repeated_fact": 1, "false_target": 2}


def test_a_figure_that_is_not_published_is_an_error_that_names_the_known_ones():
    with pytest.raises(PublishedError, match="Gemma-12B-IT, mode A.*Known: .*storage_layers"): published("worst_layer", "A", model="Gemma-12B-IT")
    with pytest.raises(PublishedError): published("entity_effect", "A")  # without its layer
    with pytest.raises(PublishedError): published("entity_effect", "A", layer=3)


def test_scaling_scales_ranges_and_values():
    assert published("storage_layers").scaled(1 / 18).high == pytest.approx(14 / 18)
    assert format(Published(16.27, None, None, 15, "s", "").scaled(1 / 18), ".3f") == "0.904"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(data_path("published"), tmp_path / "published")
    return tmp_path / "published"


def change(folder, row, column, value, file="figures.csv"):
    """Write one cell of a table; the first row of figures is row 2 of the file."""
    frame = pd.read_csv(folder / file, dtype=str, keep_default_na=False)
    frame.loc[row - 2, column] = value
    frame.to_csv(folder / file, index=False)


@pytest.mark.parametrize("row, column, value, says", [
    (2, "source", "nobody", "row 2, field 'source': 'nobody' is not in sources.csv"), (3, "value", "16,4", "row 3, field 'value': '16,4' is no number"),
    (4, "mode", "D", "row 4, field 'mode': 'D'"), (5, "obtained", "guessed", "row 5, field 'obtained'"), (2, "model", "", "field 'model': empty"),
    (2, "low", "3", "a range needs both ends"), (2, "quantity", "", "field 'quantity': empty"), (3, "mode", "A", "stands there twice")])
def test_a_slip_is_refused_with_its_row(folder, row, column, value, says):
    change(folder, row, column, value)
    with pytest.raises(PublishedError, match=says): load_published(folder)


def test_a_range_the_wrong_way_round_a_row_that_says_nothing_and_a_missing_column(folder):
    change(folder, 2, "low", "3"), change(folder, 2, "high", "2")
    with pytest.raises(PublishedError, match="3 is above high, 2"): load_published(folder)
    for column in ("value", "low", "high", "note"): change(folder, 2, column, "")
    with pytest.raises(PublishedError, match="no number and no note"): load_published(folder)
    pd.read_csv(folder / "figures.csv").drop(columns="note").to_csv(folder / "figures.csv", index=False)
    with pytest.raises(PublishedError, match="they must be"): load_published(folder)


def test_heads_and_sources_are_checked_too(folder):
    change(folder, 3, "source", "nobody", "heads.csv")
    with pytest.raises(PublishedError, match="heads.csv row 3, field 'source'"): load_heads(folder)
    change(folder, 3, "source", "zhang-nanda", "heads.csv"), change(folder, 4, "layer", "", "heads.csv")
    with pytest.raises(PublishedError, match="heads.csv row 4, field 'layer': empty"): load_heads(folder)
    change(folder, 3, "source", "bizzaroworld-article", "sources.csv")
    with pytest.raises(PublishedError, match="sources.csv row 3, field 'source': stands there twice"): load_sources(folder)
