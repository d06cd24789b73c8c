"""Laws of all aggregators, and for each a twin, known answers and the claims of its paper."""

import lightning.pytorch as pl
import pytest
import torch
from problems import close, finite_difference, normal
from tiny import QUIET
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from setpred.aggregators import (
    GIGP,
    INSET,
    PMA,
    Aggregator,
    AttSets,
    CanonicalOrder,
    EquilibriumAggregation,
    FrameAverage,
    FSPool,
    LearnableMonoid,
    MaxPool,
    MeanPool,
    PairwiseSetEncoder,
    ResidualPotential,
    SetEncoder,
    SumPool,
)
from setpred.decoders import IDSPN
from setpred.encoders.invariant_coordinates import Eigenvectors
from setpred.errors import InputError
from setpred.inner import EquilibriumMatching, Exact, GradientDescent, Implicit, LatentMatching, Problem, Unrolled
from setpred.training.faset import FASet

DIM, SIZE = 6, 5


def equilibrium(prior=True, **arguments):
    return EquilibriumAggregation(
        DIM,
        potential=ResidualPotential(DIM, DIM, widths=(8, 8, 4)),
        prior=FSPool(DIM, set_size=SIZE) if prior else None,
        **{"gain": 0.7} | arguments,
    )


def encoder_of(pool, set_dim=DIM, **arguments):
    return SetEncoder(pool, set_dim=set_dim, hidden_dim=8, **arguments)


FAMILY = {
    "sum": lambda: SumPool(DIM),
    "mean": lambda: MeanPool(DIM),
    "max": lambda: MaxPool(DIM),
    "fspool": lambda: FSPool(DIM, set_size=SIZE),
    "fspool, other knots": lambda: FSPool(DIM, set_size=9),
    "equilibrium": equilibrium,
    "equilibrium, r = 0": lambda: equilibrium(prior=False),
    "attention": lambda: PMA(DIM, heads=2),
    "attention, seeds": lambda: PMA(DIM, seeds=3, heads=3, normalise=False),
    "attsets": lambda: AttSets(DIM),
    "attsets, bounded": lambda: AttSets(DIM, bounded=True),
    "monoid in canonical order": lambda: CanonicalOrder(LearnableMonoid(DIM)),
    "frames, O(3)": lambda: FrameAverage(encoder_of(FSPool(4, set_size=SIZE))),
    "frames, SO(2)": lambda: FrameAverage(FSPool(DIM, set_size=SIZE), position_dim=2, reflections=False),
    "frames, affine": lambda: FrameAverage(FSPool(DIM, set_size=SIZE), position_dim=2, affine=True),
    "orbits": lambda: GIGP(DIM, orbits=4, largest=2.0),
    "orbits, positions alone": lambda: GIGP(DIM, position_dim=DIM, out_dim=4, orbits=4, largest=3.0),
    "superset": lambda: INSET(DIM, out_dim=4),
    "set encoder that keeps positions": lambda: encoder_of(GIGP(5, position_dim=2, orbits=4), kept=2),
    "set encoder": lambda: encoder_of(FSPool(4, set_size=SIZE)),
    "pairwise": lambda: PairwiseSetEncoder(encoder_of(FSPool(4, set_size=SIZE**2), set_dim=2 * DIM)),
}
MASK = torch.tensor([[True, False, True, True, False], [False, True, True, False, True], [True] * SIZE])


@pytest.fixture(params=FAMILY.values(), ids=FAMILY.keys())
def aggregator(request):
    torch.manual_seed(0)
    return request.param().double()


def random_set(batch=3, size=SIZE, dim=DIM, seed=1, dtype=torch.float64):
    return normal(batch, size, dim, seed=seed, dtype=dtype)


