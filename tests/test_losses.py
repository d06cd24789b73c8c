"""Laws over all set losses, and each against its definition, a twin or a known answer."""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import finite_difference
from scipy.optimize import linprog
from scipy.special import ive
from torch import nn
from torch.testing import assert_close
from torchvision.ops import box_convert, generalized_box_iou

from setpred.checkpoint.load import allowed_classes
from setpred.checkpoint.load import build as build_part
from setpred.losses import (
    ChamferLoss,
    DETRCriterion,
    DistributionalSlicedWasserstein,
    HungarianLoss,
    MatchingWithTransport,
    MaxSlicedWasserstein,
    SinkhornDivergence,
    SlicedWasserstein,
    generalised_iou,
    ot_seq2set,
)
from setpred.losses.sliced import transport_along
from setpred.matching import pairwise_smooth_l1, pairwise_squared, sinkhorn
from setpred.schema import CLEVR, ElementSchema, categorical, continuous

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
LOSSES = DIVERGENCES | {
    "hungarian, padding anywhere": lambda **options: HungarianLoss(
        **{"schema": SCHEMA, "only_present": ["coords"]} | options
    ),
    "hungarian, quantiles": lambda **options: HungarianLoss(
        **{"schema": SCHEMA, "quantiles": {"coords": 0.2}} | options
    ),
    "detr": lambda **options: DETRCriterion(**{"schema": SCHEMA} | options),
    "matching with transport": lambda **options: MatchingWithTransport(iterations=30, **options),
}
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
    rows = torch.cat([coords, kinds, torch.ones(batch, size, 1, dtype=torch.float64)], -1)
    rows[:, present:] = 0
    return rows


def vanishes(values, tolerance=1e-12):
    assert_close(values, torch.zeros_like(values), rtol=0, atol=tolerance)


@pytest.fixture
def pair():
    return elements(5, 4, seed=0), targets(5, 4, 3, seed=1)


# --- laws over all losses ---


@every_loss
def test_the_order_of_either_set_is_not_seen_nor_the_rest_of_the_batch(make, pair):
    loss, (predicted, target) = built(make), pair
    expected = loss(predicted, target)
    assert expected.shape == (5,)
    assert (expected > 0).all()
    assert_close(loss(predicted[:, [2, 0, 3, 1]], target), expected)
    assert_close(loss(predicted, target[:, [1, 3, 2, 0]]), expected)
    assert_close(loss(predicted[2:3], target[2:3]), expected[2:3])


@every_divergence
def test_equal_multisets_cost_nothing(make):
    target = elements(5, 4, seed=0)
    target[:, 1] = target[:, 0]  # a repeated element too
    leaf = target[:, [3, 1, 0, 2]].clone().requires_grad_()
    loss = built(make)(leaf, target)
    vanishes(loss)
    loss.sum().backward()
    # exact for a symmetric plan of transport, which Sinkhorn's is only at convergence
    vanishes(leaf.grad, 1e-3 if make is DIVERGENCES["sinkhorn"] else 1e-12)


@every_loss
def test_gradients_by_finite_differences(make, pair, monkeypatch):
    """With the directions and the plan that losses hold fixed."""
    loss, (predicted, target) = built(make), pair
    predicted, target = predicted[:1, :3], target[:1, 1:]  # of which one is padding
    if isinstance(loss, SlicedWasserstein):
        directions = loss.directions(predicted, target, (None, None)).detach()
        monkeypatch.setattr(loss, "directions", lambda *_: directions)
    plans = []
    if isinstance(loss, MatchingWithTransport):
        monkeypatch.setattr(
            ot_seq2set, "sinkhorn", lambda *args, **options: plans.append(sinkhorn(*args, **options)) or plans[0]
        )
    leaf = predicted.clone().requires_grad_()
    loss(leaf, target).sum().backward()
    expected = finite_difference(lambda p: loss(p, target).sum(), predicted)
    assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-7)


