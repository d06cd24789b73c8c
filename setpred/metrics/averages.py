"""Metrics that are means over examples."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """The mean of all numbers that were seen, in all processes: `update(values [count])`, `compute()` float64 `[]`.

    However they were batched: Lightning's own mean over processes rounds the number of examples of each down where
    they have not all as many.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        self.total += values.detach().double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        """NaN where nothing was seen."""
        return self.total / self.count


class MeanMetric(Metric):
    """Means over all that was seen, however it was batched and in any order.

    `update(predicted, target)` adds the examples of a batch, `compute()` gives a float64 scalar for each of `keys`.
    Subclasses write `values`, and say which key decides which model is the best, and whether more of it is better.
    """

    full_state_update = False
    is_differentiable = False
    keys: tuple[str, ...]
    monitor: str
    mode: str

    def __init__(self) -> None:
        super().__init__()
        # float64, so that neither the size of the batches nor their order shows in the digits that are printed
        self.add_state("totals", default=torch.zeros(len(self.keys), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """By key, the numbers to average, all `[count]`; of sets `[batch, n, dim]` and `[batch, m, dim]`."""
        raise NotImplementedError

    def update(self, predicted: Tensor, target: Tensor) -> None:
        values = self.values(predicted.detach(), target.detach())
        rows = torch.stack([values[key].double() for key in self.keys])
        self.totals += rows.sum(1)
        self.count += rows.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """NaN where nothing was seen."""
        return dict(zip(self.keys, self.totals / self.count, strict=True))
