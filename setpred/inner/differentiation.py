"""How gradients pass through argmin_Y L(Y): unrolled (DSPN) or implicit (iDSPN)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from setpred.inner.descent import GradientDescent, State
from setpred.inner.linear_solvers import Identity, LinearSolver

# L: iterate [batch, ...] -> [batch]; it closes over whatever else it depends on (latent vector, parameters)
Energy = Callable[[Tensor], Tensor]


def inner_gradient(energy: Energy, iterate: Tensor, *, create_graph: bool, retain_graph: bool | None = None) -> Tensor:
    """∇L at `iterate`, which must require gradients. Also under `torch.no_grad`, and in full precision always.

    The sum over the batch keeps each example's gradient independent of the others. `retain_graph` is for an energy that
    keeps a part of what it computes; as `create_graph` unless given.
    """
    refuse_inference_mode()
    # half precision breaks the descent: the steps near the optimum are lost in rounding
    with torch.enable_grad(), torch.autocast(iterate.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(
            energy(iterate).sum(), iterate, create_graph=create_graph, retain_graph=retain_graph
        )
    return gradient


def scaled(energy: Energy, iterate: Tensor, gradient: Tensor) -> Tensor:
    """h⁻¹ ∇L, where the energy has a `curvature` h of the shape of the iterate; ∇L where it has none.

    h is the diagonal of a quadratic over L that touches it at the iterate. Along h⁻¹ ∇L a step of size 1 goes to that
    quadratic's minimum, so L never rises (majorise and minimise; Hunter and Lange, The American Statistician 2004).
    """
    with torch.autocast(iterate.device.type, enabled=False):
        known = getattr(energy, "curvature", None)
        curvature = None if known is None else known(iterate)
    return gradient if curvature is None else gradient / curvature


def refuse_inference_mode() -> None:
    """Raises a `RuntimeError` under `torch.inference_mode()`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "the inner descent needs gradients, which torch.inference_mode() forbids: "
            "use torch.no_grad(), or Trainer(inference_mode=False)"
        )


def plain_step(energy: Energy, state: State, descent: GradientDescent) -> State:
    """One step of the descent that carries no gradients."""
    iterate = state.iterate.detach().requires_grad_()
    gradient = inner_gradient(energy, iterate, create_graph=False)
    with torch.no_grad():
        iterate = iterate.detach()
        return descent.step(State(iterate, state.velocity), scaled(energy, iterate, gradient))


def functional_step(energy: Energy, state: State, descent: GradientDescent) -> State:
    """`plain_step` as a function of tensors alone, which `torch.compile(fullgraph=True)` takes."""
    gradient = torch.func.grad(lambda iterate: energy(iterate).sum())(state.iterate)
    return descent.step(state, scaled(energy, state.iterate, gradient))


def free_step(energy: Energy, state: State, descent: GradientDescent) -> State:
    """One step without gradients: of an energy that has a `step` of its own (`CompiledEnergy`) that, else `plain_step`.

    Where the user compiles or exports the whole model, the functional one.
    """
    if torch.compiler.is_compiling():
        with torch.no_grad(), torch.autocast(state.iterate.device.type, enabled=False):
            return functional_step(energy, State(state.iterate.detach(), state.velocity), descent)
    step = getattr(energy, "step", None)
    return plain_step(energy, state, descent) if step is None else step(state, descent)


def free_gradient(energy: Energy, iterate: Tensor) -> Tensor:
    """∇L without gradients of its own; the functional one where the user compiles or exports the whole model."""
    if torch.compiler.is_compiling():
        with torch.no_grad(), torch.autocast(iterate.device.type, enabled=False):
            return torch.func.grad(lambda point: energy(point).sum())(iterate.detach())
    return inner_gradient(energy, iterate.detach().requires_grad_(), create_graph=False)


