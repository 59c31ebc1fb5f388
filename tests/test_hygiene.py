"""The rules of the house that a machine can see. Every check is also shown a sample that breaks its rule."""
import ast
import functools
import json
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (REPO / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (REPO / "bizzaroworld").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
# One way, no back and forth: a room imports only from the wings above its own in this list, and from the rooms before it in its own.
WINGS = {wing: rooms.split() for wing, rooms in {
    "ground": "files",
    "battery": "pairs layouts formats tokens audit knowing triage facts builder chat",
    "model": "names bridge readout hooked identity adapters gguf checks devices load",
    "tasks": "drafts recipes ioi greater_than docstring arithmetic choices recall registry ability",
    "patch": "interventions metrics noise passes engine means forecast telling sweep hops",
    "scale": "folders workers units processes ray slurm configs needs simulate",
    "methods": "donors detections multiverse grid attention cross_model masks",
    "circuits": "gradients attribution atp_star search_baselines paths interactions knockout edge_sets faithfulness search",
    "study": "runs experiments controls foreseen",
    "planted": "weights families variants truth scoreboard lookups",
    "results": "estimates effects layers heads correlations summary quantities compare",
    "replication": "published numbers claims verdicts",
    "figures": "style captions layers pairs comparisons sweeps run_figures comparison_figures methods_figures circuits_figures",
    "views": "lens_and_attention explorer explorer_state circuitsvis widgets",
    "lookup": "people asking stages probes inside nonlinear crossed memorisation hypotheses lookup_figures",
    "words": "local embeddings words_figures",
    "paper": "chapters pages report",
    "zoo": "corpus training nano micro changed people",
    "dictionaries": "saes sae_files harvest recipes learning toys pursuit splicing scores shipped",
    "features": "effects phases steering features_figures feature_page",
    "hall": "pipeline console options",
    "commands": "methods_run methods_command circuits_folder circuits_run circuits_command plan_command lookup_run lookup_command features_run features_command",
    "top": "cli"}.items()}
FLOW = [room if wing in ("ground", "hall", "top") else f"{wing}.{room}" for wing, rooms in WINGS.items() for room in rooms]
# What `--help` and a reader of the battery wait for; and all that reads a run, which needs no model.
TORCHLESS = {"files", "scale.folders", "scale.workers", "console", "options", "commands.methods_command", "commands.circuits_command", "commands.plan_command", "commands.lookup_command", "cli", "battery.pairs", "battery.layouts", "battery.formats", "battery.knowing", "battery.facts", "model.names", "methods.detections", "methods.multiverse", "study.runs", "paper.pages", "views.explorer", "words.words_figures", "lookup.lookup_figures", "features.features_figures", "commands.features_command",
             *(name for name in FLOW if name.partition(".")[0] in ("results", "replication", "figures"))}
# The one exception to the flow: `Sweep.plot` draws when it is called, as pandas does.
UPWARD = {("patch.sweep", "figures.sweeps")}
HEAVY = {"torch", "transformers", "transformer_lens"}
PLACES = "|".join(map(re.escape, sorted({str(REPO.parent), str(Path.home())} - {"/"})))
MACHINE_PATH = re.compile(rf"(?<![\w.:/-])(?:{PLACES}|/(?:root|home|tmp|var|mnt|opt|usr|Users|private))/[\w.-]+")


def cells(notebook: dict, kind: str) -> list[tuple[int, str, dict]]:
    """Number, source and cell, for the cells of one kind."""
    return [(i, "".join(c["source"]), c) for i, c in enumerate(notebook["cells"]) if c["cell_type"] == kind]


def outputs(cell: dict) -> str:
    """What a cell shows, as text; images and embedded scripts count for nothing."""
    texts = [o.get("text", "") for o in cell["outputs"]]
    texts += [v for o in cell["outputs"] for kind, v in o.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(t if isinstance(t, str) else "".join(t) for t in texts)


def long_cells(notebook: dict) -> list[str]:
    """Exported cells of more than 40 lines."""
    counts = [(i, sum(bool(line.strip()) for line in source.splitlines())) for i, source, _ in cells(notebook, "code")
              if re.search(r"^#\s*\|\s*export", source, re.M)]
    return [f"cell {i}: {n} lines" for i, n in counts if n > 40]


def mixed_imports(notebook: dict) -> list[str]:
    """Cells with imports and other code: building the site runs them without the cells before."""
    found = []
    for i, source, _ in cells(notebook, "code"):
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse("\n".join(lines)).body}
        if kinds == {True, False}: found.append(f"cell {i}: imports and other code in one cell")
    return found


def few_words(notebook: dict) -> list[str]:
    """Less than one markdown cell for two code cells."""
    words, code = len(cells(notebook, "markdown")), len(cells(notebook, "code"))
    return [f"{words} markdown cells for {code} code cells"] if 2 * words < code else []


def stored_errors(notebook: dict) -> list[str]:
    """Outputs that are errors."""
    return [f"cell {i}: an error is stored as its output" for i, _, cell in cells(notebook, "code")
            if any(o["output_type"] == "error" for o in cell["outputs"])]


def machine_paths(notebook: dict) -> list[str]:
    """Outputs that name a folder of the machine they were made on, or an address in its memory."""
    return [f"cell {i}: {found.group()}" for i, _, cell in cells(notebook, "code")
            for found in [MACHINE_PATH.search(outputs(cell)) or re.search(r" at 0x[0-9a-f]{6,}", outputs(cell))] if found]


def never_run(notebook: dict) -> list[str]:
    """No output at all: it was committed without having been executed."""
    return [] if any(cell["outputs"] for _, _, cell in cells(notebook, "code")) else ["no cell has an output: `python .ci/execute.py` it"]


def widget_state(notebook: dict) -> list[str]:
    """What widgets held when the notebook ran: long, under other names each time, and dead without a kernel."""
    return ["the state of widgets is stored in the metadata"] if "widgets" in notebook.get("metadata", {}) else []


def no_title(notebook: dict) -> list[str]:
    """The first cell is a title with a one-line description, for the site and for search."""
    first = notebook["cells"][0]
    text = "".join(first["source"])
    ok = first["cell_type"] == "markdown" and re.match(r"# \S.*\n+> \S", text) or text.startswith("---\n")
    return [] if ok else ["the first cell is not '# title' with '> description' below it"]


def sample(*sources: str, outputs: list | None = None) -> dict:
    """A notebook of code cells, the first with `outputs`."""
    return {"cells": [dict(cell_type="code", source=s, outputs=outputs or []) for s in sources]}


BAD_NOTEBOOKS = [
    (long_cells, sample("#| export\n" + "x = 1\n" * 40)),
    (mixed_imports, sample("import os\nprint(os.sep)")),
    (few_words, sample("a = 1")),
    (stored_errors, sample("1 / 0", outputs=[dict(output_type="error", ename="ZeroDivisionError", evalue="", traceback=[])])),
    (machine_paths, sample("p", outputs=[dict(output_type="stream", text=["saved in /home/", "me/runs\n"])])),
    (machine_paths, sample("p", outputs=[dict(output_type="stream", text=f"{REPO.parent}/elsewhere")])),
    (machine_paths, sample("f", outputs=[dict(output_type="execute_result", data={"text/plain": "<f at 0x7f12ab34cd>"})])),
    (never_run, sample("a = 1")),
    (widget_state, sample("a = 1") | {"metadata": {"widgets": {}}}),
    (no_title, sample("a = 1")),
]
NOTEBOOK_CHECKS = list(dict.fromkeys(check for check, _ in BAD_NOTEBOOKS))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("check", NOTEBOOK_CHECKS, ids=lambda f: f.__name__)
def test_notebook(check, path):
    assert check(json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("check, bad", BAD_NOTEBOOKS, ids=lambda x: getattr(x, "__name__", ""))
def test_notebook_check_sees_what_it_looks_for(check, bad):
    assert check(bad)


def imported(tree: ast.AST, name: str, inside: bool = True) -> list[str]:
    """The modules that the module `name` imports: rooms as in `FLOW`. `inside`: also within functions."""
    found, wing = [], ["bizzaroworld", *name.split(".")[:-1]]
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import): found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*wing[:len(wing) + 1 - node.level], *filter(None, [node.module])]) if node.level else node.module
            packages = {"bizzaroworld", *(f"bizzaroworld.{wing}" for wing in WINGS)}
            found += [f"{base}.{alias.name}" for alias in node.names] if base in packages else [base]
    return [name.removeprefix("bizzaroworld.") for name in found]


