"""A canonical order of a set, which makes functions of sequences functions of sets."""

from __future__ import annotations

import torch
from torch import Tensor

from setpred.aggregators.base import Aggregator
from setpred.aggregators.sum_mean_max import masked_fill


class CanonicalOrder(Aggregator):
    """Any function of a sequence made a function of the set: the elements come to it sorted by u · x_i.

    The frame average over permutations (Puny et al., ICLR 2022), whose frame here is the one order in which the
    scores fall; u is fixed and the same for all. Exactly invariant, up to distinct elements with equal scores, which
    have probability zero. The price is continuity: where two scores cross, the order jumps, and the result with it
    unless the function does not mind the order. Away from there as often differentiable as the function.

    Args:
        aggregator: of ordered elements, such as `LearnableMonoid`.
    """

    def __init__(self, aggregator: Aggregator) -> None:
        super().__init__(aggregator.in_dim, aggregator.out_dim)
        self.aggregator = aggregator
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("direction", torch.randn(self.in_dim, generator=generator))

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        scores = (masked_fill(elements, mask, 0.0).detach() * self.direction).sum(-1)
        order = scores.argsort(dim=1, descending=True)
        ordered = elements.gather(1, order.unsqueeze(-1).expand_as(elements))
        return self.aggregator(ordered, None if mask is None else mask.gather(1, order))