def scrambled(module, seed=5):
    """Every parameter random, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module.double()


# --- laws of all aggregators ---


def test_order_does_not_matter(aggregator):
    elements = random_set()
    expected = aggregator(elements)
    assert expected.shape == (3, aggregator.out_dim)
    for order in ([1, 0, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 1, 0, 3]):
        close(aggregator(elements[:, order]), expected)


def test_padding_has_no_influence_and_no_gradient(aggregator):
    """An empty set gives zeros."""
    elements, mask = random_set(batch=4), torch.cat([MASK[:2], torch.zeros(1, SIZE).bool(), MASK[2:]])
    noise = elements.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    out = aggregator(noise, mask)
    for row, present in enumerate(mask):
        expected = aggregator(elements[row : row + 1, present]) if present.any() else torch.zeros_like(out[:1])
        close(out[row : row + 1], expected)
    gradients = []
    for leaf in (elements.clone().requires_grad_(), noise):
        aggregator.zero_grad()
        (gradient,) = torch.autograd.grad(aggregator(leaf, mask).square().sum(), leaf, retain_graph=True)
        aggregator(leaf, mask).square().sum().backward()
        gradients.append([gradient, *(p.grad for p in aggregator.parameters() if p.grad is not None)])
    for clean, other in zip(*gradients, strict=True):
        assert_close(other, clean)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()


def test_gradients_of_first_and_second_order(aggregator):
    elements = random_set(batch=2).requires_grad_()
    assert gradcheck(aggregator, elements, fast_mode=True)
    assert gradgradcheck(lambda x: aggregator(x).square(), elements, fast_mode=True)


@pytest.mark.parametrize("mask", [None, MASK])
def test_half_precision_around_it(aggregator, mask):
    """As an encoder under autocast, as in training on a GPU; every descent inside runs in full precision."""
    aggregator, elements = aggregator.float(), random_set().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = aggregator(elements.bfloat16(), mask)
    assert mixed.dtype == torch.float32 or not isinstance(aggregator, EquilibriumAggregation)
    assert_close(mixed.float(), aggregator(elements, mask).detach(), rtol=0.1, atol=0.1)


LEARNING = ["fspool", "equilibrium", "attention, seeds", "attsets", "monoid in canonical order", "orbits", "superset"]


@pytest.mark.parametrize("name", [*LEARNING, "frames, SO(2)"])
def test_every_parameter_learns_inside_a_decoder(name):
    """The encoder of an objective, in an implicit descent; of `equilibrium` a descent inside a descent."""
    torch.manual_seed(0)
    encoder = scrambled(encoder_of(FAMILY[name](), set_dim=4))
    descent = GradientDescent(iterations=3, clip=1.0)
    decoder = IDSPN(LatentMatching(encoder), descent, Implicit(), set_size=SIZE, set_dim=4)
    latent = torch.linspace(-1, 1, encoder.out_dim, dtype=torch.float64).expand(2, -1)
    decoder(latent).square().sum().backward()
    for parameter_name, parameter in encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SumPool(DIM)(torch.zeros(2, 3, 5)), r"expected elements \[batch, set_size, 6\].*, got \[2, 3, 5\]"),
        (lambda: SumPool(DIM)(torch.zeros(2, 3, 6), torch.ones(2, 3)), "bool mask"),
        (lambda: FrameAverage(SumPool(2), position_dim=3), "position_dim from 1 to the 2"),
        (lambda: FrameAverage(SumPool(12), position_dim=11), "at most 10"),
        (lambda: GIGP(2, position_dim=3), "3 of 2"),
        (lambda: GIGP(4, orbits=1), "at least 2 orbits"),
        (lambda: GIGP(4, largest=0.0), "positive largest"),
        (lambda: INSET(1), "at least one more number"),
        (lambda: SetEncoder(GIGP(8), set_dim=3, kept=3), "kept to leave some of 3 numbers"),
        (lambda: PMA(DIM, heads=4), "heads that divides in_dim"),
        (lambda: PMA(DIM, heads=0), "heads that divides in_dim"),
        (lambda: PMA(DIM, seeds=0, heads=2), "heads that divides in_dim"),
        (lambda: PairwiseSetEncoder(SumPool(3)), "even in_dim"),
        (lambda: EquilibriumMatching(encoder_of(FSPool(DIM, set_size=SIZE))), "EquilibriumAggregation"),
        (lambda: ResidualPotential(DIM, DIM, widths=(8,)), "at least two widths"),
        (lambda: EquilibriumAggregation(DIM, potential=Pull(), prior=SumPool(3)), "expected a prior"),
    ],
)
def test_shapes_and_arguments_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_known_answers():
    elements = torch.tensor([[[1.0, 5.0], [3.0, -1.0], [2.0, 0.0]]])
    mask = torch.tensor([[True, False, True]])
    assert_close(SumPool(2)(elements, mask), torch.tensor([[3.0, 5.0]]))
    assert_close(MeanPool(2)(elements, mask), torch.tensor([[1.5, 2.5]]))
    assert_close(MaxPool(2)(elements, mask), torch.tensor([[2.0, 5.0]]))
    pool = FSPool(2, set_size=3)
    with torch.no_grad():
        pool.weight.copy_(torch.tensor([[1.0, 0.0], [10.0, 0.0], [100.0, 1.0]]))
    # a full set reads the knots: 3·1 + 2·10 + 1·100, and the least of the second feature
    assert_close(pool(elements), torch.tensor([[123.0, -1.0]]))
    # a set of two reads the ends, 2·1 + 1·100; four elements read 0, 2/3, 4/3 and 2 knots along
    assert_close(pool(elements, mask)[:, 0], torch.tensor([102.0]))
    assert_close(pool(torch.tensor([[[1.0, 0]] * 4]))[:, 0], torch.tensor([1 + 7 + 40 + 100.0]))


# --- equilibrium aggregation ---


class Pull(nn.Module):
    """F(x, φ) = ½ |x - φ|², whose equilibrium is known in closed form."""

    def forward(self, elements, state):
        return 0.5 * (elements - state.unsqueeze(1)).square().sum(-1)


def converging(**arguments):
    """An equilibrium that is unique, and a descent that reaches it."""
    torch.manual_seed(0)
    descent = GradientDescent(iterations=150, learning_rate=0.3, momentum=0.3)
    return equilibrium(descent=descent, weight=3.0, **arguments).double()


def test_equilibrium_of_a_quadratic_potential_is_a_weighted_mean():
    """λ (φ - r) + γ (φ - mean x) = 0: φ* = (λ r + γ mean) / (λ + γ)."""
    descent = GradientDescent(iterations=200, learning_rate=0.3, momentum=0.3)
    prior = FSPool(DIM, set_size=SIZE)
    pool = EquilibriumAggregation(DIM, potential=Pull(), prior=prior, descent=descent, weight=1.5, gain=0.8).double()
    elements = random_set()
    solution = pool(elements, MASK)
    expected = (1.5 * prior(elements, MASK) + 0.8 * MeanPool(DIM)(elements, MASK)) / 2.3
    assert_close(solution, expected, rtol=1e-6, atol=1e-6)
    # the residual is zero there and nowhere else
    at_solution, away = (pool.residual(elements, solution + step, MASK) for step in (0.0, 1.0))
    assert_close(at_solution, torch.zeros_like(at_solution), rtol=0, atol=1e-7)
    assert_close(away, torch.full_like(away, 1 + 0.8 / 1.5), rtol=1e-6, atol=1e-6)


def test_residual_is_the_gradient_of_the_energy_and_has_gradients():
    torch.manual_seed(0)
    pool = equilibrium(weight=1.7).double()
    elements, state = random_set(), random_set(batch=1, size=3)[0]
    prior = pool.start(elements, MASK)
    expected = finite_difference(lambda s: pool.energy(elements, s, MASK, prior).sum(), state) / 1.7
    assert_close(pool.residual(elements, state, MASK), expected, rtol=1e-6, atol=1e-7)
    without = equilibrium(gain=0.0).double()  # of which the prior is left
    assert_close(without(elements), without.prior(elements))
    assert_close(without.residual(elements, state), state - without.prior(elements))
    leaves = elements.requires_grad_(), state.requires_grad_()
    assert gradcheck(lambda e, s: pool.residual(e, s, MASK), leaves, fast_mode=True)


def test_potential_is_not_negative_and_first_layer_is_that_of_the_pair():
    torch.manual_seed(0)
    potential = ResidualPotential(DIM, 4, widths=(8, 3)).double()
    elements, state = random_set(), random_set(batch=1, size=3, dim=4)[0]
    assert (potential(elements, state) >= 0).all()
    weight = torch.cat([potential.element_layer.weight, potential.state_layer.weight], dim=1)
    pairs = torch.cat([elements, state.unsqueeze(1).expand(-1, SIZE, -1)], dim=-1)
    hidden = torch.tanh(potential.norms[0](pairs @ weight.T + potential.element_layer.bias))
    out = potential.layers[0](hidden) + potential.skips[0](hidden)
    assert_close(potential(elements, state), out.square().mean(-1))


def test_implicit_equals_unrolled_at_the_equilibrium():
    gradients = []
    for differentiation in (Unrolled(), Implicit(Exact())):
        pool = converging(differentiation=differentiation)
        pool(random_set(batch=2)).square().sum().backward()
        gradients.append([p.grad for p in pool.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 5
    for unrolled, implicit in zip(*gradients, strict=True):
        assert_close(unrolled, implicit, rtol=1e-6, atol=1e-8)


def test_nested_and_residual_objectives_agree_on_the_optimum():
    """Both are zero exactly when z is the equilibrium of Y."""
    encoder, elements = encoder_of(converging()).double(), random_set()
    problem = Problem(encoder(elements).detach(), elements)
    for objective in (LatentMatching(encoder), EquilibriumMatching(encoder)):
        value = objective(elements, problem)
        assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
        assert (objective(elements + 0.1, problem) > 1e-8).all()


# --- attention ---


def test_attention_is_torchs():
    """The same weights in torch's own attention and layer norm."""
    pool = scrambled(PMA(DIM, seeds=2, heads=3))
    theirs = nn.MultiheadAttention(DIM, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([pool.query.weight, pool.key.weight, pool.value.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(pool.out.state_dict())
    elements, seeds = random_set(), pool.seeds.expand(3, -1, -1)
    read, _ = theirs(seeds, elements, elements, key_padding_mask=~MASK, need_weights=False)
    first, second = pool.norms
    hidden = nn.functional.layer_norm(seeds + read, (DIM,), first.weight, first.bias)
    hidden = nn.functional.layer_norm(hidden + pool.network(hidden), (DIM,), second.weight, second.bias)
    assert_close(pool(elements, MASK), hidden.flatten(1))


# --- AttSets ---


def test_attsets_is_a_softmax_by_hand():
    pool = AttSets(2)
    with torch.no_grad():
        pool.attention.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    elements = torch.tensor([[[0.0, 4.0], [2.0, 1.0], [9.0, 9.0]]])
    ahead = 2 / (1 + torch.tensor(-2.0).exp())  # (0·e⁰ + 2·e²) / (e⁰ + e²); the second feature is a mean
    out = pool(elements, torch.tensor([[True, True, False]]))
    assert_close(out, torch.stack([ahead, torch.tensor(2.5)]).unsqueeze(0))


def test_single_stage_draws_one_present_element_while_training_only():
    pool, elements = scrambled(AttSets(DIM)), random_set(batch=1).expand(200, -1, -1)
    mask = MASK[:1].expand(200, -1).clone()
    mask[0] = False
    expected = pool(elements, mask)
    pool.single = True
    torch.manual_seed(0)
    drawn = pool(elements, mask)
    assert (drawn[0] == 0).all()
    which = (drawn[1:].unsqueeze(1) == elements[1:]).all(-1)
    assert (which.sum(1) == 1).all()
    assert which.any(0).tolist() == MASK[0].tolist()
    assert_close(pool.eval()(elements, mask), expected)


class MedianOfSets(pl.LightningModule):
    """A tiny model of input sets that records the stage and the parameters of each step."""

    def __init__(self, pool):
        super().__init__()
        self.encoder, self.head = encoder_of(pool, set_dim=2), nn.Linear(4, 2)
        self.fixed = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.seen = []

    def training_step(self, batch, batch_idx):
        parameters = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        self.seen.append((self.current_epoch, self.encoder.aggregator.single, parameters))
        return (self.head(self.encoder(batch)) + self.fixed - batch.median(1).values).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)

    def fit(self, epochs, single_epochs):
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[FASet(single_epochs=single_epochs)], **QUIET)
        trainer.fit(self, torch.utils.data.DataLoader(random_set(16, dim=2, dtype=torch.float32), batch_size=8))


def test_faset_trains_the_rest_on_single_elements_and_then_the_attention_alone():
    torch.manual_seed(0)
    model = MedianOfSets(AttSets(4))
    model.fit(epochs=4, single_epochs=2)
    assert [(epoch, single) for epoch, single, _ in model.seen[::2]] == [(0, True), (1, True), (2, False), (3, False)]
    start, half = (next(values for epoch, _, values in model.seen if epoch == e) for e in (0, 2))
    end = dict(model.named_parameters())
    for name in start:
        first, second = (not torch.equal(a[name], b[name]) for a, b in ((start, half), (half, end)))
        attention = name == "encoder.aggregator.attention.weight"
        assert (first, second) == ((False, False) if name == "fixed" else (not attention, attention)), name
    assert all(parameter.requires_grad == (name != "fixed") for name, parameter in end.items())
    assert not model.encoder.aggregator.single
    with pytest.raises(InputError, match="has none"):
        MedianOfSets(SumPool(4)).fit(epochs=1, single_epochs=1)


# --- learnable commutative monoid ---


class Operation(nn.Module):
    """A binary operation that is given."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def tree_twin(pool, elements):
    """The tree by recursion, of one set `[n, dim]`: neighbours in pairs, one left over passes up."""
    if len(elements) == 1:
        return elements[0]
    pairs = zip(elements[0::2], elements[1::2], strict=False)
    above = [0.5 * (pool.operation(a[None], b[None]) + pool.operation(b[None], a[None]))[0] for a, b in pairs]
    return tree_twin(pool, above + list(elements[len(elements) // 2 * 2 :]))


def monoid(function=None, dim=DIM):
    torch.manual_seed(0)
    return LearnableMonoid(dim, operation=None if function is None else Operation(function)).double()


@pytest.mark.parametrize("size", range(1, 10))
def test_monoid_is_its_tree_wherever_the_elements_are(size):
    pool, elements = monoid(), random_set(size=size)
    expected = torch.stack([tree_twin(pool, each) for each in elements])
    assert_close(pool(elements), expected)
    places = torch.randperm(size + 4, generator=torch.Generator().manual_seed(size))[:size].sort().values
    padded, mask = torch.full((3, size + 4, DIM), torch.nan, dtype=torch.float64), torch.zeros(3, size + 4).bool()
    padded[:, places], mask[:, places] = elements, True
    assert_close(pool(padded, mask), expected)


def test_monoid_commutes_and_is_not_associative_until_it_learns():
    pool, elements = monoid(), random_set(size=4)
    a, b, c, _ = elements.unbind(1)
    assert_close(pool.combine(a, b), pool.combine(b, a))
    gap = pool.combine(pool.combine(a, b), c) - pool.combine(a, pool.combine(b, c))
    assert_close(pool.associator(elements[:, :3]), gap.square().mean(-1))
    assert (gap.abs().amax(-1) > 0.01).all()
    for order in ([1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]):  # siblings and branches swap, other elements do not
        assert_close(pool(elements[:, order]), pool(elements))
    assert (pool(elements[:, [0, 2, 1, 3]]) - pool(elements)).abs().max() > 0.01


def test_associator_is_the_mean_over_triples_of_present_neighbours():
    pool = monoid(lambda a, b: a - 0.5 * b, dim=1)  # a ⊕ b = (a + b) / 4, so a triple's gap is (3 / 16) (c - a)
    elements = torch.tensor([[5.0, 1.0, 9.0, 2.0, 4.0]], dtype=torch.float64).unsqueeze(-1)
    mask = torch.tensor([[True, False, True, True, True]])
    expected = torch.tensor([((2 - 5) ** 2 + (4 - 9) ** 2) / 2 * (3 / 16) ** 2], dtype=torch.float64)
    assert_close(pool.associator(elements, mask), expected)
    assert pool.associator(elements, mask & (elements[..., 0] > 4)).item() == 0
    assert pool.associator(elements[:, :1]).item() == 0
    assert gradcheck(monoid().associator, random_set().requires_grad_(), fast_mode=True)


def test_canonical_order_sorts_the_elements():
    pool, elements = CanonicalOrder(monoid()), random_set(size=4)
    ranked = elements.gather(1, (elements @ pool.direction.double()).argsort(1, True)[..., None].expand_as(elements))
    assert_close(pool(elements), pool.aggregator(ranked))


# --- frames ---

# name to (position_dim, whether reflections are frames too)
GROUPS = {"O(2)": (2, True), "SO(2)": (2, False), "O(3)": (3, True), "SO(3)": (3, False)}
every_group = pytest.mark.parametrize("group", GROUPS)


def moved(elements, position_dim, *, reflect=False, shift=True, seed=11):
    """The sets with their positions turned at random, and reflected and shifted if asked for."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(elements), position_dim, position_dim)
    turn = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
    wrong = torch.linalg.det(turn).sign() != (-1 if reflect else 1)
    turn[wrong, :, 0] *= -1
    shifts = 5 * torch.randn(len(elements), 1, position_dim, generator=generator, dtype=torch.float64) * shift
    positions, features = elements.split([position_dim, elements.shape[-1] - position_dim], dim=-1)
    return torch.cat([(positions.double() @ turn.mT + shifts).to(features.dtype), features], dim=-1)


def frame_average(group, pool=None):
    position_dim, reflections = GROUPS[group]
    torch.manual_seed(0)
    inside = encoder_of(FSPool(4, set_size=8)) if pool is None else pool
    return FrameAverage(inside, position_dim=position_dim, reflections=reflections)


@every_group
def test_frame_average_does_not_see_rotations_translations_and_order(group):
    pool, elements = frame_average(group), random_set(batch=50, size=8, dtype=torch.float32)
    mask = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) < 0.8
    turned = moved(elements, pool.position_dim)
    assert_close(pool(turned.flip(1)), pool(elements), rtol=0, atol=1e-5)
    assert_close(pool(turned, mask), pool(elements, mask), rtol=0, atol=1e-5)
    # the wrapped function does see them
    assert (pool.aggregator(moved(elements, pool.position_dim, shift=False)) - pool.aggregator(elements)).std() > 0.01
    # handedness is seen, unless reflections are frames
    pool, elements = pool.double(), random_set(size=8)
    difference = (pool(moved(elements, pool.position_dim, reflect=True)) - pool(elements)).abs().amax(1)
    assert (difference < 1e-9).all() if pool.reflections else (difference > 1e-4).all()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
