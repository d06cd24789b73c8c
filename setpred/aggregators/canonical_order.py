"""Canonical order: turns a function of sequences into a function of sets."""

import torch
from torch import Tensor

from setpred.aggregators.base import Aggregator
from setpred.sets import fill_absent


class CanonicalOrder(Aggregator):
    """Set function f(x_(1), …, x_(n)) of a sequence function f, with the elements sorted by u · x_i, largest first.

    The vector u is random and fixed, the same for every model. The result is exactly invariant, unless distinct
    elements have equal scores (probability zero). It jumps where two scores cross, unless f ignores the order.
    Elsewhere it is as often differentiable as f. This is the frame average over permutations (Puny et al., ICLR 2022)
    whose frame is one order.

    Args:
        aggregator: f, such as `LearnableMonoid`.
    """

    def __init__(self, aggregator: Aggregator) -> None:
        super().__init__(aggregator.in_dim, aggregator.out_dim)
        self.aggregator = aggregator
        self.register_buffer("direction", torch.randn(self.in_dim, generator=torch.Generator().manual_seed(0)))

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        scores = (fill_absent(elements, mask).detach() * self.direction).sum(-1)
        order = scores.argsort(dim=1, descending=True)
        ordered = elements.gather(1, order.unsqueeze(-1).expand_as(elements))
        return self.aggregator(ordered, None if mask is None else mask.gather(1, order))
