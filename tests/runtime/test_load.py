"""runtime.load: memory budgets, and what is said to what does not fit together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import runtime
from routing.inspect_model import topology_of
from routing.layers import MoELayer
from routing.writer import TraceWriter
from runtime.engine.guards.placeholder import Placeholder
from runtime.sizing.budget import slot_budget
from runtime.sizing.units import parse_memory
from runtime.weights.arena import Spec, expert_bytes
from runtime.weights.source import ShapeGroup, from_module
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.routing.test_shards import PROVENANCE, a_document, a_topology

Directory = Callable[[str], Path]


def refused(model: Any, *args: Any, **options: Any) -> str:
    """What `load` says; it must be one line, and a model in memory must be left as it was."""
    before = {name: id(p) for name, p in model.named_parameters()} if is_module(model) else {}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        runtime.load(model, *args, **options)
    if is_module(model):
        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert "expertflow" not in model.__dict__
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 700
    return message


def is_module(model: Any) -> bool:
    return isinstance(model, nn.Module)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("memory", "parsed"),
    [
        (0.25, 0.25),
        ("0.25", 0.25),
        (1.0, 1.0),
        ("1", 1.0),
        ("1e-2", 0.01),
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        ("500MB", 500_000_000),
        (" 1.5KB ", 1500),
        ("3T", 3 * 10**12),
        ("1B", 1),
        ("4096", 4096),
        (4096, 4096),
        (4096.0, 4096),
        (np.int64(4096), 4096),
    ],
)
def test_memory_is_a_fraction_or_bytes(memory: Any, parsed: float) -> None:
    assert parse_memory(memory) == parsed
    assert isinstance(parse_memory(memory), float) == (parsed <= 1 and memory != "1B")


@pytest.mark.parametrize(
    "memory",
    [0, 0.0, -1, -0.5, 1.5, float("nan"), float("inf"), True, None, [1], "", "much", "25%", "-1GB",
     "0", "0GiB", "1.2.3GB", ".", "1e999", "1e999GB", "2 GiB of it", "GiB", "0.0000001KB"],
)  # fmt: skip
def test_memory_that_is_neither_is_refused_with_an_example(memory: Any) -> None:
    with pytest.raises(ValueError, match=r"memory=.* is neither a fraction .* like '2GiB'"):
        parse_memory(memory)


@pytest.mark.parametrize(
    ("memory", "question"),
    [
        (1, "did you mean 1.0 (all experts) or '1GiB' (a size)?"),
        (25, "did you mean 0.25 (25 % of the experts) or '25GiB' (a size)?"),
        ("25", "did you mean 0.25 (25 % of the experts) or '25GiB' (a size)?"),
        (512, "did you mean '512MiB' or '512GiB' (a size)?"),
    ],
)
def test_a_number_that_lacks_its_unit_is_asked_about(memory: Any, question: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        parse_memory(memory)
    assert str(caught.value) == f"memory={memory!r} would be so many bytes: {question}"


@pytest.mark.parametrize(("memory", "slots"), [(1.0, 32), (0.5, 16), (0.26, 8), (0.0625, 2)])
def test_a_fraction_counts_experts(memory: float, slots: int) -> None:
    model: Any = runtime.load(tiny_model("olmoe"), memory=memory)
    assert model.expertflow.stats().num_slots == slots
    sizes = [len(pool.arena.tensors["down_proj"]) for pool in model.expertflow._backend.pools]
    assert sizes == [slots] * 4


def test_bytes_pay_for_the_other_weights_first() -> None:
    source = from_module(tiny_model("olmoe"), None)
    one_expert = expert_bytes(source.store.specs(0))
    for num_slots in (2, 9, 32):
        exact = source.fixed_bytes + num_slots * one_expert
        assert slot_budget(exact, source).slots() == [num_slots]
        assert slot_budget(exact + one_expert - 1, source).slots() == [num_slots]
    assert slot_budget(1 << 40, source).slots() == [32], "never more slots than experts"


def test_the_other_weights_are_counted_from_a_directory_as_from_memory(
    tiny_directory: Directory,
) -> None:
    model: Any = runtime.load(tiny_directory("olmoe"), memory=0.5)
    assert model.expertflow._backend.pools[0].arena.num_slots == 16
    in_memory = from_module(tiny_model("olmoe"), None).fixed_bytes
    others = (p for p in model.parameters() if not isinstance(p, Placeholder))
    held = sum(p.numel() * p.element_size() for p in others)
    assert held == in_memory


class Shapes(NamedTuple):
    """As much of a `Source` as a budget looks at."""

    layers: list[MoELayer]
    groups: list[ShapeGroup]
    fixed_bytes: int


@st.composite
def sources(draw: st.DrawFn) -> Shapes:
    layers: list[MoELayer] = []
    groups: list[ShapeGroup] = []
    for width in range(1, draw(st.integers(1, 3)) + 1):
        specs = {"w": Spec((draw(st.integers(1, 5_000_000)), width), torch.bfloat16)}
        num_layers, num_experts = draw(st.integers(1, 40)), draw(st.integers(1, 300))
        top_k = draw(st.integers(1, num_experts))
        layer = MoELayer("", nn.Module(), "fused", "decoder", num_experts, top_k)
        groups.append(ShapeGroup(specs, list(range(len(layers), len(layers) + num_layers))))
        layers += [layer] * num_layers
    return Shapes(layers, groups, draw(st.integers(0, 1 << 40)))


@given(sources(), st.sampled_from([1e-9, "1B"]))
def test_a_budget_that_is_too_small_is_told_two_that_suffice(
    source: Any, too_little: float | str
) -> None:
    with pytest.raises(
        ValueError, match=r"a token needs \d+ in one layer; give at least"
    ) as caught:
        slot_budget(parse_memory(too_little), source)
    advice = str(caught.value).partition("give at least ")[2]
    fraction, _, size = advice.partition(" (a fraction of the experts) or ")
    for enough in (fraction, size):
        memory = parse_memory(enough if enough == size else float(enough))
        slots = slot_budget(memory, source).slots()
        for group, num_slots in zip(source.groups, slots, strict=True):
            assert num_slots >= max(source.layers[index].top_k for index in group.layers)


@given(sources(), st.floats(0.01, 1), st.integers(0, 1 << 42))
def test_slots_never_cost_more_than_the_budget(source: Any, share: float, size: int) -> None:
    for memory in (share, size):
        try:
            slots = slot_budget(memory, source).slots()
        except ValueError:
            continue
        bytes_of = [expert_bytes(group.specs) for group in source.groups]
        used = sum(n * b for n, b in zip(slots, bytes_of, strict=True))
        experts = sum(
            len(group.layers) * source.layers[group.layers[0]].num_experts * b
            for group, b in zip(source.groups, bytes_of, strict=True)
        )
        allowed = experts * share if isinstance(memory, float) else memory - source.fixed_bytes
        assert used <= allowed * (1 + 1e-9)


@pytest.mark.parametrize("memory", [0.03, "1KB", "1B"])
def test_a_budget_below_one_layers_top_k_is_refused(memory: Any) -> None:
    message = refused(tiny_model("olmoe"), memory=memory)
    assert "a token needs 2 in one layer; give at least 0.0625" in message
    assert runtime.load(tiny_model("olmoe"), memory=0.0625).expertflow.stats().num_slots == 2


# ---------------------------------------------------------------------- models


def test_a_model_without_moe_layers_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert "LlamaForCausalLM has no MoE layers" in refused(model)
    model.save_pretrained(tmp_path)
    assert "LlamaForCausalLM has no MoE layers" in refused(tmp_path)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert f"there is no model directory {tmp_path}/nowhere" in refused(tmp_path / "nowhere")
    assert "there is no model directory ./nowhere" in refused("./nowhere")


def test_an_id_that_the_hub_does_not_hand_out_is_refused() -> None:
    """The tests run offline."""
    message = refused("nobody/no-such-model")
    assert "nobody/no-such-model is neither a directory nor a model the hub hands out" in message


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    assert "is not a model directory: it has no config.json" in refused(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    (directory / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(directory)


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", "{}", '{"model_type": "no_such_type"}', '{"model_type": "olmoe"}',
     '{"model_type": "olmoe", "architectures": ["NoSuchModel"]}'],
)  # fmt: skip
def test_a_config_that_cannot_be_used_is_refused_by_its_name(tmp_path: Path, config: str) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    (directory / "config.json").write_text(config)
    assert f"{directory / 'config.json'}" in refused(directory)


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    (directory / "tokenizer.json").write_text("{")
    assert f"the tokenizer in {directory} cannot be used" in refused(directory)


def test_a_directory_without_a_tokenizer_can_be_loaded(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)  # type: ignore[operator]
    assert runtime.load(tmp_path).expertflow.topology.tokenizer is None


def test_a_model_that_is_offloaded_already_is_refused() -> None:
    model = runtime.load(tiny_model("olmoe"))
    with pytest.raises(ValueError, match=r"offloaded already; call model\.expertflow\.detach"):
        runtime.load(model)
    model.expertflow.check_integrity()


@pytest.mark.parametrize("device", ["nonsense", "cuda" if not torch.cuda.is_available() else "x"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    assert f"device='{device}'" in refused(tiny_model("olmoe"), device=device)


@pytest.mark.parametrize("device", [0, True, 1.5])
def test_a_device_number_is_a_gpu_or_refused_never_the_cpu(device: Any) -> None:
    assert f"device={device!r}" in refused(tiny_model("olmoe"), device=device).replace("'", "")


@pytest.mark.parametrize(
    "options", [{"context": 4096}, {"batch": 1}, {"prefetch": False}, {"compile": True}]
)
def test_options_of_captured_steps_are_reported_on_a_cpu(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.warns(UserWarning, match=rf"{name}= shape.* on a GPU; on cpu they change nothing"):
        model = runtime.load(tiny_model("olmoe"), memory=0.5, **options)
    assert model.expertflow.decode_path == "the model is not on a CUDA device"


@pytest.mark.parametrize("options", [{"context": 0}, {"batch": 1.5}, {"prefetch": "sometimes"}])
def test_options_of_captured_steps_are_checked_on_a_cpu_too(options: dict[str, Any]) -> None:
    (name,) = options
    assert refused(tiny_model("olmoe"), **options).startswith(f"{name}=")


def test_room_beyond_a_gpus_memory_is_refused_on_a_cpu() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(
        ValueError, match=r"spill_tokens=64 is room beyond a GPU's memory; on a CPU"
    ):
        runtime.load(model, device="cpu", spill_tokens=64)


@pytest.mark.parametrize("dtype", ["float99", "int8"])
def test_a_number_format_that_is_none_is_refused(dtype: str, tiny_directory: Directory) -> None:
    assert "dtype" in refused(tiny_directory("olmoe"), dtype=dtype)


def test_the_number_format_can_be_chosen(tiny_directory: Directory) -> None:
    model: Any = runtime.load(tiny_directory("olmoe"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.expertflow._backend.pools[0].arena.tensors["down_proj"].dtype == torch.bfloat16


# ---------------------------------------------------------------------- policies


def test_an_unknown_policy_is_refused_with_those_there_are() -> None:
    message = refused(tiny_model("olmoe"), policy="fifo")
    assert (
        message == "policy='fifo' is not one of "
        "lru, lfu, class-lru, lfru, reuse, hot-set, predicted, belady"
    )


def test_predicted_without_a_predictor_is_refused() -> None:
    assert "needs a predictor" in refused(tiny_model("olmoe"), policy="predicted")


def test_belady_without_a_replay_is_refused() -> None:
    assert "needs replay=" in refused(tiny_model("olmoe"), policy="belady")


def test_belady_from_another_models_trace_is_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, a_topology(), provenance=PROVENANCE) as writer:
        writer.add({"decoder": a_document(0)})
    message = refused(tiny_model("olmoe"), policy="belady", replay=tmp_path)
    assert "the model is for olmoe" in message and f"the trace {tmp_path} is for" in message


def test_belady_from_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    message = refused(tiny_model("olmoe"), policy="belady", replay=tmp_path)
    assert f"{tmp_path} is not a trace" in message


def test_belady_of_an_encoder_decoder_trace_is_refused(tmp_path: Path) -> None:
    model = tiny_model("switch_transformers")
    TraceWriter(tmp_path, topology_of(model), provenance=PROVENANCE).close()
    assert "decoder-only" in refused(model, policy="belady", replay=tmp_path)


def test_a_predictor_makes_predicted_the_default_and_reuse_is_it_without(
    predictor: Path,
) -> None:
    assert runtime.load(tiny_model("olmoe"), predictor).expertflow.stats().policy == "predicted"
    assert runtime.load(tiny_model("olmoe")).expertflow.stats().policy == "reuse"


# ---------------------------------------------------------------------- predictors


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "predictor.onnx"
    return write_predictor(path, topology_of(tiny_model("olmoe"), tiny_tokenizer()))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "switch_transformers"])
def test_a_predictor_of_another_model_is_refused_by_both_names(kind: str, predictor: Path) -> None:
    message = refused(tiny_model(kind), predictor)
    assert f"the model is for {kind}" in message and f"the predictor {predictor} is for" in message


def test_a_predictor_of_another_tokenizer_is_refused_by_both_names(predictor: Path) -> None:
    other = tiny_tokenizer(vocab_size=250)
    message = refused(tiny_model("olmoe"), predictor, tokenizer=other)
    assert f"the model and the predictor {predictor} were made with different token" in message
    runtime.load(tiny_model("olmoe"), predictor, tokenizer=tiny_tokenizer())


def test_a_directorys_own_tokenizer_is_compared(tmp_path: Path, predictor: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    runtime.load(directory, predictor)
    tiny_tokenizer(vocab_size=250).save_pretrained(directory)
    assert "different tokenizers" in refused(directory, predictor)


def test_a_predictor_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "predictor.onnx", tmp_path):
        assert f"there is no predictor at {path}" in refused(tiny_model("olmoe"), path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_truncated_predictor_is_refused(tmp_path: Path, predictor: Path, keep: float) -> None:
    path, data = tmp_path / "cut.onnx", predictor.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    assert f"{path}" in refused(tiny_model("olmoe"), path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictor.onnx"
    path.write_text("not a graph")
    assert f"{path} is not a readable ONNX file" in refused(tiny_model("olmoe"), path)


def without_metadata(path: Path) -> None:
    import onnx

    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)


def test_an_onnx_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    path = write_predictor(tmp_path / "other.onnx", topology_of(tiny_model("olmoe")))
    without_metadata(path)
    message = refused(tiny_model("olmoe"), path)
    assert "is an ONNX file, but not one that predictor.export wrote" in message


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2}, {"topology": None}, {"topology": {}}, {"stack": "encoder"}, {"window": None},
        {"window": 0}, {"horizon": "x"}, {"horizon": 0}, {"blocks": None},
    ],
)  # fmt: skip
def test_damaged_predictor_metadata_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    topology = topology_of(tiny_model("olmoe"))
    good = write_predictor(tmp_path / "good.onnx", topology)
    metadata = json.dumps(metadata_of(good) | change)
    path = write_predictor(tmp_path / "bad.onnx", topology, metadata=metadata)
    assert f"{path} has damaged predictor metadata" in refused(tiny_model("olmoe"), path)


@pytest.mark.parametrize("metadata", ["", "{", "[]", "3", "{}"])
def test_predictor_metadata_of_another_form_is_refused(tmp_path: Path, metadata: str) -> None:
    topology = topology_of(tiny_model("olmoe"))
    path = write_predictor(tmp_path / "bad.onnx", topology, metadata=metadata)
    assert f"{path} has damaged predictor metadata" in refused(tiny_model("olmoe"), path)


def metadata_of(path: Path) -> dict[str, Any]:
    import onnx

    entry = next(e for e in onnx.load(path).metadata_props if e.key == "expertflow")
    return dict(json.loads(entry.value))


@pytest.mark.parametrize("cache", [True, False])
def test_a_predictor_that_lacks_inputs_is_refused_by_their_names(
    tmp_path: Path, cache: bool
) -> None:
    topology = topology_of(tiny_model("olmoe"))
    names = ["routes", "past_positions"] if cache else ["prompt_lengths"]
    path = write_predictor(tmp_path / "lacks.onnx", topology, cache=cache, without=names)
    message = refused(tiny_model("olmoe"), path)
    assert f"{path} lacks the predictor inputs or outputs {sorted(names)}" in message


def test_a_predictor_that_lacks_an_output_is_refused_by_its_name(tmp_path: Path) -> None:
    topology = topology_of(tiny_model("olmoe"))
    path = write_predictor(tmp_path / "lacks.onnx", topology, without=["horizon"])
    assert "lacks the predictor inputs or outputs ['horizon']" in refused(tiny_model("olmoe"), path)
