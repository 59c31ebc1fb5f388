"""The report: one page that needs nothing else, in which every reference leads somewhere, about the run and no other."""
import html
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
from weekly import mostly

from bizzaroworld.files import write_table
from bizzaroworld.paper import chapters as paper, pages, report
from bizzaroworld.paper.pages import Chapter, PageError, Resolver, bibliography, numbered, page, to_html
from bizzaroworld.results.estimates import Estimate
from bizzaroworld.study.runs import RunError, open_run
from planted import planted_run, steps

SOURCES = bibliography("@misc{doe2024,\n  title = {On {Shape}},\n  author = {Doe, Jane and Roe, R. and Poe, E.},\n  year = {2024},\n"
                       "  url = {https://example.org}\n}\n")
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Elements(HTMLParser):
    "Start tags of a page with their attributes."
    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))


def outside(text: str) -> list[str]:
    "What a page would fetch: anything but links that a reader may follow."
    found = [f"{tag} {key}={value[:60]}" for tag, attrs in Elements(text).found for key, value in attrs.items()
             if key in ("src", "srcset", "data", "poster", "background", "action") and not value.startswith("data:")
             or key == "href" and tag != "a"]
    return found + re.findall(r"@import[^;]*|url\((?!['\"]?data:)[^)]*\)", text)


def dead_anchors(text: str) -> list[str]:
    "Links within a page that lead nowhere."
    found = Elements(text).found
    ids = {attrs["id"] for _, attrs in found if "id" in attrs}
    return [attrs["href"] for _, attrs in found if attrs.get("href", "").startswith("#") and attrs["href"][1:] not in ids]


def twice(text: str) -> set[str]:
    "Ids that are given more than once."
    ids = [attrs["id"] for _, attrs in Elements(text).found if "id" in attrs]
    return {i for i in ids if ids.count(i) > 1}


def figures(text: str) -> list[dict]:
    return [attrs for tag, attrs in Elements(text).found if tag == "img"]


def repeated(text: str) -> list[str]:
    """Sentences of 40 or more characters that a page says more than once, without code, tables, the explorer, the list of sources, and
    the reason that stands in the place of each chapter that is left out."""
    text = re.sub(r"<(details|iframe|style|nav|table)\b.*?</\1>|<ul class=\"references\">.*?</ul>|<p class=\"left-out\">.*?</p>", "", text, flags=re.S)
    parts = [html.unescape(re.sub(r"<.*?>|\s+", " ", p)) for p in re.findall(r"<(?:p|li)\b[^>]*>(.*?)</(?:p|li)>", text, re.S)]
    said = Counter(re.sub(r"\s+", " ", s).strip() for p in parts for s in re.split(r"(?<=[.!?])\s+", p))
    return [sentence for sentence, n in said.items() if n > 1 and len(sentence) >= 40]


def code(text: str, data: dict | None = None, metadata: dict | None = None) -> dict:
    outputs = [dict(output_type="display_data", data=data, metadata=metadata or {})] if data else []
    return dict(cell_type="code", source=text, outputs=outputs)


def chapter(name: str, *cells: dict | str) -> Chapter:
    made = [dict(cell_type="markdown", source=c) if isinstance(c, str) else c for c in cells]
    return Chapter(name, {"cells": [dict(cell_type="markdown", source=f"# Title of {name}\n> What it is about."), *made]})


def test_the_checks_see_what_they_look_for():
    assert outside('<script src="https://x.org/a.js"></script>') and outside('<link rel="s" href="a.css">')
    assert outside("<style>@import 'a';</style>") and outside("<style>a { background: url(x.png) }</style>")
    assert not outside('<a href="https://x.org">x</a><img src="data:image/png;base64,AA">')
    again = "This sentence is long enough to be noticed."
    assert repeated(f"<p>One. {again}</p><li><em>This sentence</em> is long enough\nto be noticed. Two.</li>") == [again]
    assert repeated(f"<p>{again}</p><details><p>{again}</p></details><ul class=\"references\"><li>{again}</li></ul><p>Short. Short.</p>") == []
    assert dead_anchors('<a href="#a"></a><p id="b">') == ["#a"] and twice('<p id="a"><p id="a">') == {"a"}


