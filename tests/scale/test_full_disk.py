"""A disk that fills up: the file is named, nothing half-written takes a name that is read, and the same command goes on to the same numbers."""
import errno
import json
import os
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from bizzaroworld import files, pipeline
from bizzaroworld.battery.formats import load_battery
from bizzaroworld.console import _words
from bizzaroworld.model.load import load_model
from bizzaroworld.pipeline import run_study
from bizzaroworld.study.runs import open_run
from bizzaroworld.views.explorer import write_explorer

WRITERS = {"a.parquet": lambda path: files.write_table(path, pd.DataFrame({"x": range(10**5)}).sample(frac=1, random_state=0)), "a.csv": lambda path: files.write_table(path, pd.DataFrame({"x": range(10**5)})),
           "a.json": lambda path: files.write_json(path, list(range(10**5))), "b.json": lambda path: files.write_first(path, list(range(10**5)))}


def in_safetensors(path):
    with files.replacing(path) as temporary: save_file({"x": torch.zeros(10**5)}, temporary)


@pytest.fixture
def small(tmp_path):
    """A disk of 100 kB, whose size can be changed; where this user may not mount one, the test is not run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    def sized(kib, *options): return subprocess.run(["mount", *options, "-t", "tmpfs", "-o", f"size={kib}k" + ",remount" * bool(options), "tmpfs", str(disk)], capture_output=True)
    try: refused = sized(100).returncode
    except OSError: refused = True
    if refused: pytest.skip("a tmpfs cannot be mounted here")
    yield disk, lambda kib: subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("name", [*WRITERS, "a.safetensors"])
def test_what_a_full_disk_says_names_the_file(small, name):
    disk, sized = small
    with pytest.raises(OSError) as met: (WRITERS | {"a.safetensors": in_safetensors})[name](disk / name)
    assert met.value.errno == errno.ENOSPC and _words(met.value).startswith(f"Error: The disk is full: {disk / name} could not be written.")
    assert list(disk.iterdir()) == []


@pytest.fixture(scope="module", autouse=True)
def one_figure():
    """Drawing takes most of the time of a small study; a file that is written as figures are is enough here."""
    def save_figures(run, folder, told):
        with files.replacing(folder / "one.png") as temporary: temporary.write_bytes(bytes(30_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "save_figures", save_figures)
        yield


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("battery") / "few.json"
    path.write_text(json.dumps([vars(pair) for pair in load_battery()[::30]]))
    return path


def study(model, battery, out):
    """A study and its explorer."""
    folder = run_study(model, battery=battery, out=out)
    write_explorer(open_run(folder), folder / "explorer.html")
    return folder


@pytest.fixture(scope="module")
def undisturbed(nano, few, tmp_path_factory): return study(nano, few, tmp_path_factory.mktemp("whole") / "run")


def kind(path, folder):
    """Which kind of file of a run it is: pairs and figures are many of one."""
    return re.sub(r"(pairs|controls/\w+|figures)/[^/]*(?=\.\w+$)", r"\1/*", Path(path).relative_to(folder).as_posix())


def same(folder, whole):
    names = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert names == {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()} and not any(n.suffix == ".tmp" for n in names)
    for name in names:
        if name.suffix in (".parquet", ".csv"): assert files.read_table(folder / name).equals(files.read_table(whole / name)) if name.suffix == ".parquet" else (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((folder / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())


@pytest.mark.slow
def test_the_disk_may_be_full_at_every_kind_of_file(nano, few, undisturbed, tmp_path, monkeypatch):
    """At each kind the file is cut off in its midst, once; what is there afterwards is whole, and the next start goes on."""
    folder = tmp_path / "run"
    kinds = list(dict.fromkeys(kind(p, undisturbed) for p in sorted(undisturbed.rglob("*")) if p.is_file() and p.name != ".lock"))
    left, met = set(kinds), []
    def full(take):
        def moved(temporary, path, *args):
            if Path(path).is_relative_to(folder) and (name := kind(path, folder)) in left:
                left.remove(name)
                met.append(name)
                Path(temporary).write_bytes(Path(temporary).read_bytes()[:Path(temporary).stat().st_size // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return take(temporary, path, *args)
        return moved
    monkeypatch.setattr(os, "replace", full(os.replace))
    def linked(*args): raise OSError("a file system without links")
    monkeypatch.setattr(os, "link", linked)
    for _ in range(len(kinds) + 1):
        before = {p for p in folder.rglob("*") if p.is_file()} if folder.exists() else set()
        try:
            study(nano, few, folder)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC and kind(error.filename, folder) == met[-1]
        there = {p for p in folder.rglob("*") if p.is_file()}
        assert before <= there and not any(p.suffix == ".tmp" for p in there)
    assert left == set() and len(met) == len(kinds) > 12, (left, kinds)
    same(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.weekly
def test_a_study_on_a_small_disk_stops_and_goes_on_when_there_is_room(nano, few, undisturbed, small):
    disk, sized = small
    said = []
    for kib in (4, 40, 90, 150, 220, 400, 900, 50_000):
        sized(kib)
        try: study(nano, few, disk / "run")
        except OSError as error:
            assert error.errno == errno.ENOSPC
            said.append(_words(error))
            assert not [p for p in disk.rglob("*.tmp")]
    assert len(said) > 3 and all(re.match(r"Error: The disk is full: \S+ could not be written\.", line) for line in said), said
    same(disk / "run", undisturbed)
