"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # these tests are of the CPU, on any machine
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import pytest
import torch

from routing.inspect_model import topology_of
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.tiny import save_tiny, tiny_model
from tests.helpers.tracing import TEXTS, write_texts

torch.set_num_threads(1)

with suppress(ImportError):  # a machine with a GPU may go without
    from hypothesis import settings

    settings.register_profile("thorough", max_examples=200, deadline=None)
    settings.register_profile("brief", max_examples=40, deadline=None)
    settings.load_profile("brief")


LONGEST = (
    "test_compile.py", "test_documents.py", "test_packages.py", "test_wide.py", "test_backend.py",
    "test_prefetch.py", "test_row_decoder.py", "test_decode_and_prefill.py", "test_compiling.py",
    "test_switch.py", "test_prefixes.py", "test_failures.py",
)  # fmt: skip
"""Files that take long although they have few tests: they begin, lest a process end with one."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `sampled(n)`, every n-th parameter runs; the others are exhaustive."""
    met: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None:
            name = item.nodeid.partition("[")[0]
            if met[name] % mark.args[0]:
                item.add_marker(pytest.mark.exhaustive)
            met[name] += 1
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else 99)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_directory(kind)`: a saved tiny model with its tokenizer, made once a session."""
    made: dict[str, Path] = {}

    def directory(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return directory


@pytest.fixture(scope="session")
def tiny_predictor(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_predictor(kind)`: a predictor of that tiny model, made once a session."""
    made: dict[str, Path] = {}

    def path(kind: str) -> Path:
        if kind not in made:
            target = tmp_path_factory.mktemp("predictor") / "predictor.onnx"
            made[kind] = write_predictor(target, topology_of(tiny_model(kind)))
        return made[kind]

    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A text file of twelve short documents."""
    return write_texts(tmp_path / "letters.txt", TEXTS)
