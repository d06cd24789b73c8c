"""Toy tasks of multisets, numbers, digits, characters and molecules: their data, training, loss and metrics."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from problems import finite_difference

from setpred.aggregators import FSPool, SetEncoder, SumPool
from setpred.checkpoint import load as checkpoint
from setpred.commands.evaluate import evaluate
from setpred.commands.train import train
from setpred.data.toy import Depths, MovingPoints, Multisets, Numbering, ThreeCells, UncertainPoints
from setpred.data.toy.digits import CLASSES, DigitCounting, DigitPoints, RotatedDigits, bundled_digits, pixel_points
from setpred.data.toy.median import Median
from setpred.data.toy.motion import SOFTENING, attraction, motion
from setpred.data.toy.omniglot import OmniglotCounting, read_characters
from setpred.data.toy.qm9 import PROPERTIES, QM9, read_molecule
from setpred.data.toy.solids import KINDS, TUBE, Solids
from setpred.decoders import IDSPN, FlowMatching, MLPDecoder, Readout, SlotAttention
from setpred.encoders import Elements, SmallCNN
from setpred.errors import InputError, NotFiniteError
from setpred.inner import Conditioned, GradientDescent, LatentMatching, Sum
from setpred.losses import CrossEntropy, HungarianLoss, SoftEquivariance, SquaredError
from setpred.metrics import (
    AbsoluteError,
    Accuracy,
    EnergyScore,
    NumberingAccuracy,
    SampledPrecision,
    SetDistances,
    average_precision,
)
from setpred.model import SetPredictor, Step
from setpred.nonfinite.locate import diagnose
from setpred.schema import ElementSchema, continuous
from setpred.training.task import SetPrediction

SMALL = {"train_sets": 40, "val_sets": 12, "batch_size": 4}
WORLDS = (
    Multisets,
    Numbering,
    Median,
    MovingPoints,
    Depths,
    ThreeCells,
    UncertainPoints,
    Solids,
    DigitCounting,
    RotatedDigits,
    DigitPoints,
)
every_world = pytest.mark.parametrize("make", WORLDS)


def built(make, **options):
    if make in WORLDS[8:]:
        pytest.importorskip("sklearn")
    world = make(**SMALL | options)
    world.setup()
    return world


def rng(seed=0):
    return np.random.default_rng(seed)


def numbers(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- laws over all tasks ------------------------------------------------------------------------------------------


@every_world
def test_a_seed_decides_everything(make):
    one, same, other = (built(make, worlds_seed=seed) for seed in (0, 0, 1))
    for name, values in one.train_data.tensors.items():
        assert torch.equal(values, same.train_data.tensors[name])
        assert torch.equal(one.val_data.tensors[name], same.val_data.tensors[name])
    assert not torch.equal(one.train_data.tensors["input"], other.train_data.tensors["input"])
    assert not torch.equal(one.val_data.tensors["input"], other.val_data.tensors["input"])
    assert not torch.equal(one.train_data.tensors["input"][:12], one.val_data.tensors["input"])


@every_world
def test_batches_are_padded_sets(make):
    world = built(make)
    data = world.train_data
    picked = data.__getitems__([3, 0, 39])
    assert picked["index"].tolist() == [3, 0, 39]
    for row, number in ((0, 3), (1, 0), (2, -1)):
        assert all(torch.equal(value, picked[name][row]) for name, value in data[number].items())
    assert sorted(index for batch in world.train_dataloader() for index in batch["index"].tolist()) == list(range(40))
    assert world.input_dim == picked["input"].shape[-1]
    assert data.set_size == picked["elements"].shape[1]
    for batch in (next(iter(world.train_dataloader())), next(iter(world.val_dataloader()))):
        assert {"input", "elements", "index"} <= set(batch) <= {"input", "input_mask", "elements", "index"}
        assert batch["input"].dtype == batch["elements"].dtype == torch.float32
        assert batch["input"].ndim == batch["elements"].ndim == 3
        assert len(batch["input"]) == len(batch["elements"]) == 4
        assert all(torch.isfinite(batch[name]).all() for name in ("input", "elements"))
        if "input_mask" in batch:
            assert batch["input_mask"].dtype == torch.bool
            assert batch["input_mask"].shape == batch["input"].shape[:2]
            assert batch["input_mask"].any(1).all()
            assert (batch["input"][~batch["input_mask"]] == 0).all()


# --- median -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_size", [1, 4, 5, 100])
def test_the_median_has_half_of_the_numbers_on_either_side(set_size):
    data = built(Median, set_size=set_size).train_data.tensors
    middle = (set_size - 1) // 2  # of 4, the second
    assert torch.equal(data["elements"], data["input"].sort(1).values[:, middle : middle + 1])


def test_the_three_distributions_are_equally_likely():
    """Among 100 numbers the normal has some below 0, and the gamma some over 1; the uniform neither."""
    data = built(Median, train_sets=3000).train_data.tensors["input"][..., 0].numpy()
    normal = (data < 0).any(1)
    gamma = ~normal & (data > 1).any(1)
    uniform = ~normal & ~gamma
    for part in (normal, gamma, uniform):
        assert 0.3 < part.mean() < 0.37
    for part, mean, deviation in ((normal, 0.5, 0.4), (gamma, 0.4, 0.8**0.5), (uniform, 0.5, 12**-0.5)):
        assert data[part].mean() == pytest.approx(mean, abs=0.02)
        assert data[part].std() == pytest.approx(deviation, abs=0.02)


def test_the_answers_of_three_cells_are_those_of_their_places():
    data = built(ThreeCells, side=5).train_data.tensors
    for marks, answer in zip(data["input"], data["elements"], strict=True):
        assert marks.sum(0).tolist() == [1, 1, 1]
        assert marks.sum(1).max() == 1
        a, b, c = (divmod(int(cell), 5) for cell in marks.argmax(0))
        expected = [math.dist(*pair) for pair in ((a, b), (b, c), (c, a))] + [b[0] - a[0], b[1] - a[1], *a]
        assert answer[0].tolist() == pytest.approx([number / 4 for number in expected])


def test_unseen_cells_are_marked_in_validation_alone():
    world = built(ThreeCells, side=4, unseen=0.25, train_sets=500, val_sets=500)
    seen, all_cells = (data.tensors["input"].sum((0, 2)) > 0 for data in (world.train_data, world.val_data))
    assert seen.sum() == 12
    assert all_cells.all()


def test_uncertain_points_have_the_noise_and_the_mistakes_that_they_promise():
    world = built(UncertainPoints, train_sets=3000)
    data = world.train_data.tensors
    seen, places, kinds = data["input"][..., :2].numpy(), data["elements"][..., :2], data["elements"][..., 6:8]
    residual = (places.numpy() - seen) / world.deviation(seen)
    for power, moment in ((1, 0), (2, 1), (4, 3)):
        assert (residual**power).mean() == pytest.approx(moment, abs=0.1)
    assert float((data["input"][..., 2:] != kinds).any(-1).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert all(torch.equal(data["elements"][..., start : start + 2], places) for start in (0, 2, 4))
    assert (data["elements"][..., -1] == 1).all()
    assert torch.cdist(data["input"][..., :2], data["input"][..., :2]).add(9 * torch.eye(6)).min() > 0.36


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (ThreeCells, {"side": 1}),
        (ThreeCells, {"unseen": 0.99}),
        (UncertainPoints, {"set_size": 10}),
        (UncertainPoints, {"copies": 0}),
    ],
)
def test_worlds_of_a_wrong_size_are_errors(make, wrong):
    with pytest.raises(InputError, match="expected a"):
        built(make, **wrong)


def test_multisets_are_standard_normal_and_their_own_targets():
    data = built(Multisets, train_sets=4000).train_data.tensors
    assert torch.equal(data["input"], data["elements"])
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert float((data["input"] ** power).mean()) == pytest.approx(moment, abs=0.1)


# --- depths of known chances --------------------------------------------------------------------------------------


def test_depths_have_two_answers_with_the_given_chances():
    data = built(Depths, train_sets=4000).train_data.tensors
    seen, target, present = data["input"], data["elements"], data["input_mask"]
    assert torch.equal(seen[..., 0], target[..., 0])
    assert torch.equal(seen[..., 1], target[..., 1].abs())
    assert torch.equal(target[..., 2], present.float())
    assert sorted(present.sum(1).unique().tolist()) == [2, 3, 4, 5]
    ahead, chance = target[:, 0, 1] > 0, seen[:, 0, 2]
    assert ((target[..., 1] > 0) == (ahead[:, None] & present)).all()  # one sign for all points
    for low in (0.0, 0.25, 0.5, 0.75):
        of = (chance >= low) & (chance < low + 0.25)
        assert ahead[of].double().mean().item() == pytest.approx(low + 0.125, abs=0.05)
    hidden = built(Depths, train_sets=4000, seen=False).train_data.tensors
    assert torch.equal(hidden["elements"], target)
    assert hidden["input"].shape == (4000, 1, 3)
    assert not hidden["input"].any()


def test_the_energy_of_depths_is_the_known_one():
    """1/6 for samples of the truth, 1/4 for the likelier set, 1/3 for the mean of both: see `Depths`."""
    data = built(Depths, val_sets=1500).val_data.tensors
    seen, target = data["input"], data["elements"]
    chance, sign = seen[:, :1, 2], torch.ones(3, 1500, 1)
    drawn = 1 - 2 * (numbers(3, 1500, 1) > chance).float()
    answers = {1 / 6: drawn, 1 / 4: sign * (2 * chance - 1).sign(), 1 / 3: sign * (2 * chance - 1)}
    for energy, signs in answers.items():
        depth = signs * seen[..., 1]
        samples = torch.stack([seen[..., 0].expand_as(depth), depth, target[..., 2].expand_as(depth)], -1)
        found = EnergyScore(samples=3, cutoff=2.0)(samples, target)
        assert float(found["energy"]) == pytest.approx(energy, abs=0.03)
        assert float(found["spread"]) == pytest.approx(float(found["distance"]) if energy == 1 / 6 else 0, abs=0.04)


def test_the_energy_score_against_a_loop():
    samples, target = points(4 * 9, 3, 0.7, seed=2).unflatten(0, (4, 9)), points(9, 4, 0.7, seed=5)

    def distance(ours, theirs):
        return np.array([distances_twin(p, t, 1.0)[1] for p, t in zip(ours, theirs, strict=True)])

    far = np.stack([distance(each, target) for each in samples])
    apart = np.stack([distance(one, other) for one, other in itertools.permutations(samples, 2)]).mean(0)
    expected = {"energy": far.mean(0) - apart / 2, "distance": far.mean(0), "best": far.min(0), "spread": apart}
    found = EnergyScore(samples=4)(samples, target)
    assert {name: pytest.approx(value.mean(), rel=1e-6) for name, value in expected.items()} == {
        name: float(value) for name, value in found.items()
    }
    with pytest.raises(ValueError, match="expected 5 predictions of each set"):
        EnergyScore(samples=5)(samples, target)
    for options, words in (({"samples": 1}, "at least 2 samples"), ({"cutoff": 0.0}, "positive cutoff")):
        with pytest.raises(InputError, match=words):
            EnergyScore(**options)


def test_the_precision_of_samples_against_a_loop():
    """Of all samples, of the one nearest to the others, and of the one nearest to the truth."""
    schema = ElementSchema("point", [continuous("coords", 2)], max_objects=4)
    samples, target = points(4 * 9, 3, 0.7, seed=2).unflatten(0, (4, 9)).nan_to_num(), points(9, 4, 0.7, seed=5)
    samples[2, :5, :, :2] = target[:5, :3, :2].nan_to_num()  # some are right
    metric = SampledPrecision(samples=4, cutoff=1.0, thresholds=(math.inf, 0.2), schema=schema)
    for some in (slice(0, 4), slice(4, 9)):
        metric.update(samples[:, some], target[some])
    found = metric.compute()

    def distance(one, other):
        return np.array([distances_twin(p, t, 1.0)[1] for p, t in zip(one, other, strict=True)])

    far = np.stack([distance(each, target) for each in samples])
    apart = np.stack([np.sum([distance(one, other) for other in samples], axis=0) for one in samples])
    number = np.arange(9)
    sets = {
        "ap": (samples.flatten(0, 1), target.repeat(4, 1, 1)),
        "medoid_ap": (samples[apart.argmin(0), number], target),
        "best_ap": (samples[far.argmin(0), number], target),
    }
    for name, pair in sets.items():
        scores = average_precision(*pair, thresholds=(math.inf, 0.2), schema=schema)
        assert [found[f"{name}_inf"], found[f"{name}_0.2"]] == pytest.approx(list(scores.values()))
        assert float(found[name]) == pytest.approx(np.mean(list(scores.values())))
    energies = EnergyScore(samples=4)(samples, target)
    for name in ("energy", "distance", "spread"):
        assert float(found[name]) == pytest.approx(float(energies[name]))
    assert found["best_ap"] > found["ap"]
    samples[2, ..., 2] += 0.001 * torch.arange(27).view(9, 3)  # no two alike, whose order would be that of the images
    one = SampledPrecision(samples=2, thresholds=(0.2,), schema=schema)(samples[2:3].expand(2, -1, -1, -1), target)
    assert one["ap"] == one["medoid_ap"] == one["best_ap"] > one["spread"] == 0
    perfect = SampledPrecision(samples=2, schema=schema)(target.nan_to_num().expand(2, -1, -1, -1), target)
    better = {"min": min, "max": max}[metric.mode]
    assert better(perfect[metric.monitor], found[metric.monitor]) == perfect[metric.monitor] == 0
    assert metric.higher_is_better == (metric.mode == "max")
    with pytest.raises(ValueError, match="expected 4 predictions of each set"):
        metric.update(samples[0], target)
    wrong = {"samples": 2.5}, {"thresholds": ()}, {"thresholds": (0.5, -1)}, {"cutoff": math.nan}
    for options, words in zip(wrong, ("2 samples", "thresholds over 0", "thresholds over 0", "cutoff"), strict=True):
        with pytest.raises(InputError, match=words):
            SampledPrecision(**options)


def test_a_metric_of_samples_gets_predictions_of_successive_seeds():
    world = built(Depths)
    decoder = FlowMatching(latent_dim=3, dim=8, heads=2, layers=1, hidden_dim=8, iterations=2, set_size=5, set_dim=3)
    task = SetPrediction(
        SumPool(3), decoder, schema=None, loss=HungarianLoss(aligned=True), metric=EnergyScore(samples=3)
    )
    batches = list(world.val_dataloader())
    seen, update = [], task.metric.update
    task.metric.update = lambda predicted, target: (seen.append(predicted), update(predicted, target))
    task.validate(batches)
    task.eval()
    for seed in (0, 2):
        task.model.start.seed = seed
        for batch, predicted in zip(batches, seen, strict=True):
            expected = task.model(batch["input"], mask=batch["input_mask"])
            torch.testing.assert_close(predicted[seed], expected)
    assert not torch.allclose(seen[0][0], seen[0][2])
    task.model.start.seed = 0
    same = SetPredictor(SumPool(3), MLPDecoder(latent_dim=3, hidden_dim=4, set_size=5, set_dim=3))
    assert same.start is None
    first, second = same.samples(batches[0]["input"], 2)
    assert torch.equal(first, second)


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: SoftEquivariance(loss, weights={"rotation": 1.0})])
@pytest.mark.parametrize("aligned", [True, False])
def test_only_decoders_that_match_elements_to_noise_take_an_aligned_loss(aligned, wrap):
    decoder = MLPDecoder if aligned else FlowMatching
    with pytest.raises(InputError, match=f"aligned {not aligned} for {decoder.__name__}, got {aligned}"):
        SetPrediction(
            SumPool(3),
            decoder(latent_dim=3, set_size=5, set_dim=3),
            schema=None,
            loss=wrap(HungarianLoss(aligned=aligned)),
        )


def test_a_flow_is_neither_compared_with_itself_nor_read_out():
    flow = FlowMatching(latent_dim=3, set_size=5, set_dim=3)
    loss = SoftEquivariance(HungarianLoss(aligned=True), weights={"rotation": 1.0})
    with pytest.raises(InputError, match="one prediction for FlowMatching, which samples, got SoftEquivariance"):
        SetPrediction(SumPool(3), flow, schema=None, loss=loss)
    with pytest.raises(InputError, match="slots that are predicted, got FlowMatching"):
        Readout(flow, set_dim=3)


def test_a_flow_in_training_reads_the_target_and_its_validation_does_not():
    batch = built(Depths).train_data.__getitems__([0, 1, 2])
    decoder = FlowMatching(latent_dim=3, dim=8, heads=2, layers=1, hidden_dim=8, iterations=2, set_size=5, set_dim=3)
    step = Step(SetPredictor(SumPool(3), decoder), HungarianLoss(aligned=True), batch, seed=0)
    other = replace(step, batch=batch | {"elements": batch["elements"].flip(0)})
    for training in (True, False):
        step.model.train(training)
        torch.manual_seed(0)
        one = step.predict()
        torch.manual_seed(0)
        assert torch.allclose(one, other.predict()) != training
    step.model.train()
    torch.manual_seed(0)
    loss = step.loss(step.predict(), step.target)
    stages = {stage.place: stage for stage in diagnose(step)}  # of the same step, not of a sample
    assert stages["loss"].norm == pytest.approx(float(loss.detach().max()), rel=1e-6)
    step = replace(step, auxiliary=1.0)
    with pytest.raises(InputError, match=r"set model\.auxiliary to 0"):  # one clean prediction, no earlier one
        step.losses(step.iterates())


# --- digits -------------------------------------------------------------------------------------------------------


def test_points_move_by_their_attraction():
    places, speeds = rng().normal(0, 1, (2, 6, 4, 2))
    seen = motion(places, speeds, times=5, interval=0.4)
    assert np.array_equal(seen[:, :, 0], places)
    drift = np.diff(seen.mean(1), axis=1)  # without a force from outside
    np.testing.assert_allclose(drift, 0.4 * speeds.mean(1)[:, None].repeat(4, 1))

    def potential(at):
        apart = np.sqrt(((at[:, None] - at[:, :, None]) ** 2).sum(-1) + SOFTENING)
        return -(1 / apart).sum((1, 2)) / 2 / at.shape[1]

    slope = [(potential(places + d) - potential(places - d)) / 2e-6 for d in 1e-6 * np.eye(8).reshape(8, 4, 2)]
    np.testing.assert_allclose(attraction(places), -np.stack(slope, -1).reshape(places.shape), atol=1e-8)
    fine, coarse = (motion(places, speeds, times=n, interval=2 / (n - 1))[:, :, -1] for n in (41, 6))
    np.testing.assert_allclose(fine, coarse, atol=3e-3)  # in steps of an eighth


def test_motion_is_turned_only_if_asked():
    upright, turned = (built(MovingPoints, train_turned=turn).train_data.tensors for turn in (False, True))
    for example in range(3):
        ours, theirs = (
            torch.cat([data[name][example].view(5, -1, 2) for name in ("input", "elements")], 1).flatten(0, 1)
            for data in (upright, turned)
        )
        matrix = torch.linalg.lstsq(ours, theirs).solution
        torch.testing.assert_close(matrix.mT @ matrix, torch.eye(2), atol=1e-4, rtol=0)
        assert matrix.det() > 0
        torch.testing.assert_close(ours @ matrix, theirs, atol=1e-4, rtol=0)
        assert (matrix - torch.eye(2)).abs().max() > 0.1
    steps = upright["input"].view(40, 5, 4, 2).diff(dim=2).mean((0, 1, 2))
    assert steps[0] > 0.3 > 10 * steps[1].abs()  # 0.4 along x


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return {split: bundled_digits(split) for split in ("train", "val")}


def test_training_and_validation_images_are_apart(digits):
    assert [len(part.images) for part in digits.values()] == [1297, 500]
    seen, new = ({image.tobytes() for image in part.images} for part in digits.values())
    assert not seen & new
    for part in digits.values():
        assert part.images.dtype == np.float32
        assert part.images.min() == 0
        assert part.images.max() == 1
        assert set(part.classes) == set(range(CLASSES))


def test_without_scikit_learn_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for make in (DigitCounting, RotatedDigits, DigitPoints):
        with pytest.raises(InputError, match=r"pip install 'setpred\[digits\]'"):
            make(**SMALL).setup()


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        *((Multisets, {name: 0}, "at least 1") for name in SMALL),
        (Median, {"set_size": 0}, "at least one number, got a set_size of 0"),
        (Depths, {"set_size": 1}, "up to two points"),
        *((Numbering, {name: 0}, "at least one element") for name in ("set_size", "classes")),
        (MovingPoints, {"interval": 0.0}, "an interval from over 0 to 1, got 5, 4, 4 and 0"),
        (DigitCounting, {"sizes": (4, 3)}, r"at least 1, got \[4, 3\]"),
        (RotatedDigits, {"threshold": 8.0}, "threshold from 0 to under 1"),
        (RotatedDigits, {"stretch": 0.5}, "stretch of at least 1, got 0.5"),
        (Solids, {"points": 0}, "at least 1 point"),
        (DigitPoints, {"threshold": 8.0}, "threshold from 0 to under 1"),
        (DigitPoints, {"set_size": 26}, r"27 pixels over 0\.5, more than the 26 of a set"),
        (QM9, {"folder": "", "target": "colour"}, "unknown property 'colour' of a molecule; expected one of A, B"),
        (OmniglotCounting, {"folder": "nowhere"}, r"expected Omniglot's images at .*found none; unpack images_back"),
    ],
)
def test_arguments_that_do_not_fit_raise(make, options, words):
    with pytest.raises(InputError, match=words):
        built(make, **{"train_sets": 1297, "val_sets": 500} | options)


def test_pixel_points_are_the_pixels(digits):
    images = digits["val"].images[:50]
    positions, intensities, mask = pixel_points(images, 0.3)
    drawn = np.zeros_like(images)
    for picture, points, shades, present in zip(drawn, positions, intensities, mask, strict=True):
        assert (np.diff(present.astype(int)) <= 0).all()  # padding comes last
        for (x, y), shade in zip(points[present], shades[present], strict=True):
            row, column = (1 - y) * 3.5, (x + 1) * 3.5
            assert row == pytest.approx(round(row), abs=1e-5)
            picture[round(row), round(column)] = shade
    np.testing.assert_array_equal(drawn, np.where(images > 0.3, images, 0))


@pytest.mark.parametrize("split", ["train", "val"])
def test_counts_are_right_and_of_images_of_that_part(digits, split):
    part = digits[split]
    known = {image.tobytes(): int(k) for image, k in zip(part.images, part.classes, strict=True)}
    made = DigitCounting(**SMALL).examples(split, 200, rng())
    sizes = made["input_mask"].sum(1)
    assert set(sizes) == set(range(3, 11))
    for images, mask, target in zip(made["input"], made["input_mask"], made["elements"], strict=True):
        classes = {known[image.tobytes()] for image in images[mask]}  # a KeyError for an image of the other part
        assert target.tolist() == [[len(classes)]]
        assert not images[~mask].any()
    assert set(made["elements"].flatten()) == set(range(1, 11))


def test_counting_takes_sets_of_more_than_there_are_classes():
    pytest.importorskip("sklearn")
    made = DigitCounting(**SMALL, sizes=(15, 15)).examples("val", 30, rng())
    assert made["input"].shape == (30, 15, 64)
    assert made["elements"].max() <= 10


def test_turning_keeps_radii_intensities_and_class(digits):
    upright, turned = (
        RotatedDigits(**SMALL, val_rotated=rotated).examples("val", 500, rng()) for rotated in (False, True)
    )
    for name in ("input_mask", "elements"):
        np.testing.assert_array_equal(upright[name], turned[name])
    still, moved = upright["input"].astype(float), turned["input"].astype(float)
    np.testing.assert_array_equal(still[..., 2], moved[..., 2])
    np.testing.assert_allclose(
        np.linalg.norm(moved[..., :2], axis=-1), np.linalg.norm(still[..., :2], axis=-1), atol=1e-6
    )
    # one proper rotation for all points of a digit: as complex numbers, all are multiplied by the same
    a, b = (points[..., 0] + 1j * points[..., 1] for points in (still, moved))
    turn = (a.conj() * b).sum(1) / (a.conj() * a).sum(1)
    np.testing.assert_allclose(turn[:, None] * a, b, atol=1e-5)
    quarters = np.histogram(np.angle(turn), bins=4, range=(-np.pi, np.pi))[0]
    assert quarters.min() > 90  # of 500: angles all around
    # each validation image once, with its class
    shown = sorted(np.sort(points[:, 2]).tobytes() for points in turned["input"])
    _, intensities, _ = pixel_points(digits["val"].images, 0.0)
    assert shown == sorted(np.sort(shades).tobytes() for shades in intensities)
    counts = np.bincount(turned["elements"].argmax(-1).flatten(), minlength=CLASSES)
    np.testing.assert_array_equal(counts, np.bincount(digits["val"].classes, minlength=CLASSES))
    assert (turned["elements"].sum(-1) == 1).all()


def test_training_digits_are_turned_only_if_asked():
    one, two = built(RotatedDigits), built(RotatedDigits, train_rotated=True, val_rotated=False)
    grid = torch.linspace(-1, 1, 8)
    for data, upright in ((one.train_data, True), (one.val_data, False), (two.train_data, False), (two.val_data, True)):
        points = data.tensors["input"][data.tensors["input_mask"]][:, :2]
        assert bool(((points[..., None] - grid).abs().amin(-1) < 1e-6).all()) is upright


def test_stretched_digits_are_linear_images_of_upright_ones(digits):
    upright = RotatedDigits(**SMALL, val_rotated=False).examples("val", 500, rng())
    stretched = RotatedDigits(**SMALL, stretch=2.0)
    found = stretched.examples("val", 500, rng())
    np.testing.assert_array_equal(
        stretched.examples("train", 9, rng())["input"][0],
        RotatedDigits(**SMALL).examples("train", 9, rng())["input"][0],
    )
    ratios = []
    for still, moved, mask in zip(upright["input"], found["input"], upright["input_mask"], strict=True):
        matrix, *_ = np.linalg.lstsq(still[mask, :2], moved[mask, :2], rcond=None)
        np.testing.assert_allclose(still[mask, :2] @ matrix, moved[mask, :2], atol=1e-5)
        assert np.linalg.det(matrix) == pytest.approx(1, abs=1e-4)
        ratios.append(np.linalg.svd(matrix)[1][0])
    assert 1 <= min(ratios) < 1.02
    assert 1.96 < max(ratios) < 2.001


# --- solids -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solids():
    """Upright solids of each kind, float64 `[count, 96, 6]`."""
    made = Solids(**SMALL).examples("train", 70, rng())
    kinds = made["elements"].argmax(-1).flatten()
    assert np.bincount(kinds).tolist() == [10] * len(KINDS)
    return {name: made["input"][kinds == kind].astype(float) for kind, name in enumerate(KINDS)}


def test_solids_are_on_their_surfaces_and_their_normals_point_outwards(solids):
    for sets in solids.values():
        np.testing.assert_allclose(np.linalg.norm(sets[..., 3:], axis=-1), 1, atol=1e-5)
    for name in KINDS[:4]:  # convex: the whole set is behind each tangent plane, up to the noise
        for points in solids[name]:
            heights = (points[None, :, :3] - points[:, None, :3]) @ points[:, 3:, None]
            assert heights.max() < 0.1, name
    half = np.abs(solids["box"][..., :3]).max(1)
    assert half.min() > 0.55
    assert half.max() < 1.05
    flat = np.abs(solids["cylinder"][..., 5])
    assert ((flat < 0.15) | (flat > 0.85)).mean() > 0.8  # sides and lids


def test_screws_are_mirror_images_of_each_other(solids):
    """The height rises with the angle, on the left one it falls; normals lead away from the axis of the tube."""
    for name, hand in (("right screw", 1), ("left screw", -1)):
        for points in solids[name]:
            size = np.abs(points[:, :2]).max(0) / (1 + TUBE)
            angle = np.arctan2(hand * points[:, 1] / size[1], points[:, 0] / size[0]) % (2 * np.pi)
            inside = (angle > 0.7) & (angle < 5.6)  # away from the ends
            assert np.corrcoef(angle[inside], points[inside, 2])[0, 1] > 0.7
            centre = np.stack([np.cos(angle) * size[0], hand * np.sin(angle) * size[1]], axis=-1)
            assert ((points[:, :2] - centre) * points[:, 3:5]).sum(-1).mean() > 0.05


def test_solids_are_drawn_by_area_and_turned_uniformly():
    # of a torus the inner half has π - 2 r of the 2 π of the area
    world = Solids(**SMALL, points=2000)
    points = world._upright(4, 1, rng(1))[0]
    size = np.abs(points[:, :3]).max(0)
    inner = np.linalg.norm(points[:, :2] / size[:2] * (1 + TUBE), axis=-1) < 1
    assert inner.mean() == pytest.approx((np.pi - 2 * TUBE) / (2 * np.pi), abs=0.04)
    upright, turned = (
        Solids(**SMALL, points=8, val_rotated=rotated).examples("val", 2000, rng())["input"]
        for rotated in (False, True)
    )
    assert_maps = np.linalg.solve(upright[:, :3, :3].astype(float), turned[:, :3, :3].astype(float))
    np.testing.assert_allclose(np.linalg.det(assert_maps), 1, atol=0.05)
    np.testing.assert_allclose(upright[..., 3:] @ assert_maps, turned[..., 3:], atol=0.05)
    # of a uniform rotation every entry has mean 0 and variance 1/3
    assert np.abs(assert_maps.mean(0)).max() < 0.05
    assert np.abs((assert_maps**2).mean(0) - 1 / 3).max() < 0.03


def test_points_are_those_of_the_pixels(digits):
    for split, part in digits.items():
        made = DigitPoints(**SMALL).examples(split, len(part.images), rng())
        assert made["input"].shape == (len(part.images), 27, 3)
        assert DigitPoints(masked=False, **SMALL).examples(split, 5, rng()).keys() == {"input", "elements"}
        np.testing.assert_array_equal(made["input"], made["elements"])
        np.testing.assert_array_equal(made["input_mask"], made["elements"][..., 2] == 1)
        positions, _, mask = pixel_points(part.images, 0.5)
        points = np.concatenate([positions, mask[..., None]], axis=-1)
        expected = np.pad(points, ((0, 0), (0, 27 - points.shape[1]), (0, 0))).astype(np.float32)
        assert sorted(each.tobytes() for each in made["elements"]) == sorted(each.tobytes() for each in expected)


# --- the user's files ----------------------------------------------------------------------------------------------

METHANE = """5
gdb 1\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t\
35.3641\t0.044749\t-40.47893\t-40.476062\t-40.475117\t-40.498597\t6.469\t
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 0.002150416\t-0.0060313176\t 0.0019761204\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 0.0002765748\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 9.063972942*^-1\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""


