"""Laws of the inner optimisation: known optima, and gradients against finite differences."""

import gc
import weakref

import pytest
import torch
from problems import Quadratic, check_slope, close, finite_difference, normal
from problems import weighted_sum as scalar

from setpred.aggregators import FSPool, SetEncoder
from setpred.inner import (
    ConjugateGradient,
    Exact,
    GradientDescent,
    Identity,
    Implicit,
    LatentMatching,
    Neumann,
    Problem,
    Simplex,
    Unrolled,
    clip_norm,
    minimise,
    simplex,
)
from setpred.inner.objectives import Energy

LONG = {"iterations": 150, "learning_rate": 0.7, "momentum": 0.5}
SOLVERS = {
    "conjugate gradient": ConjugateGradient(iterations=8),
    "neumann": Neumann(terms=150, step_size=0.8),
    "exact": Exact(),
}


def gradient_of(problem, differentiation, value=scalar, **numbers):
    """The gradient of a scalar of the last iterate, for θ."""
    theta = problem.theta.clone().requires_grad_()
    return torch.autograd.grad(value(problem.solve(theta, differentiation, **numbers)), theta)[0]


@pytest.mark.parametrize("differentiation", [Unrolled(), Implicit()], ids=["unrolled", "implicit"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_descent_finds_the_optimum(differentiation, momentum):
    problem = Quadratic()
    found = problem.solve(problem.theta, differentiation, iterations=250, learning_rate=0.7, momentum=momentum)
    close(found, problem.optimum(problem.theta), rtol=1e-10, atol=1e-10)


def test_nesterov_steps_are_those_of_torch_sgd():
    problem = Quadratic()
    leaf = problem.initial.clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=0.3, momentum=0.9, nesterov=True)
    descent = GradientDescent(iterations=7, learning_rate=0.3, momentum=0.9)
    iterates = Unrolled().iterates(problem.energy(problem.theta), problem.initial, descent, 7)
    for iterate in iterates:
        torch.testing.assert_close(iterate, leaf.detach(), rtol=0, atol=1e-13)
        optimizer.zero_grad()
        problem.energy(problem.theta)(leaf).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_implicit_gradient_is_that_of_the_optimum_and_of_the_unrolled_descent(solver):
    problem = Quadratic()
    found = gradient_of(problem, Implicit(solver), **LONG)
    close(found, finite_difference(lambda t: scalar(problem.optimum(t)), problem.theta), rtol=1e-7, atol=1e-7)
    close(found, gradient_of(problem, Unrolled(), **LONG))


@pytest.mark.parametrize("solver", [Neumann(terms=150), Exact()], ids=["neumann", "exact"])
def test_implicit_gradient_through_a_projection(solver):
    """On the simplex, the gradient is that of the constrained optimum."""
    problem = Quadratic(rows=2, dim=3, seed=5)
    theta = (0.2 * problem.theta).requires_grad_()

    def found():
        return problem.solve(theta, Implicit(solver), iterations=200, projection=Simplex())

    value = found()
    close(value.sum(-1), torch.ones_like(value[..., 0]))
    check_slope(lambda: scalar(found()), [theta], rtol=1e-5, atol=1e-6)


def set_problem(seed=0):
    """A set encoder's objective, a start, and latent vectors."""
    torch.manual_seed(seed)
    objective = LatentMatching(SetEncoder(FSPool(8, set_size=4), set_dim=3, hidden_dim=8).double())
    return objective, torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)


def decoder_energy():
    objective, initial, latent = set_problem()
    return initial, Energy(objective, Problem(latent, initial))


def test_the_implicit_gradient_is_taken_at_the_last_but_one_iterate():
    """With a set encoder, whose vector product differs from iterate to iterate."""
    objective, initial, latent = set_problem()
    energy = Energy(objective, Problem(latent.requires_grad_(), initial))
    iterates = list(Implicit().iterates(energy, initial, GradientDescent(iterations=4, momentum=0.9), 4))
    upstream = torch.randn_like(iterates[-1])
    (found,) = torch.autograd.grad(iterates[-1], latent, upstream)
    products = []
    for iterate in iterates[-2:]:
        leaf = iterate.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(leaf).sum(), leaf, create_graph=True)
        products.append(torch.autograd.grad(-slope, latent, upstream)[0])
    close(found, products[0])
    assert not torch.allclose(found, products[1])


