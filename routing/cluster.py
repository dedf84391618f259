"""Ray, for work over several processes or hosts: the optional extra `ray`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RESTARTS = 3
"""How often a worker that died is replaced, and a call that it took with it made again."""


def connect() -> Any:
    """The module `ray`, connected to the cluster that RAY_ADDRESS names, or to one on this machine.

    Raises ValueError where Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as missing:
        raise ValueError("workers need Ray: install moe-expertflow[ray]") from missing
    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    return ray


def start_workers(worker: type, count: int, *arguments: Any, cpus: int, gpus: int = 0) -> list[Any]:
    """`count` actors of class `worker`, over as many hosts as there are.

    Raises ValueError where Ray is missing or the cluster is too small: they would wait for ever.
    """
    ray = connect()
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        have = ray.cluster_resources().get(kind, 0)
        if count * each > have:
            raise ValueError(
                f"{count} workers of {each} {kind}s each need more than the {have:g} {kind}s of "
                "the Ray cluster: take fewer, or let RAY_ADDRESS name a larger one"
            )
    actor = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
        scheduling_strategy="SPREAD",
    )(worker)
    return [actor.remote(*arguments) for _ in range(count)]


def gpus_of_worker(device: str | None) -> int:
    """GPUs that Ray gives a worker which computes on `device`; None: on a GPU, if there are any."""
    if device is None:
        return int(connect().cluster_resources().get("GPU", 0) > 0)
    return int(device.startswith("cuda"))


@contextmanager
def errors_as_here() -> Iterator[None]:
    """Raise what a worker raised as if it had happened here."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
