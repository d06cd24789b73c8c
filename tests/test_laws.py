"""Laws of every public part: each is in a family, and objectives and descents keep the laws of theirs.

The families are tables of constructors in other test files, whose laws run over all rows. A new part that is in no
table fails here, until it is in one or has tests in a named file.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import test_aggregators
import test_decoders
import test_inner
import test_losses
import torch
from problems import Given, check_slope, close, normal
from torch import nn

from setpred import aggregators, decoders, inner, losses
from setpred.aggregators import FSPool, SetEncoder, SumPool
from setpred.decoders import (
    DETR,
    IDSPN,
    GreedyVotes,
    LearnedStart,
    SinkhornAttention,
    SlotAttention,
    SlotMixture,
)
from setpred.encoders import SinePosition
from setpred.errors import InputError
from setpred.inner import (
    Conditioned,
    EquilibriumMatching,
    GradientDescent,
    LatentMatching,
    OfTokens,
    Problem,
    Proximity,
    Simplex,
    Sum,
    VotingEnergy,
)
from setpred.schema import CLEVR

BATCH, SIZE, DIM, LATENT = 4, 4, 3, 8
ORDER = [2, 0, 3, 1]
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()


# --- every public part is in a family -------------------------------------------------------------------------------


def public(package, kind, *, but=()):
    """Names of the public classes of a kind."""
    classes = {name: getattr(package, name) for name in package.__all__}
    return {name for name, thing in classes.items() if isinstance(thing, type) and issubclass(thing, kind)} - set(but)


def built(table):
    """Instances of all rows of a table."""
    torch.manual_seed(0)
    return [build() for build in table.values()]


def names(parts):
    return {type(part).__name__ for part in parts}


def modules(parts):
    """Names of the parts and of all modules inside them."""
    return names(module for part in parts for module in part.modules())


def test_every_aggregator_is_in_the_family():
    family = built(test_aggregators.FAMILY)
    # which depends on the order, so that its laws are its own in test_aggregators.py
    assert public(aggregators, aggregators.Aggregator, but={"Aggregator"}) - names(family) == {"LearnableMonoid"}
    assert public(aggregators, nn.Module, but={"Aggregator"}) <= modules(family)


def test_every_decoder_is_in_a_family():
    family = built(test_decoders.DECODERS)
    but = {"SetDecoder", "SlotReader", "Glimpses"}  # the last, of set_size + 1 elements, has its laws in the file below
    assert "Glimpses" in (Path(__file__).parent / "test_discovery.py").read_text()
    assert public(decoders, decoders.SetDecoder, but=but) == names(family)
    others = [
        DETR(SinePosition(), dim=8, token_dim=4, set_size=CLEVR.max_objects, set_dim=CLEVR.set_dim),
        GreedyVotes(SIZE, DIM),
        LearnedStart(SIZE, DIM),
    ]
    assert public(decoders, nn.Module, but=but) <= modules(family + others)


def test_every_loss_is_in_the_family_or_has_laws_of_its_own():
    elsewhere = {"NumberingLoss": "test_numbering.py", "CrossEntropy": "test_toy.py"}
    elsewhere |= {"Reconstruction": "test_discovery.py", "SoftEquivariance": "test_soft_equivariance.py"}
    elsewhere["SquaredError"] = "test_toy.py"
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


# --- exclusive multiset equivariance --------------------------------------------------------------------------------

# aggregators whose gradient separates equal elements, by a sort or a canonical order
SEPARATE = {"fspool", "fspool, other knots", "equilibrium", "monoid in canonical order", "frames, O(3)"}
SEPARATE |= {"frames, SO(2)", "frames, affine", "set encoder", "pairwise"}


@pytest.mark.parametrize("name", test_aggregators.FAMILY)
def test_descent_on_an_aggregator_separates_equal_elements_or_cannot(name):
    """Whatever the weights: descent is multiset-equivariant with all aggregators, exclusively so with these."""
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
            OfTokens(
                LatentMatching(encoder_of(DIM)),
                SetEncoder(FSPool(LATENT, set_size=CLEVR.max_objects), set_dim=DIM + 3, hidden_dim=8),
            ),
        ]
    ),
}
every_objective = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)


def objective_problem(make, batch=BATCH):
    """An objective, elements, and their problem."""
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
    if isinstance(objective, Conditioned):
        with pytest.raises(ValueError, match="condition"):
            objective(elements, Problem(problem.latent, problem.initial))
    last = Problem(problem.latent[1:], problem.initial[1:], condition=problem.condition[1:])
    close(objective(elements[1:], last), expected[1:])
    masked = Problem(problem.latent, problem.initial, MASK, problem.condition)
    other = Problem(problem.latent, other.initial, MASK[:, ORDER], other.condition)
    close(objective(elements[:, ORDER], other), objective(elements, masked))


def test_an_auto_encoder_s_input_set_is_a_minimum():
    """With its own encoder the objective is 0 there, in any order, and positive elsewhere."""
    objective, elements = OfTokens(LatentMatching(encoder_of(DIM))).double(), normal(BATCH, SIZE, DIM)
    problem = Problem(elements, normal(BATCH, SIZE, DIM, seed=1))
    assert objective.token_dim == DIM
    close(objective(elements[:, ORDER], problem), torch.zeros(BATCH, dtype=torch.float64))
    assert objective(normal(BATCH, SIZE, DIM, seed=2), problem).min() > 1e-4
    with pytest.raises(InputError, match="expected an aggregator, since Proximity has no set encoder"):
        OfTokens(Proximity())


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
    leaf, direction = elements.requires_grad_(), normal(BATCH, SIZE, DIM, seed=5)

    def slope():
        (gradient,) = torch.autograd.grad(objective(leaf, problem).sum(), leaf, create_graph=True)
        return (gradient * direction).sum()

    check_slope(lambda: objective(leaf, problem).sum(), [leaf], atol=1e-8)
    check_slope(slope, [leaf], atol=1e-7)


# --- iDSPN and DSPN -------------------------------------------------------------------------------------------------


def solved(objective, initial, problem, mask=None, projection=None):
    """The set that a descent finds from a given start."""
    descent = GradientDescent(iterations=6, momentum=0.9, clip=2.0, projection=projection)
    decoder = IDSPN(objective, descent, set_size=SIZE, set_dim=DIM, start=Given(initial)).double()
    return decoder(problem.latent, mask=mask, condition=problem.condition if decoder.conditional else None)


@every_objective
def test_a_descent_permutes_with_its_start_and_does_not_see_padding(make):
    objective, _, problem = objective_problem(make)
    elements, masked = (solved(objective, problem.initial, problem, mask) for mask in (None, MASK))
    other = replace(problem, condition=problem.condition[:, ORDER])
    close(solved(objective, problem.initial[:, ORDER], other), elements[:, ORDER])
    close(solved(objective, problem.initial[:, ORDER], other, MASK[:, ORDER]), masked[:, ORDER])
    for row, present in enumerate(MASK):
        initial, condition = (part[row : row + 1, present] for part in (problem.initial, problem.condition))
        alone = Problem(problem.latent[row : row + 1], initial, condition=condition)
        close(solved(objective, initial, alone), masked[row : row + 1, present])


def test_a_start_outside_of_what_is_allowed_is_projected():
    """As published: the first gradient is already taken on the simplex."""
    objective, _, problem = objective_problem(OBJECTIVES["latent matching"])
    inside = inner.simplex(problem.initial)
    assert not torch.equal(inside, problem.initial)
    ways = (solved(objective, start, problem, projection=Simplex()) for start in (inside, problem.initial))
    close(*ways)


# --- implicit slots -------------------------------------------------------------------------------------------------

SLOTS = {"token_dim": DIM, "slot_dim": 4, "hidden_dim": 5, "set_size": SIZE, "set_dim": 2}
REFINED = {
    "slot attention": lambda **numbers: SlotAttention(**SLOTS, **numbers),
    "slots by transport": lambda **numbers: SlotAttention(SinkhornAttention(dim=4), **SLOTS, **numbers),
    "slot mixture": lambda **numbers: SlotMixture(**SLOTS, **numbers),
}


@pytest.mark.parametrize("make", REFINED.values(), ids=REFINED)
def test_implicit_slots_have_the_gradients_of_unrolled_ones_where_they_have_converged(make):
    """The error of the last k steps falls with k."""
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

    exact = gradients(None)
    errors = [float((gradients(steps) - exact).norm() / exact.norm()) for steps in (1, 5, 60)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-9
