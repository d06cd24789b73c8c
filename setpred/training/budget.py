"""Training under a budget of time or steps, with the schedule stretched to it."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl

from setpred.errors import InputError
from setpred.training.schedules import Schedule, planned_steps

SECONDS = {"s": 1, "m": 60, "h": 3600}
FIRST_STEPS = 5  # the mean loss of these is where a training starts


@dataclass(frozen=True)
class Budget:
    """An amount of training, in seconds or in optimizer steps.

    >>> Budget.parse("1.5m"), str(Budget.parse("1steps")), Budget.parse("600s").words
    (Budget(amount=90.0, in_steps=False), '1steps', '10 minutes')
    """

    amount: float
    in_steps: bool

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse "90s", "10m", "1.5h" or "2000steps"; raise `InputError` for anything else and for zero."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)|(\d+)steps?", text.strip())
        number, unit, steps = found.groups() if found else (0, "s", None)
        amount = int(steps) if steps else float(number) * SECONDS[unit]
        if amount == 0:
            raise InputError(f"--budget: expected a time (90s, 10m, 1.5h) or steps (2000steps), got {text!r}")
        return cls(amount, in_steps=bool(steps))

    def __str__(self) -> str:
        return f"{self.amount}steps" if self.in_steps else f"{self.amount:.10g}s"

    @property
    def words(self) -> str:
        unit = "step" if self.in_steps else "second" if self.amount % 60 else "minute"
        number = self.amount / 60 if unit == "minute" else self.amount
        return f"{number:,.10g} {unit}{'s' * (number != 1)}"

    def progress(self, seconds: float, steps: int) -> Fraction:
        """Return the used share, from 0 to 1; exact, so that rounding takes no step from a schedule."""
        return min(Fraction(1), Fraction(steps if self.in_steps else seconds) / Fraction(self.amount))


class Stretched(Schedule):
    """A learning rate schedule at the pace of a budget: at progress p in [0, 1] its value at step floor(p · steps).

    A schedule that the budget cuts off never comes down, which would favour configurations with short plans. A budget
    of exactly the planned `steps`, in epochs of `steps_per_epoch`, changes nothing.
    """

    def __init__(self, schedule: Schedule, progress: Callable[[], Fraction], steps: int, steps_per_epoch: int) -> None:
        self.schedule, self.progress, self.steps, self.steps_per_epoch = schedule, progress, steps, steps_per_epoch

    def __call__(self, step: int, epoch: int) -> float:
        planned = math.floor(self.progress() * self.steps)
        return self.schedule(planned, planned // self.steps_per_epoch)


class BudgetedTraining(pl.Callback):
    """Ends a training when its budget is used up, and validates at evenly spaced moments, the last at the end.

    It replaces the ends and validations of the trainer, and stretches the schedule from the length that they plan.
    Time counts from the first batch on, without validations. The budget is checked after each step. What depends on
    the epoch (`iterations_by_epoch`, `FASet`) follows the real epochs.

    Args:
        points: number of validations; fewer where one step takes longer than the interval.
        title: name of the training, for the line that each validation prints.

    Attributes:
        points: for each validation: seconds, step, train_loss (mean since the previous point), val_... scores.
    """

    def __init__(self, budget: Budget, *, points: int, title: str) -> None:
        self.budget, self.wanted, self.title = budget, points, title
        self.points: list[dict[str, float]] = []
        self.first: list[float] = []
        self.losses: list[float] = []  # since the last point
        self.steps = self.reached = 0  # reached: points whose moment has passed
        self.validating = 0.0  # seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started - self.validating

    def progress(self) -> Fraction:
        return self.budget.progress(self.seconds, self.steps)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.validated, trainer.limit_val_batches = trainer.limit_val_batches, 0
        if 0 in (trainer.max_epochs, trainer.max_steps):  # the trainer would not begin
            raise InputError("expected a plan of at least one step, got one of 0; raise max_epochs or max_steps")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation = trainer.datamodule.val_dataloader()
        planned, accumulated = planned_steps(trainer), trainer.accumulate_grad_batches
        if math.isfinite(planned):
            schedule, batches = pl_module.schedule.lasting(planned), trainer.num_training_batches
            per_epoch = math.ceil(min(planned * accumulated, batches) / accumulated)
            pl_module.schedule = Stretched(schedule, self.progress, int(planned), per_epoch)
        loop, steps = trainer.fit_loop, trainer.fit_loop.epoch_loop
        loop.max_epochs = steps.max_steps = -1
        loop.min_epochs = steps.min_steps = None
        self.started = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # moving the loss to the host waits for a GPU; Lightning has divided it by the batches of a step
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if trainer.global_step == self.steps:
            return  # a batch that only accumulates gradients
        self.steps, seconds = trainer.global_step, self.seconds
        if self.steps <= FIRST_STEPS:
            self.first.append(self.losses[-1])
        progress = self.budget.progress(seconds, self.steps)
        if (reached := math.floor(progress * self.wanted)) > self.reached:
            self.reached = reached
            limit = self.validated if isinstance(self.validated, int) else int(self.validated * len(self.validation))
            with trainer.precision_plugin.val_step_context():
                scores = pl_module.validate(itertools.islice(self.validation, limit))
            point = {"seconds": seconds, "step": self.steps, "train_loss": sum(self.losses) / len(self.losses)} | scores
            self.points.append(point)
            self.losses = []
            shown = dict.fromkeys(("train_loss", "val_loss", pl_module.monitor))
            numbers = ", ".join(f"{name} {point[name]:.4g}" for name in shown)
            print(f"  {self.title}: {seconds:.1f} s, step {self.steps}, {numbers}", flush=True)
            self.validating += self.seconds - seconds
        trainer.should_stop = progress >= 1
