"""A training that ends when its budget is used up: in seconds of training, or in optimizer steps."""

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
from setpred.training.schedules import Schedule

SECONDS = {"s": 1, "m": 60, "h": 3600}
FIRST_STEPS = 5  # the loss that a training starts from is the mean of these


@dataclass(frozen=True)
class Budget:
    """So many seconds of training or so many optimizer steps.

    >>> Budget.parse("1.5m"), Budget.parse("2000steps")
    (Budget(amount=90.0, in_steps=False), Budget(amount=2000, in_steps=True))
    """

    amount: float
    in_steps: bool

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from "90s", "10m", "1.5h" or "2000steps".

        Raises:
            InputError: anything else, or nothing at all to spend.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)|(\d+)steps?", text.strip())
        if not found:
            raise InputError(f"--budget: expected a time (90s, 10m, 1.5h) or steps (2000steps), got {text!r}")
        number, unit, steps = found.groups()
        amount = int(steps) if steps else float(number) * SECONDS[unit]
        if not amount > 0:
            raise InputError(f"--budget: expected more than nothing, got {text!r}")
        return cls(amount, in_steps=bool(steps))

    def __str__(self) -> str:
        return f"{self.amount}steps" if self.in_steps else f"{self.amount:.10g}s"

    def progress(self, seconds: float, steps: int) -> Fraction:
        """The share that is used up, from 0 to 1; exact, so that no rounding takes a step from a schedule."""
        return min(Fraction(1), Fraction(steps if self.in_steps else seconds) / Fraction(self.amount))


class Stretched(Schedule):
    """A schedule at the pace of a budget: at progress p as it would be at step floor(p · steps) of the plan.

    A learning rate that falls over a planned length, and is cut off by a budget, never comes down: then unfinished
    trainings would be compared, and those whose plan is short would win. With a budget of as many steps as planned
    it is the schedule itself.

    Args:
        schedule: as configured.
        progress: p in [0, 1] of the moment; the step and epoch of the training are not looked at.
        steps: that the configuration plans.
        steps_per_epoch: of these.
    """

    def __init__(
        self, schedule: Schedule, progress: Callable[[], Fraction | float], *, steps: int, steps_per_epoch: int
    ) -> None:
        self.schedule, self.progress = schedule, progress
        self.steps, self.steps_per_epoch = steps, steps_per_epoch

    def __call__(self, step: int, epoch: int) -> float:
        planned = math.floor(self.progress() * self.steps)
        return self.schedule(planned, planned // self.steps_per_epoch)


@dataclass(frozen=True)
class Plan:
    """What the configuration itself asks for: epochs and steps (None: no end), and batches of a validation."""

    epochs: int | None
    steps: int | None
    validation_batches: int | float

    @classmethod
    def of(cls, trainer: pl.Trainer, max_epochs: int | None) -> Plan:
        """Of a built trainer and the configuration's own `max_epochs`, for which Lightning has a default."""
        epochs, steps = (None if n in (None, -1) else n for n in (max_epochs, trainer.max_steps))
        return cls(epochs, steps, trainer.limit_val_batches)

    def length(self, steps_per_epoch: float) -> int | None:
        """Steps planned."""
        ends = [self.steps, None if self.epochs is None else self.epochs * steps_per_epoch]
        least = min((end for end in ends if end is not None), default=math.inf)
        return int(least) if 0 < least < math.inf else None


class BudgetedTraining(pl.Callback):
    """Ends the training when the budget is used up, and validates at evenly spaced moments of it, last at its end.

    Only training counts as time: from its first batch on, the slow first steps too, without the validations. The end
    is looked for after each step, so the last may end a little late. What else depends on the number of the epoch
    (`iterations_by_epoch`, `FASet`) goes by the epochs that are really trained.

    Args:
        budget: when to stop.
        points: how many validations; fewer where single steps take longer than from one to the next.
        plan: of the configuration; the schedule of the learning rate is stretched from there (`Stretched`), unless
            it plans no end.
        report: called with each point: seconds, step, train_loss (mean since the point before), val_... scores.

    Attributes: `seconds`, `steps` and `first_loss` of the training so far, and its `points`.
    """

    def __init__(self, budget: Budget, *, points: int, plan: Plan, report: Callable[[dict[str, float]], None]) -> None:
        self.budget, self.wanted, self.plan, self.report = budget, points, plan, report
        self.points: list[dict[str, float]] = []
        self.steps, self.reached = 0, 0
        self.first: list[float] = []
        self.losses: list[float] = []  # since the last point
        self.started: float | None = None
        self.outside = 0.0  # seconds that were not training

    @property
    def seconds(self) -> float:
        return 0.0 if self.started is None else time.monotonic() - self.started - self.outside

    @property
    def first_loss(self) -> float | None:
        return sum(self.first) / len(self.first) if self.first else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation = trainer.datamodule.val_dataloader()
        steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        steps_per_epoch = math.inf if math.isinf(steps_per_epoch) else math.ceil(steps_per_epoch)
        if steps := self.plan.length(steps_per_epoch):
            pl_module.schedule = Stretched(
                pl_module.schedule.lasting(steps),
                lambda: self.budget.progress(self.seconds, self.steps),
                steps=steps,
                steps_per_epoch=min(steps, steps_per_epoch),
            )
        self.started = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # to the host, which also waits for a GPU; Lightning has divided by the batches of a step
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        self.losses.append(loss)
        if trainer.global_step == self.steps:
            return  # gradients were only gathered
        self.steps = trainer.global_step
        if self.steps <= FIRST_STEPS:
            self.first.append(loss)
        progress = self.budget.progress(seconds := self.seconds, self.steps)
        if math.floor(progress * self.wanted) > self.reached:
            self.reached = math.floor(progress * self.wanted)
            begun = time.monotonic()
            self.add_point(trainer, pl_module, seconds)
            self.outside += time.monotonic() - begun
        trainer.should_stop = progress >= 1

    def add_point(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float) -> None:
        limit = self.plan.validation_batches
        batches = limit if isinstance(limit, int) else int(limit * len(self.validation))
        with trainer.precision_plugin.val_step_context():
            scores = pl_module.validate(itertools.islice(self.validation, batches))
        loss = sum(self.losses) / len(self.losses)
        self.losses = []
        self.points.append({"seconds": seconds, "step": self.steps, "train_loss": loss} | scores)
        self.report(self.points[-1])
