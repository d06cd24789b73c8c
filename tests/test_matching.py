"""Assignments against brute force, transport plans against their definition."""

import itertools

import pytest
import torch
from problems import normal
from torch.testing import assert_close

from setpred.errors import NotFiniteError
from setpred.matching import hungarian, sinkhorn


def uniform(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the Hungarian algorithm ---


@pytest.mark.parametrize("targets", [1, 3, 4])
def test_hungarian_is_the_least_of_all_assignments(targets):
    cost = normal(20, 4, targets, seed=targets)
    found = hungarian(cost)
    assert found.dtype == torch.int64
    for costs, assignment in zip(cost.tolist(), found.tolist(), strict=True):
        choices = itertools.permutations(range(4), targets)
        assert tuple(assignment) == min(choices, key=lambda chosen: sum(costs[i][j] for j, i in enumerate(chosen)))


def test_masked_assignment_is_that_of_the_present():
    cost, rows, columns = normal(6, 5, 4), normal(6, 5, seed=1) > -0.3, normal(6, 4, seed=2) > -0.3
    cost[~(rows[:, :, None] & columns[:, None])] = torch.nan
    found = hungarian(cost, rows, columns)
    for b in range(6):
        i, j = rows[b].nonzero().flatten(), columns[b].nonzero().flatten()
        taken = found[b][found[b] >= 0]
        assert len(taken) == len(taken.unique()) == min(len(i), len(j))
        assert set(taken.tolist()) <= set(i.tolist())
        assert (found[b][~columns[b]] == -1).all()
        few, many = (cost[b, i][:, j], len(i)) if len(i) >= len(j) else (cost[b, i][:, j].T, len(j))
        least = min(sum(few[r, c] for c, r in enumerate(p)) for p in itertools.permutations(range(many), few.shape[1]))
        assert_close(sum(cost[b, found[b, k], k] for k in j if found[b, k] >= 0), least)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    "cost", [[[1.0, 1.0 + 1e-12], [1.0, 1.0]], [[1e39, 2e39], [3e39, 1e39]]], ids=["fine", "large"]
)
def test_hungarian_keeps_the_precision_and_range_of_float64(cost, masked):
    """The identity is best, by differences and at sizes that float32 does not have."""
    masks = [torch.ones(1, 2, dtype=torch.bool)] * 2 if masked else []
    for order in ([0, 1], [1, 0]):
        assert hungarian(torch.tensor([cost], dtype=torch.float64)[:, order], *masks).tolist() == [order]


def test_hungarian_of_what_is_no_cost():
    cost = torch.zeros(5, 2, 2)
    cost[1, 0, 1], cost[4, 1, 1] = torch.nan, torch.inf
    with pytest.raises(NotFiniteError, match="samples 1, 4") as caught:
        hungarian(cost)
    assert caught.value.samples == [1, 4]
    for shape in ((2, 3), (2, 2, 3)):
        with pytest.raises(ValueError, match="expected cost"):
            hungarian(torch.zeros(shape))
    assert hungarian(torch.zeros(0, 3, 3)).shape == (0, 3)
    assert hungarian(torch.zeros(2, 3, 0)).shape == (2, 0)


# --- Sinkhorn's algorithm (its gradients are tested in test_published.py) ---


def test_sinkhorn_plan_has_the_given_marginals():
    cost, a, b = uniform(3, 4, 5), uniform(3, 4, seed=1), uniform(3, 5, seed=2)
    a[1, 2] = b[1, 0] = 0
    a, b = (7 * mass / mass.sum(-1, keepdim=True) for mass in (a, b))
    short, long = (sinkhorn(cost, a, b, epsilon=0.1, iterations=iterations).plan for iterations in (1, 400))
    assert_close(short.sum(1), b)
    assert_close(long.sum(1), b)
    assert_close(long.sum(2), a)
    assert (long >= 0).all()
    assert (long[1, 2] == 0).all()
    assert (long[1, :, 0] == 0).all()
    a[0] = 0
    assert (sinkhorn(cost, a, b, epsilon=0.1, iterations=3).plan[0] == 0).all()


def test_sinkhorn_continues_from_a_start():
    cost = normal(3, 4, 6)
    first = sinkhorn(cost, epsilon=0.5, iterations=3)
    assert_close(sinkhorn(cost, epsilon=0.5, iterations=4, start=first), sinkhorn(cost, epsilon=0.5, iterations=7))


def test_sinkhorn_minimises_its_objective():
    """No feasible change of the plan lowers ⟨P, C⟩ + ε KL(P | abᵀ)."""
    cost, epsilon = normal(1, 3, 3), 0.3
    plan = sinkhorn(cost, epsilon=epsilon, iterations=500).plan

    def objective(plan):
        return (plan * cost).sum() + epsilon * (plan * (9 * plan).log()).sum()

    for i, k, j, n in itertools.product(range(3), repeat=4):
        change = torch.zeros_like(plan)
        for row, column, sign in ((i, j, 1), (k, n, 1), (i, n, -1), (k, j, -1)):
            change[0, row, column] += sign * 1e-4
        assert objective(plan + change) >= objective(plan) - 1e-14


@pytest.mark.parametrize("options", [{"epsilon": 0.0, "iterations": 1}, {"epsilon": 1.0, "iterations": -1}])
def test_sinkhorn_checks_its_arguments(options):
    with pytest.raises(ValueError, match="epsilon > 0"):
        sinkhorn(torch.zeros(1, 2, 2), **options)
    with pytest.raises(ValueError, match="expected masses"):
        sinkhorn(torch.zeros(1, 2, 2), torch.zeros(1, 3), epsilon=1.0, iterations=1)
