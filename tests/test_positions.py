"""Positions of tokens: laws over all of them, each against its definition, and the three-cell probe."""

import math

import pytest
import torch
from problems import check_slope, close, normal
from torch import nn

from setpred import encoders
from setpred.checkpoint.allowlist import moved
from setpred.data.toy import ThreeCells
from setpred.decoders import SlotAttention
from setpred.encoders import LinearPosition, PositionedTokens, SeqPE, SinePosition, SmallTrunk, position_grid
from setpred.errors import InputError
from setpred.losses import HungarianLoss
from setpred.model import SetPredictor, Step

DIM, SIDE = 8, 4
FAMILY = {
    "linear": lambda dim=DIM: LinearPosition(dim),
    "sine": lambda dim=DIM: SinePosition(),
    "seqpe": lambda dim=DIM: SeqPE(dim, digits=2, base=5, width=8, heads=2),
}
every_position = pytest.mark.parametrize("name", FAMILY)


def build(name, **sizes):
    torch.manual_seed(0)
    return FAMILY[name](**sizes).double()


def test_every_position_is_in_the_family():
    parts = {getattr(encoders, name) for name in encoders.__all__}
    public = {part.__name__ for part in parts if getattr(part, "__module__", "").endswith("positions")}
    assert public - {"position_grid"} == {type(build(name)).__name__ for name in FAMILY}


@every_position
def test_positions_depend_on_the_place_alone_and_differ(name):
    position = build(name)
    found = position(normal(2, SIDE**2, DIM))
    assert found.shape == (SIDE**2, DIM)
    close(position(normal(3, SIDE**2, DIM, seed=2)), found)
    assert torch.pdist(found.detach()).min() > 1e-2


@every_position
def test_gradients_of_positions_are_those_of_finite_differences(name):
    position, weights = build(name), normal(SIDE**2, DIM)
    if learned := list(position.parameters()):
        check_slope(lambda: (weights * position(weights.unsqueeze(0))).sum(), learned, least=1e-3)
    assert bool(learned) == (name != "sine")


@every_position
def test_tokens_of_no_square_map_are_an_error(name):
    with pytest.raises(ValueError, match="square map"):
        build(name)(normal(1, 7, DIM))


@every_position
def test_encoders_add_any_of_them(name):
    trunk = SmallTrunk(image_size=16, width=4).double()
    image = normal(2, 3, 16, 16)
    encoder = PositionedTokens(trunk, token_dim=5, positions=build(name, dim=trunk.channels)).double().eval()
    features = trunk(image).flatten(2).mT
    close(encoder(image), encoder.network(encoder.norm(features + encoder.position(features))))


def test_the_default_is_the_published_embedding_under_the_names_of_earlier_checkpoints():
    encoder = PositionedTokens(SmallTrunk(image_size=16, width=2), token_dim=5).double().eval()
    assert {name for name, _ in encoder.named_parameters() if "position" in name} == {
        "position.weight",
        "position.bias",
    }
    features = encoder.trunk(image := normal(2, 3, 16, 16)).flatten(2).mT
    place = position_grid(8, 8).double() @ encoder.position.weight.mT + encoder.position.bias
    close(encoder(image), encoder.network(encoder.norm(features + place)))


@pytest.mark.parametrize("path", ["setpred.decoders.SinePosition", "setpred.decoders.detr.SinePosition"])
def test_the_former_path_of_the_sines_still_loads(path):
    assert moved(path) == "setpred.encoders.SinePosition"


def test_digits_are_those_of_the_number():
    position = SeqPE(DIM, digits=3, width=8, heads=2).double()
    for place in ((0, 7), (12, 345), (345, 12), (999, 0)):
        digits = [int(digit) for number in place for digit in str(number).zfill(3)]
        rows = position.digit.weight[digits] + position.place
        rows = torch.cat([position.reader, rows]).unsqueeze(0)
        for layer in position.layers:
            rows = layer(rows)
        close(position.encode(torch.tensor([place]))[0], position.head(rows[0, 0]))


