"""Router inputs of every layer of a running model, streamed batch by batch.

L MoE layers, N tokens, H hidden width, K experts a token.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from routing.blocks import Block, find_blocks
from routing.inspect_model import topology_of
from routing.layers import read_routes
from routing.topology import Topology


class Routed(NamedTuple):
    """The inputs and decisions of one stack's routers."""

    hidden_LNH: Tensor
    """float32"""
    experts_LNK: Tensor
    """int64; NO_EXPERT marks a missing expert."""


def load_model(name: str, topology: Topology, *, device: str) -> Any:
    """Load the model `name` in eval mode. Raises ValueError unless its topology is `topology`."""
    from routing.pretrained import load_plain, read_config

    config = read_config(name)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder model: look-ahead is for decoder-only models"
        )
    model = load_plain(name, config).eval().to(device)
    topology_of(model).require_match(topology, ours=f"the model {name}", theirs="the trace")
    return model


@torch.no_grad()
def router_inputs(model: Any, batches: Iterable[Sequence[np.ndarray]]) -> Iterator[Routed]:
    """Run documents (token ids [T] each) through `model`; yields each batch's tokens, unpadded.

    Raises ValueError for an architecture whose router inputs cannot be found.
    """
    blocks = find_blocks(model)
    hidden: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_watched(block, hidden, experts))
        for batch in batches:
            ids_BT, mask_BT = _padded(batch, model.device)
            model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
            real_N = mask_BT.flatten().bool()
            names = [block.layer.name for block in blocks]
            yield Routed(
                torch.stack([hidden[name].flatten(0, -2)[real_N].float() for name in names]),
                torch.stack([experts[name][real_N] for name in names]),
            )


def _watched(block: Block, hidden: dict[str, Tensor], experts: dict[str, Tensor]) -> Any:
    """Hooks that keep the router input and routes of the last call; closing removes them."""
    layer = block.layer

    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[layer.name] = block.hidden(args, kwargs)

    def keep_routes(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        experts[layer.name] = read_routes(layer, args, kwargs).experts_TK

    stack = ExitStack()
    for module, hook in ((block.module, keep_input), (layer.module, keep_routes)):
        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    return stack


def _padded(batch: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, T], padded on the right."""
    rows = [torch.from_numpy(ids_T.astype(np.int64)) for ids_T in batch]
    ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask_BT = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids_BT.to(device), mask_BT.to(device)
