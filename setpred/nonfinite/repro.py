"""Save a step with non-finite numbers, report it, and load it again."""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpred.checkpoint.load import KEY as CHECKPOINT_KEY
from setpred.checkpoint.load import read_checkpoint, rebuild_model, save_checkpoint, training_loss
from setpred.errors import InputError, listed, reason, shown
from setpred.model import Step, target_name
from setpred.nonfinite.locate import Stage, diagnose
from setpred.schema import ElementSchema

KEY = "repro"  # of the record in a file, next to weights and description as in a checkpoint
HALVES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}  # Lightning's names of autocast precisions
PRECISIONS = ("32-true", *HALVES)
MOST_REPROS = 3  # files that a process writes


@dataclass(frozen=True)
class Repro:
    """A step that was loaded from a file, its fault in the training, and Lightning's name of its precision."""

    step: Step
    fault: Stage
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the step ran."""
        half = HALVES.get(self.precision)
        return nullcontext() if half is None else torch.autocast(self.step.target.device.type, half)


def save(module: Any, step: Step, fault: Stage) -> str:
    """Save what repeats a step of a `SetPrediction` into the run's folder; return a sentence with the path.

    The file's name has the rank of the process where there are several.
    """
    trainer = module.trainer
    rank = f"-rank-{module.global_rank}" if trainer.world_size > 1 else ""
    path = Path(trainer.default_root_dir) / f"repro-step-{module.global_step}{rank}.pt"
    evaluating = [name for name, part in module.named_modules() if not part.training]
    record = {
        "fault": asdict(fault),
        "batch": {name: value.detach().cpu().clone() for name, value in step.batch.items()},
        "seed": step.seed,
        "iterations": step.iterations,
        "auxiliary": step.auxiliary,
        "training": module.training,
        "evaluating": [name for name in evaluating if name.partition(".")[0] in ("model", "loss")],
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "precision": str(trainer.precision),
    }
    content = {CHECKPOINT_KEY: module.description(), "state_dict": module.state_dict(), KEY: record}
    content |= {"epoch": module.current_epoch, "global_step": module.global_step}
    try:
        save_checkpoint(content, path)
    except InputError as error:  # a full disk does not end a training that skips
        return f"The step could not be saved: {error}"
    return f"Model, batch and seed are saved in {path}; repeat the step with `setpred replay`"


def read(path: str | os.PathLike[str], *, allow: Iterable[str] = (), device: torch.device | str = "cpu") -> Repro:
    """Load a step; no code from the file runs, see `setpred.checkpoint.load.read_checkpoint`.

    Raises:
        InputError: a missing or damaged file, a checkpoint, or parts that are not allowed.
    """
    allow, content = list(allow), read_checkpoint(path, finite=False)
    record = content.get(KEY)
    if not isinstance(record, dict):
        raise InputError(f"{path} is a checkpoint, expected a repro-step-….pt of a training with non-finite numbers")
    if record.get("precision") not in PRECISIONS:
        raise InputError(
            f"{path} was written at precision {shown(record.get('precision'))}, expected {' or '.join(PRECISIONS)}; "
            "train at one of these to repeat the step"
        )
    parts = nn.ModuleDict({"model": rebuild_model(content, path, allow=allow), "loss": training_loss(content, allow)})
    try:
        if content[CHECKPOINT_KEY].get("schema") is not None:
            parts["model"].use_schema(ElementSchema.from_dict(content[CHECKPOINT_KEY]["schema"]))
        # the memory layout of a training
        parts.to(device, memory_format=torch.channels_last).train(bool(record["training"]))
        for name in record["evaluating"]:
            parts.get_submodule(name).training = False
        for name in record["frozen"]:
            parts.get_parameter(name).requires_grad_(False)
        batch = {str(name): value.to(device) for name, value in record["batch"].items()}
        if not isinstance(batch.get(name := target_name(parts["loss"])), Tensor):
            raise TypeError(f"no {name} in the batch")
        auxiliary = float(record.get("auxiliary", 0.0))
        step = Step(parts["model"], parts["loss"], batch, record["seed"], record["iterations"], auxiliary)
        return Repro(step, Stage(**record["fault"]), record["precision"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged: {reason(error)}; use the file as the training wrote it") from error


def report(module: Any, steps: Sequence[Step], seen: Stage) -> tuple[Stage, str]:
    """Repeat steps until one shows a fault, save that one, and return its fault and the sentence for the user.

    Args:
        module: a `setpred.training.SetPrediction` in training, with the buffers from before the steps.
        steps: batches of one step of the optimiser.
        seen: the fault as known without a repeat; the answer where no repeat shows one.
    """
    repeats = ((_located(module, step), step) for step in steps)
    fault, step = next((repeat for repeat in repeats if repeat[0] is not None), (None, steps[-1]))
    text = f"{module.when()}: {fault or seen}"
    if fault is None:
        if seen.place == "gradient" and not module.trainer.is_global_zero:
            return seen, f"{text}, from the batch of another process, see its message"
        fault = replace(seen, repeated=False)
    if fault.samples and "index" in step.batch:
        text += f"; data indices {listed([int(step.batch['index'][sample]) for sample in fault.samples])}"
    if not fault.repeated:
        text += ", which a repeat of the step does not show"
    if module.guard.files < MOST_REPROS:
        module.guard.files += 1
        text += f". {save(module, step, fault)}"
    return fault, f"{text}. What to do: {fault.advice}"


def _located(module: Any, step: Step) -> Stage | None:
    """The fault that a repeat of the step shows."""
    if module.trainer.world_size > 1 and any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        return None  # a repeat would wait for the other processes
    try:
        with module.trainer.precision_plugin.forward_context():
            last = diagnose(step)[-1]
    except torch.OutOfMemoryError:
        return None
    return None if last.finite else last
