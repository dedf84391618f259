"""Arms of the loading benchmark, each to be run in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.loading.memory import Peak, anonymous_bytes

ARMS = (
    "stock from_pretrained",
    "accelerate, experts on disk",
    "load, hub layout",
    "load, prepared",
)
READS = ("read, hub layout", "read, prepared", "read, packed")
MEMORY = 0.25
PROMPT = 128


def measure(arm: str, folder: Path) -> dict[str, float]:
    """Run one arm in this process; returns seconds and bytes by name."""
    import torch
    import transformers

    import runtime.loading  # noqa: F401 - before the measurement, which is not of imports

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _ = transformers.OlmoeForCausalLM
    return measure_reads(arm, folder) if arm in READS else measure_load(arm, folder)


def measure_load(arm: str, folder: Path) -> dict[str, float]:
    """Load, then run a prompt, which fills the slots."""
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
    """The loading function of each arm, by name."""
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
    """Accelerate's disk offloading of the experts, with every other module on the CPU."""
    import torch
    from transformers import AutoConfig, OlmoeForCausalLM

    with torch.device("meta"):
        model = OlmoeForCausalLM(AutoConfig.from_pretrained(hub, trust_remote_code=False))
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    places = {name: "disk" for name, m in model.named_modules() if name.endswith(".experts")}
    places |= {n: "cpu" for n in leaves if ".experts" not in n}
    return OlmoeForCausalLM.from_pretrained(
        hub, dtype=torch.bfloat16, device_map=places, offload_folder=str(offload)
    )


def measure_reads(arm: str, folder: Path) -> dict[str, float]:
    """Read every expert once, into eight slots in turn; returns seconds."""
    import torch

    from runtime.weights.arena import Arena
    from runtime.weights.source import from_path

    names = dict(zip(READS, ("hub", "prepared", "packed"), strict=True))
    source = from_path(folder / names[arm], None, "auto")
    arena = Arena(source.store.specs(0), 8, torch.device("cpu"))
    for tensor in arena.tensors.values():
        tensor.zero_()
    start = time.perf_counter()
    for index, layer in enumerate(source.layers):
        for expert in range(layer.num_experts):
            source.store.read(index, expert, arena.slot(expert % 8))
    return {"read_s": time.perf_counter() - start}