def test_figures_and_tables_are_numbered_by_chapter_and_kind():
    chapters = [chapter("04_a", code("#| label: fig-x"), code("#| label: tbl-x"), code("#| label: fig-y")), chapter("12_b", code("#| label: fig-z"))]
    assert numbered(chapters) == {"fig-x": "Figure 4.1", "tbl-x": "Table 4.1", "fig-y": "Figure 4.2", "fig-z": "Figure 12.1"}
    with pytest.raises(PageError, match="04_a.*'fig-x' is given twice"): numbered([chapter("04_a", code("#| label: fig-x"), code("#| label: fig-x"))])


@pytest.mark.parametrize("text, html", [
    ("@fig-x shows", '<a href="#fig-x">Figure 4.1</a> shows'),
    ("shown [@doe2024]", 'shown (<a href="#ref-doe2024">Doe et al., 2024</a>)'),
    ("[@doe2024; @doe2024]", '(<a href="#ref-doe2024">Doe et al., 2024</a>; <a href="#ref-doe2024">Doe et al., 2024</a>)'),
    ("@doe2024 says", '<a href="#ref-doe2024">Doe et al. (2024)</a> says'),
    ("[next](05_b.ipynb)", '<a href="#05_b">next</a>'),
    ("[next](05_b.ipynb#fig-x)", '<a href="#fig-x">next</a>'),
    ("[how](../library/results/02_effects.ipynb)", f'<a href="{pages.SITE}library/results/effects.html">how</a>'),
    ("[bench](../benchmarks.ipynb)", f'<a href="{pages.SITE}benchmarks.html">bench</a>'),
    ("`@fig-nowhere` and me\\@home.org", "<code>@fig-nowhere</code> and me@home.org"),
    ("<script>x</script>", "&lt;script&gt;x&lt;/script&gt;"),
])
def test_references_become_links(text, html):
    resolve = Resolver({"fig-x": "Figure 4.1"}, SOURCES, frozenset({"04_a", "05_b"}))
    assert to_html(resolve(text)).strip() == f"<p>{html}</p>"


@pytest.mark.parametrize("text", ["@fig-nowhere", "[@nobody1999]", "as @nobody1999 says"])
def test_a_reference_to_nothing_is_an_error(text):
    with pytest.raises(PageError, match="neither a label of a figure nor in references.bib"): page("T", "", [chapter("04_a", text)], SOURCES)


def test_a_page_shows_everything_once_and_needs_nothing():
    shown = code("#| label: fig-x\n#| fig-cap: A dot (@fig-x).\n#| fig-alt: By the cell.\ndraw()", {"image/png": PNG, "text/plain": "repr"},
                 {"image/png": {"alt": 'By the "picture".', "width": 320}})
    other = code("#| label: fig-y\n#| fig-cap: Another.\n#| fig-alt: By the cell.\n#| echo: false\nhidden_code()", {"image/png": PNG})
    text = page("T", "", [chapter("04_a", "Look at @fig-x and [@doe2024].", shown, other, code("#| hide\nsecret()"))], SOURCES)
    assert outside(text) == [] and dead_anchors(text) == [] and not twice(text)
    assert [f["alt"] for f in figures(text)] == ['By the "picture".', "By the cell."] and "320px" in figures(text)[0]["style"]
    assert text.count("A dot (") == 1 and "<strong>Figure 4.1.</strong> A dot" in text
    body = text.partition("<body>")[2]
    assert "repr" not in body and "secret" not in text and "hidden_code" not in body and "draw" in body and "fig-cap" not in body
    assert 'id="ref-doe2024"' in text and "On Shape" in text


def told(kind: str, text: str) -> dict:
    return code("", {"text/markdown": text}, {"text/markdown": {"kind": kind}})


