"""The baseline without any structure: all numbers of the set at once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from setpred.decoders.base import SetDecoder
from setpred.nn import MLP
from setpred.schema import CLEVR


class MLPDecoder(SetDecoder):
    """Y = MLP(z), read as set_size elements: the MLP baseline of DSPN (Zhang, Hare, Prügel-Bennett, NeurIPS 2019).

    A fixed order has to be chosen for a set, and the choice jumps where the set moves continuously (the
    responsibility problem): two elements that swap places have to swap rows.

    Args:
        latent_dim: length of z.
        hidden_dim: of both hidden layers.
        set_size, set_dim: of the predicted sets.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 512,
        hidden_dim: int = 512,
        set_size: int = CLEVR.max_objects,
        set_dim: int = CLEVR.set_dim,
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, latent_dim=latent_dim)
        self.network = MLP(latent_dim, hidden_dim, hidden_dim, set_size * set_dim)

    def predictions(self, features: Tensor, *, iterations: int | None, mask: Tensor | None) -> Iterator[Tensor]:
        yield self.network(features).unflatten(-1, (self.set_size, self.set_dim))
