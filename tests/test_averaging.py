"""Averaged weights follow their recursion; validations and checkpoints have them, training does not."""

import lightning.pytorch as pl
import pytest
import torch
from tiny import built, equal

from setpred.checkpoint.load import TRAINED, load_checkpoint, read_checkpoint
from setpred.errors import InputError
from setpred.nn import batch_norms
from setpred.training.ema import EMA

SKIPPED = 6  # which step


class Watching(pl.Callback):
    """Records the trained weights after each step, and makes one step non-finite."""

    def __init__(self):
        self.weights, self.scores = [], []

    def on_train_start(self, trainer, module, *_):
        self.weights.append({name: value.detach().clone() for name, value in module.named_parameters()})

    on_train_batch_end = on_train_start

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == SKIPPED:
            batch["elements"][:] = torch.nan

    def on_train_epoch_end(self, trainer, module):
        for norm in batch_norms(module.model.encoder):
            norm.running_mean.fill_(1e3)  # a validation estimates its own
        scores = module.validate(trainer.val_dataloaders)
        self.scores.append((scores["val_loss"], float(trainer.callback_metrics["val_loss"])))


def trained(folder, data, *options):
    """Command line, callback and last.ckpt of ten steps."""
    options = [*options, "--model.on_not_finite=skip", "--model.learning_rate=0.01", f"--data.init_args.folder={data}"]
    cli = built(folder, *options)
    cli.trainer.callbacks.append(watching := Watching())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli, watching, cli.folder / "last.ckpt"


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("averaging") / "averaged"
    return trained(
        folder, tiny_data, "--trainer.callbacks=[{class_path: setpred.training.EMA, init_args: {decay: 0.6}}]"
    )


def test_the_average_is_the_recursion_over_the_steps_that_were_taken(averaged):
    cli, watching, path = averaged
    start, *steps = watching.weights
    assert equal(steps[SKIPPED], steps[SKIPPED - 1])
    expected = {name: value.double() for name, value in start.items()}
    for t, weights in enumerate(steps, 1):
        decay = min(0.6, (1 + t) / (10 + t))
        if t != SKIPPED + 1:
            expected = {name: decay * old + (1 - decay) * weights[name] for name, old in expected.items()}
    saved = read_checkpoint(path)["state_dict"]
    for name, value in expected.items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-5, atol=1e-7)
    assert equal(cli.model.state_dict(), saved)


def test_the_training_is_the_one_without(averaged, tmp_path, tiny_data):
    _, alone, path = trained(tmp_path / "alone", tiny_data)
    assert all(map(equal, averaged[1].weights, alone.weights))
    assert len(alone.weights) == 11
    kept = read_checkpoint(averaged[2])[TRAINED]
    assert equal(alone.weights[-1], {name: kept[name] for name in alone.weights[-1]})
    assert TRAINED not in read_checkpoint(path)


def test_validations_and_checkpoints_have_the_average(averaged):
    """With their own batch statistics, in the trainer's loop and by `validate`."""
    cli, watching, path = averaged
    model = load_checkpoint(path).model
    cli.datamodule.setup("fit")
    data = cli.datamodule.val_data.__getitems__(range(12))
    with torch.no_grad():
        loss = float(cli.model.loss(model(data["image"]), data["elements"]).mean())
    assert [loss, loss] == pytest.approx(watching.scores[-1], rel=1e-5)


def test_a_decay_of_1_is_an_error():
    with pytest.raises(InputError, match="decay: expected a number of at least 0 and below 1, got 1"):
        EMA(decay=1.0)
