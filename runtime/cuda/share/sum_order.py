"""The order in which a compiled kernel sums a row, read off the layouts that Triton chose.

A program sums in four stages: the entries that a thread holds, one after the other; the lanes of a
warp, in halves; the warps, in halves.

    layout            bases along the summed axis           steps
    register bits     the entries of a thread, ascending    one chain
    lane bits         distances between lanes               (distance, 2), the highest bit first
    warp bits         distances between warps               (distance, 2), the highest bit first

The CPU's kernels sum in these steps (`runtime.cpu.shape.SumOrder`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from runtime.cpu.shape import Step, Steps

REDUCE = re.compile(
    r"\"tt\.reduce\"\([^)]*\) <\{axis = (\d+) : i32\}> \(\{.*?"
    r"\}\) : \(tensor<([\dx]+)xf32, ([^)]*)>\)",
    re.DOTALL,
)
ALIAS = re.compile(r"^(#\w+) = (#ttg\.\w+<.*>)$", re.MULTILINE)
NUMBERS = re.compile(r"(\w+) = (\[[\d, \[\]]*\])")


class Bases(NamedTuple):
    """Of each bit of register, lane and warp: how far it moves along one axis; 0 for not at all."""

    register: list[int]
    lane: list[int]
    warp: list[int]

    @property
    def steps(self) -> Steps:
        """The steps of a sum along the axis."""
        chain = [stride for stride in self.register if stride]
        halves = [(stride, 2) for bits in (self.lane, self.warp) for stride in reversed(bits)]
        return (*_chained(chain), *((stride, count) for stride, count in halves if stride))


def row_sums(ttgir: str) -> list[Steps]:
    """The steps of every sum over the columns of a tile of rows, in the order of the program.

    ttgir: the intermediate form of a compiled kernel. A sum over two axes (groups, and words of a
    group) is one: lanes are numbered through both.
    """
    aliases = dict(ALIAS.findall(ttgir))
    found: list[Steps] = []
    inner: tuple[int, Steps] | None = None
    for axis, sizes, layout in REDUCE.findall(ttgir):
        shape = [int(size) for size in sizes.split("x")]
        if axis == "2":
            inner = shape[2], bases_along(aliases, layout, shape, 2).steps
        elif axis == "1" and inner is not None:
            width, steps = inner
            parent = [*shape, width]
            outer = bases_along(aliases, layout, parent, 1).steps
            found.append((*steps, *(_times(step, width) for step in outer)))
            inner = None
        elif axis == "1":
            found.append(bases_along(aliases, layout, shape, 1).steps)
    return found


def bases_along(aliases: dict[str, str], layout: str, shape: Sequence[int], axis: int) -> Bases:
    """The bases of a layout (an alias, or a slice of one) along an axis of a tensor.

    shape: of the parent, where it is a slice. Raises ValueError for a layout of another kind.
    """
    parent = re.search(r"parent = (#\w+)", layout)
    text = aliases.get(parent.group(1) if parent else layout, layout)
    numbers = {name: json.loads(lists) for name, lists in NUMBERS.findall(text)}
    if text.startswith("#ttg.blocked"):
        return _blocked(numbers, shape, axis)
    if text.startswith("#ttg.linear"):
        parts = (numbers[name] for name in ("register", "lane", "warp"))
        return Bases(*([base[axis] for base in part] for part in parts))
    raise ValueError(f"sums in the layout {text:.60} have no known order")


def _blocked(numbers: dict[str, list[int]], shape: Sequence[int], axis: int) -> Bases:
    """Of a blocked layout: threads hold neighbours, then lanes, then warps; the rest repeats."""
    reach = 1
    strides: list[list[int]] = []
    for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA"):
        bits: list[int] = []
        for dim in numbers["order"]:
            for _ in range(numbers[name][dim].bit_length() - 1):
                if dim == axis:
                    bits.append(reach if reach < shape[axis] else 0)
                    reach *= 2
                else:
                    bits.append(0)
        strides.append(bits)
    while reach < shape[axis]:
        strides[0].append(reach)
        reach *= 2
    return Bases(*strides)


def _chained(strides: list[int]) -> Iterator[Step]:
    """One chain through the entries that a thread holds, the first bits fastest."""
    runs: list[list[int]] = []
    for stride in strides:
        if runs and runs[-1][0] * prod([2] * len(runs[-1])) == stride:
            runs[-1].append(stride)
        else:
            runs.append([stride])
    if len(runs) > 2:
        raise ValueError(f"a chain over strides {strides} has no known order")
    if runs:
        flat: list[int] = []
        for run in runs:
            flat += [run[0], 1 << len(run)]
        yield tuple(flat)  # type: ignore[misc]


def _times(step: Step, factor: int) -> Step:
    """A step among lanes that lie `factor` apart."""
    return tuple(  # type: ignore[return-value]
        number * factor if index % 2 == 0 else number for index, number in enumerate(step)
    )
