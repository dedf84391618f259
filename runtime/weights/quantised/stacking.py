"""Coded matrices, stacked one below the other as the parameters of an expert stack them."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from runtime.weights.encodings.coded import CodedMatrix
from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.quantised.parts import even, with_rows


def stacked(matrices: Sequence[StoredMatrix | None], shape: tuple[int, ...]) -> CodedMatrix | None:
    """The matrix that `matrices` make up, one below the other; None for those that have to be
    decoded: they are plain, or not of one encoding, or their codes lie across.

    shape: of the model's parameter.
    """
    first = matrices[0]
    if first is None or not all(is_alike(first, matrix) for matrix in matrices):
        return None
    if len(shape) != 2 or (first.transposed and len(matrices) > 1):
        return None
    rows = gcd(*(even(matrix).rows for matrix in matrices if matrix is not None))
    one, other = shape
    shape_NK = (other, one) if first.transposed else (one, other)
    return CodedMatrix(with_rows(first.encoding, rows), shape_NK, first.transposed)


def is_alike(one: StoredMatrix | None, other: StoredMatrix | None) -> bool:
    """True if both are coded in the same way; the rows that share a scale may differ."""
    return _kind(one) == _kind(other)


def _kind(matrix: StoredMatrix | None) -> tuple[Encoding, bool] | None:
    return None if matrix is None else (with_rows(matrix.encoding, 1), matrix.transposed)
