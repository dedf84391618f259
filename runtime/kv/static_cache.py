"""The cache of captured steps: static layers over storage of our own.

Every batch size has its own cache object, since a captured step holds on to its tensors, but all
share one storage, as large as the largest batch needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from runtime.kv.state_kinds import Mask, StateKind, state_kinds
from runtime.kv.static_layers import static_layer
from runtime.kv.storage import StepTokens, Storage


def shared_cache(storage: Storage, config: Any) -> SharedCache:
    """The cache of one batch size of a model with the text configuration `config`."""
    cache: SharedCache = class_for(config, SharedCache)(storage, config)
    return cache


def class_for(config: Any, base: type[Cache]) -> Any:
    """`base`, or what a model asks for that has a class of its own."""
    if config.model_type != "minimax":
        return base
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    class LightningCache(base, MiniMaxCache):  # type: ignore[misc, valid-type]
        """What MiniMax asks of its cache: a recurrent state by names of its own."""

        linear_cache: list[Tensor] = []  # noqa: RUF012 - what it asks for the length of

        def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
            layer: Any = self.layers[layer_idx]
            layer.update_recurrent_state(linear_cache)
            layer.has_previous_state[0] = True

        def get_linear_cache(self, layer_idx: int) -> Tensor | None:
            layer: Any = self.layers[layer_idx]
            return layer.recurrent_states[0] if layer.has_previous_state[0] else None

    return LightningCache


def _makes_masks(kind: StateKind) -> bool:
    """Whether the model has to make a prompt's masks itself: for static caches transformers 5.17
    fails to make those of chunks, and to 5.23 makes those of windows beside a recurrence without
    the window.
    """
    return kind.mask is Mask.CHUNKED or (kind.recurs and kind.mask is Mask.SLIDING)


class SharedCache(Cache):
    """The cache of one batch size of a model with the text configuration `config`."""

    def __init__(self, storage: Storage, config: Any) -> None:
        self.step: StepTokens | None = None
        """The tokens of the step that runs; None: of a prompt, behind what is there."""
        kinds = state_kinds(config)
        number = getattr(config, "number_of_conv_states", 1)
        self._lengths_L: Tensor | None = None
        self._own_layers = [
            static_layer(kind, self, storage, index, number) for index, kind in enumerate(kinds)
        ]
        Cache.__init__(self, layers=list(self._own_layers))
        self._makes_masks = any(map(_makes_masks, kinds))

    @property
    def is_compileable(self) -> bool:
        """Whether a prompt's masks shall be made before the model runs."""
        return not self._makes_masks

    def lengths(self, device: torch.device) -> Tensor:
        """Tokens in each layer, int64 [L]."""
        if self._lengths_L is None:
            num_layers = len(self._own_layers)
            self._lengths_L = torch.zeros(num_layers, dtype=torch.int64, device=device)
        return self._lengths_L

    def set_length(self, length: int) -> None:
        """Forget what lies beyond `length` tokens. What recurs has no such thing."""
        for layer in self._own_layers:
            layer.length = length
        if self._lengths_L is not None:
            self._lengths_L.fill_(length)

    @property
    def recurrent(self) -> list[Tensor]:
        """Tensors of all layers that a step changes for good."""
        return [tensor for layer in self._own_layers for tensor in layer.recurrent]

    def reset(self) -> None:
        """As the layers' own, in a few launches for all of them."""
        stored = [tensor for layer in self._own_layers for tensor in layer.stored]
        for layer in self._own_layers:
            layer.forget()
        self.set_length(0)
        if stored:
            torch._foreach_zero_(stored)
