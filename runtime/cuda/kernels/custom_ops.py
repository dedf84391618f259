"""The kernels as opaque operators, for models whose other operations are compiled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.cuda.kernels import attention as attend_kernel
from runtime.cuda.kernels.dense import top_k as top_k_kernel
from runtime.kv.pages.places import Paged, Spilled


class LayerRunner(Protocol):
    """Runs the experts calls of one model's captured steps."""

    def run_layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The kernels of layer `index`: x [B, H], ids and weights [B, K], to [B, H]."""


_RUNNING = threading.local()


@contextmanager
def running(runner: LayerRunner) -> Iterator[None]:
    """Within the block, the operators that this thread runs are calls of `runner`.

    An operator takes numbers and tensors only. A number that stood for the model would differ from
    process to process, and with it every key of the compiler's caches.
    """
    outer = getattr(_RUNNING, "runner", None)
    _RUNNING.runner = runner
    try:
        yield
    finally:
        _RUNNING.runner = outer


@torch.library.custom_op("expertflow::experts", mutates_args=())
def experts(x: Tensor, ids: Tensor, weights: Tensor, layer: int) -> Tensor:
    """`LayerRunner.run_layer`. Nothing else in a graph touches what it writes (slots, tables)."""
    output: Tensor = _RUNNING.runner.run_layer(layer, x, ids, weights)
    return output


@experts.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, layer: int) -> Tensor:
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
    table_RN: Tensor | None,
    page: int,
    spilled_keys: Tensor | None,
    spilled_values: Tensor | None,
) -> Tensor:
    """`attention.attend`, as one operator."""
    spilled = None
    if spilled_keys is not None and spilled_values is not None:
        spilled = Spilled(spilled_keys, spilled_values)
    paged = None if table_RN is None else Paged(table_RN, page)
    return attend_kernel.attend(
        query_BHD, keys_RGCD, values_RGCV, rows_B, positions_B, scale, window, sinks_H, softcap,
        real_RC, paged, spilled,
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