def test_frame_average_of_few_elements_that_do_not_span_the_space(group, size):
    pool, elements = frame_average(group).double(), random_set(size=size)
    close(pool(moved(elements, 3)), pool(elements))
    assert gradcheck(pool, elements.requires_grad_(), fast_mode=True)


def test_frame_average_of_known_functions():
    # features pass, positions are centred
    elements = random_set()
    pooled = FrameAverage(MeanPool(DIM), position_dim=2)(elements)
    assert_close(pooled[:, :2], torch.zeros(3, 2, dtype=torch.float64))
    assert_close(pooled[:, 2:], elements[..., 2:].mean(1))
    # the ends of a stick of length 2 are at ±1 on its long axis, the last one, wherever the stick is
    stick = torch.tensor([[[3.0, 4.0], [3.0 + 2 * 0.6, 4.0 + 2 * 0.8]]])
    assert_close(FrameAverage(MaxPool(2), position_dim=2)(stick), torch.tensor([[0.0, 1.0]]))
    assert [len(frame_average(group).signs) for group in GROUPS] == [4, 2, 8, 4]
    _, frames = frame_average("SO(3)").double().frames(elements[..., :3], None)
    assert_close(torch.linalg.det(frames), torch.ones(3, 4, dtype=torch.float64))


def test_frame_average_of_symmetric_sets_has_finite_gradients():
    square = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]], dtype=torch.float64)
    pool = frame_average("O(2)", encoder_of(FSPool(4, set_size=4), set_dim=2)).double()
    for elements in (square, torch.ones_like(square)):
        leaf = elements.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pool(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(second).all()


def test_eigenvectors_have_the_gradients_of_torchs():
    root, weights = random_set(batch=2, size=3, dim=3), random_set(batch=2, size=3, dim=3, seed=2)
    values = []
    for vectors_of in (Eigenvectors.apply, lambda matrix: torch.linalg.eigh(matrix).eigenvectors):
        leaf = root.clone().requires_grad_()
        (first,) = torch.autograd.grad((weights * vectors_of(leaf @ leaf.mT) ** 2).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first**3).sum(), leaf, create_graph=True)
        (third,) = torch.autograd.grad((second**3).sum(), leaf)
        values.append((first, second, third))
    for mine, other in zip(*values, strict=True):
        assert_close(mine, other)


