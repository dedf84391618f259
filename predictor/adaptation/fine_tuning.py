"""Fine-tuning: the steps that adapt a predictor, when they stop, and the calibration after them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from predictor.adaptation.division import Division
from predictor.adaptation.graph import GraphPredictor
from predictor.adaptation.settings import AdaptSettings
from predictor.networks.windows import PredictorShape, Windows
from predictor.training.losses import head_losses, hide_routes, total_loss
from predictor.training.optimizer import warmup_cosine
from predictor.training.rows import Documents, Rows

ROW_TOKENS = 256
ROWS = 8
"""Rows of a step, of ROW_TOKENS tokens each."""
HIDE_HISTORY = 0.5
"""Chance that a row hides routes, as in the first training."""
WARMUP = 0.05


class Progress(NamedTuple):
    """One look at the stopping part."""

    step: int
    seconds: float
    loss: float
    """The loss of the stopping part; with a replayed trace, mixed with that of its own."""


class Tuning(NamedTuple):
    """The outcome of the steps. The graph holds the best weights that were seen."""

    looks: list[Progress]
    """The first is before any step."""
    reason: str
    """Why it ended."""

    @property
    def best(self) -> Progress:
        """The look with the smallest loss."""
        return min(self.looks, key=lambda look: look.loss)


def fine_tune(
    graph: GraphPredictor,
    shape: PredictorShape,
    new: Division,
    old: Division | None,
    settings: AdaptSettings,
    report: Callable[[Progress], None] = lambda _: None,
) -> Tuning:
    """Train `graph` on new documents, beside old ones where there are any; keep the best weights."""
    torch.manual_seed(settings.seed)
    batches = _batches(shape, new, old, settings)
    share = 0.0 if old is None else settings.replay_share

    def look(step: int) -> Progress:
        loss = (1 - share) * loss_on(graph, new.stopping, shape)
        if old is not None:
            loss += share * loss_on(graph, old.stopping, shape)
        progress = Progress(step, time.monotonic() - start, loss)
        report(progress)
        return progress

    start = time.monotonic()
    steps = _steps(new, settings)
    every = max(steps // settings.looks, 1)
    optimizer = torch.optim.AdamW(
        graph.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    looks, best, reason = [look(0)], _copy(graph), "the steps were over"
    for step in range(1, steps + 1):
        spent = max((step - 0.5) / steps, (time.monotonic() - start) / (60 * settings.minutes))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warmup_cosine(spent, WARMUP)
        _step(graph, shape, next(batches), optimizer)
        over = time.monotonic() - start > 60 * settings.minutes
        if step % every and step < steps and not over:
            continue
        looks.append(look(step))
        if looks[-1].loss <= min(one.loss for one in looks):
            best = _copy(graph)
        late = looks[-1 - settings.patience :]
        if over:
            reason = f"{settings.minutes:g} minutes were over"
            break
        if len(looks) > settings.patience and min(late, key=lambda p: p.loss) is late[0]:
            reason = f"{settings.patience} looks in a row brought nothing"
            break
    _restore(graph, best)
    return Tuning(looks, reason)


def _steps(new: Division, settings: AdaptSettings) -> int:
    tokens = int(new.train.lengths.sum())
    return max(settings.passes * tokens // (ROWS * ROW_TOKENS), settings.least_steps)


def _batches(
    shape: PredictorShape, new: Division, old: Division | None, settings: AdaptSettings
) -> Iterator[Windows]:
    """Endless batches, with the share of the rows that old documents have in them."""
    replayed = 0 if old is None else max(round(ROWS * settings.replay_share), 1)
    streams = [_endless(new.train, shape, ROWS - replayed, settings.seed)]
    if old is not None:
        streams.append(_endless(old.train, shape, replayed, settings.seed))
    while True:
        parts = [next(stream) for stream in streams]
        yield Windows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _endless(
    documents: Documents, shape: PredictorShape, rows: int, seed: int
) -> Iterator[Windows]:
    batches = Rows(
        documents, shape, row_tokens=ROW_TOKENS, batch_size=rows, shuffle=True, seed=seed
    )
    while True:
        yield from batches


def _step(
    graph: GraphPredictor,
    shape: PredictorShape,
    batch: Windows,
    optimizer: torch.optim.Optimizer,
) -> None:
    seen = batch._replace(routes_BTLK=hide_routes(batch.routes_BTLK, HIDE_HISTORY))
    optimizer.zero_grad()
    loss = total_loss(head_losses(graph(seen), batch, shape, batch.valid_BT))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(graph.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def loss_on(graph: GraphPredictor, documents: Documents, shape: PredictorShape) -> float:
    """The loss of some documents with known history, weighted over the heads as in training."""
    total, tokens = 0.0, 0
    for batch in Rows(
        documents, shape, row_tokens=ROW_TOKENS, batch_size=ROWS, shuffle=False, seed=0
    ):
        count = int(batch.valid_BT.sum())
        total += count * float(total_loss(head_losses(graph(batch), batch, shape, batch.valid_BT)))
        tokens += count
    return total / tokens if tokens else math.nan


def _copy(graph: GraphPredictor) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in graph.weights.items()}


@torch.no_grad()
def _restore(graph: GraphPredictor, weights: dict[str, Tensor]) -> None:
    for name, weight in graph.weights.items():
        weight.copy_(weights[name])
