"""What a training does where numbers break: it stops, skips the step, or goes on with what is whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from setpred.errors import InputError

Policy = Literal["stop", "skip", "sanitise"]
MOST_IN_A_ROW = 10  # steps that are skipped; after so many nothing is learned any more
MOST_REPEATS = 3  # of one step, each without more samples
MOST_REPROS = 3  # files a process writes, where a training goes on
COUNTS = ("skipped_batches", "sanitised_samples", "sanitised_gradients")


class Guard:
    """Policy and memory of a training against numbers that are not finite.

    Under every policy the step is repeated stage by stage to find the place, and a file that repeats it is written.

        stop: an error; the weights are those of the last good step.
        skip: the step changes neither weights nor momentum nor buffers, such as running statistics.
        sanitise: the step is taken with the samples that are whole; entries of a gradient that are not finite, or have
            no finite square, become zero. Where nothing is left the step is skipped.

    The number of the step, its learning rate, the seeds and the order of the data go on as without the fault. Weights
    that are not finite, and `MOST_IN_A_ROW` skipped steps in a row, stop under every policy. With many processes all
    of them take the same decision, from the gradient that they share: a process without a loss gives `poison`.

    Attributes: `counts` since the training began, of this process; `in_a_row`, the steps skipped last; `files`, how
    many that repeat a step were written.
    """

    def __init__(self, policy: Policy) -> None:
        if policy not in get_args(Policy):
            raise InputError(f"on_not_finite: expected one of {', '.join(get_args(Policy))}, got {policy!r}")
        self.policy = policy
        self.counts = dict.fromkeys(COUNTS, 0)
        self.in_a_row = self.files = 0
        self._kept: list[Tensor] = []
        self._step: int | None = None

    def keep(self, buffers: Iterable[Tensor], step: int) -> None:
        """Remembers the buffers as they are before this step; of several batches of a step, before the first."""
        buffers = list(buffers)
        if step == self._step and len(buffers) == len(self._kept):
            return
        self._step = step
        if [value.shape for value in buffers] != [value.shape for value in self._kept]:
            self._kept = [buffer.clone() for buffer in buffers]
        for kept, buffer in zip(self._kept, buffers, strict=True):
            kept.copy_(buffer)

    def restore(self, buffers: Iterable[Tensor]) -> list[Tensor]:
        """Makes the buffers those before this step; returns what they were."""
        found = []
        for kept, buffer in zip(self._kept, buffers, strict=True):
            found.append(buffer.clone())
            buffer.copy_(kept)
        return found

    def drop(self, parameters: Iterable[nn.Parameter], buffers: Iterable[Tensor]) -> None:
        """Makes the step one that does nothing: an optimiser leaves parameters without a gradient alone."""
        for parameter in parameters:
            parameter.grad = None
        self.restore(buffers)
        self.counts["skipped_batches"] += 1
        self.in_a_row += 1

    def mend(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Sets what is not finite of the gradients to zero; False, and nothing done, if that leaves nothing."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        mended = [torch.where(gradient.square().isfinite(), gradient, 0.0) for gradient in gradients]
        whole = any(bool(gradient.square().isfinite().any()) for gradient in gradients)
        if not whole or not finite_norm(mended):
            return False
        for gradient, value in zip(gradients, mended, strict=True):
            gradient.copy_(value)
        self.counts["sanitised_gradients"] += 1
        return True

    def load(self, state: Mapping[str, int]) -> None:
        """Goes on with the counts of a checkpoint."""
        self.counts = {name: int(state.get(name, 0)) for name in COUNTS}
        self.in_a_row = int(state.get("in_a_row", 0))


def poison(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A loss in place of one that does not exist: NaN, with NaN as the gradient of every parameter.

    So a process that has no loss takes part in the sum of gradients as all others do, and all get to know.
    """
    return torch.stack([each.float().sum() for each in parameters if each.requires_grad]).sum() * torch.nan


def trained(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics, by name: what must be finite. Other buffers may hold masks of infinities."""
    statistics = {name: each for name, each in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return dict(module.named_parameters()) | statistics


def finite_norm(tensors: Iterable[Tensor], *, largest: bool = False) -> Tensor:
    """Whether the norm of all of them together is finite, on their device; with `largest` the largest number is."""
    values = [tensor.detach() for tensor in tensors]
    return torch.isfinite(nn.utils.get_total_norm(values, norm_type=torch.inf if largest else 2.0))
