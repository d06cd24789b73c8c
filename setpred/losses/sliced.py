"""Sliced Wasserstein losses."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.losses.base import Mask, SetLoss
from setpred.sets import mean_present, set_sizes


class SlicedWasserstein(SetLoss):
    """Sliced Wasserstein distance between two sets.

    SW_p^p = mean over L directions θ, uniform on the sphere, of W_p^p(θᵀX, θᵀY) (Bonneel et al., JMIV 2015).

    In one dimension W_p^p = ∫₀¹ |F_X⁻¹(t) - F_Y⁻¹(t)|^p dt: the sorted numbers side by side, O(n log n). Sets are
    uniform measures over their present elements; sizes may differ. With many directions, zero only for equal multisets;
    for single elements and p = 2, mean_d (x_d - y_d)². A pair with an empty set costs 0.

    Args:
        projections: number L of directions.
        power: p, at least 1.
        seed: seed of the directions in evaluation; in training each call draws new ones, the same for all examples.
        common: `weights`, `schema` and `presence_threshold` of `SetLoss`; a weight w scales its numbers by w^(1/p).
    """

    def __init__(self, *, projections: int = 64, power: float = 2.0, seed: int = 0, **common: Any) -> None:
        super().__init__(**common)
        if projections < 1 or power < 1:
            raise ValueError(f"expected projections >= 1 and power >= 1, got {projections} and {power}")
        self.projections, self.power, self.seed = projections, power, seed

    def compare(self, predicted: Tensor, target: Tensor, predicted_mask: Mask, target_mask: Mask) -> Tensor:
        weights = self.element_weights(predicted)
        if weights is not None:
            scales = weights ** (1 / self.power)
            predicted, target = predicted * scales, target * scales
        masks = predicted_mask, target_mask
        neither_empty = (set_sizes(predicted, predicted_mask) > 0) & (set_sizes(target, target_mask) > 0)
        cost = transport_along(predicted, target, self.directions(predicted, target, masks), masks, power=self.power)
        return cost.mean(1).masked_fill(~neither_empty, 0.0)

    def directions(self, predicted: Tensor, target: Tensor, masks: tuple[Mask, Mask]) -> Tensor:
        """Unit vectors `[1 or batch, L, dim]`."""
        return functional.normalize(self.normal(predicted, 1, self.projections, predicted.shape[-1]), dim=-1)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Draw standard normal numbers: new ones in training, the same ones in evaluation."""
        generator = None if self.training else torch.Generator().manual_seed(self.seed)
        # drawn on the CPU and in float32, so that every device and precision gets the same numbers
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(like)


class MaxSlicedWasserstein(SlicedWasserstein):
    """Sliced Wasserstein distance along the worst direction.

    max-SW_p^p = max over directions θ of W_p^p(θᵀX, θᵀY) (Deshpande et al., CVPR 2019).

    Each example climbs from the best of L random directions by θ ← (θ + η ∇W / |∇W|) / |·|. η starts at 1 and halves
    whenever a step would lead down. W is not concave, so the value is a lower bound of the maximum, but at least that
    of `SlicedWasserstein` with the same directions. The gradient holds the direction fixed.

    Args:
        steps: steps of the climb.
        common: those of `SlicedWasserstein`.
    """

    def __init__(self, *, steps: int = 10, **common: Any) -> None:
        super().__init__(**common)
        self.steps = steps

    def directions(self, predicted: Tensor, target: Tensor, masks: tuple[Mask, Mask]) -> Tensor:
        predicted, target = predicted.detach(), target.detach()
        random = super().directions(predicted, target, masks)
        highest, where = transport_along(predicted, target, random, masks, power=self.power).max(1)
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


