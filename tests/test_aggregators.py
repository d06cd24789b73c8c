"""Laws over the whole family of aggregators, and known answers for each."""

import itertools

import pytest
import torch
from problems import finite_difference

from setpred.aggregators import (
    AttentionPool,
    AttSets,
    CanonicalOrder,
    EquilibriumAggregation,
    FrameAverage,
    FSPool,
    LearnableMonoid,
    MaxPool,
    MeanPool,
    OrbitPool,
    PairwiseSetEncoder,
    ResidualPotential,
    SetEncoder,
    SumPool,
    SupersetPool,
    sort_features,
)
from setpred.inner import (
    EquilibriumMatching,
    Exact,
    GradientDescent,
    Implicit,
    LatentMatching,
    Problem,
    Unrolled,
    minimise,
)

DIM, SIZE = 6, 5


def equilibrium(prior=True, **arguments):
    arguments = {"gain": 0.7} | arguments
    return EquilibriumAggregation(
        DIM,
        potential=ResidualPotential(DIM, DIM, widths=(8, 8, 4)),
        prior=FSPool(DIM, set_size=SIZE) if prior else None,
        **arguments,
    )


FAMILY = {
    "sum": lambda: SumPool(DIM),
    "mean": lambda: MeanPool(DIM),
    "max": lambda: MaxPool(DIM),
    "fspool": lambda: FSPool(DIM, set_size=SIZE),
    "fspool, other knots": lambda: FSPool(DIM, set_size=9),
    "equilibrium": equilibrium,
    "equilibrium, r = 0": lambda: equilibrium(prior=False),
    "attention": lambda: AttentionPool(DIM, heads=2),
    "attention, seeds": lambda: AttentionPool(DIM, seeds=3, heads=3, normalise=False),
    "attsets": lambda: AttSets(DIM),
    "attsets, bounded": lambda: AttSets(DIM, bounded=True),
    "monoid in canonical order": lambda: CanonicalOrder(LearnableMonoid(DIM)),
    "frames, O(3)": lambda: FrameAverage(SetEncoder(FSPool(4, set_size=SIZE), set_dim=DIM, hidden_dim=8)),
    "frames, SO(2)": lambda: FrameAverage(FSPool(DIM, set_size=SIZE), position_dim=2, reflections=False),
    "orbits": lambda: OrbitPool(DIM, orbits=4, largest=2.0),
    "orbits, positions alone": lambda: OrbitPool(DIM, position_dim=DIM, out_dim=4, orbits=4, largest=3.0),
    "superset": lambda: SupersetPool(DIM, out_dim=4),
    "set encoder that keeps positions": lambda: SetEncoder(
        OrbitPool(5, position_dim=2, orbits=4), set_dim=DIM, hidden_dim=8, kept=2
    ),
    "set encoder": lambda: SetEncoder(FSPool(4, set_size=SIZE), set_dim=DIM, hidden_dim=8),
    "pairwise": lambda: PairwiseSetEncoder(SetEncoder(FSPool(4, set_size=SIZE**2), set_dim=2 * DIM, hidden_dim=8)),
}


@pytest.fixture(params=FAMILY.values(), ids=FAMILY.keys())
def aggregator(request):
    torch.manual_seed(0)
    return request.param().double()


def random_set(batch=3, size=SIZE, seed=1):
    return torch.randn(batch, size, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_order_does_not_matter(aggregator):
    elements = random_set()
    expected = aggregator(elements)
    assert expected.shape == (3, aggregator.out_dim)
    for order in itertools.islice(itertools.permutations(range(SIZE)), 1, 30, 5):
        torch.testing.assert_close(aggregator(elements[:, order]), expected, rtol=1e-9, atol=1e-9)


def test_padding_has_no_influence(aggregator):
    elements = random_set(size=3)
    padding = torch.full((3, 2, DIM), torch.nan, dtype=torch.float64)
    padded = torch.cat([elements, padding], dim=1)[:, [3, 0, 1, 4, 2]]
    mask = torch.tensor([False, True, True, False, True]).expand(3, -1)
    expected = aggregator(elements, torch.ones(3, 3, dtype=torch.bool))
    torch.testing.assert_close(aggregator(padded, mask), expected, rtol=1e-9, atol=1e-9)
    # with no mask at all, too: a full set is a full set
    torch.testing.assert_close(aggregator(elements), expected, rtol=1e-9, atol=1e-9)


def test_padding_gives_no_gradient_to_parameters(aggregator):
    elements, mask = random_set(), torch.tensor([True, False, True, True, False]).expand(3, -1)
    poisoned = elements.masked_fill(~mask.unsqueeze(-1), torch.nan)
    gradients = []
    for each in (elements, poisoned):
        aggregator.zero_grad()
        leaf = each.clone().requires_grad_()
        aggregator(leaf, mask).square().sum().backward()
        gradients.append([p.grad for p in aggregator.parameters() if p.grad is not None])
    for clean, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, clean)


