"""Sliced Wasserstein losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.losses.base import SetLoss, counts
from setpred.schema import CLEVR, ElementSchema

Masks = tuple[Tensor | None, Tensor | None]


class SlicedLoss(SetLoss):
    """Transport cost of two sets along directions; subclasses write `directions` and say how they are summed up.

    Sets are uniform measures over their present elements, whose sizes may differ. A weight w of the schema scales
    its numbers by w^(1/p). A pair with an empty set costs 0.

    Args:
        projections: number L of directions.
        power: p in W_p^p, at least 1.
        seed: of the directions in evaluation, which are always the same; in training each call draws anew from
            torch's generator. All examples of a batch share the draw.
    """

    def __init__(
        self,
        *,
        projections: int = 64,
        power: float = 2.0,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        schema: ElementSchema | None = None,
        presence_threshold: float | None = None,
    ) -> None:
        super().__init__(weights=weights, schema=schema, presence_threshold=presence_threshold)
        if projections < 1 or power < 1:
            raise ValueError(f"expected projections >= 1 and power >= 1, got {projections} and {power}")
        self.projections, self.power, self.seed = projections, power, seed

    def compare(
        self, predicted: Tensor, target: Tensor, predicted_mask: Tensor | None, target_mask: Tensor | None
    ) -> Tensor:
        weights = self.element_weights(predicted)
        if weights is not None:
            scales = weights ** (1 / self.power)
            predicted, target = predicted * scales, target * scales
        masks = predicted_mask, target_mask
        something = (counts(predicted, predicted_mask) > 0) & (counts(target, target_mask) > 0)
        cost = transport_along(predicted, target, self.directions(predicted, target, masks), masks, power=self.power)
        return self.summary(cost).masked_fill(~something, 0.0)

    def directions(self, predicted: Tensor, target: Tensor, masks: Masks) -> Tensor:
        """Unit vectors `[1 or batch, L, dim]`."""
        raise NotImplementedError

    def summary(self, costs: Tensor) -> Tensor:
        """`[batch, L]` to `[batch]`."""
        return costs.mean(1)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Standard normal numbers: a fresh draw in training, the same ones in evaluation, on every device."""
        generator = None if self.training else torch.Generator().manual_seed(self.seed)
        # drawn on the CPU and in one precision, so that every device and precision gets the same numbers
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(like)


class SlicedWasserstein(SlicedLoss):
    """SW_p^p = mean over L directions θ, uniform on the sphere, of W_p^p(θᵀX, θᵀY) (Bonneel et al., JMIV 2015).

    In one dimension W_p^p = ∫₀¹ |F_X⁻¹(t) - F_Y⁻¹(t)|^p dt: the sorted numbers beside each other, O(n log n). For
    single elements and p = 2 the mean over all directions is mean_d (x_d - y_d)². Zero only for equal multisets,
    in the limit of many directions.
    """

    def directions(self, predicted: Tensor, target: Tensor, masks: Masks) -> Tensor:
        return functional.normalize(self.normal(predicted, 1, self.projections, predicted.shape[-1]), dim=-1)