class DistributionalSlicedWasserstein(SlicedWasserstein):
    """Sliced Wasserstein distance with directions that self-attention concentrates.

    v-DSW_p^p = mean over L directions θ ~ vMF(e(X, Y), κ) of W_p^p(θᵀX, θᵀY), e from self-attention.

        e = unit vector of ½ [mean_i att(X)_i + mean_j att(Y)_j]

    The model descends this loss with e held fixed; the attention climbs it, to find directions along which the sets
    differ (Nguyen, Nguyen and Ho, ICML 2023). There the two alternate; here one optimiser moves both at once, since the
    gradient of the attention's parameters has the opposite sign.

    Args:
        concentration: κ of the von Mises-Fisher distribution around e; 0 is uniform, large is max-sliced.
        set_dim: numbers of an element, at least 2.
        key_dim: width of the attention's keys.
        projections: number L of directions.
        common: the others of `SlicedWasserstein`.
    """

    def __init__(
        self, *, concentration: float = 1.0, set_dim: int, key_dim: int = 64, projections: int = 100, **common: Any
    ) -> None:
        super().__init__(projections=projections, **common)
        if concentration < 0 or set_dim < 2:
            raise ValueError(f"expected concentration >= 0 and set_dim >= 2, got {concentration} and {set_dim}")
        self.concentration = concentration
        self.key, self.query = nn.Linear(set_dim, key_dim, bias=False), nn.Linear(set_dim, key_dim, bias=False)
        self.value = nn.Linear(set_dim, set_dim, bias=False)

    def directions(self, predicted: Tensor, target: Tensor, masks: tuple[Mask, Mask]) -> Tensor:
        ours, theirs = self._attended(predicted.detach(), masks[0]), self._attended(target.detach(), masks[1])
        centre = functional.normalize(0.5 * (ours + theirs), dim=-1)
        centre = 2 * centre.detach() - centre  # the same value, with a gradient of the opposite sign
        return reflected(self._around_first_axis(centre), centre)

    def _attended(self, elements: Tensor, mask: Mask) -> Tensor:
        """mean_i att(X)_i `[batch, dim]`, over present elements; zeros for an empty set."""
        scores = self.query(elements) @ self.key(elements).mT / self.key.out_features**0.5
        if mask is not None:  # -∞ would make an empty set NaN
            scores = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min)
        return mean_present(scores.softmax(-1) @ self.value(elements), mask)

    def _around_first_axis(self, like: Tensor) -> Tensor:
        """Draw θ ~ vMF(first axis, κ) `[L, dim]`; no parameter takes part, so gradients reach e by the reflection.

        Its angle φ to the axis has a density proportional to exp(κ cos φ) sin^(dim - 2) φ, inverted here on a grid.
        """
        dim = like.shape[-1]
        generator = None if self.training else torch.Generator().manual_seed(self.seed + 1)
        uniform = torch.rand(self.projections, generator=generator, dtype=torch.float64)
        angle = torch.linspace(0, torch.pi, 4097, dtype=torch.float64)
        middle = 0.5 * (angle[1:] + angle[:-1])
        reached = (self.concentration * middle.cos() + (dim - 2) * middle.sin().log()).softmax(0).cumsum(0)
        found = torch.searchsorted(reached, uniform).clamp(max=len(middle) - 1)
        before = functional.pad(reached, (1, 0))[found]
        share = (uniform - before) / (reached[found] - before).clamp(min=1e-300)
        height = (angle[found] + share.clamp(0, 1) * (angle[1] - angle[0])).cos().to(like).unsqueeze(1)
        side = functional.normalize(self.normal(like, self.projections, dim - 1), dim=-1)
        return torch.cat([height, (1 - height.square()).clamp(min=0).sqrt() * side], dim=-1)


def reflected(directions: Tensor, centre: Tensor) -> Tensor:
    """Householder reflections θ - 2 u uᵀθ of `[L, dim]` that swap the first axis and each centre: `[batch, L, dim]`."""
    axis = functional.one_hot(torch.zeros((), dtype=torch.long, device=centre.device), centre.shape[-1]).to(centre)
    normal = functional.normalize(axis - centre, dim=-1).unsqueeze(1)
    return directions - 2 * (directions @ normal.mT) * normal


def transport_along(
    x: Tensor, y: Tensor, directions: Tensor, masks: tuple[Mask, Mask] = (None, None), *, power: float
) -> Tensor:
    """W_p^p(θᵀX, θᵀY) for each direction θ, with the sets as uniform measures.

    x `[batch, n, dim]`, y `[batch, m, dim]`, directions `[1 or batch, L, dim]` -> `[batch, L]`; arbitrary if a set is
    empty.
    """
    x_mask, y_mask = (None if mask is None else mask | ~mask.any(1, keepdim=True) for mask in masks)
    x_sorted, y_sorted = _sorted_along(x, directions, x_mask), _sorted_along(y, directions, y_mask)
    if x_mask is None and y_mask is None and x.shape[1] == y.shape[1]:
        return (x_sorted - y_sorted).abs().pow(power).mean(-1)
    i, j, mass = monotone_coupling(set_sizes(x, x_mask), set_sizes(y, y_mask), x.shape[1], y.shape[1])
    size = (-1, directions.shape[1], -1)
    apart = x_sorted.gather(-1, i.unsqueeze(1).expand(size)) - y_sorted.gather(-1, j.unsqueeze(1).expand(size))
    return (mass.unsqueeze(1) * apart.abs().pow(power)).sum(-1)


def _sorted_along(elements: Tensor, directions: Tensor, mask: Mask) -> Tensor:
    """Projections in ascending order, `[batch, L, set_size]`; absent elements come last."""
    along = directions @ elements.mT
    return (along if mask is None else along.masked_fill(~mask.unsqueeze(1), torch.inf)).sort(dim=-1).values


def monotone_coupling(n: Tensor, m: Tensor, n_padded: int, m_padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best transport in one dimension for every convex cost: the order is kept.

    n and m equal masses, `[batch]` in floating point -> (i, j, mass), each `[batch, n_padded + m_padded]`: mass from
    the i-th smallest to the j-th smallest. The masses of an example sum to 1, many may be 0.

    >>> i, j, mass = monotone_coupling(torch.tensor([1.0]), torch.tensor([2.0]), 1, 2)
    >>> [(a, b, c) for a, b, c in zip(i[0].tolist(), j[0].tolist(), mass[0].tolist()) if c > 0]
    [(0, 0, 0.5), (0, 1, 0.5)]
    """
    ends = []  # the quantile at which each rank ends
    for count, padded in ((n, n_padded), (m, m_padded)):
        rank = torch.arange(1, padded + 1, device=n.device, dtype=n.dtype)
        ends.append((rank / count.unsqueeze(1)).clamp(max=1))
    upper = torch.cat(ends, dim=1).sort(dim=1).values
    lower = functional.pad(upper[:, :-1], (1, 0))
    middle = 0.5 * (lower + upper)
    i, j = (torch.searchsorted(end, middle) for end in ends)
    return i, j, upper - lower
