"""Stock clients against the server of the embedded model, each by its own package.

    python -m tests.clients --python CLIENTS/bin/python [--node_modules FOLDER]

CLIENTS is an environment with torch, transformers, openai, langchain-openai, litellm, lm_eval and
guidellm; FOLDER holds the npm package `openai`. `make clients` makes both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "exports/moe-8x32"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True)
    parser.add_argument("--node_modules")
    chosen = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "runtime.server", "--model", str(MODEL), "--port", str(port)]
    command += ["--memory", "0.5", "--context", "1024"]
    server = subprocess.Popen(command)
    try:
        _wait(address, server)
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        script = [chosen.python, str(HERE / "python_clients.py"), address, str(MODEL)]
        code = subprocess.run(script, env=offline, check=False).returncode
        if chosen.node_modules:
            code |= _npm(address, Path(chosen.node_modules))
    finally:
        server.terminate()
        server.wait(30)
    return code


def _wait(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.2)
    raise TimeoutError("the server does not start")


def _npm(address: str, node_modules: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(shutil.copy(HERE / "npm_client.mjs", folder))
        (Path(folder) / "node_modules").symlink_to(node_modules.resolve())
        return subprocess.run(["node", str(script), address], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
