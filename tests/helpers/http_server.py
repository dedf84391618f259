"""The HTTP server in a thread, on a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from runtime.engine.engine import Engine
from runtime.server.app import build_app
from runtime.server.settings import ServerSettings
from tests.helpers.tiny import tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@contextmanager
def running(engine: Engine, **options: Any) -> Iterator[str]:
    """The address of a server of the model `tiny` that runs in a thread."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    settings = ServerSettings(**({"model": "models/tiny", "context": 200} | options))
    app = build_app(engine, tokenizer, settings, settings.read_token())
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=settings.grace)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
