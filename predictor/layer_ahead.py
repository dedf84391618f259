"""Train networks that look one to a few layers ahead, and add their predictions to traces.

    python -m predictor.layer_ahead --model DIR_OR_ID --trace TRAINING_DIR \
        --annotate VALIDATION_DIR FIT_DIR --out DIR

The networks are a baseline for `runtime.simulate --all`; the runtime does not load them. They read
hidden states, which the model streams while it runs the text of the traces again, and which are
never stored. Each trace to annotate is copied to `--out` under its own name, with the look-ahead
"mlp" in it, or "linear" with `--width 0`.
"""

from __future__ import annotations

from predictor.lookahead.settings import LayerAheadSettings
from routing.cli import run


def main(settings: LayerAheadSettings) -> None:
    """Train and annotate. Raises ValueError, before any training, for a trace that does not fit."""
    import torch

    from predictor.lookahead.annotation import annotate
    from predictor.lookahead.router_inputs import load_model
    from predictor.lookahead.training import train
    from predictor.training.data import open_traces

    for path in settings.annotate:
        if (settings.out / path.name).exists():
            raise ValueError(f"{settings.out / path.name} exists already: name another --out")
    readers = open_traces([*settings.trace, *settings.annotate], "decoder")
    model = load_model(settings.model, readers[0].topology, device=settings.device)
    torch.manual_seed(settings.seed)
    networks = train(model, readers[: len(settings.trace)], settings)
    for reader in readers[len(settings.trace) :]:
        annotate(model, networks, reader, settings)


if __name__ == "__main__":
    run(
        main,
        LayerAheadSettings,
        prog="python -m predictor.layer_ahead",
        examples=["--model DIR --trace trace --annotate held-out --out annotated"],
    )
