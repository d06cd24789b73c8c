"""Truncated unrolling, the quality of gradients, and the command that measures it for a checkpoint."""

import json
import math

import pytest
import torch
from problems import Quadratic, close, finite_difference, normal, weighted_sum
from torch import nn

from setpred.checkpoint.load import KEY, save_checkpoint, training_iterations
from setpred.commands import gradients as command
from setpred.commands.gradients import check, conclusions
from setpred.decoders import IDSPN
from setpred.errors import InputError
from setpred.inner import (
    ConjugateGradient,
    Exact,
    GradientDescent,
    Identity,
    Implicit,
    Neumann,
    Simplex,
    Unrolled,
    minimise,
)
from setpred.inner import diagnostics as comparison
from setpred.inner.descent import State
from setpred.inner.diagnostics import (
    EXACT,
    OWN,
    UNROLLED,
    Recorded,
    agreement,
    compare_gradients,
    hessian,
    residual_norms,
)
from setpred.losses import DistributionalSlicedWasserstein
from setpred.schema import CLEVR

# --- through the last k steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 30, 1000])
def test_truncated_is_neumann_of_as_many_terms(k):
    """For a quadratic, whose curvature is the same everywhere: η Σ_{j<k} (I - ηA)ʲ in the place of A⁻¹."""
    problem, upstream = Quadratic(), normal(3, 2, 2, seed=7)

    def gradient(differentiation):
        theta = problem.theta.clone().requires_grad_()
        found = problem.solve(theta, differentiation, iterations=200, learning_rate=0.5)
        return torch.autograd.grad(found, theta, upstream)[0]

    found = gradient(Unrolled(last=k))
    close(found, gradient(Implicit(Neumann(terms=k, step_size=0.5))))
    assert torch.equal(found, gradient(Unrolled())) == (k == 1000)  # of 200 steps


def test_truncated_is_the_derivative_of_the_last_steps():
    """Momentum, clipping and projection included, from the iterate and velocity that the first steps leave."""
    problem = Quadratic(rows=2, dim=3, seed=5)
    descent = GradientDescent(iterations=9, learning_rate=0.4, momentum=0.7, clip=0.5, projection=Simplex())

    def steps(theta, state, number):
        for _ in range(number):
            point = state.iterate.detach().requires_grad_()
            (slope,) = torch.autograd.grad(problem.energy(theta)(point).sum(), point)
            state = descent.step(State(point.detach(), state.velocity), slope)
        return state

    halfway = steps(problem.theta, State(problem.initial), 6)
    theta = problem.theta.clone().requires_grad_()
    found = minimise(problem.energy(theta), problem.initial, descent=descent, differentiation=Unrolled(last=3))
    torch.testing.assert_close(found, steps(problem.theta, halfway, 3).iterate)
    weighted_sum(found).backward()
    expected = finite_difference(lambda t: weighted_sum(steps(t, halfway, 3).iterate), problem.theta)
    close(theta.grad, expected, rtol=1e-6, atol=1e-8)


def test_truncated_carries_gradients_in_the_last_steps_alone():
    problem = Quadratic()
    theta, initial = problem.theta.clone().requires_grad_(), problem.initial.clone().requires_grad_()
    descent = GradientDescent(iterations=6, learning_rate=0.5)
    found = list(Unrolled(last=2).iterates(problem.energy(theta), initial, descent, 6))
    assert [iterate.requires_grad for iterate in found] == [True, *[False] * 4, True, True]
    assert torch.autograd.grad(found[-1].sum(), initial, allow_unused=True) == (None,)
    for iterate, other in zip(found, Unrolled().iterates(problem.energy(theta), initial, descent, 6), strict=True):
        torch.testing.assert_close(iterate, other, rtol=0, atol=0)


# --- residual, curvature, agreement ---------------------------------------------------------------------------------


