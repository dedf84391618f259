"""The server's page open beside decoding on a CPU: processor time and speed.

    python -m benchmarks.live_page --model DIR --predictor predictor.onnx [--out FILE]

A server of the model runs in a process of its own. Viewers take turns, each beside one text:
nobody, a client of the events that drops them, and headless Chromium with the page. On a machine
that others use, tokens a second are noisy; the CPU seconds of the browser's processes and of the
server's HTTP thread are much less so. Linux only.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from benchmarks.live_page.settings import LivePageSettings
from routing.cli import run


def main(settings: LivePageSettings) -> None:
    """Run all rounds, print each text's figures, then the tables."""
    import torch

    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, save
    from benchmarks.live_page.page import live_page
    from benchmarks.live_page.run import watched
    from benchmarks.live_page.server import serving
    from benchmarks.live_page.viewers import check

    check(settings)
    facts = {
        "machine": machine(torch.device("cpu")),
        "command": command("benchmarks.live_page"),
        "link_bytes_per_s": None,
        "cores": os.cpu_count(),
        "model": settings.model.name,
        "tokens": settings.tokens,
        "threads": settings.threads,
    }
    print_facts(facts)
    rows: list[dict[str, Any]] = []
    with serving(settings, free_port()) as server:
        for number in range(settings.rounds + 1):
            for viewer in settings.viewers:
                with watched(server, settings, viewer) as one:
                    row = one.text() | {"round": number}
                print(json.dumps(row), flush=True)
                if number:  # the first warms up
                    rows.append(row)
            save(facts | {"rows": rows}, settings.out)
        if settings.screenshot is not None:
            picture(server, settings)
    print("\n".join(live_page(facts | {"rows": rows})))


def picture(server: Any, settings: LivePageSettings) -> None:
    """The page in the middle of a chat, as a file."""
    from benchmarks.live_page.run import watched

    with watched(server, settings, "chat") as one:
        assert one.browser is not None
        with one.browser.page() as page:
            page.set_viewport_size({"width": 1280, "height": 900})

        def take() -> None:
            assert one.browser is not None
            with one.browser.page() as page:
                page.wait_for_timeout(3000)
                page.screenshot(path=str(settings.screenshot))

        one.text(take)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


if __name__ == "__main__":
    run(main, LivePageSettings, prog="python -m benchmarks.live_page")
