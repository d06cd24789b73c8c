"""Average precision against slow twins, by hand and by law; the report; the gathered metric."""

import itertools
import json
import math
from functools import partial

import pytest
import torch
from twins import average_precision_per_image_twin, average_precision_twin

from setpred.metrics import (
    THRESHOLDS,
    AveragePrecision,
    attribute_report,
    average_precision,
    average_precision_per_image,
    match_by_position,
    pairwise_distance,
    precision_recall,
    threshold_name,
)
from setpred.schema import CLEVR, ElementSchema, categorical, continuous

TOY = ElementSchema("toy", [continuous("at", 2, scale=2.0), categorical("kind", "a", "b")], max_objects=4)
ONLY_NUMBERS = ElementSchema("numbers", [continuous("at", 1)], max_objects=3)
ONLY_CLASSES = ElementSchema("classes", [categorical("kind", "a", "b", "c")], max_objects=3)
SCHEMAS = [CLEVR, TOY, ONLY_NUMBERS, ONLY_CLASSES]
TWINS = {average_precision: average_precision_twin, average_precision_per_image: average_precision_per_image_twin}
every_protocol = pytest.mark.parametrize("protocol", TWINS)
every_schema = pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)


def full_of_ties(schema, images, set_size, target_size, seed, present=0.6):
    """Sets on a coarse grid: equal presences, places, distances and class scores, some of it infinite."""
    generator = torch.Generator().manual_seed(seed)

    def grid(*shape, levels=3):
        return torch.randint(0, levels, shape, generator=generator) / 2

    target, predicted = grid(images, target_size, schema.set_dim), grid(images, set_size, schema.set_dim)
    if images and min(set_size, target_size):  # let many predictions agree with an object
        agree = torch.randint(0, target_size, (images, set_size), generator=generator)
        copied = target.gather(1, agree[..., None].expand(-1, -1, schema.set_dim)).clone()
        copied += 0.25 * (torch.rand(copied.shape, generator=generator) < 0.05)
        predicted = torch.where(torch.rand(images, set_size, 1, generator=generator) < 0.8, copied, predicted)
        predicted[torch.rand(predicted.shape, generator=generator) < 0.005] = math.inf
    predicted[..., -1] = grid(images, set_size, levels=4)
    target[..., -1] = (torch.rand(images, target_size, generator=generator) < present).float()
    target[target[..., -1] == 0] = math.nan  # padding may hold anything
    target[..., -1].nan_to_num_(0.0)
    return predicted, target


# --- average precision ---


@every_schema
@every_protocol
@pytest.mark.parametrize(
    ("images", "set_size", "target_size", "present"),
    [(25, 6, 6, 0.6), (25, 3, 7, 0.5), (25, 8, 2, 0.5), (4, 5, 5, 0.0), (3, 0, 4, 0.5), (3, 4, 0, 0.5), (0, 4, 4, 0.5)],
)
def test_equals_the_twin_exactly(schema, protocol, images, set_size, target_size, present):
    thresholds = (*THRESHOLDS, 1.5, math.sqrt(0.5))
    for seed in range(3):
        predicted, target = full_of_ties(schema, images, set_size, target_size, seed, present)
        scores = protocol(predicted, target, thresholds=thresholds, schema=schema)
        expected = TWINS[protocol](predicted.tolist(), target.tolist(), thresholds, schema)
        assert repr(scores) == repr(expected)  # equal, NaN too


def test_the_random_sets_reach_every_case():
    """The comparison above would be empty if nothing were ever hit or the protocols never differed."""
    predicted, target = full_of_ties(TOY, 25, 6, 6, seed=0)
    scores = average_precision(predicted, target, thresholds=THRESHOLDS, schema=TOY)
    assert 0 < scores[0.0625] < scores[1.0] < scores[math.inf] < 1
    assert scores != average_precision_per_image(predicted, target, schema=TOY)
    assert predicted.isinf().any()


def numbers(*rows):
    """One image of elements (place, presence)."""
    return torch.tensor([rows])