@every_loss
@pytest.mark.parametrize("present", [3, 1])
def test_masked_elements_have_no_influence(make, present):
    """As if absent, whatever they hold and however many; they receive no gradient."""
    loss, predicted, target = built(make), elements(3, 3, seed=0), targets(3, present, present, seed=1)
    leaf = predicted.clone().requires_grad_()
    # sets of different sizes need a mask, if only a full one
    full = None if present == 3 else torch.ones(3, present, dtype=torch.bool)
    expected = loss(leaf, target, target_mask=full)
    expected.sum().backward()

    order = [4, 0, 2, 3, 1]
    junk = torch.full((3, 2, DIM), torch.nan, dtype=torch.float64)
    padded = torch.cat([predicted, junk], 1)[:, order].requires_grad_()
    mask = torch.tensor([True] * 3 + [False] * 2)[order].expand(3, 5)
    target_mask = torch.tensor([False] * 2 + [True] * present).expand(3, 2 + present)
    found = loss(padded, torch.cat([junk, target], 1), mask, target_mask)
    assert_close(found, expected)
    found.sum().backward()
    assert_close(padded.grad, torch.cat([leaf.grad, torch.zeros_like(junk)], 1)[:, order])


@every_loss
def test_empty_sets_give_numbers_and_gradients(make):
    loss, predicted, target = built(make), elements(3, 4, seed=0), targets(3, 4, 0, seed=1)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    for given, mask in ((target, None), (target, nothing), (target[:, :0], nothing[:, :0])):
        leaf = predicted.clone().requires_grad_()
        value = loss(leaf, given, target_mask=mask)
        assert (value >= 0).all()
        value.sum().backward()
        assert torch.isfinite(leaf.grad).all()
    vanishes(loss(predicted, target, nothing, nothing))
    if not isinstance(loss, DETRCriterion):  # the cut by presence empties sets too
        vanishes(built(make, presence_threshold=10.0)(predicted, target))


@every_loss
def test_a_mask_of_some_examples_leaves_the_others_alone(make, pair):
    """Sets of different sizes in one batch are as each alone."""
    loss, predicted, target = built(make), pair[0], targets(5, 4, 4, seed=1)
    masks = [torch.arange(4) < torch.tensor(sizes)[:, None] for sizes in ([4, 1, 2, 3, 0], [3, 1, 0, 3, 0])]
    alone = [loss(*(part[b : b + 1] for part in (predicted, target, *masks))) for b in range(5)]
    together = loss(predicted, target, *masks)
    assert torch.isfinite(together).all()
    assert_close(together, torch.cat(alone))


@every_divergence
def test_the_presence_threshold_is_a_mask(make, pair):
    predicted, target = pair
    cut = built(make, presence_threshold=0.25)(predicted, target)
    assert_close(cut, built(make)(predicted, target, predicted[..., -1] > 0.25, target[..., -1] > 0.25))


@every_divergence
def test_weights_multiply_the_share_of_their_group(make):
    """Sets that differ in one group alone: its weight is a factor, the weights of others do nothing."""
    predicted, target = (torch.zeros(5, 4, DIM, dtype=torch.float64) for _ in range(2))
    predicted[..., :2], target[..., :2] = elements(5, 4, seed=2, dim=2), elements(5, 4, seed=3, dim=2)
    loss, heavy, other, blind = (
        built(make, schema=SCHEMA, weights=weights)
        for weights in (None, {"coords": 4.0}, {"kind": 7.0}, {"coords": 0.0})
    )
    expected = 4 * loss(predicted, target)
    if isinstance(loss, SinkhornDivergence):  # a temperature of the cost's unit
        heavy.epsilon = 4 * loss.epsilon
    if isinstance(loss, DistributionalSlicedWasserstein):  # the directions depend on the weighted numbers
        expected = loss(2 * predicted, 2 * target)
    assert_close(heavy(predicted, target), expected, rtol=1e-6, atol=1e-8)
    assert_close(other(predicted, target), loss(predicted, target))
    vanishes(blind(predicted, target), 1e-7)


