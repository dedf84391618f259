"""Arms of the prefill benchmark."""

from __future__ import annotations

from benchmarks.prefill.settings import PrefillSettings
from benchmarks.systems.arm import FULL, MIN, NO_CACHE, Arm, check_systems, expertflow_arm


def prefill_arms(settings: PrefillSettings) -> list[Arm]:
    """All arms that the settings ask for. Raises ValueError for an unknown system."""
    check_systems(settings.systems)
    offloaded = [
        expertflow_arm(
            NO_CACHE if residency == MIN else settings.policy,
            residency,
            prefetch="auto" if settings.prefetch and residency != FULL else False,
            batch=settings.batch,
        )
        for residency in (FULL, *settings.residency)
    ]
    arms = {
        "expertflow": list(dict.fromkeys(offloaded)),
        "transformers": [Arm(system="transformers", experts="grouped_mm")],
        "accelerate": [Arm(system="accelerate", residency="0.0")],
    }
    return [arm for name in settings.systems for arm in arms.get(name, [])]
