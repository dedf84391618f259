"""A trace of two labels and a predictor of its model, shared by the tests of the comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from routing.shards import TraceReader
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import TOPOLOGY, write_labelled


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> TraceReader:
    """Eight documents under each of two labels, of five prompt tokens and 3 to 18 generated."""
    return write_labelled(tmp_path_factory.mktemp("labelled") / "trace", range(8, 24), prompt=5)


@pytest.fixture(scope="session")
def rules_predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_predictor(tmp_path_factory.mktemp("predictor") / "ours.onnx", TOPOLOGY)