def test_how_to_read_the_figures_stands_once_at_the_top_of_the_page():
    image = {"image/png": PNG}
    first = chapter("04_a", told("conventions", "Model: a. Zero is nothing. One is all."), code("#| label: fig-x\n#| fig-alt: A.", image), told("note", "A line."))
    second = chapter("05_b", told("conventions", "Model: a. Zero is nothing. Each is one training."), code("#| label: fig-y\n#| fig-alt: A.", image),
                     told("note", "A line."), code("#| label: fig-z\n#| fig-alt: A.", image), told("note", "Another line."), told("text", "A line."))
    third = chapter("06_c", told("conventions", "Model: a. One is all."))
    gone = Chapter("03_z", chapter("03_z", told("conventions", "Never shown.")).notebook, "It does not apply.")
    kept = json.dumps([c.notebook for c in (first, second, third)])
    text = page("T", "<p>Head.</p>", [gone, first, second, third], SOURCES).partition("<main>")[2]
    assert re.findall(r'<div class="conventions"><p>(.*?)</p>', text) == ["Model: a. Zero is nothing. One is all.", "Each is one training."]
    assert text.index("Head.") < text.index("Model: a.") < text.index("<section") and text.count('class="conventions"') == 2
    assert re.findall(r'<div class="note"><p>(.*?)</p>', text) == ["A line.", 'Read as <a href="#fig-x">Figure 4.1</a>.', "Another line."]
    assert '<div class="text"><p>A line.</p>' in text and "Never shown" not in text
    assert json.dumps([c.notebook for c in (first, second, third)]) == kept, "the chapters themselves stay as they are"
    alone = page("T", "", [second], SOURCES)
    assert "Model: a. Zero is nothing. Each is one training." in alone and "Read as" not in alone


def test_chapters_say_how_to_read_one_run_or_several(moved):
    one, both = paper.how_to_read(moved), paper.how_to_read(moved, open_run("bizzaro-nano"))
    assert one.kind == both.kind == "conventions" and paper.say("a").kind == "text" and paper.note(SimpleNamespace(caption="c")).kind == "note"
    assert "Model: planted; pairs: mode C, all 6" in one and "Depth 0" not in one
    assert "planted (n = 6 of 6 pairs), embedded model bizzaro-nano (n = 60 of 60 pairs)" in both and "Depth 0" in both


def test_a_link_to_what_the_page_holds_stays_in_the_page():
    link = chapter("04_a", "[e](../library/views/01_explorer.ipynb)")
    assert '<a href="#explorer">e</a>' in page("T", "", [link], SOURCES, {"explorer": ("Explorer", "")})
    assert f'<a href="{pages.SITE}library/views/explorer.html">e</a>' in page("T", "", [link], SOURCES)


def test_sentences_in_tables_are_told_from_numbers():
    words = "Up to which layer is the fact read from the entity?"
    made = to_html(f"| a | b | c |\n| :-- | --- | --: |\n| {words} | {words} | 0.95 [0.90, 0.97] |")
    assert made.count('<td class="long"') == 2 and made.count("<td") == 3
    assert re.findall(r'<td class="interval"[^>]*>(.*?)<', made) == ["0.95 [0.90, 0.97]"]


def test_a_table_without_rows_leaves_no_caption_behind():
    text = page("T", "", [chapter("04_a", code("#| label: tbl-x\n#| tbl-cap: Nothing to see.\nNone"))], SOURCES)
    assert "Nothing to see" not in text.partition("<body>")[2] and "<figure" not in text


def test_what_nobody_cites_is_not_listed():
    assert "On Shape" not in page("T", "", [chapter("04_a", "Nothing.")], SOURCES)


def test_outputs_of_a_run_cannot_become_markup():
    text = paper.plain("<img src=x> [a](b) @key `c` | d *e*")
    assert Elements(to_html(text)).found == [("p", {})]
    resolve = Resolver({}, {}, frozenset())
    assert re.sub("<.*?>", "", to_html(resolve(text))).strip() == "&lt;img src=x&gt; [a](b) @key `c` | d *e*"
    assert to_html(resolve(paper.plain("&lt;b&gt; and\n\n# no heading"))) == "<p>&amp;lt;b&amp;gt; and # no heading</p>\n"
    table = to_html(resolve(paper.table(pd.DataFrame({"a|b": ["x|<y>"], "n": [1.5]}))))
    assert "<th style=\"text-align:left\">a|b</th>" in table and "x|&lt;y&gt;" in table and "1.50" in table


def test_cells_of_a_table():
    values = [Estimate(1.0, 0.5, 2.0, 9), None, float("nan"), pd.NA, True, 3, -0.001, "a_b"]
    assert [paper.cell(v) for v in values] == ["1.00 [0.50, 2.00]", "–", "–", "–", "yes", "3", "0.00", "a\\_b"]
    assert paper.listed("abc") == "a, b and c" and paper.listed([]) == "" and paper.listed(range(5), most=3) == "0, 1 and 3 more"


