"""Decoding of a whole model without a GPU, every expert in memory, beside stock transformers.

    python -m benchmarks.cpu.decode
    python -m benchmarks.cpu.decode --layers 16 --threads 16 --encodings bf16 mxfp4

Both systems have the same random weights and generate greedily after the same prompt; transformers
runs the experts as decoded to bfloat16, each in a loop and in one grouped product. Of a stack of
fewer layers than the shape's, whose tokens take as much less time, the table says so.

ms a token     the median of the steps after the first token
CPU ms         processor time of all threads a token: on a machine that does other work too, this is
               what the model takes
GB/s           bytes of the weights that a token uses, as they are in memory, over the median
logits         beside those of transformers' loop: largest difference over the largest logit, and
               the share of steps with the same largest logit

The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common.coded_models import coded_source
from benchmarks.common.machine import command, machine
from benchmarks.common.report import number, print_facts, print_table, save, settings_json
from benchmarks.common.shapes import Shape, layer_bytes, shape_named, weight_bytes
from benchmarks.systems.clock import Clock, LogitsRecorder
from benchmarks.systems.logits import compare_logits
from routing.cli import run
from runtime.engine.cpu_backend import CpuBackend
from runtime.engine.engine import Engine
from runtime.loading import choose_policy
from runtime.sizing.budget import slot_budget
from runtime.weights.source import Source

COLUMNS = (
    "system", "encoding", "threads", "ms a token", "CPU ms", "tokens/s", "a thread", "GB/s",
    "logits",
)  # fmt: skip
REFERENCE = "eager"
STOCK = (REFERENCE, "grouped_mm")
"""transformers' own ways to run experts."""
OURS = "expertflow"


@dataclass(frozen=True, kw_only=True)
class CpuDecodeSettings:
    """Decode on the CPU alone, every expert in memory."""

    shape: str = "olmoe-7b"
    """Model shape."""
    layers: int = 8
    """Layers of the stack, no more than the shape's: all of olmoe-7b take 28 GB at once."""
    encodings: list[str] = field(default_factory=lambda: ["bf16", "mxfp4"])
    """How the experts are stored: bf16, or an encoding, which slots hold decoded."""
    threads: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of torch's threads."""
    prompt: int = 16
    """Tokens of the prompt."""
    tokens: int = 33
    """Tokens to generate; the first is the prompt's."""
    repeats: int = 3
    """The generation of least median counts."""
    seed: int = 0
    """Of weights and prompt."""
    out: Path | None = None
    """File for the JSON."""


class Decoded(NamedTuple):
    """One system's time of a token."""

    system: str
    encoding: str
    threads: int
    seconds: float
    """Median of the steps."""
    processor_s: float
    """Of all threads, a step."""
    num_bytes: int
    """Of the weights that a token uses."""
    logits: str
    """Beside those of the reference."""


class Generated(NamedTuple):
    """One greedy generation."""

    seconds: float
    processor_s: float
    logits_TV: Tensor


def main(settings: CpuDecodeSettings) -> None:
    """Run every system; print a table, then all as JSON."""
    shape = _cut(shape_named(settings.shape), settings.layers)
    layers = shape.options["num_hidden_layers"], _num_layers(shape_named(settings.shape))
    facts: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "command": command("benchmarks.cpu.decode"),
        "settings": settings_json(settings),
        "layers": layers,
    }
    print_facts(facts)
    rows: list[Decoded] = []
    result = facts | {"rows": []}
    for row in (row for encoding in settings.encodings for row in _rows(settings, shape, encoding)):
        rows.append(row)
        result["rows"].append(row._asdict())
        print(", ".join(_cells(row)), flush=True)
        save(result, settings.out)
    title = f"{settings.shape}, {layers[0]} of its {layers[1]} layers, no GPU"
    print_table(title, COLUMNS, [_cells(row) for row in rows], {})
    print(json.dumps(result), flush=True)


