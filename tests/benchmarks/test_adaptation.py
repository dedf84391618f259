"""Benchmarks of adaptation: corrections learn from the past, and pages show the figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.adaptation.__main__ import GainSettings
from benchmarks.adaptation.__main__ import main as measure_gain
from benchmarks.adaptation.online import OnlineCorrection, OnlineSettings
from benchmarks.adaptation.online import main as replay_online
from benchmarks.adaptation.page import PageSettings
from benchmarks.adaptation.page import main as print_page
from predictor.adaptation import fine_tuning
from routing.shards import TraceReader
from runtime.cache.forecast import Forecast
from tests.helpers.predicting import write_trace
from tests.helpers.starting import start_file


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_file(tmp_path_factory.mktemp("start") / "predictor.onnx")


def wrong_forecast() -> Forecast:
    """Expert 0 is said to be unlikely in every layer, the others to be likely."""
    heads = np.full((4, 2, 3), 0.8, np.float32)
    heads[..., 0] = 0.1
    return Forecast(*heads)


def used_always() -> np.ndarray:
    """Expert 0 alone, in both layers."""
    return np.array([True, False, False] * 2)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_correction_learns_what_the_forecast_misses_in_every_head(rank: int) -> None:
    correction = OnlineCorrection(6, horizon=2, rank=rank)
    for _ in range(300):
        corrected = correction.correct(wrong_forecast())
        correction.learn(used_always())
    for head in corrected[:4]:
        assert (head[:, 0] > 0.6).all() and (head[:, 1:] < 0.4).all()


def test_a_correction_says_nothing_before_it_has_seen_anything() -> None:
    forecast = wrong_forecast()
    corrected = OnlineCorrection(6, horizon=2, rank=4).correct(forecast)
    for ours, theirs in zip(corrected[:4], forecast[:4], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_online_corrections_are_replayed_for_every_label(start: Path, tmp_path: Path) -> None:
    trace, out = write_trace(tmp_path / "trace", num_documents=6), tmp_path / "online.json"
    replay_online(OnlineSettings(trace=trace, predictor=start, max_tokens=60, ranks=[2], out=out))
    results = json.loads(out.read_text())["results"]
    found = [(result["label"], result["correction"]) for result in results]
    assert found == [(TraceReader(trace).labels[0], name) for name in ("none", "rank 2")]
    assert all(len(result["hit_rates"]) == 3 for result in results)


def test_the_gain_of_every_number_of_tokens_is_on_the_page(
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 3)
    trace, out = write_trace(tmp_path / "kind"), tmp_path / "gain.json"
    old = write_trace(tmp_path / "old", seed=3)
    measure_gain(
        GainSettings(
            traces=[trace], predictor=start, replay=[old], tokens=[200, 400], out=out,
            max_eval_tokens=200, simulated_tokens=50,
        )
    )  # fmt: skip
    capsys.readouterr()
    print_page(PageSettings(results=out))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| kind |")]
    assert len(rows) == 3 * (1 + 2)  # three tables: a head, and a row for each number
