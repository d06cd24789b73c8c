"""Featurewise sort pooling (FSPool)."""

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.sets import fill_absent

COUNTED = 16  # up to this size, and up to about twice of it, counting is faster than sorting on a CPU


class FSPool(Aggregator):
    """Featurewise sort pooling (FSPool).

    out_k = Σ_j w_k(t_j) x_(j)k, with x_(j)k the j-th largest value of feature k (Zhang et al., ICLR 2020).

    The weight of rank j = 0..n-1 in a set of n is read at t_j = j/(n-1) from a piecewise-linear function with
    `set_size` knots. For a full set of `set_size` elements these are the knots: a sum over ranks with a free weight
    matrix. Equal elements get different ranks, and so different gradients: multiset-equivariant, not set-equivariant.

    Args:
        in_dim: features of an element.
        set_size: knots of the weight function; the usual set size.
    """

    def __init__(self, in_dim: int, *, set_size: int) -> None:
        super().__init__(in_dim)
        # N(0, 1/set_size), the published start (Kaiming normal, fan out, linear)
        self.weight = nn.Parameter(torch.randn(set_size, in_dim) / set_size**0.5)

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        # the sum over ranks, in the order of the elements: each times the weight of its rank
        ranks = feature_ranks(fill_absent(elements, mask, -torch.inf))
        slopes = at_ranks(self.weights(elements.shape[1], mask), ranks)
        return (slopes * fill_absent(elements, mask)).sum(1)

    def weights(self, size: int, mask: Tensor | None) -> Tensor:
        """w(t_j) for each rank j < size: `[1, size, in_dim]`, with a mask `[batch, size, in_dim]`."""
        knots = self.weight.shape[0]
        if mask is None and size == knots:
            return self.weight.unsqueeze(0)
        # in the weight's precision: under autocast the features have less than positions need
        rank = torch.arange(size, device=self.weight.device, dtype=self.weight.dtype)
        sizes = rank.new_full((1, 1), size) if mask is None else mask.sum(1, keepdim=True).to(rank.dtype)
        position = (rank / (sizes - 1).clamp(min=1)).clamp(max=1) * (knots - 1)
        below = position.floor().long()
        above = (below + 1).clamp(max=knots - 1)
        return torch.lerp(self.weight[below], self.weight[above], (position - below).unsqueeze(-1))


@torch.no_grad()
def feature_ranks(values: Tensor) -> Tensor:
    """Rank of each value within its feature: how many values are larger, or equal and earlier in the set.

    The ranks of a feature are a permutation of 0..n-1, also with equal values. Small sets on a CPU are counted: n²
    comparisons, but no sort and no scatter, three times as fast for ten values. So are all sets in compiled code, where
    the comparisons happen in registers. Other sets are sorted; on a GPU each comparison would be a launch.

    `[batch, set_size, dim]` to the same shape, in an integer type that depends on the way.
    """
    if torch.compiler.is_compiling():
        return _count_in_blocks(values)
    if values.shape[1] <= COUNTED and values.device.type == "cpu":
        return _count_pairs(values)
    # sorting along the contiguous axis is several times faster on a CPU than along a strided one
    order = values.transpose(1, 2).contiguous().sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place).transpose(1, 2)


def _count_pairs(values: Tensor) -> Tensor:
    rows = values.unbind(1)
    ranks = [torch.full_like(row, i, dtype=torch.int8) for i, row in enumerate(rows)]
    for i, earlier in enumerate(rows):
        for j, later in enumerate(rows[i + 1 :], i + 1):
            overtakes = (later > earlier).to(torch.int8)
            ranks[i] = ranks[i] + overtakes
            ranks[j] = ranks[j] - overtakes
    return torch.stack(ranks, dim=1) if ranks else torch.zeros_like(values, dtype=torch.int8)


def _count_in_blocks(values: Tensor) -> Tensor:
    """Ranks for compiled code, which loads each value once for a block of others to compare it with."""
    batch, size, dim = values.shape
    length = next(divisor for divisor in range(COUNTED, 0, -1) if size % divisor == 0)
    number = torch.arange(size // length, device=values.device)
    blocks = values.unflatten(1, (-1, length))
    rows, others = blocks.unbind(2), blocks.unsqueeze(3)  # [batch, blocks, dim], [batch, blocks, length, 1, dim]
    in_earlier_block = (number.unsqueeze(1) < number).view(len(number), 1, len(number), 1)
    ranks = []
    for i, row in enumerate(rows):
        mine = row.view(batch, 1, 1, -1, dim)
        rank = torch.where(in_earlier_block, others >= mine, others > mine).float().sum((1, 2))
        for earlier in rows[:i]:
            rank = rank + (earlier == row).float()
        ranks.append(rank.int())
    return torch.stack(ranks, dim=2).flatten(1, 2)


def at_ranks(table: Tensor, ranks: Tensor) -> Tensor:
    """table[b, ranks[b, i, k], k] for each b, i and k: `[batch or 1, places, dim]`, `[batch, set_size, dim]`."""
    if not torch.compiler.is_compiling():
        return table.expand(ranks.shape[0], -1, -1).gather(1, ranks.long())
    if table.shape[1] <= COUNTED:  # selects stay in registers with the comparisons; a gather goes through memory
        found = table[:, :1].expand(ranks.shape)
        for rank in range(1, table.shape[1]):
            found = torch.where(ranks == rank, table[:, rank : rank + 1], found)
        return found
    found = table.expand(ranks.shape[0], -1, -1).gather(1, ranks.long())
    # a view of the same memory; without it, compiled code gathers once for the value and again for the gradient
    return found.as_strided(found.shape, found.stride())
