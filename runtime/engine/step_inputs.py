"""The inputs of a step, read off the arguments of the model's forward call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from routing.predictor_file.format import PADDING


class StepInputs(NamedTuple):
    """The tokens of one step."""

    token_ids_BT: np.ndarray | None
    """int64; None where the model was called with embeddings instead."""
    positions_BT: np.ndarray
    """int64, absolute; PADDING where the attention mask hides the token."""
    past_length: int
    """Tokens in the key/value cache before this step."""
    num_tokens: int
    """Tokens to run that are not padding."""
    cache: Any = None
    """The key/value cache that the step goes on with, if one was given."""


def end_tokens(model: Any) -> frozenset[int]:
    """The ids with which the model ends a sequence."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def read_inputs(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mask_BT: Tensor | None = None,
) -> StepInputs:
    """Read token ids, positions and history length of the (decoder's) step.

    mask_BT: zero for padding, where the call itself has a mask of another form.
    Raises ValueError while the model is traced: the trace would keep the routes of one call.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(
            "an offloaded model cannot be traced: which experts run is decided in every call; "
            "call model.expertflow.detach() first"
        )
    names = _argument_names(type(model).forward)
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    prefix = "decoder_" if model.config.is_encoder_decoder else ""  # type: ignore[union-attr]
    token_ids = kwargs.get(f"{prefix}input_ids")
    mask = kwargs.get(f"{prefix}attention_mask") if mask_BT is None else mask_BT
    past_length = _past_length(kwargs.get("past_key_values"))
    shape = _shape(token_ids, kwargs.get(f"{prefix}inputs_embeds"))
    positions_BT = _positions(shape, mask, past_length)
    return StepInputs(
        None if token_ids is None else token_ids.cpu().numpy().astype(np.int64),
        positions_BT,
        past_length,
        int((positions_BT != PADDING).sum()),
        kwargs.get("past_key_values"),
    )


@cache
def _argument_names(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _shape(token_ids: Tensor | None, embeds: Tensor | None) -> tuple[int, int]:
    present = token_ids if token_ids is not None else embeds
    return (0, 0) if present is None else (present.shape[0], present.shape[1])


def _positions(shape: tuple[int, int], mask: Any, past_length: int) -> np.ndarray:
    """Positions count real tokens only, so left padding does not shift them."""
    batch, length = shape
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        real = mask.to("cpu", torch.int64)
        counted = real.cumsum(1) - 1
        positions = torch.where(real > 0, counted, PADDING)[:, -length:]
        return positions.numpy()
    counted = torch.arange(past_length, past_length + length)
    return counted.expand(batch, length).contiguous().numpy()
