"""The tokens of a captured step: their rows and positions in the cache, and their attention.

SingleTokens  one token of each of any rows
PaddedTokens  the next token of every row, all at one position, behind rows with padding in them
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runtime.cuda.kernels import attention as kernels
from runtime.cuda.kernels.new_tokens import write
from runtime.kv.own_attention import UNDERSTOOD
from runtime.kv.pages.places import Paged, Places, Spilled, WholeRows
from runtime.kv.state_kinds import KINDS, Mask, masks_of, state_kinds


class SingleTokens:
    """Where the tokens of a captured step belong: static tensors that a graph reads."""

    def __init__(self, rows_B: Tensor, positions_B: Tensor) -> None:
        self.rows_B, self.positions_B = rows_B, positions_B
        self.places: Places = WholeRows()

    def write(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """Write the tokens' keys and values to a layer's memory, which `places` knows."""
        new_keys, new_values = _one_a_token(new_keys), _one_a_token(new_values)
        if torch.compiler.is_compiling():  # which makes it one kernel with what comes before
            at_B, within_B = self.places.at(self.rows_B, self.positions_B)
            keys[at_B, :, within_B] = new_keys
            values[at_B, :, within_B] = new_values
        else:
            tokens = self.rows_B, self.positions_B, _paged(self.places)
            write(new_keys, new_values, keys, values, *tokens)


def attend_singles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    places: Places,
    real_RC: Tensor | None = None,
    spilled: Spilled | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of B single tokens, in transformers' terms: from queries [1, heads, B, width] or
    [B, heads, 1, width] and all rows of a layer to [1, B, heads, width] or [B, 1, heads, width].
    spilled: pages of these rows in host memory, which are read in place.
    """
    scale = kwargs.get("scaling")
    given = (
        _one_a_token(query), key, value, rows_B, positions_B,
        query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("sliding_window"),
        kwargs.get("s_aux"), kwargs.get("softcap"), real_RC,
    )  # fmt: skip
    paged = _paged(places)
    if torch.compiler.is_compiling():
        pages = (None, 0) if paged is None else (paged.table_RN, paged.page)
        out_BHV: Tensor = torch.ops.expertflow.attend(*given, *pages, *(spilled or (None, None)))
    else:
        out_BHV = kernels.attend(*given, paged, spilled)
    return out_BHV.view(len(query), -1, *out_BHV.shape[1:])


def _paged(places: Places) -> Paged | None:
    """What kernels are told of the places; None where rows lie in one piece."""
    return places if isinstance(places, Paged) else None


def _one_a_token(states: Tensor) -> Tensor:
    """[B, heads, width] of states [1, heads, B, width] or [B, heads, 1, width]."""
    return states.transpose(1, 2).flatten(0, 1)


class UnknownAttention(Exception):
    """A layer attends in a way that no kernel has."""


class SeenTokens(NamedTuple):
    """Which tokens of its row each new token sees."""

    mask: Tensor
    """In the form that the model's attention takes."""
    seen_BC: Tensor
    """True for the tokens of `window` that are seen, as far as the position does not say so."""
    window: int | None


class PaddedTokens(SingleTokens):
    """The next token of each of the first `batch` rows, all at one position of the cache."""

    def __init__(self, model: nn.Module, batch: int, context: int, device: torch.device) -> None:
        zeros_B = torch.zeros(batch, dtype=torch.int64, device=device)
        super().__init__(torch.arange(batch, device=device), zeros_B)
        whole: Any = model
        self._config: Any = whole.config.get_text_config(decoder=True)
        self._masks = masks_of(state_kinds(self._config))
        self._dtype: torch.dtype = whole.dtype
        self._real_BC = torch.ones(batch, context, dtype=torch.bool, device=device)
        self._padding_B = torch.zeros_like(zeros_B)
        """Tokens at the left of each row that are padding."""
        self._columns_C = torch.arange(context, device=device)
        self._seen: dict[Mask, SeenTokens] = {}

    def start(self, length: int, real_BT: Tensor | None) -> None:
        """The rows have `length` tokens; real_BT is False for padding."""
        self.positions_B.fill_(length)
        self._real_BC.fill_(True)
        self._padding_B.zero_()
        if real_BT is not None:
            self._real_BC[:, : real_BT.shape[1]] = real_BT
            self._padding_B.copy_((real_BT.cumsum(-1) == 0).sum(-1))

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention in transformers' terms; `attention_mask` says only which tokens are seen."""
        same = [seen for seen in self._seen.values() if seen.mask is attention_mask]
        if not same or not self._is_known(module, query, key, kwargs):
            raise UnknownAttention
        kwargs["sliding_window"] = same[0].window
        tokens = self.rows_B, self.positions_B, self.places, same[0].seen_BC
        return attend_singles(query, key, value, *tokens, **kwargs), None

    def _is_known(
        self, module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]
    ) -> bool:
        given = {name for name, value in kwargs.items() if value is not None}
        if kwargs.get("dropout"):
            return False
        if getattr(module, "sinks", None) is not None and "s_aux" not in given:
            return False
        fits = key.shape[::2] == self._real_BC.shape and not query.shape[1] % key.shape[1]
        return fits and given <= UNDERSTOOD | {"dropout"}

    def masks(self) -> Tensor | dict[str, Tensor | None]:
        """The mask of each row's new token: one, or one for each layer type where they differ.

        A layer without attention gets none: a generated token is never padding.
        """
        past_BC = self._columns_C <= self.positions_B[:, None]
        self._seen = {mask: self._seen_tokens(mask, past_BC) for mask in self._masks}
        if len(self._seen) == 1:
            return next(iter(self._seen.values())).mask
        masks = {mask: seen.mask for mask, seen in self._seen.items()}
        return {name: kind.mask and masks.get(kind.mask) for name, kind in KINDS.items()}

    def _seen_tokens(self, mask: Mask, past_BC: Tensor) -> SeenTokens:
        real_BC, window = self._real_BC, None
        seen_BC = real_BC & past_BC
        if mask is Mask.SLIDING:
            window = self._config.sliding_window
            seen_BC = seen_BC & (self._columns_C > self.positions_B[:, None] - window)
        elif mask is Mask.CHUNKED:
            own_B = self.positions_B - self._padding_B
            first_B = self.positions_B - own_B % self._config.attention_chunk_size
            real_BC = real_BC & (self._columns_C >= first_B[:, None])
            seen_BC = seen_BC & real_BC
        return SeenTokens(self._as_mask(seen_BC), real_BC, window)

    def _as_mask(self, seen_BC: Tensor) -> Tensor:
        mask_B11C = seen_BC[:, None, None]
        if self._config._attn_implementation == "eager":
            lowest = torch.finfo(self._dtype).min
            return torch.zeros_like(mask_B11C, dtype=self._dtype).masked_fill(~mask_B11C, lowest)
        return mask_B11C
