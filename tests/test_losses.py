"""Laws over all set losses, and each against its definition, a twin or a known answer."""

import itertools
import math

import numpy as np
import pytest
import torch
import yaml
from problems import finite_difference
from scipy.optimize import linprog
from scipy.special import ive
from tiny import CONFIG
from torchvision.ops import box_convert, generalized_box_iou

from setpred.checkpoint.load import allowed_classes
from setpred.checkpoint.load import build as build_part
from setpred.commands.train import build
from setpred.errors import InputError
from setpred.losses import (
    ChamferLoss,
    DETRCriterion,
    DistributionalSlicedWasserstein,
    HungarianLoss,
    MaxSlicedWasserstein,
    SinkhornDivergence,
    SlicedWasserstein,
    generalised_iou,
)
from setpred.losses.sliced import reflected, transport_along
from setpred.matching import hungarian, pairwise_smooth_l1, pairwise_squared, sinkhorn
from setpred.schema import ElementSchema, categorical, continuous

SCHEMA = ElementSchema("thing", [continuous("coords", 2), categorical("kind", "a", "b", "c")], max_objects=4)
DIM = SCHEMA.set_dim
DIVERGENCES = {
    "hungarian": HungarianLoss,
    "chamfer": ChamferLoss,
    "sinkhorn": lambda **options: SinkhornDivergence(epsilon=0.1, iterations=60, **options),
    "sliced": SlicedWasserstein,
    "sliced, p = 1": lambda **options: SlicedWasserstein(power=1.0, **options),
    "max-sliced": MaxSlicedWasserstein,
    "distributional": lambda **options: DistributionalSlicedWasserstein(set_dim=DIM, **options),
}
LOSSES = DIVERGENCES | {"detr": lambda **options: DETRCriterion(**{"schema": SCHEMA} | options)}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
every_divergence = pytest.mark.parametrize("make", DIVERGENCES.values(), ids=DIVERGENCES.keys())


def built(make, **options):
    torch.manual_seed(0)
    return make(**options).double().eval()


def elements(batch, size, *, seed, dim=DIM):
    return torch.randn(batch, size, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def targets(batch, size, present, *, seed):
    """As the schema has them: one-hot classes, presence 1 for the first ones, then zeros."""
    generator = torch.Generator().manual_seed(seed)
    coords = torch.rand(batch, size, 2, dtype=torch.float64, generator=generator)
    kinds = torch.eye(3, dtype=torch.float64)[torch.randint(3, (batch, size), generator=generator)]
    whole = torch.cat([coords, kinds, torch.ones(batch, size, 1, dtype=torch.float64)], -1)
    whole[:, present:] = 0
    return whole


@pytest.fixture
def pair():
    return elements(5, 4, seed=0), targets(5, 4, 3, seed=1)


# --- laws over all losses -----------------------------------------------------------------------------------------


@every_loss
def test_the_order_of_either_set_is_not_seen_nor_the_rest_of_the_batch(make, pair):
    loss, (predicted, target) = built(make), pair
    expected = loss(predicted, target)
    assert expected.shape == (5,)
    assert (expected > 0).all()
    torch.testing.assert_close(loss(predicted[:, [2, 0, 3, 1]], target), expected)
    torch.testing.assert_close(loss(predicted, target[:, [1, 3, 2, 0]]), expected)
    torch.testing.assert_close(loss(predicted[2:3], target[2:3]), expected[2:3])


@every_divergence
def test_equal_multisets_cost_nothing(make):
    target = elements(5, 4, seed=0)
    target[:, 1] = target[:, 0]  # a repeated element too
    leaf = target[:, [3, 1, 0, 2]].clone().requires_grad_()
    loss = built(make)(leaf, target)
    torch.testing.assert_close(loss, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    loss.sum().backward()
    # exact for a plan of transport that is symmetric, as Sinkhorn's is where it has converged
    tolerance = 1e-3 if make is DIVERGENCES["sinkhorn"] else 1e-12
    torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=tolerance)


@every_loss
def test_gradients_by_finite_differences(make, pair):
    loss, (predicted, target) = built(make), pair
    predicted, target = predicted[:1, :3], target[:1, 1:]  # of which one is padding
    if hasattr(loss, "directions"):  # which are held fixed: of the others this changes nothing
        directions = loss.directions(predicted, target, (None, None)).detach()
        loss.directions = lambda *_: directions
    leaf = predicted.clone().requires_grad_()
    loss(leaf, target).sum().backward()
    expected = finite_difference(lambda p: loss(p, target).sum(), predicted)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-7)


