"""Measure an inner problem: residuals of the descent, and the quality of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.inner.descent import GradientDescent
from setpred.inner.differentiation import Differentiation, Energy, Implicit, Unrolled, inner_gradient, optimality
from setpred.inner.linear_solvers import ConjugateGradient, Exact, Identity, Neumann, dense

MOST_NUMBERS = 2048  # in a set, for an exact solution
SINGULAR = 1e-12  # of the largest eigenvalue: what counts as zero
OWN, UNROLLED, EXACT = "this model's own", "unrolled, all steps", "implicit, exact"


def differentiations(
    steps: Sequence[int], *, iterations: int, step_size: float, damping: float
) -> dict[str, Differentiation]:
    """Every way to differentiate `iterations` steps, by name; what takes a number of steps, for each of `steps`."""
    truncated = {f"unrolled, last {k}": Unrolled(last=k) for k in steps if k < iterations}
    neumann = {f"implicit, Neumann {k}": Implicit(Neumann(terms=k, step_size=step_size)) for k in steps}
    conjugate = {f"implicit, CG {k}": Implicit(ConjugateGradient(iterations=k, damping=damping)) for k in steps}
    exact = Implicit(Exact(damping=damping))
    identity = Implicit(Identity())
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
    """Compares every way to differentiate a decoder's inner problem, on one batch.

    Implicit gradients are taken at the last-but-one iterate, as in training, and so is the curvature. The exact one
    solves with the whole Hessian plus damping · I. Where that is singular (always so for a latent vector of fewer
    numbers than the set, whose encoding leaves directions free) and no damping is given, a millionth of the largest
    eigenvalue is taken. The Neumann series has the step 1 / largest eigenvalue.

    Args:
        decoder: latent to set, with its `differentiation` as an attribute, called as `IDSPN` is. Give it in
            evaluation mode, where every call starts from the same sets, and in double precision: solving with nearly
            singular matrices needs that.
        loss: of predicted and target sets, per example.
        latent: z `[batch, latent_dim]`.
        target: `[batch, set_size, set_dim]`.
        iterations: of the decoder; its own number of descent steps unless given.
        steps: the numbers of steps to try where there is a choice.
        damping: for conjugate gradient and exact.

    Returns:
        Plain types. "residual" by iterate and example; "smallest" and "largest" eigenvalue by example; "iterations",
        "damping" and "step_size" in force; "singular", whether that is where the damping comes from; "agreement" by
        name, with cosine and relative error to the exact gradient and cosine to the unrolled one, of the gradients for
        the "latent" (by example) and the decoder's "parameters" (those that the exact gradient reaches, together,
        summed over the batch).

    Raises:
        ValueError: a decoder in training mode.
        InputError: a decoder without an inner problem, no descent steps, sets too large, a Hessian that stays singular.
    """
    own = getattr(decoder, "differentiation", None)
    if not isinstance(own, Differentiation):
        raise InputError(
            f"a decoder with an inner problem was expected, such as IDSPN; {type(decoder).__name__} has none to check"
        )
    if decoder.training:
        raise ValueError("expected a decoder in evaluation mode, got one in training mode; call decoder.eval()")
    recorded = Recorded(own)
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]

    def gradient(differentiation: Differentiation) -> list[Tensor | None]:
        recorded.differentiation = differentiation
        leaf = latent.detach().requires_grad_()
        losses = loss(decoder(leaf, iterations=iterations), target)
        return list(torch.autograd.grad(losses.sum(), [leaf, *parameters], allow_unused=True))

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
        eigenvalues = spectrum(recorded.energy, iterates[-2])
        largest = eigenvalues.abs().max().item()
        singular = not damping and eigenvalues.abs().min().item() <= SINGULAR * largest
        damping = 1e-6 * largest if singular else damping
        step_size = 1 / largest if largest > 0 else 1.0
        ways = differentiations(steps, iterations=taken, step_size=step_size, damping=damping)
        found = {name: gradient(way) for name, way in ({OWN: own} | ways).items()}
    except torch.linalg.LinAlgError as error:
        raise InputError("the exact gradient does not exist, its matrix is singular; give a --damping") from error
    finally:
        decoder.differentiation = own
    reached = [part is not None for part in found[EXACT][1:]]
    vectors = {
        name: {"latent": of_latent, "parameters": _joined(of_parameters, parameters, reached)}
        for name, (of_latent, *of_parameters) in found.items()
    }
    return {
        "iterations": taken,
        "damping": damping,
        "singular": singular,
        "step_size": step_size,
        "residual": residual.tolist(),
        "smallest": eigenvalues[:, 0].tolist(),
        "largest": eigenvalues[:, -1].tolist(),
        "agreement": {
            name: {part: _agreement(vectors, name, part) for part in ("latent", "parameters")} for name in vectors
        },
    }


def _joined(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], kept: Sequence[bool]) -> Tensor:
    """One row `[1, numbers]`; no gradient is zeros."""
    parts = [
        (torch.zeros_like(parameter) if part is None else part).flatten()
        for part, parameter, keep in zip(gradients, parameters, kept, strict=True)
        if keep
    ]
    return torch.cat(parts or [torch.zeros(0)]).unsqueeze(0)


def _agreement(vectors: dict[str, dict[str, Tensor]], name: str, part: str) -> dict[str, list[float]]:
    exact, unrolled = (Agreement.of(vectors[name][part], vectors[reference][part]) for reference in (EXACT, UNROLLED))
    return {
        "cosine": exact.cosine.tolist(),
        "relative_error": exact.relative_error.tolist(),
        "cosine_to_unrolled": unrolled.cosine.tolist(),
    }


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