# --- orbits ---


@pytest.mark.parametrize("position_dim", [2, 3])
def test_orbits_do_not_turn(position_dim):
    pool = scrambled(GIGP(DIM, position_dim=position_dim, orbits=6, largest=2.0))
    elements = random_set()
    for reflect in (False, True):
        other = moved(elements, position_dim, reflect=reflect)
        assert_close(pool.orbit(other, MASK)[MASK], pool.orbit(elements, MASK)[MASK])
        assert_close(pool(other, MASK), pool(elements, MASK))
    fixed = scrambled(GIGP(DIM, position_dim=position_dim, orbits=6, largest=2.0, centred=False))
    assert_close(fixed(moved(elements, position_dim, shift=False)), fixed(elements))
    assert not torch.allclose(fixed(moved(elements, position_dim)), fixed(elements))
    # a set encoder must keep the positions
    encoders = [encoder_of(GIGP(8, position_dim=position_dim), kept=kept).double() for kept in (position_dim, 0)]
    assert [torch.allclose(pool(moved(elements, position_dim)), pool(elements)) for pool in encoders] == [True, False]


def orbit_twin(pool, elements):
    """One set in loops over its orbits and elements, centred at the origin."""
    out = 0
    for k, q in enumerate(pool.radii):
        pooled, nobody = 0, 1
        for element in elements:
            radius = (element[:2].square().sum() + (0.1 * pool.spacing) ** 2).sqrt()
            closeness = [torch.exp(-0.5 * ((radius - other) / pool.spacing) ** 2) for other in pool.radii]
            share = closeness[k] / sum(closeness)
            pooled, nobody = pooled + share * element[2:], nobody * (1 - share)
        changed = pool.network(torch.cat([pooled, q[None]]))
        out = out + pool.weight[k] * (pool.skip(pooled) + (1 - nobody) * changed)
    return out / len(elements)


