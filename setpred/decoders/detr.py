"""DETR: learned queries that attend to the image and to each other; and its decoder layer and positions."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.errors import InputError
from setpred.nn import MLP, Attention, EncoderLayer, placed


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
        own = placed(rows, queries)
        rows = self.norms[0](rows + self.dropout(self.own(own, own, rows, row_mask)))
        attended = self.across(placed(rows, queries), placed(tokens, positions), tokens, mask)
        rows = self.norms[1](rows + self.dropout(attended))
        return self.norms[2](rows + self.dropout(self.network(rows)))


def waves(places: Tensor, dim: int, temperature: float) -> Tensor:
    """Compute [sin ω_j p, cos ω_j p], ω_j = T^(-2j / dim), of places p `[...]` -> `[..., 2, dim / 2]`."""
    frequency = temperature ** -(torch.arange(0, dim, 2, device=places.device, dtype=places.dtype) / dim)
    angle = places.unsqueeze(-1) * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-2)


class SinePosition(nn.Module):
    """Positions of the tokens of a square map, as sines and cosines (DETR; Carion et al., ECCV 2020).

        e_p = [sin ω_j r, cos ω_j r, sin ω_j c, cos ω_j c]_j,    ω_j = 2π / side / T^(4j / dim),    j < dim / 4

    with r and c the row and the column of position p, counted from 1.

    Args:
        temperature: T.
        interleaved: order the numbers of a row or column by j, sine and cosine in turn, as published weights need
            them; else all sines come before all cosines.
    """

    def __init__(self, *, temperature: float = 10_000.0, interleaved: bool = False) -> None:
        super().__init__()
        self.temperature, self.interleaved = temperature, interleaved

    def forward(self, tokens: Tensor) -> Tensor:
        """`[tokens, dim]` for tokens `[batch, tokens, dim]`, row by row; dim a multiple of 4."""
        count, dim = tokens.shape[1:]
        side = math.isqrt(count)
        if side * side != count or dim % 4:
            raise ValueError(f"expected the tokens of a square map, of a multiple of 4 numbers, got {count} of {dim}")
        place = 2 * math.pi / side * torch.arange(1, side + 1, device=tokens.device, dtype=tokens.dtype)
        pairs = waves(torch.cartesian_prod(place, place), dim // 2, self.temperature)
        return (pairs.mT if self.interleaved else pairs).flatten(1)


class DETR(SetDecoder):
    """A transformer whose decoder turns learned queries into elements (Carion et al., ECCV 2020).

        H_0 = 0,    H_l = layer_l(H_{l-1}; Q, X),    Y = head(LN(H_L)),    X = layers of self-attention over the tokens

    In every decoder layer the elements attend to each other, with their queries Q as positions, and then to the tokens.
    `refine` yields the prediction after each layer. The published training scores them all: `model.auxiliary` of the
    training, the number of decoder layers less one.
    Only the queries distinguish the elements: permuting them permutes the elements. Permuting tokens together with
    their positions changes nothing.

    Args:
        position: positions `[tokens, dim]` from tokens `[batch, tokens, dim]`; `SinePosition` unless given.
        token_dim: length of a token.
        dim: width of the transformer.
        heads: number of heads of every attention.
        encoder_layers, decoder_layers: numbers of layers.
        hidden_dim: width of the layers' networks.
        dropout: probability of dropout in training; published 0.1.
        set_size, set_dim: elements of the predicted sets, one per query, and numbers of each.

    Raises:
        InputError: no decoder layer.
    """

    def __init__(
        self,
        position: nn.Module | None = None,
        *,
        token_dim: int = 512,
        dim: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        hidden_dim: int = 2048,
        dropout: float = 0.0,
        set_size: int,
        set_dim: int,
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, token_dim=token_dim)
        if decoder_layers < 1 or encoder_layers < 0:
            raise InputError(f"expected at least one decoder layer, got {encoder_layers} + {decoder_layers}; give one")
        self.position = SinePosition() if position is None else position
        self.narrow = nn.Linear(token_dim, dim)
        numbers = {"heads": heads, "hidden_dim": hidden_dim, "dropout": dropout}
        self.encoder = nn.ModuleList(EncoderLayer(dim, **numbers) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(dim, **numbers) for _ in range(decoder_layers))
        self.queries = nn.Parameter(torch.randn(set_size, dim))
        self.norm = nn.LayerNorm(dim)
        self.head = MLP(dim, dim, set_dim)

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        tokens = self.narrow(features)
        yield from self.decode(tokens, self.position(tokens), mask)

    def decode(self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield a prediction per layer, from tokens `[batch, tokens, dim]` and their positions `[tokens, dim]`."""
        for layer in self.encoder:
            tokens = layer(tokens, positions, mask)
        rows = torch.zeros_like(self.queries).expand(tokens.shape[0], -1, -1)
        for layer in self.decoder:
            rows = layer(rows, self.queries, tokens, positions, mask)
            yield self.head(self.norm(rows))
