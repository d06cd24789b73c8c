"""Diagnostics of an inner problem: residuals of its descent, and quality of its gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.inner.descent import GradientDescent
from setpred.inner.differentiation import (
    Differentiation,
    Energy,
    Implicit,
    Unrolled,
    free_gradient,
    inner_gradient,
    optimality,
)
from setpred.inner.linear_solvers import ConjugateGradient, Exact, Identity, Neumann, dense

MOST_NUMBERS = 2048  # in a set, for an exact solution
SINGULAR = 1e-12  # share of the largest eigenvalue that counts as zero
OWN, UNROLLED, EXACT = "this model's own", "unrolled, all steps", "implicit, exact"


class Recorded(Differentiation):
    """Another differentiation that keeps its latest `energy`, `descent` and iterates `found`, without gradients."""

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


@torch.no_grad()
def residual_norms(energy: Energy, iterates: Sequence[Tensor], descent: GradientDescent) -> Tensor:
    """Compute |R(Y_t)| for each iterate and example, `[iterates, batch]`; R is `optimality`."""
    residuals = (optimality(iterate, free_gradient(energy, iterate), descent) for iterate in iterates)
    return torch.stack([residual.flatten(1).norm(dim=1) for residual in residuals])


def residual_growth(norms: Tensor) -> Tensor:
    """Compute |R(Y_T)| / max(min_t |R(Y_t)|, |R(Y_0)| / 1000): the last residual relative to the least.

    Norms `[iterates, batch]` -> `[batch]`: about 1 or less if a descent settles, large if it passed its best iterate
    and rises, infinite for non-finite numbers. A thousandth of the start counts as settled, to ignore rounding.
    """
    finite = norms.isfinite()
    least = torch.where(finite, norms, torch.inf).amin(0)
    growth = norms[-1] / torch.maximum(least, torch.where(finite[0], norms[0], 0.0) / 1000)
    return torch.where(norms[-1] == 0, 0.0, torch.where(growth.isfinite(), growth, torch.inf))


def hessian(energy: Energy, iterate: Tensor) -> Tensor:
    """Compute ∂²L/∂Y² `[batch, dim, dim]` at iterates `[batch, ...]` of dim numbers, by dim products."""
    point = iterate.detach().requires_grad_()
    gradient = inner_gradient(energy, point, create_graph=True)
    if not gradient.requires_grad:  # an objective that is linear in the iterate
        return gradient.new_zeros(gradient.shape[0], point[0].numel(), point[0].numel())

    def product(vector: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, point, vector, retain_graph=True, materialize_grads=True)[0]

    matrix = dense(product, point.detach())
    return 0.5 * (matrix + matrix.mT)  # symmetric but for rounding


def agreement(gradient: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Compare gradients with references row by row: cosine, and |gradient - reference| / |reference|.

    Twice `[rows, ...]` -> twice `[rows]`. The cosine is NaN if either is zero, the error if the reference is zero.
    """
    gradient, reference = gradient.flatten(1), reference.flatten(1)
    length, expected = gradient.norm(dim=1), reference.norm(dim=1)
    cosine = (gradient * reference).sum(1) / (length * expected)
    return cosine, (gradient - reference).norm(dim=1) / torch.where(expected > 0, expected, torch.nan)


def differentiations(
    steps: Sequence[int], *, iterations: int, step_size: float, damping: float
) -> dict[str, Differentiation]:
    """List every way to differentiate `iterations` steps, by name; truncated ones once for each of `steps`."""
    truncated = {f"unrolled, last {k}": Unrolled(last=k) for k in steps if k < iterations}
    neumann = {f"implicit, Neumann {k}": Implicit(Neumann(terms=k, step_size=step_size)) for k in steps}
    conjugate = {f"implicit, CG {k}": Implicit(ConjugateGradient(iterations=k, damping=damping)) for k in steps}
    exact, identity = Implicit(Exact(damping=damping)), Implicit(Identity())
    return {UNROLLED: Unrolled()} | truncated | {"implicit, identity": identity} | neumann | conjugate | {EXACT: exact}