@every_loss
@pytest.mark.parametrize("present", [3, 1])
def test_masked_elements_have_no_influence(make, present):
    """Whatever they hold, and however many: as if they were not there; nor do they receive a gradient."""
    loss, predicted, target = built(make), elements(3, 3, seed=0), targets(3, present, present, seed=1)
    plain = predicted.clone().requires_grad_()
    if present == 3:
        expected = loss(plain, target)
    else:  # sets of different sizes need a mask, if only a full one
        expected = loss(plain, target, target_mask=torch.ones(3, present, dtype=torch.bool))
    expected.sum().backward()

    order = [4, 0, 2, 3, 1]
    junk = torch.full((3, 2, DIM), torch.nan, dtype=torch.float64)
    padded = torch.cat([predicted, junk], 1)[:, order].requires_grad_()
    mask = torch.tensor([True] * 3 + [False] * 2)[order].expand(3, 5)
    padded_target = torch.cat([junk, target], 1)
    target_mask = torch.tensor([False] * 2 + [True] * present).expand(3, 2 + present)
    found = loss(padded, padded_target, mask, target_mask)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    # the gradient to a masked element is a zero even where it holds a NaN
    reordered = torch.cat([plain.grad, torch.zeros(3, 2, DIM, dtype=torch.float64)], 1)[:, order]
    torch.testing.assert_close(padded.grad, reordered)


@every_loss
def test_empty_sets_give_numbers_and_gradients(make):
    loss, predicted, target = built(make), elements(3, 4, seed=0), targets(3, 4, 0, seed=1)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    for masks in ({}, {"target_mask": nothing}, {"target_mask": nothing[:, :0]}):
        leaf = predicted.clone().requires_grad_()
        value = loss(leaf, target[:, :0] if masks and not masks["target_mask"].numel() else target, **masks)
        assert (value >= 0).all()
        value.sum().backward()
        assert torch.isfinite(leaf.grad).all()
    both = loss(predicted, target, nothing, nothing)
    torch.testing.assert_close(both, torch.zeros_like(both))
    # the cut by presence empties sets too
    if not isinstance(loss, DETRCriterion):
        cut = built(make, presence_threshold=10.0)(predicted, target)
        torch.testing.assert_close(cut, torch.zeros_like(cut))


