"""Sum, mean and max pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from setpred.aggregators.base import Aggregator


def masked_fill(elements: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """Absent elements replaced by `value`; whatever they held (NaN too) has no influence."""
    return elements if mask is None else elements.masked_fill(~mask.unsqueeze(-1), value)


def set_sizes(elements: Tensor, mask: Tensor | None) -> Tensor:
    """Number of present elements of each set, `[batch, 1]`, in the elements' dtype."""
    if mask is None:
        return elements.new_full((elements.shape[0], 1), elements.shape[1])
    return mask.sum(1, keepdim=True).to(elements.dtype)


def zeros_where_empty(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """`vectors [batch, dim]` with zeros for sets without elements, what every aggregator gives them."""
    return vectors if mask is None else vectors.masked_fill(~mask.any(1, keepdim=True), 0.0)


class SumPool(Aggregator):
    """out = Σ_i x_i (DeepSets; Zaheer et al., NeurIPS 2017)."""

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return masked_fill(elements, mask, 0.0).sum(1)


class MeanPool(Aggregator):
    """out = (1/n) Σ_i x_i over the n present elements."""

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return masked_fill(elements, mask, 0.0).sum(1) / set_sizes(elements, mask).clamp(min=1)


class MaxPool(Aggregator):
    """out_k = max_i x_ik (PointNet; Qi et al., CVPR 2017)."""

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return zeros_where_empty(masked_fill(elements, mask, -torch.inf).amax(1), mask)
