"""Agreement of the tokens that requests get together with those that each gets alone.

    python -m benchmarks.serving.agreement --model exports/moe-8x32 --text exports/sample \
        --predictor exports/predictors/moe-8x32.onnx
    python -m benchmarks.serving.agreement --model exports/moe-8x32 --text exports/sample \
        --schedulers fifo --requests 512 --batch 512 --rows 512 --alone 64

Sharing a step changes no token except by rounding: matrix products of a different number of rows
may differ in the last bits. In float32 this matters at exact near-ties only; in bfloat16 a near-tie
is much wider. For each request that differs, the margin is how far apart the two likeliest tokens
were at the first difference. Decoding is greedy. The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.serving.arm import ServingArm
from benchmarks.serving.load import TextLoad
from routing.cli import run

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.serving.request import Request, Result

COLUMNS = (
    "scheduler", "same to the end", "tokens before a difference", "first difference at, median",
    "margin, median", "margin, most",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AgreementSettings(TextLoad):
    """Serve requests together and alone."""

    predictor: Path | None = None
    """ONNX predictor of that model. Without one only `fifo` can be compared."""
    requests: int = 64
    """Prompts, the same number from every domain."""
    alone: int | None = None
    """Of them, those that are served alone too and compared; all by default."""
    schedulers: list[str] = field(default_factory=lambda: ["fifo", "predicted"])
    """Schedulers to compare; each serves all requests."""
    memory: float = 0.25
    """Share of the experts that is resident."""
    dtype: str = "bfloat16"
    """Number format of the model."""
    device: str = "cuda"
    """Device that computes."""
    out: Path | None = None
    """File for the JSON."""


def main(settings: AgreementSettings) -> None:
    """Serve each request alone, then all under every scheduler; print the table, then JSON."""
    import torch

    import runtime
    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, print_table, save, settings_json
    from benchmarks.serving.text_requests import text_requests

    requests = text_requests(settings)
    facts = {
        "machine": machine(torch.device(settings.device)),
        "command": command("benchmarks.serving.agreement"),
        "settings": settings_json(settings),
    }
    print_facts(facts)
    on_gpu = settings.device.startswith("cuda")
    model = runtime.load(
        settings.model,
        settings.predictor,
        memory=settings.memory,
        dtype=settings.dtype,
        device=settings.device,
        context=settings.prompt_tokens[1] + settings.output_tokens[1] if on_gpu else None,
        batch=settings.rows if on_gpu else None,
    )
    with model.expertflow as engine:
        one = vars(settings.serve_settings(ServingArm.parse("fifo"))) | {"batch": 1, "rows": 1}
        some = [replace(request, logprobs=2) for request in requests[: settings.alone]]
        alone = [result for request in some for result in served(engine, [request], one)]
        rows = []
        for name in settings.schedulers:
            options = vars(settings.serve_settings(ServingArm.parse(name)))
            together = served(engine, requests, options)
            rows.append({"scheduler": name} | compare(alone, together[: len(alone)]))
    title = f"{settings.requests} requests, batch {settings.batch}, {settings.dtype}"
    print_table(title, COLUMNS, [_cells(row) for row in rows], {})
    save(facts | {"rows": rows}, settings.out)
    print(json.dumps(facts | {"rows": rows}), flush=True)


def served(engine: Engine, requests: Sequence[Request], options: dict[str, Any]) -> list[Result]:
    """The results of serving the requests, in their order."""
    results = {result.id: result for result in engine.serve(requests, **options)}
    return [results[request.id] for request in requests]


def compare(alone: Sequence[Result], together: Sequence[Result]) -> dict[str, Any]:
    """Share of requests with the same tokens (`same`), and the margins of the others.

    differ_at: index of the first different token of each that differs. margins: log-probability of
    the likeliest token less that of the second, alone, there. same_tokens: share of all tokens that
    come before a first difference.
    """
    margins, differ_at, kept = [], [], 0
    for one, other in zip(alone, together, strict=True):
        at = first_difference(one.token_ids, other.token_ids)
        kept += len(one.token_ids) if at is None else at
        if at is not None:
            (_, best), (_, second) = one.logprobs[at].top[:2]
            margins.append(best - second)
            differ_at.append(at)
    return {
        "requests": len(alone),
        "same": 1 - len(margins) / len(alone),
        "same_tokens": kept / sum(len(one.token_ids) for one in alone),
        "differ_at": differ_at,
        "margins": margins,
    }


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first different token; None if there is none."""
    pairs = enumerate(zip(left, right, strict=True))
    return next((index for index, (one, other) in pairs if one != other), None)


def _cells(row: dict[str, Any]) -> list[str]:
    margins, requests = row["margins"], row["requests"]
    spread = [f"{np.median(margins):.3f}", f"{max(margins):.3f}"] if margins else ["-", "-"]
    first = f"{np.median(row['differ_at']):.0f}" if margins else "-"
    same = f"{requests - len(margins)} of {requests}"
    return [row["scheduler"], same, f"{row['same_tokens']:.1%}", first, *spread]


if __name__ == "__main__":
    run(main, AgreementSettings, prog="python -m benchmarks.serving.agreement")
