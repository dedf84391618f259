"""What `benchmarks.loading` compares, each to be run in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARMS = (
    "stock from_pretrained",
    "accelerate, experts on disk",
    "load, hub layout",
    "load, prepared",
)
READS = ("read, hub layout", "read, prepared")
MEMORY = 0.25
PROMPT = 128
RAM = "/proc/self/status"


class Peak:
    """The most anonymous memory of this process while the block runs, in bytes above its start."""

    def __enter__(self) -> Peak:
        forget_freed_memory()
        self.start = self.most = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, anonymous_bytes())

    @property
    def num_bytes(self) -> int:
        return self.most - self.start


def forget_freed_memory() -> None:
    """Hand back what is free: used again, or freed only now, it would hide what is allocated."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone keeps much and has it
    if trim is not None:
        trim(0)


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path(RAM).read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise ValueError("this system does not say how much anonymous memory a process has")


def measure(arm: str, folder: Path) -> dict[str, float]:
    """Run one arm here. Seconds and bytes."""
    import torch
    import transformers

    import runtime.loading  # noqa: F401 - imports are not what is measured

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _ = transformers.OlmoeForCausalLM
    return measure_reads(arm, folder) if arm in READS else measure_load(arm, folder)


def measure_load(arm: str, folder: Path) -> dict[str, float]:
    """Load, and then run a prompt, which fills the slots."""
    import torch

    load = loaders(folder)[arm]
    with Peak() as peak:
        start = time.perf_counter()
        model = load()
        loaded = time.perf_counter()
        loading_peak = max(peak.most, anonymous_bytes()) - peak.start
        with torch.inference_mode():
            model(torch.arange(1, PROMPT + 1)[None])
        prompt = time.perf_counter()
    return {
        "load_s": loaded - start,
        "prompt_s": prompt - loaded,
        "load_peak_bytes": loading_peak,
        "peak_bytes": peak.num_bytes,
        "held_bytes": anonymous_bytes() - peak.start,
    }


def loaders(folder: Path) -> dict[str, Callable[[], Any]]:
    """The arms, by name."""
    import torch
    from transformers import OlmoeForCausalLM

    import runtime

    hub = folder / "hub"
    return {
        ARMS[0]: lambda: OlmoeForCausalLM.from_pretrained(hub, dtype=torch.bfloat16),
        ARMS[1]: lambda: from_disk(hub, folder / "offload"),
        ARMS[2]: lambda: runtime.load(hub, memory=MEMORY, device="cpu"),
        ARMS[3]: lambda: runtime.load(folder / "prepared", memory=MEMORY, device="cpu"),
    }


def from_disk(hub: Path, offload: Path) -> Any:
    """Accelerate's disk offload of the experts: every other module on the CPU."""
    import torch
    from transformers import AutoConfig, OlmoeForCausalLM

    with torch.device("meta"):
        model = OlmoeForCausalLM(AutoConfig.from_pretrained(hub))
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    places = {name: "disk" for name, m in model.named_modules() if name.endswith(".experts")}
    places |= {n: "cpu" for n in leaves if ".experts" not in n}
    return OlmoeForCausalLM.from_pretrained(
        hub, dtype=torch.bfloat16, device_map=places, offload_folder=str(offload)
    )


def measure_reads(arm: str, folder: Path) -> dict[str, float]:
    """Read every expert once, into eight slots in turn."""
    import torch

    from runtime.weights.arena import Arena
    from runtime.weights.source import from_path

    source = from_path(folder / ("hub" if arm == READS[0] else "prepared"), None, "auto")
    arena = Arena(source.store.specs(0), 8, torch.device("cpu"))
    for tensor in arena.tensors.values():
        tensor.zero_()
    start = time.perf_counter()
    for index, layer in enumerate(source.layers):
        for expert in range(layer.num_experts):
            source.store.read(index, expert, arena.slot(expert % 8))
    return {"read_s": time.perf_counter() - start}
