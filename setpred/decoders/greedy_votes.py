"""A start of the descent that the image's votes choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from setpred.decoders.starts import checked_shape
from setpred.inner.voting import Ballot
from setpred.nn import diagonal
from setpred.schema import CLEVR


class GreedyVotes(nn.Module):
    """r(X): one pick after the other, each near the heaviest vote that no earlier pick explains.

    With k_n = exp(-½ |v_n - v_j|²_B) around the vote v_j of the heaviest token j,

        pick = Σ_n m_n k_n p_n v_n / Σ_n m_n k_n p_n,   m_n ← m_n (1 - k_n)

    and the pick fades to the zero element by σ(20 (m_j - floor)): that is how absent elements start. It is greedy
    non-maximum suppression with soft weights, and depends on the image alone. No gradients pass.

    Args:
        set_size, set_dim: of the predicted sets.
        weights: b of the first numbers of an element, 1 for all others; those of the `VotingEnergy`.
        floor: mass at which a pick is half faded.
    """

    def __init__(
        self,
        set_size: int = CLEVR.max_objects,
        set_dim: int = CLEVR.set_dim,
        *,
        weights: Sequence[float] = (),
        floor: float = 0.3,
    ) -> None:
        super().__init__()
        self.set_size, self.set_dim = checked_shape(set_size, set_dim)
        self.floor = floor
        self.register_buffer("weights", diagonal(weights, set_dim), persistent=False)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Votes `[batch, tokens, set_dim + precise + 1]` -> `[batch, set_size, set_dim]`."""
        votes, precisions, masses = Ballot.of(features, self.set_dim)
        scaled = votes * self.weights.sqrt()
        lengths = scaled.square().sum(-1)
        picks = []
        for _ in range(self.set_size):
            heaviest, chosen = masses.max(-1, keepdim=True)
            centre = scaled.gather(1, chosen.unsqueeze(-1).expand(-1, -1, self.set_dim))
            apart = lengths + centre.square().sum(-1) - 2 * (scaled * centre).sum(-1)
            kernel = (-0.5 * apart.clamp(min=0)).exp()
            shares = (masses * kernel).unsqueeze(-1) * precisions
            mean = (shares * votes).sum(1) / shares.sum(1).clamp(min=1e-8)
            picks.append(mean * (20 * (heaviest - self.floor)).sigmoid())
            masses = masses * (1 - kernel)
        return torch.stack(picks, dim=1)
