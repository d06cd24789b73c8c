"""Transformer layers with positions: self-attention over a set, and attention to tokens."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from setpred.errors import InputError
from setpred.nn import MLP


class Attention(nn.Module):
    """Multi-head attention: softmax(q kᵀ / √d) v for each head, then a linear layer (Vaswani et al., NeurIPS 2017).

    Args:
        dim: length of a row.
        heads: number of heads, a divisor of `dim`.
        dropout: probability of dropping a weight in training.

    Raises:
        InputError: a number of heads that does not divide `dim`.
    """

    def __init__(self, dim: int, *, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(f"expected a number of heads that divides {dim}, got {heads}; choose another")
        self.heads, self.dropout = heads, dropout
        self.query, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.key = nn.Linear(dim, dim, bias=False)  # the same for all keys, a bias would change no weight
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, n, dim]` from n queries, m keys and values, and a mask of these `[batch, m]`, True where present."""
        rows = (
            layer(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        attended = functional.scaled_dot_product_attention(
            *rows,
            attn_mask=None if mask is None else mask[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """X ← LN(X + A(X + P, X + P, X)),    X ← LN(X + MLP(X)),    P: positions, or none.

    The layer of DETR's encoder (Carion et al., ECCV 2020); without P it is the original one.
    """

    def __init__(self, dim: int, *, heads: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(dim, heads=heads, dropout=dropout)
        self.network = MLP(dim, hidden_dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`[batch, rows, dim]` to the same; positions `[rows, dim]`, mask `[batch, rows]`, True where present."""
        placed = _placed(rows, positions)
        rows = self.norms[0](rows + self.dropout(self.attention(placed, placed, rows, mask)))
        return self.norms[1](rows + self.dropout(self.network(rows)))


class DecoderLayer(nn.Module):
    """Y ← LN(Y + A(Y + Q, Y + Q, Y)),    Y ← LN(Y + A(Y + Q, X + P, X)),    Y ← LN(Y + MLP(Y)).

    Q are the queries, X the tokens and P their positions (DETR; Carion et al., ECCV 2020); without Q and P it is the
    original layer.
    """

    def __init__(self, dim: int, *, heads: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.own, self.across = (Attention(dim, heads=heads, dropout=dropout) for _ in range(2))
        self.network = MLP(dim, hidden_dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        rows: Tensor,
        queries: Tensor | None,
        tokens: Tensor,
        positions: Tensor | None,
        mask: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> Tensor:
        """`[batch, rows, dim]` to the same.

        Args:
            rows, tokens: Y and X.
            queries, positions: Q and P, `[..., rows, dim]` and `[..., tokens, dim]`; zeros if None.
            mask, row_mask: present tokens and present rows, bool `[batch, tokens]` and `[batch, rows]`.
        """
        placed = _placed(rows, queries)
        rows = self.norms[0](rows + self.dropout(self.own(placed, placed, rows, row_mask)))
        attended = self.across(_placed(rows, queries), _placed(tokens, positions), tokens, mask)
        rows = self.norms[1](rows + self.dropout(attended))
        return self.norms[2](rows + self.dropout(self.network(rows)))


def _placed(rows: Tensor, positions: Tensor | None) -> Tensor:
    return rows if positions is None else rows + positions