@every_loss
def test_a_mask_of_some_examples_leaves_the_others_alone(make, pair):
    """Sets of different sizes in one batch are as each alone."""
    loss, (predicted, _) = built(make), pair
    target = targets(5, 4, 4, seed=1)
    sizes = torch.tensor([4, 1, 0, 3, 2])
    masks = torch.arange(4) < sizes[:, None], torch.arange(4) < sizes.clamp(max=3)[:, None]
    together = loss(predicted, target, *masks)
    for b in range(5):
        alone = loss(predicted[b : b + 1], target[b : b + 1], masks[0][b : b + 1], masks[1][b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone)


@every_divergence
def test_the_presence_threshold_is_a_mask(make, pair):
    predicted, target = pair
    cut = built(make, presence_threshold=0.25)(predicted, target)
    expected = built(make)(predicted, target, predicted[..., -1] > 0.25, target[..., -1] > 0.25)
    torch.testing.assert_close(cut, expected)


@every_loss
def test_weights_multiply_the_share_of_their_group(make):
    """Sets that differ in one group alone: its weight is a factor, the weights of others do nothing."""
    predicted, target = torch.zeros(5, 4, DIM, dtype=torch.float64), torch.zeros(5, 4, DIM, dtype=torch.float64)
    predicted[..., :2], target[..., :2] = elements(5, 4, seed=2, dim=2), elements(5, 4, seed=3, dim=2)
    if make is LOSSES["detr"]:
        target[..., -1] = 1
    plain, heavy, other = (
        built(make, schema=SCHEMA, weights=weights) for weights in (None, {"coords": 4.0}, {"kind": 7.0})
    )
    if isinstance(plain, SinkhornDivergence):  # a temperature of the cost's unit
        heavy.epsilon = 4 * plain.epsilon
    share = torch.zeros(5, dtype=torch.float64)
    if isinstance(plain, DETRCriterion):  # what the classes cost, whoever is matched
        kind = math.log(3)
        share += kind - math.log(1 / (1 + math.exp(0.5)))
        torch.testing.assert_close(other(predicted, target) - plain(predicted, target), share * 0 + 6 * kind)
        # without a say of the classes in the matching, which is the same for all
        torch.testing.assert_close(
            heavy(predicted, target) - share, 4 * (plain(predicted, target) - share), rtol=1e-6, atol=1e-8
        )
    elif isinstance(plain, DistributionalSlicedWasserstein):  # whose directions look at the weighted numbers
        predicted, target = predicted * 1.0, target * 1.0
        predicted[..., :2] *= 2
        target[..., :2] *= 2
        scaled = plain(predicted, target)
        predicted[..., :2] /= 2
        target[..., :2] /= 2
        torch.testing.assert_close(heavy(predicted, target), scaled)
        torch.testing.assert_close(other(predicted, target), plain(predicted, target))
    else:
        torch.testing.assert_close(heavy(predicted, target), 4 * plain(predicted, target), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(other(predicted, target), plain(predicted, target))
    blind = built(make, schema=SCHEMA, weights={"coords": 0.0})(predicted, target) - share
    torch.testing.assert_close(blind, torch.zeros_like(blind), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"size": 2.0}}, "size"),
        ({"weights": {"coords": -1.0}}, "at least 0"),
        ({"weights": {"coords": math.nan}}, "at least 0"),
        ({"beta": {"size": 2.0}}, "size"),
        ({"beta": {"coords": 0.0}}, "positive"),
        ({"beta": {"coords": math.inf}}, "positive"),
    ],
)
def test_weights_and_betas_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        HungarianLoss(schema=SCHEMA, **options)
    with pytest.raises(ValueError, match="elements"):
        HungarianLoss(schema=SCHEMA, weights={"coords": 2.0})(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="elements"):
        HungarianLoss(schema=SCHEMA, beta={"coords": 2.0})(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


def test_beta_is_where_the_cost_turns_linear():
    """One pair: torch's own smooth L1 for each group, on both sides of beta."""
    dim = SCHEMA.set_dim
    target, beta = torch.zeros(1, 1, dim), {"coords": 0.05}
    for error in (0.01, 0.049, 0.051, 0.3, 2.0):
        predicted = torch.full((1, 1, dim), error)
        coords = torch.nn.functional.smooth_l1_loss(torch.tensor(error), torch.tensor(0.0), beta=0.05)
        rest = torch.nn.functional.smooth_l1_loss(torch.tensor(error), torch.tensor(0.0))
        expected = (2 * coords + (dim - 2) * rest) / dim
        torch.testing.assert_close(HungarianLoss(schema=SCHEMA, beta=beta)(predicted, target), expected.view(1))


@pytest.mark.parametrize(("beta", "cost"), [(None, 0.3**2 / 2), ({"coords": 0.05}, 0.5**2 / 2)])
def test_beta_decides_which_elements_are_matched(beta, cost):
    """Two pairings: places apart by 0.3, or classes apart by 0.5. Squares prefer the first, a small beta the second."""
    predicted, target = torch.zeros(2, 1, 2, SCHEMA.set_dim)
    target[0, 1, 0] = predicted[0, 1, 0] = 0.3
    target[0, 1, 2] = predicted[0, 0, 2] = 0.5
    loss = HungarianLoss(schema=SCHEMA, beta=beta)(predicted, target)
    torch.testing.assert_close(loss, torch.tensor([cost / SCHEMA.set_dim]))


@every_loss
def test_shapes_are_checked_at_the_door(make, pair):
    loss, (predicted, target) = built(make), pair
    with pytest.raises(ValueError, match="equal batch and element size"):
        loss(predicted, target[:3])
    with pytest.raises(ValueError, match="bool mask"):
        loss(predicted, target, predicted_mask=torch.ones(5, 3, dtype=torch.bool))


@every_loss
def test_full_precision_under_autocast(make, pair):
    predicted, target = (elements.float() for elements in pair)
    loss = built(make).float()
    expected = loss(predicted, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(predicted, target), expected)


# --- Hungarian ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(4, 2), (2, 4), (3, 3), (0, 2), (4, 0)])
def test_hungarian_loss_with_masks_fills_the_smaller_set_with_zeros(n, m):
    predicted, target = elements(4, 5, seed=0), elements(4, 4, seed=1)
    masks = (torch.arange(size).expand(4, size) < present for size, present in ((5, n), (4, m)))
    found = HungarianLoss()(predicted, target, *masks)
    size = max(n, m)
    rows, columns = torch.zeros(4, size, DIM, dtype=torch.float64), torch.zeros(4, size, DIM, dtype=torch.float64)
    rows[:, :n], columns[:, :m] = predicted[:, :n], target[:, :m]
    cost = pairwise_smooth_l1(rows, columns)
    for b in range(4):
        totals = (sum(cost[b, i, j].item() for j, i in enumerate(p)) for p in itertools.permutations(range(size)))
        assert found[b].item() == pytest.approx(min(totals) / size)


def test_masked_assignment_is_that_of_the_present():
    cost = elements(6, 5, seed=0, dim=4)
    rows, columns = elements(1, 6, seed=1, dim=5)[0] > -0.3, elements(1, 6, seed=2, dim=4)[0] > -0.3
    cost[~(rows[:, :, None] & columns[:, None])] = torch.nan
    found = hungarian(cost, rows, columns)
    for b in range(6):
        i, j = rows[b].nonzero().flatten().tolist(), columns[b].nonzero().flatten().tolist()
        taken = found[b][found[b] >= 0]
        assert len(taken) == len(taken.unique()) == min(len(i), len(j))
        assert set(taken.tolist()) <= set(i)
        assert (found[b][~columns[b]] == -1).all()
        total = sum(cost[b, found[b, k], k].item() for k in j if found[b, k] >= 0)
        if len(i) >= len(j):
            choices = (sum(cost[b, r, c].item() for r, c in zip(p, j)) for p in itertools.permutations(i, len(j)))  # noqa: B905
        else:
            choices = (sum(cost[b, r, c].item() for r, c in zip(i, p)) for p in itertools.permutations(j, len(i)))  # noqa: B905
        assert total == pytest.approx(min(choices))


# --- Sinkhorn -----------------------------------------------------------------------------------------------------


def test_sinkhorn_plan_has_the_asked_for_marginals():
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(3, 4, 5, dtype=torch.float64, generator=generator)
    a, b = (torch.rand(3, n, dtype=torch.float64, generator=generator) for n in (4, 5))
    a[1, 2] = b[1, 0] = 0  # nothing there
    a, b = 7 * a / a.sum(-1, keepdim=True), 7 * b / b.sum(-1, keepdim=True)
    short, long = (sinkhorn(cost, a, b, epsilon=0.1, iterations=iterations).plan for iterations in (1, 400))
    torch.testing.assert_close(short.sum(1), b)
    torch.testing.assert_close(long.sum(1), b)
    torch.testing.assert_close(long.sum(2), a)
    assert (long >= 0).all()
    assert (long[1, 2] == 0).all()
    assert (long[1, :, 0] == 0).all()


def test_sinkhorn_goes_on_where_it_was():
    cost = elements(3, 4, seed=0)
    whole = sinkhorn(cost, epsilon=0.5, iterations=7)
    part = sinkhorn(cost, epsilon=0.5, iterations=3)
    torch.testing.assert_close(sinkhorn(cost, epsilon=0.5, iterations=4, start=part), whole)


def test_sinkhorn_minimises_its_objective():
    """No feasible change of the plan lowers ⟨P, C⟩ + ε KL(P | abᵀ)."""
    cost, epsilon = elements(1, 3, seed=0, dim=3), 0.3
    plan = sinkhorn(cost, epsilon=epsilon, iterations=500).plan

    def objective(plan):
        return (plan * cost).sum() + epsilon * (plan * (9 * plan).log()).sum()

    least = objective(plan)
    for i, k, j, n in itertools.product(range(3), repeat=4):
        change = torch.zeros_like(plan)
        change[0, i, j] += 1e-4
        change[0, k, n] += 1e-4
        change[0, i, n] -= 1e-4
        change[0, k, j] -= 1e-4
        assert objective(plan + change) >= least - 1e-14


def test_sinkhorn_plan_becomes_the_assignment():
    cost = elements(6, 4, seed=0, dim=4)
    expected = torch.zeros_like(cost).scatter(1, hungarian(cost).unsqueeze(1), 0.25)
    cost = cost - 4 * 0.5 * expected  # still the best, and clearly so
    plan = sinkhorn(cost, epsilon=0.02, iterations=500).plan
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-3)