def optimality(iterate: Tensor, gradient: Tensor, descent: GradientDescent) -> Tensor:
    """R(Y) = Y - P(Y - ∇L(Y)), zero at an optimum; ∇L itself without a projection P."""
    return gradient if descent.projection is None else iterate - descent.project(iterate - gradient)


class Differentiation(ABC):
    """Runs a descent and decides how gradients pass through it."""

    @abstractmethod
    def iterates(self, energy: Energy, initial: Tensor, descent: GradientDescent, iterations: int) -> Iterator[Tensor]:
        """Yields Y₀, …, Y_T; at least the last carries gradients to whatever the energy depends on."""


class Unrolled(Differentiation):
    """Differentiates through the steps of the descent (DSPN; Zhang, Hare, Prügel-Bennett, NeurIPS 2019).

    Through all of them, it is exact for the iterate it returns, and its memory grows with the iterations. Through the
    last k only (truncated backpropagation; Shaban et al., AISTATS 2019) the iterate they start from counts as given:
    memory grows with k, and what is missing shrinks with k as fast as the descent converges. At an optimum with
    Hessian A, plain steps of size η give η Σ_{j<k} (I - η A)ʲ for A⁻¹, as `Neumann` of k terms does: k = 1 is η times
    the identity. Iterates within the steps that are differentiated through carry gradients.

    Args:
        last: k; None differentiates through every step.
    """

    def __init__(self, last: int | None = None) -> None:
        if last is not None and last < 1:
            raise ValueError(f"expected to differentiate through at least the last step, got the last {last}")
        self.last = last

    def iterates(self, energy: Energy, initial: Tensor, descent: GradientDescent, iterations: int) -> Iterator[Tensor]:
        differentiable = torch.is_grad_enabled()
        state = State(initial)
        yield initial
        for left in range(iterations, 0, -1):
            if differentiable and (self.last is None or left <= self.last):
                # a fresh node: the energy may also depend on the very tensor that the descent starts from
                iterate = state.iterate.view_as(state.iterate)
                iterate = iterate if iterate.requires_grad else iterate.requires_grad_()
                gradient = inner_gradient(energy, iterate, create_graph=True)
                with torch.enable_grad():
                    state = descent.step(state._replace(iterate=iterate), scaled(energy, iterate, gradient))
            else:
                state = free_step(energy, state, descent)
            yield state.iterate


