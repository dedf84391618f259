"""What ExpertFlow makes of one architecture: discovered, traced, exact, generating, loaded lazily.

`check` is what the compatibility tests and the table in docs/compatibility.md are made of.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import runtime
from routing.inspect_model import topology_of
from routing.layers import MoELayer, find_moe_layers
from runtime.weights.source import from_path
from runtime.weights.store import expert_parameters, expert_part
from tests.helpers.architectures import architecture_model
from tests.helpers.capturing import captured, served
from tests.helpers.quantised.compatibility import check_encodings
from trace.recorder import Recorder
from trace.runner import Runner
from trace.sources import Prompt

TOLERANCE = 1e-5
NOT_APPLICABLE = "-"


class Verdict(NamedTuple):
    """One row of the table. A cell is "yes", NOT_APPLICABLE, or what went wrong."""

    architecture: str
    experts: str
    layers: str
    traced: str
    parity: str
    generates: str
    lazy: str
    difference: float
    """The largest difference of a logit, over all cache sizes, in memory and from a directory."""
    encodings: dict[str, str] = {}  # noqa: RUF012 - never changed
    """A cell for each encoding of a quantised checkpoint."""
    captured: str = ""
    """Empty where it was not tried."""
    served: str = ""

    @property
    def is_exact(self) -> bool:
        """Parity at every cache size: what the project promises."""
        return self.parity == "yes" and self.difference <= TOLERANCE


def check(kind: str, *, whole: bool = False) -> Verdict:
    """Try a tiny random model of the architecture `kind`.

    whole: also quantised checkpoints, captured steps and serving.
    """
    model: Any = architecture_model(kind)
    layers = find_moe_layers(model)
    expected = logits(model)
    seen: list[float] = []
    return Verdict(
        architecture=kind,
        experts=f"{type(layers[0].module).__name__} ({layers[0].kind})",
        layers="; ".join(map(str, topology_of(model).stacks)),
        traced=_attempt(_trace, model, layers),
        parity=_attempt(_parity, kind, expected, seen),
        generates=_attempt(_generate, kind, model),
        lazy=_attempt(_lazy, model, layers, expected, seen),
        difference=max(seen, default=0.0),
        encodings=check_encodings(kind, logits) if whole else {},
        captured=_attempt(_generated, partial(captured, long=True), model, kind) if whole else "",
        served=_attempt(_generated, served, model, kind) if whole else "",
    )


def _attempt(what: Callable[..., str], *args: Any) -> str:
    try:
        return what(*args)
    except (ValueError, AssertionError) as error:
        return f"no: {' '.join(str(error).split()) or type(error).__name__:.200}"


def logits(model: Any) -> Tensor:
    """Of two sequences; seeded, since one architecture starts from noise."""
    token_ids = torch.arange(2, 26).view(2, 12)
    decoder = {"decoder_input_ids": token_ids[:, :5]} if model.config.is_encoder_decoder else {}
    torch.manual_seed(0)
    with torch.inference_mode():
        return model(input_ids=token_ids, **decoder)["logits"]


def _trace(model: Any, layers: list[MoELayer]) -> str:
    prompts = [Prompt(0, list(range(2, 14)), "a", 0), Prompt(1, list(range(30, 37)), "b", 0)]
    generate = 3 if model.config.is_encoder_decoder else 0
    with Recorder(model) as recorder:
        documents = Runner(model, generate=generate, weights=True).run(recorder, prompts)
    assert len(documents) == 2
    stacks = dict.fromkeys(layer.stack for layer in layers)
    for document in documents:
        assert set(document) == set(stacks)
        for stack, part in document.items():
            numbers = [layer.num_experts for layer in layers if layer.stack == stack]
            assert part.experts_TLK.shape[1] == len(numbers)
            used = part.experts_TLK[part.experts_TLK < max(numbers)]
            assert len(used) >= len(part.token_ids_T), "most tokens have an expert"
    return "yes"


def sizes(model: Any) -> list[float]:
    """Three fractions of the experts: all, two fifths, and the fewest that one layer needs."""
    layers = find_moe_layers(model)
    top_k, total = max(x.top_k for x in layers), sum(x.num_experts for x in layers)
    return [1.0, 0.4, len({_shape(layer) for layer in layers}) * top_k / total]


def _shape(layer: MoELayer) -> str:
    names = layer.container.names(layer.module)
    parts = expert_part(layer, names, expert_parameters(layer), 0)
    return str({name: tuple(part.shape) for name, part in parts.items()})


def _parity(kind: str, expected: Tensor, seen: list[float]) -> str:
    for size in sizes(architecture_model(kind)):
        model: Any = runtime.load(architecture_model(kind), memory=size)
        seen.append(_difference(model, expected))
        model.expertflow.check_integrity()
    return "yes"


def _difference(model: Any, expected: Tensor) -> float:
    difference = float((logits(model) - expected).abs().max())
    assert model.expertflow.stats().misses > 0, "no expert ran out of a slot"
    assert difference <= TOLERANCE, f"logits differ by {difference:.1e}"
    return difference


def _generate(kind: str, model: Any) -> str:
    if not model.can_generate():
        return NOT_APPLICABLE
    try:
        expected = _greedy(model)
    except Exception:  # whatever it is, it is not ours: the stock model fails
        return NOT_APPLICABLE
    offloaded = runtime.load(architecture_model(kind), memory=0.4)
    assert torch.equal(_greedy(offloaded), expected), "other tokens"
    return "yes"


def _generated(check: Callable[[str], str], model: Any, kind: str) -> str:
    """What `check` says of a model that generates text."""
    try:
        _greedy(model)
    except Exception:  # whatever it is, it is not ours: the stock model fails
        return NOT_APPLICABLE
    return check(kind)


def _greedy(model: Any) -> Tensor:
    torch.manual_seed(0)
    token_ids = torch.arange(2, 14).view(1, 12)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(token_ids, attention_mask=torch.ones_like(token_ids), **options)
    assert isinstance(tokens, Tensor)
    return tokens


def _lazy(model: Any, layers: list[MoELayer], expected: Tensor, seen: list[float]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        source = from_path(Path(directory), None, "auto")
        for index, layer in enumerate(layers):
            assert not expert_parameters(source.layers[index]), "experts were loaded"
            for expert in range(layer.num_experts):
                _compare(source.store, index, layer, expert)
        seen.append(_difference(runtime.load(directory, memory=sizes(model)[1]), expected))
    return "yes"


def _compare(store: Any, index: int, layer: MoELayer, expert: int) -> None:
    names = layer.container.names(layer.module)
    for name, tensor in expert_part(layer, names, expert_parameters(layer), expert).items():
        into = torch.full_like(tensor, torch.nan)
        store.read(index, expert, {name: into})
        assert torch.equal(into, tensor), f"{layer.name}: expert {expert} is another"
