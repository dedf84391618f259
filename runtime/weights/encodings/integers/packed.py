"""Whole numbers of 4 bits in words of 32, as compressed-tensors packs them (`pack-quantized`).

The lowest 4 bits of a word are the first number. Numbers are signed and stored with 8 added, so the
bytes of the words are the codes of int4-group. Zeros are packed along N instead, 8 added as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.weights.encodings.encoding import CODES, SCALES
from runtime.weights.encodings.stored_matrix import Convert
from runtime.weights.encodings.stored_parts import (
    as_bytes,
    require_dtype,
    require_matrix,
    require_shape,
    require_there,
    scale_key,
)
from runtime.weights.files import Entry

ZEROS, SHAPE, ORDER = "zeros", "shape", "order"
"""Stored parts beside codes and scales; only zeros are kept."""
MIDDLE = 8
"""The code of 0 where numbers are symmetric."""
IN_A_WORD = 8
"""Numbers of 4 bits."""
SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

PACKED = ".weight_packed"


class Integers(NamedTuple):
    """A matrix of whole numbers of 4 bits as a checkpoint keeps it; fields as of `StoredMatrix`."""

    shape: tuple[int, ...]
    columns: int
    """That share a scale."""
    scale: torch.dtype
    zeros: bool
    """Each group has its own zero."""
    sources: dict[str, str]
    convert: Convert


class Scheme(NamedTuple):
    """What a group of a configuration says of the weights of some modules."""

    targets: tuple[str, ...]
    bits: int
    columns: int | None
    """That share a scale; None for all of a row."""
    symmetric: bool

    def fits(self, words: int, groups: int) -> bool:
        """True for rows of so many words and scales."""
        columns = words * 32 // self.bits
        return groups * (self.columns or columns) == columns

    def names(self, module: str) -> bool:
        """True if a target is a pattern or the name of `module`, not of a class of modules."""
        return any(
            re.match(target.removeprefix("re:"), module) is not None
            if target.startswith("re:")
            else target == module
            for target in self.targets
        )


def find(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, Integers]:
    """The matrices in words of 32 bits, by the key that they would have unquantised."""
    schemes = list(_schemes(quantization))
    return {
        key.removesuffix("_packed"): _integers(key, entries, schemes)
        for key, entry in entries.items()
        if key.endswith(PACKED) and entry.dtype == "I32"
    }


def _schemes(quantization: Mapping[str, Any]) -> Iterator[Scheme]:
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("type", "int") == "int" and weights.get("num_bits"):
            in_groups = weights.get("strategy") == "group"
            yield Scheme(
                tuple(group.get("targets") or ()),
                weights["num_bits"],
                weights.get("group_size") if in_groups else None,
                weights.get("symmetric", True),
            )


def _integers(key: str, entries: Mapping[str, Entry], schemes: list[Scheme]) -> Integers:
    packed, scales = entries[key], scale_key(key, entries)
    require_matrix(key, packed)
    require_dtype(scales, entries[scales], *SCALE_DTYPES)
    *stacked, rows, words = packed.shape
    groups = entries[scales].shape[-1] if entries[scales].shape else 0
    scheme = _scheme_of(key, (scales, entries[scales]), words, groups, schemes)
    require_shape(scales, entries[scales], (*stacked, rows, groups))
    columns = words * IN_A_WORD
    sources = {CODES: key, SCALES: scales} | _others(key, entries, scheme, columns, groups)
    return Integers(
        shape=(*stacked, rows, columns),
        columns=columns // groups,
        scale=SCALE_DTYPES[entries[scales].dtype],
        zeros=ZEROS in sources,
        sources=sources,
        convert=_conversion(sources, (rows, columns), columns // groups),
    )


def _scheme_of(
    key: str, scales: tuple[str, Entry], words: int, groups: int, schemes: list[Scheme]
) -> Scheme:
    """The scheme of a matrix: one that its shapes fit, and of several one that names it."""
    fitting = [scheme for scheme in schemes if groups and scheme.fits(words, groups)]
    if not fitting:
        raise ValueError(
            f"{scales[0]} has the shape {list(scales[1].shape)}, which fits no group of the "
            f"quantisation for {key} with {words} words in a row; fetch the checkpoint again"
        )
    module = key.removesuffix(PACKED)
    chosen = [scheme for scheme in fitting if scheme.names(module)] or fitting
    bits = {scheme.bits for scheme in chosen}
    if bits != {4}:
        raise ValueError(
            f"{key} is in whole numbers of {' or '.join(map(str, sorted(bits)))} bits; only those "
            "of 4 are supported"
        )
    return chosen[0]


def _others(
    key: str, entries: Mapping[str, Entry], scheme: Scheme, columns: int, groups: int
) -> dict[str, str]:
    """The stored parts beside codes and scales."""
    module = key.removesuffix("_packed")
    zeros, shape, order = f"{module}_zero_point", f"{module}_shape", f"{module}_g_idx"
    *stacked, rows, _ = entries[key].shape
    found = {}
    if not scheme.symmetric:
        require_there(zeros, entries, key)
        require_dtype(zeros, entries[zeros], "I32")
        require_shape(zeros, entries[zeros], (*stacked, -(-rows // IN_A_WORD), groups))
        found[ZEROS] = zeros
    elif zeros in entries:
        raise ValueError(f"{zeros} is there, but the quantisation of {key} is symmetric")
    if not stacked:
        require_there(shape, entries, key)
        require_dtype(shape, entries[shape], "I64", "I32")
        require_shape(shape, entries[shape], (2,))
        found[SHAPE] = shape
    if order in entries:
        require_dtype(order, entries[order], "I32", "I64")
        require_shape(order, entries[order], (*stacked, columns))
        found[ORDER] = order
    return found


def _conversion(sources: dict[str, str], shape: tuple[int, int], columns: int) -> Convert:
    """columns: that share a scale."""

    def convert(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        if SHAPE in stored and stored[SHAPE].tolist() != list(shape):
            raise ValueError(
                f"{sources[SHAPE]} says {stored[SHAPE].tolist()}, but {sources[CODES]} has "
                f"{list(shape)}; fetch the checkpoint again"
            )
        if ORDER in stored:
            require_ascending(sources[ORDER], stored[ORDER], columns)
        parts = {CODES: as_bytes(stored[CODES]), SCALES: stored[SCALES]}
        if ZEROS in stored:
            zeros_GN = nibbles(stored[ZEROS].mT.contiguous())
            parts[ZEROS] = zeros_GN[:, : shape[0]].mT.contiguous()
        return parts

    return convert


def require_ascending(key: str, order: Tensor, columns: int) -> None:
    """Raise ValueError unless `order`, the group of each column, is that of neighbours."""
    if not torch.equal(order, torch.arange(len(order), dtype=order.dtype) // columns):
        raise ValueError(
            f"{key} gives columns to groups in another order (desc_act, actorder), which is not "
            "supported; use a checkpoint that was quantised without it"
        )


def nibbles(words: Tensor) -> Tensor:
    """The numbers [.., 8 n] of words [.., n], the lowest bits first."""
    stored = as_bytes(words)
    return torch.stack([stored & 15, stored >> 4], -1).flatten(-2)


def packed(numbers: Tensor) -> Tensor:
    """Bytes [.., n] of numbers [.., 2 n], the first in the low half."""
    return numbers[..., 0::2] | numbers[..., 1::2] << 4
