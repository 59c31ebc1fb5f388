"""The site, as far as it can be checked without Quarto: what nbdev hands to it parses, and everything named exists.

Where Quarto is on the PATH, the site is built as well.
"""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
NBS = REPO / "nbs"
PAGES = sorted(p.relative_to(NBS) for p in NBS.rglob("*.ipynb")
               if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
PAPER = [p for p in PAGES if p.parts[0] == "study"]
LABEL = re.compile(r"\{#((?:fig|tbl|sec|eq)-[\w-]+)|^#\s*\|\s*label:\s*((?:fig|tbl)-[\w-]+)", re.M)
REFERENCE = re.compile(r"(?<![\w@`/.-])@([A-Za-z][\w:.-]*\w)")
CROSS = ("fig-", "tbl-", "sec-", "eq-")


def sources(notebook: dict, kind: str) -> list[str]:
    """The sources of the cells of one kind."""
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def prose(notebook: dict) -> str:
    """The markdown of a notebook and its captions, without code."""
    text = "\n\n".join(sources(notebook, "markdown"))
    text = re.sub(r"^```.*?^```|``.*?``|`[^`\n]*`", "", text, flags=re.M | re.S)
    return "\n".join([text, *re.findall(r"^#\s*\|\s*fig-cap:(.*)$", "\n".join(sources(notebook, "code")), re.M)])


def labels(notebook: dict) -> set[str]:
    """What a notebook gives a name to: figures, tables, sections, equations."""
    return {a or b for a, b in LABEL.findall("\n\n".join(sources(notebook, "markdown") + sources(notebook, "code")))}


def unresolved(notebook: dict, citations: set[str]) -> list[str]:
    """Cross-references without a target in the notebook, and citations that are not in the bibliography."""
    here = labels(notebook)
    return [name for name in REFERENCE.findall(prose(notebook))
            if name not in (here if name.startswith(CROSS) else citations)]


def empty_figures(notebook: dict) -> list[str]:
    """Cells that announce a figure, by a label, a caption or a text in its place, and show none."""
    found = []
    for i, cell in enumerate(notebook["cells"]):
        announced = re.search(r"^#\s*\|\s*(?:label:\s*fig-\S+|fig-(?:cap|alt):.*)$", "".join(cell["source"]), re.M)
        kinds = {kind for out in cell.get("outputs", []) for kind in out.get("data", {})}
        if announced and not any(kind.startswith("image/") or kind == "text/html" for kind in kinds):
            found.append(f"cell {i}: {announced.group()}")
    return found


def dead_links(notebook: dict, folder: Path) -> list[str]:
    """Relative links to files that are not there; a link to a page may name the notebook or the page made from it."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(notebook)):
        path = folder / target.partition("#")[0]
        if re.match(r"[a-z]+:|#", target) or path.is_file(): continue
        made = [p for p in path.parent.glob("*.ipynb") if re.sub(r"^\d+[a-z]?_", "", p.stem) == path.stem]
        if not (path.suffix == ".html" and made): found.append(target)
    return found


def typed_numbers(notebook: dict) -> list[str]:
    """Measurements typed into the paper's prose: decimals and percentages. Cells print those."""
    return re.findall(r"(?<![\w.])(?!95% )\d+(?:\.\d+%?|\s?%)(?!\w|\.\d)", prose(notebook))


def bare_figures(notebook: dict) -> list[str]:
    """Cells that show an image without a name, a caption and a text in its place."""
    found = []
    for i, cell in enumerate(notebook["cells"]):
        kinds = {kind for out in cell.get("outputs", []) for kind in out.get("data", {})}
        told = {key for key in ("label: fig-", "fig-cap:", "fig-alt:") if re.search(rf"^#\s*\|\s*{key}\s*\S", "".join(cell["source"]), re.M)}
        if any(kind.startswith("image/") for kind in kinds) and len(told) < 3: found.append(f"cell {i} has only {sorted(told)}")
    return found


def unread_images(notebook: dict) -> list[str]:
    """Cells that show an image without a text in its place, in the cell or with the image."""
    return [f"cell {i}" for i, cell in enumerate(notebook["cells"]) for out in cell.get("outputs", []) for kind in out.get("data", {})
            if kind.startswith("image/") and not re.search(r"^#\s*\|\s*fig-alt:\s*\S", "".join(cell["source"]), re.M)
            and not out.get("metadata", {}).get(kind, {}).get("alt")]


def empty_tables(notebook: dict) -> list[str]:
    """Cells that announce a table by a label and show nothing: a table is shown only as the last expression of its cell."""
    return [found[1] for cell in notebook["cells"] if not cell.get("outputs")
            and (found := re.search(r"^#\s*\|\s*label:\s*(tbl-\S+)", "".join(cell["source"]), re.M))]


def fetching(notebook: dict) -> list[str]:
    """Outputs for which Quarto loads scripts from a server, and mathematics that would need one in a report."""
    kinds = [(i, kind) for i, c in enumerate(notebook["cells"]) for o in c.get("outputs", []) for kind in o.get("data", {})]
    found = [f"cell {i}: {kind}" for i, kind in kinds if kind == "text/html" or "javascript" in kind or "widget" in kind]
    return found + [f"mathematics: {m}" for m in re.findall(r"(?<!\\)\$[^$\n]+\$", prose(notebook))]


def noise(notebook: dict) -> list[str]:
    """What was printed to the error stream."""
    return [f"cell {i}: {''.join(o['text'])[:80]}" for i, c in enumerate(notebook["cells"]) for o in c.get("outputs", [])
            if o.get("name") == "stderr"]


def said(notebook: dict) -> list[str]:
    """The sentences of 40 or more characters in prose, captions and printed markdown, without code, tables and marks of emphasis."""
    texts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": texts.append(source)
        texts += re.findall(r"^#\s*\|\s*(?:fig|tbl)-cap:\s*(.*)$", source, re.M) if cell["cell_type"] == "code" else []
        texts += ["".join(out["data"]["text/markdown"]) for out in cell.get("outputs", []) if "text/markdown" in out.get("data", {})]
    text = re.sub(r"^```.*?^```|^\|.*?$", "\n", "\n\n".join(texts), flags=re.M | re.S)
    parts = [re.sub(r"\s+", " ", part) for part in re.split(r"\n\s*\n|^\s*(?:[-*#>]+|\d+\.) ", text, flags=re.M)]
    return [s for part in parts for raw in re.split(r"(?<=[.!?])[*_]*\s+", part) if len(s := raw.strip(" *_\"'")) >= 40]


def repeated(notebook: dict) -> list[str]:
    """Sentences that a page says more than once."""
    return [sentence for sentence, n in Counter(said(notebook)).items() if n > 1]


def large(notebook: dict, paper: bool = False) -> list[str]:
    """Outputs above 40 kB; images above 170 kB, but for the paper's."""
    sizes = [(i, kind, len(json.dumps(data))) for i, cell in enumerate(notebook["cells"]) for out in cell.get("outputs", [])
             for kind, data in (out.get("data") or {"stream": out.get("text", "")}).items()]
    return [f"cell {i}: {kind}, {size} bytes" for i, kind, size in sizes
            if size > 40_000 and not (kind.startswith("image/") and (paper or size < 170_000))]


def sidebar(contents: list) -> list[str]:
    """The pages named in a Quarto sidebar, sections included."""
    return [page for entry in contents for page in
            ([entry] if isinstance(entry, str) else [entry[k] for k in ("href",) if k in entry] + sidebar(entry.get("contents", [])))]


@pytest.fixture(scope="module")
def settings() -> dict:
    """The site's settings."""
    return yaml.safe_load((REPO / "_quarto.yml").read_text())


@pytest.fixture(scope="module")
def citations() -> set[str]:
    """The keys of the bibliography."""
    return set(re.findall(r"^@\w+\{([^,\s]+),", (NBS / "references.bib").read_text(), re.M))


@pytest.fixture(scope="module")
def processed() -> Path:
    """The folder that nbdev hands to Quarto."""
    code = "from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=2)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "imports and other code" not in done.stderr, done.stderr
    return REPO / "_proc"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_is_complete(page, processed, citations):
    notebook = json.loads((processed / page).read_text(encoding="utf-8"))
    assert notebook["cells"] and sources(notebook, "markdown")
    assert unresolved(notebook, citations) == []
    assert empty_figures(notebook) == []
    assert dead_links(notebook, (NBS / page).parent) == []


@pytest.mark.parametrize("page", PAPER, ids=str)
def test_a_chapter_keeps_the_papers_rules(page):
    notebook = json.loads((NBS / page).read_text(encoding="utf-8"))
    assert typed_numbers(notebook) == []
    assert bare_figures(notebook) == []
    assert empty_tables(notebook) == []
    assert fetching(notebook) == []
    assert noise(notebook) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_sentence_of_a_page_repeats_another_and_outputs_are_small(page):
    notebook = json.loads((NBS / page).read_text(encoding="utf-8"))
    assert repeated(notebook) == []
    assert large(notebook, paper=page in PAPER) == []


def test_a_page_with_figures_says_once_how_to_read_them():
    pages = {page: json.loads((NBS / page).read_text(encoding="utf-8")) for page in [*PAPER, Path("index.ipynb")]}
    told = {page: " ".join(said(notebook)).count("An effect is the patched minus the unpatched logit difference") for page, notebook in pages.items()}
    patched = [page for page, notebook in pages.items() if re.search(r"\bplate\(|comparison_plates\(", "\n".join(sources(notebook, "code")))]
    assert len(patched) == 9 and told == {page: int(page in patched) for page in pages}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_image_has_a_text_in_its_place(page):
    assert unread_images(json.loads((NBS / page).read_text(encoding="utf-8"))) == []


def test_chapters_are_numbered_without_gaps():
    assert [int(p.name[:2]) for p in PAPER] == list(range(1, len(PAPER) + 1))


@pytest.mark.slow
def test_exported_functions_are_documented(processed):
    """nbdev puts signature and docstring of what a notebook exports into its page."""
    page = json.loads((processed / "library" / "battery" / "01_pairs.ipynb").read_text(encoding="utf-8"))
    shown = "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for c in page["cells"] for o in c.get("outputs", []))
    assert "### entity_spans" in shown and "### PromptPair" in shown and "clean_entity" in shown


def test_every_page_is_in_the_sidebar_and_the_other_way_around(settings):
    assert sorted(sidebar(settings["website"]["sidebar"]["contents"])) == sorted(map(str, PAGES))


def test_settings_are_where_nbdev_and_quarto_look(settings):
    inner = yaml.safe_load((NBS / "_quarto.yml").read_text())
    assert inner == {"metadata-files": ["../_quarto.yml", "nbdev.yml"]}
    assert settings["project"]["type"] == "website"
    assert list(settings["format"]) == ["html"] and settings["format"]["html"]["html-math-method"] == "mathml"
    for name in (settings["bibliography"], settings["format"]["html"]["css"]):
        assert (NBS / name).is_file()


def test_nbdev_yml_is_what_nbdev_writes():
    from nbdev.config import get_config
    from nbdev.quarto import _nbdev_yml
    cfg = get_config(path=REPO)
    values = {k: cfg[k] for k in ("title", "description", "branch", "git_url", "doc_host", "doc_baseurl")}
    assert (NBS / "nbdev.yml").read_text() == _nbdev_yml.format(**values, doc_path=cfg.doc_path.name)


def test_the_checks_see_what_they_look_for(tmp_path):
    notebook = {"cells": [
        dict(cell_type="markdown", source="As @fig-a and @fig-b show [@meng2022; @nobody1999]. `@not-a-reference`, me@x.org\n\n"
                                          "[a](there.ipynb) [b](gone.ipynb) [c](pairs.html) [d](https://example.org) [e](#top)"),
        dict(cell_type="code", source="#| label: fig-a\n#| fig-cap: As in @fig-c.\nplot()", outputs=[])]}
    (tmp_path / "there.ipynb").touch()
    (tmp_path / "00_pairs.ipynb").touch()
    assert unresolved(notebook, {"meng2022"}) == ["fig-b", "nobody1999", "fig-c"]
    assert empty_figures(notebook) == ["cell 1: #| label: fig-a"]
    assert dead_links(notebook, tmp_path) == ["gone.ipynb"]
    notebook["cells"][1]["outputs"] = [dict(output_type="display_data", data={"image/png": "..."})]
    assert empty_figures(notebook) == []
    assert bare_figures(notebook) == ["cell 1 has only ['fig-cap:', 'label: fig-']"]
    assert unread_images(notebook) == ["cell 1"]
    notebook["cells"][1]["source"] += "\n#| fig-alt: A curve."
    assert unread_images(notebook) == [] and bare_figures(notebook) == [] and fetching(notebook) == [] and noise(notebook) == [] and typed_numbers(notebook) == []
    notebook["cells"] += [dict(cell_type="code", source="#| label: tbl-a\nif rows: table(rows)", outputs=[])]
    assert empty_tables(notebook) == ["tbl-a"]
    notebook["cells"][0]["source"] = "It is 16.3 of 18, or 86.7% (v1.2 `0.5`) and $x^2$."
    notebook["cells"][1]["outputs"] += [dict(output_type="display_data", data={"text/html": ""}), dict(output_type="stream", name="stderr", text="w")]
    assert typed_numbers(notebook) == ["16.3", "86.7%"] and noise(notebook) == ["cell 1: w"]
    assert fetching(notebook) == ["cell 1: text/html", "mathematics: $x^2$"]
    again = "The same sentence, long enough to be noticed."
    notebook = {"cells": [dict(cell_type="markdown", source=f"One. *{again}* Two.\n\n```\n{again}\n```\n| {again} |"),
                          dict(cell_type="code", source=f"# {again}", outputs=[dict(output_type="stream", name="stdout", text=again)])]}
    assert repeated(notebook) == []
    for cell in (dict(cell_type="markdown", source="- The same sentence,\nlong enough to be noticed."), dict(cell_type="code", source=f"#| fig-cap: {again}"),
                 dict(cell_type="code", source="", outputs=[dict(output_type="display_data", data={"text/markdown": [f"Three. {again}"]})])):
        assert repeated({"cells": [*notebook["cells"], cell]}) == [again]
    notebook["cells"] = [dict(cell_type="code", source="", outputs=[dict(data={"text/html": "x" * 40_000}), dict(data={"image/png": "x" * 50_000})])]
    assert large(notebook) == ["cell 0: text/html, 40002 bytes"]
    notebook["cells"][0]["outputs"] = [dict(data={"image/png": "x" * 180_000}), dict(name="stdout", text="x" * 50_000)]
    assert len(large(notebook)) == 2 and large(notebook, paper=True) == ["cell 0: stream, 50002 bytes"]
    assert sidebar(["a", {"section": "s", "href": "b", "contents": ["c"]}]) == ["a", "b", "c"]


def test_what_a_site_would_fetch_is_found_and_what_nothing_uses_is_taken_out(tmp_path):
    spec = importlib.util.spec_from_file_location("offline", REPO / ".ci" / "offline.py")
    offline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(offline)
    cdn = "https://cdnjs.cloudflare.com/ajax/libs"
    needless = (f'<script src="{cdn}/require.js/2.3.6/require.min.js" integrity="x"></script>\n<script src="{cdn}/jquery/3.5.1/jquery.min.js" '
                "data-relocate-top=\"true\"></script>\n<script type=\"application/javascript\">define('jquery', [],function() {return 1;})</script>\n")
    mine = '<script src="site_libs/a.js"></script><a href="https://x.org">x</a>'
    (tmp_path / "a.html").write_text(needless + mine)
    assert offline.main(tmp_path) == 0 and (tmp_path / "a.html").read_text() == mine
    for bad in ('<script src="https://x.org/a.js">', '<link href="//x.org/a.css" rel="stylesheet">', "<style>@import url(https://x.org/f)</style>",
                "<p style=\"background: url('http://x.org/a.png')\">", '<img alt="a" src="https://x.org/a.png">'):
        (tmp_path / "a.html").write_text(bad)
        assert offline.main(tmp_path) == 1, bad


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("quarto") is None, reason="Quarto is not on the PATH")
def test_the_site_builds(settings):
    programs = {"BIN": str(Path(sys.executable).parent)}
    done = subprocess.run([REPO / ".ci" / "docs"], cwd=REPO, capture_output=True, text=True, env=os.environ | programs)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in sidebar(settings["website"]["sidebar"]["contents"]):
        name = re.sub(r"^\d+[a-z]?_", "", Path(page).stem)
        assert (REPO / "_docs" / Path(page).parent / f"{name}.html").is_file()


def test_no_label_is_given_in_two_chapters():
    """The report puts all chapters on one page, and refuses a label that comes twice."""
    given = Counter(label for page in PAPER for label in labels(json.loads((NBS / page).read_text(encoding="utf-8"))))
    assert len(given) > 40 and [label for label, times in given.items() if times > 1] == []
