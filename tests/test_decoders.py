"""Laws of the decoders: equivariance, padding, gradients against finite differences; and each decoder's formula."""

import itertools
import math

import pytest
import torch
from problems import Given, check_slope, close, normal, weighted_sum
from torch import nn

from setpred.aggregators import FSPool, SetEncoder
from setpred.decoders import (
    DETR,
    IDSPN,
    MESH,
    BiLSTMDecoder,
    DeepSets,
    ElementBiLSTM,
    ElementTransformer,
    EqMotion,
    FlowMatching,
    GaussianStart,
    LearnedStart,
    MLPDecoder,
    RandomPositions,
    RandomStart,
    Readout,
    Seq2Set,
    SequencePositions,
    SinkhornAttention,
    SlotAttention,
    SlotMixture,
    SlotSoftmax,
    SpatialBroadcast,
    TransformerDecoder,
)
from setpred.decoders.seq2set import AdditiveAttention
from setpred.decoders.sinkhorn_mesh import entropy
from setpred.decoders.slot_mixture import log_responsibilities
from setpred.encoders import (
    PositionedTokens,
    ResNetTrunk,
    SinePosition,
    SlotTrunk,
    SmallCNN,
    SmallTrunk,
    Tokens,
    position_grid,
)
from setpred.errors import InputError
from setpred.inner import GradientDescent, Implicit, LatentMatching, Unrolled
from setpred.matching import sinkhorn
from setpred.model import SetPredictor
from setpred.nn import Attention

BATCH, TOKENS, DIM, SIZE, OUT = 3, 5, 6, 4, 5
SETS = {"set_size": SIZE, "set_dim": OUT}
SLOTS = {"token_dim": DIM, "slot_dim": 8, "hidden_dim": 7, **SETS}
ORDER = torch.tensor([2, 0, 3, 1])


def sharp(differentiation, **numbers):
    """Slot Attention with MESH; without noise, which separates equal slots."""
    mesh = MESH(differentiation, **{"noise": 0.0, "step_size": 1.0, **numbers})
    return SlotAttention(SinkhornAttention(mesh, dim=8, hidden_dim=5, iterations=3), iterations=2, **SLOTS)


class Nowhere(nn.Module):
    """Positions of zero, for tokens of any number."""

    def forward(self, tokens):
        return torch.zeros_like(tokens[0])


def detr(position, **numbers):
    layers = {"encoder_layers": 1, "decoder_layers": 2, **numbers}
    return DETR(position, token_dim=DIM, dim=8, heads=2, hidden_dim=7, **layers, **SETS)


def flow(**features):
    return FlowMatching(dim=8, heads=2, layers=2, hidden_dim=7, iterations=3, **features, **SETS)


def broadcast(slots, **options):
    return SpatialBroadcast(slots, side=2, widths=[3], **options)


def transformer(start):
    return TransformerDecoder(latent_dim=DIM, dim=8, heads=2, layers=2, hidden_dim=7, start=start, **SETS)


def idspn(differentiation):
    objective = LatentMatching(SetEncoder(FSPool(DIM, set_size=SIZE), set_dim=OUT, hidden_dim=7))
    descent = GradientDescent(iterations=4, momentum=0.9, clip=2.0)
    return IDSPN(objective, descent, differentiation, **SETS)


def element_transformer(position):
    return ElementTransformer(position, dim=8, heads=2, hidden_dim=7, token_dim=DIM, set_dim=OUT)


