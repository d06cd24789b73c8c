"""Linear solvers for implicit differentiation.

They solve A v = u for every example at once. `operator(v)` applies A to `[batch, ...]`. A is block diagonal over the
batch, so inner products are taken per example. Without a projection A is the Hessian of the inner objective.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


class LinearSolver(ABC):
    """Callable `solver(operator, u)` -> v with A v = u, approximately or exactly (base class)."""

    @abstractmethod
    def __call__(self, operator: Operator, vector: Tensor) -> Tensor: ...


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per example, shaped to multiply `[batch, ...]`."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


def dense(operator: Operator, like: Tensor) -> Tensor:
    """Build A as matrices `[batch, dim, dim]`, one application per column, for examples of `like` of dim numbers."""
    batch, dim = like.shape[0], like[0].numel()
    basis = torch.eye(dim, dtype=like.dtype, device=like.device)
    columns = [operator(row.expand(batch, dim).reshape(like.shape)).reshape(batch, dim) for row in basis]
    return torch.stack(columns, dim=-1)


class Identity(LinearSolver):
    """Solver that takes the identity for the Hessian.

    v = u: the identity replaces the Hessian (iDSPN; Zhang et al., ICLR 2022). Makes no operator call.
    """

    def __call__(self, operator: Operator, vector: Tensor) -> Tensor:
        return vector


class ConjugateGradient(LinearSolver):
    """Conjugate gradient from v = 0, for symmetric positive definite A (no projection).

    Args:
        iterations: maximum number of steps; the dimension of an example's iterate is enough in exact arithmetic.
        damping: solves (A + damping I) v = u, for optima with flat directions.
        tolerance: an example stops once its residual norm is below tolerance times |u|.
    """

    def __init__(self, *, iterations: int = 10, damping: float = 0.0, tolerance: float = 1e-12) -> None:
        self.iterations, self.damping, self.tolerance = iterations, damping, tolerance

    def __call__(self, operator: Operator, vector: Tensor) -> Tensor:
        solution = torch.zeros_like(vector)
        residual = direction = vector
        squared = _inner(residual, residual)
        target = squared * self.tolerance**2
        for _ in range(self.iterations):
            active = squared > target
            if not active.any():
                break
            applied = operator(direction) + self.damping * direction
            curvature = _inner(direction, applied)
            # a solved example, or a direction without positive curvature, keeps its solution
            active = active & (curvature > 0)
            length = torch.where(active, squared / torch.where(active, curvature, 1.0), 0.0)
            solution = solution + length * direction
            residual = residual - length * applied
            new_squared = _inner(residual, residual)
            ratio = torch.where(active, new_squared / torch.where(active, squared, 1.0), 0.0)
            direction = residual + ratio * direction
            squared = torch.where(active, new_squared, torch.zeros_like(squared))
        return solution


class Neumann(LinearSolver):
    """Truncated Neumann series v = η Σ_{k<K} (I - η A)ᵏ u, K = `terms`; converges if 0 < η < 2/λ_max(A).

    It equals unrolling the last K plain steps of size η at an optimum. A may be unsymmetric, as with a projection.
    """

    def __init__(self, *, terms: int = 10, step_size: float = 1.0) -> None:
        self.terms, self.step_size = terms, step_size

    def __call__(self, operator: Operator, vector: Tensor) -> Tensor:
        power = total = vector
        for _ in range(self.terms - 1):
            power = power - self.step_size * operator(power)
            total = total + power
        return self.step_size * total


class Exact(LinearSolver):
    """Direct solution of (A + damping I) v = u, by dim operator calls and dim³ work: for checks and small sets."""

    def __init__(self, *, damping: float = 0.0) -> None:
        self.damping = damping

    def __call__(self, operator: Operator, vector: Tensor) -> Tensor:
        matrix = dense(operator, vector)
        damped = matrix + self.damping * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve(damped, vector.flatten(1).unsqueeze(-1)).reshape(vector.shape)
