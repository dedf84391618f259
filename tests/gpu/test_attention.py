"""The attention of captured steps, by the project's kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.decode.graph_step import DecodeStep
from runtime.cuda.kernels.attention import attend
from runtime.cuda.kernels.new_tokens import write
from tests.gpu.offloaded import NEVER, needs_gpu, offloaded
from tests.helpers.tiny import PAD, tiny_model

pytestmark = needs_gpu

CONTEXT = 4096
LENGTHS = (4096, 1, 64, 65, 1000, 2049, 3000, 4095)
EXACT = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Heads(NamedTuple):
    """Of a published model's attention."""

    heads: int
    groups: int
    width: int
    value_width: int
    window: int | None = None
    has_sinks: bool = False
    softcap: float | None = None


HEADS = {
    "olmoe-7b": Heads(16, 16, 128, 128),
    "qwen3-30b-a3b": Heads(32, 4, 128, 128),
    "gpt-oss-20b": Heads(64, 8, 64, 64, window=128, has_sinks=True),
    "gemma": Heads(16, 8, 256, 256, window=1024, softcap=50.0),
    "gemma, whole": Heads(16, 2, 512, 512),
    "deepseek": Heads(16, 16, 192, 128),
    "one key head": Heads(24, 1, 80, 80),
}


class Drawn(NamedTuple):
    """Random arguments of `attend`, of a token for each of LENGTHS."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any]

    def run(self, tokens: slice = slice(None)) -> Tensor:
        query, keys, values, rows, positions = self.tensors
        return attend(
            query[tokens], keys, values, rows[tokens], positions[tokens], 0.1, **self.options
        )


def drawn(name: str, dtype: torch.dtype, *, is_padded: bool) -> Drawn:
    size, rows = HEADS[name], len(LENGTHS)
    gpu: dict[str, Any] = {"device": "cuda"}
    shape = rows, size.groups, CONTEXT
    keys = torch.randn(*shape, size.width, dtype=dtype, **gpu)
    values = torch.randn(*shape, size.value_width, dtype=dtype, **gpu)
    query = torch.randn(rows, size.heads, size.width, dtype=dtype, **gpu)
    positions = torch.tensor(LENGTHS, **gpu) - 1
    order = torch.arange(rows, **gpu).flip(0)
    real = None
    if is_padded:
        columns = torch.arange(CONTEXT, **gpu)
        real = torch.empty(rows, CONTEXT, dtype=torch.bool, **gpu)
        real[order] = columns >= positions[:, None] // 3
    sinks = torch.randn(size.heads, dtype=dtype, **gpu) if size.has_sinks else None
    options = {"window": size.window, "softcap": size.softcap, "sinks_H": sinks, "real_RC": real}
    return Drawn((query, keys, values, order, positions), options)


def reference(given: Drawn) -> Tensor:
    """In float64."""
    query, keys, values = (tensor.double() for tensor in given.tensors[:3])
    (rows, positions), options = given.tensors[3:], given.options
    shared = query.shape[1] // keys.shape[1]
    keys, values = (tensor[rows].repeat_interleave(shared, 1) for tensor in (keys, values))
    scores_BHC = torch.einsum("bhd,bhcd->bhc", query, keys) * 0.1
    if options["softcap"] is not None:
        scores_BHC = options["softcap"] * torch.tanh(scores_BHC / options["softcap"])
    columns = torch.arange(CONTEXT, device="cuda")
    seen_BC = columns <= positions[:, None]
    if options["window"] is not None:
        seen_BC &= columns > positions[:, None] - options["window"]
    if options["real_RC"] is not None:
        seen_BC &= options["real_RC"][rows]
    scores_BHC = scores_BHC.masked_fill(~seen_BC[:, None], float("-inf"))
    if options["sinks_H"] is not None:
        sinks_BH1 = options["sinks_H"].double().expand(len(rows), -1)[..., None]
        scores_BHC = torch.cat([scores_BHC, sinks_BH1], -1)
    return torch.einsum("bhc,bhcv->bhv", scores_BHC.softmax(-1)[..., :CONTEXT], values)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_long_rows_give_what_float64_says(name: str, dtype: torch.dtype) -> None:
    for is_padded in (False, True):
        given = drawn(name, dtype, is_padded=is_padded)
        torch.testing.assert_close(
            given.run().double(), reference(given), rtol=EXACT[dtype], atol=EXACT[dtype]
        )


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_bits_are_the_same_in_every_run_and_beside_any_others(
    name: str, dtype: torch.dtype
) -> None:
    given = drawn(name, dtype, is_padded=True)
    together = given.run()
    for _ in range(20):
        assert torch.equal(given.run(), together)
    for token in range(len(LENGTHS)):
        one = slice(token, token + 1)
        assert torch.equal(given.run(one), together[one])


def test_new_keys_and_values_go_to_their_rows_and_positions() -> None:
    gpu: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    keys, values = torch.zeros(4, 2, 100, 192, **gpu), torch.zeros(4, 2, 100, 128, **gpu)
    new_keys, new_values = torch.randn(2, 3, 192, **gpu), torch.randn(2, 3, 128, **gpu)
    rows, positions = torch.tensor([[3, 0, 1], [99, 0, 64]], device="cuda")
    write(new_keys.transpose(0, 1), new_values.transpose(0, 1), keys, values, rows, positions)
    for cache, new in ((keys, new_keys), (values, new_values)):
        expected = torch.zeros_like(cache)
        expected[rows, :, positions] = new.transpose(0, 1)
        assert torch.equal(cache, expected)


def continued(model: Any, batch: int) -> Tensor:
    """Greedy tokens after long prompts of which each but the first is padded at the left."""
    ids_BT = torch.randint(2, 256, (batch, 150), generator=torch.Generator().manual_seed(2))
    mask_BT = (torch.arange(150) >= 70 * torch.arange(batch)[:, None]).long()
    inputs = {"input_ids": ids_BT.masked_fill(mask_BT == 0, PAD), "attention_mask": mask_BT}
    tokens: Tensor = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()}, max_new_tokens=12,
        do_sample=False, pad_token_id=PAD, eos_token_id=NEVER,
    )  # fmt: skip
    return tokens.cpu()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("olmoe", {}), ("gpt_oss", {}), ("mixtral", {"sliding_window": 90}), ("qwen3_moe", {})],
)
def test_long_prompts_go_on_with_the_librarys_tokens(
    kind: str, overrides: dict[str, Any], compile: bool
) -> None:
    expected = [continued(tiny_model(kind, **overrides), batch) for batch in (1, 3)]
    torch._dynamo.reset()
    with offloaded(
        tiny_model(kind, **overrides), context=200, memory=0.75, compile=compile
    ) as model:
        for batch, tokens in zip((1, 3), expected, strict=True):
            assert torch.equal(continued(model, batch), tokens)
        assert model.expertflow.decode_path == "graph"
        steps = model.expertflow._backend.decoder.steps.values()
        captured = [step for step in steps if isinstance(step, DecodeStep)]
        assert captured and all(step.has_own_attention for step in captured)
