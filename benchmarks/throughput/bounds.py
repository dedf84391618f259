"""The bounds of a step that uses every expert: what a GPU and its link allow.

link    bytes of the experts without a slot / the link's best measured speed
memory  bytes of all weights, and of half of the keys and values / measured copies on the GPU
FLOPs   two operations for each weight that a token uses / a measured product of matrices
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from runtime.weights.source import Source

SIDE, ROUNDS = 8192, 8
"""Of the matrices whose product measures the arithmetic, and how often it is repeated."""


class Machine(NamedTuple):
    """Measured speeds; None on a CPU."""

    link: float | None
    """Bytes a second."""
    memory: float | None
    """Bytes a second that kernels read and write."""
    flops: float | None
    """Operations a second in bfloat16."""


class Step(NamedTuple):
    """What a step that uses every expert takes, of a machine and of its sequences."""

    missing_bytes: float
    weight_bytes: float
    row_bytes: float
    """Keys and values of a sequence that is as long as half the context."""
    token_flops: float

    def seconds(self, machine: Machine, batch: int) -> dict[str, float]:
        """Least seconds of a step of so many sequences, by what bounds it."""
        work = {
            "link": (self.missing_bytes, machine.link),
            "memory": (self.weight_bytes + batch * self.row_bytes, machine.memory),
            "FLOPs": (batch * self.token_flops, machine.flops),
        }
        return {name: amount / speed for name, (amount, speed) in work.items() if speed}


def measure_machine(link: float | None, device: torch.device) -> Machine:
    """link: as measured already."""
    if device.type != "cuda":
        return Machine(None, None, None)
    from runtime.cuda.row_choices import device_bandwidth

    return Machine(link, device_bandwidth(device), _flops(device))


def _flops(device: torch.device) -> float:
    one = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=device)
    torch.mm(one, one)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(ROUNDS):
        torch.mm(one, one)
    end.record()
    end.synchronize()
    return 2 * ROUNDS * SIDE**3 / (begin.elapsed_time(end) / 1e3)


class Weights(NamedTuple):
    """Weights beside the experts, and of an expert; taken before the model is offloaded."""

    fixed_bytes: float
    fixed_weights: int
    expert_weights: int
    """Of one token, in all layers."""
    row_bytes: float

    @classmethod
    def of(cls, source: Source, context: int) -> Weights:
        from runtime.kv.size import storage_bytes

        module: Any = source.model
        used = sum(
            layer.top_k * sum(_size(spec.shape) for spec in group.specs.values())
            for group in source.groups
            for layer in (source.layers[index] for index in group.layers)
        )
        fixed = sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())
        if not module.config.tie_word_embeddings:
            fixed -= module.get_input_embeddings().weight.numel()  # read, not multiplied
        return cls(source.fixed_bytes, fixed, used, storage_bytes(module, 1, context) / 2)


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def step_of(weights: Weights, stats: Any) -> Step:
    """stats: of the engine, which knows slots and bytes of an expert."""
    size = stats.expert_bytes
    missing = size * (stats.total_experts - stats.num_slots)
    whole = weights.fixed_bytes + size * stats.total_experts
    flops = 2.0 * (weights.fixed_weights + weights.expert_weights)
    return Step(missing, whole, weights.row_bytes, flops)
