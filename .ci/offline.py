"""Make a built site work without a network: `python .ci/offline.py FOLDER`.

For every page that shows a table made by pandas Quarto asks a server for require.js and jQuery, which no page of ours
uses. They are taken out; whatever else a page would fetch from elsewhere is an error.
"""
import re
import sys
from pathlib import Path

NEEDLESS = re.compile(r'<script[^>]*src="https://cdnjs\.cloudflare\.com/[^"]*/(?:require|jquery)\.min\.js"[^>]*></script>\s*'
                      r"|<script[^>]*>define\('jquery'.*?</script>\s*", re.S)
FETCHED = re.compile(r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["'](?:https?:)?//[^"']*"""
                     r"""|<link\b(?=[^>]*\brel=["'](?:stylesheet|preload|icon)["'])[^>]*\bhref=["'](?:https?:)?//[^"']*"""
                     r"""|@import\s+(?:url\()?["']?(?:https?:)?//[^"')]*|url\(["']?(?:https?:)?//[^"')]*""", re.I)


def clean(text: str) -> str:
    """A page without the scripts that nothing on it uses."""
    return NEEDLESS.sub("", text)


def fetched(text: str) -> list[str]:
    """What a page or a style sheet would ask a server for."""
    return FETCHED.findall(text)


def main(folder: Path) -> int:
    """Clean all pages; print what is left to fetch, and return how much that is."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".html", ".css")):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".html" and (cleaned := clean(text)) != text:
            path.write_text(cleaned, encoding="utf-8")
            text = cleaned
        found += [f"{path.relative_to(folder)}: {what}" for what in fetched(text)]
    print("\n".join(found) or "The site fetches nothing from elsewhere.")
    return len(found)


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1])), 1))
