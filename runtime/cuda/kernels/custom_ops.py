"""The kernels as opaque operators, for models whose other operations are compiled."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from runtime.cuda.kernels import attention as attend_kernel
from runtime.cuda.kernels.dense import top_k as top_k_kernel


class LayerRunner(Protocol):
    """Runs the experts calls of one model's captured steps."""

    def run_layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The kernels of layer `index`: x [B, H], ids and weights [B, K], to [B, H]."""


DECODERS: WeakValueDictionary[int, LayerRunner] = WeakValueDictionary()
"""Live decoders by the id of their model: an operator takes numbers and tensors only."""


@torch.library.custom_op("expertflow::experts", mutates_args=())
def experts(x: Tensor, ids: Tensor, weights: Tensor, model: int, layer: int) -> Tensor:
    """`LayerRunner.run_layer`. Nothing else in a graph touches what it writes (slots, tables)."""
    return DECODERS[model].run_layer(layer, x, ids, weights)


@experts.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, model: int, layer: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("expertflow::attend", mutates_args=())
def attend(
    query_BHD: Tensor,
    keys_RGCD: Tensor,
    values_RGCV: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    scale: float,
    window: int | None,
    sinks_H: Tensor | None,
    softcap: float | None,
    real_RC: Tensor | None,
) -> Tensor:
    """`attention.attend`, as one operator."""
    return attend_kernel.attend(
        query_BHD, keys_RGCD, values_RGCV, rows_B, positions_B, scale, window, sinks_H, softcap,
        real_RC,
    )  # fmt: skip


@attend.register_fake
def _(query_BHD: Tensor, keys_RGCD: Tensor, values_RGCV: Tensor, *_: Any) -> Tensor:
    return query_BHD.new_empty(*query_BHD.shape[:2], values_RGCV.shape[-1])


@torch.library.custom_op("expertflow::top_k", mutates_args=())
def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_k.top_k`, as one operator."""
    return top_k_kernel.top_k(x, k)


@top_k.register_fake
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = *x.shape[:-1], k
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)
