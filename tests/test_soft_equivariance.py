"""The equivariance error against known answers, and the regulariser in a training step."""

import math

import pytest
import torch
from problems import check_slope, close, normal
from torch import nn

from setpred.aggregators import FrameAverage, MeanPool, SetEncoder
from setpred.decoders import MLPDecoder
from setpred.errors import InputError
from setpred.losses import CrossEntropy, HungarianLoss, SoftEquivariance, equivariance_error
from setpred.losses.soft_equivariance import SYMMETRIES, moved, orthogonal
from setpred.metrics import symmetry_distances
from setpred.metrics.set_distances import set_distances
from setpred.model import SetPredictor, Step
from setpred.schema import ElementSchema, continuous
from setpred.sets import mean_present

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
every_symmetry = pytest.mark.parametrize("symmetry", SYMMETRIES)


def error(predict, inputs, mask=None, *, seed=0, **options):
    torch.manual_seed(seed)
    return equivariance_error(predict, inputs, mask, **options)


def encoder():
    torch.manual_seed(0)
    return SetEncoder(MeanPool(6), set_dim=3, hidden_dim=8).double()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_drawn_matrices_are_orthogonal_of_one_determinant_and_uniform(dim, sign):
    torch.manual_seed(0)
    drawn = orthogonal(4000, dim, sign, torch.zeros(0, dtype=torch.float64))
    close(drawn @ drawn.mT, torch.eye(dim).double().expand_as(drawn))
    close(drawn.det(), torch.full((4000,), sign).double())
    if dim > 1:  # uniform: every entry has mean 0 and variance 1 / dim
        assert drawn.mean(0).abs().max() < 0.05
        close(drawn.square().mean(0), torch.full((dim, dim), 1 / dim).double(), rtol=0, atol=0.03)


@every_symmetry
def test_an_equivariant_function_has_no_error(symmetry):
    """The centre of a set moves with it; so does the set itself, in any order."""
    inputs = normal(3, 5, 3)
    options = {"symmetry": symmetry, "input_dims": 2, "output_dims": 2}
    for predict in (lambda x: x[..., :2].mean(1), lambda x: x, lambda x: x.flip(1)):
        close(error(predict, inputs, **options), torch.zeros(3).double())
        assert error(lambda x, f=predict: f(x).square(), inputs, **options).max() > 1e-3


@every_symmetry
def test_invariance_by_construction_is_measured_as_such(symmetry):
    frames, plain = FrameAverage(encoder(), position_dim=2), encoder()
    inputs, options = normal(3, 5, 3), {"symmetry": symmetry, "input_dims": 2}
    found = error(frames.double(), inputs, **options)
    assert (found < 1e-20).all() == (symmetry != "scaling")
    assert error(plain, inputs, **options).max() > 1e-4


def test_the_errors_of_the_identity_are_known():
    """E |x R - x|² = 2 |x|² for a uniform rotation, E |t|² = 2 for a normal translation; each over 2 numbers."""
    inputs = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64).expand(20_000, -1, -1)
    for symmetry, expected in (("rotation", 5.0), ("reflection", 5.0), ("translation", 1.0)):
        assert error(lambda x: x, inputs, symmetry=symmetry, input_dims=2).mean() == pytest.approx(expected, rel=0.03)


@every_symmetry
def test_padding_and_the_rest_of_the_batch_are_not_seen(symmetry):
    options, inputs = {"symmetry": symmetry, "input_dims": 2}, normal(3, 5, 3)
    model = encoder()

    def predict(mask):
        return lambda x: model(x, mask)

    expected = error(predict(MASK), inputs, MASK, **options)
    junk = inputs.masked_fill(~MASK.unsqueeze(-1), torch.nan)
    close(error(predict(MASK), junk, MASK, **options), expected)
    close(error(predict(MASK[:1]), inputs[:1], MASK[:1], **options), expected[:1])  # the first draws are the same
    motion = SYMMETRIES[symmetry](3, 2, inputs)
    assert (moved(junk, motion, MASK)[~MASK] == 0).all()
    close(moved(inputs, motion)[..., 2], inputs[..., 2])


def test_gradients_are_those_of_finite_differences():
    model, inputs = encoder(), normal(3, 5, 3)
    options = {"symmetry": "rotation", "input_dims": 2}
    check_slope(lambda: error(model, inputs, **options).sum(), list(model.parameters()), least=1e-4)


def step_of(loss, **batch):
    torch.manual_seed(0)
    model = SetPredictor(
        SetEncoder(MeanPool(6), set_dim=3, hidden_dim=8), MLPDecoder(latent_dim=6, set_size=1, set_dim=4)
    )
    batch = {"input": normal(3, 5, 3).float(), "input_mask": MASK, "elements": torch.eye(4)[:3].unsqueeze(1)} | batch
    return Step(model.train(), loss.train(), batch, seed=0)


