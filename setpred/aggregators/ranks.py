"""Ranks within a feature: which place each value has among those of the set, and what a table says of that place."""

from __future__ import annotations

import torch
from torch import Tensor

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
