"""The extra `ray`, where it is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from routing import cluster
from routing.cli import run
from runtime.batch.command import PROG, main
from runtime.serving.batch import ray_workers
from runtime.serving.batch.settings import BatchSettings
from tests.helpers.tiny import save_tiny
from trace.collect import collect
from trace.settings import CollectSettings


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "ray", None)
    return save_tiny(tmp_path / "model", "olmoe")


def test_a_batch_over_workers_says_what_to_install(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    words = [f"--model={model}", f"--dataset={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'o'}"]
    with pytest.raises(SystemExit) as stopped:
        run(main, BatchSettings, [*words, "--workers=2"], prog=PROG)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said == f"{PROG}: error: workers need Ray: install moe-expertflow[ray]\n"


def test_a_trace_over_workers_says_what_to_install(model: Path, data: Path, tmp_path: Path) -> None:
    settings = CollectSettings(
        model=str(model), dataset=[str(data)], out=str(tmp_path / "out"), workers=2
    )
    with pytest.raises(ValueError, match=r"install moe-expertflow\[ray\]"):
        collect(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "gpus", "each"),
    [(None, 2, 1), (None, 0, 0), ("cpu", 2, 0), ("cuda", 2, 1), ("cuda:0", 0, 1)],
)
def test_a_worker_gets_a_gpu_where_it_computes_on_one(
    device: str | None, gpus: int, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, actors = Mock(), Mock()
    ray.cluster_resources.return_value = {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {})
    ray.remote.return_value = lambda _: actors
    monkeypatch.setattr(cluster, "connect", lambda: ray)
    monkeypatch.setattr(ray_workers, "connect", lambda: ray)
    settings = BatchSettings(model="m", dataset="d", out=tmp_path / "o", workers=2, device=device)
    if each > gpus:
        with pytest.raises(ValueError, match="2 workers of 1 GPUs each"):
            ray_workers.Crew(settings)
        return
    ray_workers.Crew(settings)
    assert ray.remote.call_args.kwargs["num_gpus"] == each
    assert actors.remote.call_count == 2


@pytest.mark.parametrize("options", [{"workers": -1}, {"worker_cpus": 0}])
def test_workers_that_cannot_be_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CollectSettings(model="m", dataset=["d"], out="o", **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        BatchSettings(model="m", dataset="d", out=tmp_path / "o", **options)
