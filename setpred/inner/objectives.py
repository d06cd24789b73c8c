"""Objectives L(Y; z, θ), whose minimum over sets Y is the prediction."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.sets import fill_absent


@dataclass(frozen=True)
class Problem:
    """The given tensors of one inner problem.

    latent: z `[batch, latent_dim]`, or tokens `[batch, tokens, token_dim]`; initial: Y₀ `[batch, set_size, set_dim]`;
    mask: present elements, `[batch, set_size]` bool or None for all; condition: an input set `[batch, set_size, any]`,
    or None.
    """

    latent: Tensor
    initial: Tensor
    mask: Tensor | None = None
    condition: Tensor | None = None

    def moved(self, elements: Tensor) -> Tensor:
        """Compute Y - Y₀, zero for absent elements."""
        return fill_absent(elements - self.initial, self.mask)  # before any square, since NaN has no slope of 0


class Energy:
    """L(Y) of one problem, as a descent sees it.

    Args:
        objective: L(elements, `Problem`) -> `[batch]`. If it has `curvature(elements, problem)`, of the shape of the
            elements or None, the steps of the descent are scaled by it (`setpred.inner.differentiation.curvature_at`).
            `slope(elements, problem)` may give ∇L and h together, in closed form.
        problem: the given tensors.
    """

    def __init__(self, objective: nn.Module, problem: Problem) -> None:
        self.objective, self.problem = objective, problem

    def __call__(self, elements: Tensor) -> Tensor:
        return self.objective(elements, self.problem)

    def curvature(self, elements: Tensor) -> Tensor | None:
        """h, or None if the objective knows none."""
        known = getattr(self.objective, "curvature", None)
        return None if known is None else known(elements, self.problem)

    def slope(self, elements: Tensor) -> tuple[Tensor, Tensor] | None:
        """∇L and h in closed form, or None if the objective knows none."""
        known = getattr(self.objective, "slope", None)
        return None if known is None else known(elements, self.problem)


class LatentMatching(nn.Module):
    """Objective that compares the encoding of a set with the latent vector (DSPN, iDSPN).

    L(Y) = ½ mean_k (g(Y; θ)_k - z_k)²: the set whose encoding is the latent vector.

    The mean is over latent features, so a learning rate of 1 suits any latent size (Zhang et al., ICLR 2022).

    Args:
        set_encoder: g, from `elements [batch, set_size, set_dim]` and `mask` to `[batch, latent_dim]`.
    """

    def __init__(self, set_encoder: nn.Module) -> None:
        super().__init__()
        self.set_encoder = set_encoder

    def forward(self, elements: Tensor, problem: Problem) -> Tensor:
        return 0.5 * (self.set_encoder(elements, problem.mask) - problem.latent).square().mean(-1)


class EquilibriumMatching(nn.Module):
    """Objective that compares the equilibrium of a set with the latent vector.

    L(Y) = ½ mean_k ρ_k(Y, z)²: the set whose energy has the latent vector as its equilibrium.

    ρ(Y, z) = (1/λ) ∇_φ E(Y, φ) at φ = z is zero if z = φ*(Y), see
    `setpred.aggregators.EquilibriumAggregation.residual`. It takes one gradient per step, where `LatentMatching` of an
    equilibrium aggregator solves for φ*(Y).

    Args:
        set_encoder: a `SetEncoder` whose aggregator has `residual`; another one raises a ValueError.
    """

    def __init__(self, set_encoder: nn.Module) -> None:
        super().__init__()
        aggregator = getattr(set_encoder, "aggregator", set_encoder)
        if not hasattr(aggregator, "residual"):
            raise ValueError(
                f"expected an aggregator with an equilibrium residual, got {type(aggregator).__name__}; "
                "use EquilibriumAggregation, or LatentMatching as the objective"
            )
        self.set_encoder = set_encoder

    def forward(self, elements: Tensor, problem: Problem) -> Tensor:
        return 0.5 * self.set_encoder.residual(elements, problem.latent, problem.mask).square().mean(-1)


class Proximity(nn.Module):
    """Objective that keeps the set near the start.

    L(Y) = weight · ½ mean_id (Y_id - Y₀_id)²: stay near the start, so that the optimum is unique.

    The mean is over present elements; an empty set has L = 0. The regulariser of the released iDSPN (Zhang et al., ICLR
    2022).
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, elements: Tensor, problem: Problem) -> Tensor:
        squares = problem.moved(elements).square()
        if problem.mask is None:
            return self.weight * 0.5 * squares.mean((1, 2))
        return self.weight * 0.5 * squares.mean(-1).sum(-1) / problem.mask.sum(-1).clamp(min=1)


class Sum(nn.Module):
    """Sum of objectives.

    L(Y) = Σ_j L_j(Y).
    """

    def __init__(self, objectives: Sequence[nn.Module]) -> None:
        super().__init__()
        self.objectives = nn.ModuleList(objectives)

    def forward(self, elements: Tensor, problem: Problem) -> Tensor:
        return torch.stack([objective(elements, problem) for objective in self.objectives]).sum(0)

    def curvature(self, elements: Tensor, problem: Problem) -> Tensor | None:
        """Add the known curvatures; None if there is none. The sum bounds L only if every objective has one."""
        found = (Energy(objective, problem).curvature(elements) for objective in self.objectives)
        known = [curvature for curvature in found if curvature is not None]
        return functools.reduce(torch.add, known) if known else None


class OfTokens(nn.Module):
    """Objective of a vector, for features that are tokens.

    L(Y; X) = L'(Y; z) with z = aggregator(X): an objective of a vector, for features that are tokens.

    Args:
        objective: L', such as `LatentMatching`.
        aggregator: tokens `[batch, tokens, token_dim]` to z `[batch, latent_dim]`. None takes the objective's own set
            encoder, as DSPN's auto-encoder does: with `setpred.encoders.Elements` the input set X itself is a minimum.

    Raises:
        InputError: neither an aggregator nor an objective with a set encoder.
    """

    def __init__(self, objective: nn.Module, aggregator: nn.Module | None = None) -> None:
        super().__init__()
        if aggregator is None and not hasattr(objective, "set_encoder"):
            raise InputError(f"expected an aggregator, since {type(objective).__name__} has no set encoder; give one")
        self.objective, self.aggregator = objective, aggregator
        self.token_dim = self._aggregator.in_dim

    @property
    def _aggregator(self) -> nn.Module:
        return self.objective.set_encoder if self.aggregator is None else self.aggregator

    def forward(self, elements: Tensor, problem: Problem) -> Tensor:
        return self.objective(elements, replace(problem, latent=self._aggregator(problem.latent)))


class Conditioned(nn.Module):
    """Objective of a set together with the input set.

    L(Y) = L'([Y, X]): L' sees each element, of `set_dim + condition_dim` numbers, with its element of the input X.

    For set-to-set tasks such as numbering, where output i belongs to input i.
    """

    conditional = True  # reads `Problem.condition`

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, elements: Tensor, problem: Problem) -> Tensor:
        if problem.condition is None:
            raise ValueError("expected an input set as the problem's condition, got None")
        return self.objective(torch.cat([elements, problem.condition], dim=-1), problem)
