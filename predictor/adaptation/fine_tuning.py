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
from predictor.adaptation.settings import AdaptationSettings
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
LOOKS = 8
"""Looks at the stopping part in a run that nothing ends early."""
FEWEST_STEPS = 120
"""Steps, however short the text is."""


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
    settings: AdaptationSettings,
    report: Callable[[Progress], None] = lambda _: None,
) -> Tuning:
    """Train `graph` on new documents, beside old ones if there are any; keep the best weights."""
    torch.manual_seed(settings.seed)
    run = _Run(graph, shape, new, old, settings, report)
    steps = _steps(new, settings)
    every = max(steps // LOOKS, 1)
    batches = _batches(shape, new, old, settings)
    run.look(0)
    for step in range(1, steps + 1):
        run.step(next(batches), (step - 0.5) / steps)
        if step % every == 0 or step == steps or run.share_of_time >= 1:
            run.look(step)
            if reason := run.reason_to_stop():
                break
    else:
        reason = "all steps were taken"
    _restore(graph, run.best)
    return Tuning(run.looks, reason)


class _Run:
    """The state of the steps: the optimizer, the looks so far and the best weights."""

    def __init__(
        self,
        graph: GraphPredictor,
        shape: PredictorShape,
        new: Division,
        old: Division | None,
        settings: AdaptationSettings,
        report: Callable[[Progress], None],
    ) -> None:
        self._graph, self._shape, self._settings, self._report = graph, shape, settings, report
        self._new, self._old = new, old
        self._optimizer = torch.optim.AdamW(
            graph.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self._start = time.monotonic()
        self.looks: list[Progress] = []
        self.best: dict[str, Tensor] = {}

    @property
    def share_of_time(self) -> float:
        """The elapsed share of the time that there is."""
        return (time.monotonic() - self._start) / (60 * self._settings.minutes)

    def look(self, step: int) -> None:
        """Measure the stopping parts, and keep the weights if they are the best so far."""
        loss, share = loss_on(self._graph, self._new.stopping, self._shape), 0.0
        if self._old is not None:
            share = self._settings.replay_share
            loss = (1 - share) * loss + share * loss_on(
                self._graph, self._old.stopping, self._shape
            )
        if not self.looks or loss < min(look.loss for look in self.looks):
            self.best = _copy(self._graph)
        self.looks.append(Progress(step, time.monotonic() - self._start, loss))
        self._report(self.looks[-1])

    def reason_to_stop(self) -> str | None:
        """Why no step follows; None where one does."""
        patience, losses = self._settings.patience, [look.loss for look in self.looks]
        if self.share_of_time >= 1:
            return f"{self._settings.minutes:g} minutes were over"
        if losses.index(min(losses)) + patience < len(losses):
            return f"{patience} looks in a row brought nothing"
        return None

    def step(self, batch: Windows, share_of_steps: float) -> None:
        """Take one step, at the learning rate of what is left of the steps or of the time."""
        spent = max(share_of_steps, self.share_of_time)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * warmup_cosine(spent, WARMUP)
        seen = batch._replace(routes_BTLK=hide_routes(batch.routes_BTLK, HIDE_HISTORY))
        self._optimizer.zero_grad()
        heads = self._graph(seen)
        total_loss(head_losses(heads, batch, self._shape, batch.valid_BT)).backward()
        torch.nn.utils.clip_grad_norm_(self._graph.parameters(), 1.0)
        self._optimizer.step()


def _steps(new: Division, settings: AdaptationSettings) -> int:
    tokens = int(new.train.lengths.sum())
    return max(settings.passes * tokens // (ROWS * ROW_TOKENS), FEWEST_STEPS)


def _batches(
    shape: PredictorShape, new: Division, old: Division | None, settings: AdaptationSettings
) -> Iterator[Windows]:
    """Endless batches, with the share of the rows that old documents have in them."""
    share = settings.replay_share
    replayed = 0 if old is None else min(max(round(ROWS * share), 1), ROWS - 1)
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
