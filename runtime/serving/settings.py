"""Settings of serving: how requests run together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from runtime.sizing.cache_tokens import require_cache_tokens

if TYPE_CHECKING:
    from runtime.kv.storage import Storage

SCHEDULERS = ("fifo", "predicted", "paper", "domain-oracle")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of `engine.serve`, `python -m runtime.batch` and `python -m runtime.server`."""

    scheduler: str | None = None
    """fifo, predicted, paper or domain-oracle. By default predicted where there is a predictor, not
    every expert has a slot, and `batch` tokens leave a tenth of a layer's experts unused by chance,
    else fifo.
    """
    batch: int = 32
    """Sequences that decode together in one step; on a GPU, as many as the engine reserved. Where
    memory is all that bounds it, as many as `rows` take the least time.
    """
    rows: int = 32
    """Sequences in flight, each with a row of the key/value cache; those beyond `batch` are parked
    between steps, for the scheduler to choose from. fifo uses `batch` of them, paper 2 x `batch`.
    """
    context: int = 1024
    """Tokens of a sequence at the most, prompt and generated; on a GPU, as many as the engine
    reserved.
    """
    cache_tokens: int | None = None
    """Tokens of all sequences in flight together, where most are shorter than `context`: they take
    pages of 64 as they grow, and where none is left the newest waits in host memory. By default
    each has room for `context`; on a GPU, as many as the engine reserved.
    """
    chunk: int = 512
    """Prompt tokens that join a step at the most."""
    burst: int | None = None
    """Prompts that predicted admission waits for, until so many rows are free, so that they share
    a step; fewer where fewer requests wait. By default 4 (half of `batch` if that is less), or all
    rows beyond `batch` if those are more. 1 admits each as soon as there is a row.
    """
    lookahead: int = 128
    """Waiting requests that admission chooses from."""
    patience: int = 256
    """Later requests that may be admitted before a waiting one, where as many waited when it
    arrived; fewer where fewer did.
    """
    max_skips: int = 32
    """Steps in a row that a parked sequence may be passed over."""
    prefix_reuse: bool = False
    """Let a request that begins as another did go on from its keys and values. They differ in the
    last bits with the number of tokens that ran beside them, so a result may depend on what was
    served before as it does on what is served beside.
    """

    LEAST_BATCH: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler={self.scheduler!r} is not one of {', '.join(SCHEDULERS)}")
        if self.batch < self.LEAST_BATCH:
            raise ValueError(f"batch={self.batch}: give at least {self.LEAST_BATCH}")
        for name in ("rows", "context", "chunk", "lookahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        for name in ("patience", "max_skips"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative")
        require_cache_tokens(self.cache_tokens, self.context)
        if self.burst is not None and not 1 <= self.burst <= self.rows:
            raise ValueError(f"burst={self.burst} is not in 1 to rows={self.rows}")
        if self.rows < self.batch:
            raise ValueError(f"rows={self.rows} are fewer than batch={self.batch}: raise rows")

    @classmethod
    def within(cls, storage: Storage | None, **given: Any) -> Self:
        """The given settings, and for the others defaults that fit.

        storage: an engine's key/value cache, where it has one: `batch` and `context` are by default
        what it holds.
        """
        if storage is None:
            return cls(**given)
        reserved = {"batch": storage.batch, "context": storage.context} | given
        reserved.setdefault("rows", max(cls.rows, reserved["batch"]))
        return cls(**reserved)

    def fitting(self, storage: Storage | None) -> Self:
        """These settings with no more rows than an engine's key/value cache holds, if it has one.

        Raises ValueError where what was reserved is less than `batch`, `context` or `cache_tokens`.
        """
        if storage is None:
            return self
        tokens = storage.tokens or storage.batch * storage.context
        limits = {"batch": storage.batch, "context": storage.context, "cache_tokens": tokens}
        for name, reserved in limits.items():
            if reserved < (getattr(self, name) or 0):
                raise ValueError(
                    f"{name}={getattr(self, name)} needs runtime.load(..., {name}=...) of as "
                    f"much on a GPU; the model was loaded with {reserved}"
                )
        rows = min(self.rows, storage.batch)
        return replace(self, rows=rows, burst=self.burst and min(self.burst, rows))

    @property
    def num_burst(self) -> int:
        """Prompts to admit together, where so many wait."""
        return self.burst or max(1, min(4, self.batch // 2), self.rows - self.batch)