@pytest.fixture
def molecules(tmp_path):
    """Six molecules of two atoms whose properties are a constant apart, and one of five."""
    for number in range(2, 8):
        properties = "\t".join(str(number + k) for k in range(15))
        text = f"2\ngdb {number}\t{properties}\t\nF\t0.\t0.\t0.7\t0.\nF\t0.\t0.\t-7.*^-1\t0.\n900.\nFF\tFF\t\n?\t?\n"
        (tmp_path / f"dsgdb9nsd_{number:06}.xyz").write_text(text)
    (tmp_path / "dsgdb9nsd_000001.xyz").write_text(METHANE)
    (tmp_path / "readme.txt").write_text("not a molecule")
    return tmp_path


def test_a_molecule_is_read_as_it_is_written(molecules):
    atoms, properties = read_molecule(molecules / "dsgdb9nsd_000001.xyz")
    assert atoms.shape == (5, 9)
    expected = [-0.5238136345, 1.4379326443, 0.9063972942, 1, 0, 0, 0, 0, 0.133923]
    np.testing.assert_allclose(atoms[4], expected, rtol=1e-6)
    np.testing.assert_array_equal(atoms[:, 3:8].argmax(1), [1, 0, 0, 0, 0])
    named = dict(zip(PROPERTIES, properties, strict=True))
    expected = {"A": 157.7118, "mu": 0, "homo": -0.3877, "U0": -40.47893, "Cv": 6.469}
    assert expected.items() <= named.items()


