"""What a sweep takes (pairs of prompts, one or many; edits) and what can be added to an activation."""
import numpy as np
import pytest
import torch
from tiny import LAYERS, random_pair, tiny_model

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.tokens import AlignmentError, align
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention, grid
from bizzaroworld.patch.means import mean_values
from bizzaroworld.patch.sweep import sweep


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def battery(): return load_battery()[:3]


def ids(tp): return torch.tensor([tp.clean_ids])


def ld(tp, logits): return (logits[0, -1, tp.clean_target_id] - logits[0, -1, tp.corrupt_target_id]).item()


def test_pairs_are_aligned_on_the_way(nano, battery):
    edits = [Edit("resid_pre", 3, "entity"), Edit("z", 3, "final", 2)]
    by_hand = sweep(nano, [align(nano, p) for p in battery], [Intervention((e,)) for e in edits])
    for pairs in (battery, iter(battery), [battery[0], align(nano, battery[1]), battery[2]]):
        found = sweep(nano, pairs, edits)
        np.testing.assert_array_equal(found.patched, by_hand.patched)
        assert (found.pair_ids, found.interventions) == (by_hand.pair_ids, by_hand.interventions)


def test_one_pair_and_one_edit_are_lists_of_one(nano, battery):
    edit = Edit("resid_pre", 3, "entity")
    expected = sweep(nano, [align(nano, battery[0])], [Intervention((edit,))])
    for pair in (battery[0], align(nano, battery[0])):
        for asked in (edit, Intervention(edit), [edit]):
            found = sweep(nano, pair, asked, metrics="ld")
            assert found.patched.shape == (1, 1, 1) and found.patched == expected.patched


def test_each_edit_of_a_list_is_by_itself_and_an_intervention_is_together(nano, battery):
    edits = [Edit("z", 3, "final", h) for h in (1, 2)]
    apart, together = sweep(nano, battery, edits).patched[..., 0], sweep(nano, battery, Intervention(edits)).patched[..., 0]
    assert apart.shape == (3, 2) and together.shape == (3, 1)
    assert np.abs(apart - together).min() > 0.01


def test_a_pair_that_cannot_be_aligned_is_named(nano, battery):
    bad = type(battery[1])(**{**vars(battery[1]), "clean_target": " no such word anywhere"})
    with pytest.raises(AlignmentError, match=battery[1].id): sweep(nano, [battery[0], bad], Edit("resid_pre", 0))


def test_donors_are_aligned_too(nano, battery):
    edit = Edit("resid_pre", 2, "final")
    found = sweep(nano, battery[:2], edit, donors=battery[1:])
    expected = sweep(nano, battery[:2], edit, donors=[align(nano, p) for p in battery[1:]])
    np.testing.assert_array_equal(found.patched, expected.patched)


def test_means_take_what_a_sweep_takes(nano, battery):
    patches = grid(nano, ["z"], "final", layers=[3], source="given")
    found = mean_values(nano, battery, patches)
    expected = mean_values(nano, [align(nano, p) for p in battery], [i.edits[0] for i in patches])
    assert list(found) == list(expected) and len(found) == nano.n_heads
    for edit in found: torch.testing.assert_close(found[edit], expected[edit])


def test_an_intervention_takes_any_iterable_and_stays_hashable():
    edits = (Edit("z", 1, "final", 0), Edit("z", 1, "final", 1))
    assert Intervention(iter(edits)) == Intervention(list(edits)) == Intervention(edits)
    assert Intervention(edits[0]).edits == edits[:1] and len({Intervention(list(edits)), Intervention(edits)}) == 1
    with pytest.raises(ValueError, match="at least one"): Intervention(iter(()))


