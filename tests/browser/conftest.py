"""A real browser for the pages: Chromium, driven by Playwright, with the network shut and watched."""
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REMEDY = "`.ci/chromium` installs Chromium, `pip install playwright` its driver"
FLAGS = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1")
OF_THE_PAGE = ("file", "data", "blob", "about")  # addresses that are no network


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: drives Chromium (`make test-browser`; skipped where there is none)")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents: item.add_marker("browser")


def missing(what: str):
    """Skip; with BROWSER_REQUIRED=1, fail."""
    say = pytest.fail if os.environ.get("BROWSER_REQUIRED") == "1" else pytest.skip
    say(f"{what}: {REMEDY}")


def chromium() -> str | None:
    """The browser's path: $CHROMIUM, or the first on the PATH, or the one that Playwright installed."""
    if named := os.environ.get("CHROMIUM"): return shutil.which(named)
    return next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def browser():
    """Chromium, one for each test module: Playwright's loop would get in the way of tests that run one of their own."""
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing("Playwright is not installed")
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = chromium() or (own if Path(own).exists() else None)
        if path is None: missing(f"no Chromium on the PATH, nor in $CHROMIUM ({os.environ.get('CHROMIUM', 'not set')})")
        root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        running = playwright.chromium.launch(executable_path=path, args=[*FLAGS, *root])
        yield running
        running.close()


@pytest.fixture
def origins() -> set[str]:
    """Where a page may go, as `localhost:8888`. Override it in a module whose pages come from a server."""
    return set()


@pytest.fixture
def console() -> list[str]:
    """What the pages of a test said on their console at the level of an error, and what they threw. Has to end up empty."""
    return []


@pytest.fixture
def page(browser, origins, console):
    """A page at 1280 px that cannot leave this machine. Errors on its console, and requests that leave, fail the test at its end."""
    left = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})

    def leaves(url: str) -> bool:
        parts = urlsplit(url)
        return parts.scheme not in OF_THE_PAGE and parts.netloc not in origins

    def pass_or_block(route):
        route.abort() if leaves(route.request.url) else route.continue_()

    context.route("**/*", pass_or_block)
    page = context.new_page()
    page.set_default_timeout(60_000)  # a busy machine took over 10 s for a first sweep; no wait outlasts what it waits for
    page.on("request", lambda r: leaves(r.url) and left.append(r.url))
    page.on("websocket", lambda s: leaves(s.url) and left.append(s.url))
    page.on("console", lambda m: m.type == "error" and console.append(m.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    yield page
    context.close()
    assert not left, f"the page asks the network for {left}"
    assert not console, f"the page has errors: {console}"


@pytest.fixture
def open_html(page):
    """`open_html(path)` opens a file from disk in `page`, and returns the page when it has loaded."""
    def open_file(path: Path, fragment: str = ""):
        page.goto(Path(path).resolve().as_uri() + fragment, wait_until="load")
        return page
    return open_file


@pytest.fixture
def fits(page):
    """`fits(width)` makes the page that wide and asserts that it does not scroll sideways."""
    def check(width: int, height: int = 900):
        page.set_viewport_size({"width": width, "height": height})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"at {width} px the page is {wide} px wide"
    return check
