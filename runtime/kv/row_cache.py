"""The key/value cache of sequences in flight: a row each, chosen by index in every step.

A step's tokens lie side by side in one sequence [1, T], whichever sequences they belong to, so a
prompt's chunk and many single tokens share one forward pass and no padding ever reaches an expert.
New keys and values are written to (row, position); attention then runs for each sequence over a
view of its row. Regrouping sequences moves nothing, and a sequence attends exactly as it would
alone. Where layers recur, choose what they attend to or expand what they keep, sequences cannot lie
side by side: then a prompt runs by itself, and single tokens are a batch [T, 1] (`stacks`).

Of transformers' own continuous batching this takes the packed step and the attention functions,
which are run here once a sequence. Its paged cache did not hold up: it sizes heads by
`config.head_dim` (wrong for latent attention), off the GPU it attends with a mask of all tokens by
all cached tokens, its scheduler sees no residency, and its steps run in a thread of its own without
a place for the forecast. `StaticCache` has one length for all rows; `DynamicCache` would copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from runtime.kv.own_attention import OwnAttention, refuse_unknown
from runtime.kv.pages import places
from runtime.kv.pages.page_table import PageTable
from runtime.kv.pages.spill import (
    bytes_seen,
    move_pages,
    wait_for_moves,
    with_host_pages,
    with_spilled,
)
from runtime.kv.row_layers import PagedLayer, RowRecurrentLayer, row_layer
from runtime.kv.state_kinds import (
    WHOLE_PROMPTS,
    Mask,
    require_pages,
    require_rows,
    state_kinds,
)
from runtime.kv.static_cache import class_for
from runtime.kv.storage import Storage
from runtime.kv.token_layout import RaggedTokens


def row_cache(
    model: nn.Module, num_rows: int, context: int, storage: Storage | None = None,
    tokens: int | None = None,
) -> RowCache:  # fmt: skip
    """The cache of sequences in flight of `model`; see `RowCache`."""
    whole: Any = model
    cache: RowCache = class_for(whole.config.get_text_config(), RowCache)(
        model, num_rows, context, storage, tokens
    )
    return cache


TABLE = -1
"""Of the table of pages, in place of a layer's number."""


