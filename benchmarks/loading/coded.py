"""Loading of a quantised checkpoint of any size: time until the experts are in place.

python -m benchmarks.loading.coded [--encoding mxfp4] [--gigabytes 20] [--folder DIR]

Writes random codes in the tensor layout of gpt-oss (mxfp4) or Qwen3's fp8 models, then loads the
directory and runs a prompt. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from routing.cli import run


@dataclass(frozen=True, kw_only=True)
class CodedLoadingSettings:
    """Measure the time that loading experts in codes takes."""

    encoding: str = "mxfp4"
    """mxfp4, in the layout of gpt-oss-120b; or fp8, in that of Qwen3-30B-A3B."""
    shape: str | None = None
    """Model shape, in place of the encoding's own."""
    gigabytes: float = 20.0
    """Bytes of the experts, to the next layer."""
    memory: str = "0.25"
    """Memory budget, as `load` takes it."""
    device: str = "cuda"
    """Device that computes."""
    cold: bool = False
    """Drop the files from the page cache first."""
    folder: str | None = None
    """Folder for the checkpoint; by default the system's temporary directory."""
    keep: bool = False
    """Keep the checkpoint, and use an existing one."""


def main(settings: CodedLoadingSettings) -> None:
    """Write, load, print the times, then the same as JSON."""
    import torch

    from benchmarks.common.machine import command, machine

    folder = Path(settings.folder or tempfile.gettempdir(), f"expertflow-{settings.encoding}")
    try:
        values = measure(settings, folder)
    finally:
        if not settings.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{settings.encoding}: {values['bytes'] / 1e9:.1f} GB loaded in {values['load_s']:.1f} s "
        f"({values['bytes'] / values['load_s'] / 1e9:.2f} GB/s), the first prompt in "
        f"{values['prompt_s']:.2f} s; written in {values['write_s']:.1f} s"
    )
    where = machine(torch.device(settings.device))
    facts = {"settings": asdict(settings), "machine": where}
    print(json.dumps(facts | {"command": command("benchmarks.loading.coded")} | values))


def measure(settings: CodedLoadingSettings, folder: Path) -> dict[str, float]:
    """Seconds and bytes by name."""
    import torch
    import transformers

    import runtime
    import runtime.loading
    from benchmarks.common.shapes import shape_named
    from benchmarks.loading.coded_checkpoint import write_coded

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    shape = None if settings.shape is None else shape_named(settings.shape)
    if not folder.exists():
        write_coded(folder, settings.encoding, settings.gigabytes * 1e9, shape)
    written = time.perf_counter()
    if settings.cold:
        _drop(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    begun = time.perf_counter()
    model = runtime.load(folder, memory=settings.memory, device=settings.device)
    loaded = time.perf_counter()
    with torch.inference_mode():
        model(torch.arange(1, 33, device=settings.device)[None])
        _wait(settings.device)
    done = time.perf_counter()
    model.expertflow.close()
    return {
        "bytes": size,
        "write_s": written - start,
        "load_s": loaded - begun,
        "prompt_s": done - loaded,
    }


def _drop(folder: Path) -> None:
    """Write the files out, and drop their pages from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _wait(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run(main, CodedLoadingSettings, prog="python -m benchmarks.loading.coded")
