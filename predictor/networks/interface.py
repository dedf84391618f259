"""The base of every route predictor: its heads, calibration, ONNX graph and settings.

Symbols: B rows, T tokens, L MoE layers, E experts a layer, K experts a token, D width, J heads.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from predictor.networks.windows import Predictions, PredictorShape, Windows
from routing.predictor_file.format import HEADS


class CacheShape(NamedTuple):
    """Sizes of a graph's key/value cache: `past` is [blocks, 2, batch, heads, past, head_dim]."""

    blocks: int
    heads: int
    head_dim: int


class RoutePredictor(nn.Module, ABC):
    """Predicts the experts of every token at all MoE layers in one pass.

    Subclasses compute hidden states and turn them into logits with `read_out` or `calibrated`. They
    also define their ONNX graph: the names and dynamic axes of its inputs, and its computation.
    """

    kind: ClassVar[str]
    """Name of the kind in checkpoints and exported files."""
    graph_inputs: ClassVar[dict[str, dict[int, str]]]
    """Input names of the ONNX graph, in order, each with its dynamic axes."""
    graph_outputs: ClassVar[tuple[str, ...]]

    def __init__(self, shape: PredictorShape, *, width: int, read_early: int = 0) -> None:
        """read_early: MoE layers whose first head the subclass reads out by itself."""
        super().__init__()
        self.shape = shape
        self.heads = read_out_map(shape, width, len(HEADS) * shape.num_layers - read_early)
        self.register_buffer("scale_J", torch.ones(len(HEADS)))
        self.register_buffer("shift_J", torch.zeros(len(HEADS)))

    scale_J: Tensor
    shift_J: Tensor

    @abstractmethod
    def forward(self, batch: Windows) -> Predictions:
        """Predict every token of a batch."""

    def trained_BT(self, batch: Windows) -> Tensor:
        """The tokens that the loss and the metrics count."""
        return batch.valid_BT

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices between hidden states, which Muon trains; none by default."""
        return []

    @property
    @abstractmethod
    def cache(self) -> CacheShape | None:
        """The graph's key/value cache; None where it runs over the whole window each time."""

    @abstractmethod
    def random_inputs(self, batch: int, tokens: int, past: int) -> dict[str, Tensor]:
        """Random inputs of the graph by name, for exporting and checking it."""

    @abstractmethod
    def run_graph(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The ONNX graph: takes `graph_inputs` and returns `graph_outputs`, both in order."""

    def read_out(self, hidden_BTD: Tensor) -> Predictions:
        """The calibrated logits of all heads."""
        return self.calibrated(self.heads(hidden_BTD))

    def calibrated(self, logits_BTX: Tensor) -> Predictions:
        """Calibrate the logits of all heads, in order. The result is float32."""
        shape = self.shape
        sizes = (len(HEADS), shape.num_layers, shape.num_experts)
        logits_BTJLE = logits_BTX.float().unflatten(-1, sizes)
        scale, shift = self.scale_J[:, None, None], self.shift_J[:, None, None]
        return Predictions(*(logits_BTJLE * scale + shift).unbind(2))

    def set_calibration(self, scale_J: Tensor, shift_J: Tensor) -> None:
        """Set the scale and shift of each head's logits."""
        self.scale_J.copy_(scale_J)
        self.shift_J.copy_(shift_J)


@dataclass(frozen=True, kw_only=True)
class PredictorSettings(ABC):
    """The sizes of one kind of predictor, in plain JSON types: checkpoints store them."""

    @abstractmethod
    def build(self, shape: PredictorShape) -> RoutePredictor:
        """A predictor with fresh weights."""


def read_out_map(shape: PredictorShape, width: int, num_layers: int) -> nn.Linear:
    """A map from hidden states to the experts of `num_layers` layers; starts at the base rate."""
    layer = nn.Linear(width, num_layers * shape.num_experts)
    nn.init.normal_(layer.weight, std=width**-0.5 / 4)
    nn.init.constant_(layer.bias, _log_odds(shape.top_k, shape.num_experts))
    return layer


def _log_odds(top_k: int, num_experts: int) -> float:
    """The logit of an expert's base rate, from which training starts."""
    rate = min(top_k / num_experts, 1 - 1 / (2 * num_experts))
    return torch.tensor(rate).logit().item()
