"""Try every architecture with the installed transformers, and write the table of it.

python -m tests.helpers.compatibility_table

Results are kept by version of transformers in docs/compatibility.json, and docs/compatibility.md
shows all versions that were tried. Exits with 1 when an architecture is not exact.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

from tests.helpers.architectures import ARCHITECTURES, is_known
from tests.helpers.compatibility import TOLERANCE, Verdict, check

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "compatibility.json"
TABLE = DOCS / "compatibility.md"
CHECKS = ("traced", "parity", "generates", "lazy")
STEP_CHECKS = ("captured", "served")

INTRODUCTION = """# Architectures

Written by `make compatibility`, which tries every mixture-of-experts architecture of the installed
transformers on a tiny random float32 model (8 experts a layer, hidden width 32) on the CPU.
Wrappers (of text models with images, sound ...) are tried with text.

- **traced**: `trace` records the experts of every token.
- **exact**: offloaded logits differ by at most {tolerance:.0e} from the stock model's, with all
  experts, two fifths of them and the fewest possible in memory; the largest difference seen.
- **generates**: the stock model's tokens, greedily. "-": the stock model does not generate text.
- **lazy**: loaded from a directory without its experts; every expert read from the files is bit for
  bit the stock model's, and the logits are exact again.

{summary}

"""

STEPS = """## Captured steps and serving

- **captured**: on a GPU, decode steps run as CUDA graphs. Tried with that engine on the CPU, where
  it gives the stock model's tokens and logits for one sequence, for two of which one is padded, and
  after a prompt of 600 tokens.
- **served**: sequences of different lengths decode together, their prompts in pieces, each with the
  tokens that it has alone.
"""

QUANTISED = """## Quantised checkpoints

A directory of each architecture is written with its experts in each encoding, in the tensors and
with the configuration of published checkpoints, and an unquantised twin of it that has the decoded
weights.

- **yes**: experts stay in their codes; every expert decodes, bit for bit, to that of the twin, and
  logits are the twin's with two fifths of the experts in memory.
- **decoded**: the same, but experts are decoded as they are read.
- "-": no published layout has the experts of this architecture in that encoding.
"""

REMARKS = """
## What else there is to know

- **NLLB-MoE** has a defect in transformers (5.17.0 to 5.23.0): its experts call takes the one-hot
  mask of a token's first choice for a list of expert ids, so only the experts 0 and 1 ever run,
  whatever the router says. The runtime repeats it: an offloaded model computes what the stock model
  computes. Traces record what the router decided. A test fails as soon as transformers is mended.
- **JetMoE** has experts in its attention too. Those stay in memory; the feed-forward experts are
  offloaded.
- **Llama 4** scales a token by its router score before its experts see it; traces record a weight
  of 1. A token whose score rounds to zero has no expert, which is what it gets in the stock model.
- **Doge** is refused: its experts are single rows of embeddings.
- **Quantised checkpoints** are loaded by their directory or id. A model in memory whose experts are
  **FP8** or **MXFP4** modules is refused, and a directory of any other quantisation is refused by
  name.
- Remote code is not run: an architecture that transformers does not have is refused by name.
"""


def main() -> int:
    """Try what is installed, write the table, and say in one line how it went."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known = [kind for kind in ARCHITECTURES if is_known(kind)]
    verdicts = [check(kind, whole=True) for kind in track(known)]
    results[transformers.__version__] = {v.architecture: v._asdict() for v in verdicts}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(render(results))
    inexact = [verdict.architecture for verdict in verdicts if not verdict.is_exact]
    print(_summary(transformers.__version__, results[transformers.__version__]))
    if inexact:
        print(f"not exact: {', '.join(inexact)}", file=sys.stderr)
    return 1 if inexact else 0


