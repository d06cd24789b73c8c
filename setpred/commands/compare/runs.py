"""Train one configuration with one seed under a budget, and keep the results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer

from setpred.checkpoint.untrusted import read_yaml
from setpred.commands.common import finite
from setpred.commands.compare.budget import Budget, BudgetedTraining, Plan
from setpred.commands.train import TrainCLI, build, check_fit
from setpred.errors import InputError
from setpred.files import make_folder, write_atomically, writing
from setpred.training.callbacks import EpochLines, MetricsFile, TrainLoss

Run = dict[str, Any]
Key = tuple[str, int, str, tuple[str, ...]]


def key(run: Run) -> Key:
    """What makes a run the same as another: configuration, seed, budget and options."""
    return run["digest"], run["seed"], run["budget"], tuple(run["options"])


class Results:
    """A file to which several processes may add at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Key, Run]:
        """All whole lines; of runs that were tried again, the last.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: expected the results of a comparison, got what cannot be read") from error
        runs: dict[Key, Run] = {}
        for number, line in enumerate(lines, 1):
            try:
                run = json.loads(line)
                runs[key(run)] = run
            except (ValueError, KeyError, TypeError):  # a process was killed while it wrote
                print(f"{self.path}: line {number} is not a whole result; it is left out", flush=True)
        return runs

    def add(self, run: Run) -> None:
        """Appends a line in one piece; one that somebody left without its end does not swallow it.

        Raises:
            InputError: the file cannot be written.
        """
        make_folder(self.path.parent)
        with writing(self.path), self.path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            ended = file.read(1) in (b"", b"\n")
            file.write((("" if ended else "\n") + json.dumps(run) + "\n").encode())


# the budget alone ends a training, and says when to validate
NO_OTHER_END = [f"--trainer.{name}=null" for name in ("min_epochs", "min_steps", "max_time")]
NO_OTHER_END += ["--trainer.max_epochs=-1", "--trainer.max_steps=-1", "--trainer.limit_val_batches=0"]
# of train.py, whose files and lines thirteen configurations times three seeds would drown in
NOT_OURS = (Checkpoint, TrainLoss, MetricsFile, EpochLines, ProgressBar, Timer)


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share."""

    budget: Budget
    options: tuple[str, ...]  # handed to every configuration
    out: Path
    points: int = 8
    keep: bool = False
    allow: tuple[str, ...] = ()  # classes of the user's own that configurations may name

    @property
    def arguments(self) -> list[str]:
        """Of train.py, for every configuration."""
        return [*self.options, *(f"--allow={path}" for path in self.allow)]


@dataclass(frozen=True)
class Candidate:
    """A configuration that has been built once: what it plans, and the score that says how good it is."""

    path: Path
    digest: str
    plan: Plan
    monitor: str
    mode: str

    @property
    def name(self) -> str:
        return self.path.stem

    def key(self, seed: int, settings: Settings) -> Key:
        return self.digest, seed, str(settings.budget), settings.options


def digest(path: Path) -> str:
    """Of what a configuration says, comments left out.

    Raises:
        InputError: it cannot be read.
    """
    return hashlib.sha256(json.dumps(read_yaml(path), sort_keys=True, default=str).encode()).hexdigest()[:16]


def built(path: Path, *options: str) -> TrainCLI:
    """Model, data and trainer of a configuration.

    Raises:
        InputError: it cannot be built; the sentence says which it is.
    """
    try:
        return build(["--config", str(path), *options, "--trainer.logger=false"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except SystemExit as error:  # how the parser ends, which has said why
        raise InputError(f"{path} cannot be built, for the reason given above") from error


def candidate(path: Path, settings: Settings) -> Candidate:
    """Builds a configuration to see that it can be.

    Raises:
        InputError: it cannot.
    """
    found = digest(path)
    cli = built(path, *settings.arguments)
    plan = Plan.of(cli.trainer, cli.config.trainer.max_epochs)
    return Candidate(path, found, plan, cli.model.monitor, cli.model.mode)


def prepare(which: Candidate, settings: Settings) -> None:
    """Makes the data of a configuration, which may have to be rendered, and looks whether it fits the model.

    Raises:
        InputError: it cannot be made, or does not fit.
    """
    cli = built(which.path, *settings.arguments)
    try:
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        check_fit(cli)
    except InputError as error:
        raise InputError(f"{which.path}: {error}") from error


def train_one(which: Candidate, seed: int, settings: Settings) -> Run:
    """Trains a configuration with a seed until the budget is used up.

    Returns:
        What the file of results says of it. If it went wrong, "failed" says how, and the points end there.

    Raises:
        KeyboardInterrupt: stopped from outside.
    """

    def report(point: dict[str, float]) -> None:
        shown = ", ".join(f"{n} {point[n]:.4g}" for n in dict.fromkeys(("train_loss", "val_loss", which.monitor)))
        print(f"  {which.name}, seed {seed}: {point['seconds']:.1f} s, step {point['step']}, {shown}", flush=True)

    folder = settings.out / "runs" / f"{which.name}-seed{seed}"
    training = BudgetedTraining(settings.budget, points=settings.points, plan=which.plan, report=report)
    machine, parameters, failed = processor(), None, None
    try:
        make_folder(folder)
        ours = ["--seed_everything", str(seed), "--runs", str(folder.parent), "--name", folder.name, *NO_OTHER_END]
        cli = built(which.path, *settings.arguments, *ours)
        trainer = cli.trainer
        parameters = sum(parameter.numel() for parameter in cli.model.parameters())
        if trainer.strategy.root_device.type == "cuda":
            machine = torch.cuda.get_device_name(trainer.strategy.root_device)
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, NOT_OURS)] + [training]
        trainer.fit(cli.model, datamodule=cli.datamodule)
        if trainer.interrupted or trainer.received_sigterm:
            raise KeyboardInterrupt
        if settings.keep:
            trainer.save_checkpoint(folder / "last.ckpt")
    except SystemExit as stopped:  # how Lightning ends on Ctrl-C
        raise KeyboardInterrupt from stopped
    except InputError as error:
        failed = str(error)
    except Exception as error:  # whatever it is, the other runs go on
        write_atomically(folder / "error.txt", traceback.format_exc())
        first = (str(error).splitlines() or [""])[0]
        failed = f"{type(error).__name__}: {first} (more in {folder / 'error.txt'})"
    return finite(
        {
            "config": str(which.path),
            "name": which.name,
            "digest": which.digest,
            "seed": seed,
            "budget": str(settings.budget),
            "options": list(settings.options),
            "steps": training.steps,
            "seconds": training.points[-1]["seconds"] if training.points else None,
            "parameters": parameters,
            "first_loss": training.first_loss,
            "monitor": which.monitor,
            "mode": which.mode,
            "points": training.points,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processor": machine,
            "failed": failed,
        }
    )


def processor() -> str:
    """Its name, as far as the system tells."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()