ELEMENT_DECODERS = {  # one element for each token
    "deep sets": lambda: DeepSets(hidden_dim=7, layers=3, token_dim=DIM, set_dim=OUT),
    "element transformer": lambda: element_transformer(None),
    "element transformer, sequence": lambda: element_transformer(SequencePositions()),
    "element transformer, random": lambda: element_transformer(RandomPositions(seed=4)),
    "element bilstm": lambda: ElementBiLSTM(hidden_dim=7, token_dim=DIM, set_dim=OUT),
    "eqmotion": lambda: EqMotion(dim=1, channels=3, hidden_dim=7, token_dim=DIM, set_dim=OUT),
}
SET_EQUIVARIANT = ("deep sets", "element transformer", "eqmotion")
TOKEN_DECODERS = {
    "slot attention": lambda: SlotAttention(**SLOTS),
    "slot attention, two heads": lambda: SlotAttention(heads=2, **SLOTS),
    "implicit slot attention": lambda: SlotAttention(gradient_steps=1, iterations=5, **SLOTS),
    "slot mixture": lambda: SlotMixture(gradient_steps=None, **SLOTS),
    "implicit slot mixture": lambda: SlotMixture(**SLOTS),
    "detr": lambda: detr(Nowhere()),
    "flow matching": lambda: flow(token_dim=DIM),
    "seq2set": lambda: Seq2Set(token_dim=DIM, hidden_dim=7, embedding_dim=4, **SETS),
    "slots by transport, two heads": lambda: SlotAttention(SinkhornAttention(dim=4), heads=2, **SLOTS),
    "slots by cosine transport": lambda: SlotAttention(SinkhornAttention(dim=8, cosine=True), **SLOTS),
    "broadcast slots": lambda: broadcast(SlotAttention(**SLOTS)),
    "broadcast slots, subpixel": lambda: broadcast(SlotAttention(**SLOTS), subpixel=True, smoothing=0),
    "readout of slots": lambda: Readout(SlotAttention(**SLOTS), hidden_dim=3, set_dim=OUT),
    "slots by sharp transport": lambda: sharp(Unrolled()),
    "slots by sharp transport, constant steps": lambda: sharp(None),
}
VECTOR_DECODERS = {
    "mlp": lambda: MLPDecoder(latent_dim=DIM, hidden_dim=7, **SETS),
    "bilstm": lambda: BiLSTMDecoder(latent_dim=DIM, hidden_dim=4, **SETS),
    "transformer": lambda: transformer(None),
    "transformer, random": lambda: transformer(RandomStart(SIZE, 8)),
    "flow matching of a vector": lambda: flow(latent_dim=DIM),
    "idspn": lambda: idspn(Implicit()),
    "idspn, best": lambda: idspn(Implicit(best=True)),
    "dspn": lambda: idspn(Unrolled()),
}
OF_TOKENS = TOKEN_DECODERS | ELEMENT_DECODERS
DECODERS = OF_TOKENS | VECTOR_DECODERS
SLOT_DECODERS = [name for name in TOKEN_DECODERS if "slot" in name]
# decoders with a start, whose elements only the start distinguishes
FLOWS = ["flow matching", "flow matching of a vector"]
STARTED = [*SLOT_DECODERS, *FLOWS, "transformer", "transformer, random", "idspn", "idspn, best", "dspn"]
# weights without effect: DETR's elements are zeros when they first attend to each other
IDLE = {"detr": {"decoder.0.own.value.weight"}}
# attention to one token is 1 whatever the query; some processors round its gradient to zero, others nearly
IDLE["flow matching of a vector"] = {
    f"layers.{layer}.across.{part}" for layer in (0, 1) for part in ("query.weight", "query.bias", "key.weight")
}
# decoders whose gradients are not those of the value, by design
APPROXIMATE = {"implicit slot attention", "implicit slot mixture", "slots by sharp transport, constant steps"}
APPROXIMATE |= {"idspn", "idspn, best"}

every = pytest.mark.parametrize("name", DECODERS)


def build(name, seed=0):
    torch.manual_seed(seed)
    return DECODERS[name]().double().eval()


def features(name, batch=BATCH):
    return normal(*((batch, TOKENS, DIM) if name in OF_TOKENS else (batch, DIM)))


# --- all of them --------------------------------------------------------------------------------------------------


@every
def test_refine_yields_every_prediction_and_forward_the_last(name):
    decoder, given = build(name), features(name)
    iterates = list(decoder.refine(given))
    size = TOKENS if decoder.set_size is None else SIZE
    assert (size == TOKENS) == (name in ELEMENT_DECODERS)
    assert all(iterate.shape == (BATCH, size, decoder.set_dim) for iterate in iterates)
    close(decoder(given), iterates[-1])
    if name == "detr":
        assert len(iterates) == len(decoder.decoder)
    if not decoder.iterative:
        with pytest.raises(InputError, match="does not iterate"):
            decoder(given, iterations=2)
        return
    assert len(iterates) == decoder.iterations + 1
    if name in FLOWS:  # more steps are smaller ones, on the same way
        return
    longer = list(decoder.refine(given, iterations=decoder.iterations + 2))
    close(torch.stack(longer[: len(iterates)]), torch.stack(iterates))
    close(decoder(given, iterations=1), iterates[1])