@pytest.mark.parametrize(
    ("raising", "words"),
    [
        (lambda: HungarianLoss()(elements(1, 3, seed=0), elements(1, 2, seed=0)), "3 predicted and 2 target"),
        (lambda: DETRCriterion(schema=SCHEMA)(elements(2, 2, seed=0), targets(2, 4, 3, seed=1)), "as many predictions"),
        (lambda: DETRCriterion(schema=SCHEMA, box="coords"), "4 numbers"),
        (lambda: HungarianLoss(schema=SCHEMA, weights={"size": 2.0}), "size"),
        (lambda: HungarianLoss(schema=SCHEMA, weights={"coords": -1.0}), "at least 0"),
        (lambda: HungarianLoss(schema=SCHEMA, weights={"coords": math.nan}), "at least 0"),
        (lambda: HungarianLoss(schema=SCHEMA, beta={"size": 2.0}), "size"),
        (lambda: HungarianLoss(schema=SCHEMA, only_present=["size"]), "size"),
        (lambda: HungarianLoss(schema=SCHEMA, beta={"coords": 0.0}), "positive"),
        (lambda: HungarianLoss(schema=SCHEMA, beta={"coords": math.inf}), "positive"),
        (lambda: HungarianLoss(schema=SCHEMA, weights={"coords": 2.0})(*torch.zeros(2, 1, 2, 3)), "elements"),
        (lambda: MatchingWithTransport(transport=-1.0), "expected transport"),
        (lambda: MatchingWithTransport(temperature=0.0), "expected transport"),
        (lambda: MatchingWithTransport(iterations=0), "expected transport"),
    ],
)
def test_sizes_and_numbers_are_checked(raising, words):
    with pytest.raises(ValueError, match=words):
        raising()


@every_loss
def test_shapes_are_checked(make, pair):
    loss, (predicted, target) = built(make), pair
    for other in (target[:3], target[..., :-1]):
        with pytest.raises(ValueError, match="equal batch and element size"):
            loss(predicted, other)
    with pytest.raises(ValueError, match="bool mask"):
        loss(predicted, target, predicted_mask=torch.ones(5, 3, dtype=torch.bool))


@every_loss
def test_full_precision_under_autocast(make, pair):
    predicted, target = (elements.float() for elements in pair)
    loss = built(make).float()
    expected = loss(predicted, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(predicted, target), expected)


IN_CONFIGS = {
    "HungarianLoss": {"weights": {"coords": 10.0}, "beta": {"coords": 0.1}, "only_present": ["coords"]},
    "ChamferLoss": {},
    "SinkhornDivergence": {"epsilon": 0.05},
    "SlicedWasserstein": {"projections": 8},
    "MaxSlicedWasserstein": {"steps": 2, "projections": 8},
    "DistributionalSlicedWasserstein": {"projections": 8, "set_dim": CLEVR.set_dim},
    "DETRCriterion": {"no_object": 0.2, "weights": {"coords": 2.0}},
    "MatchingWithTransport": {"transport": 0.1, "weights": {"coords": 2.0}},
}


@pytest.mark.parametrize("name", IN_CONFIGS)
def test_each_can_be_named_in_a_configuration_and_rebuilt_from_a_checkpoint(name):
    config = {"class_path": f"setpred.losses.{name}", "init_args": IN_CONFIGS[name]}
    loss, rebuilt = (build_part(config, allowed_classes()).eval() for _ in range(2))
    loss.use_schema(CLEVR)
    rebuilt.use_schema(CLEVR)
    rebuilt.load_state_dict(loss.state_dict())
    assert loss.state_dict().keys() == dict(loss.named_parameters()).keys()
    target = torch.zeros(2, 4, CLEVR.set_dim)
    predicted = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = loss(predicted, target)
    assert torch.equal(rebuilt(predicted, target), value)
    value.mean().backward()
    assert predicted.grad.abs().sum() > 0


# --- Hungarian and Chamfer ---


