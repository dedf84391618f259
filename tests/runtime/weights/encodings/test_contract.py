"""The contract of every encoding: its parts, and the weights that they stand for."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from runtime.weights.encodings.coded import CodedMatrix
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from runtime.weights.encodings.table import ENCODINGS, from_json, to_json
from tests.helpers.quantised.reference import decode_parts

BF16, FP16, FP32, BYTES = torch.bfloat16, torch.float16, torch.float32, torch.uint8
DTYPES = (BF16, FP16, FP32)


class Case(NamedTuple):
    """An encoding, and a matrix [N, K] in it."""

    encoding: Encoding
    shape: tuple[int, int]


CASES = (
    Case(MXFP4(), (6, 64)),
    Case(MXFP4(), (64, 2880)),
    Case(FP8Block(rows=128, columns=128), (256, 384)),
    Case(FP8Block(rows=128, columns=128, scale=BF16), (256, 200)),
    Case(FP8Block(rows=64, columns=128, scale=BYTES), (576, 300)),
    Case(FP8Block(rows=1, columns=40), (6, 40)),
    Case(FP8Block(rows=1, columns=40, scale=BF16, product=BF16), (6, 40)),
    Case(FP8Block(rows=6, columns=40), (6, 40)),
    Case(FP8Block(rows=1, columns=32, scale=BYTES), (6, 96)),
    Case(Int4Group(columns=32), (6, 96)),
    Case(Int4Group(columns=128, scale=FP16, zeros=True), (300, 1024)),
    Case(Int4Group(columns=40, scale=FP32, zeros=True), (6, 40)),
    Case(NVFP4(rows=6), (6, 96)),
    Case(NVFP4(rows=150, divides=True), (300, 1024)),
)
WRONG = (
    Case(MXFP4(), (6, 48)),
    Case(FP8Block(rows=128, columns=128), (192, 128)),
    Case(Int4Group(columns=32), (6, 48)),
    Case(Int4Group(columns=15), (6, 45)),
    Case(Int4Group(rows=2, columns=32), (6, 64)),
    Case(NVFP4(rows=4), (6, 64)),
    Case(NVFP4(rows=6), (6, 40)),
)
"""Matrices that cannot be coded so."""


def _name(case: Case) -> str:
    encoding, (rows, columns) = case
    return f"{encoding.name}-{encoding.rows}x{encoding.columns}-{rows}x{columns}"


cases = pytest.mark.parametrize("case", CASES, ids=_name)


def random_parts(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Parts of random bytes; scales are finite, and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, spec in case.encoding.parts(case.shape).items():
        if spec.dtype.itemsize > 1:
            sizes = torch.randn(spec.shape, generator=generator) * 3
            parts[name] = sizes.exp().to(spec.dtype)
        else:
            most = 256 if name == CODES else 127
            values = torch.randint(most, spec.shape, generator=generator, dtype=torch.uint8)
            parts[name] = values.view(spec.dtype)
    return parts


def are_same(some: Tensor, others: Tensor) -> bool:
    """Equal bit for bit, but for the payload of what is not a number."""
    if some.dtype != others.dtype or some.shape != others.shape:
        return False
    equal = (some == others) & (torch.signbit(some) == torch.signbit(others))
    return bool((equal | (some.isnan() & others.isnan())).all())


def test_every_encoding_of_the_table_is_tried() -> None:
    assert {case.encoding.name for case in CASES} == ENCODINGS.keys()
    assert all(type(case.encoding) is ENCODINGS[case.encoding.name] for case in CASES)


@cases
def test_codes_and_scales_have_the_shapes_of_the_contract(case: Case) -> None:
    encoding, (rows, columns) = case
    parts = encoding.parts(case.shape)
    assert list(parts)[:2] == [CODES, SCALES]
    assert parts[CODES].num_bytes == rows * columns * encoding.bits // 8
    assert parts[CODES].shape[0] == rows
    assert parts[SCALES].shape[1] == -(-columns // encoding.columns)
    for spec in parts.values():
        assert rows % spec.shape[0] == 0, "the first dimension divides as the rows do"


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_those_of_the_definition(case: Case, dtype: torch.dtype) -> None:
    parts = random_parts(case)
    weights = case.encoding.decode(parts, dtype)
    assert weights.shape == case.shape
    assert weights.is_contiguous()
    assert are_same(weights, decode_parts(case.encoding, parts, dtype))


@cases
def test_parts_are_not_changed_by_decoding(case: Case) -> None:
    parts = random_parts(case)
    case.encoding.decode(parts, FP32)
    for name, part in random_parts(case).items():
        assert torch.equal(parts[name].view(torch.uint8), part.view(torch.uint8))


@cases
def test_weights_are_decoded_where_the_parts_are(case: Case) -> None:
    parts = {name: part.to("meta") for name, part in random_parts(case).items()}
    weights = case.encoding.decode(parts, BF16)
    assert weights.device.type == "meta"
    assert weights.shape == case.shape


@cases
def test_stacked_parts_are_stacked_weights(case: Case) -> None:
    one, other = random_parts(case, seed=1), random_parts(case, seed=2)
    rows, columns = case.shape
    stacked = {name: torch.cat([one[name], other[name]]) for name in one}
    specs = case.encoding.parts((2 * rows, columns))
    assert {name: (tuple(part.shape), part.dtype) for name, part in stacked.items()} == specs
    expected = [case.encoding.decode(parts, BF16) for parts in (one, other)]
    assert are_same(case.encoding.decode(stacked, BF16), torch.cat(expected))


@cases
def test_coded_matrix_fills_a_parameter_in_either_orientation(case: Case) -> None:
    parts = random_parts(case)
    expected = case.encoding.decode(parts, FP32)
    for transposed in (False, True):
        matrix = CodedMatrix(case.encoding, case.shape, transposed)
        into = torch.zeros_like(expected.mT if transposed else expected)
        matrix.decode(parts, into)
        assert are_same(into.mT if transposed else into, expected)


@cases
def test_encoding_is_the_same_after_it_was_written(case: Case) -> None:
    written = json.loads(json.dumps(to_json(case.encoding)))
    assert written["name"] == case.encoding.name
    read = from_json(written)
    assert read == case.encoding
    assert hash(read) == hash(case.encoding), "kernels are chosen by it"


@pytest.mark.parametrize("case", WRONG, ids=_name)
def test_matrix_that_cannot_be_coded_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=str(case.shape[0])):
        case.encoding.parts(case.shape)


@pytest.mark.parametrize(
    "written",
    [{}, {"name": "int3"}, {"name": "mxfp4", "columns": 32, "depth": 1}, {"name": "fp8-block"}],
    ids=str,
)
def test_written_encoding_that_is_none_is_refused_by_name(written: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"the encoding {written.get('name')} is"):
        from_json(written)
