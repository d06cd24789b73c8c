"""DETR: learned queries that ask the image, and each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from setpred.decoders.attention import DecoderLayer, EncoderLayer
from setpred.decoders.base import SetDecoder
from setpred.errors import InputError
from setpred.nn import MLP
from setpred.schema import CLEVR


class SinePosition(nn.Module):
    """Where the tokens of a square map lie, as sines and cosines of falling frequency (Carion et al., ECCV 2020).

        e_p = [sin ω_j r, cos ω_j r, sin ω_j c, cos ω_j c]_j,    ω_j = 2π / side / T^(4j / dim),    j < dim / 4

    with r and c the row and the column of position p, counted from 1.

    Args:
        temperature: T.
    """

    def __init__(self, *, temperature: float = 10_000.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, tokens: Tensor) -> Tensor:
        """`[tokens, dim]` for tokens `[batch, tokens, dim]`, row by row; dim a multiple of 4."""
        count, dim = tokens.shape[1:]
        side = math.isqrt(count)
        if side * side != count or dim % 4:
            raise ValueError(f"expected the tokens of a square map, of a multiple of 4 numbers, got {count} of {dim}")
        frequency = self.temperature ** -(torch.arange(0, dim, 4, device=tokens.device, dtype=tokens.dtype) / dim)
        place = 2 * math.pi / side * torch.arange(1, side + 1, device=tokens.device, dtype=tokens.dtype)
        angle = torch.cartesian_prod(place, place).unsqueeze(-1) * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)


class DETR(SetDecoder):
    """A transformer whose decoder turns learned queries into elements (Carion et al., ECCV 2020).

        H_0 = 0,    H_l = layer_l(H_{l-1}; Q, X),    Y = head(LN(H_L)),    X = layers of self-attention over the tokens

    Every decoder layer lets the elements see each other, with their queries Q as positions, and then the tokens (see
    `setpred.decoders.attention`). `refine` yields the prediction after each layer; the published training scores them
    all, here the last one counts.

    Permuting the queries permutes the elements; permuting tokens together with their positions changes nothing. The
    queries alone tell the elements apart: equal queries give equal elements.

    Args:
        position: positions `[tokens, dim]` from tokens `[batch, tokens, dim]`; `SinePosition` unless given.
        token_dim: length of a token.
        dim: width of the transformer.
        heads: of every attention.
        encoder_layers, decoder_layers: how many.
        hidden_dim: of the layers' networks.
        dropout: in training; published 0.1.
        set_size, set_dim: of the predicted sets; there are as many queries.
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
        set_size: int = CLEVR.max_objects,
        set_dim: int = CLEVR.set_dim,
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

    def predictions(self, features: Tensor, *, iterations: int | None, mask: Tensor | None) -> Iterator[Tensor]:
        tokens = self.narrow(features)
        yield from self.decode(tokens, self.position(tokens), mask)

    def decode(self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Predictions, layer by layer, from tokens `[batch, tokens, dim]` and their positions `[tokens, dim]`."""
        for layer in self.encoder:
            tokens = layer(tokens, positions, mask)
        rows = torch.zeros_like(self.queries).expand(tokens.shape[0], -1, -1)
        for layer in self.decoder:
            rows = layer(rows, self.queries, tokens, positions, mask)
            yield self.head(self.norm(rows))
