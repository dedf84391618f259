"""Plain text of HTML pages and of the help pages that GNOME writes in Mallard."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

SKIPPED = frozenset(("script", "style", "head", "nav", "footer", "aside", "button", "noscript"))
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6", "title")
LISTS = ("ul", "ol", "li", "dl", "dt", "dd", "table", "tr")
BLOCKS = frozenset(("p", "div", "pre", "section", "blockquote", *HEADINGS, *LISTS))
MALLARD_BLOCKS = "p|title|item|section|note|steps|list|page|td|tr|para|desc"


class _PageText(HTMLParser):
    """Gathers the text between tags, a blank line around each block."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._num_skipped = 0
        self._num_preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._num_skipped += tag in SKIPPED
        self._num_preformatted += tag == "pre"
        if tag in BLOCKS:
            self.pieces.append("\n\n")
        elif tag in ("br", "td"):
            self.pieces.append("\n" if tag == "br" else " ")

    def handle_endtag(self, tag: str) -> None:
        self._num_skipped = max(0, self._num_skipped - (tag in SKIPPED))
        self._num_preformatted = max(0, self._num_preformatted - (tag == "pre"))
        if tag in BLOCKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._num_skipped:
            text = data if self._num_preformatted else re.sub(r"\s+", " ", data)
            self.pieces.append(text)


def html_text(page: str) -> str:
    """The text of an HTML page, without what frames it; indented lines are kept as they are."""
    parser = _PageText()
    parser.feed(page)
    parser.close()
    lines = "".join(parser.pieces).split("\n")
    return "\n".join(line if line.startswith("    ") else line.strip() for line in lines)


def mallard_text(page: str) -> str:
    """The text of a Mallard or DocBook page."""
    page = re.sub(r"<!--.*?-->|<info\b.*?</info>", " ", page, flags=re.S)
    page = re.sub(rf"</?({MALLARD_BLOCKS})\b[^>]*>", "\n\n", page)
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    blocks = (re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(blocks)