def test_orbit_pooling_is_its_twin_and_starts_as_the_mean():
    pool = scrambled(GIGP(DIM, position_dim=2, out_dim=3, orbits=4, largest=2.0, centred=False))
    elements = random_set()
    assert_close(pool(elements), torch.stack([orbit_twin(pool, each) for each in elements]))
    fresh = GIGP(DIM, position_dim=2).double()
    assert_close(fresh(elements, MASK), MeanPool(DIM)(elements, MASK)[:, 2:])
    # positions alone count the elements
    assert_close(GIGP(2, position_dim=2).double()(elements[..., :2]), torch.ones(3, 1).double())


def test_positions_have_gradients_along_the_radius_and_none_around_it():
    """Also at the centre they are finite."""
    pool = scrambled(GIGP(2, position_dim=2, orbits=5, largest=2.0, centred=False))
    leaf = random_set(dim=2)
    leaf[0, 0] = 0.0
    leaf.requires_grad_()
    (gradient,) = torch.autograd.grad(pool(leaf).sum(), leaf, create_graph=True)
    around = gradient[..., 0] * leaf[..., 1] - gradient[..., 1] * leaf[..., 0]
    assert ((gradient * leaf).sum(-1)[1:].abs() > 1e-6).all()
    assert_close(around, torch.zeros_like(around), rtol=0, atol=1e-12)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    assert torch.isfinite(second).all()