def test_the_contrast_asks_for_the_nearest_of_the_other_positions():
    position = SeqPE(DIM, width=8, heads=2, contrast=0.5, drawn=6).double()
    torch.manual_seed(1)
    found = position.penalty()
    torch.manual_seed(1)
    places = torch.randint(100, (6, 2))
    encoded, losses = position.encode(places), []
    for i, place in enumerate(places.tolist()):
        others = [j for j in range(6) if j != i]
        nearest = min(others, key=lambda j, place=place: math.dist(place, places[j].tolist()))
        products = torch.stack([encoded[i] @ encoded[j] for j in others]) / math.sqrt(DIM)
        losses.append(products.logsumexp(0) - products[others.index(nearest)])
    close(found, 0.5 * torch.stack(losses).mean())
    check_slope(lambda: torch.manual_seed(1) and position.penalty(), list(position.parameters()), least=1e-4)
    assert SeqPE(DIM).penalty() == 0


def test_a_training_step_adds_the_contrast_and_a_validation_does_not():
    torch.manual_seed(0)
    trunk = SmallTrunk(image_size=16, width=4)
    encoder = PositionedTokens(trunk, token_dim=4, positions=SeqPE(trunk.channels, width=8, heads=2, contrast=0.5))
    model = SetPredictor(encoder, SlotAttention(token_dim=4, slot_dim=4, hidden_dim=4, set_size=2, set_dim=3))
    step = Step(model, HungarianLoss(), {"image": torch.rand(2, 3, 16, 16), "elements": torch.rand(2, 2, 3)})
    predicted = step.predict()
    plain = step.loss(predicted, step.target)
    torch.manual_seed(1)
    found = step.losses([predicted])
    torch.manual_seed(1)
    torch.testing.assert_close(found, plain + encoder.position.penalty())
    model.eval()
    torch.testing.assert_close(step.losses([predicted]), plain)


def test_sequences_have_one_coordinate_and_volumes_three():
    for dimensions in (1, 3):
        position = SeqPE(DIM, dimensions=dimensions, width=8, heads=2)
        found = position(torch.zeros(1, 8, DIM))
        places = torch.cartesian_prod(*[torch.arange(round(8 ** (1 / dimensions)))] * dimensions).view(8, dimensions)
        torch.testing.assert_close(found, position.encode(places))
        assert torch.pdist(found).min() > 1e-3


def test_wrong_sizes_are_errors():
    with pytest.raises(InputError, match="base of at least 2"):
        SeqPE(DIM, base=1)
    with pytest.raises(ValueError, match="side up to 2"):
        SeqPE(DIM, digits=1, base=2)(torch.zeros(1, 9, DIM))
    with pytest.raises(ValueError, match="tokens of 8 numbers"):
        SeqPE(DIM)(torch.zeros(1, 9, 6))


# --- the three-cell probe -----------------------------------------------------------------------------------------


def probe(position, dim=32, side=8):
    """Error of the least squares answer to each question from the positions of the three cells, on other maps."""
    world = ThreeCells(train_sets=2000, val_sets=500, side=side)
    world.setup()
    place = position(torch.zeros(1, side**2, dim, dtype=torch.float64)).detach()

    def read(data):
        marked = (data.tensors["input"].double().mT @ place).flatten(1)
        return torch.cat([marked, torch.ones(len(marked), 1).double()], -1), data.tensors["elements"][:, 0].double()

    (inputs, answers), (others, expected) = read(world.train_data), read(world.val_data)
    ridge = inputs.mT @ inputs + 1e-6 * torch.eye(inputs.shape[1]).double()
    weights = torch.linalg.solve(ridge, inputs.mT @ answers)
    return (others @ weights - expected).abs().mean(0)


class Nowhere(nn.Module):
    """The same position everywhere."""

    def forward(self, tokens):
        return torch.ones_like(tokens[0])


def test_the_three_cell_probe_tells_positions_from_none():
    guess = probe(Nowhere())
    assert (guess > 0.15).all()
    errors = {name: probe(build(name, dim=32)) for name in FAMILY}
    for name, error in errors.items():  # directed and absolute questions are linear in the places
        assert (error[3:] < 0.8 * guess[3:]).all(), name
        assert error[3:].max() < 1e-4 or name == "seqpe"
    assert errors["linear"][:3].min() > 0.05  # a distance is not linear
