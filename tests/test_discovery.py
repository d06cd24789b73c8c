"""Object discovery: layers, their composite, the reconstruction loss, and a training without labels."""

import math

import pytest
import torch
from problems import close, normal
from torch import nn

from setpred.decoders import IDSPN, MLPDecoder, SlotAttention, SpatialBroadcast
from setpred.errors import InputError
from setpred.inner import GradientDescent
from setpred.losses import Reconstruction
from setpred.nn import composite

BATCH, SLOTS, SIDE = 2, 3, 4


class Quadratic(nn.Module):
    def forward(self, elements, problem):
        return elements.square().sum((1, 2))


def layers(seed=1):
    return normal(BATCH, SLOTS, 4 * SIDE**2, seed=seed)


def test_the_composite_is_the_weighted_sum_of_colours_at_every_pixel():
    rows = layers()
    image, masks, colours = composite(rows)
    numbers = rows.view(BATCH, SLOTS, 4, SIDE, SIDE)
    for b in range(BATCH):
        for y in range(SIDE):
            for x in range(SIDE):
                weights = [math.exp(numbers[b, i, 3, y, x]) for i in range(SLOTS)]
                for i in range(SLOTS):
                    assert float(masks[b, i, y, x]) == pytest.approx(weights[i] / sum(weights))
                for c in range(3):
                    drawn = sum(weights[i] * numbers[b, i, c, y, x] for i in range(SLOTS)) / sum(weights)
                    assert float(image[b, c, y, x]) == pytest.approx(float(drawn))
    close(colours, numbers[:, :, :3])
    close(masks.sum(1), torch.ones(BATCH, SIDE, SIDE).double())


def test_layers_of_another_shape_are_an_error():
    for wrong in (torch.zeros(2, 3, 63), torch.zeros(2, 64), torch.zeros(2, 3, 4 * 8)):
        with pytest.raises(ValueError, match="expected layers"):
            composite(wrong)


def test_the_reconstruction_loss_is_the_mean_squared_error_of_each_image():
    rows, loss = layers(), Reconstruction()
    image = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    expected = ((composite(rows).image - image.double() / 255) ** 2).flatten(1).mean(1)
    close(loss(rows, image), expected, rtol=1e-6)
    close(loss(rows[:, [2, 0, 1]], image), expected, rtol=1e-6)  # a set: the order of the layers is free
    close(loss(rows, image.double() / 255), expected)
    larger = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    larger[..., ::2, ::2], larger[..., 1::2, 1::2] = 10, 20  # means over squares of pixels
    means = larger.double().view(BATCH, 3, SIDE, 2, SIDE, 2).mean((3, 5)) / 255
    close(loss(rows, larger), ((composite(rows).image - means) ** 2).flatten(1).mean(1), rtol=1e-6)
    for shape in ((BATCH, 3, 6, 6), (BATCH, 3, 8, 4), (BATCH, 3, 2, 2)):
        with pytest.raises(ValueError, match="expected square images"):
            loss(rows, torch.zeros(shape))


def test_relative_layers_move_with_their_place():
    """Moving a slot's place by whole cells moves its layer by as many, away from the borders."""
    torch.manual_seed(0)
    slots = SlotAttention(token_dim=5, slot_dim=8, set_size=SLOTS, set_dim=6)
    broadcast = SpatialBroadcast(slots, side=16, widths=[4], smoothing=0, relative=True).double()
    with torch.no_grad():  # the first two numbers speak as places alone
        broadcast.spread.weight[:, :2] = 0
    before = normal(1, 1, 6)
    before[..., :2] = 0
    after = before.clone()
    after[..., 0] += 3 * 2 / 16
    first, second = (broadcast.finish(state).view(4, 32, 32)[:, 12:20] for state in (before, after))
    close(second[..., 12:20], first[..., 6:14])
    assert (first[..., 6:14] - first[..., 12:20]).abs().max() > 1e-3
    still = SpatialBroadcast(slots, side=16, widths=[4], smoothing=0).double()
    still.load_state_dict(broadcast.state_dict())
    close(still.finish(before), still.finish(after))


def test_only_the_last_iterate_is_drawn_in_a_forward_pass():
    slots = SlotAttention(token_dim=5, slot_dim=8, iterations=4, set_size=SLOTS, set_dim=6)
    broadcast = SpatialBroadcast(slots, side=2, widths=[3], background=True).eval()
    calls = []
    broadcast.network.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randn(2, 7, 5)
    last = broadcast(tokens)
    assert len(calls) == 1
    iterates = list(broadcast.refine(tokens))
    assert len(calls) == 1 + 5
    assert last.shape == (2, SLOTS + 1, 64)
    assert torch.equal(iterates[-1], last)
    assert not torch.equal(iterates[0], last)


def test_slots_that_do_not_fit_are_an_error():
    vector = IDSPN(Quadratic(), GradientDescent(iterations=1), set_size=2, set_dim=5)  # takes vectors of any length
    flat = MLPDecoder(latent_dim=6, hidden_dim=4, set_size=2, set_dim=2)
    for slots, options in (
        (vector, {"background": True}),
        (flat, {"relative": True}),
        (flat, {"widths": []}),
        (flat, {"side": 0}),
        (flat, {"smoothing": -1}),
    ):
        with pytest.raises(InputError, match="expected"):
            SpatialBroadcast(slots, **options)
