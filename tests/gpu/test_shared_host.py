"""One copy of the experts in pinned memory for several processes that use a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import runtime
from runtime.cuda.memory import shared_memory
from runtime.prepare import prepare
from runtime.weights.prepared.store import PreparedStore
from tests.gpu.offloaded import NEW, ROOT, check_slots, generate, needs_gpu
from tests.helpers.tiny import tiny_model

pytestmark = needs_gpu
OTHER = """
import sys
from unittest.mock import patch
from tests.gpu.test_shared_host import load, tokens
from runtime.weights.prepared.store import PreparedStore

with patch.object(PreparedStore, "read_packed", side_effect=AssertionError("read again")):
    print(tokens(load(sys.argv[1], host="shared")))
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts packed as they are kept, in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3}
    model: Any = tiny_model("olmoe", **sizes)
    model.bfloat16().save_pretrained(folder / "hub")
    return Path(prepare(folder / "hub", folder / "packed", packed=True))


def load(path: str | Path, **options: Any) -> Any:
    return runtime.load(
        path, device="cuda", memory=0.4, context=64, batch=2, cpu_share=False, **options
    )


def tokens(model: Any) -> list[list[int]]:
    """Those of two rows; the engine is closed afterwards."""
    found: list[list[int]] = generate(model, 2).tolist()
    check_slots(model)
    model.expertflow.close()
    return found


def copies() -> set[Path]:
    return set(shared_memory.FOLDER.glob("expertflow-*"))


def test_two_processes_use_one_copy_and_give_the_tokens_of_one_alone(prepared: Path) -> None:
    before = copies()
    want = tokens(load(prepared))
    assert len(want[0]) > NEW
    first = load(prepared, host="shared")
    assert len(copies() - before) == 1
    other = [sys.executable, "-c", OTHER, str(prepared)]
    done = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(want)
    assert tokens(first) == want
    assert copies() == before, "the last one removes it"


def test_one_that_loads_while_another_decodes_disturbs_nothing(prepared: Path) -> None:
    want = tokens(load(prepared))
    first = load(prepared, host="shared")
    with patch.object(PreparedStore, "read_packed", side_effect=AssertionError("read again")):
        second = load(prepared, host="shared")
    for _ in range(3):
        assert generate(first, 2).tolist() == generate(second, 2).tolist() == want
    assert tokens(second) == want
    assert torch.equal(generate(first, 2), torch.tensor(want))
    assert tokens(first) == want
