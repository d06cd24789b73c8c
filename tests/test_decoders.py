"""Laws of the decoders: who is equivariant to what, what padding changes, and gradients against finite differences."""

import itertools
import math

import pytest
import tiny
import torch
import yaml
from problems import finite_difference
from torch import nn

from setpred.aggregators import FSPool, SetEncoder, SumPool
from setpred.checkpoint.load import load_checkpoint
from setpred.commands.train import train
from setpred.data.dataset import open_data
from setpred.decoders import (
    DETR,
    IDSPN,
    MESH,
    BiLSTMDecoder,
    GaussianStart,
    LearnedStart,
    MLPDecoder,
    RandomStart,
    Seq2Set,
    SinePosition,
    SinkhornAttention,
    SlotAttention,
    SlotMixture,
    SlotSoftmax,
    TransformerDecoder,
)
from setpred.decoders.attention import Attention
from setpred.decoders.base import refined
from setpred.decoders.seq2set import AdditiveAttention
from setpred.decoders.sinkhorn_mesh import entropy
from setpred.decoders.slot_mixture import log_responsibilities
from setpred.encoders import PositionedTokens, ResNetTrunk, SlotTrunk, SmallCNN, SmallTrunk, Tokens, position_grid
from setpred.errors import InputError
from setpred.inner import GradientDescent, LatentMatching, Unrolled
from setpred.matching import sinkhorn
from setpred.model import SetPredictor

BATCH, TOKENS, DIM, SIZE, OUT = 3, 5, 6, 4, 5
SETS = {"set_size": SIZE, "set_dim": OUT}
SLOTS = {"token_dim": DIM, "slot_dim": 8, "hidden_dim": 7, **SETS}


def sharp(differentiation, **numbers):
    """Slot Attention with MESH; without noise, which tells equal slots apart."""
    mesh = MESH(differentiation, **{"noise": 0.0, "step_size": 1.0, **numbers})
    return SlotAttention(SinkhornAttention(mesh, dim=8, hidden_dim=5, iterations=3), iterations=2, **SLOTS)


class Nowhere(nn.Module):
    """Positions that say nothing, for tokens of any number."""

    def forward(self, tokens):
        return torch.zeros_like(tokens[0])


def detr(position, **numbers):
    layers = {"encoder_layers": 1, "decoder_layers": 2, **numbers}
    return DETR(position, token_dim=DIM, dim=8, heads=2, hidden_dim=7, **layers, **SETS)


TOKEN_DECODERS = {
    "slot attention": lambda: SlotAttention(**SLOTS),
    "slot attention, two heads": lambda: SlotAttention(heads=2, **SLOTS),
    "implicit slot attention": lambda: SlotAttention(gradient_steps=1, iterations=5, **SLOTS),
    "slot mixture": lambda: SlotMixture(gradient_steps=None, **SLOTS),
    "implicit slot mixture": lambda: SlotMixture(**SLOTS),
    "detr": lambda: detr(Nowhere()),
    "seq2set": lambda: Seq2Set(token_dim=DIM, hidden_dim=7, embedding_dim=4, **SETS),
    "slots by transport, two heads": lambda: SlotAttention(SinkhornAttention(dim=4), heads=2, **SLOTS),
    "slots by sharp transport": lambda: sharp(Unrolled()),
    "slots by sharp transport, constant steps": lambda: sharp(None),
}
VECTOR_DECODERS = {
    "mlp": lambda: MLPDecoder(latent_dim=DIM, hidden_dim=7, **SETS),
    "bilstm": lambda: BiLSTMDecoder(latent_dim=DIM, hidden_dim=4, **SETS),
    "transformer": lambda: TransformerDecoder(latent_dim=DIM, dim=8, heads=2, layers=2, hidden_dim=7, **SETS),
}
DECODERS = TOKEN_DECODERS | VECTOR_DECODERS
# whose slots are told apart by their start alone
SLOT_DECODERS = [name for name in TOKEN_DECODERS if "slot" in name]
# weights that have nothing to weigh: DETR's elements are zeros when they first see each other
IDLE = {"detr": {"decoder.0.own.value.weight"}}
# whose gradients are not those of the value, by design
APPROXIMATE = {"implicit slot attention", "implicit slot mixture", "slots by sharp transport, constant steps"}

