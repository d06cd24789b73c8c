"""Sum, mean and max pooling."""

import torch
from torch import Tensor

from setpred.aggregators.base import Aggregator, zeros_where_empty
from setpred.sets import fill_absent, mean_present


class SumPool(Aggregator):
    """Sum of each feature.

    out = Σ_i x_i (DeepSets; Zaheer et al., NeurIPS 2017).
    """

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return fill_absent(elements, mask).sum(1)


class MeanPool(Aggregator):
    """Mean of each feature.

    out = (1/n) Σ_i x_i over the n present elements.
    """

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return mean_present(elements, mask)


class MaxPool(Aggregator):
    """Maximum of each feature.

    out_k = max_i x_ik (PointNet; Qi et al., CVPR 2017).
    """

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return zeros_where_empty(fill_absent(elements, mask, -torch.inf).amax(1), mask)
