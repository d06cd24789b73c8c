"""Exported programs give the model's predictions, for any batch, through inner gradients too."""

import io
import json

import pytest
import torch
from tiny import untrained
from torch import nn

from setpred.aggregators import FSPool, SetEncoder
from setpred.checkpoint import Checkpoint, load_checkpoint
from setpred.decoders import IDSPN, SlotAttention
from setpred.encoders import PositionedTokens, SmallCNN, SmallTrunk
from setpred.errors import InputError
from setpred.inner import GradientDescent, LatentMatching
from setpred.model import SetPredictor
from setpred.program import SCHEMA_FILE, export_program
from setpred.release import main
from setpred.schema import CLEVR, ElementSchema


def of(encoder, decoder):
    return Checkpoint(SetPredictor(encoder, decoder).eval(), CLEVR, 0, 0, 0, 16, {})


def assert_same(program, model, batch):
    images = torch.randint(256, (batch, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(images, index=torch.zeros(batch, dtype=torch.long))
    torch.testing.assert_close(program(images), expected, rtol=0, atol=1e-5)


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

    def forward(self, features):
        return features.new_zeros(features.shape[0], 4, CLEVR.set_dim)


def test_a_start_that_takes_something_else_is_a_sentence(tmp_path):
    loaded = load_checkpoint(untrained(tmp_path))
    loaded.model.decoder.start = StartOfOnesOwn()
    with pytest.raises(InputError, match=r"cannot export this model, with IDSPN: .*positional arguments"):
        export_program(loaded)


def test_a_descent_without_momentum():
    objective = LatentMatching(SetEncoder(FSPool(16, set_size=4), hidden_dim=16))
    descent = GradientDescent(iterations=3, clip=1.0)
    loaded = of(SmallCNN(image_size=16, latent_dim=16, width=4), IDSPN(objective, descent, set_size=4))
    program = torch.export.load(io.BytesIO(export_program(loaded))).module()
    for batch in (1, 5):
        assert_same(program, loaded.model, batch)


def test_a_decoder_without_inner_gradients():
    encoder = PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8)
    loaded = of(encoder, SlotAttention(set_size=4, token_dim=8, slot_dim=8, hidden_dim=8, iterations=2))
    program = torch.export.load(io.BytesIO(export_program(loaded))).module()
    for batch in (1, 5):
        assert_same(program, loaded.model, batch)
