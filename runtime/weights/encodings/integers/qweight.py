"""Whole numbers of 4 bits as GPTQ and AWQ store them, with N along a row of the tensor.

          qweight      of a word, the lowest bits first     qzeros      scales
    GPTQ  [K / 8, N]   rows 0..7                            [G, N / 8]  [G, N]
    AWQ   [K, N / 8]   columns 0, 2, 4, 6, 1, 3, 5, 7       [G, N / 8]  [G, N]

G groups of neighbours along K share a scale and a zero. GPTQ stores zeros with 1 subtracted, unless
its format is gptq_v2. They are turned into the codes of int4-group whenever they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from runtime.weights.encodings.encoding import CODES, SCALES
from runtime.weights.encodings.integers.packed import (
    IN_A_WORD,
    MIDDLE,
    ORDER,
    SCALE_DTYPES,
    ZEROS,
    Integers,
    nibbles,
    packed,
    require_ascending,
)
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

QWEIGHT = ".qweight"
LARGEST = 15
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place within a word of AWQ at which each of 8 columns is."""


def find_gptq(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, Integers]:
    """The matrices of GPTQ, by the key that they would have unquantised."""
    _require_bits(quantization, quantization.get("bits"))
    if quantization.get("desc_act"):
        raise ValueError(
            "columns in another order (desc_act) are not supported; use a checkpoint that was "
            "quantised with desc_act=false"
        )
    form = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    _require_form(form, "gptq", "gptq_v2")
    convert = partial(
        _gptq_conversion,
        subtracted=0 if form == "gptq_v2" else 1,
        symmetric=bool(quantization.get("sym", True)),
    )
    zeros = not quantization.get("sym", True)
    found = {}
    for key, entry in _qweights(entries):
        words, rows = entry.shape
        sources = {CODES: key, SCALES: scale_key(key, entries)}
        sources[ORDER] = _beside(key, ".g_idx", entries, (words * IN_A_WORD,))
        integers = _integers(sources, entries, (rows, words * IN_A_WORD), quantization)
        found[_logical(key)] = integers._replace(
            zeros=zeros, convert=convert(integers.sources, integers.columns)
        )
    return found


def find_awq(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, Integers]:
    """The matrices of AWQ, by the key that they would have unquantised."""
    _require_bits(quantization, quantization.get("bits", quantization.get("w_bit")))
    form = quantization.get("version") or quantization.get("format") or "gemm"
    _require_form(str(form).lower(), "gemm")
    found = {}
    for key, entry in _qweights(entries):
        columns, words = entry.shape
        sources = {CODES: key, SCALES: scale_key(key, entries)}
        found[_logical(key)] = _integers(
            sources, entries, (words * IN_A_WORD, columns), quantization
        )
    return found


def _require_bits(quantization: Mapping[str, Any], bits: Any) -> None:
    if bits != 4:
        method = quantization["quant_method"]
        raise ValueError(f"{method} with {bits} bits is not supported; use a checkpoint of 4 bits")


def _require_form(form: str, *known: str) -> None:
    if form not in known:
        raise ValueError(f"its format {form} is not supported (of those that are: {known})")


def _qweights(entries: Mapping[str, Entry]) -> list[tuple[str, Entry]]:
    found = [(key, entry) for key, entry in entries.items() if key.endswith(QWEIGHT)]
    for key, entry in found:
        require_dtype(key, entry, "I32")
        require_matrix(key, entry)
        if len(entry.shape) != 2:
            raise ValueError(f"{key} has the shape {list(entry.shape)}: not a matrix")
    return found


def _logical(key: str) -> str:
    return f"{key.removesuffix(QWEIGHT)}.weight"


def _beside(key: str, ending: str, entries: Mapping[str, Entry], shape: tuple[int, ...]) -> str:
    """The key of the words that belong to `key`. Raises ValueError for none of that shape."""
    other = key.removesuffix(QWEIGHT) + ending
    require_there(other, entries, key)
    require_dtype(other, entries[other], "I32")
    require_shape(other, entries[other], shape)
    return other


def _integers(
    sources: dict[str, str],
    entries: Mapping[str, Entry],
    shape: tuple[int, int],
    quantization: Mapping[str, Any],
) -> Integers:
    """A matrix [N, K] = `shape` with its scales and zeros, as AWQ has it."""
    rows, columns = shape
    size = quantization.get("group_size", quantization.get("q_group_size", -1))
    size = columns if size in (-1, None) else size
    scales = sources[SCALES]
    require_dtype(scales, entries[scales], *SCALE_DTYPES)
    if columns % size:
        raise ValueError(f"{sources[CODES]} has {columns} columns: not in groups of {size}")
    require_shape(scales, entries[scales], (columns // size, rows))
    words = -(-rows // IN_A_WORD)
    zeros = _beside(sources[CODES], ".qzeros", entries, (columns // size, words))
    return Integers(
        shape=shape,
        columns=size,
        scale=SCALE_DTYPES[entries[scales].dtype],
        zeros=True,
        sources=sources | {ZEROS: zeros},
        convert=_from_awq,
    )


def _gptq_conversion(
    sources: dict[str, str], columns: int, *, subtracted: int, symmetric: bool
) -> Convert:
    """columns: that share a scale. subtracted: from the zeros."""

    def convert(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        require_ascending(sources[ORDER], stored[ORDER], columns)
        codes = as_bytes(stored[CODES].mT.contiguous())
        scales = stored[SCALES].mT.contiguous()
        zeros = nibbles(stored[ZEROS])[:, : len(codes)].mT.contiguous() + subtracted
        if symmetric and not bool((zeros == MIDDLE).all()):
            raise ValueError(f"{sources[ZEROS]} has other zeros than a symmetric quantisation has")
        if bool((zeros > LARGEST).any()):  # 0 - 1, which programs read in different ways
            raise ValueError(
                f"{sources[ZEROS]} has the zero 0, which GPTQ's first format cannot store; use a "
                "checkpoint in the format gptq_v2"
            )
        return {CODES: codes, SCALES: scales} | ({} if symmetric else {ZEROS: zeros})

    return convert


def _from_awq(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        CODES: packed(_columns_of_awq(stored[CODES]).mT.contiguous()),
        SCALES: stored[SCALES].mT.contiguous(),
        ZEROS: _columns_of_awq(stored[ZEROS]).mT.contiguous(),
    }


def _columns_of_awq(words: Tensor) -> Tensor:
    """The numbers [.., 8 n] of words [.., n], in ascending columns."""
    in_words = nibbles(words).unflatten(-1, (-1, IN_A_WORD))
    return in_words[..., list(PLACES)].flatten(-2)
