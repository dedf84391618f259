"""Documents of a domain: cleaned, each paragraph once, split by document, cut into pieces."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

PIECE = 24_000
"""Characters of a piece of a long document, about."""
SHORTEST = 150
"""Characters of the shortest document that is kept."""
REPEATED = 60
"""Characters from which on a paragraph that was seen before is left out."""
MOST_DIGITS = 0.15
LONGEST_LINE = 1000
"""Code with more digits or a longer line is a generated table or embedded data."""
SCRIPTS = {
    "Arabic": "\u0600-\u06ff",
    "Cyrillic": "\u0400-\u04ff",
    "Devanagari": "\u0900-\u097f",
    "Georgian": "\u10a0-\u10ff",
    "Greek": "\u0370-\u03ff",
    "Han": "\u4e00-\u9fff",
    "Hangul": "\uac00-\ud7af",
    "Hebrew": "\u0590-\u05ff",
    "Japanese": "\u3040-\u30ff\u4e00-\u9fff",
    "Latin": "",
    "Tamil": "\u0b80-\u0bff",
    "Thai": "\u0e00-\u0e7f",
}
"""Ranges of the letters of each script. Of Latin, no paragraph is asked for any."""
FRAME = re.compile(
    r"(Help content debug info:|This page is:|Title is:|LibreOffice \d\.\d |"
    r"(Hilfe für|Aide|Ayuda de|Справка) LibreOffice \d)"
)
"""Paragraphs that stand on every page of LibreOffice's help."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A cleaned document and the source that it is from."""

    text: str
    source: int
    """Index of the source in its domain."""

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode("utf-8", "replace")).digest()

    def is_held_out(self, one_of: int) -> bool:
        """Whether it is among the held-out ones, one of so many; the text alone decides."""
        return int.from_bytes(self.digest[8:16], "big") % one_of == 0


class Cleaner:
    """Cleans the documents of one domain and leaves out paragraphs that it has seen."""

    def __init__(self, script: str) -> None:
        self._letters = re.compile(f"[{SCRIPTS[script]}]") if SCRIPTS[script] else None
        self._seen: set[bytes] = set()

    def clean(self, text: str) -> str:
        """The text that remains; nothing of a document that is too short."""
        text = tidy(text).replace("<|endoftext|>", "")
        kept = [block for block in text.split("\n\n") if self._keeps(block)]
        text = tidy("\n\n".join(kept))
        return text if len(text) >= SHORTEST else ""

    def _keeps(self, block: str) -> bool:
        if FRAME.match(block):
            return False
        if self._letters and len(block) > 40 and not self._letters.search(block):
            return False  # not translated
        if len(block) < REPEATED:
            return True
        digest = hashlib.blake2b(block.strip().encode("utf-8", "replace"), digest_size=8).digest()
        is_new = digest not in self._seen
        self._seen.add(digest)
        return is_new


def tidy(text: str) -> str:
    """The text with plain spaces and line ends, no spaces before those, no two blank lines."""
    text = text.replace("\u00a0", " ").replace("\u200b", "")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def is_generated(code: str) -> bool:
    """Whether source text is a table or embedded data rather than written by someone."""
    digits = sum(character.isdigit() for character in code)
    return digits > MOST_DIGITS * len(code) or max(map(len, code.split("\n"))) > LONGEST_LINE


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A long text in pieces of about `size` characters, cut at blank lines, or else at lines."""
    if len(text) <= size * 3 // 2:
        yield text
        return
    separator = "\n\n" if text.count("\n\n") > len(text) / 8000 else "\n"
    blocks: list[str] = []
    length = 0
    for block in text.split(separator):
        blocks.append(block)
        length += len(block) + len(separator)
        if length >= size:
            yield separator.join(blocks)
            blocks, length = [], 0
    if blocks:
        yield separator.join(blocks)
