"""The data of the chapter on edges: complete, of the pairs that they say, and the same numbers wherever two files have one."""
import numpy as np
import pandas as pd
import pytest

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.battery.knowing import pairs_that
from bizzaroworld.battery.tokens import align
from bizzaroworld.circuits.atp_star import atp_star
from bizzaroworld.circuits.attribution import attribution, beside
from bizzaroworld.files import data_path
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.pipeline import paper_run

FOLDER = data_path("circuits", "gemma-3-270m")
LAYERS, HEADS = 18, 4
NAMES = ("cost", "nodes", "split", "sets", "interactions", "cuts")


def when(name):
    """When a component reads and writes, in half layers."""
    if name in ("embed", "logits"): return -1 if name == "embed" else 2 * LAYERS
    layer = int(name[1:].partition("H")[0].partition(".")[0])
    return 2 * layer + name.endswith(".mlp")


@pytest.fixture(scope="module")
def edges(): return pd.read_parquet(FOLDER / "edges.parquet").astype({c: str for c in ("pair_id", "lane", "sender", "receiver")})


@pytest.fixture(scope="module")
def audit(): return pd.read_parquet(FOLDER / "audit.parquet").astype({c: str for c in ("pair_id", "site", "place")})


@pytest.fixture(scope="module")
def tables(): return {name: pd.read_csv(FOLDER / f"{name}.csv") for name in NAMES}


def test_pairs_are_those_of_the_battery_that_the_model_ranks_first(edges, audit, tables):
    known = pairs_that(paper_run().triage, "first_of_all")
    chosen = list(dict.fromkeys(edges.pair_id))
    assert set(chosen) == set(known[:len(chosen)]) <= {p.id for p in load_battery()} and len(chosen) >= 8
    assert set(audit.pair_id) == set(known[:audit.pair_id.nunique()]) and audit.pair_id.nunique() >= 4
    for name in ("nodes", "split", "sets", "interactions", "cuts"): assert set(tables[name].pair_id) == set(chosen), name


def test_both_runs_are_those_of_the_papers_run(edges, audit, tables):
    triage = paper_run().triage.set_index("pair_id")
    for table in (edges, audit, tables["nodes"], tables["split"], tables["sets"]):
        for side in ("clean", "corrupt"): np.testing.assert_allclose(table[side], triage[f"ld_{side}"].loc[table.pair_id], atol=2e-3)


def test_every_edge_is_measured_on_every_pair(edges):
    counted = edges.groupby(["lane", "sender", "receiver"]).pair_id.agg(["size", "nunique"])
    assert (counted == edges.pair_id.nunique()).all(axis=None) and edges.effect.notna().all()
    parts = [f"L{l}{part}" for l in range(LAYERS) for part in (*(f"H{h}" for h in range(HEADS)), ".mlp")]
    heads = [p for p in parts if "H" in p]
    def all_of(lane, senders, receivers): return {(lane, s, r) for s in senders for r in receivers if when(s) < when(r)}
    expected = all_of("entity", ["embed", *parts], parts) | all_of("routing", ["embed", *parts], heads) | all_of("final", parts, [*parts, "logits"])
    assert set(counted.index) == expected


def test_effects_are_within_the_swing(edges, audit, tables):
    for table, most in ((edges, 1.5), (audit, 1.5), (tables["nodes"], 1.5)):
        assert (table.effect.abs() / (table.corrupt - table.clean).abs()).max() < most


def test_the_first_layer_has_the_whole_effect_and_files_agree(audit, tables):
    nodes = tables["nodes"]
    whole = nodes[nodes.site == "resid_pre"]
    np.testing.assert_allclose(whole.effect, whole.corrupt - whole.clean, atol=2e-3)
    at_end = nodes[(nodes.position == "final") & nodes.site.isin(["z", "mlp_out"])].fillna({"head": -1})
    other = audit[(audit.place == "final") & audit.site.isin(["z", "mlp_out"])].astype({"head": float}).fillna({"head": -1})
    on = ["pair_id", "site", "layer", "head"]
    merged = at_end.merge(other, on=on, suffixes=("", "_audit"))
    assert len(merged) == audit.pair_id.nunique() * LAYERS * (HEADS + 1)
    np.testing.assert_allclose(merged.effect, merged.effect_audit, atol=2e-3)


def test_the_audit_has_every_node_and_every_estimate(audit):
    per = audit.groupby(["pair_id", "position"]).size()
    assert set(per) == {LAYERS * (HEADS + 1 + 1 + HEADS + 1)}
    assert audit[["effect", "atp", "atp_qk", "atp_star", "ig", "relp"]].notna().all(axis=None)
    keys = audit.site.isin(["q", "k"])
    assert (audit.atp_star >= 0).all() and (audit.relp[keys] == 0).all()
    np.testing.assert_allclose(audit.atp[~keys], audit.atp_qk[~keys], atol=2e-4)
    assert audit.groupby("pair_id").place.agg(lambda p: (p == "final").sum()).eq(LAYERS * (2 * HEADS + 3)).all()


