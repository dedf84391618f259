"""The files of the page, which other pages about experts may take parts of."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
INDEX = "index.html"
FOLDER = "/page/"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def page_files() -> dict[str, Path]:
    """The files by the paths that they are served under."""
    files = sorted(path for path in ASSETS.iterdir() if path.suffix in KINDS)
    return {"/" if path.name == INDEX else FOLDER + path.name: path for path in files}