def test_sinkhorn_plan_is_differentiable_and_empty_examples_have_none():
    cost, a, b = elements(2, 3, seed=0, dim=3), torch.rand(2, 3).double(), torch.rand(2, 3).double()
    a[0], b[0, 1] = 0, 0

    def plan(cost):
        return sinkhorn(cost, a, b, epsilon=0.5, iterations=3).plan

    assert (plan(cost)[0] == 0).all()
    leaf, upstream = cost.clone().requires_grad_(), elements(2, 3, seed=1, dim=3)
    (plan(leaf) * upstream).sum().backward()
    expected = finite_difference(lambda c: (plan(c) * upstream).sum(), cost)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{"epsilon": 0.0, "iterations": 1}, {"epsilon": 1.0, "iterations": -1}])
def test_sinkhorn_refuses_bad_numbers(options):
    with pytest.raises(ValueError, match="epsilon > 0"):
        sinkhorn(torch.zeros(1, 2, 2), **options)
    with pytest.raises(ValueError, match="expected masses"):
        sinkhorn(torch.zeros(1, 2, 2), torch.zeros(1, 3), epsilon=1.0, iterations=1)


def least_transport(cost):
    """By linear programming: the least cost of moving uniform mass."""
    n, m = cost.shape
    sums = [np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))]
    result = linprog(cost.ravel(), A_eq=np.concatenate(sums), b_eq=[1 / n] * n + [1 / m] * m)
    assert result.success
    return result.fun


