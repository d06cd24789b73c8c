"""Average precision gathered over batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from setpred.metrics.precision import THRESHOLDS, average_precision, check_pair, threshold_name
from setpred.schema import CLEVR, ElementSchema


class AveragePrecision(Metric):
    """An average precision gathered over batches: a shell around the pure functions.

    `update(predicted, target)` keeps the sets, `compute()` gives {"ap_inf": ..., "ap_1": ..., ...} and "ap", the mean
    of these, as float64 scalars, equal to the function on all images at once, however they were batched.

    Args:
        protocol: `average_precision` or `average_precision_per_image`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    monitor, mode = "ap", "max"  # what says which of two models is better

    def __init__(
        self,
        protocol: Callable[..., dict[float, float]] = average_precision,
        *,
        thresholds: Sequence[float] = THRESHOLDS,
        schema: ElementSchema = CLEVR,
    ) -> None:
        super().__init__()
        self.protocol = protocol
        self.thresholds = tuple(thresholds)
        self.schema = schema
        self.add_state("predicted", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        check_pair(predicted, target, self.schema)
        self.predicted.append(predicted.detach())
        self.target.append(target.detach())

    def compute(self) -> dict[str, Tensor]:
        predicted, target = dim_zero_cat(self.predicted), dim_zero_cat(self.target)
        scores = self.protocol(predicted, target, thresholds=self.thresholds, schema=self.schema)
        result = {f"ap_{threshold_name(t)}": torch.tensor(score, dtype=torch.float64) for t, score in scores.items()}
        return result | {"ap": torch.stack(list(result.values())).mean()}
