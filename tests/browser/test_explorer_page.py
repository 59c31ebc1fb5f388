"""The explorer as a person uses it: choose, click, read, press keys, send the address to somebody."""
import json
import re

import pytest
from planted import planted_run, steps

from bizzaroworld.files import write_table
from bizzaroworld.study.runs import open_run
from bizzaroworld.views.explorer import explorer_data, explorer_fragment, write_explorer

@pytest.fixture(scope="module")
def run():
    return open_run("bizzaro-nano")


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    return write_explorer(run, tmp_path_factory.mktemp("page") / "explorer.html")


@pytest.fixture(scope="module")
def data(file):
    """What the page was given."""
    return json.loads(re.search(r'type="application/json"[^>]*>(.*?)</script>', file.read_text("utf-8"), re.S)[1])


@pytest.fixture
def explorer(open_html, file):
    """The page, just opened."""
    return open_html(file)


def choose(page, **choices):
    """Set the menus, in this order, as a person would."""
    for name, value in choices.items(): page.get_by_label(name.capitalize(), exact=True).select_option(value)


def shown(page) -> dict[str, str]:
    """The number that is shown, with its interval, n and pair."""
    return {k: page.locator(f".detail dd.{k}").inner_text() for k in ("value", "interval", "n", "pair")}


def number(page) -> float:
    return float(shown(page)["value"])


def point(page, layer, label):
    """The point or cell of a layer."""
    return page.get_by_role("button", name=re.compile(rf"^Layer {layer}, {label} at"))


def test_it_opens_from_disk_with_a_view_and_no_error(explorer, fits):
    assert explorer.locator("svg .point").count() == 8
    assert explorer.get_by_label("Mode", exact=True).input_value() == "C"
    for width in (1280, 390): fits(width)


@pytest.mark.parametrize("layer", [0, 4, 7])
def test_a_click_shows_the_mean_its_interval_and_n(explorer, data, layer):
    choose(explorer, mode="A", experiment="3")
    point(explorer, layer, "resid_pre").click()
    means = data["experiments"]["3"]["sites"]["resid_pre"]["means"]["A"]["effect"]
    low, high = (f"{means[k][layer]:.3f}".replace("-0.000", "0.000") for k in ("low", "high"))
    assert number(explorer) == means["mean"][layer] and shown(explorer)["interval"] == f"{low} to {high}"
    assert (shown(explorer)["n"], shown(explorer)["pair"]) == ("15", "all: mean")


def test_a_pair_shows_its_own_numbers_and_its_prompts(explorer, data, run):
    row = run.triage.iloc[6]
    choose(explorer, experiment="3", pair=row.pair_id, value="fraction")
    number_of = [p["id"] for p in data["pairs"]].index(row.pair_id)
    for layer in (0, 3, 5):
        point(explorer, layer, "resid_pre").click()
        assert number(explorer) == data["experiments"]["3"]["sites"]["resid_pre"]["fraction"][number_of][layer]
    assert shown(explorer) | {"value": ""} == {"value": "", "interval": "none", "n": "1", "pair": row.pair_id}
    assert explorer.locator(".prompts mark.patched").all_inner_texts() == [f"{row.clean_entity}entity, patched", f"{row.corrupt_entity}entity, patched"]
    choose(explorer, experiment="1")
    assert [t.removesuffix("final, patched") for t in explorer.locator(".prompts mark.patched").all_inner_texts()] == [
        p.split()[-1] for p in (row.clean_prompt, row.corrupt_prompt)]


@pytest.mark.parametrize("pair", ["", 3])
@pytest.mark.parametrize("layer, head", [(3, 2), (0, 0), (7, 3)])
def test_a_cell_of_the_heat_map_shows_its_head(explorer, data, pair, layer, head):
    choose(explorer, experiment="4F", pair=pair and data["pairs"][pair]["id"])
    point(explorer, layer, f"z of H{head}").click()
    site = data["experiments"]["4F"]["sites"]["z"]
    values = site["means"]["C"]["effect"]["mean"] if pair == "" else site["effect"][pair]
    truth = values[layer * 4 + head]
    assert number(explorer) == truth
    cell = point(explorer, layer, f"z of H{head}").inner_text()
    assert float(cell) == pytest.approx(truth, abs=0.051) and (cell[0] in "+-") == (abs(truth) >= 0.05)


def test_a_head_alone_is_a_curve(explorer, data):
    choose(explorer, experiment="4", head="1", value="fraction")
    assert explorer.locator("svg .point").count() == 8
    point(explorer, 1, "z of H1").click()
    assert number(explorer) == data["experiments"]["4"]["sites"]["z"]["means"]["C"]["fraction"]["mean"][1 * 4 + 1]


