"""Traces as rows: nothing is lost, doubled or mixed up, and mistakes are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from predictor.networks.windows import Windows
from predictor.training.data import TraceData
from predictor.training.embedding import read_embedding
from routing.predictor_file.format import PADDING
from routing.shards import TraceReader, signed_experts
from routing.topology import NO_EXPERT
from routing.writer import TraceWriter
from tests.helpers.predicting import TOPOLOGY, VOCAB_SIZE, columns, random_document, write_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace") / "rules")


def data(*traces: Path, **options) -> TraceData:
    settings = {"window": 8, "horizon": 2, "row_tokens": 32, "batch_size": 4}
    return TraceData([str(trace) for trace in traces], **(settings | options))


def tokens_of(documents) -> list[tuple[int, bytes]]:
    return sorted(
        (int(token), signed_experts(experts_LK, 8).tobytes())
        for document in documents
        for token, experts_LK in zip(document.token_ids_T, document.experts_TLK, strict=True)
    )


def tokens_in(batches: list[Windows]) -> list[tuple[int, bytes]]:
    return sorted(
        (int(token), experts_LK.numpy().astype(np.int16).tobytes())
        for batch in batches
        for token, experts_LK in zip(
            batch.token_ids_BT[batch.valid_BT], batch.experts_BTLK[batch.valid_BT], strict=True
        )
    )


def segments(batch: Windows) -> list[Windows]:
    """Each part of a row that holds tokens of one document, as a row of its own."""
    found = []
    for row in range(len(batch.token_ids_BT)):
        ends = (~batch.continues_BT[row]).nonzero().flatten().tolist()
        starts = [0, *(end + 1 for end in ends[:-1])]
        for start, end in zip(starts, ends, strict=True):
            if batch.positions_BT[row, start] != PADDING:
                one = Windows(*(tensor[row : row + 1] for tensor in batch))
                found.append(columns(one, slice(start, end + 1)))
    return found


def test_validation_reads_every_token_of_its_split_once(trace):
    module = data(trace)
    assert tokens_in(list(module.val_dataloader())) == tokens_of(module.documents("val"))


def test_a_single_trace_needs_no_list(trace):
    alone, listed = TraceData(str(trace)), TraceData([str(trace)])
    assert alone.traces == listed.traces


def test_a_pass_of_training_drops_less_than_one_batch(trace):
    module = data(trace)
    seen = sum(int(batch.valid_BT.sum()) for batch in module.train_dataloader())
    total = int(module.documents("train").lengths.sum())
    assert total - 2 * 4 * 32 < seen <= total


def test_two_passes_cut_the_documents_elsewhere_and_the_seed_repeats_them(trace):
    def two_passes() -> list[list[Windows]]:
        loader = data(trace).train_dataloader()
        return [list(loader), list(loader)]

    first, second = two_passes()
    again = two_passes()[0]
    assert not torch.equal(first[0].token_ids_BT, second[0].token_ids_BT)
    assert all(
        torch.equal(a, b)
        for one, two in zip(first, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_every_split_holds_whole_documents_and_no_text_is_in_two(trace, tmp_path):
    generator = np.random.default_rng(5)
    repeated = random_document(generator, 30)
    with TraceWriter(tmp_path / "again", TOPOLOGY, provenance={}) as writer:
        for _ in range(5):
            writer.add({"decoder": repeated})
    module = data(trace, tmp_path / "again")
    texts = {
        split: [document.token_ids_T.tobytes() for document in module.documents(split)]
        for split in ("train", "val", "test")
    }
    assert sum(map(len, texts.values())) == len(TraceReader(trace)) + 5
    assert not set(texts["train"]) & set(texts["val"])
    assert sum(repeated.token_ids_T.tobytes() in split for split in texts.values()) == 1


def test_the_split_of_a_document_does_not_depend_on_what_else_is_traced(trace, tmp_path):
    alone = {d.token_ids_T.tobytes() for d in data(trace).documents("val")}
    other = write_trace(tmp_path / "other", num_documents=30, seed=9)
    together = {d.token_ids_T.tobytes() for d in data(other, trace).documents("val")}
    assert alone <= together


def test_documents_in_a_row_lie_more_than_a_window_apart(trace):
    steps = torch.cat(
        [
            batch.positions_BT.diff(dim=1)[batch.valid_BT[:, 1:] & batch.valid_BT[:, :-1]]
            for batch in data(trace).train_dataloader()
        ]
    )
    assert ((steps == 1) | (steps > 8)).all()
    assert (steps > 8).any()


def test_routes_are_those_of_the_predecessor_even_across_the_rows_edge(trace):
    module = data(trace)
    beginnings = {d.token_ids_T[:2].tobytes() for d in module.documents("val")}
    cut_parts = 0
    for batch in module.val_dataloader():
        for part in segments(batch):
            experts_TLK, routes_TLK = part.experts_BTLK[0], part.routes_BTLK[0]
            assert torch.equal(routes_TLK[1:], experts_TLK[:-1])
            if (routes_TLK[0] == NO_EXPERT).all():
                ids_T = part.token_ids_BT[0, :2].numpy().astype(np.int32)
                assert ids_T.tobytes() in beginnings
            else:
                cut_parts += 1
                assert routes_TLK[0, 0, 0] == experts_TLK[0, 1, 0]  # both from the token before
                assert torch.equal(routes_TLK[0, 2], experts_TLK[0, 2])  # both from the secret
    assert cut_parts


def test_tokens_that_were_dropped_by_capacity_have_no_target(tmp_path):
    document = random_document(np.random.default_rng(0), 40)
    document.experts_TLK[7, 1] = 255
    with TraceWriter(tmp_path / "trace", TOPOLOGY, provenance={}) as writer:
        writer.add({"decoder": document})
        writer.add({"decoder": random_document(np.random.default_rng(1), 40)})
    module = data(tmp_path / "trace", val_fraction=0.5, test_fraction=0.0)
    batches = [*module.train_dataloader(), *module.val_dataloader()]
    missing = sum(int((b.experts_BTLK[b.valid_BT] == NO_EXPERT).sum()) for b in batches)
    assert missing == 2


@pytest.mark.parametrize(("prompt", "expected"), [(6, 6), (10**9, 16)])
def test_the_prompt_is_the_traces_or_half_the_row(tmp_path, prompt, expected):
    generator = np.random.default_rng(3)
    with TraceWriter(tmp_path / "trace", TOPOLOGY, provenance={}) as writer:
        for _ in range(20):
            writer.add({"decoder": random_document(generator, 32, prompt)})
    batch = next(iter(data(tmp_path / "trace", val_fraction=0.4).val_dataloader()))
    assert batch.prompt_lengths_B.tolist() == [expected] * len(batch.prompt_lengths_B)


def test_evaluation_reads_only_as_many_tokens_as_asked(trace):
    few = data(trace, val_fraction=0.5, max_eval_tokens=100).documents("val")
    assert few.lengths.sum() - few.lengths.max() < 100 <= few.lengths.sum() + 79
    assert len(few) < len(data(trace, val_fraction=0.5).documents("val"))


def test_several_traces_of_one_model_are_one_data_set(trace, tmp_path):
    more = write_trace(tmp_path / "more", num_documents=60, seed=1)
    lengths = [
        sum(int(module.documents(s).lengths.sum()) for s in ("train", "val", "test"))
        for module in (
            data(*traces, val_fraction=0.3) for traces in ((trace,), (more,), (trace, more))
        )
    ]
    assert lengths[0] + lengths[1] == lengths[2]


def test_traces_of_two_models_are_refused(trace, tmp_path):
    other = write_trace(tmp_path / "other", topology=replace(TOPOLOGY, model="fedcba9876543210"))
    with pytest.raises(ValueError, match=r"rules.*other"):
        data(trace, other)


def test_a_trace_without_documents_is_refused(tmp_path):
    with TraceWriter(tmp_path / "empty", TOPOLOGY, provenance={}):
        pass
    with pytest.raises(ValueError, match=r"empty holds no documents"):
        data(tmp_path / "empty")


def test_too_few_documents_to_validate_are_refused(tmp_path):
    write_trace(tmp_path / "one", num_documents=1)
    with pytest.raises(ValueError, match=r"none for the (val|train) split.*val_fraction"):
        data(tmp_path / "one")


def test_fractions_that_leave_no_training_are_refused(trace):
    with pytest.raises(ValueError, match="leave no training"):
        data(trace, val_fraction=0.6, test_fraction=0.5)


def test_a_trace_smaller_than_one_batch_still_trains(tmp_path):
    module = data(write_trace(tmp_path / "few", num_documents=8), val_fraction=0.4, batch_size=64)
    (batch,) = module.train_dataloader()
    assert int(batch.valid_BT.sum()) == module.documents("train").lengths.sum()


@pytest.mark.parametrize("row_tokens", [7, 32, 5000])
def test_a_pass_has_as_many_batches_as_its_length_says(trace, row_tokens):
    module = data(trace, row_tokens=row_tokens)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        assert len(list(loader)) == len(loader)


def test_the_embedding_is_read_from_a_model_directory(tmp_path):
    embedding = torch.randn(VOCAB_SIZE, 5).bfloat16()
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": torch.zeros(2, 2)}
    save_file(weights, tmp_path / "model.safetensors")
    torch.testing.assert_close(read_embedding(tmp_path), embedding)


def test_the_embedding_is_found_in_a_model_of_several_files(tmp_path):
    embedding = torch.randn(VOCAB_SIZE, 5)
    save_file({"model.embed_tokens.weight": embedding}, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"x": "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}}'
    )
    torch.testing.assert_close(read_embedding(tmp_path), embedding)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no b\.safetensors"):
        read_embedding(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        read_embedding(tmp_path)


@pytest.mark.parametrize("content", [None, b"not safetensors"])
def test_a_directory_without_a_readable_model_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_embedding(tmp_path)


def test_a_model_without_a_token_embedding_is_refused(tmp_path):
    save_file({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no token embedding"):
        read_embedding(tmp_path)


def test_the_number_of_workers_changes_no_batch_of_any_pass(trace):
    alone, shared = data(trace).train_dataloader(), data(trace, num_workers=2).train_dataloader()
    passes = [[sorted(batch.token_ids_BT.sum(1).tolist()) for batch in alone] for _ in range(2)]
    assert passes[0] != passes[1], "every pass cuts the documents elsewhere"
    for expected in passes:
        found = [sorted(batch.token_ids_BT.sum(1).tolist()) for batch in shared]
        assert sorted(found) == sorted(expected)
