"""Stop a training, or skip a step, at non-finite numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setpred.errors import InputError, NotFiniteError
from setpred.model import Step
from setpred.nonfinite.locate import Stage, finite_norm, not_finite
from setpred.nonfinite.repro import report

POLICIES = ("stop", "skip")
MOST_IN_A_ROW = 10  # skipped steps, after which a training learns nothing more


class Guard:
    """Policy of a training for NaN and infinity.

        stop: raise an error; the weights are those of the last finite step.
        skip: leave weights, momentum and buffers, such as running statistics, as they were before the step.

    Both locate the fault by a repeat of the step, and write a file for `setpred replay`. Step numbers, learning rates,
    seeds and the order of the data are those of a run without the fault. Non-finite weights, and more than
    `MOST_IN_A_ROW` skipped steps in a row, always stop. Processes decide alike, from the gradient that they share: a
    process without a loss contributes `poison`.

    Attributes:
        skipped: number of steps skipped since the training began.
        in_a_row: number of steps skipped last.
        files: number of files that this process has written.

    Raises:
        InputError: another policy.
    """

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise InputError(f"on_not_finite: expected {' or '.join(POLICIES)}, got {policy!r}; use skip or stop")
        self.policy = policy
        self.skipped = self.in_a_row = self.files = 0
        self.steps: list[Step] = []  # batches of the present step of the optimiser
        self.lost: tuple[Step, NotFiniteError] | None = None  # one of them without a loss
        self._buffers: list[Tensor] = []  # from before them

    def begin(self, step: Step, buffers: Iterable[Tensor]) -> None:
        """Remember a batch of the optimiser's step; before the first one also the buffers."""
        if not self.steps:
            self._buffers, self.lost = [buffer.clone() for buffer in buffers], None
        self.steps.append(step)

    @torch.no_grad()
    def check(self, module: Any) -> None:
        """Let the optimiser take the step if the gradient is finite, or act by the policy.

        Raises:
            InputError: non-finite numbers, unless the step is skipped.
        """
        steps, self.steps = self.steps, []
        if finite_norm(parameter.grad for parameter in module.parameters() if parameter.grad is not None):
            self.in_a_row = 0
            return
        if self.lost is not None:
            steps, error = [self.lost[0]], self.lost[1]
            seen = Stage(error.place, error.samples)
        elif getattr(module.trainer.precision_plugin, "scaler", None) is not None:
            return  # the scaler skips the step and lowers its scale of the loss
        else:
            gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            seen = Stage("gradient", names=not_finite(gradients))
        for buffer, before in zip(module.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        with torch.enable_grad():
            fault, sentence = report(module, steps, seen)
        if self.policy == "stop" or fault.place == "weights":
            raise InputError(sentence)
        if self.in_a_row >= MOST_IN_A_ROW:
            raise InputError(f"{MOST_IN_A_ROW} steps in a row were skipped, and the next one fails, too: {sentence}")
        for parameter in module.parameters():
            parameter.grad = None  # an optimiser leaves parameters without a gradient as they are
        self.skipped += 1
        self.in_a_row += 1
        module.say(f"skipped ({self.skipped} so far): {sentence}")

    def state_dict(self) -> dict[str, int]:
        return {"skipped_batches": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped, self.in_a_row = (int(state.get(name, 0)) for name in ("skipped_batches", "in_a_row"))


def poison(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A loss that is NaN and has NaN as the gradient of every parameter.

    A process without a loss takes part in the sum of gradients with it, so that all processes see the fault.
    """
    return torch.stack([each.float().sum() for each in parameters if each.requires_grad]).sum() * torch.nan
