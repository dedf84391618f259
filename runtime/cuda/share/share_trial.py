"""The trial that finds how many missed experts to leave to the CPU, by the clock of whole steps."""

from __future__ import annotations

from collections import deque

from runtime.cuda.prefetching import typical

TURN = 24
"""Steps of one way in a row."""
SETTLING = 4
"""Steps at the start of a turn that do not count."""
NEEDED = 60
"""Steps of each way after which the fastest is kept."""
LEAST_GAIN = 0.01
"""What the CPU must save of a step's time."""
SLOWER = (1.0, 0.7, 1.5, 2.5)
"""Factors of the CPU's time for an expert, beside the link: both read the same memory."""
AGAIN = 1 << 14
"""Steps after which the question is asked anew: texts and neighbours change."""


def split(top_k: int, cpu_s: float, link_s: float) -> tuple[int, ...]:
    """Of m = 0 .. K missed experts, how many the CPU takes so that both sides end soonest."""
    return tuple(
        min(range(missed + 1), key=lambda away: (max(away * cpu_s, (missed - away) * link_s), away))
        for missed in range(top_k + 1)
    )


class ShareTrial:
    """Runs the ways in turns, and keeps the fastest. always: even if none with the CPU is."""

    def __init__(self, top_k: int, cpu_s: float, link_s: float, *, always: bool = False) -> None:
        self._nothing = (0,) * (top_k + 1)
        found = [split(top_k, cpu_s * factor, link_s) for factor in SLOWER]
        ways = [way for way in dict.fromkeys(found) if any(way)]
        self._ways = ways if always and ways else [self._nothing, *ways]
        self.per_expert_s = cpu_s, link_s
        """Seconds of an expert, on the CPU and over the link."""
        self._num_launched = self._num_landed = 0
        self._set = self._last = self._nothing
        self._streak = 0
        self._flying: deque[tuple[int, ...]] = deque()
        self._why: str | None = None
        self._ms: dict[tuple[int, ...], float] = {}
        self._begin()

    def _begin(self) -> None:
        self.choice: tuple[int, ...] | None = self._ways[0] if len(self._ways) == 1 else None
        """The fastest way; None while it is being tried."""
        self._seconds: dict[tuple[int, ...], list[float]] = {way: [] for way in self._ways}

    @property
    def is_on(self) -> bool:
        """Whether the step that was launched last leaves anything to the CPU."""
        return any(self._set)

    def next_share(self) -> list[int] | None:
        """The share of the step that is launched next; None where it stays as it is."""
        way = self.choice
        if self._why is not None:
            way = self._nothing
        elif way is None:
            way = self._ways[self._num_launched // TURN % len(self._ways)]
        self._num_launched += 1
        self._flying.append(way)
        changed, self._set = way != self._set, way
        return list(way) if changed else None

    def forget(self) -> None:
        """Steps in flight were dropped: nobody will count them."""
        self._flying.clear()

    def add(self, seconds: float) -> None:
        """Count a step that has ended, in the order of their launches."""
        if not self._flying:
            return
        way = self._flying.popleft()
        self._streak = self._streak + 1 if way == self._last else 0
        self._last = way
        self._num_landed += 1
        if self._num_landed % AGAIN == 0:
            self._begin()
        if self.choice is None and self._streak >= SETTLING and way in self._seconds:
            self._seconds[way].append(seconds)
            if min(map(len, self._seconds.values())) >= NEEDED:
                self._choose()

    def _choose(self) -> None:
        self._ms = {way: 1e3 * typical(seconds) for way, seconds in self._seconds.items()}
        fastest = min(self._ways, key=lambda way: self._ms[way])
        gain = 1 - self._ms[fastest] / self._ms[self._ways[0]]
        self.choice = fastest if gain >= LEAST_GAIN else self._ways[0]

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
            told += "".join(f"; {self._ms[way]:.2f} ms a step with it" for way in self._ways[1:2])
            return f"the CPU computes no experts: {told}{self._without}"
        shares = ", ".join(f"{away} of {missed}" for missed, away in enumerate(self.choice) if away)
        if self.choice in self._ms:
            told += f"; {self._ms[self.choice]:.2f} ms a step with it{self._without}"
        return f"the CPU computes {shares} missed experts: {told}"

    @property
    def _without(self) -> str:
        ms = self._ms.get(self._nothing)
        return "" if ms is None else f", {ms:.2f} ms without"
