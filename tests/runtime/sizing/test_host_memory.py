"""Host memory that is free, as the system tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.sizing import host_memory
from runtime.sizing.host_memory import available_bytes, require_host_memory


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    return tmp_path


def test_this_machine_has_some() -> None:
    assert 1 << 20 < available_bytes() < 1 << 50


def test_a_container_has_what_its_limit_leaves(files: Path) -> None:
    assert available_bytes() > 1 << 20, "all there is, where nobody tells"
    (files / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:      500 kB\nHuge: x\n")
    assert available_bytes() == 500 << 10
    (files / "memory.max").write_text("max\n")
    assert available_bytes() == 500 << 10
    (files / "memory.max").write_text(f"{300 << 10}\n")
    (files / "memory.stat").write_text(f"anon {90 << 10}\nfile 7\nshmem {10 << 10}\n")
    assert available_bytes() == 200 << 10
    require_host_memory(64, 200 << 10)
    with pytest.raises(ValueError, match=r"spill_tokens=64 takes 201 KiB .* and 200 KiB are free"):
        require_host_memory(64, 201 << 10)
