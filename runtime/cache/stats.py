"""Counts of a run: hits, misses, bytes, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from routing.layers import MoELayer
from routing.topology import NO_EXPERT
from runtime.cache.due_counts import DueCounts
from runtime.cache.expert_cache import Lookup
from runtime.sizing.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

LATENCIES_KEPT = 4096


@dataclass(kw_only=True)
class Stats:
    """Counts since loading, or since `reset`. A *request* is one distinct expert of one call."""

    layers: list[MoELayer]
    num_slots: int
    policy: str
    packing: float = 1.0
    """Bytes over the link for a byte of an expert's weights: below 1 where they are packed or in
    codes."""
    encoding: str | None = None
    """Encoding of the experts in their checkpoint, e.g. "mxfp4"; None if they are plain."""
    stored_bytes: float = 0.0
    """Mean bytes of an expert as its checkpoint stores it."""
    loss: str | None = None
    """A line about experts that are not the original model's any more; None where they are."""

    def __post_init__(self) -> None:
        self.reset()

    def __repr__(self) -> str:
        return f"<Stats: {self.report()}>"

    def reset(self) -> None:
        """Start counting anew (the cache keeps its content)."""
        self._hits = DueCounts(self.num_layers)
        self.late_L = np.zeros(self.num_layers, np.int64)
        self.misses_L = np.zeros(self.num_layers, np.int64)
        self.evictions = 0
        self.bytes_loaded = 0
        self.bytes_spilled = 0
        """Of keys and values that served steps read from host memory."""
        self.computed_on_cpu = 0
        self.prefetches, self.prefetches_used = 0, 0
        self.bytes_prefetched, self.bytes_wasted = 0, 0
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
    def all_fit(self) -> bool:
        """Whether there is a slot for every expert."""
        return self.num_slots >= self.total_experts

    @property
    def hits_L(self) -> np.ndarray:
        """Requests that found their expert resident, of each layer."""
        return self._hits.counts_L

    @property
    def hits(self) -> int:
        return int(self.hits_L.sum())

    @property
    def misses(self) -> int:
        """Requests of experts that were not resident: copied to a slot, or computed on the CPU."""
        return int(self.misses_L.sum())

    @property
    def late(self) -> int:
        """Requests whose expert was still on its way."""
        return int(self.late_L.sum())

    @property
    def hit_rate(self) -> float:
        """Share of requests that found their expert resident (NaN before the first)."""
        requests = self.hits + self.late + self.misses
        return self.hits / requests if requests else float("nan")

    @property
    def recall(self) -> float:
        """Recall@K of the predictor for the tokens decoded so far (NaN without any)."""
        return self._recalled / self._predicted if self._predicted else float("nan")

    @property
    def prediction_ms_median(self) -> float:
        """Median wall-clock milliseconds of one prediction (NaN without any)."""
        return float(np.median(self.prediction_ms)) if self.prediction_ms else float("nan")

    @property
    def expert_bytes(self) -> float:
        """Mean bytes of an expert on its way over the link: in codes, packed, or as it is."""
        return self.stored_bytes * (self.packing if self.encoding is None else 1.0)

    def count(self, layer: int, lookup: Lookup, slot_bytes: int) -> None:
        """Count one served wave of `layer`."""
        num_missed = int(np.count_nonzero(lookup.missed))
        self.misses_L[layer] += num_missed
        self._hits.counts_L[layer] += len(lookup.missed) - num_missed
        self.evictions += lookup.num_evicted
        self.bytes_loaded += num_missed * slot_bytes

    def count_hits_later(self, count: Callable[[], np.ndarray]) -> None:
        """Count the hits that `count` returns, int [L]: in `catch_up`, or when they are read."""
        self._hits.add_later(count)

    def catch_up(self) -> None:
        """Count what was left for later; a good moment is while the device runs."""
        self._hits.catch_up()

    def count_step(
        self,
        num_used_L: np.ndarray,
        num_brought_L: np.ndarray,
        slot_bytes: int,
        num_tokens: int,
        num_away_L: np.ndarray | int = 0,
    ) -> None:
        """Count one captured step of `num_tokens` tokens: experts used in each layer, and of the
        missed ones those that came over the link and those that the CPU computed (away).
        """
        num_missed_L = num_brought_L + num_away_L
        self.misses_L += num_missed_L
        self._hits.add(num_used_L - num_missed_L)
        self.bytes_loaded += int(num_brought_L.sum()) * slot_bytes
        self.computed_on_cpu += int(np.sum(num_away_L))
        self.steps += 1
        self.tokens += num_tokens

    def count_prefetches(
        self, late_L: np.ndarray, *, begun: int, whole: int, bytes_sent: int, bytes_late: int,
        bytes_wasted: int,
    ) -> None:  # fmt: skip
        """Count what a captured step sent ahead, and what became of it.

        late_L: experts that each layer used of which a part had come; bytes_late, their rest, which
        came with the layer. begun: experts of which the first bytes were sent. whole: experts that
        were used and were all there. bytes_wasted: sent, and evicted before a use; they may be of
        an earlier step.
        """
        self._hits.add(-late_L)
        self.late_L += late_L
        self.prefetches += begun
        self.prefetches_used += whole + int(late_L.sum())
        self.bytes_prefetched += bytes_sent
        self.bytes_loaded += bytes_sent + bytes_late
        self.bytes_wasted += bytes_wasted

    def count_recall(self, logits_BLE: np.ndarray, routes_BLK: np.ndarray) -> None:
        """Count how many of the used experts (int, NO_EXPERT for none) are among the K of highest
        predicted logit.
        """
        top_k = routes_BLK.shape[-1]
        best_BLK = np.argpartition(logits_BLE, -top_k, axis=-1)[..., -top_k:]
        used = routes_BLK != NO_EXPERT
        found = (best_BLK[..., None] == routes_BLK[..., None, :]).any(-2) & used
        self._recalled += int(found.sum())
        self._predicted += int(used.sum())

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the wall-clock time of the block to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_time(name, time.perf_counter() - start)

    def add_time(self, name: str, seconds: float) -> None:
        """Add to `seconds[name]`."""
        self.seconds[name] += seconds
        if name == "predict":
            self.prediction_ms.append(seconds * 1e3)
            del self.prediction_ms[:-LATENCIES_KEPT]

    def seconds_per_load(self) -> float:
        """Mean time of one expert load so far; 0 before the first."""
        return self.seconds["load"] / self.misses if self.misses else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain numbers and lists, for JSON; None where there is nothing yet."""
        counts = {
            name: getattr(self, name)
            for name in (
                "policy", "encoding", "loss", "num_slots", "total_experts", "steps", "tokens",
                "hits", "late", "misses", "evictions", "bytes_loaded", "computed_on_cpu",
                "prefetches", "prefetches_used", "bytes_prefetched", "bytes_wasted",
                "bytes_spilled",
            )
        }  # fmt: skip
        rates = {
            "hit_rate": self.hit_rate,
            "recall": self.recall,
            "prediction_ms": self.prediction_ms_median,
        }
        known = {name: None if np.isnan(rate) else rate for name, rate in rates.items()}
        layers = [
            {"name": layer.name, "hits": hits, "late": late, "misses": misses}
            for layer, hits, late, misses in self._by_layer()
        ]
        return counts | known | {"seconds": dict(self.seconds), "layers": layers}

    def _by_layer(self) -> Iterator[tuple[MoELayer, int, int, int]]:
        """Hits, late and misses of each layer."""
        counts = (self.hits_L.tolist(), self.late_L.tolist(), self.misses_L.tolist())
        yield from zip(self.layers, *counts, strict=True)

    def report(self) -> str:
        """One line about the run."""
        kind = f" {self.encoding}" if self.encoding else ""
        line = (
            f"{self.policy}: {self.num_slots} of {self.total_experts}{kind} experts fit, "
            f"{self.tokens} tokens in {self.steps} steps"
        )
        if self.loss:
            line = f"{self.loss}; {line}"
        if self.hits + self.late + self.misses:
            line += (
                f", hit rate {self.hit_rate:.1%}, "
                f"{self.misses - self.computed_on_cpu} loads ({format_bytes(self.bytes_loaded)})"
            )
            if self.computed_on_cpu:
                line += f", {self.computed_on_cpu} experts computed on the CPU"
        if self.bytes_spilled:
            line += f", {format_bytes(self.bytes_spilled)} of keys and values read in host memory"
        if self._predicted:
            line += f", recall {self.recall:.1%}"
        if self.prediction_ms:
            line += f", prediction {self.prediction_ms_median:.2f} ms"
        if self.seconds["step"]:
            line += f", {self.tokens / self.seconds['step']:.1f} tok/s"
        return line

    def table(self) -> Table:
        """The counts of each layer, as a rich table."""
        from rich.table import Column, Table

        layer_column = Column("layer", overflow="fold")  # a cut name would be any layer's
        table = Table(layer_column, "hits", "late", "misses", "hit rate", title=self.report())
        for layer, hits, late, misses in self._by_layer():
            requests = hits + late + misses
            rate = f"{hits / requests:.1%}" if requests else "-"
            table.add_row(layer.name, str(hits), str(late), str(misses), rate)
        return table

    def plot(self, path: str | Path) -> None:
        """Draw hits, late and misses of each layer into the picture file `path`."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 3.5), layout="constrained")
        axes = figure.add_subplot()
        layers = np.arange(self.num_layers)
        parts = [("hits", self.hits_L, "#3b6ea5"), ("misses", self.misses_L, "#d9822b")]
        if self.late:
            parts.insert(1, ("late", self.late_L, "#e8b98a"))
        below = np.zeros(self.num_layers)
        for label, counts_L, color in parts:
            axes.bar(layers, counts_L, bottom=below, label=label, color=color)
            below = below + counts_L
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="MoE layer", ylabel="expert requests")
        axes.set_title("\n".join(wrap(self.report(), 96)), fontsize=8)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)