def test_interactions_are_differences_of_effects(tables):
    both = tables["interactions"]
    np.testing.assert_allclose(both.interaction, both.both - both.alone_first - both.alone_second, atol=3e-4)
    nodes = tables["nodes"].query("site == 'z' and position == 'final'").set_index(["pair_id", "layer", "head"]).effect
    first = both["first"].str.extract(r"L(\d+)H(\d+)").astype(int)
    np.testing.assert_allclose(both.alone_first, [nodes[key] for key in zip(both.pair_id, first[0], first[1])], atol=2e-3)


def test_all_edges_together_are_the_other_run(tables):
    every = tables["sets"].query("set == 'all'")
    np.testing.assert_allclose(every.patched, np.where(every.direction == "noising", every.corrupt, every.clean), atol=5e-3)
    assert set(tables["sets"].direction) == {"noising", "denoising"}


def test_the_scoreboard_is_of_every_method_and_circuit():
    board, variants = (pd.read_csv(data_path("circuits", "planted", f"{name}.csv")) for name in ("scoreboard", "variants"))
    assert set(board.groupby(["kind", "method"]).variant.nunique()) == {8} and set(board.variant) == set(variants.name)
    told = board.set_index(["kind", "method", "variant"]).sort_index()
    assert told.exact["nodes", "exact, beside every other"].all()
    masked = {"backup", "cancelled", "spread"}
    for way in ("exact, noising", "exact, denoising"): assert set(told.exact["nodes", way].loc[lambda x: ~x].index) == masked
    assert told.result["nodes", "AtP"][["flat", "saturated"]].tolist() == ["0/2", "1/3"] and told.exact["nodes", "AtP*"]["flat"]
    saturated = {method: told.result["inputs", method]["saturated"] for method in ("AtP", "AtP, QK fix", "IG", "exact, noising")}
    assert saturated == {"AtP": "0/2", "AtP, QK fix": "1/2", "IG": "2/2", "exact, noising": "2/2"}  # its query is mended, the value before it is not
    edges = told.result["edges", "exact paths"]
    assert not edges.str.contains("+", regex=False).any() and set(edges.index[~told.exact["edges", "exact paths"].to_numpy()]) == masked
    assert told.exact["edges", "exact paths, beside each node"].all() and (told.auroc["edges", "exact paths, beside each node"] == 1).all()  # the right question, of all eight


WIDE = {name: pd.read_csv(data_path("circuits", "neurons") / f"{name}.csv") for name in ("audit", "missed", "recall", "coverage")}


def test_the_audit_of_all_neurons_is_of_every_node_and_its_tables_agree():
    audit, missed, recall, tried = WIDE.values()
    sizes = {"bizzaro-nano": (8, 4, 1, 512), "gemma-3-270m": (18, 4, 1, 2048)}
    for row in audit.itertuples():
        layers, heads, kv, neurons = sizes[row.model]
        assert row.neurons == layers * neurons * row.tokens and row.nodes == row.neurons + layers * (2 * heads + 2 * kv + 1) * row.tokens
    assert set(audit.method) == {"exact", "atp", "atp_qk", "atp_star", "ig", "relp"} and audit.groupby("model").pair_id.nunique().to_dict() == {"bizzaro-nano": 3, "gemma-3-270m": 1}
    for row in audit[audit.method != "exact"].itertuples():
        names, curve = missed[missed.pair_id == row.pair_id], recall[(recall.pair_id == row.pair_id) & (recall.method == row.method)]
        least, most = (names[names[row.method].abs() < names.exact.abs() / 2 + edge] for edge in (-1e-4, 1e-4))  # rounded to four digits
        assert len(least) <= row.missed <= len(most) and least.node.str.contains("N").sum() <= row.missed_neurons <= most.node.str.contains("N").sum()
        assert curve.found.is_monotonic_increasing and curve.found.iloc[0] == row.top_all and curve.verified.iloc[-1] == row.nodes and curve.found.iloc[-1] == 20
    assert (names.exact.abs() >= 0.01 - 1e-4).all() and set(tried.pair_id) == set(audit.pair_id)
    assert ((tried.own <= tried.covered) & (tried.covered <= tried.draws)).all() and (tried.draws * tried.samples == 200).all()
    assert (tried.left == tried.pair_id.map(audit.groupby("pair_id").nodes.first()) - 20).all()


