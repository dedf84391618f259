"""Rounding of a matrix to a grid: to the nearest numbers, by a search over scales, with feedback.

The error that counts is that of the product. For inputs x of second moments H = E[x x^T], the
error D of the weights costs trace(D H D^T). `search` minimises it with the diagonal of H alone,
block by block. `feedback` takes all of H: it rounds one column after the other, and moves the
columns that are left so that they make up for the error so far, after Frantar et al., GPTQ,
arXiv 2210.17323; the scales of a block are searched when its turn comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.weights.encodings.encoders.grid import Grid

DAMPING = 0.05
"""Added to the diagonal of H, as a share of its mean: inputs never seen count a little."""


class Rounded(NamedTuple):
    """Weights on a grid."""

    numbers_NK: Tensor
    """Numbers of the grid."""
    scales_NB: Tensor
    """Scales [N / rows, B] of the blocks."""

    def weights(self, grid: Grid) -> Tensor:
        """What they stand for, float32 [N, K]."""
        return self.numbers_NK * _spread(self.scales_NB, grid, self.numbers_NK.shape[1])


def nearest(weights_NK: Tensor, grid: Grid) -> Rounded:
    """The nearest numbers under the usual scales."""
    scales_NB = grid.scales(_largest(_blocks(weights_NK, grid)))[0]
    return _round(weights_NK, scales_NB, grid)


def search(weights_NK: Tensor, grid: Grid, importance_K: Tensor | None = None) -> Rounded:
    """The nearest numbers under the scales of least error.

    importance_K: what the error of each column counts; by default all count alike.
    """
    return _round(weights_NK, _best_scales(weights_NK, grid, importance_K), grid)


def feedback(weights_NK: Tensor, grid: Grid, moments_KK: Tensor) -> Rounded:
    """Rounded column by column, each error made up for by the columns after it.

    moments_KK: H, the second moments of the inputs, float32. Rows that come out worse than under
    `search` with the diagonal of H are taken from there.
    """
    damped_KK = _damped(moments_KK)
    importance_K = damped_KK.diagonal()
    plain = search(weights_NK, grid, importance_K)
    fed_back = _feed_back(weights_NK, grid, importance_K, _inverse_root(damped_KK))
    return _better(weights_NK, damped_KK, grid, fed_back, plain)


def error(weights_NK: Tensor, rounded_NK: Tensor, moments_KK: Tensor) -> Tensor:
    """What the error of each row costs, [N]."""
    difference_NK = weights_NK - rounded_NK
    return ((difference_NK @ moments_KK) * difference_NK).sum(-1)


def _better(
    weights_NK: Tensor, moments_KK: Tensor, grid: Grid, one: Rounded, other: Rounded
) -> Rounded:
    """Of each row of blocks the one that costs less."""
    costs_2N = torch.stack([error(weights_NK, r.weights(grid), moments_KK) for r in (one, other)])
    other_is_better_N = costs_2N.unflatten(1, (-1, grid.rows)).sum(-1).diff(dim=0)[0] < 0
    rows_N = other_is_better_N.repeat_interleave(grid.rows)
    return Rounded(
        torch.where(rows_N[:, None], other.numbers_NK, one.numbers_NK),
        torch.where(other_is_better_N[:, None], other.scales_NB, one.scales_NB),
    )


def _feed_back(weights_NK: Tensor, grid: Grid, importance_K: Tensor, root_KK: Tensor) -> Rounded:
    rest_NK, numbers_NK = weights_NK.clone(), torch.empty_like(weights_NK)
    scales = []
    for start in range(0, weights_NK.shape[1], grid.columns):
        stop = min(start + grid.columns, weights_NK.shape[1])
        block_NC = rest_NK[:, start:stop]
        scales.append(_best_scales(block_NC, grid, importance_K[start:stop]))
        scale_N = scales[-1][:, 0].repeat_interleave(grid.rows)
        errors_NC = torch.empty_like(block_NC)
        for column in range(start, stop):
            root = root_KK[column]
            number_N = grid.round(rest_NK[:, column] / scale_N)
            numbers_NK[:, column] = number_N
            error_N = (rest_NK[:, column] - number_N * scale_N) / root[column]
            errors_NC[:, column - start] = error_N
            rest_NK[:, column + 1 : stop] -= torch.outer(error_N, root[column + 1 : stop])
        rest_NK[:, stop:] -= errors_NC @ root_KK[start:stop, stop:]
    return Rounded(numbers_NK, torch.cat(scales, dim=1))


def _damped(moments_KK: Tensor) -> Tensor:
    diagonal_K = moments_KK.diagonal()
    added = DAMPING * diagonal_K.mean().clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
    return moments_KK + torch.diag_embed(added.expand_as(diagonal_K))


def _inverse_root(damped_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse; damped further where rounding makes it needed."""
    scale = damped_KK.diagonal().mean()
    identity_KK = torch.eye(len(damped_KK), device=damped_KK.device)
    for damping in (0.0, DAMPING, 10 * DAMPING, 1.0):
        factor, failed = torch.linalg.cholesky_ex(damped_KK / scale + damping * identity_KK)
        if failed == 0:
            inverse = torch.cholesky_inverse(factor)
            root, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if failed == 0:
                return root
    return identity_KK


def _best_scales(weights_NK: Tensor, grid: Grid, importance_K: Tensor | None) -> Tensor:
    """The scales [N / rows, B] of least squared error, weighted by `importance_K`."""
    blocks_NRBC = _blocks(weights_NK, grid)
    importance_BC: Tensor | None = None
    if importance_K is not None:
        importance_BC = _blocks(importance_K[None], grid, rows=1)[0, 0]
    best_NB = least_NB = None
    for scales_NB in grid.scales(_largest(blocks_NRBC)):
        scale = scales_NB[:, None, :, None]
        squares_NRBC = (grid.round(blocks_NRBC / scale) * scale - blocks_NRBC).square_()
        if importance_BC is not None:
            squares_NRBC *= importance_BC
        errors_NB = squares_NRBC.sum((1, 3))
        if best_NB is None or least_NB is None:
            best_NB, least_NB = scales_NB, errors_NB
        else:
            better_NB = errors_NB < least_NB
            best_NB = torch.where(better_NB, scales_NB, best_NB)
            least_NB = torch.where(better_NB, errors_NB, least_NB)
    assert best_NB is not None, "a grid has scales"
    return best_NB


def _round(weights_NK: Tensor, scales_NB: Tensor, grid: Grid) -> Rounded:
    numbers_NK = grid.round(weights_NK / _spread(scales_NB, grid, weights_NK.shape[1]))
    return Rounded(numbers_NK, scales_NB)


def _spread(scales_NB: Tensor, grid: Grid, num_columns: int) -> Tensor:
    """The scale of each weight, [N, K]."""
    wide = scales_NB.repeat_interleave(grid.rows, 0).repeat_interleave(grid.columns, 1)
    return wide[:, :num_columns]


def _blocks(weights_NK: Tensor, grid: Grid, rows: int | None = None) -> Tensor:
    """The blocks [N / rows, rows, B, columns] of a matrix, padded with zeros on the right."""
    padded = F.pad(weights_NK, (0, -weights_NK.shape[1] % grid.columns))
    return padded.view(-1, rows or grid.rows, padded.shape[1] // grid.columns, grid.columns)


def _largest(blocks_NRBC: Tensor) -> Tensor:
    """The largest magnitude of each block; 1 where there are only zeros."""
    largest_NB = blocks_NRBC.abs().amax((1, 3))
    return torch.where(largest_NB > 0, largest_NB, 1.0)
