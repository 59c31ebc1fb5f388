"""Write README.md from nbs/index.ipynb, without Quarto: `python .ci/readme.py [--check]`.

nbdev_readme calls Quarto for this and stops where there is none, so this small step takes its place everywhere:
markdown cells as they are, code cells as fenced blocks, outputs below them, figures as files in nbs/images/.
The directives `hide`, `echo: false`, `output: false`, `fig-cap` and `fig-alt` are honored.
`--check` writes nothing and fails if README.md or one of its figures is out of date.
"""
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\s*\|\s*(.*?)\s*$", re.M)
NOT_MARKDOWN = re.compile(r"^:::|\[@[\w-]+|(?<![\w`])@(?:fig|tbl|sec|eq)-[\w-]+", re.M)
NOTE = "<!-- Written by .ci/readme.py from nbs/index.ipynb: edit the notebook, then run `make notebooks`. -->\n"


def directives(source: str) -> dict[str, str]:
    """`#| key: value` lines as a dict; a bare flag such as `#| hide` has the value ''."""
    return {key.strip(): value.strip().strip("\"'") for key, _, value in
            (line.partition(":") for line in DIRECTIVE.findall(source))}


def relative_links(text: str, nbs: Path) -> str:
    """Links to files beside the notebook, rewritten so that they hold from the repository's root."""
    def fix(match):
        target = match.group(2)
        return f"{match.group(1)}nbs/{target}" if (nbs / target.partition("#")[0]).is_file() else match.group(0)
    return re.sub(r"(\]\()([^)\s:#][^)\s:]*)(?=\))", fix, text)


def figure(data: str, options: dict, images: dict[str, bytes]) -> str:
    """A markdown image; its bytes are added to `images`."""
    name = f"nbs/images/index-{len(images) + 1}.png"
    images[name] = base64.b64decode(data)
    caption = options.get("fig-cap", "")
    image = f"![{options.get('fig-alt') or caption or 'figure'}]({name})"
    return f"{image}\n\n*{caption}*" if caption else image


def output(out: dict, options: dict, images: dict[str, bytes]) -> str:
    """One output of a code cell as markdown: a figure, markdown, or text in a fence."""
    data = out.get("data", {})
    if "image/png" in data:
        return figure("".join(data["image/png"]), options, images)
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip()
    text = "".join(out.get("text", data.get("text/plain", ""))).rstrip()
    if text.startswith("<Figure size"):
        raise SystemExit("nbs/index.ipynb: a figure has no image in its output; run: python .ci/execute.py nbs/index.ipynb")
    return f"```text\n{text}\n```" if text else ""


def blocks(cell: dict, nbs: Path, images: dict[str, bytes]) -> list[str]:
    """What a cell puts into the README."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [relative_links(source.strip(), nbs)]
    options = directives(source)
    if cell["cell_type"] != "code" or {"hide", "default_exp"} & options.keys() or options.get("include") == "false":
        return []
    code = DIRECTIVE.sub("", source).strip()
    shown = [f"```python\n{code}\n```"] if code and options.get("echo") != "false" else []
    if options.get("output") != "false":
        shown += [output(out, options, images) for out in cell["outputs"]]
    return [block for block in shown if block]


def render(nbs: Path) -> dict[str, bytes]:
    """README.md and its figures: a dict from path (relative to the root) to content."""
    notebook = json.loads((nbs / "index.ipynb").read_text(encoding="utf-8"))
    images: dict[str, bytes] = {}
    text = "\n\n".join([NOTE.strip(), *(b for cell in notebook["cells"] for b in blocks(cell, nbs, images))])
    if found := NOT_MARKDOWN.search(text):
        raise SystemExit(f"nbs/index.ipynb: {found.group()!r} means something to Quarto only; write plain markdown there.")
    return {"README.md": (text + "\n").encode(), **images}


def main(arguments: list[str]) -> None:
    """Write what is out of date, or with --check only say so."""
    files = render(ROOT / "nbs")
    stale = [name for name, content in files.items()
             if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != content]
    if "--check" in arguments:
        raise SystemExit(f"out of date: {', '.join(stale)}. Run: python .ci/readme.py" if stale else 0)
    for name in stale:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(files[name])
        print(f"wrote {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
