"""Exported programs give the model's predictions, for any batch, through inner gradients too."""

import io
import json
import math

import numpy as np
import pytest
import torch
from tiny import untrained
from torch import nn

from setpred.aggregators import FSPool, SetEncoder
from setpred.checkpoint import torch_export as programs
from setpred.checkpoint.load import Checkpoint, load_checkpoint
from setpred.checkpoint.torch_export import SCHEMA_FILE, _difference, export_program, unit
from setpred.commands.release import main
from setpred.data.scenes import render_records
from setpred.decoders import IDSPN, MESH, GaussianStart, GreedyVotes, SinkhornAttention, SlotAttention, SlotMixture
from setpred.encoders import PositionedTokens, ResidualTrunk, SmallCNN, SmallTrunk, Votes
from setpred.errors import InputError
from setpred.inner import GradientDescent, LatentMatching, VotingEnergy
from setpred.model import SetPredictor
from setpred.schema import CLEVR, ElementSchema


def of(encoder, decoder):
    return Checkpoint(SetPredictor(encoder, decoder).eval(), CLEVR, 0, 0, 0, 16, {})


def assert_same(program, model, batch):
    """Of scenes as bytes and as numbers in [0, 1]; the pixels of a batch that is black are bytes, too."""
    scenes = np.stack([r.image for r in render_records(range(batch), seed=7, image_size=16, objects=(3, 6))])
    images = torch.from_numpy(scenes).permute(0, 3, 1, 2)
    for some in (images, (images > 128).byte()):
        with torch.no_grad():
            expected = model(some)
        torch.testing.assert_close(program(some), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(program(some / 255), expected, rtol=0, atol=1e-5)


def test_the_command_writes_a_program_of_the_model(tmp_path, capsys):
    path, out = untrained(tmp_path), tmp_path / "deep" / "tiny.pt2"
    assert main([str(path), "--export", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    inside = {SCHEMA_FILE: ""}
    exported = torch.export.load(out, extra_files=inside)
    assert ElementSchema.from_dict(json.loads(inside[SCHEMA_FILE])).differences(CLEVR) == ""
    # nothing in it needs this package: operations of torch alone
    assert {
        type(node.target).__module__.split(".")[0] for node in exported.graph.nodes if node.op != "placeholder"
    } <= {
        "torch",
        "builtins",
    }
    for batch in (1, 4, 40):
        assert_same(exported.module(), load_checkpoint(path).model, batch)


def test_it_refuses_in_a_sentence(tmp_path, capsys):
    path = untrained(tmp_path)
    for options in ([], ["--export", str(tmp_path / "tiny.onnx")]):
        assert main([str(path), *options]) == 2
        assert ".pt2" in capsys.readouterr().err
    loaded = load_checkpoint(path)
    # reads a number out of a tensor, which no tracer follows
    loaded.model.decoder.objective.register_forward_hook(lambda part, given, value: value * float(value.detach().sum()))
    with pytest.raises(InputError, match="cannot export this model, with IDSPN: "):
        export_program(loaded)


class StartOfOnesOwn(nn.Module):
    """Takes something else than a start is given."""

    def forward(self, features, more):
        return features.new_zeros(features.shape[0], 4, CLEVR.set_dim)


def test_a_start_that_takes_something_else_is_a_sentence(tmp_path):
    loaded = load_checkpoint(untrained(tmp_path))
    loaded.model.decoder.start = StartOfOnesOwn()
    with pytest.raises(InputError, match=r"cannot export this model, with IDSPN: "):
        export_program(loaded)


def test_a_descent_without_momentum():
    objective = LatentMatching(SetEncoder(FSPool(16, set_size=4), hidden_dim=16))
    descent = GradientDescent(iterations=3, clip=1.0)
    loaded = of(SmallCNN(image_size=16, latent_dim=16, width=4), IDSPN(objective, descent, set_size=4))
    program = torch.export.load(io.BytesIO(export_program(loaded))).module()
    for batch in (1, 5):
        assert_same(program, loaded.model, batch)


class Read(nn.Module):
    """A start that reads the features."""

    def __init__(self, dim, length):
        super().__init__()
        self.read = nn.Linear(dim, 4 * length)

    def forward(self, features):
        rows = features if features.ndim == 2 else features.mean(1)
        return self.read(rows).unflatten(-1, (4, -1))


@pytest.mark.parametrize("start", [GaussianStart(4, CLEVR.set_dim, seed=3), Read(16, CLEVR.set_dim)])
def test_a_descent_starts_as_in_the_model(start):
    objective = LatentMatching(SetEncoder(FSPool(16, set_size=4), hidden_dim=16))
    descent = GradientDescent(iterations=2, momentum=0.9)
    loaded = of(SmallCNN(image_size=16, latent_dim=16, width=4), IDSPN(objective, descent, set_size=4, start=start))
    program = torch.export.load(io.BytesIO(export_program(loaded))).module()
    assert_same(program, loaded.model, 5)


def test_a_voting_model():
    torch.manual_seed(0)
    tokens = PositionedTokens(ResidualTrunk(image_size=16, widths=(4, 8), blocks=1), token_dim=None)
    descent = GradientDescent(iterations=4)
    start = GreedyVotes(4, weights=[4, 4, 4])
    decoder = IDSPN(VotingEnergy(precise=3, weights=[4, 4, 4]), descent, set_size=4, start=start)
    encoder = Votes(tokens, precise=3, hidden_dim=8)
    with torch.no_grad():  # tokens that differ, as trained ones do: rounding does not choose the heaviest
        encoder.network[-1].weight *= 20
    loaded = of(encoder, decoder)
    program = torch.export.load(io.BytesIO(export_program(loaded))).module()
    for batch in (1, 5):
        assert_same(program, loaded.model, batch)


SLOTS = {"set_size": 4, "token_dim": 8, "slot_dim": 8, "hidden_dim": 8, "iterations": 2}


@pytest.mark.parametrize(
    "decoder",
    [
        lambda: SlotAttention(**SLOTS),
        lambda: SlotAttention(start=Read(8, 8), **SLOTS),
        lambda: SlotAttention(SinkhornAttention(MESH(), dim=8, hidden_dim=8), **SLOTS),
        lambda: SlotMixture(**SLOTS),
    ],
    ids=["slots", "slots that read", "slots by sharp transport", "mixture"],
)
def test_a_decoder_without_inner_gradients(decoder):
    torch.manual_seed(0)
    loaded = of(PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8), decoder())
    program = torch.export.load(io.BytesIO(export_program(loaded))).module()
    for batch in (1, 5):
        assert_same(program, loaded.model, batch)


def test_a_few_other_sets_are_rounding_and_many_are_another_function():
    images = torch.arange(24, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)

    def model(images):
        return unit(images)[:, 0, :, :1]

    def other_below(pixel):
        return lambda images: model(images) + (model(images) * 255 < pixel - 0.5)

    assert _difference(model, model, images) == 0
    assert _difference(model, other_below(2), images) == 0
    assert _difference(model, other_below(6), images) == 1
    assert math.isnan(_difference(model, lambda images: model(images) / 0 * 0, images))


def test_a_program_of_another_function_is_refused(monkeypatch):
    torch.manual_seed(0)
    loaded = of(PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8), SlotAttention(**SLOTS))
    monkeypatch.setattr(programs, "unit", lambda images: images / 5)
    with pytest.raises(InputError, match="the exported program differs from the model by"):
        export_program(loaded)
