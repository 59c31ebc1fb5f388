"""Execute notebooks in place and clean them: `python .ci/execute.py [NOTEBOOK ...]` (default: all under nbs/).

`#| eval: false` and the test flags of settings.ini (`tst_flags`) are honored: such a cell keeps the outputs it has.
nbdev's own runner does not write outputs, and execnb's ignores the directives.
"""
import os
import re
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def skip_pattern() -> re.Pattern:
    """Matches a directive line that keeps its cell from being run."""
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    flags = "|".join(map(re.escape, ini["DEFAULT"]["tst_flags"].split()))
    return re.compile(rf"^#\s*\|\s*(eval:\s*false|{flags})\s*$", re.M | re.I)


class Client(NotebookClient):
    """A notebook client that leaves the cells marked as not to be run alone."""
    skip = skip_pattern()

    async def async_execute_cell(self, cell, *args, **kwargs):
        if cell.cell_type == "code" and self.skip.search(cell.source):
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def execute(path: Path) -> None:
    """Run one notebook in its own folder, store the outputs, clean it."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    # The state of widgets has other names each time, and no page that is only read can use it.
    Client(notebook, timeout=1800, kernel_name="python3", resources=where, store_widget_state=False).execute()
    temporary = path.with_suffix(".executed")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)
    subprocess.run([str(Path(sys.executable).with_name("nbdev_clean")), "--fname", str(path)], check=True, cwd=ROOT)


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all of them in order."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("BIZZARO_RUN", "BIZZARO_MODEL"): os.environ.pop(name, None)  # the committed paper is about the shipped run
    os.environ.pop("MPLBACKEND", None)  # the notebooks' own backend puts figures into the outputs
    hidden = re.compile(r"(^|/)[_.]")
    found = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not hidden.search(str(p.relative_to(ROOT))))
    for path in [Path(name).resolve() for name in names] or found:
        begin = time.monotonic()
        execute(path)
        print(f"{path.relative_to(ROOT)}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
