"""The terminal of a training run: lines and tables in words, nothing of the framework's."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from predictor.networks.windows import PredictorShape
from predictor.training.progress import epoch_line, header, print_scores, score_rows
from tests.helpers.predicting import write_trace

ROOT = Path(__file__).parents[2]
SHAPE = PredictorShape(
    num_layers=2, num_experts=8, top_k=2, vocab_size=9, window=8, horizon=3
)  # fmt: skip
PER_LAYER = {"recall": [0.5, 0.7], "recall_1_5k": [0.8, 0.8], "precision": [0.25, 0.35]}
PER_LAYER["calibration_error"] = [0.01, math.nan]
REPORT = {f"{head}_known": PER_LAYER for head in ("this", "next", "horizon", "far")}
NOISE = ("Tip:", "GPU available", "deprecated", "log files", "Seed set", "Warning", "litlogger")


def test_an_epoch_line_stands_under_its_header() -> None:
    logged = {"train/loss": 1.5, "val/loss": 1.25, "val/this_known_recall": 0.5}
    first, second = header(4)
    line = epoch_line(3, 57, logged, 12.34)
    assert len(first) == len(second) == len(line) <= 100
    assert line.split() == ["3", "57", "1.500", "1.250", "0.500", "-", "-", "12.3"]


def test_tokens_are_scored_by_recall_and_horizons_by_precision() -> None:
    rows = {row[0]: row[2:] for row in score_rows(REPORT, SHAPE) if row[0]}
    assert rows["this token"] == ["0.600", "0.800", "", "0.010"]
    assert rows["the next 3 tokens"] == ["", "", "0.300", "0.010"]


def test_no_table_says_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_scores(REPORT | {"this_known": {"recall": [math.nan] * 2}}, SHAPE, "2 documents")
    said = capsys.readouterr().out
    assert "nan" not in said and "recall@2" in said and "recall@3" in said
    assert max(map(len, said.splitlines())) <= 100


def test_a_training_run_prints_its_lines_and_nothing_of_the_framework(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace", num_documents=60)
    command = [
        sys.executable, "-m", "predictor.train", "fit", f"--data.trace={trace}",
        f"--trainer.default_root_dir={tmp_path / 'out'}", "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2", "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_model_summary=false", "--data.val_fraction=0.15",
        "--data.test_fraction=0.15", "--data.window=8", "--data.horizon=2", "--data.row_tokens=64",
        "--model.predictor=predictor.networks.causal.CausalSettings",
        "--model.predictor.width=48", "--model.predictor.blocks=1",
        "--model.predictor.attention_heads=2", "--model.predictor.embedding_rank=12",
    ]  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.csv").write_text("an earlier run's\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [word for word in NOISE if word in done.stdout + done.stderr] == []
    lines = done.stdout.splitlines()
    assert lines[0].startswith("training a causal predictor of ")
    assert [line.split()[0] for line in lines[3:5]] == ["1", "2"]
    assert lines[-1].startswith("wrote predictor.ckpt, summary.json")
    assert max(map(len, lines[:-1])) <= 100
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["checkpoint"] == str(tmp_path / "out" / "predictor.ckpt")
    assert 0 < summary["this_known_recall"] <= 1
