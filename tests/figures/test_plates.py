"""Plates: every figure of a run with a short caption, what holds for its page, a text in its place, and the same bytes each time."""
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawn import add_controls, clipped, legend_texts, lines, make, overlapping, smallest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from planted import planted_run, steps

from bizzaroworld.figures.captions import about, conventions, conventions_beside, curve_words, layer_words
from bizzaroworld.figures.comparison_figures import comparison_plates, save_comparison, seed_plate
from bizzaroworld.figures.run_figures import MAKERS, plate, plates, save_figures, write_plates
from bizzaroworld.figures.style import SITE_COLORS
from bizzaroworld.results.compare import compare, seed_spread
from bizzaroworld.results.correlations import correlations, pair_points, pearson, relation
from bizzaroworld.results.effects import AnalysisError, curve, effect_matrix
from bizzaroworld.results.heads import head_table
from bizzaroworld.results.layers import crossing, release_layer, worst_layer
from bizzaroworld.study.runs import DamagedError, RunError, open_run

NAMES = ["triage", "residual", "crossing", "controls", "sites", "heads", "head_frequency", "worst", "release", "confidence", "swing",
         "release_damage", "pairs", "categories"]
ALWAYS = [name for name in NAMES if name != "controls"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return add_controls(make(tmp_path_factory.mktemp("run") / "r"))


@pytest.fixture(scope="module")
def found(run):
    return {p.name: p for p in plates(run)}


# --- which figures there are ----------------------------------------------------------------------------------------

def test_every_figure_is_there_once_and_in_order(found):
    assert list(found) == NAMES == list(MAKERS)


def test_what_a_run_lacks_is_left_out_and_a_missing_experiment_is_named(tmp_path):
    run = make(tmp_path / "r", n=4)
    assert [p.name for p in plates(run)] == ALWAYS
    with pytest.raises(RunError, match="controls"): plate(run, "controls")
    with pytest.raises(RunError, match="'4F'"): save_figures(make(tmp_path / "s", leave_out=("4F",)), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_damaged_controls_are_not_taken_for_none(tmp_path):
    run = planted_run(tmp_path, steps([3] * 4), controls={"unrelated": steps([3] * 4)})
    (tmp_path / "controls.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedError, match="controls.parquet is damaged"): plates(run)
    (tmp_path / "controls.parquet").unlink()
    assert "controls" not in [p.name for p in plates(run)]


def test_an_unknown_figure_is_refused_with_the_names_that_exist(run):
    with pytest.raises(RunError, match="no figure 'curves': use one of triage, residual"): plate(run, "curves")


def never_released(folder):
    """A run whose entity token matters as much in the last layer as in the first."""
    return planted_run(folder, np.full((5, 8), 0.8), final=steps([0] * 5, after=0.8))


@pytest.mark.parametrize("made", [lambda f: make(f, n=1), never_released, lambda f: make(f, n=3, n_layers=48, heads=16)],
                         ids=["one pair", "no release", "48 layers"])
def test_unusual_runs_have_all_figures_and_whole_texts(tmp_path, made):
    found = plates(made(tmp_path))
    assert [p.name for p in found] == ALWAYS
    for p in found:
        for text in (p.caption, p.alt): assert len(text) > 60 and not re.search(r"\bnan\b|None|NaN|inf\b|<NA>", text), p.name
        assert clipped(p.figure) == [] and overlapping(p.figure) == [], p.name


def test_without_a_release_every_pair_is_a_hatched_bar(tmp_path):
    shown = plate(never_released(tmp_path), "release")
    for ax in shown.figure.axes:
        assert [b.get_height() for b in ax.patches if b.get_hatch()] == [5] and "never (5)" in ax.get_xlabel()
        assert sum(b.get_height() for b in ax.patches if not b.get_hatch()) == 0 and "not defined (0 of 5)" in ax.get_title()
    assert shown.alt.count("never 5") == 2


def test_pairs_without_any_swing_have_all_figures_but_fractions_by_category(tmp_path):
    found = plates(run := make(tmp_path, n=5, swings=[0.9, 0.5, 0.2, 0.1, -1]))
    assert [p.name for p in found] == [name for name in ALWAYS if name != "categories"]
    assert all("nan" not in p.alt for p in found) and all("n = 0 of 5" in p.caption for p in found if p.name in ("sites", "crossing"))
    with pytest.raises(RunError, match="No pair"): plate(run, "categories")


# --- pairs ----------------------------------------------------------------------------------------------------------

def test_points_are_the_pairs_of_the_run(run):
    points = pair_points(run).set_index("pair_id")
    assert list(points.index) == run.pairs("C") and points.mode_a.sum() == 15
    assert set(points.index[points.mode_a]) == set(run.pairs("A"))
    worst, effect = worst_layer(run, "1").table.set_index("pair_id").layer, effect_matrix(run, "1")
    release = release_layer(run).table.set_index("pair_id").layer
    for pair_id, row in points.iterrows():
        assert row.damage == effect.loc[pair_id, worst[pair_id]] == effect.loc[pair_id].min()
        assert row.fraction == pytest.approx(-row.damage / row.total_swing)
        assert row.release == release[pair_id] and row.entity == effect_matrix(run, "3").loc[pair_id].min()
        assert row.label == pair_id, "a battery without entities is named by its ids"


def test_points_are_named_by_their_entities(tmp_path):
    run = make(tmp_path, n=3)
    run.triage["clean_entity"], run.triage["corrupt_entity"] = ["a", "b", "c"], "x"
    assert pair_points(run).label.tolist() == ["a/x", "b/x", "c/x"]


def test_relations_agree_with_the_analysis_and_need_three_pairs(run):
    points = pair_points(run)
    assert relation(points, "ld_clean", "damage", pearson) == correlations(run)["ld_clean"]["pearson"]
    assert relation(points.head(2), "ld_clean", "damage", pearson).value is None
    points.loc[3, "fraction"] = np.nan
    assert relation(points, "ld_clean", "fraction", pearson).n == 19


# --- what is drawn is what the run says ---------------------------------------------------------------------------------

def test_figures_show_the_right_experiments(run, found):
    c = {e: curve(run, e, value="fraction") for e in ("3", "1")}
    entity, final = lines(found["crossing"].figure.axes[0]).values()
    np.testing.assert_array_equal(entity.get_ydata(), c["3"]["mean"]), np.testing.assert_array_equal(final.get_ydata(), c["1"]["mean"])
    assert legend_texts(found["crossing"].figure) == [f"{p} token: {crossing(run, experiment=e):.2f}" for p, e in (("entity", "3"), ("final", "1"))]
    for ax, e in zip(found["controls"].figure.axes, ("3", "1")):
        np.testing.assert_allclose(lines(ax)["real patch"].get_ydata(), c[e]["mean"])
        for label, part in (("unrelated donor", 1 / 3), ("other position", 0.1), ("untrained model", 0)):
            np.testing.assert_allclose(lines(ax)[label].get_ydata(), c[e]["mean"] * part, atol=1e-12)
    first = lines(found["pairs"].figure.axes[0])
    for label, e in (("entity token", "3"), ("final token", "1")):
        np.testing.assert_array_equal(first[label].get_ydata(), effect_matrix(run, e).iloc[0])
    for ax, e in zip(found["heads"].figure.axes, ("4", "4F")):
        np.testing.assert_array_equal(ax.images[0].get_array(), head_table(run, e)["mean"].to_numpy().reshape(8, 4))
    left = found["swing"].figure.axes[0]
    assert left.get_title() == f"r = {correlations(run)['total_swing']['pearson']:.2f}\nn = 20 pairs"
    assert found["confidence"].figure.axes[0].get_title() == f"r = {correlations(run)['ld_clean']['pearson']:.2f}\nn = 20 pairs"


def test_a_site_has_its_color_in_every_figure(found):
    seen = {}
    for p in found.values():
        for ax in p.figure.axes:
            for label, drawn in lines(ax).items():
                if not hasattr(drawn, "get_color") or p.name in ("controls", "triage"): continue
                site = label if label in SITE_COLORS else "resid_pre" if "token" in label or p.name == "categories" else None
                if site: seen.setdefault(site, []).append((p.name, to_hex(drawn.get_color()).upper()))
    assert set(seen) == set(SITE_COLORS) - {"z"} and {name for name, _ in seen["resid_pre"]} == {"residual", "crossing", "sites", "pairs", "categories"}
    for site, drawn in seen.items(): assert {color for _, color in drawn} == {SITE_COLORS[site]}, site
    bars = {name: {to_hex(b.get_facecolor()).upper() for ax in found[name].figure.axes for b in ax.patches if not b.get_hatch()}
            for name in ("head_frequency", "worst", "release")}
    assert bars == {"head_frequency": {SITE_COLORS["z"]}, "worst": {SITE_COLORS["resid_pre"]}, "release": {SITE_COLORS["resid_pre"]}}


def test_maps_are_centered_on_zero(found):
    norms = [image.norm for p in found.values() for ax in p.figure.axes for image in ax.images]
    assert len(norms) == 2 and all(n.vcenter == 0 and n.vmin == -n.vmax and n(0) == 0.5 for n in norms)


@pytest.mark.parametrize("name, per_panel", [("residual", 2), ("crossing", 2), ("controls", 4), ("sites", 5), ("categories", 1), ("worst", 1),
                                             ("release", 1), ("head_frequency", 1)])
def test_intervals_are_drawn(found, name, per_panel):
    for ax in found[name].figure.axes:
        drawn = [c.get_paths() for c in ax.collections]
        assert len(drawn) == per_panel and all(np.ptp(path.vertices) > 0 for paths in drawn for path in paths)


# --- how it looks ---------------------------------------------------------------------------------------------------

def test_no_text_is_clipped_or_covered_in_the_figures_of_a_small_run(found):
    for p in found.values(): assert clipped(p.figure) == [] and overlapping(p.figure) == [] and smallest(p.figure) > 5, p.name


@pytest.mark.parametrize("shape", [dict(n=60, n_layers=18, heads=8), dict(n=6, n_layers=48, heads=16, direction="denoising")],
                         ids=["18 layers", "48 layers"])
def test_no_text_is_clipped_or_covered_and_letters_are_large(tmp_path, shape):
    for p in plates(add_controls(make(tmp_path, **shape))):
        assert clipped(p.figure) == [] and overlapping(p.figure) == [], p.name
        assert smallest(p.figure) > 5, "points, printed in half a column"


# --- texts ----------------------------------------------------------------------------------------------------------

SENTENCE = re.compile(r"(?<=\.) (?=[A-Z0-9])")
SHARED = ("Model", "Noising:", "Denoising:", "bootstrap", "the patch changes nothing", "run the patch came from", "embedded")


def short(caption: str) -> bool:
    """Whether a caption is one or two sentences that leave to the page what holds for all of its figures."""
    return len(SENTENCE.split(caption)) <= 2 and len(caption) <= 320 and not any(word in caption for word in SHARED)


def test_the_check_of_captions_sees_what_it_looks_for():
    assert short("Effect by layer, n = 20 pairs. Dashed: final token.") and not short("One. Two. Three.") and not short("x" * 321)
    assert not short("Effect by layer. Bands: 95% bootstrap intervals over pairs.")


def test_captions_are_short_and_say_their_n(found):
    for p in found.values():
        assert short(p.caption) and "{" not in p.caption and "nan" not in p.caption and p.caption.endswith("."), (p.name, len(p.caption))
        assert "20" in p.caption, p.name
        assert len(p.alt) > 60 and "nan" not in p.alt and p.alt.endswith("."), p.name
    for name in ("sites", "crossing", "controls", "categories"): assert "n = 20 of 20 pairs" in found[name].caption
    assert len({p.caption for p in found.values()}) == len(found)


def test_caption_and_conventions_together_say_everything(run, found):
    for p in found.values():
        assert p.conventions == conventions(about(run)) and p.full_caption == f"{p.caption} {p.conventions}"
        assert "embedded model planted" in p.full_caption and "logit difference (ld)" in p.full_caption and "mode C, all 20" in p.full_caption
        assert "Noising: activations of the corrupted run are put into the clean run, damage is negative" in p.full_caption
        assert "0: the patch changes nothing, 1 (of a fraction): the answer is that of the run the patch came from" in p.full_caption
        assert "95% bootstrap intervals over pairs" in p.full_caption and "By construction, late layers" in p.full_caption
        sentences = SENTENCE.split(p.full_caption)
        assert len(set(sentences)) == len(sentences), "nothing is said twice"


@pytest.mark.parametrize("name, words", [("worst", "Nearly an identity"), ("swing", "Nearly an identity"), ("confidence", "by construction"),
                                         ("crossing", "by construction"), ("controls", "by construction"), ("release_damage", "by construction"),
                                         ("pairs", "not typical")])
def test_captions_say_where_an_identity_is_at_work(found, name, words):
    assert words in found[name].caption


def test_texts_give_the_numbers(run, found):
    c = curve(run, "3", value="fraction")
    assert f"starts at {c['mean'].iloc[0]:.2f}, ends at 0.00" in found["crossing"].alt and crossing(run) != crossing(run, experiment="1")
    assert re.findall(r"one half at (.*?\])", found["crossing"].alt) == [f"{crossing(run)}", f"{crossing(run, experiment='1')}"]
    assert "The model prefers the right answer on 20 of 20 pairs, ranks it first among its kind on 17, first of all on 17." in found["triage"].alt
    assert all(f"{m} {correlations(run, m)['total_swing']['pearson']}" in found["swing"].caption for m in "ABC")
    assert "unrelated donor 20, other position 20, untrained model 20" in found["controls"].caption
    assert layer_words(worst_layer(run)) in found["worst"].alt and "cat-0" in found["categories"].alt
    assert curve_words(curve(run, "2A", value="fraction").query("site == 'mlp_out'")) in found["sites"].alt


def test_conventions_follow_the_direction_and_the_kind_of_model(tmp_path):
    text = plate(make(tmp_path, direction="denoising", embedded=False), "residual").full_caption
    assert "repair is positive" in text and "damage" not in text and "embedded" not in text and "planted" in text


def test_pairs_without_a_fraction_are_not_counted_in_it(tmp_path):
    run = make(tmp_path, n=6, swings=[9.0, 8, 7, 6, 0.5, -2])
    found = {p.name: p for p in plates(run)}
    assert about(run).n == {"A": 6, "B": 4, "C": 6, "fraction": 4}
    assert all("n = 4 of 6" in found[name].caption for name in ("sites", "crossing", "release")) and "n = 6 pairs" in found["heads"].caption
    assert all("(n = 4)" in ax.get_title() for ax in found["sites"].figure.axes)
    assert "n = 4 pairs" in found["swing"].figure.axes[1].get_title() and "n = 6 pairs" in found["swing"].figure.axes[0].get_title()


# --- files ----------------------------------------------------------------------------------------------------------

def test_files_are_the_same_each_time_whatever_the_readers_settings(tmp_path):
    run = add_controls(make(tmp_path / "r", n=5))
    first = save_figures(run, tmp_path / "a")
    with plt.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 40, "savefig.transparent": True, "hatch.linewidth": 9}):
        second = save_figures(open_run(run.folder), tmp_path / "b")
    assert [p.name for p in first] == [f"{n}.png" for n in NAMES]
    for a, b in zip(first, second): assert a.read_bytes() == b.read_bytes(), a.name
    assert plt.get_fignums() == [] and sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([*(p.name for p in first), "captions.json"])


def test_files_hold_their_texts_and_no_trace_of_the_machine(found, tmp_path):
    stored = json.loads((write_plates(list(found.values()), tmp_path)[0].parent / "captions.json").read_text("utf-8"))
    assert set(stored) == {f"{name}.png" for name in found}
    for name, made in found.items():
        with Image.open(tmp_path / f"{name}.png") as image:
            assert set(image.info) == {"dpi", "Title", "Description"} and round(image.info["dpi"][0]) == 150
            assert image.info["Title"] == made.full_caption == stored[f"{name}.png"]["caption"]
            assert image.info["Description"] == made.alt == stored[f"{name}.png"]["alt"]
            assert len(image.convert("RGB").getcolors(1 << 20)) > 3


def test_a_figure_is_written_whole_or_not_at_all(found, tmp_path, monkeypatch):
    def broken(self, path, **options):
        path.write_bytes(b"half an image")
        raise OSError("disk full")
    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"): write_plates([found["worst"]], tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- several runs -----------------------------------------------------------------------------------------------------

def named(folder, name, **options):
    """A planted run of a model with this name."""
    run = make(folder, **options)
    run.info["model"]["name"] = name
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return [named(folder / "a", "small", n=12), named(folder / "b", "large-model-with-a-name", n=12, n_layers=18, heads=8)]


@pytest.fixture(scope="module")
def beside(two):
    return {p.name: p for p in comparison_plates(compare(two), two)}


def test_two_runs_have_depths_crossings_concentration_and_differences(two, beside):
    assert list(beside) == ["depths", "crossings", "concentration", "differences"]
    for p in beside.values():
        assert short(p.caption) and p.conventions == conventions_beside([about(run) for run in two]) and "{" not in p.caption and "nan" not in p.alt
        assert "embedded model small (n = 12 of 12 pairs), embedded model large-model-with-a-name (n = 12 of 12 pairs)" in p.full_caption
        assert "Noising: " in p.full_caption and "(ld)" in p.full_caption and "0: the patch changes nothing" in p.full_caption
        assert clipped(p.figure) == [] and overlapping(p.figure) == [] and smallest(p.figure) > 5, p.name
        assert "another seed" in p.full_caption and "Depth 0 is the input of the first block" in p.full_caption
    assert f"small, entity token: {crossing(two[0]).value / 8:.2f}" in beside["crossings"].alt
    assert f"paired over the {len(compare(two).common)} pairs on which both prefer both answers by 2 logits" in beside["differences"].caption
    assert beside["differences"].figure.axes[0].get_xlabel() == "large-model-with-a-name minus small"


def test_one_run_has_no_differences_and_drift_is_shown_where_there_is_any(two):
    run = two[0]
    run.__dict__["excluded"] = pd.DataFrame({"pair_id": ["x", "y"], "reason": ["length_differs"] * 2, "replaced_by": ["z", "none"]})
    found = {p.name: p for p in comparison_plates(compare([run]), [run])}
    del run.__dict__["excluded"]
    assert list(found) == ["depths", "crossings", "concentration", "drift"]
    assert [b.get_width() for b in found["drift"].figure.axes[0].patches] == [10, 1, 1]
    assert "small: 10 of 12 aligned, 1 replaced" in found["drift"].alt


def test_trainings_have_a_figure_of_their_spread(tmp_path):
    runs = [named(tmp_path / f"s{i}", f"nano-s{i}", n=6 + i) for i in range(2)]
    found = seed_plate(seed_spread(runs), runs, ("leaves", "half_final"))
    assert "trained 2 times (n = 6, 7 pairs)" in found.caption and short(found.caption) and "nano-s1 (n = 7 of 7 pairs)" in found.full_caption and len(found.figure.axes) == 2
    low, high = sorted(crossing(run).value / 8 for run in runs)
    assert f"from {low:.2f} to {high:.2f}" in found.alt and clipped(found.figure) == [] and overlapping(found.figure) == []


def test_a_comparison_is_written_with_its_tables(two, beside, tmp_path):
    paths = save_comparison(two, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*(p.name for p in paths), "captions.json"])
    tables = ["models", "curves", "crossings", "heads", "pairs", "drift", "quantities", "differences"]
    assert [p.name for p in paths] == [*(f"{name}.csv" for name in tables), *(f"{name}.png" for name in beside)]
    stored = json.loads((tmp_path / "out" / "captions.json").read_text("utf-8"))
    assert stored == {f"{p.name}.png": {"caption": p.full_caption, "alt": p.alt} for p in beside.values()}
    found = compare(two)
    for name in tables:
        written, table = pd.read_csv(tmp_path / "out" / f"{name}.csv"), getattr(found, name)
        assert list(written.columns) == list(table.columns) and len(written) == len(table), name
        for column in table.select_dtypes("float"): np.testing.assert_array_equal(written[column], table[column])


def test_nothing_is_written_of_runs_that_do_not_compare(two, tmp_path):
    other = named(tmp_path / "d", "third", n=12, direction="denoising")
    with pytest.raises(AnalysisError, match="different directions"): save_comparison([two[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
