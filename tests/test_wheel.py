"""The wheel: what is in it, and that it does its job alone, in an empty folder, without a network."""
import configparser
import os
import re
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow
EXPERIMENTS = {"1", "2A", "2B", "3", "4", "4F"}


def run(*command, **options) -> str:
    """Run a command; its output, or a failed test that shows it."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def built(repo, tmp_path_factory) -> dict[str, Path]:
    """A source distribution of the tree, and a wheel built from that distribution alone."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, repo)
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


@pytest.fixture(scope="module")
def content(built) -> zipfile.ZipFile:
    """The opened wheel."""
    with zipfile.ZipFile(built["wheel"]) as archive:
        yield archive


def tracked(repo: Path, folder: str) -> set[str]:
    """The files under a folder of the repository that are not ignored."""
    return set(run("git", "ls-files", "-co", "--exclude-standard", folder, cwd=repo).split())


def test_the_wheel_holds_the_package_and_its_data(repo, content):
    names = {n for n in content.namelist() if ".dist-info/" not in n}
    data = tracked(repo, "data")
    assert {"data/battery.json", "data/spares.json", "data/facts/facts.csv", "data/runs/bizzaro-nano/effects.parquet",
            "data/explorer/explorer.js", "data/published/figures.csv"} <= data
    paper = {f.removeprefix("nbs/") for f in tracked(repo, "nbs/study")} | {"references.bib"}
    assert len(paper) == 19
    expected = {f for f in tracked(repo, "bizzaroworld") if f.endswith((".py", ".pyi", "py.typed"))} | {f"bizzaroworld/{f}" for f in data}
    assert names == expected | {f"bizzaroworld/data/paper/{f}" for f in paper}


def test_the_embedded_models_are_small(content):
    sizes = {i.filename: i.file_size for i in content.infolist() if i.filename.startswith("bizzaroworld/data/models/")}
    assert {n.split("/")[3] for n in sizes if n.count("/") > 3} == {"bizzaro-nano", "bizzaro-nano-local", "bizzaro-micro", "bizzaro-people"}
    assert sum(sizes.values()) < 38_000_000


def test_the_metadata_come_from_settings(repo, content):
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read(repo / "settings.ini")
    cfg = ini["DEFAULT"]
    name = next(n for n in content.namelist() if n.endswith(".dist-info/METADATA"))
    meta = Parser().parsestr(content.read(name).decode())
    assert (meta["Name"], meta["Version"], meta["License-Expression"]) == (cfg["lib_name"], cfg["version"], "Apache-2.0")
    assert meta["Requires-Python"] == f">={cfg['min_python']}"
    required = {re.split(r"[<>=!~\[; ]", r)[0] for r in meta.get_all("Requires-Dist") if "extra ==" not in r}
    assert required == {re.split(r"[<>=]", r)[0] for r in cfg["requirements"].split()}
    assert "LICENSE" in "".join(content.namelist()) and "](nbs/" not in meta.get_payload()
    scripts = content.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "bizzaroworld = bizzaroworld.cli:main" in scripts


def pip(folder: Path) -> list:
    """This environment's pip, at work on the environment whose programs are in `folder`."""
    return [sys.executable, "-m", "pip", "--python", folder / "python", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def alone(repo, built, tmp_path_factory) -> Path:
    """A fresh environment with the wheel at the versions of constraints.txt, and nothing else."""
    where = tmp_path_factory.mktemp("alone") / "venv"
    venv.create(where)
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # with the tree on it, pip finds the package there already
    run(*pip(where / "bin"), "install", "--quiet", "--no-compile",  # what is imported is compiled then
        "-c", repo / "constraints.txt", *index, built["wheel"], env=clean)
    return where / "bin"


def offline(**extra: str) -> dict[str, str]:
    """An environment in which every way to the network ends at a closed port, and no setting of ours helps."""
    hidden = ("PYTHON", "HF_", "TRANSFORMERS_", "VIRTUAL_ENV", "no_proxy", "NO_PROXY")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    closed = "http://127.0.0.1:9"
    return env | {k: closed for k in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")} | extra


def test_the_environment_holds_what_constraints_say(repo, alone):
    wanted = dict(line.split(" ;")[0].split("==") for line in (repo / "constraints.txt").read_text().splitlines() if "==" in line)
    names = {re.sub(r"[-_.]+", "-", n).lower() for n in wanted}
    have = run(*pip(alone), "list", "--format", "freeze").split()
    installed = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in have}
    assert not installed & {"nbdev", "fastcore", "execnb", "ghapi", "pytest"}
    cuda = {n for n in installed if n.startswith(("nvidia", "cuda", "triton"))}
    assert installed - cuda - names <= {"bizzaroworld", "pip", "setuptools", "wheel"}, "constraints.txt lacks something"
    if any(line.startswith("torch==") and line.endswith("+cpu") for line in have):
        assert not cuda, "the CPU build of torch needs none of these"
    run(*pip(alone), "check")


def test_a_study_runs_alone_and_offline(alone, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    shown = run(alone / "bizzaroworld", "study", "--out", "out", cwd=tmp_path, env=offline(HOME=str(home), HF_HOME=str(home / "hf")))
    assert "Traceback" not in shown and "%|" not in shown, "a progress bar where there is no terminal"
    assert "60 pairs" in shown and "out/effects.parquet" in shown
    effects = pd.read_parquet(tmp_path / "out" / "effects.parquet")
    assert set(effects["experiment"]) == EXPERIMENTS
    for experiment, rows in effects.groupby("experiment"):
        assert rows["pair_id"].nunique() == 60, f"experiment {experiment}"
    assert effects[["clean", "corrupt", "patched", "effect"]].notna().all().all()
    assert len(pd.read_csv(tmp_path / "out" / "triage.csv")) == 60
    assert {"run.json", "summary.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    report = (tmp_path / "out" / "report.html").read_text()
    assert "could not be made" not in report and "Where bizzaro-nano keeps its facts" in report


def test_the_command_answers_from_anywhere(alone, tmp_path):
    assert re.match(r"bizzaroworld \d+\.\d+\.\d+$", run(alone / "bizzaroworld", "--version", cwd=tmp_path).strip())
    assert "bizzaro-nano-local" in run(alone / "bizzaroworld", "models", cwd=tmp_path, env=offline())
    assert "replicate" in run(alone / "bizzaroworld", "claims", "bizzaro-nano", cwd=tmp_path, env=offline())
    run(alone / "bizzaroworld", "view", "bizzaro-micro", "--no-open", cwd=tmp_path, env=offline())
    assert (tmp_path / "bizzaro-micro-explorer.html").stat().st_size > 100_000
