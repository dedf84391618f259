"""A trace of two labels and a predictor of its model, shared by the tests of the comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from routing.shards import TraceReader
from routing.writer import TraceWriter
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import TOPOLOGY, random_document


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> TraceReader:
    """Eight documents under each of two labels, of five prompt tokens and 3 to 18 generated."""
    directory = tmp_path_factory.mktemp("labelled") / "trace"
    generator = np.random.default_rng(4)
    with TraceWriter(directory, TOPOLOGY, provenance={"model": "rules"}) as writer:
        for number in range(16):
            document = random_document(generator, 8 + number, 5)
            writer.add({"decoder": document._replace(label="even" if number % 2 else "odd")})
    return TraceReader(directory)


@pytest.fixture(scope="session")
def rules_predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_predictor(tmp_path_factory.mktemp("predictor") / "ours.onnx", TOPOLOGY)
