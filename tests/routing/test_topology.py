"""routing.topology: a model's topology, its JSON form, and matching two topologies."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from routing.inspect_model import tokenizer_fingerprint, topology_of
from routing.topology import Layer, Stack, Topology
from tests.helpers.tiny import KINDS, tiny_model, tiny_tokenizer

layers = st.lists(
    st.builds(Layer, st.text(max_size=8), st.integers(1, 999), st.integers(1, 99)),
    min_size=1,
    max_size=5,
).map(tuple)
topologies = st.builds(
    Topology,
    model_type=st.text(max_size=8),
    vocab_size=st.integers(1, 1 << 20),
    stacks=st.lists(
        st.builds(Stack, name=st.sampled_from(["encoder", "decoder"]), layers=layers),
        min_size=1,
        max_size=2,
    ).map(tuple),
    model=st.text("0123456789abcdef", min_size=16, max_size=16),
    tokenizer=st.none() | st.text("0123456789abcdef", min_size=16, max_size=16),
)


@given(topologies)
def test_a_topology_survives_json(topology: Topology) -> None:
    assert Topology.from_json(json.loads(json.dumps(topology.to_json()))) == topology


@pytest.mark.parametrize(
    ("kind", "stacks"),
    [
        ("olmoe", ["decoder 4 x 8, top-2"]),
        ("mixtral", ["decoder 3 x 8, top-2"]),
        ("qwen3_moe", ["decoder 3 x 8, top-2"]),
        ("switch_transformers", ["encoder 2 x 8, top-1", "decoder 2 x 8, top-1"]),
    ],
)
def test_the_topology_counts_each_stacks_layers_and_experts(kind: str, stacks: list[str]) -> None:
    topology = topology_of(tiny_model(kind))
    assert [str(stack) for stack in topology.stacks] == stacks
    assert (topology.model_type, topology.vocab_size) == (kind, 256)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_named_by_their_experts_module(kind: str) -> None:
    model = tiny_model(kind)
    for stack in topology_of(model).stacks:
        for layer in stack.layers:
            assert model.get_submodule(layer.name).num_experts == layer.num_experts


def test_the_largest_layer_gives_a_stack_its_experts_and_top_k() -> None:
    stack = Stack(name="decoder", layers=(Layer("a", 4, 3), Layer("b", 16, 1)))
    assert (stack.num_layers, stack.num_experts, stack.top_k) == (2, 16, 3)


def test_a_model_on_the_meta_device_has_the_topology_of_the_real_one() -> None:
    real = topology_of(tiny_model("olmoe"))
    with torch.device("meta"):
        assert topology_of(tiny_model("olmoe")) == real


def test_weights_and_tokenizer_do_not_change_the_models_fingerprint() -> None:
    bare = topology_of(tiny_model("olmoe"))
    other = topology_of(tiny_model("olmoe", seed=1), tiny_tokenizer())
    assert bare.model == other.model
    bare.require_match(other, ours="a", theirs="b")


@pytest.mark.parametrize(
    "change",
    [{"num_experts": 4}, {"num_experts_per_tok": 4}, {"num_hidden_layers": 2}, {"vocab_size": 300}],
)
def test_models_of_another_shape_do_not_match(change: dict[str, int]) -> None:
    ours, theirs = topology_of(tiny_model("olmoe")), topology_of(tiny_model("olmoe", **change))
    with pytest.raises(ValueError, match=r"the trace is for olmoe .*the model is for olmoe"):
        ours.require_match(theirs, ours="the trace", theirs="the model")


def test_tokenizers_of_another_vocabulary_do_not_match() -> None:
    model = tiny_model("olmoe")
    ours = topology_of(model, tiny_tokenizer())
    theirs = topology_of(model, tiny_tokenizer(vocab_size=250))
    with pytest.raises(ValueError, match="the trace and the model were made with different token"):
        ours.require_match(theirs, ours="the trace", theirs="the model")
    ours.require_match(replace(theirs, tokenizer=None), ours="the trace", theirs="the model")


def test_the_tokenizers_fingerprint_is_its_vocabulary_alone() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    other.padding_side = "right"
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
    other.add_tokens(["<new>"])
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)


def test_a_model_without_moe_layers_is_refused_by_its_class() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layers"):
        topology_of(LlamaForCausalLM(config))


def test_a_missing_stack_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ValueError, match="no 'encoder' MoE stack; it has: decoder"):
        topology_of(tiny_model("olmoe")).stack("encoder")


@pytest.mark.parametrize("field", ["model_type", "vocab_size", "stacks", "model", "tokenizer"])
def test_json_that_lacks_a_field_is_refused_by_its_name(field: str) -> None:
    data = topology_of(tiny_model("olmoe")).to_json()
    del data[field]
    with pytest.raises(ValueError, match=f"not a routing topology: KeyError.'{field}'"):
        Topology.from_json(data)


@pytest.mark.parametrize("data", [None, [], "text", {"stacks": [1]}, {"stacks": {"name": "x"}}])
def test_json_of_another_form_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="not a routing topology"):
        Topology.from_json(data)