def test_the_bibliography_is_read_whole():
    text = report.paper_path("references.bib").read_text("utf-8")
    found = bibliography(text)
    assert len(found) == len(re.findall(r"^@", text, re.M)) > 15 and "\\" not in text
    assert all(s.authors and re.fullmatch(r"\d{4}[a-z]?", s.year) and s.title and s.url.startswith("https://") for s in found.values())
    assert found["zhang2024towards"].short == "Zhang and Nanda" and found["gemma2024"].short == "Gemma Team"
    assert len({(s.short, s.year) for s in found.values()}) == len(found)
    assert (found["gemma2024"].year, found["gemma2_2024"].year, found["gemma3_2025"].year) == ("2024a", "2024b", "2025")
    assert "{" not in json.dumps([s.title + s.where + "".join(s.authors) for s in found.values()])


# ---- on runs

def complete(run):
    "A planted run with the columns of a real triage."
    triage = run.triage.assign(replaces=None, warnings=None, clean_target=" a", corrupt_target=" b")
    write_table(run.folder / "triage.csv", triage)
    write_table(run.folder / "excluded.csv", pd.DataFrame({"pair_id": [], "battery_idx": [], "reason": [], "message": [], "replaced_by": []}))
    return open_run(run.folder)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    return complete(planted_run(tmp_path_factory.mktemp("moved"), steps([4] * 6), embedded=False))


TINY = [chapter("01_a", code("#| hide\nimport os\nkept = 1"), code("#| echo: false\nprint(os.path.basename(os.environ['BIZZARO_RUN']))")),
        chapter("02_b", code("kept"), code("#| label: fig-x\nprint('not', 'reached')")),
        chapter("03_c", code("from bizzaroworld.paper.chapters import leave_out"), code("leave_out(True, 'There is nothing to compare with.')")),
        chapter("04_d", code("print('after' + ' that')"))]


def test_chapters_run_on_their_own_one_after_another(moved, monkeypatch):
    monkeypatch.setenv("BIZZARO_MODEL", "another")
    told = []
    a, b, c, d = report.execute(TINY, moved.folder, progress=lambda *args: told.append(args))
    assert a.notebook["cells"][2]["outputs"][0]["text"].strip() == moved.folder.name
    assert b.left_out.startswith("This chapter could not be made: cell 2 (kept): NameError: name 'kept'") and not b.notebook["cells"][2]["outputs"]
    assert c.left_out == "There is nothing to compare with."
    assert d.notebook["cells"][1]["outputs"][0]["text"] == "after that\n" and not d.left_out
    assert told == [(i, 4, c.title) for i, c in enumerate(TINY)] + [(4, 4, "")]


def test_a_kernel_that_dies_is_named_by_chapter_and_cell(moved):
    killed = [chapter("01_a", code("print('fine')")), chapter("02_b", code("# by the system\nimport os"), code("os._exit(9)"))]
    with pytest.raises(RuntimeError, match=r"Chapter 02_b, cell 3 \(os._exit\(9\)\): its process ended"): report.execute(killed, moved.folder)


@pytest.fixture
def hears_of_stops():
    "Ctrl-C raises, also where this was begun in the background by a shell, which has such programs ignore it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stop_while_a_chapter_runs_is_a_stop_and_ends_the_kernel(moved, tmp_path, hears_of_stops):
    """Ctrl-C is neither a lack of memory nor a chapter that failed."""
    note = tmp_path / "pid"
    endless = [chapter("01_a", code(f"import os, pathlib, time\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))\ntime.sleep(60)")), TINY[3]]
    def stop():
        while not (note.exists() and note.read_text()): time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt): report.execute(endless, moved.folder)
    assert not psutil.pid_exists(int(note.read_text())) or psutil.Process(int(note.read_text())).status() == psutil.STATUS_ZOMBIE


def test_a_cell_without_end_is_stopped(moved):
    slow, after = report.execute([chapter("01_a", code("while True: pass")), TINY[3]], moved.folder, timeout=1)
    assert slow.left_out.startswith("This chapter could not be made: cell 2 (while True: pass): ") and not after.left_out


