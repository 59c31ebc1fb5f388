"""The command line: what it passes on, what it prints, its exit codes, and that it answers without what takes long to import."""
import errno
import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bizzaroworld import __version__, cli, console
from bizzaroworld.model import names

COMMANDS = ["study", "triage", "audit", "battery", "plan", "methods", "paths", "attribute", "circuit", "models", "claims", "compare", "report", "view"]


def run(*args: str):
    """Run the command line in this process."""
    return CliRunner().invoke(cli.app, list(args), prog_name="bizzaroworld")


@pytest.fixture
def stand_in(monkeypatch):
    """Replace a module of the package by one with the given members."""
    def install(name: str, **members):
        module = ModuleType(f"bizzaroworld.{name}")
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, f"bizzaroworld.{name}", module)
    return install


@pytest.mark.parametrize("args", [[], *[[c] for c in COMMANDS]])
def test_help_is_quick_and_imports_nothing_heavy(args):
    code = ("import sys\nfrom bizzaroworld.cli import main\n"
            "try: main()\nexcept SystemExit as e: code = e.code\n"
            "heavy = {'torch', 'transformers', 'transformer_lens', 'pandas', 'numpy', 'matplotlib', 'fastcore'}\n"
            "print('HEAVY', sorted(heavy & set(sys.modules)), code)")
    done = subprocess.run([sys.executable, "-c", code, *args, "--help"], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("HEAVY [] 0"), done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command):
    assert f"\n  bizzaroworld {command}" in run(command, "--help").output


def test_version():
    assert run("--version").output.strip() == f"bizzaroworld {__version__}"


def fake_study(calls):
    """Members of a `study` module that records how it was called."""
    def run_study(model_name, **options):
        calls.append((model_name, options))
        options["progress"](1, 2, "one")
        return options["out"] or Path("runs") / "default"
    return dict(run_study=run_study, closing_lines=lambda run_dir: ["60 pairs swept", f"Files: {run_dir}"])


def test_study_passes_every_option_on_and_prints_the_closing_lines(stand_in, tmp_path):
    calls = []
    stand_in("pipeline", **fake_study(calls))
    battery = tmp_path / "mine.json"
    battery.write_text("[]")
    done = run("study", "--model", "google/gemma-2b", "--battery", str(battery), "--out", str(tmp_path / "run"),
               "--device", "cpu", "--dtype", "bfloat16", "--revision", "main", "--direction", "denoising", "--rows", "7", "--controls", "none", "--workers", "2", "--no-report")
    assert done.exit_code == 0, done.output
    (name, options), = calls
    assert callable(options.pop("progress")) and callable(options.pop("say"))
    assert (name, options) == ("google/gemma-2b", dict(
        battery=battery, out=tmp_path / "run", device="cpu", dtype="bfloat16", revision="main", direction="denoising", chat=False,
        bos=None, multi_token=False, controls=(), max_rows=7, workers="2", anyway=False))
    assert done.stdout.splitlines() == ["60 pairs swept", f"Files: {tmp_path / 'run'}"]
    assert done.stderr == "", "no progress bar where there is no terminal"


def test_study_defaults(stand_in):
    calls, reports = [], []
    stand_in("pipeline", **fake_study(calls))
    stand_in("paper.report", report=lambda run, out, progress: reports.append((run, out)))
    assert run("study").exit_code == 0
    assert run("study", "-m", "google/gemma-2b").exit_code == 0
    (name, options), (_, other) = calls
    assert name == "bizzaro-nano"
    assert (options["dtype"], options["direction"], options["max_rows"], options["controls"]) == ("float32", "noising", 8192, None)
    assert other["out"] is None, "the library chooses the folder"
    assert reports == 2 * [("runs/default", None)], "the paper about the run, in the run folder"


def test_a_report_that_fails_is_told_after_the_results(stand_in):
    def fails(*args, **options): raise OSError("no kernel")
    stand_in("pipeline", **fake_study([]))
    stand_in("paper.report", report=fails)
    done = run("study")
    assert done.exit_code == 1 and "60 pairs swept" in done.stdout and "no kernel" in done.stderr


@pytest.mark.parametrize("args", [
    ["study", "--direction", "sideways"], ["study", "--dtype", "int3"], ["study", "--rows", "0"],
    ["study", "--battery", "no-such-file.json"], ["triage", "--out", "table.xls"],
    ["audit", "bizzaro-nano", "--out", "table"], ["study", "--no-such-option"], ["audit"], ["nonsense"]])
def test_bad_usage_is_exit_code_2(args):
    done = run(*args)
    assert done.exit_code == 2 and done.stdout == "" and done.stderr


def error_of(module: str, kind: type) -> type:
    """An exception class that looks as if it were defined in `module`."""
    return type("BadInputError", (kind,), {"__module__": module})


