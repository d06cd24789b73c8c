"""Models built in Python are saved as files that every command reads, or the error names the part that cannot be."""

import json
from contextlib import nullcontext

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUIET
from torch import nn
from torch.utils.data import DataLoader

from setpred import CLEVR, decoders
from setpred.aggregators import FSPool, SetEncoder
from setpred.checkpoint import describe, load_checkpoint, save_model
from setpred.checkpoint.load import KEY, read_checkpoint, save_checkpoint, training_loss
from setpred.commands.evaluate import evaluate
from setpred.commands.predict import run as predict
from setpred.commands.release import main as release
from setpred.data.dataset import SetFile, as_batch
from setpred.data.scenes import render_file
from setpred.decoders import DETR, IDSPN, MESH, GaussianStart, GreedyVotes, SetDecoder, SinkhornAttention, SlotAttention
from setpred.encoders import Elements, PositionedTokens, ResidualTrunk, SinePosition, SmallCNN, SmallTrunk, Votes
from setpred.errors import InputError
from setpred.evaluation import for_evaluation
from setpred.inner import (
    ConjugateGradient,
    GradientDescent,
    Implicit,
    LatentMatching,
    Proximity,
    Simplex,
    Sum,
    VotingEnergy,
)
from setpred.losses import ChamferLoss, HungarianLoss
from setpred.metrics import AveragePrecision
from setpred.model import SetPredictor
from setpred.nn import recorded
from setpred.training import SetPrediction

SIDE = 16
SIZES = {"set_size": 4, "set_dim": CLEVR.set_dim}
SLOTS = SIZES | {"token_dim": 8, "slot_dim": 8, "hidden_dim": 8}


@recorded
class OwnDecoder(SetDecoder):
    """A part of a user, with options that need not have names."""

    def __init__(self, scale, **sizes):
        super().__init__(latent_dim=16, **sizes)
        self.scale, self.head = scale, nn.Linear(16, 4 * CLEVR.set_dim)

    def predictions(self, features, mask, iterations):
        yield self.scale * self.head(features).unflatten(-1, (4, -1))


class Undecorated(decoders.MLPDecoder):
    """Its own arguments differ from those of its base."""

    def __init__(self, width):
        super().__init__(latent_dim=16, hidden_dim=width, **SIZES)


def image(latent_dim=16):
    return SmallCNN(image_size=SIDE, latent_dim=latent_dim, width=4)


def tokens():
    return PositionedTokens(SmallTrunk(image_size=SIDE, width=4), token_dim=8)


def voting():
    encoder = Votes(PositionedTokens(ResidualTrunk(image_size=SIDE, widths=(4, 8), blocks=1), token_dim=None),
                    precise=3, hidden_dim=8, set_dim=CLEVR.set_dim)  # fmt: skip
    start = GreedyVotes(4, CLEVR.set_dim, weights=torch.ones(3).tolist())
    return encoder, IDSPN(VotingEnergy(precise=3, set_dim=CLEVR.set_dim), GradientDescent(iterations=4), start=start,
                          **SIZES)  # fmt: skip


def descent(*differentiation, **options):
    objective = Sum([LatentMatching(SetEncoder(FSPool(16, set_size=4), hidden_dim=16, set_dim=CLEVR.set_dim)),
                     Proximity(weight=0.2)])  # fmt: skip
    return IDSPN(objective, GradientDescent(iterations=3, **options), *differentiation, **SIZES)


MODELS = {
    "IDSPN": lambda: (image(), descent(Implicit(ConjugateGradient(iterations=3)), momentum=0.9)),
    "IDSPN projected": lambda: (image(), descent(projection=Simplex(), learned=True)),
    "IDSPN of votes": voting,
    "SlotAttention": lambda: (tokens(), SlotAttention(**SLOTS, start=GaussianStart(4, 8, seed=3))),
    "SlotAttention with MESH": lambda: (
        tokens(),
        SlotAttention(SinkhornAttention(MESH(seed=5), dim=8, hidden_dim=8), **SLOTS),
    ),
    "SlotMixture": lambda: (tokens(), decoders.SlotMixture(**SLOTS)),
    "DETR": lambda: (tokens(), DETR(SinePosition(), token_dim=8, dim=8, heads=2, encoder_layers=1,
                                    decoder_layers=2, hidden_dim=8, dropout=0.1, **SIZES)),
    "Seq2Set": lambda: (tokens(), decoders.Seq2Set(token_dim=8, hidden_dim=8, embedding_dim=8, **SIZES)),
    "MLPDecoder": lambda: (image(), decoders.MLPDecoder(latent_dim=16, hidden_dim=8, **SIZES)),
    "BiLSTMDecoder": lambda: (image(), decoders.BiLSTMDecoder(latent_dim=16, hidden_dim=8, **SIZES)),
    "TransformerDecoder": lambda: (
        image(),
        decoders.TransformerDecoder(latent_dim=16, dim=8, heads=2, layers=1, hidden_dim=8, **SIZES),
    ),
    "SpatialBroadcast": lambda: (
        tokens(),
        decoders.SpatialBroadcast(SlotAttention(**SLOTS), side=2, widths=[4], smoothing=0),
    ),
    "Glimpses": lambda: (tokens(), decoders.Glimpses(SlotAttention(**SLOTS), canvas=8, side=2, widths=[4])),
    "Readout": lambda: (tokens(), decoders.Readout(SlotAttention(**SLOTS), set_dim=CLEVR.set_dim)),
    "FlowMatching": lambda: (tokens(), decoders.FlowMatching(token_dim=8, dim=8, heads=2, hidden_dim=8, **SIZES)),
    "OwnDecoder": lambda: (image(), OwnDecoder(0.5, **SIZES)),
}  # fmt: skip
OF_SETS = {"DeepSets", "ElementBiLSTM", "ElementTransformer", "EqMotion"}


