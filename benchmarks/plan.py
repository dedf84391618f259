"""Which arms a benchmark runs, the most telling first: a run may end before the last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.arms import MIN, NO_CACHE, Arm

if TYPE_CHECKING:
    from benchmarks.decode import DecodeSettings
    from benchmarks.prefill import PrefillSettings

FULL = "1.0"
SYSTEMS = ("transformers", "expertflow", "accelerate", "policylang", "compiled")
EXPERTS = ("grouped_mm", "batched_mm")


def decode_arms(settings: DecodeSettings) -> list[Arm]:
    """The arms of benchmarks.decode. Raises ValueError for an unknown system."""
    check_systems(settings.systems)
    rivals = {
        "transformers": [Arm(system="transformers", experts=experts) for experts in EXPERTS],
        "accelerate": [Arm(system="accelerate", residency="0.0")],
        "policylang": [Arm(system="policylang", residency=settings.compare_at)],
        "compiled": [Arm(system="compiled", replays=False)],
    }
    ours = _ours(settings) if "expertflow" in settings.systems else {}
    arms = [
        *(rivals["transformers"] if "transformers" in settings.systems else []),
        *ours.get("first", []),
        *(a for name in SYSTEMS[2:] if name in settings.systems for a in rivals[name]),
        *ours.get("then", []),
    ]
    return list(dict.fromkeys(arms))


def _ours(settings: DecodeSettings) -> dict[str, list[Arm]]:
    main = settings.policies[0]
    at = settings.compare_at
    shares = [r for r in settings.residency if r not in (FULL, MIN, at)]
    has_full = FULL in settings.residency
    full = [_arm("lru", FULL)] if has_full else []
    compiled = [_arm("lru", FULL, compile=True)] if has_full else []
    least = [_arm(NO_CACHE, MIN)] if MIN in settings.residency else []
    compared = [_arm(policy, at) for policy in settings.policies]
    prefetching = [_arm(policy, at, prefetch=True) for policy in dict.fromkeys((main, "lru"))]
    batches = [_arm(main, at, batch=batch) for batch in settings.batches]
    batches += [_arm("lru", FULL, batch=batch) for batch in settings.batches if has_full]
    others = [_arm(policy, share) for share in shares for policy in settings.policies]
    return {
        "first": full + compared,
        "then": least + prefetching + batches + compiled + others,
    }


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


def _arm(
    policy: str, residency: str, *, prefetch: bool = False, compile: bool = False, batch: int = 1
) -> Arm:
    return Arm(
        system="expertflow",
        policy=policy,
        residency=residency,
        prefetch=prefetch,
        compile=compile,
        batch=batch,
    )


def check_systems(names: list[str]) -> None:
    """Raise ValueError for a name that is not one of `SYSTEMS`."""
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"systems: {name!r} is not one of {', '.join(SYSTEMS)}")
