"""Checks of the checkpoint tensors that are parts of a coded matrix, and their conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import torch
from torch import Tensor

from runtime.weights.encodings.number_formats import E8M0_NAN
from runtime.weights.files import Entry

SCALE_NAMES = {
    ".weight": (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight"),
    ".weight_packed": (".weight_scale",),
    ".qweight": (".scales",),
    "_blocks": ("_scales",),
    "": ("_scale_inv", "_scale"),
}
"""Endings of the keys of scales, by that of the codes."""

Shape = Sequence[int]


def scale_key(key: str, entries: Mapping[str, Entry]) -> str:
    """The key of the scales of the codes `key`. Raises ValueError where there are none."""
    ending = next(ending for ending in SCALE_NAMES if key.endswith(ending))
    names = {name: key.removesuffix(ending) + name for name in SCALE_NAMES[ending]}
    for name in names.values():
        if name in entries:
            return name
    usual = [name for name in names if any(other.endswith(name) for other in entries)]
    raise ValueError(
        f"{key} is stored in codes of {entries[key].dtype}, and their scales "
        f"{names[(usual or list(names))[0]]} are missing; fetch the checkpoint again"
    )


def require_there(key: str, entries: Mapping[str, Entry], codes: str) -> None:
    """Raise ValueError unless the tensor `key`, without which `codes` mean nothing, is there."""
    if key not in entries:
        raise ValueError(
            f"{codes} stands for no weights without {key}, which is missing; fetch the checkpoint "
            "again"
        )


def require_dtype(key: str, entry: Entry, *dtypes: str) -> None:
    """Raise ValueError unless the tensor `key` has one of `dtypes`."""
    if entry.dtype not in dtypes:
        raise ValueError(f"{key} is stored as {entry.dtype} instead of {' or '.join(dtypes)}")


def require_shape(key: str, entry: Entry, shape: Shape) -> None:
    """Raise ValueError unless the tensor `key` has the shape `shape`."""
    if tuple(entry.shape) != tuple(shape):
        raise ValueError(
            f"{key} has the shape {list(entry.shape)} instead of {list(shape)}; fetch the "
            "checkpoint again"
        )


def require_matrix(key: str, entry: Entry) -> None:
    """Raise ValueError unless the tensor `key` is a matrix, or one for each of some experts."""
    if len(entry.shape) not in (2, 3) or 0 in entry.shape:
        raise ValueError(f"{key} is stored as {entry.dtype} {list(entry.shape)}: not a matrix")


def block_of(
    key: str, grid: Shape, shape: Shape, configured: Shape | None = None
) -> tuple[int, int]:
    """Rows and columns that share a scale, from the shape of the scales of a matrix.

    key: of the scales.
    grid: their shape, without experts.
    shape: of the matrix.
    configured: the block that the configuration names. It is the right one where blocks at the end
    of a matrix are cut. A matrix may have smaller ones of its own, but no larger ones: then scales
    are missing.
    """
    fewest = [1, 1]
    if configured is not None:
        fewest = [-(-size // block) for size, block in zip(shape, configured, strict=True)]
        if list(grid) == fewest:
            return min(configured[0], shape[0]), min(configured[1], shape[1])
    whole = len(grid) == 2 and all(n and not size % n for n, size in zip(grid, shape, strict=True))
    if not whole or any(n < least for n, least in zip(grid, fewest, strict=True)):
        raise ValueError(
            f"{key} has the shape {list(grid)}, which does not fit a matrix of {shape[0]} x "
            f"{shape[1]}{_in_blocks(configured)}; fetch the checkpoint again"
        )
    return shape[0] // grid[0], shape[1] // grid[1]


def _in_blocks(configured: Shape | None) -> str:
    return "" if configured is None else f" in blocks of {configured[0]} x {configured[1]}"


def whole_rows(rows: int, block: int) -> int:
    """The most rows that can share a scale where `rows` are not a multiple of `block`."""
    return gcd(rows, block)


def repeat_rows(scales: Tensor, block: int, rows: int, matrix_rows: int) -> Tensor:
    """Scales of `block` rows each, as scales of `rows`, a divisor, for a matrix of that height."""
    return scales.repeat_interleave(block // rows, 0)[: matrix_rows // rows]


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor whose elements have one."""
    return tensor.view(torch.uint8)


def e8m0(key: str, scales: Tensor) -> Tensor:
    """Scales of 8 bits in bytes. Raises ValueError, naming `key`, for one that is no number."""
    stored = as_bytes(scales)
    if scales.dtype == torch.float8_e8m0fnu and bool((stored == E8M0_NAN).any()):
        raise ValueError(f"a scale of {key} is not a number (0xFF); fetch the checkpoint again")
    return stored
