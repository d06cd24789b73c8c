"""Scores of segmentations against slow twins and scikit-learn, by hand and by law; labels of masks; the metric."""

import math
from functools import partial

import pytest
import torch
from twins import adjusted_rand_twin, mean_best_overlap_twin, mean_iou_twin

from setpred.errors import NotFiniteError
from setpred.metrics import (
    AbsoluteError,
    AveragePrecision,
    Segmentation,
    adjusted_rand_index,
    contingency,
    masks_to_labels,
    mean_best_overlap,
    mean_iou,
)
from setpred.model import target_name
from setpred.schema import CLEVR
from setpred.training.task import Scores

SCORES = {
    "ari": (partial(adjusted_rand_index, foreground=False), partial(adjusted_rand_twin, foreground=False)),
    "fg_ari": (partial(adjusted_rand_index, foreground=True), partial(adjusted_rand_twin, foreground=True)),
    "mbo": (mean_best_overlap, mean_best_overlap_twin),
    "miou": (mean_iou, mean_iou_twin),
}
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14, equal_nan=True)


def label_maps(images, height, width, *, objects, masks, right=0.5, seed=0):
    """Predicted labels that agree with the instances at some pixels, and instances; some images lack some labels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most, *shape):
        return torch.randint(0, most, shape, generator=generator)

    instances = draw(objects + 1, images, height, width)
    hidden = draw(2, images, objects + 1).bool().gather(1, instances.flatten(1)).view_as(instances)
    instances = instances.masked_fill(hidden & (draw(2, images, 1, 1) == 0), 0)
    agree = torch.rand(instances.shape, generator=generator) < right
    return torch.where(agree, instances % masks, draw(masks, images, height, width)), instances


def all_scores(predicted, instances):
    return {name: score(predicted, instances) for name, (score, _) in SCORES.items()}


def of(*rows):
    """Label maps of one row of pixels each."""
    return torch.tensor(rows).unsqueeze(1)


# --- the functions ---


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(("objects", "masks"), [(3, 4), (5, 2), (1, 3), (2, 1), (0, 2), (4, 4)])
def test_scores_equal_their_twins(name, objects, masks):
    score, twin = SCORES[name]
    predicted, instances = label_maps(12, 4, 5, objects=objects, masks=masks)
    expected = torch.tensor([twin(*pair) for pair in zip(predicted, instances, strict=True)], dtype=torch.float64)
    close(score(predicted, instances.to(torch.uint8)), expected)


def test_the_rand_index_equals_that_of_scikit_learn():
    """In images of so many pixels that 32 bits do not hold their pairs."""
    rand = pytest.importorskip("sklearn.metrics").adjusted_rand_score
    predicted, instances = label_maps(4, 256, 250, objects=6, masks=7)
    predicted[0, 50:] = instances[0, 50:] = 0
    pairs = list(zip(predicted, instances, strict=True))
    everywhere = [rand(t.flatten(), p.flatten()) for p, t in pairs]
    close(adjusted_rand_index(predicted, instances, foreground=False).tolist(), everywhere)
    inside = [rand(t[t > 0], p[t > 0]) for p, t in pairs]
    close(adjusted_rand_index(predicted, instances, foreground=True).tolist(), inside)
    assert min(everywhere) > 0.05
    assert adjusted_rand_index(instances, instances, foreground=False).tolist() == [1.0] * 4


def test_numbers_of_labels_and_other_images_change_nothing():
    predicted, instances = label_maps(9, 6, 6, objects=4, masks=5)
    expected = all_scores(predicted, instances)
    generator = torch.Generator().manual_seed(1)
    for image in range(9):  # each in numbers that no other image has
        names = torch.randperm(1000, generator=generator) + 10**9 * image
        renamed = torch.cat([torch.zeros(1, dtype=torch.long), names[5:] + 1])
        pair = names[predicted[image]], renamed[instances[image]]
        close({name: value[image] for name, value in expected.items()}, {n: v[0] for n, v in _alone(*pair).items()})
        predicted[image], instances[image] = pair
    close(all_scores(predicted, instances), expected)
    turned = [each.transpose(1, 2).flip(2) for each in (predicted, instances)]
    close(all_scores(*turned), expected)


def _alone(predicted, instances):
    return all_scores(predicted.unsqueeze(0), instances.unsqueeze(0))


@pytest.mark.parametrize(
    ("predicted", "instances", "expected"),
    [
        # perfect, with the background as one mask or as two, which only "ari" sees
        ([7, 7, 3, 3, 5], [0, 0, 1, 1, 2], (1, 1, 1, 1)),
        ([7, 8, 3, 3, 5], [0, 0, 1, 1, 2], (8 / 13, 1, 1, 1)),
        # all in one mask: no better than at random
        ([4, 4, 4, 4, 4], [0, 1, 1, 2, 2], (0, 0, 0.4, 0.2)),
        # one object: a mask on it and on the background; two masks on it
        ([4, 4, 4, 4, 4], [0, 0, 0, 1, 1], (0, 1, 0.4, 0.4)),
        ([4, 4, 4, 4, 5], [0, 0, 0, 1, 1], (3 / 13, 0, 0.5, 0.5)),
        # more objects than masks: the third has no mask left
        ([0, 0, 1, 1, 1, 1], [1, 1, 2, 2, 3, 3], (4 / 9, 4 / 9, 2 / 3, 0.5)),
        # the best matching is not that of the best mask first
        ([0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 2, 2], (-4 / 23, -4 / 23, 0.45, 0.325)),
        # no object: one cluster on both sides, and on one
        ([2, 2, 2], [0, 0, 0], (1, math.nan, math.nan, math.nan)),
        ([2, 1, 2], [0, 0, 0], (0, math.nan, math.nan, math.nan)),
        # one pixel of an object; each pixel another cluster
        ([1, 1, 2], [0, 0, 1], (1, 1, 1, 1)),
        ([3, 1, 2], [3, 2, 1], (1, 1, 1, 1)),
    ],
)
def test_scores_by_hand(predicted, instances, expected):
    found = all_scores(of(predicted), of(instances))
    assert [float(value) for value in found.values()] == pytest.approx(expected, rel=1e-12, abs=1e-15, nan_ok=True)


def test_the_counts_are_those_of_the_pixels():
    counts = contingency(of([9, 4, 4], [4, 0, 9]), of([0, 2, 2], [2, 7, 0]))
    assert counts.tolist() == [[[0, 0, 1], [0, 2, 0], [0, 0, 0]], [[0, 0, 1], [0, 1, 0], [1, 0, 0]]]
    none = torch.zeros(0, 3, 3, dtype=torch.long)
    assert all(value.shape == (0,) for value in all_scores(none, none).values())


@pytest.mark.parametrize(
    ("predicted", "instances", "message"),
    [
        (of([0.0, 1.0]), of([0, 1]), r"expected integer predicted \[batch, H, W\], got torch.float32 \[1, 1, 2\]"),
        (of([0, 1]), of([False, True]), r"expected integer instances \[batch, H, W\], got torch.bool"),
        (torch.tensor([[0, 1]]), of([0, 1]), r"expected integer predicted \[batch, H, W\], got torch.int64 \[1, 2\]"),
        (of([0, 1, 1]), of([0, 1]), r"expected predicted labels \[1, 1, 2\] as the instances, got \[1, 1, 3\]"),
        (of([0, 1], [0, 1]), of([0, 1]), r"as the instances, got \[2, 1, 2\]"),
        (of([0, 1]), of([0, -2]), "expected instances of at least 0, got -2"),
        (of([-1, 1]), of([0, 2]), "expected predicted labels of at least 0, got -1"),
    ],
)
def test_label_maps_are_checked(predicted, instances, message):
    for score, _ in SCORES.values():
        with pytest.raises(ValueError, match=message):
            score(predicted, instances)


# --- labels of masks ---


def test_each_pixel_takes_its_largest_mask():
    masks = torch.rand(3, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    labels = masks_to_labels(masks, (6, 7))
    assert torch.equal(masks.gather(1, labels.unsqueeze(1)).squeeze(1), masks.amax(1))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(order[masks_to_labels(masks[:, order], (6, 7))], labels)
    levels = (3 * masks).floor()  # the first of equal masks
    assert torch.equal(masks_to_labels(levels, (6, 7)), (levels == levels.amax(1, keepdim=True)).int().argmax(1))


def test_smaller_masks_are_interpolated_between_the_centres_of_their_pixels():
    falling, constant = [1.0, 0.4], [0.5, 0.5]  # 1, 1, 0.925, 0.775, 0.625, 0.475, 0.4, 0.4
    masks = torch.tensor([[[falling], [constant]]])
    assert masks_to_labels(masks, (1, 8)).tolist() == [[[0, 0, 0, 0, 0, 1, 1, 1]]]
    down = masks_to_labels(masks.mT, (8, 3))
    assert down.tolist() == [[[label] * 3 for label in (0, 0, 0, 0, 0, 1, 1, 1)]]


def test_precision_does_not_make_masks_equal():
    masks = torch.rand(2, 6, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(masks_to_labels(1 + 1e-8 * masks, (32, 32)), masks_to_labels(masks, (32, 32)))
    half = masks.bfloat16()
    assert torch.equal(masks_to_labels(half, (32, 32)), masks_to_labels(half.double(), (32, 32)))


def test_supports_of_tokens_are_scored_at_the_size_of_the_image():
    grid = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]])
    tokens = torch.nn.functional.one_hot(grid).permute(0, 3, 1, 2).double()
    instances = grid.repeat_interleave(8, 1).repeat_interleave(8, 2)
    scores = all_scores(masks_to_labels(tokens, (32, 32)), instances)
    assert [float(value) for value in scores.values()] == [1.0] * 4


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(2, 3, 4), r"expected floating point masks \[batch, slots, h, w\], got torch.float32 \[2, 3, 4\]"),
        (torch.zeros(2, 0, 4, 4), r"got torch.float32 \[2, 0, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4).long(), "got torch.int64"),
        (torch.zeros(2, 3, 4, 5), r"expected masks of at most \[4, 4\] pixels, got \[4, 5\]"),
        (torch.zeros(2, 3, 5, 4), r"expected masks of at most \[4, 4\] pixels, got \[5, 4\]"),
    ],
)
def test_masks_are_checked(masks, message):
    with pytest.raises(ValueError, match=message):
        masks_to_labels(masks, (4, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_masks_that_are_not_finite_are_named(value):
    masks = torch.zeros(3, 2, 2, 2)
    masks[1, 0, 1, 1] = value
    with pytest.raises(NotFiniteError, match="samples 1 of the batch"):
        masks_to_labels(masks, (4, 4))


# --- the metric ---


def layers_of(labels, slots, seed=0):
    """Layers `[batch, slots, 4 · S²]` whose masks give these labels, under louder colours."""
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(len(labels), slots, *labels.shape[1:], generator=generator)
    alpha.scatter_add_(1, labels.unsqueeze(1), torch.ones(len(labels), 1, *labels.shape[1:]))
    colour = 9 * torch.randn(len(labels), slots, 3, *labels.shape[1:], generator=generator)
    return torch.cat([colour, alpha.unsqueeze(2)], dim=2).flatten(2)


def test_the_metric_is_the_mean_of_the_functions_for_any_batches_and_processes():
    predicted, instances = label_maps(11, 6, 6, objects=3, masks=5)
    instances[[2, 3, 10]] = 0  # batches with and without objects
    layers, instances = layers_of(predicted, 5), instances.to(torch.uint8)
    expected = {name: value.nanmean() for name, value in all_scores(predicted, instances).items()}
    for sizes in ([11], [1] * 11, [2, 2, 7], [10, 1]):
        metric = Segmentation()
        for ours, theirs in zip(layers.split(sizes), instances.split(sizes), strict=True):
            metric.update(ours.requires_grad_(), theirs)
        close(metric.compute(), expected)
    assert not any(value.requires_grad for value in metric.compute().values())
    one, other = Segmentation(), Segmentation()
    one.update(layers[:4], instances[:4])
    other.update(layers[4:], instances[4:])
    states = iter(other.metric_state.values())
    one.dist_sync_fn, one.distributed_available_fn = lambda state, group: [state, next(states)], lambda: True
    close(one.compute(), expected)
    metric.reset()
    metric.update(layers[:2], instances[:2])
    close(metric.compute(), {name: value.nanmean() for name, value in all_scores(predicted[:2], instances[:2]).items()})


def test_images_without_objects_leave_the_mean_over_objects_unknown():
    metric = Segmentation()
    metric.update(layers_of(torch.tensor([[[0, 0], [0, 0]], [[0, 1], [0, 1]]]), 3), torch.zeros(2, 2, 2).long())
    found = metric.compute()
    assert float(found["ari"]) == 0.5
    assert all(found[name].isnan() for name in ("fg_ari", "mbo", "miou"))


def test_layers_smaller_than_the_instances_are_enlarged():
    instances = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [2, 2, 3, 3], [2, 2, 3, 3]]])
    metric = Segmentation()
    metric.update(layers_of(instances[:, ::2, ::2], 4), instances)
    assert [float(value) for value in metric.compute().values()] == [1.0] * 4


def test_a_training_can_validate_by_the_metric():
    metric = Segmentation()
    scores = Scores(metric, None)
    assert (scores.monitor, scores.mode) == ("val_fg_ari", "max")
    labels = torch.tensor([[[0, 1], [2, 2]], [[2, 2], [1, 0]]])
    scores.update(torch.zeros(2), layers_of(labels, 3), {"instances": labels, "image": torch.zeros(2, 3, 2, 2)})
    assert {name: float(value) for name, value in scores.compute().items()} == {
        **{"val_loss": 0.0, "val_ari": 1.0, "val_fg_ari": 1.0, "val_mbo": 1.0, "val_miou": 1.0}
    }


def test_no_metric_keeps_a_tensor_of_a_worker():
    """Each would keep two file descriptors open; 512 batches of validation use up the usual 1,024."""
    scores, target = Scores(None, CLEVR), torch.zeros(2, 3, CLEVR.set_dim)
    scores.update(torch.zeros(2), torch.zeros(2, 3, CLEVR.set_dim), {"elements": target})
    kept = [each for part in scores.parts[1:] for each in part.target]
    assert len(kept) == 2
    assert target.data_ptr() not in [each.data_ptr() for each in kept]


def test_a_metric_that_keeps_its_targets_is_given_elements():
    metric = AveragePrecision(schema=CLEVR)
    metric.update(torch.zeros(2, 3, CLEVR.set_dim), torch.zeros(2, 4, CLEVR.set_dim))
    assert [target_name(part) for part in (metric, AbsoluteError(), None)] == ["elements"] * 3
    assert target_name(Segmentation()) == "instances"


@pytest.mark.parametrize(
    ("layers", "instances", "message"),
    [
        (torch.zeros(2, 3, 4 * 5), (2, 3, 3), r"expected layers \[batch, n, 4 · side²\], got \[2, 3, 20\]"),
        (torch.zeros(2, 3, 4 * 16), (2, 3, 3), r"expected masks of at most \[3, 3\] pixels, got \[4, 4\]"),
        (torch.zeros(2, 3, 4 * 9), (2, 3, 4), r"expected instances \[batch, S, S\], got \[2, 3, 4\]"),
        (torch.zeros(2, 3, 4 * 9), (2, 9), r"expected instances \[batch, S, S\], got \[2, 9\]"),
        (
            torch.zeros(1, 3, 4 * 9),
            (2, 3, 3),
            r"expected predicted labels \[2, 3, 3\] as the instances, got \[1, 3, 3\]",
        ),
    ],
)
def test_layers_and_instances_of_other_sizes_are_named(layers, instances, message):
    with pytest.raises(ValueError, match=message):
        Segmentation().update(layers, torch.zeros(instances, dtype=torch.uint8))


def test_layers_that_are_not_finite_are_named():
    layers = torch.zeros(3, 2, 16)
    layers[2, 1, 15] = math.nan
    with pytest.raises(NotFiniteError, match="samples 2 of the batch"):
        Segmentation().update(layers, torch.zeros(3, 2, 2, dtype=torch.uint8))
