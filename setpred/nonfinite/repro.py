"""Save a step with non-finite numbers, report it, and read it again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpred.checkpoint.load import KEY as CHECKPOINT_KEY
from setpred.checkpoint.load import read_checkpoint, rebuild_model, save_checkpoint, training_loss
from setpred.errors import InputError, listed, reason, shown
from setpred.model import Step
from setpred.nonfinite.locate import Fault, diagnose, not_finite
from setpred.nonfinite.policy import MOST_REPROS

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
        CHECKPOINT_KEY: module.description(),
        "state_dict": module.state_dict(),
        "epoch": module.current_epoch,
        "global_step": module.global_step,
        KEY: found,
    }
    try:
        save_checkpoint(content, path)
    except InputError as error:  # where the policy is to go on, a full disk is not the end
        return f"What repeats the step could not be saved: {error}"
    return f"Model, batch and seed are saved in {path}, which python -m setpred replay repeats"


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
    """Rebuilds the step; no code from the file is run, see `setpred.checkpoint.load.read_checkpoint`.

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
    parts = nn.ModuleDict({"model": rebuild_model(content, path, allow=allow), "loss": training_loss(content, allow)})
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


def report(module: Any, step: Step, seen: Fault) -> tuple[Fault, str]:
    """Repeats the step to find where it breaks, saves all that repeats it, and says so.

    Args:
        module: the `setpred.training.SetPrediction` in training, with buffers as before the step.
        seen: what is known without a repeat; holds where a repeat shows nothing.

    Returns:
        The fault and the sentence for the user.
    """
    fault = _located(module, step, seen)
    text = f"{_when(module)}: {fault}"
    if fault.samples and "index" in step.batch:
        text += f"; data indices {listed([int(step.batch['index'][sample]) for sample in fault.samples])}"
    if not fault.repeated:
        text += ", which a repeat of the step does not show"
    if module.guard.files < MOST_REPROS:
        module.guard.files += 1
        text += f". {save(module, step, fault)}"
    return fault, f"{text}. What to do: {fault.advice}"


def report_gradient(module: Any, steps: Sequence[Step]) -> tuple[Fault, str]:
    """The same where a gradient is not finite, though every loss of this process is; of the batches of one step.

    Where it is none of this process's batches, another process reports; the first process does in any case.
    """
    broken = not_finite({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    seen = Fault("gradient", names=broken, repeated=False)
    buffers = list(module.buffers())
    after = module.guard.restore(buffers)
    guilty = next((step for step in steps if _located(module, step, seen).repeated), None)
    if guilty is None and not module.trainer.is_global_zero:
        found = seen, f"{_when(module)}: {seen}, by the batch of another process, which says more"
    else:
        found = report(module, steps[-1] if guilty is None else guilty, seen)
    for buffer, value in zip(buffers, after, strict=True):
        buffer.copy_(value)
    return found


def _when(module: Any) -> str:
    return f"step {module.global_step} (epoch {module.current_epoch})"


def _located(module: Any, step: Step, seen: Fault) -> Fault:
    if module.trainer.world_size > 1 and any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        return seen  # a repeat would wait for the other processes
    try:
        with module.trainer.precision_plugin.forward_context():
            return diagnose(step)[0] or seen
    except torch.OutOfMemoryError:
        return seen