@pytest.mark.parametrize(("n", "m"), [(4, 2), (2, 4), (3, 3), (0, 2), (4, 0), (None, None)])
def test_hungarian_loss_fills_the_smaller_set_with_zeros_if_there_are_masks(n, m):
    predicted, target = elements(4, 5, seed=0), elements(4, 4, seed=1)
    if n is None:
        n = m = 4
        found = HungarianLoss()(predicted[:, :4], target)
    else:
        masks = (torch.arange(size).expand(4, size) < present for size, present in ((5, n), (4, m)))
        found = HungarianLoss()(predicted, target, *masks)
    size = max(n, m)
    rows, columns = torch.zeros(4, size, DIM, dtype=torch.float64), torch.zeros(4, size, DIM, dtype=torch.float64)
    rows[:, :n], columns[:, :m] = predicted[:, :n], target[:, :m]
    cost = pairwise_smooth_l1(rows, columns)
    for b in range(4):
        totals = (sum(cost[b, i, j].item() for j, i in enumerate(p)) for p in itertools.permutations(range(size)))
        assert found[b].item() == pytest.approx(min(totals) / size)


def test_beta_is_where_the_cost_turns_linear():
    """One pair: torch's own smooth L1 for each group, on both sides of beta."""
    for error in (0.01, 0.049, 0.051, 0.3, 2.0):
        coords, rest = (
            nn.functional.smooth_l1_loss(torch.tensor(error), torch.tensor(0.0), beta=beta) for beta in (0.05, 1.0)
        )
        found = HungarianLoss(schema=SCHEMA, beta={"coords": 0.05})(
            torch.full((1, 1, DIM), error), torch.zeros(1, 1, DIM)
        )
        assert_close(found, ((2 * coords + (DIM - 2) * rest) / DIM).view(1))


@pytest.mark.parametrize(("beta", "cost"), [(None, 0.3**2 / 2), ({"coords": 0.05}, 0.5**2 / 2)])
def test_beta_decides_which_elements_are_matched(beta, cost):
    """Two pairings: places apart by 0.3, or classes apart by 0.5. Squares prefer the first, a small beta the second."""
    predicted, target = torch.zeros(2, 1, 2, DIM)
    target[0, 1, 0] = predicted[0, 1, 0] = 0.3
    target[0, 1, 2] = predicted[0, 0, 2] = 0.5
    assert_close(HungarianLoss(schema=SCHEMA, beta=beta)(predicted, target), torch.tensor([cost / DIM]))


def test_padding_may_be_anywhere_by_brute_force(pair):
    """The least of all matchings, where the coordinates of a prediction matched to padding cost nothing."""
    predicted, target = pair
    loss = HungarianLoss(schema=SCHEMA, weights={"coords": 3.0}, beta={"coords": 0.05}, only_present=["coords"])
    found = loss(predicted, target)
    for b in range(len(target)):
        totals = []
        for order in itertools.permutations(range(4)):
            matched = predicted[b, list(order)].clone()
            matched[3, :2] = target[b, 3, :2]  # padding
            costs = [
                weight * nn.functional.smooth_l1_loss(matched[:, part], target[b][:, part], beta=beta, reduction="sum")
                for part, weight, beta in ((slice(2), 3.0, 0.05), (slice(2, None), 1.0, 1.0))
            ]
            totals.append(sum(costs).item() / (4 * DIM))
        assert found[b].item() == pytest.approx(min(totals))


def test_aligned_elements_keep_their_order_in_training_alone(pair):
    predicted, target = (part.float() for part in pair)
    options = {"schema": SCHEMA, "weights": {"coords": 3.0}, "only_present": ["coords"]}
    matched, aligned = HungarianLoss(**options), HungarianLoss(aligned=True, **options)
    first, last = (torch.eye(4)[order] @ part for order, part in (([2, 0, 3, 1], predicted), ([2, 0, 3, 1], target)))
    assert_close(aligned(first, last), aligned(predicted, target))  # together
    assert (aligned(first, target) > matched(first, target) + 1e-4).any()
    assert_close(aligned(target[:, [1, 0, 2, 3]], target) > 0, torch.ones(len(target)).bool())
    assert_close(aligned.eval()(first, target), matched(first, target))


