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
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from routing.cli import run
from runtime.serving.batch.settings import BatchSettings

if TYPE_CHECKING:
    from runtime.serving.batch.journal import Journal
    from runtime.serving.batch.local import LocalWorker
    from runtime.serving.batch.prompts import Row
    from runtime.serving.batch.ray_workers import Crew
    from runtime.serving.request import Request, Result

PROG = "python -m runtime.batch"


def main(settings: BatchSettings) -> None:
    """Serve every row that has no result yet, then put the results in order."""
    from runtime.serving.batch.journal import Journal
    from runtime.serving.batch.prompts import read_rows

    digest, num_rows = _digest(read_rows(settings.dataset, settings.split))
    if num_rows == 0:
        raise ValueError(f"the data set {settings.dataset} has no rows")
    with Journal(settings.out, _identity(settings, digest)) as journal:
        tokenizer = settings.read_tokenizer()
        with closing(_crew(settings, tokenizer)) as crew:
            num_bad = _serve(settings, crew, tokenizer, journal, num_rows)
            report = crew.report()
        journal.finish()
    print(f"{settings.out}: {num_rows} results, {num_bad} of them errors", file=sys.stderr)
    print(report, file=sys.stderr)


def _crew(settings: BatchSettings, tokenizer: Any) -> LocalWorker | Crew:
    if not settings.workers:
        from runtime.serving.batch.local import LocalWorker

        return LocalWorker(settings, tokenizer)
    from runtime.serving.batch.ray_workers import Crew

    return Crew(settings)


def _serve(
    settings: BatchSettings,
    crew: LocalWorker | Crew,
    tokenizer: Any,
    journal: Journal,
    num_rows: int,
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


if __name__ == "__main__":
    run(
        main,
        BatchSettings,
        prog=PROG,
        first=("model", "dataset", "out", "predictor", "memory", "max_tokens", "device"),
        examples=[
            "--model DIR --predictor predictor.onnx --memory 8GiB --dataset prompts.jsonl "
            "--out results.jsonl",
            "--model DIR --dataset prompts.txt --out results.jsonl --max-tokens 256",
        ],
    )