class RowCache(Cache):
    """`num_rows` sequences of up to `context` tokens, in `storage` where the engine has one (which
    it may be longer than); else memory is touched as tokens come. tokens: of all sequences, whose
    keys and values lie in pages then; those of the storage, where there is one.
    """

    def __init__(
        self, model: nn.Module, num_rows: int, context: int, storage: Storage | None = None,
        tokens: int | None = None,
    ) -> None:  # fmt: skip
        config: Any = model.config
        text = config.get_text_config()
        require_rows(text, context)
        self.num_rows, self.context, self.storage = num_rows, context, storage
        self.layout: RaggedTokens
        self.kinds = state_kinds(text)
        self._chunk = getattr(text, "attention_chunk_size", None)
        self._window = getattr(text, "sliding_window", None)
        self.runs_prompts_whole = text.model_type in WHOLE_PROMPTS
        """Whether a prompt cannot go on where a piece of it has ended."""
        self._free = list(range(num_rows - 1, -1, -1))
        self.epoch = 0
        """Times that a row was taken while all were free: no sequence lives in two epochs."""
        self._attention = OwnAttention(model, self._attend)
        self.pages = self._page_table(text, tokens if storage is None else storage.tokens)
        """The pages of each row; None where rows lie in one piece."""
        number = getattr(text, "number_of_conv_states", 1)
        self._own_layers = [
            row_layer(kind, self, index, number, paged=self.pages is not None)
            for index, kind in enumerate(self.kinds)
        ]
        Cache.__init__(self, layers=list(self._own_layers))
        self._recurrent = [one for one in self._own_layers if isinstance(one, RowRecurrentLayer)]
        self._chooses = any(kind.indexes for kind in self.kinds)
        self.stacks = any(kind.stacks for kind in self.kinds)
        """Whether single tokens run as a batch [T, 1], and prompts one at a time."""

    def _page_table(self, config: Any, tokens: int | None) -> PageTable | None:
        if tokens is None:
            return None
        require_pages(config, tokens)
        page = places.PAGE if self.storage is None else self.storage.page
        on_host = 0 if self.storage is None else self.storage.num_host_pages
        return PageTable(
            self.num_rows, self.room, -(-tokens // page), page,
            lambda like: self.allocate(TABLE, "pages", like), on_host,
        )  # fmt: skip

    @property
    def room(self) -> int:
        """Positions of a row; an engine's storage may have more than are asked for."""
        return self.context if self.storage is None else self.storage.context

    def allocate(self, index: int, name: str, like: Tensor) -> Tensor:
        """Memory of layer `index` for a state `like` [*, ...] of every row, [R, ...]: of the
        engine's storage, where it has one.
        """
        if self.storage is not None:
            return self.storage.state(index, name, like, self.num_rows)
        return like.new_empty(self.num_rows, *like.shape[1:])

    def allocate_pages(self, index: int, name: str, like: Tensor) -> Tensor:
        """Memory of layer `index` in pages, for entries `like` [*, heads, *, width]."""
        assert self.pages is not None
        if self.storage is not None:
            return self.storage.pages(index, name, like)
        shape = self.pages.num_pages, like.shape[1], self.pages.page, like.shape[3]
        return like.new_empty(shape)

    def allocate_host_pages(self, index: int, name: str, like: Tensor) -> Tensor | None:
        """Further pages in host memory; None where no page can lie there."""
        return None if self.storage is None else self.storage.host_pages(index, name, like)

    def entries(self, row: int, num_tokens: int) -> Any:
        """The index of a row's first tokens in each of `by_position`: with pages, of all that lies
        in the same ones on the device.
        """
        if self.pages is None:
            return row, ..., slice(num_tokens), slice(None)
        self._move_pages()
        away = len(self.pages.spilled_of(row, num_tokens))
        return torch.tensor(self.pages.of(row, num_tokens)[away:], dtype=torch.int64)

    def beginnings(self, row: int, num_tokens: int, *, on_host: bool = False) -> Iterator[Tensor]:
        """Copies of a row's first tokens in each of `by_position`, or of their pages in order."""
        at = self.entries(row, num_tokens)
        away = [] if self.pages is None else self.pages.spilled_of(row, num_tokens)
        for states, spilled in with_host_pages(self._own_layers):
            own = states[at].to("cpu", copy=True) if on_host else states[at]
            if on_host and away:
                wait_for_moves(states)
            yield with_spilled(own, spilled, away)

    def _move_pages(self) -> None:
        """Copy the pages that were sent to host memory, or back, since this was last done."""
        moves = [] if self.pages is None else self.pages.take_moves()
        for states, spilled in with_host_pages(self._own_layers) if moves else ():
            if spilled is not None:
                move_pages(states, spilled, moves)

    def spilled_bytes(self, row: int, position: int) -> int:
        """Of keys and values in host memory that a row's token at `position` attends to."""
        if self.pages is None or not (away := len(self.pages.spilled_of(row))):
            return 0
        kinds = zip(self.kinds, self._own_layers, strict=True)
        layers = [(kind.mask, one.spilled) for kind, one in kinds if isinstance(one, PagedLayer)]
        return bytes_seen(layers, away, position, self.pages.page, self._window, self._chunk)

    def send_pages(self, device: torch.device) -> None:
        """Let what runs next on the device find the pages that rows have now."""
        if self.pages is not None:
            self._move_pages()
            self.pages.sent_to(device)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Of all rows; 0 before the first step."""
        return sum(tensor.nbytes for tensor in self.by_position + self.by_row)

    @property
    def by_position(self) -> list[Tensor]:
        """Tensors with an entry for each position, [R, ..., context, width], or in pages."""
        return [tensor for layer in self._own_layers for tensor in layer.by_position]

    @property
    def by_row(self) -> list[Tensor]:
        """Tensors of one size for each sequence, [R, ...]."""
        return [tensor for layer in self._own_layers for tensor in layer.by_row]

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
        if self.num_free == self.num_rows:
            self.epoch += 1
            if self.pages is not None:
                self.pages.renew()
        if row is None:
            return self._free.pop()
        self._free.remove(row)
        return row

    def release(self, row: int, *, keep: bool = False) -> None:
        """Free a row. keep: with the pages that it has."""
        assert row not in self._free
        if self.pages is not None and not keep:
            self.pages.cut(row)
        self._free.append(row)
        if self.storage is not None and self.num_free == self.num_rows:
            self.storage.let_go(self)

    def claim(self) -> bool:
        """Whether all rows still hold what was written to them: an engine's storage is shared, and
        from now on it is this cache that writes to it.
        """
        if self.storage is None or self.storage.claim(self):
            return True
        if self.pages is not None:
            self.pages.renew()
        return False

    @contextmanager
    def attending(self, layout: RaggedTokens) -> Iterator[None]:
        """Within the block, the model's forward runs over the tokens of `layout`."""
        self.layout = layout
        if self.pages is not None:
            self._move_pages()
            layout.places = self.pages.sent_to(layout.rows_B.device)
        rows_B = layout.rows_B[:1] if layout.is_one_sequence else layout.rows_B
        for layer in self._recurrent:
            layer.take(rows_B, is_new=layout.is_new)
        with self._attention.in_use():
            yield
        for layer in self._recurrent:
            layer.put(rows_B)

    def states_of(self, rows_B: Tensor) -> list[Tensor]:
        """Copies of what a step of these rows changes for good."""
        return [tensor[rows_B] for tensor in self.by_row]

    def set_states(self, rows_B: Tensor, saved: list[Tensor]) -> None:
        """Put such copies back."""
        for tensor, before in zip(self.by_row, saved, strict=True):
            tensor[rows_B] = before

    def mask(self, layout: RaggedTokens) -> Tensor | None:
        """The mask that layers must be given which choose what they attend to; None: there are
        none, and the layout knows better.
        """
        return layout.seen(self.room) if self._chooses else None

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention by the layout, which knows the masks but for those that a layer chooses."""
        kind = self.kinds[getattr(module, "layer_idx", 0)]
        if not kind.indexes:
            refuse_unknown(kwargs)
        kwargs["gathered"] = kind.expands
        if kind.mask is Mask.CHUNKED:
            kwargs["chunk"] = self._chunk
        if kind.indexes:
            assert attention_mask is not None
            is_bool = attention_mask.dtype == torch.bool
            kwargs["seen"] = attention_mask if is_bool else attention_mask == 0
        function = self._attention.replaced(module)
        layer = self._own_layers[getattr(module, "layer_idx", 0)]
        if isinstance(layer, PagedLayer):
            kwargs["spilled"] = layer.spilled
        return self.layout.attend(function, module, query, key, value, **kwargs), None