def test_residuals_of_a_quadratic():
    problem = Quadratic()
    recorded = Recorded(Unrolled())
    problem.solve(problem.theta, recorded, iterations=5, learning_rate=0.5)
    assert len(recorded.found) == 6
    found = residual_norms(recorded.energy, recorded.found, recorded.descent)
    # plain steps of size η: Y_t - Y* = (I - ηA)ᵗ (Y₀ - Y*), and ∇L = A (Y - Y*)
    apart = (problem.initial - problem.optimum(problem.theta)).flatten(1).unsqueeze(-1)
    for step in range(6):
        torch.testing.assert_close(found[step], (problem.matrix @ apart).norm(dim=(1, 2)))
        apart = apart - 0.5 * problem.matrix @ apart


def test_the_residual_is_zero_at_an_optimum_with_a_projection():
    problem = Quadratic(rows=2, dim=3, seed=5)
    descent = GradientDescent(iterations=300, projection=Simplex())
    energy = problem.energy(0.2 * problem.theta)
    found = minimise(energy, problem.initial, descent=descent, differentiation=Implicit())
    constrained, free = (residual_norms(energy, [found], each) for each in (descent, GradientDescent(iterations=1)))
    assert (constrained < 1e-10).all()
    assert (free > 0.1).all()


def test_the_hessian_of_a_quadratic_and_of_a_linear_objective():
    problem = Quadratic()
    energy = problem.energy(problem.theta)
    with torch.no_grad():  # as a command calls it
        torch.testing.assert_close(hessian(energy, problem.initial), problem.matrix)
    flat = hessian(lambda y: 3 * y.flatten(1).sum(1), problem.initial)
    assert torch.equal(flat, torch.zeros(3, 4, 4, dtype=torch.float64))


def test_agreement_of_known_vectors():
    reference = torch.tensor([[2.0, 0.0]] * 4 + [[0.0, 0.0]])
    cosine, error = agreement(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0]]), reference)
    torch.testing.assert_close(cosine, torch.tensor([1, 1, 0, math.nan, math.nan]), equal_nan=True)
    torch.testing.assert_close(error, torch.tensor([0, 0.5, 2**0.5, 1, math.nan]), equal_nan=True)


# --- all differentiations of one problem ----------------------------------------------------------------------------


class Pulled(nn.Module):
    """L(Y; z) = ½ yᵀ A y - (B z)ᵀ y, with A given and B a parameter: Y* = A⁻¹ B z."""

    def __init__(self, matrix, link):
        super().__init__()
        self.matrix, self.link = matrix, nn.Parameter(link)

    def forward(self, elements, problem):
        flat = elements.flatten(1)
        pull = torch.einsum("ij,bi,bj->b", self.matrix, flat, flat)
        return 0.5 * pull - torch.einsum("ip,bp,bi->b", self.link, problem.latent, flat)


def quadratic_decoder(eigenvalues=(0.3, 0.5, 0.8, 1.2), *, differentiation=None, iterations=80):
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT
    link = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    descent = GradientDescent(iterations=iterations, learning_rate=0.8)
    decoder = IDSPN(Pulled(matrix, link), descent, differentiation, set_size=2, set_dim=2)
    latent, target = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((5, 3), (5, 2, 2)))
    return decoder.eval(), latent, target


def linear_loss(predicted, target):
    """Its slope, the target, is what is passed back."""
    return (predicted * target).flatten(1).sum(1)


