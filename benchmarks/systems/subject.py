"""The model and the text that all arms of a benchmark share, and its set-up for each system."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.link import best, measure_link
from benchmarks.common.shapes import build_model, expert_bytes, shape_named, weight_bytes
from benchmarks.replay.passages import (
    EvenText,
    Passages,
    RandomText,
    Text,
    TracedText,
    passage_calls,
)
from benchmarks.replay.relabel_predictor import relabel_predictor
from benchmarks.replay.text_replay import TextReplay
from benchmarks.systems import other_systems
from benchmarks.systems.arm import MIN, NO_CACHE, Arm, decoding_as
from benchmarks.systems.running import Running, offloaded
from routing.inspect_model import topology_of
from routing.predictor_file.reader import open_predictor
from routing.topology import Topology


class Pass(NamedTuple):
    """One run: passages, the length of their prompt, and the number of tokens to generate."""

    passages: Passages
    prompt: int
    new_tokens: int

    @property
    def text(self) -> Passages:
        """The tokens that run through the model: all but the last new one."""
        return self.passages.first(self.prompt + self.new_tokens - 1)


class Subject:
    """A random model of a published shape in host memory, and the measured link to the device."""

    def __init__(
        self,
        shape: str,
        device: torch.device,
        *,
        trace: Path | None,
        predictor: Path | None,
        routes: str = "model",
        seed: int,
    ) -> None:
        """routes: "even" draws the routes evenly where no trace is given.

        Raises ValueError for an unknown shape, or a trace or predictor that does not fit.
        """
        self.shape, self.device = shape_named(shape), device
        start = time.perf_counter()
        self.model: Any = build_model(self.shape, device, seed=seed)
        self.build_s = time.perf_counter() - start
        self.topology: Topology = topology_of(self.model)
        self.expert_bytes = expert_bytes(self.model)
        self.weight_bytes = weight_bytes(self.model)
        self.text: Text = self._text(trace, routes)
        self.predictor = None if predictor is None else self._relabelled(predictor)
        self.link = measure_link(self.expert_bytes, device)
        self.bandwidth = best(self.link)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about model, text and link, for the result file."""
        return {
            "shape": self.shape.name,
            "topology": str(self.topology.stack()),
            "weights": "random, drawn on the device",
            "routes": self.text.routes,
            "bytes": self.weight_bytes,
            "expert_bytes": self.expert_bytes,
            "build_s": self.build_s,
            "link_bytes_per_s": self.link,
        }

    @property
    def replays(self) -> bool:
        """Whether routes are given, rather than chosen by the random router."""
        return isinstance(self.text, TracedText | EvenText)

    def _text(self, trace: Path | None, routes: str) -> Text:
        stack, vocab_size = self.topology.stack(), self.topology.vocab_size
        if trace is not None:
            return TracedText(trace, stack, vocab_size)
        return EvenText(vocab_size, stack) if routes == "even" else RandomText(vocab_size)

    def _relabelled(self, predictor: Path) -> Path:
        if open_predictor(predictor).topology.model == self.topology.model:
            return predictor
        self._folder = tempfile.TemporaryDirectory()
        return relabel_predictor(predictor, self.topology, Path(self._folder.name, predictor.name))

    def replay(self, arm: Arm, length: int) -> TextReplay | None:
        """The replay for `arm`; None for an arm that generates freely."""
        if not arm.replays:
            return None
        return TextReplay(self.model, arm.batch, length, self.device, routes=self.replays)

    @contextmanager
    def set_up(
        self, arm: Arm, replay: TextReplay | None, passes: list[Pass], context: int
    ) -> Iterator[Running]:
        """Set the model up for `arm`. passes: everything that it will run, in order.

        Raises ValueError for an arm that lacks a device, a predictor or a trace.
        """
        replaying = nullcontext() if replay is None else replay.installed()
        with replaying, decoding_as(arm), self._system(arm, passes, context) as running:
            yield running

    def _system(
        self, arm: Arm, passes: list[Pass], context: int
    ) -> AbstractContextManager[Running]:
        if arm.system == "expertflow":
            return offloaded(self.model, **self._load_options(arm, passes, context))
        if arm.system == "transformers":
            assert arm.experts is not None
            return _running(other_systems.resident(self.model, self.device, experts=arm.experts))
        if arm.system == "float32":
            block = other_systems.resident(
                self.model, self.device, experts="batched_mm", dtype=torch.float32
            )
            return _running(block)
        if self.device.type != "cuda":
            raise ValueError(f"{arm.system} needs a CUDA device")
        if arm.system == "compiled":
            return _running(other_systems.compiled(self.model, self.device))
        if arm.system == "accelerate":
            return _running(other_systems.accelerated(self.model, self.device))
        if arm.system == "policylang":
            slots = int(float(arm.residency) * self.topology.stack().num_experts)
            return _running(other_systems.policylang(self.model, self.device, slots=slots))
        raise ValueError(f"there is no system {arm.system!r} to run")

    def _load_options(self, arm: Arm, passes: list[Pass], context: int) -> dict[str, Any]:
        options: dict[str, Any] = {
            "memory": self.memory(arm.residency),
            "policy": None if arm.policy == NO_CACHE else arm.policy,
            "device": self.device,
        }
        if self.device.type == "cuda":
            options |= {"context": context, "batch": arm.batch}
            options |= {"prefetch": arm.loads_prefetch, "compile": arm.compile}
            options |= {"cpu_share": "auto" if arm.cpu_share else False}
        if arm.policy == "belady":
            if not self.replays:
                raise ValueError("belady needs a trace: the future is not known otherwise")
            calls = [call for one in passes for call in passage_calls(one.text, one.prompt)]
            options["replay"] = calls
        if arm.policy == "predicted":
            if self.predictor is None:
                raise ValueError("predicted needs a predictor")
            options["predictor"] = self.predictor
        return options

    def memory(self, residency: str) -> float | int | str:
        """The residency as `memory` of `runtime.load`. Raises ValueError for a malformed share."""
        if residency == MIN:
            layers = self.topology.stack().layers
            return max(x.top_k for x in layers) / sum(x.num_experts for x in layers)
        if residency.endswith("%"):
            return int(float(residency[:-1]) / 100 * self.weight_bytes)
        return residency


@contextmanager
def _running(block: AbstractContextManager[dict[str, Any]]) -> Iterator[Running]:
    with block as options:
        yield Running(options)
