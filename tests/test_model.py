"""Laws of encoders, decoders and the whole predictor."""

import pytest
import torch

from setpred.aggregators import FSPool, SetEncoder
from setpred.decoders import IDSPN, GaussianStart, LearnedStart, RandomStart
from setpred.encoders import ResNet, SmallCNN
from setpred.inner import GradientDescent, Implicit, LatentMatching, Problem, Unrolled
from setpred.model import SetPredictor

LATENT, SIZE = 16, 4


def decoder(differentiation=None, start=None, **numbers):
    torch.manual_seed(0)
    encoder = SetEncoder(FSPool(LATENT, set_size=SIZE), hidden_dim=16)
    descent = GradientDescent(**{"iterations": 5, "momentum": 0.9, "clip": 10.0} | numbers)
    return IDSPN(LatentMatching(encoder), descent, differentiation, set_size=SIZE, start=start)


def predictor():
    torch.manual_seed(1)
    return SetPredictor(SmallCNN(image_size=16, latent_dim=LATENT, width=4), decoder())


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


@pytest.mark.parametrize(
    "build",
    [
        lambda: SmallCNN(image_size=48),
        lambda: ResNet(depth=20),
        lambda: ResNet(image_size=100),
        lambda: ResNet(image_size=192, latent_dim=512),
    ],
)
def test_encoders_refuse_sizes_they_cannot_have(build):
    with pytest.raises(ValueError, match="expected"):
        build()


def test_refine_yields_every_iterate_and_forward_the_last():
    model, latent = decoder().eval(), torch.randn(3, LATENT)
    iterates = list(model.refine(latent))
    assert len(iterates) == 6
    torch.testing.assert_close(iterates[0], model.start(latent))
    torch.testing.assert_close(model(latent), iterates[-1])
    torch.testing.assert_close(model(latent, iterations=3), iterates[3])
    longer = list(model.refine(latent, iterations=8))
    torch.testing.assert_close(torch.stack(longer[:6]), torch.stack(iterates))


def test_the_descent_lowers_the_objective():
    model = decoder()
    with torch.no_grad():
        latent = model.objective.set_encoder(torch.randn(3, SIZE, model.set_dim))  # of a set, so zero can be reached
        iterates = list(model.refine(latent, iterations=60))
        losses = [model.objective(elements, Problem(latent, iterates[0])).mean().item() for elements in iterates]
    assert losses[-1] < 0.2 * losses[0]


def test_dspn_and_idspn_predict_the_same_and_differ_in_gradients_only():
    latent = torch.randn(3, LATENT)
    gradients = []
    values = []
    for differentiation in (Unrolled(), Implicit()):
        model = decoder(differentiation).eval()
        leaf = latent.clone().requires_grad_()
        values.append(model(leaf))
        values[-1].square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1])
    assert not torch.allclose(gradients[0], gradients[1])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("kind", [RandomStart, GaussianStart])
def test_a_random_start_depends_on_the_seed_alone_in_evaluation_and_is_fresh_in_training(kind):
    latent, start = torch.randn(4, LATENT), kind(SIZE, 19, seed=3)
    fresh = start(latent)
    assert not torch.allclose(fresh[0], fresh[1])
    assert not torch.allclose(fresh, start(latent))
    start.eval()
    torch.manual_seed(0)
    fixed = start(latent)
    torch.manual_seed(1)
    assert torch.equal(start(torch.randn(4, LATENT)), fixed)
    assert torch.equal(start(latent[:1]).expand(4, -1, -1), fixed)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(start(latent), fixed)
    start.seed = 4
    assert not torch.allclose(start(latent), fixed)


@pytest.mark.parametrize("training", [True, False])
def test_the_numbers_of_a_random_start_are_normal(training):
    draws = RandomStart(100, 50, scale=0.1).train(training)(torch.zeros(2, LATENT))
    assert draws.std().item() == pytest.approx(0.1, rel=0.05)
    assert draws.mean().item() == pytest.approx(0, abs=0.005)


def test_a_learned_start_learns():
    model = decoder(differentiation=Unrolled(), start=LearnedStart(SIZE, 19))
    model(torch.randn(3, LATENT)).square().sum().backward()
    assert model.start.initial.grad.abs().max() > 0


def test_evaluation_does_not_depend_on_batch_size_or_order():
    model = predictor().eval()
    with torch.no_grad():
        everything = model(images())
        torch.testing.assert_close(model(images()), everything)
        one_by_one = torch.cat([model(images()[i : i + 1]) for i in range(7)])
        order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
        shuffled = model(images()[order])
    torch.testing.assert_close(one_by_one, everything, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shuffled, everything[order], rtol=1e-5, atol=1e-6)


def test_uint8_and_unit_images_are_the_same():
    model = predictor().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images()), model(images().float() / 255))


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 3, 32, 32)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="expected images"):
        predictor()(torch.zeros(shape))


def test_every_parameter_learns():
    model = predictor().train()
    model(images()).square().sum().backward()
    # the bias before a sort pooling moves all elements alike and is learned too
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_the_descent_stays_in_full_precision_under_autocast():
    model = predictor().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latent = model.encode(images())
        assert latent.dtype == torch.bfloat16
        mixed = model.decoder(latent)
    with torch.no_grad():
        full = model.decoder(latent.float())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, full, rtol=0, atol=0)
