"""The model as captured steps run it: its forward, its key/value storage, its sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from runtime.cuda.compiling.blueprint import StepKey, StepShape
from runtime.cuda.compiling.step_forwards import StepForwards
from runtime.cuda.memory.pinned import PinnedPool
from runtime.cuda.options import LARGEST_BATCH, CudaOptions
from runtime.kv.size import page_bytes
from runtime.kv.state_kinds import require_pages, state_kinds
from runtime.kv.storage import Storage
from runtime.sizing.host_memory import require_host_memory
from runtime.weights.source import Source


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
        tokens = options.paged_tokens
        if tokens is not None:
            require_pages(self.config, tokens)
        spilled = options.spilled_tokens
        self._pool = None if not spilled else _pool(page_bytes(model, spilled), spilled)
        allocate = {} if self._pool is None else {"allocate_host": self._pool.take}
        self.storage = Storage(options.batch, options.context, tokens, spilled, **allocate)
        sizes = len(_buckets(self.batch))
        self.forwards = StepForwards(
            source, options.compile, device, num_sizes=sizes, storage=self.storage.size
        )
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

    def shape(self, key: StepKey, cache: Cache, *, own_attention: bool = True) -> StepShape:
        """All that the graph of a step depends on, which has run over `cache`.

        Raises ValueError where layers keep more than keys and values.
        """
        if not all(kind.keeps_positions for kind in state_kinds(self.config)):
            raise ValueError("states that recur or choose are compiled with compile=True alone")
        states = [_state(layer) for layer in cache.layers]
        return StepShape(key, self.storage.size, own_attention, states, self.device)

    def close(self) -> None:
        """Free the key/value storage and the compiled forward."""
        self.forwards.close()
        self.storage = Storage(*self.storage.size)
        if self._pool is not None:
            self._pool.close()


def _pool(num_bytes: int, spilled: int) -> PinnedPool:
    """Memory for so many tokens, beside the experts, which have theirs by now."""
    require_host_memory(spilled, num_bytes)
    return PinnedPool(num_bytes)


def _state(layer: Any) -> tuple[Any, Any, torch.dtype] | None:
    if not isinstance(getattr(layer, "keys", None), Tensor):
        return None
    return tuple(layer.keys.shape), tuple(layer.values.shape), layer.keys.dtype


def _buckets(batch: int) -> list[int]:
    """Powers of two up to `batch`, and `batch`."""
    return sorted({min(2**power, batch) for power in range(LARGEST_BATCH.bit_length())})
