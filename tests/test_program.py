"""Exported programs give the model's predictions, for any batch size, also through inner gradients."""

import io
import json

import numpy as np
import pytest
import torch
from tiny import untrained
from torch import nn

from setpred.aggregators import FSPool, SetEncoder
from setpred.checkpoint import Checkpoint, load_checkpoint
from setpred.checkpoint import torch_export as programs
from setpred.checkpoint.torch_export import SCHEMA_FILE, export_program
from setpred.commands.release import main
from setpred.data.scenes import render_records
from setpred.decoders import (
    IDSPN,
    MESH,
    FlowMatching,
    GaussianStart,
    GreedyVotes,
    SinkhornAttention,
    SlotAttention,
    SlotMixture,
)
from setpred.encoders import PositionedTokens, ResidualTrunk, SmallCNN, SmallTrunk, Votes
from setpred.errors import InputError
from setpred.inner import GradientDescent, LatentMatching, VotingEnergy
from setpred.model import SetPredictor
from setpred.schema import CLEVR, ElementSchema


class Read(nn.Module):
    """A start that depends on the features."""

    def __init__(self, dim, length):
        super().__init__()
        self.read = nn.Linear(dim, 4 * length)

    def forward(self, features):
        rows = features if features.ndim == 2 else features.mean(1)
        return self.read(rows).unflatten(-1, (4, -1))


def descent(momentum=0.0, **options):
    objective = LatentMatching(SetEncoder(FSPool(16, set_size=4), hidden_dim=16, set_dim=CLEVR.set_dim))
    steps = GradientDescent(iterations=3, momentum=momentum, clip=None if momentum else 1.0)
    return SmallCNN(image_size=16, latent_dim=16, width=4), IDSPN(
        objective, steps, set_size=4, set_dim=CLEVR.set_dim, **options
    )


def voting():
    tokens = PositionedTokens(ResidualTrunk(image_size=16, widths=(4, 8), blocks=1), token_dim=None)
    encoder = Votes(tokens, precise=3, hidden_dim=8, set_dim=CLEVR.set_dim)
    with torch.no_grad():  # different tokens, as trained ones: rounding does not choose the heaviest
        encoder.network[-1].weight *= 20
    start = GreedyVotes(4, CLEVR.set_dim, weights=[4, 4, 4])
    energy = VotingEnergy(precise=3, weights=[4, 4, 4], set_dim=CLEVR.set_dim)
    return encoder, IDSPN(energy, GradientDescent(iterations=4), set_size=4, start=start, set_dim=CLEVR.set_dim)


def slots(kind=SlotAttention, *parts, **options):
    sizes = {"set_size": 4, "set_dim": CLEVR.set_dim, "token_dim": 8, "slot_dim": 8, "hidden_dim": 8, "iterations": 2}
    return PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8), kind(*parts, **sizes, **options)


def flow_matching():
    torch.manual_seed(0)
    sizes = {"set_size": 4, "set_dim": CLEVR.set_dim, "token_dim": 8, "dim": 8, "heads": 2, "hidden_dim": 8}
    tokens = PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8)
    return tokens, FlowMatching(layers=1, iterations=3, **sizes)


MODELS = {
    "descent": descent,
    "momentum and a fixed start": lambda: descent(0.9, start=GaussianStart(4, CLEVR.set_dim, seed=3)),
    "momentum and a start from features": lambda: descent(0.9, start=Read(16, CLEVR.set_dim)),
    "voting": voting,
    "flow matching": flow_matching,
    "slots from tokens": lambda: slots(start=Read(8, 8)),
    "mixture": lambda: slots(SlotMixture),
    "mesh": lambda: slots(SlotAttention, SinkhornAttention(MESH(), dim=8, hidden_dim=8)),
}


def loaded_of(encoder, decoder):
    return Checkpoint(SetPredictor(encoder, decoder).eval(), CLEVR, 0, 0, 0, 16, {})


def assert_same(program, model, batch):
    """Compare for scenes and black-and-white images, each as bytes and as floats in [0, 1]."""
    scenes = np.stack([r.image for r in render_records(range(batch), seed=7, image_size=16, objects=(3, 6))])
    images = torch.from_numpy(scenes).permute(0, 3, 1, 2)
    for some in (images, (images > 128).byte()):
        with torch.no_grad():
            expected = model(some)
        torch.testing.assert_close(program(some), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(program(some / 255), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*list(MODELS)[:-1], pytest.param("mesh", marks=pytest.mark.slow)])
def test_a_program_predicts_as_its_model(name):
    torch.manual_seed(0)
    loaded = loaded_of(*MODELS[name]())
    program = torch.export.load(io.BytesIO(export_program(loaded))).module()
    for batch in (1, 5):
        assert_same(program, loaded.model, batch)


def test_the_command_writes_a_program_of_torch_alone(tmp_path, capsys):
    path, out = untrained(tmp_path), tmp_path / "deep" / "tiny.pt2"
    assert main([str(path), "--export", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    extra = {SCHEMA_FILE: ""}
    exported = torch.export.load(out, extra_files=extra)
    assert ElementSchema.from_dict(json.loads(extra[SCHEMA_FILE])).differences(CLEVR) == ""
    targets = [node.target for node in exported.graph.nodes if node.op != "placeholder"]
    assert {type(target).__module__.split(".")[0] for target in targets} <= {"torch", "builtins"}
    assert_same(exported.module(), load_checkpoint(path).model, 40)


def test_models_that_cannot_be_exported_are_rejected():
    encoder, decoder = descent()
    # reads a number out of a tensor, which no tracer follows
    decoder.objective.register_forward_hook(lambda part, given, value: value * float(value.detach().sum()))
    with pytest.raises(InputError, match="cannot export this model, with IDSPN: "):
        export_program(loaded_of(encoder, decoder))


def test_a_program_of_another_function_is_rejected(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(programs, "unit", lambda images: images / 5)
    with pytest.raises(InputError, match="the exported program differs from the model by"):
        export_program(loaded_of(*slots()))
