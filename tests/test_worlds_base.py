"""Small worlds through the same training: sets in, sets out, other metrics, checkpoints."""

import numpy as np
import pytest
import torch
from torchmetrics import Metric

from setpred.aggregators import FSPool, SetEncoder, SumPool
from setpred.checkpoint import load as checkpoint
from setpred.commands.evaluate import evaluate
from setpred.commands.train import train
from setpred.data.toy import Multisets
from setpred.decoders import IDSPN, MLPDecoder, SlotAttention
from setpred.encoders import Elements, SmallCNN
from setpred.errors import InputError
from setpred.inner import Conditioned, GradientDescent, LatentMatching, Sum
from setpred.losses import HungarianLoss
from setpred.model import SetPredictor
from setpred.training.task import SetPrediction

CONFIG = """
model:
  schema: null
  encoder:
    class_path: setpred.aggregators.SetEncoder
    init_args:
      set_dim: 2
      hidden_dim: 8
      aggregator: {class_path: setpred.aggregators.FSPool, init_args: {in_dim: 8, set_size: 3}}
  decoder:
    class_path: setpred.decoders.MLPDecoder
    init_args: {set_size: 3, set_dim: 2, latent_dim: 8, hidden_dim: 16}
data:
  class_path: setpred.data.toy.Multisets
  init_args: {train_sets: 24, val_sets: 10, set_size: 3, set_dim: 2, batch_size: 8, eval_batch_size: 4}
trainer: {max_epochs: 2, accelerator: cpu, precision: 32-true, logger: false}
"""


def run(folder, *options, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(config)
    return train(["--config", str(folder / "small.yaml"), "--runs", str(folder), *options])


def conditional(size=4, classes=2):
    def encoder(set_dim):
        return SetEncoder(FSPool(8, set_size=size), set_dim=set_dim, hidden_dim=8)

    objective = Sum([Conditioned(LatentMatching(encoder(size + classes)))])
    return SetPredictor(encoder(classes), IDSPN(objective, GradientDescent(iterations=3), set_size=size, set_dim=size))


def test_examples_are_a_function_of_the_seed_alone():
    def made(seed, count=20):
        world = Multisets(train_sets=count, val_sets=5, batch_size=4, worlds_seed=seed, set_size=3, set_dim=2)
        world.setup()
        return world

    one, again, other = made(0), made(0), made(1)
    assert torch.equal(one.train_data.tensors["input"], again.train_data.tensors["input"])
    assert not torch.equal(one.train_data.tensors["input"], other.train_data.tensors["input"])
    assert not torch.equal(one.train_data.tensors["input"][:5], one.val_data.tensors["input"])
    assert one.train_data.tensors["input"].dtype == torch.float32
    assert one.input_dim == 2
    assert one.train_data.set_size == 3


def test_a_batch_is_the_examples_of_its_indices():
    data = Multisets(train_sets=20, val_sets=5, batch_size=4, set_size=3, set_dim=2)
    data.setup()
    batch = data.train_data.__getitems__([3, 0, 19])
    assert batch["index"].tolist() == [3, 0, 19]
    assert torch.equal(batch["input"][1], data.train_data.tensors["input"][0])
    assert torch.equal(batch["input"], batch["elements"])
    assert torch.equal(data.train_data[-1]["input"], data.train_data.tensors["input"][19])
    seen = [index for b in data.train_dataloader() for index in b["index"].tolist()]
    assert sorted(seen) == list(range(20))


def test_multisets_are_normal():
    rng = np.random.default_rng(0)
    world = Multisets(train_sets=4000, val_sets=1, batch_size=4, set_size=8, set_dim=4)
    values = world.examples("train", 4000, rng)["input"]
    assert values.shape == (4000, 8, 4)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


@pytest.mark.parametrize("numbers", [{"train_sets": 3}, {"val_sets": 0}, {"batch_size": 0}])
def test_too_few_sets_are_refused(numbers):
    with pytest.raises(InputError, match="expected at least one batch"):
        Multisets(**{"train_sets": 8, "val_sets": 4, "batch_size": 4} | numbers)


def test_trains_from_a_configuration_and_follows_the_loss(tmp_path):
    folder = run(tmp_path)
    content = checkpoint.read_checkpoint(folder / "best.ckpt")
    assert content[checkpoint.KEY]["schema"] is None
    callbacks = [state for name, state in content["callbacks"].items() if "val_loss" in name]
    assert float(callbacks[0]["best_model_score"]) > 0
    loaded = checkpoint.load_checkpoint(folder / "best.ckpt")
    assert loaded.schema is None
    assert loaded.model(torch.zeros(2, 3, 2)).shape == (2, 3, 2)
    with pytest.raises(InputError, match="small world"):
        evaluate([str(folder / "best.ckpt")])


def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path):
    whole = run(tmp_path / "whole")
    half = run(tmp_path / "half", "--trainer.max_epochs", "1")
    run(tmp_path / "half", "--resume", "last")
    ends = [checkpoint.read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (whole, half)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.encoder=setpred.encoders.SmallCNN", "--model.encoder.init_args.latent_dim=8"], "takes images"),
        (["--model.encoder.init_args.set_dim=3"], "elements of 3 numbers, the data has elements of 2"),
        (["--data.init_args.set_size=4"], "predicts sets of 3, the data has sets of 4"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_training(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, *options)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"gives a vector of 4 numbers.*takes a vector of 8"):
        SetPredictor(SumPool(4), MLPDecoder(latent_dim=8, set_size=2, set_dim=1))
    decoder = conditional().decoder
    with pytest.raises(InputError, match="conditioned on an input set"):
        SetPredictor(SmallCNN(image_size=16, latent_dim=8, width=2), decoder)


def test_a_conditional_decoder_sees_the_input_beside_each_element():
    torch.manual_seed(0)
    model = conditional().eval()
    sets = torch.eye(2)[torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]])]
    features = model.encode(sets)
    assert model.decoder.conditional
    expected = model.decoder(features, condition=sets)
    assert torch.equal(model(sets), expected)
    assert not torch.allclose(expected, model.decoder(features, condition=sets.flip(1)))
    assert torch.equal(list(model.refine(sets))[-1], expected)


