"""Threads answer the doorbell: every ring, whoever asks, however few threads there are."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cpu import CpuExperts, Doorbell, SumOrder, load_library
from runtime.cpu.service import doorbell_memory
from runtime.cpu.shape import halving
from tests.helpers.cpu_experts import Case, shape_of

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 40, 6, 4
LANES = SumOrder(columns=16, steps=halving(16))
CASE = Case(shape_of(HIDDEN, WIDTH, LANES, LANES))
BELL = Doorbell(TOP_K, HIDDEN)


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    torch.manual_seed(0)
    return CASE.blocks(EXPERTS)


@pytest.fixture
def memory() -> Tensor:
    return doorbell_memory(BELL)


def opened(blocks: Tensor, memory: Tensor, threads: int = 2, spin: float = 1e-4) -> CpuExperts:
    library = load_library(CASE.shape)
    assert not isinstance(library, str), library
    return CpuExperts(
        library, CASE.shape, CASE.table(blocks), TOP_K, cores=[-1] * threads, memory=memory,
        spin=spin,
    )  # fmt: skip


@pytest.fixture
def service(blocks: Tensor, memory: Tensor) -> Iterator[CpuExperts]:
    with opened(blocks, memory) as service:
        yield service


def words(memory: Tensor, at: int, count: int = 1) -> np.ndarray:
    return memory[at : at + 4 * count].view(torch.int32).numpy()


def ring(memory: Tensor, bell: int, ids: list[int], x_H: Tensor, layer: int = 0) -> None:
    """What a GPU's kernel does, in Python."""
    words(memory, BELL.order, 2 + TOP_K)[: 2 + len(ids)] = [layer, len(ids), *ids]
    memory[BELL.x :][: 2 * HIDDEN] = x_H.view(torch.uint8)
    words(memory, BELL.bell)[0] = bell


