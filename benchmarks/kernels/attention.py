"""Test bench of single tokens' attention: the kernels as used, with other blocks, and torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.shapes import empty_model, shape_named
from benchmarks.kernels.clock import Clock, in_turn
from benchmarks.kernels.report import TimedKernel
from runtime.cuda.kernels.attention import Tile, attend

MOST_BYTES = 4 << 30
"""Of the caches that take turns. There is one a launch, so that a GPU's own cache holds none."""
CANDIDATES = [(32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8), (256, 8)]
"""Keys of a block, warps."""
CUDNN = "torch, cuDNN"
TOLERANCE = 2e-2
"""Between results in bfloat16."""


class Call(NamedTuple):
    """The tokens and the cache of one launch."""

    query_BHD: Tensor
    keys_BGCD: Tensor
    values_BGCD: Tensor
    real_BC: Tensor
    rows_B: Tensor
    positions_B: Tensor


class AttentionBench(Clock):
    """One layer's attention at a model's size, over caches that are full."""

    def __init__(self, shape: str, device: torch.device, repeats: int) -> None:
        super().__init__(device, repeats)
        config = empty_model(shape_named(shape)).config
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads

    def decode(self, context: int, batch: int) -> Iterator[TimedKernel]:
        """The attention of `batch` sequences of `context` tokens, compared with torch's first."""
        num_bytes = 4 * batch * self._groups * context * self._width
        turns = max(1, min(self._repeats, MOST_BYTES // num_bytes))
        calls = [self._drawn(context, batch) for _ in range(turns)]
        used = Tile.of(self._heads // self._groups, self._width, torch.bfloat16)
        expected = self._by_torch(calls[0])
        for name, run in self._ways(used).items():
            seconds = self._timed(name, run, calls, expected)
            operations = 4.0 * batch * self._heads * context * self._width
            in_use = name == _text(used)
            kernel = f"attend {context}"
            yield TimedKernel(kernel, batch, name, in_use, seconds, num_bytes, operations)

    def _drawn(self, context: int, batch: int) -> Call:
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": self._device}
        keys, values = torch.randn(2, batch, self._groups, context, self._width, **options)
        return Call(
            torch.randn(batch, self._heads, self._width, **options), keys, values,
            torch.ones(batch, context, dtype=torch.bool, device=self._device),
            torch.arange(batch, device=self._device),
            torch.full((batch,), context - 1, device=self._device),
        )  # fmt: skip

    def _ways(self, used: Tile) -> dict[str, Callable[[Call], Tensor]]:
        tiles = [used] + [used._replace(keys=keys, warps=warps) for keys, warps in CANDIDATES]
        ways: dict[str, Callable[[Call], Tensor]] = {"torch": self._by_torch}
        if self._device.type == "cuda":
            ways[CUDNN] = self._by_torch
        return {_text(tile): partial(self._by_kernel, tile=tile) for tile in tiles} | ways

    def _by_kernel(self, call: Call, tile: Tile) -> Tensor:
        query, keys, values, real, rows, positions = call
        scale = self._width**-0.5
        return attend(query, keys, values, rows, positions, scale, real_RC=real, tile=tile)

    def _by_torch(self, call: Call) -> Tensor:
        """As transformers calls it."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        module: Any = SimpleNamespace(num_key_value_groups=self._heads // self._groups)
        query_BH1D, mask_B11C = call.query_BHD[:, :, None], call.real_BC[:, None, None]
        out_B1HD: Tensor = sdpa_attention_forward(
            module, query_BH1D, call.keys_BGCD, call.values_BGCD, mask_B11C, is_causal=False
        )[0]
        return out_B1HD[:, 0]

    def _timed(
        self, name: str, run: Callable[[Call], Tensor], calls: list[Call], expected: Tensor
    ) -> float:
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(name == CUDNN)
        try:
            seconds = self._seconds(in_turn(run, calls))
            if seconds < float("inf"):
                torch.testing.assert_close(
                    run(calls[0]), expected, rtol=TOLERANCE, atol=TOLERANCE, msg=name
                )
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
        return seconds


def _text(tile: Tile) -> str:
    return f"{tile.keys} keys, {tile.warps} warps"
