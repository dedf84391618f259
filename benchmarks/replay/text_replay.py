"""Replay of a recorded text on a random model: its tokens, and its routes where they are recorded.

A random model generates no sensible text and routes all tokens alike. Here it generates a given
text, and uses the experts that a trained model used for it. The whole model still runs, the head
and the routers too, and the routers' weights still weigh the experts. Only the choices are read
from tables on the device, by the positions that the model is given. So the replay works inside a
captured CUDA graph, needs no host sync, and is the same for every system, even one that runs a step
twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.replay.passages import Passages
from routing.layers import MoELayer, find_moe_layers
from runtime.engine.guards.changes import capturable

CHOSEN_LOGIT = 8192.0
"""Above all other logits, and exact in every number format."""
ROUTERS = ("gate", "router")
"""Names of routers beside their experts."""


class TextReplay:
    """Tables for `batch` sequences of up to `length` tokens, and the position reached.

    A forward pass looks up the experts of its positions in all layers. It sets the logit of the
    text's next token to `CHOSEN_LOGIT`.
    """

    def __init__(
        self, model: Any, batch: int, length: int, device: torch.device, *, routes: bool,
        layers: Sequence[MoELayer] | None = None,
    ) -> None:  # fmt: skip
        """routes: replay the experts too. layers: of a model that was built without experts."""
        layers = layers or find_moe_layers(model)
        top_k = max(layer.top_k for layer in layers)
        self._model = model
        rotaries = (m for name, m in model.named_modules() if name.endswith("rotary_emb"))
        self._rotary: nn.Module | None = next(rotaries, None)
        self._routers = [router_of(model, layer.name) for layer in layers] if routes else []
        self._batch, self._length = batch, length
        self._tokens_BT = torch.zeros(batch, length, dtype=torch.int64, device=device)
        shape = len(self._routers), batch * length, top_k
        self._experts_LPK = torch.zeros(shape, dtype=torch.int64, device=device)
        self._first_B1 = torch.arange(batch, device=device)[:, None] * length
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._step_LPK: Tensor | None = None

    def start(self, passages: Passages) -> None:
        """Replay `passages` from now on (written in place: captured graphs see them)."""
        length = passages.token_ids_BT.shape[1]
        self._tokens_BT[:, :length].copy_(passages.token_ids_BT)
        if self._routers:
            assert passages.experts_BTLK is not None
            experts_LBTK = torch.from_numpy(passages.experts_BTLK).permute(2, 0, 1, 3)
            table_LBTK = self._experts_LPK.unflatten(1, (self._batch, self._length))
            table_LBTK[:, :, :length].copy_(experts_LBTK)
        self._position.zero_()

    @property
    def position(self) -> int:
        """Tokens of each sequence that have run. A host sync."""
        return int(self._position)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make the model follow the tables inside the block."""
        rotary, head = self._rotary, self._model.get_output_embeddings()
        if rotary is not None:
            rotary.forward = partial(self._rotate, rotary.forward)
        else:
            decoder = self._model.get_decoder()
            locating = decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        choosing = head.register_forward_hook(self._choose)  # called whatever computes the head
        for layer, router in enumerate(self._routers):
            router.forward = partial(self._route, layer, router.forward)
        try:
            yield
        finally:
            choosing.remove()
            if rotary is None:
                locating.remove()
            for module in filter(None, (rotary, *self._routers)):
                module.__dict__.pop("forward", None)

    @capturable
    def _rotate(self, own: Any, hidden: Tensor, position_ids: Tensor) -> Any:
        """The rotary embedding: most models compute it before their layers, from the positions."""
        self._locate(position_ids)
        return own(hidden, position_ids)

    @capturable
    def _begin(self, _decoder: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """A pass of a model that rotates nothing."""
        self._locate(kwargs["position_ids"])

    def _locate(self, position_ids: Tensor) -> None:
        if self._routers:
            rows_BT = self._first_B1 + position_ids % self._length
            self._step_LPK = self._experts_LPK.index_select(1, rows_BT.reshape(-1))
        self._position.copy_(position_ids[0, -1:] + 1)

    @capturable
    def _route(self, layer: int, own: Any, hidden: Tensor) -> tuple[Tensor, ...]:
        """The router's result with other experts in it: of (logits, weights [P, K], experts), or of
        (scores [P, E], logits) in Llama 4, whose scores are zero but for the chosen.
        """
        assert self._step_LPK is not None
        experts_PK, result = self._step_LPK[layer], own(hidden)
        if len(result) == 3:
            return result[0], result[1], experts_PK
        scores_PE, logits = result
        best_PK = scores_PE.topk(experts_PK.shape[-1], dim=-1).values
        return torch.zeros_like(scores_PE).scatter(-1, experts_PK, best_PK), logits

    @capturable
    def _choose(self, _head: Any, _inputs: Any, logits_BTV: Tensor) -> Tensor:
        next_B1 = self._tokens_BT.index_select(1, self._position % self._length)
        logits_BTV[:, -1].scatter_(1, next_B1, CHOSEN_LOGIT)
        return logits_BTV


def router_of(model: nn.Module, experts_name: str) -> nn.Module:
    """The router beside a container of experts."""
    block = model.get_submodule(experts_name.rpartition(".")[0])
    names = [name for name, _ in block.named_children() if name in ROUTERS]
    return block.get_submodule(names[0])