every = pytest.mark.parametrize("name", DECODERS)
every_of_tokens = pytest.mark.parametrize("name", TOKEN_DECODERS)
every_of_slots = pytest.mark.parametrize("name", SLOT_DECODERS)


def build(name, seed=0):
    torch.manual_seed(seed)
    return DECODERS[name]().double().eval()


def features(name, batch=BATCH):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, TOKENS, DIM) if name in TOKEN_DECODERS else (batch, DIM)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


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


class New(nn.Module):
    """A recurrent cell that forgets."""

    def forward(self, new, old):
        return new


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-9, "atol": 1e-9, **tolerance})


# --- all of them --------------------------------------------------------------------------------------------------


@every
def test_refine_yields_every_prediction_and_forward_the_last(name):
    decoder, given = build(name), features(name)
    iterates = list(decoder.refine(given))
    assert all(iterate.shape == (BATCH, SIZE, OUT) for iterate in iterates)
    close(decoder(given), iterates[-1])
    if name == "detr":
        assert len(iterates) == len(decoder.decoder)
    if not decoder.iterative:
        with pytest.raises(InputError, match="no number of iterations"):
            decoder(given, iterations=2)
        return
    assert len(iterates) == decoder.iterations + 1
    longer = list(decoder.refine(given, iterations=decoder.iterations + 2))
    close(torch.stack(longer[: len(iterates)]), torch.stack(iterates))


@every
def test_a_prediction_depends_on_its_example_alone(name):
    decoder, given = build(name), features(name)
    together = decoder(given)
    order = torch.tensor([2, 0, 1])
    close(decoder(given[order]), together[order])
    close(decoder(given[1:2]), together[1:2])


@pytest.mark.parametrize("name", sorted(DECODERS.keys() - APPROXIMATE))
def test_gradients_are_those_of_finite_differences(name):
    """Along random directions of the features alone, and of all parameters at once."""
    decoder, given = build(name), features(name).requires_grad_()
    weighted_sum(decoder(given)).backward()
    for tensors in ([given], list(decoder.parameters())):
        directions = [torch.randn_like(tensor) for tensor in tensors]
        slope = sum((tensor.grad * direction).sum() for tensor, direction in zip(tensors, directions, strict=True))
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6, 1e-6):  # ahead, behind, and back
                for tensor, direction in zip(tensors, directions, strict=True):
                    tensor += step * direction
                values.append(weighted_sum(decoder(given)))
        assert slope.abs() > 1e-4
        close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@every
def test_every_parameter_learns(name):
    decoder = build(name).train()
    weighted_sum(decoder(features(name))).backward()
    for part, parameter in decoder.named_parameters():
        if part.startswith("start") and getattr(decoder, "gradient_steps", None) is not None:
            assert parameter.grad is None  # a fixed point does not depend on its start
        else:
            assert (parameter.grad.abs().max() > 0) == (part not in IDLE.get(name, ())), part


@every
def test_runs_in_full_precision_under_autocast(name):
    decoder, given = build(name).float(), features(name).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = decoder(given)
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        torch.testing.assert_close(mixed, decoder(given.float()), rtol=0, atol=0)


@every
def test_features_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match="expected features"):
        build(name)(features(name)[..., 1:])
    with pytest.raises(ValueError, match="expected features"):
        build(name)(features(name).unsqueeze(1))


# --- over tokens --------------------------------------------------------------------------------------------------


@every_of_tokens
def test_padding_has_no_influence(name):
    decoder, given = build(name), features(name)
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [2], [4]])
    noise = given.clone().masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    masked = decoder(noise, mask=mask)
    for row, count in enumerate([TOKENS, 2, 4]):
        close(masked[row : row + 1], decoder(given[row : row + 1, :count]))
    weighted_sum(masked).backward()
    assert torch.isfinite(noise.grad).all()
    assert (noise.grad[~mask] == 0).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in decoder.parameters())
    with pytest.raises(ValueError, match="mask"):
        decoder(given, mask=mask[:, 1:])


@every_of_tokens
def test_the_order_of_tokens_changes_nothing(name):
    decoder, given = build(name), features(name)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    close(decoder(given[:, order]), decoder(given))


# --- slots --------------------------------------------------------------------------------------------------------


