"""Sizes of key/value caches: of any model, on the meta device, and of captured steps' storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from routing.layers import MoELayer, find_moe_layers
from runtime.kv.pages.places import PAGE
from runtime.kv.state_kinds import fits_pages, unsupported
from runtime.kv.static_cache import shared_cache
from runtime.kv.storage import Storage

CACHE_MODULE = "transformers.cache_utils"
SHORTEST = 8
"""Tokens of a pass that shows what a cache keeps."""
_OF_A_ROW: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()
"""Bytes of one sequence's storage by its context: to find them takes seconds."""
SHORT = (128, 256, 384)
"""Lengths that a cache of recurrent layers is measured at: their steps over longer sequences take
minutes, and the cache grows by the same bytes for every token."""


def cache_bytes(model: nn.Module, layers: list[MoELayer], num_tokens: int) -> int | None:
    """Bytes of the key/value cache of one sequence of `num_tokens`, recurrent states included.

    model: on the meta device, so the forward pass that fills the cache costs nothing; its experts
    are skipped. None where the architecture's own code cannot run without data.
    """
    if num_tokens > max(SHORT) and not _has_windows(model.config):
        sizes = [_measured(model, layers, length) for length in SHORT]
        known = [size for size in sizes if size]
        if len(known) < len(SHORT):
            return None
        slope = (known[1] - known[0]) / (SHORT[1] - SHORT[0])
        is_affine = known[2] - known[1] == slope * (SHORT[2] - SHORT[1])
        if is_affine and known[0] > slope * SHORT[0]:  # a part of it is constant: recurrent states
            return int(known[0] + slope * (num_tokens - SHORT[0]))
    return _measured(model, layers, num_tokens)


def _has_windows(config: Any) -> bool:
    """True where the cache may stop to grow at some length."""
    fields = config.get_text_config().to_dict()
    kinds = str(fields.get("layer_types"))
    named = any(("window" in name or "attention_chunk" in name) and fields[name] for name in fields)
    return named or "sliding" in kinds or "chunked" in kinds


def _measured(model: nn.Module, layers: list[MoELayer], num_tokens: int) -> int | None:
    """Bytes of the cache that a forward pass over `num_tokens` fills."""
    token_ids = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    decoder = {"decoder_input_ids": token_ids} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    try:
        with torch.no_grad(), skipped(layers):
            output = model(input_ids=token_ids, use_cache=True, **decoder)
        return tensor_bytes(output["past_key_values"]) or None
    except (RuntimeError, NotImplementedError, KeyError, ValueError):
        return None


def tensor_bytes(cache: Any) -> int:
    """Of all tensors of the cache's layers."""
    found: dict[int, Tensor] = {}
    stack, seen = [cache], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif isinstance(item, (list, tuple)):
            stack += item
        elif isinstance(item, dict):
            stack += item.values()
        elif "Cache" in type(item).__name__ or type(item).__module__ == CACHE_MODULE:
            stack += vars(item).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def storage_bytes(model: nn.Module, batch: int, context: int, tokens: int | None = None) -> int:
    """Bytes of `Storage` for the captured steps of a model, before there is any. tokens: of all
    sequences, where they lie in pages and the model keeps what can.

    0 for a model without captured steps: one whose states are of no known kind, whose decoder
    attends to an encoder, or whose own code waits for its numbers.
    """
    whole: Any = model
    config = whole.config
    if config.is_encoder_decoder or unsupported(config.get_text_config(decoder=True)) is not None:
        return 0
    if tokens is None or not fits_pages(config.get_text_config(decoder=True)):
        return batch * _bytes_of_a_row(whole, context)
    of_states = _bytes_of_a_row(whole, PAGE) - _bytes_of_a_page(whole)
    return batch * of_states + page_bytes(model, tokens)


def page_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of the pages of so many tokens, of a model whose states can lie in some."""
    return -(-tokens // PAGE) * _bytes_of_a_page(model)


def _bytes_of_a_page(model: Any) -> int:
    return _bytes_of_a_row(model, 2 * PAGE) - _bytes_of_a_row(model, PAGE)


def _bytes_of_a_row(model: Any, context: int) -> int:
    known = _OF_A_ROW.setdefault(model, {})
    if context not in known:
        try:
            known[context] = _storage_of_copy(model, 1, context)
        except NotImplementedError:  # numbers were asked for that the copy does not have
            known[context] = 0
    return known[context]


@torch.no_grad()
def _storage_of_copy(model: Any, batch: int, context: int) -> int:
    """Of what a copy of the model without memory writes in a short pass."""
    with torch.device("meta"):
        copy = type(model)._from_config(model.config, dtype=model.dtype)
    storage = Storage(batch, context)
    with skipped(find_moe_layers(copy)):
        token_ids = torch.zeros(1, SHORTEST, dtype=torch.int64, device="meta")
        cache = shared_cache(storage, model.config.get_text_config(decoder=True))
        copy(input_ids=token_ids, past_key_values=cache, use_cache=True)
    return storage.num_bytes


@contextmanager
def skipped(layers: list[MoELayer]) -> Iterator[None]:
    """Within the block, the experts of these layers do nothing."""
    for layer in layers:
        layer.module.forward = lambda hidden, *_, **__: torch.zeros_like(hidden)
    try:
        yield
    finally:
        for layer in layers:
            del layer.module.forward
