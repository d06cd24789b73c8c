"""Large sets, and many: same results as obvious code, with memory that does not grow with the pairs."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from twins import average_precision_per_image_twin, average_precision_twin

from setpred import matching
from setpred.matching import hungarian, pairwise_smooth_l1, pairwise_squared
from setpred.metrics import AveragePrecision, average_precision, average_precision_per_image
from setpred.metrics.average_precision import PAIRS_AT_ONCE
from setpred.schema import CLEVR

PROTOCOLS = [
    (average_precision, average_precision_twin),
    (average_precision_per_image, average_precision_per_image_twin),
]


def random_sets(images, set_size, *, noise, seed=0):
    """Targets with at least half of their elements present, and noisy predictions of them."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(images, set_size, CLEVR.set_dim, generator=generator)
    objects = torch.randint(set_size // 2, set_size + 1, (images, 1), generator=generator)
    target[..., -1] = (torch.arange(set_size) < objects).float()
    return target + noise * torch.randn(target.shape, generator=generator), target


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is made; views of earlier ones do not count."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        there = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        for made in tree_leaves(result):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in there:
                self.numbers = max(self.numbers, made.numel())
        return result


# --- matching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "size"), [(8, 64), (2, 256)])
@pytest.mark.parametrize("masked", [False, True])
def test_large_sets_are_matched_as_one_by_one(batch, size, masked):
    cost = torch.rand(batch, size, size, generator=torch.Generator().manual_seed(size))
    masks = [torch.rand(batch, size, generator=torch.Generator().manual_seed(seed)) < 0.8 for seed in (1, 2)]
    found = hungarian(cost, *masks) if masked else hungarian(cost)
    for number, (here, chosen) in enumerate(zip(cost, found, strict=True)):
        rows, columns = ((mask[number] if masked else torch.ones(size, dtype=bool)).nonzero()[:, 0] for mask in masks)
        i, j = map(torch.from_numpy, linear_sum_assignment(here[rows][:, columns]))
        expected = torch.full((size,), -1)
        expected[columns[j]] = rows[i]
        assert torch.equal(chosen, expected)


def test_costs_go_to_the_host_once_masks_included(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self.shape) or self)
    cost, mask = torch.rand(5, 4, 3), torch.ones(5, 3, dtype=bool)
    hungarian(cost)
    assert moved == [(5, 4, 3)]
    hungarian(cost, None, mask)
    assert moved[1:] == [(5, 4 * 3 + 4 + 3)]


@pytest.mark.parametrize("pairwise", [pairwise_smooth_l1, pairwise_squared])
def test_costs_of_few_examples_at_a_time_equal_those_of_all(pairwise, monkeypatch):
    predicted, target = random_sets(5, 64, noise=0.3)
    together = pairwise(predicted, target)
    monkeypatch.setattr(matching, "NUMBERS_AT_ONCE", 2 * predicted[0].numel() * 64)
    with Largest() as largest:
        assert torch.equal(pairwise(predicted, target), together)
    assert largest.numbers == matching.NUMBERS_AT_ONCE
    assert pairwise(predicted[:0], target[:0]).shape == (0, 64, 64)


# --- average precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "twin"), PROTOCOLS)
def test_30000_images_are_scored_as_the_150_that_they_repeat(protocol, twin):
    """Distinct presences, each k times: hits come k at a time, and precision rises within them to what it was."""
    few, times = 150, 200
    predicted, target = random_sets(few, CLEVR.max_objects, noise=0.05)
    rank = predicted[..., -1].flatten().argsort().argsort().view(few, -1)
    predicted[..., -1] = rank / rank.numel()  # all distinct
    expected = twin(predicted.tolist(), target.tolist(), (1.0, 0.5), CLEVR)
    assert 0.1 < expected[0.5] < expected[1.0] < 0.9
    many = (each.repeat(times, 1, 1) for each in (predicted, target))
    assert protocol(*many, thresholds=(1.0, 0.5), schema=CLEVR) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("protocol", [protocol for protocol, _ in PROTOCOLS])
@pytest.mark.parametrize(("images", "set_size"), [(8000, 10), (10, 256)])
def test_memory_grows_with_the_predictions_not_with_the_pairs(protocol, images, set_size):
    predicted, target = random_sets(images, set_size, noise=0.1)
    assert images * set_size**2 > 2 * PAIRS_AT_ONCE > 2 * images * set_size
    with Largest() as largest:
        protocol(predicted, target, schema=CLEVR)
    assert largest.numbers <= PAIRS_AT_ONCE


@pytest.mark.parametrize(("protocol", "twin"), PROTOCOLS)
def test_sets_of_64_are_scored_as_in_loops(protocol, twin):
    predicted, target = random_sets(4, 64, noise=0.1)
    metric = AveragePrecision(protocol, thresholds=(2.0,), schema=CLEVR)
    for start in (0, 1):
        metric.update(predicted[start::2], target[start::2])
    order = [0, 2, 1, 3]
    expected = twin(predicted[order].tolist(), target[order].tolist(), (2.0,), CLEVR)
    assert 0.1 < expected[2.0] < 0.9
    assert float(metric.compute()["ap_2"]) == expected[2.0]
