"""Experts from cached files to pinned memory: a checkpoint, and the same prepared with --packed.

python -m benchmarks.loading.pinning [--shape olmoe-7b] [--rounds 2] [--folder DIR]

Writes a random checkpoint and prepares it, then loads the experts' host tier in a process of its
own for each arm: one expert after the other, as before there were threads; by threads that read
while the GPU packs; packed ones, read into place; and those in memory that processes share. Every
block of the last two is compared with the checkpoint's. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.loading.pinning_arms import ARMS, measure
from routing.cli import run


@dataclass(frozen=True, kw_only=True)
class PinningSettings:
    """Measure the time until all experts of a model are in pinned memory."""

    shape: str = "olmoe-7b"
    """Model shape, of OLMoE."""
    device: str = "cuda"
    """Device whose kernels read the pinned memory."""
    rounds: int = 2
    """Loads in the process of each arm; the first finds its code and its memory cold."""
    folder: str | None = None
    """Folder for the checkpoints; by default the system's temporary directory."""
    arm: str | None = None
    """Run only this arm, in this process."""
    keep: bool = False
    """Keep the checkpoints, and use existing ones."""


def main(settings: PinningSettings) -> None:
    """Write, load, print the table, then the same as JSON."""
    folder = Path(settings.folder or tempfile.gettempdir(), f"expertflow-pinning-{settings.shape}")
    if settings.arm is not None:
        print(json.dumps(measure(settings.arm, folder, settings.rounds, settings.device)))
        return
    try:
        facts = write_checkpoints(settings.shape, folder)
        print(
            f"written in {facts['write_s']:.1f} s, prepared in {facts['prepare_s']:.1f} s, "
            f"all on the disk {facts['sync_s']:.1f} s later",
            flush=True,
        )
        arms = {}
        for arm in ARMS:
            arms[arm] = in_process(arm, settings)
            print(describe(arm, arms[arm], facts["expert_bytes"]), flush=True)
    finally:
        if not settings.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(record(settings) | facts | {"arms": arms}))


def record(settings: PinningSettings) -> dict[str, Any]:
    """The settings, the machine and the command."""
    import torch

    from benchmarks.common.machine import command, machine

    where = machine(torch.device(settings.device))
    run_by = command("benchmarks.loading.pinning")
    return {"settings": asdict(settings), "machine": where, "command": run_by}


def write_checkpoints(shape: str, folder: Path) -> dict[str, float]:
    """Write what is not there; returns seconds and bytes. Raises ValueError for another model."""
    from benchmarks.common.shapes import NO_TOKENS, shape_named
    from benchmarks.loading.checkpoint import write_olmoe
    from runtime.plan import plan
    from runtime.prepare import prepare

    model = shape_named(shape)
    if model.model_type != "olmoe":
        raise ValueError(f"shape={shape!r} is no OLMoE, whose files are written here")
    start = time.perf_counter()
    if not (folder / "hub").exists():
        (folder / "hub").mkdir(parents=True)
        write_olmoe(folder / "hub", model.options | NO_TOKENS)
    written = time.perf_counter()
    if not (folder / "packed").exists():
        prepare(folder / "hub", folder / "packed", packed=True)
    done = time.perf_counter()
    os.sync()  # writing behind the arms' backs would slow them
    return {
        "expert_bytes": plan(folder / "hub", 1.0).total_expert_bytes,
        "packed_bytes": (folder / "packed" / "experts.bin").stat().st_size,
        "write_s": written - start,
        "prepare_s": done - written,
        "sync_s": time.perf_counter() - done,
    }


def in_process(arm: str, settings: PinningSettings) -> dict[str, Any]:
    """Figures of one arm in a fresh process. Raises ValueError if it fails."""
    command = [sys.executable, "-m", "benchmarks.loading.pinning", f"--arm={arm}"]
    command += [
        f"--shape={settings.shape}",
        f"--rounds={settings.rounds}",
        f"--device={settings.device}",
    ]
    command += [f"--folder={settings.folder}"] if settings.folder else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{arm} failed: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def describe(arm: str, values: dict[str, Any], expert_bytes: float) -> str:
    """A line for each round, and one for what was found afterwards."""
    lines = []
    for one in values["rounds"]:
        parts = ", ".join(f"{name} {one[name]:.2f}" for name in one if name not in ("s", "peak"))
        lines.append(
            f"{arm}: {one['s']:.2f} s, {expert_bytes / one['s'] / 1e9:.2f} GB/s of experts as the "
            f"model has them; peak {one['peak'] / 1e9:.2f} GB; thread-seconds: {parts}"
        )
    found = {name: value for name, value in values.items() if name != "rounds"}
    return "\n".join([*lines, f"    {found}"])


if __name__ == "__main__":
    run(main, PinningSettings, prog="python -m benchmarks.loading.pinning")
