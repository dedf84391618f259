"""A server of a tiny model on a real socket, in a thread, and the official client for it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

from runtime.engine.engine import Engine
from runtime.server.app import build_app
from runtime.server.listener import Listener
from runtime.server.settings import ServerSettings
from tests.helpers.tiny import tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@contextmanager
def running(
    engine: Engine,
    *,
    template: str | None = TEMPLATE,
    tokenizer: Any = None,
    at: int = 0,
    **options: Any,
) -> Iterator[str]:
    """The address of a server that runs in a thread. template: the tokenizer's own. at: the port;
    0 takes a free one.
    """
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    tokenizer.chat_template = template
    given: dict[str, Any] = {"model": "models/tiny", "context": 200} | options
    settings = ServerSettings(**given)
    app = build_app(engine, tokenizer, settings, settings.read_token())
    listening = socket.create_server(("127.0.0.1", at))
    server = Listener(app, settings, log_level="warning")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def connect(address: str, key: str = "none") -> openai.OpenAI:
    """The official client, which does not try again."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