@pytest.mark.parametrize("name", ["gemma", "gemma3", "gpt2", "pythia"])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "resid_post", "z"])
@torch.no_grad()
def test_what_is_added_is_added(name, site):
    """Against TransformerLens's hooks: the vector on top of what this run has there, at two layers at once and in a batch of pairs."""
    model, pairs = tiny_model(name), [random_pair(1), random_pair(2, length=11)]
    head = 2 if site == "z" else None
    edits = [Edit(site, l, "entity", head, "added") for l in (0, LAYERS - 1)]
    edits[1] = Edit(site, LAYERS - 1, "final", head, "added")
    width = model.d_head if site == "z" else model.d_model
    values = {e: torch.randn(width, generator=torch.Generator().manual_seed(i)) for i, e in enumerate(edits)}
    found = sweep(model, pairs, [Intervention(edits), Edit("resid_pre", 1)], values=values).patched[:, 0, 0]
    hook = model.points[site, 0].name.removeprefix("blocks.0.")
    for tp, ours in zip(pairs, found):
        def add(edit, position):
            def hook(act, hook):
                act[(slice(None), position) + ((head,) if head is not None else ())] += values[edit]
                return act
            return hook
        logits = model.bridge.run_with_hooks(ids(tp), fwd_hooks=[(f"blocks.0.{hook}", add(edits[0], tp.entity)),
                                                                 (f"blocks.{LAYERS - 1}.{hook}", add(edits[1], tp.final))])
        assert abs(ours - ld(tp, logits)) < 1e-5
        assert abs(ours - ld(tp, model.bridge(ids(tp)))) > 1e-3, "adding changes nothing, so agreement shows nothing"


def test_adding_zero_changes_nothing(nano, battery):
    edits = [Edit(s, l, p, None, "added") for s in ("resid_pre", "resid_post", "mlp_out") for l in range(8) for p in ("entity", "final")]
    found = sweep(nano, battery, edits, values=dict.fromkeys(edits, torch.zeros(nano.d_model)))
    assert found.to_frame().effect.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gemma", "gemma3", "gpt2"])
@torch.no_grad()
def test_attention_is_knocked_out_in_every_layer_and_head(name):
    """Minus infinity on a score: the softmax shares out what is left. Against hooks on the scores of each layer."""
    model, tp = tiny_model(name), random_pair(4, length=8, entity=(5, 6))
    edits = [Edit("scores", l, "final", source="added") for l in range(LAYERS)]
    block = torch.zeros(len(tp.clean_ids))
    block[tp.entity] = -torch.inf
    together, alone = sweep(model, tp, [Intervention(edits), edits[1]], values=dict.fromkeys(edits, block)).patched[0, :, 0]
    def cut(act, hook):
        act[:, :, tp.final, tp.entity] = -torch.inf
        return act
    def rows_sum_to_one(act, hook):
        assert (act[:, :, tp.final, tp.entity] == 0).all()
        torch.testing.assert_close(act.sum(-1), torch.ones_like(act.sum(-1)))
    hooks = [(f"blocks.{l}.attn.hook_attn_scores", cut) for l in range(LAYERS)]
    checks = [(f"blocks.{l}.attn.hook_pattern", rows_sum_to_one) for l in range(LAYERS)]
    assert abs(together - ld(tp, model.bridge.run_with_hooks(ids(tp), fwd_hooks=hooks + checks))) < 1e-5
    assert abs(alone - ld(tp, model.bridge.run_with_hooks(ids(tp), fwd_hooks=hooks[1:2]))) < 1e-5
    assert abs(together - alone) > 1e-4


def test_one_vector_serves_all_heads(nano, battery):
    edit = Edit("z", 3, "final", None, "given")
    vector = torch.randn(nano.d_head, generator=torch.Generator().manual_seed(0))
    same = sweep(nano, battery, edit, values={edit: vector}).patched
    np.testing.assert_array_equal(same, sweep(nano, battery, edit, values={edit: vector.expand(nano.n_heads, -1)}).patched)


def test_what_is_added_must_be_there(nano, battery):
    edit = Edit("resid_pre", 3, source="added")
    with pytest.raises(ValueError, match="nothing was given"): sweep(nano, battery, edit)


def test_a_sweep_says_what_it_is(nano, battery):
    assert repr(sweep(nano, battery, grid(nano, "resid_pre"), metrics=("ld", "kl"))) == "Sweep(3 pairs x 8 interventions, ld, kl, noising)"
    assert repr(sweep(nano, battery[0], Edit("resid_pre", 0), "denoising")) == "Sweep(1 pair x 1 intervention, ld, denoising)"


