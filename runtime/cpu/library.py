"""The C kernels, compiled for a shape of experts when it is first asked for, and kept on disk."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from runtime.cpu.shape import ExpertShape, header, reason_against

SOURCE = Path(__file__).parent / "source"
COMPILERS = ("cc", "gcc", "clang")
"""Asked for after the environment's CC."""
OPTIONS = (
    *("-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    # Nothing that changes a bit: no products fused but those written so, no value taken for finite.
    *("-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math"),
)
FOLDER = "expertflow/kernels"
"""In the user's cache folder ($XDG_CACHE_HOME, or ~/.cache)."""
SECONDS = 120
"""A compiler that takes longer is given up."""

Library = ctypes.CDLL
"""The compiled functions of `source/service.c`."""


@cache
def load_library(shape: ExpertShape) -> Library | str:
    """The kernels for experts of a shape, or why there are none. The first call takes seconds."""
    if reason := reason_against(shape):
        return reason
    compiler = _compiler()
    if compiler is None:
        return "there is no C compiler (install gcc, or set CC) for kernels on the CPU"
    try:
        return _loaded(compiler, header(shape))
    except OSError as error:
        return f"the CPU kernels do not load: {error}"


def _loaded(compiler: str, constants: str) -> Library | str:
    """The kernels for these constants, kept or compiled; or why there are none."""
    name = f"{_key(constants, compiler)}.so"
    with tempfile.TemporaryDirectory() as scratch:
        path = _cached(name)
        if path is None or not path.exists():
            made = _compile(compiler, constants, Path(scratch))
            if isinstance(made, str):
                return made
            path = _keep(made, path)
        return _declared(ctypes.CDLL(str(path)))


def _compiler() -> str | None:
    names = (os.environ.get("CC", ""), *COMPILERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def _processor() -> str:
    """The machine, as far as -march=native looks at it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.platform()
    facts = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.split("\t")[0].strip() in facts)


def _key(constants: str, compiler: str) -> str:
    """A hash of all that the compiled code depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    parts = [constants, " ".join(OPTIONS), compiler, version.stdout, _processor()]
    parts += [path.read_text() for path in sorted(SOURCE.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cached(name: str) -> Path | None:
    """Where the user's compiled kernels are kept; None where nothing can be written."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder / name


def _compile(compiler: str, constants: str, folder: Path) -> Path | str:
    """The compiled library, in `folder`; or why there is none."""
    (folder / "shape.h").write_text(constants)
    made = folder / "experts.so"
    command = [compiler, *OPTIONS, f'-DSHAPE="{folder / "shape.h"}"', "-o", str(made)]
    try:
        done = subprocess.run(
            [*command, str(SOURCE / "service.c")],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} did not compile the CPU kernels: {error}"
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line), done.stderr[-200:])
        return f"{compiler} did not compile the CPU kernels: {first}"
    return made


def _keep(made: Path, path: Path | None) -> Path:
    """Move a library to where it is kept, whole or not at all; it stays where that fails."""
    if path is None:
        return made
    try:
        handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".so")
        os.close(handle)
        shutil.copyfile(made, beside)
        os.replace(beside, path)
    except OSError:
        return made
    return path


class DoorbellOffsets(ctypes.Structure):
    """`struct doorbell`: bytes from the start of the memory."""

    _fields_ = tuple((n, ctypes.c_int64) for n in ("bell", "order", "x", "answer", "done"))


PARTS = 8
"""Parts of an expert: codes, scales, extra and bias of gate_up, then of down."""


class Layout(ctypes.Structure):
    """`struct layout`."""

    _fields_ = (
        ("doorbell", DoorbellOffsets),
        *((name, ctypes.c_int64) for name in ("layers", "experts", "top_k")),
        ("strides", ctypes.c_int64 * PARTS),
    )


class Counts(ctypes.Structure):
    """`struct counts`."""

    _fields_ = tuple((n, ctypes.c_int64) for n in ("rings", "experts", "nanoseconds", "refused"))


def _declared(library: ctypes.CDLL) -> Library:
    """The library with the types of its functions."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.service_open.argtypes = ctypes.POINTER(Layout), pointer, pointer
    library.service_open.restype = pointer
    library.service_start.argtypes = pointer, number, pointer, number
    library.service_start.restype = number
    library.service_wake.argtypes = pointer, number
    library.service_wake.restype = None
    library.service_close.argtypes = (pointer,)
    library.service_close.restype = None
    library.service_counts.argtypes = pointer, ctypes.POINTER(Counts)
    library.service_counts.restype = None
    library.service_ask.argtypes = (
        pointer, number, number, pointer, pointer, pointer, number, number,
    )  # fmt: skip
    library.service_ask.restype = ctypes.c_int
    return library