def test_molecules_are_divided_and_their_target_is_standardised(molecules):
    options = {"folder": str(molecules), "target": "mu", "train_sets": 4, "val_sets": 3, "batch_size": 2}
    world = QM9(**options)
    world.setup()
    train, val = world.train_data.tensors, world.val_data.tensors
    target = train["elements"].flatten()
    assert float(target.mean()) == pytest.approx(0, abs=1e-6)
    assert float(target.std(correction=0)) == pytest.approx(1)
    mean, deviation = world.standard
    raw = torch.cat([target, val["elements"].flatten()]) * deviation + mean
    # each molecule once: mu of number k is k + 3, and of methane 0
    assert sorted(round(value, 4) for value in raw.tolist()) == [0, *range(5, 11)]
    sizes = {int(count) for part in (train, val) for count in part["input_mask"].sum(1)}
    assert sizes == {2, 5}
    only_val = QM9(**options)
    only_val.setup("validate")
    assert torch.equal(only_val.val_data.tensors["elements"], val["elements"])
    assert QM9(**options, worlds_seed=1)._paths() != world._paths()


def test_faults_of_molecules(molecules, tmp_path):
    with pytest.raises(InputError, match=r"expected 9 molecules .* found 7; unpack dsgdb9nsd\.xyz\.tar\.bz2"):
        QM9(folder=str(molecules), train_sets=5, val_sets=4, batch_size=2).setup()
    with pytest.raises(InputError, match="found 0"):
        QM9(folder=str(tmp_path / "nowhere"), train_sets=5, val_sets=4, batch_size=2).setup()
    first, second, *rest = METHANE.splitlines(keepends=True)
    damaged = [(b"\xff\xfe", 1), (("five\n" + METHANE[2:]).encode(), 1), (b"", 1)]
    damaged += [("".join([first, second.replace("13.21", wrong), *rest]).encode(), 2) for wrong in ("", "nan")]
    damaged += [("".join([first, second, *rest[:2]]).encode(), 5)]
    damaged += [
        (METHANE.replace("C\t-0.01", "Xe\t-0.01").encode(), 3),
        (METHANE.replace("\t 0.133921", "").encode(), 4),
    ]
    for content, line in damaged:
        (tmp_path / "damaged.xyz").write_bytes(content)
        with pytest.raises(InputError, match=rf"damaged\.xyz, line {line}: expected a molecule"):
            read_molecule(tmp_path / "damaged.xyz")