def _rows(settings: CpuDecodeSettings, shape: Shape, encoding: str) -> Iterator[Decoded]:
    generator = torch.Generator().manual_seed(settings.seed)
    prompt_1T = torch.randint(
        shape.options["vocab_size"], (1, settings.prompt), generator=generator
    )
    before, references = torch.get_num_threads(), dict[int, Tensor]()
    try:
        for system in (*STOCK, OURS):
            source = coded_source(shape, encoding, torch.device("cpu"), seed=settings.seed)
            with _running(source, system):
                for threads in settings.threads:
                    torch.set_num_threads(threads)
                    runs = [_generate(source.model, prompt_1T, settings.tokens)]  # a warm-up
                    runs += [
                        _generate(source.model, prompt_1T, settings.tokens)
                        for _ in range(settings.repeats)
                    ]
                    best = min(runs[1:], key=lambda one: one.seconds)
                    reference_TV = references.setdefault(threads, best.logits_TV)
                    logits = compare_logits(best.logits_TV, reference_TV)
                    least = min(one.processor_s for one in runs[1:])
                    used = _bytes_of_token(source)
                    yield Decoded(system, encoding, threads, best.seconds, least, used, logits)
    finally:
        torch.set_num_threads(before)


@contextmanager
def _running(source: Source, system: str) -> Iterator[None]:
    """The source's model, with all of its experts, offloaded or as it is."""
    if system != OURS:
        _fill(source)
        model: Any = source.model
        model.set_experts_implementation(system)
        yield
        return
    budget, device = slot_budget(1.0, source), torch.device("cpu")
    policy = choose_policy(None, source, None, None)
    backend = CpuBackend(source, budget, device, policy)
    with Engine(source, backend, None, None, device) as engine:
        yield
        engine.check_integrity()


@torch.no_grad()
def _fill(source: Source) -> None:
    """Give the layers the experts of the store, decoded."""
    for index, layer in enumerate(source.layers):
        specs, count = source.store.specs(index), layer.num_experts
        tensors = {n: torch.empty(count, *s.shape, dtype=s.dtype) for n, s in specs.items()}
        for expert in range(count):
            source.store.read(index, expert, {n: tensor[expert] for n, tensor in tensors.items()})
        for name, tensor in tensors.items():
            layer.module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _generate(model: Any, prompt_1T: Tensor, tokens: int) -> Generated:
    recorder, spent = LogitsRecorder(), list[float]()
    clock = Clock(on_first=lambda: spent.append(time.process_time()))
    model.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=tokens,
        do_sample=False, streamer=clock, logits_processor=[recorder],
    )  # fmt: skip
    spent.append(time.process_time())
    processor_s = (spent[1] - spent[0]) / (tokens - 1)
    return Generated(statistics.median(clock.step_s), processor_s, torch.cat(recorder.logits))


def _bytes_of_token(source: Source) -> int:
    """Bytes of all weights but those of unused experts and of the embedding."""
    experts = sum(
        source.store.specs(index)[name].num_bytes * layer.top_k
        for index, layer in enumerate(source.layers)
        for name in source.store.specs(index)
    )
    held = sum(layer_bytes(layer) for layer in source.layers)
    model: Any = source.model
    embedding: int = model.get_input_embeddings().weight.nbytes
    return weight_bytes(model) - held - embedding + experts


def _cut(shape: Shape, layers: int) -> Shape:
    """The shape with so many layers. Raises ValueError for more than it has, or none."""
    if not 0 < layers <= _num_layers(shape):
        raise ValueError(f"layers={layers}: {shape.name} has 1 to {_num_layers(shape)}")
    return replace(shape, options=shape.options | {"num_hidden_layers": layers})


def _num_layers(shape: Shape) -> int:
    found: int = shape.options["num_hidden_layers"]
    return found


def _cells(row: Decoded) -> list[str]:
    each = 1 / row.seconds
    return [
        row.system, row.encoding, str(row.threads), number(row.seconds, ".1f", 1e-3),
        number(row.processor_s, ".1f", 1e-3), number(each, ".2f"),
        number(each / row.threads, ".2f"), number(row.num_bytes * each, ".1f", 1e9), row.logits,
    ]  # fmt: skip


if __name__ == "__main__":
    run(main, CpuDecodeSettings, prog="python -m benchmarks.cpu.decode")