def both(predicted, target, *thresholds):
    """Scores by both protocols."""
    return [list(f(predicted, target, thresholds=thresholds, schema=ONLY_NUMBERS).values()) for f in TWINS]


def test_by_hand():
    """Hit, miss, hit: precisions 1, 1/2, 2/3 over two objects of three: (1 + 2/3) / 3."""
    target = numbers((0.0, 1.0), (10.0, 1.0), (20.0, 1.0))
    predicted = numbers((0.1, 0.9), (0.2, 0.8), (10.1, 0.7))
    of_all, per_image = both(predicted, target, 1.0, math.inf)
    assert of_all == pytest.approx(2 * [(1 + 2 / 3) / 3])
    # per image the second falls back on the object at 10, so that the third gets the one at 20
    assert per_image == pytest.approx([1 / 3, 1.0])
    recall, precision = precision_recall(predicted, target, 1.0, schema=ONLY_NUMBERS)
    assert recall.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])


def test_a_far_prediction_keeps_the_object_from_others_only_per_image():
    target = numbers((0.0, 1.0))
    assert both(numbers((3.0, 0.9), (0.1, 0.8)), target, 1.0) == [[0.5], [0.0]]
    for place in (math.inf, -math.inf):  # one at infinity never does
        assert both(numbers((place, 0.9), (0.1, 0.8)), target, 1.0, math.inf) == [[0.5, 0.5], [0.5, 0.5]]


def test_the_threshold_is_strict_and_infinity_means_finite():
    for place, expected in ((0.5, [0.0, 1.0]), (0.25, [1.0, 1.0]), (math.inf, [0.0, 0.0])):
        assert both(numbers((place, 1.0)), numbers((0.0, 1.0)), 0.5, math.inf) == [expected, expected]


def test_ties_of_presence_go_by_image_then_slot():
    target = torch.cat([numbers((0.0, 1.0)), numbers((0.0, 1.0))])
    miss_first = torch.cat([numbers((9.0, 0.7)), numbers((0.0, 0.7))])
    assert both(miss_first, target, 1.0)[0] == [0.25]
    assert both(miss_first.flip(0), target, 1.0)[0] == [0.5]


def test_an_image_without_objects_costs_the_data_set_but_not_the_mean_over_images():
    target = torch.cat([numbers((0.0, 0.0)), numbers((0.0, 1.0))])
    predicted = torch.cat([numbers((0.0, 0.9)), numbers((0.0, 0.8))])
    assert both(predicted, target, 1.0) == [[0.5], [1.0]]


@every_protocol
def test_order_within_sets_padding_and_scale_of_presence_do_not_matter(protocol):
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(30, 6, CLEVR.set_dim, generator=generator)
    target[..., -1] = (torch.rand(30, 6, generator=generator) < 0.7).float()
    predicted = target + 0.05 * torch.randn(target.shape, generator=generator)
    score = partial(protocol, schema=CLEVR)
    scores = score(predicted, target)
    shuffled = score(predicted[:, torch.randperm(6)], target[:, torch.randperm(6)])
    padded = score(predicted, torch.cat([target, torch.zeros(30, 4, CLEVR.set_dim)], 1))
    predicted[..., -1] = 5 * predicted[..., -1] - 3  # strictly rising
    assert scores == shuffled == padded == score(predicted, target)
    assert 0 < scores[0.25] < scores[1.0] < 1
    assert set(score(target, target).values()) == {1.0}
    assert set(score(target[:, :0], target).values()) == {0.0}


def test_area_of_the_curve_is_the_average_precision():
    predicted, target = full_of_ties(TOY, 25, 6, 6, seed=4)
    for threshold, score in average_precision(predicted, target, schema=TOY).items():
        recall, precision = precision_recall(predicted, target, threshold, schema=TOY)
        steps = torch.diff(recall, prepend=recall.new_zeros(1))
        envelope = precision.flip(0).cummax(0).values.flip(0)
        assert float((steps * envelope).sum()) == pytest.approx(score, abs=1e-12)


