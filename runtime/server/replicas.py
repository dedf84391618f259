"""The server as replicas on a Ray cluster, by Ray Serve: `python -m runtime.server --replicas N`.

Each replica is the whole application of `runtime.server.app` with a model of its own; Ray Serve
listens, on every host, and hands requests to the replicas. What `/metrics` counts and what
`max_queue` bounds is one replica's.
"""

from __future__ import annotations

from fastapi import FastAPI

from routing.cluster import connect, gpus_of_worker
from runtime.server.settings import ServerSettings


def start(settings: ServerSettings, *, blocking: bool = True) -> None:
    """Serve, until Ctrl-C if `blocking`. Raises ValueError where Ray Serve is missing."""
    connect()
    try:
        from ray import serve
    except ImportError as missing:
        raise ValueError("replicas need Ray Serve: install moe-expertflow[ray]") from missing

    def build() -> FastAPI:
        from runtime.server.app import load_app

        return load_app(settings)

    deploy = serve.deployment(
        name="expertflow",
        num_replicas=settings.replicas,
        ray_actor_options={"num_gpus": gpus_of_worker(settings.device)},
        max_ongoing_requests=settings.max_queue,
        graceful_shutdown_timeout_s=settings.grace,
    )
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(deploy(serve.ingress(build)()).bind(), name="expertflow", blocking=blocking)
