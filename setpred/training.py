"""The training layer: one LightningModule for any set predictor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from setpred import checkpoint
from setpred.checkpoint import save_whole
from setpred.errors import InputError
from setpred.losses import HungarianLoss
from setpred.matching import NotFiniteError
from setpred.metrics import AveragePrecision, Mean
from setpred.model import SetPredictor
from setpred.nn import batch_norms, estimating_statistics
from setpred.schedules import Constant, Schedule
from setpred.schema import CLEVR, ElementSchema
from setpred.sets import check_set

SCHEMAS: dict[str, ElementSchema] = {CLEVR.name: CLEVR}
STATISTICS_IMAGES = 1024  # over which batch statistics for validation are taken


class SetPrediction(pl.LightningModule):
    """Trains a `SetPredictor` by a set loss and validates it by average precision, or by another metric.

    Batches are dictionaries with `image` uint8 `[batch, 3, H, W]`, or `input` `[batch, n, in_dim]` and perhaps
    `input_mask` bool `[batch, n]`; the target `elements [batch, set_size, set_dim]`; and `index [batch]`. The
    randomness of a training step is a function of (seed, step) alone, so that a resumed run repeats the undisturbed
    one. Before each validation the encoder's statistics of batch normalisation are estimated anew, over the first
    training images, if the data module has `statistics_batches`; see `setpred.nn.estimating_statistics`. Logs
    `val_loss` and `val_<name>` of every number of the metric; `setpred.callbacks.TrainLoss` logs `train_loss`.

    Args:
        encoder: image, or set, to features.
        decoder: features to set.
        schema: name of the element schema (`SCHEMAS`), which gives the metric; None for elements without one.
        loss: per-example set loss; `HungarianLoss` unless given.
        metric: a torchmetrics metric with `update(predicted, target)`, a `compute` that gives numbers by name, and
            which of them to `monitor` with which `mode`, "max" or "min". With a schema `AveragePrecision` unless given;
            without either the validation loss is monitored.
        learning_rate, betas: of Adam.
        weight_decay: decoupled, as in AdamW.
        schedule: of the learning rate; constant unless given.
        iterations_by_epoch: descent steps from given epochs on, e.g. `{0: 20, 50: 40}`; training only.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        schema: str | None = CLEVR.name,
        loss: nn.Module | None = None,
        metric: nn.Module | None = None,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        iterations_by_epoch: dict[int, int] | None = None,
    ) -> None:
        super().__init__()
        if schema is not None and schema not in SCHEMAS:
            raise InputError(f"unknown schema {schema!r}; expected one of {', '.join(SCHEMAS)}")
        self.schema = None if schema is None else SCHEMAS[schema]
        set_dim = getattr(decoder, "set_dim", None)
        if self.schema is not None and set_dim not in (None, self.schema.set_dim):
            raise InputError(
                f"schema {schema!r} has elements of {self.schema.set_dim} numbers, the decoder of {set_dim}; give the "
                "decoder that set_dim, or `schema: null` for elements without a schema"
            )
        # channels-last is the faster layout for convolutions on GPUs and CPUs alike
        self.model = SetPredictor(encoder, decoder).to(memory_format=torch.channels_last)
        self.loss = HungarianLoss() if loss is None else loss
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.schedule = Constant() if schedule is None else schedule
        self.iterations_by_epoch = iterations_by_epoch
        self._batch: dict[str, Tensor] = {}
        self._trained_norms: list[nn.Module] = []  # of the encoder
        self._statistics_images: list[Tensor] | None = None
        self.seed = 0  # the command line sets it to seed_everything
        self.model_config: dict[str, Any] | None = None  # encoder and decoder as plain types, for checkpoints
        self.data_description: dict[str, Any] = {}  # the validation data's path, split and image size
        self.settings: dict[str, Any] = {}  # the other settings of the run, likewise; a resumed run is compared
        self.metric = AveragePrecision(schema=self.schema) if metric is None and self.schema is not None else metric
        self.mean_loss = Mean()  # of a validation
        self.monitor = "val_loss" if self.metric is None else f"val_{self.metric.monitor}"
        self.mode = "min" if self.metric is None else self.metric.mode

    def forward(self, inputs: Tensor, **arguments: Any) -> Tensor:
        return self.model(inputs, **arguments)

    def training_iterations(self) -> int | None:
        """Descent steps at this epoch of training; None leaves it to the decoder."""
        reached = [epoch for epoch in self.iterations_by_epoch or {} if epoch <= self.current_epoch]
        return self.iterations_by_epoch[max(reached)] if reached else None

    def on_train_start(self) -> None:
        self._note_norms()  # a run resumed at the end of an epoch validates first
        self._count_batches()

    def _count_batches(self) -> None:
        """Where an epoch goes on with batches of another size, or shared by other processes, as many have gone by."""
        loader, progress = self.trainer.train_dataloader, self.trainer.fit_loop.epoch_loop.batch_progress.current
        behind = loader.behind(self.current_epoch) if hasattr(loader, "behind") else None
        if behind is not None:
            shift = behind - progress.ready
            for name in ("ready", "started", "processed", "completed"):
                setattr(progress, name, getattr(progress, name) + shift)

    def _note_norms(self) -> None:
        """Which batch normalisations train: not those held fixed, in evaluation mode all along."""
        self._trained_norms = [norm for norm in batch_norms(self.model.encoder) if norm.training]

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # set from (step, epoch) each time, not by a stateful scheduler: nothing to restore, nothing to drift
        for group in self.optimizers().param_groups:
            group["lr"] = self.learning_rate * self.schedule(self.global_step, self.current_epoch)
        # also seeds CUDA; 1_000_003 keeps the streams of neighbouring seeds apart
        stream = (self.seed * 1_000_003 + self.global_step) * 1_009 + batch_idx
        torch.manual_seed((stream * 1_021 + self.global_rank) % 2**63)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self._batch = batch
        self._note_norms()
        losses, _ = self._predict(batch, iterations=self.training_iterations())
        return losses.mean()

    @torch.no_grad()
    def _estimate_statistics(self) -> None:
        """While training: the batch statistics of the present weights, over the same images in every process."""
        data = self._trainer and getattr(self.trainer, "datamodule", None)
        if not self._trained_norms or not hasattr(data, "statistics_batches") or self.trainer.state.fn != "fit":
            return
        if self._statistics_images is None:  # kept, for streamed ones have to be drawn
            batches = data.statistics_batches(STATISTICS_IMAGES)
            self._statistics_images = [self.trainer.strategy.batch_to_device(batch)["image"] for batch in batches]
        with self.trainer.precision_plugin.forward_context(), estimating_statistics(self._trained_norms):
            for images in self._statistics_images:
                self.model.encode(images)

    def on_fit_end(self) -> None:
        self._statistics_images = None

    def on_validation_start(self) -> None:
        self._estimate_statistics()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score(batch)

    def on_validation_epoch_end(self) -> None:
        # every process has them of all images; of equal numbers the largest is exact, a mean is not
        self.log_dict(self._scores(), sync_dist=True, reduce_fx="max")

    def validate(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """The same numbers as a validation by the trainer logs, at any moment and by themselves."""
        was_training = self.training
        self.eval()
        try:
            self._estimate_statistics()
            with torch.no_grad():
                for batch in batches:
                    self._score({name: value.to(self.device) for name, value in batch.items()})
            return {name: float(value) for name, value in self._scores().items()}
        finally:
            self.train(was_training)

    def _predict(
        self, batch: dict[str, Tensor], *, index: Tensor | None = None, iterations: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of each example and the predicted sets."""
        inputs = batch["image"] if "image" in batch else batch["input"]
        predicted = self.model(inputs, mask=batch.get("input_mask"), index=index, iterations=iterations)
        return self._losses(batch, predicted), predicted

    def _score(self, batch: dict[str, Tensor]) -> None:
        """Loss and metric take note of the predictions."""
        losses, predicted = self._predict(batch, index=batch["index"])
        self.mean_loss.update(losses)
        if self.metric is not None:
            self.metric.update(predicted.float(), batch["elements"])

    def _scores(self) -> dict[str, Tensor]:
        """What they say of all that all processes have seen, which they forget."""
        scores = {"loss": self.mean_loss.compute()}
        self.mean_loss.reset()
        if self.metric is not None:
            scores |= self.metric.compute()
            self.metric.reset()
        return {f"val_{name}": value.float() for name, value in scores.items()}

    def _losses(self, batch: dict[str, Tensor], predicted: Tensor) -> Tensor:
        """Loss of each example, checked to be finite."""
        check_set(batch["elements"], set_dim=None if self.schema is None else self.schema.set_dim)
        try:
            losses = self.loss(predicted.float(), batch["elements"])
            # one number to the host each step, against hours of training on nothing
            if not torch.isfinite(losses.detach().sum()):
                raise NotFiniteError("the loss", (~torch.isfinite(losses)).nonzero().flatten().tolist())
        except NotFiniteError as error:
            raise self._stop(error, batch) from error
        return losses

    def _stop(self, error: NotFiniteError, batch: dict[str, Tensor]) -> InputError:
        """Saves all that repeats the failing step and says where it lies."""
        index = batch["index"].tolist()
        path = Path(self.trainer.default_root_dir) / f"repro-step-{self.global_step}.pt"
        save_whole(
            {
                "error": str(error),
                "step": self.global_step,
                "epoch": self.current_epoch,
                "training": self.training,
                "samples": error.samples,
                "batch": {name: value.cpu() for name, value in batch.items()},
                "state_dict": self.state_dict(),
                checkpoint.KEY: self.description(),
            },
            path,
        )
        return InputError(
            f"step {self.global_step} (epoch {self.current_epoch}): {error}; "
            f"data indices {[index[sample] for sample in error.samples[:8]]}. "
            f"Model, batch and seed are saved in {path}. If the loss rose before, lower model.learning_rate or set "
            "trainer.gradient_clip_val; if it came at once, look at these images and their elements"
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameters(), self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):
            # before the weights take it in, so that the repro file holds the last good ones
            error = NotFiniteError("the gradient", [])
            raise self._stop(error, self._batch) from error

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        """Adds what evaluation needs to rebuild the model: plain types only."""
        content[checkpoint.KEY] = self.description()

    def description(self) -> dict[str, Any]:
        """What rebuilds the model, in plain types; `setpred.checkpoint` reads it."""
        return {
            "version": checkpoint.VERSION,
            "schema": None if self.schema is None else self.schema.to_dict(),
            "model": self.model_config,
            "data": self.data_description,
            "settings": self.settings,
            "seed": self.seed,
        }
