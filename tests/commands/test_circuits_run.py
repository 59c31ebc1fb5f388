"""The commands about circuits, end to end on the embedded model: what a folder holds, that it goes on where it was stopped, and what it refuses."""
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from bizzaroworld.commands import circuits_folder, circuits_run
from bizzaroworld.circuits import paths as paths_room
from bizzaroworld.battery.formats import load_battery, load_spares
from bizzaroworld.battery.triage import triage
from bizzaroworld.circuits.attribution import attribution
from bizzaroworld.circuits.faithfulness import NodeCircuits, areas, curve, nodes_at
from bizzaroworld.circuits.paths import path_effects
from bizzaroworld.circuits.search import prune
from bizzaroworld.commands.circuits_folder import CircuitsError, over_pairs
from bizzaroworld.commands.circuits_run import attribution_lines, circuit_lines, paths_lines, place_of, run_attribution, run_circuit, run_paths
from bizzaroworld.cli import app
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.results.estimates import estimate
from bizzaroworld.study.runs import RunError, open_run

TO = dict(receivers=["logits"], n=3)
PLACES = dict(at=["entity", "final"], n=4)


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def ranked(nano):
    """The pairs that a run takes, best first."""
    return triage(nano, load_battery(), load_spares()).golden("C", "preferred")


def save_battery(pairs, path): path.write_text(json.dumps([asdict(p) for p in pairs]))


@pytest.fixture
def loaded(nano, monkeypatch):
    """The commands get the model that is loaded already."""
    asked = []
    monkeypatch.setattr(circuits_folder, "load_model", lambda name, **how: asked.append(name) or nano)
    return asked


def stamps(folder): return {p: p.stat().st_mtime_ns for part in ("pairs", "estimates", "exact", "circuits") for p in (folder / part).rglob("*.parquet")}


@pytest.fixture(scope="module")
def to_logits(nano, tmp_path_factory): return run_paths(nano, out=tmp_path_factory.mktemp("paths") / "run", **TO)


def test_paths_are_those_of_the_library_on_the_best_known_pairs(nano, ranked, to_logits):
    table, means = pd.read_parquet(to_logits / "paths.parquet"), pd.read_csv(to_logits / "paths.csv")
    assert list(table.pair_id.unique()) == [tp.id for tp in ranked[:3]] and set(table.receiver) == {"logits"}
    path = means.path[0]
    direct = path_effects(nano, ranked[:3], path)
    assert np.allclose(table.effect[table.path == path], direct.effects()[:, 0], atol=1e-5)
    expected = estimate(direct.effects()[:, 0])
    assert np.allclose(means.loc[0, ["mean", "low", "high"]].astype(float), [expected.value, expected.low, expected.high], atol=1e-4)
    assert means.share[0] == pytest.approx(direct.effects().mean() / (direct.corrupt - direct.clean).mean(), abs=1e-5)
    assert means["mean"].abs().is_monotonic_decreasing and len(means) == 1 + 8 * (nano.n_heads + 1)
    told = paths_lines(to_logits)
    assert "3 pairs" in told[0] and "preferred on both prompts" in told[0] and path in told[2]