@every
def test_a_prediction_depends_on_its_example_alone(name):
    """In training each example has its own random start or positions."""
    decoder, given = build(name), features(name)
    expected = decoder(given)
    torch.manual_seed(5)
    close(decoder(given[[2, 0, 1]]), expected[[2, 0, 1]])
    close(decoder(given[1:2]), expected[1:2])
    assert not list(decoder.buffers())  # which earlier checkpoints would lack
    drawing = name in {*STARTED, "element transformer, random"} - {"transformer"}
    alike = decoder.train()(given[:1].expand(2, *given.shape[1:]))
    assert torch.allclose(*alike) != drawing


@pytest.mark.parametrize("name", sorted(DECODERS.keys() - APPROXIMATE))
def test_gradients_are_those_of_finite_differences(name):
    decoder, given = build(name), features(name).requires_grad_()
    for tensors in ([given], list(decoder.parameters())):
        check_slope(lambda: weighted_sum(decoder(given)), tensors, least=1e-4)


@every
def test_every_parameter_learns(name):
    decoder = build(name).train()
    # as many refinements as gradient steps: the start gets no gradient even then
    weighted_sum(decoder(features(name), iterations=getattr(decoder, "gradient_steps", None))).backward()
    for part, parameter in decoder.named_parameters():
        if part.startswith("start") and getattr(decoder, "gradient_steps", None) is not None:
            assert parameter.grad is None  # a fixed point does not depend on its start
        else:
            least = 1e-12 if name == "flow matching of a vector" else 0.0
            assert (parameter.grad.abs().max() > least) == (part not in IDLE.get(name, ())), part


@every
def test_runs_in_full_precision_under_autocast(name):
    decoder, given = build(name).float(), features(name).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = decoder(given)
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        torch.testing.assert_close(mixed, decoder(given.float()), rtol=0, atol=0)


@every
def test_features_of_another_shape_raise(name):
    decoder, given = build(name), features(name)
    with pytest.raises(ValueError, match="expected features"):
        decoder(given.unsqueeze(1))
    if "dspn" not in name:  # whose vector may have any length that its objective takes
        with pytest.raises(ValueError, match="expected features"):
            decoder(given[..., 1:])


# --- over tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_TOKENS)
def test_padding_has_no_influence(name):
    """Wherever it is and whatever it holds; positions of an order know of a gap."""
    decoder, given = build(name), features(name)
    mask = torch.tensor([[True] * TOKENS, [False, True, False, True, False], [True, True, True, False, True]])
    if name.startswith("element transformer, "):
        mask = mask.sort(dim=1, descending=True).values
    noise = given.clone().masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    masked = decoder(noise, mask=mask)
    for row, present in enumerate(mask):
        mine = masked[row, present] if name in ELEMENT_DECODERS else masked[row]
        close(mine, decoder(given[row : row + 1, present])[0])
    weighted_sum(masked[mask] if name in ELEMENT_DECODERS else masked).backward()
    assert torch.isfinite(noise.grad).all()
    assert (noise.grad[~mask] == 0).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in decoder.parameters())
    with pytest.raises(ValueError, match="mask"):
        decoder(given, mask=mask[:, 1:])


@pytest.mark.parametrize("name", [*TOKEN_DECODERS, *SET_EQUIVARIANT])
def test_the_order_of_tokens_changes_nothing_but_the_order_of_their_elements(name):
    decoder, given, order = build(name), features(name), torch.tensor([3, 0, 4, 1, 2])
    expected = decoder(given)
    close(decoder(given[:, order]), expected[:, order] if name in ELEMENT_DECODERS else expected)


@pytest.mark.parametrize("name", ELEMENT_DECODERS)
def test_equal_tokens_give_equal_elements_unless_there_is_an_order_or_noise(name):
    for seed in range(3):
        elements = build(name, seed)(features(name)[:, :1].expand(-1, TOKENS, -1)).detach()
        apart = torch.stack([torch.pdist(one) for one in elements])
        assert apart.max() < 1e-12 if name in SET_EQUIVARIANT else apart.min() > 1e-4


