"""Attention of a model's layers by a function of our own, for as long as a block lasts.

transformers calls attention by a name in the configuration. The modules of the model read copies of
their configurations with a private name: other models, which other threads may be running, can have
the same ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.kv.private_configs import PrivateConfigs

Attention = Callable[..., tuple[Tensor, Any]]
TAKEN = {"scaling", "sliding_window", "s_aux", "softcap", "is_causal"}
"""What kernels heed of all that a layer gives to its attention."""
OF_NO_MATTER = {
    "position_ids", "cache_position", "use_cache", "past_key_values", "logits_to_keep",
    "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
"""Meant for the forward pass, and handed through."""
UNDERSTOOD = TAKEN | OF_NO_MATTER


class OwnAttention:
    """`function`, in transformers' terms, in place of the attention of `model`."""

    def __init__(self, model: nn.Module, function: Attention) -> None:
        config: Any = model.config
        self._name = f"expertflow-attention-{id(self)}"
        self._configs = PrivateConfigs(model, self._name)
        self._function = function
        self._replaced = config.get_text_config()._attn_implementation

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, the model's layers call the function."""
        AttentionInterface.register(self._name, self._function)
        try:
            with self._configs.in_use():
                yield
        finally:
            del ALL_ATTENTION_FUNCTIONS._global_mapping[self._name]

    def replaced(self, module: nn.Module) -> Attention:
        """The attention that `module` has otherwise; it takes a boolean mask."""
        if self._replaced != "eager":
            return ALL_ATTENTION_FUNCTIONS[self._replaced]
        return partial(_eager, sys.modules[type(module).__module__].eager_attention_forward)


def _eager(
    function: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Eager attention adds its mask."""
    if mask is not None:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
    return function(module, query, key, value, mask, **kwargs)


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for tensors that a model gives its attention, of another meaning than those
    that are `UNDERSTOOD`.
    """
    unknown = sorted(
        name
        for name, given in kwargs.items()
        if isinstance(given, Tensor) and name not in UNDERSTOOD
    )
    if unknown:
        raise ValueError(
            f"the model's attention takes {', '.join(unknown)}, made for one sequence; it "
            "cannot be served, use model.generate"
        )