@pytest.fixture
def characters(tmp_path):
    """Omniglot's layout: black strokes on white, 105x105, one bit; each character a bar at its own height."""
    for part, alphabets in (("images_background", 2), ("images_evaluation", 1)):
        for alphabet in range(alphabets):
            for character in range(3):
                folder = tmp_path / part / f"Alphabet_{alphabet}" / f"character{character + 1:02}"
                folder.mkdir(parents=True)
                for drawer in range(2):
                    paper = np.full((105, 105), 255, dtype=np.uint8)
                    top = 15 * (1 + character + 3 * alphabet)
                    paper[top : top + 15, 15 : 90 - 15 * drawer] = 0
                    Image.fromarray(paper).convert("1").save(folder / f"0{alphabet}{character}_{drawer + 1:02}.png")
    return tmp_path


def test_characters_are_counted(characters):
    images, classes = read_characters(characters / "images_background", 7)
    assert images.shape == (12, 7, 7)
    np.testing.assert_array_equal(classes, np.repeat(np.arange(6), 2))
    np.testing.assert_array_equal(images.sum((1, 2)), np.tile([5, 4], 6))  # blocks of 15 pixels
    np.testing.assert_array_equal(images[3, 2], [0, 1, 1, 1, 1, 0, 0])
    world = OmniglotCounting(folder=str(characters), image_size=7, sizes=(3, 6), **SMALL)
    world.setup()
    for data, rows in ((world.train_data, range(1, 7)), (world.val_data, range(1, 4))):
        for elements, mask, target in zip(*(data.tensors[k] for k in ("input", "input_mask", "elements")), strict=True):
            at = elements[mask].view(-1, 7, 7).sum(2).argmax(1)  # the row of the bar is the character
            assert set(at.tolist()) <= set(rows)
            assert int(target) == len(set(at.tolist()))


