"""Featurewise sort pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.aggregators.basic import masked_fill
from setpred.aggregators.ranks import at_ranks, feature_ranks
from setpred.schema import CLEVR


def sort_features(elements: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each feature sorted over the set, largest first; absent elements become zeros at the end.

    `[batch, set_size, dim]` to the same shape. Equal values get different ranks, in an order left open, and so
    in a gradient equal elements get different slopes: multiset-equivariant, but not set-equivariant.
    """
    filled = masked_fill(elements, mask, -torch.inf)
    # sorting along the contiguous axis is several times faster on a CPU than along a strided one
    ranked = filled.transpose(1, 2).contiguous().sort(dim=-1, descending=True).values.transpose(1, 2)
    if mask is None:
        return ranked
    rank = torch.arange(elements.shape[1], device=elements.device)
    return masked_fill(ranked, rank < mask.sum(1, keepdim=True), 0.0)


class FSPool(Aggregator):
    """out_k = Σ_j w_k(t_j) x_(j)k, with x_(j)k the j-th largest value of feature k (Zhang et al., ICLR 2020).

    The weight of rank j = 0..n-1 in a set of n is read at t_j = j/(n-1) from a piecewise-linear function with
    `set_size` knots; for a full set of `set_size` elements these are the knots themselves and the pooling is
    exactly a sum over ranks with a free weight matrix.

    Args:
        in_dim: features of an element.
        set_size: knots of the weight function; the usual set size.
    """

    def __init__(self, in_dim: int, *, set_size: int = CLEVR.max_objects) -> None:
        super().__init__(in_dim)
        # N(0, 1/set_size), the published start (Kaiming normal, fan out, linear)
        self.weight = nn.Parameter(torch.randn(set_size, in_dim) / set_size**0.5)

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        # the sum over ranks taken in the order of the elements, each times the weight of its rank
        ranks = feature_ranks(masked_fill(elements, mask, -torch.inf))
        slopes = at_ranks(self.weights(elements.shape[1], mask), ranks)
        return (slopes * masked_fill(elements, mask, 0.0)).sum(1)

    def weights(self, size: int, mask: Tensor | None) -> Tensor:
        """w(t_j) for each rank j < size: `[1, size, in_dim]`, with a mask `[batch, size, in_dim]`."""
        knots = self.weight.shape[0]
        if mask is None and size == knots:
            return self.weight.unsqueeze(0)
        # in the weight's precision: under autocast the features have less than positions need
        rank = torch.arange(size, device=self.weight.device, dtype=self.weight.dtype)
        counts = rank.new_full((1, 1), size) if mask is None else mask.sum(1, keepdim=True).to(rank.dtype)
        position = (rank / (counts - 1).clamp(min=1)).clamp(max=1) * (knots - 1)
        below = position.floor().long()
        above = (below + 1).clamp(max=knots - 1)
        share = (position - below).unsqueeze(-1)
        return torch.lerp(self.weight[below], self.weight[above], share)
