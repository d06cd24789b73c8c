"""Differentiation through argmin_Y L(Y): unrolled (DSPN) or implicit (iDSPN)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.inner.descent import GradientDescent, State
from setpred.inner.linear_solvers import Identity, LinearSolver

# L: iterate [batch, ...] -> [batch]; it closes over the latent vector, parameters and other inputs
Energy = Callable[[Tensor], Tensor]
Iterate = TypeVar("Iterate")


def inner_gradient(energy: Energy, iterate: Tensor, *, create_graph: bool, retain_graph: bool | None = None) -> Tensor:
    """Compute ∇L of each example at `iterate`, which must require gradients; in full precision, also under `no_grad`.

    `retain_graph` is for an energy that keeps tensors of its graph; it equals `create_graph` unless given. Raises a
    RuntimeError under `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "the inner descent needs gradients, which torch.inference_mode() forbids: "
            "use torch.no_grad(), or Trainer(inference_mode=False)"
        )
    # in half precision rounding loses the steps near the optimum
    with torch.enable_grad(), torch.autocast(iterate.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(
            energy(iterate).sum(), iterate, create_graph=create_graph, retain_graph=retain_graph
        )
    return gradient


def free_gradient(energy: Energy, iterate: Tensor) -> Tensor:
    """Compute ∇L without a graph; by `torch.func.grad` inside `torch.compile`, which cannot trace autograd."""
    iterate = iterate.detach()
    if not torch.compiler.is_compiling():
        return inner_gradient(energy, iterate.requires_grad_(), create_graph=False)
    with torch.no_grad(), torch.autocast(iterate.device.type, enabled=False):
        return torch.func.grad(lambda point: energy(point).sum())(iterate)


def curvature_at(energy: Energy, iterate: Tensor) -> Tensor | float:
    """Return h, of the shape of the iterate, if the energy has a `curvature`; else 1.

    h is the diagonal of a quadratic above L that touches it at the iterate. A step of size 1 along h⁻¹ ∇L reaches its
    minimum, so L never rises (majorise and minimise; Hunter and Lange, The American Statistician 2004).
    """
    known = getattr(energy, "curvature", None)
    with torch.autocast(iterate.device.type, enabled=False):
        curvature = None if known is None else known(iterate)
    return 1.0 if curvature is None else curvature


def free_direction(energy: Energy, iterate: Tensor) -> Tensor:
    """Compute h⁻¹ ∇L without a graph: from the energy's `slope` (∇L and h in closed form) if it has one."""
    known = getattr(energy, "slope", None)
    with torch.no_grad(), torch.autocast(iterate.device.type, enabled=False):
        slope = None if known is None else known(iterate.detach())
    if slope is None:
        gradient = free_gradient(energy, iterate)
        with torch.no_grad():
            slope = gradient, curvature_at(energy, iterate.detach())
    return slope[0] / slope[1]


def plain_step(energy: Energy, state: State, descent: GradientDescent) -> State:
    """Take one step of the descent without gradients."""
    with torch.no_grad():
        return descent.step(state._replace(iterate=state.iterate.detach()), free_direction(energy, state.iterate))


def free_step(energy: Energy, state: State, descent: GradientDescent) -> State:
    """Take one step without gradients: by the energy's `step` if it has one (`CompiledEnergy`), else `plain_step`."""
    step = None if torch.compiler.is_compiling() else getattr(energy, "step", None)
    return plain_step(energy, state, descent) if step is None else step(state, descent)


def optimality(iterate: Tensor, gradient: Tensor, descent: GradientDescent) -> Tensor:
    """Compute R(Y) = Y - P(Y - ∇L(Y)), zero at an optimum; ∇L itself without a projection P."""
    return gradient if descent.projection is None else iterate - descent.project(iterate - gradient)


class Differentiation(ABC):
    """Run of a descent, with a rule for the gradients that pass through it (base class)."""

    @abstractmethod
    def iterates(self, energy: Energy, initial: Tensor, descent: GradientDescent, iterations: int) -> Iterator[Tensor]:
        """Yield Y₀, …, Y_T; at least the last one carries gradients to the inputs of the energy."""


class Unrolled(Differentiation):
    """Differentiation through the steps of an iteration (DSPN; Zhang, Hare, Prügel-Bennett, NeurIPS 2019).

    Through all steps it is exact for the returned iterate, and its memory grows with the iterations. Through the last
    k only (truncated backpropagation; Shaban et al., AISTATS 2019) memory grows with k. At a fixed point s = f(s; θ),
    with J = ∂f/∂s and an upstream gradient u, the gradient is

        uᵀ ds/dθ = uᵀ (I - J)⁻¹ ∂f/∂θ = Σ_j uᵀ Jʲ ∂f/∂θ

    and k steps give the first k terms of the series. k = 1 is the one-step gradient of implicit Slot Attention (Chang,
    Griffiths, Levine, NeurIPS 2022). Plain descent of step size η has J = I - η A with the Hessian A, so its k steps
    equal `Neumann` of k terms.

    Args:
        last: k >= 1; None differentiates through every step.
    """

    def __init__(self, last: int | None = None) -> None:
        if last is not None and last < 1:
            raise InputError(f"expected at least 1 differentiated step, got the last {last}; give 1 or more, or None")
        self.last = last

    def states(
        self,
        step: Callable[[Iterate], Iterate],
        start: Iterate,
        iterations: int,
        free: Callable[[Iterate], Iterate] | None = None,
    ) -> Iterator[Iterate]:
        """Yield s₀, …, s_T of s_{t+1} = f(s_t), for any step map.

        Args:
            step: f, with gradients.
            start: s₀, which gets a gradient if all steps have one.
            iterations: T.
            free: f without gradients; `step` under `torch.no_grad` unless given.
        """
        free = torch.no_grad()(step) if free is None else free
        differentiable, state = torch.is_grad_enabled(), start
        yield state
        for left in range(iterations, 0, -1):
            state = step(state) if differentiable and (self.last is None or left <= self.last) else free(state)
            yield state

    def iterates(self, energy: Energy, initial: Tensor, descent: GradientDescent, iterations: int) -> Iterator[Tensor]:
        def step(state: State) -> State:
            # a fresh node: the energy may also depend on the tensor that the descent starts from
            iterate = state.iterate.view_as(state.iterate)
            iterate = iterate if iterate.requires_grad else iterate.requires_grad_()
            gradient = inner_gradient(energy, iterate, create_graph=True)
            with torch.enable_grad():
                return descent.step(state._replace(iterate=iterate), gradient / curvature_at(energy, iterate))

        def free(state: State) -> State:
            return free_step(energy, state, descent)

        for state in self.states(step, State(initial), iterations, free):
            yield state.iterate


class Implicit(Differentiation):
    """Differentiation of the optimality condition at the end of the descent (iDSPN; Zhang et al., ICLR 2022).

    With R(Y; θ) = Y - P(Y - ∇L(Y; θ)), see `optimality`, an optimum has R = 0 and

        uᵀ dY*/dθ = -vᵀ ∂R/∂θ,    (∂R/∂Y)ᵀ v = u

    R is taken at the last-but-one iterate, where the descent needs its gradient anyway; momentum, clipping and step
    size act on the value only. Memory does not grow with the iterations. First derivatives only: R's point is held
    fixed, so an inner problem inside another objective needs `Unrolled`.

    Args:
        solver: finds v; `Identity` unless given: v = u, the published iDSPN, or v = h⁻¹ u for a `curvature` h.
        best: keeps the iterate of least residual norm |R(Y_t)| of each example, and takes R there, so a descent that
            diverges returns its best iterate. The iterates yielded are the best so far. A non-finite residual counts
            as infinite; without a finite one the last iterate stays, so a non-finite latent vector shows.
    """

    def __init__(self, solver: LinearSolver | None = None, *, best: bool = False) -> None:
        self.solver = Identity() if solver is None else solver
        self.best = best

    def iterates(self, energy: Energy, initial: Tensor, descent: GradientDescent, iterations: int) -> Iterator[Tensor]:
        if self.best and iterations:
            yield from self._best_iterates(energy, State(initial.detach()), descent, iterations)
            return
        differentiable = torch.is_grad_enabled() and iterations > 0
        state = State(initial.detach())
        yield state.iterate if iterations else initial
        for _ in range(iterations - differentiable):
            state = free_step(energy, state, descent)
            yield state.iterate
        if differentiable:
            iterate = state.iterate.detach().requires_grad_()
            gradient = inner_gradient(energy, iterate, create_graph=True)
            with torch.no_grad():
                curvature = curvature_at(energy, iterate.detach())
                state = descent.step(State(iterate.detach(), state.velocity), gradient.detach() / curvature)
            yield self._attach(state.iterate, curvature, iterate, gradient, descent)

    def _best_iterates(
        self, energy: Energy, state: State, descent: GradientDescent, iterations: int
    ) -> Iterator[Tensor]:
        """Yield the best of Y₀, …, Y_t for each t; the last one carries gradients."""
        differentiable = torch.is_grad_enabled()
        best, each = state.iterate, (-1, *[1] * (state.iterate.ndim - 1))
        least = best.new_full(best.shape[:1], torch.inf)
        for left in range(iterations, -1, -1):
            gradient = free_gradient(energy, state.iterate)
            with torch.no_grad():
                norm = optimality(state.iterate, gradient, descent).flatten(1).norm(dim=1)
                better = norm < least  # False for NaN
                least = torch.where(better, norm, least)
                best = torch.where(better.view(each), state.iterate, best)
                if left:
                    state = descent.step(state, gradient / curvature_at(energy, state.iterate))
                else:
                    best = torch.where(least.isfinite().view(each), best, state.iterate)
            if left or not differentiable:
                yield best
        if differentiable:
            iterate = best.detach().requires_grad_()
            gradient = inner_gradient(energy, iterate, create_graph=True)
            with torch.no_grad():
                curvature = curvature_at(energy, iterate.detach())
            yield self._attach(best, curvature, iterate, gradient, descent)

    def _attach(
        self, value: Tensor, curvature: Tensor | float, iterate: Tensor, gradient: Tensor, descent: GradientDescent
    ) -> Tensor:
        """Give `value` the gradients of the implicit function, by a carrier that is zero in value."""
        residual = optimality(iterate, gradient, descent)
        if not residual.requires_grad:  # an objective without parameters and inputs
            return value
        # a new node: the hook below refers to earlier nodes only, so no reference cycle arises
        carrier = -residual
        if type(self.solver) is Identity:  # the curvature, or the identity, replaces the Hessian
            carrier = -residual / curvature
        else:

            def operator(vector: Tensor) -> Tensor:
                (product,) = torch.autograd.grad(
                    residual, iterate, vector, retain_graph=True, create_graph=torch.is_grad_enabled()
                )
                return product

            carrier.register_hook(lambda upstream: self.solver(operator, upstream))
        return value + (carrier - carrier.detach())


def minimise(
    energy: Energy,
    initial: Tensor,
    *,
    descent: GradientDescent,
    differentiation: Differentiation,
    iterations: int | None = None,
) -> Tensor:
    """Find argmin_Y L(Y) of each example, from Y₀ `[batch, ...]`: the last iterate, with gradients.

    `iterations` overrides the descent's number of steps.
    """
    iterations = descent.iterations if iterations is None else iterations
    for iterate in differentiation.iterates(energy, initial, descent, iterations):  # noqa: B007
        pass
    return iterate
