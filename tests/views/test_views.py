"""Traces and views: what is looked at is what was run, and the page that shows it is safe, small and always the same."""
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from planted import planted_run, steps

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import TokenPair, align
from bizzaroworld.files import write_table
from bizzaroworld.model.hooked import Model
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.results.effects import effect_matrix
from bizzaroworld.study.runs import open_run
from bizzaroworld.views.circuitsvis import (Panel, View, attention_view, effects_view, lens_view, log_probs_view, plain_tokens,
                                            script, setup, stored_effects_view, write_script)
from bizzaroworld.views.explorer_state import RunChoice, run_page
from bizzaroworld.views.lens_and_attention import Traces, predictions, traces

VOID = {"br", "img", "meta", "link", "input", "hr"}


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def tp(model) -> TokenPair:
    return align(model, load_battery()[0])


@pytest.fixture(scope="module")
def traced(model, tp) -> Traces:
    return traces(model, tp, Intervention((Edit("resid_pre", 2, "entity"),)))


@pytest.fixture(scope="module")
def shown(model, tp, traced) -> dict[str, View]:
    return {"attention": attention_view(traced, [(3, 0), (4, 1)]), "effects": effects_view(model, tp, [1, 4]),
            "log_probs": log_probs_view(traced), "lens": lens_view(traced)}


PATCHES = [
    (Edit("resid_pre", 3, "entity"),), (Edit("attn_out", 3, "final"),), (Edit("resid_mid", 2, "entity"),), (Edit("mlp_out", 1, "all"),),
    (Edit("resid_post", 7, "final"),), (Edit("z", 3, "final", 1),), (Edit("z", 3, "final"),), (Edit("k", 3, "entity"),),
    (Edit("q", 4, "final", 2),), (Edit("v", 3, "entity", 0),), (Edit("pattern", 3, "final", 0),), (Edit("scores", 3, "final", 0),),
    (Edit("resid_pre", 1, "entity", source="zero"),), (Edit("z", 3, "final", 1, source="zero"), Edit("resid_pre", 5, "final"))]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("edits", PATCHES, ids=lambda e: str(Intervention(e)))
def test_a_patched_run_says_what_the_sweep_says(model, tp, edits, direction):
    patch = Intervention(edits)
    last = traces(model, tp, patch, direction).patched.log_probs[-1]
    swept = sweep(model, [tp], [patch], direction, metrics=("ld", "prob"), progress=False).patched[0, 0]
    assert last[tp.clean_target_id] - last[tp.corrupt_target_id] == pytest.approx(swept[0], abs=2e-3)
    assert last[tp.clean_target_id].exp().item() == pytest.approx(swept[1], abs=1e-4)
    top = predictions(model, tp, patch, direction)
    assert top.probability[0] == pytest.approx(last.exp().max().item(), abs=1e-4)
    assert top.token[0].strip() == model.tokenizer.decode([int(last.argmax())]).strip()


def test_the_three_runs(model, tp, traced):
    for run, ids in ((traced.clean, tp.clean_ids), (traced.corrupted, tp.corrupt_ids), (traced.patched, tp.clean_ids)):
        assert run.ids == ids and len(run.tokens) == len(ids)
        assert torch.allclose(run.patterns.sum(-1), torch.ones(()), atol=1e-5)
        assert run.patterns.triu(1).abs().max() == 0
    assert "".join(traced.clean.tokens) == "<bos>" + tp.pair.clean_prompt
    for run, ids in ((traced.clean, tp.clean_ids), (traced.corrupted, tp.corrupt_ids)):
        assert torch.allclose(run.log_probs[-1], model.logits(torch.tensor([ids]))[0].log_softmax(-1), atol=1e-4)
    before = traced.patched.log_probs[:tp.entity] - traced.clean.log_probs[:tp.entity]
    assert before.abs().max() < 1e-4, "a token before the patch changed"
    assert (traced.patched.patterns - traced.clean.patterns)[:2].abs().max() == 0, "a layer before the patch changed"


def test_denoising_patches_the_corrupted_run(model, tp):
    t = traces(model, tp, Intervention((Edit("resid_pre", 0, "entity"),)), "denoising")
    assert t.base is t.corrupted and t.patched.ids == tp.corrupt_ids
    assert torch.allclose(t.patched.log_probs[-1], t.clean.log_probs[-1], atol=1e-3)


def test_the_lens_ends_in_the_prediction(model, tp, traced):
    for run in traced.runs:
        assert set(run.lens.depth) == set(range(model.n_layers + 1)) and (run.lens.groupby(["position", "depth"]).size() == 5).all()
        for position, at in (("entity", tp.entity), ("final", tp.final)):
            last = run.lens[(run.lens.position == position) & (run.lens.depth == model.n_layers)].set_index("rank")
            best = run.log_probs[at].exp().topk(5)
            assert last.probability.to_numpy() == pytest.approx(best.values.numpy(), abs=1e-4)
            assert last.token[1].strip() == model.tokenizer.decode([int(best.indices[0])]).strip()


