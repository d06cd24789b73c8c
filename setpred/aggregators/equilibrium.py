"""Equilibrium aggregation and its potential."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.inner import GradientDescent, Unrolled, minimise
from setpred.inner.differentiation import Differentiation
from setpred.nn import LayerNorm, Positive
from setpred.sets import check_set, fill_absent, mean_present


class EquilibriumAggregation(Aggregator):
    """Aggregator whose vector minimises a learned energy (equilibrium aggregation).

    φ*(X) = argmin_φ E(X, φ),   E(X, φ) = λ/2 |φ - r(X)|² + γ/n Σ_i F(x_i, φ).

    Bartunov, Fuchs, Lillicrap (UAI 2022); there r = 0, γ = 1, and log₂(n+1) γ/n in place of γ/n. The prior r is another
    aggregator, which the result equals for γ = 0; γ is learned and may start there. With a bounded potential (such as
    `ResidualPotential`) a minimum exists for γ of either sign. It is unique where γ F is convex in φ or λ exceeds its
    curvature.

    Args:
        in_dim: features of an element.
        potential: F(elements `[batch, n, in_dim]`, φ `[batch, out_dim]`) -> `[batch, n]`.
        prior: r, an aggregator to `out_dim`; None for r = 0.
        out_dim: length of φ; by default that of the prior, or `in_dim`.
        descent: inner descent, which starts from φ = r; by default 10 learned Nesterov steps.
        differentiation: `Unrolled` (the paper) by default, and always inside another objective.
        weight: start value of λ, which is learned.
        gain: start value of γ, which is learned.

    Raises:
        ValueError: a prior of other dimensions.
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
        super().__init__(in_dim, prior.out_dim if prior is not None and out_dim is None else out_dim)
        if prior is not None and (prior.in_dim, prior.out_dim) != (self.in_dim, self.out_dim):
            raise ValueError(
                f"expected a prior from {self.in_dim} to {self.out_dim} features, got {prior.in_dim} to {prior.out_dim}"
            )
        self.potential, self.prior = potential, prior
        if descent is None:
            descent = GradientDescent(iterations=10, learning_rate=0.3, momentum=0.5, learned=True)
        self.descent = descent
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
        return mean_present(self.potential(fill_absent(elements, mask), state), mask)

    def energy(self, elements: Tensor, state: Tensor, mask: Tensor | None, prior: Tensor) -> Tensor:
        """E(X, φ) `[batch]`, given r(X)."""
        pull = 0.5 * self.weight() * (state - prior).square().sum(-1)
        return pull + self.gain * self.mean_potential(elements, state, mask)

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(elements.device.type, enabled=False):  # every descent runs in full precision
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

        `[batch, out_dim]`, differentiable in all arguments; costs one gradient of F and no descent.
        """
        check_set(elements, mask, set_dim=self.in_dim)
        # torch.func: also under no_grad, in compiled code, and whatever `state` depends on
        slope = torch.func.grad(lambda point: self.mean_potential(elements, point, mask).sum())(state)
        return state - self.start(elements, mask) + self.gain / self.weight() * slope


class ResidualPotential(nn.Module):
    """Potential of an equilibrium aggregation: a residual MLP.

    F(x, φ) = mean_c h_c([x, φ])² >= 0, with h a residual MLP (Bartunov et al., UAI 2022).

    Each stage is a linear layer plus a skip connection: the identity, or a linear map where the width changes.
    LayerNorm and tanh precede each stage, so h and F are bounded.

    Args:
        in_dim: features of an element.
        state_dim: length of φ.
        widths: widths of the stages, at least two.
    """

    def __init__(self, in_dim: int, state_dim: int, *, widths: Sequence[int] = (64, 32)) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"expected at least two widths, so that tanh bounds the potential, got {list(widths)}")
        self.element_layer = nn.Linear(in_dim, widths[0])
        self.state_layer = nn.Linear(state_dim, widths[0], bias=False)
        self.norms = nn.ModuleList(LayerNorm(width) for width in widths[:-1])
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairs)
        self.skips = nn.ModuleList(
            nn.Identity() if before == after else nn.Linear(before, after, bias=False) for before, after in pairs
        )

    def forward(self, elements: Tensor, state: Tensor) -> Tensor:
        """F `[batch, set_size]` of elements `[batch, set_size, in_dim]` and φ `[batch, state_dim]`."""
        # the first layer of [x, φ]: its part of φ is computed once per set
        hidden = self.element_layer(elements) + self.state_layer(state).unsqueeze(1)
        for norm, layer, skip in zip(self.norms, self.layers, self.skips, strict=True):
            hidden = torch.tanh(norm(hidden))
            if isinstance(skip, nn.Linear):  # two linear maps of one input are one, which saves a matrix product
                hidden = nn.functional.linear(hidden, layer.weight + skip.weight, layer.bias)
            else:
                hidden = layer(hidden) + hidden
        return hidden.square().mean(-1)
