"""A trace of a tiny model that lies beside it, with texts that try to be more than text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from routing.inspect_model import topology_of
from routing.shards import GENERATED, PROMPT, Document, stored_experts
from routing.topology import Stack, Topology
from routing.writer import TraceWriter
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.tiny import save_tiny, tiny_model, tiny_tokenizer

EVIL = (
    "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'"
    "</script><!-- <b>x</b>"
)
STORY = "first line\nsécond liné, 你好 "
"""Its accents and its Chinese are characters of several tokens."""
PROMPT_TOKENS = 9


class Traced(NamedTuple):
    """The files of a trace whose documents are EVIL, STORY with a prompt, and a long one."""

    trace: Path
    model: Path
    predictor: Path
    topology: Topology


def a_document(token_ids: list[int], num_prompt: int, label: str, stack: Stack) -> Document:
    """Random routes, of which the ones of neighbours have much in common."""
    random = np.random.default_rng(len(token_ids))
    shape = len(token_ids), stack.num_layers, stack.num_experts
    walk_TLE = np.cumsum(random.normal(size=shape), axis=0)
    experts_TLK = np.argsort(walk_TLE, axis=-1)[..., -stack.top_k :]
    return Document(
        np.array(token_ids, np.int32),
        stored_experts(experts_TLK, stack.num_experts),
        np.where(np.arange(len(token_ids)) < num_prompt, PROMPT, GENERATED).astype(np.uint8),
        label,
    )


@pytest.fixture(scope="package")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    folder = tmp_path_factory.mktemp("replay")
    tokenizer = tiny_tokenizer()
    topology = topology_of(tiny_model("olmoe"), tokenizer)
    model = save_tiny(folder / "model", "olmoe")
    stack = topology.stack()
    with TraceWriter(folder / "trace", topology, provenance={"model": str(model)}) as writer:
        for text, num_prompt, label in [
            (EVIL, 10_000, "<b>evil</b>"),
            (STORY, PROMPT_TOKENS, "story"),
            ("abc " * 20, 10_000, "long"),
        ]:
            token_ids = tokenizer(text)["input_ids"]
            writer.add({"decoder": a_document(token_ids, num_prompt, label, stack)})
    predictor = write_predictor(folder / "predictor.onnx", topology)
    return Traced(folder / "trace", model, predictor, topology)
