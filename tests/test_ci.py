"""The helper scripts of .ci: the README writer, the no-change check, the notebook runner."""
import base64
import importlib.util
import json
import sys
from types import ModuleType

import pytest


@pytest.fixture
def script(repo):
    """Import a script of .ci by name."""
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"ci_{name}", repo / ".ci" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


def code(source: str, *outputs: dict) -> dict:
    """A code cell."""
    return dict(cell_type="code", source=source, outputs=list(outputs))


def notebook(folder, *cells: dict):
    """Write index.ipynb into a folder named nbs, beside a page that it may link to."""
    nbs = folder / "nbs"
    nbs.mkdir()
    (nbs / "page.ipynb").touch()
    (nbs / "index.ipynb").write_text(json.dumps({"cells": list(cells)}))
    return nbs


def test_readme_shows_what_the_page_shows(script, tmp_path):
    png = base64.b64encode(b"pixels").decode()
    nbs = notebook(
        tmp_path, dict(cell_type="markdown", source=["# title\n", "[a](page.ipynb#x), [b](https://x.org), [c](none.ipynb)"]),
        code("#| hide\nimport secret"),
        code("1 + 1", dict(output_type="execute_result", data={"text/plain": ["2"]})),
        code("#| echo: false\n#| fig-cap: What it shows.\nplot()", dict(output_type="display_data", data={"image/png": png})))
    files = script("readme").render(nbs)
    text = files.pop("README.md").decode()
    assert files == {"nbs/images/index-1.png": b"pixels"}
    assert "[a](nbs/page.ipynb#x), [b](https://x.org), [c](none.ipynb)" in text
    assert "secret" not in text and "plot()" not in text
    assert "```python\n1 + 1\n```\n\n```text\n2\n```" in text
    assert "![What it shows.](nbs/images/index-1.png)\n\n*What it shows.*" in text


@pytest.mark.parametrize("source", ["see @fig-main", "as shown [@meng2022locating]", "::: {.callout-note}"])
def test_readme_refuses_what_only_quarto_understands(script, tmp_path, source):
    with pytest.raises(SystemExit, match="plain markdown"):
        script("readme").render(notebook(tmp_path, dict(cell_type="markdown", source=source)))


def test_readme_refuses_a_figure_without_an_image(script, tmp_path):
    shown = dict(output_type="display_data", data={"text/plain": ["<Figure size 650x460 with 1 Axes>"]})
    with pytest.raises(SystemExit, match="no image"):
        script("readme").render(notebook(tmp_path, code("plot()", shown)))


def test_readme_check_fails_when_it_is_out_of_date(script, tmp_path, monkeypatch):
    readme = script("readme")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    notebook(tmp_path, dict(cell_type="markdown", source="# title"))
    with pytest.raises(SystemExit, match="out of date: README.md"): readme.main(["--check"])
    readme.main([])
    with pytest.raises(SystemExit) as done: readme.main(["--check"])
    assert done.value.code == 0


def test_unchanged_sees_a_changed_an_added_and_a_removed_file(script, tmp_path):
    snapshot = script("unchanged").snapshot
    (tmp_path / "nbs").mkdir()
    a, b = tmp_path / "nbs" / "a.ipynb", tmp_path / "nbs" / "b.ipynb"
    a.write_text("1")
    (tmp_path / "README.md").write_text("r")
    first = snapshot(tmp_path)
    assert set(first) == {"nbs/a.ipynb", "README.md"}
    a.write_text("2")
    assert snapshot(tmp_path) != first
    a.write_text("1")
    assert snapshot(tmp_path) == first
    b.touch()
    assert snapshot(tmp_path) != first
    b.unlink(), a.unlink()
    assert snapshot(tmp_path) != first


def test_unchanged_passes_the_exit_code_on(script):
    unchanged = script("unchanged")
    assert unchanged.main([sys.executable, "-c", "pass"]) == 0
    assert unchanged.main([sys.executable, "-c", "raise SystemExit(3)"]) == 3


@pytest.mark.parametrize("source, skipped", [
    ("#| eval: false\nx", True), ("#|eval: false", True), ("#| slow\nx", True), ("#| train", True),
    ("x = '#| slow'", False), ("#| eval: true\nx", False), ("#| slower\nx", False)])
def test_execute_skips_what_is_marked(script, source, skipped):
    assert bool(script("execute").skip_pattern().search(source)) == skipped


def test_the_files_that_come_first_are_there(repo):
    spec = importlib.util.spec_from_file_location("tests_conftest", repo / "tests" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    assert [name for name in conftest.LONG if not (repo / "tests" / name).is_file()] == []
    class Item:
        def __init__(self, name, i): self.path, self.name = repo / "tests" / name, f"{name}::{i}"
    class Worker: workerinput = {}
    items = [Item(name, i) for name in ("battery/test_pairs.py", conftest.LONG[1], conftest.LONG[0], "zoo/test_corpus.py") for i in range(2)]
    before = [item.name for item in items]
    conftest.pytest_collection_modifyitems(object(), items)
    assert [item.name for item in items] == before, "one process keeps the order"
    conftest.pytest_collection_modifyitems(Worker(), items)
    assert [item.name for item in items] == [*before[4:6], *before[2:4], *before[:2], *before[6:]]
