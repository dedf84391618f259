"""Experts computed on the CPU where they lie, one token at a time, in a written-down order of sums.

shape     the experts of a model and the order of their sums: what C is specialised for
library   the C kernels (`source/`), compiled for a shape on first use
doorbell  the memory through which work is asked for and answered
service   threads that answer a doorbell
cores     the cores that a process may use

slot_experts    the same kernels where there is no GPU, out of an arena's slots
team            torch's own threads, lent to them
"""

from runtime.cpu.cores import usable_cores
from runtime.cpu.doorbell import Doorbell
from runtime.cpu.library import Library, load_library
from runtime.cpu.service import CpuExperts, ExpertTable, MatrixParts
from runtime.cpu.shape import ExpertShape, Packing, SumOrder

__all__ = [
    "CpuExperts",
    "Doorbell",
    "ExpertShape",
    "ExpertTable",
    "Library",
    "MatrixParts",
    "Packing",
    "SumOrder",
    "load_library",
    "usable_cores",
]
