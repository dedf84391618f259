"""Continue every prompt of a data set: `python -m runtime.batch`.

python -m runtime.batch --model DIR --predictor P.onnx --dataset prompts.jsonl --out out.jsonl

With `--workers N` the rows go to N engines over the hosts of a Ray cluster
(`runtime.serving.batch.ray_workers`).
"""

from __future__ import annotations

from routing.cli import run
from runtime.batch.command import PROG, main
from runtime.serving.batch.settings import BatchSettings

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
