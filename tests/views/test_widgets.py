"""The explorers without a browser: one state, everything shown follows it, errors are shown, numbers are the run's and the sweep's."""
import re
from html import unescape

import ipywidgets as w
import pandas as pd
import pytest
from comm.base_comm import BaseComm
from planted import planted_run, steps

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.results.effects import effect_matrix
from bizzaroworld.study.runs import open_run
from bizzaroworld.views.explorer_state import Grid, PatchChoice, RunChoice, Typed, run_options, run_page, settled, typed_pair
from bizzaroworld.views.widgets import BLUE, RED, Cells, ModelExplorer, RunExplorer, cell_color

BERLIN = {"clean_prompt": "The national parliament of Germany meets in the city of", "clean_target": "Berlin",
          "corrupt_prompt": "The national parliament of Russia meets in the city of", "corrupt_target": "Moscow"}


@pytest.fixture(scope="module")
def run():
    return open_run("bizzaro-nano")


@pytest.fixture(scope="module")
def model():
    return load_model("bizzaro-nano")


def typed(live, **changes) -> ModelExplorer:
    """Type the pair, other words where given, and press the button."""
    for field, text in (BERLIN | changes).items(): live.typed[field].value = text
    live.run_pair.click()
    return live


@pytest.fixture
def live(model):
    return typed(ModelExplorer(model))


def words(html: w.HTML) -> str:
    """What a reader sees of it."""
    return unescape(re.sub(r"<[^>]+>", "", html.value))


def column(html: w.HTML, name: str) -> list[float]:
    """A column of the table that is shown."""
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr.*?</tr>", html.value, re.S)]
    return [float(row[rows[0].index(name)]) for row in rows[1:]]


def agree(live):
    """Every control says what the state says, and the one marked cell is the chosen one."""
    for field in ("direction", "site", "layer", "position", "head"): assert getattr(live, field).value == getattr(live.state, field)
    marked = [place for place, button in live.cells.buttons.items() if button.layout.border_top.startswith("3px")]
    assert marked == [(live.state.layer, live.state.column)] and live.alert.value == ""
    assert words(live.prediction).startswith(live.page.words)


def swept(live, *edits, direction="noising"):
    """The engine's row of a patch."""
    return sweep(live.model, [live.pair], [Intervention(edits)], direction, metrics=("ld",), progress=False).to_frame().iloc[0]


# a finished run

def test_the_numbers_are_the_runs(run):
    explorer = RunExplorer(run)
    pair = run.pairs("A")[2]
    for menu, value in (("mode", "A"), ("experiment", "2B"), ("site", "mlp_out"), ("pair", pair)): explorer.menus[menu].value = value
    assert explorer.state == RunChoice("A", "2B", "mlp_out", None, pair)
    table = {name: column(explorer.numbers, name) for name in ("effect", "mean", "low", "high", "n")}
    effects = effect_matrix(run, "2B", "A", "effect", "mlp_out")
    assert table["effect"] == pytest.approx(effects.loc[pair].tolist(), abs=6e-4)
    assert table["mean"] == pytest.approx(effects.mean().tolist(), abs=6e-4)
    assert all(low <= mean <= high for low, mean, high in zip(table["low"], table["mean"], table["high"])) and set(table["n"]) == {15}
    assert pair in explorer.picture.value and "alt=" in explorer.picture.value
    row = run.triage.set_index("pair_id").loc[pair]
    assert f"{row.clean_prompt} {row.clean_target.strip()}" in words(explorer.words)


def test_a_head_has_its_own_numbers(run):
    explorer = RunExplorer(run)
    explorer.menus["experiment"].value = "4F"
    assert not explorer.menus["head"].disabled and [o for o, _ in explorer.menus["head"].options] == ["H0", "H1", "H2", "H3"]
    explorer.menus["head"].value = 2
    effects = effect_matrix(run, "4F").loc[explorer.state.pair]
    assert column(explorer.numbers, "effect") == pytest.approx([effects[layer, 2] for layer in range(8)], abs=6e-4)


