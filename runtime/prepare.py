"""Rewrite a model's experts into one file of contiguous, page-aligned blocks.

python -m runtime.prepare MODEL OUT            write OUT, which runtime.load takes as a model
python -m runtime.prepare MODEL OUT --packed   the same, as GPUs keep experts: they load faster
python -m runtime.prepare MODEL OUT --encoding int4    a LOSSY copy, and what it lost
python -m runtime.prepare OUT --verify         compare a prepared model with its checksums
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from routing.cli import run
from routing.process.cores import wait_passively
from runtime.conversion.settings import ConversionSettings


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(ConversionSettings):
    """Rewrite a model's experts so that each is one contiguous block, or verify such a model.

    The copy is exact: experts in codes of 4 or 8 bits keep their codes. With --encoding, experts of
    plain weights are rounded to a smaller encoding: a lossy copy, never made unless asked for.
    """

    model: str
    """Model: a directory or an id on the Hub. With --verify, a prepared directory."""
    out: str | None = None
    """Directory to write; it must not exist."""
    packed: bool = False
    """Keep bfloat16 experts as a GPU does, in 12 bits a weight: still exact, a quarter fewer bytes,
    and the GPU has nothing to pack while it loads. A CPU takes several times as long for each miss,
    since it has to unpack."""
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
    packed: bool = False,
    encoding: str | None = None,
    **options: Any,
) -> Path:
    """Write a prepared copy of `model` to `out`, completely or not at all. Returns `out`.

    packed: keep bfloat16 experts as a GPU does, in 12 bits a weight, lossless: it loads them
        faster, while a CPU has to unpack them.
    encoding: round the experts to "mxfp4", "int4", "fp8" or "nvfp4". The copy is then LOSSY, and
        says so: `model.expertflow.encoding`, README.md and conversion.json in `out`.
    options: other fields of `ConversionSettings`, for a lossy copy: the texts to calibrate and to
        measure on, the rounding, the device.

    Without `encoding` the copy keeps the dtype and the codes of the checkpoint. Only `runtime.load`
    can read it: it has no weights under the names that transformers looks for. Raises ValueError
    for a model that `runtime.load` would refuse, for experts that cannot be packed, and if `out`
    exists.
    """
    from runtime.weights.repository.hub import HubOptions

    hub = HubOptions(revision=revision, token=token, cache_dir=cache_dir)
    settings = ConversionSettings(encoding=encoding, **options)
    if encoding is None:
        from runtime.weights.prepared.writer import write_prepared

        if options:
            raise ValueError(f"{', '.join(options)}: nothing without encoding=")
        return write_prepared(model, out, hub, packed=packed)
    if packed:
        raise ValueError("packed= is for plain weights; those of encoding= are smaller than packed")
    from runtime.conversion.convert import convert

    convert(model, out, settings, hub)
    return Path(out)


def main(settings: PrepareSettings) -> None:
    """Prepare a model, or verify a prepared one."""
    wait_passively()
    if settings.verify:
        from runtime.weights.prepared.checksums import verify

        print(f"{settings.model}: {verify(Path(settings.model)):,} experts are intact")
    elif settings.out is None:
        raise ValueError("say where to write the prepared model: runtime.prepare MODEL OUT")
    elif settings.encoding is None:
        _refuse_lonely(settings)
        hub = {"revision": settings.revision, "cache_dir": settings.cache_dir}
        prepared = prepare(settings.model, settings.out, packed=settings.packed, **hub)
        print(f"{prepared} is ready for runtime.load")
    elif settings.packed:
        raise ValueError(
            "--packed is for plain weights; those of --encoding are smaller than packed"
        )
    else:
        _convert(settings, settings.out)


def _refuse_lonely(settings: PrepareSettings) -> None:
    """Raise ValueError for options of a conversion where none is asked for."""
    plain = ConversionSettings()
    names = [
        f"--{field.name}"
        for field in fields(ConversionSettings)
        if getattr(settings, field.name) != getattr(plain, field.name)
    ]
    if names:
        raise ValueError(f"{', '.join(names)}: nothing without --encoding")


def _convert(settings: PrepareSettings, out: str) -> None:
    """Convert a model, and print what it cost."""
    from rich.console import Console

    from runtime.conversion.card import NOT_MEASURED, table
    from runtime.conversion.convert import convert
    from runtime.weights.repository.hub import HubOptions

    hub = HubOptions(revision=settings.revision, cache_dir=settings.cache_dir)
    report = convert(settings.model, out, settings, hub)
    Console().print(table(report))
    if report.quality is None:
        print(NOT_MEASURED)
    print(f"{out} is ready for runtime.load; it is not the original: {report.line}")


if __name__ == "__main__":
    run(
        main,
        PrepareSettings,
        prog="python -m runtime.prepare",
        positional=["model", "out"],
        examples=[
            "DIR PREPARED",
            "DIR PREPARED --packed",
            "DIR SMALLER --encoding int4",
            "DIR SMALLER --encoding mxfp4 --calibration some.txt --text other.txt",
            "PREPARED --verify",
        ],
    )
