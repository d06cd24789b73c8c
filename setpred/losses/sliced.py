"""Sliced Wasserstein distances: transport along lines, where sorting solves it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from setpred.losses.base import SetLoss, counts
from setpred.schema import ElementSchema

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
