"""Learnable commutative monoid: a balanced tree of one learned binary operation."""

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator, zeros_where_empty
from setpred.sets import mean_present, present_first


class LearnableMonoid(Aggregator):
    """Balanced tree of a learned binary operation (LearnableMonoid).

    out = ((x_1 ⊕ x_2) ⊕ (x_3 ⊕ x_4)) ⊕ …, a balanced tree of depth ⌈log₂ n⌉ (Ong, Veličković, LoG 2022).

        a ⊕ b = ½ (f(a, b) + f(b, a)),    f a GRU cell: input a, state b

    For every f, ⊕ commutes and absent elements are neutral. That ⊕ is associative has to be learned: **unlike all other
    aggregators, an untrained one depends on the order of the elements.** To train this, shuffle the sets or add
    `associator` to the loss. `CanonicalOrder` makes the result invariant at once.

    Differentiable any number of times. Equal elements can get unequal gradients, by their places in the tree.

    Args:
        in_dim: features of an element and of every node of the tree.
        operation: f, from a and b `[count, in_dim]` to `[count, in_dim]`; a GRU cell by default.
    """

    def __init__(self, in_dim: int, *, operation: nn.Module | None = None) -> None:
        super().__init__(in_dim)
        self.operation = nn.GRUCell(in_dim, in_dim) if operation is None else operation

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """first ⊕ second, `[..., in_dim]` each."""
        a, b = (operand.reshape(-1, self.in_dim) for operand in (first, second))
        both = self.operation(torch.cat([a, b]), torch.cat([b, a]))
        return (0.5 * (both[: len(a)] + both[len(a) :])).view_as(first)

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        nodes, present = present_first(elements, mask)
        while nodes.shape[1] > 1:
            if nodes.shape[1] % 2:
                nodes, present = nn.functional.pad(nodes, (0, 0, 0, 1)), nn.functional.pad(present, (0, 1))
            left, right = nodes[:, 0::2], nodes[:, 1::2]
            # present nodes are in front: a right node is never without its left one
            nodes = torch.where(present[:, 1::2].unsqueeze(-1), self.combine(left, right), left)
            present = present[:, 0::2]
        return zeros_where_empty(nodes.sum(1), mask)

    def associator(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """Distance of ⊕ from associativity, `[batch]`: the mean square of (a ⊕ b) ⊕ c - a ⊕ (b ⊕ c).

        The mean is over features and all triples of neighbours among the present elements; 0 with fewer than three.
        """
        nodes, present = present_first(elements, mask)
        a, b, c = (nodes[:, i : max(nodes.shape[1] - 2 + i, 0)] for i in range(3))
        gap = self.combine(self.combine(a, b), c) - self.combine(a, self.combine(b, c))
        return mean_present(gap.square().mean(-1), present[:, 2:])
