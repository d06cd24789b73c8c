"""Accuracy of class-specific numbering."""

from torch import Tensor
from torch.nn import functional

from setpred.losses.numbering import split_target
from setpred.metrics.averages import MeanMetric


def right_numbers(predicted: Tensor, target: Tensor, *, classes: int) -> tuple[Tensor, Tensor]:
    """Number of elements of each set that are right, and number of elements: int64 `[batch]` each.

    The answer of an element is the number of its largest score. Answers are right by the best one-to-one matching
    within classes: as many of a class as its numbers that are answered. Target elements without a class are padding.

    Args:
        predicted: scores `[batch, n, numbers]`.
        target: one-hot class, then one-hot number, `[batch, n, classes + numbers]`.
        classes: number of classes.
    """
    kinds, wanted = split_target(predicted, target, classes)
    answered = functional.one_hot(predicted.argmax(-1), predicted.shape[-1]).to(target.dtype)
    right = (kinds.mT @ answered).minimum(kinds.mT @ wanted)  # of each class and number
    return right.sum((1, 2)).round().long(), kinds.sum((1, 2)).round().long()


class NumberingAccuracy(MeanMetric):
    """Accuracy of class-specific numbering: "all_right", share of sets without a mistake, and "right", of elements.

    Both are 1 exactly for right answers, in any order within a class; see `right_numbers`. "right" weighs each set
    alike. The published figures are "all_right" with the matching of the loss instead of the best one (Zhang et al.,
    ICLR 2022), which can only be lower.

    Args:
        classes: how many leading numbers of a target element are its one-hot class.
    """

    keys = ("all_right", "right")
    monitor, mode, higher_is_better = "all_right", "max", True

    def __init__(self, *, classes: int = 4) -> None:
        super().__init__()
        self.classes = classes

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        right, total = right_numbers(predicted, target, classes=self.classes)
        return {"all_right": right == total, "right": right / total.clamp(min=1)}
