"""routing.process.cores: as many threads as there are cores, which sleep while they wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from routing.process import cores
from routing.process.cores import available_cores, wait_passively

ROOT = Path(__file__).parents[2]
SHOW = (
    "import json, os; from routing.process.cores import wait_passively; wait_passively();"
    "print(json.dumps({k: v for k, v in os.environ.items() if k in"
    " ('OMP_WAIT_POLICY', 'KMP_BLOCKTIME', 'GOMP_SPINCOUNT')}))"
)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 6), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 6), ("?", 6)],
)
def test_cores_are_those_of_affinity_and_of_a_containers_quota(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "CGROUP", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert available_cores() == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "9"}),
    ],
)
def test_threads_wait_passively_unless_the_environment_says_otherwise(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    names = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")
    environment = {k: v for k, v in os.environ.items() if k not in names} | given
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert json.loads(shown.stdout) == expected


def test_nothing_is_set_once_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", sys)
    wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize("module", ["trace.collect", "predictor.evaluate"])
def test_commands_wait_passively_before_they_load_torch(module: str, tmp_path: Path) -> None:
    """Seen from the outside: a sitecustomize notes the setting at the import of torch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('torch', os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    (tmp_path / "a.txt").write_text("text")
    options = {
        "trace.collect": ["--model", "exports/moe-8x32", "--dataset", str(tmp_path / "a.txt"),
                          "--out", str(tmp_path / "out")],
        "predictor.evaluate": ["--trace", str(tmp_path)],
    }[module]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if "OMP" not in k}
    shown = subprocess.run(
        [sys.executable, "-m", module, *options], cwd=ROOT, capture_output=True, text=True,
        env=environment | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert shown.stdout == "torch PASSIVE\n"
