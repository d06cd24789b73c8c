"""Baselines that predict all elements from a vector at once: MLP, BiLSTM and transformer."""

from collections.abc import Iterator

from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.decoders.starts import LearnedStart
from setpred.nn import MLP, EncoderLayer


class MLPDecoder(SetDecoder):
    """Decoder from a vector to a set by an MLP.

    Y = MLP(z), reshaped to set_size elements: the MLP baseline of DSPN (Zhang, Hare, Prügel-Bennett, NeurIPS 2019).

    The output has a fixed order, which jumps where the set moves continuously (the responsibility problem): two
    elements that swap places have to swap rows.

    Args:
        latent_dim: length of z.
        hidden_dim: width of both hidden layers.
        set_size, set_dim: elements of the predicted sets, and numbers of each.
    """

    def __init__(self, *, latent_dim: int = 512, hidden_dim: int = 512, set_size: int, set_dim: int) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, latent_dim=latent_dim)
        self.network = MLP(latent_dim, hidden_dim, hidden_dim, set_size * set_dim)

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        yield self.network(features).unflatten(-1, (self.set_size, self.set_dim))


class BiLSTMDecoder(SetDecoder):
    """Decoder from a vector to a set by a bidirectional LSTM.

    Y_i = W h_i, with h a bidirectional LSTM of set_size steps, whose input is the vector z at every step.

    The recurrent baseline of the iDSPN paper (Zhang et al., ICLR 2022), between linear layers. Each step knows its
    position from both ends, so the elements have an order. (DSPN's has one direction, and z as its first cell state.)

    Args:
        latent_dim: length of z.
        hidden_dim: width of the input of every step, and of the state of each direction.
        layers: number of stacked LSTMs.
        set_size, set_dim: elements of the predicted sets, and numbers of each.
    """

    def __init__(
        self, *, latent_dim: int = 512, hidden_dim: int = 256, layers: int = 2, set_size: int, set_dim: int
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, latent_dim=latent_dim)
        self.narrow = nn.Linear(latent_dim, hidden_dim)
        self.recurrent = nn.LSTM(hidden_dim, hidden_dim, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_dim, set_dim)

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        steps = self.narrow(features).unsqueeze(1).expand(-1, self.set_size, -1)
        yield self.head(self.recurrent(steps)[0])


class TransformerDecoder(SetDecoder):
    """Decoder from a vector to a set by self-attention over codes of the elements.

    Y = head(layers of self-attention over {W z + e_i}): each element from the vector z and its own code e_i.

    The layout of the Transformer Set Prediction Network (Kosiorek, Kim, Rezende, 2020). Only the codes, learned or of
    `RandomStart`, distinguish the elements: permuting them permutes the elements, and equal codes give equal elements.

    Args:
        latent_dim: length of z.
        dim: width of the transformer.
        heads: number of heads of every attention.
        layers: number of layers.
        hidden_dim: width of the layers' networks.
        dropout: probability of dropout in training.
        start: the codes `[batch, set_size, dim]` from z; `LearnedStart` of scale 1 unless given.
        set_size, set_dim: elements of the predicted sets, and numbers of each.
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
        set_size: int,
        set_dim: int,
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, latent_dim=latent_dim)
        self.start = LearnedStart(set_size, dim, scale=1.0) if start is None else start
        self.widen = nn.Linear(latent_dim, dim)
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads=heads, hidden_dim=hidden_dim, dropout=dropout) for _ in range(layers)
        )
        self.head = MLP(dim, dim, set_dim)

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        rows = self.widen(features).unsqueeze(1) + self.start(features).to(features.dtype)
        for layer in self.layers:
            rows = layer(rows)
        yield self.head(rows)