@pytest.mark.parametrize("solver", [ConjugateGradient(iterations=20, damping=0.5), Exact(damping=0.5)])
def test_damping_is_added_to_the_operator(solver):
    problem = Quadratic()
    vector = torch.randn_like(problem.initial)
    solution = solver(lambda v: (problem.matrix @ v.flatten(1).unsqueeze(-1)).view_as(v), vector)
    damped = problem.matrix + 0.5 * torch.eye(problem.matrix.shape[-1], dtype=torch.float64)
    expected = torch.linalg.solve(damped, vector.flatten(1).unsqueeze(-1)).view_as(vector)
    torch.testing.assert_close(solution, expected)


def saved_tensors(function):
    """Number of tensors that autograd keeps for the backward pass of `function()`."""
    saved = []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        kept = Kept(tensor.detach())
        saved.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = function()
    alive = sum(reference() is not None for reference in saved)
    assert result.requires_grad
    return alive


def test_memory_of_the_implicit_way_does_not_grow_with_the_iterations():
    initial, energy = decoder_energy()

    def tensors(differentiation, iterations):
        descent = GradientDescent(iterations=iterations, momentum=0.9)
        return saved_tensors(lambda: minimise(energy, initial, descent=descent, differentiation=differentiation))

    for solver in (Identity(), ConjugateGradient()):
        assert tensors(Implicit(solver), 40) == tensors(Implicit(solver), 5) > 0
    assert tensors(Unrolled(), 40) > 4 * tensors(Unrolled(), 5)


def test_no_reference_cycle_keeps_the_graph_alive():
    """The graph of a step is freed by reference counting alone, solver hook included."""
    initial, energy = decoder_energy()
    watched = []

    class Token:
        pass

    class Tagged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, elements):
            ctx.token = Token()
            watched.append(weakref.ref(ctx.token))
            return elements.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    gc.disable()
    try:
        found = minimise(
            lambda elements: energy(Tagged.apply(elements)),
            initial,
            descent=GradientDescent(iterations=3),
            differentiation=Implicit(ConjugateGradient()),
        )
        assert any(token() is not None for token in watched)
        found.sum().backward()
        del found
        assert all(token() is None for token in watched)
    finally:
        gc.enable()


def test_works_without_grad_leaves_the_mode_alone_and_raises_in_inference_mode():
    initial, energy = decoder_energy()
    descent = GradientDescent(iterations=3)
    for differentiation in (Unrolled(), Implicit()):
        with torch.no_grad():
            for iterate in differentiation.iterates(energy, initial, descent, 3):
                assert not torch.is_grad_enabled()
                assert not iterate.requires_grad
        with torch.enable_grad():
            attached = minimise(energy, initial, descent=descent, differentiation=differentiation)
        assert attached.requires_grad
        with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
            minimise(energy, initial, descent=descent, differentiation=differentiation)


def test_clip_keeps_direction_and_bounds_the_norm():
    gradient = normal(5, 3, 2)
    gradient[0] = 0
    gradient[1] *= 1e-3
    clipped = clip_norm(gradient, 0.5)
    norms = clipped.flatten(1).norm(dim=1)
    assert (norms <= 0.5 + 1e-12).all()
    torch.testing.assert_close(clipped[:2], gradient[:2])
    cosine = torch.nn.functional.cosine_similarity(clipped[2:].flatten(1), gradient[2:].flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    zero = torch.zeros(1, 2, requires_grad=True)
    (first,) = torch.autograd.grad(clip_norm(zero, 1.0).square().sum(), zero, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), zero)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()


def test_simplex_projection_is_the_nearest_point():
    """Against the optimality condition: x - p is constant on the support and smaller off it."""
    points = 3 * normal(200, 6)
    projected = simplex(points)
    assert (projected >= 0).all()
    torch.testing.assert_close(projected.sum(-1), torch.ones(200, dtype=torch.float64))
    slack = points - projected
    multiplier = torch.where(projected > 0, slack, -torch.inf).amax(-1, keepdim=True)
    support = projected > 0
    torch.testing.assert_close(slack[support], multiplier.expand_as(slack)[support])
    assert (slack <= multiplier + 1e-12).all()
    torch.testing.assert_close(simplex(projected), projected)


def test_learned_descent_starts_where_it_says():
    descent = GradientDescent(iterations=1, learning_rate=0.1, momentum=0.9, learned=True)
    assert descent.learning_rate.item() == pytest.approx(0.1, rel=1e-6)
    assert descent.momentum.item() == pytest.approx(0.9, rel=1e-6)
    found = minimise(
        lambda y: (y - 1).square().flatten(1).sum(1),
        torch.randn(3, 2, 2),
        descent=descent,
        differentiation=Unrolled(),
        iterations=2,
    )
    found.sum().backward()
    assert all(parameter.grad.abs() > 0 for parameter in descent.parameters())
