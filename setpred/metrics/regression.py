"""How far predicted numbers are off."""

from __future__ import annotations

from torch import Tensor

from setpred.matching import check_pair
from setpred.metrics.averages import MeanMetric


class AbsoluteError(MeanMetric):
    """ "absolute_error" = mean |predicted - target| over the numbers of an example, then over the examples.

    Elements are aligned, as those of a set of one element are. In the units of the target.

    Args:
        whole: the targets are whole numbers, such as counts. Then there is also "exact", the share of the examples
            whose numbers, rounded, are all right: each less than a half off.
    """

    keys = ("absolute_error",)
    monitor, mode = "absolute_error", "min"
    higher_is_better = False

    def __init__(self, *, whole: bool = False) -> None:
        if whole:
            self.keys = ("absolute_error", "exact")
        super().__init__()

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        check_pair(predicted, target)
        if predicted.shape != target.shape:
            raise ValueError(
                f"expected as many numbers as targets, got {list(predicted.shape)} and {list(target.shape)}"
            )
        error = (predicted.double() - target.double()).abs().flatten(1)
        return {"absolute_error": error.mean(1), "exact": (error < 0.5).all(1)}