def render(results: dict[str, dict[str, Any]]) -> str:
    """The document, from the verdicts by version and architecture."""
    versions = sorted(results, key=lambda version: [int(part) for part in version.split(".")])
    summary = "\n".join(f"- {_summary(version, results[version])}" for version in versions)
    notes: list[str] = []
    heads = [f"{name} ({v})" for v in versions for name in ("traced", "exact", "generates", "lazy")]
    lines = []
    for kind in ARCHITECTURES:
        rows = [results[version].get(kind) for version in versions]
        found = [row for row in rows if row]
        cells = [cell for row in rows for cell in _cells(row, notes)]
        lines.append([kind, found[-1]["experts"] if found else "", *cells])
    main = _table(["architecture", "experts", *heads], lines)
    steps = render_steps(results, versions, notes)
    encoded = render_encodings(results, versions, notes)
    numbered = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    head = INTRODUCTION.format(tolerance=TOLERANCE, summary=summary)
    return (
        "\n\n".join(
            [head.rstrip(), main, STEPS.rstrip(), steps, QUANTISED.rstrip(), encoded, numbered]
        )
        + "\n"
        + REMARKS
    )


def render_steps(results: dict[str, dict[str, Any]], versions: list[str], notes: list[str]) -> str:
    """The table of captured steps and serving: two columns for each version that they were tried
    in.
    """
    names = STEP_CHECKS
    versions = [v for v in versions if any(row.get("captured") for row in results[v].values())]
    lines = [
        [kind, *(_noted(results[version].get(kind, {}).get(name, ""), notes)
                 for version in versions for name in names)]
        for kind in ARCHITECTURES
    ]  # fmt: skip
    heads = [f"{name} ({version})" for version in versions for name in names]
    return _table(["architecture", *heads], lines)


def render_encodings(
    results: dict[str, dict[str, Any]], versions: list[str], notes: list[str]
) -> str:
    """The table of quantised checkpoints: a column for each encoding and version."""
    names = sorted({name for v in versions for row in results[v].values() for name in _of(row)})
    lines = []
    for kind in ARCHITECTURES:
        found = [_of(results[version].get(kind)) for version in versions]
        cells = [_noted(cells.get(name, ""), notes) for cells in found for name in names]
        lines.append([kind, *cells])
    heads = [f"{name} ({version})" for version in versions for name in names]
    return _table(["architecture", *heads], lines)


def _of(row: dict[str, Any] | None) -> dict[str, str]:
    """The cells of encodings; none of a version in which they were not tried."""
    return (row or {}).get("encodings", {})


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _summary(version: str, rows: dict[str, Any]) -> str:
    verdicts = [Verdict(**row) for row in rows.values()]
    counts = {
        name: sum(getattr(v, name) == "yes" for v in verdicts) for name in CHECKS + STEP_CHECKS
    }
    exact = sum(verdict.is_exact for verdict in verdicts)
    more = f", {counts['captured']} captured, {counts['served']} served"
    more = more if any(verdict.captured for verdict in verdicts) else ""
    return (
        f"transformers {version}: {len(verdicts)} architectures, {exact} exact, "
        f"{counts['traced']} traced, {counts['generates']} generate, {counts['lazy']} lazy{more}"
    )


def _cells(row: dict[str, Any] | None, notes: list[str]) -> list[str]:
    if row is None:
        return [""] * len(CHECKS)
    return [_cell(name, row, notes) for name in CHECKS]


def _cell(name: str, row: dict[str, Any], notes: list[str]) -> str:
    if name == "parity" and not row[name].startswith("no: "):
        return f"{row['difference']:.0e}" if row["difference"] else "0"
    return _noted(row[name], notes)


def _noted(text: str, notes: list[str]) -> str:
    """A cell; the reason of a "no" becomes a numbered note."""
    if not text.startswith("no: "):
        return text
    note = text.removeprefix("no: ")
    notes += [note] if note not in notes else []
    return f"no [{notes.index(note) + 1}]"


if __name__ == "__main__":
    sys.exit(main())
