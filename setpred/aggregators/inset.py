"""Superset-aware pooling: a subset is pooled beside the set it was taken from."""

from __future__ import annotations

from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.aggregators.sum_mean_max import masked_fill, zeros_where_empty
from setpred.errors import InputError


class SupersetPool(Aggregator):
    """INSET: out = σ(W_S Σ_i m_i x_i + W_V Σ_i x_i + b), for elements [m_i, x_i] (Xie et al., ICLR 2024).

    The superset V is all present elements. Its subset S is said by the first number of each, the membership m_i: 1 in,
    0 out, and anything between while a relaxed subset is descended on; it is not clamped. A pooling of S alone cannot
    tell of which superset S is a part. This can, and is invariant to permutations of S, of V and of both.

    The paper has σ(θ₁(Σ_S φ(x)) + θ₂(Σ_V φ(x))). φ is the network of a `SetEncoder` with `kept=1`; the θ are linear
    here, and σ is SiLU, smooth, so that an objective made of it has a continuous Hessian. Differentiable any number of
    times. Equal elements get equal gradients. To find a subset of given elements by descent, a `Conditioned` objective
    puts the memberships before them.

    Args:
        in_dim: numbers of an element, the membership first.
        out_dim: length of the vector; `in_dim - 1`, that of x, unless given.
    """

    def __init__(self, in_dim: int, *, out_dim: int | None = None) -> None:
        if in_dim < 2:
            raise InputError(
                f"expected a membership and at least one more number in in_dim, got {in_dim}; give 2 or more"
            )
        super().__init__(in_dim, in_dim - 1 if out_dim is None else out_dim)
        self.subset = nn.Linear(in_dim - 1, self.out_dim)
        self.superset = nn.Linear(in_dim - 1, self.out_dim, bias=False)

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        elements = masked_fill(elements, mask, 0.0)
        member, features = elements[..., :1], elements[..., 1:]
        joined = self.subset((member * features).sum(1)) + self.superset(features.sum(1))
        return zeros_where_empty(nn.functional.silu(joined), mask)
