"""Votes of tokens for elements."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setpred.nn import MLP
from setpred.schema import CLEVR


class Votes(nn.Module):
    """Encoder that predicts, from each token, its element v, the precisions p of v, and the mass m of its vote.

        [v, a, b] = MLP(LN x),   p = 2 σ(a),   m = σ(b)

    p starts at 1. `setpred.inner.VotingEnergy` and `setpred.decoders.GreedyVotes` read the result. Votes are
    computed in float32 also under autocast, because half precision would round coordinates.

    Args:
        tokens: image, or set, to tokens `[batch, tokens, token_dim]`; such as `PositionedTokens` or `Elements`.
        set_dim: numbers of an element.
        precise: how many of the first numbers of an element have precisions. Use the coordinates alone: with
            precisions of classes the start merges and splits objects.
        hidden_dim: width of the hidden layer.
    """

    def __init__(
        self, tokens: nn.Module, *, set_dim: int = CLEVR.set_dim, precise: int = 0, hidden_dim: int = 128
    ) -> None:
        super().__init__()
        self.tokens = tokens
        for name in ("image_size", "in_dim"):
            if getattr(tokens, name, None) is not None:
                setattr(self, name, getattr(tokens, name))
        self.set_dim, self.token_dim = set_dim, set_dim + precise + 1
        self.norm = nn.LayerNorm(tokens.token_dim)
        self.network = MLP(tokens.token_dim, hidden_dim, self.token_dim)
        with torch.no_grad():  # p = 1 at the start
            for parameter in self.network[-1].parameters():
                parameter[set_dim : set_dim + precise] = 0

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images `[batch, 3, H, W]`, or sets and their mask -> `[batch, tokens, set_dim + precise + 1]`: v, p, m.

        Absent tokens have mass 0.
        """
        tokens = self.tokens(inputs) if mask is None else self.tokens(inputs, mask)
        if mask is not None:  # padding may hold NaN
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
        with torch.autocast(tokens.device.type, enabled=False):
            outputs = self.network(self.norm(tokens.to(self.norm.weight.dtype)))
            votes, rest = outputs.split([self.set_dim, self.token_dim - self.set_dim], dim=-1)
            rest = rest.sigmoid()
            mass = rest[..., -1:] if mask is None else rest[..., -1:].masked_fill(~mask.unsqueeze(-1), 0.0)
            return torch.cat([votes, 2 * rest[..., :-1], mass], dim=-1)