@every_protocol
@pytest.mark.parametrize("batch", [1, 7, 30])
def test_gathered_equals_the_function_for_any_batching(protocol, batch):
    predicted, target = full_of_ties(TOY, 30, 5, 6, seed=5)
    metric = AveragePrecision(protocol, schema=TOY)
    for pair in zip(predicted.split(batch), target.split(batch), strict=True):
        metric.update(*pair)
    expected = protocol(predicted, target, schema=TOY)
    gathered = {name: value.item() for name, value in metric.compute().items()}
    assert gathered.pop("ap") == pytest.approx(sum(expected.values()) / len(expected), rel=1e-12)
    assert gathered == {f"ap_{threshold_name(threshold)}": score for threshold, score in expected.items()}
    metric.reset()
    one = metric(predicted[:3], target[:3])  # forward: the score of the batch alone
    assert one["ap_inf"].item() == protocol(predicted[:3], target[:3], schema=TOY)[math.inf]


@every_protocol
def test_bad_input_is_named(protocol):
    predicted, target = full_of_ties(TOY, 5, 3, 3, seed=6)
    target = target.nan_to_num(0.0)
    with_nan, infinite = predicted.clone(), target.clone()
    with_nan[2, 1, 0] = with_nan[4, 0, -1] = math.nan
    infinite[3, 0] = math.inf
    for given, message in (
        ((predicted[..., 1:], target), r"expected floating point predicted .*, 5\], got .*\[5, 3, 4\]"),
        ((predicted, target.long()), r"got torch\.int64"),
        ((predicted, target[:4]), "got 5 and 4"),
        ((with_nan, target), "NaN in 2 images, first image 2"),
        ((predicted, infinite), "first in image 3"),
    ):
        with pytest.raises(ValueError, match=message):
            protocol(*given, schema=TOY)
    with pytest.raises(ValueError, match="thresholds over 0"):
        protocol(predicted, target, thresholds=(-1,), schema=TOY)


# --- the report ---


def kinds(*rows):
    """One image of toy elements (x, y, kind, presence), x and y in real units."""
    return torch.tensor([[[x / 2, y / 2, kind == "a", kind == "b", presence] for x, y, kind, presence in rows]])


def test_report_by_hand():
    target = kinds((0, 0, "a", 1), (4, 0, "b", 1), (9, 9, "b", 1), (0, 0, "a", 0))
    predicted = kinds((4, 3, "a", 0.9), (0, 1, "a", 0.8), (9, 9, "b", 0.1), (5, 5, "a", 0.7))
    report = attribute_report(predicted, target, torch.tensor([[1, 0, 2, 3]]), thresholds=THRESHOLDS, schema=TOY)
    third, off, none = pytest.approx(1 / 3), pytest.approx(4 / 3), {"mean": 0.0, "median": 0.0, "bias": 0.0}
    within = report.pop("within")
    assert (within["inf"], within["1"]) == (1.0, third)
    assert report == {
        "images": 1,
        "objects": 3,
        "accuracy": {"kind": pytest.approx(2 / 3)},
        "all_attributes": pytest.approx(2 / 3),
        "confusion": {"kind": [[1, 0], [1, 1]]},
        "distance": {"mean": off, "median": 1.0, "p90": 3.0, "p99": 3.0},
        "unit": "",
        "errors": {},
        "axis_errors": {"at": [none, {"mean": off, "median": 1.0, "bias": off}]},
        "presence_accuracy": 0.5,  # slot 2 is too shy, slot 3 too bold
        "found": pytest.approx(2 / 3),
        "count_error": 0.0,
        "count_exact": 1.0,
    }
    assert json.loads(json.dumps(report)) == report


