"""Loading a model that should not fit: time, memory and bytes read, beside what else there is.

python -m benchmarks.loading [--layers 24] [--experts 128] [--repeats 3] [--folder DIR]

Writes a random OLMoE as on the Hub and the same prepared, then runs every arm in processes of its
own, in turn. Peak memory is anonymous (without pages of files) above the imports, sampled every two
milliseconds. The accelerate arm runs where accelerate can be imported. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.loading_arms import ARMS, MEMORY, PROMPT, READS, measure
from routing.cli import run


@dataclass(frozen=True, kw_only=True)
class LoadingSettings:
    """Measure how long loading takes, and how much memory."""

    layers: int = 24
    """MoE layers."""
    experts: int = 128
    """Experts of a layer, of 1.5 MiB each; top-8."""
    repeats: int = 3
    """Processes for each arm."""
    folder: str | None = None
    """Where the checkpoints are written; by default the system's temporary directory."""
    arm: str | None = None
    """Run only this arm, in this process."""
    keep: bool = False
    """Keep the checkpoints, and use those that are there."""


def config(settings: LoadingSettings) -> dict[str, Any]:
    """The model: hidden width 1,024, expert width 256, bfloat16."""
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


def main(settings: LoadingSettings) -> None:
    """Print the table, then the same as JSON."""
    folder = Path(settings.folder or tempfile.gettempdir(), "expertflow-loading")
    if settings.arm is not None:
        print(json.dumps(measure(settings.arm, folder)))
        return
    try:
        facts = write_checkpoints(settings, folder)
        report(settings, facts, run_arms(settings, folder))
    finally:
        if not settings.keep:
            shutil.rmtree(folder, ignore_errors=True)


def has_accelerate() -> bool:
    """Whether the third arm can run."""
    import importlib.util

    return importlib.util.find_spec("accelerate") is not None


def plan_arms(with_accelerate: bool) -> list[tuple[str, bool]]:
    """Names of the rows, and whether the page cache is emptied before each process."""
    arms = [arm for arm in ARMS if with_accelerate or "accelerate" not in arm]
    return [(arm, False) for arm in (*arms, *READS)] + [
        (f"{arm} (cold)", True) for arm in (*ARMS[2:], *READS)
    ]


def write_checkpoints(settings: LoadingSettings, folder: Path) -> dict[str, Any]:
    """The hub layout and the prepared one; what the plan says of them."""
    from benchmarks.synthetic import write_olmoe
    from runtime.plan import plan
    from runtime.prepare import prepare

    if not (folder / "hub").exists():
        (folder / "hub").mkdir(parents=True)
        write_olmoe(folder / "hub", config(settings))
    start = time.perf_counter()
    if not (folder / "prepared").exists():
        prepare(folder / "hub", folder / "prepared")
    prepared_s = time.perf_counter() - start
    start = time.perf_counter()
    forecast = plan(folder / "hub", MEMORY)
    return {
        "checkpoint_bytes": sum(path.stat().st_size for path in (folder / "hub").iterdir()),
        "expert_bytes": forecast.total_expert_bytes,
        "forecast_bytes": forecast.resident_bytes,
        "plan_s": time.perf_counter() - start,
        "prepare_s": prepared_s,
    }


def run_arms(settings: LoadingSettings, folder: Path) -> dict[str, dict[str, float]]:
    """Medians over rounds of all arms in turn, so that a slow minute slows them all."""
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
    """Drop the checkpoints' pages from the page cache, or bring them all into it."""
    for path in (*(folder / "hub").iterdir(), *(folder / "prepared").iterdir()):
        with path.open("rb") as file:
            if is_cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not is_cold and file.read(1 << 24):
                pass


def in_process(arm: str, folder: Path) -> dict[str, float]:
    """One arm in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loading", f"--arm={arm}"]
    command.append(f"--folder={folder.parent}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{arm} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report(
    settings: LoadingSettings, facts: dict[str, Any], results: dict[str, dict[str, float]]
) -> None:
    """The table for people, and one line for programs."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from benchmarks.machine import command, machine

    table = Table(
        "arm", "load s", f"{PROMPT}-token prompt s", "peak MiB, loading", "peak MiB", "held MiB"
    )
    reads = Table("arm", "seconds", "GB/s")
    for name, values in results.items():
        if "read_s" in values:
            speed = facts["expert_bytes"] / values["read_s"] / 1e9
            reads.add_row(name, f"{values['read_s']:.2f}", f"{speed:.2f}")
            continue
        sizes = [values[key] / 2**20 for key in ("load_peak_bytes", "peak_bytes", "held_bytes")]
        seconds = f"{values['load_s']:.2f}", f"{values['prompt_s']:.2f}"
        table.add_row(name, *seconds, *(f"{size:,.0f}" for size in sizes))
    where = machine(torch.device("cpu"))
    console = Console(highlight=False, soft_wrap=True)
    console.print(command("benchmarks.loading"), where)
    console.print(table, reads)
    console.print({key: round(value, 2) for key, value in facts.items()})
    print(json.dumps({"settings": asdict(settings), "machine": where, **facts, "arms": results}))


if __name__ == "__main__":
    run(main, LoadingSettings, prog="python -m benchmarks.loading")
