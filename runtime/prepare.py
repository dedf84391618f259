"""Rewrite a model's experts into one file of contiguous, page-aligned blocks.

python -m runtime.prepare MODEL OUT            write OUT, which runtime.load takes as a model
python -m runtime.prepare OUT --verify         compare a prepared model with its checksums
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from routing.cli import run


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Rewrite a model's experts so that each is one contiguous block, or verify such a model."""

    model: str
    """Model: a directory or an id on the Hub. With --verify, a prepared directory."""
    out: str | None = None
    """Directory to write; it must not exist."""
    verify: bool = False
    """Read all blocks of a prepared model and compare their checksums."""
    revision: str | None = None
    """Branch, tag or commit of an id on the Hub. HF_TOKEN opens private ones."""
    cache_dir: str | None = None
    """Folder to keep fetched files in."""


def prepare(
    model: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Write a prepared copy of `model` to `out`, completely or not at all. Returns `out`.

    The copy keeps the dtype of the checkpoint. Only `runtime.load` can read it: it has no weights
    under the names that transformers looks for. Raises ValueError for a model that `runtime.load`
    would refuse, and if `out` exists.
    """
    from runtime.weights.preparation import write_prepared
    from runtime.weights.repository.hub import HubOptions

    hub = HubOptions(revision=revision, token=token, cache_dir=cache_dir)
    return write_prepared(model, out, hub)


def main(settings: PrepareSettings) -> None:
    """Prepare a model, or verify a prepared one."""
    if settings.verify:
        from runtime.weights.prepared_store import verify

        print(f"{settings.model}: {verify(Path(settings.model)):,} experts are intact")
    elif settings.out is None:
        raise ValueError("say where to write the prepared model: runtime.prepare MODEL OUT")
    else:
        hub = {"revision": settings.revision, "cache_dir": settings.cache_dir}
        print(f"{prepare(settings.model, settings.out, **hub)} is ready for runtime.load")


if __name__ == "__main__":
    run(
        main,
        PrepareSettings,
        prog="python -m runtime.prepare",
        positional=["model", "out"],
        examples=["DIR PREPARED", "PREPARED --verify"],
    )
