"""Failing loads: an expert whose load failed is never treated as resident."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.weights.store import ExpertStore
from tests.helpers.offloading import logits, offload
from tests.helpers.tiny import tiny_model


class Failing(ExpertStore):
    """A wrapper of a store in which one read fails half done."""

    def __init__(self, store: ExpertStore, fail_at: int, error: BaseException) -> None:
        self._store, self._error = store, error
        self._reads = iter(range(1 << 20))
        self._fail_at = fail_at

    def specs(self, layer: int) -> Any:
        return self._store.specs(layer)

    def whole_specs(self, layer: int) -> Any:
        return self._store.whole_specs(layer)

    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        if next(self._reads) == self._fail_at:
            next(iter(into.values())).fill_(float("nan"))
            raise self._error
        self._store.read(layer, expert, into)

    def restore(self, layer: int) -> None:
        self._store.restore(layer)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is gone")])
@pytest.mark.parametrize("fail_at", [0, 1, 5, 17, 40])
@pytest.mark.parametrize("size", [0.0625, 0.25, 1.0])
def test_an_expert_that_did_not_arrive_is_not_treated_as_resident(
    size: float, fail_at: int, error: BaseException
) -> None:
    model: Any = tiny_model("olmoe")
    expected = logits(model)
    engine = offload(model, size).expertflow
    for pool in dict.fromkeys(engine._backend.pools):
        pool._store = Failing(pool._store, fail_at, error)
    failed = False
    for _ in range(3):
        try:
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        except (KeyboardInterrupt, OSError):
            failed = True
        engine.check_integrity()
    assert failed == (fail_at < 32 or size < 1), (
        "with all experts resident there are at most 32 reads"
    )
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


class Interrupting(np.ndarray):
    """An array that interrupts the program when it is written to."""

    def __setitem__(self, *_: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["within the slot table", "after the slot table"])
def test_an_expert_whose_slot_is_being_assigned_at_an_interrupt_is_not_treated_as_resident(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model("olmoe")
    expected = logits(model)
    engine = offload(model, 0.25).expertflow
    pool = engine._backend.pools[0]
    for slots in pool.arena.tensors.values():
        slots.fill_(float("nan"))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "within the slot table":
            patch.setattr(pool.cache, "key_of_slot", pool.cache.key_of_slot.view(Interrupting))
        else:
            patch.setattr(pool, "_load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
    engine.check_integrity()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
