"""Plain text of manual pages, written in roff with the macros of man or mdoc."""

from __future__ import annotations

import re

FONTS = frozenset(
    (
        "B",
        "I",
        "BR",
        "RB",
        "BI",
        "IB",
        "IR",
        "RI",
        "SM",
        "SB",
        "MR",
        "Nm",
        "Fl",
        "Ar",
        "Pa",
        "Xr",
        "Em",
    )
)
"""Macros whose arguments are text."""
ALTERNATING = frozenset(("BR", "RB", "BI", "IB", "IR", "RI"))
"""Macros that join their arguments without a space."""
HEADINGS = frozenset(("SH", "SS", "Sh", "Ss"))
BREAKS = frozenset(("PP", "LP", "P", "TP", "IP", "HP", "Pp", "It", "TQ", "br", "sp"))
VERBATIM = {"nf": True, "EX": True, "Bd": True, "fi": False, "EE": False, "Ed": False}
"""Macros between which lines stay lines."""
COMMENTS = ("'\\\"", '.\\"', '\\"')
ESCAPES = [
    (re.compile(pattern), text)
    for pattern, text in (
        (r"\\\*\((?:lq|rq)|\\\((?:lq|rq|dq)", '"'),
        (r"\\\*\(aq|\\\((?:aq|cq|oq)", "'"),
        (r"\\\(bu", "*"),
        (r"\\\(em", "--"),
        (r"\\\(en", "-"),
        (r"\\\(co", "(C)"),
        (r"\\\(ti", "~"),
        (r"\\\(ha", "^"),
        (r"\\\(rs|\\e", r"\\"),
        (r"\\\(mu", "x"),
        (r"\\\(<=", "<="),
        (r"\\\(>=", ">="),
        (r"\\\(..|\\\[[^\]]*\]", ""),
        (r"\\f\(..|\\f\[[^\]]*\]|\\f.", ""),
        (r"\\s[-+]?\d+", ""),
        (r"\\[&/,|^%:)c]", ""),
        (r"\\-", "-"),
        (r"\\~|\\ |\\0", " "),
        (r"\\\".*", ""),
        (r"\\\*\(..|\\\*.", ""),
        (r"\\([.'`])", r"\1"),
    )
]


class _Page:
    """Paragraphs of a page as its lines are read."""

    def __init__(self) -> None:
        self.paragraphs: list[str] = []
        self._lines: list[str] = []
        self._is_verbatim = False

    def end_paragraph(self) -> None:
        if self._lines:
            self.paragraphs.append(("\n" if self._is_verbatim else " ").join(self._lines))
            self._lines = []

    def add(self, text: str) -> None:
        for pattern, replacement in ESCAPES:
            text = pattern.sub(replacement, text)
        self._lines.append(text)

    def run(self, macro: str, arguments: str) -> None:
        """Follow a macro; unknown ones are left out with their arguments."""
        if macro in FONTS:
            between = "" if macro in ALTERNATING else " "
            self.add(between.join(_words(arguments)))
        elif macro in HEADINGS:
            self.end_paragraph()
            self.add(" ".join(_words(arguments)))
            self.end_paragraph()
        elif macro in BREAKS:
            self.end_paragraph()
            if macro == "IP" and arguments:
                self.add(_words(arguments)[0])
        elif macro in VERBATIM:
            self.end_paragraph()
            self._is_verbatim = VERBATIM[macro]


def man_text(page: str) -> str:
    """The text of a manual page; of a page that only names another (`.so`), nothing."""
    reader = _Page()
    for line in page.split("\n"):
        if line.startswith(COMMENTS):
            continue
        macro = re.match(r"[.'][ \t]*([A-Za-z]+)[ \t]*(.*)", line)
        if macro and macro[1] == "so":
            return ""
        if macro:
            reader.run(macro[1], macro[2])
        elif line.strip():
            reader.add(line)
        else:
            reader.end_paragraph()
    reader.end_paragraph()
    return "\n\n".join(text.strip("\n") for text in reader.paragraphs if text.strip())


def _words(arguments: str) -> list[str]:
    """The arguments of a macro: words, or texts in quotation marks."""
    return [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', arguments)] or [""]
