"""What a training run measures and prints: means over epochs, one line of metrics an epoch, plain progress."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from setpred.aggregators import AttSets
from setpred.checkpoint import TRAINED
from setpred.errors import InputError
from setpred.files import write_atomically

VALIDATED = "val_"  # begins the names of what a validation measures
STEP_LOSS = "loss"  # of the latest step, for the progress bar and loggers
NOTABLE_WAITING = 0.05  # a smaller share is not worth a word on the screen; metrics.csv has it


class MetricsFile(pl.Callback):
    """One row an epoch in `metrics.csv`: epoch, step, seconds of the run, learning rate, losses, AP and so on.

    A resumed run keeps the rows of the epochs before it and drops later ones, so none is missing or double. Its
    seconds count from those of its checkpoint; what was trained after that and lost is not in them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.start = time.monotonic()
        self.validated: dict[str, float] = {}  # of the latest validation since the last row

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.monotonic() - self.start, "validated": dict(self.validated)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = time.monotonic() - state_dict["seconds"]
        self.validated = dict(state_dict.get("validated", {}))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.start, self.validated = time.monotonic(), {}  # before the state of a resumed run comes

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows = []
        if trainer.current_epoch > 0 and self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < trainer.current_epoch]
        # what was measured in this epoch before a resume, for who looks for the best
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.validated.items()})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self.validated = {name: float(value) for name, value in metrics if name.startswith(VALIDATED)}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "seconds": round(time.monotonic() - self.start, 1),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        measured = {name: float(value) for name, value in trainer.callback_metrics.items() if name != STEP_LOSS}
        # Lightning keeps the numbers of a validation, also for epochs that have none
        measured = {name: value for name, value in measured.items() if not name.startswith(VALIDATED)}
        row |= sorted((measured | self.validated).items())
        self.validated = {}
        self.rows.append(row)
        names = list(dict.fromkeys(name for each in self.rows for name in each))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue())


