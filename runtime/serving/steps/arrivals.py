"""Arrivals: requests and wishes to end them, from any thread, taken in between steps."""

from __future__ import annotations

from queue import Empty, SimpleQueue
from typing import NamedTuple

from runtime.serving.request import Request
from runtime.serving.sequence import ServedSequence
from runtime.serving.steps.failures import PASSED_ON, fault_at_arrival, reason_of, refusal
from runtime.serving.steps.in_flight import InFlight
from runtime.serving.validation import Validator


class Cancel(NamedTuple):
    """The wish to end a request."""

    id: str


class Arrivals:
    """Makes sequences of requests; a bad request ends here, whatever it makes a library raise."""

    def __init__(self, validator: Validator, sequences: InFlight) -> None:
        self._validator, self._sequences = validator, sequences
        self._inbox: SimpleQueue[Request | Cancel] = SimpleQueue()
        self._num_arrived = 0

    @property
    def is_empty(self) -> bool:
        return self._inbox.empty()

    def put(self, item: Request | Cancel) -> None:
        """Hand over from any thread."""
        self._inbox.put(item)

    def take(self, failure: str = "") -> None:
        """Take in everything that was put. failure: the reason to refuse all requests."""
        first = self._num_arrived
        while True:
            try:
                item = self._inbox.get_nowait()
            except Empty:
                break
            if isinstance(item, Cancel):
                self._cancel(item.id)
            elif failure:
                self._sequences.ended.append(refusal(item, failure, "server"))
            else:
                self._arrive(item)
        if self._num_arrived == first:
            return
        for sequence in self._sequences.waiting:
            if sequence.number >= first:
                sequence.num_waiting_at_arrival = len(self._sequences.waiting)

    def _cancel(self, request_id: str) -> None:
        for sequence in self._sequences.all:
            if sequence.request.id == request_id:
                self._sequences.end(sequence, "cancelled")

    def _arrive(self, request: Request) -> None:
        sequences, tokenizer = self._sequences, self._validator.tokenizer
        try:
            if any(request.id == sequence.request.id for sequence in sequences.all):
                raise ValueError(f"a request with the id {request.id!r} is in flight already")
            prompt_ids = self._validator.encode(request)
            sequence = ServedSequence(
                request, prompt_ids, tokenizer, self._num_arrived, sequences.eos_ids
            )
        except PASSED_ON:
            raise
        except BaseException as error:
            sequences.ended.append(refusal(request, reason_of(error), fault_at_arrival(error)))
            return
        sequences.waiting.append(sequence)
        self._num_arrived += 1
