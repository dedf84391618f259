"""Encoders: codes and scales that stand for weights near those that were given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from runtime.weights.encodings.encoders.grid import Encoder, Grid
from runtime.weights.encodings.encoders.rounding import (
    Rounded,
    error,
    feedback,
    nearest,
    search,
)
from runtime.weights.encodings.encoders.table import ENCODERS, find_encoder
from runtime.weights.encodings.encoding import CODES

every_encoder = pytest.mark.parametrize("name", ENCODERS)
SHAPE = (48, 160)
"""Rows of three blocks of 16 for fp8; columns of one block of 128 and a part of one."""


def weights(shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    """Weights of rows of very different size, with outliers and a block of zeros, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-3, 1, shape[0])[:, None]
    found = torch.randn(shape, generator=generator) * rows
    found[::5, ::7] *= 8
    found[3, 32:64] = 0
    return found.bfloat16().float()


def moments(size: int = SHAPE[1]) -> Tensor:
    """Second moments of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, size, generator=generator).cumsum(1) + 0.1
    return inputs.T @ inputs / len(inputs)


ROUNDINGS: dict[str, Callable[[Tensor, Grid], Rounded]] = {
    "nearest": nearest,
    "search": search,
    "feedback": lambda weights_NK, grid: feedback(weights_NK, grid, moments()),
}
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


def encoded(
    name: str, rounding: str, given: Tensor | None = None
) -> tuple[Tensor, Rounded, Grid, dict[str, Tensor]]:
    given = weights() if given is None else given
    encoder = find_encoder(name)
    grid = encoder.grid(given, encoder.encoding((given.shape[0], given.shape[1]), stacked=3))
    rounded = ROUNDINGS[rounding](given, grid)
    return given, rounded, grid, grid.pack(rounded.numbers_NK, rounded.scales_NB)


@every_encoder
@every_rounding
def test_the_parts_are_those_of_the_encoding_and_decode_to_what_was_rounded_to(
    name: str, rounding: str
) -> None:
    _, rounded, grid, parts = encoded(name, rounding)
    found = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in parts.items()}
    assert found == {part: tuple(spec) for part, spec in grid.encoding.parts(SHAPE).items()}
    assert list(found) == list(grid.encoding.parts(SHAPE))
    for dtype in (torch.float32, torch.bfloat16):  # products are exact in both
        decoded = grid.encoding.decode(parts, dtype)
        assert decoded.dtype == dtype and torch.equal(decoded.float(), rounded.weights(grid))


@every_encoder
@pytest.mark.parametrize("rounding", ["nearest", "search"])
def test_every_weight_becomes_the_nearest_that_its_scale_allows(name: str, rounding: str) -> None:
    given, _, grid, parts = encoded(name, rounding)
    decoded = grid.encoding.decode(parts, torch.float32)
    codes = parts[CODES]
    every_code = (torch.full_like(codes.view(torch.uint8), byte) for byte in range(256))
    best = torch.full_like(given, torch.inf)
    for code in every_code:
        other = grid.encoding.decode(parts | {CODES: code.view(codes.dtype)}, torch.float32)
        best = torch.minimum(best, (other - given).abs().nan_to_num(nan=torch.inf))
    assert torch.equal((decoded - given).abs(), best)


@every_encoder
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_is_never_worse_than_the_usual_scale(name: str, weighted: bool) -> None:
    given, plain, grid, _ = encoded(name, "nearest")
    importance = moments().diagonal() if weighted else torch.ones(SHAPE[1])
    found = search(given, grid, importance if weighted else None)
    costs = [
        (importance * (one.weights(grid) - given) ** 2).view(-1, grid.rows * SHAPE[1]).sum(1)
        for one in (found, plain)
    ]
    assert (costs[0] <= costs[1] * (1 + 1e-5)).all()
    assert costs[0].sum() < costs[1].sum()


@every_encoder
def test_feedback_is_never_worse_than_the_search_and_mostly_better(name: str) -> None:
    given, fed_back, grid, _ = encoded(name, "feedback")
    searched = search(given, grid, moments().diagonal())
    costs = [
        error(given, one.weights(grid), moments()).view(-1, grid.rows).sum(1)
        for one in (fed_back, searched)
    ]
    assert (costs[0] <= costs[1] * 1.1).all()  # the damping counts, too
    assert costs[0].sum() < 0.9 * costs[1].sum()


@every_encoder
@every_rounding
def test_encoding_decoded_weights_changes_nothing(name: str, rounding: str) -> None:
    _, rounded, grid, _ = encoded(name, rounding)
    once = rounded.weights(grid)
    for again in ("search", "feedback"):
        _, second, second_grid, _ = encoded(name, again, once)
        assert torch.equal(second.weights(second_grid), once)


@every_encoder
@every_rounding
def test_zeros_stay_zero(name: str, rounding: str) -> None:
    _, _, grid, parts = encoded(name, rounding, torch.zeros(SHAPE))
    assert not grid.encoding.decode(parts, torch.float32).any()
    _, _, grid, parts = encoded(name, rounding)
    if grid.columns <= 32 and rounding != "feedback":  # which makes up for errors beside them
        assert not grid.encoding.decode(parts, torch.float32)[3, 32:64].any()


@every_encoder
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_very_small_and_very_large_weights_keep_their_size(name: str, size: float) -> None:
    given = (weights() * size).bfloat16().float()
    _, _, grid, parts = encoded(name, "search", given)
    decoded = grid.encoding.decode(parts, torch.float32)
    assert torch.isfinite(decoded).all()
    large = given.abs() > given.abs().amax(1, keepdim=True) / 2
    rows = slice(grid.encoding.rows - SHAPE[0] // 3, None)  # the last block has the largest rows
    assert torch.allclose(decoded[rows][large[rows]], given[rows][large[rows]], rtol=0.3)


def test_a_group_of_int4_may_reach_further_up_than_down() -> None:
    up = torch.tensor([[8.0, *range(-7, 8), *range(-7, 8), 0.0]])
    encoder = find_encoder("int4")
    for given in (up, -up):
        rounded = search(given, encoder.grid(given, encoder.encoding((1, 32))))
        assert torch.equal(rounded.numbers_NK * rounded.scales_NB, given)


def test_groups_of_128_are_an_option_of_int4() -> None:
    given = weights((8, 256))
    errors = []
    for group in (32, 128):
        encoder = find_encoder("int4", group)
        encoding = encoder.encoding((8, 256))
        assert encoding.columns == group
        grid = encoder.grid(given, encoding)
        errors.append((search(given, grid).weights(grid) - given).square().sum())
    assert errors[0] < errors[1]


def test_rounding_with_inputs_of_less_rank_than_columns_works() -> None:
    given, encoder = weights(), find_encoder("int4")
    grid = encoder.grid(given, encoder.encoding(SHAPE))
    one = torch.zeros(SHAPE[1], SHAPE[1])
    one[5, 5] = 1.0
    for moments_KK in (one, torch.zeros_like(one), moments() * 1e20, moments() * 1e-20):
        assert torch.isfinite(feedback(given, grid, moments_KK).weights(grid)).all()


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("name", "columns"), [("int4", 48), ("mxfp4", 48), ("nvfp4", 24)])
def test_columns_that_do_not_divide_are_refused_by_their_number(name: str, columns: int) -> None:
    with pytest.raises(ValueError, match=str(columns)):
        find_encoder(name).encoding((16, columns))


def test_fp8_takes_rows_that_128_does_not_divide_in_lower_blocks() -> None:
    encoder: Encoder = find_encoder("fp8")
    assert encoder.encoding((2 * 96, 64), stacked=2).rows == 32
    assert encoder.encoding((256, 64), stacked=1).rows == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int8",), "encoding='int8' is not one of mxfp4, int4, fp8, nvfp4"),
        (("int4", 64), "group=64 is for int4 alone, and 32 or 128"),
        (("mxfp4", 128), "group=128 is for int4 alone"),
    ],
)
def test_names_and_groups_that_there_are_not_are_refused(
    arguments: tuple[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_encoder(*arguments)
