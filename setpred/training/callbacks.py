"""Callbacks that measure and report a training: means of epochs, metrics.csv, lines on the screen."""

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from setpred.decoders.idspn import descending
from setpred.files import write_atomically
from setpred.inner import Unrolled
from setpred.inner.diagnostics import Recorded, residual_growth, residual_norms
from setpred.model import Step
from setpred.training.schedules import planned_steps

VALIDATED = "val_"  # prefix of the metrics of a validation
STEP_LOSS = "loss"  # of the latest step, for the progress bar and loggers
NOTABLE_WAITING = 0.05  # share of waiting from which the screen shows it; metrics.csv always has it
LINE_SECONDS = 30.0  # between two lines within an epoch
TIMED_STEPS = (5, 25)  # the steps that the estimate of a run's time is of
NOTABLE_SECONDS = 60.0  # an estimate from which the screen shows it
WATCHED = 4  # samples of the first validation batch
RISING = 3.0  # settled descents end at most 1.8 times above their least residual, diverging ones 5 times and more


class EpochReport(pl.Callback):
    """Base of callbacks that report the metrics of each epoch, without validations of earlier epochs."""

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        self.start = time.monotonic()
        self.validated: dict[str, float] = {}  # metrics of the latest validation of this epoch

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.monotonic() - self.start, "validated": dict(self.validated)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = time.monotonic() - state_dict["seconds"]
        self.validated = dict(state_dict.get("validated", {}))

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self.validated = {name: float(value) for name, value in metrics if name.startswith(VALIDATED)}

    def epoch_metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        """Metrics of the epoch that ends, by name; Lightning also keeps those of earlier validations."""
        kept = {name: float(value) for name, value in trainer.callback_metrics.items() if name != STEP_LOSS}
        found = {name: value for name, value in kept.items() if not name.startswith(VALIDATED)} | self.validated
        self.validated = {}
        return found


