"""Train a route predictor on traces.

    python -m predictor.train fit --config predictor/configs/small.yaml --data.trace '[DIR]' \\
        --trainer.default_root_dir OUT

Prints a line for each epoch and the held-out scores. Writes to OUT: predictor.ckpt (the best
weights, calibrated, with held-out metrics), summary.json (its mean recalls), metrics.csv,
TensorBoard logs, curves.png and the checkpoints of the run.
"""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from routing.cli import friendly_errors, print_help, program, with_underscores
from routing.process.cores import wait_passively

wait_passively()  # before torch is imported

HELP = """usage: {prog} fit --config NAME_OR_FILE --data.trace TRACES [options]

Train a route predictor on traces.

subcommands:
  fit       train, calibrate and test; leaves predictor.ckpt, curves and logs
  validate  measure a checkpoint on the validation split
  test      measure a checkpoint on the test split
  predict   of LightningCLI, not used here

`{prog} fit --help` lists every option (that takes some seconds). The configurations that ship,
small, medium, base and t5, go by name; a file of your own goes by its path.
Options may be written with dashes too: --data.batch-size is --data.batch_size.

examples:
  {prog} fit --config small --data.trace '[trace]' --trainer.default_root_dir runs/mine
  {prog} fit --config base --data.trace '[trace]' --start-from predictor.ckpt
"""

if __name__ == "__main__":
    print_help(HELP, "python -m predictor.train")  # before the imports that take seconds

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from predictor.configs import with_paths
from predictor.training.calibration import calibrate
from predictor.training.checkpoint import (
    earlier_rows,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    require_resumable,
    require_same,
)
from predictor.training.curves import plot_curves
from predictor.training.data import Split, TraceData
from predictor.training.module import CHECKPOINT_KEY, RouteModule
from predictor.training.progress import EpochLines, print_scores, silence_framework
from predictor.training.resumption import ResumedLogger
from routing.process.output_lock import OutputLock

PROG = "python -m predictor.train"
DEFAULT_ROOT = "runs/predictor"
CHECKPOINT = "predictor.ckpt"
SUMMARY = "summary.json"
SPLITS = {"test": "held-out documents", "val": "validation documents (there is no test split)"}
_held = ExitStack()
"""The lock on the directory of the running training."""


class TrainCLI(LightningCLI):
    """The command line: fits, calibrates, tests and draws."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("topology", "stack", "window", "horizon"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="Checkpoint (predictor.ckpt) of a predictor of the same shape, to train further.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.save_last": True,
                "early_stopping.monitor": "val/loss",
                "early_stopping.patience": 3,
                "early_stopping.strict": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Find the checkpoint to go on from, and refuse one of another program."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        if name := config.get("ckpt_path"):
            root = Path(config["trainer"].get("default_root_dir") or DEFAULT_ROOT)
            folder = config.get("checkpoint", {}).get("dirpath") or root / "checkpoints"
            path = find_checkpoint(str(name), Path(folder))
            read_checkpoint(path)
            config["ckpt_path"] = str(path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with the project's logs and lines in place of Lightning's progress bar."""
        trainer = self._get(self.config_init, "trainer")
        root = trainer.get("default_root_dir") or DEFAULT_ROOT
        kwargs["default_root_dir"] = root
        kwargs["enable_progress_bar"] = False
        chosen = trainer.get("callbacks") or []
        lines = EpochLines(status=trainer.get("enable_progress_bar") is not False)
        kwargs["callbacks"] = [*(chosen if isinstance(chosen, list) else [chosen]), lines]
        resumed = self._get(self.config_init, "ckpt_path") if self.subcommand == "fit" else None
        rows, first_step = [], None
        if resumed:
            checkpoint = read_checkpoint(Path(resumed))
            rows = earlier_rows(Path(resumed), checkpoint)
            first_step = int(checkpoint.get("global_step", 0))
        kwargs["logger"] = [
            ResumedLogger(root, rows),
            TensorBoardLogger(root, name="", version="tensorboard", purge_step=first_step),
        ]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Lock the directory, note the traces, and check the checkpoint to go on from."""
        root = Path(self.trainer.default_root_dir)
        if self.trainer.is_global_zero:
            root.parent.mkdir(parents=True, exist_ok=True)
            _held.enter_context(OutputLock(root))
        path = self._get(self.config, "ckpt_path")
        if path:
            require_resumable(Path(path), self.model.describe())
        self.model.provenance = {
            "traces": self.datamodule.provenance,
            "torch": str(torch.__version__),
        }
        start = self._get(self.config, "start_from")
        if start:
            start_from(Path(start), self.model)

    def after_fit(self) -> None:
        """Restore the best weights, calibrate and test them, and write the results."""
        root = Path(self.trainer.default_root_dir)
        model, data = self.model, self.datamodule
        best = self.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        if best:
            model.load_state_dict(torch.load(best, weights_only=True)["state_dict"])
        model.eval().to(self.trainer.strategy.root_device)
        model.provenance["calibration"] = calibrate(model.predictor, data.val_dataloader())
        split: Split = "test" if len(data.documents("test")) else "val"
        evaluate = self.trainer.test if split == "test" else self.trainer.validate
        evaluate(model, datamodule=data, verbose=False)
        self.trainer.save_checkpoint(root / CHECKPOINT, weights_only=True)
        plot_curves(root / "metrics.csv", root / "curves.png")
        if self.trainer.is_global_zero:
            summary = {"checkpoint": str(root / CHECKPOINT), **_summary(model.report)}
            (root / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            print_scores(model.report, data.shape, f"{len(data.documents(split))} {SPLITS[split]}")
            print(f"wrote {CHECKPOINT}, {SUMMARY}, metrics.csv and curves.png to {root}")


def start_from(path: Path, module: RouteModule) -> None:
    """Copy the weights of a finished training into `module`, say to adapt them to other text.

    Raises ValueError unless the checkpoint is of the same predictor.
    """
    trained = load_checkpoint(path)
    require_same(path, json.loads(read_checkpoint(path)[CHECKPOINT_KEY]), module.describe())
    module.predictor.load_state_dict(trained.predictor.state_dict())
    module.provenance["started_from"] = trained.provenance


def _summary(report: dict[str, Any]) -> dict[str, float]:
    """Mean recall over the layers, of each head with known and with unknown history."""
    return {
        f"{name}_recall": float(torch.tensor(values["recall"]).nanmean())
        for name, values in report.items()
    }


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # never unpickle a checkpoint
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    silence_framework()
    prog = program(PROG)
    with friendly_errors(prog), _held:
        words = with_paths(with_underscores(sys.argv[1:] if args is None else args))
        if args is None:  # Lightning warns where it gets both
            sys.argv[1:] = words
        TrainCLI(
            RouteModule,
            TraceData,
            args=None if args is None else words,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"prog": prog},
        )


if __name__ == "__main__":
    main()
