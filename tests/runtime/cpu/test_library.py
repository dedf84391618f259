"""Kernels are compiled once for a shape, and a reason is given where they cannot be."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.cpu import ExpertShape, Packing, SumOrder, library, load_library
from runtime.cpu.shape import halving
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4

LANES = SumOrder(columns=16, steps=halving(16))
SHAPE = ExpertShape(hidden=32, width=16, activation="silu", gate_up=LANES, down=LANES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    yield tmp_path
    load_library.cache_clear()


def scripted(path: Path, text: str) -> str:
    """A compiler that does as it is told."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_compiled_once_for_all_processes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(load_library(SHAPE), str)
    (kept,) = cache.rglob("*.so")
    load_library.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    assert not isinstance(load_library(SHAPE), str)
    assert list(cache.rglob("*")) == [*kept.parents[1::-1], kept]


def test_kept_nowhere_where_nothing_can_be_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    assert not isinstance(load_library(SHAPE), str)


def test_there_is_no_room_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(library, "_compile", full)
    assert "no space left" in str(load_library(SHAPE))


def test_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in str(load_library(SHAPE))


def test_the_compiler_fails(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = scripted(cache / "failing", "echo 'experts.h:3: error: no such thing' >&2; exit 1")
    monkeypatch.setenv("CC", compiler)
    assert re.search("failing did not compile .* error: no such thing", str(load_library(SHAPE)))


def test_the_compiler_makes_no_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = scripted(
        cache / "lying", 'for last; do out=$before; before=$last; done; echo > "$out"'
    )
    monkeypatch.setenv("CC", compiler)
    assert "do not load" in str(load_library(SHAPE))


def test_the_processor_cannot_round_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("-march=x86-64" if one == "-march=native" else one for one in library.OPTIONS)
    monkeypatch.setattr(library, "OPTIONS", tuple(options))
    assert "no fused multiply-add" in str(load_library(SHAPE))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (replace(SHAPE, activation="gelu"), "no activation gelu"),
        (replace(SHAPE, packing=Packing(matrices=8192, chunk=8192, patches=16, gate_up=0, down=0)),
         "sums over 2 lanes"),
        (replace(SHAPE, encodings=(MXFP4(), Int4Group(columns=32)),
                 gate_up=replace(LANES, columns=128), down=replace(LANES, columns=128)),
         "in different encodings"),
        (replace(SHAPE, gate_up=SumOrder(columns=32, steps=((1, 32),))), "no sum in steps"),
    ],
    ids=("activation", "lanes", "encodings", "steps"),
)  # fmt: skip
def test_shapes_without_kernels(shape: ExpertShape, reason: str) -> None:
    assert reason in str(load_library(shape))
