"""Look-ahead by early gates: the rankings of later layers' gates on earlier router inputs.

This is the next-layer gate of mixtral-offloading (arXiv 2312.17238), AdapMoE (2408.10284) and Fate
(2502.12224), and the further ones of HOBBIT (2411.01433). A gate is asked when its own layer runs,
with the router input kept from the earlier layer. The answer is the same as if it had been asked
early, because the other arguments of a block do not depend on the layer.

B sequences, T tokens, N = B x T rows of one call, L MoE layers, D distances, M experts named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from routing.blocks import Block, Ranking, find_blocks
from routing.layers import MoELayer
from routing.lookahead import LookAhead, num_named
from routing.shards import experts_dtype


class EarlyGates:
    """Hooks on every MoE block of a model; `take` returns the rankings recorded since the last.

    Raises ValueError for architectures whose router inputs cannot be read.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        self.depth = depth
        self._blocks = find_blocks(model)
        self._inputs: dict[str, Tensor] = {}
        self._answers: dict[tuple[str, int], list[Ranking]] = defaultdict(list)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Register the hooks, and yield their handles."""
        for block in self._blocks:
            stack = [b for b in self._blocks if b.layer.stack == block.layer.stack]
            count = num_named(
                max(b.layer.top_k for b in stack), max(b.layer.num_experts for b in stack)
            )
            index = stack.index(block)
            earlier = [b.layer.name for b in reversed(stack[max(index - self.depth, 0) : index])]
            ask = self._hook(block, earlier, count)
            yield block.module.register_forward_pre_hook(ask, with_kwargs=True)

    def _hook(self, block: Block, earlier: list[str], count: int) -> Any:
        """A hook that ranks by the inputs of the layers `earlier`, the nearest first."""
        dtype = torch.int16 if block.layer.num_experts <= 256 else torch.int32

        def ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[block.layer.name] = block.hidden(args, kwargs)
            for distance, name in enumerate(earlier, 1):
                found = block.rank(args, kwargs, self._inputs[name], count)
                answer = Ranking(found.experts_NM.to(dtype), found.scores_NM.half())
                self._answers[name, distance].append(answer)

        return ask

    def take(self, layers: list[MoELayer], batch_size: int) -> LookAhead:
        """The rankings of the stack `layers` since the last `take`, arrays [B, T, L, D, M]."""
        self._inputs.clear()
        joined = {
            (source, distance): _join(self._answers.pop((layer.name, distance)), batch_size)
            for source, layer in enumerate(layers)
            for distance in range(1, min(self.depth, len(layers) - 1 - source) + 1)
        }
        num_experts = max(layer.num_experts for layer in layers)
        return _together(joined, (len(layers), self.depth), experts_dtype(num_experts))


def _join(calls: list[Ranking], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive calls, [B x T', M] each, as [B, T, M]."""
    rows = (
        torch.cat([x.view(batch_size, -1, x.shape[-1]) for x in c], 1)
        for c in zip(*calls, strict=True)
    )
    experts_BTM, scores_BTM = (x.cpu().numpy() for x in rows)
    return experts_BTM, scores_BTM


def _together(
    joined: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]],
    shape: tuple[int, int],
    dtype: type[np.generic],
) -> LookAhead:
    batch, tokens, named = next(iter(joined.values()))[0].shape
    size = (batch, tokens, *shape, named)
    ahead = LookAhead(np.zeros(size, dtype), np.full(size, -np.inf, np.float16))
    for (source, distance), (experts_BTM, scores_BTM) in joined.items():
        ahead.experts_TLDM[:, :, source, distance - 1] = experts_BTM
        ahead.scores_TLDM[:, :, source, distance - 1] = scores_BTM
    return ahead