def compare_gradients(
    decoder: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    latent: Tensor,
    target: Tensor,
    *,
    iterations: int | None = None,
    steps: Sequence[int] = (1, 5, 10),
    damping: float = 0.0,
) -> dict[str, Any]:
    """Compare every way to differentiate a decoder's inner problem, on one batch.

    Implicit gradients and the curvature are taken at the last-but-one iterate, as in training. The exact gradient
    solves with the Hessian plus damping · I. Unless `damping` is given, a singular Hessian (as for a latent vector of
    fewer numbers than the set) is damped by a millionth of its largest eigenvalue. The Neumann series has the step
    1 / largest eigenvalue.

    Args:
        decoder: an `IDSPN` or similar, with a `differentiation`; in evaluation mode, where every call starts from the
            same sets, and in double precision, which nearly singular matrices need.
        loss: predicted and target sets to `[batch]`.
        latent: z `[batch, latent_dim]`.
        target: `[batch, set_size, set_dim]`.
        iterations: descent steps; the decoder's default unless given.
        steps: numbers of steps to try in each truncated way.
        damping: for conjugate gradient and exact.

    Returns:
        Plain types: "residual" by iterate and example; "smallest" and "largest" eigenvalue by example; "iterations",
        "damping" and "step_size" in effect; "singular", if the damping comes from a singular Hessian; "agreement" by
        name, with cosine and relative error to the exact gradient and cosine to the unrolled one, for the "latent" (by
        example) and the "parameters" (those that the exact gradient reaches, joined, summed over the batch).

    Raises:
        ValueError: a decoder in training mode.
        InputError: a decoder without an inner problem, no descent steps, sets too large, a singular damped Hessian.
    """
    own = getattr(decoder, "differentiation", None)
    if not isinstance(own, Differentiation):
        raise InputError(f"expected a decoder with an inner problem, such as IDSPN, got {type(decoder).__name__}")
    if decoder.training:
        raise ValueError("expected a decoder in evaluation mode, got one in training mode; call decoder.eval()")
    recorded = Recorded(own)
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]

    def gradients(differentiation: Differentiation) -> tuple[Tensor | None, ...]:
        recorded.differentiation = differentiation
        leaf = latent.detach().requires_grad_()
        losses = loss(decoder(leaf, iterations=iterations), target)
        return torch.autograd.grad(losses.sum(), [leaf, *parameters], allow_unused=True)

    decoder.differentiation = recorded
    try:
        with torch.no_grad():
            decoder(latent, iterations=iterations)
        iterates, taken = recorded.found, len(recorded.found) - 1
        if taken < 1:
            raise InputError("expected at least 1 descent step, got 0; there is nothing to differentiate")
        if (numbers := iterates[0][0].numel()) > MOST_NUMBERS:
            raise InputError(
                f"expected sets of at most {MOST_NUMBERS} numbers, got {numbers}: too many to solve exactly"
            )
        residual = residual_norms(recorded.energy, iterates, recorded.descent)
        eigenvalues = torch.linalg.eigvalsh(hessian(recorded.energy, iterates[-2]))  # ascending
        largest = eigenvalues.abs().max().item()
        singular = not damping and eigenvalues.abs().min().item() <= SINGULAR * largest
        damping = 1e-6 * largest if singular else damping
        step_size = 1 / largest if largest > 0 else 1.0
        ways = differentiations(steps, iterations=taken, step_size=step_size, damping=damping)
        found = {name: gradients(way) for name, way in ({OWN: own} | ways).items()}
    except torch.linalg.LinAlgError as error:
        raise InputError("the matrix of the exact gradient is singular; give a --damping") from error
    finally:
        decoder.differentiation = own

    def joined(parts: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Gradients for the latent `[batch, latent_dim]`, and one row for all parameters that EXACT reaches."""
        first, *rest = (
            torch.zeros_like(given) if part is None else part
            for part, given in zip(parts, [latent, *parameters], strict=True)
        )
        reached = [part.flatten() for part, exact in zip(rest, found[EXACT][1:], strict=True) if exact is not None]
        return {"latent": first, "parameters": torch.cat(reached or [torch.zeros(0)]).unsqueeze(0)}

    vectors = {name: joined(parts) for name, parts in found.items()}
    compared: dict[str, dict[str, Any]] = {name: {} for name in vectors}
    for name, parts in vectors.items():
        for part, vector in parts.items():
            cosine, error = agreement(vector, vectors[EXACT][part])
            unrolled, _ = agreement(vector, vectors[UNROLLED][part])
            values = {"cosine": cosine, "relative_error": error, "cosine_to_unrolled": unrolled}
            compared[name][part] = {key: value.tolist() for key, value in values.items()}
    return {
        "iterations": taken,
        "damping": damping,
        "singular": singular,
        "step_size": step_size,
        "residual": residual.tolist(),
        "smallest": eigenvalues[:, 0].tolist(),
        "largest": eigenvalues[:, -1].tolist(),
        "agreement": compared,
    }