def test_padding_of_an_input_set_has_no_influence():
    torch.manual_seed(0)
    vector = SetPredictor(
        SetEncoder(SumPool(8), set_dim=2, hidden_dim=8), MLPDecoder(latent_dim=8, set_size=2, set_dim=1)
    )
    tokens = SetPredictor(Elements(set_dim=2), SlotAttention(set_size=2, set_dim=3, token_dim=2, slot_dim=4))
    sets = torch.randn(3, 5, 2)
    mask = torch.arange(5).expand(3, -1) < torch.tensor([[2], [5], [3]])
    for model in (vector.eval(), tokens.eval()):
        clean, dirty = (sets.masked_fill(~mask.unsqueeze(-1), value) for value in (0.0, float("nan")))
        assert torch.equal(model(clean, mask=mask), model(dirty, mask=mask))
        alone = model(sets[:1, :2])
        torch.testing.assert_close(model(sets, mask=mask)[:1], alone)


class Mean(Metric):
    """Mean of the predictions; counts every example once."""

    monitor, mode = "mean", "max"

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, predicted, target):
        self.total += predicted.sum()
        self.count += predicted.numel()

    def compute(self):
        return {"mean": self.total / self.count}


def test_validate_scores_every_example_once():
    encoder = SetEncoder(FSPool(8, set_size=3), set_dim=2, hidden_dim=8)
    module = SetPrediction(
        encoder, MLPDecoder(latent_dim=8, set_size=3, set_dim=2, hidden_dim=16), schema=None, metric=Mean()
    )
    assert (module.monitor, module.mode) == ("val_mean", "max")
    data = Multisets(train_sets=8, val_sets=10, batch_size=4, set_size=3, set_dim=2)
    data.setup()
    module.train()
    scores = module.validate(data.val_dataloader())
    assert module.training
    whole = data.val_data.__getitems__(range(10))
    predicted = module.model(whole["input"]).detach()
    assert scores["val_mean"] == pytest.approx(float(predicted.mean()), rel=1e-5)
    assert scores["val_loss"] == pytest.approx(float(HungarianLoss()(predicted, whole["elements"]).mean()), rel=1e-5)
    assert module.validate(data.val_dataloader()) == scores  # nothing is left over from the time before
