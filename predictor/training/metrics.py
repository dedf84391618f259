"""Metrics of predicted routes: recall, precision and calibration error of each MoE layer.

Every metric takes `update(logits_NLE, experts_NLK)`: N tokens, L layers, E experts, and the ids of
the used experts, integers. The id -1 stands for no expert, and a repeated id counts once. A bool
tensor [N, L, E] may take the place of the ids. A token is ignored at a layer where it uses no
expert. `compute()` returns one float64 figure for each layer, [L], NaN for a layer without a token;
`.nanmean()` is the mean over layers. States are sums, which distributed runs add up.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from predictor.networks.targets import multi_hot
from routing.topology import Stack


def used_experts(experts_NLK: Tensor, num_experts: int) -> Tensor:
    """Ids [..., K] (-1: no expert) or a bool mask [..., E], as a bool mask [..., E]."""
    if experts_NLK.dtype == torch.bool:
        return experts_NLK
    return multi_hot(experts_NLK, num_experts)


def require_numbers(logits_NLE: Tensor) -> None:
    """Raise ValueError where a logit is NaN: it would count as the most probable expert."""
    if logits_NLE.isnan().any():
        raise ValueError(
            "the predictor's logits are NaN: its training diverged or its file is damaged; train "
            "again, with a lower model.learning_rate where it diverged"
        )


class _RouteMetric(Metric):
    """The base of the metrics: the stack's sizes, and the experts that each layer has."""

    full_state_update = False
    exists_LE: Tensor

    def __init__(self, stack: Stack, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experts = stack.num_experts
        sizes_L = torch.tensor([layer.num_experts for layer in stack.layers])
        exists_LE = torch.arange(self.num_experts) < sizes_L[:, None]
        self.register_buffer("exists_LE", exists_LE, persistent=False)

    def _add_counts(self, name: str, *sizes: int) -> None:
        self.add_state(name, torch.zeros(sizes, dtype=torch.int64), dist_reduce_fx="sum")


class _RankedHits(_RouteMetric):
    """Counts how often the expert of rank 0, 1, 2, ... was used, for each layer.

    Recall and precision at any k up to 1.5 K follow from these counts. A MetricCollection puts all
    metrics built on them in one compute group and updates it once.
    """

    higher_is_better = True
    hits_LR: Tensor
    used_L: Tensor
    rows_L: Tensor
    cut_L: Tensor

    def __init__(self, stack: Stack, factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(stack, **kwargs)
        assert 0 < factor <= 1.5, f"only the first 1.5 K ranks are counted, not {factor} K"
        self.num_ranks = min(self.num_experts, math.ceil(1.5 * stack.top_k))
        cut_L = [min(layer.num_experts, math.ceil(factor * layer.top_k)) for layer in stack.layers]
        self.register_buffer("cut_L", torch.tensor(cut_L), persistent=False)
        self._add_counts("hits_LR", stack.num_layers, self.num_ranks)
        self._add_counts("used_L", stack.num_layers)
        self._add_counts("rows_L", stack.num_layers)

    def update(self, logits_NLE: Tensor, experts_NLK: Tensor) -> None:
        """Count N tokens. Raises ValueError for NaN."""
        require_numbers(logits_NLE)
        used_NLE = used_experts(experts_NLK, self.num_experts)
        possible_NLE = logits_NLE.detach().masked_fill(~self.exists_LE, -torch.inf)
        ranked_NLR = possible_NLE.topk(self.num_ranks, dim=-1).indices
        self.hits_LR += used_NLE.gather(-1, ranked_NLR).sum(0)
        self.used_L += used_NLE.sum((0, 2))
        self.rows_L += used_NLE.any(-1).sum(0)

    def _hits_L(self) -> Tensor:
        within_LR = torch.arange(self.num_ranks, device=self.cut_L.device) < self.cut_L[:, None]
        return (self.hits_LR * within_LR).sum(-1)


class RouteRecall(_RankedHits):
    """recall@k with k = ceil(factor x K): used experts among the k most probable / used experts."""

    def compute(self) -> Tensor:
        """The figure of each layer, float64 [L]."""
        return self._hits_L().double() / self.used_L


class RoutePrecision(_RankedHits):
    """precision@k with k = ceil(factor x K): used experts among the k most probable / k."""

    def compute(self) -> Tensor:
        """The figure of each layer, float64 [L]."""
        return self._hits_L().double() / (self.rows_L * self.cut_L)


class RouteCalibrationError(_RouteMetric):
    """Expected calibration error of sigmoid(logits) in equal-width bins, for each layer.

    ECE = sum over bins of |uses - sum of probabilities| / number of (token, expert) pairs
    (Guo et al. 2017, arXiv 1706.04599, eq. 3, with every expert of every token as one event).
    """

    higher_is_better = False
    excess_LB: Tensor
    pairs_L: Tensor

    def __init__(self, stack: Stack, num_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(stack, **kwargs)
        self.num_bins = num_bins
        excess_LB = torch.zeros(stack.num_layers, num_bins, dtype=torch.float64)
        self.add_state("excess_LB", excess_LB, dist_reduce_fx="sum")
        self._add_counts("pairs_L", stack.num_layers)

    def update(self, logits_NLE: Tensor, experts_NLK: Tensor) -> None:
        """Count N tokens. Raises ValueError for NaN."""
        require_numbers(logits_NLE)
        used_NLE = used_experts(experts_NLK, self.num_experts)
        counted_NLE = used_NLE.any(-1, keepdim=True) & self.exists_LE
        probability_NLE = logits_NLE.detach().float().sigmoid()
        excess_NLE = (probability_NLE - used_NLE.float()) * counted_NLE
        bins_NLE = (probability_NLE * self.num_bins).long().clamp_(max=self.num_bins - 1)
        first_L = torch.arange(len(self.pairs_L), device=bins_NLE.device) * self.num_bins
        flat = (bins_NLE + first_L[:, None]).flatten()
        self.excess_LB.view(-1).index_add_(0, flat, excess_NLE.double().flatten())
        self.pairs_L += counted_NLE.sum((0, 2))

    def compute(self) -> Tensor:
        """The figure of each layer, float64 [L]."""
        return self.excess_LB.abs().sum(-1) / self.pairs_L


def route_metrics(stack: Stack) -> MetricCollection:
    """The four metrics of every table: recall, recall_1_5k, precision and calibration_error.

    `compute()` gives {name: float64 [L]}. The first three share one pass over the logits.
    """
    return MetricCollection(
        {
            "recall": RouteRecall(stack),
            "recall_1_5k": RouteRecall(stack, factor=1.5),
            "precision": RoutePrecision(stack),
            "calibration_error": RouteCalibrationError(stack),
        }
    )


def means(values: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The mean over layers of each figure, under `prefix` + its name."""
    return {prefix + name: value_L.nanmean() for name, value_L in values.items()}