@every_of_slots
def test_elements_permute_with_the_start_of_their_slots(name):
    decoder, given = build(name), features(name)
    start, order = decoder.start(given), torch.tensor([2, 0, 3, 1])
    decoder.start = Given(start)
    elements = decoder(given)
    decoder.start = Given(start[:, order])
    close(decoder(given), elements[:, order])


# not MESH: a tie is a maximum of the entropy, from which its descent flees in any direction, be it that of rounding
@pytest.mark.parametrize("name", [name for name in SLOT_DECODERS if "sharp" not in name])
def test_slots_that_start_equal_stay_equal(name):
    """Set equivariance: whatever the weights, equal slots end as equal elements, so two equal objects are one."""
    for seed in range(3):
        decoder, given = build(name, seed), features(name)
        decoder.start = Given(decoder.start(given)[:, :1].expand(-1, SIZE, -1))
        elements = decoder(given)
        close(elements, elements[:, :1].expand_as(elements))


# --- queries and codes: the other decoders that are set-equivariant ---------------------------------------------------


def test_elements_permute_with_the_queries_of_detr():
    decoder, given, order = build("detr"), features("detr"), torch.tensor([2, 0, 3, 1])
    elements = decoder(given)
    with torch.no_grad():
        decoder.queries.copy_(decoder.queries[order])
    close(decoder(given), elements[:, order])


def test_equal_queries_of_detr_give_equal_elements():
    for seed in range(3):
        decoder, given = build("detr", seed), features("detr")
        with torch.no_grad():
            decoder.queries.copy_(decoder.queries[:1].expand_as(decoder.queries))
        elements = decoder(given)
        close(elements, elements[:, :1].expand_as(elements))


def test_elements_permute_with_the_codes_of_the_transformer_and_equal_codes_give_equal_ones():
    for seed in range(3):
        decoder, given, order = build("transformer", seed), features("transformer"), torch.tensor([2, 0, 3, 1])
        elements, codes = decoder(given), decoder.start(given)
        decoder.start = Given(codes[:, order])
        close(decoder(given), elements[:, order])
        decoder.start = RandomStart(SIZE, 8, scale=0.0)
        elements = decoder(given)
        close(elements, elements[:, :1].expand_as(elements))


def test_detr_sees_tokens_with_their_positions_and_in_no_other_order():
    torch.manual_seed(0)
    decoder = detr(SinePosition()).double().eval()
    given, order = torch.randn(BATCH, 9, DIM, dtype=torch.float64), torch.randperm(9)
    tokens = decoder.narrow(given)
    positions = decoder.position(tokens)
    *_, elements = decoder.decode(tokens, positions)
    close(elements, decoder(given))
    *_, together = decoder.decode(tokens[:, order], positions[order])
    close(together, elements)
    assert (decoder(given[:, order]) - elements).abs().max() > 1e-3  # positions matter


def test_sine_positions_against_a_loop():
    positions = SinePosition()(torch.zeros(1, 9, 8, dtype=torch.float64))
    for row, column in itertools.product(range(3), range(3)):
        waves = [math.tau / 3 / 10_000 ** (4 * j / 8) for j in range(2)]
        expected = [wave(w * (place + 1)) for place in (row, column) for wave in (math.sin, math.cos) for w in waves]
        close(positions[3 * row + column], torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="square map"):
        SinePosition()(torch.zeros(1, 8, 8))


def test_seq2set_says_each_element_knowing_those_before():
    decoder, given = build("seq2set"), features("seq2set")
    elements = decoder(given)
    assert torch.pdist(elements[0].detach()).min() > 0
    head = decoder.head

    class Louder(nn.Module):
        """The head, but for the second element it says something else."""

        def __init__(self):
            super().__init__()
            self.said = 0

        def forward(self, rows):
            self.said += 1
            return head(rows) + (self.said == 2)

    decoder.head = Louder()
    others = decoder(given)
    close(others[:, 0], elements[:, 0])
    assert ((others - elements)[:, 1:].abs().amax((1, 2)) > 1e-6).all()
    assert ((others - elements)[:, 2:].abs().amax(2) > 1e-9).all()


