"""What is foreseen of a study is what it runs; one that does not fit is not begun."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import BUILDERS, random_pair, tiny_hf
from transformers import Gemma4TextConfig
from typer.testing import CliRunner

from bizzaroworld import cli, pipeline
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.model.load import load_model
from bizzaroworld.patch import engine, sweep as sweep_room
from bizzaroworld.scale.configs import Known
from bizzaroworld.scale.needs import Rates, empty_model, sketch
from bizzaroworld.study import foreseen as room
from bizzaroworld.study.foreseen import NoRoomError, box_table, check_room, copies_of, foresee, plan_lines, sweeps_of

PAIRS = [replace(random_pair(i, 7 + i, (2 + i % 2, 4)), pair=replace(random_pair(i).pair, category=f"kind {i % 3}", clean_entity=f"b{i}", corrupt_entity=f"c{i}",
                                                                    clean_target=f" d{i}", corrupt_target=f" e{i}")) for i in range(6)]


@pytest.mark.parametrize("name", list(BUILDERS))
def test_without_weights_as_with_them(name):
    hf = tiny_hf(name)
    known = Known(name, hf.config, "memory", 0)
    drawn, model = sketch(known, empty_model(known)), load_model(hf)
    options = dict(controls=("unrelated", "shuffled", "untrained"), memory=2**26)
    assert sweeps_of(drawn, PAIRS, "denoising", **options) == sweeps_of(model, PAIRS, "denoising", **options)


def test_a_study_runs_what_was_foreseen(monkeypatch, tmp_path):
    """Rows, passes and token-layers as they go through the model, counted while the study of a few pairs runs, with all controls."""
    seen = {"rows": 0, "passes": 0, "token_layers": 0}
    real_pass, real_base = engine._run_pass, sweep_room.base_run

    def run_pass(model, base, the_pass, bank):
        seen["rows"], seen["passes"] = seen["rows"] + len(the_pass.rows), seen["passes"] + 1
        seen["token_layers"] += the_pass.tail * sum(the_pass.counts(model.n_layers))
        return real_pass(model, base, the_pass, bank)

    def base_run(model, sequences, *rest):
        seen["token_layers"] += len(sequences) * max(map(len, sequences)) * model.n_layers
        return real_base(model, sequences, *rest)
    monkeypatch.setattr(engine, "_run_pass", run_pass)
    monkeypatch.setattr(sweep_room, "base_run", base_run)
    monkeypatch.setattr(pipeline, "save_figures", lambda *a: None)
    from bizzaroworld.files import write_json
    write_json(tmp_path / "few.json", [{k: v for k, v in vars(p).items() if v} for p in load_battery()[::6]])
    needs = foresee("bizzaro-nano", tmp_path / "few.json", device="cpu", rates=False)
    folder = pipeline.run_study("bizzaro-nano", battery=tmp_path / "few.json", out=tmp_path / "run", device="cpu")
    assert (needs.work.rows, needs.work.token_layers) == (seen["rows"], seen["token_layers"])
    assert abs(needs.work.passes - seen["passes"]) <= 2, "ties of length and place are broken by rank in the study"
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) <= needs.files and sum(p.stat().st_size for p in files) < needs.folder


def test_a_large_battery_is_planned_by_some_of_its_pairs():
    pairs = [replace(p, id=f"{p.id} {i}") for i in range(3) for p in load_battery()]
    options = dict(device="cpu", rates=False, controls=(), memory=2**28)
    all_of_them, some = foresee("bizzaro-nano", pairs, some=1000, **options), foresee("bizzaro-nano", pairs, some=30, **options)
    assert all_of_them.work.pairs == some.work.pairs == 180
    assert some.work.rows == pytest.approx(all_of_them.work.rows, rel=0.05) and some.work.token_layers == pytest.approx(all_of_them.work.token_layers, rel=0.1)


def test_forecasts_add_up():
    one, two = (sweeps_of(load_model(tiny_hf("gemma")), p, controls=(), memory=2**26)["study"] for p in (PAIRS[:1], PAIRS[:2]))
    both = one + two
    assert (both.rows, both.passes, both.pairs) == (one.rows + two.rows, one.passes + two.passes, 3) and both.bytes_a_pass == max(one.bytes_a_pass, two.bytes_a_pass)


def test_plan_lines_say_all_of_it():
    needs = foresee("google/gemma-3-12b-it", load_battery()[:3], precision="4 bits", device="meta", memory=2**30, rates=Rates(1e-11, 1e-6, 1e-5))
    text = "\n".join(plan_lines(needs))
    assert "12,187,325,040" in text and "table of architectures" in text and "22.7 GiB (bfloat16), of which 22.7 GiB are to be downloaded" in text
    for precision in ("45.4 GiB in float32", "22.7 GiB in bfloat16", "in 8 bits", "in 4 bits"): assert precision in text
    assert "3 pairs (guessed" in text and "rows a pass" in text and "a guess" in text and "untrained" not in text
    assert f"{needs.work.rows:,} rows in {needs.work.passes:,} passes" in text and needs.copies == 1


@pytest.mark.parametrize("shared, said", [(0, False), (2, True)])
def test_what_cannot_be_patched_is_said_and_a_folder_without_weights_is_planned(tmp_path, shared, said):
    """A Gemma 4 of which only the configuration is there."""
    Gemma4TextConfig(num_hidden_layers=6, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=500, vocab_size_per_layer_input=500,
                     hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"] * 3, num_kv_shared_layers=shared).save_pretrained(tmp_path)
    text = "\n".join(plan_lines(foresee(str(tmp_path), load_battery()[:3], device="cpu", rates=False, memory=2**28)))
    assert "no weights are there" in text and ("2 of its layers take keys and values from earlier ones" in text) == said


def test_a_small_model_comes_with_an_untrained_twin():
    needs = foresee("bizzaro-nano", load_battery()[:4], device="cpu", rates=False, memory=2**28)
    assert needs.copies == 2 and "second model" in "\n".join(plan_lines(needs))
    assert foresee("bizzaro-nano", load_battery()[:4], device="cpu", rates=False, memory=2**28, controls=()).copies == 1


def test_a_box_for_the_models_of_the_study():
    table = box_table(["google/gemma-2b"], ("bfloat16", "4 bits"))
    assert table.GPU.tolist() == ["8 GiB", "8 GiB"] and table.weights.tolist() == ["4.7 GiB", "2.0 GiB"] and (table.rows > 10_000).all()


def test_prompts_beyond_the_models_positions_are_refused():
    pair = load_battery()[0]
    long = replace(pair, clean_prompt="word " * 1100 + pair.clean_prompt, corrupt_prompt="word " * 1100 + pair.corrupt_prompt)
    with pytest.raises(ValueError, match="positions for 1024"): foresee("openai-community/gpt2", [long], device="cpu", rates=False, memory=2**28)


# -- What does not fit is not begun ------------------------------------------------------------------------------------

@pytest.fixture
def little(monkeypatch):
    """A machine with 16 MiB of memory; loading a model is a failure."""
    from bizzaroworld.scale import needs
    for module in (room, needs): monkeypatch.setattr(module, "free_bytes", lambda device: 2**24)
    monkeypatch.setattr(pipeline, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))


def test_a_study_that_does_not_fit_is_not_begun(little, tmp_path):
    with pytest.raises(NoRoomError, match="GiB of memory in float32.*\n.*--anyway"): pipeline.run_study("google/gemma-2b", out=tmp_path / "run", device="cpu")
    with pytest.raises(NoRoomError, match="bizzaro-nano needs"): pipeline.run_study("bizzaro-nano", out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_unless_told_to(little, monkeypatch, tmp_path):
    class Loaded(Exception): pass
    def load(*a, **k): raise Loaded
    monkeypatch.setattr(pipeline, "load_model", load)
    with pytest.raises(Loaded): pipeline.run_study("google/gemma-2b", out=tmp_path / "run", device="cpu", anyway=True)
    with pytest.raises(Loaded): pipeline.run_study("nobody/knows-it", out=tmp_path / "run", device="cpu")


def test_a_full_disk_is_told_before(monkeypatch, tmp_path):
    from bizzaroworld.scale import needs
    for module in (room, needs): monkeypatch.setattr(module, "free_on_disk", lambda path: (2**20, 10**6))
    with pytest.raises(NoRoomError, match="its run folder: .* needed and 1 MiB are free"): check_room("bizzaro-nano", tmp_path / "run", device="cpu")
    (tmp_path / "run" / "pairs").mkdir(parents=True)
    (tmp_path / "run" / "pairs" / "a.parquet").write_bytes(bytes(40 * 2**20))
    check_room("bizzaro-nano", tmp_path / "run", device="cpu")  # what is there already need not be written


def test_a_model_in_memory_and_a_small_one_are_not_planned(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "foresee", lambda *a, **k: pytest.fail("it was planned"))
    monkeypatch.setattr(pipeline, "check_room", lambda *a, **k: pytest.fail("it was checked"))
    model = load_model(tiny_hf("gemma"))
    with pytest.raises(ValueError): pipeline.run_study(model, out=tmp_path / "run")  # it has no tokenizer
    check_room("bizzaro-nano", tmp_path / "run", device="cpu")


def test_the_command():
    def run(*args): return CliRunner().invoke(cli.app, list(args), prog_name="bizzaroworld")
    done = run("plan", "--device", "cpu")
    assert done.exit_code == 0 and "2,558,080" in done.stdout and "60 pairs (as its tokenizer counts)" in done.stdout and "fits this machine" in done.stdout
    unknown = run("plan", "--model", "nobody/nothing")
    assert unknown.exit_code == 2 and "Hub could not be reached" in unknown.stderr
    assert isinstance(NoRoomError("x"), ValueError) and NoRoomError.__module__.startswith("bizzaroworld."), "exit code 2"


def test_several_workers_are_counted_where_they_lie(monkeypatch):
    cpu, gpus, one = torch.device("cpu"), torch.device("cuda"), torch.device("cuda:1")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert [copies_of(n, True, cpu) for n in (1, 2, 4)] == [2, 5, 9], "and the process that began them"
    assert [copies_of(n, False, gpus) for n in (1, 4, 5)] == [1, 2, 3] and copies_of(4, False, one) == 5
    with pytest.raises(NoRoomError, match="which spreads the model"): check_room("bizzaro-nano", Path("runs"), device="cpu", workers=10**5)
    check_room("bizzaro-nano", Path("runs"), device="auto", workers=1)
