"""An arm of the serving benchmarks: a scheduler and its options."""

from __future__ import annotations

from typing import NamedTuple


class ServingArm(NamedTuple):
    """A scheduler, a cache policy, and options of their own."""

    name: str
    scheduler: str
    policy: str
    extra: float
    """Share of the experts that is resident in addition to the table's residency."""
    options: dict[str, int]
    """Fields of `ServeSettings`."""

    @classmethod
    def parse(cls, name: str) -> ServingArm:
        """Parse SCHEDULER,KEY=VALUE,... Raises ValueError for anything else."""
        scheduler, *words = name.split(",")
        given = dict(word.split("=") for word in words)
        policy, extra = given.pop("policy", "predicted"), float(given.pop("extra", 0.0))
        return cls(name, scheduler, policy, extra, {key: int(given[key]) for key in given})
