"""The host tier, taken over by the whole engine on the CPU: what it stores, and gives back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.pinned import PinnedMemory
from runtime.cuda.memory.pinned_experts import PinnedExperts
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.tiny import tiny_model


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


@pytest.fixture
def model() -> Any:
    return tiny_model("olmoe")


def generate(model: Any, new: int = 3) -> Tensor:
    """Greedy tokens [1, T]."""
    ids_BT = torch.randint(2, 256, (1, 9), generator=torch.Generator().manual_seed(3))
    tokens: Tensor = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, do_sample=False
    )
    return tokens


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_packed_experts_take_fewer_bytes_so_more_of_them_are_resident() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    model: Any = tiny_model("olmoe", **sizes).bfloat16()
    outputs = []
    for memory, num_slots in ((1.0, 8), (0.75, 7)):
        engine = load_fake(model, memory=memory).expertflow
        assert engine.stats().packing == 5 / 6, "five chunks of six"
        assert engine.stats().num_slots == num_slots
        outputs.append(generate(model, new=2))
        engine.detach()
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("num_odd", "patches", "is_full"),
    [(0, 16, False), (0, 16, True), (40, 64, False), (200, 0, False)],
)
def test_weights_come_back_bit_for_bit(
    model: Any, num_odd: int, patches: int, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last layer takes more patches than those before it had room for, or cannot be
    packed at all, and where no more memory can be pinned by then.
    """
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[-1].mlp.experts.down_proj[-1].view(-1)[:num_odd] = 1e-30
    before = {name: p.clone() for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    engine = load_fake(model).expertflow
    assert engine._backend._host.expert_blocks[0].patches == patches
    if is_full:
        monkeypatch.setattr(PinnedMemory, "register", raising(MemoryError("no more")))
    engine.detach()
    after = dict(model.named_parameters())
    assert {name: id(p) for name, p in after.items()} == identities
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_weights_come_back_though_storing_them_otherwise_failed_half_way(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[-1].mlp.experts.down_proj[-1].view(-1)[:40] = 1e-30
    before = {name: p.clone() for name, p in model.named_parameters()}
    again = PinnedExperts._stored_again

    def full(tier: PinnedExperts, layer: int, expert_block: ExpertBlock) -> Tensor:
        if layer == 1:
            raise MemoryError("no more")
        return again(tier, layer, expert_block)

    monkeypatch.setattr(PinnedExperts, "_stored_again", full)
    with pytest.raises(MemoryError):
        load_fake(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_loading_that_fails_gives_the_model_back(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = generate(model)
    full = raising(torch.OutOfMemoryError("no room"))
    monkeypatch.setattr("runtime.cuda.prefill.streaming_pool.slots", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_fake(model)
    assert "expertflow" not in model.__dict__
    assert torch.equal(generate(model), want)
