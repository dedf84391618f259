"""Lengths of a data set's requests: of a sample of its rows, for the room that sequences need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from runtime.batch.jobs import Job, Jobs
from runtime.serving.batch.rows import Row
from runtime.serving.inputs.prompt import prompt_ids
from runtime.serving.steps.failures import PASSED_ON

SAMPLED = 512
"""Rows that are read: the mean of so many is within a few percent of that of all."""


class Length(NamedTuple):
    """Tokens of a request."""

    prompt: int
    most_new: int
    """Those to be generated, at the most."""


def sampled_lengths(
    rows: Iterable[Row], num_rows: int, jobs: Jobs, tokenizer: Any, done: Collection[int]
) -> list[Length]:
    """Of requests of rows all over the data set that are still to be served; none of those that
    will be refused.
    """
    lengths = []
    every = max(1, (num_rows - len(done)) // SAMPLED)
    waiting = ((index, row) for index, row in enumerate(rows) if index not in done)
    for number, (index, row) in enumerate(waiting):
        job = jobs.of(index, row) if number % every == 0 else None
        for request in job.requests if isinstance(job, Job) else ():
            try:
                length = len(prompt_ids(request.prompt, tokenizer))
            except PASSED_ON:
                raise
            except BaseException:  # whatever a tokenizer raises: serving will report it
                continue
            lengths.append(Length(length, request.max_tokens))
    return lengths


def mean_tokens(lengths: Sequence[Length], context: int, page: int) -> int | None:
    """Tokens of the cache that a sequence in flight takes in pages at the most, as a mean; None
    where nothing is known.

    Long sequences are in flight for longer: each counts by the tokens that it generates. Those that
    begin together count alike; so it is the larger one of both means.
    """
    fitting = [one for one in lengths if one.prompt + one.most_new <= context]
    if not fitting:
        return None
    taken = [-(-(one.prompt + one.most_new) // page) * page for one in fitting]
    steps = [max(one.most_new, 1) for one in fitting]
    by_time = sum(a * b for a, b in zip(taken, steps, strict=True)) / sum(steps)
    return int(max(by_time, sum(taken) / len(taken))) + 1


def tokens_together(
    lengths: Sequence[Length], context: int, page: int
) -> Callable[[int], int | None]:
    """Says for a number of sequences how many tokens the cache reserves for them together: none
    where nothing is known, and never fewer than one of `context` has.
    """
    each = mean_tokens(lengths, context, page)
    return lambda rows: None if each is None else max(rows * each, context)
