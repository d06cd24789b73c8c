"""What a training run measures and prints: means over epochs, one line of metrics an epoch, plain progress."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from setpred.decoders import IDSPN
from setpred.files import write_atomically
from setpred.inner import Unrolled
from setpred.inner.diagnostics import Recorded, residual_growth, residual_norms
from setpred.model import Step

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
    loaders that tell when they were `asked` are timed, as `setpred.data.loading.ResumableLoader`.
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


WATCHED = 4  # samples, of the first validation batch
RISING = (
    3.0  # descents that settle end at most 1.8 times above their least residual, those that diverge 5 times and more
)


class NotFiniteCounts(pl.Callback):
    """Logs what `setpred.nonfinite.policy.Guard` has counted since the training began, unless its policy is to stop.

    `skipped_batches` and `sanitised_gradients`, which are the same in all processes, and `sanitised_samples` of all.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.guard.policy != "stop":
            pl_module.log_dict({name: float(count) for name, count in pl_module.not_finite_counts().items()})


class ResidualGrowth(pl.Callback):
    """Measures the descent in each validation: `val_residual_growth`, and a sentence where it diverges.

    The median, over the first `WATCHED` samples, of `setpred.inner.diagnostics.residual_growth`; of the descent as it
    is, whichever iterate is kept. Draws no random numbers and changes nothing. Decoders without a descent have none.
    """

    def __init__(self) -> None:
        self.said = -1  # in which epoch

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        decoder = pl_module.model.decoder
        if batch_idx or not isinstance(decoder, IDSPN):
            return
        few = {name: value[:WATCHED] for name, value in batch.items()}
        with trainer.precision_plugin.forward_context():
            norms = descent_norms(Step(pl_module.model, pl_module.loss, few))
        if not norms[0].isfinite().all():
            return  # broken before the descent, which the validation says itself
        growth = residual_growth(norms).median()
        pl_module.log("val_residual_growth", growth.float(), batch_size=WATCHED, sync_dist=True)
        if growth > RISING and self.said != trainer.current_epoch and trainer.is_global_zero:
            self.said = trainer.current_epoch
            pl_module.say(f"epoch {trainer.current_epoch}: {rising(decoder, float(growth))}")


def rising(decoder: IDSPN, growth: float) -> str:
    """The sentence for the user."""
    descent, kept = decoder.descent, getattr(decoder.differentiation, "best", False)
    rate, momentum = (float(torch.as_tensor(value).detach()) for value in (descent.learning_rate, descent.momentum))
    return (
        f"the inner descent diverges: its residual ends {growth:.3g} times above the least on the way; lower the "
        f"learning_rate ({rate:.3g}) or momentum ({momentum:.3g}) of model.decoder.init_args.descent"
        + ("" if kept else ", or keep the best iterate with setpred.inner.Implicit's best: true")
    )


@torch.no_grad()
def descent_norms(step: Step) -> Tensor:
    """|R(Y_t)| along the decoder's descent on a batch, `[iterates, batch]`, whichever iterate it keeps."""
    decoder: Any = step.model.decoder
    recorded, own = Recorded(Unrolled()), (decoder.differentiation, decoder.compiled)
    # as written: a batch of another size would be compiled anew
    decoder.differentiation, decoder.compiled = recorded, False
    try:
        step.predict()
    finally:
        decoder.differentiation, decoder.compiled = own
    return residual_norms(recorded.energy, recorded.found, recorded.descent)
