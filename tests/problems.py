"""Problems with known answers, finite differences, and what every test of a law needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from setpred.inner import Differentiation, GradientDescent, minimise


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw N(0, 1) from a separate generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    """Assert equality up to rounding in double precision."""
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-9, "atol": 1e-9, **tolerance})


def weighted_sum(elements: Tensor) -> Tensor:
    """Compute a scalar that treats every number differently."""
    weights = torch.linspace(-1, 2, elements.numel(), dtype=elements.dtype).view_as(elements)
    return (weights * elements).sum() + elements.square().sum()


class Given(nn.Module):
    """A start, or a prior, that is given."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.given = start

    def forward(self, features: Tensor) -> Tensor:
        return self.given


class Quadratic:
    """L(y) = ½ yᵀ A y - (B θ)ᵀ y per example, with A symmetric positive definite: y* = A⁻¹ B θ."""

    def __init__(self, batch: int = 3, rows: int = 2, dim: int = 2, parameters: int = 5, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = rows * dim
        root = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
        # eigenvalues in (0.2, 1.2]: every solver and a unit step size converge
        matrix = root @ root.mT
        self.matrix = 0.2 * torch.eye(size, dtype=torch.float64) + matrix / torch.linalg.matrix_norm(
            matrix, ord=2, keepdim=True
        )
        self.matrix = 0.5 * (self.matrix + self.matrix.mT)
        self.link = torch.randn(batch, size, parameters, generator=generator, dtype=torch.float64)
        self.theta = torch.randn(parameters, generator=generator, dtype=torch.float64)
        self.initial = torch.randn(batch, rows, dim, generator=generator, dtype=torch.float64)

    def energy(self, theta: Tensor) -> Callable[[Tensor], Tensor]:
        def energy(iterate: Tensor) -> Tensor:
            flat = iterate.flatten(1)
            pull = torch.einsum("bij,bi,bj->b", self.matrix, flat, flat)
            return 0.5 * pull - torch.einsum("bip,p,bi->b", self.link, theta, flat)

        return energy

    def optimum(self, theta: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, self.link @ theta).view_as(self.initial)

    def solve(self, theta: Tensor, differentiation: Differentiation, **numbers: Any) -> Tensor:
        """The last iterate of a descent; `numbers` are the arguments of `GradientDescent`."""
        descent = GradientDescent(**numbers)
        return minimise(self.energy(theta), self.initial, descent=descent, differentiation=differentiation)


def finite_difference(function: Callable[[Tensor], Tensor], point: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function at `point`, in the shape of `point`."""
    flat = point.detach().flatten()
    slopes = []
    for i in range(flat.numel()):
        ahead, behind = flat.clone(), flat.clone()
        ahead[i] += step
        behind[i] -= step
        slopes.append((function(ahead.view_as(point)) - function(behind.view_as(point))) / (2 * step))
    return torch.stack([slope.detach() for slope in slopes]).view_as(point)


def check_slope(value: Callable[[], Tensor], tensors: Sequence[Tensor], *, least: float = 0.0, **tolerance) -> None:
    """Compare the gradients of `value()` for all tensors, together along a random direction, with finite differences.

    The tensors are leaves that `value` reads; `least` is a bound that excludes a slope of zero.
    """
    directions = [normal(*tensor.shape, seed=i) for i, tensor in enumerate(tensors)]
    gradients = torch.autograd.grad(value(), tensors)
    slope = sum((gradient * way).sum() for gradient, way in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-6, -2e-6, 1e-6):  # ahead, behind, and back
        with torch.no_grad():
            for tensor, way in zip(tensors, directions, strict=True):
                tensor += step * way
        values.append(value().detach())
    assert slope.abs() > least
    close(slope, (values[0] - values[1]) / 2e-6, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})