@pytest.mark.parametrize("error, code", [
    (error_of("bizzaroworld.battery.pairs", ValueError)("row 3 has no clean_target"), 2),
    (error_of("bizzaroworld.pipeline", RuntimeError)("it broke"), 1),
    (ValueError("deep inside torch"), 1), (OSError("disk full"), 1), (KeyboardInterrupt(), 130), (console.Ended(), 143)])
def test_errors_are_one_message_and_an_exit_code(stand_in, error, code):
    def run_study(*args, **options): raise error
    stand_in("pipeline", run_study=run_study, closing_lines=None)
    done = run("study")
    assert done.exit_code == code
    assert str(error) in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_where_downloads_are_kept_is_asked_before_the_client_is_read(tmp_path):
    """In a process of its own: this one has read it."""
    code = "import sys; from bizzaroworld.cli import app; app(['--cache-dir', sys.argv[1], 'models'], standalone_mode=False); from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code, "here"], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path / "elsewhere"), "PYTHONPATH": str(Path(__file__).resolve().parents[1])})
    assert done.stdout.splitlines()[-1] == str(tmp_path / "here"), done.stderr


def test_a_full_disk_is_said_to_be_one(stand_in):
    def run_study(*args, **options): raise OSError(errno.ENOSPC, "No space left on device", "runs/m/pairs/p.parquet")
    stand_in("pipeline", run_study=run_study, closing_lines=None)
    done = run("study")
    assert done.exit_code == 1 and done.stderr.startswith("Error: The disk is full: runs/m/pairs/p.parquet could not be written. What was finished is kept.")


def test_a_request_to_end_is_heard_while_a_command_runs_and_only_then(stand_in):
    before = signal.getsignal(signal.SIGTERM)
    def run_study(*args, **options): signal.raise_signal(signal.SIGTERM)
    stand_in("pipeline", run_study=run_study, closing_lines=None)
    done = run("study")
    assert done.exit_code == 143 and done.stderr == "Stopped. What is finished is kept: the same command goes on from there.\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_debug_lets_the_error_through(stand_in):
    def run_study(*args, **options): raise OSError("disk full")
    stand_in("pipeline", run_study=run_study, closing_lines=None)
    assert isinstance(run("study", "--debug").exception, OSError)
    assert not isinstance(run("study").exception, OSError)


def test_a_malformed_battery_is_bad_input(tmp_path):
    battery = tmp_path / "bad.json"
    battery.write_text('[{"category": "x"}]')
    code = "from bizzaroworld.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "audit", "bizzaro-nano", "--battery", str(battery)],
                          capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "bad.json" in done.stderr and "clean_prompt" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def table() -> pd.DataFrame:
    """A triage table of three pairs."""
    return pd.DataFrame({"rank": [1, 2, 3], "total_swing": [9.0, 8.0, 7.25], "ld_clean": [5.0, 4.0, 3.0],
                         "ld_corrupt": [-4.0, -4.0, -4.25], "pair_id": ["first", "second", "third"], "warnings": ["none", "target_space_added", "none"]})


