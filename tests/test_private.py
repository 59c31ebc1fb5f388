"""What is written says nothing of the machine it was written on, and shows markup as text."""
import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bizzaroworld.battery.formats import load_battery
from bizzaroworld.files import write_table
from bizzaroworld.model.names import embedded_models
from bizzaroworld.paper import report
from bizzaroworld.pipeline import run_study
from bizzaroworld.study.runs import open_run
from bizzaroworld.views.explorer import explorer_page
from planted import planted_run, steps


def contents(path: Path) -> str:
    """All that a file says: its bytes, and what is packed in them."""
    said = path.read_bytes().decode("latin-1")
    if path.suffix == ".parquet": said += pd.read_parquet(path).to_csv() + str(pq.read_schema(path).metadata)
    if path.suffix == ".png":
        with Image.open(path) as image: said += str(image.info)
    return said


@pytest.mark.slow
def test_a_study_does_not_say_where_its_model_lies(tmp_path, monkeypatch):
    secret = tmp_path / "zz-secret-user-zz"
    shutil.copytree(embedded_models()["bizzaro-nano"], secret / "my-nano")
    (tmp_path / "few.json").write_text(json.dumps([dataclasses.asdict(p) for p in load_battery()[::12]]))
    monkeypatch.setenv("HF_TOKEN", "hf_marker0123456789")
    folder = run_study(str(secret / "my-nano"), battery=tmp_path / "few.json", out=tmp_path / "run", controls=())
    chapter = report.read_chapters(["04_fact"])
    report.report(folder, chapters=["04_fact"], explorer=True)
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert chapter and {".parquet", ".csv", ".json", ".png", ".html"} <= {p.suffix for p in files}
    assert [p.name for p in files for place in ("zz-secret", str(Path.home()) + "/", "hf_marker") if place in contents(p)] == []
    assert json.loads((folder / "run.json").read_text())["model"]["name"] == "my-nano"


def test_a_chapter_that_stops_does_not_say_where_the_run_lies(tmp_path):
    (tmp_path / "zz-run").mkdir()
    says = report._placeless(tmp_path / "zz-run")
    assert says(f"{tmp_path / 'zz-run'} holds no experiment '4'") == "zz-run holds no experiment '4'"
    assert says(f"{Path.home()}/x {Path.home()}x") == f"~/x {Path.home()}x" and says("runs/a") == "runs/a"
    cell = {"outputs": [{"text": f"a {Path.home()}/b"}, {"data": {"text/html": [f"<p>{tmp_path / 'zz-run'}/triage.csv"], "image/png": str(Path.home())}}]}
    report._nowhere(cell, says)
    assert cell["outputs"] == [{"text": "a ~/b"}, {"data": {"text/html": "<p>zz-run/triage.csv", "image/png": str(Path.home())}}]


MARK = "<script>alert('x')</script>"


@pytest.fixture
def marked(tmp_path):
    """A run in which every text is markup."""
    run = planted_run(tmp_path / "run", steps([2] * 3))
    names = {pair: f"{MARK}{i}" for i, pair in enumerate(run.pairs())}
    for path in run.folder.iterdir():
        if path.suffix not in (".csv", ".parquet"): continue
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        more = {k: f"{MARK} of Peru is" for k in ("clean_prompt",)} | {"corrupt_prompt": f"{MARK} of Cuba is", "clean_target": MARK, "corrupt_target": MARK + "2", "clean_entity": "Peru",
                "corrupt_entity": "Cuba", "relation": MARK} if path.name != "effects.parquet" else {}
        write_table(path, table.assign(pair_id=table.pair_id.map(names), category=MARK, **more))
    info = run.info | {"model": run.info["model"] | {"name": MARK, "architecture": MARK, "revision": MARK}}
    (run.folder / "run.json").write_text(json.dumps(info))
    return open_run(run.folder)


def test_the_explorer_shows_markup_as_text(marked):
    page = explorer_page(marked)
    assert "alert(" in page and "<script>alert" not in page


def test_the_opening_of_a_report_shows_markup_as_text(marked):
    text = report.opening(marked, []) + report.framed(explorer_page(marked))
    assert "&lt;script&gt;alert" in text and "<script>alert" not in text


@pytest.mark.slow
def test_a_whole_report_shows_markup_as_text(marked):
    triage = marked.triage.assign(replaces=None, warnings=None)
    write_table(marked.folder / "triage.csv", triage)
    text = report.report(marked.folder).read_text("utf-8")
    assert "alert(" in text and "<script>alert" not in text
