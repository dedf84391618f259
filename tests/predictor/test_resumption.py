"""A resumed training is the uninterrupted one: weights, rows of the log, curves and scores."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from predictor.training.checkpoint import find_checkpoint
from predictor.training.module import RouteModule
from tests.helpers.predicting import train, write_trace

OPTIONS = (
    "--trainer.max_epochs=4",
    "--trainer.log_every_n_steps=1",
    "--model.predictor.dropout=0.1",
    "--early_stopping.patience=100",
)
EVERY_THREE = ("--checkpoint.every_n_train_steps=3",)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace") / "rules", num_documents=150)


@pytest.fixture(scope="module")
def whole(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    train(trace, out, *OPTIONS)
    return out


@pytest.fixture(scope="module")
def whole_with_more_checkpoints(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that writes a checkpoint every three steps."""
    out = tmp_path_factory.mktemp("whole")
    train(trace, out, *OPTIONS, *EVERY_THREE)
    return out


class PowerCut(Exception):
    """Ends a run in the middle."""


def cut_off(
    monkeypatch: pytest.MonkeyPatch, trace: Path, out: Path, step: int, *options: str
) -> None:
    """A run that ends with an exception in its step number `step`."""
    original = RouteModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step >= step:
            raise PowerCut
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(RouteModule, "training_step", training_step)
        with pytest.raises(PowerCut):
            train(trace, out, *OPTIONS, *options)


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(out: Path, other: Path) -> None:
    assert rows(out) == rows(other)
    assert (out / "curves.png").read_bytes() == (other / "curves.png").read_bytes()
    one, two = (torch.load(run / "predictor.ckpt", weights_only=True) for run in (out, other))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    assert json.loads(one["expertflow"])["metrics"] == json.loads(two["expertflow"])["metrics"]


def steps_of(out: Path) -> int:
    (last,) = out.rglob("last.ckpt")
    return int(torch.load(last, weights_only=True)["global_step"])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("part", "workers"), [(0.6, 0), (0.5, 0), (0.6, 2)])
def test_a_run_resumed_from_the_end_of_an_epoch_is_the_uninterrupted_one(
    part: float, workers: int, whole: Path, trace: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    option = f"--data.num_workers={workers}"
    cut_off(monkeypatch, trace, tmp_path, int(part * steps_of(whole)), option)
    train(trace, tmp_path, *OPTIONS, option, "--ckpt_path=last")
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("part", "workers"), [(0.4, 0), (0.6, 2)])
def test_a_run_resumed_from_the_middle_of_an_epoch_is_the_uninterrupted_one(
    part: float, workers: int, whole_with_more_checkpoints: Path, trace: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = (*EVERY_THREE, f"--data.num_workers={workers}")
    step = int(part * steps_of(whole_with_more_checkpoints))
    cut_off(monkeypatch, trace, tmp_path, step, *options)
    train(trace, tmp_path, *OPTIONS, *options, "--ckpt_path=last")
    assert_same_run(tmp_path, whole_with_more_checkpoints)


def test_a_run_resumed_into_another_folder_takes_its_log_along(
    whole: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, trace, tmp_path / "one", int(0.6 * steps_of(whole)))
    (last,) = tmp_path.rglob("last.ckpt")
    train(trace, tmp_path / "two", *OPTIONS, f"--ckpt_path={last}")
    assert_same_run(tmp_path / "two", whole)


def test_the_number_of_workers_changes_nothing(whole: Path, trace: Path, tmp_path: Path) -> None:
    train(trace, tmp_path, *OPTIONS, "--data.num_workers=2")
    assert_same_run(tmp_path, whole)


def test_last_is_the_newest_of_several_and_the_mend_is_named_where_there_is_none(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="start without --ckpt_path"):
        find_checkpoint("last", tmp_path)
    with pytest.raises(ValueError, match="name a file"):
        find_checkpoint("best", tmp_path)
    for name in ("last.ckpt", "last-v1.ckpt"):
        (tmp_path / name).write_bytes(b"")
    import os

    os.utime(tmp_path / "last.ckpt", (1, 1))
    assert find_checkpoint("last", tmp_path) == tmp_path / "last-v1.ckpt"
