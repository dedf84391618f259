"""Windows: rows of traced tokens, and the predictions for them.

Symbols: B rows, T tokens, L MoE layers, E experts a layer, K experts a token.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from routing.predictor_file.format import FAR
from routing.topology import NO_EXPERT, Topology


@dataclass(frozen=True, kw_only=True)
class PredictorShape:
    """The sizes of a predictor that the traced model and the task fix."""

    num_layers: int
    """MoE layers (L)."""
    num_experts: int
    """Experts of a layer (E)."""
    top_k: int
    """Experts of a token at a layer (K)."""
    vocab_size: int
    window: int
    """A token sees the `window` newest tokens up to and including itself."""
    horizon: int
    """Tokens that the third head looks ahead (H)."""

    @property
    def far(self) -> int:
        """Tokens that the last head looks ahead."""
        return FAR * self.horizon

    @classmethod
    def of(cls, topology: Topology, stack: str, *, window: int, horizon: int) -> Self:
        """The shape for a stack of a topology. Raises ValueError where there is no such stack."""
        layers = topology.stack(stack)
        return cls(
            num_layers=layers.num_layers,
            num_experts=layers.num_experts,
            top_k=layers.top_k,
            vocab_size=topology.vocab_size,
            window=window,
            horizon=horizon,
        )


class Windows(NamedTuple):
    """Rows of traced tokens; a row may hold several documents, one after the other.

    Positions grow by one inside a document and jump by more than the attention window between
    documents, so that a mask made from positions keeps documents apart.
    """

    token_ids_BT: Tensor
    """int64; 0 in padding."""
    routes_BTLK: Tensor
    """Signed integer: the experts of each token's predecessor, NO_EXPERT where unknown."""
    positions_BT: Tensor
    """int64; PADDING where there is no token."""
    experts_BTLK: Tensor
    """Signed integer: the experts of the token itself (the target), or NO_EXPERT."""
    prompt_lengths_B: Tensor
    """int64: leading tokens of the row that are prompt, at least 1."""

    @property
    def valid_BT(self) -> Tensor:
        """bool: where there is a token."""
        return self.positions_BT >= 0

    @property
    def continues_BT(self) -> Tensor:
        """bool: the row's next token is of the same document. False in the last column."""
        same = self.positions_BT[:, 1:] == self.positions_BT[:, :-1] + 1
        return nn.functional.pad(same & self.valid_BT[:, :-1], (0, 1))

    def without_history(self) -> "Windows":
        """The same rows without any known route, as before the model has run."""
        return self._replace(routes_BTLK=torch.full_like(self.routes_BTLK, NO_EXPERT))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Windows":
        """Copy the tensors to `device`."""
        return Windows(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def pin_memory(self) -> "Windows":
        """Copy the tensors to pinned memory; the data loader calls this."""
        return Windows(*(tensor.pin_memory() for tensor in self))


class Predictions(NamedTuple):
    """Calibrated logits, float32 [B, T, L, E]; their sigmoid is a probability."""

    this_BTLE: Tensor
    """Experts of this token."""
    next_BTLE: Tensor
    """Experts of the next token, whose id is not known yet."""
    horizon_BTLE: Tensor
    """Experts used at least once by the next H tokens."""
    far_BTLE: Tensor
    """Experts used at least once by the next FAR * H tokens."""
