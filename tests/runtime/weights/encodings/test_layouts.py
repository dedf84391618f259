"""Layouts of quantised checkpoints: found, converted and decoded, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.weights.encodings.encoding import CODES
from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.encodings.table import find_all
from runtime.weights.files import CheckpointFiles, Entry
from tests.helpers.quantised import LAYOUTS, LayoutWriter
from tests.helpers.quantised.checkpoint import SINGLE, read_tensors
from tests.helpers.quantised.decoding import decode_all, find_matrices, parts_of

Written = Callable[[str], Path]

layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The directory of a small model in a layout; its twin beside it has the decoded weights."""
    write = LayoutWriter(tmp_path_factory.mktemp("layouts"))
    return lambda layout: write(layout)[0]


def twin_of(directory: Path) -> dict[str, Tensor]:
    return read_tensors(directory.with_name(f"{directory.name} twin") / SINGLE)


@layouts
def test_every_coded_weight_is_found_and_is_that_of_the_definition(
    written: Written, layout: str
) -> None:
    directory = written(layout)
    expected, weights = twin_of(directory), decode_all(directory, torch.bfloat16)
    stored = read_tensors(directory / SINGLE)
    assert weights
    for key, tensor in expected.items():
        if key in weights:
            assert torch.equal(weights.pop(key), tensor), key
        else:
            assert torch.equal(stored[key], tensor), f"{key} is in codes"
    assert not weights, "the unquantised checkpoint has no such tensors"


@layouts
def test_converted_tensors_are_the_parts_of_the_encoding(written: Written, layout: str) -> None:
    files, matrices = find_matrices(written(layout))
    experts = {m.encoding.name for key, m in matrices.items() if ".experts" in key}
    assert experts == {LAYOUTS[layout].encoding}
    for matrix in matrices.values():
        specs = matrix.encoding.parts((matrix.shape[-2], matrix.shape[-1]))
        parts = next(parts_of(files, matrix))
        found = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
        assert found == dict(specs)
        assert all(part.is_contiguous() for part in parts.values())


def an_expert(matrices: dict[str, StoredMatrix]) -> StoredMatrix:
    return next(matrix for key, matrix in matrices.items() if ".experts" in key)


def others(matrix: StoredMatrix) -> list[str]:
    """The keys of all stored parts but the codes."""
    return [key for part, key in matrix.sources.items() if part != CODES]


def contents(directory: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    config = json.loads((directory / "config.json").read_text())
    return dict(CheckpointFiles(directory).entries), config["quantization_config"]


@layouts
def test_missing_scale_is_refused_by_name(written: Written, layout: str) -> None:
    matrix = an_expert(find_matrices(written(layout))[1])
    for key in others(matrix):
        entries, quantization = contents(written(layout))
        del entries[key]
        with pytest.raises(ValueError, match=f"{key.rpartition('.')[0]}.*{key[-7:]}"):
            find_all(entries, quantization)


@layouts
@pytest.mark.parametrize("shape", [(7, 11), (7,), (4, 0), (2, 3, 5, 7)], ids=str)
def test_misshaped_scale_is_refused_by_name(
    written: Written, layout: str, shape: tuple[int, ...]
) -> None:
    matrix = an_expert(find_matrices(written(layout))[1])
    for key in others(matrix):
        entries, quantization = contents(written(layout))
        entries[key] = entries[key]._replace(shape=shape)
        with pytest.raises(ValueError, match=key):
            find_all(entries, quantization)


@layouts
def test_truncated_scale_is_refused_by_name(written: Written, layout: str) -> None:
    matrix = an_expert(find_matrices(written(layout))[1])
    for key in others(matrix):
        entries, quantization = contents(written(layout))
        shape = entries[key].shape
        for place in range(len(shape)):
            if shape[place] > 1:
                cut = (*shape[:place], shape[place] - 1, *shape[place + 1 :])
                entries[key] = entries[key]._replace(shape=cut)
                with pytest.raises(ValueError, match=key):
                    find_all(entries, quantization)


@layouts
def test_scale_of_another_format_is_refused_by_name(written: Written, layout: str) -> None:
    matrix = an_expert(find_matrices(written(layout))[1])
    for key in others(matrix):
        entries, quantization = contents(written(layout))
        entries[key] = entries[key]._replace(dtype="BOOL")
        with pytest.raises(ValueError, match=f"{key}.*BOOL"):
            find_all(entries, quantization)
