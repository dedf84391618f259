"""One copy of the experts in host memory for all processes of a machine."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime import load
from runtime.cuda.memory import shared_memory
from runtime.cuda.memory.kernel_layout import KernelLayout, common_layout
from runtime.cuda.memory.pinned_experts import host_tier
from runtime.cuda.memory.shared_memory import SharedMemory
from runtime.prepare import prepare
from runtime.weights.prepared.store import PreparedStore
from runtime.weights.source import from_path
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.tiny import tiny_model

SHAPES = [(2, 3), (1, 5000)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the machine's own."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "shm")
    return tmp_path / "shm"


def filling(value: int) -> Callable[[list[Tensor]], None]:
    def fill(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.fill_(value)

    return fill


def refused(_: list[Tensor]) -> None:
    raise AssertionError("it is there already")


def test_who_comes_later_finds_what_the_first_one_wrote(folder: Path) -> None:
    first = SharedMemory("a", SHAPES, filling(7))
    second = SharedMemory("a", SHAPES, refused)
    assert [tuple(tensor.shape) for tensor in second.tensors] == SHAPES
    assert all((tensor == 7).all() for tensor in second.tensors)
    first.tensors[1][0, -1] = 8
    assert second.tensors[1][0, -1] == 8, "the same memory"
    first.close()
    third = SharedMemory("a", SHAPES, refused)
    second.close()
    assert list(folder.iterdir())
    third.close()
    third.close()
    assert not list(folder.iterdir()), "the last one removes it"


def test_other_contents_have_a_copy_of_their_own() -> None:
    with_7, with_8 = (SharedMemory(str(value), SHAPES, filling(value)) for value in (7, 8))
    assert (with_7.tensors[0] == 7).all() and (with_8.tensors[0] == 8).all()


def test_what_a_process_left_unfinished_is_filled_anew(folder: Path) -> None:
    with pytest.raises(RuntimeError):
        SharedMemory("a", SHAPES, raising(RuntimeError("the disk")))
    assert not list(folder.iterdir())
    left = folder / f"expertflow-{os.getuid()}-a"
    left.write_bytes(bytes(100))  # by one that was killed
    memory = SharedMemory("a", SHAPES, filling(7))
    assert (memory.tensors[1] == 7).all()


def test_who_comes_while_it_is_being_filled_waits(folder: Path) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    found: list[SharedMemory] = []

    def slowly(tensors: list[Tensor]) -> None:
        begun.set()
        goes_on.wait(10)
        filling(7)(tensors)

    first = threading.Thread(target=lambda: found.append(SharedMemory("a", SHAPES, slowly)))
    first.start()
    begun.wait(10)
    second = threading.Thread(target=lambda: found.append(SharedMemory("a", SHAPES, refused)))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not found
    goes_on.set()
    first.join(10)
    second.join(10)
    assert all((memory.tensors[1] == 7).all() for memory in found) and len(found) == 2


def test_another_process_shares_it_and_its_death_keeps_nobody_waiting(folder: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from runtime.cuda.memory import shared_memory as shared\n"
        f"shared.FOLDER = Path({str(folder)!r})\n"
        f"shared.SharedMemory('a', {SHAPES}, lambda ts: [t.fill_(9) for t in ts])\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    memory = SharedMemory("a", SHAPES, refused)
    assert (memory.tensors[1] == 9).all()
    memory.close()
    assert not list(folder.iterdir())


def test_a_folder_without_room_is_named_with_the_remedy(folder: Path) -> None:
    full = OSError(28, "No space left on device")
    with (
        patch.object(os, "posix_fallocate", side_effect=full),
        pytest.raises(ValueError, match=r"no room for 0\.0 GB .No space left.*load without"),
    ):
        SharedMemory("a", SHAPES, refused)
    assert not list(folder.iterdir())


def test_a_link_in_its_place_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"mine")
    (folder / f"expertflow-{os.getuid()}-a").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="remove it or load without it"):
        SharedMemory("a", SHAPES, filling(7))
    assert (tmp_path / "other").read_bytes() == b"mine"


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


# ---------------------------------------------------------------------- the host tier


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Experts packed as they are kept."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    model: Any = tiny_model("olmoe", **sizes)
    model.bfloat16().save_pretrained(tmp_path / "hub")
    return Path(prepare(tmp_path / "hub", tmp_path / "packed", packed=True))


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


@pytest.mark.usefixtures("_fake")
def test_the_second_engine_reads_no_expert_and_gives_the_same_tokens(
    prepared: Path, folder: Path
) -> None:
    ids_BT = torch.randint(2, 256, (1, 5), generator=torch.Generator().manual_seed(3))
    asked = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 2, "do_sample": False}
    alone = load_fake(prepared)
    want = alone.generate(ids_BT, **asked)
    first = load_fake(prepared, shared=True)
    with patch.object(PreparedStore, "read_packed", side_effect=AssertionError("read again")):
        second = load_fake(prepared, shared=True)
    for model in (first, second):
        assert torch.equal(model.generate(ids_BT, **asked), want)
    first.expertflow.close()
    assert torch.equal(second.generate(ids_BT, **asked), want)
    second.expertflow.close()
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("_fake")
def test_experts_that_are_kept_otherwise_have_a_copy_of_their_own(
    prepared: Path, folder: Path
) -> None:
    source = from_path(prepared, None, "auto", shared=True)
    layout = common_layout(source)
    assert isinstance(layout, KernelLayout)
    packed, plain = (host_tier(source, one, torch.device("cpu")) for one in (layout, None))
    assert len(list(folder.iterdir())) == 2
    assert all(torch.equal(packed.read(1, 3)[name], p) for name, p in plain.read(1, 3).items())
    packed.close()
    plain.close()
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("_fake")
def test_a_loading_that_fails_lets_go_of_it(prepared: Path, folder: Path) -> None:
    full = torch.OutOfMemoryError("no room")
    with (
        patch("runtime.cuda.prefill.streaming_pool.slots", side_effect=full),
        pytest.raises(torch.OutOfMemoryError),
    ):
        load_fake(prepared, shared=True)
    assert not list(folder.iterdir())


def test_a_copy_is_of_the_file_as_it_was(prepared: Path) -> None:
    names = [from_path(prepared, None, "auto", shared=True).store.shared_as for _ in range(2)]
    assert names[0] == names[1]
    os.utime(prepared / "experts.bin", ns=(1, 1))
    assert from_path(prepared, None, "auto", shared=True).store.shared_as != names[0]


@pytest.mark.usefixtures("_fake")
def test_experts_that_cannot_be_shared_are_refused_with_the_remedy(
    prepared: Path, folder: Path
) -> None:
    with pytest.raises(ValueError, match=r"prepared model.*--packed"):
        load_fake(prepared.parent / "hub", shared=True)
    plain = prepare(prepared.parent / "hub", prepared.parent / "plain")
    with pytest.raises(ValueError, match=r"stored as they are kept.*--packed"):
        load_fake(plain, shared=True)
    assert not list(folder.iterdir())


def test_a_cpu_shares_nothing(prepared: Path) -> None:
    with pytest.raises(ValueError, match="on a CPU leave it out"):
        load(prepared, host="shared", device="cpu")


def test_a_lock_of_somebody_else_is_no_reason_to_remove_it(folder: Path) -> None:
    memory = SharedMemory("a", SHAPES, filling(7))
    (path,) = folder.iterdir()
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        memory.close()
        assert path.exists()