def answered(memory: Tensor, bell: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while words(memory, BELL.done)[0] != bell:
        if time.monotonic() > end:
            return False
        time.sleep(0)
    return True


def answer(memory: Tensor) -> Tensor:
    return memory[BELL.answer :][: 4 * TOP_K * HIDDEN].view(torch.float32).view(TOP_K, HIDDEN)


def test_every_ring_is_answered(service: CpuExperts, memory: Tensor, blocks: Tensor) -> None:
    generator = np.random.default_rng(0)
    for bell in range(1, 200):
        x_H = torch.randn(HIDDEN).bfloat16()
        ids = generator.permutation(EXPERTS)[: generator.integers(1, TOP_K + 1)].tolist()
        ring(memory, bell, ids, x_H)
        assert answered(memory, bell)
        if bell % 20 == 0:
            expected = np.stack([CASE.expected(blocks[expert], x_H) for expert in ids])
            np.testing.assert_array_equal(answer(memory)[: len(ids)].numpy(), expected)
    counts = service.counts()
    assert counts.rings == 199
    assert counts.nanoseconds > 0
    assert counts.refused == 0


def test_a_thread_that_helps_two_services_takes_neither_ones_vector_for_the_others(
    blocks: Tensor,
) -> None:
    x_2H = torch.randn(2, HIDDEN).bfloat16()
    expected = [CASE.expected(blocks[0], x_H) for x_H in x_2H]
    with (
        opened(blocks, doorbell_memory(BELL), 0) as first,
        opened(blocks, doorbell_memory(BELL), 0) as second,
    ):
        answers = [one.ask(0, [0], x_H)[0] for one, x_H in zip((first, second), x_2H, strict=True)]
        np.testing.assert_array_equal(np.stack(answers), expected)


def test_an_answer_comes_after_a_long_silence(service: CpuExperts, memory: Tensor) -> None:
    time.sleep(0.3)
    ring(memory, 1, [0], torch.zeros(HIDDEN).bfloat16())
    assert answered(memory, 1)


def test_any_other_value_rings_the_bell(service: CpuExperts, memory: Tensor) -> None:
    for bell in (5, -3, 2**31 - 1, -(2**31), 0):
        ring(memory, bell, [1], torch.ones(HIDDEN).bfloat16())
        assert answered(memory, bell)
    assert service.counts().rings == 5


def test_a_bell_rung_before_there_were_threads(blocks: Tensor, memory: Tensor) -> None:
    ring(memory, 9, [2], torch.ones(HIDDEN).bfloat16())
    with opened(blocks, memory):
        assert answered(memory, 9)


def test_bits_do_not_depend_on_the_number_of_threads(blocks: Tensor) -> None:
    x_H, answers = torch.randn(HIDDEN).bfloat16(), []
    for threads in (0, 1, 5):
        with opened(blocks, doorbell_memory(BELL), threads) as service:
            answers.append(service.ask(0, [5, 1, 3], x_H).clone())
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(
    ("layer", "ids"), [(1, [0]), (-1, [0]), (0, [EXPERTS]), (0, [-1])], ids=str
)
def test_an_order_for_no_expert_is_refused_and_answered(
    service: CpuExperts, memory: Tensor, layer: int, ids: list[int]
) -> None:
    x_H = torch.ones(HIDDEN).bfloat16()
    with pytest.raises(RuntimeError, match="refused the order"):
        service.ask(layer, ids, x_H)
    assert service.counts().refused == 1
    assert service.ask(0, [0], x_H).abs().sum() > 0


def test_an_order_for_more_experts_than_there_is_room_for(
    service: CpuExperts, memory: Tensor
) -> None:
    ring(memory, 1, [0, 1], torch.ones(HIDDEN).bfloat16())
    assert answered(memory, 1)
    words(memory, BELL.order, 2)[1] = TOP_K + 1
    words(memory, BELL.bell)[0] = 2
    assert answered(memory, 2)
    assert service.counts().refused == 1


def test_an_order_for_nothing_is_answered(service: CpuExperts) -> None:
    assert service.ask(0, [], torch.ones(HIDDEN).bfloat16()).shape == (0, HIDDEN)


def test_nobody_answers_without_threads(blocks: Tensor, memory: Tensor) -> None:
    with (
        opened(blocks, memory, threads=0) as service,
        pytest.raises(RuntimeError, match=r"did not answer in 0\.05 s"),
    ):
        service.ask(0, [0], torch.ones(HIDDEN).bfloat16(), helpers=0, patience=0.05)


def test_who_asks_may_do_the_work_himself(blocks: Tensor, memory: Tensor) -> None:
    x_H = torch.randn(HIDDEN).bfloat16()
    with opened(blocks, memory, threads=0) as service:
        output = service.ask(0, [4], x_H)[0].numpy()
        np.testing.assert_array_equal(output, CASE.expected(blocks[4], x_H))


def test_the_caller_keeps_his_rounding_of_subnormals(blocks: Tensor, memory: Tensor) -> None:
    tiny = torch.full((HIDDEN,), 1e-39)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        with opened(blocks, memory, threads=0) as service:
            output = service.ask(0, [4], tiny.bfloat16())[0].clone()
        assert (tiny + tiny).sum() == 0
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(output.numpy(), CASE.expected(blocks[4], tiny.bfloat16()))


def test_a_closed_service_has_no_threads(blocks: Tensor, memory: Tensor) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    service = opened(blocks, memory, threads=3)
    assert service.num_threads == 3
    assert threads() == before + 3
    service.close()
    service.close()
    assert threads() == before
    assert service.counts().rings == 0


def test_it_is_closed_while_a_bell_rings(blocks: Tensor) -> None:
    for _ in range(20):
        memory = doorbell_memory(BELL)
        service = opened(blocks, memory)
        ring(memory, 1, [0, 1, 2], torch.ones(HIDDEN).bfloat16())
        service.close()


def test_a_forked_process_closes_nothing(service: CpuExperts) -> None:
    child = os.fork()
    if child == 0:
        service.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert service.ask(0, [0], torch.ones(HIDDEN).bfloat16()).abs().sum() > 0


def test_threads_without_work_do_not_use_the_cores(service: CpuExperts) -> None:
    service.ask(0, [0], torch.ones(HIDDEN).bfloat16())
    time.sleep(0.15)
    before, start = time.process_time(), time.monotonic()
    time.sleep(0.4)
    used = (time.process_time() - before) / (time.monotonic() - start)
    assert used < 0.5


def test_experts_are_timed(service: CpuExperts) -> None:
    assert 0 < service.measure(experts=2, rings=4, helpers=1) < 1


def test_other_threads_run_while_one_asks(service: CpuExperts) -> None:
    """The wait holds no lock of Python's."""
    turns = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1

    thread = threading.Thread(target=count)
    service.close()
    with opened(CASE.blocks(EXPERTS), doorbell_memory(BELL), threads=0) as alone:
        thread.start()
        with pytest.raises(RuntimeError):
            alone.ask(0, [0], torch.ones(HIDDEN).bfloat16(), helpers=0, patience=0.5)
        stop.set()
        thread.join()
    assert turns > 1000
