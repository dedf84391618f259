"""The demo: the whole pipeline on the embedded model, `python -m exports.demo` or `make demo`.

Traces exports/moe-8x32 over the sample text, trains a predictor on the trace, exports it to ONNX
and generates with a quarter of the experts resident, under every cache policy, after prompts from
held-out documents. Every stage is a public command, shown before it runs.

With --chat it is a conversation instead, with smol-moe (`expertflow build smol-moe`).
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

from routing.cli import run

HERE = Path(__file__).parent
MODEL = HERE / "moe-8x32"
SAMPLE = HERE / "sample"
SEPARATOR = "\n<|endoftext|>\n"
RESIDENCY = 0.25
WIDTH = 100
"""Columns of the terminal that the demo fits into."""
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # OpenMP threads that spin while they wait make a busy machine many times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Trace, train, export and generate offloaded, on the embedded model and sample text."""

    out: Path = Path("runs/demo")
    """Directory for the demo's files."""
    quick: bool = False
    """Run a smaller demo: three domains, a short training, few tokens."""
    chat: bool = False
    """Chat in the terminal with smol-moe instead, a quarter of its experts in memory."""
    model: Path | None = None
    """Model directory to chat with, offloaded without a predictor. Default: smol-moe in
    runs/smol-moe/model, with its own."""

    @property
    def directory(self) -> Path:
        """The directory of this run; a quick one has its own."""
        return self.out.with_name(f"{self.out.name}-quick") if self.quick else self.out

    @property
    def domains(self) -> list[Path]:
        """The sample text files in use."""
        files = sorted(SAMPLE.glob("*.txt"))
        return files[::4] if self.quick else files

    @property
    def epochs(self) -> int:
        """Epochs of the training."""
        return 3 if self.quick else 8

    @property
    def new_tokens(self) -> int:
        """Tokens to generate after each prompt."""
        return 16 if self.quick else 48


def main(settings: DemoSettings) -> None:
    """Run every stage, print the tables and draw the pictures. Exits with 1 if tokens differ."""
    if settings.chat:
        talk(settings)
        return
    start = time.perf_counter()
    prompts = hold_back(settings)
    run_stages(settings)
    print_heading(f"Generate, with {RESIDENCY:.0%} of the experts in memory")
    os.environ |= ENVIRONMENT | os.environ

    from exports.demo_generation import generate
    from exports.demo_report import draw, print_report, save

    onnx = settings.directory / "predictor.onnx"
    live = generate(MODEL, onnx, prompts, residency=RESIDENCY, new_tokens=settings.new_tokens)
    print_report(live, width=WIDTH)
    draw(live.runs, settings.directory / "policies.png")
    save(live, settings.directory / "policies.json")
    pictures = ", ".join(sorted(path.name for path in settings.directory.glob("*.png")))
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes in all; in {settings.directory}: {pictures}, policies.json")
    print_next_steps()
    if not all(result.identical for result in live.runs):
        raise SystemExit("the offloaded model generated other tokens than the model itself")


def talk(settings: DemoSettings) -> None:
    """Chat with smol-moe, or with another model."""
    from exports.demo_chat import SMOL_MODEL, SMOL_PREDICTOR, chat

    predictor = SMOL_PREDICTOR if settings.model is None else None
    chat(settings.model or SMOL_MODEL, predictor, residency=RESIDENCY)


def hold_back(settings: DemoSettings) -> dict[str, str]:
    """Write the text to trace, less one document of every domain.

    Returns the beginning of that document by domain, as a prompt.
    """
    text = settings.directory / "text"
    text.mkdir(parents=True, exist_ok=True)
    prompts = {}
    for file in settings.domains:
        held, *rest = file.read_text(encoding="utf-8").split(SEPARATOR)
        (text / file.name).write_text(SEPARATOR.join(rest), encoding="utf-8")
        prompts[file.stem] = held.strip()[:200]
    return prompts


def run_stages(settings: DemoSettings) -> None:
    """Trace, inspect, train, export and simulate, each by its command."""
    root = settings.directory
    trace, onnx = str(root / "trace"), str(root / "predictor.onnx")
    print_heading("Trace: which experts does every token use?")
    stage("trace.collect", "--model", MODEL, "--dataset", root / "text", "--out", trace)
    print_heading("Inspect: does every domain have experts of its own?")
    stage("trace.inspect", trace, "--picture", root / "usage.png")
    print_heading("Train: learn the routing from the trace")
    stage(
        "predictor.train", "fit", "--config", "small", "--data.trace", f"[{trace}]",
        "--model.embedding_from", MODEL, "--trainer.default_root_dir", root,
        "--trainer.max_epochs", settings.epochs,
    )  # fmt: skip
    print_heading("Export the predictor to ONNX")
    stage("predictor.export", root / "predictor.ckpt", onnx)
    print_heading("Simulate: replay the trace through every cache policy")
    stage(
        "runtime.simulate", "--trace", trace, "--predictor", onnx, "--max_tokens",
        500 if settings.quick else 3000, "--document_tokens", 256, "--plot", root / "hit_rates.png",
    )  # fmt: skip


def stage(module: str, *arguments: object) -> None:
    """Run one stage's command, showing it. Exits as it does where it fails."""
    words = ["-m", module, *map(str, arguments)]
    print(wrapped(["python", *(near(word) for word in words)]), flush=True)
    result = subprocess.run([sys.executable, *words], env=ENVIRONMENT | os.environ, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)


def near(word: str) -> str:
    """A path below the current directory, relative to it; any other word as it is."""
    return word.removeprefix(f"{Path.cwd()}/")


def wrapped(words: Sequence[str], prompt: str = "$ ") -> str:
    """A shell command, broken before options so that its lines fit WIDTH."""
    options: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            options.append([])
        options[-1].append(shlex.quote(word))
    lines = [prompt + " ".join(options[0])]
    for option in map(" ".join, options[1:]):
        if len(lines[-1]) + len(option) + len(" \\") >= WIDTH:
            lines.append(f"    {option}")
        else:
            lines[-1] += f" {option}"
    return " \\\n".join(lines)


def print_heading(title: str) -> None:
    """Announce a part of the demo."""
    print(f"\n== {title}", flush=True)


def print_next_steps() -> None:
    """Print the same pipeline for the user's own model."""
    print_heading("Next: your own model (a directory or an id on the Hub)")
    print("  expertflow trace --model MODEL --dataset TEXT.txt --out runs/mine/trace")
    print("  expertflow train fit --config small --data.trace runs/mine/trace \\")
    print("      --trainer.default_root_dir runs/mine")
    print("  expertflow export runs/mine/predictor.ckpt runs/mine/predictor.onnx")
    print("and in Python:")
    print("  import expertflow")
    print('  model = expertflow.load("MODEL", "runs/mine/predictor.onnx", memory=0.25)')


if __name__ == "__main__":
    run(
        main,
        DemoSettings,
        prog="python -m exports.demo",
        examples=["", "--quick", "--out runs/mine", "--chat"],
    )
