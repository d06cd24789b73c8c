"""Many processes that train together: how they are started, and how they end when one of them cannot go on."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from setpred.errors import InputError
from setpred.workers import end_with_parent

# As "ddp", but a parameter that no gradient reaches is no error: the start of an implicit descent, the step sizes of
# an equilibrium that is only matched.
STRATEGY = "ddp_find_unused_parameters_true"
PATIENCE = 5.0  # seconds for the others to say what ended them, before they are ended


def scheduler() -> list[SLURMEnvironment]:
    """The plugin for a training under SLURM's `srun`, else none.

    Lightning's own would save checkpoints of its own on SIGUSR1 and put the job into the queue again, beside what
    `setpred.training.checkpointing` does.
    """
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def check_started(trainer: pl.Trainer, environment: Mapping[str, str] = os.environ) -> None:
    """That the trainer knows of the processes that torchrun has started.

    Raises:
        InputError: it would train in each of them as if alone.
    """
    started = int(environment.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in environment else trainer.world_size
    if started != trainer.world_size:
        raise InputError(
            f"torchrun has started {started} processes, but the training is for {trainer.world_size}; give --trainer."
            "devices (processes of a node) and --trainer.num_nodes whose product is that number"
        )


def number(environment: Mapping[str, str] = os.environ) -> int:
    """Which of all processes this is, as their starter says; 0 where there are no others."""
    return int(next((environment[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in environment), 0))


@contextmanager
def together(trainer: pl.Trainer) -> Iterator[None]:
    """Within, what ends one process ends all, each with a sentence, and no one waits for who is gone.

    Where Lightning has started the other processes they are children of process 0: it ends them when it cannot go on
    itself, and they end when it has gone. `torchrun` and `srun --kill-on-bad-exit` look after theirs.

    Raises:
        InputError: says which process it is; also where another process has gone.
    """
    if trainer.world_size == 1:
        yield
        return
    if hasattr(trainer.strategy.launcher, "procs") and trainer.local_rank > 0:
        end_with_parent()
    name = f"process {trainer.global_rank} of {trainer.world_size}"
    try:
        yield
    except BaseException as error:
        _end(getattr(trainer.strategy.launcher, "procs", []))
        if isinstance(error, InputError):
            raise InputError(f"{name}: {error}") from error
        if _left_alone(error):
            says = "another process of this training has ended; its own message says why"
            raise InputError(f"{name}: {says}") from error
        raise


def _left_alone(error: BaseException) -> bool:
    """Whether it says that another process does not answer any more; gloo's errors have no class of their own."""
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return gloo or isinstance(error, torch.distributed.DistError)


def _end(children: list[subprocess.Popen]) -> None:
    """Ends the processes; those that have come to their end by themselves are given the time for it."""
    ours, deadline = list(children), time.monotonic() + PATIENCE
    children.clear()  # Lightning looks at this list now and then, and would end us because of the first who is gone
    for child in ours:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    for child in ours:
        child.kill()  # who waits in a collective operation hears no softer signal
