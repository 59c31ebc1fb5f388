"""The explorers in a real JupyterLab, as a person uses them: type, click, press keys, read. One server, one kernel."""
import json
import os
import re
import secrets
import subprocess
import sys
import time
from importlib.util import find_spec
from urllib.parse import urlsplit

import nbformat
import pytest
from conftest import missing

from bizzaroworld.battery.tokens import align
from bizzaroworld.model.load import load_model
from bizzaroworld.patch.interventions import Edit, Intervention
from bizzaroworld.patch.sweep import sweep
from bizzaroworld.results.effects import effect_matrix
from bizzaroworld.results.estimates import number
from bizzaroworld.study.runs import open_run
from bizzaroworld.views.explorer_state import Typed, typed_pair
from bizzaroworld.views.lens_and_attention import predictions

pytestmark = pytest.mark.slow

CELLS = ["from bizzaroworld.model.load import load_model\nfrom bizzaroworld.study.runs import open_run\n"
         "from bizzaroworld.views.widgets import ModelExplorer, RunExplorer",
         "ModelExplorer(load_model('bizzaro-nano'))", "RunExplorer(open_run('bizzaro-nano'))"]
TYPED = Typed("The national parliament of Germany meets in the city of", "The national parliament of Russia meets in the city of", "Berlin", "Moscow")
LABELS = {"clean_prompt": "Clean prompt", "clean_target": "Clean answer", "corrupt_prompt": "Corrupted prompt", "corrupt_target": "Corrupted answer"}
STARTING = 120  # seconds until a server answers, or a kernel has imported what it needs


@pytest.fixture(scope="module")
def lab(repo, tmp_path_factory):
    """The address, with its token, of a notebook with both explorers in a JupyterLab that has only its own settings."""
    if find_spec("jupyterlab") is None: missing("JupyterLab is not installed (`pip install 'bizzaroworld[browser]'`)")
    home, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(8)
    places = {f"JUPYTER{name}": str(home / name.lower()) for name in
              ("_CONFIG_DIR", "_RUNTIME_DIR", "_DATA_DIR", "LAB_WORKSPACES_DIR", "LAB_SETTINGS_DIR")}
    (home / "_config_dir" / "labconfig").mkdir(parents=True)
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "_config_dir" / "labconfig" / "page_config.json").write_text(json.dumps(quiet), "utf-8")
    (home / "work").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, home / "work" / "explorers.ipynb")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home / 'work'}"]
    paths = os.pathsep.join(filter(None, (str(repo), os.environ.get("PYTHONPATH"))))
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | places | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    try:
        yield f"{_address(server, home)}lab/tree/explorers.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(20)


def _address(server, home) -> str:
    """Where the server says that it listens."""
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        assert server.poll() is None, (home / "log").read_text()
        for file in (home / "_runtime_dir").glob("jpserver-*.json"):
            if file.read_text(): return json.loads(file.read_text())["url"]
        time.sleep(0.1)
    raise AssertionError((home / "log").read_text())


@pytest.fixture
def origins(lab) -> set[str]:
    """The pages come from the server."""
    return {urlsplit(lab).netloc}


@pytest.fixture
def notebook(page, lab):
    """The notebook, with its cells run."""
    page.goto(lab)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=STARTING * 1000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=STARTING * 1000)  # before that, running asks for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator("img[alt*='experiment']").wait_for(timeout=STARTING * 1000)
    return page


@pytest.fixture(scope="module")
def model():
    return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def tp(model):
    return align(model, typed_pair(TYPED))


def type_pair(page, **answers):
    """Type the pair, other answers where given, and run it."""
    for field, label in LABELS.items(): page.get_by_label(label, exact=True).fill(answers.get(field, getattr(TYPED, field)))
    page.get_by_role("button", name="Run this pair").click()


def said(model, tp, edit, direction="noising") -> str:
    """What the explorer has to say of a patch, from the engine."""
    patch = Intervention((edit,))
    row = sweep(model, [tp], [patch], direction, progress=False).to_frame().iloc[0]
    (before, after) = (predictions(model, tp, i, direction).iloc[0] for i in (None, patch))
    return (f"the model said {before.token.strip()!r} ({before.probability:.2f}), now it says {after.token.strip()!r} "
            f"({after.probability:.2f}). Effect {number(row.effect)} logits, recovery {number(row.recovery)}.")


def test_type_a_pair_click_a_cell_read_the_prediction(notebook, model, tp):
    status = notebook.get_by_role("status").filter(has_text="the model said")
    type_pair(notebook, corrupt_target="Saint Petersburg")
    alert = notebook.get_by_role("alert").filter(has_text="AlignmentError")
    alert.wait_for()
    assert "Saint Petersburg" in alert.inner_text() and status.count() == 0

    type_pair(notebook)
    status.filter(has_text="L2 ").wait_for()
    assert status.inner_text().endswith(said(model, tp, Edit("resid_pre", 2, tp.entity))) and alert.count() == 0
    cell = notebook.get_by_title(re.compile(rf"^Patch resid_pre, layer 4, \S+ {tp.final}:"))
    cell.click()
    status.filter(has_text="L4 ").wait_for()
    assert "now it says 'Moscow'" in status.inner_text() and status.inner_text().endswith(said(model, tp, Edit("resid_pre", 4, tp.final)))
    assert re.search(rf"Effect {cell.inner_text()}\d? logits", status.inner_text()), "the cell says another effect"

    notebook.get_by_label("Direction", exact=True).select_option("denoising")
    status.filter(has_text="denoising").wait_for()
    assert status.inner_text().endswith(said(model, tp, Edit("resid_pre", 4, tp.final), "denoising"))


def test_the_keyboard_works_it(notebook, model, tp):
    type_pair(notebook)
    status = notebook.get_by_role("status").filter(has_text="the model said")
    status.filter(has_text="L2 ").wait_for()
    notebook.get_by_title(re.compile(rf"^Patch resid_pre, layer 2, \S+ {tp.entity}:")).focus()
    notebook.keyboard.press("Tab")
    notebook.keyboard.press("Space")
    status.filter(has_text=f"L2 resid_pre @{tp.entity + 1}").wait_for()
    notebook.get_by_role("slider").focus()
    notebook.keyboard.press("ArrowRight")
    status.filter(has_text=f"L3 resid_pre @{tp.entity + 1}").wait_for()
    assert status.inner_text().endswith(said(model, tp, Edit("resid_pre", 3, tp.entity + 1)))


def test_choose_in_the_run_explorer_and_read_the_value(notebook):
    run = open_run("bizzaro-nano")
    pair = run.pairs("A")[3]
    explorer = notebook.locator(".jp-CodeCell").nth(2)
    for menu, option, says in (("Mode", "A", "15 pairs of mode A"), ("Experiment", "4F", "experiment 4F: z of head 0"),
                               ("Head", "H1", "experiment 4F: z of head 1"), ("Pair", pair, pair)):
        explorer.get_by_label(menu, exact=True).select_option(option)
        picture = explorer.locator(f"img[alt*='{says}']")
        picture.wait_for()
    table = explorer.locator("table").filter(has_text=f"{pair}: effect (logits)")
    cells = [row.split("\t")[:2] for row in table.inner_text().splitlines() if re.match(r"\d", row)]
    effects = effect_matrix(run, "4F", "A", "effect", "z").loc[pair]
    assert cells == [[str(layer), number(effects[layer, 1], ".3f")] for layer, head in effects.index if head == 1]
    assert len(cells) == 8 and picture.evaluate("i => i.complete && i.naturalWidth") > 500