@pytest.mark.parametrize("m", [4, 3, 1])
def test_sinkhorn_divergence_becomes_the_least_cost_of_transport(m):
    predicted, target = elements(4, 4, seed=0), elements(4, m, seed=1)
    cost = pairwise_squared(predicted, target)
    expected = torch.tensor([least_transport(c.numpy()) for c in cost], dtype=torch.float64)
    if m == 4:  # which is then an assignment, of those the least
        for b in range(4):
            totals = (sum(cost[b, i, j].item() for j, i in enumerate(p)) / 4 for p in itertools.permutations(range(4)))
            assert expected[b].item() == pytest.approx(min(totals))
    errors = [
        (SinkhornDivergence(epsilon=epsilon, iterations=200)(predicted, target) - expected).abs().max().item()
        for epsilon in (0.1, 0.01, 0.001)
    ]
    assert errors[0] > errors[1] > errors[2] or m == 1
    assert errors[2] < 1e-3


def test_sinkhorn_divergence_of_high_temperature_is_the_distance_of_the_means():
    predicted, target = elements(4, 4, seed=0), elements(4, 3, seed=1)
    found = SinkhornDivergence(epsilon=1e5, iterations=5)(predicted, target)
    torch.testing.assert_close(found, 0.5 * (predicted.mean(1) - target.mean(1)).square().mean(-1), rtol=1e-4, atol=0)


def test_sinkhorn_divergence_sees_multiplicity_and_is_symmetric(pair):
    a, b = torch.tensor([0.0]), torch.tensor([1.0])
    one, other = torch.stack([a, a, b]).unsqueeze(0), torch.stack([a, b, b]).unsqueeze(0)
    assert SinkhornDivergence(epsilon=1e-3)(one, other).item() == pytest.approx(0.5 / 3, abs=1e-3)
    loss = SinkhornDivergence(epsilon=0.1)
    torch.testing.assert_close(loss(*pair), loss(*reversed(pair)))


