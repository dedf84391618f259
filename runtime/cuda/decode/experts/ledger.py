"""The ledger: the record of one captured step, as the kernels write it and the host reads it.

routes [L, B * K]   counts [L, 3]   prefetched [L]   used [L]   progress [L, PREFETCHERS]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Ledger(NamedTuple):
    """The record of one step, on the host."""

    routes_LBK: np.ndarray
    num_used_L: np.ndarray
    num_fetched_L: np.ndarray
    num_away_L: np.ndarray
    """Experts that the CPU computed."""
    prefetched_L: np.ndarray
    """The expert that was chosen, -1 for none."""
    used_L: np.ndarray
    """1 where the chosen expert was then needed."""
    chunks_L: np.ndarray
    """Chunks of it that arrived in time."""
