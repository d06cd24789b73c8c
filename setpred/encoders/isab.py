"""ISAB of the Set Transformer: self-attention of a set through a few learned points."""

import torch
from torch import Tensor, nn

from setpred.nn import EncoderLayer


class ISAB(nn.Module):
    """Induced set attention block (Lee et al., ICML 2019): the elements attend to points that have attended to them.

        H = MAB(I, X),    ISAB(X) = MAB(X, H)

    with m learned points I and the MAB of `setpred.nn.EncoderLayer`. Sets of n elements take time and memory of n m
    instead of n². Set-equivariant, as self-attention is.

    Args:
        dim: length of a row.
        points: m.
        heads, hidden_dim: of both layers.
    """

    def __init__(self, dim: int, *, points: int, heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.points = nn.Parameter(nn.init.xavier_uniform_(torch.empty(points, dim)))
        self.gather, self.spread = (EncoderLayer(dim, heads=heads, hidden_dim=hidden_dim) for _ in range(2))

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, n, dim]` to the same; mask `[batch, n]`, True where present."""
        gathered = self.gather(self.points.expand(len(rows), -1, -1), mask=mask, source=rows)
        return self.spread(rows, source=gathered)