@pytest.mark.parametrize("dim", [2, 3])
def test_eqmotion_turns_mirrors_and_moves_with_its_points(dim):
    decoder = EqMotion(dim=dim, channels=3, hidden_dim=7, token_dim=4 * dim, set_dim=2 * dim).double()
    past, mask = normal(BATCH, TOKENS, 4, dim), torch.arange(TOKENS) < torch.tensor([[5], [3], [1]])
    matrix, shift = torch.linalg.qr(normal(dim, dim, seed=2)).Q, 5 * normal(dim, seed=3)
    for turn in (matrix, matrix @ torch.diag(torch.tensor([-1.0] + [1.0] * (dim - 1)).double())):  # and a reflection
        future, moved = (
            decoder(points.flatten(2), mask=mask).unflatten(2, (2, dim)) for points in (past, past @ turn + shift)
        )
        close(moved[mask], (future @ turn + shift)[mask])
    assert (future[:, :, 0] - past[:, :, -1])[mask].abs().max() > 1e-2  # no copy


def test_positions_are_waves_of_the_place_or_of_row_and_column():
    def waves(*places, dim, scale=1.0):
        angles = [[scale * place / 10_000 ** (2 * j / dim) for j in range(dim // 2)] for place in places]
        return normal(0).new_tensor([wave(a) for each in angles for wave in (math.sin, math.cos) for a in each])

    added = SequencePositions()(torch.zeros(1, 5, 6, dtype=torch.float64))[0]
    for p in range(5):  # sine and cosine in turn
        close(added[p], waves(p, dim=6).view(2, 3).mT.flatten())
    positions = SinePosition()(torch.zeros(1, 9, 8, dtype=torch.float64))
    for row, column in itertools.product(range(3), range(3)):
        expected = waves(row + 1, column + 1, dim=4, scale=math.tau / 3)
        close(positions[3 * row + column], expected)
    for module, rows in ((SequencePositions(), 3), (SinePosition(), 8)):
        with pytest.raises(ValueError, match=r"even length|square map"):
            module(torch.zeros(1, 5, rows))


def test_random_positions_are_normal_with_a_learned_shift_and_scale():
    position, rows = RandomPositions(), torch.randn(200, 10, 4)
    with torch.no_grad():
        position.shift.fill_(3.0)
        position.log_scale.fill_(math.log(0.5))
    drawn = position(rows)
    assert torch.equal(drawn[..., :4], rows)
    assert drawn[..., 4:].mean().item() == pytest.approx(3, abs=0.03)
    assert drawn[..., 4:].std().item() == pytest.approx(0.5, abs=0.03)


def test_deep_sets_against_a_loop():
    decoder, given = build("deep sets"), normal(2, 3, DIM)
    for b in range(2):
        rows = list(given[b])
        for depth, layer in enumerate(decoder.layers):
            if depth:
                rows = [row.clamp(min=0) for row in rows]
            mean = sum(rows) / len(rows)
            rows = [layer.each(row) + layer.all.weight @ mean for row in rows]
        close(decoder(given)[b], torch.stack(rows))


def test_the_element_transformer_is_that_of_torch():
    decoder, given = build("element transformer"), features("element transformer")
    theirs = nn.Transformer(8, 2, 2, 2, 7, dropout=0.0, batch_first=True).double().eval()
    layers = [*theirs.encoder.layers, *theirs.decoder.layers]
    for ours, other in zip([*decoder.encoder, *decoder.decoder], layers, strict=True):
        if hasattr(ours, "attention"):
            attentions = [(ours.attention, other.self_attn)]
        else:
            attentions = [(ours.own, other.self_attn), (ours.across, other.multihead_attn)]
        for attention, its in attentions:
            copy_attention(attention, its)
        parts = {"linear1": ours.network[0], "linear2": ours.network[2]}
        for name, part in (parts | {f"norm{i}": norm for i, norm in enumerate(ours.norms, 1)}).items():
            getattr(other, name).load_state_dict(part.state_dict())
    expected = decoder.head(theirs(decoder.source(given), decoder.first(given)))
    close(decoder(given), expected, rtol=1e-7, atol=1e-7)


# --- starts and queries: set equivariance ---------------------------------------------------------------------------


def restarted(decoder, change, given):
    """The decoder with a changed start, or with changed queries."""
    if isinstance(decoder, DETR):
        with torch.no_grad():
            decoder.queries.copy_(change(decoder.queries.unsqueeze(0))[0])
    else:
        of = getattr(decoder, "slots", decoder)  # whose start it is
        of.start = Given(change(of.start(given)))
    return decoder


@pytest.mark.parametrize("name", [*STARTED, "detr"])
def test_elements_permute_with_their_start(name):
    decoder, given = build(name), features(name)
    elements = decoder(given)
    close(restarted(decoder, lambda start: start[:, ORDER], given)(given), elements[:, ORDER])


# not MESH: a tie is a maximum of the entropy, from which its descent flees in any direction, be it that of rounding;
# and not iDSPN, whose aggregators are in test_laws.py
@pytest.mark.parametrize("name", [name for name in [*STARTED, "detr"] if "sharp" not in name and "dspn" not in name])
def test_elements_that_start_equal_stay_equal(name):
    """Set equivariance: whatever the weights, two equal objects are one."""
    for seed in range(3):
        decoder, given = build(name, seed), features(name)
        elements = restarted(decoder, lambda start: start[:, :1].expand_as(start).clone(), given)(given)
        close(elements, elements[:, :1].expand_as(elements))


@pytest.mark.parametrize("kind", [RandomStart, GaussianStart])
def test_a_random_start_depends_on_the_seed_alone_in_evaluation_and_is_fresh_in_training(kind):
    latent, start = torch.randn(4, 16), kind(SIZE, 19, seed=3)
    assert not torch.allclose(start(latent), start(latent))
    fixed = start.eval()(latent)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(start(torch.randn(4, 16)), fixed)
    start.seed = 4
    assert not torch.allclose(start(latent), fixed)


@pytest.mark.parametrize("training", [True, False])
def test_random_starts_are_normal(training):
    shape, given = (100, 50), torch.zeros(40, 1)
    torch.manual_seed(0)
    noise = RandomStart(*shape, scale=0.1, seed=5).train(training)(given)
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    assert noise.mean().item() == pytest.approx(0, abs=0.005)
    start = GaussianStart(*shape, seed=5).train(training)
    torch.manual_seed(0)
    torch.testing.assert_close(start(given), start.mean + start.log_deviation.exp() * 10 * noise)


@pytest.mark.parametrize("name", ["slot attention", "dspn"])
def test_a_start_can_be_learned(name):
    decoder, given = build(name), features(name)
    decoder.start = LearnedStart(*decoder.start(given).shape[1:], scale=1.0).double()
    weighted_sum(decoder(given)).backward()
    assert decoder.start.initial.grad.abs().max() > 0


# --- flow matching ------------------------------------------------------------------------------------------------


def test_a_flow_with_a_known_posterior_samples_the_known_distribution():
    """Sets of all +1, of chance q, or all -1: E[Y | Y_t] = tanh(t Σ y_t / (1 - t)² + ½ log(q / (1 - q)))."""
    count, q = 4000, 0.3
    decoder = flow(latent_dim=DIM).double()
    decoder.start = Given(normal(count, SIZE, OUT))

    def posterior(elements, time, tokens, mask):
        sums = elements.sum((1, 2), keepdim=True)
        return (time * sums / (1 - time) ** 2 + 0.5 * math.log(q / (1 - q))).tanh().expand_as(elements)

    decoder.denoise = posterior
    samples = decoder(normal(count, DIM), iterations=50)
    assert (samples.abs() - 1).abs().mean() < 0.02
    assert (samples.mean((1, 2)) > 0).double().mean().item() == pytest.approx(q, abs=0.03)


def test_the_steps_of_a_flow_are_those_of_ddim():
    """Y_s = s Ŷ + (1 - s) ε̂, with the noise ε̂ that the clean prediction leaves."""
    decoder, given = build("flow matching"), features("flow matching")
    tokens, steps = decoder.narrow(given), decoder.iterations
    iterates = list(decoder.refine(given))
    for number, (before, after) in enumerate(itertools.pairwise(iterates)):
        t, s = number / steps, (number + 1) / steps
        clean = decoder.denoise(before, torch.full((BATCH, 1, 1), t, dtype=before.dtype), tokens, None)
        close(after, s * clean + (1 - s) * (before - t * clean) / (1 - t))
    close(iterates[-1], clean)


def test_training_denoises_a_target_matched_to_the_noise():
    decoder, given, target = build("flow matching").train(), features("flow matching"), normal(BATCH, SIZE, OUT, seed=9)
    noise, seen = normal(BATCH, SIZE, OUT, seed=8), []
    decoder.start = Given(noise)
    decoder.denoise = lambda elements, time, *_: (seen.append((elements, time)), elements)[1]
    prediction = decoder(given, target=target)
    (elements, time), *others = seen
    assert not others
    assert torch.equal(prediction, elements)
    assert len(time.unique()) == BATCH
    assert ((time >= 0) & (time < 1)).all()
    drawn = (elements - time * target) / (1 - time)
    for row, candidates in enumerate(noise):
        orders = map(list, itertools.permutations(range(SIZE)))
        best = min(orders, key=lambda order: (candidates[order] - target[row]).square().sum())
        close(drawn[row], candidates[best])
    with pytest.raises(ValueError, match="expected target"):
        decoder(given, target=target[:, 1:])


# --- DETR, transformers, Seq2Set --------------------------------------------------------------------------------------


def test_detr_reads_tokens_with_their_positions_and_in_no_other_order():
    torch.manual_seed(0)
    decoder = detr(SinePosition()).double().eval()
    given, order = normal(BATCH, 9, DIM), torch.randperm(9)
    tokens, elements = decoder.narrow(given), decoder(given)
    *_, permuted = decoder.decode(tokens[:, order], decoder.position(tokens)[order])
    close(permuted, elements)
    assert (decoder(given[:, order]) - elements).abs().max() > 1e-3  # positions matter


def test_seq2set_predicts_each_element_from_those_before():
    decoder, given = build("seq2set"), features("seq2set")
    elements = decoder(given)
    assert torch.pdist(elements[0].detach()).min() > 0
    head, calls = decoder.head, itertools.count(1)
    decoder.head = type("Changed", (nn.Module,), {"forward": lambda self, rows: head(rows) + (next(calls) == 2)})()
    others = decoder(given)
    close(others[:, 0], elements[:, 0])
    assert ((others - elements)[:, 1:].abs().amax((1, 2)) > 1e-6).all()
    assert ((others - elements)[:, 2:].abs().amax(2) > 1e-9).all()


def test_additive_attention_against_a_loop():
    torch.manual_seed(0)
    attention = AdditiveAttention(3, 2, hidden_dim=4).double()
    tokens, state = normal(2, 5, 3), normal(2, 2)
    attended = attention(tokens, attention.of_token(tokens), state, None)
    for b in range(2):
        scores = [attention.score((attention.of_token(x) + attention.of_state(state[b])).tanh()) for x in tokens[b]]
        weights = torch.cat(scores).softmax(0)
        close(attended[b], sum(weight * x for weight, x in zip(weights, tokens[b], strict=True)))


@torch.no_grad()
def copy_attention(ours, theirs):
    """Give an attention of torch our weights; its bias of the keys has no effect."""
    theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in (ours.query, ours.key, ours.value)]))
    theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, torch.randn(8), ours.value.bias]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def test_dropout_is_of_training_alone():
    torch.manual_seed(0)
    decoder, given = detr(Nowhere(), dropout=0.5).double(), features("detr")
    assert not torch.allclose(decoder(given), decoder(given))
    close(decoder.eval()(given), decoder(given))