# --- superset ---


def test_superset_pooling_is_two_sums():
    pool = INSET(3, out_dim=2)
    with torch.no_grad():
        pool.subset.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        pool.superset.weight.copy_(torch.tensor([[0.0, 10.0], [0.0, 0.0]]))
        pool.subset.bias.copy_(torch.tensor([0.5, 0.0]))
    elements = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 5.0, 7.0], [1.0, 4.0, -2.0], [1.0, 90.0, 90.0]]])
    mask = torch.tensor([[True, True, True, False]])
    # S = {(2, 3), (4, -2)}, V = S with (5, 7): (2 + 4 + 10 (3 + 7 - 2) + 0.5, 3 - 2)
    assert_close(pool(elements, mask), nn.functional.silu(torch.tensor([[86.5, 1.0]])))
    # of an empty subset V remains
    elements[..., 0] = 0.0
    assert_close(pool(elements, mask), nn.functional.silu(torch.tensor([[80.5, 0.0]])))


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (lambda elements: elements, r"Own.aggregate to return \[2, 6\], got \[2, 5, 6\]"),
        (lambda elements: elements.mean((1, 2)), r"Own.aggregate to return \[2, 6\], got \[2\]"),
        (lambda elements: elements.mean((1, 2)).unsqueeze(1), r"Own.aggregate to return \[2, 6\], got \[2, 1\]"),
    ],
)
def test_own_aggregators_return_a_vector_of_the_stated_length(result, sentence):
    class Own(Aggregator):
        def aggregate(self, elements, mask):
            return result(elements)

    with pytest.raises(ValueError, match=sentence):
        Own(DIM)(torch.zeros(2, SIZE, DIM))
    with pytest.raises(NotImplementedError, match="Aggregator has no method aggregate"):
        Aggregator(DIM)(torch.zeros(2, SIZE, DIM))
