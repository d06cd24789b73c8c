"""Featurewise sort pooling (FSPool)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.aggregators.sum_mean_max import masked_fill
from setpred.schema import CLEVR

COUNTED = 16  # so many values are compared pair by pair: faster than sorting up to about twice as many (one core)


def feature_ranks(values: Tensor) -> Tensor:
    """How many values of the same feature are larger, or equal and earlier in the set: 0 for the largest.

    The ranks of a feature are a permutation of 0..n-1, equal values included. Small sets are counted, which takes n²
    comparisons but no sorting and no scattering: twice as fast for ten values on a CPU, and nearly free in compiled
    code, where all comparisons of a feature happen in registers. Other sets are sorted.

    Args:
        values: `[batch, set_size, dim]`, -inf to be the last.

    Returns:
        Ranks of the same shape, whole numbers of whatever type they were counted in.
    """
    size = values.shape[1]
    if torch.compiler.is_compiling():
        return _count_pairs(values, values.dtype) if size <= COUNTED else _count_blocks(values)
    # on a GPU, each comparison would be a launch
    return _count_pairs(values, torch.int8) if size <= COUNTED and values.device.type == "cpu" else _sort(values)


def at_ranks(table: Tensor, ranks: Tensor) -> Tensor:
    """table[b, ranks[b, i, k], k] for each b, i and k.

    Args:
        table: `[batch or 1, places, dim]`.
        ranks: `[batch, set_size, dim]`.
    """
    if torch.compiler.is_compiling() and table.shape[1] <= COUNTED:
        # selects stay in registers with the comparisons that gave the ranks; a gather goes through memory
        found = table[:, :1].expand(ranks.shape)
        for rank in range(1, table.shape[1]):
            found = torch.where(ranks == rank, table[:, rank : rank + 1], found)
        return found
    found = table.expand(ranks.shape[0], -1, -1).gather(1, ranks.long())
    # a view of its own memory: compiled code would gather once for the value and again for the gradient
    return found.as_strided(found.shape, found.stride()) if torch.compiler.is_compiling() else found


@torch.no_grad()
def _count_pairs(values: Tensor, dtype: torch.dtype) -> Tensor:
    rows = values.unbind(1)
    ranks = [torch.full_like(row, i, dtype=dtype) for i, row in enumerate(rows)]
    for i, earlier in enumerate(rows):
        for j, later in enumerate(rows[i + 1 :], i + 1):
            overtakes = (later > earlier).to(dtype)
            ranks[i] = ranks[i] + overtakes
            ranks[j] = ranks[j] - overtakes
    return torch.stack(ranks, dim=1) if ranks else torch.zeros_like(values, dtype=dtype)


@torch.no_grad()
def _count_blocks(values: Tensor) -> Tensor:
    """For compiled code: each value is loaded once for a whole block of others that it is compared with."""
    batch, size, dim = values.shape
    length = next(divisor for divisor in range(COUNTED, 0, -1) if size % divisor == 0)
    number = torch.arange(size // length, device=values.device)
    rows = values.unflatten(1, (-1, length)).unbind(2)  # the i-th row of each block, [batch, blocks, dim]
    others = values.unflatten(1, (-1, length)).unsqueeze(3)  # [batch, blocks, length, 1, dim]
    in_earlier_block = (number.unsqueeze(1) < number).view(len(number), 1, len(number), 1)
    ranks = []
    for i, row in enumerate(rows):
        mine = row.view(batch, 1, 1, -1, dim)
        rank = torch.where(in_earlier_block, others >= mine, others > mine).float().sum((1, 2))
        for earlier in rows[:i]:
            rank = rank + (earlier == row).float()
        ranks.append(rank.int())
    return torch.stack(ranks, dim=2).flatten(1, 2)


@torch.no_grad()
def _sort(values: Tensor) -> Tensor:
    # sorting along the contiguous axis is several times faster on a CPU than along a strided one
    order = values.transpose(1, 2).contiguous().sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place).transpose(1, 2)


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
