"""The page's files: what is served, to whom, and what they may do."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2 as httpx
import pytest

from runtime.engine.engine import Engine
from runtime.server.live.page_files import ASSETS, page_files
from runtime.server.settings import ServerSettings
from tests.helpers.http_server import running

MOST_BYTES = 150_000
MOST_LINES = 300
UNSAFE = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|srcdoc"
)


def test_all_files_of_the_page_are_served_with_a_strict_policy(address: str) -> None:
    for path, file in page_files().items():
        response = httpx.get(address + path)
        assert response.content == file.read_bytes()
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert httpx.head(address + path).status_code == 200


def test_the_page_is_small_and_of_readable_files() -> None:
    files = list(ASSETS.iterdir())
    assert set(files) == set(page_files().values())
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    assert all(len(file.read_text().splitlines()) <= MOST_LINES for file in files)


@pytest.mark.parametrize("file", sorted(ASSETS.iterdir()), ids=lambda file: file.name)
def test_a_file_makes_no_html_of_text_and_asks_nobody_else(file: Path) -> None:
    text = file.read_text()
    assert not re.search(UNSAFE, text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\sstyle=|\son\w+=\"", text)


def test_every_module_that_is_imported_is_there() -> None:
    for file in ASSETS.glob("*.js"):
        for name in re.findall(r'from "\./(.+?)"', file.read_text()):
            assert (ASSETS / name).is_file()


def test_the_page_can_be_left_out(engine: Engine) -> None:
    with running(engine, page=False) as address:
        assert httpx.get(address).status_code == 404
        assert httpx.get(f"{address}/page/app.js").status_code == 404
        assert httpx.get(f"{address}/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({}, True),
        ({"page": False}, False),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "page": True}, True),
        ({"replicas": 2}, False),
    ],
)
def test_by_default_the_page_is_for_this_machine(given: dict[str, object], shown: bool) -> None:
    assert ServerSettings(model="models/tiny", **given).has_page is shown  # type: ignore[arg-type]


def test_replicas_have_no_page() -> None:
    with pytest.raises(ValueError, match="page"):
        ServerSettings(model="models/tiny", replicas=2, page=True)
