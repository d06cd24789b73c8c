"""Class-specific numbering: the world, loss and metric by hand and by brute force, and who can do it at all."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from setpred.aggregators import FSPool, SetEncoder, SumPool
from setpred.data.toy import Numbering
from setpred.decoders import (
    IDSPN,
    DeepSets,
    ElementBiLSTM,
    ElementTransformer,
    LearnedStart,
    RandomPositions,
    SequencePositions,
)
from setpred.errors import InputError, NotFiniteError
from setpred.inner import Conditioned, GradientDescent, Implicit, LatentMatching, Simplex, Unrolled
from setpred.losses import NumberingLoss
from setpred.metrics import NumberingAccuracy, right_numbers

SIZE, CLASSES = 6, 3


def world(train_sets=8, val_sets=4, set_size=SIZE, classes=CLASSES):
    return Numbering(train_sets=train_sets, val_sets=val_sets, batch_size=4, set_size=set_size, classes=classes)


def examples(count):
    """Inputs and targets in float64."""
    arrays = world().examples("val", count, np.random.default_rng(0))
    return torch.from_numpy(arrays["input"]).double(), torch.from_numpy(arrays["elements"]).double()


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-9, "atol": 1e-9, **tolerance})


def numbering_orders(kinds):
    """All permutations of the elements within their classes."""
    places = [[i for i, kind in enumerate(kinds) if kind == k] for k in sorted(set(kinds))]
    for choice in itertools.product(*map(itertools.permutations, places)):
        order = list(range(len(kinds)))
        for mine, others in zip(places, choice, strict=True):
            for here, there in zip(mine, others, strict=True):
                order[here] = there
        yield order


# --- the world ----------------------------------------------------------------------------------------------------


def test_numbers_count_those_of_the_class_before():
    arrays = world().examples("train", 50, np.random.default_rng(3))
    assert arrays["input"].shape == (50, SIZE, CLASSES)
    assert arrays["elements"].shape == (50, SIZE, CLASSES + SIZE)
    assert all(array.dtype == np.float32 for array in arrays.values())
    for rows, targets in zip(arrays["input"], arrays["elements"], strict=True):
        seen = [0] * CLASSES
        for row, target in zip(rows.tolist(), targets.tolist(), strict=True):
            kind = row.index(1)
            expected = [0.0] * (CLASSES + SIZE)
            expected[kind] = expected[CLASSES + seen[kind]] = 1.0
            assert target == expected
            seen[kind] += 1


def test_classes_are_uniform_and_splits_apart():
    arrays = world().examples("train", 4000, np.random.default_rng(0))
    np.testing.assert_allclose(arrays["input"].mean((0, 1)), 1 / CLASSES, atol=0.02)
    data, again = world(train_sets=40, val_sets=40), world(train_sets=40, val_sets=40)
    data.setup()
    again.setup()
    assert not torch.equal(data.train_data.tensors["input"], data.val_data.tensors["input"])
    assert torch.equal(data.val_data.tensors["elements"], again.val_data.tensors["elements"])


def test_a_world_has_elements_and_classes():
    for numbers in ({"set_size": 0}, {"classes": 0}):
        with pytest.raises(InputError, match="at least one element"):
            world(**numbers)


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["distance", "cross entropy"])
def loss(request):
    return NumberingLoss(classes=CLASSES, cross_entropy=request.param)


def test_any_order_within_the_classes_is_right_and_no_other(loss):
    _, target = examples(3)
    sure = 100.0 if loss.cross_entropy else 1.0
    for example in target:
        right = [example[order, CLASSES:] for order in numbering_orders(example[:, :CLASSES].argmax(-1).tolist())]
        answers = itertools.islice(itertools.product(range(SIZE), repeat=SIZE), 0, None, 997)
        others = [torch.eye(SIZE, dtype=torch.float64)[list(answer)] for answer in answers]
        values = loss(sure * torch.stack(right + others), example.expand(len(right + others), -1, -1))
        close(values[: len(right)], torch.zeros(len(right), dtype=torch.float64))
        expected = [any(torch.equal(answer, one) for one in right) for answer in others]
        assert (values[len(right) :] < 1e-6).tolist() == expected


def test_the_loss_is_the_least_over_all_orders(loss):
    _, target = examples(4)
    predicted = normal(4, SIZE, SIZE)
    found = loss(predicted, target)
    for b in range(4):
        kinds, numbers = target[b, :, :CLASSES].argmax(-1).tolist(), target[b, :, CLASSES:].argmax(-1).tolist()

        def distance(row, number):
            if loss.cross_entropy:
                return float(row.exp().sum().log() - row[number])
            return math.sqrt(sum((float(y) - (k == number)) ** 2 for k, y in enumerate(row)))

        costs = [[distance(row, number) for number in numbers] for row in predicted[b]]
        values = [sum(costs[i][j] for i, j in enumerate(order)) / SIZE for order in numbering_orders(kinds)]
        assert found[b].item() == pytest.approx(min(values))


def test_gradients_of_the_loss(loss):
    _, target = examples(2)
    assert gradcheck(lambda p: loss(p, target), normal(2, SIZE, SIZE).requires_grad_())
    leaf = target[..., CLASSES:].clone().requires_grad_()  # of a right answer it is finite
    loss(leaf, target).sum().backward()
    assert torch.isfinite(leaf.grad).all() if loss.cross_entropy else (leaf.grad == 0).all()


def test_the_order_of_elements_with_their_answers_does_not_matter(loss):
    _, target = examples(4)
    predicted, order = normal(4, SIZE, SIZE), [3, 0, 5, 1, 4, 2]
    expected = loss(predicted, target)
    close(loss(predicted[:, order], target[:, order]), expected)
    close(loss(predicted[1:2], target[1:2]), expected[1:2])


def test_predictions_far_away_are_still_matched_within_classes(loss):
    """However much a swap between classes would save."""
    loss.classes = 2
    target = torch.tensor([[[1.0, 0, 1, 0, 0], [0.0, 1, 1, 0, 0], [0.0, 1, 0, 1, 0]]])
    predicted = torch.tensor([[[0.0, 1e6, 0], [1e6, 0.0, 0], [1e6, 0.0, 0]]])
    # the first wants number 0 and has 1; of the others both have 0 and one should have 1
    wrong, right = (1e6, 0.0) if loss.cross_entropy else (math.hypot(1e6, 1), 1e6 - 1)
    torch.testing.assert_close(loss(predicted, target), torch.tensor([(2 * wrong + right) / 3]))


def test_padding_of_targets_has_no_influence(loss):
    _, target = examples(3)
    predicted, keep = normal(3, SIZE, SIZE), torch.tensor([True, False, True, True, False, False])
    plain = predicted[:, keep].clone().requires_grad_()
    expected = loss(plain, target[:, keep])
    expected.sum().backward()
    padded = predicted.masked_fill(~keep[:, None], torch.nan).requires_grad_()
    found = loss(padded, target * keep[:, None])
    close(found, expected)
    found.sum().backward()
    close(padded.grad[:, keep], plain.grad)
    assert (padded.grad[:, ~keep] == 0).all()
    assert loss(predicted, 0 * target).tolist() == [0.0] * 3


def test_a_non_finite_prediction_is_named(loss):
    _, target = examples(3)
    predicted = normal(3, SIZE, SIZE)
    predicted[1, 2, 0] = torch.nan
    with pytest.raises(NotFiniteError) as raised:
        loss(predicted, target)
    assert raised.value.samples == [1]


def test_shapes_are_checked():
    _, target = examples(3)
    for check in (NumberingLoss(classes=CLASSES), NumberingAccuracy(classes=CLASSES).update):
        with pytest.raises(ValueError, match="3 \\+ numbers"):
            check(normal(3, SIZE, SIZE + 1), target)
        with pytest.raises(ValueError, match="expected predictions"):
            check(normal(3, SIZE - 1, SIZE), target)


# --- the metric ---------------------------------------------------------------------------------------------------


def test_right_is_the_most_that_any_matching_within_classes_makes_right():
    _, target = examples(30)
    # of few numbers, so that some are right
    answers = torch.randint(3, (30, SIZE), generator=torch.Generator().manual_seed(0))
    predicted = torch.eye(SIZE, dtype=torch.float64)[answers] + 0.1 * normal(30, SIZE, SIZE)
    right, total = right_numbers(predicted, target, classes=CLASSES)
    assert total.tolist() == [SIZE] * 30
    for given, example, found in zip(answers.tolist(), target, right.tolist(), strict=True):
        kinds, wanted = example[:, :CLASSES].argmax(-1).tolist(), example[:, CLASSES:].argmax(-1).tolist()
        assert found == max(sum(given[i] == wanted[j] for i, j in enumerate(o)) for o in numbering_orders(kinds))


def test_accuracy_gathers_batches():
    _, target = examples(7)
    predicted = target[..., CLASSES:].clone()
    predicted[:3, 0] = predicted[:3, 0].roll(1, -1)  # a number too large
    metric = NumberingAccuracy(classes=CLASSES)
    for start, end in ((0, 2), (2, 7)):
        metric.update(predicted[start:end], target[start:end])
    right, total = right_numbers(predicted, target, classes=CLASSES)
    expected = {"all_right": pytest.approx(4 / 7), "right": pytest.approx((right / total).mean().item())}
    assert metric.compute() == expected
    assert (metric.monitor, metric.mode) == ("all_right", "max")
    metric.reset()
    order = next(itertools.islice(numbering_orders(target[0, :, :CLASSES].argmax(-1).tolist()), 1, None))
    metric.update(target[:1, order, CLASSES:], target[:1])
    assert metric.compute() == {"all_right": 1.0, "right": 1.0}


def test_accuracy_does_not_see_padding_and_a_swap_between_classes_is_wrong():
    _, target = examples(5)
    predicted = normal(5, SIZE, SIZE)
    expected = right_numbers(predicted[:, :4], target[:, :4], classes=CLASSES)
    target[:, 4:] = 0.0
    found = right_numbers(predicted.index_fill(1, torch.tensor([4, 5]), torch.nan), target, classes=CLASSES)
    assert all(map(torch.equal, found, expected))
    target = torch.tensor([[[1.0, 0, 1, 0], [1.0, 0, 0, 1], [0.0, 1, 1, 0]]])
    swapped = target[:, [0, 2, 1], 2:]
    assert right_numbers(swapped, target, classes=2)[0].tolist() == [1]
    assert NumberingLoss(classes=2)(swapped, target) > 0


# --- the decoders ---------------------------------------------------------------------------------------------------

DIM, OUT = 5, 4
SIZES = {"token_dim": DIM, "set_dim": OUT}


def transformer(position):
    return ElementTransformer(position, dim=8, heads=2, hidden_dim=7, **SIZES)


DECODERS = {
    "deep sets": lambda: DeepSets(hidden_dim=7, layers=3, **SIZES),
    "transformer": lambda: transformer(None),
    "transformer, sequence": lambda: transformer(SequencePositions()),
    "transformer, random": lambda: transformer(RandomPositions(seed=4)),
    "bilstm": lambda: ElementBiLSTM(hidden_dim=7, **SIZES),
}
EQUIVARIANT = ["deep sets", "transformer"]
every = pytest.mark.parametrize("name", DECODERS)
every_equivariant = pytest.mark.parametrize("name", EQUIVARIANT)


def build(name, seed=0):
    torch.manual_seed(seed)
    return DECODERS[name]().double().eval()


@every
def test_there_is_an_element_for_each_token(name):
    decoder, given = build(name), normal(3, SIZE, DIM)
    elements = decoder(given)
    assert elements.shape == (3, SIZE, OUT)
    assert decoder.set_size is None
    close(decoder(given[1:2]), elements[1:2])
    assert decoder(given[:, :2]).shape == (3, 2, OUT)


@every
def test_gradients_of_decoders(name):
    decoder, mask = build(name), torch.arange(4) < torch.tensor([[4], [3]])
    assert gradcheck(lambda tokens: decoder(tokens, mask=mask)[mask], normal(2, 4, DIM).requires_grad_())
    decoder(normal(2, 4, DIM), mask=mask)[mask].sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@every
def test_padding_of_tokens_has_no_influence(name):
    """Wherever it is and whatever it holds."""
    decoder, given = build(name), normal(2, SIZE, DIM)
    mask = torch.tensor([[True, False, True, True, False, True], [True] * SIZE])
    expected = decoder(given, mask=mask)
    noise = given.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    found = decoder(noise, mask=mask)
    close(found[mask], expected[mask])
    found[mask].square().sum().backward()
    assert torch.isfinite(noise.grad).all()
    assert (noise.grad[~mask] == 0).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in decoder.parameters())
    # a full mask is none
    close(decoder(given, mask=torch.ones_like(mask)), decoder(given))
    if not name.startswith("transformer, "):  # whose positions know of the gap
        close(found[0, mask[0]], decoder(given[:1, mask[0]])[0])


@every_equivariant
def test_set_equivariant_decoders_permute_with_the_tokens_and_keep_equals_equal(name):
    for seed in range(3):
        decoder, given, order = build(name, seed), normal(2, SIZE, DIM), [3, 0, 5, 1, 4, 2]
        elements = decoder(given)
        close(decoder(given[:, order]), elements[:, order])
        given[:, 4] = given[:, 1]
        elements = decoder(given)
        close(elements[:, 4], elements[:, 1], rtol=0, atol=1e-12)
        assert (elements[:, 0] - elements[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["transformer, sequence", "bilstm"])
def test_decoders_with_an_order_are_not_equivariant_and_tell_equals_apart(name):
    decoder, given, order = build(name), normal(2, SIZE, DIM), [3, 0, 5, 1, 4, 2]
    assert (decoder(given[:, order]) - decoder(given)[:, order]).abs().max() > 1e-3
    elements = decoder(given[:, :1].expand(-1, SIZE, -1))
    assert min((elements[:, i] - elements[:, j]).norm() for i, j in itertools.combinations(range(SIZE), 2)) > 1e-4


def test_random_positions_are_those_of_the_seed_and_equivariant_in_distribution_only():
    decoder, given = build("transformer, random"), normal(2, SIZE, DIM)
    elements = decoder(given)
    close(decoder(given), elements)
    close(decoder(given[[1]]), elements[[1]])
    # padding behind the tokens changes none of their positions
    mask = torch.arange(SIZE + 3).expand(2, -1) < SIZE
    close(decoder(torch.cat([given, normal(2, 3, DIM)], 1), mask=mask)[:, :SIZE], elements)
    assert not torch.allclose(decoder.train()(given), decoder(given))
    decoder.eval()
    equal = decoder(given[:, :1].expand(-1, SIZE, -1))
    assert min((equal[:, i] - equal[:, j]).norm() for i, j in itertools.combinations(range(SIZE), 2)) > 1e-4
    # permuted together with their noise, elements permute
    order = [3, 0, 5, 1, 4, 2]
    noise = decoder.position(torch.zeros(2, SIZE, 4, dtype=torch.float64))[..., 4:]
    decoder.position.forward = lambda rows: torch.cat([rows, noise[:, order]], dim=-1)
    close(decoder(given[:, order]), elements[:, order])


def test_random_positions_have_a_learned_shift_and_scale():
    position = RandomPositions()
    with torch.no_grad():
        position.shift.fill_(3.0)
        position.log_scale.fill_(math.log(0.5))
    rows = torch.randn(200, 10, 4)
    drawn = position(rows)
    assert torch.equal(drawn[..., :4], rows)
    torch.testing.assert_close(drawn[..., 4:].mean(), torch.tensor(3.0), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn[..., 4:].std(), torch.tensor(0.5), rtol=0, atol=0.03)


def test_sequence_positions_against_a_loop():
    added = SequencePositions()(torch.zeros(1, 5, 6, dtype=torch.float64))[0]
    for p in range(5):
        angles = [p / 10_000 ** (2 * j / 6) for j in range(3)]
        expected = [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
        close(added[p], torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="even length"):
        SequencePositions()(torch.zeros(1, 5, 3))


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


def test_the_transformer_is_that_of_torch():
    decoder = build("transformer")
    theirs = nn.Transformer(8, 2, 2, 2, 7, dropout=0.0, batch_first=True).double().eval()

    layers = zip([*decoder.encoder, *decoder.decoder], [*theirs.encoder.layers, *theirs.decoder.layers], strict=True)
    for ours, other in layers:
        kinds = (
            {"self_attn": "attention"}
            if hasattr(ours, "attention")
            else {"self_attn": "own", "multihead_attn": "across"}
        )
        for name, kind in kinds.items():
            mine, its = getattr(ours, kind), getattr(other, name)
            weight = torch.cat([layer.weight for layer in (mine.query, mine.key, mine.value)])
            bias = torch.cat([mine.query.bias, torch.zeros(8), mine.value.bias])
            out = {f"out_proj.{name}": value for name, value in mine.out.state_dict().items()}
            its.load_state_dict({"in_proj_weight": weight, "in_proj_bias": bias} | out)
        parts = {"linear1": ours.network[0], "linear2": ours.network[2]}
        parts |= {f"norm{i}": norm for i, norm in enumerate(ours.norms, 1)}
        for name, part in parts.items():
            getattr(other, name).load_state_dict(part.state_dict())
    given = normal(2, SIZE, DIM)
    expected = decoder.head(theirs(decoder.source(given), decoder.first(given)))
    close(decoder(given), expected, rtol=1e-7, atol=1e-7)


def test_arguments_of_decoders_are_checked():
    for make in (
        lambda: DeepSets(layers=0, **SIZES),
        lambda: ElementTransformer(decoder_layers=-1, **SIZES),
        lambda: ElementTransformer(RandomPositions(), dim=9, heads=3, **SIZES),
    ):
        with pytest.raises(InputError, match="expected"):
            make()


# --- who can number ---------------------------------------------------------------------------------------------------


def numberer(pool, *, differentiation=None, start=None, seed=0):
    """The published model at a small size; pool is of the objective."""
    torch.manual_seed(seed)
    objective = Conditioned(LatentMatching(SetEncoder(pool, set_dim=SIZE + CLASSES, hidden_dim=16)))
    descent = GradientDescent(iterations=10, momentum=0.9, clip=40.0, projection=Simplex())
    return IDSPN(objective, descent, differentiation or Implicit(), set_size=SIZE, set_dim=SIZE, start=start).double()


def furthest_apart_of_equals(elements, given):
    """Over pairs of elements of one class."""
    same = (given.unsqueeze(1) == given.unsqueeze(2)).all(-1)
    return torch.cdist(elements, elements, compute_mode="donot_use_mm_for_euclid_dist")[same].max()


@pytest.mark.parametrize("differentiation", [Implicit(), Unrolled()], ids=["idspn", "dspn"])
def test_idspn_with_sorting_separates_equal_elements_and_with_a_sum_cannot(differentiation):
    """Exclusive multiset equivariance (Zhang et al., ICLR 2022).

    Exchanging two equal elements leaves the input as it is, so a set-equivariant function must exchange their equal
    outputs: they are equal. iDSPN permutes its output with its input as well, but what the sort of FSPool does to
    equals is left open; even from an equal start it separates them.
    """
    given, _ = examples(4)
    latent = normal(4, 16)
    equal_start = LearnedStart(SIZE, SIZE, scale=0.0)
    for pool, separates in ((FSPool(16, set_size=SIZE), True), (SumPool(16), False)):
        elements = numberer(pool, differentiation=differentiation, start=equal_start)(latent, condition=given)
        apart = furthest_apart_of_equals(elements, given)
        assert apart > 1e-2 if separates else apart < 1e-12


def test_idspn_permutes_with_its_input_and_its_start():
    """The part of equivariance that it keeps: elements that differ, be it by the start alone, permute."""
    given, _ = examples(4)
    latent, order = normal(4, 16), [3, 0, 5, 1, 4, 2]
    decoder = numberer(FSPool(16, set_size=SIZE))
    start = decoder.start(latent)
    decoder.start.forward = lambda _: start
    elements = decoder(latent, condition=given)
    decoder.start.forward = lambda _: start[:, order]
    close(decoder(latent, condition=given[:, order]), elements[:, order])
    close(elements.sum(-1), torch.ones(4, SIZE, dtype=torch.float64))
    assert (elements >= 0).all()


@pytest.mark.parametrize("make", [DeepSets, ElementTransformer])
def test_at_best_a_set_equivariant_decoder_numbers_one_element_of_each_class(make):
    """Whatever its weights: equals say the same number, of which a class has one."""
    given, target = examples(20)
    kinds = given.any(1).sum(1)
    for seed in range(5):
        torch.manual_seed(seed)
        right, _ = right_numbers(make(token_dim=CLASSES, set_dim=SIZE).double()(given), target, classes=CLASSES)
        assert (right <= kinds).all()
