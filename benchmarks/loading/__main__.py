"""Loading of a model that should not fit: time, memory and bytes read, beside other systems.

python -m benchmarks.loading [--layers 24] [--experts 128] [--repeats 3] [--folder DIR]

Writes a random OLMoE in hub layout and prepared, then runs every arm in processes of its own, in
turn. Peak memory is anonymous memory (without pages of files) above that after the imports, sampled
every two milliseconds. The accelerate arm runs if accelerate is installed. The last line is JSON.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from benchmarks.loading.arms import measure
from benchmarks.loading.settings import LoadingSettings
from routing.cli import run


def main(settings: LoadingSettings) -> None:
    """Run every arm, print the table, then the same as JSON."""
    folder = Path(settings.folder or tempfile.gettempdir(), "expertflow-loading")
    if settings.arm is not None:
        print(json.dumps(measure(settings.arm, folder)))
        return
    from benchmarks.loading.report import report
    from benchmarks.loading.runner import run_arms, write_checkpoints

    try:
        facts = write_checkpoints(settings, folder)
        report(settings, facts, run_arms(settings, folder))
    finally:
        if not settings.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run(main, LoadingSettings, prog="python -m benchmarks.loading")
