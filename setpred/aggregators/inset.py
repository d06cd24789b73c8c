"""Superset-aware pooling (INSET): pools a subset together with the set that contains it."""

from torch import Tensor, nn

from setpred.aggregators.base import Aggregator, zeros_where_empty
from setpred.errors import InputError
from setpred.sets import fill_absent


class INSET(Aggregator):
    """Pooling of a subset and its superset, of elements [m_i, x_i] (Xie et al., ICLR 2024).

        out = σ(W_S Σ_i m_i x_i + W_V Σ_i x_i + b)

    The superset V is all present elements. The membership m_i is 1 in the subset S and 0 outside; a descent on a
    relaxed subset may take any value. Unlike a pooling of S alone, the result depends on the superset. A `Conditioned`
    objective, which prepends the memberships, finds a subset of given elements.

    The paper has σ(θ₁(Σ_S φ(x)) + θ₂(Σ_V φ(x))). Here a `SetEncoder` with `kept=1` has the network φ, the θ are linear,
    and σ is SiLU, which is differentiable any number of times. Equal elements get equal gradients.

    Args:
        in_dim: numbers of an element, the membership first.
        out_dim: length of the vector; by default `in_dim - 1`, the length of x.
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
        elements = fill_absent(elements, mask)
        member, features = elements[..., :1], elements[..., 1:]
        joined = self.subset((member * features).sum(1)) + self.superset(features.sum(1))
        return zeros_where_empty(nn.functional.silu(joined), mask)
