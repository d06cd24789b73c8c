"""What a training says of a step whose numbers break, and what it keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from setpred import repro
from setpred.diagnosis import Step, diagnose
from setpred.faults import Fault, listed, not_finite
from setpred.guard import MOST_REPROS


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
        text += f". {repro.save(module, step, fault)}"
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
