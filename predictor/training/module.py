"""Training of a route predictor: the loss, the metrics and the content of checkpoints."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torchmetrics import MetricCollection

from predictor.networks.causal import CausalPredictor, CausalSettings
from predictor.networks.interface import PredictorSettings, RoutePredictor
from predictor.networks.targets import targets
from predictor.networks.windows import Predictions, PredictorShape, Windows
from predictor.training.embedding import read_embedding
from predictor.training.losses import head_losses, hide_routes, total_loss
from predictor.training.metrics import means, route_metrics
from predictor.training.optimizer import Muon, warmup_cosine
from predictor.training.resumption import SEED_KEY, note_log_rows, seed_step
from routing.predictor_file.format import HEADS
from routing.topology import Topology

CHECKPOINT_KEY = "expertflow"
"""The entry of a checkpoint that describes the predictor, as JSON."""
HISTORIES = ("known", "unknown")
"""Validation runs twice: with the true routes of earlier tokens and without them."""


class RouteModule(L.LightningModule):
    """Trains a predictor with binary cross-entropy on its heads (the paper's eq. 1).

    Args:
        topology: Routing topology of the traced model (comes from the data).
        stack: The stack of MoE layers to predict (comes from the data).
        window: Newest tokens that a prediction depends on (comes from the data).
        horizon: Tokens that the horizon head looks ahead (comes from the data).
        predictor: The kind of predictor and its sizes.
        embedding_from: Directory of the traced model, to start from its token embedding.
        learning_rate: Peak of the schedule: linear warm-up, then a cosine down to zero.
        weight_decay: Weight decay of matrices.
        warmup: Share of the steps in which the learning rate rises.
        hide_history: Chance that a training row hides the routes of all, of the first, or of single
            tokens (a third each), so that prompts are predicted as well as generated text.
        compile: Compile the training step; takes about a minute, worth it in long runs on a GPU.
    """

    def __init__(
        self,
        topology: dict[str, Any],
        stack: str,
        window: int,
        horizon: int,
        predictor: PredictorSettings,
        embedding_from: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        hide_history: float = 0.5,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.topology = Topology.from_json(topology)
        self.stack = self.topology.stack(stack)
        self.settings = predictor
        shape = PredictorShape.of(self.topology, stack, window=window, horizon=horizon)
        self.predictor: RoutePredictor = predictor.build(shape)
        if embedding_from is not None:
            self._start_from(embedding_from)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.hide_history = hide_history
        self._train_losses = torch.compile(self._losses_of) if compile else self._losses_of
        self.metrics = torch.nn.ModuleDict(
            {f"{head}_{known}": route_metrics(self.stack) for head in HEADS for known in HISTORIES}
        )
        self._seed = torch.initial_seed()
        self.report: dict[str, Any] = {}
        """Held-out metrics of each layer, filled in by validation and test."""
        self.provenance: dict[str, Any] = {}
        """The traces and libraries of the training, filled in by `predictor.train`."""

    def _start_from(self, directory: str) -> None:
        if not isinstance(self.predictor, CausalPredictor):
            raise ValueError("embedding_from: only the causal predictor takes an embedding")
        self.predictor.set_embedding(read_embedding(Path(directory)))

    # ---------------------------------------------------------------- steps

    def on_train_batch_start(self, batch: Windows, batch_idx: int) -> None:
        """Make the random numbers of a step independent of the steps before it."""
        seed_step(self._seed, self.trainer.global_rank, self.current_epoch, batch_idx)

    def training_step(self, batch: Windows, batch_idx: int) -> Tensor:
        """The loss of a batch with some of its history hidden."""
        losses_J = self._train_losses(batch)
        loss = total_loss(losses_J)
        self.log("train/loss", loss, logger=False, batch_size=len(batch.token_ids_BT))
        if self._steps_with(batch_idx) and (self.global_step + 1) % self._log_interval == 0:
            self._write_losses(losses_J)
            self._require_finite(loss)
        return loss

    def _require_finite(self, loss: Tensor) -> None:
        """Raise ValueError where the training has diverged."""
        if not loss.isfinite():
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
            kept = f"; the best checkpoint before it is {best}" if best else ""
            raise ValueError(
                f"the training diverged: the loss is {float(loss)} in step {self.global_step}; "
                f"lower model.learning_rate, or set trainer.gradient_clip_val{kept}"
            )

    def _steps_with(self, batch_idx: int) -> bool:
        """Whether the optimizer steps after this batch."""
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    @property
    def _log_interval(self) -> int:
        """Steps between two rows of the log."""
        return max(1, int(self.trainer.log_every_n_steps))  # type: ignore[attr-defined]

    def _write_losses(self, losses_J: Tensor) -> None:
        """Write a row of the log at once, so that a checkpoint of this step comes after it."""
        row = {name: float(loss) for name, loss in _named_losses("train", losses_J).items()}
        for logger in self.loggers:
            logger.log_metrics(row | {"epoch": self.current_epoch}, step=self.global_step)

    def _losses_of(self, batch: Windows) -> Tensor:
        routes_BTLK = hide_routes(batch.routes_BTLK, self.hide_history)
        return self.losses(self.predictor(batch._replace(routes_BTLK=routes_BTLK)), batch)

    def validation_step(self, batch: Windows, batch_idx: int) -> None:
        """Measure a batch of the validation split."""
        self._measure("val", batch)

    def test_step(self, batch: Windows, batch_idx: int) -> None:
        """Measure a batch of the test split."""
        self._measure("test", batch)

    def _measure(self, stage: str, batch: Windows) -> None:
        for known in HISTORIES:
            seen = batch if known == "known" else batch.without_history()
            predictions = self.predictor(seen)
            self._update_metrics(predictions, batch, known)
            if known == "known":
                self._log_losses(stage, self.losses(predictions, batch), len(batch.token_ids_BT))

    def losses(self, predictions: Predictions, batch: Windows) -> Tensor:
        """The loss [J] of each head, over the tokens that the predictor is trained on."""
        return head_losses(
            predictions, batch, self.predictor.shape, self.predictor.trained_BT(batch)
        )

    def _update_metrics(self, predictions: Predictions, batch: Windows, known: str) -> None:
        counted_BT = self.predictor.trained_BT(batch)
        answers = targets(batch, self.predictor.shape)
        for head, logits_BTLE, target in zip(HEADS, predictions, answers, strict=True):
            rows = target.valid_BT & counted_BT
            self.metric(head, known).update(logits_BTLE[rows], target.used_BTLE[rows])

    def metric(self, head: str, known: str) -> MetricCollection:
        """The metrics of one head with known or unknown history."""
        collection = self.metrics[f"{head}_{known}"]
        assert isinstance(collection, MetricCollection)
        return collection

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation split."""
        self._close_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test split."""
        self._close_metrics("test")

    def _close_metrics(self, stage: str) -> None:
        """Log the means over layers; keep the figures of each layer in `report`."""
        self.report = {}
        for head in HEADS:
            for known in HISTORIES:
                metric = self.metric(head, known)
                values = metric.compute()
                metric.reset()
                self.report[f"{head}_{known}"] = {n: v.tolist() for n, v in values.items()}
                self.log_dict(means(values, prefix=f"{stage}/{head}_{known}_"))
        recall = torch.tensor(self.report["this_known"]["recall"]).nanmean()
        self.log(f"{stage}/recall", recall, prog_bar=True)

    def _log_losses(self, stage: str, losses_J: Tensor, batch_size: int) -> None:
        self.log_dict(_named_losses(stage, losses_J), batch_size=batch_size)

    # ---------------------------------------------------------------- optimiser, checkpoint

    def configure_optimizers(self) -> Any:
        """Warm-up and cosine decay over the run's steps, or its time where that ends first."""
        matrices = self.predictor.hidden_matrices()
        taken = {id(matrix) for matrix in matrices}
        others = [p for p in self.predictor.parameters() if id(p) not in taken]
        optimizer = Muon(matrices, others, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_cosine(max((step + 0.5) / steps, self._spent()), self.warmup),
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _spent(self) -> float:
        """The elapsed share of `trainer.max_time`; 0 where none is set."""
        timer = next((c for c in self.trainer.callbacks if isinstance(c, Timer)), None)  # type: ignore[attr-defined]
        remaining = None if timer is None else timer.time_remaining()
        if timer is None or remaining is None:
            return 0.0
        elapsed = timer.time_elapsed()
        return elapsed / max(elapsed + remaining, 1e-9)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilding the predictor needs, as JSON: no pickled classes."""
        checkpoint[CHECKPOINT_KEY] = json.dumps(self.describe())
        checkpoint[SEED_KEY] = self._seed
        if self._trainer is not None:
            note_log_rows(self._trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the seed of the run."""
        self._seed = int(checkpoint.get(SEED_KEY, self._seed))

    def describe(self) -> dict[str, Any]:
        """The description of the predictor that a checkpoint holds."""
        shape = self.predictor.shape
        return {
            "kind": self.predictor.kind,
            "settings": vars(self.settings),
            "topology": self.topology.to_json(),
            "stack": self.stack.name,
            "window": shape.window,
            "horizon": shape.horizon,
            "metrics": self.report,
            "provenance": self.provenance,
        }


def _named_losses(stage: str, losses_J: Tensor) -> dict[str, Tensor]:
    """The losses of the heads and their weighted sum, by their names in the log."""
    named = {f"{stage}/{head}_loss": loss for head, loss in zip(HEADS, losses_J, strict=True)}
    return named | {f"{stage}/loss": total_loss(losses_J)}


def settings_of(kind: str) -> type[PredictorSettings]:
    """The settings class of a kind of predictor ("causal" or "t5"). Raises ValueError."""
    from predictor.networks.t5 import T5Settings

    kinds: dict[str, type[PredictorSettings]] = {"causal": CausalSettings, "t5": T5Settings}
    if kind not in kinds:
        raise ValueError(f"there is no predictor of kind {kind!r}; there are {', '.join(kinds)}")
    return kinds[kind]
