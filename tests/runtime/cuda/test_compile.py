"""The GPU engine's kernels compile for GPUs that are not here, and fit them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
NAMES = {
    "plan", "pick", "fetch", "halt", "gate_up", "down", "join", "unpack", "grouped_gate_up",
    "grouped_down", "combine", "attend_blocks", "join_blocks", "write_tokens", "gather", "project",
    "gate_up_of_one", "sort_pairs", "arrange",
}  # fmt: skip
LEAST_SHARED = 99 << 10
"""Bytes of shared memory that a program may take on a consumer's GPU (8.6, 8.9, 12.0)."""
MOST_STACK = 192
"""Bytes a thread: some spilled registers cost little (a product of 128 rows with some is faster on
an H200 than in tiles without), arrays in memory would."""


@cache
def compiled(capability: int, *names: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.compile_only", str(capability), *names],
            capture_output=True, text=True, check=False, cwd=ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": folder},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        pytest.param(80, ["olmoe-7b"], marks=pytest.mark.exhaustive),
        (90, ["--brief", "gpt-oss-20b"]),
        pytest.param(90, ["gpt-oss-20b"], marks=pytest.mark.exhaustive),
    ],
)
def test_every_kernel_compiles_and_fits_any_gpu(capability: int, names: list[str]) -> None:
    kernels = compiled(capability, *names)
    assert {kernel["name"] for kernel in kernels} == NAMES
    assert all(kernel["shared"] <= LEAST_SHARED for kernel in kernels)
    assert all(kernel["stack"] <= MOST_STACK for kernel in kernels)


def test_a_kernel_is_compiled_once_for_all_layers() -> None:
    """Where a layer's entries lie in a shared tensor is no reason to compile anew."""
    counts = Counter(kernel["name"] for kernel in compiled(80, "olmoe-7b"))
    assert counts["join_blocks"] == 1
    assert counts["write_tokens"] == 2  # to whole rows, and to pages
    assert counts["fetch"] == counts["halt"] == 1
    assert counts["pick"] == 2 * 2  # by forecast and by uses; within a step and around it
    assert counts["attend_blocks"] == 4  # of served rows, in pages, in spilled ones, behind padding
    assert counts["plan"] == 6 + 5 + 2  # prefetching for batches 1, 8, 32; rules; residents, ranges
    assert counts["gate_up"] == 8 + 1 + 2  # there and fetched, by batch; without; residents; ranges
    assert counts["gate_up_of_one"] == 5
    assert counts["down"] == 3 + 1


def test_attention_of_small_heads_compiles_in_any_format() -> None:
    kernels = compiled(90, "small-heads")
    assert {"attend_blocks", "join_blocks", "write_tokens"} == {k["name"] for k in kernels}


def test_activations_with_bounds_compile() -> None:
    names = Counter(kernel["name"] for kernel in compiled(90, "--brief", "bounds"))
    assert names["gate_up_of_one"] == 2  # one for each activation
    assert {"gate_up", "grouped_gate_up"} <= names.keys()


CODED = {
    80: ["olmoe-7b:fp8", "olmoe-7b:int4", "olmoe-7b:nvfp4"],
    90: ["gpt-oss-20b:mxfp4", "olmoe-7b:int4-zeros", "olmoe-7b:mxfp8"],
}


@pytest.mark.parametrize("brief", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.sampled(2)
@pytest.mark.parametrize("capability", CODED)
def test_kernels_of_experts_in_codes_compile_and_fit_any_gpu(capability: int, brief: bool) -> None:
    kernels = compiled(capability, *(["--brief"] if brief else []), *CODED[capability])
    assert {"gate_up", "down", "decode"} <= {kernel["name"] for kernel in kernels}
    assert all(kernel["shared"] <= LEAST_SHARED for kernel in kernels)
    assert all(kernel["stack"] <= MOST_STACK for kernel in kernels)
