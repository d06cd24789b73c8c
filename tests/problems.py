"""Problems with known answers, and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
