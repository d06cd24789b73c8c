"""Pooling by multi-head attention (PMA): learned seeds attend to the elements."""

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator, zeros_where_empty
from setpred.errors import InputError
from setpred.nn import LayerNorm
from setpred.sets import fill_absent


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the set, axis 1 of `scores [batch, set_size, ...]`, with weight 0 for absent elements."""
    if mask is None:
        return scores.softmax(1)
    absent = ~mask.view(*mask.shape, *[1] * (scores.ndim - 2))
    # the least finite number instead of -inf keeps softmax and gradient of an empty set finite
    return scores.masked_fill(absent, torch.finfo(scores.dtype).min).softmax(1).masked_fill(absent, 0.0)


class PMA(Aggregator):
    """Pooling by attention, of the Set Transformer: learned seeds S attend to the elements Z (Lee et al., ICML 2019).

        PMA(Z) = LN(H + r(H)),    H = LN(S + [A_1 V_1, …, A_h V_h] W + b),    A_j = softmax_n(Q_j K_jᵀ / √d)

    with Q, K, V = S W_Q, Z W_K, Z W_V cut into h heads of d numbers; biases there would add nothing to S and b. r is a
    linear layer and SiLU (the paper: ReLU), so that an objective has a continuous Hessian. A `SetEncoder` has the
    paper's row-wise network on Z. Differentiable any number of times. Equal elements get equal gradients.

    Args:
        in_dim: features of an element and of a seed; a multiple of `heads`.
        seeds: number of rows of S; the result is its rows end to end, `seeds * in_dim` numbers.
        heads: h.
        normalise: False omits LN, the default of the released code.
    """

    def __init__(self, in_dim: int, *, seeds: int = 1, heads: int = 4, normalise: bool = True) -> None:
        if seeds < 1 or heads < 1 or in_dim % heads:
            raise InputError(
                f"expected at least one seed and a number of heads that divides in_dim, got {seeds} seeds, {heads} "
                f"heads and in_dim {in_dim}; choose seeds >= 1 and another number of heads"
            )
        super().__init__(in_dim, seeds * in_dim)
        self.heads = heads
        self.seeds = nn.Parameter(nn.init.xavier_uniform_(torch.empty(seeds, in_dim)))
        self.query, self.key, self.value = (nn.Linear(in_dim, in_dim, bias=False) for _ in range(3))
        self.out = nn.Linear(in_dim, in_dim)
        self.network = nn.Sequential(nn.Linear(in_dim, in_dim), nn.SiLU())
        self.norms = nn.ModuleList(LayerNorm(in_dim) if normalise else nn.Identity() for _ in range(2))

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        elements = fill_absent(elements, mask)
        queries, keys, values = (
            layer(rows).unflatten(-1, (self.heads, -1))
            for layer, rows in ((self.query, self.seeds), (self.key, elements), (self.value, elements))
        )
        # written out, since torch's fused attention cannot be differentiated twice
        scores = torch.einsum("bnhd,khd->bnhk", keys, queries) / queries.shape[-1] ** 0.5
        read = torch.einsum("bnhk,bnhd->bkhd", masked_softmax(scores, mask), values)
        hidden = self.norms[0](self.seeds + self.out(read.flatten(2)))
        hidden = self.norms[1](hidden + self.network(hidden))
        return zeros_where_empty(hidden.flatten(1), mask)
