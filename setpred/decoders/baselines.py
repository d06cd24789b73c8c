"""Baselines that predict all elements at once: MLP and BiLSTM."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.nn import MLP
from setpred.schema import CLEVR


class BiLSTMDecoder(SetDecoder):
    """Y_i = W h_i, with h a bidirectional LSTM of set_size steps, each of which sees the vector z.

    The recurrent baseline of the iDSPN paper (two layers, a linear layer before and one behind); DSPN's has one
    direction, and z as its first cell state. Each step knows its place from both ends, so that there is an order, as
    with an MLP.

    Args:
        latent_dim: length of z.
        hidden_dim: of the input of every step, and of the state of each direction.
        layers: how many LSTMs on top of each other.
        set_size, set_dim: of the predicted sets.
    """

    def __init__(
        self,
        *,
        latent_dim: int = 512,
        hidden_dim: int = 256,
        layers: int = 2,
        set_size: int = CLEVR.max_objects,
        set_dim: int = CLEVR.set_dim,
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, latent_dim=latent_dim)
        self.narrow = nn.Linear(latent_dim, hidden_dim)
        self.recurrent = nn.LSTM(hidden_dim, hidden_dim, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_dim, set_dim)

    def predictions(self, features: Tensor, *, iterations: int | None, mask: Tensor | None) -> Iterator[Tensor]:
        steps = self.narrow(features).unsqueeze(1).expand(-1, self.set_size, -1)
        yield self.head(self.recurrent(steps)[0])


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
