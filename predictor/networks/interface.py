"""What every route predictor has in common: its batch, its heads, its targets, its graph.

Symbols: B rows, T tokens, L MoE layers, E experts a layer, K experts a token, D width, J heads.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from routing.predictor_file.format import FAR, HEADS
from routing.topology import NO_EXPERT, Topology


@dataclass(frozen=True, kw_only=True)
class PredictorShape:
    """Everything about a predictor that is fixed by the traced model and the task."""

    num_layers: int
    num_experts: int
    top_k: int
    vocab_size: int
    window: int
    """A token sees the `window` newest tokens up to and including itself."""
    horizon: int
    """How many tokens ahead the third head looks (H)."""

    @property
    def far(self) -> int:
        """How many tokens ahead the last head looks."""
        return FAR * self.horizon

    @classmethod
    def of(cls, topology: Topology, stack: str, *, window: int, horizon: int) -> Self:
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
    """Rows of traced tokens. A row may hold several documents, one after the other.

    Positions grow by one inside a document and jump by more than the attention window between
    documents, so that a mask made from positions keeps documents apart.
    """

    token_ids_BT: Tensor  # int64; 0 where padded
    routes_BTLK: Tensor  # signed integer: experts of the predecessor, NO_EXPERT where unknown
    positions_BT: Tensor  # int64; PADDING where there is no token
    experts_BTLK: Tensor  # signed integer: experts of the token itself (the target), or NO_EXPERT
    prompt_lengths_B: Tensor  # int64: leading tokens of the row that are prompt, at least 1

    @property
    def valid_BT(self) -> Tensor:
        return self.positions_BT >= 0

    @property
    def continues_BT(self) -> Tensor:
        """Whether the row's next token is of the same document; False in the last column."""
        same = self.positions_BT[:, 1:] == self.positions_BT[:, :-1] + 1
        return nn.functional.pad(same & self.valid_BT[:, :-1], (0, 1))

    def without_history(self) -> "Windows":
        """The same rows as a predictor sees them before the model has run: no route is known."""
        return self._replace(routes_BTLK=torch.full_like(self.routes_BTLK, NO_EXPERT))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Windows":
        return Windows(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def pin_memory(self) -> "Windows":
        return Windows(*(tensor.pin_memory() for tensor in self))


class Predictions(NamedTuple):
    """Calibrated logits [B, T, L, E]; a sigmoid turns them into probabilities."""

    this_BTLE: Tensor  # experts of this token
    next_BTLE: Tensor  # experts of the next token, whose id is not known yet
    horizon_BTLE: Tensor  # experts used at least once by the next H tokens
    far_BTLE: Tensor  # experts used at least once by the next FAR * H tokens


class Target(NamedTuple):
    """What one head should say, and at which tokens the question has an answer."""

    used_BTLE: Tensor  # bool
    valid_BT: Tensor  # bool


class Targets(NamedTuple):
    """One target for each head, in the order of HEADS."""

    this: Target
    next: Target
    horizon: Target
    far: Target


class Cache(NamedTuple):
    """The key/value cache of a graph: `past` is [blocks, 2, batch, heads, past, head_dim]."""

    blocks: int
    heads: int
    head_dim: int


def multi_hot(experts_BTLK: Tensor, num_experts: int) -> Tensor:
    """Integer expert ids [..., L, K] (NO_EXPERT is ignored) as a bool mask [..., L, E]."""
    slots = experts_BTLK.long().where(experts_BTLK != NO_EXPERT, num_experts)
    mask = experts_BTLK.new_zeros((*slots.shape[:-1], num_experts + 1), dtype=torch.bool)
    return mask.scatter(-1, slots, True)[..., :num_experts]


def following(values_BT: Tensor) -> Tensor:
    """Each token's successor's value; what the last column holds means nothing."""
    return values_BT.roll(-1, dims=1)


def targets(batch: Windows, shape: PredictorShape) -> Targets:
    """The targets of a batch.

    All heads but the first have no target at the last token of a document. Near a document's end
    the horizon is the tokens that are left. Where the row ends before the horizon does, there is no
    horizon target, because the document may go on in the next row.
    """
    used_BTLE = multi_hot(batch.experts_BTLK, shape.num_experts)
    continues_BT = batch.continues_BT
    last_BT = _last_of_document(continues_BT)
    ahead = [_used_ahead(used_BTLE, last_BT, count) for count in (shape.horizon, shape.far)]
    return Targets(
        Target(used_BTLE, batch.valid_BT),
        Target(following(used_BTLE), continues_BT),
        *(Target(ahead_BTLE, continues_BT & known_BT) for ahead_BTLE, known_BT in ahead),
    )


def _last_of_document(continues_BT: Tensor) -> Tensor:
    """For each token, the column in which its document's part of the row ends."""
    num_tokens = continues_BT.shape[1]
    columns_T = torch.arange(num_tokens, device=continues_BT.device)
    ends_BT = columns_T.where(~continues_BT, num_tokens)
    return ends_BT.flip(1).cummin(1).values.flip(1)


def _used_ahead(used_BTLE: Tensor, last_BT: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Experts used within t+1..t+horizon of the same document; whether the row shows them all."""
    num_tokens = used_BTLE.shape[1]
    columns_T = torch.arange(num_tokens, device=used_BTLE.device)
    uses_BTLE = used_BTLE.cumsum(1, dtype=torch.int32)
    until_BT = torch.minimum(columns_T + horizon, last_BT)
    rows_B1 = torch.arange(len(used_BTLE), device=used_BTLE.device)[:, None]
    ahead_BTLE = uses_BTLE[rows_B1, until_BT] > uses_BTLE
    complete_BT = (columns_T + horizon < num_tokens) | (last_BT < num_tokens - 1)
    return ahead_BTLE, complete_BT


class RoutePredictor(nn.Module, ABC):
    """A model that predicts, for every token and every MoE layer at once, which experts are used.

    Subclasses compute hidden states, and `read_out` or `calibrated` logits. They also say what
    their ONNX graph looks like: the names and dynamic axes of its inputs, and how it runs.
    """

    kind: ClassVar[str]
    graph_inputs: ClassVar[dict[str, dict[int, str]]]
    """Input names of the ONNX graph, in order, each with its dynamic axes."""
    graph_outputs: ClassVar[tuple[str, ...]]

    def __init__(self, shape: PredictorShape, *, width: int, read_early: int = 0) -> None:
        """read_early: MoE layers whose first head the subclass reads out of other hidden states."""
        super().__init__()
        self.shape = shape
        self.heads = read_out_map(shape, width, len(HEADS) * shape.num_layers - read_early)
        self.register_buffer("scale_J", torch.ones(len(HEADS)))
        self.register_buffer("shift_J", torch.zeros(len(HEADS)))

    scale_J: Tensor
    shift_J: Tensor

    @abstractmethod
    def forward(self, batch: Windows) -> Predictions: ...

    def trained_BT(self, batch: Windows) -> Tensor:
        """The tokens that the loss and the metrics are on."""
        return batch.valid_BT

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices between hidden states, which Muon may train; none by default."""
        return []

    @property
    @abstractmethod
    def cache(self) -> Cache | None:
        """The graph's key/value cache; None for a graph that is run over the whole window again."""

    @abstractmethod
    def random_inputs(self, batch: int, tokens: int, past: int) -> dict[str, Tensor]:
        """Inputs that the graph accepts, by name, for export and for checking it."""

    @abstractmethod
    def run_graph(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The ONNX graph: takes `graph_inputs` and returns `graph_outputs`, both in order."""

    def read_out(self, hidden_BTD: Tensor) -> Predictions:
        """The heads, calibrated."""
        return self.calibrated(self.heads(hidden_BTD))

    def calibrated(self, logits_BTX: Tensor) -> Predictions:
        """All heads' logits, in order. This is float32 whatever the hidden states are."""
        shape = self.shape
        sizes = (len(HEADS), shape.num_layers, shape.num_experts)
        logits_BTJLE = logits_BTX.float().unflatten(-1, sizes)
        scale, shift = self.scale_J[:, None, None], self.shift_J[:, None, None]
        return Predictions(*(logits_BTJLE * scale + shift).unbind(2))

    def set_calibration(self, scale_J: Tensor, shift_J: Tensor) -> None:
        self.scale_J.copy_(scale_J)
        self.shift_J.copy_(shift_J)


@dataclass(frozen=True, kw_only=True)
class PredictorSettings(ABC):
    """The size of one kind of predictor. Plain JSON types only: it is stored in checkpoints."""

    @abstractmethod
    def build(self, shape: PredictorShape) -> RoutePredictor: ...


def read_out_map(shape: PredictorShape, width: int, num_layers: int) -> nn.Linear:
    """From hidden states to the experts of so many layers, at their base rate to begin with."""
    layer = nn.Linear(width, num_layers * shape.num_experts)
    nn.init.normal_(layer.weight, std=width**-0.5 / 4)
    nn.init.constant_(layer.bias, _log_odds(shape.top_k, shape.num_experts))
    return layer


def _log_odds(top_k: int, num_experts: int) -> float:
    """The logit of an expert's base rate, where training starts from."""
    rate = min(top_k / num_experts, 1 - 1 / (2 * num_experts))
    return torch.tensor(rate).logit().item()