# --- attention of slots, transport between tokens and slots ---------------------------------------------------------


def test_slot_softmax_against_a_loop():
    queries, keys = normal(2, 1, 3, 4), normal(2, 1, 5, 4, seed=2)
    weights = SlotSoftmax()(queries, keys, None, None)
    for b in range(2):
        shares = torch.zeros(3, 5, dtype=torch.float64)
        for s in range(5):
            scores = [math.exp(queries[b, 0, i] @ keys[b, 0, s] / 2) for i in range(3)]
            shares[:, s] = torch.tensor(scores, dtype=torch.float64) / sum(scores)
        close(weights[b, 0], shares / shares.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)


def transport_problem(**options):
    """Queries, keys, and an attention whose marginals are not uniform."""
    torch.manual_seed(3)
    queries, keys = (torch.randn(2, 2, n, 3, dtype=torch.float64) for n in (SIZE, 7))
    return queries, keys, SinkhornAttention(dim=3, iterations=200, **options).double()


def test_weights_are_a_plan_between_the_learned_marginals():
    queries, keys, attention = transport_problem()
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    weights = attention(queries, keys, mask, None)
    of_slots = SIZE * attention.slot_mass(queries).squeeze(-1).softmax(-1)
    of_tokens = attention.token_mass(keys).squeeze(-1).masked_fill(~mask[:, None], -torch.inf).softmax(-1) * SIZE
    close(weights.sum(-1), of_slots)
    close(weights.sum(-2), of_tokens)
    assert min(of_slots.std(), of_tokens.std()) > 1e-3
    attention.iterations = 1
    close(attention(queries, keys, None, None).sum(-1), of_slots)  # exact after any number of iterations


