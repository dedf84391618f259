"""benchmarks.ordering: forecasts of recorded texts, and orders over a cache that only counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.ordering.__main__ import main
from benchmarks.ordering.page import ordering
from benchmarks.ordering.settings import OrderingSettings
from benchmarks.ordering.simulation import Order, OrderedRun
from benchmarks.ordering.texts import Foretold, foretell, true_forecast
from benchmarks.replay.recorded_requests import recorded_requests
from routing.predictor_file.driver import Past
from routing.predictor_file.reader import open_predictor
from runtime.prediction.sequence_forecaster import SequenceForecaster
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import TOPOLOGY, write_trace

PROMPT, NEW = 3, 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ordering")
    return {
        "trace": write_trace(folder / "trace", num_documents=12, seed=5),
        "predictor": write_predictor(folder / "predictor.onnx", TOPOLOGY, window=16),
    }


@pytest.fixture(scope="module")
def texts(files: dict[str, Path]) -> list[Foretold]:
    _, recorded = recorded_requests(
        files["trace"], 6, prompt_tokens=[PROMPT] * 2, output_tokens=[NEW] * 2, seed=0
    )
    file = open_predictor(files["predictor"])
    return list(foretell(file, list(recorded.values()), PROMPT))


def test_a_text_is_foretold_as_serving_reads_it_token_by_token(
    files: dict[str, Path], texts: list[Foretold]
) -> None:
    file = open_predictor(files["predictor"])
    forecaster, text = SequenceForecaster(file), texts[0]
    tokens, routes_TLK = text.recorded.token_ids_T, text.recorded.experts_TLK.astype(np.int64)
    past = Past(file, 1)
    served = forecaster.read_prompt(past, tokens[:PROMPT].tolist())
    assert np.allclose(text.mean_use_LE, served.mean_use_LE, atol=1e-3)
    for at in range(NEW):
        told = text.forecast(at)
        assert np.allclose(told.unused_LE, served.unused_LE, atol=1e-3)
        assert np.allclose(told.unused_later_HLE, served.unused_later_HLE, atol=1e-3)
        token = [int(tokens[PROMPT + at])]
        (served,) = forecaster.step([past], token, routes_TLK[PROMPT + at - 1][None], [served])


def test_the_true_forecast_names_the_routes_that_follow(texts: list[Foretold]) -> None:
    text = texts[1]
    for at in range(NEW + 1):
        pending = text.recorded.experts_TLK[:PROMPT] if at == 0 else None
        if pending is None:
            pending = text.recorded.experts_TLK[PROMPT + at - 1][None]
        unused_LE = true_forecast(text, at).unused_LE
        for layer in range(unused_LE.shape[0]):
            assert set(np.flatnonzero(unused_LE[layer] == 0)) == set(pending[:, layer].ravel())


def run_of(name: str, texts: list[Foretold], files: dict[str, Path]) -> OrderedRun:
    file = open_predictor(files["predictor"])
    return OrderedRun(
        texts, Order.of(name, 2), file.stack, residency=0.5, load_s=1.0, horizon=file.horizon,
        output_tokens=[2, NEW], seed=1,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["arrival", "predicted", "true", "twice", "served"])
def test_requests_end_under_every_order_and_steps_are_counted(
    name: str, texts: list[Foretold], files: dict[str, Path]
) -> None:
    run = run_of(name, texts, files)
    steps = [run.step() for _ in range(30)]
    batch = Order.of(name, 2).batch
    assert run.ended >= 30 * batch // (2 * NEW)
    assert sum(step.loads for step in steps) > 0
    assert all(step.tokens <= Order.of(name, 2).rows + batch for step in steps)
    decodes = [step for step in steps if step.decode_steps]
    assert decodes and all(0 < step.used <= 1 for step in decodes)


def test_a_name_that_is_no_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order='best' is not one of arrival, predicted"):
        Order.of("best", 8)


def test_the_benchmark_compares_every_order_with_arrival(
    files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "ordering.json"
    options: dict[str, Any] = {"batches": [2], "texts": 6, "steps": 10, "tokens": 30}
    main(
        OrderingSettings(
            trace=files["trace"],
            predictor=files["predictor"],
            prompt_tokens=PROMPT,
            output_tokens=[2, NEW],
            out=out,
            **options,
        )
    )
    document = json.loads(out.read_text())
    assert [row["order"] for row in document["rows"]] == [
        "arrival", "predicted", "true", "twice", "served",
    ]  # fmt: skip
    *_, row = ordering(document)
    assert row.startswith("| 2 |") and row.count("%)") == 4
