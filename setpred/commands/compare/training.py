"""Train one configuration with one seed under a budget."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer

from setpred.commands.common import finite
from setpred.commands.compare.results import mean
from setpred.commands.train import TrainCLI, build
from setpred.errors import InputError
from setpred.files import make_folder, write_atomically
from setpred.training.budget import BudgetedTraining
from setpred.training.callbacks import EpochLines, MetricsFile, TrainLoss
from setpred.training.mixed_precision import processor

UNUSED = (Checkpoint, TrainLoss, MetricsFile, EpochLines, ProgressBar, Timer)  # callbacks of `setpred train`


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
    """Train the configuration at `path` until the budget is used up; `options` are those of the command.

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
        cli.load_initial_weights()
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
