"""The amortised distributional sliced Wasserstein distance: directions from a network that looks where sets differ."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.losses.sliced import Masks, SlicedLoss
from setpred.schema import CLEVR, ElementSchema


class DistributionalSlicedWasserstein(SlicedLoss):
    """v-DSW_p^p = mean over L directions θ ~ vMF(e(X, Y), κ) of W_p^p(θᵀX, θᵀY), e from self-attention.

        e = unit vector of ½ [mean_i att(X)_i + mean_j att(Y)_j]

    The model descends this loss, with e held fixed; the attention climbs it, to find directions along which the sets
    differ (Nguyen, Nguyen and Ho, ICML 2023). There the two take turns. Here both move at once, by one optimiser:
    the gradient that reaches the attention's parameters has the opposite sign.

    Args:
        concentration: κ of the von Mises-Fisher distribution around e; 0 is uniform, large is max-sliced.
        set_dim: numbers of an element, at least 2.
        key_dim: width of the attention's keys.
        projections, power, seed, weights, schema, presence_threshold: as everywhere.
    """

    def __init__(
        self,
        *,
        concentration: float = 1.0,
        set_dim: int = CLEVR.set_dim,
        key_dim: int = 64,
        projections: int = 100,
        power: float = 2.0,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        schema: ElementSchema | None = None,
        presence_threshold: float | None = None,
    ) -> None:
        super().__init__(
            projections=projections,
            power=power,
            seed=seed,
            weights=weights,
            schema=schema,
            presence_threshold=presence_threshold,
        )
        if concentration < 0 or set_dim < 2:
            raise ValueError(f"expected concentration >= 0 and set_dim >= 2, got {concentration} and {set_dim}")
        self.concentration = concentration
        self.key, self.query = nn.Linear(set_dim, key_dim, bias=False), nn.Linear(set_dim, key_dim, bias=False)
        self.value = nn.Linear(set_dim, set_dim, bias=False)

    def directions(self, predicted: Tensor, target: Tensor, masks: Masks) -> Tensor:
        looks = [self._look(elements.detach(), mask) for elements, mask in zip((predicted, target), masks, strict=True)]
        centre = _Reversed.apply(functional.normalize(0.5 * (looks[0] + looks[1]), dim=-1))
        return reflected(self._around_first_axis(centre), centre)

    def _look(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        """mean_i att(X)_i `[batch, dim]`, over present elements; zeros for an empty set."""
        scores = self.query(elements) @ self.key(elements).mT / self.key.out_features**0.5
        if mask is None:
            return (scores.softmax(-1) @ self.value(elements)).mean(1)
        scores = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min)  # -∞ would make an empty set NaN
        attended = scores.softmax(-1) @ self.value(elements)
        return (attended * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def _around_first_axis(self, like: Tensor) -> Tensor:
        """θ ~ vMF(first axis, κ) `[L, dim]`: independent of any parameter, so gradients reach e by the reflection."""
        dim = like.shape[-1]
        height = self._heights(like, dim)
        side = functional.normalize(self.normal(like, self.projections, dim - 1), dim=-1)
        return torch.cat([height, (1 - height.square()).clamp(min=0).sqrt() * side], dim=-1)

    def _heights(self, like: Tensor, dim: int) -> Tensor:
        """cos of the angle to the centre, `[L, 1]`, by inverting its distribution on a grid.

        Its density is ∝ exp(κ w) (1 - w²)^((dim - 3) / 2). In terms of the angle, w = cos φ, that is
        exp(κ cos φ) sin^(dim - 2) φ, which is bounded.
        """
        generator = None if self.training else torch.Generator().manual_seed(self.seed + 1)
        uniform = torch.rand(self.projections, generator=generator, dtype=torch.float64)
        angle = torch.linspace(0, torch.pi, 4097, dtype=torch.float64)
        middle = 0.5 * (angle[1:] + angle[:-1])
        log_density = self.concentration * middle.cos() + (dim - 2) * middle.sin().log()
        reached = log_density.softmax(0).cumsum(0)
        found = torch.searchsorted(reached, uniform).clamp(max=len(middle) - 1)
        before = functional.pad(reached, (1, 0))[found]
        share = (uniform - before) / (reached[found] - before).clamp(min=1e-300)
        return (angle[found] + share.clamp(0, 1) * (angle[1] - angle[0])).cos().to(like).unsqueeze(1)


def reflected(directions: Tensor, centre: Tensor) -> Tensor:
    """Directions around the first axis `[L, dim]` to directions around each centre `[batch, dim]`: `[batch, L, dim]`.

    By the Householder reflection that swaps the axis and the centre: θ - 2 u uᵀθ, u the unit vector of axis - centre.
    """
    axis = functional.one_hot(torch.zeros((), dtype=torch.long, device=centre.device), centre.shape[-1]).to(centre)
    normal = functional.normalize(axis - centre, dim=-1).unsqueeze(1)
    return directions - 2 * (directions @ normal.mT) * normal


class _Reversed(torch.autograd.Function):
    """The identity, with the gradient's sign turned round: what lies before it climbs what others descend."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient
