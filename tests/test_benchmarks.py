"""The benchmark programs stop when numbers differ, and their records hold what the page reads and no one's paths."""
import copy
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import BUILDERS, random_pair, tiny_model
from weekly import mostly

from bizzaroworld.circuits.attribution import attribution, beside
from bizzaroworld.circuits.paths import edges, path_effects
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import grid, positions_of
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.study.experiments import interventions_of

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "data" / "benchmarks").glob("*.json"))


@pytest.fixture(scope="module")
def programs():
    """The programs as modules; they lie beside the package, not in it."""
    if not (ROOT / "benchmarks").is_dir(): pytest.skip("the benchmark programs are not here")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import circuits
        import expert
        import floor
        import gpu
        import patching
        import shapes
        yield Namespace(circuits=circuits, patching=patching, floor=floor, gpu=gpu, expert=expert, shapes=shapes)
    finally: sys.path.remove(str(ROOT / "benchmarks"))


OPTIONS = Namespace(rounds=1, clock="processor", tries=1, only="")


@torch.no_grad()
def test_contestants_agree_on_every_task(programs):
    p, model, pair = programs.patching, tiny_model("gemma"), random_pair(1)
    running = {"sweep": p.by_sweep, "transformer_lens": p.by_transformer_lens, "plain_loop": p.by_plain_loop}
    for task, interventions in p.tasks(model, pair).items():
        values = {name: contestant(model, pair, interventions) for name, contestant in running.items()}
        assert p.check_equal(values) < 1e-5, task
        assert len({round(v, 4) for v in values["sweep"]}) > 2, task


@pytest.mark.parametrize("name", ["gemma3", "llama", "gpt2"])
def test_the_experts_loop_agrees_at_every_site(programs, name):
    """On the bare model, 32 at a time and one left over, at every site that the study patches."""
    bare, pair = BUILDERS[name]().eval(), random_pair(1)
    model = load_model(copy.deepcopy(bare))
    asked = interventions_of(model)
    edits = [(e.site, e.layer, positions_of(e.position, pair)[0], e.head) for e in (i.edits[0] for i in asked)]
    theirs = programs.expert.patch(bare, pair.clean_ids, pair.corrupt_ids, (pair.clean_target_id, pair.corrupt_target_id), edits)
    ours = sweep(model, pair, asked, progress=False)
    assert len(edits) > 32 and {e[0] for e in edits} == {"resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z"}
    assert abs(torch.tensor(theirs) - torch.tensor(ours.patched[0, :, 0])).max() < 1e-5 < abs(ours.patched - ours.clean[0, 0]).max()


@pytest.mark.parametrize("name", mostly(["gemma3", "llama", "gpt2"], ["gemma3"]))
def test_every_edge_by_hand_is_that_of_the_paths(programs, name):
    """One at a time with plain hooks; those of the record are some of each kind."""
    model, pair = tiny_model(name), random_pair(1)
    hand, ours = programs.circuits.ByHand(model, pair), path_effects(model, pair, edges(model))
    assert max(abs(hand.value(path) - value) for path, value in zip(ours.paths, ours.patched[0, :, 0])) < 1e-5 < abs(ours.effects()).max()
    some = programs.circuits.drawn(list(ours.paths), lambda path: (path[0].kind, path[1].kind), 2)
    assert len(set(some)) == len(some) == 2 * 3 * 5 - 1, "three kinds of senders, five of receivers; one embedding to the logits"


@torch.no_grad()
def test_circuits_are_timed_beside_estimates_after_they_were_checked(programs, monkeypatch):
    c, model, pair = programs.circuits, tiny_model("gemma3"), random_pair(1)
    done = c.measure(model, pair, rounds=2, tries=1)["tasks"]
    assert set(done) == {"exact", "AtP", "AtP*", "every edge"} and done["exact"]["asked"] == 9 * 3 * (4 + 2 + 2 + 4) == done["AtP"]["asked"]
    assert done["every edge"]["asked"] == len(edges(model)) and done["every edge"]["checked"] > 30 and done["exact"]["checked"] == 12
    table = beside(sweep(model, pair, grid(model, ("q", "k", "v", "z"), range(3, 9)), progress=False), attribution(model, pair, sites=("q", "k", "v", "z")))
    assert done["AtP"]["rank_correlation"] == pytest.approx(table.effect.abs().corr(table.atp.abs(), "spearman"), abs=1e-3)
    for r in done.values():
        assert r["largest_difference"] < 1e-4 and all(0 < s["min"] <= s["median"] <= s["max"] for s in r["seconds"].values())
    found = {n: run() for n, run in c.contestants(model, pair).items()}
    found["every edge"].patched[:] += 0.01
    with pytest.raises(SystemExit, match="edges: the numbers disagree"): c.checked(model, pair, found, 1)
    found["exact"].patched[:] += 0.01
    with pytest.raises(SystemExit, match="nodes: the numbers disagree"): c.checked(model, pair, found, 1)
    found = {n: run() for n, run in c.contestants(model, pair).items()}
    found["AtP"] = attribution(model, random_pair(2), sites=("q", "k", "v", "z"))
    with pytest.raises(SystemExit, match="both runs of the estimates"): c.checked(model, pair, found, 1)


