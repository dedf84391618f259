"""The GPU engine's kernels, compiled for an architecture that is not here.

    python -m tests.helpers.compile_only 90 olmoe-7b gpt-oss-20b
    python -m tests.helpers.compile_only 90 gpt-oss-20b:mxfp4
    python -m tests.helpers.compile_only 90 --brief gpt-oss-20b:mxfp4

Briefly: every kernel, of the fewest and the most rows, under one policy of either kind.
Launches are caught, so nothing runs: what Triton and ptxas make of the kernels at the sizes of
published models comes back, one JSON line a kernel: its name, registers a thread, bytes of shared
memory, and bytes of stack (spilled registers).
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import pytest
import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from routing.layers import Routes
from runtime.cache.expert_cache import ExpertCache
from runtime.cache.policies import LFU, LRU
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.class_lru import ClassLRU
from runtime.cache.rules.reuse import Reuse
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.kernels.attention import attend
from runtime.cuda.kernels.new_tokens import write
from runtime.cuda.memory import host_dense as dense
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.memory.unpacking import unpack_blocks
from runtime.cuda.prefill.products import Products, Work, combined, sort
from runtime.cuda.prefill.tiling import LEAST_ROWS, heights_for
from runtime.kv.pages.places import PAGE, Paged, Spilled
from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from runtime.weights.gated_experts import BOUNDED
from runtime.weights.packed.packing import PATCHES
from tests.helpers.device_twins import coding_of, specs_of
from tests.helpers.fake_cuda import without_streams

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CPU = torch.device("cpu")


class Size(NamedTuple):
    """What kernels see of a model."""

    hidden: int
    width: int
    num_experts: int
    top_k: int
    num_slots: int
    """A quarter of the model's experts."""
    heads: int
    groups: int
    """Key/value heads."""
    head_dim: int
    vocabulary: int
    num_layers: int
    is_oss: bool = False
    """Expert biases, alternating gate and up rows, attention sinks and a window."""


SIZES = {
    "olmoe-7b": Size(2048, 1024, 64, 8, 256, 16, 16, 128, 50304, 16),
    "qwen3-30b-a3b": Size(2048, 768, 128, 8, 1536, 32, 4, 128, 151936, 48),
    "mixtral-8x7b": Size(4096, 14336, 8, 2, 64, 32, 8, 128, 32000, 32),
    "gpt-oss-20b": Size(2880, 2880, 32, 4, 192, 64, 8, 64, 201088, 24, is_oss=True),
}


class Absent:
    """Triton's driver for a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Stands in for launches: what would run is compiled."""

    def __init__(self, capability: int) -> None:
        driver.set_active(Absent(capability))
        self.found: dict[str, dict[str, Any]] = {}
        """By the hash of the kernel."""
        run: Any = JITFunction.run

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
            self.found.setdefault(compiled.hash, {"name": kernel.__name__} | usage(compiled))

        JITFunction.run = compile_only


def usage(compiled: Any) -> dict[str, int]:
    """What a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", said))
    return {
        "registers": int(numbers["REG"]),
        "shared": compiled.metadata.shared,
        "stack": int(numbers["STACK"]),
    }


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of any size that takes no memory: nobody looks at it."""
    return torch.zeros((), dtype=dtype).expand(shape)


ENCODINGS: dict[str, Callable[[int, int], Encoding]] = {
    "mxfp4": lambda n, k: MXFP4(),
    "fp8": lambda n, k: FP8Block(rows=math.gcd(n, 128), columns=128),
    "fp8-row": lambda n, k: FP8Block(columns=k, product=torch.bfloat16),
    "mxfp8": lambda n, k: FP8Block(columns=32, scale=torch.uint8),
    "int4": lambda n, k: Int4Group(columns=math.gcd(k, 128)),
    "int4-zeros": lambda n, k: Int4Group(columns=16, scale=torch.float16, zeros=True),
    "nvfp4": lambda n, k: NVFP4(rows=n, divides=True),
}
"""Of a matrix [N, K]; as `size:encoding` they follow a size."""