def test_all_sites_and_one_site(explorer, data):
    choose(explorer, experiment="2B")
    assert explorer.locator("svg .point").count() == 5 * 8 and explorer.locator(".legend li").count() == 5
    choose(explorer, site="mlp_out")
    assert explorer.locator("svg .point").count() == 8
    point(explorer, 1, "mlp_out").click()
    assert number(explorer) == data["experiments"]["2B"]["sites"]["mlp_out"]["means"]["C"]["effect"]["mean"][1]


def test_controls_can_be_laid_beside_it(explorer, data):
    choose(explorer, experiment="3", value="fraction")
    explorer.get_by_label("Controls").check()
    point(explorer, 2, "unrelated donor").click()
    assert number(explorer) == data["experiments"]["3"]["sites"]["resid_pre"]["controls"]["unrelated"]["C"]["fraction"]["mean"][2]
    choose(explorer, pair=data["pairs"][0]["id"])
    assert explorer.get_by_label("Controls").is_hidden() and explorer.locator("svg .point").count() == 8


def test_arrow_keys_move_and_tab_enters_once(explorer, data):
    choose(explorer, experiment="2B", value="fraction")
    explorer.get_by_label("Value", exact=True).focus()
    explorer.keyboard.press("Tab")
    assert explorer.locator(".point[tabindex='0']").count() == 1
    sites = data["experiments"]["2B"]["sites"]
    walk = [("ArrowRight", "resid_pre", 1), ("ArrowUp", "attn_out", 1), ("End", "attn_out", 7), ("ArrowRight", "attn_out", 7),
            ("ArrowUp", "resid_mid", 7), ("Home", "resid_mid", 0), ("ArrowDown", "attn_out", 0)]
    for key, site, layer in walk:
        explorer.keyboard.press(key)
        name = explorer.evaluate("document.activeElement.getAttribute('aria-label')")
        assert name.startswith(f"Layer {layer}, {site} at the entity token") and number(explorer) == sites[site]["means"]["C"]["fraction"]["mean"][layer]
    explorer.keyboard.press("Tab")
    assert explorer.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_arrow_keys_in_the_heat_map_go_where_they_point(explorer):
    choose(explorer, experiment="4F")
    point(explorer, 3, "z of H2").click()
    before = point(explorer, 3, "z of H2").bounding_box()
    for key, label, layer in (("ArrowUp", "z of H2", 4), ("ArrowLeft", "z of H1", 4), ("ArrowDown", "z of H1", 3)):
        explorer.keyboard.press(key)
        assert explorer.evaluate("document.activeElement.getAttribute('aria-label')").startswith(f"Layer {layer}, {label} at")
        if key == "ArrowUp": assert point(explorer, 4, "z of H2").bounding_box()["y"] < before["y"]


def test_the_layer_stays_while_pairs_are_compared(explorer, data):
    choose(explorer, experiment="3")
    assert explorer.locator(".detail b").inner_text().startswith("Layer 0,")  # the largest
    point(explorer, 4, "resid_pre").click()
    for number_of in (2, 5):
        choose(explorer, pair=data["pairs"][number_of]["id"])
        assert number(explorer) == data["experiments"]["3"]["sites"]["resid_pre"]["effect"][number_of][4]


def test_menus_work_by_keyboard(explorer):
    explorer.get_by_label("Experiment", exact=True).focus()
    explorer.keyboard.type("4F")
    explorer.keyboard.press("Tab")
    assert explorer.locator(".heat button").count() == 32


def test_the_table_holds_the_same_numbers(explorer, data):
    choose(explorer, experiment="4")
    explorer.get_by_text("Numbers", exact=True).click()
    rows = [r.locator("td").all_inner_texts() for r in explorer.locator(".numbers tbody tr").all()[:9]]
    means = data["experiments"]["4"]["sites"]["z"]["means"]["C"]["effect"]
    assert [(r[0], r[1], float(r[2]), float(r[3]), float(r[4]), r[5]) for r in rows] == [
        (str(layer), f"H{head}", *(means[k][layer * 4 + head] for k in ("mean", "low", "high")), "60")
        for head in range(4) for layer in range(8)][:9]


def test_the_address_brings_the_view_back(explorer, open_html, file, data):
    pair = data["pairs"][4]["id"]
    choose(explorer, mode="A", pair=pair, experiment="4F", head="2", value="fraction")
    point(explorer, 2, "z of H2").click()
    seen, fragment = shown(explorer), explorer.evaluate("location.hash")
    explorer.goto("about:blank")
    again = open_html(file, fragment)
    assert shown(again) == seen and again.get_by_label("Pair", exact=True).input_value() == pair
    again.evaluate("location.hash = 'experiment=3&layer=5'")
    again.wait_for_function("document.querySelectorAll('svg .point').length === 8")
    assert shown(again)["pair"] == "all: mean" and again.locator(".detail b").inner_text() == "Layer 5, resid_pre at the entity token"