def test_a_report_is_written_with_what_failed_at_its_top(moved, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "read_chapters", lambda names: TINY)
    monkeypatch.setattr(report, "explorer_page", lambda run: '<script>alert("x")</script>')
    path = report.report(moved.folder, tmp_path / "r.html")
    text = path.read_text("utf-8")
    assert re.search(r'class="caution">(?:\s*<p>Only 6 pairs.*</p>)?\s*<p>2 Title of 02_b: This chapter could not be made: cell 2 \(kept\): NameError', text)
    assert "reached" not in re.sub(r"<details>.*?</details>", "", text, flags=re.S) and "There is nothing to compare with." in text
    frame = next(attrs for tag, attrs in Elements(text).found if tag == "iframe")
    assert frame["srcdoc"] == '<script>alert("x")</script>' and frame["title"] and "<script" not in text
    assert outside(text) == [] and dead_anchors(text) == []


def test_a_doubtful_run_says_so_before_anything_else(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "read_chapters", lambda names: [])
    def tops(**planted):
        run = complete(planted_run(tmp_path / str(len(list(tmp_path.iterdir()))), **planted))
        return report.report(run.folder, explorer=False).read_text("utf-8")
    few = tops(entity=steps([4] * 12), preferred=[True] * 5 + [False] * 7)
    caution = re.search(r'<div class="caution">\s*<p>(.*?)</p>', few).group(1)
    assert caution.startswith("It prefers the right answer on 5 of 12 pairs, ") and few.index(caution) < few.index("<section")
    assert 'class="caution"' not in tops(entity=steps([4] * 12))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError): report.report(tmp_path)


def test_where_the_report_goes_is_known_before_it_is_made(moved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "read_chapters", lambda names: [])
    assert report.report("bizzaro-nano", explorer=False) == Path("bizzaro-nano-report.html") and Path("bizzaro-nano-report.html").exists()
    monkeypatch.setattr(report, "execute", lambda *args, **options: pytest.fail("executed for nothing"))
    with pytest.raises(RunError, match="is a folder. Name a file, such as .*report.html"): report.report(moved.folder, tmp_path)
    monkeypatch.setattr(report.os, "access", lambda path, mode: False)
    with pytest.raises(RunError, match="Nothing can be written to .*--out"): report.report(moved.folder, tmp_path / "r.html")


def test_chapters_come_without_outputs_and_in_order():
    found = report.read_chapters()
    assert [c.number for c in found] == sorted(c.number for c in found) and found[0].number == 1
    assert not any(cell.get("outputs") for c in found for cell in c.notebook["cells"])


RUNS = {
    "nowhere": dict(entity=np.zeros((6, 8)), final=np.zeros((6, 8))),
    "unknown": dict(entity=steps([2, 3, 4, 5]), swings=[9, 3, 0.5, -1], known=[True, True, False, False], direction="denoising"),
    "one": dict(entity=steps([5])),
    "flat": dict(entity=steps([2, 3, 4, 5]), swings=[0.9, 0.5, 0.1, -1], known=[False] * 4, controls={"unrelated": steps([2, 3, 4, 5], before=0.5)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(RUNS, ["nowhere", "one"]))
def test_the_paper_can_be_made_of_any_run(name, tmp_path):
    run = complete(planted_run(tmp_path / "run", **RUNS[name]))
    text = report.report(run.folder).read_text("utf-8")
    assert "could not be made" not in text, re.findall(r"could not be made[^<]*", text)
    assert outside(text) == [] and dead_anchors(text) == [] and not twice(text)
    assert repeated(text) == [] and text.count("An effect is the patched minus the unpatched logit difference (ld)") == 1
    assert text.index('class="conventions"') < text.index("<section")
    assert figures(text) and all(f["alt"] for f in figures(text))
    shown = re.sub(r"<details>.*?</details>|data:image[^\"]*", "", text, flags=re.S)
    assert not re.search(r"\bnan\b|\bNone\b|NaN", shown), re.findall(r".{60}\b(?:nan|None|NaN)\b.{60}", shown)


@pytest.mark.slow
def test_a_report_of_another_model_says_nothing_of_ours(tmp_path):
    run = complete(planted_run(tmp_path / "run", steps([4] * 6), embedded=False))
    names = [c.name for c in report.read_chapters() if c.number <= 6]
    text = report.report(run.folder, chapters=names, explorer=False).read_text("utf-8")
    assert "planted" in text and "bizzaro-nano" not in text and "embedded" not in text
