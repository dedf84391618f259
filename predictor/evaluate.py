"""Compare exported predictors with each other and with baselines, on held-out documents.

    python -m predictor.evaluate --trace DIR --predictors a.onnx b.onnx --fit_trace TRAINING_DIR

Without `--fit_trace` the baselines are fitted on the training split of the trace and all predictors
are scored on its test split. The splits are those that `predictor.train` makes by default. With it,
documents that both traces hold are left out of the figures.
"""

from __future__ import annotations

import json

from predictor.evaluation.settings import EvaluateSettings
from routing.cli import run
from routing.process.cores import wait_passively


def evaluate(settings: EvaluateSettings) -> None:
    """Score the predictors, print tables, write the JSON and the picture. Raises ValueError."""
    wait_passively()
    from predictor.evaluation.corpus import corpora
    from predictor.evaluation.report import plot_layers, to_json
    from predictor.evaluation.scoring import all_contenders, check, score
    from predictor.evaluation.tables import print_report
    from predictor.file.documents import open_exported
    from routing.shards import TraceReader, write_atomically

    reader = TraceReader(settings.trace, settings.stack)
    reader.require_token_ids("a predictor")
    predictors = [open_exported(path) for path in settings.predictors]
    check(predictors, reader, settings)
    fit, held_out = corpora(reader, settings)
    contenders, shape = all_contenders(predictors, fit, settings)
    scores = score(contenders, held_out, shape, predictors)
    report = to_json(settings, scores, predictors, shape.horizon)
    print_report(report, scores, reader.stack)
    for path in filter(None, (settings.json, settings.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if settings.json is not None:
        write_atomically(settings.json, json.dumps(report, indent=1).encode())
    if settings.plot is not None:
        plot_layers(scores.results, reader.stack, shape.horizon, settings.plot)


if __name__ == "__main__":
    run(
        evaluate,
        EvaluateSettings,
        prog="python -m predictor.evaluate",
        examples=[
            "--trace trace --predictors predictor.onnx",
            "--trace held-out --fit-trace trace --predictors a.onnx b.onnx --plot recall.png",
        ],
    )