@pytest.mark.parametrize("cosine", [False, True])
def test_the_plan_is_the_cheapest_at_its_temperature(cosine):
    """P = diag(u) exp(-cost / τ) diag(v): the logarithm's interaction is that of the costs."""
    queries, keys, attention = transport_problem(temperature=0.7, cosine=cosine)
    logs = attention(queries, keys, None, None).log()
    pair = queries.unsqueeze(-2), keys.unsqueeze(-3)
    costs = 1 - torch.cosine_similarity(*pair, dim=-1) if cosine else (pair[0] - pair[1]).norm(dim=-1)

    def interaction(matrix):
        return matrix - matrix.mean(-1, keepdim=True) - matrix.mean(-2, keepdim=True) + matrix.mean((-1, -2), True)

    close(interaction(logs), interaction(-costs / 0.7), rtol=1e-6, atol=1e-6)


def test_a_key_near_zero_has_no_huge_gradient_from_its_direction():
    queries, keys, attention = transport_problem(cosine=True)
    keys[0, 0, 0] *= 1e-9
    keys.requires_grad_()
    attention(queries, keys, None, None).square().sum().backward()
    assert keys.grad[0, 0, 0].norm() < 100


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


def test_noise_separates_equal_slots():
    """With noise MESH is exclusively multiset-equivariant: it separates what a softmax must keep equal."""
    given = features("slot attention")
    torch.manual_seed(0)
    decoder = sharp(None, noise=1e-3, step_size=8.0).double().eval()
    decoder.start = Given(normal(1, 1, 8).expand(BATCH, SIZE, -1))
    elements = decoder(given)
    assert min(torch.pdist(one).min() for one in elements.detach()) > 1e-2  # ten times the noise and more


