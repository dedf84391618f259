"""The trial that finds how many missed experts to leave to the CPU, by the clock of whole steps."""

from __future__ import annotations

from collections import deque

from runtime.cuda.trial import Trial

TURN = 24
"""Steps of one way in a row."""
NEEDED = 60
"""Steps of each way after which the fastest is kept."""
LEAST_GAIN = 0.01
"""What the CPU must save of a step's time."""
SLOWER = (1.0, 0.7, 1.5, 2.5)
"""Factors of the CPU's time for an expert, beside the link: both read the same memory."""


Share = tuple[int, ...]
"""How many of m = 0 .. K missed experts the CPU computes."""


def split(top_k: int, cpu_s: float, link_s: float) -> Share:
    """Of m = 0 .. K missed experts, how many the CPU takes so that both sides end soonest."""
    return tuple(
        min(range(missed + 1), key=lambda away: (max(away * cpu_s, (missed - away) * link_s), away))
        for missed in range(top_k + 1)
    )


class ShareTrial(Trial[Share]):
    """Runs the ways in turns, and keeps the fastest. always: even if none with the CPU is."""

    def __init__(self, top_k: int, cpu_s: float, link_s: float, *, always: bool = False) -> None:
        self._nothing = (0,) * (top_k + 1)
        found = [split(top_k, cpu_s * factor, link_s) for factor in SLOWER]
        self._with_cpu = [way for way in dict.fromkeys(found) if any(way)]
        only = always and self._with_cpu
        ways = self._with_cpu if only else [self._nothing, *self._with_cpu]
        super().__init__(ways, turn=TURN, needed=NEEDED, least_gain=LEAST_GAIN)
        self.per_expert_s = cpu_s, link_s
        """Seconds of an expert, on the CPU and over the link."""
        self._set = self._nothing
        self._flying: deque[Share] = deque()
        self._why: str | None = None

    @property
    def is_on(self) -> bool:
        """Whether the step that was launched last leaves anything to the CPU."""
        return any(self._set)

    def next_share(self) -> list[int] | None:
        """The share of the step that is launched next; None where it stays as it is."""
        way = self.next_way() if self._why is None else self._nothing
        self._flying.append(way)
        changed, self._set = way != self._set, way
        return list(way) if changed else None

    def forget(self) -> None:
        """Steps in flight were dropped: nobody will count them."""
        self._flying.clear()

    def count(self, seconds: float) -> None:
        """Count a step that has ended, in the order of their launches."""
        way = self._flying.popleft() if self._flying else None
        if way is not None and self._why is None:
            self.add(way, seconds)

    def stop(self, why: str) -> None:
        """Leave nothing to the CPU any more."""
        self._why = why

    @property
    def verdict(self) -> str:
        """A sentence for people, with the times that decided."""
        if self._why is not None:
            return f"the CPU computes no experts: {self._why}"
        if self.choice is None:
            return "the CPU's share is being tried"
        cpu, link = (1e3 * seconds for seconds in self.per_expert_s)
        told = f"an expert takes {cpu:.2f} ms there, {link:.2f} ms over the link"
        if not any(self.choice):
            told += "".join(f"; {self.ms[way]:.2f} ms a step with it" for way in self._with_cpu[:1])
            return f"the CPU computes no experts: {told}{self._without}"
        shares = ", ".join(f"{away} of {missed}" for missed, away in enumerate(self.choice) if away)
        if self.choice in self.ms:
            told += f"; {self.ms[self.choice]:.2f} ms a step with it{self._without}"
        return f"the CPU computes {shares} missed experts: {told}"

    @property
    def _without(self) -> str:
        ms = self.ms.get(self._nothing)
        return "" if ms is None else f", {ms:.2f} ms without"
