"""Box AP against COCO's own evaluator, against a slow twin, and by hand."""

import contextlib
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import built
from twins import box_average_precision_twin

from setpred.errors import InputError
from setpred.metrics import BoxAveragePrecision, box_average_precision
from setpred.metrics.box_precision import AREA_NAMES, NAMES, columns
from setpred.schema import CLEVR, ElementSchema, categorical, continuous
from setpred.training.task import SetPrediction

SIDE = 64.0
FIELDS = [continuous("coords", 2, scale=SIDE / 2, offset=SIDE / 2), continuous("extent", 2, scale=SIDE / 2)]
SCHEMA = ElementSchema("boxes", [*FIELDS, categorical("category", "cat", "dog", "hen", "absent")], max_objects=12)
CLASSES = len(SCHEMA.field("category").classes)


def random_boxes(seed, images=12, set_size=9, target_size=6, *, grid=False, present=0.6):
    """Real boxes, and predictions near them; on a grid of equal places, sizes and presences, or continuous."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(images, target_size, SCHEMA.set_dim)
    predicted = torch.zeros(images, set_size, SCHEMA.set_dim)
    for elements in (target, predicted):
        shape = elements.shape[:2]
        if grid:  # in eighths: sums and products are exact, also in the twin
            place = torch.randint(-4, 5, (*shape, 2), generator=generator) / 8
            side = torch.randint(2, 5, (*shape, 2), generator=generator) / 4
        else:
            place = torch.rand(*shape, 2, generator=generator) * 2 - 1
            side = torch.rand(*shape, 2, generator=generator) * 0.6 + 0.1
        elements[..., :2], elements[..., 2:4] = place, side
        kind = torch.randint(0, CLASSES - 1, shape, generator=generator)
        elements[..., 4:8] = torch.nn.functional.one_hot(kind, CLASSES)
    copied = target[:, torch.arange(set_size) % target_size].clone()
    if not grid:
        copied[..., :4] += 0.06 * torch.randn(copied[..., :4].shape, generator=generator)
        copied[..., 2:4].clamp_(min=0.02)
    agree = torch.rand(images, set_size, 1, generator=generator) < 0.7
    predicted = torch.where(agree, copied, predicted)
    score = torch.randint(0, 4, (images, set_size), generator=generator) / 2
    predicted[..., -1] = score if grid else torch.randn(images, set_size, generator=generator)
    target[..., -1] = (torch.rand(images, target_size, generator=generator) < present).float()
    target[0, :, -1] = 0  # an image without objects
    return predicted, target


def pycocotools_scores(predicted, target, schema=SCHEMA):
    """The numbers of COCOeval for the same boxes, and the AP of each class with real boxes."""
    coco_module = pytest.importorskip("pycocotools.coco")
    evaluator_of = pytest.importorskip("pycocotools.cocoeval").COCOeval
    names = schema.field("category").classes

    def boxes(elements):
        values = elements.double()
        centre, extent = schema.values(values, "coords"), schema.values(values, "extent")
        corner = centre - extent / 2
        return torch.cat([corner, extent], -1).tolist(), schema.values(values, "category").tolist()

    document = {
        "info": {},
        "images": [{"id": number} for number in range(len(target))],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
        "annotations": [],
    }
    found = []
    for image in range(len(target)):
        for row, box, kind in zip(target[image], *boxes(target[image]), strict=True):
            if row[-1] > 0.5:
                key = len(document["annotations"]) + 1
                record = {"id": key, "image_id": image, "category_id": kind, "bbox": box}
                document["annotations"].append(record | {"area": box[2] * box[3], "iscrowd": 0})
        for row, box, kind in zip(predicted[image], *boxes(predicted[image]), strict=True):
            found.append({"image_id": image, "category_id": kind, "bbox": box, "score": float(row[-1])})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_module.COCO()
        truth.dataset = document
        truth.createIndex()
        evaluator = evaluator_of(truth, truth.loadRes(found), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats, precision = evaluator.stats, evaluator.eval["precision"][:, :, :, 0, -1]
    means = [math.nan if stats[place] < 0 else stats[place] for place in (0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11)]
    real = {names[k]: precision[:, :, k].mean() for k in range(len(names)) if precision[0, 0, k] > -1}
    return means, real


CASES = [
    {},
    {"grid": True},
    {"set_size": 3, "target_size": 8},
    {"images": 2, "set_size": 140, "target_size": 30},  # more than 100 of a class in an image
    {"present": 0.05},
    {"grid": True, "images": 30, "present": 1.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_evaluator_of_coco(case):
    for seed in range(3):
        predicted, target = random_boxes(seed, **case)
        ours = box_average_precision(predicted, target, schema=SCHEMA)
        means, classes = pycocotools_scores(predicted, target)
        assert [ours[name] for name in NAMES] == pytest.approx(means[:6], abs=1e-6)
        assert {name: of["AP"] for name, of in ours["classes"].items()} == pytest.approx(classes, abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_areas_equal_the_evaluator_of_coco(case):
    """Boxes with sides from 10 to 180 pixels; on the grid from 32 to 128, with areas of exactly 32² and 96²."""
    seen = set()
    for seed, scale in enumerate((64.0, 128.0, 192.0) if case.get("grid") else (100.0, 160.0, 256.0)):
        fields = [replace(field, scale=scale, offset=scale if field.name == "coords" else 0.0) for field in FIELDS]
        schema = ElementSchema("large", [*fields, SCHEMA.field("category")], max_objects=12)
        predicted, target = random_boxes(seed, **case)
        ours = box_average_precision(predicted, target, schema=schema, areas=True)
        means, _ = pycocotools_scores(predicted, target, schema)
        found = [ours[name] for name in (*NAMES, *AREA_NAMES)]
        assert found == pytest.approx(means, abs=1e-6, nan_ok=True)
        plain = box_average_precision(predicted, target, schema=schema)
        assert [plain[name] for name in NAMES] == found[:6]
        seen |= set(columns(ours))
        assert all(set(of) == {*NAMES, *AREA_NAMES, "boxes"} for of in ours["classes"].values())
    assert seen >= set(AREA_NAMES) or case.get("present", 1) < 0.1


@pytest.mark.parametrize("case", [case for case in CASES if case.get("set_size", 0) < 100], ids=str)
def test_equals_the_twin(case):
    predicted, target = random_boxes(5, **case)
    ours = box_average_precision(predicted, target, schema=SCHEMA)
    theirs = box_average_precision_twin(predicted.tolist(), target.tolist(), SCHEMA)
    assert [ours[name] for name in NAMES] == pytest.approx(theirs, abs=1e-6, nan_ok=True)


def test_the_random_boxes_reach_every_case():
    predicted, target = random_boxes(0)
    scores = box_average_precision(predicted, target, schema=SCHEMA)
    assert 0.01 < scores["AP75"] < scores["AP50"] < 1
    assert scores["AR1"] < scores["AR10"]
    assert set(scores["classes"]) == {"cat", "dog", "hen"}  # a class without real boxes has no score


def box(x, y, width, height, kind="cat", presence=1.0):
    row = torch.from_numpy(SCHEMA.encode([{"coords": (x, y), "extent": (width, height), "category": kind}], 1))[0]
    row[-1] = presence
    return row


def test_by_hand():
    """IoU 0.8: right at the seven thresholds up to 0.80, or six; the second prediction finds nothing left."""
    target = torch.stack([box(16, 16, 16, 16), box(48, 48, 8, 8)])[None]
    predicted = torch.stack([box(16, 16, 16, 12.5, presence=3.0), box(16, 16, 16, 12, presence=2.0)])[None]
    scores = box_average_precision(predicted, target, schema=SCHEMA)
    half = 51 / 101  # precision 1 at the recalls 0, 0.01, ..., 0.5
    assert scores["AP50"] == scores["AP75"] == pytest.approx(half)
    assert scores["AP"] == pytest.approx(half * 6 / 10)
    assert scores["AR1"] == scores["AR100"] == pytest.approx(0.5 * 6 / 10)
    assert scores["classes"]["cat"]["boxes"] == 2


def test_corner_cases_have_a_value():
    predicted, target = random_boxes(1)
    nothing = box_average_precision(predicted, 0 * target, schema=SCHEMA)
    assert math.isnan(nothing["AP"])
    assert nothing["classes"] == {}
    assert box_average_precision(predicted[:, :0], target, schema=SCHEMA)["AP"] == 0
    assert math.isnan(box_average_precision(predicted, target[:, :0], schema=SCHEMA)["AP"])
    wild = predicted.clone()
    wild[1, 0, :4], wild[2, 0, 2:4] = math.inf, -1.0  # neither a box of any overlap
    assert 0 < box_average_precision(wild, target, schema=SCHEMA)["AP"] < 1
    with pytest.raises(InputError, match="schema 'clevr': expected boxes"):
        box_average_precision(torch.zeros(1, 2, 19), torch.zeros(1, 2, 19), schema=CLEVR)


def test_the_class_is_the_label_or_every_field_of_classes():
    colour, label = categorical("color", "red", "blue"), categorical("label", "cup", "jug")
    both = ElementSchema("both", [*FIELDS, colour, label], max_objects=2)
    assert [field.name for field in both.label] == ["label"]
    mixed = ElementSchema("mixed", [*FIELDS, colour, categorical("form", "round", "flat")], max_objects=2)
    place = {"coords": (3, 4), "extent": (5, 6)}
    rows = mixed.encode([place | {"color": "red", "form": "flat"}, place | {"color": "blue", "form": "round"}])
    elements = torch.from_numpy(rows)[None]
    assert list(box_average_precision(elements, elements, schema=mixed)["classes"]) == ["red flat", "blue round"]
    none = ElementSchema("none", FIELDS, max_objects=2)
    elements = torch.from_numpy(none.encode([place]))[None]
    assert box_average_precision(elements, elements, schema=none)["classes"]["object"]["AP"] == pytest.approx(1)


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_gathered_equals_the_function_for_any_batching(batch):
    predicted, target = random_boxes(2)
    metric = BoxAveragePrecision(schema=SCHEMA)
    for pair in zip(predicted.split(batch), target.split(batch), strict=True):
        metric.update(*pair)
    expected = box_average_precision(predicted, target, schema=SCHEMA)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == {f"box_{name.lower()}": expected[name] for name in NAMES}
    assert np.isfinite(found[metric.monitor])


def test_a_training_can_be_validated_by_it(tmp_path):
    """The metric takes the schema of the task, and rejects one without boxes before the training."""
    with pytest.raises(InputError, match="schema 'clevr': expected boxes"):
        built(tmp_path, "--model.metric=setpred.metrics.BoxAveragePrecision")
    metric = BoxAveragePrecision()
    with pytest.raises(InputError, match="expected a schema"):
        metric.update(*random_boxes(0))
    encoder, decoder = built(tmp_path).model.model.children()
    decoder.set_dim = SCHEMA.set_dim
    task = SetPrediction(encoder, decoder, schema=SCHEMA.to_dict(), metric=metric)
    assert (task.monitor, task.mode, task.metric.schema) == ("val_box_ap", "max", SCHEMA)
