"""Models whose experts are in codes, run by the whole GPU engine on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.device_budget import device_budget, reserved_bytes, slot_bytes
from runtime.cuda.memory.kernel_layout import KernelLayout, common_layout
from runtime.plan import plan
from runtime.sizing.budget import slot_budget
from runtime.sizing.units import parse_memory
from runtime.weights.arena import expert_bytes
from runtime.weights.source import Source, from_path
from tests.helpers import interpreter
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.logits_recorder import with_logits
from tests.helpers.quantised import LayoutWriter

interpreter.mend()

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
SIZES = {
    "gpt_oss": SMALL,
    "qwen3_moe": SMALL | {"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": []},
}
RUN = ("mxfp4 gpt-oss", "fp8 compressed-tensors channel", "int4 kimi", "nvfp4 modelopt")
"""A layout of each encoding, all of which kernels run."""
ACROSS = "fp8 stacked"
"""A layout whose codes lie across the rows that kernels read."""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> LayoutWriter:
    """A checkpoint in some layout, and the unquantised one with the same weights."""
    return LayoutWriter(tmp_path_factory.mktemp("layouts"), SIZES)


def logits_of(model: Any, rows: int = 1) -> Tensor:
    """Logits [N, B, V] of greedy tokens; the first are of the prompt."""
    ids_BT = torch.randint(2, 256, (rows, 5), generator=torch.Generator().manual_seed(3))
    _, logits_BNV = with_logits(
        model.generate, ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=2,
        do_sample=False, eos_token_id=1 << 20, pad_token_id=0,
    )  # fmt: skip
    return logits_BNV.transpose(0, 1)


@pytest.mark.parametrize("layout", RUN)
def test_captured_steps_run_on_codes_as_on_the_weights_of_the_twin(
    layout: str, written: LayoutWriter
) -> None:
    """Prompts are the same bit for bit; the sums of steps have another order."""
    coded, twin = written(layout)
    found, expected = load_fake(coded, memory=0.5), load_fake(twin, memory=0.5)
    ours, theirs = logits_of(found), logits_of(expected)
    assert torch.equal(ours[0], theirs[0])
    assert torch.allclose(ours, theirs, atol=2e-2, rtol=2e-2)
    engine = found.expertflow
    assert engine.decode_path == "graph"
    engine.check_integrity()
    backend = engine._backend
    assert all(pool.expert_block.coding for pool in backend._pools)
    weights, plain = (model.expertflow.detach().state_dict() for model in (found, expected))
    assert [name for name, one in plain.items() if not torch.equal(weights[name], one)] == []


@pytest.mark.parametrize("rows", [1, 2])
def test_logits_of_codes_are_the_same_bit_for_bit_whatever_is_resident(
    rows: int, written: LayoutWriter
) -> None:
    coded, _ = written("nvfp4 modelopt")
    options: list[dict[str, Any]] = [{"memory": 1.0}, {"memory": 0.5, "policy": "lfu"}]
    options += [{"memory": 0.5, "prefetch": True}] if rows == 1 else []
    found = []
    for chosen in options:
        model = load_fake(coded, batch=rows, **chosen)
        found.append(logits_of(model, rows))
        assert model.expertflow.decode_path == "graph"
        model.expertflow.check_integrity()
        model.expertflow.close()
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_codes_that_no_kernel_reads_are_decoded_into_plain_slots(
    written: LayoutWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as of the twin, if kernels do not run that either."""
    coded, twin = written(ACROSS)
    found = []
    for memory in (1.0, 0.5):
        model = load_fake(coded, memory=memory)
        found.append(logits_of(model))
        engine, stats = model.expertflow, model.expertflow.stats()
        assert "the codes of gate_up_proj lie across the rows" in engine.decode_path
        assert stats.bytes_loaded == stats.misses * engine._backend._host.link_bytes(0)
        assert stats.packing < 1
        engine.check_integrity()
        engine.close()
    monkeypatch.setattr("runtime.cuda.backend.common_layout", lambda _: "no kernel for tests")
    expected = logits_of(load_fake(twin, memory=1.0))
    assert all(torch.equal(logits, expected) for logits in found)


# ---------------------------------------------------------------------- budgets


def source_of(directory: Path) -> Source:
    return from_path(directory, None, "auto")


def test_a_fraction_counts_experts_and_bytes_pay_for_their_codes(written: LayoutWriter) -> None:
    coded, twin = map(source_of, written("mxfp4 gpt-oss"))
    sizes = {"context": 32, "batch": 1}
    assert isinstance(common_layout(coded), KernelLayout)
    for fraction in (0.25, 0.5, 1.0):
        ours, theirs = (device_budget(one, fraction, **sizes) for one in (coded, twin))
        assert ours.slots() == theirs.slots()
    (size,) = slot_bytes(coded)
    assert size == 2 * 8192, "one chunk"
    reserved = reserved_bytes(coded, **sizes)
    budget = coded.fixed_bytes + reserved + 5 * size
    assert device_budget(coded, budget, **sizes).slots() == [5]
    assert device_budget(coded, budget - 1, **sizes).slots() == [4]


def test_where_no_kernel_runs_codes_bytes_pay_for_weights_and_for_their_decoding(
    written: LayoutWriter,
) -> None:
    coded, twin = map(source_of, written(ACROSS))
    sizes = {"context": 32, "batch": 1}
    (group,) = coded.groups
    assert slot_bytes(coded) == slot_bytes(twin) == [expert_bytes(group.specs)]
    landing = reserved_bytes(coded, **sizes) - reserved_bytes(twin, **sizes)
    assert landing > expert_bytes(group.stored_specs)


def test_the_least_budget_that_a_message_names_is_enough_for_codes(written: LayoutWriter) -> None:
    source = source_of(written("mxfp4 gpt-oss")[0])
    sizes = slot_bytes(source)
    with pytest.raises(ValueError, match="give at least") as caught:
        slot_budget(1000, source, slot_bytes=sizes)
    least = str(caught.value).rpartition(" or ")[2]
    assert slot_budget(parse_memory(least), source, slot_bytes=sizes).slots()[0] >= 2


def test_a_plan_for_a_gpu_counts_slots_of_codes_only_where_kernels_run_them(
    written: LayoutWriter,
) -> None:
    for layout, is_coded in (("mxfp4 gpt-oss", True), (ACROSS, False)):
        planned = plan(written(layout)[0], 0.5, device="cuda", context=32)
        plain = expert_bytes(planned.source.groups[0].specs)
        assert (planned.expert_bytes != [plain]) == is_coded
        assert planned.fraction == 0.5