def test_paths_beside_others_are_those_of_the_library(loaded, nano, ranked, to_logits, tmp_path):
    asked = ["paths", "--receivers", "logits,L6.mlp", "--senders", "L3H2,L2.mlp,L5H1", "--pairs", "2", "--beside", "L4.mlp", "--beside", "L3H2", "--beside-at", "entity", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    table, paths = pd.read_parquet(tmp_path / "run" / "paths.parquet"), [f"{s} -> {r}" for s in ("L3H2", "L2.mlp", "L5H1") for r in ("logits", "L6.mlp")]
    theirs = path_effects(nano, ranked[:2], paths, beside=[Edit("mlp_out", 4, "entity"), Edit("z", 3, "entity", 2)])
    found = table.pivot(index="pair_id", columns="path", values="effect").loc[list(theirs.pair_ids), paths]
    assert np.allclose(found, theirs.effects(), atol=1e-5) and not np.allclose(found, path_effects(nano, ranked[:2], paths).effects(), atol=1e-2)
    assert "Patched already: L3H2, L4.mlp (at entity). Effects count from the run with these." in " ".join(done.output.split())
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    assert (options["beside"], options["beside_at"]) == (["L3H2", "L4.mlp"], "entity")
    for other, told in ((["--beside", "L3H2"], r"beside \['L3H2', 'L4.mlp'\], not \['L3H2'\]"), ([], "beside_at 'entity', not None")):
        with pytest.raises(RunError, match=told): run_paths(nano, receivers=["logits", "L6.mlp"], senders=["L3H2", "L2.mlp", "L5H1"], n=2, out=tmp_path / "run", beside=other[1:], **({"beside_at": "entity"} if other else {}))
    run_paths(nano, receivers=["logits", "L6.mlp"], senders=["L3H2", "L2.mlp", "L5H1"], n=2, out=tmp_path / "run", beside=["L3H2", "L4.mlp", "L3H2"], beside_at="entity")
    assert "beside" not in json.loads((to_logits / "run.json").read_text())["options"] and not any("Patched already" in line for line in paths_lines(to_logits)), "a run without is what it was"


def test_a_run_that_was_stopped_does_only_what_is_missing(nano, to_logits, tmp_path, monkeypatch):
    def stop(done, total, note):
        if done == 2 and note not in ("tokens", "triage"): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_paths(nano, out=tmp_path / "r", progress=stop, **TO)
    before = stamps(tmp_path / "r")
    assert len(before) == 2 and not (tmp_path / "r" / "paths.csv").exists()
    (tmp_path / "r" / "pairs" / "half.parquet.tmp").write_text("cut off")
    run_paths(nano, out=tmp_path / "r", **TO)
    assert stamps(tmp_path / "r").items() >= before.items() and len(stamps(tmp_path / "r")) == 3
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "r" / "paths.parquet"), pd.read_parquet(to_logits / "paths.parquet"), atol=1e-5)
    monkeypatch.setattr(paths_room, "path_effects", None)
    run_paths(nano, out=tmp_path / "r", **TO)


def test_more_pairs_may_be_asked_for_later(nano, to_logits, tmp_path):
    run_paths(nano, out=tmp_path / "r", receivers=["logits"], n=1)
    assert pd.read_csv(tmp_path / "r" / "paths.csv").low.isna().all(), "one pair tells no interval"
    before = stamps(tmp_path / "r")
    run_paths(nano, out=tmp_path / "r", **TO)
    assert stamps(tmp_path / "r").items() >= before.items()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "r" / "paths.csv"), pd.read_csv(to_logits / "paths.csv"), atol=1e-5)


def test_a_damaged_file_is_made_anew(nano, to_logits):
    table = pd.read_parquet(to_logits / "paths.parquet")
    file = sorted((to_logits / "pairs").iterdir())[0]
    file.write_bytes(file.read_bytes()[:100])
    run_paths(nano, out=to_logits, **TO)
    pd.testing.assert_frame_equal(pd.read_parquet(to_logits / "paths.parquet"), table, atol=1e-5)


@pytest.mark.parametrize("other, told", [
    (lambda folder: run_paths("bizzaro-nano-local", out=folder, **TO), "model differs"), (lambda folder: run_paths("bizzaro-nano", out=folder, direction="denoising", **TO), "direction 'noising', not 'denoising'"),
    (lambda folder: run_paths("bizzaro-nano", out=folder, receivers=["L7.mlp"]), r"receivers \['logits'\], not \['L7.mlp'\]"), (lambda folder: run_paths("bizzaro-nano", out=folder, known="all", **TO), "known 'preferred', not 'all'"),
    (lambda folder: run_attribution("bizzaro-nano", out=folder), "command 'paths', not 'attribute'"), (lambda folder: run_circuit("bizzaro-nano", out=folder), "command 'paths', not 'circuit'")])
def test_another_runs_folder_is_refused_by_what_differs(to_logits, other, told):
    before = {p: p.read_bytes() for p in to_logits.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=told): other(to_logits)
    assert {p: p.read_bytes() for p in to_logits.rglob("*") if p.is_file()} == before


def test_another_battery_is_another_run(nano, to_logits, tmp_path):
    save_battery(load_battery()[:10], tmp_path / "few.json")
    with pytest.raises(RunError, match="battery_sha256 differs"): run_paths(nano, battery=tmp_path / "few.json", out=to_logits, **TO)


def test_a_folder_of_paths_is_no_study(to_logits):
    with pytest.raises(RunError, match="bizzaroworld paths.*not a study"): open_run(to_logits)


