"""Voting energy: elements compete for the votes of an image's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.inner.objectives import Problem
from setpred.nn import diagonal, log_sum_exp, product_by_rows
from setpred.sets import fill_absent


class Ballot(NamedTuple):
    """Votes v and precisions p `[batch, tokens, set_dim]` of tokens for elements, and masses m `[batch, tokens]`."""

    votes: Tensor
    precisions: Tensor
    masses: Tensor

    @classmethod
    def of(cls, features: Tensor, set_dim: int) -> Ballot:
        """Split `features [batch, tokens, set_dim + precise + 1]`: votes, precisions of the first numbers, mass.

        Raises:
            ValueError: another shape.
        """
        precise = features.shape[-1] - set_dim - 1
        if features.ndim != 3 or not 0 <= precise <= set_dim:
            raise ValueError(
                f"expected votes [batch, tokens, {set_dim} + precise + 1] with 0 <= precise <= {set_dim}, "
                f"got {list(features.shape)}"
            )
        votes, precisions, masses = features.split([set_dim, precise, 1], dim=-1)
        rest = torch.ones_like(votes[..., precise:])
        return cls(votes, torch.cat([precisions, rest], dim=-1), masses.squeeze(-1))


class VotingEnergy(nn.Module):
    """Objective in which elements compete for the votes of tokens.

    E(Y; X) = λ/2 Σ_i |y_i - r_i|²_B - Σ_n m_n log Σ_i exp(-½ |y_i - v_n|²_{B p_n}).

    Each token n has a vote v_n, precisions p_n and a mass m_n (`setpred.encoders.Votes`); the predicted elements y_i
    compete for the votes. B = diag(b) is fixed and |a|²_W = Σ_d W_d a_d². The gradient is

        ∂E/∂y_i = λ B (y_i - r_i) + Σ_n m_n a_in B p_n (y_i - v_n),   a_in = softmax_i(-½ |y_i - v_n|²_{B p_n})

    so a_in is the share of token n that supports element i (`supports`): a segmentation of the image into objects.
    With fixed shares the energy is a quadratic of curvature h_i = B (λ + Σ_n m_n a_in p_n), and an upper bound
    elsewhere. A step of size 1 along h⁻¹ ∂E/∂y reaches its minimum, the weighted mean of start and votes, and never
    raises E: expectation maximisation of a mixture, or mean shift.

    This is `setpred.aggregators.EquilibriumAggregation` (Bartunov et al., UAI 2022) of the tokens, with the multiset Y
    as its state. Votes for object centres are Hough voting (VoteNet; Qi et al., ICCV 2019). r is the start of the
    descent (`Problem.initial`); see `setpred.decoders.GreedyVotes`. b is not learned: its implicit gradient has no
    optimum.

    Args:
        set_dim: numbers of an element.
        precise: how many of the first numbers of an element have precisions.
        weights: b of the first numbers of an element.
        rest: b of all others. A small one lets elements compete by place alone.
        prior_weight: λ.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        *,
        set_dim: int,
        precise: int = 0,
        weights: Sequence[float] = (),
        rest: float = 1.0,
        prior_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= precise <= set_dim or not prior_weight >= 0:
            raise InputError(
                f"expected 0 <= precise <= {set_dim} and prior_weight >= 0, got {precise} and {prior_weight}"
            )
        self.set_dim, self.prior_weight = set_dim, prior_weight
        self.token_dim = set_dim + precise + 1
        self.register_buffer("weights", diagonal(weights, set_dim, rest), persistent=False)

    def forward(self, elements: Tensor, problem: Problem) -> Tensor:
        pull = (self.weights * problem.moved(elements).square()).sum((1, 2))
        return 0.5 * self.prior_weight * pull + self.potentials(elements, problem).sum(-1)

    def potentials(self, elements: Tensor, problem: Problem) -> Tensor:
        """Compute F(x_n, Y) = -m_n log Σ_i exp(-½ |y_i - v_n|²_{B p_n}) `[batch, tokens]`; 0 for an empty set."""
        ballot = Ballot.of(problem.latent, self.set_dim)
        lengths = (ballot.precisions * ballot.votes.square()) @ self.weights
        potentials = ballot.masses * (0.5 * lengths - log_sum_exp(self._logits(elements, ballot, problem.mask), 1))
        return potentials if problem.mask is None else potentials * problem.mask.any(1, keepdim=True)

    def curvature(self, elements: Tensor, problem: Problem) -> Tensor:
        """Compute h `[batch, set_size, set_dim]`, the curvature of the upper bound that touches E at `elements`."""
        return self.slope(elements, problem)[1]

    def slope(self, elements: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        """Compute ∂E/∂Y and h, both `[batch, set_size, set_dim]`, in closed form: faster than autograd."""
        ballot = Ballot.of(problem.latent, self.set_dim)
        supports = self._supports(elements, ballot, problem.mask)
        gathered = product_by_rows(supports, ballot.precisions)
        present = elements if problem.mask is None else elements.masked_fill(~problem.mask.unsqueeze(-1), 0.0)
        pull = self.prior_weight * problem.moved(elements) + gathered * present
        gradient = self.weights * (pull - product_by_rows(supports, ballot.precisions * ballot.votes))
        # without a prior and support there is no gradient either
        curvature = self.weights * (self.prior_weight + gathered).clamp(min=torch.finfo(gathered.dtype).tiny)
        return gradient, curvature

    def supports(self, elements: Tensor, problem: Problem) -> Tensor:
        """Compute m_n a_in `[batch, set_size, tokens]`: the part of each token's mass that supports each element."""
        return self._supports(elements, Ballot.of(problem.latent, self.set_dim), problem.mask)

    def shares(self, elements: Tensor, problem: Problem) -> Tensor:
        """Compute a_in `[batch, set_size, tokens]`: the share of each element in each token, whatever its mass."""
        shares = self._logits(elements, Ballot.of(problem.latent, self.set_dim), problem.mask).softmax(1)
        return fill_absent(shares, problem.mask)

    def _supports(self, elements: Tensor, ballot: Ballot, mask: Tensor | None) -> Tensor:
        supports = self._logits(elements, ballot, mask).softmax(1) * ballot.masses.unsqueeze(1)
        return fill_absent(supports, mask)

    def _logits(self, elements: Tensor, ballot: Ballot, mask: Tensor | None) -> Tensor:
        """½ |v_n|² - ½ |y_i - v_n|², both of the metric B p_n, `[batch, set_size, tokens]`, by matrix products.

        A softmax over the elements does not see the first term.
        """
        elements = fill_absent(elements, mask)
        straight, square = self.weights * elements, 0.5 * self.weights * elements.square()
        logits = product_by_rows(straight, (ballot.precisions * ballot.votes).mT)
        logits = logits - product_by_rows(square, ballot.precisions.mT)
        if mask is None:
            return logits
        absent = ~mask & mask.any(1, keepdim=True)  # finite in an empty set, whose softmax has no meaning
        return logits.masked_fill(absent.unsqueeze(-1), -torch.inf)
