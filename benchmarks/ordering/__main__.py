"""The worth of ordering sequences by their routes, by the number that decode together.

    python -m benchmarks.ordering --trace DIR --predictor predictor.onnx [--out FILE]

Texts of a trace are served without a model: the scheduler, its forecasts and the cache are the
runtime's own, routes and tokens are the recorded ones. Requests never run out, and no order ever
rests but the one as served. Slots are equal for all orders; the key/value cache of the further
sequences that an order chooses among is not paid for.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from benchmarks.ordering.settings import OrderingSettings
from routing.cli import run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.ordering.texts import Foretold
    from routing.predictor_file.reader import PredictorFile


def main(settings: OrderingSettings) -> None:
    """Run every order of every batch, print each, then a table."""
    import torch

    from benchmarks.common.coded_models import PLAIN
    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, save, settings_json
    from benchmarks.ordering.page import by_batch
    from benchmarks.ordering.texts import foretell
    from benchmarks.replay.recorded_requests import num_passages, recorded_requests
    from routing.predictor_file.reader import open_predictor

    torch.set_num_threads(1)
    file = open_predictor(settings.predictor)
    new = settings.output_tokens[1]
    length = settings.prompt_tokens + new
    count = min(settings.texts, num_passages(settings.trace, length))
    _, recorded = recorded_requests(
        settings.trace, count, prompt_tokens=[settings.prompt_tokens] * 2,
        output_tokens=[new] * 2, seed=settings.seed,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "title": f"{count:,} texts of {length} tokens, {file.stack}",
        "machine": machine(torch.device("cpu")),
        "command": command("benchmarks.ordering"),
        "link_bytes_per_s": None,
        "settings": settings_json(settings),
        "top_k": file.stack.top_k,
        "num_experts": file.stack.num_experts,
        "expert_bytes": expert_bytes_of(settings.shape, PLAIN),
    }
    print_facts(facts)
    texts = list(foretell(file, list(recorded.values()), settings.prompt_tokens))
    rows: list[dict[str, Any]] = []
    for batch in settings.batches:
        for name in settings.orders:
            rows.append(run_order(settings, texts, file, name, batch, facts["expert_bytes"]))
            print(json.dumps(rows[-1]), flush=True)
            save(facts | {"rows": rows}, settings.out)
    print("\n".join(by_batch(facts | {"rows": rows})))


def run_order(
    settings: OrderingSettings, texts: Sequence[Foretold], file: PredictorFile, name: str,
    batch: int, expert_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """One order of one batch: the sums over the counted steps."""
    from benchmarks.ordering.simulation import Counted, Order, OrderedRun

    order = Order.of(name, batch)
    run = OrderedRun(
        texts, order, file.stack, residency=settings.residency, horizon=file.horizon,
        load_s=expert_bytes / settings.link_gb_per_s / 1e9,
        output_tokens=settings.output_tokens, seed=settings.seed,
    )  # fmt: skip
    start = time.perf_counter()
    while run.ended < batch:
        run.step()
    total = Counted()
    while total.steps < settings.steps and total.tokens < settings.tokens:
        total.add(run.step())
    decodes = total.decode_steps
    return {
        "batch": batch, "order": name, "decoding": order.batch, "rows": order.rows,
        "steps": total.steps, "tokens": total.tokens,
        "loads_per_token": total.loads / total.tokens, "decode_steps": decodes,
        "used_share": total.used / decodes if decodes else None,
        "foretold_share": total.foretold / decodes if decodes else None,
        "order_ms": 1e3 * total.seconds / total.steps, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def expert_bytes_of(shape: str, encoding: str) -> int:
    """Bytes of one expert of a shape's model."""
    from benchmarks.common.coded_models import coded_bytes
    from benchmarks.common.shapes import empty_model, shape_named
    from routing.layers import find_moe_layers

    layers = find_moe_layers(empty_model(shape_named(shape)))
    return coded_bytes(shape, encoding) // sum(layer.num_experts for layer in layers)


if __name__ == "__main__":
    run(main, OrderingSettings, prog="python -m benchmarks.ordering")