def test_padding_gets_no_gradient(aggregator):
    elements = random_set().requires_grad_()
    mask = torch.tensor([True, False, True, True, False]).expand(3, -1)
    (gradient,) = torch.autograd.grad(aggregator(elements, mask).square().sum(), elements)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()


def test_an_empty_set_gives_finite_numbers(aggregator):
    mask = torch.zeros(3, SIZE, dtype=torch.bool)
    mask[1] = True
    out = aggregator(random_set(), mask)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[1], aggregator(random_set())[1], rtol=1e-9, atol=1e-9)


def test_gradients_by_finite_differences(aggregator):
    elements = random_set(batch=2)
    weights = torch.linspace(-1, 1, aggregator.out_dim, dtype=torch.float64)

    def value(elements):
        return (aggregator(elements) * weights).sum()

    leaf = elements.clone().requires_grad_()
    value(leaf).backward()
    torch.testing.assert_close(leaf.grad, finite_difference(value, elements), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True, False]).expand(3, -1)])
def test_half_precision_around_it(aggregator, mask):
    """As an encoder under autocast, as in training on a GPU."""
    aggregator, elements = aggregator.float(), random_set().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = aggregator(elements.bfloat16(), mask)
    torch.testing.assert_close(mixed.float(), aggregator(elements, mask).detach(), rtol=0.1, atol=0.1)


def test_twice_differentiable_inside_an_objective(aggregator):
    """The inner gradient has a gradient: finite differences of ∇L along a direction give the Hessian product."""
    objective = LatentMatching(aggregator)
    elements = random_set(batch=2)
    problem = Problem(torch.ones(2, aggregator.out_dim, dtype=torch.float64), elements)
    direction = random_set(batch=2, seed=7)

    def slope(elements):
        leaf = elements.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf, problem).sum(), leaf)
        return gradient

    leaf = elements.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf, problem).sum(), leaf, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    step = 1e-5
    expected = (slope(elements + step * direction) - slope(elements - step * direction)) / (2 * step)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("elements", "mask", "message"),
    [
        (torch.zeros(2, 3), None, r"expected elements \[batch, set_size, 6\]"),
        (torch.zeros(2, 3, 5), None, "got \\[2, 3, 5\\]"),
        (torch.zeros(2, 3, 6, dtype=torch.long), None, "floating"),
        (torch.zeros(2, 3, 6), torch.ones(2, 3), "bool mask"),
        (torch.zeros(2, 3, 6), torch.ones(2, 4, dtype=torch.bool), "bool mask"),
    ],
)
def test_the_door_checks_shapes(elements, mask, message):
    with pytest.raises(ValueError, match=message):
        SumPool(DIM)(elements, mask)


def test_known_answers():
    elements = torch.tensor([[[1.0, 5.0], [3.0, -1.0], [2.0, 0.0]]])
    mask = torch.tensor([[True, False, True]])
    torch.testing.assert_close(SumPool(2)(elements, mask), torch.tensor([[3.0, 5.0]]))
    torch.testing.assert_close(MeanPool(2)(elements, mask), torch.tensor([[1.5, 2.5]]))
    torch.testing.assert_close(MaxPool(2)(elements, mask), torch.tensor([[2.0, 5.0]]))
    torch.testing.assert_close(sort_features(elements, mask), torch.tensor([[[2.0, 5.0], [1.0, 0.0], [0.0, 0.0]]]))
    pool = FSPool(2, set_size=3)
    with torch.no_grad():
        pool.weight.copy_(torch.tensor([[1.0, 0.0], [10.0, 0.0], [100.0, 1.0]]))
    # a full set reads the knots: 3·1 + 2·10 + 1·100, and the least of the second feature
    torch.testing.assert_close(pool(elements), torch.tensor([[123.0, -1.0]]))
    # a set of two reads the ends, 2·1 + 1·100; four elements read 0, 2/3, 4/3 and 2 knots along
    torch.testing.assert_close(pool(elements, mask)[:, 0], torch.tensor([102.0]))
    four = torch.tensor([[[1.0, 0], [1.0, 0], [1.0, 0], [1.0, 0]]])
    torch.testing.assert_close(pool(four)[:, 0], torch.tensor([1 + 7 + 40 + 100.0]))


