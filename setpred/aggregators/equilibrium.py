"""Equilibrium aggregation and its potentials."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.aggregators.sum_mean_max import masked_fill, set_sizes
from setpred.inner import GradientDescent, Unrolled, minimise
from setpred.inner.differentiation import Differentiation
from setpred.nn import LayerNorm, Positive
from setpred.sets import check_set


class EquilibriumAggregation(Aggregator):
    """φ*(X) = argmin_φ E(X, φ),   E(X, φ) = λ/2 |φ - r(X)|² + γ/n Σ_i F(x_i, φ).

    Bartunov, Fuchs, Lillicrap (UAI 2022), with two additions. The prior r is another aggregator, or 0 (the
    paper): with F = 0 the result is r(X), so every aggregator is a special case. The gain γ on F is learned and
    may start at zero, so that training begins at that special case.

    A bounded potential (such as `ResidualPotential`) keeps E coercive for a γ of either sign, so a minimum exists; it
    is unique where γ F is convex in φ or λ exceeds its curvature. The mean over the n present elements, where the
    paper sums and scales by log₂(n+1)/n, keeps F and the prior in balance for any n.

    Args:
        in_dim: features of an element.
        potential: F(elements `[batch, n, in_dim]`, φ `[batch, out_dim]`) -> `[batch, n]`.
        prior: r, an aggregator to `out_dim`, or None for r = 0.
        out_dim: length of φ; the prior's, or `in_dim`.
        descent: the inner descent from φ = r; the default is 10 learned Nesterov steps.
        differentiation: `Unrolled` (the paper) unless given. Inside another objective it must stay so.
        weight: start value of λ, learned.
        gain: start value of γ; learned.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        potential: nn.Module,
        prior: Aggregator | None = None,
        out_dim: int | None = None,
        descent: GradientDescent | None = None,
        differentiation: Differentiation | None = None,
        weight: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__(in_dim, (prior.out_dim if prior is not None else in_dim) if out_dim is None else out_dim)
        if prior is not None and (prior.in_dim, prior.out_dim) != (self.in_dim, self.out_dim):
            raise ValueError(
                f"expected a prior from {self.in_dim} to {self.out_dim} features, got {prior.in_dim} to {prior.out_dim}"
            )
        self.potential = potential
        self.prior = prior
        self.descent = (
            GradientDescent(iterations=10, learning_rate=0.3, momentum=0.5, learned=True)
            if descent is None
            else descent
        )
        self.differentiation = Unrolled() if differentiation is None else differentiation
        self.weight = Positive(weight)
        self.gain = nn.Parameter(torch.tensor(float(gain)))

    def start(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        """r(X) `[batch, out_dim]`."""
        if self.prior is None:
            return elements.new_zeros(elements.shape[0], self.out_dim)
        return self.prior(elements, mask)

    def mean_potential(self, elements: Tensor, state: Tensor, mask: Tensor | None) -> Tensor:
        """(1/n) Σ_i F(x_i, φ) `[batch]`."""
        potential = self.potential(masked_fill(elements, mask, 0.0), state)
        if mask is not None:
            potential = potential * mask
        return potential.sum(1) / set_sizes(elements, mask).clamp(min=1).squeeze(1)

    def energy(self, elements: Tensor, state: Tensor, mask: Tensor | None, prior: Tensor) -> Tensor:
        """E(X, φ) `[batch]`, given r(X)."""
        pull = 0.5 * self.weight() * (state - prior).square().sum(-1)
        return pull + self.gain * self.mean_potential(elements, state, mask)

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        # in full precision, as every descent
        with torch.autocast(elements.device.type, enabled=False):
            elements = elements.to(self.gain.dtype)
            prior = self.start(elements, mask)
            return minimise(
                lambda state: self.energy(elements, state, mask, prior),
                prior,
                descent=self.descent,
                differentiation=self.differentiation,
            )

    def residual(self, elements: Tensor, state: Tensor, mask: Tensor | None = None) -> Tensor:
        """(1/λ) ∇_φE(X, φ) = φ - r(X) + γ/(λ n) Σ_i ∇_φF(x_i, φ), zero exactly at an equilibrium.

        `[batch, out_dim]`, differentiable in everything; costs one gradient of F, no descent.
        """
        check_set(elements, mask, set_dim=self.in_dim)
        # a function's gradient, at φ = state whatever state itself depends on; also under no_grad and in compiled code
        slope = torch.func.grad(lambda point: self.mean_potential(elements, point, mask).sum())(state)
        return state - self.start(elements, mask) + self.gain / self.weight() * slope


class ResidualPotential(nn.Module):
    """F(x, φ) = mean_c h_c([x, φ])² >= 0, with h a residual MLP (Bartunov et al., UAI 2022).

    Each stage is linear plus a skip (the identity, or a projection where the width changes); all but the last are
    followed by LayerNorm and tanh, so h and F are bounded.

    Args:
        in_dim: features of an element.
        state_dim: length of φ.
        widths: of the stages.
    """

    def __init__(self, in_dim: int, state_dim: int, *, widths: Sequence[int] = (64, 32)) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"expected at least two widths, so that tanh bounds the potential, got {list(widths)}")
        self.element_layer = nn.Linear(in_dim, widths[0])
        self.state_layer = nn.Linear(state_dim, widths[0], bias=False)
        self.norms = nn.ModuleList(LayerNorm(width) for width in widths[:-1])
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Linear(narrow, wide) for narrow, wide in pairs)
        self.skips = nn.ModuleList(
            nn.Identity() if narrow == wide else nn.Linear(narrow, wide, bias=False) for narrow, wide in pairs
        )

    def forward(self, elements: Tensor, state: Tensor) -> Tensor:
        """`[batch, set_size, in_dim]`, `[batch, state_dim]` -> `[batch, set_size]`."""
        # the first layer on [x, φ], with φ's part computed once per set
        hidden = self.element_layer(elements) + self.state_layer(state).unsqueeze(1)
        for norm, layer, skip in zip(self.norms, self.layers, self.skips, strict=True):
            hidden = torch.tanh(norm(hidden))
            if isinstance(skip, nn.Linear):  # two linear maps of one input are one: a matrix product less each way
                hidden = nn.functional.linear(hidden, layer.weight + skip.weight, layer.bias)
            else:
                hidden = layer(hidden) + hidden
        return hidden.square().mean(-1)
