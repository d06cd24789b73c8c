"""Laws of image encoders and of the complete predictor."""

import copy

import pytest
import torch

from setpred.aggregators import FSPool, SetEncoder
from setpred.decoders import IDSPN, FlowMatching
from setpred.encoders import Occluded, ResNet, SmallCNN, Supervised
from setpred.errors import InputError
from setpred.inner import GradientDescent, LatentMatching, Problem
from setpred.losses import HungarianLoss
from setpred.model import SetPredictor, Step
from setpred.schema import CLEVR
from setpred.training.task import SetPrediction

LATENT, SIZE = 16, 4


def decoder():
    torch.manual_seed(0)
    encoder = SetEncoder(FSPool(LATENT, set_size=SIZE), hidden_dim=16, set_dim=CLEVR.set_dim)
    descent = GradientDescent(iterations=5, momentum=0.9, clip=10.0)
    return IDSPN(LatentMatching(encoder), descent, set_size=SIZE, set_dim=CLEVR.set_dim)


def flow():
    return FlowMatching(latent_dim=LATENT, dim=8, heads=2, layers=1, hidden_dim=8, set_size=SIZE, set_dim=CLEVR.set_dim)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return SetPredictor(SmallCNN(image_size=16, latent_dim=LATENT, width=4), decoder()).eval()


def images(count=7, size=16):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", [16, 64])
def test_small_cnn_knows_where_things_are(size):
    torch.manual_seed(0)
    encoder = SmallCNN(image_size=size, latent_dim=12, width=4).eval()
    image = torch.zeros(2, 3, size, size)
    image[0, :, : size // 4, : size // 4] = 1
    image[1, :, -size // 4 :, -size // 4 :] = 1
    latent = encoder(image)
    assert latent.shape == (2, 12)
    assert not torch.allclose(latent[0], latent[1])


@pytest.mark.parametrize(("depth", "size", "width"), [(18, 64, 512), (18, 128, 512), (34, 64, 512), (50, 64, 2048)])
def test_resnet_is_the_published_trunk_and_head(depth, size, width):
    encoder = ResNet(depth=depth, image_size=size, latent_dim=64).eval()
    side = size // 64
    assert encoder.head[0].num_features == width
    assert tuple(encoder.head[1].weight.shape) == (64 // side**2, width, 2, 2)
    with torch.no_grad():
        assert encoder(torch.rand(2, 3, size, size)).shape == (2, 64)


def test_what_is_occluded_has_no_influence_and_the_rest_has():
    torch.manual_seed(0)
    encoder = Occluded(SmallCNN(image_size=16, latent_dim=12, width=4), share=0.4).eval()  # columns 10 to 15
    assert (encoder.image_size, encoder.latent_dim) == (16, 12)
    image = torch.rand(2, 3, 16, 16)
    for column in (0, 9, 10, 15):
        other = image.clone()
        other[..., column] = 0
        assert torch.equal(encoder(other), encoder(image)) == (column >= 10)
    grey = image.clone()
    grey[..., 10:] = 0.5
    assert torch.equal(encoder(image), encoder.encoder(grey))


def test_a_supervised_encoder_adds_the_loss_of_its_decoder_in_training_alone():
    torch.manual_seed(0)
    encoder = Supervised(
        SmallCNN(image_size=16, latent_dim=LATENT, width=4), decoder(), HungarianLoss(weights={"coords": 2})
    )
    task = SetPrediction(encoder, flow(), loss=HungarianLoss(aligned=True))
    batch = {"image": images(), "elements": torch.rand(7, SIZE, CLEVR.set_dim)}
    step = Step(task.model, task.loss, batch)
    torch.manual_seed(1)
    predicted = step.predict()
    own = task.loss(predicted, batch["elements"])
    torch.manual_seed(2)  # of the start of the descent
    expected = HungarianLoss(weights={"coords": 2}, schema=CLEVR)(encoder.decoder(encoder.features), batch["elements"])
    torch.manual_seed(2)
    losses = step.losses([predicted])
    torch.testing.assert_close(losses, own + expected)
    assert encoder.features is None  # nothing is kept alive
    losses.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in encoder.decoder.parameters())
    with pytest.raises(ValueError, match="expected a prediction in training before its loss"):
        step.losses([predicted])
    task.zero_grad()
    step.predict()
    encoder.penalty(step, predicted).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in encoder.encoder.parameters())  # trained along
    for evaluated in (encoder, task):  # a frozen encoder, or a validation
        evaluated.eval()
        predicted = step.predict()
        torch.testing.assert_close(step.losses([predicted]), task.loss(predicted, batch["elements"]))
        assert encoder.features is None


def test_a_supervised_encoder_is_copied_without_the_features_of_a_step():
    encoder = Supervised(SmallCNN(image_size=16, latent_dim=LATENT, width=4), decoder(), HungarianLoss())
    encoder(images() / 255)
    assert encoder.features.grad_fn is not None
    assert copy.deepcopy(encoder).features is None
    assert encoder.features is not None


@pytest.mark.parametrize(
    ("latent", "inner", "options", "words"),
    [
        (LATENT, decoder, {"aligned": True}, "IDSPN and HungarianLoss with aligned True"),
        (LATENT, lambda: flow(), {}, "FlowMatching and HungarianLoss with aligned False"),
        (
            LATENT + 1,
            lambda: flow(),
            {},
            "SmallCNN gives a vector of 17 numbers, the decoder FlowMatching takes a vector of 16",
        ),
    ],
)
def test_a_supervised_encoder_rejects_parts_that_do_not_fit(latent, inner, options, words):
    with pytest.raises(InputError, match=words):
        Supervised(SmallCNN(image_size=16, latent_dim=latent, width=4), inner(), HungarianLoss(**options))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Occluded(SmallCNN(image_size=16), share=1.0),
        lambda: Occluded(SmallCNN(image_size=16), share=0.01),
        lambda: Occluded(SmallCNN(image_size=16), share=0.99),
        lambda: SmallCNN(image_size=48),
        lambda: ResNet(depth=20, image_size=128),
        lambda: ResNet(image_size=100),
        lambda: ResNet(image_size=192, latent_dim=512),
    ],
)
def test_encoders_of_impossible_sizes_raise(build):
    with pytest.raises(ValueError, match="expected"):
        build()


def test_the_descent_lowers_the_objective():
    model = decoder()
    with torch.no_grad():
        latent = model.objective.set_encoder(torch.randn(3, SIZE, model.set_dim))  # of a set, so zero can be reached
        iterates = list(model.refine(latent, iterations=60))
        losses = [model.objective(elements, Problem(latent, iterates[0])).mean().item() for elements in iterates]
    assert losses[-1] < 0.2 * losses[0]


@torch.no_grad()
def test_a_prediction_depends_on_neither_batch_nor_order_nor_type_of_images(model):
    expected, order = model(images()), [3, 0, 6, 2, 5, 1, 4]
    torch.testing.assert_close(torch.cat([model(one) for one in images().split(1)]), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(images()[order]), expected[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(images().float() / 255), expected)
    torch.testing.assert_close(list(model.refine(images()))[-1], expected)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 3, 32, 32)])
def test_images_of_another_shape_raise(shape, model):
    with pytest.raises(ValueError, match="expected images"):
        model(torch.zeros(shape))


def test_every_parameter_learns(model):
    model.train()(images()).square().sum().backward()
    # the bias before a sort pooling moves all elements alike, and is learned too
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
