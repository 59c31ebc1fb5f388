"""What a circuit is worth: against plain hooks on the bare model, and on planted models whose circuit is known."""
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from bare_paths import Bare
from tiny import LAYERS, random_pair, tiny_hf, tiny_model
from weekly import mostly

from bizzaroworld.circuits.faithfulness import (SHARES, EdgeCircuits, NodeCircuits, areas, completeness, curve, minimality, nodes_at)
from bizzaroworld.circuits.paths import edges
from bizzaroworld.patch.hops import as_path
from bizzaroworld.patch.interventions import Edit, positions_of
from bizzaroworld.planted.scoreboard import places
from bizzaroworld.planted.truth import truth_of
from bizzaroworld.planted.variants import VARIANTS, plant

FAMILIES = ("llama", "gemma", "gemma2", "gemma3", "gpt2")
PAIRS = (random_pair(1), random_pair(2), random_pair(5, 9, (2, 4)))
BARE_SITES = {"z": "z", "mlp_out": "mlp"}


def ld(logits, tp): return float(logits[tp.clean_target_id] - logits[tp.corrupt_target_id])


class ByHand(Bare):
    "The ablated run with plain hooks: whole prompts, one circuit at a time."
    def others(self, reference):
        "What every place does in each of both prompts of the reference pairs."
        return [self.run(ids)[1] for tp in reference for ids in (tp.clean_ids, tp.corrupt_ids)]

    def nodes(self, tp, outside, others):
        "The logit difference with nodes replaced by the mean of what they do elsewhere (of one run: by that)."
        def put(e, x):
            for p in positions_of(e.position, tp):
                at = (p, e.head) if e.site == "z" else p
                x[at] = torch.stack([seen[BARE_SITES[e.site], e.layer][at] for seen in others]).mean(0)
            return x
        changes = {}
        for e in outside:
            key = (BARE_SITES[e.site], e.layer)
            changes[key] = lambda x, e=e, before=changes.get(key, lambda x: x): put(e, before(x))
        return ld(self.run(tp.clean_ids, changes)[0], tp)

    def edges(self, tp, outside, others):
        "The logit difference where receivers read of some senders what these do elsewhere: receiver by receiver, in a run that goes on."
        done = {}
        def mean(key): return torch.stack([seen[key] for seen in others]).mean(0)
        def swapped(sender, x):
            if sender.kind == "mlp": return mean(("mlp", sender.layer))
            x = x.clone()
            x[:, sender.head] = mean(("z", sender.layer))[:, sender.head]
            return x
        def stream(seen, layer, mid): return seen["mid", layer] if mid else seen["in", layer] if layer < len(self.blocks) else seen["end", 0]
        def reads(receiver):
            "What the receiver's norm reads: the stream, with what the outside senders write exchanged; heads of a layer together."
            layer, mid = (len(self.blocks) if receiver.kind == "logits" else receiver.layer), receiver.kind == "mlp"
            _, seen = self.run(tp.clean_ids, done)
            out, groups = stream(seen, layer, mid), {}
            for sender, _ in (e for e in outside if e[1] == receiver): groups.setdefault((sender.kind, sender.layer), []).append(sender)
            for (kind, l), senders in groups.items():
                if kind == "embed":
                    out = out + mean(("in", 0)) - seen["in", 0]
                    continue
                key, x = ("mlp" if kind == "mlp" else "z", l), seen["mlp" if kind == "mlp" else "z", l]
                for sender in senders: x = swapped(sender, x)
                _, then = self.run(tp.clean_ids, {k: v for k, v in done.items() if k[1] < l or (k[1] == l and kind == "mlp")} | {key: lambda _, x=x: x})
                near = kind != "mlp"  # what the block's own MLP would answer is left out
                out = out + stream(then, l if near else l + 1, near) - stream(seen, l if near else l + 1, near)
            return out
        for l in range(len(self.blocks)):
            new = {}
            for site in "qkv":
                for receiver in dict.fromkeys(e[1] for e in outside if e[1].kind == site and e[1].layer == l):
                    _, seen = self.run(tp.clean_ids, {("in", l): lambda _, x=reads(receiver): x})
                    new.setdefault(site, {})[receiver.head] = seen[site, l][:, receiver.head]
            for site, heads in new.items():
                def put(x, heads=heads):
                    x = x.clone()
                    for h, value in heads.items(): x[:, h] = value
                    return x
                done[site, l] = put
            for receiver in dict.fromkeys(e[1] for e in outside if e[1].kind == "mlp" and e[1].layer == l):
                _, seen = self.run(tp.clean_ids, {("mid", l): lambda _, x=reads(receiver): x})
                done["mlp", l] = lambda _, x=seen["mlp", l]: x
        last = next((e[1] for e in outside if e[1].kind == "logits"), None)
        if last is not None: done["end", 0] = lambda _, x=reads(last): x
        return ld(self.run(tp.clean_ids, done)[0], tp)


