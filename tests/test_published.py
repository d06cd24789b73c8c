"""Published definitions: numbers that the authors' code gives, and slow twins of what their papers define."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from setpred.decoders import MESH
from setpred.decoders.sinkhorn_mesh import entropy
from setpred.inner import Problem, Proximity
from setpred.matching import sinkhorn

CONFIGS = Path(__file__).parents[1] / "configs"

# a problem of 4 tokens and 3 slots, with more than one unit of mass on a token and on a slot
COST = [[[0.2, 1.1, 0.7], [1.4, 0.3, 0.9], [0.6, 0.8, 0.1], [1.0, 0.5, 1.3]]]
TOKEN_MASS, SLOT_MASS = [[1.6, 0.4, 0.3, 0.7]], [[1.7, 0.8, 0.5]]


def problem(*tensors):
    """As float64 that takes gradients."""
    return [torch.tensor(tensor, dtype=torch.float64, requires_grad=True) for tensor in tensors]


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def upstream(values):
    """Weights for a sum of values."""
    return torch.linspace(-1, 1, values.numel(), dtype=values.dtype).cos().view_as(values) - 0.8


def slopes(values, *tensors):
    """Gradients of the sum; zeros for a tensor that it does not depend on."""
    return torch.autograd.grad(values.sum(), tensors, retain_graph=True, allow_unused=True, materialize_grads=True)


def compare_slopes(found, expected, *tensors):
    for mine, theirs in zip(slopes(found, *tensors), slopes(expected, *tensors), strict=True):
        close(mine, theirs)


def random_problem(seed, tokens=6, slots=3, examples=4):
    """Costs and masses of equal sum, on average one unit a slot."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(examples, tokens, slots, dtype=torch.float64, generator=generator)
    scores = (torch.randn(examples, n, dtype=torch.float64, generator=generator) for n in (tokens, slots))
    return [tensor.requires_grad_() for tensor in (cost, *(slots * score.softmax(-1) for score in scores))]


# --- Sinkhorn (Cuturi, NeurIPS 2013; as in the released MESH) ---------------------------------------------------------


def scaled(cost, a, b, iterations, right=None):
    """P = diag(u) K diag(v) of one example, K = exp(-C), from v = 1; and v."""
    kernel, left, right = (-cost).exp(), torch.ones_like(a), torch.ones_like(b) if right is None else right
    for _ in range(iterations):
        left = a / (kernel @ right)
        right = b / (kernel.mT @ left)
    return left[:, None] * kernel * right, right


def test_sinkhorn_after_few_iterations_is_the_published_plan():
    cost, a, b = problem(COST, TOKEN_MASS, SLOT_MASS)
    after_two = [
        [1.11314955734, 0.2473361152085, 0.2496158975927],
        [0.1214328849357, 0.1993697636337, 0.07402007455043],
        [0.1456525375043, 0.06517157396123, 0.08878329531773],
        [0.3197650202197, 0.2881225471966, 0.08758073253913],
    ]
    close(sinkhorn(cost, a, b, epsilon=1.0, iterations=2).plan.detach(), [after_two])


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_sinkhorn_starts_at_scalings_of_one(iterations):
    """Plan and gradients of every number of iterations, at any temperature; the masses of the start have none.

    Slots without mass are as absent.
    """
    cost, a, b = random_problem(0)
    weights = upstream(cost)
    found = sinkhorn(cost, a, b, epsilon=0.5, iterations=iterations).plan
    expected = torch.stack([scaled(*of, iterations)[0] for of in zip(cost / 0.5, a, b, strict=True)])
    close(found, expected)
    compare_slopes(found * weights, expected * weights, cost, a, b)
    there, b = torch.tensor([0, 2]), (b * torch.tensor([1.0, 0.0, 1.0])).detach()
    alone = sinkhorn(cost[..., there], a, b[:, there], epsilon=0.5, iterations=iterations).plan
    close(sinkhorn(cost, a, b, epsilon=0.5, iterations=iterations).plan[..., there], alone)


# --- MESH (Zhang et al., ICML 2023; davzha/MESH) ----------------------------------------------------------------------


def transport_of(a, b):
    """Plans from costs and a start, by the released number of iterations."""
    return lambda cost, start: sinkhorn(cost, a, b, epsilon=1.0, iterations=5, start=start)


def test_mesh_sees_no_entropy_where_more_than_a_unit_is_carried():
    (plan,) = problem([[[0.5, 1.5], [0.1, 2.5]]])
    half, tenth = 0.5 * math.log(2), 0.1 * math.log(10)
    close(entropy(plan), [half + tenth])
    close(slopes(entropy(plan), plan)[0], [[[math.log(2) - 1, 0.0], [math.log(10) - 1, 0.0]]])


