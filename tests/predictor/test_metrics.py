"""The metrics of predictor.training.metrics against brute force by their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from predictor.training.metrics import (
    RouteCalibrationError,
    RoutePrecision,
    RouteRecall,
    means,
    route_metrics,
    used_experts,
)
from routing.topology import NO_EXPERT, Layer, Stack


def stack_of(*sizes: tuple[int, int]) -> Stack:
    layers = tuple(Layer(f"layers.{i}", experts, top_k) for i, (experts, top_k) in enumerate(sizes))
    return Stack(name="decoder", layers=layers)


@st.composite
def routed(draw: st.DrawFn) -> tuple[Stack, Tensor, Tensor]:
    """A stack of unequal layers, distinct logits and routes of which some experts are missing."""
    sizes = draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))
    stack = stack_of(*((size, draw(st.integers(1, size))) for size in sizes))
    num_tokens = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (num_tokens, stack.num_layers, stack.num_experts)
    logits_NLE = torch.from_numpy(rng.permutation(math.prod(shape)).reshape(shape) / 20 - 3)
    experts_NLK = np.full((num_tokens, stack.num_layers, stack.top_k), NO_EXPERT)
    for row_LK in experts_NLK:
        for layer, row_K in zip(stack.layers, row_LK, strict=True):
            row_K[: layer.top_k] = rng.permutation(layer.num_experts)[: layer.top_k]
    experts_NLK[rng.random(experts_NLK.shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = NO_EXPERT
    return stack, logits_NLE.float(), torch.from_numpy(experts_NLK)


def rows(stack: Stack, logits_NLE: Tensor, experts_NLK: Tensor, layer: int):
    """(layer's logits, its set of used experts) for each token that has any."""
    for logits_LE, experts_LK in zip(logits_NLE, experts_NLK, strict=True):
        used = {int(e) for e in experts_LK[layer] if e != NO_EXPERT}
        if used:
            yield logits_LE[layer, : stack.layers[layer].num_experts].double().numpy(), used


def brute_force(stack: Stack, logits_NLE: Tensor, experts_NLK: Tensor, factor: float):
    recall, precision = [], []
    for index, layer in enumerate(stack.layers):
        k = min(layer.num_experts, math.ceil(factor * layer.top_k))
        hits = used_total = guesses = 0
        for logits_E, used in rows(stack, logits_NLE, experts_NLK, index):
            best = set(sorted(range(layer.num_experts), key=lambda e: -logits_E[e])[:k])
            hits += len(best & used)
            used_total += len(used)
            guesses += k
        recall.append(hits / used_total if used_total else math.nan)
        precision.append(hits / guesses if guesses else math.nan)
    return np.array(recall), np.array(precision)


def brute_force_calibration(stack: Stack, logits_NLE: Tensor, experts_NLK: Tensor, num_bins: int):
    errors = []
    for index in range(stack.num_layers):
        bins: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
        for logits_E, used in rows(stack, logits_NLE, experts_NLK, index):
            for expert, logit in enumerate(logits_E):
                probability = 1 / (1 + math.exp(-logit))
                bins[int(probability * num_bins)].append((probability, expert in used))
        pairs = sum(map(len, bins))
        gaps = [
            len(b) * abs(np.mean([p for p, _ in b]) - np.mean([u for _, u in b])) for b in bins if b
        ]
        errors.append(sum(gaps) / pairs if pairs else math.nan)
    return np.array(errors)


@given(routed(), st.sampled_from([1.0, 1.5]))
@settings(max_examples=60, deadline=None)
def test_recall_and_precision_agree_with_their_definitions(case, factor) -> None:
    stack, logits_NLE, experts_NLK = case
    recall, precision = RouteRecall(stack, factor=factor), RoutePrecision(stack, factor=factor)
    recall.update(logits_NLE, experts_NLK)
    precision.update(logits_NLE, experts_NLK)
    expected_recall, expected_precision = brute_force(stack, logits_NLE, experts_NLK, factor)
    np.testing.assert_allclose(recall.compute().numpy(), expected_recall)
    np.testing.assert_allclose(precision.compute().numpy(), expected_precision)


@given(routed(), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_calibration_error_agrees_with_its_definition(case, num_bins) -> None:
    stack, logits_NLE, experts_NLK = case
    error = RouteCalibrationError(stack, num_bins=num_bins)
    error.update(logits_NLE, experts_NLK)
    expected = brute_force_calibration(stack, logits_NLE, experts_NLK, num_bins)
    np.testing.assert_allclose(error.compute().numpy(), expected, atol=1e-6)


@given(routed(), st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_two_workers_whose_states_are_summed_agree_with_one(case, cut) -> None:
    stack, logits_NLE, experts_NLK = case
    whole, first, second = (route_metrics(stack) for _ in range(3))
    whole.update(logits_NLE, experts_NLK)
    first.update(logits_NLE[:cut], experts_NLK[:cut])
    second.update(logits_NLE[cut:], experts_NLK[cut:])
    for name, metric in first.items(copy_state=False):
        other, expected = second[name], whole[name]
        for state in metric._reductions:
            both = torch.stack([getattr(metric, state), getattr(other, state)])
            reduced = metric._reductions[state](both)  # type: ignore[operator,misc]
            torch.testing.assert_close(reduced, getattr(expected, state))


def test_updates_accumulate_and_reset_forgets_them() -> None:
    stack = stack_of((8, 2), (8, 2))
    generator = torch.Generator().manual_seed(0)
    logits_NLE = torch.randn(50, 2, 8, generator=generator)
    experts_NLK = torch.rand(50, 2, 8, generator=generator).topk(2).indices
    whole, parts = route_metrics(stack), route_metrics(stack)
    parts.update(-logits_NLE, experts_NLK)
    parts.reset()
    whole.update(logits_NLE, experts_NLK)
    for logits, experts in zip(logits_NLE.split(7), experts_NLK.split(7), strict=True):
        parts.update(logits, experts)
    for name, value_L in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value_L)


def test_a_collection_ranks_the_experts_only_once_an_update(monkeypatch) -> None:
    calls, topk = [], Tensor.topk

    def counted(*args, **kwargs):
        calls.append(args)
        return topk(*args, **kwargs)

    monkeypatch.setattr(Tensor, "topk", counted)
    metrics = route_metrics(stack_of((8, 2)))
    for _ in range(5):
        metrics.update(torch.randn(4, 1, 8), torch.randint(8, (4, 1, 2)))
    assert len(calls) == 3 + 4  # the first update finds out that three metrics share their states


def test_a_bool_target_means_the_same_as_the_ids_it_marks() -> None:
    stack = stack_of((8, 2))
    logits_NLE = torch.randn(20, 1, 8)
    experts_NLK = torch.randint(-1, 8, (20, 1, 5))
    by_id, by_mask = route_metrics(stack), route_metrics(stack)
    by_id.update(logits_NLE, experts_NLK)
    by_mask.update(logits_NLE, used_experts(experts_NLK, 8))
    for name, value_L in by_id.compute().items():
        torch.testing.assert_close(by_mask.compute()[name], value_L)


def test_a_layer_never_reached_is_nan_and_left_out_of_the_mean() -> None:
    stack = stack_of((4, 1), (4, 1))
    metrics = route_metrics(stack)
    experts_NLK = torch.tensor([[[2], [NO_EXPERT]]])
    metrics.update(torch.tensor([[[0.0, 0, 9, 0], [9, 0, 0, 0]]]), experts_NLK)
    values = metrics.compute()
    assert values["recall"].isnan().tolist() == [False, True]
    assert means(values, "val/")["val/recall"] == pytest.approx(1.0)


def test_an_expert_that_a_smaller_layer_does_not_have_is_never_predicted() -> None:
    stack = stack_of((4, 1), (2, 1))
    recall = RouteRecall(stack)
    logits_NLE = torch.tensor([[[0.0, 0, 0, 1], [0, 1, 9, 9]]])
    recall.update(logits_NLE, torch.tensor([[[3], [1]]]))
    assert recall.compute().tolist() == [1.0, 1.0]
