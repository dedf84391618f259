"""Kinds of state that layers keep of the tokens before, and which of them can be captured.

    causal, sliding, chunked   keys and values of every position; the mask says which are seen
    indexed                    these, and the keys of an indexer that chooses among them
    recurrent                  states of one size: of a recurrence, of a short convolution

transformers names the kinds in `config.layer_types`; a layer can attend and recur.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple


class Mask(Enum):
    """Which earlier tokens a token sees."""

    CAUSAL = "causal"
    SLIDING = "sliding"
    CHUNKED = "chunked"


class StateKind(NamedTuple):
    """The kind of one layer."""

    mask: Mask | None
    """Of its attention; None: it has none."""
    recurs: bool = False
    indexes: bool = False
    """Whether an indexer of its own chooses what is attended to."""
    expands: bool = False
    """Whether keys and values may be kept compressed, and are expanded in every pass."""

    @property
    def keeps_positions(self) -> bool:
        """Whether its state can be cut after any token: every position has its own entries."""
        return not (self.recurs or self.indexes)

    @property
    def fits_pages(self) -> bool:
        """Whether what it keeps by position, if anything, is plain keys and values."""
        return self.mask is None or not self.stacks

    @property
    def stacks(self) -> bool:
        """Whether sequences cannot lie side by side in one pass."""
        return self.recurs or self.indexes or self.expands


CAUSAL, SLIDING = StateKind(Mask.CAUSAL), StateKind(Mask.SLIDING)
CHUNKED, INDEXED = StateKind(Mask.CHUNKED), StateKind(Mask.CAUSAL, indexes=True)
RECURRENT, NOTHING = StateKind(None, recurs=True), StateKind(None)

KINDS = {
    "full_attention": CAUSAL,
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
    "indexed_attention": INDEXED,
    "deepseek_sparse_attention": INDEXED,
    "qwen_sparse_attention": INDEXED,
    "linear_attention": RECURRENT,
    "conv": RECURRENT,
    "hybrid": StateKind(Mask.CAUSAL, recurs=True),
    "hybrid_sliding": StateKind(Mask.SLIDING, recurs=True),
    "dummy": NOTHING,
    "moe": NOTHING,
    "mlp": NOTHING,
}
"""The kind of each of transformers' layer types, of both ends of the supported range."""


UNCAPTURED = {
    "diffusion_gemma_text": "it does not write one token after the other",
    "glm5_next_text": "its indexer makes masks of its own for keys that begin with the sequence",
    "qwen4_exp_text": "its indexer waits for the numbers of the tokens that it may choose",
}
"""Models whose own code cannot run in a step that never waits, by their `model_type`."""

_DISTANCES = "its attention takes distances that it counts for one sequence"
NOT_SERVED = dict.fromkeys(("inkling_text", "inkling2_text"), _DISTANCES)
"""Models of which rows at several positions cannot share a step."""

WHOLE_PROMPTS = frozenset({"jamba"})
"""Models whose recurrence begins anew with every piece of a prompt of more than one token."""


def layer_types(config: Any) -> list[str]:
    """The type of each layer, in transformers' words."""
    types = getattr(config, "layer_types", None)
    if types:
        return list(types)
    if getattr(config, "sliding_window", None) is not None:
        one = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        one = "chunked_attention"
    else:
        one = "full_attention"
    return [one] * config.num_hidden_layers


def state_kinds(config: Any) -> list[StateKind]:
    """The kind of each layer. Raises ValueError for a type that is not among `KINDS`."""
    types = layer_types(config)
    unknown = sorted(set(types) - set(KINDS))
    if unknown:
        raise ValueError(f"it has layers of type {', '.join(unknown)}")
    expands = vars(config).get("kv_lora_rank") is not None
    kinds = [KINDS[name] for name in types]
    return [kind._replace(expands=expands and kind.mask is not None) for kind in kinds]


def masks_of(kinds: Sequence[StateKind]) -> set[Mask]:
    """The masks that the layers' attention needs."""
    return {kind.mask for kind in kinds if kind.mask is not None}


def unsupported(config: Any) -> str | None:
    """Why a model's steps cannot run captured; None where they can."""
    if (reason := _unknown(config)) is not None:
        return reason
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention implementation is {config._attn_implementation}, not sdpa or eager"
    if most_independent_tokens(config) is not None:
        return "how it rotates keys depends on the longest position of every step"
    return None


def _unknown(config: Any) -> str | None:
    try:
        state_kinds(config)
    except ValueError as error:
        return str(error)
    return UNCAPTURED.get(config.model_type)


def fits_pages(config: Any) -> bool:
    """Whether all that a model keeps by position can lie in pages."""
    return _unknown(config) is None and all(kind.fits_pages for kind in state_kinds(config))


def require_pages(config: Any, cache_tokens: int) -> None:
    """Raise ValueError where a key/value cache of so many tokens in all cannot be had."""
    if not fits_pages(config):
        raise ValueError(
            f"cache_tokens={cache_tokens}: what this model keeps of its tokens (latent, indexed or "
            "of a recurrence) lies in whole rows, of context= tokens each; leave it out"
        )


def most_independent_tokens(config: Any) -> int | None:
    """Tokens up to which a sequence's positions are encoded the same whatever runs beside it; None
    for any number.

    Beyond, some models rotate the keys of a whole step by the length of its longest sequence.
    """
    given = getattr(config, "rope_parameters", None) or {}
    found = [given] if "rope_type" in given else list(given.values())
    limits = []
    for parameters in (one for one in found if isinstance(one, dict)):
        kind = str(parameters.get("rope_type"))
        if "dynamic" in kind:
            limits.append(config.max_position_embeddings - 1)  # from there on nothing is reset
        elif kind == "longrope":
            original = parameters.get("original_max_position_embeddings")
            limits.append(original or config.max_position_embeddings)
    return min(limits, default=None)


def require_rows(config: Any, context: int) -> None:
    """Raise ValueError where sequences of up to `context` tokens cannot be served side by side."""
    if (why := _unknown(config) or NOT_SERVED.get(config.model_type)) is not None:
        raise ValueError(f"the model cannot be served together yet: {why}; use model.generate")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"the model's attention is {config._attn_implementation}; load it with "
            "attn_implementation='sdpa' to serve it"
        )
    most = most_independent_tokens(config)
    if most is not None and context > most:
        raise ValueError(
            f"context={context}: beyond {most} tokens this model encodes positions by the longest "
            "sequence of a step, so requests served together would change each other's tokens; "
            f"serve with context={most} or less, or use model.generate"
        )
