"""Quantiles and their coverage, and the Wasserstein distance per class: known answers and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import normal
from scipy.stats import norm, wasserstein_distance

from setpred.data.toy import UncertainPoints
from setpred.errors import InputError
from setpred.losses import HungarianLoss
from setpred.matching import pinball, transport_cost
from setpred.metrics import ClassWasserstein, Coverage
from setpred.schema import ElementSchema, categorical, continuous

LEVELS = {"low": 0.05, "coords": 0.5, "high": 0.95}
PLACES = [continuous(name, 2) for name in ("coords", "low", "high")]
POINTS = ElementSchema("points", [*PLACES, categorical("kind", "a", "b")], max_objects=6)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.8])
def test_the_pinball_loss_is_least_at_the_quantile(level):
    numbers, guesses = normal(1000), torch.linspace(-3, 3, 601, dtype=torch.float64)
    losses = pinball(guesses.unsqueeze(1), numbers, level).mean(1)
    assert guesses[losses.argmin()] == pytest.approx(float(numbers.quantile(level)), abs=0.02)
    assert pinball(torch.tensor(1.0), torch.tensor(3.0), level) == pytest.approx(2 * level)
    assert pinball(torch.tensor(3.0), torch.tensor(1.0), level) == pytest.approx(2 * (1 - level))


def test_quantile_fields_cost_the_pinball_loss_and_the_others_what_they_did():
    loss, plain = HungarianLoss(schema=POINTS, quantiles={"low": 0.05, "high": 0.95}), HungarianLoss(schema=POINTS)
    predicted, target = normal(3, 1, POINTS.set_dim), normal(3, 1, POINTS.set_dim, seed=2)
    expected = plain(predicted, target)
    for name, level in loss.quantiles.items():
        ours, theirs = predicted[:, 0, POINTS.slice(name)], target[:, 0, POINTS.slice(name)]
        smooth = torch.nn.functional.smooth_l1_loss(ours, theirs, reduction="none")
        expected = expected + (pinball(ours, theirs, level) - smooth).sum(1) / POINTS.set_dim
    torch.testing.assert_close(loss(predicted, target), expected)
    with pytest.raises(InputError, match="quantile of 'low': expected a level between 0 and 1, got 1"):
        HungarianLoss(quantiles={"low": 1.0})


# --- coverage ------------------------------------------------------------------------------------------------------


def uncertain(sets=3000):
    """The world, its targets, and predictions of the true quantiles."""
    world = UncertainPoints(train_sets=1, val_sets=sets)
    world.setup()
    target, seen = world.val_data.tensors["elements"], world.val_data.tensors["input"][..., :2]
    deviation = torch.from_numpy(world.deviation(seen.numpy()))
    predicted = target.clone()
    for name, level in LEVELS.items():
        predicted[..., POINTS.slice(name)] = seen + deviation * norm.ppf(level)
    return predicted, target, deviation.double()


def coverage(predicted, target, schema=POINTS):
    metric = Coverage(quantiles=LEVELS, schema=schema)
    for one, other in zip(predicted.split(1000), target.split(1000), strict=True):
        metric.update(one, other)
    return {name: float(value) for name, value in metric.compute().items()}


def test_the_true_quantiles_have_their_levels_as_coverage_and_the_least_loss():
    predicted, target, deviation = uncertain()
    found = coverage(predicted, target)
    for name, level in LEVELS.items():
        assert found[f"below_{name}"] == pytest.approx(level, abs=0.006)  # 36,000 numbers
    assert found["covered"] == pytest.approx(0.9, abs=0.006)
    assert found["width"] == pytest.approx(float(2 * norm.ppf(0.95) * deviation.mean()), rel=1e-5)
    # E max(τ e, (τ - 1) e) = σ φ(Φ⁻¹(τ)) at the quantile of N(0, σ²)
    expected = float(deviation.mean()) * np.mean([norm.pdf(norm.ppf(level)) for level in LEVELS.values()])
    assert found["pinball"] == pytest.approx(expected, rel=0.02)
    fixed = predicted.clone()  # one width for all points: the same coverage on the whole, a worse score
    for name, level in LEVELS.items():
        fixed[..., POINTS.slice(name)] = predicted[..., POINTS.slice("coords")] + norm.ppf(level) * deviation.mean()
    assert coverage(fixed, target)["pinball"] > 1.05 * found["pinball"]


def test_coverage_is_in_the_units_of_the_schema_and_ignores_order_and_padding():
    predicted, target, _ = uncertain(500)
    found = coverage(predicted, target)
    twice = ElementSchema(
        "b", [*(continuous(f.name, 2, scale=2.0) for f in PLACES), POINTS.field("kind")], max_objects=6
    )
    scaled = coverage(predicted, target, twice)
    assert scaled["width"] == pytest.approx(2 * found["width"])
    assert scaled["pinball"] == pytest.approx(2 * found["pinball"])
    assert scaled["below_low"] == found["below_low"]
    padding = torch.full((500, 2, POINTS.set_dim), math.nan)
    padding[..., -1] = 0
    idle = torch.zeros(500, 2, POINTS.set_dim)
    again = coverage(torch.cat([idle, predicted], 1).flip(1), torch.cat([padding, target], 1)[:, torch.randperm(8)])
    assert again == pytest.approx(found)


def test_coverage_needs_two_levels_of_the_same_numbers():
    for quantiles in ({"low": 0.1}, {"low": 0.0, "high": 0.9}):
        with pytest.raises(InputError, match="two fields with levels"):
            Coverage(quantiles=quantiles)
    predicted, target, _ = uncertain(10)
    target[..., POINTS.slice("low")] += 1
    with pytest.raises(InputError, match="repeat the same numbers, got others in low and coords"):
        coverage(predicted, target)


# --- transport -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 4), (1, 5), (3, 2), (4, 6)])
def test_transport_is_that_of_scipy_on_a_line_and_of_every_matching_of_copies(n, m):
    ours, theirs = normal(n, 1), normal(m, 1, seed=2)
    found = transport_cost((ours - theirs.mT).abs())
    assert found == pytest.approx(wasserstein_distance(ours[:, 0], theirs[:, 0]), abs=1e-9)
    cost, copies = torch.rand(n, m, dtype=torch.float64), math.lcm(n, m)
    if copies <= 6:
        table = cost.repeat_interleave(copies // n, 0).repeat_interleave(copies // m, 1)
        matchings = itertools.permutations(range(copies))
        best = min(float(table[torch.arange(copies), list(matching)].mean()) for matching in matchings)
        assert transport_cost(cost) == pytest.approx(best, abs=1e-9)


def element(x, kind, presence=1.0):
    return [x, 0.0, 0, 0, 0, 0, float(kind == "a"), float(kind == "b"), presence]


def wasserstein(predicted, target, **options):
    metric = ClassWasserstein(schema=POINTS, **options)
    for ours, theirs in zip(predicted, target, strict=True):
        metric.update(torch.tensor([ours]), torch.tensor([theirs]))
    return {name: float(value) for name, value in metric.compute().items()}


def test_the_distance_of_each_class_by_hand():
    nothing, far = element(0.0, "a", 0.0), element(0.4, "a", 0.3)
    target = [[element(0.0, "a"), element(0.1, "a"), element(0.5, "b")], [element(0.0, "a"), nothing, nothing]]
    predicted = [[element(0.02, "a"), element(0.5, "b"), far], [element(0.0, "b"), nothing, far]]
    found = wasserstein(predicted, target, cutoff=0.25)
    # image 1: half of the mass of a moves 0.02, half 0.08, and b is right; image 2: neither class has a partner
    assert found["wasserstein_a"] == pytest.approx((0.05 + 0.25) / 2)
    assert found["wasserstein_b"] == pytest.approx((0.0 + 0.25) / 2)
    assert found["wasserstein"] == pytest.approx((0.05 + 0.25 + 0.0 + 0.25) / 4)
    shuffled = wasserstein([rows[::-1] for rows in predicted], [rows[1:] + rows[:1] for rows in target], cutoff=0.25)
    assert shuffled == pytest.approx(found)


def test_classes_that_do_not_occur_have_no_distance():
    found = wasserstein([[element(0.1, "a")]], [[element(0.0, "a")]])
    assert found["wasserstein"] == found["wasserstein_a"] == pytest.approx(0.1)
    assert math.isnan(found["wasserstein_b"])


def test_the_field_has_to_be_one_of_classes():
    for options in ({"field": "coords"}, {"field": "colour"}):
        with pytest.raises(InputError, match=r"expected a field of classes \(kind\)"):
            wasserstein([[element(0.1, "a")]], [[element(0.0, "a")]], **options)
    with pytest.raises(InputError, match="positive cutoff"):
        ClassWasserstein(cutoff=0.0)
