"""Compiled decode steps: seconds to the first one, with empty and filled caches; the switch of
compile="auto"; and how far their logits are from those of plain steps, by setting and operation.

python -m benchmarks.compiling [--shape olmoe-7b] [--encoding mxfp4] [--tokens 128]

Every arm is a process of its own; caches lie in a temporary folder. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compiling.settings import CompilingSettings
from routing.cli import run

KEPT = "expertflow"
"""The folder within the caches that is ours: what a restart of the machine leaves."""


def main(settings: CompilingSettings) -> None:
    """Run every arm and print what it found, then all of it as JSON."""
    if settings.arm is not None:
        from benchmarks.compiling.arms import run_arm

        print(json.dumps(run_arm(settings)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = Path(folder, "caches")
        found["first load"] = _measured("first", settings, caches)
        found["second load"] = _measured("second", settings, caches)
        for path in caches.iterdir():
            if path.name != KEPT and path.is_dir():
                shutil.rmtree(path)
        found["second load, torch's caches lost"] = _measured("second", settings, caches)
        found["auto"] = _measured("auto", settings, Path(folder, "other caches"))
        found["numbers"] = _measured("numbers", settings, Path(folder, "more caches"))
    print(json.dumps(found))


def _measured(arm: str, settings: CompilingSettings, caches: Path) -> dict[str, Any]:
    given = asdict(settings) | {"arm": arm}
    options = [f"--{name}={value}" for name, value in given.items()]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiling", *options], text=True, capture_output=True,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches)},
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    found = {"error": done.stderr[-2000:]} if done.returncode else json.loads(lines[-1])
    print(f"{arm}, {time.perf_counter() - start:.1f} s in all: {json.dumps(found, indent=1)}")
    sys.stdout.flush()
    return dict(found)


if __name__ == "__main__":
    run(main, CompilingSettings, prog="python -m benchmarks.compiling")