@pytest.mark.slow
def test_one_pair_of_the_audit_of_all_neurons_measured_anew():
    pair = "literature_authors-alice-oliver"
    model, (tp,) = load_model("bizzaro-nano"), [p for p in load_battery() if p.id == pair]
    tp, sites = align(model, tp), ("q", "k", "v", "z", "mlp_out", "neurons")
    swept = sweep(model, tp, grid(model, sites, range(min(tp.differing), len(tp.clean_ids))), progress=False)
    table = beside(swept, attribution(model, tp, sites=sites), atp_star(model, tp, sites=sites))
    told = WIDE["audit"].query("pair_id == @pair").set_index("method")
    assert len(table) == told.nodes["exact"] and abs(table.clean - table.corrupt).iloc[0] == pytest.approx(told.swing["atp"], abs=1e-3)
    for method in ("atp", "atp_star"):
        neurons = table[table.site == "neurons"]
        assert table.effect.abs().corr(table[method].abs(), "spearman") == pytest.approx(told.rank_all[method], abs=1e-2)  # most effects are next to nothing, and their order is arithmetic
        assert neurons.effect.abs().corr(neurons[method].abs(), "spearman") == pytest.approx(told.rank_neurons[method], abs=1e-2)
    swing = table.corrupt.iloc[0] - table.clean.iloc[0]
    lost = table[(table.effect.abs() >= 0.01 * abs(swing)) & (table.atp.abs() < table.effect.abs() / 2)]
    assert len(lost) == told.missed["atp"]
    assert set(lost.intervention.str.extract(r"(L\d+N\d+) neurons")[0].dropna()) == set(WIDE["missed"].query("pair_id == @pair and abs(atp) < abs(exact) / 2").node.loc[lambda n: n.str.contains("N")])


def test_curves_of_circuits_begin_with_nothing_and_end_with_the_model():
    """Under both ablations, on pairs that were searched and on others; MIB's areas are those of the curves."""
    kept, found = (pd.read_csv(FOLDER / f"{name}.csv") for name in ("faithfulness", "circuits"))
    for key, rows in kept.groupby(["of", "ablation", "pairs", "ranking"]):
        assert rows.share.is_monotonic_increasing and rows.faithfulness.iloc[-1] == pytest.approx(1, abs=1e-3), key
        assert (rows.faithfulness[rows["size"] == 0].abs() < 1e-3).all() and rows["size"].iloc[-1] == (180 if key[0] == "nodes" else 5644)
        assert ((rows.low <= rows.faithfulness + 1e-4) & (rows.faithfulness <= rows.high + 1e-4)).all() and rows.n.nunique() == 1
    rankings = kept.groupby(["of", "ablation", "pairs"]).ranking.nunique()
    assert (rankings == 2).all() and {("nodes", a, p) for a in ("noising", "mean") for p in ("searched", "held out")} <= set(rankings.index)
    for row in found.itertuples():
        curves = {way: rows for way, rows in kept[(kept["of"] == row.of) & (kept.ablation == row.ablation) & (kept.pairs == row.pairs)].groupby("ranking")}
        assert np.trapezoid(curves["help"].faithfulness, curves["help"].share) == pytest.approx(row.CPR, abs=2e-3) and curves["size"].n.iloc[0] == row.n
        assert np.trapezoid((1 - curves["size"].faithfulness).abs(), curves["size"].share) == pytest.approx(row.CMD, abs=2e-3)


def test_the_circuit_that_was_found_is_of_the_parts():
    parts, found = pd.read_csv(FOLDER / "circuit.csv"), pd.read_csv(FOLDER / "circuits.csv").query("circuit == 'found'")
    assert len(parts) == 180 == parts.part.nunique() and (found["size"] == parts.kept.sum()).all() and parts.alone.notna().equals(parts.kept)
    assert {(a, p) for a, p in zip(found.ablation, found.pairs)} == {(a, p) for a in ("noising", "mean") for p in ("searched", "held out")}


def test_the_bound_was_tried_on_what_estimates_left(audit):
    tried = pd.read_csv(FOLDER / "coverage.csv")
    assert set(tried.method) == {"atp", "atp_star"} and set(tried.confidence) == {0.9, 0.95, 0.99} and set(tried.pair_id) <= set(audit.pair_id)
    assert ((tried.own <= tried.covered) & (tried.covered <= tried.draws)).all() and (tried.groupby(["method", "pair_id", "samples"]).bound.diff().dropna() >= 0).all()
    for (pair, method), rows in tried.groupby(["pair_id", "method"]):
        one = audit[audit.pair_id == pair]
        left = one.drop(one[method].abs().nlargest(20).index)
        assert (rows.left == len(left)).all() and rows.largest.to_numpy() == pytest.approx(left.effect.abs().max(), abs=2e-3)
        assert rows.swing.to_numpy() == pytest.approx(abs(one.corrupt.iloc[0] - one.clean.iloc[0]), abs=2e-3)
        assert rows.among.nunique() == 1 and (rows.error > 0).all() and (rows.draws * rows.samples == 200).all()
