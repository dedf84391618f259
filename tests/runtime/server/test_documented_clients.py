"""The clients in docs/serving.md, each run as it stands against a server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from runtime.engine.engine import Engine
from tests.clients.python_clients import DEFAULT, MODEL, documented_clients
from tests.helpers.http_server import running

NEEDS = {"langchain_openai": "LangChain runs in `make clients`"}
"""Packages that are not in the extra `dev`, and where their blocks are run."""


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    """A server that goes by the name of the document's."""
    with running(engine, name=MODEL) as address:
        yield address


def test_the_document_has_a_client_of_each_kind() -> None:
    blocks = documented_clients(DEFAULT)
    assert [language for language, _ in blocks] == ["python", "python", "bash"]
    for (_, text), name in zip(blocks, ("from openai", "langchain_openai", "curl"), strict=True):
        assert name in text and DEFAULT in text and MODEL in text


@pytest.mark.parametrize("number", range(3), ids=["openai", "langchain", "curl"])
def test_a_documented_client_gets_an_answer(number: int, address: str) -> None:
    language, text = documented_clients(address)[number]
    for package, reason in NEEDS.items():
        if package in text and find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {reason}")
    if language == "bash" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euc", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    assert language == "python" or done.stdout.rstrip().endswith("data: [DONE]")