def test_no_hook_stays_behind(model, tp):
    ids = torch.tensor([tp.clean_ids])
    before = model.logits(ids)
    traces(model, tp, Intervention((Edit("resid_pre", 2, "entity", source="zero"),)))
    assert torch.equal(model.logits(ids), before)


def test_what_a_trace_refuses(model, tp):
    with pytest.raises(ValueError, match="sideways"): traces(model, tp, Intervention((Edit("z", 0),)), "sideways")
    with pytest.raises(ValueError, match="not given"): traces(model, tp, Intervention((Edit("z", 0, source="given"),)))
    with pytest.raises(ValueError, match="has 4 heads"): traces(model, tp, Intervention((Edit("z", 0, head=9),)))
    with pytest.raises(ValueError, match="sideways"): predictions(model, tp, direction="sideways")


class Balance(HTMLParser):
    """Whether every element is closed, and in order."""
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def parsed(html: str) -> list[tuple[str, dict]]:
    """The elements of a page, all closed."""
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser.seen


@pytest.mark.parametrize("name", ["attention", "effects", "log_probs", "lens"])
def test_a_view_in_a_page(shown, name):
    view = shown[name]
    html = view._repr_html_()
    elements = parsed(html)
    assert html == view._repr_html_() and len(html) < 25_000
    places = [a["data-circuits"] for _, a in elements if "data-circuits" in a]
    calls = re.findall(r'\["(cv-[0-9a-f]{12})","(\w+)",', html)
    assert len(places) == len(view.panels) and {n for n, _ in calls} == set(places) and len(calls) == len(set(places))
    assert [a.get("aria-label") for _, a in elements if a.get("role") == "group"] == [view.alt] and len(view.alt) > 40
    assert "<table" in html and not re.search(r'(?:src|href)=|https?:', html)


def test_the_same_content_has_the_same_name(traced):
    first, second = (attention_view(traced, [(3, 0)])._repr_html_() for _ in range(2))
    assert first == second != attention_view(traced, [(3, 1)])._repr_html_()


def test_attention_is_what_the_runs_attended(traced):
    view = attention_view(traced, [(3, 0)])
    own, other, patched, change = (np.array(p.props["attention"]) for p in view.panels)
    for values, run in zip((own, other, patched), traced.runs):
        assert values == pytest.approx(run.patterns[3, 0].numpy(), abs=6e-4)
    assert change == pytest.approx((traced.patched.patterns - traced.clean.patterns)[3, 0].numpy(), abs=6e-4)
    limits = view.panels[3].props
    assert limits["minValue"] == -limits["maxValue"] and limits["maxValue"] == pytest.approx(np.abs(change).max(), abs=1e-3)
    assert view.panels[1].props["tokens"] == plain_tokens(traced.corrupted.tokens)
    assert view.table.iloc[:, 1].to_numpy() == pytest.approx(traced.clean.patterns[3, 0, -1].numpy(), abs=6e-4)


def test_effects_are_those_of_the_sweep(model, tp):
    view = effects_view(model, tp, [4, 1], "mlp_out", "denoising")
    assert [p.label for p in view.panels] == ["layer 4", "layer 1"]
    rows = [[Intervention((Edit("mlp_out", layer, p),)) for p in range(len(tp.clean_ids))] for layer in (4, 1)]
    swept = sweep(model, [tp], rows[0] + rows[1], "denoising", progress=False).to_frame().effect.to_numpy()
    assert np.array([p.props["values"] for p in view.panels]).ravel() == pytest.approx(swept, abs=2e-3)
    assert all(p.props["maxValue"] == -p.props["minValue"] == pytest.approx(np.abs(swept).max(), abs=2e-3) for p in view.panels)
    with pytest.raises(ValueError, match="nowhere"): effects_view(model, tp, [0], "nowhere")


def test_a_stored_run_shows_what_it_holds():
    run = open_run("bizzaro-nano")
    pair = run.pairs("A")[1]
    view = stored_effects_view(run, pair, [2, 4])
    row = run.triage.set_index("pair_id").loc[pair]
    for panel, layer in zip(view.panels, (2, 4)):
        at = [effect_matrix(run, e).at[pair, layer] for e in ("3", "1")]
        assert panel.label == f"layer {layer}" and panel.props["values"] == pytest.approx([0, at[0], 0, at[1]], abs=6e-4)
        assert "".join(panel.props["tokens"]) == row.clean_prompt and panel.props["tokens"][1] == row.clean_entity
    assert len(view.table) == 2 and "were not patched" in view.alt
    parsed(view._repr_html_())
    view.figure().draw_without_rendering()
    with pytest.raises(ValueError, match="no prompts of 'nobody'"): stored_effects_view(run, "nobody", [2])
    with pytest.raises(ValueError, match="layers 0 to 7"): stored_effects_view(run, pair, [8])