def test_what_becomes_impossible_gives_way(run):
    explorer = RunExplorer(run, RunChoice("C", "4F", "z", 3, run.pairs("C")[-1]))
    explorer.menus["experiment"].value = "2A"
    assert explorer.state.head is None and explorer.menus["head"].disabled and explorer.state.site in explorer.menus["site"].options[0]
    explorer.menus["mode"].value = "A"
    assert explorer.state.pair in run.pairs("A") and explorer.menus["pair"].value == explorer.state.pair
    assert {f: m.value for f, m in explorer.menus.items()} == {f: getattr(explorer.state, f) for f in explorer.menus}


def test_a_wish_that_cannot_be_is_said_and_changes_nothing(run):
    explorer = RunExplorer(run)
    before, picture = explorer.state, explorer.picture.value
    explorer.change(pair="nobody's pair")
    assert "pair cannot be \"nobody's pair\"" in words(explorer.alert) and 'role="alert"' in explorer.alert.value
    assert explorer.state == before and explorer.picture.value == picture
    explorer.change(mode="A")
    assert explorer.alert.value == "" and explorer.state.mode == "A"


def test_a_run_without_prompts_is_shown_by_its_ids(tmp_path):
    planted = planted_run(tmp_path / "run", final=steps([5] * 6), entity=steps([3] * 6), swings=range(1, 7))
    explorer = RunExplorer(planted)
    assert explorer.state.pair in words(explorer.words) and explorer.alert.value == ""


def test_every_choice_has_a_page(run):
    for experiment in run_options(run, RunChoice())["experiment"]:
        page = run_page(run, RunChoice(mode="B", experiment=experiment))
        assert settled(run, page.choice) == page.choice and f"experiment {experiment}" in page.alt
        assert len(page.numbers) == 8 and page.heat.index.tolist() == run.pairs("B")


# a live model

def test_a_typed_pair_is_run(live):
    assert live.patching.layout.display != "none" and live.pair.pair.clean_entity == "Germany"
    assert live.state == PatchChoice(layer=2, position=live.pair.entity)
    agree(live)
    assert "entity" in live.aligned.value and "Germany" in live.aligned.value


def test_a_click_patches_and_the_prediction_is_the_engines(live):
    before = words(live.prediction)
    live.cells.buttons[4, live.pair.final].click()
    agree(live)
    row = swept(live, Edit("resid_pre", 4, live.pair.final))
    assert (live.page.effect, live.page.recovery) == pytest.approx((row.effect, row.recovery), abs=1e-3)
    assert live.page.numbers["logit difference"].tolist() == pytest.approx([row.clean, row.corrupt, row.patched], abs=2e-3)
    assert "now it says 'Moscow'" in words(live.prediction) != before


@pytest.mark.parametrize("site, direction", [("z", "noising"), ("z", "denoising"), ("mlp_out", "denoising")])
def test_every_cell_says_its_effect(live, site, direction):
    live.site.value, live.direction.value = site, direction
    live.position.value = live.pair.final
    agree(live)
    live.cells.buttons[3, 1].click()
    agree(live)
    edit = Edit("z", 3, live.pair.final, 1) if site == "z" else Edit(site, 3, 1)
    row = swept(live, edit, direction=direction)
    assert live.page.effect == pytest.approx(row.effect, abs=1e-3)
    button = live.cells.buttons[3, 1]
    assert float(button.description) == pytest.approx(row.effect, abs=0.06) and f"Patch {site}, layer 3" in button.tooltip
    assert len(live.cells.buttons) == 8 * (4 if site == "z" else len(live.pair.clean_ids))


def test_a_slider_does_what_a_click_does(live):
    live.layer.value = 4
    by_slider = live.page.words
    live.layer.value = 2
    live.cells.buttons[4, live.pair.entity].click()
    assert live.page.words == by_slider
    agree(live)


def test_a_grid_is_swept_once(live, monkeypatch):
    from bizzaroworld.views import widgets
    monkeypatch.setattr(widgets, "patch_grid", lambda *_: pytest.fail("swept again"))
    for place in ((0, 1), (7, live.pair.final)): live.cells.buttons[place].click()
    agree(live)