def test_additive_attention_against_a_loop():
    torch.manual_seed(0)
    attention = AdditiveAttention(3, 2, hidden_dim=4).double()
    tokens, state = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    seen = attention(tokens, attention.of_token(tokens), state, None)
    for b in range(2):
        scores = [attention.score((attention.of_token(x) + attention.of_state(state[b])).tanh()) for x in tokens[b]]
        weights = torch.cat(scores).softmax(0)
        close(seen[b], sum(weight * x for weight, x in zip(weights, tokens[b], strict=True)))


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = Attention(8, heads=2).double(), nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in (ours.query, ours.key, ours.value)]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, torch.randn(8), ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    queries, keys, values = (torch.randn(2, n, 8, dtype=torch.float64) for n in (3, 5, 5))
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    close(ours(queries, keys, values, mask), theirs(queries, keys, values, key_padding_mask=~mask)[0])


@pytest.mark.parametrize(
    "build", [lambda: detr(None, decoder_layers=0), lambda: Attention(8, heads=3), lambda: Attention(8, heads=0)]
)
def test_transformers_refuse_numbers_they_cannot_have(build):
    with pytest.raises(InputError, match="expected"):
        build()


def test_dropout_is_of_training_alone():
    torch.manual_seed(0)
    decoder, given = detr(Nowhere(), dropout=0.5).double(), features("detr")
    assert not torch.allclose(decoder(given), decoder(given))
    close(decoder.eval()(given), decoder(given))


def test_idspn_with_sorting_separates_what_starts_equal_and_with_a_sum_does_not():
    """Exclusive multiset equivariance: equal elements get different gradients from the sort (Zhang et al., 2022)."""
    for pool, separates in ((FSPool(16, set_size=SIZE), True), (SumPool(16), False)):
        torch.manual_seed(0)
        encoder = SetEncoder(pool, set_dim=OUT, hidden_dim=8)
        start = Given(torch.randn(1, 1, OUT).expand(BATCH, SIZE, OUT))
        decoder = IDSPN(LatentMatching(encoder), GradientDescent(iterations=5), start=start, **SETS)
        elements = decoder.double()(torch.randn(BATCH, 16, dtype=torch.float64))
        apart = torch.stack([(elements[:, i] - elements[:, j]).norm() for i, j in itertools.combinations(range(4), 2)])
        assert apart.min() > 1e-3 if separates else apart.max() < 1e-9


def test_slot_softmax_against_a_loop():
    queries, keys = torch.randn(2, 1, 3, 4, dtype=torch.float64), torch.randn(2, 1, 5, 4, dtype=torch.float64)
    weights = SlotSoftmax()(queries, keys, None, None)
    for b in range(2):
        shares = torch.zeros(3, 5, dtype=torch.float64)
        for s in range(5):
            scores = [float(queries[b, 0, i] @ keys[b, 0, s]) / 2 for i in range(3)]
            total = sum(torch.tensor(score).exp() for score in scores)
            for i in range(3):
                shares[i, s] = torch.tensor(scores[i]).exp() / total
        close(weights[b, 0], shares / shares.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)


# --- transport between tokens and slots -----------------------------------------------------------------------------


def transport_problem(dtype=torch.float64):
    """Queries, keys, and an attention whose marginals are not uniform."""
    torch.manual_seed(3)
    queries, keys = torch.randn(2, 2, SIZE, 3, dtype=dtype), torch.randn(2, 2, 7, 3, dtype=dtype)
    return queries, keys, SinkhornAttention(dim=3, iterations=200).to(dtype)


def test_weights_are_a_plan_between_the_learned_marginals():
    queries, keys, attention = transport_problem()
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    weights = attention(queries, keys, mask, None)
    of_slots = SIZE * attention.slot_mass(queries).squeeze(-1).softmax(-1)
    of_tokens = attention.token_mass(keys).squeeze(-1).masked_fill(~mask[:, None], -torch.inf).softmax(-1) * SIZE
    close(weights.sum(-1), of_slots)
    close(weights.sum(-2), of_tokens)
    assert of_slots.std() > 1e-3
    assert of_tokens.std() > 1e-3
    few = transport_problem()[2]
    few.iterations = 1
    close(few(queries, keys, None, None).sum(-1), of_slots)  # exact after any number of iterations