def test_all_ways_on_a_quadratic_are_as_predicted():
    decoder, latent, target = quadratic_decoder(differentiation=Implicit(Identity()))
    result = compare_gradients(decoder, linear_loss, latent, target, steps=(1, 4))
    assert isinstance(decoder.differentiation, Implicit)  # put back
    assert result["smallest"] == pytest.approx([0.3] * 5)
    assert result["largest"] == pytest.approx([1.2] * 5)
    assert (result["damping"], result["singular"], result["iterations"]) == (0, False, 80)
    assert result["step_size"] == pytest.approx(1 / 1.2)
    assert max(result["residual"][-1]) < 1e-9 * max(result["residual"][0])

    matrix, link = decoder.objective.matrix, decoder.objective.link.detach()
    upstream = target.flatten(1)
    exact = torch.linalg.solve(matrix, upstream.mT).mT

    def series(terms, step):
        power = total = upstream
        for _ in range(terms - 1):
            power = power - step * power @ matrix
            total = total + power
        return step * total

    solutions = {
        OWN: upstream,
        "implicit, identity": upstream,
        "unrolled, last 1": series(1, 0.8),
        "unrolled, last 4": series(4, 0.8),
        "implicit, Neumann 1": series(1, 1 / 1.2),
        "implicit, Neumann 4": series(4, 1 / 1.2),
        "implicit, CG 4": exact,  # as many steps as numbers
        UNROLLED: exact,
        EXACT: exact,
    }
    assert set(solutions) == set(result["agreement"]) - {"implicit, CG 1"}
    for name, solution in solutions.items():
        found = result["agreement"][name]
        assert found["latent"]["cosine_to_unrolled"] == pytest.approx(found["latent"]["cosine"], abs=1e-7)
        outer = [torch.einsum("bi,bp->ip", v, latent).unsqueeze(0) for v in (solution, exact)]
        for part, pair in (("latent", (solution @ link, exact @ link)), ("parameters", outer)):
            for number, expected in zip(("cosine", "relative_error"), agreement(*pair), strict=True):
                assert found[part][number] == pytest.approx(expected.tolist(), abs=1e-7)
    assert result["agreement"]["implicit, identity"]["latent"]["cosine"] != pytest.approx([1.0] * 5, abs=1e-3)
    decoder.differentiation = Implicit(ConjugateGradient(iterations=4))
    result = compare_gradients(decoder, linear_loss, latent, target)
    assert result["agreement"][OWN]["latent"]["relative_error"] == pytest.approx([0.0] * 5, abs=1e-9)


def test_a_singular_hessian_is_damped_and_a_saddle_is_seen():
    decoder, latent, target = quadratic_decoder((0.0, 0.5, 0.8, 1.2), iterations=20)
    result = compare_gradients(decoder, linear_loss, latent, target)
    assert result["singular"]
    assert result["damping"] == pytest.approx(1.2e-6)
    asked = compare_gradients(decoder, linear_loss, latent, target, damping=0.5)
    assert (asked["singular"], asked["damping"]) == (False, 0.5)
    decoder, latent, target = quadratic_decoder((-0.5, 0.5, 0.8, 1.2), iterations=5)
    assert compare_gradients(decoder, linear_loss, latent, target)["smallest"] == pytest.approx([-0.5] * 5)


def test_what_cannot_be_compared_raises(monkeypatch):
    decoder, latent, target = quadratic_decoder()
    with pytest.raises(ValueError, match="expected a decoder in evaluation mode"):
        compare_gradients(decoder.train(), linear_loss, latent, target)
    decoder.eval()
    with pytest.raises(InputError, match="at least 1 descent step"):
        compare_gradients(decoder, linear_loss, latent, target, iterations=0)
    with pytest.raises(InputError, match=r"inner problem, .* got Linear"):
        compare_gradients(nn.Linear(2, 2), linear_loss, latent, target)
    monkeypatch.setattr(comparison, "MOST_NUMBERS", 3)
    with pytest.raises(InputError, match="at most 3 numbers, got 4"):
        compare_gradients(decoder, linear_loss, latent, target)