class EpochMean(pl.Callback):
    """Logs a mean over the training of an epoch as `name`; a run that is resumed within one goes on with its sums.

    Over all processes. Subclasses add to `total` and `weight`, tensors or numbers.
    """

    name: str

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer
        self.total: Tensor | float = 0.0
        self.weight: Tensor | float = 0.0

    def state_dict(self) -> dict[str, float]:
        return dict(zip(("total", "weight"), self._sums(), strict=True))

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        if self.trainer.is_global_zero:  # the sums are of all processes, however many there are now
            self.total, self.weight = state_dict.get("total", 0.0), state_dict.get("weight", 0.0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total, weight = self._sums()
        if weight > 0:
            pl_module.log(self.name, total / weight, sync_dist=True, reduce_fx="max")  # the same in all processes
        self.total = self.weight = 0.0

    def _sums(self) -> list[float]:
        """Of all processes, which must all ask."""
        sums = [float(self.total), float(self.weight)]
        if self.trainer.world_size == 1:
            return sums
        both = torch.tensor(sums, dtype=torch.float64, device=self.trainer.strategy.root_device)
        return self.trainer.strategy.reduce(both, reduce_op="sum").tolist()


class TrainLoss(EpochMean):
    """Logs `train_loss`, the mean over the training examples of the epoch, and `loss`, of each step.

    Steps whose loss is not finite do not count.
    """

    name = "train_loss"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs is None:
            return
        # left on the device, in double precision, where there is one; Lightning has divided by the batches of a step
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        pl_module.log(STEP_LOSS, loss, prog_bar=True)
        loss = loss if loss.device.type == "mps" else loss.double()
        known = torch.isfinite(loss)
        examples = len(batch["elements"])
        self.total = self.total + torch.where(known, loss * examples, 0)
        self.weight = self.weight + known * examples


class DataWaiting(EpochMean):
    """Logs `data_waiting` each epoch, the share of training that is spent waiting for data, from 0 to 1.

        data_waiting = Σ (step begins - batch is asked for) / Σ (step ends - batch is asked for)

    over the steps of the epoch in all processes. Reading, moving to the device and, of streamed scenes, drawing count
    as waiting; validation and checkpoints count as neither. It is the host's time: on a GPU that still has work while
    the host waits, an upper bound. Near 0 the data keep up; if not, more `num_workers` or `in_memory` help. Only
    loaders that tell when they were `asked` are timed, as `setpred.data.order.ResumableLoader`.
    """

    name = "data_waiting"

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.total += self._since_asked(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.weight += self._since_asked(trainer)

    def _since_asked(self, trainer: pl.Trainer) -> float:
        asked = getattr(trainer.train_dataloader, "asked", None)
        return 0.0 if asked is None else time.perf_counter() - asked


class EpochLines(pl.Callback):
    """A line an epoch; where no progress bar shows, one every 30 s between."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = self.last = time.monotonic()
        self.first_step = trainer.global_step
        self.validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self.last >= 30 and trainer.is_global_zero and trainer.progress_bar_callback is None:
            self.last = now
            rate = (trainer.global_step - self.first_step) / (now - self.start)
            print(
                f"epoch {trainer.current_epoch}: batch {batch_idx + 1} of {trainer.num_training_batches}, "
                f"loss {float(outputs['loss']):.4f}, {rate:.1f} steps/s",
                flush=True,
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            # Lightning keeps the numbers of a validation, also for epochs that have none
            kept = trainer.callback_metrics.items()
            metrics = {name: value for name, value in kept if self.validated or not name.startswith(VALIDATED)}
            self.validated = False
            scores = ", ".join(
                f"{name} {float(metrics[name]):.4f}" for name in ("train_loss", "val_loss") if name in metrics
            )
            scores += "".join(
                f", AP_{name} {100 * float(metrics[f'val_ap_{name}']):.1f}"
                for name in ("inf", "1", "0.5")
                if f"val_ap_{name}" in metrics
            )
            if pl_module.monitor not in ("val_ap", "val_loss") and pl_module.monitor in metrics:
                scores += f", {pl_module.monitor} {float(metrics[pl_module.monitor]):.4f}"
            elapsed = time.monotonic() - self.start
            line = f"epoch {trainer.current_epoch}: step {trainer.global_step}, {scores}, {elapsed:.0f} s"
            if (waiting := float(metrics.get("data_waiting", 0.0))) >= NOTABLE_WAITING:
                line += f" ({100 * waiting:.0f} % of the training waits for data)"
            if trainer.progress_bar_callback is None:
                print(line, flush=True)
            else:
                trainer.progress_bar_callback.print(line)
            self.last = time.monotonic()


class FASet(pl.Callback):
    """Trains a model with `AttSets` in two stages (FASet; Yang, Wang, Markham, Trigoni, IJCV 2020).

    First everything but the attention, on single elements: in each step every set is seen as one of its elements,
    drawn at random (the paper makes an example of each; the expected gradient is the same). Then the attention alone,
    on whole sets, everything else held fixed; running statistics of batch normalisation go on. So the features are
    good for any number of elements, and the attention only learns how to combine them. Validation sees whole sets
    throughout. The stage follows from the epoch, so a resumed run is in the right one.

        trainer: {callbacks: [{class_path: setpred.callbacks.FASet, init_args: {single_epochs: 31}}]}

    Args:
        single_epochs: length of the first stage; the paper's code has 31 of 50.
    """

    def __init__(self, *, single_epochs: int) -> None:
        self.single_epochs = single_epochs
        self.stage: bool | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pools = [module for module in pl_module.modules() if isinstance(module, AttSets)]
        if not self.pools:
            raise InputError("FASet trains the attention of AttSets, and the model has none: add one or drop FASet")
        attention = {id(parameter) for pool in self.pools for parameter in pool.attention.parameters()}
        learned = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        self.attention = [parameter for parameter in learned if id(parameter) in attention]
        self.base = [parameter for parameter in learned if id(parameter) not in attention]
        self.stage = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # before a batch, not an epoch, whose start does not come again where a run is resumed within one
        single = trainer.current_epoch < self.single_epochs
        if single != self.stage:
            self.stage = single
            self._learn(base=single, attention=not single, single=single)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._learn(base=True, attention=True, single=False)

    def _learn(self, *, base: bool, attention: bool, single: bool) -> None:
        for parameters, learn in ((self.base, base), (self.attention, attention)):
            for parameter in parameters:
                # without a gradient the optimiser leaves a parameter be: no momentum, no decay
                parameter.requires_grad_(learn).grad = None
        for pool in self.pools:
            pool.single = single


class EMA(pl.Callback):
    """Validates and saves an exponential moving average of the weights, and trains as without it.

        average ← d · average + (1 - d) · weights,  d = min(decay, (1 + t) / (10 + t))

    after optimiser step t, all parameters alike. d grows from 2/11, as in TensorFlow's `ExponentialMovingAverage` with
    `num_updates`, so that the untrained weights are soon forgotten. A step that is skipped (`on_not_finite`) leaves the
    average as it is.

    Validations and the `state_dict` of checkpoints, which evaluation loads, have the average, with batch statistics of
    its own; so has the module after the training. The trained weights are in the checkpoint, too, and a resumed run
    goes on exactly. One that is resumed without this callback goes on from the average.

        trainer: {callbacks: [{class_path: setpred.callbacks.EMA, init_args: {decay: 0.999}}]}

    Args:
        decay: d in the long run, in [0, 1): the average is over about the last 1 / (1 - d) steps.

    Raises:
        InputError: another decay.
    """

    def __init__(self, *, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay: expected a number of at least 0 and below 1, got {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # while `inside`, the trained weights
        self.inside = False
        self.step = 0  # the last one seen

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.average, self.inside = {}, False  # before the state of a resumed run comes

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if TRAINED in checkpoint and trainer.state.fn == "fit":
            self.average = {name: checkpoint["state_dict"][name] for name, _ in pl_module.named_parameters()}
            pl_module.load_state_dict(checkpoint[TRAINED])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        named = pl_module.named_parameters()  # which are on the device by now
        self.average = {name: self.average.get(name, own).detach().to(own, copy=True) for name, own in named}
        self.step = trainer.global_step
        pl_module.averaged = lambda: self.averaged(pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        # a step that is skipped has no gradients
        if stepped and any(weight.grad is not None for weight in pl_module.parameters()):
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            for average, weight in zip(self.average.values(), pl_module.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.average:
            checkpoint[TRAINED] = checkpoint["state_dict"] | (self.average if self.inside else {})
            with self.averaged(pl_module):
                checkpoint["state_dict"] = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)
        self.average, self.inside, pl_module.averaged = {}, False, nullcontext

    @contextmanager
    def averaged(self, module: pl.LightningModule) -> Iterator[None]:
        """Within, the module has the average."""
        if self.inside:
            yield
            return
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: pl.LightningModule) -> None:
        """The average in the place of the weights, or back."""
        self.inside = not self.inside
        for average, weight in zip(self.average.values(), module.parameters(), strict=bool(self.average)):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