def test_fspool_separates_equal_elements_and_sum_cannot():
    """Exclusive multiset equivariance: equal elements get different gradients from FSPool, equal ones from sum."""
    torch.manual_seed(0)
    elements = torch.randn(1, 1, DIM, dtype=torch.float64).expand(1, SIZE, DIM).clone()
    spread = {}
    for name, pool in {"fspool": FSPool(DIM, set_size=SIZE), "sum": SumPool(DIM), "equilibrium": equilibrium()}.items():
        encoder = SetEncoder(pool, set_dim=DIM, hidden_dim=8).double()
        leaf = elements.clone().requires_grad_()
        objective = EquilibriumMatching(encoder) if name == "equilibrium" else LatentMatching(encoder)
        problem = Problem(torch.ones(1, DIM, dtype=torch.float64), elements)
        (gradient,) = torch.autograd.grad(objective(leaf, problem).sum(), leaf)
        spread[name] = float(gradient.std(dim=1).max())
    assert spread["fspool"] > 1e-3
    assert spread["equilibrium"] > 1e-3
    assert spread["sum"] < 1e-12


# --- equilibrium aggregation ---


class PullToElement(torch.nn.Module):
    """F(x, φ) = ½ |x - φ|², whose equilibrium is known in closed form."""

    def forward(self, elements, state):
        return 0.5 * (elements - state.unsqueeze(1)).square().sum(-1)


def test_equilibrium_of_a_quadratic_potential_is_a_weighted_mean():
    """λ (φ - r) + γ (φ - mean x) = 0: φ* = (λ r + γ mean) / (λ + γ)."""
    torch.manual_seed(0)
    prior = FSPool(DIM, set_size=SIZE)
    aggregator = EquilibriumAggregation(
        DIM,
        potential=PullToElement(),
        prior=prior,
        descent=GradientDescent(iterations=200, learning_rate=0.3, momentum=0.3),
        weight=1.5,
        gain=0.8,
    ).double()
    elements = random_set()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, True, True, False]])
    expected = (1.5 * prior(elements, mask) + 0.8 * MeanPool(DIM)(elements, mask)) / 2.3
    torch.testing.assert_close(aggregator(elements, mask), expected, rtol=1e-6, atol=1e-6)
    # the residual is zero there and nowhere else
    solution = aggregator(elements, mask)
    at_solution = aggregator.residual(elements, solution, mask)
    torch.testing.assert_close(at_solution, torch.zeros_like(at_solution), rtol=0, atol=1e-7)
    away = aggregator.residual(elements, solution + 1.0, mask)
    torch.testing.assert_close(away, torch.full_like(away, 1 + 0.8 / 1.5), rtol=1e-6, atol=1e-6)


def test_no_potential_leaves_the_prior():
    torch.manual_seed(0)
    aggregator = equilibrium(gain=0.0).double()
    elements, latent = random_set(), torch.ones(3, DIM, dtype=torch.float64)
    torch.testing.assert_close(aggregator(elements), aggregator.prior(elements))
    torch.testing.assert_close(aggregator.residual(elements, latent), latent - aggregator.prior(elements))


def test_residual_is_the_gradient_of_the_energy():
    torch.manual_seed(0)
    aggregator = equilibrium(weight=1.7).double()
    elements, mask = random_set(), torch.tensor([True, True, False, True, False]).expand(3, -1)
    state = torch.randn(3, DIM, dtype=torch.float64)
    prior = aggregator.start(elements, mask)
    expected = finite_difference(lambda s: aggregator.energy(elements, s, mask, prior).sum(), state) / 1.7
    torch.testing.assert_close(aggregator.residual(elements, state, mask), expected, rtol=1e-6, atol=1e-7)


