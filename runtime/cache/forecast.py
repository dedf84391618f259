"""A forecast: the probabilities that each expert is used, soon and later."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Forecast(NamedTuple):
    """Probabilities, float32 [L, E], that an expert is used by any sequence of the batch."""

    this_LE: np.ndarray
    """In the step about to run."""
    next_LE: np.ndarray
    """In the step after it."""
    horizon_LE: np.ndarray
    """At least once within the next H steps."""
    far_LE: np.ndarray
    """At least once within the next FAR * H steps."""
    remembered: np.ndarray | None = None
    """float32 [2, 4, L, E]: the same four by what followed the same tokens earlier in this session,
    and by what followed tokens alike; None where nothing is remembered."""
