"""Experts in the checkpoint's own codes on a GPU: their twin's tokens, whatever is resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.serving.request import Request
from tests.gpu.offloaded import (
    NEVER,
    allocated,
    check_slots,
    forbid_waiting,
    generate,
    generate_with_logits,
    needs_gpu,
    offloaded,
)
from tests.helpers.quantised import LayoutWriter
from tests.helpers.serving import by_id, prompts

pytestmark = needs_gpu

SIZES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    "qwen3_moe": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_hidden_layers": 3,
        "mlp_only_layers": [],
    },
}
"""24 experts, by architecture."""
RUN = (
    "mxfp4 gpt-oss",
    "mxfp4 compressed-tensors",
    "fp8 128x128",
    "fp8 e8m0",
    "fp8 compressed-tensors channel",
    "fp8 compressed-tensors tensor",
    "int4 kimi",
    "int4 awq",
    "int4 compressed-tensors asymmetric",
    "nvfp4 modelopt",
    "nvfp4 compressed-tensors",
    "nvfp4 gpt-oss",
)
"""Layouts of every encoding that kernels run."""
ONE_EACH = ("mxfp4 gpt-oss", "fp8 128x128", "int4 kimi", "nvfp4 modelopt")
ACROSS = "fp8 stacked"
"""A layout whose codes lie across the rows that kernels read: decoded on arrival."""
ROUNDING = 0.03
"""Of bfloat16 logits, as a share of the largest, where sums have another order."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> LayoutWriter:
    """A checkpoint in some layout, and the unquantised one with the same weights."""
    return LayoutWriter(tmp_path_factory.mktemp("layouts"), SIZES)


def run(directory: Path, batch: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, T] and the logits [B, N, V] of captured steps."""
    with offloaded(directory, **options) as model:
        found = generate_with_logits(model, batch, eos_token_id=NEVER)
        assert model.expertflow.decode_path == "graph"
        check_slots(model)
    return found


def assert_close(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Assert that logits agree to rounding, up to the first token that a near tie decided."""
    new = ours[1].shape[1]
    for row, (some, others) in enumerate(zip(ours[0][:, -new:], theirs[0][:, -new:], strict=True)):
        differ = (some != others).nonzero().flatten().tolist()
        stop = differ[0] + 1 if differ else new
        known = theirs[1][row, :stop].float()
        gap = (ours[1][row, :stop].float() - known).abs().max() / known.abs().max()
        assert gap <= ROUNDING, (row, stop, gap)


@pytest.mark.parametrize("layout", RUN)
def test_prompts_and_captured_steps_give_the_twins_logits(
    layout: str, written: LayoutWriter
) -> None:
    """To rounding, of prompts too: their weights are the twin's bit for bit, but which sixteen of
    them a tensor core sums at once follows from how they come into registers (Triton's `kWidth`:
    8 where zeros or scales are bytes, 4 in the twin's packed blocks).
    """
    coded, twin = written(layout)
    for batch in (1, 4):
        assert_close(run(coded, batch, memory=0.4), run(twin, batch, memory=0.4))


@pytest.mark.parametrize("layout", RUN)
def test_logits_are_the_same_bit_for_bit_whatever_is_resident(
    layout: str, written: LayoutWriter
) -> None:
    coded, _ = written(layout)
    everything = run(coded, memory=1.0)
    for options in (
        {"memory": 0.25},
        {"memory": 0.25, "policy": "lfu"},
        {"memory": 0.4, "prefetch": True},
        {"memory": 0.4, "prefetch": False},
    ):
        found = run(coded, **options)
        assert all(map(torch.equal, found, everything)), options
    of_four = [run(coded, 4, memory=memory) for memory in (1.0, 0.4)]
    assert all(map(torch.equal, *of_four))


def test_codes_that_no_kernel_reads_are_decoded_on_arrival(
    written: LayoutWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as of the twin, if kernels do not run that either."""
    coded, twin = written(ACROSS)
    found = []
    for options in ({"memory": 1.0}, {"memory": 0.25}, {"memory": 0.4, "prefetch": True}):
        with offloaded(coded, **options) as model:
            found += [generate_with_logits(model, batch, eos_token_id=NEVER) for batch in (1, 4)]
            engine = model.expertflow
            assert "lie across the rows" in engine.decode_path
            stats, host = engine.stats(), engine._backend._host
            on_demand = stats.bytes_loaded - stats.bytes_prefetched
            assert on_demand == stats.misses * host.link_bytes(0)
            assert engine._backend.seconds_per_load() > 0
            engine.check_integrity()
    monkeypatch.setattr("runtime.cuda.backend.common_layout", lambda _: "no kernel for tests")
    with offloaded(twin, memory=1.0) as model:
        expected = [generate_with_logits(model, batch, eos_token_id=NEVER) for batch in (1, 4)]
    for ours, theirs in zip(found, 3 * expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("layout", ONE_EACH)
def test_served_tokens_are_the_same_whatever_is_resident(
    layout: str, written: LayoutWriter
) -> None:
    """In float32: who shares a step depends on time, and in bfloat16 near ties go by rounding."""
    coded, _ = written(layout)
    asked = [
        Request(id=str(index), prompt=prompt, max_tokens=12, ignore_eos=True)
        for index, prompt in enumerate(prompts(3, 9))
    ]
    served = []
    for options in ({"memory": 1.0}, {"memory": 0.4}, {"memory": 0.4, "prefetch": True}):
        with offloaded(coded, batch=8, dtype="float32", **options) as model:
            results = by_id(model.expertflow.serve(asked, batch=4, context=48, chunk=16))
            served.append({id: result.token_ids for id, result in results.items()})
            check_slots(model)
    assert served[0] == served[1] == served[2]
    assert all(len(tokens) == 12 for tokens in served[0].values())


@pytest.mark.parametrize("layout", ONE_EACH)
def test_compiled_steps_are_the_same_whatever_is_resident(
    layout: str, written: LayoutWriter
) -> None:
    coded, _ = written(layout)
    found = [run(coded, memory=memory, compile=True) for memory in (1.0, 0.25)]
    assert all(map(torch.equal, *found))


def test_compiled_steps_say_the_same(written: LayoutWriter) -> None:
    """In float32: the compiler keeps more digits between operations."""
    coded, _ = written("int4 kimi")
    found = [run(coded, memory=1.0, dtype="float32", compile=way) for way in (True, False)]
    assert_close(*found)


def test_a_step_on_codes_never_waits_for_the_device(
    written: LayoutWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = forbid_waiting(monkeypatch)
    with offloaded(written("mxfp4 gpt-oss")[0], memory=0.25) as model:
        generate(model, eos_token_id=NEVER)
    assert len(watched) > 10


@pytest.mark.parametrize("layout", [*ONE_EACH, ACROSS])
def test_weights_come_back_decoded_and_no_memory_stays(layout: str, written: LayoutWriter) -> None:
    coded, twin = written(layout)
    run_plain: Any
    with offloaded(twin) as run_plain:
        generate(run_plain)
    expected = run_plain.state_dict()
    before = allocated()
    with offloaded(coded) as model:
        generate(model)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name].cpu(), weight.cpu()), name
    del model, found
    assert allocated() <= before
