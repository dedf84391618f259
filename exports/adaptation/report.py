"""The figures of an adaptation: tables for the terminal, and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exports.adaptation.hit_rates import RESIDENCY, HitRates
from exports.demo_report import NAMES
from predictor.adaptation.candidate import Candidate
from routing.names import print_whole
from runtime.cache.policies import LIVE_FREE_RULES

if TYPE_CHECKING:
    from rich.table import Table

PARTS = {"new": "the new text", "old": "the replayed text"}
POLICIES = {rule: NAMES[rule] for rule in LIVE_FREE_RULES} | {
    "before": "predicted, before",
    "after": "predicted, after",
    "belady": NAMES["belady"],
}
FIGURES = {
    "recall@K, this token": ("this", "recall"),
    "recall@K, the next": ("next", "recall"),
    "calibration error, this token": ("this", "calibration_error"),
    "calibration error, the next": ("next", "calibration_error"),
}


def to_json(candidate: Candidate, rates: dict[str, HitRates]) -> dict[str, Any]:
    """All figures of an adaptation."""
    return {
        "start": str(candidate.start),
        "better": candidate.is_better,
        "tokens": {
            name: division.tokens
            for name, division in (("new", candidate.new), ("old", candidate.old))
            if division is not None
        },
        "steps": candidate.tuning.looks[-1].step,
        "best_step": candidate.tuning.best.step,
        "seconds": round(candidate.tuning.looks[-1].seconds, 1),
        "ended": candidate.tuning.reason,
        "looks": [look._asdict() for look in candidate.tuning.looks],
        "before": {name: score.summary() for name, score in candidate.before.items()},
        "after": {name: score.summary() for name, score in candidate.after.items()},
        "residency": list(RESIDENCY),
        "hit_rates": rates,
    }


def print_report(candidate: Candidate, rates: dict[str, HitRates]) -> None:
    """Print what became of the predictor on documents that it was not trained on."""
    tuning = candidate.tuning
    print(
        f"{tuning.looks[-1].step} steps in {tuning.looks[-1].seconds:.0f} s over "
        f"{candidate.new.tokens['train']:,} tokens ({tuning.reason}); best after step "
        f"{tuning.best.step}"
    )
    for name, table_of_rates in rates.items():
        part = PARTS[name]
        division = candidate.new if name == "new" else candidate.old
        assert division is not None
        held_out = f"{division.tokens['held_out']:,} tokens held out of {part}"
        print_whole(_scores(candidate, name, held_out))
        print_whole(_rates(table_of_rates, f"hit rate by share of experts resident, {part}"))


def _scores(candidate: Candidate, name: str, title: str) -> Table:
    from rich.table import Table

    table = Table("figure", title=title, title_justify="left")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    before, after = candidate.before[name], candidate.after[name]
    table.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    for label, key in FIGURES.items():
        table.add_row(label, f"{before.mean(*key):.3f}", f"{after.mean(*key):.3f}")
    return table


def _rates(rates: HitRates, title: str) -> Table:
    from rich.table import Table

    table = Table("policy", title=title, title_justify="left")
    for share in RESIDENCY:
        table.add_column(f"{share * 100:.4g} %", justify="right")
    for policy, label in POLICIES.items():
        table.add_row(label, *(f"{rate:.3f}" for rate in rates[policy]))
    return table
