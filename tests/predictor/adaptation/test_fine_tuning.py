"""Fine-tuning: what is learnt, what is kept, and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from predictor.adaptation import fine_tuning
from predictor.adaptation.division import Division, divide
from predictor.adaptation.fine_tuning import Tuning, fine_tune, loss_on
from predictor.adaptation.graph import GraphPredictor
from predictor.adaptation.recalibration import calibration_json, recalibrate
from predictor.adaptation.settings import AdaptationSettings
from predictor.adaptation.starting import open_start
from predictor.networks.windows import PredictorShape
from routing.shards import TraceReader
from routing.writer import TraceWriter
from tests.helpers.predicting import (
    NUM_EXPERTS,
    TOPOLOGY,
    random_document,
    shape,
    write_trace,
)
from tests.helpers.starting import start_file


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_file(tmp_path_factory.mktemp("start") / "predictor.onnx")


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Division:
    return divided(write_trace(tmp_path_factory.mktemp("new") / "trace"))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Division:
    """Documents whose routes are those of other rules: each expert's neighbour instead."""
    directory, generator = tmp_path_factory.mktemp("old") / "trace", np.random.default_rng(1)
    with TraceWriter(directory, TOPOLOGY, provenance={}) as writer:
        for _ in range(60):
            made = random_document(generator, 30)
            experts = ((made.experts_TLK + 1) % NUM_EXPERTS).astype(np.uint8)
            tokens = (made.token_ids_T // 6 * 6 + 5).astype(np.int32)
            writer.add({"decoder": made._replace(token_ids_T=tokens, experts_TLK=experts)})
    return divided(directory)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 40)
    monkeypatch.setattr(fine_tuning, "ROW_TOKENS", 32)


def divided(directory: Path) -> Division:
    return divide([TraceReader(directory)], share=0.15, most_tokens=10_000)


def tiny_shape() -> PredictorShape:
    return shape(window=6)


def tune(graph: GraphPredictor, new: Division, old: Division | None = None, **how: Any) -> Tuning:
    options = {"learning_rate": 0.02, "passes": 4} | how
    settings = AdaptationSettings(trace=[Path("unused")], **options)
    return fine_tune(graph, tiny_shape(), new, old, settings)


def test_the_loss_of_documents_that_are_not_trained_on_falls(start: Path, new: Division) -> None:
    graph = open_start(start).graph()
    before = loss_on(graph, new.held_out, tiny_shape())
    tuning = tune(graph, new)
    assert loss_on(graph, new.held_out, tiny_shape()) < 0.8 * before
    assert tuning.best.loss < tuning.looks[0].loss and tuning.reason == "all steps were taken"


def test_a_replayed_trace_is_remembered_better(start: Path, new: Division, old: Division) -> None:
    losses = []
    for replayed in (None, old):
        graph = open_start(start).graph()
        tune(graph, old)
        tune(graph, new, replayed)
        losses.append(loss_on(graph, old.held_out, tiny_shape()))
    forgotten, remembered = losses
    assert remembered < 0.9 * forgotten


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_every_step_has_new_text_and_replayed_text(
    start: Path, new: Division, old: Division, share: float
) -> None:
    tuning = tune(open_start(start).graph(), new, old, replay_share=share, minutes=1e-6)
    assert tuning.looks[-1].step == 1


def test_the_best_weights_are_kept_where_later_steps_spoil_them(start: Path, new: Division) -> None:
    graph = open_start(start).graph()
    tuning = tune(graph, new, learning_rate=30.0)
    assert tuning.best.step == 0
    assert loss_on(graph, new.stopping, tiny_shape()) == pytest.approx(tuning.looks[0].loss)


def test_it_stops_early_where_looks_bring_nothing(start: Path, new: Division) -> None:
    tuning = tune(open_start(start).graph(), new, learning_rate=30.0, patience=2)
    assert tuning.reason == "2 looks in a row brought nothing" and len(tuning.looks) == 3


def test_it_stops_when_the_time_is_over(start: Path, new: Division) -> None:
    tuning = tune(open_start(start).graph(), new, minutes=1e-6)
    assert tuning.looks[-1].step == 1 and "minutes were over" in tuning.reason


def test_equal_seeds_give_equal_weights(start: Path, new: Division) -> None:
    graphs = [open_start(start).graph() for _ in range(2)]
    for graph in graphs:
        tune(graph, new, passes=1)
    for one, other in zip(*(graph.parameters() for graph in graphs), strict=True):
        assert torch.equal(one, other)


def test_recalibration_mends_logits_that_are_too_sure(start: Path, new: Division) -> None:
    graph = open_start(start).graph()
    tune(graph, new)
    calibration = graph.calibration()
    assert calibration is not None
    recalibrate(graph, [new.train], tiny_shape())
    fitted = calibration_json(graph)
    with torch.no_grad():
        calibration[0].mul_(3)
        calibration[1].add_(1)
    recalibrate(graph, [new.train], tiny_shape())
    for head, pair in calibration_json(graph).items():
        assert pair == pytest.approx(fitted[head], rel=0.02, abs=0.02)


@pytest.mark.parametrize(
    "wrong", [{"replay_share": 1.0}, {"held_out": 0.5}, {"minutes": 0.0}, {"passes": 0}]
)
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"--{name}"):
        AdaptationSettings(trace=[Path("trace")], **wrong)