def test_triage_prints_the_top_and_writes_everything(stand_in, table, tmp_path):
    stand_in("model.load", load_model=lambda name, **options: (name, options))
    stand_in("battery.triage", triage=lambda model, pairs, spares, **aligned: SimpleNamespace(table=table, excluded=table.head(1), line="The model prefers 2."))
    out = tmp_path / "new" / "triage.csv"
    done = run("triage", "--top", "2", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "second" in done.stdout and "third" not in done.stdout
    assert "3 pairs ranked, 1 excluded. The model prefers 2." in done.stdout
    assert pd.read_csv(out).equals(table)
    assert [p.name for p in out.parent.iterdir()] == ["triage.csv"], "no temporary file is left"


def test_one_pair_is_not_pairs(stand_in, table):
    stand_in("model.load", load_model=lambda name, **options: name)
    stand_in("battery.triage", triage=lambda *args, **aligned: SimpleNamespace(table=table.head(1), excluded=table, line="It is so."))
    assert "1 pair ranked, 3 excluded. It is so." in run("triage").stdout


def test_triage_in_chat(stand_in, table):
    seen = []
    def triage(model, pairs, spares, **aligned):
        seen.append((pairs, spares))
        return SimpleNamespace(table=table, excluded=table, line="")
    stand_in("model.load", load_model=lambda name, **options: name)
    stand_in("battery.triage", triage=triage)
    stand_in("battery.chat", in_chat=lambda model, pairs: [f"in the chat of {model}: {pair.id}" for pair in pairs])
    assert run("triage", "--chat").exit_code == run("triage").exit_code == 0
    (chat, spares), (bare, others) = seen
    assert chat == [f"in the chat of bizzaro-nano: {pair.id}" for pair in bare] and spares == [f"in the chat of bizzaro-nano: {pair.id}" for pair in others]


def test_triage_in_chat_needs_a_template():
    done = run("triage", "--chat")
    assert done.exit_code == 2 and "no chat template" in done.stderr


def test_audit_prints_the_counts_and_the_reasons(stand_in, tmp_path):
    summary = pd.DataFrame({"tokenizer": ["one"], "pairs": [60], "usable": [59], "dropped": [1], "replaced": [1],
                            "reasons": ["length_differs 1"]})
    dropped = pd.DataFrame({"pair_id": ["newton"], "reason": ["length_differs"], "replaced_by": ["spare-7"]})
    report = SimpleNamespace(summary=lambda: summary, dropped=lambda name: dropped, table=dropped)
    seen = []
    (tmp_path / "one").mkdir()
    stand_in("model.load", load_tokenizer=lambda name: f"tokenizer of {name}")
    stand_in("battery.audit", audit=lambda *args, **aligned: (seen.append(args), report)[1])
    done = run("audit", str(tmp_path / "one"), "--out", str(tmp_path / "audit.csv"))
    assert done.exit_code == 0, done.output
    (tokenizers, pairs, spares), = seen
    assert tokenizers == {"one": f"tokenizer of {tmp_path / 'one'}"} and "Dropped by one:" in done.stdout and len(pairs) == 60 and len(spares) == 60
    assert "length_differs 1" in done.stdout and "newton" in done.stdout and "spare-7" in done.stdout
    assert pd.read_csv(tmp_path / "audit.csv").equals(dropped)


def test_a_spare_that_the_battery_holds_is_not_offered_again(repo, tmp_path):
    spares = json.loads((repo / "data" / "spares.json").read_text())
    battery = tmp_path / "mine.json"
    battery.write_text(json.dumps(spares[:2]))
    pairs, left = cli._pairs(battery)
    assert len(pairs) == 2 and len(left) == len(spares) - 2
    assert not {p.id for p in pairs} & {p.id for p in left}


def test_models_reads_configs_and_weight_headers(monkeypatch, tmp_path):
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(
        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=1, hidden_size=128)))
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "F16", "shape": [1000, 500]},
                         "b": {"dtype": "F16", "shape": [100_000]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    monkeypatch.setattr("bizzaroworld.model.names.embedded_models", lambda: {"tiny": folder})
    assert [row[:6] for row in names.embedded()] == [("tiny", "0.6M", 8, 4, 1, 128)]
    done = run("models")
    assert done.exit_code == 0 and "tiny" in done.stdout and "google/gemma-2b" in done.stdout


def test_the_embedded_models_are_listed():
    assert {row[0] for row in names.embedded()} == {"bizzaro-nano", "bizzaro-nano-local", "bizzaro-micro", "bizzaro-people"}


def test_a_wide_table_keeps_its_words(capsys):
    console.print_table(["a", "n"], [("[not markup] nan", 1.5), ("x", float("nan"))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("[not markup] nan") and lines[1].endswith("1.50") and lines[2].strip() == "x"


def test_claims_prints_verdicts_and_writes_the_table(tmp_path):
    out = tmp_path / "claims.csv"
    done = run("claims", "bizzaro-nano", "--out", str(out))
    assert done.exit_code == 0, done.output
    table = pd.read_csv(out)
    assert len(table) >= 10 and {"replicates", "does not replicate", "cannot be tested here"} >= set(table.verdict)
    assert all(verdict in done.stdout for verdict in table.verdict.unique())
    assert len(run("claims", "bizzaro-nano", "--why").stdout) > 2 * len(done.stdout)
    scales = run("claims", "bizzaro-nano", "bizzaro-micro")
    assert scales.exit_code == 0 and scales.stdout != done.stdout, "a second run lets more be tested"


def test_compare_names_the_runs_and_writes_figures(tmp_path):
    done = run("compare", "bizzaro-nano", "bizzaro-nano-local", "--out", str(tmp_path / "both"))
    assert done.exit_code == 0, done.output
    assert "bizzaro-nano-local" in done.stdout and list((tmp_path / "both").glob("*.png"))
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path / "both").glob("*.csv")}
    assert tables["models"].run.tolist() == ["bizzaro-nano", "bizzaro-nano-local"] and len(tables["crossings"])


def test_view_writes_the_page_and_opens_it(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    page = tmp_path / "page.html"
    assert run("view", "bizzaro-nano", "--out", str(page), "--no-open").exit_code == 0
    assert page.read_text().lstrip().lower().startswith("<!doctype html") and not opened
    assert run("view", "bizzaro-nano", "--out", str(page)).exit_code == 0 and opened == [page.resolve().as_uri()]


@pytest.mark.parametrize("command", ["claims", "compare", "report", "view"])
def test_a_folder_that_is_no_run_is_bad_input(command, tmp_path):
    done = run(command, str(tmp_path), *([str(tmp_path)] if command == "compare" else []))
    assert done.exit_code == 2 and "no run.json" in done.stderr and "bizzaro-nano" in done.stderr


def test_audit_of_an_embedded_model():
    done = run("audit", "bizzaro-nano")
    assert done.exit_code == 0, done.output
    assert "bizzaro-nano" in done.stdout and "60" in done.stdout


def test_audit_of_a_tokenizer_that_is_not_there():
    done = run("audit", "./no-such-folder")
    assert done.exit_code == 2 and "no-such-folder" in done.stderr


def test_a_category_in_the_progress_bar_is_no_markup(monkeypatch):
    terminal = Console(force_terminal=True, file=StringIO(), width=100)
    monkeypatch.setattr(console, "Console", lambda **options: terminal)
    with console.progress("nano [/x]") as advance: advance(1, 2, "[/b] dates")
    assert "nano [/x] [/b] dates" in terminal.file.getvalue()


def test_a_reader_who_stops_reading_is_no_failure():
    code = "from bizzaroworld.cli import main; main()"
    done = subprocess.run(f"{sys.executable} -c '{code}' claims bizzaro-nano --why | head -n 1", shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("Claims of") and done.stderr == ""


@pytest.mark.slow
def test_battery_writes_a_battery_that_triage_reads(tmp_path):
    from bizzaroworld.battery.formats import load_battery
    prompt = "The national parliament of {} meets in the city of"
    few = [dict(id=i, category="c", relation="capital", clean_prompt=prompt.format(a), corrupt_prompt=prompt.format(b), clean_target=x, corrupt_target=y,
                clean_entity=a, corrupt_entity=b) for i, a, b, x, y in [("1", "Germany", "Russia", " Berlin", " Moscow"), ("2", "Poland", "China", " Warsaw", " Beijing")]]
    (tmp_path / "mine.json").write_text(json.dumps(few))
    out = tmp_path / "made.json"
    done = run("battery", "--from", str(tmp_path / "mine.json"), "--out", str(out))
    assert done.exit_code == 0 and "2 pairs of 1 relation. Wrote" in done.output, done.output
    pairs = load_battery(out)
    assert pairs and {p.relation for p in pairs} == {"capital"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made.json", "mine.json"], "the notes are gone"
    nothing = run("battery", "--from", str(tmp_path / "mine.json"), "--swing", "999", "--out", str(tmp_path / "none.json"))
    assert nothing.exit_code == 2 and "--swing" in nothing.output and not (tmp_path / "none.json").exists()
    ranked = run("triage", "--battery", str(out), "--out", str(tmp_path / "t.csv"))
    assert ranked.exit_code == 0 and (pd.read_csv(tmp_path / "t.csv").total_swing >= 2).all()


def test_the_beginning_of_prompts_and_answers_of_several_tokens_can_be_chosen(tmp_path):
    """Without a BOS another study; an answer of several tokens is compared where it differs, and the run says so."""
    battery = tmp_path / "pairs.csv"
    battery.write_text("id,category,relation,clean_prompt,corrupt_prompt,clean_target,corrupt_target,clean_entity,corrupt_entity\n"
                       "a,c,r,The capital of Germany is the city of,The capital of Russia is the city of, Berlin city, Moscow city,Germany,Russia\n"
                       "b,c,r,The capital of Spain is the city of,The capital of Japan is the city of, Madrid, Tokyo,Spain,Japan\n", "utf-8")
    def ranked(*options):
        out = tmp_path / "out.csv"
        done = run("triage", "--battery", str(battery), "--out", str(out), *options)
        assert done.exit_code == 0, done.output
        return pd.read_csv(out).set_index("pair_id")
    plain, without, several = ranked(), ranked("--no-bos"), ranked("--multi-token")
    assert list(plain.index) == list(without.index) == ["b"] and abs(plain.total_swing["b"] - without.total_swing["b"]) > 0.01
    assert set(several.index) == {"a", "b"} and several.total_swing["b"] == pytest.approx(plain.total_swing["b"], abs=1e-4)
    folder = tmp_path / "run"
    done = run("study", "--battery", str(battery), "--out", str(folder), "--no-bos", "--multi-token", "--controls", "none", "--no-report")
    assert done.exit_code == 0, done.output
    options = json.loads((folder / "run.json").read_text("utf-8"))["options"]
    assert options["bos"] is False and options["multi_token"] is True and set(pd.read_csv(folder / "triage.csv").pair_id) == {"a", "b"}
    other = run("study", "--battery", str(battery), "--out", str(folder), "--controls", "none", "--no-report")
    assert other.exit_code == 2 and "bos" in other.output