def test_means_over_pairs_are_over_those_that_have_the_row():
    rows = pd.DataFrame({"pair_id": list("abcab"), "node": ["x"] * 3 + ["y"] * 2, "effect": [-4.0, -3.0, -5.0, -0.5, 0.1], "clean": 4.0, "corrupt": [-4.0, -4.0, -5.0, -4.0, -4.0], "direction": "noising"})
    found = over_pairs(rows, "node").set_index("node")
    assert list(found.index) == ["x", "y"] and list(found.n) == [3, 2]
    assert found["mean"].tolist() == pytest.approx([-4, -0.2]) and found.share.tolist() == pytest.approx([4 / (25 / 3), 0.2 / 8])
    assert found.low.x == pytest.approx(estimate([-4.0, -3.0, -5.0]).low)
    pd.testing.assert_frame_equal(over_pairs(rows, "node", at_once=1), over_pairs(rows, "node"))
    assert over_pairs(rows.assign(direction="denoising"), "node").share.tolist() == pytest.approx((-found.share).tolist())


@pytest.fixture(scope="module")
def estimated(nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribution") / "run"
    run_attribution(nano, methods=["atp"], sites=["z", "mlp_out"], n=3, out=folder)
    assert not (folder / "audit.csv").exists()
    before = stamps(folder)
    run_attribution(nano, methods=["atp", "atp_star"], sites=["z", "mlp_out"], n=3, out=folder, exact=True, top=10)
    assert stamps(folder).items() >= before.items(), "methods and exact effects are added to what is there"
    return folder


def test_estimates_and_exact_effects_are_those_of_the_library(nano, ranked, estimated):
    table = pd.read_parquet(estimated / "attribution.parquet")
    tp = ranked[1]
    one = attribution(nano, tp, sites=["z", "mlp_out"]).to_frame().set_index("intervention").effect
    rows = table[table.pair_id == tp.id].set_index("intervention")
    assert np.allclose(rows.atp, one[rows.index], atol=1e-4)
    assert one.drop(rows.index).abs().max() < 1e-6, "only tokens before the prompts part are left out"
    node = rows.exact.abs().idxmax()
    e = rows.loc[node]
    assert e.exact == pytest.approx(sweep(nano, tp, Edit(e.site, int(e.layer), int(e.position), None if pd.isna(e["head"]) else int(e["head"]))).to_frame().effect[0], abs=1e-4)


def test_a_place_is_the_sum_of_its_tokens(ranked, estimated):
    table, means = pd.read_parquet(estimated / "attribution.parquet"), pd.read_csv(estimated / "attribution.csv")
    places = {(tp.id, str(p)): place_of(tp, p) for tp in ranked[:3] for p in range(len(tp.clean_ids))}
    assert [places[key] for key in zip(table.pair_id, table.position)] == list(table.place)
    for tp in ranked[:3]: assert place_of(tp, tp.entity_span[1] - 1) == "entity" and place_of(tp, len(tp.clean_ids) - 1) == "final" and place_of(tp, 0) == "before"
    summed = table[(table.place == "between") & (table.site == "mlp_out") & (table.layer == 2)].groupby("pair_id").atp.sum()
    (row,) = means[(means.node == "L2 mlp_out @between") & (means.method == "atp")].itertuples()
    assert row.mean == pytest.approx(summed.mean(), abs=1e-5) and row.n == len(summed)
    assert set(means.method) == {"atp", "atp_star", "exact"}
    assert set(means.method[means.share.isna()]) == {"atp_star"} and (means["mean"][means.method == "atp_star"] >= 0).all(), "sizes have no sign, and no share of the swing"


def test_one_pair_has_no_interval_and_a_neuron_is_no_head(nano, tmp_path):
    folder = run_attribution(nano, methods=["atp"], sites=["neurons"], exact=True, top=5, n=1, out=tmp_path)
    told = "\n".join(attribution_lines(folder))
    assert "[nan" not in told and "(n = 1: no interval)" in told and "each node and place (its tokens there summed)" in told
    table = pd.read_csv(folder / "attribution.csv")
    assert table.node.str.fullmatch(r"L\d+N\d+ neurons @\w+").all() and str(Edit("z", 7, "final", 3)) == "L7H3 z @final" and table.low.isna().all()


def test_the_audit_is_by_rank_and_names_what_was_missed(estimated):
    table, audit, missed = pd.read_parquet(estimated / "attribution.parquet"), pd.read_csv(estimated / "audit.csv"), pd.read_csv(estimated / "missed.csv")
    for method in ("atp", "atp_star"):
        by = [rows for _, rows in table.groupby("pair_id")]
        found = audit[audit.method == method].set_index("measure").value
        assert found["rank correlation"] == pytest.approx(np.mean([stats.spearmanr(r.exact.abs(), r[method].abs())[0] for r in by]), abs=1e-4)
        tops = [set(r.exact.abs().nlargest(10).index) - set(r[method].abs().nlargest(10).index) for r in by]
        assert found["of the 10 largest"] == pytest.approx(np.mean([10 - len(t) for t in tops]), abs=1e-4)
        lost = {(table.pair_id[i], table.intervention[i]) for t in tops for i in t}
        assert lost == set(zip(missed.pair_id[missed.method == method], missed.intervention[missed.method == method]))
    assert any("beside the exact effects: rank correlation" in line for line in attribution_lines(estimated))


@pytest.fixture(scope="module")
def found(nano, tmp_path_factory): return run_circuit(nano, out=tmp_path_factory.mktemp("circuit") / "run", **PLACES)


def test_a_circuit_is_that_of_the_library(nano, ranked, found):
    told, table, curve = json.loads((found / "circuit.json").read_text()), pd.read_csv(found / "circuit.csv"), pd.read_csv(found / "curve.csv")
    parts = nodes_at(nano, ["entity", "final"])
    circuits = NodeCircuits(nano, ranked[:4], parts)
    expected = prune(circuits, 0.01)
    assert set(told["circuit"]) == set(map(str, expected.circuit)) == set(table.part[table.kept]) and 0 < len(told["circuit"]) < len(parts) == told["parts"]
    assert told["faithfulness"] == pytest.approx(circuits.faithfulness([expected.circuit])[0], abs=1e-3) and told["low"] <= told["faithfulness"] <= told["high"]
    assert curve.groupby("ranking").faithfulness.last().tolist() == pytest.approx([1, 1])
    best = table.iloc[0]
    effects = sweep(nano, ranked[:4], next(p for p in parts if str(p) == best.part), progress=False)
    assert best["rank"] == 1 and best["mean"] == pytest.approx((effects.patched - effects.clean[:, None]).mean(), abs=1e-4)
    assert table.alone.notna().equals(table.kept) and f"{len(told['circuit'])} of {len(parts)} parts" in circuit_lines(found)[1]


def test_a_circuit_that_was_found_is_not_looked_for_again(nano, found, monkeypatch):
    before = {p: p.read_bytes() for p in found.rglob("*") if p.is_file()}
    monkeypatch.setattr(circuits_run, "prune", None), monkeypatch.setattr(circuits_run, "sweep", None)
    run_circuit(nano, out=found, **PLACES)
    assert {p: p.read_bytes() for p in found.rglob("*") if p.is_file()} == before
    with pytest.raises(TypeError): run_circuit(nano, out=found, **PLACES | {"n": 5})


@pytest.mark.parametrize("ablation", ["noising", "mean"])
def test_a_circuit_is_measured_on_pairs_that_were_not_searched(nano, ranked, tmp_path, ablation):
    """The next in order; what is found does not change, and means are those of all pairs."""
    folder, asked = tmp_path / "run", dict(at="final", n=4, ablation=ablation)
    before = json.loads((run_circuit(nano, out=tmp_path / "alone", **asked) / "circuit.json").read_text())
    told = json.loads((run_circuit(nano, out=folder, held_out=3, **asked) / "circuit.json").read_text())
    held, curves = told["held_out"], pd.read_csv(folder / "curve.csv")
    assert {**told, "held_out": None} == before and held["pairs"] == [tp.id for tp in ranked[4:7]]
    circuits = NodeCircuits(nano, ranked[4:7], nodes_at(nano, "final"), ablation, reference=ranked)
    expected, ranking = [p for p in circuits.parts if str(p) in told["circuit"]], pd.read_csv(folder / "circuit.csv").part
    assert held["faithfulness"] == pytest.approx(circuits.faithfulness([expected])[0], abs=1e-3) != told["faithfulness"]
    mine = curve(circuits, sorted(circuits.parts, key=lambda p: list(ranking).index(str(p))))
    theirs = curves[(curves.pairs == "held out") & (curves.ranking == "size")]
    np.testing.assert_allclose(theirs.faithfulness, mine.faithfulness, atol=1e-4)
    assert held["CMD"] == pytest.approx(areas(mine).CMD, abs=1e-3) and (curves.pairs == "searched").sum() == (curves.pairs == "held out").sum()
    assert "On pairs that were not searched it keeps" in "".join(circuit_lines(folder)) and "(n = 3)" in "".join(circuit_lines(folder))
    assert len(json.loads((run_circuit(nano, out=folder, held_out=2, **asked) / "circuit.json").read_text())["held_out"]["pairs"]) == 2


def test_circuits_of_each_pair_are_added_and_resumed(nano, ranked, tmp_path):
    folder, final = tmp_path / "run", dict(at="final", n=3)
    def stop(done, total, note):
        if note == "circuits" and done == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_circuit(nano, out=folder, each=True, progress=stop, **final)
    assert len(list((folder / "circuits").iterdir())) == 2 and not (folder / "circuits.csv").exists()
    before = stamps(folder)
    run_circuit(nano, out=folder, each=True, **final)
    assert stamps(folder).items() >= before.items()
    shares, clusters = pd.read_csv(folder / "circuits.csv"), pd.read_csv(folder / "clusters.csv")
    alone = set(map(str, prune(NodeCircuits(nano, [ranked[2]], nodes_at(nano, "final")), 0.01).circuit))
    mine = pd.read_parquet(folder / "circuits" / f"{ranked[2].id}.parquet")
    assert set(mine.part[mine.kept]) == alone and alone <= set(shares.part)
    assert shares.pairs.max() <= 3 and np.allclose(shares.value, shares.pairs / 3, atol=1e-4) and list(clusters.pair_id) == [tp.id for tp in ranked[:3]]
    assert clusters["size"][2] == len(alone) and "each" in json.loads((folder / "circuit.json").read_text())
    run_circuit(nano, out=folder, **final | {"n": 4})
    assert not (folder / "clusters.csv").exists() and "each" not in json.loads((folder / "circuit.json").read_text()), "what is said of three pairs is not said of four"


def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".json") and p.name.startswith(("circuit", "curve", "steps", "clusters"))}


