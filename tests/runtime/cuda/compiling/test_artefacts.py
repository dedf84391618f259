"""Artefacts of the compiler on disk: found again, never wrong, never in the way."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from runtime.cuda.compiling import artefacts as module
from runtime.cuda.compiling.artefacts import SUFFIX, Artefacts, folder


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_said", set())


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What torch was given to load; it takes everything."""
    found: list[bytes] = []

    def take(content: bytes) -> bytes:
        found.append(content)
        return content

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", take)
    return found


def test_they_lie_where_the_user_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder() == tmp_path / "expertflow" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == Path.home() / ".cache" / "expertflow" / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert folder() == Path("/elsewhere/expertflow")


def test_another_step_version_or_model_has_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {Artefacts({"step": 1}).path, Artefacts({"step": 2}).path}
    for package in ("torch", "triton", "transformers", "moe-expertflow"):
        with monkeypatch.context() as patch:
            patch.setattr(module, "version", lambda name, of=package: "0" if name == of else "1")
            paths.add(Artefacts({"step": 1}).path)
    assert len(paths) == 6
    assert Artefacts({"step": 1}).path in paths


def test_what_was_written_is_loaded(loaded: list[bytes]) -> None:
    Artefacts("a")._write(b"graphs and kernels")
    assert Artefacts("a").load()
    assert not Artefacts("b").load()
    assert loaded == [b"graphs and kernels"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"\0"])
def test_a_damaged_file_is_left_alone_and_said_once(
    damage: Any, loaded: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    kept = Artefacts("a")
    kept._write(b"graphs and kernels")
    kept.path.write_bytes(damage(kept.path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert not kept.load()
        assert not kept.load()
    assert loaded == []
    assert len(caplog.records) == 1


def test_what_torch_cannot_read_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    kept = Artefacts("a")
    kept._write(b"of another torch")
    with caplog.at_level(logging.WARNING):
        assert not kept.load()


def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "expertflow").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        Artefacts("a")._write(b"1")
        Artefacts("a")._write(b"1")
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"compiled steps are not kept in {folder()}"
    ]


def test_many_writers_and_readers_see_whole_files(loaded: list[bytes]) -> None:
    contents = [bytes([number]) * 200_000 for number in range(8)]
    threads = [threading.Thread(target=Artefacts("a")._write, args=(c,)) for c in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        Artefacts("a").load()
    assert Artefacts("a").load()
    assert set(loaded) <= set(contents)
    assert [path.suffix for path in folder().iterdir()] == [SUFFIX]


def test_the_files_used_longest_ago_make_room(
    loaded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT", 300)
    for age, name in enumerate("abc"):
        Artefacts(name)._write(bytes(60))
        os.utime(Artefacts(name).path, (1000 + age, 1000 + age))
    assert Artefacts("a").load(), "which makes it the youngest"
    Artefacts("d")._write(bytes(60))
    assert [name for name in "abcd" if Artefacts(name).exist] == ["a", "c", "d"]


def test_a_compilation_is_recorded(loaded: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"new", None))
    with Artefacts("a").recording():
        pass
    assert Artefacts("a").load()
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"the same", None))
    with Artefacts("a").recording():
        pass
    assert Artefacts("a").load()
    assert loaded == [b"new", b"new"], "nothing was compiled the second time"
