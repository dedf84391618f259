"""The forward that each captured step runs: the model's own, or a compiled one.

compile=False   plain steps
compile=True    compiled steps; the first one waits for the compiler, or finds its artefacts
compile="auto"  plain steps, until a process of the compiler's has filled the artefacts; then, from
                the next generation on, compiled ones
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import torch

from runtime.cuda.compiling.artefacts import Artefacts, device_name, model_description
from runtime.cuda.compiling.background import CompilerProcess, Task
from runtime.cuda.compiling.blueprint import StepKey, StepShape, pack
from runtime.cuda.compiling.compiled_forward import COMPILER, CompiledForward
from runtime.cuda.decode.fused_forward import FusedForward
from runtime.cuda.decode.fused_top_k import cached_only
from runtime.cuda.options import AUTO
from runtime.cuda.single_tokens import UnknownAttention
from runtime.cuda.sorted_experts import sorted_forwards
from runtime.kv.storage import StorageSize
from runtime.weights.source import Source

Forward = Callable[..., Any]
LEAST_FREE = 1 << 30
"""Bytes of GPU memory without which no process of the compiler's is started: it takes half of them
for its own context."""

log = logging.getLogger(__name__)


class StepForwards:
    """The forwards of the steps of one model.

    asked: the option. num_sizes: of steps of each kind. storage: the key/value storage's size.
    """

    def __init__(
        self,
        source: Source,
        asked: bool | str,
        device: torch.device,
        *,
        num_sizes: int,
        storage: StorageSize,
    ) -> None:
        model: Any = source.model
        self._model, self._layers, self._device = model, source.layers, device
        self._asked, self._storage = asked, storage
        self._description = model_description(model)
        self.plain: Forward = FusedForward(model)
        """The model's own."""
        self._compile = partial(
            CompiledForward, model.forward, source.layers, sorted_forwards(model),
            num_sizes=num_sizes, fullgraph=asked == AUTO,
        )  # fmt: skip
        self._seen: set[StepKey] = set()
        self._waiting: deque[tuple[StepKey, bytes]] = deque()
        self._process: tuple[StepKey, CompilerProcess] | None = None
        self._ready: set[StepKey] = set()
        self._switched: set[StepKey] = set()
        self.failure: str | None = None
        """Why steps stay plain under "auto"."""

    @cached_property
    def _compiled(self) -> Forward:
        """Made at first use: torch takes seconds to import its compiler."""
        return self._compile()

    def of(self, key: StepKey) -> Forward:
        """For a step that is being built."""
        if self._asked is True:
            return KeptForward(self._compiled, self._artefacts(key))
        if key in self._switched:
            return CachedForward(self._compiled, self._artefacts(key), self.plain, self._give_up)
        return self.plain

    # ------------------------------------------------------------------ under "auto"

    def seen(self, key: StepKey, shape: Callable[[], StepShape]) -> None:
        """A plain step of this kind has been captured: let it be compiled, once."""
        if self._asked != AUTO or key in self._seen or self.failure is not None:
            return
        self._seen.add(key)
        if self._artefacts(key).exist:
            self._ready.add(key)
            return
        try:
            self._waiting.append((key, pack(self._model, self._layers, shape())))
        except ValueError as error:
            self._give_up(str(error))
        self._go_on()

    def switches(self, key: StepKey) -> bool:
        """Whether steps of this kind are to be built anew, compiled; asked between generations."""
        if self._asked != AUTO or self.failure is not None:
            return False
        self._go_on()
        if key not in self._ready:
            return False
        self._ready.remove(key)
        self._switched.add(key)
        return True

    def _go_on(self) -> None:
        """Look after the process, and start the next one."""
        if self._process is not None:
            key, process = self._process
            if process.is_running:
                return
            failure, self._process = process.failure, None
            process.close()
            if failure is not None:
                self._give_up(failure)
                return
            self._ready.add(key)
        if self._waiting and self.failure is None:
            key, blueprint = self._waiting.popleft()
            try:
                self._refuse_without_memory()
                self._process = key, CompilerProcess(Task(blueprint, self._artefacts(key)))
            except (ValueError, OSError) as error:
                self._give_up(str(error))

    def _refuse_without_memory(self) -> None:
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            if free < LEAST_FREE:
                raise ValueError(
                    f"{free >> 20} MiB of GPU memory are free, and a process that compiles needs "
                    f"{LEAST_FREE >> 20}; give a smaller memory=, or compile=True"
                )

    def _give_up(self, why: str) -> None:
        """Stay with plain steps, and say so once."""
        if self.failure is None:
            self.failure = why
            log.warning("decode steps stay as they are, not compiled: %s", why)

    def _artefacts(self, key: StepKey) -> Artefacts:
        return Artefacts({
            "model": self._description, "step": key, "storage": self._storage,
            "device": device_name(self._device), "compiler": _comparable(COMPILER),
        })  # fmt: skip

    def close(self) -> None:
        """End the process of the compiler's, if there is one."""
        self._waiting.clear()
        if self._process is not None:
            self._process[1].close()
            self._process = None


class KeptForward:
    """A compiled forward whose artefacts are looked for before its first run, and kept after it."""

    def __init__(self, compiled: Forward, artefacts: Artefacts) -> None:
        self._compiled, self._artefacts, self._has_run = compiled, artefacts, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._has_run:
            return self._compiled(*args, **kwargs)
        self._artefacts.load()
        with self._artefacts.recording():
            output = self._compiled(*args, **kwargs)
        self._has_run = True
        return output


class CachedForward:
    """A compiled forward that is there already: where it is not, the plain one runs.

    give_up: told why.
    """

    def __init__(
        self,
        compiled: Forward,
        artefacts: Artefacts,
        plain: Forward,
        give_up: Callable[[str], None],
    ) -> None:
        self._compiled, self._artefacts, self._plain = compiled, artefacts, plain
        self._give_up = give_up
        self._run: Forward = self._first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        """One graph, so that nothing has run where it fails to compile."""
        self._artefacts.load()
        try:
            with cached_only():
                output = self._compiled(*args, **kwargs)
        except (UnknownAttention, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of dynamo, of a compiler, of a driver
            self._artefacts.discard()
            self._give_up(f"{type(error).__name__}: {error!s:.300}")
            self._run = self._plain
            return self._plain(*args, **kwargs)
        log.info("decode steps are compiled from here on")
        self._run = self._compiled
        return output


def _comparable(options: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The compiler's options, a pass by the hash of its files."""
    return [
        (name, value.uuid().hex() if hasattr(value, "uuid") else repr(value))
        for name, value in sorted(options.items())
    ]
