"""The cache policies live, kind of text by kind of text, beside their simulation.

The model without offloading decodes a kind's documents first, token by token as if they were being
generated. Its routes are simulated: rules that do not run live (ARC, S3-FIFO ...), and Belady where
it is not asked for, have their rows from there, and every live row says what its simulation loads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cache.policies import LIVE_FREE_RULES

if TYPE_CHECKING:
    import torch

    from exports.comparison import Calls, RecordedRoutes
    from routing.predictor_file.reader import PredictorFile
    from routing.topology import Topology
    from runtime.simulation.trace_steps import TraceStep

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LiveKindsSettings:
    """Settings of live runs, most of which a simulation has too."""

    model: Path | None = None
    """Model directory: the rules run live in it, on --text instead of a trace."""
    text: Path | None = None
    """Folder with a KIND.txt for each kind; lines `<|endoftext|>` divide documents."""
    policies: list[str] = field(default_factory=lambda: [*LIVE_FREE_RULES, "predicted"])
    """Policies to run live; everything else is simulated on the same routes."""
    document_tokens: int = 200
    """Tokens to decode of each document at most, in live runs."""
    dtype: str = "auto"
    """Number format of the model; `auto` is the stored one."""
    predictor: Path | None = None
    """ONNX predictor; adds predicted reuse."""
    fit_trace: Path | None = None
    """Trace of other text; makes the hot set."""
    residency: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])
    """Cache sizes, as fractions of all experts."""
    kinds: list[str] = field(default_factory=list)
    """Kinds to run; all where none is named."""
    kind_tokens: int = 3_200
    """Tokens to run of each kind at most."""


@dataclass(frozen=True, kw_only=True)
class LiveKinds:
    """What runs on every kind of text.

    Raises ValueError if the predictor is of another model.
    """

    model: Any
    topology: Topology
    predictor: Path | None
    residency: Sequence[float]
    policies: Sequence[str]
    fit: Calls | None
    """Calls of other text, for the hot set."""

    def __post_init__(self) -> None:
        if (file := self._file) is not None:
            names = {"ours": "the model", "theirs": f"the predictor {self.predictor}"}
            self.topology.require_match(file.topology, **names)

    @cached_property
    def _file(self) -> PredictorFile | None:
        from routing.predictor_file.reader import open_predictor

        return None if self.predictor is None else open_predictor(self.predictor)

    def rows(self, texts: Sequence[torch.Tensor]) -> list[Row]:
        """The results on some documents (int64 [1, T]), by cache size and policy."""
        from exports.comparison import record_routes, teacher_forced
        from runtime.simulation.replay import simulate

        routes: RecordedRoutes = []
        with record_routes(self.model, routes):
            expected = teacher_forced(texts)(self.model)
        stack = self.topology.stack()
        steps = decoded_steps(texts, routes, stack.num_layers)
        results = simulate(
            steps,
            (stack.num_layers, stack.num_experts),
            residency=self.residency,
            predictor=self._file,
            fit=self.fit,
        )
        simulated = [
            {name: getattr(result, name) for name in ("policy", "residency", "slots")}
            | {"requests": result.requests, "loads": result.loads, "live": False}
            for result in results
        ]
        calls = [call for step in steps for call in step.calls()]
        return [self._live(row, texts, expected, calls) for row in simulated]

    def _live(
        self, row: Row, texts: Sequence[torch.Tensor], expected: list[list[int]], calls: Calls
    ) -> Row:
        """The live row in place of a simulated one, if its policy is to run live."""
        from exports.comparison import run_offloaded, teacher_forced

        if row["policy"] not in self.policies:
            return row
        live = run_offloaded(
            self.model,
            teacher_forced(texts),
            expected,
            predictor=self.predictor,
            policy=row["policy"],
            share=row["residency"],
            replay={"belady": calls, "hot-set": self.fit}.get(row["policy"]),
        )
        measured = {"slots": live.slots, "requests": live.requests, "loads": live.loads}
        more = {"live": True, "identical": live.identical, "simulated_loads": row["loads"]}
        return row | measured | more


def live_kinds(settings: LiveKindsSettings) -> Iterator[list[Row]]:
    """The rows of each kind, as its runs end."""
    import transformers

    from routing.inspect_model import topology_of
    from routing.pretrained import read_tokenizer
    from runtime.simulation.trace_steps import trace_calls

    assert settings.model is not None
    files, fit_trace = kind_files(settings), settings.fit_trace
    refuse_unready(settings)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = read_tokenizer(settings.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=settings.dtype, trust_remote_code=False
    ).eval()
    topology = topology_of(model, tokenizer)
    live = LiveKinds(
        model=model,
        topology=topology,
        predictor=settings.predictor,
        residency=settings.residency,
        policies=settings.policies,
        fit=None if fit_trace is None else trace_calls(fit_trace, topology, decode_all=True),
    )
    for file in files:
        texts = list(documents(file, tokenizer, settings.document_tokens, settings.kind_tokens))
        yield [{"kind": file.stem} | row for row in live.rows(texts)]
        print(f"{file.stem}: done", file=sys.stderr)


def kind_files(settings: LiveKindsSettings) -> list[Path]:
    """The text file of each kind. Raises ValueError if one is missing."""
    if settings.text is None:
        raise ValueError("live runs need text: give --text, a folder with a KIND.txt for each kind")
    files = {path.stem: path for path in sorted(settings.text.glob("*.txt"))}
    if not files:
        raise ValueError(f"there are no .txt files in {settings.text}")
    if unknown := sorted(set(settings.kinds) - set(files)):
        raise ValueError(f"{settings.text} has no text of the kind {', '.join(unknown)}")
    return [files[kind] for kind in settings.kinds or files]


def refuse_unready(settings: LiveKindsSettings) -> None:
    """Raise ValueError for a policy that does not exist, or lacks what it has to know."""
    from runtime.cache.policies import POLICIES

    if unknown := sorted(set(settings.policies) - set(POLICIES)):
        raise ValueError(f"{', '.join(unknown)} does not run live: take {', '.join(POLICIES)}")
    for policy, given, option in (
        ("predicted", settings.predictor, "--predictor"),
        ("hot-set", settings.fit_trace, "--fit_trace"),
    ):
        if policy in settings.policies and given is None:
            raise ValueError(f"the policy {policy} needs {option}, or leave it out of --policies")


def documents(
    file: Path, tokenizer: Any, document_tokens: int, kind_tokens: int
) -> Iterator[torch.Tensor]:
    """The token ids of a file's first documents, int64 [1, T], `kind_tokens` in all."""
    from exports.token_stream import read_documents

    for document in read_documents(file):
        length = min(document_tokens, kind_tokens)
        if length <= 0:
            return
        ids = tokenizer(document[: length * 16], return_tensors="pt").input_ids[:, :length]
        kind_tokens -= ids.shape[1]
        yield ids


def decoded_steps(
    texts: Sequence[torch.Tensor], routes: RecordedRoutes, num_layers: int
) -> list[TraceStep]:
    """The steps of texts that were decoded token by token, from their routes in order."""
    import numpy as np

    from runtime.simulation.trace_steps import TraceStep

    experts = [experts_TK for _, experts_TK in routes]
    experts_NLK = np.concatenate(experts).reshape(-1, num_layers, experts[0].shape[-1])
    places = [(text.numpy()[0], t) for text in texts for t in range(text.shape[1])]
    return [
        TraceStep(t == 0, ids_T[t : t + 1], np.array([t]), experts_LK[None])
        for (ids_T, t), experts_LK in zip(places, experts_NLK, strict=True)
    ]
