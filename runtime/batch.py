"""Continue every prompt of a data set: `python -m runtime.batch`.

python -m runtime.batch --model DIR --predictor P.onnx --dataset prompts.jsonl --out out.jsonl

With `--workers N` the rows go to N engines over the hosts of a Ray cluster
(`runtime.serving.batch.ray_workers`).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from routing.cli import run
from runtime.serving.model_settings import ModelSettings
from runtime.serving.settings import ServeSettings

if TYPE_CHECKING:
    from runtime.serving.batch.journal import Journal
    from runtime.serving.batch.prompts import Row
    from runtime.serving.batch.ray_workers import Crew
    from runtime.serving.request import Request, Result

PROG = "python -m runtime.batch"


@dataclass(frozen=True, kw_only=True)
class BatchSettings(ModelSettings):
    """Continue every prompt of a data set; interrupted, the same command goes on."""

    dataset: str
    """A .jsonl file (rows with `prompt` or `messages`, and options of their own), a .txt file (a
    prompt a line), a .parquet file, or a data set on the Hub.
    """
    out: Path
    """JSON lines to write, one an input and in their order."""
    split: str = "train"
    """Of a data set on the Hub."""
    max_tokens: int = 128
    """Tokens to generate for a prompt at the most."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this joint probability."""
    seed: int = 0
    """A row's own random numbers come from this plus its index."""
    stop: list[str] = field(default_factory=list)
    """Generation ends before the first of these."""
    workers: int = 0
    """Ray actors to spread the rows over, each with the model: on the cluster that RAY_ADDRESS
    names, else on this machine. 0 serves them here. Needs the extra `ray`.
    """
    worker_cpus: int = 1
    """Cores of a worker."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers and self.record:
            raise ValueError("record: several workers cannot write one recording; serve without")
        for name, least in (("workers", 0), ("worker_cpus", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}")


class Served(NamedTuple):
    """A result and the hit rate, so far, of the engine that gave it."""

    result: Result
    hit_rate: float


def main(settings: BatchSettings) -> None:
    """Serve every row that has no result yet, then put the results in order."""
    from runtime.serving.batch.journal import Journal
    from runtime.serving.batch.prompts import read_rows

    digest, num_rows = _digest(read_rows(settings.dataset, settings.split))
    if num_rows == 0:
        raise ValueError(f"the data set {settings.dataset} has no rows")
    with Journal(settings.out, _identity(settings, digest)) as journal:
        tokenizer = read_tokenizer(settings.model)
        with closing(_crew(settings, tokenizer)) as crew:
            num_bad = _serve(settings, crew, tokenizer, journal, num_rows)
            report = crew.report()
        journal.finish()
    print(f"{settings.out}: {num_rows} results, {num_bad} of them errors", file=sys.stderr)
    print(report, file=sys.stderr)


def _crew(settings: BatchSettings, tokenizer: Any) -> Alone | Crew:
    if not settings.workers:
        return Alone(settings, tokenizer)
    from runtime.serving.batch.ray_workers import Crew

    return Crew(settings)


class Alone:
    """One engine, in this process."""

    def __init__(self, settings: BatchSettings, tokenizer: Any) -> None:
        self._engine = settings.load(tokenizer)
        self._options = serve_settings(settings) | {"tokenizer": tokenizer}

    def serve(self, requests: Iterator[Request]) -> Iterator[Served]:
        """Results as they end."""
        for result in self._engine.serve(requests, **self._options):
            yield Served(result, self._engine.stats().hit_rate)

    def report(self) -> str:
        """One line about the run so far."""
        return self._engine.report()

    def close(self) -> None:
        self._engine.detach()


def serve_settings(settings: BatchSettings) -> dict[str, Any]:
    """What `engine.serve` is told."""
    return {f.name: getattr(settings, f.name) for f in fields(ServeSettings)}


def _serve(
    settings: BatchSettings, crew: Alone | Crew, tokenizer: Any, journal: Journal, num_rows: int
) -> int:
    from tqdm import tqdm

    num_bad = num_tokens = 0
    with tqdm(total=num_rows, initial=len(journal.done), unit="row", desc="batch") as bar:

        def keep(index: int, result: dict[str, Any]) -> None:
            nonlocal num_bad
            journal.add(index, result)
            if "error" in result:
                num_bad += 1
                bar.write(f"row {index}: {result['error']}", file=sys.stderr)
            bar.update()

        for result, hit_rate in crew.serve(_requests(settings, tokenizer, journal, keep)):
            num_tokens += result.num_prompt + len(result.token_ids)
            rate = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:.1f} tok/s, hit rate {hit_rate:.1%}")
            keep(int(result.id), _describe(result))
    return num_bad


def _requests(
    settings: BatchSettings, tokenizer: Any, journal: Journal, keep: Any
) -> Iterator[Request]:
    """The rows that have no result yet; bad ones are kept as such at once."""
    from runtime.serving.batch.prompts import read_rows, to_request

    defaults: dict[str, Any] = {
        name: getattr(settings, name) for name in ("max_tokens", "temperature", "top_p")
    } | {"stop": tuple(settings.stop)}
    for index, row in enumerate(read_rows(settings.dataset, settings.split)):
        if index in journal.done:
            continue
        seeded = defaults | {"seed": settings.seed + index}
        try:
            request = to_request(row, str(index), tokenizer, seeded)
        except ValueError as error:
            keep(index, {"error": str(error)})
            continue
        yield request


def _describe(result: Result) -> dict[str, Any]:
    if result.finish == "error":
        return {"error": result.error}
    return {
        "text": result.text,
        "finish_reason": result.finish,
        "prompt_tokens": result.num_prompt,
        "completion_tokens": len(result.token_ids),
    }


def _digest(rows: Iterator[Row]) -> tuple[str, int]:
    """A fingerprint of all rows, and their number."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for count, row in enumerate(rows, 1):  # noqa: B007 - the count is what is wanted
        digest.update(repr(row).encode())
    return digest.hexdigest(), count


def _identity(settings: BatchSettings, digest: str) -> dict[str, Any]:
    """What a batch's results depend on."""
    names = ("model", "dtype", "max_tokens", "temperature", "top_p", "seed", "stop", "context")
    return {"rows": digest} | {name: asdict(settings)[name] for name in names}


def read_tokenizer(model: str) -> Any:
    """The tokenizer of `model`. Raises ValueError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = " ".join(str(error).split())
        raise ValueError(f"{model} has no tokenizer that can be used: {reason:.200}") from error


if __name__ == "__main__":
    run(main, BatchSettings, prog=PROG)