class MaxSlicedWasserstein(SlicedLoss):
    """max-SW_p^p = max over directions θ of W_p^p(θᵀX, θᵀY) (Deshpande et al., CVPR 2019).

    Each example climbs from the best of L random directions by θ ← (θ + η ∇W / |∇W|) / |·|, where η starts at 1 and
    halves whenever a step would lead down, so the value is never under that of `SlicedWasserstein` with the same
    directions. It is a lower bound of the maximum, for W is not concave. The gradient is that of the direction held
    fixed.

    Args:
        steps: of the climb.
    """

    def __init__(
        self,
        *,
        projections: int = 64,
        steps: int = 10,
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
        self.steps = steps

    def directions(self, predicted: Tensor, target: Tensor, masks: Masks) -> Tensor:
        predicted, target = predicted.detach(), target.detach()
        random = functional.normalize(self.normal(predicted, 1, self.projections, predicted.shape[-1]), dim=-1)
        costs = transport_along(predicted, target, random, masks, power=self.power)
        highest, where = costs.max(1)
        best = random[0, where].unsqueeze(1)
        length = torch.ones_like(best[..., :1])
        for _ in range(self.steps):
            with torch.enable_grad():
                best = best.detach().requires_grad_()
                cost = transport_along(predicted, target, best, masks, power=self.power)
                (slope,) = torch.autograd.grad(cost.sum(), best)
            best = best.detach()
            tried = functional.normalize(best + length * functional.normalize(slope, dim=-1), dim=-1)
            cost = transport_along(predicted, target, tried, masks, power=self.power).squeeze(1)
            better = (cost > highest).view(-1, 1, 1)
            highest = highest.maximum(cost)
            best, length = torch.where(better, tried, best), torch.where(better, length, 0.5 * length)
        return best

    def summary(self, costs: Tensor) -> Tensor:
        return costs.squeeze(1)


def transport_along(x: Tensor, y: Tensor, directions: Tensor, masks: Masks = (None, None), *, power: float) -> Tensor:
    """W_p^p(θᵀX, θᵀY) for each direction θ, the sets taken as uniform measures.

    x `[batch, n, dim]`, y `[batch, m, dim]`, directions `[1 or batch, L, dim]` -> `[batch, L]`. Of an empty set all
    elements are taken, so that the result is a number; it has no meaning.
    """
    x_mask, y_mask = (None if mask is None else mask | ~mask.any(1, keepdim=True) for mask in masks)
    x_sorted, y_sorted = _sorted_along(x, directions, x_mask), _sorted_along(y, directions, y_mask)
    if x_mask is None and y_mask is None and x.shape[1] == y.shape[1]:
        return (x_sorted - y_sorted).abs().pow(power).mean(-1)
    i, j, mass = monotone_coupling(counts(x, x_mask), counts(y, y_mask), x.shape[1], y.shape[1])
    size = (-1, directions.shape[1], -1)
    apart = x_sorted.gather(-1, i.unsqueeze(1).expand(size)) - y_sorted.gather(-1, j.unsqueeze(1).expand(size))
    return (mass.unsqueeze(1) * apart.abs().pow(power)).sum(-1)


def monotone_coupling(n: Tensor, m: Tensor, n_padded: int, m_padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """How the i-th smallest of n equal masses and the j-th smallest of m share their mass when the order is kept.

    That is the best transport in one dimension for every convex cost. n, m `[batch]`, in floating point ->
    (i, j, mass), each `[batch, n_padded + m_padded]`; the masses of an example sum to 1, many may be 0.

    >>> i, j, mass = monotone_coupling(torch.tensor([1.0]), torch.tensor([2.0]), 1, 2)
    >>> [(a, b, c) for a, b, c in zip(i[0].tolist(), j[0].tolist(), mass[0].tolist()) if c > 0]
    [(0, 0, 0.5), (0, 1, 0.5)]
    """
    ends = []  # up to which quantile each rank reaches
    for count, padded in ((n, n_padded), (m, m_padded)):
        rank = torch.arange(1, padded + 1, device=n.device, dtype=n.dtype)
        ends.append((rank / count.unsqueeze(1)).clamp(max=1))
    upper = torch.cat(ends, dim=1).sort(dim=1).values
    lower = functional.pad(upper[:, :-1], (1, 0))
    middle = 0.5 * (lower + upper)
    i, j = (torch.searchsorted(end, middle) for end in ends)
    return i, j, upper - lower


def _sorted_along(elements: Tensor, directions: Tensor, mask: Tensor | None) -> Tensor:
    """Projections in ascending order, `[batch, L, set_size]`; absent elements come last."""
    along = directions @ elements.mT
    return (along if mask is None else along.masked_fill(~mask.unsqueeze(1), torch.inf)).sort(dim=-1).values


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
