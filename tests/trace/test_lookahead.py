"""Look-ahead by early gates: the recorded rankings, and their place in a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from routing.blocks import Block, Ranking, find_blocks
from routing.layers import find_moe_layers, read_routes
from routing.lookahead import LookAhead, recall_ahead
from routing.shards import MANIFEST, TraceReader, signed_experts
from tests.helpers.architectures import architecture_model, is_known
from tests.helpers.tiny import save_tiny
from tests.helpers.tracing import Directory, assert_same_documents, trace
from tests.routing.test_shards import PROVENANCE, a_document, a_topology

TOKENS = torch.arange(2, 26).view(2, 12)
ROUTERS = ["olmoe", "gpt_oss", "deepseek_v3", "dbrx", "llama4_text", "jetmoe", "granitemoe"]
"""Softmax, biased, grouped with a correction, logits only, dense calls, sorted pairs, packed."""


def asked_at_its_own_layer(model: Any) -> tuple[list[Block], dict[str, Any], dict[str, Ranking]]:
    """The routes of each experts call, and the ranking of the same router input by `rank`."""
    blocks, ran, said = find_blocks(model), {}, {}
    for block in blocks:
        name, layer = block.layer.name, block.layer

        def runs(_: Any, args: Any, kwargs: Any, name: str = name, layer: Any = layer) -> None:
            ran[name] = read_routes(layer, args, kwargs)

        def enters(_: Any, args: Any, kwargs: Any, name: str = name, block: Any = block) -> None:
            said[name] = block.rank(args, kwargs, block.hidden(args, kwargs), 4)

        layer.module.register_forward_pre_hook(runs, with_kwargs=True)
        block.module.register_forward_pre_hook(enters, with_kwargs=True, prepend=True)
    with torch.inference_mode():
        model(input_ids=TOKENS)
    return blocks, ran, said


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if is_known(kind)])
def test_a_router_asked_early_ranks_as_it_routes_in_the_model(kind: str) -> None:
    model: Any = architecture_model(kind)
    with torch.inference_mode():
        expected = model(input_ids=TOKENS).logits
    blocks, ran, said = asked_at_its_own_layer(model)
    for block in blocks:
        routes, ranking = ran[block.layer.name], said[block.layer.name]
        assert ranking.experts_NM.shape == (TOKENS.numel(), 4)
        first = ranking.experts_NM[:, : routes.experts_TK.shape[1]]
        assert torch.equal(first.sort(-1).values, routes.experts_TK.sort(-1).values)
        for row, named in zip(ranking.experts_NM, ranking.scores_NM > -torch.inf, strict=True):
            assert len(row[named].unique()) == named.sum()
    with torch.inference_mode():
        assert torch.equal(model(input_ids=TOKENS).logits, expected)  # asking leaves no trace


@pytest.mark.parametrize("kind", ["gemma4_text", "zaya"])
def test_an_architecture_whose_router_input_cannot_be_read_is_refused_by_name(kind: str) -> None:
    if not is_known(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    with pytest.raises(ValueError, match=r"Gemma4|Zaya.*no look-ahead"):
        asked_at_its_own_layer(architecture_model(kind))


def early_answers(directory: Path, ids: list[int], depth: int) -> np.ndarray:
    """Top-2 ids [T, L, D, 2] of later gates on earlier router inputs; -1 beyond the last layer."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    blocks = [
        model.get_submodule(layer.name.rpartition(".")[0]) for layer in find_moe_layers(model)
    ]
    inputs: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.inference_mode():
        model(torch.tensor([ids]))
        answers = np.full((len(ids), len(blocks), depth, 2), -1)
        for source, hidden_TH in enumerate(inputs):
            for distance, block in enumerate(blocks[source + 1 : source + depth + 1]):
                chosen = (hidden_TH @ block.gate.weight.T).topk(2).indices
                answers[:, source, distance] = chosen.numpy()
    return answers


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("generate", [0, 4])
def test_a_trace_holds_the_rankings_of_later_gates_on_earlier_router_inputs(
    kind: str, generate: int, tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    documents = trace(tiny_directory(kind), data, tmp_path / "out", lookahead=2, generate=generate)
    for document in documents[:4]:
        ahead = document.lookahead["gate"]
        expected = early_answers(tiny_directory(kind), document.token_ids_T.tolist(), 2)
        there = expected[..., 0] >= 0
        assert np.array_equal(ahead.experts_TLDM[there][:, :2], expected[there])
        assert (ahead.scores_TLDM[there] > -np.inf).all()
        assert (ahead.scores_TLDM[~there] == -np.inf).all()
        assert (np.diff(ahead.scores_TLDM[there].astype(np.float32), axis=-1) <= 0).all()


def test_look_ahead_changes_nothing_else_in_a_trace(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    plain = trace(tiny_directory("olmoe"), data, tmp_path / "plain", weights=True)
    ahead = trace(tiny_directory("olmoe"), data, tmp_path / "a", weights=True, lookahead=9)
    assert_same_documents(plain, ahead)
    assert not any(document.lookahead for document in plain)
    assert TraceReader(tmp_path / "a").lookahead == {"gate": 9}
    assert ahead[0].lookahead["gate"].experts_TLDM.shape[1:] == (4, 9, 4)


def test_an_encoder_and_a_decoder_look_ahead_each_in_itself(tmp_path: Path, data: Path) -> None:
    model = save_tiny(
        tmp_path / "model", "switch_transformers", num_layers=4, num_sparse_encoder_layers=4
    )
    documents = trace(model, data, tmp_path / "out", generate=3, lookahead=1)
    encoders = list(TraceReader(tmp_path / "out", "encoder").documents())
    for document, num_layers in ((documents[0], 2), (encoders[0], 4)):
        scores_TLDM = document.lookahead["gate"].scores_TLDM
        assert scores_TLDM.shape[:3] == (len(document.token_ids_T), num_layers, 1)
        assert (
            (scores_TLDM[:, :, 0, 0] > -np.inf) == (np.arange(num_layers) < num_layers - 1)
        ).all()


def test_a_trace_is_not_resumed_with_another_look_ahead(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    trace(tiny_directory("olmoe"), data, tmp_path / "out", max_documents=3)
    with pytest.raises(ValueError, match="lookahead"):
        trace(tiny_directory("olmoe"), data, tmp_path / "out", max_documents=3, lookahead=1)


def test_a_trace_from_before_look_ahead_is_read_and_resumed(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    documents = trace(tiny_directory("olmoe"), data, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    del manifest["lookahead"], manifest["checksum"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    assert_same_documents(trace(tiny_directory("olmoe"), data, tmp_path / "out"), documents)


# ------------------------------------------------------------------------------ the format


def random_ahead(length: int, num_experts: int, seed: int, depth: int = 2) -> LookAhead:
    random = np.random.default_rng(seed)
    size = (length, 2, depth, num_experts)
    order = np.argsort(random.random(size), axis=-1)[..., :6]
    dtype = np.uint8 if num_experts <= 256 else np.uint16
    scores = -np.sort(random.random(order.shape)).astype(np.float16)
    return LookAhead(np.asfortranarray(order.astype(dtype)), scores)  # in any order of memory


@pytest.mark.parametrize("num_experts", [8, 256, 300])
def test_look_aheads_of_several_sources_are_read_back_as_written(
    num_experts: int, tmp_path: Path
) -> None:
    from routing.writer import TraceWriter

    written = [
        a_document(seed, 3 + seed, num_experts)._replace(
            lookahead={
                "gate": random_ahead(3 + seed, num_experts, seed),
                "mlp": random_ahead(3 + seed, num_experts, -seed % 99, depth=1),
            }
        )
        for seed in range(5)
    ]
    with TraceWriter(
        tmp_path, a_topology(num_experts), provenance=PROVENANCE, shard_tokens=10,
        lookahead={"gate": 2, "mlp": 1},
    ) as writer:  # fmt: skip
        for document in written:
            writer.add({"decoder": document})
    for read, document in zip(TraceReader(tmp_path).documents(), written, strict=True):
        assert read.lookahead.keys() == document.lookahead.keys()
        for name, ahead in document.lookahead.items():
            for ours, theirs in zip(read.lookahead[name], ahead, strict=True):
                assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def test_a_damaged_look_ahead_does_not_match_its_checksum(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    trace(tiny_directory("olmoe"), data, tmp_path / "out", lookahead=1)
    shard = next((tmp_path / "out").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    scores = TraceReader(tmp_path / "out").document(0).lookahead["gate"].scores_TLDM
    content[content.index(scores[:1, 0].tobytes())] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        TraceReader(tmp_path / "out", verify=True)


@given(st.integers(1, 8), st.integers(0, 99))
def test_recall_ahead_is_one_for_the_truth_and_falls_with_every_error(
    length: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    experts_TLK = np.argsort(random.random((length, 2, 8)), axis=-1)[..., :3]
    ahead = random_ahead(length, 8, seed, depth=1)
    right = ahead.experts_TLDM.copy()
    right[:, 0, 0, :3] = experts_TLK[:, 1]
    assert recall_ahead(LookAhead(right, ahead.scores_TLDM), experts_TLK) == [1.0]
    right[0, 0, 0, 0] = np.setdiff1d(np.arange(8), experts_TLK[0, 1])[0]
    worse = recall_ahead(LookAhead(right, ahead.scores_TLDM), experts_TLK)
    assert worse == pytest.approx([1 - 1 / (3 * length)])
    assert signed_experts(right, 8).min() >= 0