class MetricsFile(EpochReport):
    """One row per epoch in `metrics.csv`: epoch, step, seconds, learning rate, and all metrics.

    A resumed run keeps the rows of earlier epochs and drops later ones, so that each epoch has one row. Its seconds
    continue those of the checkpoint; they leave out what was trained after it and lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.rows: list[dict[str, Any]] = []
        if trainer.current_epoch > 0 and self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < trainer.current_epoch]
        # scores of this epoch from before a resume, for callbacks that look for the best
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.validated.items()})

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        metrics = self.epoch_metrics(trainer)
        if not trainer.is_global_zero:
            return
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "seconds": round(time.monotonic() - self.start, 1),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        self.rows.append(row | dict(sorted(metrics.items())))
        names = list(dict.fromkeys(name for each in self.rows for name in each))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue())


class EpochLines(EpochReport):
    """One line per epoch on the screen, and one every `LINE_SECONDS` where there is no progress bar."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.start = self.last = time.monotonic()
        self.first_step = trainer.global_step
        self.timed: float | None = None  # when the first of the `TIMED_STEPS` ended

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, steps = time.monotonic(), trainer.global_step - self.first_step
        if steps == TIMED_STEPS[0] and self.timed is None:
            self.timed = now
        if steps == TIMED_STEPS[1] and self.timed is not None and trainer.is_global_zero:
            self._estimate(trainer, module, (now - self.timed) / (TIMED_STEPS[1] - TIMED_STEPS[0]))
            self.timed = None
        if now - self.last >= LINE_SECONDS and trainer.is_global_zero and trainer.progress_bar_callback is None:
            self.last = now
            rate = (trainer.global_step - self.first_step) / (now - self.start)
            print(
                f"epoch {trainer.current_epoch}: batch {batch_idx + 1} of {trainer.num_training_batches}, "
                f"loss {float(outputs['loss']):.4f}, {rate:.1f} steps/s",
                flush=True,
            )

    def _estimate(self, trainer: pl.Trainer, module: Any, seconds: float) -> None:
        """Print how long the run will take, at so many seconds a step, unless that is short or it has no end."""
        left = planned_steps(trainer) - trainer.global_step
        if math.isfinite(left) and left * seconds >= NOTABLE_SECONDS:
            minutes = left * seconds / 60
            time_left = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
            module.say(
                f"about {time_left}, besides validations, for the other {left:.0f} steps at {1 / seconds:.1f} steps/s; "
                "--epochs N makes the run shorter"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        metrics, self.last = self.epoch_metrics(trainer), time.monotonic()
        if not trainer.is_global_zero:
            return
        monitor = module.monitor
        shown = {name: f"{name} {{:.4f}}" for name in ("train_loss", "val_loss")}
        scores = [name for name in metrics if name.startswith("val_ap_")]  # of the three largest thresholds
        scores = sorted(scores, key=lambda name: -float(name.removeprefix("val_ap_")))[:3]
        shown |= {name: f"AP_{name.removeprefix('val_ap_')} {{:.1f}}" for name in scores}
        shown |= {} if monitor in ("val_ap", "val_loss") else {monitor: f"{monitor} {{:.4f}}"}
        percent = {name: 100 * value if name.startswith("val_ap_") else value for name, value in metrics.items()}
        scores = [text.format(percent[name]) for name, text in shown.items() if name in metrics]
        words = [f"step {trainer.global_step}", *scores, f"{self.last - self.start:.0f} s"]
        line = f"epoch {trainer.current_epoch}: {', '.join(words)}"
        if (waiting := metrics.get(DataWaiting.name, 0.0)) >= NOTABLE_WAITING:
            line += f" ({100 * waiting:.0f} % of the training waits for data)"
        module.say(line)


class EpochMean(pl.Callback):
    """Base of callbacks that log total / weight over the training of an epoch, in all processes, as `name`.

    A run that is resumed within an epoch continues its sums. Subclasses add to `total` and `weight`.
    """

    name: str

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        self.trainer = trainer
        self.total: Tensor | float = 0.0
        self.weight: Tensor | float = 0.0

    def state_dict(self) -> dict[str, float]:
        return dict(zip(("total", "weight"), self._sums(), strict=True))

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        if self.trainer.is_global_zero:  # the sums are of all processes
            self.total, self.weight = state_dict.get("total", 0.0), state_dict.get("weight", 0.0)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        total, weight = self._sums()
        if weight > 0:
            module.log(self.name, total / weight, sync_dist=True, reduce_fx="max")  # the same in all processes
        self.total = self.weight = 0.0

    def _sums(self) -> list[float]:
        """Sums over all processes, which must all call it."""
        sums = [float(self.total), float(self.weight)]
        if self.trainer.world_size == 1:
            return sums
        both = torch.tensor(sums, dtype=torch.float64, device=self.trainer.strategy.root_device)
        return self.trainer.strategy.reduce(both, reduce_op="sum").tolist()


class TrainLoss(EpochMean):
    """Logs `train_loss`, the mean over the training examples of the epoch, and `loss` of each step.

    Steps with a non-finite loss do not count.
    """

    name = "train_loss"

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # stays on the device, in double precision where it has one; Lightning has divided by the batches of a step
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        module.log(STEP_LOSS, loss, prog_bar=True)
        loss = loss if loss.device.type == "mps" else loss.double()
        known, examples = torch.isfinite(loss), len(batch["elements"])
        self.total = self.total + torch.where(known, loss * examples, 0)
        self.weight = self.weight + known * examples


class DataWaiting(EpochMean):
    """Logs `data_waiting`, the share of an epoch's training that is spent waiting for data, in [0, 1].

        data_waiting = Σ (step begins - batch is asked for) / Σ (step ends - batch is asked for)

    over the steps of all processes, by the host's clock: an upper bound on a GPU that has work while the host waits.
    Validation and checkpoints count as neither. If it is far from 0, try more `num_workers` or `in_memory`. Only
    loaders with the time `asked` are measured, such as `setpred.data.loading.ResumableLoader`.
    """

    name = "data_waiting"

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.total += self._since_asked(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weight += self._since_asked(trainer)

    def _since_asked(self, trainer: pl.Trainer) -> float:
        asked = getattr(trainer.train_dataloader, "asked", None)
        return 0.0 if asked is None else time.perf_counter() - asked


class FinalValidation(pl.Callback):
    """Validates after the last epoch, whatever `check_val_every_n_epoch` is: the weights at the end have a score."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.check_val_every_n_epoch is not None and trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


class SkippedSteps(pl.Callback):
    """Logs `skipped_batches`, the number of steps skipped since the training began, unless the policy is to stop."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if module.guard.policy != "stop":
            module.log("skipped_batches", float(module.guard.skipped))


class ResidualGrowth(pl.Callback):
    """Logs `val_residual_growth` of the inner descent in each validation, and prints a sentence where it diverges.

    The value is the median of `setpred.inner.diagnostics.residual_growth` over `WATCHED` samples. The descent is
    recomputed outside the validation, so predictions, scores and training are the same as without.
    """

    warned = -1  # epoch of the latest sentence

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        decoder = descending(module.model.decoder)
        if batch_idx or decoder is None:
            return
        few = {name: value[:WATCHED] for name, value in batch.items()}
        with trainer.precision_plugin.forward_context():
            norms = descent_norms(Step(module.model, module.loss, few))
        if not norms[0].isfinite().all():
            return  # non-finite before the descent, which the validation reports
        growth = residual_growth(norms).median()
        module.log("val_residual_growth", growth.float(), batch_size=WATCHED, sync_dist=True)
        if growth > RISING and self.warned != trainer.current_epoch and trainer.is_global_zero:
            self.warned = trainer.current_epoch
            numbers = (decoder.descent.learning_rate, decoder.descent.momentum)
            rate, momentum = (float(torch.as_tensor(number).detach()) for number in numbers)
            best = getattr(decoder.differentiation, "best", False)
            module.say(
                f"epoch {trainer.current_epoch}: the inner descent diverges: its residual ends {float(growth):.3g} "
                f"times above the least on the way; lower the learning_rate ({rate:.3g}) or momentum ({momentum:.3g}) "
                "of the decoder's descent"
                + ("" if best else ", or keep the best iterate with setpred.inner.Implicit's best: true")
            )


@torch.no_grad()
def descent_norms(step: Step) -> Tensor:
    """|R(Y_t)| along the decoder's descent on a batch, `[iterates, batch]`, whichever iterate it keeps."""
    decoder: Any = descending(step.model.decoder)
    recorded, own = Recorded(Unrolled()), (decoder.differentiation, decoder.compiled)
    decoder.differentiation, decoder.compiled = recorded, False  # a batch of another size would be compiled again
    try:
        step.predict()
    finally:
        decoder.differentiation, decoder.compiled = own
    return residual_norms(recorded.energy, recorded.found, recorded.descent)
