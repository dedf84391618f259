"""Readers of the packages' files: each yields the documents in a file, as plain text."""

from __future__ import annotations

import gettext
import gzip
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from exports.corpus.man_pages import man_text
from exports.corpus.markup import html_text, mallard_text

Reader = Callable[[Path], Iterator[str]]
MESSAGES = 60
"""Translated messages in a document."""
ENTRIES = 40
"""Entries of a dictionary in a document."""
STATEMENTS = 30
"""Paragraphs of a Metamath database in a document."""
ANNOTATIONS = "|".join(
    (
        r"Contributed by.*?",
        r"Revised by.*?",
        r"Proof\s+shortened by.*?",
        r"Proof modification is discouraged\.",
        r"New usage is discouraged\.",
    )
)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed if it is a `.gz` or a dictionary's `.dz`."""
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix in (".gz", ".dz") else content


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or else in Latin-1."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def grouped(parts: list[str], size: int, separator: str = "\n") -> Iterator[str]:
    """Documents of `size` parts each."""
    for start in range(0, len(parts), size):
        yield separator.join(parts[start : start + size])


def _plain(path: Path) -> Iterator[str]:
    yield read_text(path)


def _script(path: Path) -> Iterator[str]:
    """JavaScript, without the name of its source map."""
    yield re.sub(r"\n//# sourceMappingURL.*", "", read_text(path))


def _html(path: Path) -> Iterator[str]:
    yield html_text(read_text(path))


def _mallard(path: Path) -> Iterator[str]:
    yield mallard_text(read_text(path))


def _man(path: Path) -> Iterator[str]:
    yield man_text(read_text(path))


def _messages(path: Path) -> Iterator[str]:
    """Translations of a compiled catalogue (.mo), without marks of keyboard shortcuts."""
    catalogue = gettext.GNUTranslations(io.BytesIO(path.read_bytes()))
    translated: dict[object, str] = vars(catalogue)["_catalog"]
    texts = [text for original, text in translated.items() if original]
    yield from grouped([re.sub(r"[_~&](?=\w)", "", text) for text in texts], MESSAGES)


def _dictionary(path: Path) -> Iterator[str]:
    """Entries of a dictionary for dictd: each begins at the margin."""
    yield from grouped(re.split(r"\n(?=\S)", read_text(path)), ENTRIES)


def _wordnet(path: Path) -> Iterator[str]:
    """Words and glosses of WordNet's data files."""
    lines = []
    for line in read_text(path).split("\n"):
        if line.startswith("  ") or " | " not in line:
            continue
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        names = ", ".join(word.replace("_", " ") for word in words)
        lines.append(f"{names} ({path.suffix[1:]}): {gloss.strip()}")
    yield from grouped(lines, ENTRIES)


def _metamath(path: Path) -> Iterator[str]:
    """Statements and comments of a Metamath database, without proofs."""
    text = re.sub(r"\$=.*?\$\.", "$.", read_text(path), flags=re.S)
    text = re.sub(r"\n\s+\$\.", " $.", text)
    text = re.sub(rf"\((?:{ANNOTATIONS})\)", "", text, flags=re.S)
    text = re.sub(r"\n {2,}", "\n  ", text)
    yield from grouped(re.split(r"\n\s*\n", text), STATEMENTS, "\n\n")


def _tagged(path: Path) -> Iterator[str]:
    """Text of the Brown corpus, whose words carry their parts of speech."""
    paragraphs = []
    for block in re.split(r"\n\s*\n\s*\n", read_text(path)):
        words = [word.rsplit("/", 1)[0] for word in block.split()]
        text = re.sub(r" ([.,;:?!)']|'')", r"\1", " ".join(words))
        paragraphs.append(text.replace("`` ", '"').replace("''", '"').replace("( ", "("))
    yield "\n\n".join(text for text in paragraphs if text)


def _java_archive(path: Path) -> Iterator[str]:
    """Sources of the packages java.util, lang, io, net and time in a zip file."""
    with zipfile.ZipFile(path) as file:
        for name in sorted(file.namelist()):
            if re.search(r"java\.base/java/(util|lang|io|net|time)/.*\.java$", name):
                yield file.read(name).decode("utf-8", "replace")


READERS: dict[str, Reader] = {
    "plain": _plain,
    "script": _script,
    "html": _html,
    "mallard": _mallard,
    "man": _man,
    "messages": _messages,
    "dictionary": _dictionary,
    "wordnet": _wordnet,
    "metamath": _metamath,
    "tagged": _tagged,
    "java_archive": _java_archive,
}
"""Readers by the names that the table of domains calls them, beside those of `records`."""