@pytest.mark.parametrize("fragment", ["#experiment=99&pair=%3Cb%3E&mode=constructor&layer=x", "#experiment=__proto__&site=z&head=9", "#%"])
def test_an_address_that_makes_no_sense_shows_the_first_view(open_html, file, fragment):
    page = open_html(file, fragment)
    assert page.get_by_label("Experiment", exact=True).input_value() == "1" and page.locator("svg .point").count() == 8


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out(explorer, fits, data, width):
    fits(width)
    for experiment in data["experiments"]:
        for pair in ("", data["pairs"][0]["id"]):
            choose(explorer, experiment=experiment, pair=pair)
            fits(width)
    outside = explorer.evaluate("[...document.querySelectorAll('svg text')].filter(t => { const b = t.getBoundingClientRect(); "
                                "return b.left < 0 || b.right > innerWidth; }).length")
    assert outside == 0


CONTRAST = """() => { const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const back = n => { for (; n; n = n.parentElement) { const c = getComputedStyle(n).backgroundColor; if (!/, 0\\)$/.test(c)) return c; } return "rgb(255,255,255)"; };
  return [...document.querySelectorAll(".bizzaro-explorer *")].filter(n => [...n.childNodes].some(c => c.nodeType === 3 && c.data.trim()) && !n.closest("svg"))
    .map(n => { const s = getComputedStyle(n), [a, b] = [light(s.color), light(back(n))].sort((x, y) => y - x);
      return [(a + .05) / (b + .05) * (s.opacity === "1" ? 1 : 0), n.outerHTML.slice(0, 90)]; }).filter(([ratio]) => ratio < 4.5); }"""


@pytest.mark.parametrize("experiment", ["3", "4F"])
def test_letters_can_be_read_on_their_ground(explorer, data, experiment):
    choose(explorer, experiment=experiment, pair=data["pairs"][0]["id"])
    assert explorer.evaluate(CONTRAST) == []


def test_everything_to_press_has_a_name_and_a_visible_focus(explorer):
    choose(explorer, experiment="4F")
    assert explorer.evaluate("[...document.querySelectorAll('select, input, button, [role=button]')].filter(n => "
                             "!(n.labels && n.labels.length) && !n.getAttribute('aria-label')).length") == 0
    point(explorer, 3, "z of H2").focus()
    explorer.keyboard.press("ArrowLeft")
    assert explorer.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_hostile_tokens_are_shown_as_they_are(open_html, tmp_path):
    token = '</script><b id="out">x</b>'
    run = planted_run(tmp_path / "run", steps([1, 2], 3), leave_out=("1", "2A", "2B"))
    table = run.triage.assign(relation="r", clean_prompt=f"Ann says {token} to", corrupt_prompt=f"Bob says {token} to", clean_entity="Ann",
                              corrupt_entity="Bob", clean_target=f" {token}", corrupt_target=" y")
    write_table(run.folder / "triage.csv", table)
    page = open_html(write_explorer(open_run(run.folder), tmp_path / "x.html"))
    choose(page, pair="pair-00", experiment="3")
    assert page.locator("#out").count() == 0 and token in page.locator(".prompts").inner_text()


def test_two_fragments_live_in_one_page_and_do_not_share_state(open_html, tmp_path, run):
    small = planted_run(tmp_path / "run", steps([1, 2], 3), leave_out=("1", "2A", "2B"))
    (tmp_path / "two.html").write_text(f"<!DOCTYPE html><title>two</title><p id='p'>.</p>{explorer_fragment(small, 'one')}<hr>{explorer_fragment(small, 'two')}", "utf-8")
    page = open_html(tmp_path / "two.html")
    one, two = page.locator("#one"), page.locator("#two")
    one.get_by_label("Experiment", exact=True).select_option("4F")
    assert (one.locator(".heat button").count(), two.locator(".heat button").count()) == (6, 0)
    assert two.locator("svg .point").count() == 3 and page.evaluate("location.hash") == ""


def test_it_works_inside_a_frame(open_html, tmp_path, file, data):
    from bizzaroworld.paper.report import framed
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title>frame</title>{framed(file.read_text('utf-8'))}", "utf-8")
    frame = open_html(tmp_path / "frame.html").frame_locator("iframe")
    frame.get_by_label("Experiment", exact=True).select_option("3")
    frame.get_by_role("button", name=re.compile("^Layer 2, resid_pre at")).click()
    assert float(frame.locator("dd.value").inner_text()) == data["experiments"]["3"]["sites"]["resid_pre"]["means"]["C"]["effect"]["mean"][2]


def test_a_run_of_one_pair(open_html, tmp_path):
    run = planted_run(tmp_path / "run", steps([2], 4), swings=[0.5], leave_out=("1", "2A", "2B"))
    page = open_html(write_explorer(run, tmp_path / "x.html"))
    point(page, 1, "resid_pre").click()
    assert shown(page) == {"value": "-0.500", "interval": "none", "n": "1", "pair": "all: mean"}
    choose(page, value="fraction")
    assert "Not defined" in page.locator(".plot").inner_text() and explorer_data(run)["modes"]["C"] == [0]
