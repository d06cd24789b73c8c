"""What every aggregator shares: the door where sets are checked."""

from __future__ import annotations

from torch import Tensor, nn

from setpred.sets import check_set


class Aggregator(nn.Module):
    """Set to vector: `elements [batch, set_size, in_dim]` and `mask` to `[batch, out_dim]`.

    Subclasses write `aggregate(elements, mask)`. Equal multisets give equal vectors, in any order of the
    elements (`LearnableMonoid` has to learn that), and masked elements have no influence (value and gradient). An
    empty set gives zeros.

    Args:
        in_dim: numbers of an element.
        out_dim: length of the vector; `in_dim` unless given.
    """

    def __init__(self, in_dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = in_dim if out_dim is None else out_dim

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        check_set(elements, mask, set_dim=self.in_dim)
        return self.aggregate(elements, mask)

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    @property
    def latent_dim(self) -> int:
        """`out_dim`, under the name that decoders have for it."""
        return self.out_dim
