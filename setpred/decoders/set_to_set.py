"""Decoders that map each element of an input set to one element: DeepSets, BiLSTM, Transformer."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from setpred.decoders.base import SetDecoder
from setpred.decoders.detr import DecoderLayer
from setpred.decoders.starts import gaussian
from setpred.encoders.positions import waves
from setpred.errors import InputError
from setpred.nn import EncoderLayer
from setpred.sets import mean_present, present_order


class DeepSetsLayer(nn.Module):
    """f(X)_i = A x_i + B mean_j x_j + c: the general set-equivariant affine map (Zaheer et al., NeurIPS 2017)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.each, self.all = nn.Linear(in_dim, out_dim), nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        """`[batch, n, in_dim]` -> `[batch, n, out_dim]`; the mean is over the present elements."""
        return self.each(elements) + self.all(mean_present(elements, mask).unsqueeze(1))


class DeepSets(SetDecoder):
    """Decoder from tokens to one element each by DeepSets layers.

    Y = f_L(… ReLU(f_1(X))), one element for each token: the DeepSets baseline of numbering in the iDSPN paper.

    It is set-equivariant: equal tokens give equal elements, whatever it learns.

    Args:
        token_dim: length of a token.
        hidden_dim: width of the layers between.
        layers: L.
        set_dim: numbers of an element.

    Raises:
        InputError: no layer.
    """

    def __init__(self, *, token_dim: int, set_dim: int, hidden_dim: int = 64, layers: int = 2) -> None:
        super().__init__(set_size=None, set_dim=set_dim, token_dim=token_dim)
        if layers < 1:
            raise InputError(f"expected at least one layer, got {layers}; give more")
        widths = [token_dim, *[hidden_dim] * (layers - 1), set_dim]
        self.layers = nn.ModuleList(DeepSetsLayer(narrow, wide) for narrow, wide in itertools.pairwise(widths))

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        rows = self.layers[0](features, mask)
        for layer in self.layers[1:]:
            rows = layer(rows.relu(), mask)
        yield rows


class ElementBiLSTM(SetDecoder):
    """Decoder from tokens to one element each by a bidirectional LSTM.

    Y = W LSTM(V X + b) + c, one element for each token, in their order.

    The BiLSTM of numbering in the iDSPN paper, between linear layers. It depends on the order, so it can separate equal
    tokens.

    Args:
        token_dim: length of a token.
        hidden_dim: width of the input of every step, and of the state of each direction.
        layers: number of stacked LSTMs.
        set_dim: numbers of an element.
    """

    def __init__(self, *, token_dim: int, set_dim: int, hidden_dim: int = 64, layers: int = 2) -> None:
        super().__init__(set_size=None, set_dim=set_dim, token_dim=token_dim)
        self.first = nn.Linear(token_dim, hidden_dim)
        self.recurrent = nn.LSTM(hidden_dim, hidden_dim, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_dim, set_dim)

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        rows = self.first(features)
        if mask is None:
            yield self.head(self.recurrent(rows)[0])
            return
        # the present rows alone, in their order
        order = present_order(mask).unsqueeze(-1)
        front = rows.gather(1, order.expand_as(rows))
        packed = pack_padded_sequence(front, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=rows.shape[1])
        yield self.head(torch.zeros_like(states).scatter(1, order.expand_as(states), states))


class SequencePositions(nn.Module):
    """Sum of each row and its position, as sines and cosines (Vaswani et al., NeurIPS 2017).

        e_p = [sin ω_j p, cos ω_j p]_j,    ω_j = T^(-2j / dim),    j < dim / 2

    Args:
        temperature: T.
    """

    widening = 1  # ratio of output to input width

    def __init__(self, *, temperature: float = 10_000.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, rows: Tensor) -> Tensor:
        """`[batch, rows, dim]` to the same, dim even."""
        count, dim = rows.shape[1:]
        if dim % 2:
            raise ValueError(f"expected rows of an even length, got {dim}")
        places = torch.arange(count, device=rows.device, dtype=rows.dtype)
        return rows + waves(places, dim, self.temperature).mT.flatten(1)


class RandomPositions(nn.Module):
    """Concatenation of each row and noise: [x_i, α + exp(β) N(0, 1)], twice as wide, with α and β learned.

    The "random PE" of the iDSPN paper (Zhang et al., ICLR 2022): no order, yet equal rows differ. Draws are those of
    `RandomStart`: fresh in training, in evaluation one for all examples, a function of `seed`.
    """

    widening = 2

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, rows: Tensor) -> Tensor:
        """`[batch, rows, dim]` -> `[batch, rows, 2 dim]`."""
        noise = gaussian(rows.shape[1:], rows, seed=None if self.training else self.seed).to(rows.dtype)
        return torch.cat([rows, self.shift + self.log_scale.exp() * noise], dim=-1)


class ElementTransformer(SetDecoder):
    """Decoder from tokens to one element each by a transformer.

    Y = W LN(decoder(P(W_y X), LN(encoder(W_x X)))), one element for each token (Vaswani et al., NeurIPS 2017).

    The transformers of numbering in the iDSPN paper, which differ in the positions P: `SequencePositions` are its "PE",
    `RandomPositions` its "random PE", and None its "no PE", which is set-equivariant.

    Args:
        position: rows `[batch, tokens, width]` to rows `[batch, tokens, dim]`, with `widening` = dim / width; None
            leaves the rows unchanged.
        token_dim: length of a token.
        dim: width of the transformer.
        heads: number of heads of every attention.
        encoder_layers, decoder_layers: numbers of layers.
        hidden_dim: width of the layers' networks.
        dropout: probability of dropout in training.
        set_dim: numbers of an element.

    Raises:
        InputError: a number out of range.
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

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        tokens, rows = self.source(features), self.first(features)
        if self.position is not None:
            rows = self.position(rows)
        for layer in self.encoder:
            tokens = layer(tokens, mask=mask)
        tokens = self.norms[0](tokens)
        for layer in self.decoder:
            rows = layer(rows, None, tokens, None, mask, mask)
        yield self.head(self.norms[1](rows))
