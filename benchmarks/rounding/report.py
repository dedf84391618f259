"""Tables of the encodings benchmark."""

from __future__ import annotations

from benchmarks.common.report import number, print_table
from benchmarks.rounding.arms import Arm
from benchmarks.rounding.routes import Replay

POLICIES = ("lru", "lfu", "predicted", "belady")


def print_quality(arms: list[Arm]) -> None:
    """Print what each conversion costs."""
    cells = []
    for arm in arms:
        quality = arm.quality
        assert quality is not None, "every arm is measured"
        cells.append(
            [
                arm.name,
                f"{arm.bits:.2f}",
                f"{quality.perplexity:.4f}",
                f"{100 * quality.change:+.2f} %",
                f"{quality.divergence:.5f}",
                f"{100 * quality.agreement:.2f} %",
                f"{arm.seconds:.0f}",
            ]
        )
    first = arms[0].quality
    assert first is not None, "every arm is measured"
    title = f"{first.tokens:,} tokens; perplexity of the original {first.original_perplexity:.4f}"
    columns = ("arm", "bits", "perplexity", "change", "KL, nats", "same greedy token", "seconds")
    print_table(title, columns, cells, {})


def print_replays(replays: list[Replay]) -> None:
    """Print the hit rates under each model's own routes."""
    cells = [
        [
            replay.name,
            f"{share:.1%}",
            *(_hit_rate(replay, policy, share) for policy in POLICIES),
            number(replay.recall_this, ".3f"),
            number(replay.recall_next, ".3f"),
            f"{replay.in_common:.3f}",
        ]
        for replay in replays
        for share in dict.fromkeys(result["residency"] for result in replay.hit_rates)
    ]
    columns = ("routes of", "resident", *POLICIES, "recall, this", "recall, next", "in common")
    print_table(f"hit rates over {replays[0].tokens:,} tokens", columns, cells, {})


def _hit_rate(replay: Replay, policy: str, share: float) -> str:
    found = [
        result["hit_rate"]
        for result in replay.hit_rates
        if (result["policy"], result["residency"]) == (policy, share)
    ]
    return number(found[0] if found else None, ".3f")
