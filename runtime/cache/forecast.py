"""A forecast: how probable it is that each expert is used, soon and later."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Forecast(NamedTuple):
    """Probabilities, float32 [L, E], that an expert is used by any sequence of the batch."""

    this_LE: np.ndarray
    """in the step about to run"""
    next_LE: np.ndarray
    """in the step after it"""
    horizon_LE: np.ndarray
    """at least once within the next H steps"""
    far_LE: np.ndarray
    """at least once within the next FAR * H steps"""
