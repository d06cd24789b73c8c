"""Laws that every public part must have: who is in which family, and what no family's own tests say.

The families are tables of constructors in the tests beside this one, whose laws run over all of their rows. A new part
that is in no table fails here, until it is in one or has laws of its own.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import test_aggregators
import test_decoders
import test_inner
import test_losses
import test_numbering
import torch
from problems import finite_difference
from torch import nn

from setpred import aggregators, decoders, inner, losses
from setpred.aggregators import FSPool, LearnableMonoid, SetEncoder, SumPool
from setpred.decoders import DETR, IDSPN, GreedyVotes, SinePosition, SinkhornAttention, SlotAttention, SlotMixture
from setpred.inner import (
    Conditioned,
    ConjugateGradient,
    EquilibriumMatching,
    Exact,
    GradientDescent,
    Implicit,
    LatentMatching,
    Neumann,
    OfTokens,
    Problem,
    Proximity,
    Simplex,
    Sum,
    Unrolled,
    VotingEnergy,
)

BATCH, SIZE, DIM, LATENT = 4, 4, 3, 8
ORDER = [2, 0, 3, 1]
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-9, "atol": 1e-9, **tolerance})


def weighted_sum(elements):
    """A scalar that treats every number differently."""
    weights = torch.linspace(-1, 2, elements.numel(), dtype=elements.dtype).view_as(elements)
    return (weights * elements).sum() + elements.square().sum()


class Given(nn.Module):
    """A start that is handed over."""

    def __init__(self, start):
        super().__init__()
        self.given = start

    def forward(self, features):
        return self.given


# --- every public part is in a family -------------------------------------------------------------------------------


def public(package, kind, *, but=()):
    """Names of the public classes of a kind."""
    classes = {name: getattr(package, name) for name in package.__all__}
    return {name for name, thing in classes.items() if isinstance(thing, type) and issubclass(thing, kind)} - set(but)


def built(*tables):
    """What the tables build."""
    torch.manual_seed(0)
    return [build() for table in tables for build in table.values()]


def names(parts):
    return {type(part).__name__ for part in parts}


def modules(parts):
    """Names of the parts and of everything inside them."""
    return names(module for part in parts for module in part.modules())


def test_every_aggregator_is_in_the_family():
    family = built(test_aggregators.FAMILY)
    # which depends on the order, so that its laws are its own: below, and in test_aggregators.py
    assert public(aggregators, aggregators.Aggregator, but={"Aggregator"}) - names(family) == {"LearnableMonoid"}
    assert public(aggregators, nn.Module, but={"Aggregator"}) <= modules(family)


def test_every_decoder_is_in_a_family():
    family = built(test_decoders.DECODERS, test_numbering.DECODERS)
    assert public(decoders, decoders.SetDecoder, but={"SetDecoder"}) == names(family)
    others = [
        decoder_of(LatentMatching(encoder_of(DIM))),
        DETR(SinePosition(), dim=8, token_dim=4),
        GreedyVotes(SIZE, DIM),
    ]
    assert public(decoders, nn.Module, but={"SetDecoder"}) <= modules(family + others)


def test_every_loss_is_in_the_family_or_has_laws_of_its_own():
    elsewhere = {"NumberingLoss": "test_numbering.py", "CrossEntropy": "test_worlds.py"}
    family = names(built(test_losses.LOSSES))
    assert public(losses, nn.Module, but={"SetLoss"}) - family == set(elsewhere)
    for name, file in elsewhere.items():
        assert name in (Path(__file__).parent / file).read_text()


def test_every_part_of_the_inner_problem_is_in_a_family():
    assert public(inner, inner.LinearSolver, but={"LinearSolver"}) == names(test_inner.SOLVERS.values()) | {"Identity"}
    # whose laws are those of test_inner.py, which names them one by one
    assert public(inner, inner.Differentiation, but={"Differentiation"}) == {"Implicit", "Unrolled"}
    assert public(inner, inner.Projection, but={"Projection"}) == {"Simplex"}
    assert public(inner, nn.Module) <= modules(built(OBJECTIVES))


# --- the aggregator that depends on the order -----------------------------------------------------------------------


def test_the_monoid_does_not_see_padding_and_has_the_gradients_of_its_value():
    torch.manual_seed(0)
    pool, elements = LearnableMonoid(DIM).double(), normal(BATCH, SIZE, DIM)
    noise = elements.masked_fill(~MASK.unsqueeze(-1), torch.nan).requires_grad_()
    out = pool(noise, MASK)
    for row, present in enumerate(MASK):
        close(out[row : row + 1], pool(elements[row : row + 1, present]))
    weighted_sum(out).backward()
    expected = finite_difference(lambda x: weighted_sum(pool(x, MASK)), elements)
    close(noise.grad, expected, rtol=1e-6, atol=1e-7)
    assert (noise.grad[~MASK] == 0).all()


# --- exclusive multiset equivariance --------------------------------------------------------------------------------

# whose gradient tells equal elements apart: there is a sort in them, or a canonical order
SEPARATE = {"fspool", "fspool, other knots", "equilibrium", "monoid in canonical order", "frames, O(3)"}
SEPARATE |= {"frames, SO(2)", "set encoder", "pairwise"}


@pytest.mark.parametrize("name", test_aggregators.FAMILY)
def test_descent_on_an_aggregator_parts_equal_elements_or_cannot(name):
    """Whatever the weights: descent is multiset-equivariant with all of them, exclusively so with these."""
    size, dim = test_aggregators.SIZE, test_aggregators.DIM
    for seed in range(2):
        torch.manual_seed(seed)
        aggregator = test_aggregators.FAMILY[name]()
        start = Given(normal(BATCH, 1, dim).expand(-1, size, -1))
        descent = GradientDescent(iterations=4, clip=0.1)
        decoder = IDSPN(LatentMatching(aggregator), descent, set_size=size, set_dim=dim, start=start).double()
        elements = decoder(normal(BATCH, aggregator.out_dim, seed=2))
        apart = torch.stack([elements[:, i] - elements[:, j] for i, j in itertools.combinations(range(size), 2)])
        assert apart.abs().max() > 1e-4 if name in SEPARATE else apart.abs().max() < 1e-10
        moved = (elements - start.given).abs().max() > 1e-6
        assert moved == (name != "orbits, positions alone")  # all at their centre, where no radius has a slope


# --- objectives -----------------------------------------------------------------------------------------------------


def encoder_of(dim, pool=None):
    return SetEncoder(FSPool(LATENT, set_size=SIZE) if pool is None else pool, set_dim=dim, hidden_dim=8)


def equilibrium_of(dim):
    pool = aggregators.EquilibriumAggregation(
        LATENT,
        potential=aggregators.ResidualPotential(LATENT, LATENT, widths=(8, 4)),
        prior=FSPool(LATENT, set_size=SIZE),
        weight=2.0,
        gain=0.5,
    )
    return EquilibriumMatching(encoder_of(dim, pool))


OBJECTIVES = {
    "latent matching": lambda: LatentMatching(encoder_of(DIM)),
    "latent matching of a sum": lambda: LatentMatching(encoder_of(DIM, SumPool(LATENT))),
    "equilibrium matching": lambda: equilibrium_of(DIM),
    "proximity": lambda: Proximity(weight=0.3),
    "conditioned": lambda: Conditioned(LatentMatching(encoder_of(DIM + 2))),
    "sum": lambda: Sum([LatentMatching(encoder_of(DIM)), Proximity()]),
    "voting": lambda: VotingEnergy(set_dim=DIM, precise=2, weights=(2.0, 1.5)),
    "voting and latent matching": lambda: Sum(
        [
            VotingEnergy(set_dim=DIM, precise=2),
            OfTokens(LatentMatching(encoder_of(DIM)), SetEncoder(FSPool(LATENT), set_dim=DIM + 3, hidden_dim=8)),
        ]
    ),
}
every_objective = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)


def objective_problem(make, batch=BATCH):
    """An objective, elements, and what is given beside them."""
    torch.manual_seed(0)
    objective = make().double()
    latent = normal(batch, LATENT)
    if any(hasattr(part, "token_dim") for part in objective.modules()):  # votes, precisions and a mass
        latent = torch.cat([normal(batch, 5, DIM), normal(batch, 5, 3, seed=6).sigmoid()], dim=-1)
    given = Problem(latent, normal(batch, SIZE, DIM, seed=2), condition=normal(batch, SIZE, 2, seed=3))
    return objective, normal(batch, SIZE, DIM, seed=4), given


@every_objective
def test_an_objective_does_not_see_the_order_of_elements_with_what_belongs_to_them(make):
    objective, elements, problem = objective_problem(make)
    expected = objective(elements, problem)
    assert expected.shape == (BATCH,)
    other = Problem(problem.latent, problem.initial[:, ORDER], condition=problem.condition[:, ORDER])
    close(objective(elements[:, ORDER], other), expected)
    last = Problem(problem.latent[1:], problem.initial[1:], condition=problem.condition[1:])
    close(objective(elements[1:], last), expected[1:])
    masked = Problem(problem.latent, problem.initial, MASK, problem.condition)
    other = Problem(problem.latent, other.initial, MASK[:, ORDER], other.condition)
    close(objective(elements[:, ORDER], other), objective(elements, masked))


@every_objective
def test_an_objective_does_not_see_padding(make):
    objective, elements, problem = objective_problem(make)
    absent = ~MASK.unsqueeze(-1)
    noise = elements.masked_fill(absent, torch.nan).requires_grad_()
    nowhere = problem.initial.masked_fill(absent, torch.nan), MASK, problem.condition.masked_fill(absent, torch.nan)
    found = objective(noise, Problem(problem.latent, *nowhere))
    for row, present in enumerate(MASK):
        parts = (part[row : row + 1, present] for part in (problem.initial, problem.condition))
        alone = Problem(problem.latent[row : row + 1], next(parts), condition=next(parts))
        close(found[row : row + 1], objective(elements[row : row + 1, present], alone))
    found.sum().backward()
    assert torch.isfinite(noise.grad).all()
    assert (noise.grad[~MASK] == 0).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in objective.parameters())


@every_objective
def test_the_gradients_of_an_objective_and_of_its_gradient_are_those_of_finite_differences(make):
    objective, elements, problem = objective_problem(make)
    direction = normal(BATCH, SIZE, DIM, seed=5)

    def slope(elements, **options):
        leaf = elements.detach().requires_grad_()
        return leaf, torch.autograd.grad(objective(leaf, problem).sum(), leaf, **options)[0]

    leaf, first = slope(elements, create_graph=True)
    close(first, finite_difference(lambda y: objective(y, problem).sum(), elements), rtol=1e-6, atol=1e-8)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    ahead, behind = (slope(elements + step * direction)[1] for step in (1e-6, -1e-6))
    close(second, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


# --- iDSPN and DSPN -------------------------------------------------------------------------------------------------


def decoder_of(objective, differentiation=None, **numbers):
    descent = GradientDescent(**{"iterations": 6, "momentum": 0.9, "clip": 2.0} | numbers)
    return IDSPN(objective, descent, differentiation, set_size=SIZE, set_dim=DIM).double().eval()


def refined(decoder, problem, mask=None):
    condition = problem.condition if decoder.conditional else None
    return decoder.refine(problem.latent, mask=mask, condition=condition)


def solved(decoder, problem, mask=None):
    *_, last = refined(decoder, problem, mask)
    return last


@every_objective
def test_a_descent_permutes_with_its_start_and_does_not_see_padding(make):
    objective, _, problem = objective_problem(make)
    decoder = decoder_of(objective)
    decoder.start = Given(problem.initial)
    elements, masked = solved(decoder, problem), solved(decoder, problem, MASK)
    other = Problem(problem.latent, problem.initial[:, ORDER], condition=problem.condition[:, ORDER])
    decoder.start = Given(other.initial)
    close(solved(decoder, other), elements[:, ORDER])
    close(solved(decoder, other, MASK[:, ORDER]), masked[:, ORDER])
    for row, present in enumerate(MASK):
        decoder.start = Given(problem.initial[row : row + 1, present])
        alone = Problem(
            problem.latent[row : row + 1], decoder.start.given, None, problem.condition[row : row + 1, present]
        )
        close(solved(decoder, alone), masked[row : row + 1, present])


@every_objective
def test_an_unrolled_descent_has_the_gradients_of_its_value(make):
    """DSPN: exact for the iterate it returns, to the vector and to every parameter."""
    objective, _, problem = objective_problem(make)
    decoder = decoder_of(objective, Unrolled(), iterations=3)
    decoder.start = Given(problem.initial)
    leaf = problem.latent.clone().requires_grad_()

    def value():
        return weighted_sum(solved(decoder, replace(problem, latent=leaf)))

    if isinstance(objective, Proximity):  # which knows of no vector
        close(solved(decoder, problem), problem.initial)
        return
    value().backward()
    for tensors in ([leaf], [parameter for parameter in decoder.parameters() if parameter.grad is not None]):
        directions = [normal(*tensor.shape, seed=i) for i, tensor in enumerate(tensors)]
        products = [(tensor.grad * way).sum() for tensor, way in zip(tensors, directions, strict=True)]
        expected = sum(products, start=torch.zeros((), dtype=torch.float64))
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for tensor, way in zip(tensors, directions, strict=True):
                    tensor += step * way
            values.append(value().detach())
        with torch.no_grad():
            for tensor, way in zip(tensors, directions, strict=True):
                tensor += 1e-6 * way
        close(expected, (values[0] - values[1]) / 2e-6, rtol=1e-4, atol=1e-6)


CONVEX = {
    "latent matching": lambda: Sum([LatentMatching(encoder_of(DIM)), Proximity(weight=3.0 * SIZE)]),
    "equilibrium matching": lambda: Sum([equilibrium_of(DIM), Proximity(weight=3.0 * SIZE)]),
    "conditioned": lambda: Sum([Conditioned(LatentMatching(encoder_of(DIM + 2))), Proximity(weight=3.0 * SIZE)]),
}


@pytest.mark.parametrize("projection", [None, Simplex()], ids=["anywhere", "on the simplex"])
@pytest.mark.parametrize("make", CONVEX.values(), ids=CONVEX)
def test_idspn_has_the_gradients_of_dspn_where_both_have_converged(make, projection):
    """With the optimum held by `Proximity`, for every solver that is exact: those of finite differences, too.

    Where they have: a sort has kinks, an optimum may lie on one, and a descent comes to no rest there.
    """
    objective, _, problem = objective_problem(make, 6)
    numbers = {"iterations": 25, "learning_rate": 0.8, "momentum": 0.0, "clip": None, "projection": projection}
    decoder = decoder_of(objective, **numbers)
    decoder.start = Given(0.3 * problem.initial)
    *_, before, last = (iterate.detach() for iterate in refined(decoder, problem))
    converged = (last - before).abs().amax((1, 2)) < 1e-10
    assert converged.sum() >= 2

    def scalar(elements):
        return weighted_sum(elements * converged.view(-1, 1, 1))

    ways = {"unrolled": Unrolled(), "exact": Implicit(Exact()), "neumann": Implicit(Neumann(terms=25))}
    if projection is None:  # the operator of a projection is not symmetric
        ways["conjugate gradient"] = Implicit(ConjugateGradient(iterations=DIM * SIZE))
    gradients = {}
    for name, way in ways.items():
        decoder.differentiation = way
        leaf = problem.latent.clone().requires_grad_()
        decoder.zero_grad()
        scalar(solved(decoder, replace(problem, latent=leaf))).backward()
        gradients[name] = [leaf.grad, *(p.grad for p in decoder.parameters() if p.grad is not None)]
    for found in gradients.values():
        for mine, exact in zip(found, gradients["exact"], strict=True):
            close(mine, exact, rtol=1e-6, atol=1e-8)
    way = normal(6, LATENT, seed=9)
    with torch.no_grad():
        ahead, behind = (
            scalar(solved(decoder, replace(problem, latent=problem.latent + step * way))) for step in (1e-6, -1e-6)
        )
    close((gradients["exact"][0] * way).sum(), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-8)


def test_a_start_outside_of_what_is_allowed_is_projected():
    """As published: the first gradient is already taken on the simplex."""
    objective, _, problem = objective_problem(OBJECTIVES["latent matching"])
    decoder = decoder_of(objective, projection=Simplex())
    first, *_ = decoder.refine(problem.latent)
    close(first, inner.simplex(decoder.start(problem.latent).double()))


# --- implicit slots -------------------------------------------------------------------------------------------------

SLOTS = {"token_dim": DIM, "slot_dim": 4, "hidden_dim": 5, "set_size": SIZE, "set_dim": 2}
REFINED = {
    "slot attention": lambda **numbers: SlotAttention(**SLOTS, **numbers),
    "slots by transport": lambda **numbers: SlotAttention(SinkhornAttention(dim=4), **SLOTS, **numbers),
    "slot mixture": lambda **numbers: SlotMixture(**SLOTS, **numbers),
}


@pytest.mark.parametrize("make", REFINED.values(), ids=REFINED)
def test_implicit_slots_have_the_gradients_of_unrolled_ones_where_they_have_converged(make):
    """The last k steps have the first k terms of the implicit function's series: all of it with many, less with one."""
    tokens, upstream = normal(2, 5, DIM), normal(2, SIZE, 2, seed=2)

    def gradients(gradient_steps, iterations=80):
        torch.manual_seed(0)
        decoder = make(iterations=iterations, gradient_steps=gradient_steps).double().eval()
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter *= 0.7  # a contraction
        decoder.head = nn.Linear(decoder.head[0].in_features, 2).double()
        *_, before, last = decoder.refine(tokens)
        close(before, last, rtol=0, atol=1e-12)
        (upstream * last).sum().backward()
        return torch.cat([p.grad.flatten() for n, p in decoder.named_parameters() if not n.startswith("start")])

    whole = gradients(None)
    errors = [float((gradients(steps) - whole).norm() / whole.norm()) for steps in (1, 5, 60)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-9
