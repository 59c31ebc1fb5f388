"""The front door: which names it has, where they come from, and that opening it costs nothing."""
import ast
import importlib
import inspect
import json
import subprocess
import sys

import pytest

import bizzaroworld as bw

NAMES = ("Desideratum Edit Intervention Noise PromptPair SAE Task ability align ask attention_to audit claims compare cross_patch detection_table detections edge_sets edges embedding_report feature_effects forecast grid interactions "
         "knockout load_battery load_model load_sae local_processing make_task mean_values multiverse only_right open_run path_effects report run_attribution run_circuit run_features run_lookup run_methods run_paths run_study "
         "save_sae shapley shipped splice steer sweep train_mask train_sae triage variance_explained warnings_of").split()


def test_the_names():
    assert bw.__all__ == sorted(NAMES) == dir(bw)
    with pytest.raises(AttributeError): bw.no_such_name


def test_the_stub_says_where_they_live(repo):
    stub = ast.parse((repo / "bizzaroworld" / "__init__.pyi").read_text(encoding="utf-8"))
    homes = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(homes) == sorted(NAMES)
    assert all(alias.asname == alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names), \
        "type checkers take only `from .x import y as y` as handed on"
    for name, home in homes.items():
        thing = getattr(bw, name)
        assert thing is getattr(importlib.import_module(f"bizzaroworld.{home}"), name)
        assert (thing.__module__, thing.__name__) == (f"bizzaroworld.{home}", name), "the door's name is the thing's own"


def test_no_room_or_wing_has_the_name_of_something_in_the_door(repo):
    package = repo / "bizzaroworld"
    inside = {p.stem for p in package.glob("*.py")} | {p.name for p in package.iterdir() if p.is_dir()}
    assert not inside & set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_says_what_it_is(name):
    assert not inspect.getdoc(getattr(bw, name)).startswith(name), "a dataclass that documents nothing but its signature"


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has after some code."""
    shown = subprocess.run([sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"], check=True,
                           capture_output=True, text=True).stdout
    return set(json.loads(shown))


def test_opening_the_door_loads_nothing():
    there = loaded_by("import bizzaroworld as bw\nassert 'sweep' in dir(bw)")
    assert not there & {"torch", "transformers", "transformer_lens", "pandas", "numpy", "matplotlib", "typer"}
    assert {m for m in there if m.startswith("bizzaroworld")} == {"bizzaroworld"}


def test_reading_a_run_and_naming_a_pair_needs_no_torch():
    there = loaded_by("import bizzaroworld as bw\nbw.open_run('bizzaro-nano'), bw.PromptPair, bw.claims, bw.compare, bw.load_battery()")
    assert "pandas" in there and not there & {"torch", "transformers", "transformer_lens"}


def test_all_names_load_at_once():
    """EAGER_IMPORT is how lazy_loader's users find a broken stub; no import may go around in a circle."""
    code = "import os; os.environ['EAGER_IMPORT'] = '1'\nimport bizzaroworld"
    assert {"torch", "bizzaroworld.paper.report"} <= loaded_by(code)


def test_names_survive_the_loading_of_modules_called_like_them():
    """There is a module `battery.audit` and one `patch.sweep`; the door hands out the functions."""
    for name in ("ability", "audit", "triage", "sweep", "compare", "report"): assert inspect.isfunction(getattr(bw, name))


def test_its_page_lists_all_of_it(repo):
    page = json.loads((repo / "nbs" / "door.ipynb").read_text(encoding="utf-8"))
    shown = "".join("".join(o.get("data", {}).get("text/markdown", "")) for c in page["cells"] for o in c.get("outputs", []))
    assert sorted(line.split("`")[1].removeprefix("bw.") for line in shown.splitlines() if line.startswith("| `")) == sorted(NAMES)
