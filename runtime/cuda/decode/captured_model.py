"""The model as captured steps run it: its forward, its key/value storage, its sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runtime.cuda.decode.fused_forward import FusedForward
from runtime.cuda.decode.fused_top_k import FusedTopKPass
from runtime.cuda.options import CudaOptions
from runtime.kv.static_cache import Storage
from runtime.weights.source import Source

COMPILER: dict[str, Any] = {
    "coordinate_descent_tuning": True,
    "deterministic": True,
    "post_grad_custom_pre_pass": FusedTopKPass(),
}
"""Makes the products of one token reductions of the compiler's own, at the memory's bandwidth, and
a router's choice one kernel. No reduction is tuned by the clock: else two loads of a model would
sum in different orders."""
LARGEST_BATCH = 32
"""Most sequences of a step: with more, decode kernels would compute more than they load."""


class CapturedModel:
    """The part of a model that all its captured steps share.

    context: tokens of the longest sequence; batch: sequences of the largest step.
    """

    def __init__(self, source: Source, options: CudaOptions, device: torch.device) -> None:
        model: Any = source.model
        self.model = model
        self.config: Any = model.config.get_text_config(decoder=True)
        self.device = device
        self.context, self.batch = options.context, min(options.batch, LARGEST_BATCH)
        self.top_k = max(layer.top_k for layer in source.layers)
        self.storage = Storage(options.batch, options.context)
        self.forward: Any = None
        """The model's forward, compiled or with fused norms."""
        if options.compile:
            self.forward = _compiled(model.forward, num_sizes=len(_buckets(self.batch)))
        else:
            self.forward = FusedForward(model)
        self.stream = torch.cuda.Stream(device)
        """The stream that captures steps: cuBLAS keeps a workspace for each stream."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the model."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def bucket(self, num_rows: int) -> int:
        """Rows of the captured step that serves so many sequences."""
        return next(size for size in _buckets(self.batch) if size >= num_rows)

    def close(self) -> None:
        """Free the key/value storage and the compiled forward."""
        self.storage = Storage(self.storage.batch, self.context)
        self.forward = None


def _compiled(forward: Callable[..., Any], num_sizes: int) -> Callable[..., Any]:
    """`forward`, compiled anew for every size of step, generated or served: torch's own limit is
    eight, beyond which it would run uncompiled.
    """
    compiled = torch.compile(forward, dynamic=False, options=COMPILER)
    limit = max(torch._dynamo.config.recompile_limit, 4 * num_sizes)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=limit):
            return compiled(*args, **kwargs)

    return run


def _buckets(batch: int) -> list[int]:
    """Powers of two up to `batch`, and `batch`."""
    return sorted({min(2**power, batch) for power in range(LARGEST_BATCH.bit_length())})
