"""How far a descent has come, how its objective curves there, and how well two gradients agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from setpred.inner.descent import GradientDescent
from setpred.inner.differentiation import Differentiation, Energy, inner_gradient, optimality
from setpred.inner.linear_solvers import dense


class Recorded(Differentiation):
    """Another differentiation, which keeps what it was last given and found: to look into a decoder from outside.

    Attributes: `energy` and `descent` as they were given, `found` the iterates Y₀, …, Y_T without gradients.
    """

    energy: Energy
    descent: GradientDescent

    def __init__(self, differentiation: Differentiation) -> None:
        self.differentiation = differentiation
        self.found: list[Tensor] = []

    def iterates(self, energy: Energy, initial: Tensor, descent: GradientDescent, iterations: int) -> Iterator[Tensor]:
        self.energy, self.descent, self.found = energy, descent, []
        for iterate in self.differentiation.iterates(energy, initial, descent, iterations):
            self.found.append(iterate.detach())
            yield iterate


def residual_norms(energy: Energy, iterates: Sequence[Tensor], descent: GradientDescent) -> Tensor:
    """|R(Y_t)| for each iterate and example, `[iterates, batch]`; R is `optimality`, ∇L without a projection."""
    norms = []
    for iterate in iterates:
        point = iterate.detach().requires_grad_()
        gradient = inner_gradient(energy, point, create_graph=False)
        with torch.no_grad():
            norms.append(optimality(point, gradient, descent).flatten(1).norm(dim=1))
    return torch.stack(norms)


def hessian(energy: Energy, iterate: Tensor) -> Tensor:
    """∂²L/∂Y² `[batch, dim, dim]` at iterates `[batch, ...]` of dim numbers: dim products, for small sets."""
    point = iterate.detach().requires_grad_()
    gradient = inner_gradient(energy, point, create_graph=True)
    if not gradient.requires_grad:  # an objective that is linear in the iterate
        return gradient.new_zeros(gradient.shape[0], point[0].numel(), point[0].numel())

    def product(vector: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(gradient, point, vector, retain_graph=True, materialize_grads=True)
        return found

    matrix = dense(product, point.detach())
    return 0.5 * (matrix + matrix.mT)  # symmetric but for rounding


def spectrum(energy: Energy, iterate: Tensor) -> Tensor:
    """Eigenvalues of the `hessian`, ascending, `[batch, dim]`.

    A smallest one under 0 says that the point is no minimum, one near 0 that a direction is left free. Plain descent
    of step size η settles if η < 2 / largest, and takes about largest / smallest steps to do so.
    """
    return torch.linalg.eigvalsh(hessian(energy, iterate))


class Agreement(NamedTuple):
    """Of a gradient with a reference, row by row: cosine, and |gradient - reference| / |reference|.

    NaN where they have no meaning: the cosine if either is zero, the error if the reference is.
    """

    cosine: Tensor
    relative_error: Tensor

    @classmethod
    def of(cls, gradient: Tensor, reference: Tensor) -> Agreement:
        """`[rows, ...]` twice, each row on its own -> `[rows]` twice."""
        gradient, reference = gradient.flatten(1), reference.flatten(1)
        length, wanted = gradient.norm(dim=1), reference.norm(dim=1)
        cosine = (gradient * reference).sum(1) / (length * wanted)
        return cls(cosine, (gradient - reference).norm(dim=1) / torch.where(wanted > 0, wanted, torch.nan))


def residual_growth(norms: Tensor) -> Tensor:
    """|R(Y_T)| / max(min_t |R(Y_t)|, |R(Y_0)| / 1000): how far above its least the residual ends, by example.

    About 1 or less where a descent settles; large where it has passed its best and rises; infinite where numbers broke.
    What lies a thousandth under the start counts as settled, so that rounding at an optimum is no rise.

    Args:
        norms: `[iterates, batch]`, of `residual_norms` -> `[batch]`.
    """
    finite = norms.isfinite()
    least = torch.where(finite, norms, torch.inf).amin(0)
    growth = norms[-1] / torch.maximum(least, torch.where(finite[0], norms[0], 0.0) / 1000)
    at_optimum = norms[-1] == 0
    return torch.where(at_optimum, 0.0, torch.where(growth.isfinite(), growth, torch.inf))