def test_faults_of_characters(characters):
    broken = characters / "images_evaluation" / "Alphabet_0" / "character02" / "001_01.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(InputError, match=r"001_01\.png is not an image .*unpack it again"):
        OmniglotCounting(folder=str(characters), **SMALL).setup()


# --- cross entropy ------------------------------------------------------------------------------------------------


def test_cross_entropy_is_the_mean_over_elements_that_have_a_class():
    logits, classes = numbers(3, 4, 5) * 6, torch.tensor([[0, 4, 2, 2], [1, 1, 3, -1], [-1, -1, -1, -1]])
    target = torch.where(classes[..., None] < 0, 0.0, torch.eye(5, dtype=torch.float64)[classes])
    expected = []
    for rows, ks in zip(logits.tolist(), classes.tolist(), strict=True):
        terms = [math.log(sum(map(math.exp, row))) - row[k] for row, k in zip(rows, ks, strict=True) if k >= 0]
        expected.append(sum(terms) / max(len(terms), 1))
    torch.testing.assert_close(CrossEntropy()(logits, target).tolist(), expected)
    leaf = logits.clone().requires_grad_()
    CrossEntropy()(leaf, target).sum().backward()
    torch.testing.assert_close(leaf.grad, finite_difference(lambda x: CrossEntropy()(x, target).sum(), logits))


