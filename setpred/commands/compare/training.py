"""Train one configuration with one seed under a budget of time or steps."""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer

from setpred.commands.common import finite
from setpred.commands.train import TrainCLI, build
from setpred.errors import InputError
from setpred.files import make_folder, write_atomically
from setpred.training.callbacks import EpochLines, MetricsFile, TrainLoss
from setpred.training.schedules import Schedule, planned_steps

SECONDS = {"s": 1, "m": 60, "h": 3600}
FIRST_STEPS = 5  # the mean loss of these is where a training starts
UNUSED = (Checkpoint, TrainLoss, MetricsFile, EpochLines, ProgressBar, Timer)  # callbacks of `setpred train`


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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.validated, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation = trainer.datamodule.val_dataloader()
        planned, accumulated = planned_steps(trainer), trainer.accumulate_grad_batches
        if math.isfinite(planned):
            schedule, batches = pl_module.schedule.lasting(planned), trainer.num_training_batches
            per_epoch = math.ceil(min(planned * accumulated, batches) / accumulated)
            progress = lambda: self.budget.progress(self.seconds, self.steps)  # noqa: E731
            pl_module.schedule = Stretched(schedule, progress, int(planned), per_epoch)
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
            point = {"seconds": seconds, "step": self.steps, "train_loss": mean(self.losses)} | scores
            self.points.append(point)
            self.losses = []
            shown = dict.fromkeys(("train_loss", "val_loss", pl_module.monitor))
            numbers = ", ".join(f"{name} {point[name]:.4g}" for name in shown)
            print(f"  {self.title}: {seconds:.1f} s, step {self.steps}, {numbers}", flush=True)
            self.validating += self.seconds - seconds
        trainer.should_stop = progress >= 1


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the configuration in an `InputError`, and turn an exit of the parser into one."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except SystemExit as error:
        raise InputError(f"{path} cannot be built, for the reason given above") from error


def build_configuration(path: Path, options: argparse.Namespace, *more: str) -> TrainCLI:
    """Build model, data and trainer of a configuration, with the options after `--` and `more`."""
    allowed = [f"--allow={name}" for name in options.allow]
    with naming(path):
        return build(["--config", str(path), *options.train, *allowed, *more, "--trainer.logger=false"])


def train_one(path: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train the configuration at `path` until the budget is used up.

    Args:
        options: options of the command.

    Returns:
        The results. After an error "failed" holds its message, and the points end there.

    Raises:
        KeyboardInterrupt: Ctrl-C or a signal.
    """
    folder = options.out / "runs" / f"{path.stem}-seed{seed}"
    training = BudgetedTraining(options.budget, points=options.points, title=f"{path.stem}, seed {seed}")
    machine, parameters, failed = processor(), None, None
    try:
        make_folder(folder)
        own = ["--seed_everything", str(seed), "--runs", str(folder.parent), "--name", folder.name]
        cli = build_configuration(path, options, *own)
        trainer, device = cli.trainer, cli.trainer.strategy.root_device
        parameters = sum(parameter.numel() for parameter in cli.model.parameters())
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else machine
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, UNUSED)] + [training]
        trainer.fit(cli.model, datamodule=cli.datamodule)
        if trainer.interrupted or trainer.received_sigterm:
            raise KeyboardInterrupt
        if options.keep:
            trainer.save_checkpoint(folder / "last.ckpt")
    except SystemExit as stopped:  # how Lightning ends on Ctrl-C
        raise KeyboardInterrupt from stopped
    except InputError as error:
        failed = str(error)
    except Exception as error:  # the other runs continue after any error
        write_atomically(folder / "error.txt", traceback.format_exc())
        first = (str(error).splitlines() or [""])[0]
        failed = f"{type(error).__name__}: {first} (more in {folder / 'error.txt'})"
    results = {"steps": training.steps, "seconds": training.points[-1]["seconds"] if training.points else None}
    results |= {"parameters": parameters, "first_loss": mean(training.first), "points": training.points}
    results |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": machine}
    return finite(results | {"failed": failed})


def processor() -> str:
    """Return the name of the processor, as far as the system knows it."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()