def test_a_sweep_keeps_the_tokens_that_its_pairs_share(nano, battery):
    pair = battery[0]
    tp = align(nano, pair)
    for direction, prompt in (("noising", pair.clean_prompt), ("denoising", pair.corrupt_prompt)):
        tokens = sweep(nano, pair, Edit("resid_pre", 0), direction).tokens
        assert len(tokens) == len(tp.clean_ids) and "".join(tokens).replace("<bos>", "").strip() == prompt
    by_length = {len(align(nano, p).clean_ids): p for p in load_battery()}
    assert sweep(nano, list(by_length.values())[:2], Edit("resid_pre", 0)).tokens == ()
    turned = type(pair)(**{**vars(pair), "id": "turned", "clean_prompt": pair.corrupt_prompt, "corrupt_prompt": pair.clean_prompt,
                           "clean_target": pair.corrupt_target, "corrupt_target": pair.clean_target,
                           "clean_entity": pair.corrupt_entity, "corrupt_entity": pair.clean_entity})
    tokens = sweep(nano, [pair, turned], Edit("resid_pre", 0)).tokens
    assert tokens.index("…") == tp.entity and tokens.count("…") == 1
    assert sweep(tiny_model("gemma"), random_pair(1), Edit("resid_pre", 0)).tokens == ()


def test_a_sweep_plots_itself_with_its_tokens(nano, battery):
    tp = align(nano, battery[0])
    figure = sweep(nano, tp, grid(nano, "resid_pre", range(len(tp.clean_ids)))).plot()
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels[tp.entity] == f"{battery[0].clean_entity}  {tp.entity}" and len(labels) == len(tp.clean_ids)
    curve = sweep(nano, battery, grid(nano, "resid_pre", "entity"), metrics=("prob", "ld")).plot(value="effect")
    assert curve.axes[0].get_ylabel() == "Effect on prob (probability)"


@pytest.mark.parametrize("source", ["given", "added"])
def test_attention_is_given_to_prompts_of_one_length_only(nano, source):
    edit, tps = Edit("scores", 2, "final", 1, source=source), [align(nano, p) for p in load_battery()]
    short, other = next((a, b) for a in tps for b in tps if len(a.clean_ids) != len(b.clean_ids))
    with pytest.raises(ValueError, match="one length at a time"):
        sweep(nano, [short, other], edit, values={edit: torch.zeros(len(short.clean_ids))})
    alone = sweep(nano, short, edit, values={edit: torch.zeros(len(short.clean_ids))})
    assert np.isfinite(alone.patched).all()


@pytest.mark.parametrize("edit, said", [(Edit("resid_post", -1), "layers 0 to 7"), (Edit("resid_pre", 8), "layers 0 to 7"),
                                        (Edit("resid_pre", "1"), "layers 0 to 7"), (Edit("mlp", 1), "Unknown site 'mlp'")])
def test_a_layer_or_site_that_is_not_there_is_named(nano, battery, edit, said):
    with pytest.raises(ValueError, match=said): sweep(nano, battery[0], edit)


def test_what_was_mended_is_told(nano, battery):
    from dataclasses import replace
    edit, typed = Edit("resid_pre", 3, "entity"), replace(battery[0], clean_target=battery[0].clean_target.strip())
    with pytest.warns(UserWarning, match="In 1 pair an answer came without the space"): mended = sweep(nano, typed, edit)
    assert (mended.patched == sweep(nano, battery[0], edit).patched).all()


@pytest.mark.parametrize("position, other, heads", [("final", -1, (None, None)), ("all", "final", (None, None)), ("final", "final", (None, 1))])
def test_one_activation_under_two_names_is_refused(nano, battery, position, other, heads):
    site = "resid_pre" if heads == (None, None) else "z"
    both = Intervention((Edit(site, 1, position, heads[0], source="zero"), Edit(site, 1, other, heads[1])))
    with pytest.raises(ValueError, match="of the same activation"): sweep(nano, battery[0], both)
