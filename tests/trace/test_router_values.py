"""Router logits and router inputs in a trace: those of the model, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from routing.blocks import find_blocks
from routing.inspect_model import topology_of
from routing.layers import find_moe_layers
from routing.shards import MANIFEST, Document, TraceReader
from routing.trace_format.extras import Extras
from routing.trace_format.manifest import write_manifest
from tests.helpers.architectures import architecture_model, is_known
from tests.helpers.tracing import Directory, assert_same_documents, trace
from trace.router_values import RouterValues, extras_of

M = 3
ROUTERS = ["olmoe", "gpt_oss", "deepseek_v3", "dbrx", "llama4_text", "jetmoe", "granitemoe"]
"""Softmax, biased, grouped with a correction, logits only, dense calls, sorted pairs, packed."""


def values_of(directory: Path, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Router logits as transformers reports them, [T, L, E], and router inputs, [T, L, H]."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    inputs: list[torch.Tensor] = []
    for block in find_blocks(model):
        block.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
    return torch.stack(list(logits), 1).numpy(), torch.stack(inputs, 1).numpy()


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe"])
@pytest.mark.parametrize("generate", [0, 4])
def test_a_trace_holds_the_models_own_router_logits_and_router_inputs(
    kind: str, generate: int, tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    documents = trace(
        tiny_directory(kind), data, tmp_path / "out", router_logits=M, hidden=[2, 0],
        generate=generate,
    )  # fmt: skip
    extras = TraceReader(tmp_path / "out").extras
    assert extras == Extras(router_logits=M, hidden=(0, 2), hidden_size=32)
    for document in documents[:4]:
        logits_TLE, hidden_TLH = values_of(tiny_directory(kind), document.token_ids_T.tolist())
        assert document.router is not None
        expected = -np.sort(-logits_TLE)[..., :M]
        np.testing.assert_allclose(document.router.logits_TLM, expected, atol=4e-3)
        named = np.take_along_axis(
            logits_TLE, document.router.experts_TLM.astype(np.int64), axis=-1
        )
        np.testing.assert_allclose(named, expected, atol=1e-4)
        for layer in (0, 2):
            np.testing.assert_allclose(
                document.hidden[layer], hidden_TLH[:, layer], atol=4e-3, rtol=2e-3
            )


def assert_same_values(ours: list[Document], theirs: list[Document]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.router is not None and other.router is not None
        for left, right in zip(one.router, other.router, strict=True):
            assert left.tobytes() == right.tobytes()
        assert one.hidden.keys() == other.hidden.keys()
        assert all(one.hidden[n].tobytes() == other.hidden[n].tobytes() for n in one.hidden)


def test_recorded_values_change_nothing_else_and_are_read_once_beside_a_look_ahead(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    model = tiny_directory("olmoe")
    plain = trace(model, data, tmp_path / "plain", weights=True)
    options = {"weights": True, "router_logits": M, "hidden": [1]}
    values = trace(model, data, tmp_path / "values", **options)
    both = trace(model, data, tmp_path / "both", lookahead=2, **options)
    assert_same_documents(plain, values)
    assert_same_documents(plain, both)
    assert_same_values(values, both)
    assert plain[0].router is None and not plain[0].hidden
    assert "extras" not in json.loads((tmp_path / "plain" / MANIFEST).read_text())


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if is_known(kind)])
def test_the_highest_logits_name_the_experts_of_every_kind_of_router(kind: str) -> None:
    from routing.layers import read_routes

    model: Any = architecture_model(kind)
    layers = find_moe_layers(model)
    ran: dict[str, torch.Tensor] = {}
    extras = extras_of(model, topology_of(model), M, [0])
    values = RouterValues(model, extras)
    handles = list(values.hooks())
    for layer in layers:
        layer.module.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: ran.__setitem__(
                layer.name, read_routes(layer, args, kwargs).experts_TK
            ),
            with_kwargs=True,
        )
    with torch.inference_mode():
        model(input_ids=torch.arange(2, 26).view(2, 12))
    router, hidden = values.take(layers, 2)
    assert router is not None and handles
    assert hidden[0].shape == (2, 12, extras.hidden_size)
    for index, layer in enumerate(layers):
        used_NK = ran[layer.name].numpy()
        first_NK = router.experts_TLM[:, :, index].reshape(len(used_NK), M)[:, : used_NK.shape[1]]
        if kind != "deepseek_v3":  # its groups and its correction choose by more than logits
            assert np.array_equal(np.sort(first_NK), np.sort(used_NK))


def test_an_encoder_and_a_decoder_have_values_each_of_its_own(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    model = tiny_directory("switch_transformers")
    documents = trace(model, data, tmp_path / "out", generate=3, router_logits=2, hidden=[0])
    encoders = list(TraceReader(tmp_path / "out", "encoder").documents())
    for document in (*documents[:2], *encoders[:2]):
        assert document.router is not None
        assert document.router.logits_TLM.shape == (len(document.token_ids_T), 2, 2)
        assert document.hidden[0].shape == (len(document.token_ids_T), 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_logits": 9}, "--router_logits 9: the decoder has 8 experts"),
        ({"hidden": [1, 4]}, r"--hidden 4: the decoder has MoE layers 0 to 3"),
        ({"hidden": [-1]}, r"--hidden -1"),
        ({"router_logits": -1}, "must not be negative"),
    ],
)
def test_values_that_the_model_does_not_have_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trace(tiny_directory("olmoe"), data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gemma4_text", "Gemma4.*no router values"),
        ("longcat_flash", "10 logits for 8 experts"),
        ("deepseek_v4", "DeepseekV4.*does not say where its router logits are"),
    ],
)
def test_an_architecture_whose_logits_cannot_be_read_is_refused_by_name(
    kind: str, message: str
) -> None:
    if not is_known(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    with pytest.raises(ValueError, match=message):
        run_with_values(architecture_model(kind))


def run_with_values(model: Any) -> None:
    list(RouterValues(model, Extras(router_logits=2)).hooks())
    with torch.inference_mode():
        model(input_ids=torch.arange(2, 26).view(2, 12))


def test_a_trace_is_not_resumed_with_other_values(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    trace(tiny_directory("olmoe"), data, tmp_path / "out", max_documents=3)
    with pytest.raises(ValueError, match=r"extras: None there, .*router_logits.* here"):
        trace(tiny_directory("olmoe"), data, tmp_path / "out", max_documents=3, router_logits=2)


# --------------------------------------------------------------------------- the format


@pytest.mark.parametrize(
    "extras",
    [
        {"token_ids": 3},
        {"router_logits": -1},
        {"router_logits": True},
        {"hidden": [2, 1], "hidden_size": 4},
        {"hidden": [1]},
        {"hidden_size": 4},
        {"speed": 1},
        [],
    ],
)
def test_a_manifest_with_extras_that_cannot_be_is_refused(
    extras: Any, tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    trace(tiny_directory("olmoe"), data, tmp_path / "out", max_documents=2)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    write_manifest(tmp_path / "out", manifest | {"extras": extras})
    with pytest.raises(ValueError, match=r"extras is .*, not a description of optional contents"):
        TraceReader(tmp_path / "out")


@pytest.mark.parametrize("extras", [{"router_logits": 4}, {"hidden": [1], "hidden_size": 32}])
def test_a_shard_without_the_values_that_its_manifest_names_is_refused(
    extras: dict[str, Any], tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"router_logits": M, "hidden": [0]}
    trace(tiny_directory("olmoe"), data, tmp_path / "out", max_documents=2, **options)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    write_manifest(tmp_path / "out", manifest | {"extras": extras})
    with pytest.raises(ValueError, match=r"router\.experts is uint8|it lacks the tensor hidden\.1"):
        TraceReader(tmp_path / "out")
