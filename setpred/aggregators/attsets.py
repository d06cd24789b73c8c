"""AttSets: attention over the set, separately for each feature."""

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.aggregators.pma import masked_softmax
from setpred.sets import fill_absent


class AttSets(Aggregator):
    """Attention pooling with a weight for each feature (AttSets).

    out_k = Σ_n s_nk x_nk,   s_nk = softmax over n of c_nk,   c_n = W x_n (Yang, Wang, Markham, Trigoni, IJCV 2020).

    Each feature is a weighted mean with its own weights; W = 0 gives the plain mean. Differentiable any number of
    times. Equal elements get equal gradients. The weight of the only element of a set is 1 for every W, so such sets
    train the rest of a model alone: the first stage of the paper's training, which `setpred.training.FASet` runs by
    setting `single`. It suits models that encode input sets; inside an objective, each descent step would draw again.

    Args:
        in_dim: features of an element.
        bounded: c_n = tanh(W x_n + b), one of the paper's options.
    """

    def __init__(self, in_dim: int, *, bounded: bool = False) -> None:
        super().__init__(in_dim)
        self.attention = nn.Linear(in_dim, in_dim, bias=bounded)  # without tanh, a bias would cancel in the softmax
        self.bounded = bounded
        self.single = False  # in training, reduce each set to one of its elements, drawn at random

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        if self.single and self.training:
            draw = torch.rand(elements.shape[:2], device=elements.device)
            draw = draw if mask is None else draw.masked_fill(~mask, -1.0)
            chosen = torch.zeros_like(draw, dtype=torch.bool).scatter(1, draw.argmax(1, keepdim=True), True)
            mask = chosen if mask is None else chosen & mask
        elements = fill_absent(elements, mask)
        scores = self.attention(elements)
        return (masked_softmax(scores.tanh() if self.bounded else scores, mask) * elements).sum(1)