class Kernels:
    """Launches every kernel at one size, of packed bfloat16 experts or of those in an encoding."""

    def __init__(self, size: Size, encoding: str = "", **layout: Any) -> None:
        """layout: fields of the layout that are others than the size's."""
        self.size = size
        own: dict[str, Any] = {
            "hidden": size.hidden, "width": size.width, "transposed": size.is_oss,
            "has_bias": size.is_oss, "activation": "clamped_swiglu" if size.is_oss else "silu",
            "alternating": size.is_oss, "dtype": torch.bfloat16,
        }  # fmt: skip
        self.layout = KernelLayout(**own | layout)
        specs = specs_of(self.layout)
        coding = coding_of(specs, ENCODINGS[encoding]) if encoding else None
        self.expert_block = ExpertBlock(specs, 0 if encoding else PATCHES[0], coding)
        self.slots_SN = empty(size.num_slots, self.expert_block.stored_units, dtype=torch.int16)
        self.layers = [
            empty(size.num_experts, self.expert_block.stored_units, dtype=torch.int16)
        ] * size.num_layers

    def decode(
        self, batch: int, policy: type[Policy], *, prefetch: bool = False, resident: bool = False,
        num_ranges: int = 1,
    ) -> None:  # fmt: skip
        """Two layers of a captured step, and the last."""
        size, options = self.size, {"horizon": 4} if policy is PredictedReuse else {}
        shape = size.num_layers, size.num_experts
        cache = ExpertCache(*shape, size.num_slots, policy(*shape, **options))
        host: Any = self
        router = nn.Linear(size.hidden, size.num_experts, size.is_oss, dtype=torch.bfloat16)
        call = ExpertsCall(
            batch, size.top_k, self.layout, self.expert_block, self.slots_SN, host,
            DeviceCache(cache, size.num_layers, CPU), prefetch=prefetch, resident=resident,
            num_ranges=num_ranges, routers=[router] * size.num_layers,
            chances=torch.zeros(2, math.prod(shape)) if policy is PredictedReuse else None,
        )  # fmt: skip
        x = torch.zeros(batch, size.hidden, dtype=torch.bfloat16)
        weights = torch.zeros(batch, size.top_k, dtype=torch.bfloat16)
        call.begin_step()
        for layer in (0, 1, size.num_layers - 1):
            call(layer, x, torch.zeros(batch, size.top_k, dtype=torch.int64), weights)
        call.end_step()

    def attend(self, batch: int) -> None:
        """One layer's attention, in a step over rows, pages, spilled pages, and behind padding."""
        size = self.size
        query = torch.zeros(batch, size.heads, size.head_dim, dtype=torch.bfloat16)
        keys = torch.zeros(1, size.groups, 4096, size.head_dim, dtype=torch.bfloat16)
        new = torch.zeros(batch, size.groups, size.head_dim, dtype=torch.bfloat16)
        rows, positions = torch.zeros(2, batch, dtype=torch.int64)
        write(new, new, keys, keys, rows, positions)
        sinks, window = (torch.zeros(size.heads), 128) if size.is_oss else (None, None)
        for real in (None, torch.ones(1, 4096, dtype=torch.bool)):
            attend(
                query, keys, keys, rows, positions, scale=0.1, window=window, sinks_H=sinks,
                real_RC=real,
            )  # fmt: skip
        pages = torch.zeros(4, size.groups, PAGE, size.head_dim, dtype=torch.bfloat16)
        paged = Paged(torch.zeros(1, 4096 // PAGE, dtype=torch.int32), PAGE)
        write(new, new, pages, pages, rows, positions, paged)
        for spilled in (None, Spilled(pages, pages)):
            attend(
                query, pages, pages, rows, positions, scale=0.1, window=window, sinks_H=sinks,
                paged=paged, spilled=spilled,
            )  # fmt: skip

    def prefill(self, chosen: slice = slice(None)) -> None:
        """One layer of many tokens, in tiles of all these heights."""
        size, block = self.size, self.expert_block
        x_TH = torch.zeros(64, size.hidden, dtype=torch.bfloat16)
        experts_TK = torch.zeros(64, size.top_k, dtype=torch.int64)
        work = Work.of(experts_TK.numel(), size.num_experts, self.layout, CPU)
        numbers_E = torch.zeros(size.num_experts, dtype=torch.int32)
        workspace_RN = empty(4, block.units, dtype=torch.int16)
        unpack_blocks(block, self.slots_SN, numbers_E[:4], workspace_RN)
        sort(experts_TK, work, numbers_E, numbers_E, size.num_experts, LEAST_ROWS)
        for stored, slots_SN in (block, self.slots_SN), (block.plain, workspace_RN):
            products = Products(stored, slots_SN, self.layout)
            products.arranged(x_TH)
            for tiles in heights_for(stored)[chosen]:
                products.run(x_TH, size.top_k, work, tiles, 0, 8)
        weights_TK = torch.zeros(64, size.top_k, dtype=torch.bfloat16)
        combined(x_TH, Routes(experts_TK, weights_TK), work, size.num_experts)

    def dense(self, batch: int) -> None:
        """Embedding and head in host memory."""
        weight = empty(self.size.vocabulary, self.size.hidden)
        dense.embed(SimpleNamespace(weight=weight), torch.zeros(batch, dtype=torch.int64))
        x = torch.zeros(batch, self.size.hidden, dtype=torch.bfloat16)
        dense.head(SimpleNamespace(weight=weight, bias=None), x)


def compile_coded(kernels: Kernels, *, brief: bool) -> None:
    """What reads experts in codes: decoding steps of one token and of several, and prefill."""
    kernels.decode(1, LRU)
    kernels.decode(8, LRU)
    if not brief:
        kernels.decode(1, LRU, resident=True)
        kernels.decode(8, LRU, resident=True)
    kernels.prefill(slice(-1, None) if brief else slice(None))


def compile_plain(kernels: Kernels, *, brief: bool) -> None:
    """What a model of packed bfloat16 experts runs."""
    policies = (LRU, PredictedReuse) if brief else (LRU, LFU, PredictedReuse, ClassLRU, Reuse)
    for batch in (1, 32) if brief else (1, 8, 32):
        kernels.decode(batch, PredictedReuse, prefetch=True)
        if not brief:
            kernels.decode(batch, Reuse, prefetch=True)
        kernels.attend(batch)
        kernels.dense(batch)
    for policy in policies:
        kernels.decode(1, policy)
        kernels.decode(1, policy, resident=True)
    kernels.decode(8, LRU, resident=True)
    kernels.decode(32, Reuse, num_ranges=4)
    kernels.prefill(slice(None, None, 2) if brief else slice(None))


BRIEF = "--brief"
SMALL_HEADS, BOUNDS = "small-heads", "bounds"


def compile_small_heads() -> None:
    """Attention of heads below what the tensor cores take, as tiny models have, in any format."""
    rows, positions = torch.zeros(2, 2, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        for width, value_width, groups in ((8, 8, 2), (12, 8, 4), (64, 64, 4)):
            query = torch.zeros(2, 4, width, dtype=dtype)
            keys = torch.zeros(2, groups, 48, width, dtype=dtype)
            values = torch.zeros(2, groups, 48, value_width, dtype=dtype)
            write(keys[:, :, 0], values[:, :, 0], keys, values, rows, positions)
            attend(query, keys, values, rows, positions, scale=0.1, softcap=3.0)


def compile_bounds(*, brief: bool) -> None:
    """Activations with bounds, which are compile-time constants."""
    size = Size(128, 256, 8, 2, 10, 4, 4, 32, 256, 3)
    for activation in BOUNDED:
        kernels = Kernels(size, activation=activation, bounds=(10.0, 7.5))
        kernels.decode(1, LRU)
        kernels.decode(1, LRU, resident=True)
        kernels.prefill(slice(1) if brief else slice(None))


def compile_all(
    capability: int, names: Sequence[str], *, brief: bool = False
) -> list[dict[str, Any]]:
    """What every kernel takes, at the named sizes."""
    compiler = Compiler(capability)
    with pytest.MonkeyPatch.context() as patch:
        without_streams(patch)
        for name in names:
            size, _, encoding = name.partition(":")
            if name == SMALL_HEADS:
                compile_small_heads()
            elif name == BOUNDS:
                compile_bounds(brief=brief)
            elif encoding:
                compile_coded(Kernels(SIZES[size], encoding), brief=brief)
            else:
                compile_plain(Kernels(SIZES[size]), brief=brief)
    return list(compiler.found.values())


def main(capability: str, *names: str) -> None:
    wanted = [name for name in names if name != BRIEF]
    for line in compile_all(int(capability), wanted or list(SIZES), brief=BRIEF in names):
        print(json.dumps(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
