"""Input sets as tokens."""

from __future__ import annotations

from torch import Tensor, nn

from setpred.sets import check_set


class Elements(nn.Module):
    """Encoder that returns the elements of an input set as tokens, unchanged.

    Args:
        set_dim: numbers of an element.
    """

    def __init__(self, *, set_dim: int) -> None:
        super().__init__()
        self.in_dim = self.token_dim = set_dim

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, n, set_dim]` and bool `[batch, n]` -> `[batch, n, set_dim]`."""
        check_set(elements, mask, set_dim=self.in_dim)
        return elements
