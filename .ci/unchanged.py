"""Run a command and fail if it changed, added or removed a file: `python .ci/unchanged.py nbdev_export`.

Contents are compared before and after, so it works on a tree with uncommitted work as well.
"""
import hashlib
import subprocess
import sys
from pathlib import Path

ROOTS = ("nbs", "bizzaroworld", "settings.ini", "pyproject.toml", "README.md")
SKIP = {"__pycache__", ".ipynb_checkpoints"}


def snapshot(root: Path) -> dict[str, str]:
    """The sha256 of every file that the notebook tools may write, by path."""
    tops = [root / name for name in ROOTS]
    files = [f for top in tops for f in ([top] if top.is_file() else sorted(top.rglob("*")))]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in files if f.is_file() and not SKIP & set(f.parts)}


def main(command: list[str]) -> int:
    """Run `command` in the repository; 0 if it succeeded and left every file as it was."""
    root = Path(__file__).resolve().parent.parent
    before = snapshot(root)
    code = subprocess.run(command, cwd=root).returncode
    after = snapshot(root)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed:
        print(f"changed by {command[0]}: {name}", file=sys.stderr)
    if changed:
        print("These files were out of date. They are right now: look at them and commit them.", file=sys.stderr)
    return code or bool(changed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
