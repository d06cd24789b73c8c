"""Small network parts that several floors share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from setpred.errors import InputError


class MLP(nn.Sequential):
    """Linear layers with ReLU between: `widths[0] -> widths[1] -> ... -> widths[-1]`, last one linear."""

    def __init__(self, *widths: int) -> None:
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Linear(narrow, wide), nn.ReLU()]
        super().__init__(*layers[:-1])


def softplus_inverse(value: float) -> float:
    """x with softplus(x) = value, so that a positive parameter starts at the value that was asked for."""
    return value + math.log(-math.expm1(-value))  # log(eˣ - 1), without overflow


def diagonal(first: Sequence[float], size: int) -> Tensor:
    """The diagonal `[size]` that begins with the numbers `first` and goes on with ones.

    Raises:
        InputError: more than `size` numbers, or one that is not positive and finite.
    """
    numbers = [float(number) for number in first]  # not a tensor: on the meta device those cannot be compared
    if len(numbers) > size or not all(0 < number < math.inf for number in numbers):
        raise InputError(f"expected at most {size} positive numbers, got {list(first)}; shorten or correct the list")
    return torch.cat([torch.tensor(numbers), torch.ones(size - len(numbers))])


class Positive(nn.Module):
    """A learned positive number that **starts at `value`**: softplus(raw)."""

    def __init__(self, value: float) -> None:
        super().__init__()
        if value <= 0:
            raise ValueError(f"expected a positive start value, got {value}")
        self.raw = nn.Parameter(torch.tensor(softplus_inverse(value)))

    def forward(self) -> Tensor:
        return nn.functional.softplus(self.raw)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation out of elementary operations, so that derivatives of every order are right.

    The third derivative of torch's fused layer norm is wrong (seen with torch 2.15 against finite differences), and a
    potential inside an objective inside a training loss is differentiated three times.
    """

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return centred * scale * self.weight + self.bias


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch normalisations inside that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within, the module and all its parts are in evaluation mode; afterwards each part is in the mode it was in."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def estimating_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within, their running statistics are the mean over the forward passes; at least one must be made.

    Running averages of a training trail behind its weights: while the learning rate is high, a model is worse in
    evaluation than in training for that alone. All of them anew, under the weights as they are, is the remedy (precise
    batch normalisation; Wu and Johnson, "Rethinking Batch in BatchNorm", 2021). Nothing else goes into training mode.
    """
    before = [(norm.momentum, norm.training, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # counts all passes alike
        norm.train()
    try:
        yield
    finally:
        for norm, (momentum, training, tracked) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
            norm.num_batches_tracked.copy_(tracked)