def too_long(name: str, text: str) -> list[str]:
    """More than 300 lines: such a room has two jobs."""
    return [f"{n} lines"] if (n := text.count("\n")) > 300 else []


def cuda_literals(name: str, text: str) -> list[str]:
    """A device written into the code."""
    return re.findall(r"""["']cuda(?::\d+)?["']""", text)


def hook_names(name: str, text: str) -> list[str]:
    """A hook's name outside `model.hooked`, the one room that knows TransformerLens."""
    return [] if name == "model.hooked" else re.findall(r"""["']blocks\.|["'](?:attn\.)?hook_\w+["']""", text)


def wrong_way(name: str, text: str) -> list[str]:
    """An import from a room that comes later: from a wing below the own one in the list, or later in the own wing."""
    before, tree = FLOW[:FLOW.index(name)], ast.parse(text)
    when_loaded = imported(tree, name, inside=False)
    return [f"{name} imports {m}" for m in imported(tree, name) if m in FLOW and m not in before
            and ((name, m) not in UPWARD or m in when_loaded)]


def door() -> set[str]:
    """The names that `import bizzaroworld` gives."""
    stub = ast.parse((REPO / "bizzaroworld" / "__init__.pyi").read_text(encoding="utf-8"))
    return {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def hidden_ways(name: str, text: str) -> list[str]:
    """Imports that the flow does not see: through the front door, or by a name made at run time."""
    return [m for m in imported(ast.parse(text), name) if m in door() | {"bizzaroworld"}] + re.findall(r"import_module|__import__", text)


def heavy_imports(name: str, text: str) -> list[str]:
    """torch and its like, imported by a module that `--help` or a reader of the battery waits for."""
    if name not in TORCHLESS: return []
    return [m for m in imported(ast.parse(text), name, inside=False) if m.partition(".")[0] in HEAVY]


def development_imports(name: str, text: str) -> list[str]:
    """Development requirements: the installed package does without them."""
    return [m for m in imported(ast.parse(text), name) if m.partition(".")[0] in {"nbdev", "fastcore", "execnb", "pytest"}]


def declared() -> set[str]:
    """The packages that settings.ini requires at run time, or an extra does."""
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(REPO / "settings.ini")
    lines = [line for key in ("requirements", "gguf_requirements", "peft_requirements", "ray_requirements", "slurm_requirements") for line in ini["DEFAULT"][key].split()]
    return {canonical(re.split(r"[<>=]", line)[0]) for line in lines}


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


owners = functools.cache(packages_distributions)


def undeclared(name: str, text: str) -> list[str]:
    """Imports of packages that are there by luck only: nothing in settings.ini requires them."""
    tops = {m.partition(".")[0] for m in imported(ast.parse(text), name) if m not in FLOW} - set(sys.stdlib_module_names)
    return [top for top in sorted(tops - {"bizzaroworld", "__version__"})
            if not declared() & {canonical(d) for d in owners().get(top, [top])}]


BAD_MODULES = [
    (too_long, "cli", "x = 1\n" * 301),
    (cuda_literals, "model.load", "device = 'cuda:0'"),
    (hook_names, "patch.sweep", "name = f'blocks.{layer}.hook_z'"),
    (hook_names, "model.load", "name = 'hook_resid_pre'"),
    (wrong_way, "battery.pairs", "from .triage import triage"),
    (wrong_way, "battery.tokens", "def f():\n    from ..patch.sweep import sweep"),
    (wrong_way, "battery.tokens", "def f():\n    from ..patch import sweep"),
    (wrong_way, "patch.metrics", "import bizzaroworld.cli"),
    (wrong_way, "results.effects", "from ..figures import style"),
    (wrong_way, "patch.passes", "from . import sweep"),
    (wrong_way, "pipeline", "from .cli import main"),
    (wrong_way, "patch.sweep", "from ..figures.sweeps import draw_sweep"),
    (wrong_way, "patch.sweep", "def f():\n    from ..figures.style import line"),
    (wrong_way, "patch.engine", "def f():\n    from ..figures.sweeps import draw_sweep"),
    (hidden_ways, "results.effects", "def f():\n    from .. import sweep"),
    (hidden_ways, "results.effects", "import bizzaroworld as bw"),
    (hidden_ways, "results.effects", "importlib.import_module('bizzaroworld.figures.style')"),
    (heavy_imports, "battery.pairs", "import torch.nn as nn"),
    (heavy_imports, "results.effects", "from torch import Tensor"),
    (undeclared, "figures.style", "import requests"),
    (development_imports, "figures.style", "from fastcore.basics import store_attr"),
]
MODULE_CHECKS = list(dict.fromkeys(check for check, _, _ in BAD_MODULES))


def room(path: Path) -> str:
    """The name of a module of the package as in `FLOW`."""
    return ".".join(path.relative_to(REPO / "bizzaroworld").with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=room)
@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda f: f.__name__)
def test_module(check, path):
    assert check(room(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("check, name, bad", BAD_MODULES, ids=lambda x: getattr(x, "__name__", ""))
def test_module_check_sees_what_it_looks_for(check, name, bad):
    assert check(name, bad)


def test_every_room_has_its_place_in_the_flow_and_its_notebook():
    assert {room(p) for p in MODULES} == set(FLOW)
    library = REPO / "nbs" / "library"
    sources = {".".join([*p.parent.relative_to(library).parts, re.sub(r"^\d+_", "", p.stem)]) for p in library.rglob("*.ipynb")
               if p in NOTEBOOKS}
    assert sources == set(FLOW), "nbs/library/<wing>/NN_name.ipynb makes bizzaroworld/<wing>/name.py"


def test_the_exception_to_the_flow_is_needed():
    found = {(room(p), m) for p in MODULES for m in imported(ast.parse(p.read_text(encoding="utf-8")), room(p)) if m in FLOW}
    assert {(a, b) for a, b in found if FLOW.index(b) > FLOW.index(a)} == UPWARD and len(UPWARD) == 1


def test_a_wing_has_at_most_ten_rooms():
    assert {wing: len(rooms) for wing, rooms in WINGS.items() if len(rooms) > 10} == {}


def test_contributing_shows_the_wings_as_they_are():
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = {m[1]: re.sub(r"[,.]", " ", m[2]).split() for m in re.finditer(r"^ +(\w+) {2,}([a-z_, ]+?)(?: {2,}.*)?$", text, re.M)}
    assert {wing: lines.get(wing) for wing in WINGS} == WINGS


def test_there_is_something_to_check():
    assert len(NOTEBOOKS) > 50 and len(MODULES) > 40
