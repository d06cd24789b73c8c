"""How many elements are numbered rightly, within their classes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from setpred.losses.numbering import split_target
from setpred.metrics.averages import MeanMetric


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


class NumberingAccuracy(MeanMetric):
    """Accuracy of class-specific numbering: "all_right", the share of sets without a mistake, and "right", of elements.

    Both are 1 exactly for right answers, in any order within a class; see `right_numbers`. The published figures are
    of "all_right" with the matching of the loss in place of the best one (Zhang et al., ICLR 2022), which can only be
    lower. "right" weighs each set alike.

    Args:
        classes: how many leading numbers of a target element are its one-hot class.
    """

    keys = ("all_right", "right")
    monitor, mode = "all_right", "max"
    higher_is_better = True

    def __init__(self, *, classes: int = 4) -> None:
        super().__init__()
        self.classes = classes

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        right, total = right_numbers(predicted, target, classes=self.classes)
        return {"all_right": right == total, "right": right / total.clamp(min=1)}
