"""The candidate: a predictor adapted to recorded routes, beside the one that it started from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from predictor.adaptation.division import Division, divide
from predictor.adaptation.fine_tuning import Progress, Tuning, fine_tune
from predictor.adaptation.graph import GraphPredictor
from predictor.adaptation.recalibration import calibration_json, recalibrate
from predictor.adaptation.scores import Score, rows_of, score
from predictor.adaptation.settings import AdaptationSettings
from predictor.adaptation.starting import Start, describe, open_start, write_adapted
from predictor.file.documents import open_exported
from predictor.training.data import open_traces
from routing.shards import TraceReader


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A written predictor, its start, and the figures of both on documents that neither saw."""

    path: Path
    start: Path
    new: Division
    old: Division | None
    tuning: Tuning
    before: dict[str, Score]
    """Of "new" documents, and of "old" ones where a trace is replayed."""
    after: dict[str, Score]
    share: float
    """Share of the old documents in what is judged."""

    @property
    def is_better(self) -> bool:
        """Whether the held-out loss fell; that of old documents counts by its share."""
        return self.judged(self.after) < self.judged(self.before)

    def judged(self, scores: dict[str, Score]) -> float:
        """The held-out loss that decides."""
        old = scores.get("old")
        new_loss = scores["new"].loss
        return new_loss if old is None else (1 - self.share) * new_loss + self.share * old.loss


def make_candidate(
    settings: AdaptationSettings,
    predictor: Path,
    folder: Path,
    report: Callable[[Progress], None] = lambda _: None,
) -> Candidate:
    """Train `predictor` further and write the result into `folder`. Raises ValueError."""
    start = open_start(predictor)
    stack, shape = start.exported.stack, start.exported.shape
    readers = _readers(settings.trace, start)
    new = _divided(readers, settings, settings.max_tokens)
    replayed = _readers(settings.replay, start) if settings.replay else None
    old = None if replayed is None else _divided(replayed, settings)
    graph = start.graph()
    tuning = fine_tune(graph, shape, new, old, settings, report)
    recalibrate(graph, [part.stopping for part in (new, old) if part is not None], shape)
    held_out = {"new": new.held_out} | ({} if old is None else {"old": old.held_out})
    sample = next(rows_of(new.stopping, shape))

    def scores(path: Path) -> dict[str, Score]:
        exported = open_exported(path)
        return {name: score(exported, part, shape, stack) for name, part in held_out.items()}

    path = write_adapted(start, graph, sample, folder)
    after = scores(path)
    describe(path, _changes(start, graph, readers, new, tuning, after["new"]))
    return Candidate(
        path=path,
        start=predictor,
        new=new,
        old=old,
        tuning=tuning,
        before=scores(predictor),
        after=after,
        share=0.0 if old is None else settings.replay_share,
    )


def _readers(traces: Sequence[Path], start: Start) -> list[TraceReader]:
    readers = open_traces(traces, start.exported.stack.name)
    start.exported.topology.require_match(
        readers[0].topology,
        ours=f"the predictor {start.exported.path}",
        theirs=f"the trace {readers[0].directory}",
    )
    return readers


def _divided(
    readers: Sequence[TraceReader], settings: AdaptationSettings, max_tokens: int | None = None
) -> Division:
    return divide(
        readers,
        share=settings.held_out,
        most_tokens=settings.max_eval_tokens,
        max_tokens=max_tokens,
    )


def _changes(
    start: Start,
    graph: GraphPredictor,
    readers: Sequence[TraceReader],
    new: Division,
    tuning: Tuning,
    held_out: Score,
) -> dict[str, Any]:
    """The entries of the metadata that adapting changes."""
    provenance = start.description["provenance"]
    note = {
        "traces": [reader.provenance for reader in readers],
        "tokens": new.tokens,
        "steps": tuning.best.step,
    }
    earlier = provenance.get("adaptations", [])
    return {
        "metrics": {f"{head}_known": values for head, values in held_out.metrics.items()},
        "calibration": start.description["calibration"] | calibration_json(graph),
        "provenance": provenance | {"adaptations": [*earlier, note]},
    }