def test_a_run_that_was_stopped_while_it_grew_is_not_whole(nano, tmp_path, monkeypatch):
    """Two pairs; four, stopped when all tables are written and the circuit is not; two again: nothing is left of the four."""
    write, folder = circuits_run.write_json, tmp_path / "run"
    def stop(path, told):
        if path.name == "circuit.json": raise KeyboardInterrupt
        write(path, told)
    before = files(run_circuit(nano, out=folder, at="final", n=2))
    with monkeypatch.context() as patch:
        patch.setattr(circuits_run, "write_json", stop)
        with pytest.raises(KeyboardInterrupt): run_circuit(nano, out=folder, at="final", n=4)
    assert files(run_circuit(nano, out=folder, at="final", n=2)) == before and len(before) == 4


def test_circuits_of_other_pairs_do_not_stay(nano, tmp_path, monkeypatch):
    """Each of two pairs; each of four, stopped before theirs are found; four."""
    folder, final = tmp_path / "run", dict(at="final", n=4)
    run_circuit(nano, out=folder, each=True, at="final", n=2)
    old = {name: (folder / name).read_bytes() for name in ("circuits.csv", "clusters.csv")}
    def stop(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(circuits_run, "_each", stop)
        with pytest.raises(KeyboardInterrupt): run_circuit(nano, out=folder, each=True, **final)
    assert not old.keys() & files(folder).keys()
    for name, was in old.items(): (folder / name).write_bytes(was)  # as an earlier version left them
    run_circuit(nano, out=folder, **final)
    assert not old.keys() & files(folder).keys() and len(json.loads((folder / "circuit.json").read_text())["pairs"]) == 4
    run_circuit(nano, out=folder, each=True, **final)
    assert len(pd.read_csv(folder / "clusters.csv")) == 4 and old.keys() <= files(run_circuit(nano, out=folder, **final)).keys()


def test_places_are_named_once_and_apart(nano, ranked, tmp_path, monkeypatch):
    """Twice the same is once; two that are one token in some pair are refused before anything is swept."""
    monkeypatch.setattr(circuits_run, "swept", None)
    with pytest.raises(CircuitsError, match=f"{ranked[0].id}: token {len(ranked[0].clean_ids) - 1} is at 'final' and at -1. Give one of them"): run_circuit(nano, out=tmp_path / "new", at=["final", -1], n=2)
    monkeypatch.setattr(circuits_run, "check_places", lambda pairs, places, check=circuits_run.check_places: check([replace(tp, entity_span=(1, len(tp.clean_ids))) if tp is pairs[1] else tp for tp in pairs], places))
    with pytest.raises(CircuitsError, match=f"{ranked[1].id}: token .* is at 'entity' and at 'final'"): run_circuit(nano, out=tmp_path / "new", at=["entity", "final"], n=2)
    assert not (tmp_path / "new").exists()


def test_twice_the_same_place_is_once(nano, tmp_path):
    once, twice = (run_circuit(nano, out=tmp_path / str(i), at=at, n=2) for i, at in enumerate(["final", ["final", "final"]]))
    assert files(once) == files(twice)


def test_one_name_is_not_taken_letter_by_letter(nano, to_logits, tmp_path):
    folder = run_paths(nano, receivers="logits", senders="embed", n=1, out=tmp_path / "a")
    assert pd.read_csv(folder / "paths.csv").path.tolist() == ["embed -> logits"] == pd.read_csv(run_paths(nano, paths="embed -> logits", n=1, out=tmp_path / "b") / "paths.csv").path.tolist()
    assert run_paths(nano, out=to_logits, receivers="logits", n=3) == to_logits, "it is the same run"
    assert set(pd.read_csv(run_attribution(nano, methods="atp", sites="mlp_out", n=1, out=tmp_path / "c") / "attribution.csv").site) == {"mlp_out"}


def test_methods_are_added_to_those_that_the_folder_has(nano, estimated, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(estimated, folder)
    def listed(file): return list(dict.fromkeys(pd.read_csv(folder / file).method))
    before = pd.read_csv(folder / "audit.csv")
    run_attribution(nano, methods=["ig"], sites=["z", "mlp_out"], n=3, out=folder, top=10)
    assert listed("audit.csv") == ["atp", "ig", "atp_star"] and listed("attribution.csv") == ["atp", "ig", "atp_star", "exact"] and {"atp", "ig", "atp_star"} <= {*pd.read_parquet(folder / "attribution.parquet")}
    pd.testing.assert_frame_equal(pd.read_csv(folder / "audit.csv").query("method != 'ig'").reset_index(drop=True), before)
    run_attribution(nano, methods=["ig"], sites=["z", "mlp_out"], n=4, out=folder, top=10)
    assert listed("attribution.csv") == ["ig"], "the others were not estimated for the fourth pair"


@pytest.mark.slow
def test_a_circuit_of_edges(nano, tmp_path):
    """One pair on the embedded model: what is kept is among the edges, and the whole of them is the model."""
    folder = run_circuit(nano, of="edges", n=1, threshold=0.02, out=tmp_path / "run")
    told = json.loads((folder / "circuit.json").read_text())
    assert told["circuit"] and all(" -> " in part for part in told["circuit"]) and "low" not in told
    assert pd.read_csv(folder / "curve.csv").query("share == 1").faithfulness.tolist() == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("options, told", [
    (["paths", "--path", "L3.mlp -> L2H0.q"], "There is no path from L3.mlp"), (["paths", "--path", "L99.mlp -> logits"], "has layers 0 to 7"), (["paths", "--senders", "nobody"], "'nobody' is no component"),
    (["paths", "--beside", "L3H2.q"], "L3H2.q: paths can be asked beside heads (L3H2) and MLPs (L3.mlp)"), (["paths", "--beside", "L3"], "'L3' is no component"), (["paths", "--beside", "L9.mlp"], "has layers 0 to 7"),
    (["paths", "--beside", "L3H2", "--beside-at", "middle"], "Unknown position 'middle'"),
    (["paths", "--metrics", "loss"], "Unknown metric 'loss'"), (["paths", "--sender-at", "middle"], "Unknown position 'middle'"), (["paths", "--sender-at", "final", "--receiver-at", "entity"], "nothing changes from senders"),
    (["paths", "--path", "embed -> logits", "--senders", "embed"], "not both"), (["paths", "--senders", "L7.mlp", "--receivers", "L0.mlp"], "No edge leads"), (["paths", "--metrics", ""], "one metric or more"),
    (["attribute", "--methods", "eap"], "Unknown method 'eap'"), (["attribute", "--metric", "rank"], "'rank' has no gradient"), (["attribute", "--sites", "heads"], "Unknown site 'heads'"), (["attribute", "--methods", ""], "Unknown method"),
    (["attribute", "--sites", "z,pattern"], "pattern is no site of nodes"), (["circuit", "--threshold", "nan"], "threshold above 0"), (["circuit", "--at", "final,-1"], "is at 'final' and at -1"),
    (["circuit", "--at", "middle"], "Unknown position 'middle'"), (["circuit", "--threshold", "0"], "threshold above 0"), (["circuit", "--metric", "loss"], "Unknown metric 'loss'"), (["circuit", "--at", ""], "one place or more")])
def test_bad_options_are_named_and_leave_no_folder(loaded, options, told, tmp_path):
    done = CliRunner().invoke(app, [*options, "--pairs", "2", "--out", str(tmp_path / "new")])
    assert done.exit_code == 2 and told in done.output and "Traceback" not in done.output and not (tmp_path / "new").exists()


@pytest.mark.parametrize("asked, told", [(dict(known="some"), "Unknown set of pairs 'some'"), (dict(direction="up"), "Unknown direction 'up'"), (dict(n=0), "0 pairs")])
def test_what_the_command_line_would_refuse_the_functions_do(nano, asked, told, tmp_path):
    with pytest.raises(CircuitsError, match=told): run_paths(nano, out=tmp_path / "new", **asked)


def test_a_battery_that_the_model_does_not_know_is_said(nano, tmp_path):
    """All answers the wrong way around: the model prefers none."""
    save_battery([replace(p, clean_target=p.corrupt_target, corrupt_target=p.clean_target) for p in load_battery()[:6]], tmp_path / "wrong.json")
    done = CliRunner().invoke(app, ["paths", "--battery", str(tmp_path / "wrong.json"), "--out", str(tmp_path / "new")])
    assert done.exit_code == 2 and "none is preferred on both prompts" in done.output and not (tmp_path / "new").exists()


def test_pairs_that_the_tokenizer_cannot_align_are_told(nano, tmp_path):
    pairs = load_battery()[:6]
    save_battery([replace(pairs[0], clean_prompt="Well, " + pairs[0].clean_prompt), *pairs[1:]], tmp_path / "one.json")
    folder = run_paths(nano, paths=["embed -> logits"], battery=tmp_path / "one.json", n=2, out=tmp_path / "run")
    assert "1 pair could not be used (excluded.csv); 0 replaced" in paths_lines(folder)[0] and pd.read_csv(folder / "excluded.csv").pair_id.tolist() == [pairs[0].id]


@pytest.mark.parametrize("options, files", [
    (["paths", "--receivers", "logits"], ["paths.csv", "paths.parquet"]), (["attribute", "--sites", "mlp_out", "--exact"], ["attribution.csv", "audit.csv", "missed.csv"]),
    (["circuit", "--at", "-1", "--ablation", "mean"], ["circuit.json", "circuit.csv", "curve.csv", "steps.csv"])])
def test_the_commands(loaded, options, files, tmp_path):
    done = CliRunner().invoke(app, [*options, "--pairs", "2", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0 and loaded == ["bizzaro-nano"], done.output
    assert done.stdout.startswith("bizzaro-nano, 2 pairs: the 2 with the largest TotalSwing") and all(str(tmp_path / "run" / f) in done.stdout or f == "circuit.json" for f in files)
    assert all((tmp_path / "run" / f).exists() for f in files) and json.loads((tmp_path / "run" / "run.json").read_text())["options"]["command"] == options[0]


def test_a_pair_that_cannot_be_swept_is_left_out_of_circuits_and_named(nano, ranked, tmp_path, monkeypatch):
    bad, original = ranked[1].id, circuits_run.swept
    def overflows(model, **options):
        sweeper = original(model, **options)
        return lambda pairs: sweeper(pairs).assign(effect=lambda t: t.effect.where(t.pair_id != bad, np.inf))
    monkeypatch.setattr(circuits_run, "swept", overflows)
    folder = run_circuit(nano, out=tmp_path / "r", at="final", n=4, each=True)
    told = json.loads((folder / "circuit.json").read_text())
    assert told["pairs"] == [ranked[i].id for i in (0, 2, 3)] and told["n"] == 3 and pd.read_csv(folder / "clusters.csv").shape[0] in (3, 4)
    assert pd.read_csv(folder / "left_out.csv").pair_id.tolist() == [bad] and f"({circuits_folder.LEFT_OUT}): {bad}." in circuit_lines(folder)[0]
