"""Every way to differentiate one inner problem, held against the exact one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.inner.diagnostics import Agreement, Recorded, residual_norms, spectrum
from setpred.inner.differentiation import Differentiation, Implicit, Unrolled
from setpred.inner.linear_solvers import ConjugateGradient, Exact, Identity, Neumann

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