def test_the_quietest_try_counts(programs, monkeypatch):
    """Of three, and no more once one is quiet: half of two cores busy with others, then a quarter, then none."""
    clock = iter([(0, 0, 0), (2, 1, 3), (2, 1, 3), (5, 3, 6.5), (5, 3, 6.5), (9, 4, 7.5), (9, 9, 9)])
    monkeypatch.setattr(programs.circuits, "used", lambda: next(clock))
    monkeypatch.setattr(programs.circuits.os, "cpu_count", lambda: 2)
    value, took = programs.circuits.timed(lambda: 7, 5)
    assert value == 7 and took == {"wall": 4, "processor": 1, "others": 0.0}


def test_what_can_be_saved_is_counted_by_hand(programs):
    """Three layers, nine tokens, the entity at 3 and 4, one patch of every layer at each token."""
    model, pair = tiny_model("gemma"), random_pair(1)
    found = programs.shapes.counts(model, pair, grid(model, "resid_pre", range(9)))
    assert found["counted"] == pytest.approx(27 * 27 / ((3 + 2 + 1) * sum(range(1, 10))))
    assert found["counted_with_names_and_starts"] == pytest.approx(28 * 27 / ((3 + 2 + 1) * sum(range(1, 7)) + 2 * 27))


@torch.no_grad()
def test_no_time_is_given_when_numbers_differ(programs):
    p, model, pair = programs.patching, tiny_model("gemma"), random_pair(1)
    interventions = p.tasks(model, pair)["experiment 4"]
    def wrong(*task): return [v + 0.01 * (i == 3) for i, v in enumerate(p.by_sweep(*task))]
    def short(*task): return p.by_sweep(*task)[:-1]
    def against(other): return p.race({"sweep": p.by_sweep, "plain_loop": other}, model, pair, interventions, OPTIONS.rounds, OPTIONS)
    with pytest.raises(SystemExit, match="disagree"): against(wrong)
    with pytest.raises(ValueError): against(short)


def test_a_time_is_taken_again_until_it_is_quiet(programs, monkeypatch):
    """Three tries: half of two cores busy with others, all quiet, and one that must not happen."""
    clock = iter([(0, 0, 0), (1, 1, 2), (1, 1, 2), (3, 3, 4), (9, 9, 9), (9, 9, 9)])
    monkeypatch.setattr(programs.patching, "used", lambda: next(clock))
    monkeypatch.setattr(programs.patching.os, "cpu_count", lambda: 2)
    values, seconds, others = programs.patching.timed(lambda: [1.0], "wall", 5)
    assert (values, seconds, others) == ([1.0], 2.0, 0.0)


def test_operations_are_counted_by_hand(programs):
    """One pair of 3 tokens, 3 layers: a head written at the last token of layer 1, beside the two whole runs."""
    from bizzaroworld.patch.interventions import Edit, Intervention
    model, pair = tiny_model("gemma"), random_pair(1, length=3, entity=(1, 2))
    d, mlp, inner = 32, 48, 32
    weights = 2 * d * inner + 2 * 2 * d * 8 + 2 * inner * d + 6 * d * mlp
    whole = 2 * (3 * weights + 4 * inner * 6) + (3 * 4 * d * 8 + 4 * d * inner + 6 * d * mlp + 4 * inner * 3)
    head = (2 * inner * d + 6 * d * mlp) + weights + 4 * inner * 3
    counted = programs.floor.operations(model, [pair], [Intervention((Edit("z", 1, "final", 0),))])
    assert counted == 2 * whole + head + 4 * d * 3


def test_gpu_says_that_nothing_is_measured(programs, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    programs.gpu.main()
    assert "nothing is measured" in capsys.readouterr().out and not (tmp_path / "gpu.json").exists()


def test_gpu_runs_whole_at_a_tiny_shape(programs, monkeypatch, capsys, tmp_path):
    """What somebody with a GPU will run, here on the processor: both shapes, every rival, the profile, and the record that is sent back."""
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *"--device cpu --layers 2 --width 32 --pairs 2 --stock 6 --wide 40 --times 1 --out".split(), str(path)])
    programs.gpu.main()
    record, real = json.loads(path.read_text()), json.loads((ROOT / "data" / "benchmarks" / "gpu.json").read_text())
    assert set(record["results"]) == set(programs.gpu.SHAPES) and set(record) == set(real) and str(tmp_path) not in path.read_text()
    for name, done in record["results"].items():
        assert set(real["results"][name]) - {"expert_256"} <= set(done), "all that the committed record says"
        assert done["largest_difference_in_float32"] < 1e-3 and set(done["times_faster_than"]) == {"stock", "expert_32", "expert_40"} and done["patches"] == 2 * done["interventions"]
        assert set(done["limits"]) == {"512 rows", "2048 rows", "60% of the memory"} and 0 < sum(done["shares"].values()) <= 1.01
    assert "in float32 all agree" in capsys.readouterr().out


