"""Optional contents of a trace: router logits and hidden states; and token ids that are missing.

T tokens, L MoE layers, M experts named, H hidden size. The manifest's `extras` says what there is;
a trace of token ids and routes alone has no such key. In shards:

    router.experts  uint8   [T, L, M]   (uint16 above 256 experts) experts by logit, highest first
    router.logits   float16 [T, L, M]   their logits
    hidden.LAYER    float16 [T, H]      router input of the MoE layer LAYER, counted from 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np

ROUTER, HIDDEN = "router", "hidden"
"""First parts of the tensors' names."""


class RouterLogits(NamedTuple):
    """The M highest logits of every router, for one document."""

    experts_TLM: np.ndarray
    """uint8 (uint16 above 256 experts), the highest logit first."""
    logits_TLM: np.ndarray
    """float16; -inf where a layer has fewer than M experts."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """The optional contents of a trace."""

    token_ids: bool = True
    """False where the ids are unknown, as in traces of other programs: all are 0 then."""
    router_logits: int = 0
    """M, or 0 for none."""
    hidden: tuple[int, ...] = ()
    """The MoE layers whose router inputs are kept, ascending."""
    hidden_size: int = 0
    """H, or 0 without hidden states."""

    def to_json(self) -> dict[str, Any]:
        """What differs from a trace of token ids and routes alone; empty for such a trace."""
        values = asdict(self) | {"hidden": list(self.hidden)}
        plain = Extras()
        return {
            field.name: values[field.name]
            for field in fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`, of an object that `is_extras` accepts."""
        return cls(**{**data, "hidden": tuple(data.get("hidden", ()))})

    def expected(
        self, num_tokens: int, num_layers: int, experts: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each tensor. experts: the dtype of expert ids."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.router_logits:
            shape = num_tokens, num_layers, self.router_logits
            found[f"{ROUTER}.experts"] = experts, shape
            found[f"{ROUTER}.logits"] = "float16", shape
        for layer in self.hidden:
            found[f"{HIDDEN}.{layer}"] = "float16", (num_tokens, self.hidden_size)
        return found


def is_extras(value: object) -> bool:
    """Whether it can be the `extras` of a manifest."""
    if not isinstance(value, dict) or value.keys() - {f.name for f in fields(Extras)}:
        return False
    counts = [value.get(key, 0) for key in ("router_logits", "hidden_size")]
    hidden = value.get("hidden", [])
    return (
        isinstance(value.get("token_ids", True), bool)
        and isinstance(hidden, list)
        and all(type(x) is int and 0 <= x < 1 << 31 for x in [*counts, *hidden])
        and sorted(set(hidden)) == hidden
        and bool(hidden) == bool(counts[1])
    )


def as_tensors(
    extras: Extras, routers: Sequence[RouterLogits | None], hidden: Sequence[Mapping[int, Any]]
) -> dict[str, np.ndarray]:
    """The tensors of a shard, from what each of its documents holds."""
    tensors: dict[str, np.ndarray] = {}
    if extras.router_logits:
        found = [router for router in routers if router is not None]
        assert len(found) == len(routers), "this trace keeps router logits"
        tensors[f"{ROUTER}.experts"] = np.concatenate([r.experts_TLM for r in found])
        tensors[f"{ROUTER}.logits"] = np.concatenate([r.logits_TLM for r in found])
    for layer in extras.hidden:
        tensors[f"{HIDDEN}.{layer}"] = np.concatenate([of[layer] for of in hidden])
    return tensors


def from_tensors(
    tensors: Mapping[str, np.ndarray],
) -> tuple[RouterLogits | None, dict[int, np.ndarray]]:
    """Router logits and hidden states (by layer) of a shard, where it holds any."""
    router = None
    if f"{ROUTER}.experts" in tensors:
        router = RouterLogits(tensors[f"{ROUTER}.experts"], tensors[f"{ROUTER}.logits"])
    prefix = f"{HIDDEN}."
    hidden = {
        int(name.removeprefix(prefix)): values
        for name, values in tensors.items()
        if name.startswith(prefix)
    }
    return router, hidden