def test_cross_entropy_takes_half_precision_in_full_and_sets_of_one_shape():
    logits, target = numbers(2, 1, 3).bfloat16(), torch.eye(3)[torch.tensor([[0], [2]])]
    loss = CrossEntropy()(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, CrossEntropy()(logits.float(), target))
    for shape in ((2, 1, 4), (2, 2, 3)):
        with pytest.raises(ValueError, match="expected"):
            CrossEntropy()(torch.zeros(shape), target)


# --- metrics ------------------------------------------------------------------------------------------------------


def points(batch, size, share, *, seed):
    """Sets [x, y, presence]; what is absent may hold anything."""
    made = numbers(batch, size, 3, seed=seed) * 2 - 0.5
    made[..., 2] = (numbers(batch, size, seed=seed + 1) < share).double() * 0.8 + 0.1
    made[..., :2][made[..., 2] < 0.5] = math.nan
    return made


def distances_twin(predicted, target, cutoff):
    """`SetDistances` of one example in loops: over all matchings, so of small sets."""
    ours, theirs = ([row[:-1] for row in rows.tolist() if row[-1] > 0.5] for rows in (predicted, target))
    if not ours or not theirs:
        return (0.0, 0.0) if len(ours) == len(theirs) else (cutoff, cutoff)

    def apart(p, t):
        return min(math.dist(p, t), cutoff)

    chamfer = 0.5 * sum(min(apart(p, t) for p in ours) for t in theirs) / len(theirs)
    chamfer += 0.5 * sum(min(apart(p, t) for t in theirs) for p in ours) / len(ours)
    few, many = sorted((ours, theirs), key=len)
    best = min(sum(map(apart, few, chosen)) for chosen in itertools.permutations(many, len(few)))
    return chamfer, (best + cutoff * (len(many) - len(few))) / len(many)