def test_every_family_of_decoders_is_among_the_models():
    families = {name for name in decoders.__all__ if issubclass(getattr(decoders, name), SetDecoder)}
    assert families - {"SetDecoder", "SlotReader"} - OF_SETS <= {name.split()[0] for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_predicts_the_same_bit_by_bit(name, tmp_path):
    torch.manual_seed(1)
    model, path = SetPredictor(*MODELS[name]()), tmp_path / "model.ckpt"
    with torch.no_grad():  # trained weights and statistics, which building anew does not give
        for value in filter(torch.is_floating_point, model.state_dict().values()):
            value.add_(0.01 * torch.rand_like(value))
    before = torch.get_rng_state()
    schema = None if name in ("SpatialBroadcast", "Glimpses") else CLEVR  # whose elements are layers
    save_model(path, model, schema)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    loaded = load_checkpoint(path, allow=[f"{__name__}.OwnDecoder"] * (name == "OwnDecoder"))
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    assert torch.equal(loaded.model(images), model.eval()(images))
    assert (loaded.schema, loaded.image_size) == (schema, SIDE)


@pytest.mark.parametrize("name", sorted(OF_SETS))
def test_a_model_of_sets_is_saved_as_well(name, tmp_path):
    part = getattr(decoders, name)
    sizes = {"heads": 2, "encoder_layers": 1, "decoder_layers": 1} if name == "ElementTransformer" else {"layers": 1}
    sizes |= {"dim": 1} if name == "EqMotion" else {}
    model = SetPredictor(Elements(set_dim=3), part(token_dim=3, set_dim=2, hidden_dim=8, **sizes))
    save_model(tmp_path / "model.ckpt", model, None)
    given = torch.rand(2, 5, 3)
    assert torch.equal(load_checkpoint(tmp_path / "model.ckpt").model(given), model.eval()(given))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.h5"
    render_file(path, images=6, image_size=SIDE, objects=(3, 4))
    return path


def test_commands_read_a_saved_model_and_its_release(data, tmp_path):
    torch.manual_seed(0)
    path, small = tmp_path / "model.ckpt", tmp_path / "model.safetensors"
    save_model(path, SetPredictor(*voting()), CLEVR)
    assert release([str(path), "--out", str(small)]) == 0
    for each in (path, small):
        assert evaluate([str(each), "--data", str(data)])["images"] == 6
    Image.fromarray(SetFile(data)[0]["image"].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    predict([str(path), str(tmp_path / "a.png"), "--out", str(tmp_path / "p.json"), "--threshold", "0"])
    assert len(json.loads((tmp_path / "p.json").read_text())[0]["objects"]) == 4


def changed():
    model = SetPredictor(*MODELS["IDSPN"]())
    model.decoder.descent.iterations = 9
    return model


def other_class():
    class Local(SmallCNN):
        pass

    return SetPredictor(Local(image_size=SIDE, latent_dim=16, width=4), OwnDecoder(1.0, **SIZES))


def broken():
    model = SetPredictor(*MODELS["MLPDecoder"]())
    torch.nn.init.constant_(next(model.parameters()), float("nan"))
    return model


UNSAVED = {
    "undecorated": (lambda: SetPredictor(image(), Undecorated(8)), r"decoder: the arguments that .*Undecorated was"),
    "tensor": (
        lambda: SetPredictor(image(), OwnDecoder(torch.ones(1), **SIZES)),
        r"decoder\.scale: expected a part .*, got tensor",
    ),
    "function": (lambda: SetPredictor(image(), OwnDecoder(len, **SIZES)), r"decoder\.scale: expected a part .*len"),
    "layer": (lambda: SetPredictor(image(), OwnDecoder(nn.ReLU(), **SIZES)), r"decoder\.scale: expected a part .*ReLU"),
    "changed": (changed, "the model differs from one that is built again"),
    "not importable": (other_class, "encoder: expected a class that other programs can import"),
    "not finite": (broken, "has non-finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAVED)
def test_a_model_that_a_file_cannot_hold_is_an_error_and_no_file(case, tmp_path):
    make, message = UNSAVED[case]
    with pytest.raises(InputError, match=message):
        save_model(tmp_path / "model.ckpt", make(), CLEVR, image_size=SIDE)
    assert list(tmp_path.iterdir()) == []


def test_a_release_s_name_and_a_missing_size_are_errors(tmp_path):
    with pytest.raises(InputError, match="got a name of releases"):
        save_model(tmp_path / "model.safetensors", SetPredictor(*voting()), CLEVR)
    model = SetPredictor(tokens(), MODELS["DETR"]()[1])
    model.encoder.image_size = None
    with pytest.raises(InputError, match="expected an image_size"):
        save_model(tmp_path / "model.ckpt", model, CLEVR)


# --- training in Python -----------------------------------------------------------------------------------------------


def fit(module, data, folder):
    loader = DataLoader(SetFile(data, set_size=4), batch_size=3, collate_fn=as_batch)
    trainer = pl.Trainer(max_epochs=1, default_root_dir=folder, **QUIET)
    trainer.fit(module, loader)
    trainer.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt"


def test_a_training_in_python_saves_checkpoints_that_load(data, tmp_path, capsys):
    module = SetPrediction(image(), descent(), loss=ChamferLoss(weights={"coords": 2.0}))
    path = fit(module, data, tmp_path)
    assert "will not read" not in capsys.readouterr().out
    loaded, images = load_checkpoint(path), torch.rand(2, 3, SIDE, SIDE)
    # in one memory format: another one rounds otherwise
    assert torch.equal(*(for_evaluation(model, torch.device("cpu"))(images) for model in (loaded.model, module.model)))
    loss = training_loss(read_checkpoint(path), [])
    assert (type(loss), loss.group_weights) == (ChamferLoss, {"coords": 2.0})


def test_a_training_whose_checkpoints_will_not_load_says_so_at_its_start(data, tmp_path, capsys):
    class Own(HungarianLoss):
        pass

    path = fit(SetPrediction(image(), Undecorated(8), loss=Own()), data, tmp_path)
    said = capsys.readouterr().out
    assert said.count("will not read the checkpoints of this training: decoder: the arguments that") == 1
    with pytest.raises(InputError, match="does not say how its model is built"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="expected a class path as the checkpoint's loss, got 'Own'"):
        training_loss(read_checkpoint(path), [])


# --- what the numbers mean ------------------------------------------------------------------------------------------


def test_schemas_of_model_metric_and_data_are_one(data, tmp_path):
    """Of the same length in other units: scores would be wrong in silence."""
    other = CLEVR.to_dict()
    other["fields"][0]["scale"] = 100.0
    assert SetPrediction(image(), descent(), metric=AveragePrecision(), schema=other).metric.schema.to_dict() == other
    with pytest.raises(InputError, match="metric AveragePrecision is of schema 'clevr', the model of 'clevr': field"):
        SetPrediction(image(), descent(), metric=AveragePrecision(schema=CLEVR), schema=other)
    with pytest.raises(InputError, match="the model is of schema 'clevr', the data of 'clevr': field 'coords'"):
        fit(SetPrediction(image(), descent(), schema=other), data, tmp_path)
    with pytest.raises(InputError, match="expected a schema"):
        AveragePrecision().update(torch.zeros(1, 4, CLEVR.set_dim), torch.zeros(1, 4, CLEVR.set_dim))


@pytest.mark.parametrize(
    ("name", "advice"), [("IDSPN", "a `weight` times the size"), ("SlotAttention with MESH", "train")]
)
def test_checkpoints_of_parts_that_computed_something_else_warn(name, advice, tmp_path):
    path, warning = tmp_path / "model.ckpt", f"may predict other sets than when it was trained: .*{advice}"
    for parts, warns in ((MODELS[name](), pytest.warns(UserWarning, match=warning)), (voting(), nullcontext())):
        save_model(path, SetPredictor(*parts), CLEVR)
        load_checkpoint(path)  # without a warning, which would be an error
        content = read_checkpoint(path)
        del content[KEY]["revision"]
        save_checkpoint(content, path)
        with warns:
            load_checkpoint(path)


def test_a_description_is_of_plain_types():
    config = describe.describe(GaussianStart(np.int64(4), 8, seed=np.int64(3)), "start")
    assert config == {
        "class_path": "setpred.decoders.GaussianStart",
        "init_args": {"set_size": 4, "set_dim": 8, "seed": 3},
    }
    assert all(type(value) is int for value in config["init_args"].values())