def test_mesh_takes_whole_steps_down_a_flat_entropy():
    """Published: a gradient of the mean entropy counts as one of norm 1 from a norm of 1e-12 on."""
    cost, a, b = problem([[[0.0, 17.0], [17.0, 0.0]]], [[1.0, 1.0]], [[1.0, 1.0]])
    transport = transport_of(a, b)
    (slope,) = slopes(entropy(transport(cost, None).plan) / 4, cost)
    assert 1e-12 < slope.norm() < 2e-6
    changed, _ = MESH(noise=0.0, iterations=1, step_size=8.0)(cost, transport, None)
    close((cost - changed).detach(), 8 * slope / slope.norm(), tolerance=1e-6)


def published_mesh(cost, a, b, iterations, step_size):
    """The plan of one example after the descent, by plain autograd.

    Gradients of the entropy are constants; the scalings that one plan hands to the next are not.
    """
    right = None
    for _ in range(iterations):
        plan, right = scaled(cost, a, b, 5, right)
        terms = -plan * plan.log()
        (slope,) = torch.autograd.grad(terms[plan < 1].sum(), cost, retain_graph=True)
        cost = cost - step_size * slope / slope.norm()
    return scaled(cost, a, b, 5, right)[0]


def mesh_plan(cost, a, b, **numbers):
    """The plan of ours."""
    transport = transport_of(a, b)
    return transport(*MESH(noise=0.0, **numbers)(cost, transport, None)).plan


def test_mesh_has_the_plan_and_the_gradients_of_the_released_code():
    cost, a, b = problem(COST, TOKEN_MASS, SLOT_MASS)
    weights = torch.tensor([[[1.0, -2, 3], [0.5, 1, -1], [2, 0, 1], [-1, 2, 0.5]]], dtype=torch.float64)
    plan = mesh_plan(cost, a, b)  # 4 steps of 8
    released = [
        [1.065645216507, 1.78616653088e-06, 0.4999957728883],
        [0.0003933263053659, 0.4169131950352, 4.165340352458e-06],
        [0.3005408086699, 4.477585982085e-09, 8.230378542618e-09],
        [0.3334206485182, 0.3830850143207, 5.354096285624e-08],
    ]
    of_cost = [
        [-0.004627660595212, 0.0009208086785336, 0.003706851916678],
        [-0.002237512358951, 0.002924853094589, -0.0006873407356379],
        [0.0004041873556681, 0.0003285434286507, -0.0007327307843186],
        [0.006460999824457, -0.004174222102775, -0.002286777721682],
    ]
    close(plan.detach(), [released])
    found = slopes(weights * plan, cost, a, b)
    close(found[0], [of_cost])
    close(found[1], [[1.014625119955, -2.679385733644, 2.314725462467, -1.780090767444]])
    close(found[2], [[0.1685284303518, 3.868926082619, 1.269852980913]])


@pytest.mark.parametrize(("iterations", "step_size"), [(1, 8.0), (4, 1.0), (4, 8.0)])
def test_mesh_is_its_definition_unrolled(iterations, step_size):
    cost, a, b = random_problem(2)
    found = mesh_plan(cost, a, b, iterations=iterations, step_size=step_size)
    each = zip(cost, a, b, strict=True)
    expected = torch.stack([published_mesh(*of, iterations, step_size) for of in each])
    assert expected.max() > 1
    weights = upstream(cost)
    close(found, expected)
    compare_slopes(weights * found, weights * expected, cost, a, b)
    with torch.no_grad():
        close(mesh_plan(cost, a, b, iterations=iterations, step_size=step_size), expected)


# --- iDSPN and DSPN (davzha/multiset-equivariance) --------------------------------------------------------------------


def test_proximity_is_the_published_regulariser():
    """0.1 · ½ mean_id (Y_id - Y₀_id)², by hand: squares of 1, 4, 0, 9, 1 and 1 make 0.05 · 16 / 6."""
    initial, elements = problem([[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]], [[[1.0, 3.0], [2.0, 0.0], [5.0, 4.0]]])
    given = Problem(latent=initial[:, 0], initial=initial)
    close(Proximity()(elements, given), [0.05 * 16 / 6])
    close(slopes(Proximity()(elements, given), elements)[0], 0.1 * (elements - initial) / 6)
    # padded sets are what they are alone
    mask = torch.tensor([[True, True, False]])
    close(Proximity()(elements, replace(given, mask=mask)), [0.05 * 14 / 4])
    close(Proximity()(elements, replace(given, mask=~mask.new_ones(1, 3))), [0.0])


def test_dspn_on_clevr_is_idspn_with_momentum_one_half_and_without_a_clip():
    """The authors' only CLEVR script of DSPN: 40 steps, 20 in the first half, as of iDSPN; its clip is not read."""
    idspn, dspn = (yaml.safe_load((CONFIGS / f"clevr_{name}.yaml").read_text()) for name in ("fspool", "dspn"))
    arguments = idspn["model"]["decoder"]["init_args"]
    arguments["descent"]["init_args"] = {"iterations": 40, "learning_rate": 1.0, "momentum": 0.5}
    arguments["differentiation"] = {"class_path": "setpred.inner.Unrolled"}
    assert dspn == idspn
    assert dspn["model"]["iterations_by_epoch"] == {0: 20, 50: 40}