@pytest.mark.parametrize("cutoff", [1.0, 0.4, 10.0])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 2), (1, 4)])
def test_distances_equal_their_definition(cutoff, sizes):
    predicted, target = points(30, sizes[0], 0.6, seed=0), points(30, sizes[1], 0.6, seed=7)
    expected = np.mean([distances_twin(p, t, cutoff) for p, t in zip(predicted, target, strict=True)], axis=0)
    found = SetDistances(cutoff=cutoff)(predicted, target)
    assert list(found) == ["chamfer", "hungarian"]
    np.testing.assert_allclose([float(value) for value in found.values()], expected, rtol=1e-6)


def test_distances_of_empty_and_non_finite_sets():
    here, gone = [0.3, 0.4, 1.0], [0.0, 0.0, 0.0]
    cases = [([here, here], here, 0, 0.5), ([gone, gone], here, 1, 1), ([gone, gone], gone, 0, 0)]
    cases += [([here, gone], gone, 1, 1), ([[math.inf, 0.0, 1.0], gone], here, 1, 1)]
    for predicted, target, chamfer, hungarian in cases:
        found = SetDistances()(torch.tensor([predicted]), torch.tensor([[target, gone]]))
        assert [float(value) for value in found.values()] == pytest.approx([chamfer, hungarian], abs=1e-7)
    with pytest.raises(NotFiniteError):
        SetDistances()(torch.tensor([[[math.nan, 0.0, 1.0]]]), torch.tensor([[here]]))
    with pytest.raises(InputError, match="positive cutoff"):
        SetDistances(cutoff=0.0)


