"""The setting of the mixins: stock and offloaded models, their inputs, and how results compare."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import runtime
from tests.helpers.tiny import PAD, save_tiny, tiny_model

ARCHITECTURES = ("olmoe", "mixtral", "qwen3_moe", "gpt_oss")
WAYS = ("module", "directory")

Check = Callable[[Any], Any]
"""Uses a model as people do, and returns whatever it computes: tensors in containers."""


@cache
def directory(architecture: str) -> Path:
    """The tiny model's directory, saved once a process."""
    return save_tiny(tempfile.mkdtemp(prefix="mixins-"), architecture)


def stock(architecture: str) -> Any:
    return tiny_model(architecture)


def offloaded(architecture: str, way: str) -> Any:
    """A quarter of the experts resident, given as a module or as a directory."""
    given = tiny_model(architecture) if way == "module" else directory(architecture)
    return runtime.load(given, memory=0.25)


def token_ids(batch: int = 3, length: int = 9, seed: int = 1) -> Tensor:
    """Random tokens, int64 [batch, length], without padding."""
    return torch.randint(2, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, Tensor]:
    """Three prompts of 12, 7 and 9 tokens, padded at the left."""
    ids_BT = token_ids(3, 12)
    mask_BT = torch.ones_like(ids_BT)
    for row, padding in enumerate((0, 5, 3)):
        ids_BT[row, :padding], mask_BT[row, :padding] = PAD, 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def assert_same(found: Any, expected: Any) -> None:
    """Assert that two nested results agree: whole numbers exactly, floats to rounding."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor) and found.dtype == expected.dtype
        scale = 1e-5 * max(1.0, float(expected.detach().abs().float().nan_to_num(0, 0, 0).max()))
        tolerance = scale if expected.is_floating_point() else 0
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, equal_nan=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def assert_gives(check: Check, architecture: str, way: str, expected: Any) -> None:
    """Assert that `check` of an offloaded model gives what is expected, and leaves it sound."""
    model = offloaded(architecture, way)
    assert_same(check(model), expected)
    model.expertflow.check_integrity()
