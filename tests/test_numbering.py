"""Class-specific numbering: the world, loss and metric by hand and by brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import close, normal
from torch.autograd import gradcheck

from setpred.data.toy import Numbering
from setpred.errors import NotFiniteError
from setpred.losses import NumberingLoss
from setpred.metrics import NumberingAccuracy, right_numbers

SIZE, CLASSES = 6, 3


def world():
    return Numbering(train_sets=8, val_sets=4, batch_size=4, set_size=SIZE, classes=CLASSES)


def examples(count):
    """Inputs and targets in float64."""
    arrays = world().examples("val", count, np.random.default_rng(0))
    return torch.from_numpy(arrays["input"]).double(), torch.from_numpy(arrays["elements"]).double()


def numbering_orders(kinds):
    """All permutations of the elements within their classes."""
    places = [[i for i, kind in enumerate(kinds) if kind == k] for k in sorted(set(kinds))]
    for choice in itertools.product(*map(itertools.permutations, places)):
        order = list(range(len(kinds)))
        for mine, others in zip(places, choice, strict=True):
            for here, there in zip(mine, others, strict=True):
                order[here] = there
        yield order


# --- the world ----------------------------------------------------------------------------------------------------


def test_numbers_count_those_of_the_class_before():
    arrays = world().examples("train", 50, np.random.default_rng(3))
    assert arrays["input"].shape == (50, SIZE, CLASSES)
    assert arrays["elements"].shape == (50, SIZE, CLASSES + SIZE)
    assert all(array.dtype == np.float32 for array in arrays.values())
    for rows, targets in zip(arrays["input"], arrays["elements"], strict=True):
        seen = [0] * CLASSES
        for row, target in zip(rows.tolist(), targets.tolist(), strict=True):
            kind = row.index(1)
            expected = [0.0] * (CLASSES + SIZE)
            expected[kind] = expected[CLASSES + seen[kind]] = 1.0
            assert target == expected
            seen[kind] += 1


def test_classes_are_uniform():
    arrays = world().examples("train", 4000, np.random.default_rng(0))
    np.testing.assert_allclose(arrays["input"].mean((0, 1)), 1 / CLASSES, atol=0.02)


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["distance", "cross entropy"])
def loss(request):
    loss = NumberingLoss(classes=CLASSES, cross_entropy=request.param)
    assert loss.cross_entropy == request.param
    return loss


def test_the_loss_is_the_least_over_all_orders(loss):
    _, target = examples(4)
    predicted = normal(4, SIZE, SIZE)
    found = loss(predicted, target)
    for b in range(4):
        kinds, numbers = target[b, :, :CLASSES].argmax(-1).tolist(), target[b, :, CLASSES:].argmax(-1).tolist()

        def distance(row, number):
            if loss.cross_entropy:
                return float(row.exp().sum().log() - row[number])
            return math.sqrt(sum((float(y) - (k == number)) ** 2 for k, y in enumerate(row)))

        costs = [[distance(row, number) for number in numbers] for row in predicted[b]]
        values = [sum(costs[i][j] for i, j in enumerate(order)) / SIZE for order in numbering_orders(kinds)]
        assert found[b].item() == pytest.approx(min(values))


def test_gradients_of_the_loss(loss):
    _, target = examples(2)
    assert gradcheck(lambda p: loss(p, target), normal(2, SIZE, SIZE).requires_grad_())
    leaf = target[..., CLASSES:].clone().requires_grad_()  # of a right answer it is finite
    loss(leaf, target).sum().backward()
    assert torch.isfinite(leaf.grad).all() if loss.cross_entropy else (leaf.grad == 0).all()


def test_predictions_far_away_are_still_matched_within_classes(loss):
    """However much a swap between classes would save."""
    loss.classes = 2
    target = torch.tensor([[[1.0, 0, 1, 0, 0], [0.0, 1, 1, 0, 0], [0.0, 1, 0, 1, 0]]])
    predicted = torch.tensor([[[0.0, 1e6, 0], [1e6, 0.0, 0], [1e6, 0.0, 0]]])
    # the first wants number 0 and has 1; of the others both have 0 and one should have 1
    wrong, right = (1e6, 0.0) if loss.cross_entropy else (math.hypot(1e6, 1), 1e6 - 1)
    torch.testing.assert_close(loss(predicted, target), torch.tensor([(2 * wrong + right) / 3]))


def test_padding_of_targets_has_no_influence(loss):
    _, target = examples(3)
    predicted, keep = normal(3, SIZE, SIZE), torch.tensor([True, False, True, True, False, False])
    plain = predicted[:, keep].clone().requires_grad_()
    expected = loss(plain, target[:, keep])
    expected.sum().backward()
    padded = predicted.masked_fill(~keep[:, None], torch.nan).requires_grad_()
    found = loss(padded, target * keep[:, None])
    close(found, expected)
    found.sum().backward()
    close(padded.grad[:, keep], plain.grad)
    assert (padded.grad[:, ~keep] == 0).all()
    assert loss(predicted, 0 * target).tolist() == [0.0] * 3


def test_a_non_finite_prediction_is_named(loss):
    _, target = examples(3)
    predicted = normal(3, SIZE, SIZE)
    predicted[1, 2, 0] = torch.nan
    with pytest.raises(NotFiniteError) as raised:
        loss(predicted, target)
    assert raised.value.samples == [1]


def test_shapes_are_checked():
    _, target = examples(3)
    for check in (NumberingLoss(classes=CLASSES), NumberingAccuracy(classes=CLASSES).update):
        with pytest.raises(ValueError, match="3 \\+ numbers"):
            check(normal(3, SIZE, SIZE + 1), target)
        with pytest.raises(ValueError, match="expected predictions"):
            check(normal(3, SIZE - 1, SIZE), target)


# --- the metric ---------------------------------------------------------------------------------------------------


def test_right_is_the_most_that_any_matching_within_classes_makes_right():
    _, target = examples(30)
    # of few numbers, so that some are right
    answers = torch.randint(3, (30, SIZE), generator=torch.Generator().manual_seed(0))
    predicted = torch.eye(SIZE, dtype=torch.float64)[answers] + 0.1 * normal(30, SIZE, SIZE)
    right, total = right_numbers(predicted, target, classes=CLASSES)
    assert total.tolist() == [SIZE] * 30
    for given, example, found in zip(answers.tolist(), target, right.tolist(), strict=True):
        kinds, wanted = example[:, :CLASSES].argmax(-1).tolist(), example[:, CLASSES:].argmax(-1).tolist()
        assert found == max(sum(given[i] == wanted[j] for i, j in enumerate(o)) for o in numbering_orders(kinds))


def test_accuracy_is_of_sets_and_of_elements():
    _, target = examples(7)
    predicted = target[..., CLASSES:].clone()
    predicted[:3, 0] = predicted[:3, 0].roll(1, -1)  # a number too large
    right, total = right_numbers(predicted, target, classes=CLASSES)
    expected = {"all_right": pytest.approx(4 / 7), "right": pytest.approx((right / total).mean().item())}
    assert NumberingAccuracy(classes=CLASSES)(predicted, target) == expected
    order = next(itertools.islice(numbering_orders(target[0, :, :CLASSES].argmax(-1).tolist()), 1, None))
    found = NumberingAccuracy(classes=CLASSES)(target[:1, order, CLASSES:], target[:1])
    assert found == {"all_right": 1.0, "right": 1.0}


def test_accuracy_does_not_see_padding_and_a_swap_between_classes_is_wrong():
    _, target = examples(5)
    predicted = normal(5, SIZE, SIZE)
    expected = right_numbers(predicted[:, :4], target[:, :4], classes=CLASSES)
    target[:, 4:] = 0.0
    found = right_numbers(predicted.index_fill(1, torch.tensor([4, 5]), torch.nan), target, classes=CLASSES)
    assert all(map(torch.equal, found, expected))
    target = torch.tensor([[[1.0, 0, 1, 0], [1.0, 0, 0, 1], [0.0, 1, 1, 0]]])
    swapped = target[:, [0, 2, 1], 2:]
    assert right_numbers(swapped, target, classes=2)[0].tolist() == [1]
    assert NumberingLoss(classes=2)(swapped, target) > 0
