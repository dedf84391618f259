"""Which arms a benchmark runs, the most telling first: a run may end before the last."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.arms import MIN, NO_CACHE, Arm

if TYPE_CHECKING:
    from benchmarks.decode import DecodeSettings
    from benchmarks.prefill import PrefillSettings

FULL = "1.0"
SYSTEMS = ("float32", "transformers", "expertflow", "accelerate", "policylang", "compiled")
EXPERTS = ("grouped_mm", "batched_mm")


def decode_arms(settings: DecodeSettings) -> list[Arm]:
    """The arms of benchmarks.decode. Raises ValueError for an unknown system."""
    check_systems(settings.systems)
    at, full, usable = settings.compare_at, _full(settings), usable_policies(settings)
    main = usable[0]
    shares = [r for r in settings.residency if r not in (FULL, MIN, at)]
    least = [_arm(NO_CACHE, MIN)] if MIN in settings.residency else []
    arms = [
        Arm(system="float32"),
        *(Arm(system="transformers", experts=experts) for experts in EXPERTS),
        *full,
        *(_arm(policy, at) for policy in settings.policies),
        *(replace(_arm(main, at, prefetch=ahead), compile=True) for ahead in (False, True)),
        Arm(system="accelerate", residency="0.0"),
        Arm(system="policylang", residency=at),
        *least,
        *(_arm(policy, at, prefetch=True) for policy in (main, "lru")),
        _arm(main, at, prefetch="auto"),
        *(_arm(main, at, batch=batch) for batch in settings.batches),
        *(replace(arm, batch=batch) for arm in full for batch in settings.batches),
        *(replace(arm, compile=True) for arm in full),
        Arm(system="compiled", replays=False),
        *(_arm(policy, share) for share in shares for policy in usable),
    ]
    chosen = [arm for arm in dict.fromkeys(arms) if arm.system in settings.systems]
    return [arm for arm in chosen if not settings.only or arm.name in settings.only]


def usable_policies(settings: DecodeSettings) -> list[str]:
    """The policies that have what they need; the others get one row, which says what they lack.

    Raises ValueError when there is none.
    """
    lacking = {
        "predicted": settings.predictor is None,
        "belady": settings.trace is None and settings.routes != "even",
    }
    usable = [policy for policy in settings.policies if not lacking.get(policy, False)]
    if not usable:
        raise ValueError("policies: each of them needs a predictor or a trace that is not given")
    return usable


def _full(settings: DecodeSettings) -> list[Arm]:
    return [_arm("lru", FULL)] if FULL in settings.residency else []


def prefill_arms(settings: PrefillSettings) -> list[Arm]:
    """The arms of benchmarks.prefill. Raises ValueError for an unknown system."""
    check_systems(settings.systems)
    ours = [_arm(NO_CACHE if r == MIN else "lru", r) for r in (FULL, *settings.residency)]
    arms = {
        "expertflow": list(dict.fromkeys(ours)),
        "transformers": [Arm(system="transformers", experts="grouped_mm")],
        "accelerate": [Arm(system="accelerate", residency="0.0")],
    }
    return [arm for name in settings.systems for arm in arms.get(name, [])]


def _arm(policy: str, residency: str, *, prefetch: bool | str = False, batch: int = 1) -> Arm:
    return Arm(
        system="expertflow", policy=policy, residency=residency, prefetch=prefetch, batch=batch
    )


def check_systems(names: list[str]) -> None:
    """Raise ValueError for a name that is not one of `SYSTEMS`."""
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"systems: {name!r} is not one of {', '.join(SYSTEMS)}")
