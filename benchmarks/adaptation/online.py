"""Corrections of the forecast that are learnt online, between steps, replayed on a trace.

    python -m benchmarks.adaptation.online --trace TRACE --predictor predictor.onnx

For every label of the trace: the log-loss of each head and the hit rates of predicted reuse, with
the forecast as it is, with biases, and with biases and a low-rank correction. What they gain beyond
what predicted reuse learns by itself is the question (docs/experiments.md has the answer).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.machine import command, machine
from routing.cli import run
from routing.predictor_file.format import FAR
from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.shards import TraceReader, write_atomically
from runtime.cache.forecast import Forecast
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.simulation.baselines import answers, used_by
from runtime.simulation.comparison import decode_steps, file_forecasts
from runtime.simulation.replay import Simulation, slots_of
from runtime.simulation.trace_steps import TraceStep, document_steps

SURE = 1e-5
"""Probabilities are kept this far from 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """Replay a trace with corrections of the forecast that are learnt online."""

    trace: Path
    """Trace directory; each label is replayed by itself."""
    predictor: Path
    """ONNX predictor of that model."""
    labels: list[str] = field(default_factory=list)
    """Labels to replay; all by default."""
    ranks: list[int] = field(default_factory=lambda: [0, 32])
    """Features of the low-rank correction; 0 for biases alone."""
    residency: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])
    """Cache sizes, as fractions of all experts."""
    max_tokens: int = 1500
    """Tokens of each label."""
    out: Path | None = None
    """JSON file to write."""


class OnlineCorrection:
    """Adds to each head's log-odds a bias per expert and a linear map of a few features.

    The features are a random projection of all log-odds, less their fading mean, of length one: so
    nothing but the forecast is needed. A head is scored once its steps have run. Biases take steps
    of their own fading curvature, the map plain gradient steps, shorter for heads whose answers
    overlap.
    """

    BIAS_PRIOR, FADE = 10.0, 0.995
    RATES = 0.5, 0.25, 0.05, 0.01
    """Of the map, for each head."""

    def __init__(self, keys: int, *, horizon: int, rank: int) -> None:
        generator = np.random.default_rng(0)
        self._delays = 0, 1, horizon, FAR * horizon
        self._projection = generator.standard_normal((rank, 4 * keys)).astype(np.float32)
        self._mean = np.zeros(4 * keys, np.float32)
        self._maps = np.zeros((4, rank, keys), np.float32)
        self._biases = np.zeros((4, keys), np.float32)
        self._curvature = np.zeros((4, keys), np.float32)
        self._said: list[tuple[np.ndarray, np.ndarray]] = []
        """Of every step: the features and the probabilities."""
        self._used: list[np.ndarray] = []

    def correct(self, forecast: Forecast) -> Forecast:
        """The corrected forecast of the step about to run."""
        heads = np.stack(forecast[:4])
        odds = _log_odds(heads.reshape(4, -1))
        features = self._features(odds.reshape(-1))
        said = _sigmoid(odds + self._biases + np.einsum("r,jrk->jk", features, self._maps))
        self._said.append((features, said))
        names = Forecast._fields[:4]
        return forecast._replace(**dict(zip(names, said.reshape(heads.shape), strict=True)))

    def _features(self, odds: np.ndarray) -> np.ndarray:
        projected = self._projection @ (odds - self._mean)
        self._mean += 0.02 * (odds - self._mean)
        features: np.ndarray = projected / max(float(np.linalg.norm(projected)), 1e-6)
        return features

    def learn(self, used: np.ndarray) -> None:
        """The step has run, and used these keys (bool)."""
        self._used.append(used)
        for head, delay in enumerate(self._delays):
            scored = len(self._used) - 1 - delay
            if scored >= 0:
                features, said = self._said[scored]
                answer = np.any(self._used[scored + 1 :], 0) if delay else used
                self._descend(head, features, said[head], answer)

    def _descend(
        self, head: int, features: np.ndarray, said: np.ndarray, answer: np.ndarray
    ) -> None:
        error = said - answer
        self._curvature[head] = self._curvature[head] * self.FADE + said * (1 - said)
        self._biases[head] -= error / (self.BIAS_PRIOR + self._curvature[head])
        self._maps[head] -= self.RATES[head] * np.outer(features, error)


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    bounded = np.clip(probabilities, SURE, 1 - SURE)
    odds: np.ndarray = np.log(bounded) - np.log1p(-bounded)
    return odds


