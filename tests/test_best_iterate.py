"""`Implicit(best=True)`: each example's iterate of least residual, and the implicit gradient at it."""

from __future__ import annotations

import io

import pytest
import torch
from problems import Given, Quadratic, close, normal
from tiny import built

from setpred.aggregators import FSPool, SetEncoder
from setpred.checkpoint.load import Checkpoint
from setpred.checkpoint.torch_export import export_program
from setpred.commands.gradients import described
from setpred.decoders import IDSPN
from setpred.encoders import SmallCNN
from setpred.errors import InputError
from setpred.inner import (
    ConjugateGradient,
    Exact,
    GradientDescent,
    Identity,
    Implicit,
    LatentMatching,
    Simplex,
    Unrolled,
    minimise,
)
from setpred.inner.diagnostics import Recorded, residual_norms
from setpred.model import SetPredictor
from setpred.schema import CLEVR

STEPS = 12


class Quartic(Quadratic):
    """L(y) = ½ yᵀ A y + ¼ Σ y⁴ - (B θ)ᵀ y, whose Hessian differs from point to point."""

    def energy(self, theta):
        quadratic = super().energy(theta)
        return lambda iterate: quadratic(iterate) + 0.25 * iterate.flatten(1).pow(4).sum(1)


def by_hand(problem, rate, **arguments):
    """Of each example the iterate of least residual norm, and its number."""
    recorded = Recorded(Unrolled())
    with torch.no_grad():
        problem.solve(problem.theta, recorded, iterations=STEPS, learning_rate=rate, **arguments)
    norms = residual_norms(recorded.energy, recorded.found, recorded.descent)
    norms = torch.where(norms.isfinite(), norms, torch.inf)
    chosen = norms.argmin(0)
    iterates = torch.stack(recorded.found)
    return iterates[chosen, torch.arange(len(chosen))], chosen


@pytest.mark.parametrize(
    ("rate", "arguments"),
    [(1.75, {}), (1.5, {"momentum": 0.9}), (3.0, {"clip": 0.5}), (1.0, {"momentum": 0.9, "projection": Simplex()})],
    ids=["plain", "momentum", "clipped", "on the simplex"],
)
def test_the_best_is_the_least_residual_of_all_iterates(rate, arguments):
    """With and without gradients, and for each example separately; each iterate is the best so far."""
    problem = Quadratic(batch=6, rows=2, dim=3, seed=4)
    expected, chosen = by_hand(problem, rate, **arguments)
    assert len(set(chosen.tolist())) > 1 or arguments.get("clip")
    for gradients in (True, False):
        recorded = Recorded(Implicit(best=True))
        with torch.set_grad_enabled(gradients):
            theta = problem.theta.clone().requires_grad_()
            found = problem.solve(theta, recorded, iterations=STEPS, learning_rate=rate, **arguments)
        close(found.detach(), expected, rtol=1e-13, atol=1e-13)
        norms = residual_norms(recorded.energy, recorded.found, recorded.descent)
        assert len(recorded.found) == STEPS + 1
        assert torch.equal(recorded.found[0], problem.initial)
        assert (norms.diff(dim=0) <= 1e-12).all()


@pytest.mark.parametrize(
    "solver", [Identity(), Exact(), ConjugateGradient(iterations=8)], ids=lambda s: type(s).__name__
)
def test_the_gradient_is_that_of_the_implicit_function_at_the_best_iterate(solver):
    """uᵀ dY/dθ = -vᵀ ∂(∇L)/∂θ = vᵀ B for H v = u with the Hessian H there; v = u for the identity."""
    problem = Quartic(seed=1)
    point, chosen = by_hand(problem, 0.9)
    assert (chosen < STEPS - 1).any()  # not where the last-but-one step would take it
    theta = problem.theta.clone().requires_grad_()
    found = problem.solve(theta, Implicit(solver, best=True), iterations=STEPS, learning_rate=0.9)
    upstream = normal(*found.shape)
    found.backward(upstream)
    hessian = problem.matrix + torch.diag_embed(3 * point.flatten(1).square())
    vector = upstream.flatten(1)
    if not isinstance(solver, Identity):
        vector = torch.linalg.solve(hessian, vector)
    close(theta.grad, torch.einsum("bip,bi->p", problem.link, vector))


def test_what_is_not_finite_counts_as_infinite_and_leaves_others_alone():
    """An example that overflows keeps what it had; one without a finite residual shows it."""
    problem = Quartic(batch=3, seed=6)
    problem.initial[1] *= 10  # y³ then runs away
    whole = problem.energy(problem.theta)

    def energy(iterate):
        broken = torch.tensor([0.0, 0.0, torch.nan], dtype=iterate.dtype)  # as a latent vector of NaN
        return whole(iterate) + broken * iterate.flatten(1).sum(1)

    arguments = {
        "descent": GradientDescent(iterations=STEPS, learning_rate=0.3),
        "differentiation": Implicit(best=True),
    }
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found = minimise(energy, problem.initial, **arguments).detach()
        last = minimise(energy, problem.initial, **arguments | {"differentiation": Implicit()}).detach()
        assert not last[1].isfinite().any()
        assert torch.equal(found[1], problem.initial[1])
        assert not found[2].isfinite().any()
        close(found[0], by_hand(problem, 0.3)[0][0], rtol=1e-13, atol=1e-13)


def decoder_of(rate=60.0, *, iterations=5, **arguments):
    torch.manual_seed(0)
    objective = LatentMatching(SetEncoder(FSPool(8, set_size=4), set_dim=CLEVR.set_dim, hidden_dim=8))
    descent = GradientDescent(iterations=iterations, learning_rate=rate)
    return IDSPN(objective, descent, Implicit(best=True), set_size=4, set_dim=CLEVR.set_dim, **arguments)


def test_a_configuration_asks_for_it(tmp_path):
    with pytest.raises(InputError, match="set compile or best to false"):
        decoder_of(compile=True)
    way = "--model.decoder.init_args.differentiation"
    decoder = built(tmp_path, f"{way}=setpred.inner.Implicit", f"{way}.init_args.best=true").model.model.decoder
    assert decoder.differentiation.best
    assert described(decoder.differentiation) == "Implicit(Identity(), best=True)"


@pytest.mark.slow
def test_a_compiled_or_exported_model_gives_the_best_too():
    decoder, latent = decoder_of().eval(), torch.randn(3, 8)
    decoder.start = Given(torch.randn(3, 4, CLEVR.set_dim))
    with torch.no_grad():
        expected = decoder(latent)
        found = torch.compile(decoder, backend="eager", fullgraph=True)(latent)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        decoder.differentiation = Implicit()
        assert not torch.allclose(decoder(latent), expected, atol=1e-3)
    model = SetPredictor(SmallCNN(image_size=16, latent_dim=8, width=4), decoder_of(1e4, iterations=2)).eval()
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    program = torch.export.load(io.BytesIO(export_program(Checkpoint(model, CLEVR, 0, 0, 0, 16, {})))).module()
    found, expected = program(images), model(images)
    model.decoder.differentiation = Implicit()
    assert not torch.allclose(model(images), expected, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