def test_noise_is_drawn_once_for_all_refinements_and_anew_for_each_batch_in_training():
    """As in the released code; the same in every refinement, so that ties break the same way."""
    given, drawn = features("slot attention"), []
    torch.manual_seed(0)
    decoder = sharp(None, noise=1e-3).double()
    decoder.attention.mesh.forward = lambda cost, transport, noise: (drawn.append(noise), (cost, None))[1]
    for training in (True, True, False, False):
        decoder.train(training)(given)
    first, second, fixed, again = drawn[::2]
    assert first.shape == fixed.shape == (BATCH, 1, TOKENS, SIZE)
    pairs = [*zip(drawn[::2], drawn[1::2], strict=True), (first, second), first[:2], (fixed, again), fixed[:2]]
    assert [torch.equal(*pair) for pair in pairs] == [True] * 4 + [False, False, True, True]
    # padding changes no other token's noise
    mesh, keys = MESH(noise=1.0, seed=3).eval(), torch.zeros(2, 2, 7, 4)
    assert torch.equal(mesh.draw(keys, 3)[:, :, :5], mesh.draw(keys[:, :, :5], 3))


# --- mixtures -------------------------------------------------------------------------------------------------------


def test_responsibilities_are_the_posterior_of_the_mixture():
    points, mean, log_deviation = normal(2, 7, 3), normal(2, SIZE, 3, seed=2), 0.5 * normal(2, SIZE, 3, seed=3)
    log_prior = normal(2, SIZE, seed=4).log_softmax(-1)
    components = torch.distributions.Normal(mean.unsqueeze(2), log_deviation.exp().unsqueeze(2))
    joint = log_prior.unsqueeze(-1) + components.log_prob(points.unsqueeze(1)).sum(-1)
    close(log_responsibilities(points, mean, log_deviation, log_prior), joint.log_softmax(1))
    tempered = joint - (1 - 0.3) * (joint - log_prior.unsqueeze(-1))
    close(log_responsibilities(points, mean, log_deviation, log_prior, scale=0.3), tempered.log_softmax(1))


def test_with_nothing_learned_the_refinement_is_expectation_maximisation():
    torch.manual_seed(4)
    decoder = SlotMixture(token_dim=DIM, slot_dim=DIM, gradient_steps=None, **SETS).double()
    for linear in (decoder.query, decoder.key, decoder.value):
        linear.weight.data = torch.eye(DIM, dtype=torch.float64)
    decoder.norm_slots = decoder.residual[0] = decoder.head = nn.Identity()
    for parameter in decoder.residual[1].parameters():
        nn.init.zeros_(parameter)
    decoder.recurrent = type("New", (nn.Module,), {"forward": lambda self, new, old: new})()
    tokens, slots = normal(2, 30, DIM), normal(2, SIZE, 2 * DIM, seed=2)
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


