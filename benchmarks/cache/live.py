"""Cache policies, live, on the same tokens of held-out text.

    python -m benchmarks.cache.live --model DIR --predictor predictor.onnx --text FILES_OR_FOLDER

Each document is decoded token by token as if it were being generated (teacher forcing), one
sequence at a time: by the model without offloading, then offloaded under the free rules,
predicted reuse and Belady (which knows the recorded future). All layers share one pool of slots.
The predictor runs inside each step and its time counts. The last line is JSON.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routing.cli import run
from runtime.cache.policies import LIVE_FREE_RULES

if TYPE_CHECKING:
    from torch import Tensor

    from exports.comparison import Run

SEPARATOR = "<|endoftext|>"
COLUMNS = (
    "resident",
    "policy",
    "hit rate",
    "expert loads",
    "vs LRU",
    "of LRU's gap",
    "of free",
    "MiB moved",
    "tok/s",
    "recall",
    "prediction",
    "tokens",
)


@dataclass(frozen=True, kw_only=True)
class LiveCacheSettings:
    """Compare the cache policies live on held-out text."""

    model: Path
    """Model directory."""
    predictor: Path
    """ONNX predictor of that model."""
    text: list[Path]
    """Text files, or folders of .txt files; lines `<|endoftext|>` separate documents."""
    residency: list[float] = field(default_factory=lambda: [0.125, 0.25])
    """Cache sizes, as fractions of all experts."""
    policies: list[str] = field(default_factory=lambda: [*LIVE_FREE_RULES, "predicted", "belady"])
    """Cache policies to run; all are held against LRU and the best free rule among them."""
    document_tokens: int = 128
    """Tokens to decode of one document; each file gives one document."""
    dtype: str = "auto"
    """Number format of the model; `auto` is the stored one."""
    threads: int = 2
    """CPU threads of the model; the predictor has one."""


def main(settings: LiveCacheSettings) -> None:
    """Run every arm, print the table, then the same as JSON."""
    import torch
    import transformers

    from benchmarks.common.machine import command, machine
    from exports.comparison import compare, teacher_forced

    torch.set_num_threads(settings.threads)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=settings.dtype, trust_remote_code=False
    )
    texts = _texts(settings)
    runs, stock_seconds = compare(
        model.eval(),
        teacher_forced(texts),
        predictor=settings.predictor,
        residency=settings.residency,
        policies=settings.policies,
        on_run=lambda run: print(f"{run.policy} {run.residency}: done", file=sys.stderr),
    )
    facts = {
        "machine": machine(torch.device("cpu")),
        "command": command("benchmarks.cache.live"),
        "documents": len(texts),
        "stock_tokens_per_second": runs[0].tokens / stock_seconds,
    }
    _print(runs, facts)
    print(json.dumps(facts | {"runs": [asdict(run) for run in runs]}))


def _texts(settings: LiveCacheSettings) -> list[Tensor]:
    from routing.pretrained import read_tokenizer

    tokenizer = read_tokenizer(settings.model)
    files = [
        file
        for path in settings.text
        for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])
    ]
    if not files:
        raise ValueError(f"there are no .txt files in {settings.text}")
    texts = []
    for file in files:
        documents = file.read_text().split(f"\n{SEPARATOR}\n")
        longest = max(documents[:50], key=len)
        ids = tokenizer(longest[: settings.document_tokens * 16], return_tensors="pt").input_ids
        texts.append(ids[:, : settings.document_tokens])
    return texts


def _print(runs: Sequence[Run], facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{runs[0].tokens} tokens of {facts['documents']} documents, decoded one by one"
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    lru = {run.residency: run.loads for run in runs if run.policy == "lru"}
    versus = [f"{r.loads / lru[r.residency] - 1:+.1%}" if lru else "-" for r in runs]
    for row, difference in zip(runs, versus, strict=True):
        table.add_row(
            f"{row.residency:.1%}",
            row.policy,
            f"{row.hit_rate:.3f}",
            str(row.loads),
            difference,
            *_gaps(row, runs),
            f"{row.bytes_loaded / 2**20:.1f}",
            f"{row.tokens / row.seconds:.1f}",
            "-" if row.recall != row.recall else f"{row.recall:.3f}",
            "-" if row.prediction_ms != row.prediction_ms else f"{row.prediction_ms:.2f} ms",
            "identical" if row.identical else "DIFFERENT",
        )
    console = Console(width=140)
    console.print(facts["machine"])
    console.print(facts["command"])
    console.print(table)
    rate = facts["stock_tokens_per_second"]
    console.print(f"without offloading, while its routes are recorded: {rate:.1f} tok/s")


def _gaps(row: Run, runs: Sequence[Run]) -> list[str]:
    """The share closed of the gap to Belady: of LRU's, and of the best free rule's."""
    from runtime.simulation.gap import best_free_rule, gap_closed

    rates = {run.policy: run.hit_rate for run in runs if run.residency == row.residency}
    shares = [
        gap_closed(row.hit_rate, rates[floor], rates["belady"])
        if floor in rates and "belady" in rates
        else math.nan
        for floor in ("lru", best_free_rule(rates))
    ]
    return ["-" if math.isnan(share) else f"{share:.0%}" for share in shares]


if __name__ == "__main__":
    run(main, LiveCacheSettings, prog="python -m benchmarks.cache.live")
