"""Runner of the loading arms: checkpoints on disk, then every arm in processes of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.loading.arms import ARMS, MEMORY, READS
from benchmarks.loading.checkpoint import write_olmoe
from benchmarks.loading.settings import LoadingSettings
from runtime.plan import plan
from runtime.prepare import prepare


def config(settings: LoadingSettings) -> dict[str, Any]:
    """The model's configuration: hidden width 1,024, expert width 256."""
    return {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 256,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": settings.experts,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 2048,
        "eos_token_id": 0,
    }


def has_accelerate() -> bool:
    """Whether accelerate's arm can run."""
    return importlib.util.find_spec("accelerate") is not None


def plan_arms(with_accelerate: bool) -> list[tuple[str, bool]]:
    """(arm, cold): cold empties the page cache before each process."""
    arms = [arm for arm in ARMS if with_accelerate or "accelerate" not in arm]
    return [(arm, False) for arm in (*arms, *READS)] + [
        (f"{arm} (cold)", True) for arm in (*ARMS[2:], *READS)
    ]


def write_checkpoints(settings: LoadingSettings, folder: Path) -> dict[str, Any]:
    """Write the checkpoint in hub layout, prepared, and packed; return sizes and the plan's
    forecast.
    """
    if not (folder / "hub").exists():
        (folder / "hub").mkdir(parents=True)
        write_olmoe(folder / "hub", config(settings))
    start = time.perf_counter()
    if not (folder / "prepared").exists():
        prepare(folder / "hub", folder / "prepared")
    prepared_s = time.perf_counter() - start
    start = time.perf_counter()
    if not (folder / "packed").exists():
        prepare(folder / "hub", folder / "packed", packed=True)
    packed_s = time.perf_counter() - start
    start = time.perf_counter()
    forecast = plan(folder / "hub", MEMORY)
    return {
        "checkpoint_bytes": sum(path.stat().st_size for path in (folder / "hub").iterdir()),
        "expert_bytes": forecast.total_expert_bytes,
        "forecast_bytes": forecast.resident_bytes,
        "plan_s": time.perf_counter() - start,
        "prepare_s": prepared_s,
        "prepare_packed_s": packed_s,
    }


def run_arms(settings: LoadingSettings, folder: Path) -> dict[str, dict[str, float]]:
    """Medians over rounds of all arms in turn, so that a slow minute slows every arm."""
    arms = plan_arms(has_accelerate())
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name, _ in arms}
    for _ in range(settings.repeats):
        for name, is_cold in arms:
            touch_files(folder, is_cold)
            rounds[name].append(in_process(name.removesuffix(" (cold)"), folder))
            shutil.rmtree(folder / "offload", ignore_errors=True)
    return {
        name: {key: statistics.median(values[key] for values in found) for key in found[0]}
        for name, found in rounds.items()
    }


def touch_files(folder: Path, is_cold: bool) -> None:
    """Drop the checkpoints' pages from the page cache if `is_cold`, else read them all into it."""
    folders = (folder / name for name in ("hub", "prepared", "packed"))
    for path in (path for one in folders for path in one.iterdir()):
        with path.open("rb") as file:
            if is_cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not is_cold and file.read(1 << 24):
                pass


def in_process(arm: str, folder: Path) -> dict[str, float]:
    """Results of one arm in a fresh process. Raises ValueError if it fails."""
    command = [sys.executable, "-m", "benchmarks.loading", f"--arm={arm}"]
    command.append(f"--folder={folder.parent}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{arm} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
