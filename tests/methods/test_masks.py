"""Desiderata-based component masking against plain hooks on the bare model, its identities, and planted circuits."""
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from bare_mixed import logits_with, seen
from tiny import LAYERS, random_pair, tiny_hf, tiny_model

from bizzaroworld.battery.pairs import PromptPair
from bizzaroworld.battery.tokens import align
from bizzaroworld.methods.masks import (
    Desideratum, Mask, MaskOptions, _steps, faithfulness, heads_of, judged, mixed_run, random_sets, summary, top_exact, train_mask)
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention, positions_of
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.planted.truth import truth_of
from bizzaroworld.planted.variants import VARIANTS, plant

SHAPES = ("llama", "gemma", "gemma2", "gemma3", "gpt2")
PAIRS = [random_pair(i) for i in range(8)]
OPTIONS = MaskOptions(batch=2, penalty=0.05)
_PLANTED = {}


def planted(name):
    if name not in _PLANTED: _PLANTED[name] = plant(name, n=30)
    return _PLANTED[name]


def apart(p): return Desideratum("value", p.pairs[:24]), Desideratum("value", p.pairs[24:])
def drawn(n, seed=0): return torch.rand(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
def test_no_share_is_the_clean_run_and_all_of_everything_the_corrupted_one(name):
    model = tiny_model(name)
    clean, corrupt = (model.run(torch.tensor([getattr(tp, f"{side}_ids") for tp in PAIRS])) for side in ("clean", "corrupt"))
    everything = [*heads_of(model, "all", mlps=True), Edit("resid_pre", 0, "all")]
    torch.testing.assert_close(mixed_run(model, PAIRS, everything, torch.zeros(len(everything))), clean, rtol=0, atol=0)
    torch.testing.assert_close(mixed_run(model, PAIRS, everything, torch.ones(len(everything))), corrupt, rtol=0, atol=1e-5)
    assert (clean - corrupt).abs().max() > 0.01


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("position", ["final", "entity_span", 6])
def test_a_rounded_mask_is_what_a_sweep_runs(name, position):
    model, g = tiny_model(name), np.random.default_rng(0)
    components = [*heads_of(model, position, mlps=True), Edit("k", 1, position, 0)]
    for _ in range(3):
        on = g.random(len(components)) < 0.5
        logits = model.readout(mixed_run(model, PAIRS, components, torch.tensor(on).float())).detach()
        found = sweep(model, PAIRS, Intervention(e for e, o in zip(components, on) if o))
        ours = [float(x[tp.clean_target_id] - x[tp.corrupt_target_id]) for x, tp in zip(logits, PAIRS)]
        np.testing.assert_allclose(ours, found.patched[:, 0, 0], atol=2e-5)
        assert np.abs(found.patched[:, 0, 0] - found.clean[:, 0]).max() > 1e-3


def by_hand(hf, tp, components, shares):
    acts, _ = seen(hf, tp.corrupt_ids)
    return logits_with(hf, tp.clean_ids, [(e, p, acts[e.site, e.layer], share) for e, share in zip(components, shares) for p in positions_of(e.position, tp)])


@pytest.mark.parametrize("name", SHAPES)
def test_shares_are_those_of_the_bare_model_and_so_is_their_gradient(name):
    """No TransformerLens on this side; the second of two pairs that run together."""
    model, hf = tiny_model(name), tiny_hf(name)
    hf.set_attn_implementation("eager")
    components = [*heads_of(model, "final", mlps=True), *heads_of(model, "entity")]
    ours, theirs = (drawn(len(components)).requires_grad_() for _ in range(2))
    logits, bare = model.readout(mixed_run(model, PAIRS[:2], components, ours))[1], by_hand(hf, PAIRS[1], components, theirs)
    torch.testing.assert_close(logits, bare, atol=1e-5, rtol=1e-5)
    a, b = (torch.autograd.grad(x[7] - x[11], s)[0] for x, s in ((logits, ours), (bare, theirs)))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert (a.abs() > 1e-4).float().mean() > 0.5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_training_is_that_of_a_loop_written_by_hand(name):
    """Adam, its penalty and its clamps, pair by pair on the bare model, with two desiderata: the corrupted answer must win, the clean one must stay."""
    model, hf, desiderata = tiny_model(name), tiny_hf(name), [Desideratum("value", PAIRS[:4]), Desideratum("stay", PAIRS[4:6], wins="clean")]
    hf.set_attn_implementation("eager")
    options = MaskOptions(batch=1, penalty=0.02, start=0.3, epochs=2)
    mask = train_mask(model, desiderata, options=options)
    steps, shares = _steps([d.asked(model) for d in desiderata], options), torch.full((4 * LAYERS,), 0.3, requires_grad=True)
    for epoch in (steps[:6], steps[6:]): assert sorted(tp.id for step in epoch for tp in step) == sorted(tp.id for tp in PAIRS[:6])
    assert steps[:6] != steps[6:]
    adam, wins = torch.optim.Adam([shares], lr=0.1), {tp.id: 11 if i < 4 else 7 for i, tp in enumerate(PAIRS)}
    for (tp,) in steps:
        adam.zero_grad()
        loss = 0.02 * shares.sum() - by_hand(hf, tp, heads_of(model), shares)[wins[tp.id]]
        loss.backward()
        adam.step()
        shares.data.clamp_(0, 1)
    assert torch.tensor(mask.shares) == pytest.approx(shares.detach(), abs=2e-3)
    assert len(mask.losses) == 12 and mask.losses[-1] == pytest.approx(loss.item(), abs=2e-3)
    assert len({round(s, 2) for s in mask.shares}) > 4


def test_the_same_every_time_and_another_order_for_another_seed():
    model, d = tiny_model("gemma3"), Desideratum("value", PAIRS)
    first, again = (train_mask(model, d, options=OPTIONS) for _ in range(2))
    assert first.shares == again.shares and first.losses == again.losses
    torch.manual_seed(5)
    assert train_mask(model, d, options=OPTIONS).losses == first.losses
    assert train_mask(model, d, options=replace(OPTIONS, seed=1)).losses != first.losses


def test_the_model_is_given_back_as_it_was():
    hf = tiny_hf("gemma3")
    for p in list(hf.parameters())[::2]: p.requires_grad_(False)
    asks, names = [p.requires_grad for p in hf.parameters()], set(hf.state_dict())
    model, before = load_model(hf), {k: v.clone() for k, v in hf.state_dict().items()}
    with torch.no_grad(): mask = train_mask(model, Desideratum("value", PAIRS), options=OPTIONS)
    assert [p.requires_grad for p in hf.parameters()] == asks and all(p.grad is None for p in hf.parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.points.values())
    assert all(torch.equal(v, before[k]) for k, v in hf.state_dict().items())
    assert not model.run(torch.tensor([PAIRS[0].clean_ids])).requires_grad
    assert all(isinstance(s, float) for s in mask.shares)
    model.close()
    assert set(hf.state_dict()) == names


@pytest.mark.parametrize("name", ["plain", "spread", "decoy", "early"])
def test_the_papers_options_find_the_heads_of_planted_circuits_exactly(name):
    p, (train, held_out) = planted(name), apart(planted(name))
    mask = train_mask(p.model, train)
    assert set(mask.chosen) == {n for n in truth_of(p.variant).nodes if n.site == "z"}
    assert mask.undecided == 0 and mask.sparsity == 1 - len(mask.chosen) / 24
    t = summary(faithfulness(p.model, mask, held_out, train)).set_index("set")
    assert t.won["mask"] == t.won["all"] == 1 and t.won["none"] == 0 and t.n["mask"] == 6
    assert t.faithfulness["mask"] == pytest.approx(1, abs=1e-3) and t.effect["all"] == pytest.approx(20, abs=0.01)
    assert t.won["random"] < 0.3 and t.high["random"] < 0.4 and (t["size"][["mask", "top", "random"]] == len(mask.chosen)).all()


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_in_the_shape_of_a_gemma_too(family):
    p = plant("plain", n=12, family=family)
    mask = train_mask(p.model, Desideratum("value", p.pairs), options=MaskOptions(batch=2))
    assert {(e.layer, e.head) for e in mask.chosen} == {(3, 1), (4, 2)}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_from_the_other_end_a_smallest_sufficient_set_is_found_in_every_planted_circuit(name):
    """Smallest by brute force: no smaller set of the circuit's heads makes the donor's answer win on all pairs."""
    p, (train, held_out) = planted(name), apart(planted(name))
    mask = train_mask(p.model, train, options=MaskOptions(start=1, objective="ld"))
    heads = [n for n in truth_of(p.variant).nodes if n.site == "z"]
    assert set(mask.chosen) <= set(heads)
    sets = {str(i): some for i, some in enumerate(c for k in range(len(heads) + 1) for c in combinations(heads, k))}
    won = judged(p.model, held_out, sets | {"mask": mask.chosen}).groupby("set").won.mean()
    assert won["mask"] == 1
    assert len(mask.chosen) == min(len(sets[s]) for s in sets if won[s] == 1)


def test_what_the_papers_options_miss_and_why():
    """A flat slope at the start leads nowhere; and the logit of one answer does not see that the other is larger."""
    p, (train, held_out) = planted("flat"), apart(planted("flat"))
    assert train_mask(p.model, train).chosen == () and train_mask(p.model, train, options=MaskOptions(start=1)).chosen == (Edit("z", 3, "final", 1),)
    p, (train, held_out) = planted("backup"), apart(planted("backup"))
    for start in (0, 1):
        mask = train_mask(p.model, train, options=MaskOptions(start=start))
        assert mask.chosen == (Edit("z", 3, "final", 1),)
        t = judged(p.model, held_out, {"mask": mask.chosen})
        assert not t.won.any() and t.effect.abs().max() < 0.01


def crossed(kind, n=24):
    """Two cities in the prompt; `asked`: the donor's question, whose answer stands in the clean prompt only; `value`: the donor's answer, which does not."""
    from bizzaroworld.planted.weights import CITIES, FIRST, LAST, tokenizer
    words, pairs = tokenizer(), []
    def text(a, b, k): return f"between {CITIES[a % 6]} and {CITIES[b % 6]} {FIRST[k % 6]} {LAST[k % 6]} lives in"
    for i in range(n):
        x, step = i % 6, 1 + i // 6
        y = x + step
        others = [k % 6 for k in range(x + 1, x + 6) if k % 6 != y % 6]
        first, second = (x, y) if i % 2 else (y, x)
        c, d = (others[0], others[1]) if kind == "asked" else (others[0], y)
        if kind == "value": first, second = (x, others[1]) if i % 2 else (others[1], x)
        names = [f"{FIRST[k % 6]} {LAST[k % 6]}" for k in (x, y)]
        pairs.append(align(words, PromptPair(text(first, second, x), text(c, d, y), f" {CITIES[x]}", f" {CITIES[y % 6]}", *names, f"{kind}-{i}", kind)))
    return Desideratum(kind, pairs)


def test_two_desiderata_tell_two_heads_apart():
    """L3H1 says which city is asked for, L4H2 copies it: each is needed for one desideratum and in the way for the other."""
    p = planted("saturated")
    asked, value = crossed("asked"), crossed("value")
    heads = {"L3H1": [Edit("z", 3, "final", 1)], "L4H2": [Edit("z", 4, "final", 2)]}
    won = judged(p.model, [asked, value], heads).groupby(["desideratum", "set"]).won.mean()
    assert won.to_dict() == {("asked", "L3H1"): 1, ("asked", "L4H2"): 0, ("value", "L3H1"): 0, ("value", "L4H2"): 1}
    for d, head, names in ((asked, "L3H1", ("start=1",)), (value, "L4H2", ("start=0", "start=1"))):
        for name in names: assert train_mask(p.model, d, options=MaskOptions(start=int(name[-1]))).chosen == tuple(heads[head]), (d.name, name)
    assert train_mask(p.model, asked).chosen == (), "the pattern is saturated: no gradient leads away from the clean run"


def test_controls():
    p = planted("plain")
    components = heads_of(p.model)
    assert top_exact(p.model, Desideratum("value", p.pairs), components, 2) == (Edit("z", 3, "final", 1), Edit("z", 4, "final", 2))
    sets = random_sets(components, 3, draws=50, seed=1)
    assert len(sets) == 50 and all(len(set(s)) == 3 for s in sets) and len(set(sets)) > 40 and sets == random_sets(components, 3, 50, 1)
    assert {e for s in sets for e in s} == set(components)
    table = judged(p.model, Desideratum("value", p.pairs[:3]), {"none": (), "draws": sets[:2]})
    assert len(table) == 9 and (table[table["set"] == "none"].effect == 0).all() and not table.won_unpatched.any()
    assert (table.unpatched < -9).all()


def test_summary_is_means_and_their_ratio():
    table = judged(tiny_model("llama"), Desideratum("value", PAIRS), {"all": heads_of(tiny_model("llama")), "one": [Edit("z", 1, "final", 2)]})
    t, effects = summary(table).set_index("set"), table.groupby("set").effect.mean()
    assert t.faithfulness["one"] == pytest.approx(effects["one"] / effects["all"]) and t.faithfulness["all"] == 1
    assert t.low["one"] < t.faithfulness["one"] < t.high["one"] and (t.low["all"], t.high["all"]) == (1, 1)


def test_what_is_refused():
    model, d = tiny_model("gpt2"), Desideratum("value", PAIRS)
    with pytest.raises(ValueError, match="Unknown answer 'donor'"): Desideratum("value", PAIRS, "donor")
    with pytest.raises(ValueError, match="has no pairs"): Desideratum("value", [])
    with pytest.raises(ValueError, match="4 steps of 0.1 cannot"): train_mask(model, d)
    with pytest.raises(ValueError, match="pattern cannot be mixed"): train_mask(model, d, [Edit("pattern", 0, "final", 0)])
    with pytest.raises(ValueError, match="source 'donor'"): train_mask(model, d, [Edit("z", 0, "final", 0, "zero")])
    with pytest.raises(ValueError, match="same activation"): train_mask(model, d, [Edit("z", 0, "final", 0), Edit("z", 0, 8)], OPTIONS)
    with pytest.raises(ValueError, match="z has 4 heads"): train_mask(model, d, [Edit("z", 0, "final", 4)], OPTIONS)
    with pytest.raises(ValueError, match="at least one component"): train_mask(model, d, [])
    with pytest.raises(ValueError, match="9 and 12 tokens"): mixed_run(model, [random_pair(1), random_pair(2, 12)], heads_of(model), torch.zeros(12))
    for wrong in (dict(objective="kl"), dict(start=2), dict(batch=0), dict(penalty=-1)):
        with pytest.raises(ValueError): MaskOptions(**wrong)
    mask = Mask(heads_of(model), (1.0,) * 12)
    with pytest.raises(ValueError, match="pair-3 was trained on"): faithfulness(model, mask, Desideratum("value", PAIRS[3:]), Desideratum("value", PAIRS[:4]))


def test_pairs_of_several_lengths_and_a_frame():
    model = tiny_model("gemma2")
    pairs = [random_pair(i, length) for i, length in enumerate((9, 9, 12, 9, 12, 11, 9, 12))]
    mask = train_mask(model, Desideratum("value", pairs), heads_of(model, "entity", mlps=True), OPTIONS)
    frame = mask.to_frame()
    assert len(mask.losses) == 10 and frame.columns.tolist() == ["site", "layer", "head", "position", "share", "chosen"] and len(frame) == 15
    assert frame[frame.site == "mlp_out"]["head"].isna().all() and set(frame.position) == {"entity"}
    assert repr(mask) == f"Mask({frame.chosen.sum()} of 15 components, {mask.undecided} undecided)"
