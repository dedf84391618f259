"""Arms of the decode benchmark, the most important first: a run may end before the last."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.decode.settings import DecodeSettings
from benchmarks.systems.arm import (
    FULL,
    MIN,
    NO_CACHE,
    ONE_GUESS,
    Arm,
    check_systems,
    expertflow_arm,
)

EXPERTS = ("grouped_mm", "batched_mm")


def decode_arms(settings: DecodeSettings) -> list[Arm]:
    """All arms that the settings ask for. Raises ValueError for an unknown system."""
    check_systems(settings.systems)
    at, full, usable = settings.compare_at, _full(settings), usable_policies(settings)
    main = usable[0]
    compared = dict.fromkeys(policy for policy in usable if policy in (main, "lru"))
    shares = [r for r in settings.residency if r not in (FULL, MIN, at)]
    least = [expertflow_arm(NO_CACHE, MIN)] if MIN in settings.residency else []
    arms = [
        Arm(system="float32"),
        *(Arm(system="transformers", experts=experts) for experts in EXPERTS),
        *full,
        *(expertflow_arm(policy, at) for policy in settings.policies),
        *(
            replace(expertflow_arm(main, at, prefetch=ahead), compile=True)
            for ahead in (False, ONE_GUESS, True)
        ),
        Arm(system="accelerate", residency="0.0"),
        Arm(system="policylang", residency=at),
        *least,
        *(expertflow_arm(policy, at, prefetch=True) for policy in (main, "lru")),
        expertflow_arm(main, at, prefetch=ONE_GUESS),
        expertflow_arm(main, at, prefetch="auto"),
        *(
            expertflow_arm(policy, at, batch=batch)
            for batch in settings.batches
            for policy in compared
        ),
        *(replace(arm, batch=batch) for arm in full for batch in settings.batches),
        *(replace(arm, compile=True) for arm in full),
        Arm(system="compiled", replays=False),
        *(expertflow_arm(policy, share) for share in shares for policy in usable),
    ]
    chosen = [arm for arm in dict.fromkeys(arms) if arm.system in settings.systems]
    return [arm for arm in chosen if not settings.only or arm.name in settings.only]


def usable_policies(settings: DecodeSettings) -> list[str]:
    """The policies whose predictor or trace is given. Each other gets one row that names the lack.

    Raises ValueError if there is none.
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
    return [expertflow_arm("lru", FULL)] if FULL in settings.residency else []
