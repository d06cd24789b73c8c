"""Matching against brute force, losses against slow twins."""

import itertools

import pytest
import torch
from problems import finite_difference

from setpred.errors import NotFiniteError
from setpred.losses import ChamferLoss, HungarianLoss
from setpred.matching import hungarian, pairwise_smooth_l1

GENERATOR = torch.Generator()


@pytest.fixture
def pair():
    GENERATOR.manual_seed(0)
    return (torch.randn(6, 4, 3, dtype=torch.float64, generator=GENERATOR) for _ in range(2))


def smooth_l1(error):
    return 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5


def test_pairwise_cost_is_the_definition(pair):
    predicted, target = (2 * elements for elements in pair)  # both branches of the smooth L1
    cost = pairwise_smooth_l1(predicted, target[:, :3])
    for b, i, j in itertools.product(range(6), range(4), range(3)):
        errors = (predicted[b, i] - target[b, j]).tolist()
        assert cost[b, i, j].item() == pytest.approx(sum(map(smooth_l1, errors)) / 3)


@pytest.mark.parametrize("targets", [1, 3, 4])
def test_hungarian_is_the_least_of_all_assignments(targets):
    GENERATOR.manual_seed(targets)
    cost = torch.randn(20, 4, targets, dtype=torch.float64, generator=GENERATOR)
    found = hungarian(cost)
    assert found.dtype == torch.int64
    for b in range(len(cost)):
        totals = {
            assignment: sum(cost[b, i, j].item() for j, i in enumerate(assignment))
            for assignment in itertools.permutations(range(4), targets)
        }
        assert tuple(found[b].tolist()) == min(totals, key=totals.get)


def test_a_cost_that_is_not_finite_names_the_samples():
    cost = torch.zeros(5, 2, 2)
    cost[1, 0, 1] = torch.nan
    cost[4, 1, 1] = torch.inf
    with pytest.raises(NotFiniteError, match="samples 1, 4") as caught:
        hungarian(cost)
    assert caught.value.samples == [1, 4]


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)])
def test_bad_cost_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="expected cost"):
        hungarian(torch.zeros(shape))


def test_empty_batches_and_sets():
    assert hungarian(torch.zeros(0, 3, 3)).shape == (0, 3)
    assert hungarian(torch.zeros(2, 3, 0)).shape == (2, 0)


def test_hungarian_loss_against_brute_force(pair):
    predicted, target = pair
    loss = HungarianLoss()(predicted, target)
    cost = pairwise_smooth_l1(predicted, target)
    for b in range(6):
        least = min(sum(cost[b, i, j] for j, i in enumerate(p)) / 4 for p in itertools.permutations(range(4)))
        torch.testing.assert_close(loss[b], least)


@pytest.mark.parametrize("loss", [HungarianLoss(), ChamferLoss()], ids=["hungarian", "chamfer"])
def test_losses_do_not_see_the_order_and_are_zero_at_the_target(loss, pair):
    predicted, target = pair
    expected = loss(predicted, target)
    assert expected.shape == (6,)
    torch.testing.assert_close(loss(predicted[:, [2, 0, 3, 1]], target[:, [1, 3, 2, 0]]), expected)
    torch.testing.assert_close(loss(target[:, [3, 1, 0, 2]], target), torch.zeros(6, dtype=torch.float64))
    # example by example
    torch.testing.assert_close(loss(predicted[2:3], target[2:3]), expected[2:3])


@pytest.mark.parametrize("loss", [HungarianLoss(), ChamferLoss()], ids=["hungarian", "chamfer"])
def test_gradients_by_finite_differences(loss, pair):
    predicted, target = pair
    leaf = predicted.clone().requires_grad_()
    loss(leaf, target).sum().backward()
    expected = finite_difference(lambda p: loss(p, target).sum(), predicted)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-8)


def test_chamfer_is_the_definition_and_blind_to_multiplicity():
    a, b = torch.tensor([0.0]), torch.tensor([4.0])
    one, other = torch.stack([a, a, b]).unsqueeze(0), torch.stack([a, b, b]).unsqueeze(0)
    assert ChamferLoss()(one, other).item() == 0
    assert HungarianLoss()(one, other).item() == pytest.approx(3.5 / 3)
    single = torch.stack([a, a, a]).unsqueeze(0)
    # targets: 0, 0 and 4 to the nearest 0; predictions: all at 0
    assert ChamferLoss()(single, one).item() == pytest.approx(0.5 * 3.5 / 3)


def test_predictions_left_over_are_not_free():
    with pytest.raises(ValueError, match="3 predicted and 2 target"):
        HungarianLoss()(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4))


def test_sets_of_other_element_sizes_are_refused():
    with pytest.raises(ValueError, match="equal batch and element size"):
        HungarianLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
