"""The whole pipeline on the embedded model: `python -m exports.demo` (or `make demo`).

Traces exports/moe-8x32 over the sample text, trains a predictor on the trace, exports it to ONNX
and generates with a quarter of the experts resident, under every cache policy, after prompts from
documents that were held back. Every stage is the public command, printed before it runs.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from routing.cli import run

if TYPE_CHECKING:
    from torch import Tensor

    from exports.comparison import Run

HERE = Path(__file__).parent
MODEL = HERE / "moe-8x32"
SAMPLE = HERE / "sample"
SEPARATOR = "\n<|endoftext|>\n"
RESIDENCY = 0.25


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Trace, train, export and generate offloaded, on the embedded model and sample text."""

    out: Path = Path("runs/demo")
    """Directory for everything that the demo makes."""
    quick: bool = False
    """A smaller setting: three domains, a short training, few tokens."""

    @property
    def directory(self) -> Path:
        return self.out.with_name(f"{self.out.name}-quick") if self.quick else self.out

    @property
    def domains(self) -> list[Path]:
        """The sample text files in use."""
        files = sorted(SAMPLE.glob("*.txt"))
        return files[::4] if self.quick else files

    @property
    def epochs(self) -> int:
        return 3 if self.quick else 8

    @property
    def new_tokens(self) -> int:
        """Tokens to generate after each prompt."""
        return 16 if self.quick else 48


def main(settings: DemoSettings) -> None:
    """Run every stage, print the table and write the pictures. Exits with 1 if tokens differ."""
    start = time.perf_counter()
    prompts = hold_back(settings)
    run_stages(settings)
    runs = generate(settings, prompts)
    print_table(runs)
    draw(runs, settings.directory / "policies.png")
    pictures = ", ".join(sorted(path.name for path in settings.directory.glob("*.png")))
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes; pictures in {settings.directory}: {pictures}")
    if not all(result.identical for result in runs):
        raise SystemExit("the offloaded model generated other tokens than the model itself")


def hold_back(settings: DemoSettings) -> list[str]:
    """Write the text to trace, less one document of every domain, whose beginning is a prompt."""
    text = settings.directory / "text"
    text.mkdir(parents=True, exist_ok=True)
    prompts = []
    for file in settings.domains:
        held, *rest = file.read_text(encoding="utf-8").split(SEPARATOR)
        (text / file.name).write_text(SEPARATOR.join(rest), encoding="utf-8")
        prompts.append(held.strip()[:200])
    return prompts


def run_stages(settings: DemoSettings) -> None:
    """Trace, inspect, train, export and simulate, each by its command."""
    import predictor

    root = settings.directory
    trace, onnx = str(root / "trace"), str(root / "predictor.onnx")
    config = Path(predictor.__file__).parent / "configs" / "small.yaml"
    stage("trace.collect", "--model", MODEL, "--dataset", root / "text", "--out", trace)
    stage("trace.inspect", trace, "--picture", root / "usage.png")
    stage(
        "predictor.train", "fit", "--config", config, "--data.trace", f"[{trace}]",
        "--model.embedding_from", MODEL, "--trainer.default_root_dir", root,
        "--trainer.max_epochs", settings.epochs,
    )  # fmt: skip
    stage("predictor.export", root / "predictor.ckpt", onnx)
    stage(
        "runtime.simulate", "--trace", trace, "--predictor", onnx, "--max_tokens",
        500 if settings.quick else 3000, "--document_tokens", 256, "--plot", root / "hit_rates.png",
    )  # fmt: skip


def stage(module: str, *arguments: object) -> None:
    """Run one stage's command, showing it."""
    words = ["-m", module, *map(str, arguments)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    # OpenMP threads that spin while they wait make a busy machine many times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    result = subprocess.run([sys.executable, *words], env=environment, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)


def generate(settings: DemoSettings, texts: Sequence[str]) -> list[Run]:
    """Generate after the prompts under every policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from exports.comparison import compare
    from exports.comparison import generate as generating

    print(f"\ngenerating with {RESIDENCY:.0%} of the experts resident", flush=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts: list[Tensor] = [tokenizer(t, return_tensors="pt").input_ids[:, :48] for t in texts]
    runs, _ = compare(
        AutoModelForCausalLM.from_pretrained(MODEL).eval(),
        generating(prompts, settings.new_tokens),
        predictor=settings.directory / "predictor.onnx",
        residency=[RESIDENCY],
    )
    return runs


def print_table(runs: Sequence[Run]) -> None:
    """The closing table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"the same {runs[0].tokens} tokens, {runs[0].slots} slots, live")
    for column in ("policy", "hit rate", "expert loads", "vs LRU", "moved", "tokens identical"):
        table.add_column(column, justify="right")
    for row in runs:
        table.add_row(
            row.policy,
            f"{row.hit_rate:.1%}",
            str(row.loads),
            f"{row.loads / runs[0].loads - 1:+.1%}",
            f"{row.bytes_loaded / 2**20:.1f} MiB",
            "yes" if row.identical else "NO",
        )
    console = Console()
    console.print(table)
    predicted = next(row for row in runs if row.policy == "predicted")
    console.print(
        f"predictor: recall@K {predicted.recall:.3f} while decoding, "
        f"{predicted.prediction_ms:.2f} ms a step (median)"
    )


def draw(runs: Sequence[Run], path: Path) -> None:
    """Expert loads of each policy as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    colors = ["#8c8c8c", "#3b6ea5", "#d9822b", "#4f8a5b"]
    bars = axes.bar([row.policy for row in runs], [row.loads for row in runs], color=colors)
    axes.bar_label(bars, [f"{row.loads}\n{row.hit_rate:.0%} hits" for row in runs], fontsize=8)
    axes.set_ylim(0, max(row.loads for row in runs) * 1.2)
    axes.set(ylabel="expert loads")
    axes.set_title(f"{runs[0].tokens} tokens, {RESIDENCY:.0%} of the experts resident", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run(main, DemoSettings, prog="python -m exports.demo")