def test_the_plan_is_the_cheapest_at_its_temperature():
    """P = diag(u) exp(-cost / τ) diag(v): the logarithm's interaction is that of the costs."""
    queries, keys, attention = transport_problem()
    attention.temperature = 0.7
    logs = attention(queries, keys, None, None).log()
    costs = torch.stack([torch.stack([(q[:, None] - k[None]).norm(dim=-1) for q, k in zip(*pair, strict=True)])
                         for pair in zip(queries, keys, strict=True)])  # fmt: skip

    def interaction(matrix):
        return matrix - matrix.mean(-1, keepdim=True) - matrix.mean(-2, keepdim=True) + matrix.mean((-1, -2), True)

    close(interaction(logs), interaction(-costs / 0.7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("differentiation", [None, Unrolled()], ids=["constant steps", "unrolled"])
def test_mesh_lowers_the_entropy_of_the_plan_and_keeps_its_marginals(differentiation):
    torch.manual_seed(0)
    cost = torch.rand(5, 12, SIZE, dtype=torch.float64)
    a, b = (SIZE * torch.rand(5, n, dtype=torch.float64).softmax(-1) for n in (12, SIZE))

    def plan(cost, start):
        return sinkhorn(cost, a, b, epsilon=1.0, iterations=30, start=start)

    entropies = [entropy(plan(cost, None).plan)]
    for iterations in (1, 2, 4):
        mesh = MESH(differentiation, iterations=iterations, step_size=1.0)
        changed, start = mesh(cost, plan, None)
        sharp = plan(changed, start).plan
        close(sharp.sum(-1), a, rtol=1e-4, atol=1e-4)
        close(sharp.sum(-2), b)
        entropies.append(entropy(sharp))
    assert all((later < earlier).all() for earlier, later in itertools.pairwise(entropies))
    # a step has the asked length
    moved = MESH(differentiation, iterations=1, step_size=8.0, noise=0.0)(cost, plan, None)[0] - cost
    close(moved.flatten(1).norm(dim=1), torch.full((5,), 8.0, dtype=torch.float64))


def test_entropy_of_a_sharp_and_of_an_even_plan():
    close(entropy(torch.eye(4, dtype=torch.float64)[None]), torch.zeros(1, dtype=torch.float64), atol=1e-12)
    even = torch.full((1, 2, 4), 0.125, dtype=torch.float64)
    close(entropy(even), torch.tensor([8.0], dtype=torch.float64).log())


def test_constant_steps_pass_the_gradient_straight_to_the_costs():
    cost = torch.rand(2, 5, SIZE, dtype=torch.float64, requires_grad=True)
    mesh = MESH(noise=0.0)
    changed, _ = mesh(cost, lambda cost, start: sinkhorn(cost, epsilon=1.0, iterations=5, start=start), None)
    upstream = torch.randn_like(changed)
    changed.backward(upstream)
    assert not torch.allclose(changed, cost)
    close(cost.grad, upstream)


def test_noise_drives_equal_slots_apart():
    """With noise MESH is exclusively multiset-equivariant: what a softmax must keep equal, it separates."""
    given = features("slot attention")
    torch.manual_seed(0)
    decoder = sharp(None, noise=1e-3, step_size=8.0).double().eval()
    start = torch.randn(1, 1, 8, dtype=torch.float64).expand(BATCH, SIZE, -1)
    decoder.start = Given(start)
    elements = decoder(given)
    apart = torch.stack([(elements[:, i] - elements[:, j]).norm() for i, j in itertools.combinations(range(SIZE), 2)])
    assert apart.min() > 1e-2  # ten times the noise and more
    close(decoder(given), elements)  # of the seed alone
    decoder.train()
    assert not torch.allclose(decoder(given), decoder(given))


def test_noise_is_drawn_once_for_all_refinements_and_anew_for_each_batch_in_training():
    """As in the released code; the same in every refinement, so that ties break the same way."""
    given, drawn = features("slot attention"), []
    torch.manual_seed(0)
    decoder = sharp(None, noise=1e-3).double()
    decoder.attention.mesh.forward = lambda cost, transport, noise: (drawn.append(noise), (cost, None))[1]
    for training in (True, True, False, False):
        decoder.train(training)(given)
    first, second, fixed, again = drawn[::2]
    assert all(torch.equal(one, other) for one, other in zip(drawn[::2], drawn[1::2], strict=True))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(fixed, again)
    assert torch.equal(fixed[0], fixed[1])
    assert first.shape == fixed.shape == (BATCH, 1, TOKENS, SIZE)


def test_padding_does_not_change_the_noise_of_other_tokens():
    mesh, keys = MESH(noise=1.0, seed=3).eval(), torch.zeros(2, 2, 7, 4)
    assert torch.equal(mesh.draw(keys, 3)[:, :, :5], mesh.draw(keys[:, :, :5], 3))


# --- mixtures -------------------------------------------------------------------------------------------------------


def mixture_problem():
    """Tokens and slots, and a module whose learned parts do nothing: what is left is the mixture."""
    torch.manual_seed(4)
    decoder = SlotMixture(token_dim=DIM, slot_dim=DIM, gradient_steps=None, **SETS).double()
    for linear in (decoder.query, decoder.key, decoder.value):
        linear.weight.data = torch.eye(DIM, dtype=torch.float64)
    decoder.norm_slots = decoder.residual[0] = nn.Identity()
    for layer in (decoder.residual[1][0], decoder.residual[1][2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    decoder.recurrent = New()
    decoder.head = nn.Identity()
    tokens = torch.randn(2, 30, DIM, dtype=torch.float64)
    slots = torch.randn(2, SIZE, 2 * DIM, dtype=torch.float64)
    return decoder, tokens, slots


def test_responsibilities_are_the_posterior_of_the_mixture():
    torch.manual_seed(0)
    points, mean = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, SIZE, 3, dtype=torch.float64)
    log_deviation = 0.5 * torch.randn_like(mean)
    log_prior = torch.randn(2, SIZE, dtype=torch.float64).log_softmax(-1)
    components = torch.distributions.Normal(mean.unsqueeze(2), log_deviation.exp().unsqueeze(2))
    joint = log_prior.unsqueeze(-1) + components.log_prob(points.unsqueeze(1)).sum(-1)
    close(log_responsibilities(points, mean, log_deviation, log_prior), joint.log_softmax(1))
    tempered = joint - (1 - 0.3) * (joint - log_prior.unsqueeze(-1))
    close(log_responsibilities(points, mean, log_deviation, log_prior, scale=0.3), tempered.log_softmax(1))


def test_with_nothing_learned_the_refinement_is_expectation_maximisation():
    decoder, tokens, slots = mixture_problem()
    decoder.start = Given(slots)
    x = decoder.norm_tokens(tokens)
    prior, found = torch.full((2, SIZE), 1 / SIZE, dtype=torch.float64), slots
    for iterations in (1, 2, 3):
        shares = log_responsibilities(x, *found.chunk(2, -1), prior.log(), scale=DIM**-0.5).exp()
        mass = shares.sum(-1)
        mean = torch.einsum("bis,bsd->bid", shares, x) / mass.unsqueeze(-1)
        squares = (x.unsqueeze(1) - mean.unsqueeze(2)).square()
        variance = torch.einsum("bis,bisd->bid", shares, squares) / mass.unsqueeze(-1)
        found, prior = torch.cat([mean, 0.5 * variance.log()], -1), mass / 30
        close(decoder(tokens, iterations=iterations), found, rtol=1e-4, atol=1e-5)


# --- the start of the slots -----------------------------------------------------------------------------------------


def test_the_start_of_slots_has_the_learned_mean_and_deviation():
    start = GaussianStart(SIZE, 3, seed=5)
    torch.manual_seed(0)
    draws = start(torch.zeros(4000, 1))
    close(draws.mean((0, 1)), start.mean, rtol=0, atol=0.05)
    close(draws.std((0, 1)), start.log_deviation.exp(), rtol=0.05, atol=0)
    torch.manual_seed(0)
    noise = RandomStart(SIZE, 3, scale=1.0, seed=5)(torch.zeros(4000, 1))
    torch.testing.assert_close(draws, start.mean + start.log_deviation.exp() * noise)


# --- gradients at a fixed point ------------------------------------------------------------------------------------


class Contraction:
    """f(s; θ) = tanh(A s + θ) per example, |A| < 1: one fixed point, and its derivatives in closed form."""

    def __init__(self, dim=4):
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        self.matrix = 0.8 * matrix / torch.linalg.matrix_norm(matrix, ord=2)
        self.theta, self.start, self.upstream = torch.randn(3, 2, dim, generator=generator, dtype=torch.float64)

    def after(self, theta, iterations, gradient_steps=None, start=None):
        def step(state):
            return (state @ self.matrix.mT + theta).tanh()

        start = self.start if start is None else start
        *_, last = refined(step, start, iterations=iterations, gradient_steps=gradient_steps)
        return last

    def gradient(self, iterations, gradient_steps=None):
        theta = self.theta.clone().requires_grad_()
        (self.upstream * self.after(theta, iterations, gradient_steps)).sum().backward()
        return theta.grad

    def series(self, terms):
        """Σ_{j < terms} uᵀ Jʲ ∂f/∂θ at the fixed point, J = ∂f/∂θ A and ∂f/∂θ = diag(1 - s²)."""
        slope = 1 - self.after(self.theta, 300).square()
        term = total = self.upstream * slope
        for _ in range(terms - 1):
            term = (term @ self.matrix) * slope
            total = total + term
        return total


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_last_steps_give_the_first_terms_of_the_series(steps):
    """Exact at the fixed point; one step, implicit Slot Attention, is the first term alone."""
    problem = Contraction()
    close(problem.gradient(200, steps), problem.series(steps))
    assert (problem.gradient(200, steps) - problem.series(200)).abs().max() > 1e-3


def test_many_steps_are_the_implicit_gradient_and_the_unrolled_one():
    problem = Contraction()
    exact = finite_difference(lambda t: (problem.upstream * problem.after(t, 300)).sum(), problem.theta)
    close(problem.gradient(300, 150), exact, rtol=1e-7, atol=1e-7)
    close(problem.gradient(300), exact, rtol=1e-7, atol=1e-7)


def test_the_one_step_gradient_is_that_of_a_step_from_where_the_others_led():
    """Exact wherever the iteration stands: s_T = f(s_{T-1}) with s_{T-1} held fixed."""
    decoder, given = build("implicit slot attention"), features("slot attention")
    decoder.head = nn.Identity()
    *_, before, last = decoder.refine(given)
    weighted_sum(last).backward()
    gradients = [parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None]
    decoder.zero_grad()
    decoder.start, decoder.gradient_steps = Given(before.detach()), None
    again = decoder(given, iterations=1)
    close(again, last)
    weighted_sum(again).backward()
    for gradient, parameter in zip(gradients, decoder.parameters(), strict=False):
        close(parameter.grad, gradient)


def test_steps_without_gradients_leave_the_value_and_the_start_alone():
    problem = Contraction()
    start = problem.start.clone().requires_grad_()
    close(problem.after(problem.theta, 7, 2), problem.after(problem.theta, 7))
    assert not problem.after(problem.theta, 7, 2, start).requires_grad
    assert problem.after(problem.theta, 7, None, start).requires_grad
    theta = problem.theta.clone().requires_grad_()
    with torch.no_grad():
        assert not problem.after(theta, 3, 2).requires_grad


# --- encoders that give tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", [SmallTrunk(image_size=16, width=4), SlotTrunk(image_size=32, width=6)])
def test_tokens_are_the_positions_of_the_map(trunk):
    torch.manual_seed(0)
    image = torch.rand(2, 3, trunk.image_size, trunk.image_size)
    bare, positioned = Tokens(trunk).eval(), PositionedTokens(trunk, token_dim=5).eval()
    features = trunk(image)
    tokens = bare(image)
    assert tokens.shape == (2, 64, bare.token_dim)
    assert bare.image_size == positioned.image_size == trunk.image_size
    torch.testing.assert_close(tokens[:, 11], features[:, :, 1, 3])
    assert positioned(image).shape == (2, 64, 5)
    top, bottom = [[0, 0, 1, 1], [0, 0.5, 1, 0.5], [0, 1, 1, 0]], [[1, 0, 0, 1], [1, 0.5, 0, 0.5], [1, 1, 0, 0]]
    assert position_grid(2, 3).tolist() == top + bottom


def test_equal_features_at_different_positions_are_different_tokens():
    flat = torch.zeros(1, 3, 32, 32)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 1, stride=4))
    trunk.image_size, trunk.channels = 32, 4
    assert torch.equal(*Tokens(trunk)(flat)[0, [0, 30]])
    tokens = PositionedTokens(trunk, token_dim=5)(flat)[0]
    assert torch.pdist(tokens.double()).min() > 0


def test_a_resnet_trunk_refuses_sizes_it_cannot_have():
    with pytest.raises(ValueError, match="expected image_size"):
        ResNetTrunk(image_size=100)


# --- the door -----------------------------------------------------------------------------------------------------


def slots(**numbers):
    return SlotAttention(**{**SLOTS, **numbers})


def idspn():
    return IDSPN(LatentMatching(SetEncoder(FSPool(16, set_size=SIZE))), GradientDescent(iterations=1), set_size=SIZE)


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        (
            lambda: SmallCNN(image_size=16, latent_dim=16, width=4),
            slots,
            "SmallCNN gives a vector of 16 numbers, the decoder SlotAttention takes tokens of 6 numbers; take an encod",
        ),
        (
            lambda: Tokens(SmallTrunk(image_size=16, width=4)),
            idspn,
            "Tokens gives tokens of 4 numbers, the decoder IDSPN takes a vector; take an encoder that gives a vector",
        ),
        (
            lambda: PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=5),
            slots,
            "gives tokens of 5 numbers, .* takes tokens of 6 numbers; give both the same token_dim",
        ),
        (
            lambda: SmallCNN(image_size=16, latent_dim=16, width=4),
            lambda: MLPDecoder(latent_dim=8),
            "gives a vector of 16 numbers, the decoder MLPDecoder takes a vector of 8 .*; give both the same",
        ),
    ],
    ids=["vector for tokens", "tokens for vector", "tokens of another length", "vector of another length"],
)
def test_features_that_do_not_fit_are_said_at_the_door(encoder, decoder, message):
    with pytest.raises(InputError, match=message):
        SetPredictor(encoder(), decoder())