def test_squared_error_is_the_mean_over_aligned_numbers():
    predicted, target = numbers(3, 4, 2), numbers(3, 4, 2, seed=1)
    expected = torch.tensor(
        [
            sum((p - t) ** 2 for p, t in zip(*pair, strict=True)) / 8
            for pair in zip(predicted.flatten(1).tolist(), target.flatten(1).tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(SquaredError()(predicted, target), expected)
    assert SquaredError()(predicted.bfloat16(), target.float()).dtype == torch.float32
    assert (SquaredError()(predicted[:, [1, 0, 2, 3]], target) != expected).all()  # the order counts
    with pytest.raises(ValueError, match="one shape"):
        SquaredError()(predicted[:, 1:], target)


def test_absolute_error_and_rounding():
    predicted, target = numbers(20, 2, 3) * 4, (numbers(20, 2, 3, seed=1) * 4).round()
    predicted[:8] = target[:8] + 0.9 * (numbers(8, 2, 3, seed=2) - 0.5)  # right when rounded
    errors, right = [], []
    for ours, theirs in zip(predicted.flatten(1).tolist(), target.flatten(1).tolist(), strict=True):
        errors.append(sum(abs(p - t) for p, t in zip(ours, theirs, strict=True)) / 6)
        right.append(all(round(p) == t for p, t in zip(ours, theirs, strict=True)))
    found = AbsoluteError(whole=True)(predicted, target)
    assert float(found["absolute_error"]) == pytest.approx(sum(errors) / 20)
    assert float(found["exact"]) == sum(right) / 20 >= 8 / 20
    assert list(AbsoluteError()(predicted, target)) == ["absolute_error"]
    with pytest.raises(ValueError, match="sets of one shape"):
        AbsoluteError()(predicted, target[:, :1])


def test_accuracy_counts_elements_that_have_a_class():
    logits, target = torch.tensor([[[3.0, 1, 1], [5, 4, 3]]]), torch.eye(3)[torch.tensor([[0, 1]])]
    assert float(Accuracy()(logits, target)["accuracy"]) == 0.5
    assert float(Accuracy()(logits, target * torch.tensor([[[1.0], [0.0]]]))["accuracy"]) == 1


METRICS = {
    "error": (lambda: AbsoluteError(whole=True), numbers(11, 1, 1) * 3, (numbers(11, 1, 1, seed=1) * 3).round()),
    "accuracy": (Accuracy, numbers(11, 1, 4), torch.eye(4)[torch.arange(11) % 4][:, None]),
    "distances": (SetDistances, points(11, 4, 0.6, seed=0), points(11, 3, 0.6, seed=5)),
    "numbering": (
        lambda: NumberingAccuracy(classes=2),
        numbers(11, 2, 2),
        torch.tensor([[1.0, 0, 1, 0], [0.0, 1, 1, 0]]).expand(11, -1, -1),
    ),
}


@pytest.mark.parametrize(("make", "predicted", "target"), METRICS.values(), ids=METRICS.keys())
def test_batches_and_order_change_nothing(make, predicted, target):
    whole = make()(predicted, target)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    metric = make()
    for part in (order[:1], order[1:8], order[8:]):
        metric.update(predicted[part].requires_grad_(), target[part])
    torch.testing.assert_close(metric.compute(), whole, rtol=1e-12, atol=0)
    assert not any(value.requires_grad for value in metric.compute().values())
    assert metric.monitor in whole
    assert metric.mode == ("max" if metric.higher_is_better else "min")
    metric.reset()
    metric.update(predicted[:2], target[:2])
    torch.testing.assert_close(metric.compute(), make()(predicted[:2], target[:2]))


# --- training -----------------------------------------------------------------------------------------------------

FEW = {"train_sets": 24, "val_sets": 10, "batch_size": 8, "eval_batch_size": 4}


def run(folder, *options):
    config = Path(__file__).parents[1] / "configs" / "worlds" / "multisets" / "fspool.yaml"
    few = [f"--data.init_args.{name}={count}" for name, count in FEW.items()]
    fixed = ["--trainer.max_epochs=2", "--trainer.precision=32-true", "--trainer.logger=false"]
    return train(["--config", str(config), "--runs", str(folder), *few, *fixed, *options])


def conditional(size=4, classes=2):
    def encoder(set_dim):
        return SetEncoder(FSPool(8, set_size=size), set_dim=set_dim, hidden_dim=8)

    objective = Sum([Conditioned(LatentMatching(encoder(size + classes)))])
    return SetPredictor(encoder(classes), IDSPN(objective, GradientDescent(iterations=3), set_size=size, set_dim=size))


def test_trains_and_follows_the_loss(tmp_path):
    folder = run(tmp_path / "whole")
    content = checkpoint.read_checkpoint(folder / "best.ckpt")
    assert content[checkpoint.KEY]["schema"] is None
    callbacks = [state for name, state in content["callbacks"].items() if "val_loss" in name]
    assert float(callbacks[0]["best_model_score"]) > 0
    loaded = checkpoint.load_checkpoint(folder / "best.ckpt")
    assert loaded.schema is None
    assert loaded.model(torch.zeros(2, 8, 4)).shape == (2, 8, 4)
    with pytest.raises(InputError, match="elements without a schema, as of the toy tasks"):
        evaluate([str(folder / "best.ckpt")])
    with pytest.raises(InputError, match="predicts sets of 8, the data has sets of 4"):
        run(tmp_path / "misfit", "--data.init_args.set_size=4")


def test_a_conditional_decoder_sees_the_input_of_each_element():
    torch.manual_seed(0)
    model = conditional().eval()
    with pytest.raises(InputError, match="conditioned on an input set"):
        SetPredictor(SmallCNN(image_size=16, latent_dim=8, width=2), model.decoder)
    sets = torch.eye(2)[torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]])]
    features = model.encode(sets)
    assert model.decoder.conditional
    expected = model.decoder(features, condition=sets)
    assert torch.equal(model(sets), expected)
    assert not torch.allclose(expected, model.decoder(features, condition=sets.flip(1)))
    assert torch.equal(list(model.refine(sets))[-1], expected)


def test_padding_of_an_input_set_has_no_influence():
    torch.manual_seed(0)
    vector = SetPredictor(
        SetEncoder(SumPool(8), set_dim=2, hidden_dim=8), MLPDecoder(latent_dim=8, set_size=2, set_dim=1)
    )
    tokens = SetPredictor(Elements(set_dim=2), SlotAttention(set_size=2, set_dim=3, token_dim=2, slot_dim=4))
    sets = torch.randn(3, 5, 2)
    mask = torch.arange(5).expand(3, -1) < torch.tensor([[2], [5], [3]])
    for model in (vector.eval(), tokens.eval()):
        clean, dirty = (sets.masked_fill(~mask.unsqueeze(-1), value) for value in (0.0, float("nan")))
        assert torch.equal(model(clean, mask=mask), model(dirty, mask=mask))
        alone = model(sets[:1, :2])
        torch.testing.assert_close(model(sets, mask=mask)[:1], alone)


def test_validate_scores_every_example_once():
    encoder, metric = SetEncoder(FSPool(8, set_size=3), set_dim=2, hidden_dim=8), AbsoluteError()
    decoder = MLPDecoder(latent_dim=8, set_size=3, set_dim=2, hidden_dim=16)
    module = SetPrediction(encoder, decoder, schema=None, metric=metric)
    assert (module.monitor, module.mode) == (f"val_{metric.monitor}", metric.mode)
    data = built(Multisets, val_sets=10, set_size=3, set_dim=2)
    module.train()
    scores = module.validate(data.val_dataloader())
    assert module.training
    whole = data.val_data.__getitems__(range(10))
    predicted = module.model(whole["input"]).detach()
    (expected,) = AbsoluteError()(predicted, whole["elements"]).values()
    assert scores[module.monitor] == pytest.approx(float(expected), rel=1e-5)
    assert scores["val_loss"] == pytest.approx(float(HungarianLoss()(predicted, whole["elements"]).mean()), rel=1e-5)
    assert module.validate(data.val_dataloader()) == scores  # nothing remains of the first time