@every_schema
def test_report_of_perfect_and_of_no_objects(schema):
    generator = torch.Generator().manual_seed(7)
    target = torch.rand(8, 5, schema.set_dim, generator=generator)
    target[..., -1] = (torch.rand(8, 5, generator=generator) < 0.6).float()
    shuffle = torch.stack([torch.randperm(5, generator=generator) for _ in target])
    predicted = torch.empty_like(target).scatter_(1, shuffle[..., None].expand_as(target), target)
    report = attribute_report(predicted, target, shuffle, schema=schema)
    assert all(share == 1.0 for share in report["accuracy"].values())
    assert report["distance"]["p99"] == report["count_error"] == 0.0
    assert report["all_attributes"] == report["presence_accuracy"] == report["found"] == 1.0
    nothing = attribute_report(predicted, torch.zeros_like(target), shuffle, schema=schema)
    assert nothing["objects"] == 0
    assert math.isnan(nothing["distance"]["mean"])
    assert math.isnan(nothing["found"])


def test_matches_by_position_do_not_depend_on_the_unit():
    """In pixels of a large image, with predictions that are hundreds of pixels off."""
    large = ElementSchema("large", [continuous("coords", 2, scale=2000.0, offset=2000.0)], max_objects=40)
    places = [{"coords": (100.0 * k, 3000.0)} for k in range(40)]
    target = torch.from_numpy(large.encode(places))[None]
    predicted = torch.from_numpy(large.encode([{"coords": (x["coords"][0] + 10, 2700.0)} for x in places]))[None]
    assert match_by_position(predicted.flip(1), target, schema=large).tolist() == [list(range(39, -1, -1))]


def test_match_by_position_is_the_best_of_all_and_prefers_confident_slots():
    generator = torch.Generator().manual_seed(8)
    target = torch.randn(20, 3, TOY.set_dim, generator=generator)
    predicted = torch.randn(20, 4, TOY.set_dim, generator=generator)
    target[..., -1] = (torch.rand(20, 3, generator=generator) < 0.7).float()
    predicted[..., -1] = torch.rand(20, 4, generator=generator)
    distance = pairwise_distance(predicted, target, schema=TOY)
    confident, real = predicted[..., -1] > 0.5, target[..., -1] > 0.5
    for image, assignment in enumerate(match_by_position(predicted, target, schema=TOY)):
        slots = real[image].nonzero().flatten().tolist()

        def badness(chosen, image=image, slots=slots):
            shy = sum(not confident[image, i] for i in chosen)
            return shy, sum(float(distance[image, i, j]) for i, j in zip(chosen, slots, strict=True))

        best = min(itertools.permutations(range(4), len(slots)), key=badness)
        assert assignment.tolist() == [best[slots.index(j)] if j in slots else -1 for j in range(3)]


def test_a_predicted_set_too_small_leaves_objects_without_partner():
    target = kinds((0, 0, "a", 1), (4, 0, "b", 1), (9, 9, "b", 1))
    predicted = kinds((4, 1, "b", 0.9), (0, 0, "b", 0.2))
    assignment = match_by_position(predicted, target, schema=TOY)
    assert assignment.tolist() == [[1, 0, -1]]
    report = attribute_report(predicted, target, assignment, schema=TOY)
    assert (report["objects"], report["found"], report["count_error"]) == (3, pytest.approx(1 / 3), 2.0)
    assert report["accuracy"] == {"kind": 0.5}  # over the two that have a partner
    assert match_by_position(predicted[:, :0], target, schema=TOY).tolist() == [[-1, -1, -1]]
    assert match_by_position(predicted, target[:, :0], schema=TOY).shape == (1, 0)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (torch.tensor([[0, 0]]), "one-to-one"),
        (torch.tensor([[0, 2]]), r"slots in -1\.\.1, got 0\.\.2"),
        (torch.tensor([[0.0, 1.0]]), "expected long assignment"),
        (torch.tensor([[0, 1, 2]]), r"expected long assignment \[1, 2\], got torch.int64 \[1, 3\]"),
    ],
)
def test_assignments_are_checked(assignment, message):
    target = kinds((0, 0, "a", 1), (4, 0, "b", 1))
    with pytest.raises(ValueError, match=message):
        attribute_report(target, target, assignment, schema=TOY)
