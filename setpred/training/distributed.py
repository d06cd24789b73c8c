"""Training in several processes: their start, and a common end when one of them fails."""

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

# as "ddp", but parameters without a gradient are no error, such as the start of an implicit descent
STRATEGY = "ddp_find_unused_parameters_true"
PATIENCE = 5.0  # seconds for other processes to print their error before they are killed


def slurm_plugins() -> list[SLURMEnvironment]:
    """Plugin for a training under SLURM's `srun`, else none.

    Lightning's default would itself save on SIGUSR1 and requeue the job, on top of `setpred.training.checkpointing`.
    """
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def check_started(trainer: pl.Trainer, environment: Mapping[str, str] = os.environ) -> None:
    """Raise `InputError` if torchrun has started another number of processes than the trainer expects."""
    started = int(environment.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in environment else trainer.world_size
    if started != trainer.world_size:
        raise InputError(
            f"torchrun has started {started} processes, but the training is for {trainer.world_size}; give --trainer."
            "devices (processes of a node) and --trainer.num_nodes whose product is that number"
        )


def process_number(environment: Mapping[str, str] = os.environ) -> int:
    """Rank of this process, as given by its starter; 0 without others."""
    return int(next((environment[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in environment), 0))


@contextmanager
def common_end(trainer: pl.Trainer) -> Iterator[None]:
    """Within, an error of one process ends all, each with a message.

    Processes that Lightning has started are children of process 0: it ends them when it fails, and they end when it
    is gone. `torchrun` and `srun --kill-on-bad-exit` do so for theirs.

    Raises:
        InputError: as in the block, with the number of the process; or another process has ended.
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
        # gloo's errors have no class
        gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
        if gloo or isinstance(error, torch.distributed.DistError):
            raise InputError(f"{name}: another process of this training has ended; see its message") from error
        raise


def _end(children: list[subprocess.Popen]) -> None:
    """End the processes, after some time to end by themselves."""
    ours, deadline = list(children), time.monotonic() + PATIENCE
    children.clear()  # Lightning watches this list, and would end this process when the first is gone
    for child in ours:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    for child in ours:
        child.kill()  # softer signals do not reach a process in a collective operation
