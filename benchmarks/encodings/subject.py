"""The models of the encodings' benchmark: their text, and each set up for an arm."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.coded_models import coded_source
from benchmarks.common.link import best, measure_link
from benchmarks.common.shapes import empty_model, shape_named
from benchmarks.encodings.arms import TRACE, CodedArm
from benchmarks.replay.drawn_routes import LocalText
from benchmarks.replay.passages import Text, TracedText
from benchmarks.replay.relabel_predictor import relabel_predictor
from benchmarks.replay.text_replay import TextReplay
from benchmarks.systems.arm import decoding_as
from benchmarks.systems.running import Running, of_engine
from routing.inspect_model import topology_of
from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.shards import TraceReader
from routing.topology import Topology
from runtime.cuda.options import CudaOptions
from runtime.engine.cpu_backend import CpuBackend
from runtime.engine.engine import Engine
from runtime.loading import choose_policy, offload_on_gpu
from runtime.prediction.forecaster import Forecaster
from runtime.sizing.budget import slot_budget
from runtime.sizing.units import parse_memory
from runtime.weights.source import Source


@cache
def topology(shape: str) -> Topology:
    """The topology of a shape's model."""
    return topology_of(empty_model(shape_named(shape)))


def fitting(shapes: list[str], other: Topology) -> set[str]:
    """The shapes with the layers, experts and top-k of another topology."""
    return {shape for shape in shapes if _sizes(topology(shape)) == _sizes(other)}


def _sizes(topology: Topology) -> list[tuple[int, int]]:
    return [(layer.num_experts, layer.top_k) for layer in topology.stack().layers]


class Loaded:
    """A model that is set up for an arm, and for others that differ in their routes."""

    def __init__(
        self, source: Source, replay: TextReplay, running: Running, bandwidth: float | None
    ) -> None:
        self.model: Any = source.model
        self.replay, self.running, self.bandwidth = replay, running, bandwidth


class CodedSubject:
    """Everything that the arms of all shapes share."""

    def __init__(
        self, device: torch.device, *, trace: Path | None, predictor: Path | None, seed: int
    ) -> None:
        self.device, self._trace, self._predictor, self._seed = device, trace, predictor, seed
        self._texts: dict[tuple[str, str], Text] = {}
        self._predictors: dict[str, PredictorFile] = {}
        self._folder = tempfile.TemporaryDirectory()

    def traced(self, shapes: list[str]) -> set[str]:
        """The shapes that the trace fits."""
        return set() if self._trace is None else fitting(shapes, TraceReader(self._trace).topology)

    def predicted(self, shapes: list[str]) -> set[str]:
        """The shapes that the predictor fits."""
        if self._predictor is None:
            return set()
        return fitting(shapes, open_predictor(self._predictor).topology)

    @cached_property
    def link(self) -> dict[str, float] | None:
        """Bandwidths of the link in bytes a second."""
        return measure_link(4 << 20, self.device)

    def text(self, arm: CodedArm) -> Text:
        """The text of an arm and its routes."""
        key = arm.shape, arm.routes
        if key not in self._texts:
            model = topology(arm.shape)
            stack, vocab_size = model.stack(), model.vocab_size
            if arm.routes == TRACE:
                assert self._trace is not None
                self._texts[key] = TracedText(self._trace, stack, vocab_size)
            else:
                self._texts[key] = LocalText(vocab_size, stack, float(arm.routes))
        return self._texts[key]

    @contextmanager
    def loaded(self, arm: CodedArm, context: int) -> Iterator[Loaded]:
        """A new model, offloaded as `arm` and those with an equal `load` say."""
        source = coded_source(shape_named(arm.shape), arm.encoding, self.device, seed=self._seed)
        replay = TextReplay(
            source.model, 1, context, self.device, routes=True, layers=source.layers
        )
        with (
            replay.installed(),
            decoding_as(arm.load),
            self._engine(source, arm, context) as engine,
        ):
            yield Loaded(source, replay, of_engine(engine), best(self.link))
            engine.check_integrity()

    def _engine(self, source: Source, arm: CodedArm, context: int) -> Engine:
        budget = parse_memory(arm.residency)
        file = self._file(arm) if arm.policy == "predicted" else None
        policy = choose_policy(arm.policy, source, file, None)
        forecaster = None if file is None else Forecaster(file)
        if self.device.type == "cuda":
            options = CudaOptions(
                context=context, prefetch=arm.loads_prefetch, compile=arm.compile,
                cpu_share="auto" if arm.cpu_share else False,
            )  # fmt: skip
            model = offload_on_gpu(source, budget, self.device, policy, options, forecaster)
            return model.expertflow
        backend = CpuBackend(source, slot_budget(budget, source), self.device, policy)
        return Engine(source, backend, forecaster, None, self.device)

    def _file(self, arm: CodedArm) -> PredictorFile:
        assert self._predictor is not None
        if arm.shape not in self._predictors:
            own = Path(self._folder.name, f"{arm.shape}.onnx")
            relabelled = relabel_predictor(self._predictor, topology(arm.shape), own)
            self._predictors[arm.shape] = open_predictor(relabelled)
        return self._predictors[arm.shape]
