"""The bundle: the page's modules, style sheets and data as one HTML file.

Modules are those of this package and of the server's page. Each becomes a function of its own, so
that no two see each other's names. A content policy with the digests of script and style lets
nothing else run, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.server.live import page_files

FOLDERS = (Path(__file__).parent / "assets", page_files.ASSETS)
STYLES = ("style.css", "live.css", "replay.css")
TEMPLATE = "replay.html"
ENTRY = "replay.js"
NAMED = re.compile(r'^import \{ (.+) \} from "\./(.+)";$', re.MULTILINE)
WHOLE = re.compile(r'^import \* as (\w+) from "\./(.+)";$', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const|let) (\w+))", re.MULTILINE)
PLACE = re.compile(r"\{\{(\w+)\}\}")
CLOSING = re.compile("</(script|style)", re.IGNORECASE)


def html_page(data: Mapping[str, Any]) -> str:
    """The whole page. data: what `page_data` gives; none of its text is ever read as HTML."""
    script, style = _script(), "\n".join(asset(name) for name in STYLES)
    parts = {
        "script": script,
        "style": style,
        "policy": (
            f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        "icon": base64.b64encode(asset("icon.svg").encode()).decode("ascii"),
        "data": json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        .replace("<", "\\u003c"),
    }  # fmt: skip
    return PLACE.sub(lambda place: parts[place[1]], asset(TEMPLATE))


def asset(name: str) -> str:
    """The text of a file of this package, or else of the server's page."""
    path = next(path for folder in FOLDERS if (path := folder / name).is_file())
    text = path.read_text(encoding="utf-8")
    assert path.name == TEMPLATE or not CLOSING.search(text), f"{name} would end its own element"
    return text


def _script() -> str:
    modules: dict[str, str] = {}
    _add_module(ENTRY, modules)
    return '"use strict";\nconst modules = {};\n' + "\n".join(modules.values())


def _add_module(name: str, modules: dict[str, str]) -> None:
    """Add a module as a function, after those that it imports."""
    text = asset(name)
    for imported in dict.fromkeys(found[1] for found in NAMED.findall(text) + WHOLE.findall(text)):
        if imported not in modules:
            _add_module(imported, modules)
    exported = ", ".join(EXPORT.findall(text))
    text = NAMED.sub(r'const { \1 } = modules["\2"];', text)
    text = WHOLE.sub(r'const \1 = modules["\2"];', text)
    text = EXPORT.sub("", text)
    assert not re.search(r"^(import|export)\b", text, re.MULTILINE), f"{name} is not understood"
    modules[name] = f'modules["{name}"] = (() => {{\n{text}return {{ {exported} }};\n}})();'


def _digest(text: str) -> str:
    """The source expression of a content policy that stands for exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