def some_circuits(parts, n=4, seed=0):
    rng = np.random.default_rng(seed)
    return [frozenset(p for p in parts if rng.random() < share) for share in np.linspace(0.15, 0.9, n)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", ["all", ("entity", "final", 6)])
@pytest.mark.parametrize("ablation", ["noising", "mean"])
def test_circuits_of_nodes_are_those_of_plain_hooks(family, at, ablation):
    model, hand = tiny_model(family), ByHand(tiny_hf(family), family)
    found = NodeCircuits(model, PAIRS, nodes_at(model, at), ablation)
    circuits = some_circuits(found.parts)
    ours = found.values(circuits)
    everywhere = hand.others(PAIRS)
    for i, tp in enumerate(PAIRS):
        others = [hand.run(tp.corrupt_ids)[1]] if ablation == "noising" else everywhere
        for j, c in enumerate(circuits):
            outside = [p for p in found.parts if p not in c]
            by_hand = named_means(hand, tp, outside) if ablation == "mean" and at != "all" else hand.nodes(tp, outside, others)
            assert ours[i, j] == pytest.approx(by_hand, abs=1e-5)
    assert np.ptp(ours, axis=1).min() > 1e-2 and found.runs == len(circuits) + 2


def named_means(hand, tp, outside):
    "Means at named places: of each reference pair at the place that it has."
    runs = [(other, hand.run(ids)[1]) for other in PAIRS for ids in (other.clean_ids, other.corrupt_ids)]
    changes = {}
    for e in outside:
        key, (here,) = (BARE_SITES[e.site], e.layer), positions_of(e.position, tp)
        def value(seen, p): return seen[key][p, e.head] if e.site == "z" else seen[key][p]
        mean = torch.stack([value(seen, positions_of(e.position, other)[0]) for other, seen in runs]).mean(0)
        def put(x, e=e, here=here, mean=mean, before=changes.get(key, lambda x: x)):
            x = before(x)
            x[(here, e.head) if e.site == "z" else here] = mean
            return x
        changes[key] = put
    return ld(hand.run(tp.clean_ids, changes)[0], tp)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("ablation", ["noising", "mean"])
def test_circuits_of_edges_are_those_of_plain_hooks(family, ablation):
    model, hand = tiny_model(family), ByHand(tiny_hf(family), family)
    found = EdgeCircuits(model, PAIRS[:2], edges(model), ablation, reference=PAIRS)
    circuits = some_circuits(found.parts, 3)
    ours = found.values(circuits)
    for i, tp in enumerate(PAIRS[:2]):
        others = [hand.run(tp.corrupt_ids)[1]] if ablation == "noising" else hand.others(PAIRS)
        for j, c in enumerate(circuits):
            assert ours[i, j] == pytest.approx(hand.edges(tp, [e for e in found.parts if e not in c], others), abs=2e-5)
    assert np.ptp(ours, axis=1).min() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_without_any_part_it_is_the_corrupted_run(family):
    "Of all heads and MLPs at all tokens, and of all edges; by mean ablation every prompt that ends alike says the same."
    model = tiny_model(family)
    bare = Bare(tiny_hf(family), family)
    corrupt, clean = ([ld(bare.run(getattr(tp, side))[0], tp) for tp in PAIRS] for side in ("corrupt_ids", "clean_ids"))
    for found in (NodeCircuits(model, PAIRS, nodes_at(model)), EdgeCircuits(model, PAIRS, edges(model))):
        assert found.empty == pytest.approx(corrupt, abs=2e-5) and found.full == pytest.approx(clean, abs=1e-5)
        assert found.faithfulness([found.parts, []]) == pytest.approx([1, 0]) and found.distance([found.parts, []]) == pytest.approx([0, 1])
    means = EdgeCircuits(model, PAIRS, edges(model), "mean")
    assert np.ptp(means.empty) < 2e-5 < np.ptp(means.full)


def test_nodes_and_edges_agree_where_both_can_say_it():
    "A circuit without some heads and MLPs is one without the edges out of them."
    model = tiny_model("gemma3")
    nodes = NodeCircuits(model, PAIRS, nodes_at(model))
    wires = EdgeCircuits(model, PAIRS, edges(model))
    for c in some_circuits(nodes.parts):
        names = {f"L{e.layer}H{e.head}" if e.site == "z" else f"L{e.layer}.mlp" for e in c}
        kept = [e for e in wires.parts if e[0].kind == "embed" or str(e[0]) in names]
        assert wires.values([kept])[:, 0] == pytest.approx(nodes.values([c])[:, 0], abs=2e-5)


# --- planted circuits

_ZOO = {}


def planted(name, ablation="noising", metric="ld"):
    p = _ZOO.setdefault(name, plant(name, n=6))
    return p, NodeCircuits(p.model, p.pairs, nodes_at(p.model, places(p.pairs[0])), ablation, metric), list(truth_of(p.variant).nodes)


def as_edges(model, truth):
    "The edges of a truth as paths: these have no tokens."
    def node(n, reads):
        if n.site in ("embed", "logits"): return n.site
        return {"z": f"L{n.layer}H{n.head}", "q": f"L{n.layer}H{n.head}.q"}.get(n.site) or (f"L{n.layer}KV{n.head}.{n.site}" if n.site in "kv" else f"L{n.layer}.mlp")
    return list(dict.fromkeys(as_path(model, (node(e.sender, False), node(e.receiver, True))) for e in truth.edges))


@pytest.mark.parametrize("ablation, metric", mostly([("noising", "ld"), ("mean", "ld"), ("noising", "kl")], [("mean", "ld")]))
@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_planted_circuit_is_all_there_is(name, ablation, metric):
    _, found, truth = planted(name, ablation, metric)
    rest = [n for n in found.parts if n not in truth]
    table = found.table({"planted": truth, "rest": rest, "all": found.parts, "none": []})
    assert table.faithfulness.tolist() == pytest.approx([1, 0, 1, 0], abs=2e-3) and table.distance.tolist() == pytest.approx([0, 1, 0, 1], abs=3e-3)
    assert table["size"].tolist() == [len(truth), len(rest), len(found.parts), 0] and set(table.n) == {6}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_planted_edges_are_all_there_is(name):
    p, _, _ = planted(name)
    found = EdgeCircuits(p.model, p.pairs[:2], edges(p.model))
    truth = as_edges(p.model, truth_of(p.variant))
    assert found.faithfulness([truth, [e for e in found.parts if e not in truth]]) == pytest.approx([1, 0], abs=2e-3)


NEEDED_WITH = {"backup": {"L3H1", "L4H2"}, "cancelled": {"L4H2"}, "spread": {"L0", "L1", "L2"}}  # what is needed only once something else is out


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_planted_node_is_needed(name):
    _, found, truth = planted(name)
    table = minimality(found, truth)
    assert (table.most.abs() > 0.4).all()
    assert {part.split()[0] for part in table.part[table.alone.abs() < 1e-2]} == NEEDED_WITH.get(name, set())
    extra = next(n for n in found.parts if n.site == "z" and n not in truth)
    assert minimality(found, [*truth, extra]).set_index("part").most.abs()[str(extra)] < 1e-2


def test_the_backup_is_missed_by_faithfulness_and_seen_by_completeness():
    _, found, truth = planted("backup")
    mlp, first, second = truth
    assert found.faithfulness([[mlp, first]]) == pytest.approx([1], abs=1e-3)
    gaps = completeness(found, [mlp, first]).set_index("removed").gap
    assert gaps[str(first)] == pytest.approx(1, abs=1e-2) and gaps[str(mlp)] < 1e-2
    assert completeness(found, truth).gap.max() < 1e-2
    assert completeness(found, truth, [[first, second]])[["size", "circuit", "model"]].iloc[0].tolist() == pytest.approx([2, 0, 0], abs=1e-2)


def test_completeness_of_everything_compares_the_empty_circuit_with_the_complement():
    _, found, truth = planted("plain")
    whole = completeness(found, truth[:1], draws=0).iloc[-1]
    assert (whole.circuit, whole.model) == pytest.approx(tuple(found.faithfulness([[], [n for n in found.parts if n not in truth[:1]]])))


# --- curves

def test_a_perfect_ranking_has_the_best_areas_there_can_be():
    """The best faithfulness at each size, by trying all sets of that many of the parts that do something; the others do nothing."""
    p, found, truth = planted("plain")
    rest = [n for n in found.parts if n not in truth]
    perfect = curve(found, [*truth, *rest])
    for size, f in {min(size, 3): f for size, f in zip(perfect["size"], perfect.faithfulness)}.items():
        assert f == pytest.approx(found.faithfulness(list(combinations([*truth, *rest[::60]], size))).max(), abs=2e-3)
    best = areas(perfect)
    rng = np.random.default_rng(0)
    for order in [[*rest, *truth], *([found.parts[i] for i in rng.permutation(len(found.parts))] for _ in range(3))]:
        worse = areas(curve(found, order))
        assert worse.CPR < best.CPR and worse.CMD > best.CMD
    # sizes 0, 0, 0, 1 up to one per cent are worth nothing, then 3 are worth all
    assert best.CMD == pytest.approx((0.01 - 0.001) + (0.02 - 0.01) / 2, abs=2e-3) and best.CPR == pytest.approx(0.999 - best.CMD, abs=2e-3)


def test_areas_are_those_worked_out_by_hand():
    table = pd.DataFrame({"share": SHARES, "faithfulness": [0.0, 0, 0, 0, 0, 0, 0.5, 1.5, 1.0, 1.0]})
    under = 0.05 * 0.25 + 0.1 * 1.0 + 0.3 * 1.25 + 0.5 * 1.0
    beside = 0.049 * 1 + 0.05 * 0.75 + 0.1 * 0.5 + 0.3 * 0.25
    assert areas(table).tolist() == pytest.approx([under, beside])
    ones = areas(table.assign(faithfulness=1.0))
    assert ones.tolist() == pytest.approx([0.999, 0])


def test_sizes_are_rounded_down():
    p, found, truth = planted("plain")
    table = curve(found, [*truth, *(n for n in found.parts if n not in truth)])
    assert table["size"].tolist() == [0, 0, 0, 1, 3, 9, 18, 36, 90, 180] and table.share.tolist() == list(SHARES)
    assert (table.low <= table.faithfulness + 1e-9).all() and (table.faithfulness <= table.high + 1e-9).all()


def test_means_over_pairs_come_before_the_ratio():
    model = tiny_model("llama")
    found = NodeCircuits(model, PAIRS, nodes_at(model))
    (c,) = some_circuits(found.parts, 1)
    v = found.values([c])[:, 0]
    assert found.faithfulness([c])[0] == pytest.approx((v.mean() - found.empty.mean()) / (found.full.mean() - found.empty.mean()))
    assert found.distance([c])[0] == pytest.approx(sum(abs(v - found.full)) / sum(abs(found.empty - found.full)))
    single = found.only(found.pairs[1])
    assert single.values([c])[0, 0] == pytest.approx(v[1], abs=1e-5) and single.table({"c": c}).low.isna().all()


def test_means_of_one_pair_are_those_of_all():
    model = tiny_model("llama")
    for found in (NodeCircuits(model, PAIRS, nodes_at(model), "mean"), EdgeCircuits(model, PAIRS, edges(model), "mean")):
        c = some_circuits(found.parts, 1)
        assert found.only(found.pairs[1]).values(c)[0] == pytest.approx(found.values(c)[1], abs=1e-5)


def test_what_is_refused():
    model = tiny_model("llama")
    nodes = nodes_at(model)
    for options, why in ((dict(ablation="zero"), "Unknown ablation 'zero'"), (dict(metric="x"), "Unknown metric"), (dict(parts=[]), "0 parts"), (dict(pairs=[]), "0 pairs"),
                         (dict(parts=[Edit("z", 0, 0, 0)]), "nothing to explain"), (dict(ablation="mean", reference=PAIRS[:1]), "no two reference pairs"),
                         (dict(ablation="mean", reference=[random_pair(1, 11), random_pair(2, 11)]), "Give more pairs of this length")):
        with pytest.raises(ValueError, match=why): NodeCircuits(**dict(model=model, pairs=PAIRS, parts=nodes) | options)
    with pytest.raises(ValueError, match=f"{PAIRS[0].id}: token 8 is at 'all' and at 'final'"): NodeCircuits(model, PAIRS, nodes_at(model, ["all", "final"]))
    assert NodeCircuits(model, PAIRS[:1], [Edit("z", 0, "all", 0), Edit("mlp_out", 1, "final")]).runs == 2, "other nodes may share a token"
    found = NodeCircuits(model, PAIRS, nodes[:-1])
    with pytest.raises(ValueError, match="L2 mlp_out @all is not among the"): found.faithfulness([nodes])
    with pytest.raises(ValueError, match="is not in the circuit"): completeness(found, nodes[:2], [nodes[3:4]])
    for ranking in (nodes[:3], [*nodes[:-2], nodes[0]]):
        with pytest.raises(ValueError, match="each of them once"): curve(found, ranking)
    assert found.values([]).shape == (3, 0) and LAYERS == 3
