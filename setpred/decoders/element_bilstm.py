"""The recurrent map from a sequence to a sequence, as a baseline for sets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from setpred.decoders.base import SetDecoder


class ElementBiLSTM(SetDecoder):
    """Y = W LSTM(V X + b) + c, one element for each token, in the order they come.

    The BiLSTM of numbering in the iDSPN paper: bidirectional, two layers, a linear layer before and one behind. There
    is an order, so it can tell equal tokens apart, and it has to learn what the order does not matter for.

    Args:
        token_dim: length of a token.
        hidden_dim: of the input of every step, and of the state of each direction.
        layers: how many LSTMs on top of each other.
        set_dim: of an element.
    """

    def __init__(self, *, token_dim: int, set_dim: int, hidden_dim: int = 64, layers: int = 2) -> None:
        super().__init__(set_size=None, set_dim=set_dim, token_dim=token_dim)
        self.first = nn.Linear(token_dim, hidden_dim)
        self.recurrent = nn.LSTM(hidden_dim, hidden_dim, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_dim, set_dim)

    def predictions(self, features: Tensor, *, iterations: int | None, mask: Tensor | None) -> Iterator[Tensor]:
        rows = self.first(features)
        yield self.head(self.recurrent(rows)[0] if mask is None else self._read(rows, mask))

    def _read(self, rows: Tensor, mask: Tensor) -> Tensor:
        """The states `[batch, tokens, 2 hidden_dim]` of the present rows, read as if there were no others."""
        order = mask.int().argsort(dim=1, descending=True, stable=True)  # the present in front, as they come
        front = rows.gather(1, order.unsqueeze(-1).expand_as(rows))
        packed = pack_padded_sequence(front, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=rows.shape[1])
        return torch.zeros_like(states).scatter(1, order.unsqueeze(-1).expand_as(states), states)
