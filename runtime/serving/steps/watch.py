"""The watch: steps as somebody outside of the loop sees them.

    loop --begin, show--> Watch --Sighting--> the watcher, if there is one

A sighting refers to arrays that the loop has anyway. Without a watcher nothing is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from runtime.serving.model_runner import Part

log = logging.getLogger(__name__)


class Sighting(NamedTuple):
    """One step that ran: L layers, E experts of each, K experts of a token, T tokens."""

    routes_TLK: np.ndarray
    """The experts that the tokens used, NO_EXPERT for none."""
    missing_LE: np.ndarray
    """1 where an expert was in no slot when the step began."""
    logits_NLE: list[np.ndarray]
    """The predictor's logits for those decoded tokens that it had read."""
    num_sequences: int
    """Sequences that had a part in the step."""
    num_decoded: int
    """Of its tokens, those that continue a text; the others are of prompts."""


class Watch:
    """Hands sightings of steps to `watcher`; one that raises is dropped, with a warning."""

    def __init__(self) -> None:
        self.watcher: Callable[[Sighting], None] | None = None
        """May be set from any thread, between any two steps."""
        self._missing_K = np.zeros(0, np.float32)

    @property
    def is_watched(self) -> bool:
        return self.watcher is not None

    def begin(self, missing_K: np.ndarray) -> None:
        """A step is about to run. missing_K: per expert key, 1 where it is in no slot."""
        self._missing_K = missing_K

    def show(self, parts: Sequence[Part], routes_TLK: np.ndarray) -> None:
        """The parts have run. Raises nothing."""
        watcher = self.watcher
        if watcher is None or not routes_TLK.size:
            return
        try:
            watcher(_sighting(parts, routes_TLK, self._missing_K))
        except Exception as error:
            log.warning("the watcher of the steps failed; they go on without it", exc_info=error)
            self.watcher = None


def _sighting(parts: Sequence[Part], routes_TLK: np.ndarray, missing_K: np.ndarray) -> Sighting:
    decoded = [part.sequence for part in parts if part.sequence.is_ready]
    forecasts = [one.forecast for one in decoded if one.forecast is not None]
    logits_NLE = [one.logits_LE for one in forecasts if one.logits_LE.size]
    missing_LE = missing_K.reshape(routes_TLK.shape[1], -1)
    return Sighting(routes_TLK, missing_LE, logits_NLE, len(parts), len(decoded))