def test_chamfer_is_the_definition_and_blind_to_multiplicity():
    one, other, single = (torch.tensor([[[a], [b], [c]]]) for a, b, c in ((0.0, 0.0, 4.0), (0.0, 4.0, 4.0), (0.0,) * 3))
    assert ChamferLoss()(one, other).item() == 0
    assert HungarianLoss()(one, other).item() == pytest.approx(3.5 / 3)
    # targets: 0, 0 and 4 to the nearest 0; predictions: all at 0
    assert ChamferLoss()(single, one).item() == pytest.approx(0.5 * 3.5 / 3)


# --- Sinkhorn ---


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
    errors = [
        (SinkhornDivergence(epsilon=epsilon, iterations=200)(predicted, target) - expected).abs().max().item()
        for epsilon in (0.1, 0.01, 0.001)
    ]
    assert errors[0] > errors[1] > errors[2] or m == 1
    assert errors[2] < 1e-3


def test_sinkhorn_divergence_sees_multiplicity_and_is_symmetric(pair):
    one, other = torch.tensor([[[0.0], [0.0], [1.0]]]), torch.tensor([[[0.0], [1.0], [1.0]]])
    assert SinkhornDivergence(epsilon=1e-3)(one, other).item() == pytest.approx(0.5 / 3, abs=1e-3)
    loss = SinkhornDivergence(epsilon=0.1)
    assert_close(loss(*pair), loss(*reversed(pair)))
    # equal sets have none even before convergence
    vanishes(SinkhornDivergence(epsilon=1e-3, iterations=2)(pair[0], pair[0][:, [2, 0, 3, 1]]))


# --- sliced Wasserstein ---


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


def test_single_elements_are_as_far_as_their_mean_square():
    x, y = elements(2, 1, seed=0), elements(2, 1, seed=1)
    found = SlicedWasserstein(projections=40_000).eval()(x, y)
    assert_close(found, (x - y).square().mean((1, 2)), rtol=2e-2, atol=0)


def test_directions_are_fresh_in_training_and_fixed_in_evaluation(pair):
    loss = SlicedWasserstein(projections=2)
    assert not torch.equal(loss(*pair), loss(*pair))
    assert torch.equal(loss.eval()(*pair), loss(*pair))


