"""How often the class is right."""

from __future__ import annotations

from torch import Tensor

from setpred.matching import check_pair
from setpred.metrics.averages import MeanMetric


class Accuracy(MeanMetric):
    """ "accuracy": the share of elements whose greatest logit is that of their class; equal ones: the first.

    Elements are aligned, and targets one-hot, as `setpred.losses.CrossEntropy` takes them; a row of zeros has no class
    and is not counted. The class of a whole set is the one element of `[batch, 1, classes]`.
    """

    keys = ("accuracy",)
    monitor, mode = "accuracy", "max"
    higher_is_better = True

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        check_pair(predicted, target)
        if predicted.shape != target.shape:
            raise ValueError(
                f"expected as many logits as classes, got {list(predicted.shape)} and {list(target.shape)}"
            )
        return {"accuracy": (predicted.argmax(-1) == target.argmax(-1))[target.sum(-1) > 0]}