def test_parts_that_state_nothing_pass():
    SetPredictor(nn.Identity(), nn.Identity())
    SetPredictor(SmallCNN(image_size=16, latent_dim=16, width=4), idspn())
    SetPredictor(PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=DIM), slots())


@pytest.mark.parametrize("numbers", [{"heads": 3}, {"iterations": -1}, {"gradient_steps": 0}])
def test_slot_attention_refuses_numbers_it_cannot_have(numbers):
    with pytest.raises(InputError, match="expected slot_dim"):
        slots(**numbers)


def test_a_start_can_be_learned():
    decoder = slots(start=LearnedStart(SIZE, 8, scale=1.0))
    weighted_sum(decoder(torch.randn(BATCH, TOKENS, DIM))).backward()
    assert decoder.start.initial.grad.abs().max() > 0


# --- from the command line ------------------------------------------------------------------------------------------

TOKENS_FROM = {
    "class_path": "setpred.encoders.PositionedTokens",
    "init_args": {
        "token_dim": 8,
        "trunk": {"class_path": "setpred.encoders.SmallTrunk", "init_args": {"image_size": 16, "width": 4}},
    },
}
SHARP_SLOTS = {
    "class_path": "setpred.decoders.SlotAttention",
    "init_args": {
        "set_size": 4,
        "token_dim": 8,
        "slot_dim": 8,
        "attention": {
            "class_path": "setpred.decoders.SinkhornAttention",
            "init_args": {"dim": 8, "mesh": {"class_path": "setpred.decoders.MESH"}},
        },
    },
}


def test_trains_from_a_file_and_its_checkpoint_predicts_alike_in_any_batch(tmp_path, tiny_data):
    config = yaml.safe_load(tiny.CONFIG)
    config["model"] = {"encoder": TOKENS_FROM, "decoder": SHARP_SLOTS}
    (tmp_path / "slots.yaml").write_text(yaml.safe_dump(config))
    options = ["--runs", str(tmp_path), f"--data.init_args.folder={tiny_data}"]
    folder = train(["--config", str(tmp_path / "slots.yaml"), *options])
    loaded = load_checkpoint(folder / "best.ckpt")
    batch = open_data(loaded.data["path"], image_size=16).__getitems__(range(5))
    with torch.no_grad():
        together = loaded.model(batch["image"])
        alone = [loaded.model(batch["image"][i : i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)


def test_a_mismatch_in_a_file_is_one_sentence(tmp_path):
    config = yaml.safe_load(tiny.CONFIG)
    config["model"]["decoder"] = SHARP_SLOTS
    (tmp_path / "mismatch.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        InputError, match="SmallCNN gives a vector of 16 numbers, the decoder SlotAttention takes tokens"
    ):
        train(["--config", str(tmp_path / "mismatch.yaml")])
