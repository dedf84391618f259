"""Products of codes and the scales of their blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.weights.encodings.encoding import Encoding

CHUNK = 1 << 18
"""Weights that are decoded at once on the CPU, so that they stay in its caches."""


def decode_blocks(
    encoding: Encoding,
    codes: Tensor,
    unpack: Callable[[Tensor], Tensor],
    scales: Tensor,
    dtype: torch.dtype,
    zeros: Tensor | None = None,
) -> Tensor:
    """The weights [N, K] of codes, each multiplied by the scale of its block, in `dtype`.

    unpack: makes numbers [.., K] of some rows of codes, in the number format of `scales`, in which
    they are multiplied.
    zeros: numbers of every row and block, which are subtracted before.
    """
    rows, columns = codes.shape[0], codes.shape[1] * codes.itemsize * 8 // encoding.bits
    scales = scales if len(scales) == rows else scales.repeat_interleave(encoding.rows, 0)
    weights_NK = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    step = max(1, CHUNK // columns) if codes.device.type == "cpu" else rows
    for start in range(0, rows, step):
        numbers = unpack(codes[start : start + step])
        if zeros is not None:
            numbers.unflatten(1, (-1, encoding.columns)).sub_(zeros[start : start + step, :, None])
        _multiply(numbers, scales[start : start + step], encoding.columns)
        weights_NK[start : start + step] = numbers
    return weights_NK


def _multiply(numbers: Tensor, scales: Tensor, columns: int) -> None:
    """Multiply `columns` numbers of a row by each scale, in place; the last may be fewer."""
    full = numbers.shape[1] // columns
    numbers[:, : full * columns].unflatten(1, (full, columns)).mul_(scales[:, :full, None])
    if full * columns < numbers.shape[1]:
        numbers[:, full * columns :].mul_(scales[:, full:])