@pytest.mark.parametrize("direction, entity", [("noising", "Rom"), ("denoising", "all")])
def test_an_entity_is_marked_where_it_stands_and_not_inside_another_word(tmp_path, direction, entity):
    run = planted_run(tmp_path / "run", steps([3] * 4), direction=direction)
    texts = dict(relation="r", clean_prompt="In Romania they call Rom a", corrupt_prompt="In Romania they call all a", clean_target=" b",
                 corrupt_target=" c", clean_entity="Rom", corrupt_entity="all")
    write_table(tmp_path / "run" / "triage.csv", run.triage.assign(**texts))
    run = open_run(tmp_path / "run")
    pair = run.pairs("C")[0]
    tokens = stored_effects_view(run, pair, [2]).panels[0].props["tokens"]
    assert list(tokens) == ["In Romania they call ", entity, " ", "a"]
    prompts = run_page(run, RunChoice(pair=pair)).prompts
    assert "Romania they call <mark><b>Rom</b></mark> a <u>b</u>" in prompts and "Romania they call <mark><b>all</b></mark> a <u>c</u>" in prompts


def test_a_stored_run_without_prompts_says_so(tmp_path):
    run = planted_run(tmp_path / "run", final=steps([5] * 4), entity=steps([3] * 4), swings=range(1, 5))
    with pytest.raises(ValueError, match="no prompts of"): stored_effects_view(run, run.pairs("C")[0], [2])


def test_log_probabilities_before_and_after(tp, traced):
    table = log_probs_view(traced).table
    following = [*tp.clean_ids[1:], tp.clean_target_id]
    for column, run in (("clean run", traced.clean), ("patched run", traced.patched)):
        assert table[column].to_numpy() == pytest.approx([run.log_probs[i, j].item() for i, j in enumerate(following)], abs=1e-5)
    assert table.change.to_numpy() == pytest.approx((table["patched run"] - table["clean run"]).to_numpy(), abs=1e-5)
    assert table.token.iloc[-1].endswith(tp.pair.clean_target.strip())


def test_the_lens_view_says_since_when(traced):
    final = traced.patched.lens.query("position == 'final' and rank == 1").set_index("depth").token
    said = final.iloc[-1]
    since = max([d for d in final.index if final[d] != said], default=-1) + 1
    assert f"{said.strip()!r} from depth {since} on the patched run" in lens_view(traced).alt
    assert lens_view(traced, 1).table.iloc[0, 1].count(",") == 0


@pytest.mark.parametrize("name, axes", [("attention", 16), ("effects", 2), ("log_probs", 2), ("lens", 2)])
def test_every_view_has_a_figure_without_scripts(shown, name, axes):
    for _ in range(2): figure = shown[name].figure()  # more than once
    assert len(figure.axes) == axes
    figure.draw_without_rendering()


NASTY = ["<bos>", "</script>", "<img src=x onerror=alert(1)>", "&lt;b&gt;", "\u2028", '"\\']


def test_no_token_is_markup():
    panel = Panel("a < b", "ColoredTokens", {"tokens": plain_tokens(NASTY), "values": np.zeros(len(NASTY))})
    assert "<" not in panel.data
    assert [t.replace("\u200b", "") for t in json.loads(panel.data)["tokens"]] == NASTY, "the reader sees other tokens"
    view = View("<i>", "says <b>\"no\"</b>", (panel,), traced_table(), lambda: None)
    elements = parsed(view._repr_html_())
    assert [t for t, _ in elements if t in ("img", "i", "bos")] == [] and [t for t, _ in elements].count("script") == 1
    assert not any(re.search(r"<(?!\u200b)|&(?!\u200b)", t) for t in plain_tokens(NASTY))


def traced_table():
    """A table with a cell that would be markup."""
    import pandas as pd
    return pd.DataFrame({"token": ["<img src=x>"]})


def test_the_script_is_put_into_a_page_once(tmp_path):
    inline = setup()._repr_html_()
    assert parsed(inline) == [("script", {})] and len(inline) > 1_000_000 and inline.count("</script") == 1
    link = setup("../circuits'vis.js")._repr_html_()
    assert parsed(link) == [("script", {"src": "../circuits'vis.js", "defer": None})] and len(link) < 100
    write_script(tmp_path / "site" / "circuitsvis.js")
    assert (tmp_path / "site" / "circuitsvis.js").read_text("utf-8") == script()


def test_the_committed_page_is_small_and_links_to_the_script(repo):
    notebook = json.loads((repo / "nbs" / "library" / "views" / "04_circuitsvis.ipynb").read_text("utf-8"))
    pages = ["".join(o["data"]["text/html"]) for c in notebook["cells"] for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    assert setup("../circuitsvis.js")._repr_html_() in pages
    assert sum("data-circuits" in p for p in pages) >= 3 and max(map(len, pages)) < 25_000
