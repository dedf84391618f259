"""Serve a model over HTTP: `python -m runtime.server --model DIR --predictor predictor.onnx`."""

from __future__ import annotations

from routing.cli import program, run
from runtime.server.settings import ServerSettings

PROG = "python -m runtime.server"


def main(settings: ServerSettings) -> None:
    """Load the model and serve until told to stop."""
    try:
        from runtime.server.app import load_app
        from runtime.server.listener import Listener
    except ModuleNotFoundError as missing:
        raise ValueError(
            f"the server needs {missing.name}: install moe-expertflow[serve]"
        ) from missing
    token = settings.read_token()
    if not settings.is_local and token is None:
        who = f"anyone who reaches {settings.host} can use this server"
        print(f"{program(PROG)}: {who}: no token is asked")
    if settings.replicas:
        from runtime.server.replicas import start

        start(settings)
        return
    Listener(load_app(settings), settings, log_level="info").run()


if __name__ == "__main__":
    run(
        main,
        ServerSettings,
        prog=PROG,
        first=("model", "predictor", "memory", "device", "host", "port"),
        examples=[
            "--model DIR --predictor predictor.onnx --memory 8GiB",
            "--model DIR --host 0.0.0.0 --port 8080 --token-file token.txt",
        ],
    )
