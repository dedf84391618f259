"""The expert layouts that the GPU's kernels can run, and how blocks of them are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from routing.layers import MoELayer
from runtime.cuda.kernels.coded import reason_against
from runtime.cuda.kernels.gate_up import Activation
from runtime.cuda.memory.expert_block import CHUNK, ExpertBlock
from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.coded import Coding
from runtime.weights.gated_experts import ACTIVATIONS, KernelLayout, activate, gated_layout
from runtime.weights.source import Source

__all__ = [
    "ACTIVATIONS",
    "KernelLayout",
    "activate",
    "as_model",
    "block_of",
    "common_layout",
    "down_constants",
    "gate_up_constants",
    "layout_of",
    "stored_specs",
]


KINDS = "fused", "longcat", "llama4", "dbrx", "aria", "jetmoe"
"""Kinds of containers whose calls become a kernel's."""


def common_layout(source: Source) -> KernelLayout | str:
    """How the kernels read all of a model's experts, or why they cannot."""
    config: Any = source.model.config
    if config.is_encoder_decoder:
        return "encoder-decoder models are not captured"
    if len(source.groups) > 1:
        shapes = [group.specs for group in source.groups]
        several = "shapes" if any(one != shapes[0] for one in shapes) else "encodings"
        return f"its layers have experts of several {several}"
    coding = source.groups[0].coding
    found = [
        layout_of(layer, source.store.specs(index), coding, kinds=KINDS)
        for index, layer in enumerate(source.layers)
    ]
    return found[0] if len(set(found)) == 1 else "its layers have experts of several kinds"


def layout_of(
    layer: MoELayer,
    specs: Specs,
    coding: Coding | None = None,
    *,
    kinds: Sequence[str] = ("fused",),
) -> KernelLayout | str:
    """The layout of `layer`'s experts, or why the kernels cannot run them."""
    if layer.kind == "llama4" and layer.top_k > 1:
        return "each of a token's experts gets it scaled by another score"
    layout = gated_layout(layer, specs, kinds)
    if coding and not isinstance(layout, str):
        return _reason_against(coding, layout) or layout
    return layout


def _reason_against(coding: Coding, layout: KernelLayout) -> str | None:
    """Why no kernel decodes the matrices of an expert; None where kernels do."""
    for name in layout.matrices:
        matrix = coding.get(name)
        if matrix is None:
            return f"{name} is not in codes, as the experts' other matrix is"
        if matrix.transposed != layout.transposed:
            return f"the codes of {name} lie across the rows that kernels read"
        if reason := reason_against(matrix):
            return reason
    return None


def block_of(specs: Specs, coding: Coding, layout: KernelLayout | None) -> ExpertBlock:
    """The blocks of experts with such parameters: where kernels run them, weights are [out, in]."""
    if layout is not None:
        coding = {name: matrix._replace(transposed=False) for name, matrix in coding.items()}
    return ExpertBlock(stored_specs(specs, layout), coding=coding)


def stored_specs(specs: Specs, layout: KernelLayout | None) -> Specs:
    """The shapes as the host tier and the slots keep them: weights [out, in]."""
    if layout is None or not layout.transposed:
        return specs
    return {name: Spec(spec.shape[::-1], spec.dtype) for name, spec in specs.items()}


def as_model(parameters: dict[str, Tensor], layout: KernelLayout) -> dict[str, Tensor]:
    """Stored parameters of one expert as views in the model's own orientation."""
    if not layout.transposed:
        return parameters
    return {
        name: tensor.t() if tensor.dim() == 2 else tensor for name, tensor in parameters.items()
    }


def _constants(block: ExpertBlock, layout: KernelLayout) -> dict[str, Any]:
    """What every kernel that reads stored blocks is compiled for."""
    return {
        "STORED": block.stored_units, "CHUNK": CHUNK, "MATRICES": block.matrix_units,
        "PATCHES": block.patches, "HAS_BIAS": layout.has_bias, "H": layout.hidden,
        "W": layout.width,
    }  # fmt: skip


def _activation(layout: KernelLayout) -> Activation:
    return Activation(ACTIVATIONS.index(layout.activation), *layout.bounds or ())


def gate_up_constants(block: ExpertBlock, layout: KernelLayout) -> dict[str, Any]:
    """Compile-time constants of a kernel that reads gate and up projections of stored blocks."""
    name, _ = layout.matrices
    return _constants(block, layout) | {
        "UP": block.start(name), "UP_BIAS": block.start_stored(f"{name}_bias"),
        "CODE": block.code(name), "ACT": _activation(layout),
        "ALTERNATING": layout.alternating,
    }  # fmt: skip


def down_constants(block: ExpertBlock, layout: KernelLayout) -> dict[str, Any]:
    """Compile-time constants of a kernel that reads down projections of stored blocks."""
    return _constants(block, layout) | {
        "DOWN": block.start("down_proj"), "DOWN_BIAS": block.start_stored("down_proj_bias"),
        "CODE": block.code("down_proj"),
    }  # fmt: skip