def _sigmoid(odds: np.ndarray) -> np.ndarray:
    probabilities: np.ndarray = 1 / (1 + np.exp(-np.clip(odds, -30, 30)))
    return probabilities.astype(np.float32)


def main(settings: OnlineSettings) -> None:
    """Replay every label with every correction, print the figures and write them."""
    reader, file = TraceReader(settings.trace), open_predictor(settings.predictor)
    results = []
    for label in settings.labels or reader.labels:
        for result in replay(
            label, documents_of(reader, label, settings.max_tokens), file, settings
        ):
            results.append(result)
            rates = " ".join(f"{rate:.3f}" for rate in result["hit_rates"])
            losses = " ".join(f"{loss:.3f}" for loss in result["log_loss"])
            print(f"{label:14} {result['correction']:10} hits {rates}  loss {losses}", flush=True)
    if settings.out is not None:
        facts = machine(torch.device("cpu")), command("benchmarks.adaptation.online")
        document = {"machine": facts[0], "command": facts[1], "results": results}
        write_atomically(settings.out, json.dumps(document, indent=1, default=str).encode() + b"\n")


def documents_of(reader: TraceReader, label: str, max_tokens: int) -> list[list[TraceStep]]:
    """The decode steps of a label's documents, up to `max_tokens`."""
    found: list[list[TraceStep]] = []
    for index in np.flatnonzero(reader.doc_labels == reader.labels.index(label)):
        left = max_tokens - sum(map(len, found))
        if left > 0:
            document = reader.document(int(index))
            steps = document_steps(document, reader.stack.num_experts, decode_all=True)
            found.append(list(steps)[:left])
    return found


def replay(
    label: str, documents: list[list[TraceStep]], file: PredictorFile, settings: OnlineSettings
) -> Iterator[dict[str, Any]]:
    """Figures without a correction, and with one of every rank."""
    num_experts = file.stack.num_experts
    used = np.concatenate([used_by(steps, num_experts) for steps in documents])
    truth = truths(documents, file)
    plain = list(file_forecasts(file, documents))
    for rank in (None, *settings.ranks):
        forecasts = plain if rank is None else corrected(plain, used, file.horizon, rank)
        said = np.stack([np.stack(forecast[:4]) for forecast in forecasts])
        yield {
            "label": label,
            "correction": "none" if rank is None else f"rank {rank}" if rank else "biases",
            "tokens": len(forecasts),
            "log_loss": log_loss(said, truth, file.stack.num_layers * file.stack.top_k),
            "hit_rates": [
                hit_rate(documents, forecasts, file, share) for share in settings.residency
            ],
        }


def corrected(
    forecasts: Sequence[Forecast], used: np.ndarray, horizon: int, rank: int
) -> list[Forecast]:
    """Each forecast, corrected by what came before it."""
    correction = OnlineCorrection(used[0].size, horizon=horizon, rank=rank)
    found = []
    for forecast, used_LE in zip(forecasts, used, strict=True):
        found.append(correction.correct(forecast))
        correction.learn(used_LE.reshape(-1))
    return found


def truths(documents: list[list[TraceStep]], file: PredictorFile) -> np.ndarray:
    """The truth that each head should have said, bool [T, 4, L, E]."""
    used = [used_by(steps, file.stack.num_experts) for steps in documents]
    return np.concatenate([np.stack(list(answers(one, file.horizon)), 1) for one in used])


def log_loss(said: np.ndarray, truth: np.ndarray, routes: int) -> list[float]:
    """The log-loss of each head, over the routes of a token."""
    bounded = np.clip(said, SURE, 1 - SURE)
    loss = -np.where(truth, np.log(bounded), np.log1p(-bounded))
    means: list[float] = (loss.sum((2, 3)).mean(0) / routes).tolist()
    return means


def hit_rate(
    documents: list[list[TraceStep]],
    forecasts: Sequence[Forecast],
    file: PredictorFile,
    share: float,
) -> float:
    """The hit rate of predicted reuse with these forecasts."""
    shape = file.stack.num_layers, file.stack.num_experts
    slots = slots_of(share, shape)
    simulation = Simulation(PredictedReuse(*shape, horizon=file.horizon), *shape, slots)
    for forecast, step in zip(forecasts, decode_steps(documents), strict=True):
        simulation.step(forecast, list(step.calls()))
    return 1 - simulation.loads / simulation.requests


if __name__ == "__main__":
    run(
        main,
        OnlineSettings,
        prog="python -m benchmarks.adaptation.online",
        examples=["--trace trace --predictor predictor.onnx --labels el git_man --out online.json"],
    )
