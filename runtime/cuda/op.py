"""The experts call as one opaque operator, for models whose other operations are compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from runtime.cuda.decoder import Decoder

DECODERS: WeakValueDictionary[int, Decoder] = WeakValueDictionary()
"""Live decoders by the id of their model: an operator takes numbers and tensors only."""


@torch.library.custom_op("expertflow::experts", mutates_args=())
def experts(x: Tensor, ids: Tensor, weights: Tensor, model: int, layer: int) -> Tensor:
    """`Decoder.run_layer`. What it writes (slots, books) nothing else in a graph touches."""
    return DECODERS[model].run_layer(layer, x, ids, weights)


@experts.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, model: int, layer: int) -> Tensor:
    return torch.empty_like(x)
