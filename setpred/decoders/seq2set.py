"""Sequence to set: a recurrent decoder that predicts one element after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.nn import MLP
from setpred.sets import mean_present


class AdditiveAttention(nn.Module):
    """c = Σ_s w_s x_s,    w = softmax_s(v · tanh(A x_s + B h))  (Bahdanau, Cho, Bengio, ICLR 2015).

    Args:
        token_dim, state_dim: lengths of a token x and of the state h.
        hidden_dim: length of v.
    """

    def __init__(self, token_dim: int, state_dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.of_token, self.of_state = nn.Linear(token_dim, hidden_dim), nn.Linear(state_dim, hidden_dim, bias=False)
        self.score = nn.Linear(hidden_dim, 1, bias=False)

    def forward(self, tokens: Tensor, projected: Tensor, state: Tensor, mask: Tensor | None) -> Tensor:
        """`[batch, token_dim]` from tokens, their `of_token`, a state `[batch, state_dim]` and a mask of tokens."""
        scores = self.score((projected + self.of_state(state).unsqueeze(1)).tanh()).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1).unsqueeze(1) @ tokens).squeeze(1)


class Seq2Set(SetDecoder):
    """A recurrent decoder that attends to the tokens and reads its previous output.

        h_i = GRU([E y_{i-1}, c_i], h_{i-1}),    c_i = attention(X; h_{i-1}),    y_i = head([h_i, c_i, E y_{i-1}])

    The decoder of OTSeq2Set (Cao, Zhang, EMNLP 2022) with elements in place of labels, without its convolutions over
    words. As published it trains on its own outputs ("student forcing"); its loss is
    `setpred.losses.MatchingWithTransport`. The elements have an order; the order of the tokens changes nothing.

    Args:
        token_dim: length of a token.
        hidden_dim: width of the state, the attention and the head.
        embedding_dim: length of the embedding of the previous element.
        set_size, set_dim: elements of the predicted sets, one per step, and numbers of each.
    """

    def __init__(
        self, *, token_dim: int = 64, hidden_dim: int = 128, embedding_dim: int = 64, set_size: int, set_dim: int
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, token_dim=token_dim)
        self.norm = nn.LayerNorm(token_dim)
        self.first_state = nn.Linear(token_dim, hidden_dim)
        self.first_element = nn.Parameter(torch.zeros(set_dim))
        self.embed = nn.Linear(set_dim, embedding_dim)
        self.attention = AdditiveAttention(token_dim, hidden_dim, hidden_dim=hidden_dim)
        self.recurrent = nn.GRUCell(embedding_dim + token_dim, hidden_dim)
        self.head = MLP(hidden_dim + token_dim + embedding_dim, hidden_dim, set_dim)

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        tokens = self.norm(features)
        projected = self.attention.of_token(tokens)
        state = self.first_state(mean_present(tokens, mask)).tanh()
        element = self.first_element.expand(tokens.shape[0], -1)
        elements = []
        for _ in range(self.set_size):
            attended = self.attention(tokens, projected, state, mask)
            previous = self.embed(element)
            state = self.recurrent(torch.cat([previous, attended], dim=-1), state)
            element = self.head(torch.cat([state, attended, previous], dim=-1))
            elements.append(element)
        yield torch.stack(elements, dim=1)
