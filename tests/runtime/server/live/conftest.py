"""One server for all tests of the folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from runtime.engine.engine import Engine
from tests.helpers.http_server import running
from tests.helpers.serving import offloaded
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with offloaded(tiny_model("olmoe"), tmp_path_factory.mktemp("live")) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with running(engine) as address:
        yield address