class Implicit(Differentiation):
    """Differentiates the optimality condition at the end of the descent (iDSPN; Zhang et al., ICLR 2022).

    With R(Y; θ) = Y - P(Y - ∇L(Y; θ)), see `optimality`, an optimum has R = 0 and

        uᵀ dY*/dθ = -vᵀ ∂R/∂θ,    (∂R/∂Y)ᵀ v = u

    R is taken at the last-but-one iterate, where the descent needs its gradient anyway; momentum, clipping
    and step size act on the value only. The `solver` finds v; `Identity` takes v = u, the published iDSPN, or
    v = h⁻¹ u where the objective has a `curvature` h.
    Memory does not grow with the iterations: all steps but the last are forgotten.

    First derivatives only: the point where R is taken is held fixed, so a second derivative of the result
    would miss terms. An inner problem inside another objective needs `Unrolled`.

    With `best`, each example keeps the iterate Y_t of least residual norm |R(Y_t)|, t = 0, …, T, in place of the last
    one, and R is taken at that very iterate: where a descent diverges, what it has passed is not lost. Instead of Y_t
    the best so far is yielded. A residual that is not finite counts as infinite; where none is finite the last
    iterate stays, so that a broken latent vector shows. Costs one gradient more, of the last iterate.

    Args:
        solver: of the linear system; `Identity` unless given.
        best: keeps the best iterate of each example, not the last one.
    """

    def __init__(self, solver: LinearSolver | None = None, *, best: bool = False) -> None:
        self.solver = Identity() if solver is None else solver
        self.best = best

    def iterates(self, energy: Energy, initial: Tensor, descent: GradientDescent, iterations: int) -> Iterator[Tensor]:
        if self.best and iterations:
            yield from self._best_iterates(energy, initial.detach(), descent, iterations)
            return
        differentiable = torch.is_grad_enabled()
        state = State(initial.detach())
        yield initial if iterations == 0 else state.iterate
        for _ in range(iterations - 1 if differentiable else iterations):
            state = free_step(energy, state, descent)
            yield state.iterate
        if iterations and differentiable:
            iterate = state.iterate.detach().requires_grad_()
            gradient = inner_gradient(energy, iterate, create_graph=True)
            with torch.no_grad():
                step = scaled(energy, iterate.detach(), gradient.detach())
                state = descent.step(State(iterate.detach(), state.velocity), step)
            yield self._attach(state.iterate, energy, iterate, gradient, descent)

    def _best_iterates(
        self, energy: Energy, initial: Tensor, descent: GradientDescent, iterations: int
    ) -> Iterator[Tensor]:
        """Yields the best of Y₀, …, Y_t for each t; the last one carries gradients."""
        differentiable = torch.is_grad_enabled()
        state, best, least = State(initial), initial, initial.new_full(initial.shape[:1], torch.inf)
        for left in range(iterations, -1, -1):
            gradient = free_gradient(energy, state.iterate)
            with torch.no_grad():
                norm = optimality(state.iterate, gradient, descent).flatten(1).norm(dim=1)
                better = norm < least  # never so for NaN
                least = torch.where(better, norm, least)
                best = torch.where(_beside(better, best), state.iterate, best)
                if left:
                    yielded, state = best, descent.step(state, scaled(energy, state.iterate, gradient))
                else:
                    yielded = torch.where(_beside(least.isfinite(), best), best, state.iterate)
            if left or not differentiable:
                yield yielded
        if differentiable:
            iterate = yielded.detach().requires_grad_()
            yield self._attach(yielded, energy, iterate, inner_gradient(energy, iterate, create_graph=True), descent)

    def _attach(
        self, value: Tensor, energy: Energy, iterate: Tensor, gradient: Tensor, descent: GradientDescent
    ) -> Tensor:
        """`value`, with the gradients of the implicit function."""
        residual = optimality(iterate, gradient, descent)
        if not residual.requires_grad:  # an objective without parameters and inputs
            return value
        # a node of its own, so that the hook below refers to nodes before it and no reference cycle arises
        carrier = -residual
        if type(self.solver) is Identity:  # the curvature, or the identity, in place of the Hessian
            with torch.no_grad():
                weights = scaled(energy, iterate.detach(), torch.ones_like(value))
            carrier = -residual * weights
        else:

            def operator(vector: Tensor) -> Tensor:
                (product,) = torch.autograd.grad(
                    residual, iterate, vector, retain_graph=True, create_graph=torch.is_grad_enabled()
                )
                return product

            carrier.register_hook(lambda upstream: self.solver(operator, upstream))
        return value + (carrier - carrier.detach())


def _beside(flags: Tensor, elements: Tensor) -> Tensor:
    """Flags `[batch]`, shaped to choose among `[batch, ...]`."""
    return flags.view(-1, *[1] * (elements.ndim - 1))


def minimise(
    energy: Energy,
    initial: Tensor,
    *,
    descent: GradientDescent,
    differentiation: Differentiation,
    iterations: int | None = None,
) -> Tensor:
    """argmin_Y L(Y) per example, differentiable: the last of the iterates.

    Args:
        energy: L, from `[batch, ...]` to `[batch]`.
        initial: Y₀ `[batch, ...]`.
        descent, differentiation: how to iterate and how gradients pass.
        iterations: overrides the descent's number of steps.
    """
    iterations = descent.iterations if iterations is None else iterations
    for iterate in differentiation.iterates(energy, initial, descent, iterations):  # noqa: B007
        pass
    return iterate
