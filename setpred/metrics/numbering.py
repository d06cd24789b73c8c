"""How many elements are numbered rightly, within their classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from setpred.losses.numbering import split_target


def right_numbers(predicted: Tensor, target: Tensor, *, classes: int) -> tuple[Tensor, Tensor]:
    """How many elements of each set are right, and how many there are: int64 `[batch]` each.

    An element says the number of its largest score. Right is as many elements as a one-to-one matching within
    classes can make right at best: for each class, how many of the numbers 0, …, n - 1 that its n elements have in
    the target are said at least once. Target elements without a class are padding.

    Args:
        predicted: scores `[batch, n, numbers]`.
        target: one-hot class, then one-hot number, `[batch, n, classes + numbers]`.
        classes: how many.
    """
    kinds, wanted = split_target(predicted, target, classes)
    said = functional.one_hot(predicted.argmax(-1), predicted.shape[-1]).to(target.dtype)
    times_said, times_wanted = kinds.mT @ said, kinds.mT @ wanted  # of each class and number
    return times_said.minimum(times_wanted).sum((1, 2)).round().long(), kinds.sum((1, 2)).round().long()


class NumberingAccuracy(Metric):
    """Accuracy of class-specific numbering: "all_right", the share of sets without a mistake, and "right", of elements.

    Both are 1 exactly for right answers, in any order within a class; see `right_numbers`. The published figures are
    of "all_right" with the matching of the loss in place of the best one (Zhang et al., ICLR 2022), which can only be
    lower. "right" weighs each set alike.

    Args:
        classes: how many leading numbers of a target element are its one-hot class.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    monitor, mode = "all_right", "max"

    def __init__(self, *, classes: int = 4) -> None:
        super().__init__()
        self.classes = classes
        for name in ("sets", "all_right", "right"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        right, total = right_numbers(predicted, target, classes=self.classes)
        self.sets += len(right)
        self.all_right += (right == total).sum()
        self.right += (right / total.clamp(min=1)).double().sum()

    def compute(self) -> dict[str, Tensor]:
        return {"all_right": self.all_right / self.sets, "right": self.right / self.sets}
