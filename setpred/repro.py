"""Files that repeat a step whose numbers break: written by a training, read by `python -m setpred.replay`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpred import checkpoint
from setpred.check import training_loss
from setpred.checkpoint import read_checkpoint, rebuilt, save_whole
from setpred.diagnosis import Step
from setpred.errors import InputError, reason
from setpred.faults import Fault
from setpred.limits import shown

KEY = "repro"  # where a file keeps it; beside it lie weights and description, as in a checkpoint
HALVES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}  # Lightning's names of what autocast does
PRECISIONS = ("32-true", *HALVES)


def save(module: Any, step: Step, fault: Fault) -> str:
    """Saves all that repeats a step of a `SetPrediction` into the run's folder; says where, or why not.

    The name has the process's rank where there is more than one.
    """
    trainer = module.trainer
    rank = f"-rank-{module.global_rank}" if trainer.world_size > 1 else ""
    path = Path(trainer.default_root_dir) / f"repro-step-{module.global_step}{rank}.pt"
    evaluating = [name for name, part in module.named_modules() if not part.training]
    found = {
        "fault": fault.to_dict(),
        "sentence": str(fault),
        "batch": {name: value.detach().cpu().clone() for name, value in step.batch.items()},
        "seed": step.seed,
        "iterations": step.iterations,
        "training": module.training,
        "evaluating": [name for name in evaluating if name.partition(".")[0] in ("model", "loss")],
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "precision": str(trainer.precision),
        "device": module.device.type,
        "rank": module.global_rank,
        "processes": trainer.world_size,
    }
    content = {
        checkpoint.KEY: module.description(),
        "state_dict": module.state_dict(),
        "epoch": module.current_epoch,
        "global_step": module.global_step,
        KEY: found,
    }
    try:
        save_whole(content, path)
    except InputError as error:  # where the policy is to go on, a full disk is not the end
        return f"What repeats the step could not be saved: {error}"
    return f"Model, batch and seed are saved in {path}, which python -m setpred.replay repeats"


@dataclass(frozen=True)
class Repro:
    """A file that was read: the step on its device, the fault as `Fault.to_dict` wrote it, and what else it says."""

    step: Step
    fault: Mapping[str, Any]
    about: Mapping[str, Any]

    def context(self) -> AbstractContextManager[Any]:
        """The precision in which the step ran."""
        device = self.step.batch["elements"].device
        half = HALVES.get(self.about["precision"])
        return nullcontext() if half is None else torch.autocast(device.type, half)


def read(path: str | os.PathLike[str], *, allow: Iterable[str] = (), device: torch.device | str = "cpu") -> Repro:
    """Rebuilds the step; no code from the file is run, see `setpred.checkpoint.read_checkpoint`.

    Raises:
        InputError: no such file, a damaged one or one of another kind; parts that are not allowed.
    """
    allow, content = list(allow), read_checkpoint(path, finite=False)
    found = content.get(KEY)
    if not isinstance(found, dict):
        raise InputError(f"{path} is a checkpoint, expected a repro-step-….pt, which a training writes where it breaks")
    if found.get("precision") not in PRECISIONS:
        raise InputError(
            f"{path} was written at precision {shown(found.get('precision'))}, expected {' or '.join(PRECISIONS)}; "
            "train at one of these to repeat the step"
        )
    parts = nn.ModuleDict({"model": rebuilt(content, path, allow=allow), "loss": training_loss(content, allow)})
    try:
        # the layout in which a training has it
        parts.to(device, memory_format=torch.channels_last).train(bool(found["training"]))
        for name in found["evaluating"]:
            parts.get_submodule(name).training = False
        for name in found["frozen"]:
            parts.get_parameter(name).requires_grad_(False)
        batch = {str(name): value.to(device) for name, value in found["batch"].items()}
        if not isinstance(batch.get("elements"), Tensor):
            raise TypeError("no elements in the batch")
        step = Step(parts["model"], parts["loss"], batch, found["seed"], found["iterations"])
        return Repro(step, dict(found["fault"]), {key: value for key, value in found.items() if key != "batch"})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged: {reason(error)}; use the file as the training wrote it") from error