def test_a_training_step_adds_the_weighted_errors_and_a_validation_does_not():
    weights = {"rotation": 0.5, "scaling": 2.0}
    step = step_of(SoftEquivariance(CrossEntropy(), weights=weights))
    plain = CrossEntropy()(predicted := step.predict(), step.target)
    torch.manual_seed(1)
    found = step.losses([predicted])
    torch.manual_seed(1)
    for name, weight in weights.items():
        plain = plain + weight * equivariance_error(step.predict, step.inputs(), MASK, symmetry=name, input_dims=2)
    torch.testing.assert_close(found, plain)
    assert (found > CrossEntropy()(predicted, step.target)).all()
    step.model.eval()
    torch.testing.assert_close(step.losses([predicted]), CrossEntropy()(predicted, step.target))


def test_the_groups_of_a_schema_reach_the_loss_within():
    schema = ElementSchema("point", [continuous("coords", 3)], max_objects=1)
    loss = SoftEquivariance(HungarianLoss(weights={"coords": 2.0}), weights={})
    loss.use_schema(schema)
    step = step_of(loss)
    alone = HungarianLoss(weights={"coords": 2.0}, schema=schema)
    torch.testing.assert_close(step.losses([step.predict()]), alone(step.predict(), step.target))


def test_wrong_arguments_are_errors():
    for weights in ({"shear": 1.0}, {"rotation": -1.0}):
        with pytest.raises(InputError, match="expected weights of at least 0 of rotation"):
            SoftEquivariance(weights=weights)
    for wrong in ({"symmetry": "shear"}, {"input_dims": 4}, {"output_dims": 1}):
        with pytest.raises(InputError, match="expected one of rotation"):
            equivariance_error(nn.Identity(), normal(1, 2, 3), **{"symmetry": "rotation", "input_dims": 2} | wrong)
    images = {"image": torch.zeros(3, 3, 4, 4)}
    with pytest.raises(InputError, match="model of input sets, got images"):
        SoftEquivariance(weights={"rotation": 1.0}).penalty(step_of(CrossEntropy(), **images), torch.zeros(3, 1, 4))


# --- the distance between moved and predicted sets --------------------------------------------------------------------


def distances(predict, inputs, mask=None, **options):
    torch.manual_seed(0)
    return symmetry_distances(predict, inputs, mask, **{"dims": 2, "cutoff": 500.0} | options)


def around_their_mean(inputs, mask):
    """Each position, half as far from the mean of its set: equivariant; the presence is that of the input."""
    centre = mean_present(inputs[..., :2], mask).unsqueeze(1)
    return torch.cat([0.5 * (inputs[..., :2] + centre), mask.unsqueeze(-1).double()], dim=-1)


@every_symmetry
def test_the_distance_is_zero_for_equivariant_sets_and_that_of_a_loop_for_others(symmetry):
    inputs = normal(3, 5, 3) * torch.tensor([1.0, 2.0, 1.0]) + torch.tensor([20.0, -40.0, 0.0])
    inputs[~MASK] = math.nan  # motions are about the mean of all present points, far from the origin
    moved_off, different = distances(lambda x: around_their_mean(x, MASK), inputs, MASK, symmetry=symmetry)
    assert moved_off.max() < 1e-9
    predicted = around_their_mean(inputs.nan_to_num(), MASK)
    expected = set_distances(predicted, predicted.roll(1, 0), cutoff=500.0)["hungarian"]
    torch.testing.assert_close(different, expected)
    assert different.min() > 0.1

    def fixed(x):  # positions that do not follow the input
        return torch.cat([x.new_ones(3, 4, 2) + 20, x.new_ones(3, 4, 1)], dim=-1)

    off, none = distances(fixed, inputs, MASK, symmetry=symmetry)
    assert none.max() == 0
    capped, _ = distances(fixed, inputs, MASK, symmetry=symmetry, cutoff=1e-3)
    assert capped.max() <= 1e-3 < off.max()
    torch.manual_seed(0)
    matrix, shift = SYMMETRIES[symmetry](3, 2, inputs)
    present = inputs[..., :2][MASK]
    centre = present.mean(0)
    unit = ((present - centre) ** 2).mean().sqrt()
    for found, a, b in zip(off, matrix, shift, strict=True):  # the point goes to c + (point - c) A + unit b
        point = torch.tensor([21.0, 21.0]).double()
        assert found.item() == pytest.approx((centre + (point - centre) @ a + unit * b - point).norm().item())


def test_an_absent_element_may_be_anywhere():
    inputs = normal(3, 5, 3)
    few = MASK & (torch.arange(15).view(3, 5) == 2)

    def predict(x, junk):
        found = around_their_mean(x, MASK)
        return torch.where(found[..., 2:] > 0, found, torch.tensor([junk, junk, 0.0]).double())

    first, second = (distances(lambda x, j=j: predict(x, j), inputs, MASK, symmetry="rotation") for j in (0.0, 7.0))
    torch.testing.assert_close(first, second)
    assert first[0].max() < 1e-9
    for wrong in ({"symmetry": "shear"}, {"dims": 4}, {"dims": 1}, {"inputs": inputs[:1]}):
        with pytest.raises(InputError, match=r"expected one of rotation, .*positions of . to 3 numbers and two"):
            symmetry_distances(nn.Identity(), **{"inputs": inputs, "symmetry": "rotation", "dims": 2} | wrong)
    with pytest.raises(InputError, match="at least two present elements in the inputs, got 1"):
        symmetry_distances(nn.Identity(), inputs, few, symmetry="rotation", dims=2)