@pytest.mark.parametrize("changes, says", [
    ({"corrupt_prompt": BERLIN["clean_prompt"]}, "BatteryError"),
    ({"corrupt_prompt": "The regional parliament of Russia meets in the city of"}, "differ in 2 places"),
    ({"corrupt_prompt": "The national parliament meets in the city of"}, "Nothing stands in the place of"),
    ({"corrupt_target": "Saint Petersburg"}, "AlignmentError"),
    ({"corrupt_target": ""}, "corrupt_target"),
    ({"clean_prompt": "", "corrupt_prompt": ""}, "prompt"),
    ({"corrupt_prompt": "The national parliament of <b>Russia</b> meets in the city of"}, "AlignmentError")])
def test_a_pair_that_cannot_be_run_is_said(live, changes, says):
    typed(live, **changes)
    assert says in words(live.alert) and 'role="alert"' in live.alert.value and "<b>Russia" not in live.alert.value
    assert live.patching.layout.display == "none" and live.pair is None, "the last pair's numbers stand beside another pair"
    typed(live)
    agree(live)
    assert live.patching.layout.display != "none"


def test_no_pair_yet(model):
    live = ModelExplorer(model)
    live.change(layer=3)
    assert "There is no pair yet" in words(live.alert) and live.state == PatchChoice()


def test_what_nobody_foresaw_is_shown_and_raised(live, monkeypatch):
    from bizzaroworld.views import widgets
    def broken(*_): raise RuntimeError("the model ran <away>")
    monkeypatch.setattr(widgets, "patch_page", broken)
    before = live.state
    with pytest.raises(RuntimeError): live.change(layer=5)
    assert "RuntimeError: the model ran <away>" in words(live.alert) and "<away>" not in live.alert.value
    assert live.state == before
    monkeypatch.undo()
    live.change(layer=5)
    agree(live)


def test_it_starts_from_a_pair_of_the_battery(model):
    pairs = load_battery()[:3]
    live = ModelExplorer(model, pairs)
    assert live.pair.id == "typed" and live.typed["clean_prompt"].value == pairs[0].clean_prompt
    live.start.value = pairs[2]
    assert live.pair.pair.clean_prompt == pairs[2].clean_prompt
    agree(live)


def test_typed_words_need_no_care(model):
    pair = typed_pair(Typed(**{k: f"  {v} " for k, v in BERLIN.items()}))
    assert (pair.clean_target, pair.clean_entity, pair.corrupt_entity) == (" Berlin", "Germany", "Russia")


# what is colored

def test_colors_say_the_sign_and_the_size():
    end = {-2.0: RED, 2.0: BLUE}
    for effect, color in end.items(): assert cell_color(effect, 2.0) == "#" + "".join(f"{c:02x}" for c in color)
    assert cell_color(0.0, 2.0) == cell_color(0.0, 0.0) == "#ffffff" and cell_color(-9.0, 2.0) == cell_color(-2.0, 2.0)
    for color in (RED, BLUE):  # the numbers are legible on the deepest color: WCAG's ratio for text is 4.5
        linear = [(c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in color]
        assert (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) / (0.0056 + 0.05) > 4.5


def test_cells_call_with_their_place():
    called = []
    cells = Cells(lambda *place: called.append(place))
    index = pd.MultiIndex.from_product([range(2), range(3)], names=["layer", "column"])
    table = pd.DataFrame({"effect": [0.0, -1, 2, 0.5, 0, -0.04]}, index=index)
    cells.show(Grid(("a", "<b>", "c"), table), PatchChoice(layer=1, position=2))
    cells.buttons[0, 1].click()
    assert called == [(0, 1)] and cells.buttons[1, 2].layout.border_top.startswith("3px")
    assert [b.description for b in cells.buttons.values()] == ["0.0", "-1.0", "2.0", "0.5", "0.0", "0.0"]
    assert all("<b>" not in child.value for child in cells.children if isinstance(child, w.HTML))


def test_few_messages_are_sent(model, monkeypatch):
    """A notebook loses messages when a thousand come at once; the grid alone has 88 buttons here."""
    sent = []

    class Counted(BaseComm):
        def publish_msg(self, kind, *content, **more): sent.append(kind)

    monkeypatch.setattr("comm.create_comm", lambda *args, **more: Counted(*args, **more))
    live = typed(ModelExplorer(model))
    assert len(live.cells.buttons) < sent.count("comm_open") and len(sent) < 3 * len(live.cells.buttons)
    sent.clear()
    live.cells.buttons[4, 1].click()
    assert 0 < len(sent) < 15
