"""AttSets: attention over the set, for each feature on its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.aggregators.pma import masked_softmax
from setpred.aggregators.sum_mean_max import masked_fill


class AttSets(Aggregator):
    """out_k = Σ_n s_nk x_nk,   s_nk = softmax over n of c_nk,   c_n = W x_n (Yang, Wang, Markham, Trigoni, IJCV 2020).

    Each feature is a weighted mean of its own; with W = 0 all of them are the plain mean. The weights of a set of one
    element are 1 whatever W is, so such sets teach the rest of a model and never the attention: that is the first
    stage of the paper's training, FASet. The callback `setpred.training.FASet` runs it by setting `single`; it is for
    models that encode input sets, since inside an objective each step of the descent would draw other elements.

    Differentiable any number of times. Equal elements get equal gradients.

    Args:
        in_dim: features of an element.
        bounded: c_n = tanh(W x_n + b), one of the paper's options.
    """

    def __init__(self, in_dim: int, *, bounded: bool = False) -> None:
        super().__init__(in_dim)
        self.attention = nn.Linear(in_dim, in_dim, bias=bounded)  # without tanh the softmax does not see a bias
        self.bounded = bounded
        self.single = False  # while training: each set is seen as one of its elements, drawn at random

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        if self.single and self.training:
            mask = one_of_each(elements, mask)
        elements = masked_fill(elements, mask, 0.0)
        scores = self.attention(elements)
        return (masked_softmax(scores.tanh() if self.bounded else scores, mask) * elements).sum(1)


def one_of_each(elements: Tensor, mask: Tensor | None) -> Tensor:
    """A mask `[batch, set_size]` with one element of each set, all as likely; none of an empty set."""
    draw = torch.rand(elements.shape[:2], device=elements.device)
    if mask is not None:
        draw = draw.masked_fill(~mask, -1.0)
    chosen = torch.zeros_like(draw, dtype=torch.bool).scatter(1, draw.argmax(1, keepdim=True), True)
    return chosen if mask is None else chosen & mask
