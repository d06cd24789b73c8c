"""Learning rate schedules: (step, epoch) to a factor on the learning rate.

A schedule with a length does not depend on the length of the run, so that a run of one epoch resumed for another takes
the same steps as a run of two. One without a length takes that of the run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from setpred.errors import InputError


class Schedule(ABC):
    """factor(step, epoch) on the learning rate, both counted from 0.

    Attributes:
        total_steps: the step at which it ends; None without an end, or without a length yet.
    """

    total_steps: int | None = None

    def lasting(self, steps: float) -> Schedule:
        """The schedule of a run of `steps`: itself, unless it takes its length from the run."""
        return self

    @abstractmethod
    def __call__(self, step: int, epoch: int) -> float: ...


class Constant(Schedule):
    """Always 1."""

    def __call__(self, step: int, epoch: int) -> float:
        return 1.0


class StepDecay(Schedule):
    """Multiplication by `factor` from each of the given epochs on."""

    def __init__(self, *, epochs: Sequence[int], factor: float = 0.1) -> None:
        self.epochs, self.factor = tuple(epochs), factor

    def __call__(self, step: int, epoch: int) -> float:
        return self.factor ** sum(epoch >= milestone for milestone in self.epochs)


class WarmupCosine(Schedule):
    """Linear rise over `warmup_steps`, then a half cosine down to `final` at `total_steps`, where it stays.

    Args:
        warmup_steps: length of the rise.
        total_steps: length of the schedule; None takes that of the run, with a rise of at most a tenth.
        final: factor at the end.
    """

    def __init__(self, *, warmup_steps: int, total_steps: int | None = None, final: float = 0.0) -> None:
        if warmup_steps < 0 or (total_steps is not None and warmup_steps >= total_steps):
            raise ValueError(f"expected 0 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}")
        self.warmup_steps, self.total_steps, self.final = warmup_steps, total_steps, final

    def lasting(self, steps: float) -> Schedule:
        if self.total_steps is not None:
            return self
        if not math.isfinite(steps):
            raise InputError(
                "expected a run of known length for a WarmupCosine without total_steps, got one without end; "
                "pass --trainer.max_epochs, or --model.schedule.init_args.total_steps"
            )
        steps = max(1, int(steps))
        return WarmupCosine(warmup_steps=min(self.warmup_steps, steps // 10), total_steps=steps, final=self.final)

    def __call__(self, step: int, epoch: int) -> float:
        if self.total_steps is None:
            raise ValueError("expected a length; call lasting(steps) first")
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        along = min(1.0, max(0.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)))
        return rise * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * along)))


def planned_steps(trainer: pl.Trainer) -> float:
    """Optimiser steps of a run whose data is set up; infinite for a run without end."""
    most = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if trainer.max_epochs == -1 or math.isinf(batches := trainer.num_training_batches):
        return most
    changing = [part for part in trainer.callbacks if isinstance(part, GradientAccumulationScheduler)]
    accumulated = [
        changing[0].get_accumulate_grad_batches(epoch) if changing else trainer.accumulate_grad_batches
        for epoch in range(trainer.max_epochs)
    ]
    return min(most, sum(math.ceil(batches / number) for number in accumulated))


def fitted(schedule: Schedule, trainer: pl.Trainer) -> Schedule:
    """The schedule with the length of the trainer's run.

    Raises:
        InputError: the schedule ends before the run.
    """
    steps = planned_steps(trainer)
    schedule = schedule.lasting(steps)
    if schedule.total_steps is not None and math.isfinite(steps) and steps > schedule.total_steps:
        raise InputError(
            f"expected a schedule of at least the {steps} steps of this run, got one of {schedule.total_steps}, after "
            f"which nothing is learned; pass --model.schedule.init_args.total_steps {steps}, or fewer "
            "--trainer.max_epochs"
        )
    return schedule
