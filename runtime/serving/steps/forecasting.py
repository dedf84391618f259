"""The predictor beside the steps: a forecast for every sequence that needs one.

Nothing here ever raises: a predictor that fails is dropped, with a warning in the log, and serving
goes on without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from routing.predictor_file.driver import Past, not_used
from routing.predictor_file.reader import PredictorFile
from runtime.engine.engine import Engine
from runtime.prediction.sequence_forecaster import SequenceForecast, SequenceForecaster
from runtime.serving.sequence import ServedSequence

log = logging.getLogger(__name__)


class Forecasting:
    """Reads prompts and new tokens with the predictor.

    file: None where nothing is to be predicted. overlaps: new tokens are read while the next step
    runs, which begins with what was predicted one token earlier. on_failure: called once, when the
    predictor is dropped.
    """

    def __init__(
        self,
        engine: Engine,
        file: PredictorFile | None,
        *,
        overlaps: bool,
        on_failure: Callable[[], None],
    ) -> None:
        self._engine, self._overlaps, self._on_failure = engine, overlaps, on_failure
        self._forecaster = None if file is None else SequenceForecaster(file)
        self._unpredicted: list[tuple[ServedSequence, np.ndarray]] = []
        """Sequences whose newest token has no forecast yet, and the routes of the token before."""

    @property
    def is_on(self) -> bool:
        return self._forecaster is not None

    def read_prompts(self, sequences: Iterable[ServedSequence]) -> None:
        """Predict for what is pending of sequences that have no past of the predictor's."""
        for sequence in sequences:
            if self._forecaster is not None and sequence.predictor_past is None:
                self._guarded(self._read_prompt, self._forecaster, sequence)

    def _read_prompt(self, forecaster: SequenceForecaster, sequence: ServedSequence) -> None:
        with self._engine.stats().timer("predict"):
            past = Past(forecaster.file, 1, sequence.limit)
            forecast = forecaster.read_prompt(past, sequence.token_ids)
        if sequence.num_pending == 1:  # the rest has run, before the sequence was parked
            forecast = forecast._replace(unused_LE=not_used(forecast.logits_LE))
        sequence.predictor_past, sequence.forecast = past, forecast

    def read_tokens(self, chosen: Sequence[tuple[ServedSequence, np.ndarray]]) -> None:
        """Score the forecasts of the tokens that ran, and predict for the chosen ones.

        chosen: the sequences with a new token, and the routes [L, K] of the token before it.
        """
        if self._forecaster is None or not chosen:
            return
        sequences = [sequence for sequence, _ in chosen]
        routes_BLK = np.stack([routes_LK for _, routes_LK in chosen])
        self._guarded(self._score, sequences, routes_BLK)
        if not self._overlaps:
            self._guarded(self._predict, self._forecaster, sequences, routes_BLK)
            return
        self._unpredicted += chosen
        self._guarded(_age, sequences)

    def renew(self) -> None:
        """Make the forecasts that are missing."""
        unpredicted, self._unpredicted = self._unpredicted, []
        if self._forecaster is not None and unpredicted:
            sequences = [sequence for sequence, _ in unpredicted]
            routes_BLK = np.stack([routes_LK for _, routes_LK in unpredicted])
            self._guarded(self._predict, self._forecaster, sequences, routes_BLK)

    def give_up(self, error: Exception) -> None:
        """Drop the predictor."""
        log.warning("the predictor failed; serving goes on without it", exc_info=error)
        self._forecaster, self._unpredicted = None, []
        self._on_failure()

    def _guarded(self, work: Callable[..., None], *args: object) -> None:
        try:
            work(*args)
        except Exception as error:  # a session or a graph can raise anything
            self.give_up(error)

    def _predict(
        self,
        forecaster: SequenceForecaster,
        sequences: list[ServedSequence],
        routes_BLK: np.ndarray,
    ) -> None:
        known = [
            (at, sequence.predictor_past, sequence.forecast)
            for at, sequence in enumerate(sequences)
            if sequence.predictor_past is not None and sequence.forecast is not None
        ]  # a parked one reads everything again when it goes on
        if not known:
            return
        places, pasts, before = (list(column) for column in zip(*known, strict=True))
        with self._engine.stats().timer("predict"):
            newest = [sequences[at].token_ids[-1] for at in places]
            forecasts = forecaster.step(pasts, newest, routes_BLK[places], before)
        for at, forecast in zip(places, forecasts, strict=True):
            sequences[at].forecast = forecast

    def _score(self, sequences: Sequence[ServedSequence], routes_BLK: np.ndarray) -> None:
        """Count the recall of the forecasts for the tokens that were decoded."""
        decoded: list[tuple[int, SequenceForecast]] = [
            (at, sequence.forecast)
            for at, sequence in enumerate(sequences)
            if sequence.num_generated > 1 and sequence.forecast is not None
        ]
        if decoded:
            logits_BLE = np.stack([forecast.logits_LE for _, forecast in decoded])
            routes_BLK = routes_BLK[[at for at, _ in decoded]]
            self._engine.stats().count_recall(logits_BLE, routes_BLK)


def _age(sequences: Iterable[ServedSequence]) -> None:
    for sequence in sequences:
        sequence.forecast = sequence.forecast and sequence.forecast.stale()
