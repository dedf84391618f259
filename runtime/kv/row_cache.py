"""The key/value cache of sequences in flight: a row each, chosen by index in every step.

A step's tokens lie side by side in one sequence [1, T], whichever sequences they belong to, so a
prompt's chunk and many single tokens share one forward pass and no padding ever reaches an expert.
New keys and values are written to (row, position); attention then runs for each sequence over a
view of its row. Regrouping sequences moves nothing, and a sequence attends exactly as it would
alone.

Of transformers' own continuous batching this takes the packed step and the attention functions,
which are run here once a sequence. Its paged cache did not hold up: it sizes heads by
`config.head_dim` (wrong for latent attention), off the GPU it attends with a mask of all tokens by
all cached tokens, its scheduler sees no residency, and its steps run in a thread of its own without
a place for the forecast. `StaticCache` has one length for all rows; `DynamicCache` would copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from runtime.kv.attention_kinds import require_rows
from runtime.kv.own_attention import Attention, OwnAttention
from runtime.kv.static_cache import StepTokens, Storage


class Span(NamedTuple):
    """The tokens of one sequence within a step."""

    row: int
    start: int
    """Tokens of the sequence that are in the cache already."""
    num_tokens: int
    """Tokens of this step."""


class RaggedTokens(StepTokens, Protocol):
    """The tokens of a step, of any rows, side by side: [1, T]."""

    rows_T: Tensor
    positions_T: Tensor

    def attend(
        self,
        function: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """From queries [1, heads, T, width] and all rows of a layer to [1, T, heads, width]."""


class TokenLayout:
    """Where each of a step's tokens belongs.

    attend_singles: attention of single tokens together, as
    `runtime.cuda.decode.row_decoder` has it; it serves the spans of one token that come first.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        device: torch.device,
        attend_singles: Callable[..., Tensor] | None = None,
    ) -> None:
        self._attend_singles = attend_singles
        ends = (index for index, span in enumerate(spans) if span.num_tokens > 1)
        self._num_singles = 0 if attend_singles is None else next(ends, len(spans))
        self.spans = spans
        rows = [span.row for span in spans for _ in range(span.num_tokens)]
        positions = [span.start + i for span in spans for i in range(span.num_tokens)]
        self.rows_T, self.positions_T = torch.tensor([rows, positions], device=device)
        self._masks: dict[tuple[Span, int | None], Tensor] = {}

    def write(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """Keys and values [1, heads, T, width] to the tokens' rows and positions."""
        keys[self.rows_T, :, self.positions_T] = new_keys[0].transpose(0, 1)
        values[self.rows_T, :, self.positions_T] = new_values[0].transpose(0, 1)

    def mask(self, span: Span, window: int | None) -> Tensor | None:
        """Who sees whom, bool [1, 1, new, all tokens]; None where everything is seen."""
        length = span.start + span.num_tokens
        if span.num_tokens == 1 and (window is None or length <= window):
            return None
        if (span, window) not in self._masks:
            positions = torch.arange(length, device=self.rows_T.device)
            query, key = positions[span.start :, None], positions[None]
            seen = key <= query if window is None else (key <= query) & (key > query - window)
            self._masks[span, window] = seen[None, None]
        return self._masks[span, window]

    def attend(
        self,
        function: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """`function`, once a sequence: from queries [1, heads, T, width] and a layer's rows to
        [1, T, heads, width].
        """
        outputs, at = [], self._num_singles
        if self._attend_singles is not None and at:
            places = self.rows_T[:at], self.positions_T[:at]
            outputs.append(self._attend_singles(query[:, :, :at], key, value, *places, **kwargs))
        for span in self.spans[at:]:
            length = span.start + span.num_tokens
            mask = self.mask(span, kwargs.get("sliding_window"))
            one = slice(span.row, span.row + 1)
            seen = key[one, :, :length], value[one, :, :length]
            queries = query[:, :, at : at + span.num_tokens]
            outputs.append(function(module, queries, *seen, mask, **kwargs)[0])
            at += span.num_tokens
        return torch.cat(outputs, 1)


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, [R, heads, context, width]."""

    def __init__(self, rows: RowCache, index: int) -> None:
        super().__init__()
        self._rows, self._index = rows, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            self._tensor("keys", key_states),
            self._tensor("values", value_states),
        )
        self.is_initialized = True

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        rows = self._rows
        if rows.storage is not None:
            return rows.storage.view(self._index, name, like, rows.num_rows)
        return like.new_empty(rows.num_rows, like.shape[1], rows.context, like.shape[-1])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self._rows.layout.write(self.keys, self.values, key_states, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._rows.context

    get_max_cache_shape = get_max_length
    """Its name in older versions of transformers."""


class RowCache(Cache):
    """`num_rows` sequences of up to `context` tokens, in `storage` where the engine has one (which
    it may be longer than); else memory is touched as tokens come.
    """

    def __init__(
        self, model: nn.Module, num_rows: int, context: int, storage: Storage | None = None
    ) -> None:
        config: Any = model.config
        text = config.get_text_config()
        require_rows(text, context)
        self.num_rows, self.context, self.storage = num_rows, context, storage
        self.layout: RaggedTokens
        self._free = list(range(num_rows - 1, -1, -1))
        self.epoch = 0
        """Times that a row was taken while all were free: no sequence lives in two epochs."""
        self._attention = OwnAttention(model, self._attend)
        super().__init__(layers=[RowLayer(self, index) for index in range(text.num_hidden_layers)])

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Of all rows; 0 before the first step."""
        layers = (layer for layer in self.layers if isinstance(layer, RowLayer))
        stored = (tensor for layer in layers for tensor in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in stored if tensor is not None)

    @property
    def free_rows(self) -> tuple[int, ...]:
        """The one that `take` gives comes last."""
        return tuple(self._free)

    def take(self, row: int | None = None) -> int:
        """A free row, or that one.

        Raises ValueError while the storage has sequences of others in it, and then takes none.
        """
        if self.storage is not None and not self.storage.take(self):
            raise ValueError(
                "the key/value cache of captured steps is in use by another serve or a generation "
                "of this engine; let it end, or give all requests to one model.expertflow.serve"
            )
        self.epoch += self.num_free == self.num_rows
        if row is None:
            return self._free.pop()
        self._free.remove(row)
        return row

    def release(self, row: int) -> None:
        assert row not in self._free
        self._free.append(row)
        if self.storage is not None and self.num_free == self.num_rows:
            self.storage.let_go(self)

    def claim(self) -> bool:
        """Whether all rows still hold what was written to them: an engine's storage is shared, and
        from now on it is this cache that writes to it.
        """
        return self.storage is None or self.storage.claim(self)

    @contextmanager
    def attending(self, layout: RaggedTokens) -> Iterator[None]:
        """Within the block, the model's forward runs over the tokens of `layout`."""
        self.layout = layout
        with self._attention.in_use():
            yield

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention by the layout, which knows the masks."""
        function = self._attention.replaced(module)
        return self.layout.attend(function, module, query, key, value, **kwargs), None
