"""The transformer baseline: a set that looks at itself, beside the vector."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from setpred.decoders.attention import EncoderLayer
from setpred.decoders.base import SetDecoder
from setpred.decoders.starts import LearnedStart
from setpred.nn import MLP
from setpred.schema import CLEVR


class TransformerDecoder(SetDecoder):
    """Y = head(layers of self-attention over {W z + e_i}): each element from the vector z and its own code e_i.

    The layout of the Transformer Set Prediction Network (Kosiorek, Kim, Rezende, 2020). The codes alone tell the
    elements apart: learned ones, or those of `RandomStart`, fresh for each example; permuting them permutes the
    elements, so equal codes give equal elements. The transformers of the iDSPN paper, which differ in just that, map a
    set to a set: they are `ElementTransformer`.

    Args:
        latent_dim: length of z.
        dim: width of the transformer.
        heads: of every attention.
        layers: how many.
        hidden_dim: of the layers' networks.
        dropout: in training.
        start: the codes `[batch, set_size, dim]` from z; `LearnedStart` of scale 1 unless given.
        set_size, set_dim: of the predicted sets.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 512,
        dim: int = 256,
        heads: int = 8,
        layers: int = 4,
        hidden_dim: int = 512,
        dropout: float = 0.0,
        start: nn.Module | None = None,
        set_size: int = CLEVR.max_objects,
        set_dim: int = CLEVR.set_dim,
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, latent_dim=latent_dim)
        self.start = LearnedStart(set_size, dim, scale=1.0) if start is None else start
        self.widen = nn.Linear(latent_dim, dim)
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads=heads, hidden_dim=hidden_dim, dropout=dropout) for _ in range(layers)
        )
        self.head = MLP(dim, dim, set_dim)

    def predictions(self, features: Tensor, *, iterations: int | None, mask: Tensor | None) -> Iterator[Tensor]:
        rows = self.widen(features).unsqueeze(1) + self.start(features).to(features.dtype)
        for layer in self.layers:
            rows = layer(rows)
        yield self.head(rows)
