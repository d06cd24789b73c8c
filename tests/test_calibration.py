"""Confidence: strictly rising with the presence, fitted to the share that is right, and stored in checkpoints."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from test_box_precision import SCHEMA, random_boxes
from tiny import built, untrained

from setpred.checkpoint.load import KEY, load_checkpoint, save_checkpoint
from setpred.checkpoint.release import export
from setpred.errors import InputError
from setpred.evaluation import Predictions, format_report, report
from setpred.metrics import average_precision, fit_calibration, reliability, right_predictions
from setpred.metrics.calibration import LEAST_SLOPE
from setpred.schema import CLEVR, UNCALIBRATED, Calibration, ElementSchema, continuous
from setpred.visualise.predictions import compare

POINTS = ElementSchema("points", [continuous("coords", 2, scale=30.0)], max_objects=4)


def drawn(calibration, count=20_000, seed=0):
    """Presences, and whether each is right with the probability that the calibration gives."""
    generator = np.random.default_rng(seed)
    presence = generator.normal(0.6, 0.5, count)
    return torch.from_numpy(presence), torch.from_numpy(generator.random(count) < calibration.confidence(presence))


@pytest.mark.parametrize("calibration", [UNCALIBRATED, Calibration(0.05, -3.0), Calibration(25.0, 2.0)])
def test_the_confidence_rises_strictly_with_the_presence(calibration):
    """Also from one float32 number to the next, where a clip would make ties."""
    coarse = np.linspace(-1, 1.3, 2000, dtype=np.float32)
    presence = np.unique(np.concatenate([coarse, np.nextafter(coarse, np.float32(9))]))
    confidence = calibration.confidence(presence)
    assert (np.diff(confidence) > 0).all()
    assert 0 < confidence[0] < confidence[-1] < 1
    assert np.array_equal(calibration.confidence(torch.from_numpy(presence)), confidence)


def test_without_a_fit_one_half_stays_one_half():
    assert UNCALIBRATED.confidence(0.5) == 0.5
    rows = POINTS.encode(4 * [{"coords": (0, 0)}])
    rows[:, -1] = [1.1, 0.499, 1.2, 0.501]

    def found(**options):
        return [obj["confidence"] for obj in POINTS.decode(rows, **options)]

    assert found() == found(threshold=0.5) == UNCALIBRATED.confidence(rows[[2, 0, 3], -1]).tolist()
    shy = Calibration(8.0, -5.0)  # of a model whose objects are mostly wrong: the same objects, of lower confidence
    assert found(calibration=shy) == shy.confidence(rows[[2, 0, 3], -1]).tolist()
    assert len(found(threshold=0.5, calibration=shy)) == 1
    assert len(found(threshold=0, calibration=shy)) == 4


def test_a_clip_would_cost_average_precision():
    """A hundred right predictions and one wrong, all of a presence above 1: ties rank the wrong one first."""
    target = torch.zeros(101, 1, POINTS.set_dim)
    target[:, 0, -1] = 1
    predicted = target.clone()
    predicted[..., -1] = torch.linspace(1.1, 1.4, 101)[:, None]
    predicted[0, 0, 0] = 5.0  # far away
    confidence = torch.from_numpy(UNCALIBRATED.confidence(predicted[..., -1]))
    by_confidence = predicted.double()
    by_confidence[..., -1] = confidence
    clipped = predicted.clamp(max=1.0)
    clipped[0, 0, 0] = 5.0
    best, same, worse = (
        average_precision(each, target, thresholds=[10.0], schema=POINTS)[10.0]
        for each in (predicted, by_confidence, clipped)
    )
    assert best == same == pytest.approx(100 / 101)
    assert worse < best - 0.005


@pytest.mark.parametrize("truth", [Calibration(6.0, -1.0), Calibration(1.5, 0.5), Calibration(12.0, 0.0)])
def test_the_fit_finds_what_generated_the_data(truth):
    found = fit_calibration(*drawn(truth))
    assert found.slope == pytest.approx(truth.slope, rel=0.08)
    assert found.offset == pytest.approx(truth.offset, abs=0.1)


@pytest.mark.parametrize("case", ["noisy", "separable", "all right", "none right", "opposite", "far", "one"])
def test_the_fit_is_the_best_with_a_rising_confidence(case):
    presence, right = drawn(Calibration(4.0, -1.0), 300)
    if case == "separable":
        right = presence > 0.5
    elif case in ("all right", "none right"):
        right = torch.full_like(right, case == "all right")
    elif case == "opposite":
        right = ~right
    elif case == "far":
        presence = 1000 * presence
    elif case == "one":
        presence, right = presence[:1], right[:1]
    found = fit_calibration(presence, right)
    shuffle = torch.randperm(len(presence), generator=torch.Generator().manual_seed(0))
    assert fit_calibration(presence[shuffle], right[shuffle]) == found
    x, y = presence.numpy() - 0.5, right.numpy()
    label = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))

    def loss(theta):
        score = theta[0] * x + theta[1]
        return (np.logaddexp(0, score) - label * score).sum()

    best = minimize(loss, [1.0, 0.0], bounds=[(LEAST_SLOPE, None), (None, None)], tol=1e-12).fun
    assert loss([found.slope, found.offset]) <= best + 1e-6
    assert found.slope >= LEAST_SLOPE
    assert math.isfinite(found.offset)


def test_no_predictions_are_no_fit():
    assert fit_calibration(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)) == UNCALIBRATED


def test_reliability_by_hand():
    confidence = np.array([[0.01, 0.92, 0.96], [0.55, 0.51, 1.0]])
    found = reliability(confidence, np.array([[False, True, False], [True, True, True]]))
    assert found["predictions"] == 5  # the faint one is an empty slot
    assert found["bins"] == [
        {"count": 2, "confidence": pytest.approx(0.53), "right": 1.0},
        {"count": 3, "confidence": pytest.approx(0.96), "right": pytest.approx(2 / 3)},
    ]
    assert found["ece"] == pytest.approx(0.4 * 0.47 + 0.6 * (0.96 - 2 / 3))
    assert math.isnan(reliability(np.zeros(3), np.zeros(3, dtype=bool))["ece"])


def test_the_fit_lowers_the_calibration_error():
    presence, right = drawn(Calibration(3.0, -1.5))
    before, after = (
        reliability(each.confidence(presence), right.numpy())["ece"]
        for each in (UNCALIBRATED, fit_calibration(presence, right))
    )
    assert after < 0.01 < 0.1 < before


def test_right_is_what_average_precision_finds():
    target = torch.from_numpy(POINTS.encode([{"coords": (0, 0)}, {"coords": (20, 0)}]))[None]
    predicted = torch.from_numpy(POINTS.encode([{"coords": (9, 0)}, {"coords": (1, 0)}, {"coords": (20, 10)}]))[None]
    predicted[0, :3, -1] = torch.tensor([0.9, 0.8, 1.5])
    right, criterion = right_predictions(predicted, target, schema=POINTS)
    assert criterion == "distance under 10"
    assert right.tolist() == [[True, False, False, False]]  # the second finds its object taken, the third is too far
    strict = POINTS.with_tolerances({"coords": 5})
    right, criterion = right_predictions(predicted, target, schema=strict)
    assert criterion == "distance under 10, coords under 5"
    assert right.tolist() == [[False, True, False, False]]
    predicted, target = random_boxes(0)
    right, criterion = right_predictions(predicted, target, schema=SCHEMA)
    assert criterion == "IoU of at least 0.5"
    assert 0 < right.sum() < right.numel()


def test_evaluation_reports_it_and_figures_use_it():
    predicted, target = random_boxes(0)
    predictions = Predictions(predicted, target, torch.arange(len(target)))
    calibration = Calibration(1.0, -0.5)
    result = report(predictions, SCHEMA, "dataset", calibration=calibration)
    found = result["calibration"]
    assert (found["slope"], found["offset"], found["right"]) == (1.0, -0.5, "IoU of at least 0.5")
    assert 0 < found["ece"] < 1
    assert f"confidence       {100 * found['ece']:.1f} % off" in format_report(result | {"data": "here"})
    assert "all classes" in format_report(result | {"data": "here"})
    shown = compare(predicted[1], target[1], SCHEMA, calibration).predicted
    assert shown[0]["confidence"] == calibration.confidence(predicted[1, :, -1].max())


def test_a_validation_stores_its_fit_in_the_checkpoint(tmp_path):
    cli = built(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8)
    elements = torch.rand(12, 4, CLEVR.set_dim, generator=generator).round()
    batches = [
        {"image": image, "elements": some} for image, some in zip(images.split(5), elements.split(5), strict=True)
    ]
    cli.model.validate(batches)
    model = cli.model.eval()
    predicted = torch.cat([model(batch["image"]).detach() for batch in batches])
    right, _ = right_predictions(predicted, torch.cat([batch["elements"] for batch in batches]), schema=CLEVR)
    expected = fit_calibration(predicted[..., -1], right)
    content = {"state_dict": cli.model.state_dict(), "epoch": 0, "global_step": 5, KEY: cli.model.description()}
    save_checkpoint(content, tmp_path / "a.ckpt")
    found = load_checkpoint(tmp_path / "a.ckpt").calibration
    assert (found.slope, found.offset) == pytest.approx((expected.slope, expected.offset), rel=1e-4)
    assert found != UNCALIBRATED
    export(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors").calibration == found
    again = built(tmp_path).model
    again.on_load_checkpoint(content)  # a resumed run saves it until it validates
    assert again.description()["calibration"] == found.to_dict()
    for record in ({"slope": -1.0, "offset": 0.0}, {"slope": 1.0}, {"slope": "1", "offset": 0.0}, [1, 2]):
        content[KEY]["calibration"] = record
        save_checkpoint(content, tmp_path / "b.ckpt")
        with pytest.raises(InputError, match=r"calibration|slope"):
            load_checkpoint(tmp_path / "b.ckpt")


def test_a_checkpoint_without_a_fit_has_the_default(tmp_path):
    path = untrained(tmp_path)
    content = torch.load(path, weights_only=True)
    del content[KEY]["calibration"]  # as in files of earlier versions
    save_checkpoint(content, path)
    assert load_checkpoint(path).calibration == UNCALIBRATED
