"""A page with CircuitsVis views, opened from disk without a network: everything is drawn, once, and nothing complains."""
import pandas as pd
import pytest

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import align
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.views.circuitsvis import (Panel, View, attention_view, effects_view, lens_view, log_probs_view, plain_tokens,
                                            setup, write_script)
from bizzaroworld.views.lens_and_attention import traces

pytestmark = pytest.mark.slow
NASTY = ["<bos>", "</script><script>window.bitten=1</script>", "<img src=x onerror=window.bitten=1>", "&lt;b&gt;", "\u2028", '"\\']


@pytest.fixture(scope="module")
def traced():
    model = load_model("bizzaro-nano")
    tp = align(model, load_battery()[0])
    return model, traces(model, tp, Intervention((Edit("resid_pre", 2, "entity"),)))


@pytest.fixture(scope="module")
def views(traced):
    model, t = traced
    return [attention_view(t, [(3, 0), (4, 1)]), effects_view(model, t.tp, [1, 4]), log_probs_view(t), lens_view(t)]


def html(*parts) -> str:
    """A page of things that display themselves, as a notebook's site makes one."""
    body = "".join(part._repr_html_() for part in parts)
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Views</title><body>{body}</body></html>'


def drawn(page, panels):
    """Wait until every panel has drawn something in the place of its note; the ids are the panels' names."""
    for name in {p.name for p in panels}:
        page.wait_for_function("n => {const e = document.getElementById(n); return e && e.querySelector('canvas, span, svg') && !e.querySelector('code')}", arg=name)


@pytest.mark.parametrize("order", ["script first", "script last", "linked"])
def test_every_view_is_drawn_offline(open_html, fits, tmp_path, views, order):
    script = setup("circuits.js") if order == "linked" else setup()
    if order == "linked": write_script(tmp_path / "circuits.js")
    file = tmp_path / "views.html"
    file.write_text(html(*views, script) if order == "script last" else html(script, *views), "utf-8")
    page = open_html(file)
    panels = [p for view in views for p in view.panels]
    drawn(page, panels)
    assert page.locator("[data-circuits]").count() == page.locator("[data-circuits][id]").count() == len(panels)
    assert page.locator("script").count() == 1 + sum(bool(view.panels) for view in views)
    for width in (1280, 390): fits(width)


def test_an_attention_panel_says_what_the_run_attended(open_html, tmp_path, traced):
    _, t = traced
    view = attention_view(t, [(3, 0)])
    file = tmp_path / "attention.html"
    file.write_text(html(setup(), view), "utf-8")
    page = open_html(file)
    drawn(page, view.panels)
    page.get_by_text("Numbers").click()
    row = page.locator("table tbody tr").nth(t.tp.entity).inner_text().split("\t")
    assert row[0].strip() == f"{t.tp.entity} Germany"
    assert [float(x) for x in row[1:4]] == pytest.approx([run.patterns[3, 0, -1, t.tp.entity].item() for run in t.runs], abs=6e-4)
    assert page.get_by_role("group", name=view.alt).count() == 1
    ink = "n => {const c = document.getElementById(n).querySelector('canvas'); const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; return new Set(new Uint32Array(d.buffer)).size}"
    assert all(page.evaluate(ink, p.name) > 5 for p in view.panels), "an empty picture"


def test_a_token_is_colored_by_its_effect(open_html, tmp_path, traced):
    model, t = traced
    view = effects_view(model, t.tp, [1])
    file = tmp_path / "effects.html"
    file.write_text(html(setup(), view), "utf-8")
    page = open_html(file)
    drawn(page, view.panels)
    color = "e => getComputedStyle(e).backgroundColor"
    tokens = page.locator(f"#{view.panels[0].name}").get_by_text("Germany")
    assert tokens.last.evaluate(color) == "rgb(229, 131, 104)"  # the deepest red
    assert page.locator(f"#{view.panels[0].name}").get_by_text("parliament").last.evaluate(color) in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")


def test_no_token_runs(open_html, tmp_path):
    panel = Panel(NASTY[1], "ColoredTokens", {"tokens": plain_tokens(NASTY), "values": [0.0] * len(NASTY), "minValue": -1, "maxValue": 1})
    view = View(NASTY[2], NASTY[1], (panel,), pd.DataFrame({"token": NASTY}), lambda: None)
    file = tmp_path / "nasty.html"
    file.write_text(html(setup(), view, view), "utf-8")
    page = open_html(file)
    drawn(page, [panel])
    assert page.evaluate("window.bitten") is None and page.locator("img").count() == 0
    assert page.locator(f"#{panel.name}, #{panel.name}-2").count() == 2, "the same view twice"
    shown = page.locator(f"#{panel.name}").inner_text().replace("\u200b", "").replace("\xa0", " ")
    assert NASTY[1] in shown and NASTY[2] in shown
