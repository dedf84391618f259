"""The report of a conversion: a table, conversion.json and the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.conversion.quality import Quality
from runtime.weights.prepared.loss import CONVERSION, describe_loss

if TYPE_CHECKING:
    from rich.table import Table

CARD = "README.md"
ORIGINAL_CARD = "README.original.md"
NOT_MEASURED = "The loss was not measured: give --text FILE, a text that this model is meant for."


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted, how, and at what loss."""

    original: str
    """The model, a directory or an id on the Hub."""
    encoding: str
    """As it is called elsewhere, e.g. "int4-group"."""
    details: list[dict[str, Any]]
    """The encodings of the matrices as JSON, each once."""
    rounding: str
    bits: float
    """Bytes of a stored expert times 8, a parameter."""
    calibration: list[str]
    """Names of the texts whose activations were recorded."""
    calibration_tokens: int
    text: list[str]
    """Names of the texts that the loss was measured on."""
    quality: Quality | None

    @property
    def line(self) -> str:
        """The loss in one line."""
        return describe_loss(self.encoding, self.quality and self.quality.change)

    def as_json(self) -> dict[str, Any]:
        """The content of conversion.json."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        measured = self.quality and self.quality._asdict() | {"change": self.quality.change}
        return {"schema": 1, "lossy": True} | fields | {"quality": measured}


def rows(conversion: Conversion) -> list[tuple[str, str]]:
    """The report as names and values."""
    found = [
        ("encoding of the experts", conversion.encoding),
        ("bits a weight", f"{conversion.bits:.2f}"),
        ("rounding", conversion.rounding),
        ("calibrated on", f"{conversion.calibration_tokens:,} tokens"),
    ]
    quality = conversion.quality
    if quality is None:
        return [*found, ("loss", "not measured")]
    return [
        *found,
        ("measured on", f"{quality.tokens:,} tokens"),
        ("perplexity of the original", f"{quality.original_perplexity:.4f}"),
        ("perplexity", f"{quality.perplexity:.4f} ({100 * quality.change:+.2f} %)"),
        ("KL divergence from the original", f"{quality.divergence:.5f} nats a token"),
        ("same greedy token as the original", f"{100 * quality.agreement:.2f} %"),
    ]


def table(conversion: Conversion) -> Table:
    """The report for a terminal."""
    from rich.table import Table

    drawn = Table(title=conversion.line, title_justify="left", show_header=False)
    for row in rows(conversion):
        drawn.add_row(*row)
    return drawn


def write(conversion: Conversion, out: Path) -> None:
    """Write conversion.json and the model card into `out`; the original's card is kept."""
    (out / CONVERSION).write_text(json.dumps(conversion.as_json(), indent=1) + "\n")
    if (out / CARD).exists():
        (out / CARD).rename(out / ORIGINAL_CARD)
    (out / CARD).write_text(_card(conversion, has_original=(out / ORIGINAL_CARD).exists()))


def _card(conversion: Conversion, has_original: bool) -> str:
    name = Path(conversion.original).name
    lines = [
        f"# {name}, lossy {conversion.encoding}",
        "",
        f"A LOSSY copy of {name}: its experts are rounded to {conversion.encoding}, so its text is "
        "not the original's. All other weights are the original's. Only ExpertFlow loads it "
        "(`runtime.load`).",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows(conversion)),
        "",
    ]
    if conversion.quality is None:
        lines += [NOT_MEASURED, ""]
    else:
        lines += [
            "Both models got the same true text, in windows of 512 tokens: "
            f"{', '.join(conversion.text)}.",
            "",
        ]
    if has_original:
        lines += [f"The original's card is [{ORIGINAL_CARD}]({ORIGINAL_CARD}).", ""]
    return "\n".join(lines)
