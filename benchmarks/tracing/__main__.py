"""Cost of recording: a model's forward pass alone, and the same with its trace written to disk.

python -m benchmarks.tracing [--model DIR_OR_ID] [--tokens 16384] [--repeats 7]

The two arms run the same batches in turn, `repeats` times, after one unmeasured round; the table
shows medians. CPU seconds stand beside wall-clock seconds because other programs disturb them less.
The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from routing.cli import run

if TYPE_CHECKING:
    from trace.runner import Runner
    from trace.sources import Prompt

TARGET = 0.20
RANDOM_MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "eos_token_id": 0,
}


@dataclass(frozen=True, kw_only=True)
class OverheadSettings:
    """Measure the cost of recording routes beside the forward pass."""

    model: str | None = None
    """Model: a directory or an id on the Hub. Default: a random OLMoE, 8 layers of 32 experts."""
    tokens: int = 16384
    """Tokens in a round, in documents of 64 to 1,024 tokens."""
    batch_tokens: int = 8192
    """Tokens in a batch, padding included."""
    repeats: int = 7
    """Measured rounds of each arm."""
    device: str = "cpu"
    """Device that computes."""
    weights: bool = False
    """Record the router weights too."""


class Cost(NamedTuple):
    """Median cost of a round."""

    wall_s: float
    cpu_s: float


def main(settings: OverheadSettings) -> None:
    """Print the table, then the same as JSON."""
    import torch

    from benchmarks.common.machine import command, machine

    arms = make_arms(settings)
    costs = measure(arms, settings)
    plain, recorded = costs["forward"], costs["forward + recording"]
    overhead = {
        "wall": 1 - plain.wall_s / recorded.wall_s,
        "cpu": 1 - plain.cpu_s / recorded.cpu_s,
    }
    facts = {
        "machine": machine(torch.device(settings.device)),
        "command": command("benchmarks.tracing"),
        "settings": asdict(settings),
    }
    print_table(facts, costs, settings, overhead["wall"])
    result = {"tokens_per_s": {arm: settings.tokens / cost.wall_s for arm, cost in costs.items()}}
    costs_json = {arm: cost._asdict() for arm, cost in costs.items()}
    print(json.dumps(facts | {"costs": costs_json, "throughput_lost": overhead} | result))


def make_arms(settings: OverheadSettings) -> dict[str, Callable[[], None]]:
    """The two ways to run the same batches, by name."""
    import torch

    from routing.inspect_model import topology_of
    from routing.writer import TraceWriter
    from trace.batches import batches, padded
    from trace.recorder import Recorder
    from trace.runner import Runner

    runner = Runner(load(settings), weights=settings.weights)
    topology = topology_of(runner.model)
    prompts = list(batches(documents(runner, settings), settings.batch_tokens))

    @torch.inference_mode()
    def forward() -> None:
        for batch in prompts:
            ids_BT, mask_BT = (t.to(settings.device) for t in padded(batch, 0, left=False))
            runner.model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)

    def record() -> None:
        with tempfile.TemporaryDirectory() as out, Recorder(runner.model) as recorder:
            path = Path(out, "trace")
            with TraceWriter(
                path, topology, provenance={}, with_weights=settings.weights
            ) as writer:
                for batch in prompts:
                    for document in runner.run(recorder, batch):
                        writer.add(document)

    return {"forward": forward, "forward + recording": record}


def load(settings: OverheadSettings) -> Any:
    """The model of the settings, or a random one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if settings.model is not None:
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype="auto", trust_remote_code=False
        )
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **RANDOM_MODEL))
    return model.eval().to(settings.device)


def documents(runner: Runner, settings: OverheadSettings) -> list[Prompt]:
    """Random documents with `settings.tokens` tokens in all."""
    import numpy as np

    from trace.sources import Prompt

    random = np.random.default_rng(0)
    vocab_size = runner.model.config.get_text_config().vocab_size
    prompts: list[Prompt] = []
    rest = settings.tokens
    while rest:
        length = min(rest, int(random.integers(64, 1025)))
        ids = random.integers(0, vocab_size, length).tolist()
        prompts.append(Prompt(len(prompts), ids, "random", 0))
        rest -= length
    return prompts


def measure(arms: dict[str, Callable[[], None]], settings: OverheadSettings) -> dict[str, Cost]:
    """Medians over interleaved rounds, so that a slow minute slows both arms."""
    rounds: dict[str, list[Cost]] = {arm: [] for arm in arms}
    for _ in range(settings.repeats + 1):
        for arm, work in arms.items():
            rounds[arm].append(timed(work, settings.device))
    return {
        arm: Cost(*map(statistics.median, zip(*costs[1:], strict=True)))
        for arm, costs in rounds.items()
    }


def timed(work: Callable[[], None], device: str) -> Cost:
    """The cost of one round, until the device has finished."""
    import torch

    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def print_table(
    facts: dict[str, Any], costs: dict[str, Cost], settings: OverheadSettings, lost: float
) -> None:
    """Print the table and the verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table("arm", "seconds", "CPU seconds", "tokens/s")
    for arm, cost in costs.items():
        speed = f"{settings.tokens / cost.wall_s:,.0f}"
        table.add_row(arm, f"{cost.wall_s:.3f}", f"{cost.cpu_s:.3f}", speed)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{facts['command']}\n{facts['machine']}")
    console.print(table)
    verdict = "within" if lost <= TARGET else "over"
    console.print(
        f"recording takes {lost:.1%} of the throughput: {verdict} the {TARGET:.0%} target"
    )


if __name__ == "__main__":
    run(main, OverheadSettings, prog="python -m benchmarks.tracing")