# --- gradients at a fixed point ------------------------------------------------------------------------------------


def test_the_one_step_gradient_is_that_of_a_step_from_the_last_but_one_state():
    """Exact for any state: s_T = f(s_{T-1}) with s_{T-1} held fixed."""
    decoder, given = build("implicit slot attention"), features("slot attention")
    decoder.head = nn.Identity()
    *_, before, last = decoder.refine(given)
    learned = [parameter for name, parameter in decoder.named_parameters() if not name.startswith("start")]
    gradients = torch.autograd.grad(weighted_sum(last), learned)
    decoder.start, decoder.gradient_steps = Given(before.detach()), None
    again = decoder(given, iterations=1)
    close(again, last)
    for mine, expected in zip(torch.autograd.grad(weighted_sum(again), learned), gradients, strict=True):
        close(mine, expected)


# --- encoders of tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", [SmallTrunk(image_size=16, width=4), SlotTrunk(image_size=32, width=6)])
def test_tokens_are_the_positions_of_the_map(trunk):
    image = torch.rand(2, 3, trunk.image_size, trunk.image_size)
    bare, positioned = Tokens(trunk).eval(), PositionedTokens(trunk, token_dim=5).eval()
    tokens = bare(image)
    assert tokens.shape == (2, 64, bare.token_dim)
    assert bare.image_size == positioned.image_size == trunk.image_size
    torch.testing.assert_close(tokens[:, 11], trunk(image)[:, :, 1, 3])
    assert positioned(image).shape == (2, 64, positioned.token_dim) == (2, 64, 5)
    trunk.forward = lambda image: torch.zeros(len(image), trunk.channels, 8, 8)  # tokens differ by their position
    assert not torch.equal(*positioned(image)[0, [0, 30]])
    top, bottom = [[0, 0, 1, 1], [0, 0.5, 1, 0.5], [0, 1, 1, 0]], [[1, 0, 0, 1], [1, 0.5, 0, 0.5], [1, 1, 0, 0]]
    assert position_grid(2, 3).tolist() == top + bottom


# --- parts that do not fit, numbers out of range -----------------------------------

SMALL = SmallTrunk(image_size=16, width=4)
MISFITS = [
    (SmallCNN(image_size=16, latent_dim=16, width=4), "slot attention", "gives a vector of 16 .* takes tokens of 6"),
    (Tokens(SMALL), "idspn", "gives tokens of 4 numbers, .* takes a vector"),
    (PositionedTokens(SMALL, token_dim=5), "slot attention", "tokens of 5 .* takes tokens of 6 .* the same token_dim"),
    (SmallCNN(image_size=16, latent_dim=16, width=4), "mlp", "a vector of 16 .* takes a vector of 6 .*; give both"),
]


@pytest.mark.parametrize(("encoder", "decoder", "message"), MISFITS)
def test_features_that_do_not_fit_raise_at_once(encoder, decoder, message):
    with pytest.raises(InputError, match=message):
        SetPredictor(encoder, build(decoder))


@pytest.mark.parametrize(
    "build",
    [
        lambda: detr(None, decoder_layers=0),
        lambda: flow(),
        lambda: flow(token_dim=DIM, latent_dim=DIM),
        lambda: Attention(8, heads=3),
        lambda: Attention(8, heads=0),
        lambda: SlotAttention(**SLOTS, heads=3),
        lambda: SlotAttention(**SLOTS, iterations=-1),
        lambda: SlotAttention(**SLOTS, gradient_steps=0),
        lambda: SlotMixture(**SLOTS, gradient_steps=0),
        lambda: Unrolled(last=0),
        lambda: ResNetTrunk(image_size=100),
        lambda: DeepSets(layers=0, token_dim=DIM, set_dim=OUT),
        lambda: EqMotion(dim=2, token_dim=DIM, set_dim=OUT),
        lambda: ElementTransformer(decoder_layers=-1, token_dim=DIM, set_dim=OUT),
        lambda: ElementTransformer(RandomPositions(), dim=9, heads=3, token_dim=DIM, set_dim=OUT),
    ],
)
def test_numbers_out_of_range_raise(build):
    with pytest.raises(ValueError, match="expected"):
        build()
