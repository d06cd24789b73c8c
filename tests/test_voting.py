"""Laws of the voting energy, of the start from the votes, and of the descent by its curvature."""

import itertools

import pytest
import torch
from problems import close
from torch import nn

from setpred.aggregators import Aggregator, EquilibriumAggregation
from setpred.decoders import IDSPN, GreedyVotes
from setpred.encoders import Elements, PositionedTokens, ResidualTrunk, Votes
from setpred.errors import InputError
from setpred.inner import (
    Exact,
    GradientDescent,
    Identity,
    Implicit,
    Problem,
    Proximity,
    Sum,
    Unrolled,
    VotingEnergy,
    compiled,
    inner_gradient,
)
from setpred.inner.objectives import Energy
from setpred.inner.voting import Ballot
from setpred.model import SetPredictor

BATCH, TOKENS, SIZE, DIM, PRECISE = 3, 12, 4, 3, 2
WEIGHTS = (4.0, 4.0)


def features_of(*, batch=BATCH, tokens=TOKENS, dim=DIM, precise=PRECISE, seed=0, centres=None, spread=0.1):
    """Votes in clusters around centres `[objects, dim]`, with precisions near 1 and masses near 0.9."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres = 2 * noise(SIZE, dim) if centres is None else torch.as_tensor(centres, dtype=torch.float64)
    votes = centres[torch.arange(tokens) % len(centres)] + spread * noise(batch, tokens, dim)
    precisions, masses = (0.3 * noise(batch, tokens, precise)).exp(), (2 + 0.3 * noise(batch, tokens, 1)).sigmoid()
    return torch.cat([votes, precisions, masses], dim=-1)


def energy_of(**numbers):
    return VotingEnergy(**{"set_dim": DIM, "precise": PRECISE, "weights": WEIGHTS, **numbers}).double()


def start_of(size=SIZE, weights=WEIGHTS):
    return GreedyVotes(size, DIM, weights=weights).double()


def decoder_of(iterations=300, differentiation=None, size=SIZE):
    descent = GradientDescent(iterations=iterations)
    return IDSPN(energy_of(), descent, differentiation, set_size=size, set_dim=DIM, start=start_of(size)).double()


def points_of(seed=1):
    return features_of(tokens=SIZE, seed=seed)[..., :DIM]


def slowly(elements, features, initial):
    """The energy of one example, term by term as in the definition."""
    ballot = Ballot.of(features.unsqueeze(0), DIM)
    weights = torch.tensor([*WEIGHTS, 1.0], dtype=torch.float64)
    value = 0.5 * (weights * (elements - initial) ** 2).sum()
    for vote, precision, mass in zip(ballot.votes[0], ballot.precisions[0], ballot.masses[0], strict=True):
        inside = sum(torch.exp(-0.5 * (weights * precision * (row - vote) ** 2).sum()) for row in elements)
        value = value - mass * torch.log(inside)
    return value


def test_the_energy_is_its_definition():
    features, elements = features_of(), points_of()
    initial = points_of(2)
    expected = torch.stack([slowly(*one) for one in zip(elements, features, initial, strict=True)])
    close(energy_of()(elements, Problem(features, initial)), expected)


def test_its_gradient_is_the_formula_and_its_supports_share_out_the_masses():
    features, elements = features_of(), points_of().requires_grad_()
    problem = Problem(features, points_of(2))
    energy = energy_of(prior_weight=0.7)
    (gradient,) = torch.autograd.grad(energy(elements, problem).sum(), elements)
    ballot, supports = Ballot.of(features, DIM), energy.supports(elements, problem)
    close(supports.sum(1), ballot.masses)
    pulls = ballot.precisions.unsqueeze(1) * (elements.unsqueeze(2) - ballot.votes.unsqueeze(1))
    expected = 0.7 * (elements - problem.initial) + (supports.unsqueeze(-1) * pulls).sum(2)
    close(gradient, energy.weights * expected)


def test_the_slope_in_closed_form_is_the_gradient_also_of_a_set_with_padding():
    features, initial = features_of(), points_of(2)
    for mask in (None, torch.arange(SIZE) < torch.tensor([[SIZE], [2], [0]])):
        elements = points_of() if mask is None else points_of().masked_fill(~mask.unsqueeze(-1), torch.nan)
        energy = Energy(energy_of(prior_weight=0.7), Problem(features, initial, mask))
        gradient, curvature = energy.slope(elements)
        close(gradient, inner_gradient(energy, elements.requires_grad_(), create_graph=False))
        assert (curvature > 0).all()


def test_it_is_equilibrium_aggregation_whose_state_is_the_multiset():
    """The same energy and the same equilibrium, with the tokens as elements and the start as the prior."""
    features = features_of()
    energy, start = energy_of(weights=()), start_of(weights=())

    class Prior(Aggregator):
        def aggregate(self, elements, mask):
            return start(elements).flatten(1)

    class Potential(nn.Module):
        def forward(self, elements, state):
            return energy.potentials(state.unflatten(-1, (SIZE, DIM)), Problem(elements, None))

    descent = GradientDescent(iterations=50, learning_rate=0.1, momentum=0.5)
    prior = Prior(features.shape[-1], SIZE * DIM)
    # the aggregation takes the mean over the tokens, the energy their sum
    aggregation = EquilibriumAggregation(
        features.shape[-1], potential=Potential(), prior=prior, descent=descent, gain=TOKENS
    ).double()
    state = points_of()
    problem = Problem(features, start(features))
    close(aggregation.energy(features, state.flatten(1), None, prior(features)), energy(state, problem), rtol=1e-7)
    decoder = IDSPN(energy, descent, Unrolled(), set_size=SIZE, set_dim=DIM, start=start).double()
    close(aggregation(features).unflatten(-1, (SIZE, DIM)), decoder(features), rtol=1e-6, atol=1e-7)


def test_the_descent_ends_in_the_least_energy_that_brute_force_finds():
    """Two elements of one number: every pair of points of a fine grid."""
    features = features_of(batch=2, tokens=9, dim=1, precise=1, centres=[[-1.0], [1.5]], spread=0.3)
    energy, start = (energy_of(set_dim=1, precise=1, weights=(4.0,)), GreedyVotes(2, 1, weights=(4.0,)).double())
    descent = GradientDescent(iterations=400)
    decoder = IDSPN(energy, descent, set_size=2, set_dim=1, start=start).double()
    found, initial = decoder(features).detach(), start(features)
    line = torch.linspace(-2.5, 2.5, 401, dtype=torch.float64)
    pairs = torch.cartesian_prod(line, line).unsqueeze(-1)
    for row in range(2):
        given = Problem(*(part[row : row + 1].expand(len(pairs), -1, -1) for part in (features, initial)))
        energies = energy(pairs, given)
        best = pairs[energies.argmin()].flatten()
        close(found[row].flatten().sort().values, best.sort().values, rtol=0, atol=0.02)
        own = energy(found[row : row + 1], Problem(features[row : row + 1], initial[row : row + 1]))
        assert float(own) <= float(energies.min()) + 1e-9


def test_equal_tokens_are_one_of_their_masses_together():
    features, elements = features_of(tokens=4), points_of()
    heavy = torch.cat([features[..., :-1], 3 * features[..., -1:]], dim=-1)
    initial = torch.zeros_like(elements)
    close(
        energy_of()(elements, Problem(features.repeat(1, 3, 1), initial)),
        energy_of()(elements, Problem(heavy, initial)),
    )


WAYS = (Implicit(), Implicit(best=True), Implicit(Exact()), Unrolled(last=3), Unrolled())


@pytest.mark.parametrize("differentiation", WAYS)
def test_the_answer_depends_on_the_tokens_of_its_image_alone_in_any_order_and_by_any_way(differentiation):
    features = features_of()
    decoder, expected = decoder_of(8, differentiation), decoder_of(8)(features)
    close(decoder(features), expected)
    close(decoder(features[:, torch.randperm(TOKENS)]), expected)
    for row in range(BATCH):
        close(decoder(features[row : row + 1]), expected[row : row + 1])


def test_greedy_votes_pick_the_clusters_and_leave_the_rest_at_zero():
    """Clusters without spread: their centres, heaviest first; then nothing."""
    centres = torch.tensor([[2.0, -1.0, 1.0], [-2.0, 2.0, 1.0], [0.0, 0.5, -1.0]], dtype=torch.float64)
    features = features_of(batch=1, tokens=9, centres=centres, spread=0.0)
    features[..., -1] = torch.tensor([0.7, 0.9, 0.8] * 3)
    picks = start_of(5)(features)[0]
    close(picks[:3], centres[[1, 2, 0]], rtol=0, atol=2e-3)
    close(picks[3:], torch.zeros(2, DIM, dtype=torch.float64), rtol=0, atol=5e-2)


def test_absent_tokens_have_no_vote():
    torch.manual_seed(0)
    encoder = Votes(Elements(set_dim=5), set_dim=DIM, precise=PRECISE, hidden_dim=8).double()
    model = SetPredictor(encoder, decoder_of(8)).eval()
    inputs = torch.randn(1, 7, 5, dtype=torch.float64)
    padded = torch.cat([inputs, torch.full((1, 2, 5), torch.nan, dtype=torch.float64)], dim=1)
    mask = torch.tensor([[True] * 7 + [False] * 2])
    close(model(padded, mask=mask), model(inputs))


def test_anchored_votes_are_offsets_from_the_cells_of_the_image():
    torch.manual_seed(0)
    trunk = ResidualTrunk(image_size=16, widths=(4, 8), blocks=0)
    tokens = PositionedTokens(trunk, token_dim=None)
    plain, anchored = (Votes(tokens, set_dim=DIM, precise=PRECISE, hidden_dim=8, anchored=a) for a in (False, True))
    anchored.load_state_dict(plain.state_dict())
    image = torch.rand(2, 3, 16, 16)
    offsets = (anchored(image) - plain(image)).unflatten(1, (4, 4))  # rows and columns of 4 pixels each
    line = torch.tensor([2.0, 6.0, 10.0, 14.0]) / 8 - 1  # centres, in the units of positions in an image
    close(offsets[..., 0], line.expand(2, 4, 4), rtol=0, atol=1e-6)
    close(offsets[..., 1], line[:, None].expand(2, 4, 4), rtol=0, atol=1e-6)
    assert (offsets[..., 2:] == 0).all()
    with pytest.raises(ValueError, match="square map for anchored votes, got 7"):
        Votes(Elements(set_dim=5), set_dim=DIM, anchored=True)(torch.zeros(1, 7, 5))


def test_gated_votes_weigh_as_much_as_they_are_present():
    torch.manual_seed(0)
    plain, gated = (Votes(Elements(set_dim=5), set_dim=DIM, precise=PRECISE, hidden_dim=8, gated=g) for g in (0, 1))
    nn.init.normal_(plain.network[-1].weight)
    gated.load_state_dict(plain.state_dict())
    inputs = torch.randn(9, 20, 5)
    free, found = (Ballot.of(model(inputs), DIM) for model in (plain, gated))
    presence = free.votes[..., -1].clamp(0, 1)
    assert ((presence > 0) & (presence < 1)).any()
    close(found.masses, free.masses * presence)
    assert torch.equal(found.votes, free.votes)
    found.masses.sum().backward()
    assert (gated.network[-1].weight.grad[DIM - 1] == 0).all()  # presence learns from the sets alone
    with pytest.raises(InputError, match="gated or massive"):
        Votes(Elements(set_dim=5), set_dim=DIM, gated=True, massive=True)


def test_an_empty_set_has_no_energy_and_no_support():
    features, elements = features_of(), points_of().requires_grad_()
    problem = Problem(features, torch.zeros_like(elements), torch.zeros(BATCH, SIZE, dtype=torch.bool))
    energy = energy_of()(elements, problem)
    energy.sum().backward()
    assert (energy == 0).all()
    assert (elements.grad == 0).all()
    assert (energy_of().supports(elements, problem) == 0).all()


def test_the_curvature_is_of_a_quadratic_over_the_energy_that_touches_it():
    """E(Y + D) <= E(Y) + <∂E, D> + ½ <h D, D>, for small and large D."""
    features = features_of()
    problem = Problem(features, start_of()(features))
    energy = Energy(energy_of(prior_weight=0.4), problem)
    for seed in range(20):
        elements, apart = (points_of(2 * seed + k) for k in (0, 1))
        value, slope = energy(elements), inner_gradient(energy, elements.requires_grad_(), create_graph=False)
        for length in (1e-3, 0.1, 1.0, 10.0):
            step = length * apart
            bound = value + (slope * step + 0.5 * energy.curvature(elements) * step.square()).sum((1, 2))
            assert (energy(elements + step) <= bound + 1e-9).all()


def test_a_step_is_the_mean_of_votes_and_start_and_never_raises_the_energy():
    features = features_of(spread=1.0)
    initial, ballot = start_of()(features), Ballot.of(features, DIM)
    problem, decoder = Problem(features, initial), decoder_of(40)
    iterates = list(decoder.refine(features))
    for before, after in itertools.pairwise(iterate.detach() for iterate in iterates):
        shares = decoder.objective.supports(before, problem).unsqueeze(-1) * ballot.precisions.unsqueeze(1)
        close(after, (initial + (shares * ballot.votes.unsqueeze(1)).sum(2)) / (1 + shares.sum(2)))
        assert (decoder.objective(after, problem) <= decoder.objective(before, problem) + 1e-12).all()


def test_the_curvature_replaces_the_hessian_in_implicit_differentiation():
    """With one element, to which every vote belongs, it is the Hessian: `Exact` gives the same gradients."""
    features, results = features_of(), []
    for solver in (Identity(), Exact()):
        leaf = features.clone().requires_grad_()
        decoder_of(2, Implicit(solver), size=1)(leaf).pow(3).sum().backward()
        results.append(leaf.grad)
    close(*results)
    assert results[0].abs().max() > 1e-3


def test_objectives_in_a_sum_add_their_curvatures():
    features, elements = features_of(), points_of()
    problem = Problem(features, elements)
    close(
        Energy(Sum([energy_of(), Proximity(), energy_of()]), problem).curvature(elements),
        2 * energy_of().curvature(elements, problem),
    )
    assert Energy(Sum([Proximity()]), problem).curvature(elements) is None


def image_model(*, compile=False):
    torch.manual_seed(0)
    trunk = ResidualTrunk(image_size=16, widths=(4, 8), blocks=1)
    encoder = Votes(PositionedTokens(trunk, token_dim=None), set_dim=DIM, precise=PRECISE, hidden_dim=8)
    descent = GradientDescent(iterations=6)
    energy = VotingEnergy(set_dim=DIM, precise=PRECISE, weights=WEIGHTS)
    start = GreedyVotes(SIZE, DIM, weights=WEIGHTS)
    return SetPredictor(encoder, IDSPN(energy, descent, set_size=SIZE, set_dim=DIM, start=start, compile=compile))


def test_it_trains_from_images_in_half_precision_and_compiled(monkeypatch):
    torch.compiler.reset()
    step = torch.compile(compiled._step, backend="eager", fullgraph=True)  # without C++
    monkeypatch.setattr(compiled, "_compiled", lambda replayed: step)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model, fast = image_model(), image_model(compile=True)
    torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
    assert found.dtype == torch.float32  # no coordinate is rounded to eight bits
    found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_residual_block_starts_as_the_identity_and_every_block_counts():
    torch.manual_seed(0)
    trunk = ResidualTrunk(image_size=16, widths=(4, 8), blocks=2).eval()
    images = torch.rand(2, 3, 16, 16)
    halving = nn.Sequential(*list(trunk)[:2])
    torch.testing.assert_close(trunk(images), halving(images))
    assert trunk(images).shape == (2, 8, 4, 4)
    nn.init.ones_(trunk[-1].second[1].weight)
    assert not torch.allclose(trunk(images), halving(images))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: VotingEnergy(set_dim=3, precise=4), "precise"),
        (lambda: VotingEnergy(set_dim=3, weights=[1.0, -1.0]), "positive"),
        (lambda: VotingEnergy(set_dim=1, weights=[1.0, 1.0]), "at most 1"),
        (lambda: GreedyVotes(0, 3), "at least 1 element"),
        (lambda: Ballot.of(torch.zeros(1, 4, DIM), DIM), "expected votes"),
    ],
)
def test_bad_numbers_and_shapes_raise(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_the_rest_of_the_weights_is_that_of_a_longer_list():
    features, sizes = features_of(), (SIZE, DIM)
    elements = torch.randn(BATCH, SIZE, DIM, dtype=features.dtype, generator=torch.Generator().manual_seed(1))
    long, short = {"weights": [4.0] + [0.25] * (DIM - 1)}, {"weights": [4.0], "rest": 0.25}
    ones = {"weights": [4.0]}
    problem = Problem(features, torch.zeros_like(elements))
    energies = [energy_of(**{"weights": (), **each})(elements, problem) for each in (long, short, ones)]
    starts = [GreedyVotes(*sizes, **each).double()(features) for each in (long, short, ones)]
    for wide, brief, other in (energies, starts):
        close(brief, wide)
        assert not torch.allclose(other, wide)


@pytest.mark.parametrize("set_size", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("tokens", [5, 22, 256])
def test_equal_examples_have_equal_sets_to_the_last_bit(set_size, tokens):
    generator = torch.Generator().manual_seed(0)
    votes = torch.cat(
        [torch.randn(1, tokens, 9, generator=generator), torch.rand(1, tokens, 4, generator=generator)], -1
    )
    decoder = IDSPN(
        VotingEnergy(set_dim=9, precise=3, weights=[8, 8, 8]),
        GradientDescent(iterations=6),
        set_size=set_size,
        set_dim=9,
        start=GreedyVotes(set_size, 9, weights=[8, 8, 8]),
    )
    with torch.no_grad():
        found = decoder(votes.repeat(64, 1, 1))
    assert torch.equal(found, found[:1].expand_as(found))