def test_sinkhorn_divergence_of_equal_sets_is_zero_before_convergence(pair):
    loss = SinkhornDivergence(epsilon=1e-3, iterations=2)(pair[0], pair[0][:, [2, 0, 3, 1]])
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


# --- sliced Wasserstein -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize(("n", "m"), [(4, 4), (4, 3), (1, 3), (2, 4)])
def test_transport_along_lines_is_its_twin(n, m, power):
    """Each element repeated until both sets have n m of them; then sorted, side by side."""
    x, y, directions = elements(3, n, seed=0), elements(3, m, seed=1), elements(3, 5, seed=2)
    masks = (None, None) if n == m else (torch.ones(3, n, dtype=torch.bool), None)
    found = transport_along(x, y, directions, masks, power=power)
    for b, k in itertools.product(range(3), range(5)):
        ours, theirs = (
            sorted(float(element @ directions[b, k]) for element in side[b] for _ in range(times))
            for side, times in ((x, m), (y, n))
        )
        expected = sum(abs(p - q) ** power for p, q in zip(ours, theirs, strict=True)) / (n * m)
        assert found[b, k].item() == pytest.approx(expected)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_in_one_dimension_it_is_the_closed_form(power):
    """Quantiles of a normal distribution, moved and stretched: W_p^p = E|a + (s - 1) z|^p."""
    z = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    shuffled = z[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    moved, stretched = (0.5 + z).view(1, -1, 1), (3 * shuffled).view(1, -1, 1)
    loss = SlicedWasserstein(projections=3, power=power).eval()
    assert loss(moved, shuffled.view(1, -1, 1)).item() == pytest.approx(0.5**power)
    expected = 4.0 if power == 2 else 2 * math.sqrt(2 / math.pi)
    assert loss(stretched, z.view(1, -1, 1)).item() == pytest.approx(expected, rel=2e-3)


def test_single_elements_are_as_far_as_their_mean_square():
    x, y = elements(2, 1, seed=0), elements(2, 1, seed=1)
    found = SlicedWasserstein(projections=40_000).eval()(x, y)
    torch.testing.assert_close(found, (x - y).square().mean((1, 2)), rtol=2e-2, atol=0)


def test_directions_are_fresh_in_training_and_fixed_in_evaluation(pair):
    loss = SlicedWasserstein(projections=2)
    assert not torch.equal(loss(*pair), loss(*pair))
    loss.eval()
    assert torch.equal(loss(*pair), loss(*pair))


@pytest.mark.parametrize("steps", [0, 1, 20])
def test_the_maximum_is_not_under_the_mean_and_climbs(steps):
    x, y = elements(6, 4, seed=0), elements(6, 3, seed=1)
    masks = torch.ones(6, 4, dtype=torch.bool), torch.ones(6, 3, dtype=torch.bool)
    mean = SlicedWasserstein(projections=8).eval()(x, y, *masks)
    found, start = (MaxSlicedWasserstein(projections=8, steps=number).eval()(x, y, *masks) for number in (steps, 0))
    assert (start >= mean).all()
    assert (found >= start).all()
    assert steps == 0 or (found > start).any()


def test_the_maximum_is_that_of_all_directions_in_the_plane():
    x, y = elements(6, 4, seed=0, dim=2), elements(6, 4, seed=1, dim=2)
    angle = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    around = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(0)
    expected = transport_along(x, y, around, power=2.0).amax(1)
    found = MaxSlicedWasserstein(projections=64, steps=100).eval()(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_maximum_of_a_shift_is_along_it():
    x, shift = elements(3, 4, seed=0), elements(3, 1, seed=1)
    found = MaxSlicedWasserstein(steps=100).eval()(x + shift, x)
    torch.testing.assert_close(found, shift.square().sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("concentration", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("dim", [2, 3, 7])
def test_directions_are_distributed_as_von_mises_and_fisher_say(dim, concentration):
    """Mean of the cosine to the centre: I_{d/2}(κ) / I_{d/2 - 1}(κ); none to any other side."""
    loss = DistributionalSlicedWasserstein(set_dim=dim, concentration=concentration, projections=40_000).double().eval()
    x, y = elements(1, 4, seed=0, dim=dim), elements(1, 4, seed=1, dim=dim)
    seen = []
    loss._around_first_axis = lambda centre, draw=loss._around_first_axis: seen.append(centre) or draw(centre)
    directions = loss.directions(x, y, (None, None))[0]
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(40_000, dtype=torch.float64))
    length = ive(dim / 2, concentration) / ive(dim / 2 - 1, concentration) if concentration else 0.0
    torch.testing.assert_close(directions.mean(0), length * seen[0][0], rtol=0, atol=0.02)


def test_reflection_carries_the_first_axis_to_the_centre():
    directions = torch.nn.functional.normalize(elements(1, 9, seed=0)[0], dim=-1)
    centre = torch.nn.functional.normalize(elements(1, 3, seed=1)[0], dim=-1)
    centre[2] = torch.eye(DIM, dtype=torch.float64)[0]  # the axis itself
    found = reflected(directions, centre)
    torch.testing.assert_close((found * centre.unsqueeze(1)).sum(-1), directions[:, 0].expand(3, 9))
    torch.testing.assert_close(found @ found.mT, (directions @ directions.mT).expand(3, 9, 9))


def test_the_attention_climbs_what_the_model_descends(pair):
    predicted, target = pair
    loss = built(DIVERGENCES["distributional"], concentration=5.0)
    weight = loss.value.weight
    loss(predicted, target).sum().backward()

    @torch.no_grad()
    def value(candidate):
        old = weight.clone()
        weight.copy_(candidate)
        result = loss(predicted, target).sum()
        weight.copy_(old)
        return result

    torch.testing.assert_close(weight.grad, -finite_difference(value, weight), rtol=1e-5, atol=1e-8)
    assert loss.query.weight.grad.abs().max() > 0
    before = loss(predicted, target).sum().item()
    optimiser = torch.optim.Adam(loss.parameters(), 0.03)
    for _ in range(30):
        optimiser.zero_grad()
        loss(predicted, target).sum().backward()
        optimiser.step()
    assert loss(predicted, target).sum().item() > 1.1 * before


# --- DETR ---------------------------------------------------------------------------------------------------------


def detr_twin(predicted, target, *, no_object, coords, weights):
    """One example, in loops over Python floats and all assignments."""

    def softmax(scores):
        whole = sum(math.exp(s) for s in scores)
        return [math.exp(s) / whole for s in scores]

    real = [row for row in target if row[-1] > 0.5]
    odds = [1 / (1 + math.exp(0.5 - row[-1])) for row in predicted]
    entropy, place = {}, {}
    for (i, ours), (j, theirs) in itertools.product(enumerate(predicted), enumerate(real)):
        kind = softmax(ours[2:5])[theirs[2:5].index(1)]
        entropy[i, j] = -weights["presence"] * math.log(odds[i]) - weights["kind"] * math.log(kind)
        place[i, j] = coords * weights["coords"] * sum(abs(ours[d] - theirs[d]) for d in range(2))
    best, matching = math.inf, ()
    for chosen in itertools.permutations(range(len(predicted)), len(real)):
        total = sum(place[i, j] - math.exp(-entropy[i, j]) for j, i in enumerate(chosen))
        if total < best:
            best, matching = total, chosen
    classes = sum(entropy[i, j] for j, i in enumerate(matching))
    for i in set(range(len(predicted))) - set(matching):
        classes -= no_object * weights["presence"] * math.log(1 - odds[i])
    classes /= len(real) + no_object * (len(predicted) - len(real))
    places = sum(place[i, j] for j, i in enumerate(matching))
    return classes + (places / len(real) if real else 0)


@pytest.mark.parametrize("present", [0, 1, 3, 4])
@pytest.mark.parametrize(
    "weights", [{"presence": 1.0, "kind": 1.0, "coords": 1.0}, {"presence": 0.5, "kind": 3.0, "coords": 0.2}]
)
def test_detr_criterion_is_its_twin(present, weights):
    predicted, target = elements(6, 5, seed=0), targets(6, 4, present, seed=1)
    loss = DETRCriterion(schema=SCHEMA, no_object=0.3, coords=0.7, weights=weights)
    for b, found in enumerate(loss(predicted, target)):
        expected = detr_twin(predicted[b].tolist(), target[b].tolist(), no_object=0.3, coords=0.7, weights=weights)
        assert found.item() == pytest.approx(expected)


def test_detr_criterion_vanishes_for_sure_and_right_predictions():
    target = targets(3, 4, 2, seed=0)
    sure = target.clone()
    sure[..., 2:] = 200 * (target[..., 2:] - 0.5)
    loss = DETRCriterion(schema=SCHEMA)(sure[:, [3, 1, 0, 2]], target)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


def test_detr_criterion_asks_for_nothing_where_there_is_nothing():
    predicted = elements(3, 4, seed=0).requires_grad_()
    DETRCriterion(schema=SCHEMA)(predicted, targets(3, 4, 0, seed=1)).sum().backward()
    assert (predicted.grad[..., -1] > 0).all()  # descent lowers every presence
    assert (predicted.grad[..., :-1] == 0).all()


def test_detr_criterion_needs_a_prediction_for_each_object():
    with pytest.raises(ValueError, match="as many predictions as objects"):
        DETRCriterion(schema=SCHEMA)(elements(2, 2, seed=0), targets(2, 4, 3, seed=1))


def test_detr_criterion_with_boxes():
    schema = ElementSchema("boxed", [continuous("box", 4), categorical("kind", "a", "b")], max_objects=2)
    target = torch.tensor([[[0.5, 0.5, 0.2, 0.4, 1, 0, 1]]], dtype=torch.float64)
    predicted = target.clone()
    predicted[..., 0] += 0.1
    with_boxes, without = (DETRCriterion(schema=schema, box=box) for box in ("box", None))
    overlap = generalised_iou(predicted[..., :4], target[..., :4]).item()
    difference = with_boxes(predicted, target) - without(predicted, target)
    assert difference.item() == pytest.approx(2 * (1 - overlap))
    with pytest.raises(InputError, match="4 numbers"):
        DETRCriterion(schema=SCHEMA, box="coords")


def test_generalised_iou_is_that_of_torchvision():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(30, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (a, b))
    torch.testing.assert_close(generalised_iou(a[:, None], b[None]), generalized_box_iou(*corners))
    torch.testing.assert_close(generalised_iou(a, a), torch.ones(30, dtype=torch.float64))
    flat = torch.zeros(1, 4, requires_grad=True)
    generalised_iou(flat, flat.detach()).sum().backward()
    assert torch.isfinite(flat.grad).all()


# --- in training --------------------------------------------------------------------------------------------------

IN_CONFIGS = {
    "HungarianLoss": {"weights": {"coords": 10.0}, "beta": {"coords": 0.1}},
    "ChamferLoss": {},
    "SinkhornDivergence": {"epsilon": 0.05},
    "SlicedWasserstein": {"projections": 8},
    "MaxSlicedWasserstein": {"steps": 2},
    "DistributionalSlicedWasserstein": {"projections": 8},
    "DETRCriterion": {"no_object": 0.2, "weights": {"coords": 2.0}},
}


@pytest.mark.parametrize("name", IN_CONFIGS)
def test_each_can_be_named_in_a_configuration_and_rebuilt_from_a_checkpoint(name, tmp_path):
    arguments = {"class_path": f"setpred.losses.{name}", "init_args": IN_CONFIGS[name]}
    config = yaml.safe_load(CONFIG)
    config["model"]["loss"] = arguments
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    cli = build(["--config", str(file), "--trainer.logger", "false"])
    loss = cli.model.loss
    target = torch.zeros(2, 4, cli.model.schema.set_dim)
    predicted = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss(predicted, target).mean().backward()
    assert predicted.grad.abs().sum() > 0
    assert loss.state_dict().keys() == {key for key, _ in loss.named_parameters()}
    saved = cli.model.settings["model"]["loss"]
    rebuilt = build_part(saved, allowed_classes())
    rebuilt.load_state_dict(loss.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(predicted, target), loss.eval()(predicted, target))
