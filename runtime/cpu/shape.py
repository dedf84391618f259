"""The experts of a model and the order of their sums, for which the C kernels are specialised."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch

from runtime.weights.encodings.encoding import Encoding
from runtime.weights.gated_experts import KernelLayout

ACTIVATIONS = {
    "silu": "SILU",
    "gelu_tanh": "GELU_TANH",
    "relu": "RELU",
    "clamped_swiglu": "CLAMPED_SWIGLU",
    "bounded_silu": "BOUNDED_SILU",
}
"""Gated activations that the kernels know, and their names in C."""
KINDS = {"mxfp4": "MXFP4", "fp8-block": "FP8", "int4-group": "INT4", "nvfp4": "NVFP4"}
"""Encodings that the kernels decode, and their names in C."""
FORMATS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "E8M0",
    torch.float8_e8m0fnu: "E8M0",
    torch.float8_e4m3fn: "E4M3",
}
EIGHT = 8
"""Neighbours in a row that a lane takes at a time, unless weights are plain."""
PATCH_LANES = 128
FEWEST_LANES = 4
MOST_IN_A_STEP = 16
WIDEST = 16
"""Lanes of the widest vectors."""
NO_SECOND = (0, 1)
"""Stride and count where a step has only one."""

Step = tuple[int, int] | tuple[int, int, int, int]
Steps = tuple[Step, ...]
"""(stride, count) of each step of a sum over lanes: groups of `count` lanes at distance `stride`
are replaced by ((a0 + a1) + a2) + ..., until one is left. (stride, count, stride2, count2): `count`
lanes, then those at distance `stride2`, ..., all in one such chain.
"""


def halving(lanes: int) -> Steps:
    """The steps of a sum of so many lanes (a power of two) in which each adds the upper half."""
    return tuple((1 << bit, 2) for bit in reversed(range(lanes.bit_length() - 1)))


HALVES = halving(PATCH_LANES)


@dataclass(frozen=True, kw_only=True)
class SumOrder:
    """The order in which the products of a row are summed."""

    columns: int
    """Columns of a tile, a power of two. Its lanes take one column each where weights are plain,
    eight neighbours otherwise; a lane's products are added in ascending order of tiles."""
    steps: Steps
    """The sum over the lanes."""
    rows: int = 1
    """Neighbouring rows (of gate or of up) whose patches one program of the GPU looks through."""
    patch_steps: Steps = HALVES
    """The sum over 128 entries of patches."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The packed weights of a block (12 bits each): sizes in weights."""

    matrices: int
    """Length of all of a block's packed matrices, whole chunks."""
    chunk: int
    patches: int
    """Entries for the patches of a chunk and its base."""
    gate_up: int
    """Where the matrix starts, a multiple of the chunk."""
    down: int


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The experts of a model, whose weights decode to bfloat16.

    encodings: of gate_up and down, where those are in codes.
    """

    hidden: int
    """H"""
    width: int
    """W, rows of the gate (and of the up) projection."""
    activation: str
    bounds: tuple[float, float] | None = None
    """Of gate and up, where the activation has any."""
    alternating: bool = False
    """Gate and up rows alternate, instead of gate first, then up."""
    has_bias: bool = False
    gate_up: SumOrder
    down: SumOrder
    packing: Packing | None = None
    encodings: tuple[Encoding, Encoding] | None = None

    @staticmethod
    def of(layout: KernelLayout, gate_up: SumOrder, down: SumOrder, **stored: Any) -> ExpertShape:
        """The experts of a layout, summed in these orders. stored: packing or encodings."""
        return ExpertShape(
            hidden=layout.hidden, width=layout.width, activation=layout.activation,
            bounds=layout.bounds, alternating=layout.alternating, has_bias=layout.has_bias,
            gate_up=gate_up, down=down, **stored,
        )  # fmt: skip

    def lanes(self, order: SumOrder) -> int:
        """The lanes of a sum in that order."""
        each = EIGHT if self.packing or self.encodings else 1
        return order.columns // each


def reason_against(shape: ExpertShape) -> str | None:
    """Why there are no C kernels for experts of such a shape; None where there are."""
    if shape.activation not in ACTIVATIONS:
        return f"the CPU kernels have no activation {shape.activation}"
    for encoding in shape.encodings or ():
        if encoding.name not in KINDS:
            return f"the CPU kernels decode no {encoding.name}"
    for order, width in ((shape.gate_up, shape.hidden), (shape.down, shape.width)):
        lanes = shape.lanes(order)
        if lanes < FEWEST_LANES:
            return f"sums over {lanes} lanes are too narrow for the CPU kernels"
        if (shape.packing or shape.encodings) and width % EIGHT:
            return f"rows of {width} are no whole eights, as the CPU kernels take them"
        for steps, of in ((order.steps, lanes), (order.patch_steps, PATCH_LANES)):
            for _, count, apart, times in _in_place(steps, of):
                if max(count, times) > MOST_IN_A_STEP or 0 < apart < WIDEST * count:
                    return f"the CPU kernels have no sum in steps {steps}"
    if len({encoding.name for encoding in shape.encodings or ()}) > 1:
        return "the matrices of an expert are in different encodings"
    return None


def header(shape: ExpertShape) -> str:
    """The constants of a shape, as the C kernels read them."""
    sums = {"UP": (shape.gate_up, shape.hidden), "DOWN": (shape.down, shape.width)}
    lanes = [shape.lanes(order) for order, _ in sums.values()]
    encodings = dict(zip(sums, shape.encodings or (), strict=False))
    kind = KINDS[encodings["UP"].name] if encodings else "PACKED" if shape.packing else "PLAIN"
    constants: dict[str, object] = {
        "KIND": kind,
        "HIDDEN": shape.hidden,
        "WIDTH": shape.width,
        "ALTERNATING": int(shape.alternating),
        "ACTIVATION": ACTIVATIONS[shape.activation],
        "HAS_BIAS": int(shape.has_bias),
        "FEWEST_LANES": min(*lanes, PATCH_LANES),
        "LONGEST": max(
            -(-width // order.columns) * order.columns for order, width in sums.values()
        ),
    }
    if shape.bounds:
        gate, up = shape.bounds
        constants |= {"GATE_BOUND": f"{gate!r}f", "UP_BOUND": f"{up!r}f"}
    if shape.packing:
        constants |= {"CHUNK": shape.packing.chunk, "PATCHES": shape.packing.patches}
        constants |= {"UP_FIRST": shape.packing.gate_up, "DOWN_FIRST": shape.packing.down}
    for name, (order, width) in sums.items():
        constants |= {
            f"{name}_COLUMNS": width,
            f"{name}_BLOCK_K": order.columns,
            f"{name}_SPAN": order.rows,
            f"{name}_STEPS": _steps(order.steps, shape.lanes(order)),
            f"{name}_PATCH_STEPS": _steps(order.patch_steps, PATCH_LANES),
        }
        if encodings:
            constants |= {f"{name}_{key}": value for key, value in _codes(encodings[name]).items()}
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())


def _codes(encoding: Encoding) -> dict[str, object]:
    """The constants of a matrix in codes."""
    own = torch.float8_e4m3fn if encoding.name == "nvfp4" else torch.uint8
    scale: torch.dtype = getattr(encoding, "scale", own)
    narrow = scale if encoding.name == "int4-group" else torch.float32
    return {
        "ROWS": f"{encoding.rows}L",
        "GROUP": f"{encoding.columns}L",
        "SCALE": FORMATS[scale],
        "PRODUCT": FORMATS[getattr(encoding, "product", narrow)],
        "ZEROS": int(getattr(encoding, "zeros", False)),
        "DIVIDES": int(getattr(encoding, "divides", False)),
    }


def _steps(steps: Steps, lanes: int) -> str:
    """Steps as C has them."""
    return " ".join(f"STEP({', '.join(map(str, step))})" for step in _in_place(steps, lanes))


def _in_place(steps: Steps, lanes: int) -> list[tuple[int, int, int, int]]:
    """Steps with strides among the sums that are left, instead of among all lanes."""
    ordered = [*sorted(pair for step in steps for pair in _pairs(step)), (lanes, 1)]
    assert all(a * count == b for (a, count), (b, _) in pairwise([(1, 1), *ordered])), (
        f"{steps} are no sum over {lanes} lanes"
    )
    done: list[tuple[int, int]] = []
    found = []
    for step in steps:
        near, far = (*_pairs(step), NO_SECOND)[:2]
        strides = [stride // prod(n for at, n in done if at < stride) for stride, _ in (near, far)]
        found.append((strides[0], near[1], strides[1], far[1]))
        done += _pairs(step)
    return found


def _pairs(step: Step) -> list[tuple[int, int]]:
    """The strides and counts of a step."""
    return list(zip(step[::2], step[1::2], strict=True))