def test_gpu_gives_no_record_when_numbers_differ(programs, monkeypatch, tmp_path):
    monkeypatch.setattr(programs.gpu, "by_stock", lambda *asked: by_stock(*asked) + 0.01)
    by_stock = lambda model, pairs, study: torch.tensor([programs.patching.by_plain_loop(model, p, study) for p in pairs])  # noqa: E731
    monkeypatch.setattr(sys, "argv", ["gpu.py", *"--device cpu --layers 2 --width 32 --pairs 1 --stock 3 --shape Gemma-2B --out".split(), str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="disagree by 1.0e-02 in float32: no time means anything"): programs.gpu.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.name)
def test_records_say_how_they_came_about(path):
    record = json.loads(path.read_text())
    assert {"processor", "cores", "threads", "system"} <= set(record["hardware"])
    assert {"torch", "transformers", "transformer-lens"} <= set(record["versions"])
    assert re.match(r"python benchmarks/\w+\.py", record["command"])
    assert not re.search(r"/home/|/root|/work|/tmp|/Users/", path.read_text())


def test_records_of_patching_hold_what_the_page_reads():
    records = [json.loads(path.read_text()) for path in RECORDS if path.name.startswith("patching-")]
    assert "processor" in {record["clock"] for record in records}
    for record in records:
        assert set(record["results"]) == {"random Gemma, 18 layers", "bizzaro-nano"}
        for done in record["results"].values():
            assert len(done["tasks"]) == 6
            for r in done["tasks"].values():
                assert r["largest_difference"] < 1e-4 and {"median", "min", "max"} == set(r["seconds"]["sweep"])
                assert {"transformer_lens", "plain_loop"} <= set(r["times_faster_than"])
                assert {"floor_seconds", "fraction_of_floor", "bound_by"} <= set(r["floor"])
                assert "bar" in r and 0 <= r["other_programs"] <= 1


def test_the_record_of_circuits_holds_what_the_page_reads():
    path = ROOT / "data" / "benchmarks" / "circuits-cpu.json"
    if not path.exists(): pytest.skip("circuits were not timed")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["model"] == "gemma-3-270m" and record["results"]
    for done in record["results"].values():
        assert [r["bar"] for r in done["tasks"].values()] == [20, None, None, 60] and list(done["tasks"]) == ["exact", "AtP", "AtP*", "every edge"]
        assert done["tasks"]["exact"]["asked"] == done["tokens"] * 18 * (4 + 1 + 1 + 4) and done["tasks"]["every edge"]["asked"] == 5644
        for name, r in done["tasks"].items():
            assert r["largest_difference"] < 1e-4 and 0 <= r["other_programs"] <= 1 and {"wall", "processor"} == set(r["seconds"])
            assert name not in ("AtP", "AtP*") or (0.8 < r["rank_correlation"] <= 1 and 0 < r["of_exact"]["processor"]["median"] <= r["bar_of_exact"] < 1)


def test_growth_keeps_to_its_budget():
    record = json.loads((ROOT / "data" / "benchmarks" / "scaling-cpu.json").read_text(encoding="utf-8"))
    results = record["results"]
    assert {r["length"] for r in results} >= {8, 1000} and {r["interventions"] for r in results} >= {10, 20_000}
    for r in results:
        assert max(r["peak_mib"], r["forecast_mib"]) <= record["budget_mib"], r
        assert r["peak_mib"] <= 1.1 * r["forecast_mib"] + 2 and r["planning"] <= 0.1 * r["seconds"], r


def test_the_readme_says_what_was_measured():
    record = json.loads((ROOT / "data" / "benchmarks" / "gemma-3-270m-cpu.json").read_text(encoding="utf-8"))
    task = record["results"]["gemma-3-270m"]["tasks"]["the whole study of one pair"]
    assert task["largest_difference"] < 1e-4 and task["other_programs"] < 0.05
    faster = {name: f"{r['median']:.0f} times faster than" for name, r in task["times_faster_than"].items()}
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (f"{task['interventions']} interventions, takes {task['seconds']['sweep']['median']:.1f} s on two CPU cores: {faster['batched_loop']} the loop") in said
    assert f"{faster['nnsight'].removesuffix(' than')} than nnsight" in said and f"{faster['transformer_lens']} TransformerLens's stock loop" in said


@pytest.mark.slow
def test_dictionaries_are_trained_and_scored_at_a_tiny_size(repo, tmp_path):
    (tmp_path / "text.txt").write_text((repo / "README.md").read_text("utf-8"), "utf-8")
    asked = ["--text", str(tmp_path), "--facts", "400", "--tokens", "4000", "--context", "32", "--held", "2", "--width", "64", "-k", "4", "--steps", "3", "--places", "resid_post:1,z:4", "--main", "resid_post:1", "--parts", "places,untrained", "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, repo / "benchmarks" / "dictionaries.py", *asked], check=True, cwd=tmp_path)
    rows = pd.read_csv(tmp_path / "out" / "places.csv")
    assert rows[["site", "layer"]].values.tolist() == [["resid_post", 1], ["z", 4]] and (rows.l0 == 4).all() and rows.first_direction.between(0, 1).all()
    assert (tmp_path / "out" / "saes-untrained" / "resid_post-1" / "cfg.json").exists()