# --- the conclusions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eigenvalues", "differentiation", "options", "sentence"),
    [
        ((0.3, 0.5, 0.8, 1.2), None, {}, "well curved (largest to smallest curvature 4)"),
        ((0.3, 0.5, 0.8, 1.2), None, {"iterations": 2}, "far from an optimum"),
        ((0.3, 0.5, 0.8, 1.2), Implicit(Exact()), {}, "follows the exact one (cosine 1.00"),
        ((0.3, 0.5, 0.8, 1.2), None, {"damping": 0.1}, "damped by 0.1, as asked"),
        ((1e-5, 0.5, 0.8, 1.2), None, {}, "nearly flat"),
        ((0.0, 0.5, 0.8, 1.2), None, {}, "is singular"),
        ((-0.5, 0.5, 0.8, 1.2), None, {"iterations": 5}, "In 5 of 5 images the objective curves down"),
    ],
)
def test_the_conclusions_follow_the_numbers(eigenvalues, differentiation, options, sentence):
    decoder, latent, target = quadratic_decoder(eigenvalues, differentiation=differentiation)
    result = compare_gradients(decoder, linear_loss, latent, target, steps=[1], **options) | {"images": 5}
    found = " ".join(conclusions(result))
    assert sentence in found
    assert ("damped" in found) == (bool(options.get("damping")) or result["singular"])


# --- the command ----------------------------------------------------------------------------------------------------


def changed(checkpoint, tmp_path, change):
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    path = tmp_path / "changed.ckpt"
    save_checkpoint(content, path)
    return str(path)


def test_the_command_measures_a_checkpoint(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "check.json"
    result = check([str(checkpoint), "--images", "3", "--steps", "1", "2", "--json", str(out)])
    printed, found = capsys.readouterr().out, result["agreement"]
    assert json.loads(out.read_text())["agreement"] == found
    assert (result["images"], result["iterations"], result["loss"]) == (3, 3, "HungarianLoss")
    assert result["own"] == "Implicit(Identity())"
    assert [text for text in (*found, "3 images", "smallest") if text not in printed] == []
    assert found[EXACT]["latent"]["cosine"] == pytest.approx([1.0] * 3)
    assert found[UNROLLED]["latent"]["cosine_to_unrolled"] == pytest.approx([1.0] * 3)
    assert found[OWN] == found["implicit, identity"]
    assert found["unrolled, last 2"]["latent"]["cosine"] != found["unrolled, last 1"]["latent"]["cosine"]
    assert all(len(residual) == 3 and min(residual) > 0 for residual in result["residual"])
    assert len(result["residual"]) == 4
    again = check([str(checkpoint), "--images", "3", "--steps", "1", "2", "--iterations", "5", "--damping", "1e-4"])
    assert (again["iterations"], again["damping"]) == (5, 1e-4)


def test_the_loss_is_that_of_the_training(checkpoint, tmp_path):
    loss = DistributionalSlicedWasserstein(projections=4, seed=3, set_dim=CLEVR.set_dim)
    path = "setpred.losses.DistributionalSlicedWasserstein"

    def retrained(content):
        config = {"class_path": path, "init_args": {"projections": 4, "seed": 3, "set_dim": CLEVR.set_dim}}
        content[KEY]["settings"]["model"]["loss"] = config
        content["state_dict"] |= {f"loss.{name}": value for name, value in loss.state_dict().items()}

    file = changed(checkpoint, tmp_path, retrained)
    rebuilt = command.training_loss(torch.load(file, weights_only=True), [])
    assert not rebuilt.training
    a, b = torch.rand(2, 4, CLEVR.set_dim), torch.rand(2, 4, CLEVR.set_dim)
    with torch.no_grad():
        assert torch.equal(rebuilt(a, b), loss.eval()(a, b))
    assert check([file, "--images", "2", "--steps", "1"])["loss"] == "DistributionalSlicedWasserstein"
    bad = {"class_path": "setpred.losses.SinkhornDivergence", "init_args": {"epsilon": -1.0}}
    with pytest.raises(InputError, match="SinkhornDivergence cannot be built"):
        check([changed(checkpoint, tmp_path, lambda content: content[KEY]["settings"]["model"].update(loss=bad))])


def test_the_iterations_are_those_of_the_training():
    content = {KEY: {"settings": {"model": {"iterations_by_epoch": {"0": 10, "5": 40}}}}}
    assert [training_iterations(content | {"epoch": epoch}) for epoch in (4, 5)] == [10, 40]
    assert training_iterations({KEY: {}, "epoch": 5}) is None
