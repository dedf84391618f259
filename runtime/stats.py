"""What the runtime counted: hits, misses, bytes, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np

from routing.layers import MoELayer
from runtime.cache import Lookup

if TYPE_CHECKING:
    from rich.table import Table

LATENCIES_KEPT = 4096


@dataclass(kw_only=True)
class Stats:
    """Counts since loading, or since `reset`. A *request* is one distinct expert of one call."""

    layers: list[MoELayer]
    num_slots: int
    policy: str

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew (the cache keeps its content)."""
        self.hits_L = np.zeros(self.num_layers, np.int64)
        self.misses_L = np.zeros(self.num_layers, np.int64)
        self.evictions = 0
        self.bytes_loaded = 0
        self.steps = 0
        self.tokens = 0
        self.seconds = {"load": 0.0, "predict": 0.0, "step": 0.0}
        self.prediction_ms: list[float] = []
        self._recalled, self._predicted = 0, 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_experts(self) -> int:
        """E, the largest of any layer."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def total_experts(self) -> int:
        """Experts of all layers."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def hits(self) -> int:
        return int(self.hits_L.sum())

    @property
    def misses(self) -> int:
        """Expert loads: each miss copies one expert into a slot."""
        return int(self.misses_L.sum())

    @property
    def hit_rate(self) -> float:
        """Share of requests that found their expert resident (NaN before the first)."""
        requests = self.hits + self.misses
        return self.hits / requests if requests else float("nan")

    @property
    def recall(self) -> float:
        """Recall@K of the predictor for the tokens decoded so far (NaN without any)."""
        return self._recalled / self._predicted if self._predicted else float("nan")

    @property
    def prediction_ms_median(self) -> float:
        """Median wall-clock milliseconds of one prediction (NaN without any)."""
        return float(np.median(self.prediction_ms)) if self.prediction_ms else float("nan")

    def count(self, layer: int, lookup: Lookup, slot_bytes: int) -> None:
        """Book one served wave of `layer`."""
        num_missed = int(np.count_nonzero(lookup.missed))
        self.misses_L[layer] += num_missed
        self.hits_L[layer] += len(lookup.missed) - num_missed
        self.evictions += lookup.num_evicted
        self.bytes_loaded += num_missed * slot_bytes

    def count_recall(self, recalled: int, out_of: int) -> None:
        """Book how many of `out_of` used experts the predictor had in its top-k."""
        self._recalled += recalled
        self._predicted += out_of

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the wall-clock time of the block to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add_time(name, time.perf_counter() - start)

    def _add_time(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds
        if name == "predict":
            self.prediction_ms.append(seconds * 1e3)
            del self.prediction_ms[:-LATENCIES_KEPT]

    def report(self) -> str:
        """One line about the run."""
        line = (
            f"{self.policy}: {self.num_slots} of {self.total_experts} experts fit, "
            f"{self.tokens} tokens in {self.steps} steps, hit rate {self.hit_rate:.1%}, "
            f"{self.misses} loads ({format_bytes(self.bytes_loaded)})"
        )
        if self.prediction_ms:
            line += f", recall {self.recall:.1%}, prediction {self.prediction_ms_median:.2f} ms"
        if self.seconds["step"]:
            line += f", {self.tokens / self.seconds['step']:.1f} tok/s"
        return line

    def table(self) -> Table:
        """The counts of each layer, as a rich table."""
        from rich.table import Table

        table = Table("layer", "hits", "misses", "hit rate", title=self.report())
        names = [layer.name for layer in self.layers]
        rows = zip(names, self.hits_L.tolist(), self.misses_L.tolist(), strict=True)
        for name, hits, misses in rows:
            rate = f"{hits / (hits + misses):.1%}" if hits + misses else "-"
            table.add_row(name, str(hits), str(misses), rate)
        return table

    def plot(self, path: str | Path) -> None:
        """Draw hits and misses of each layer into the picture file `path`."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.5), layout="constrained")
        axes = figure.add_subplot()
        layers = np.arange(self.num_layers)
        axes.bar(layers, self.hits_L, label="hits", color="#3b6ea5")
        axes.bar(layers, self.misses_L, bottom=self.hits_L, label="misses", color="#d9822b")
        axes.set(xlabel="MoE layer", ylabel="expert requests")
        axes.set_title("\n".join(wrap(self.report(), 96)), fontsize=8)
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=150)


def format_bytes(num_bytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"