def test_residual_is_differentiable_in_elements_and_latent():
    torch.manual_seed(0)
    aggregator = equilibrium().double()
    elements, state = random_set(batch=2), torch.randn(2, DIM, dtype=torch.float64)

    def value(elements, state):
        return (aggregator.residual(elements, state) ** 3).sum()

    leaves = elements.clone().requires_grad_(), state.clone().requires_grad_()
    value(*leaves).backward()
    torch.testing.assert_close(
        leaves[0].grad, finite_difference(lambda e: value(e, state), elements), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        leaves[1].grad, finite_difference(lambda s: value(elements, s), state), rtol=1e-5, atol=1e-6
    )


def test_potential_is_not_negative_and_first_layer_is_that_of_the_pair():
    torch.manual_seed(0)
    potential = ResidualPotential(DIM, 4, widths=(8, 3)).double()
    elements, state = random_set(), torch.randn(3, 4, dtype=torch.float64)
    assert (potential(elements, state) >= 0).all()
    weight = torch.cat([potential.element_layer.weight, potential.state_layer.weight], dim=1)
    pairs = torch.cat([elements, state.unsqueeze(1).expand(-1, SIZE, -1)], dim=-1)
    hidden = torch.tanh(potential.norms[0](pairs @ weight.T + potential.element_layer.bias))
    out = potential.layers[0](hidden) + potential.skips[0](hidden)
    torch.testing.assert_close(potential(elements, state), out.square().mean(-1))


def test_implicit_equals_unrolled_at_the_equilibrium():
    gradients = []
    for differentiation in (Unrolled(), Implicit(Exact())):
        torch.manual_seed(0)
        aggregator = equilibrium(
            descent=GradientDescent(iterations=300, learning_rate=0.2, momentum=0.3),
            differentiation=differentiation,
            weight=3.0,
        ).double()
        elements = random_set(batch=2)
        (aggregator(elements) ** 2).sum().backward()
        gradients.append([p.grad for p in aggregator.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 5
    for unrolled, implicit in zip(*gradients, strict=True):
        torch.testing.assert_close(unrolled, implicit, rtol=1e-6, atol=1e-8)


def test_nested_and_residual_objectives_agree_on_the_optimum():
    """Both are zero exactly when z is the equilibrium of Y."""
    torch.manual_seed(0)
    aggregator = equilibrium(
        descent=GradientDescent(iterations=400, learning_rate=0.2, momentum=0.3), weight=3.0
    ).double()
    encoder = SetEncoder(aggregator, set_dim=DIM, hidden_dim=8).double()
    elements = random_set()
    problem = Problem(encoder(elements).detach(), elements)
    for objective in (LatentMatching(encoder), EquilibriumMatching(encoder)):
        value = objective(elements, problem)
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
        assert (objective(elements + 0.1, problem) > 1e-8).all()


def test_the_equilibrium_is_found_in_full_precision_under_autocast():
    torch.manual_seed(0)
    encoder = SetEncoder(equilibrium(), set_dim=DIM, hidden_dim=8)
    elements = random_set().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(elements)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, encoder(elements).detach(), rtol=0.1, atol=0.1)


def test_the_objective_needs_an_equilibrium():
    with pytest.raises(ValueError, match="EquilibriumAggregation"):
        EquilibriumMatching(SetEncoder(FSPool(DIM, set_size=SIZE), set_dim=DIM))
    with pytest.raises(ValueError, match="at least two widths"):
        ResidualPotential(DIM, DIM, widths=(8,))


def test_a_prior_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected a prior"):
        EquilibriumAggregation(DIM, potential=PullToElement(), prior=SumPool(3))


def test_inner_problem_of_the_aggregator_runs_in_the_decoder():
    """The nested form: an inner problem inside an inner problem, with gradients to every parameter."""
    torch.manual_seed(0)
    encoder = SetEncoder(
        equilibrium(descent=GradientDescent(iterations=3, learning_rate=0.3, momentum=0.5, learned=True)),
        set_dim=DIM,
        hidden_dim=8,
    ).double()
    objective, initial = LatentMatching(encoder), random_set()
    problem = Problem(torch.ones(3, DIM, dtype=torch.float64), initial)
    found = minimise(
        lambda y: objective(y, problem),
        initial,
        descent=GradientDescent(iterations=2),
        differentiation=Implicit(),
    )
    found.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    assert all(p.grad.abs().max() > 0 for p in encoder.aggregator.descent.parameters())
