"""The transformer as a map from set to set."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from setpred.decoders.attention import DecoderLayer, EncoderLayer
from setpred.decoders.base import SetDecoder
from setpred.errors import InputError


class ElementTransformer(SetDecoder):
    """Y = W LN(decoder(P(W_y X), LN(encoder(W_x X)))), one element for each token (Vaswani et al., NeurIPS 2017).

    The transformers of numbering in the iDSPN paper, which differ in the positions P: those of `SequencePositions` are
    its "PE", those of `RandomPositions` its "random PE", and None its "no PE".

    Permuting the tokens permutes the elements and, without positions, equal tokens give equal elements. With
    `RandomPositions` that holds of their distribution only; with `SequencePositions` there is an order.

    Args:
        position: rows `[batch, tokens, width]` to rows `[batch, tokens, dim]`, its `widening` being dim / width; None
            leaves the rows as they are.
        token_dim: length of a token.
        dim: width of the transformer.
        heads: of every attention.
        encoder_layers, decoder_layers: how many.
        hidden_dim: of the layers' networks.
        dropout: in training.
        set_dim: of an element.
    """

    def __init__(
        self,
        position: nn.Module | None = None,
        *,
        token_dim: int,
        set_dim: int,
        dim: int = 64,
        heads: int = 8,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        hidden_dim: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(set_size=None, set_dim=set_dim, token_dim=token_dim)
        widening = getattr(position, "widening", 1)
        if dim % widening or min(encoder_layers, decoder_layers) < 0:
            raise InputError(
                f"expected dim a multiple of {widening} and numbers of layers, got {dim}, {encoder_layers} and "
                f"{decoder_layers}; change the one that is out of range"
            )
        self.position = position
        self.source, self.first = nn.Linear(token_dim, dim), nn.Linear(token_dim, dim // widening)
        numbers = {"heads": heads, "hidden_dim": hidden_dim, "dropout": dropout}
        self.encoder = nn.ModuleList(EncoderLayer(dim, **numbers) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(dim, **numbers) for _ in range(decoder_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.head = nn.Linear(dim, set_dim)

    def predictions(self, features: Tensor, *, iterations: int | None, mask: Tensor | None) -> Iterator[Tensor]:
        tokens, rows = self.source(features), self.first(features)
        if self.position is not None:
            rows = self.position(rows)
        for layer in self.encoder:
            tokens = layer(tokens, mask=mask)
        tokens = self.norms[0](tokens)
        for layer in self.decoder:
            rows = layer(rows, None, tokens, None, mask, mask)
        yield self.head(self.norms[1](rows))
