"""Metrics that are means over examples, in float64 and over all processes."""

from collections.abc import Mapping

import torch
import torchmetrics
from torch import Tensor

from setpred.losses.cross_entropy import check_aligned


class MeanMetric(torchmetrics.Metric):
    """Base class of metrics that average over examples, independent of batches and their order.

    `update(predicted, target)` adds the examples of a batch, `compute()` gives a float64 scalar for each of `keys`, NaN
    without examples. A subclass implements `values`; `monitor` is the key that compares models, `mode` "min" or "max".
    """

    full_state_update = False
    is_differentiable = False
    keys: tuple[str, ...]
    monitor: str
    mode: str

    def __init__(self) -> None:
        super().__init__()
        # float64, so that batches and their order do not change the printed digits
        self.add_state("totals", default=torch.zeros(len(self.keys), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Numbers to average for each key, `[count]`, of sets `[batch, n, dim]` and `[batch, m, dim]`."""
        raise NotImplementedError

    def update(self, predicted: Tensor, target: Tensor) -> None:
        self.gather(self.values(predicted.detach(), target.detach()))

    def gather(self, values: Mapping[str, Tensor]) -> None:
        """Add numbers `[count]` for each key."""
        rows = torch.stack([values[key].double() for key in self.keys])
        self.totals += rows.sum(1)
        self.count += rows.shape[1]

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.keys, self.totals / self.count, strict=True))


class Mean(MeanMetric):
    """Mean of all numbers: `update(values [count])` adds some, `compute()` gives float64 `[]`, NaN without any.

    `torchmetrics.MeanMetric` follows the precision of the module that it is in, and would sum in float32.
    """

    keys = ("mean",)

    def update(self, values: Tensor) -> None:
        self.gather({"mean": values.detach()})

    def compute(self) -> Tensor:
        return super().compute()["mean"]


class Accuracy(MeanMetric):
    """ "accuracy": share of elements whose greatest logit is that of their class; the first of equal logits counts.

    Elements are aligned and targets one-hot, as in `setpred.losses.CrossEntropy`; a row of zeros has no class and does
    not count. The class of a complete set is the one element of `[batch, 1, classes]`.
    """

    keys = ("accuracy",)
    monitor, mode, higher_is_better = "accuracy", "max", True

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        check_aligned(predicted, target)
        return {"accuracy": (predicted.argmax(-1) == target.argmax(-1))[target.sum(-1) > 0]}


class AbsoluteError(MeanMetric):
    """ "absolute_error": mean |predicted - target| over the numbers of an example, then over examples, in target units.

    Elements are aligned, such as those of sets of one element.

    Args:
        whole: True for integer targets, such as counts. Adds "exact", the share of examples whose numbers are all right
            after rounding: off by less than a half.
    """

    keys = ("absolute_error",)
    monitor, mode, higher_is_better = "absolute_error", "min", False

    def __init__(self, *, whole: bool = False) -> None:
        if whole:
            self.keys = ("absolute_error", "exact")
        super().__init__()

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        check_aligned(predicted, target)
        error = (predicted.double() - target.double()).abs().flatten(1)
        return {"absolute_error": error.mean(1), "exact": (error < 0.5).all(1)}