def test_the_maximum_is_that_of_all_directions():
    x, y = elements(6, 4, seed=0, dim=2), elements(6, 4, seed=1, dim=2)
    angle = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    around = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(0)
    expected = transport_along(x, y, around, power=2.0).amax(1)
    assert_close(MaxSlicedWasserstein(steps=100).eval()(x, y), expected, rtol=1e-4, atol=1e-6)
    # of a shift it is along the shift
    x, shift = elements(3, 4, seed=0), elements(3, 1, seed=1)
    found = MaxSlicedWasserstein(steps=100).eval()(x + shift, x)
    assert_close(found, shift.square().sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("concentration", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("dim", [2, 3, 7])
def test_directions_have_a_von_mises_fisher_distribution(dim, concentration):
    """Mean of the cosine to the centre: I_{d/2}(κ) / I_{d/2 - 1}(κ); none to any other side."""
    loss = DistributionalSlicedWasserstein(set_dim=dim, concentration=concentration, projections=40_000).double().eval()
    x, y = elements(1, 4, seed=0, dim=dim), elements(1, 4, seed=1, dim=dim)
    seen = []
    loss._around_first_axis = lambda centre, draw=loss._around_first_axis: seen.append(centre) or draw(centre)
    directions = loss.directions(x, y, (None, None))[0]
    assert_close(directions.norm(dim=-1), torch.ones(40_000, dtype=torch.float64))
    length = ive(dim / 2, concentration) / ive(dim / 2 - 1, concentration) if concentration else 0.0
    assert_close(directions.mean(0), length * seen[0][0], rtol=0, atol=0.02)


def test_the_attention_climbs_what_the_model_descends(pair):
    loss = built(DIVERGENCES["distributional"], concentration=5.0)
    weight = loss.value.weight
    loss(*pair).sum().backward()

    def value(candidate):
        parameters = dict(loss.named_parameters()) | {"value.weight": candidate}
        return torch.func.functional_call(loss, parameters, pair).sum()

    assert_close(weight.grad, -finite_difference(value, weight), rtol=1e-5, atol=1e-8)
    assert loss.query.weight.grad.abs().max() > 0


# --- DETR ---


def detr_twin(predicted, target, *, no_object, coords, weights):
    """One example, in loops over Python floats and all assignments."""

    def softmax(scores):
        total = sum(math.exp(s) for s in scores)
        return [math.exp(s) / total for s in scores]

    real = [row for row in target if row[-1] > 0.5]
    odds = [1 / (1 + math.exp(0.5 - row[-1])) for row in predicted]
    entropy, place = {}, {}
    for (i, ours), (j, theirs) in itertools.product(enumerate(predicted), enumerate(real)):
        kind = softmax(ours[2:5])[theirs[2:5].index(1)]
        entropy[i, j] = -weights["presence"] * math.log(odds[i]) - weights["kind"] * math.log(kind)
        place[i, j] = coords * weights["coords"] * sum(abs(ours[d] - theirs[d]) for d in range(2))

    def total(chosen):
        return sum(place[i, j] - math.exp(-entropy[i, j]) for j, i in enumerate(chosen))

    matching = min(itertools.permutations(range(len(predicted)), len(real)), key=total)
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


def test_detr_criterion_with_boxes():
    schema = ElementSchema("boxed", [continuous("box", 4), categorical("kind", "a", "b")], max_objects=2)
    target = torch.tensor([[[0.5, 0.5, 0.2, 0.4, 1, 0, 1]]], dtype=torch.float64)
    predicted = target.clone()
    predicted[..., 0] += 0.1
    with_boxes, without = (DETRCriterion(schema=schema, box=box) for box in ("box", None))
    overlap = generalised_iou(predicted[..., :4], target[..., :4]).item()
    difference = with_boxes(predicted, target) - without(predicted, target)
    assert difference.item() == pytest.approx(2 * (1 - overlap))


def test_generalised_iou_is_that_of_corners_and_finite_without_area():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(30, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (a, b))
    assert_close(generalised_iou(a[:, None], b[None]), generalized_box_iou(*corners))
    assert_close(generalised_iou(a, a), torch.ones(30, dtype=torch.float64))
    flat = torch.zeros(1, 4, requires_grad=True)
    value = generalised_iou(flat, flat.detach())
    value.sum().backward()
    assert value.item() == 0
    assert torch.isfinite(flat.grad).all()
    # negative sides count as 0
    assert generalised_iou(torch.tensor([0.0, 0, -1, 1]), torch.tensor([0.0, 0, 0, 1])) == 0


# --- OTSeq2Set ---


def proximal_points(cost, *, steps, inner=60):
    """P ← argmin <P, C> + KL(P | P before), each solved to the end by scaling rows and columns."""
    plan = torch.full_like(cost, 1 / cost.numel())
    for _ in range(steps):
        plan = plan * (-cost).exp()
        for _ in range(inner):
            plan = plan / plan.sum(1, keepdim=True) / plan.shape[0]
            plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
    return plan


@pytest.mark.parametrize("present", [3, 1, 0])
def test_transport_is_that_of_the_papers_proximal_points_to_real_elements(present):
    predicted, target = elements(1, 4, seed=0), targets(1, 4, present, seed=1)
    matched = HungarianLoss()(predicted, target)
    transport = MatchingWithTransport(transport=1.0, iterations=400)(predicted, target) - matched
    ours, theirs = predicted[0], target[0, :present]
    cost = 1 - (ours @ theirs.T) / (ours.norm(dim=-1)[:, None] * theirs.norm(dim=-1))
    expected = (proximal_points(cost, steps=50) * cost).sum() if present else transport.new_zeros(())
    assert_close(transport, expected.view(1), rtol=1e-4, atol=1e-6)
    heavier = MatchingWithTransport(transport=8.0, iterations=400)(predicted, target)
    assert_close(heavier, matched + 8 * transport)
