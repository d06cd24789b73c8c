"""Learning rate schedules in absolute steps or epochs.

A schedule maps (step, epoch) to a factor on the learning rate. None depends on how long the run is asked to be, so
that a run of one epoch resumed for another takes the same steps as a run of two.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Schedule(ABC):
    """factor(step, epoch) on the learning rate, both counted from 0.

    Attributes:
        total_steps: the step at which it ends, None for a schedule without an end.
    """

    total_steps: int | None = None

    @abstractmethod
    def __call__(self, step: int, epoch: int) -> float: ...


class Constant(Schedule):
    """Always 1."""

    def __call__(self, step: int, epoch: int) -> float:
        return 1.0


class StepDecay(Schedule):
    """Multiplied by `factor` from each of the given epochs on."""

    def __init__(self, *, epochs: Sequence[int], factor: float = 0.1) -> None:
        self.epochs, self.factor = tuple(epochs), factor

    def __call__(self, step: int, epoch: int) -> float:
        return self.factor ** sum(epoch >= milestone for milestone in self.epochs)


class WarmupCosine(Schedule):
    """Rises linearly over `warmup_steps`, then falls along a half cosine to `final` at `total_steps` and stays."""

    def __init__(self, *, warmup_steps: int, total_steps: int, final: float = 0.0) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"expected 0 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}")
        self.warmup_steps, self.total_steps, self.final = warmup_steps, total_steps, final

    def __call__(self, step: int, epoch: int) -> float:
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        along = min(1.0, max(0.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)))
        return rise * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * along)))
