"""An expert as one piece of memory, as it is and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.memory.expert_block import ALIGNMENT, CHUNK, ExpertBlock
from runtime.cuda.memory.unpacking import unpack_blocks
from runtime.weights.arena import Spec
from runtime.weights.packed.packing import PATCHES

ROOM = PATCHES[0]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 70), min_size=1, max_size=2).map(tuple),
            st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_matrices_lie_in_a_record_in_whole_chunks_and_the_rest_behind_them(
    shapes: list[Any],
) -> None:
    expert_block = ExpertBlock({f"p{index}": Spec(*shape) for index, shape in enumerate(shapes)})
    fields = sorted(expert_block.fields.items(), key=lambda item: item[1].start)
    end, is_behind = 0, False
    for name, field in fields:
        is_behind = is_behind or len(field.shape) == 1
        assert is_behind == (len(field.shape) == 1)
        alignment = ALIGNMENT if is_behind else CHUNK
        assert field.start % alignment == 0
        assert end <= field.start < end + CHUNK
        assert expert_block.start(name) * field.dtype.itemsize == field.start * 2
        assert is_behind == (field.start >= expert_block.matrix_units)
        end = field.start + field.units
    assert expert_block.units % CHUNK == expert_block.matrix_units % CHUNK == 0
    assert expert_block.num_chunks == -(-end // CHUNK)


def test_views_of_records_are_the_parameters_themselves() -> None:
    specs = {"weight": Spec((3, 5), torch.float32), "bias": Spec((7,), torch.bfloat16)}
    expert_block = ExpertBlock(specs)
    expert_blocks = torch.zeros(4, expert_block.units, dtype=torch.int16)
    views = expert_block.views(expert_blocks)
    assert {name: view.shape for name, view in views.items()} == {
        "weight": (4, 3, 5),
        "bias": (4, 7),
    }
    views["weight"].copy_(torch.randn(4, 3, 5))
    views["bias"].copy_(torch.randn(4, 7))
    assert torch.equal(expert_block.views(expert_blocks[2])["weight"], views["weight"][2])
    assert torch.equal(expert_block.views(expert_blocks)["bias"], views["bias"])
    assert (expert_blocks[:, expert_block.fields["bias"].start + 7 :] == 0).all()


# ---------------------------------------------------------------------- as stored

BF16 = torch.bfloat16
SPECS = {
    "gate_up_proj": Spec((96, 200), BF16),
    "gate_up_proj_bias": Spec((96,), BF16),
    "down_proj": Spec((200, 48), BF16),
    "down_proj_bias": Spec((200,), BF16),
}


def filled(expert_block: ExpertBlock, count: int) -> Tensor:
    """Records of random weights, the biases of any bits, int16 [count, units]."""
    records_EN = torch.zeros(count, expert_block.units, dtype=torch.int16)
    for name, view in expert_block.views(records_EN).items():
        view.view(torch.int16).copy_((torch.randn(view.shape) * 0.02).bfloat16().view(torch.int16))
        if name.endswith("bias"):
            view.view(torch.int16).random_(-(2**15), 2**15)
    return records_EN


@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("picked", [[3], [2, 0, 4]])
def test_a_kernel_unpacks_stored_records(patches: int, picked: list[int]) -> None:
    expert_block = ExpertBlock(SPECS, patches)
    records_EN = filled(expert_block, 5)
    first, last = expert_block.fields["gate_up_proj"], expert_block.fields["down_proj"]
    records_EN[:, last.start : last.start + patches // 2] = 0x7FC1
    records_EN[:, first.units - 1] = 1
    records_EN[:, 100:120], records_EN[:, 120:140] = 0, -(2**15)  # zeros of either sign
    stored = [expert_block.store(block_N) for block_N in records_EN]
    stored_EN = torch.stack([one for one in stored if one is not None])
    assert stored_EN.shape == (5, expert_block.stored_units)
    to_RN = torch.full((len(picked) + 1, expert_block.units), -1, dtype=torch.int16)
    unpack_blocks(expert_block, stored_EN, torch.tensor(picked, dtype=torch.int32), to_RN)
    for row, expert in enumerate(picked):
        for name, view in expert_block.views(to_RN[row]).items():
            want = expert_block.views(records_EN[expert])[name]
            assert torch.equal(view.view(torch.int16), want.view(torch.int16))
    assert (to_RN[-1] == -1).all()


def test_a_record_that_is_not_packed_is_stored_as_it_is() -> None:
    expert_block = ExpertBlock(SPECS)
    (block_N,) = filled(expert_block, 1)
    assert expert_block.store(block_N) is block_N
    assert expert_block.stored_units == expert_block.units


def test_a_stored_bias_lies_behind_the_packed_matrices() -> None:
    expert_block = ExpertBlock(SPECS, ROOM)
    (block_N,) = filled(expert_block, 1)
    stored_N = expert_block.store(block_N)
    assert stored_N is not None
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        start, field = expert_block.start_stored(name), expert_block.fields[name]
        bias = expert_block.views(block_N)[name].view(torch.int16)
        assert torch.equal(stored_N[start : start + field.units], bias)


@pytest.mark.parametrize(
    ("changes", "packs"),
    [
        ({}, True),
        ({"down_proj": Spec((200, 48), torch.float16)}, False),
        ({"down_proj_bias": Spec((200,), torch.float32)}, False),
        ({"down_proj": Spec((200, 44), BF16)}, False),
    ],
)
def test_only_bfloat16_alone_in_rows_of_eights_can_be_packed(
    changes: dict[str, Any], packs: bool
) -> None:
    assert ExpertBlock(SPECS | changes).can_pack == packs
