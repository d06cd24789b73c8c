"""Numbers that break: found where they do, repeated from a file, and stop, skip and sanitise do what they say."""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from tiny import CONFIG as TINY
from torch import nn
from torch.utils.data import DataLoader

from setpred import evaluation
from setpred.checkpoint.allowlist import allowed_classes
from setpred.checkpoint.load import build, read_checkpoint
from setpred.commands import predict
from setpred.commands.replay import main as replay
from setpred.commands.train import build as command_line
from setpred.decoders.starts import RandomStart
from setpred.errors import InputError, NotFiniteError
from setpred.inner import GradientDescent
from setpred.inner.diagnostics import residual_growth
from setpred.losses import HungarianLoss
from setpred.model import Step
from setpred.nonfinite import policy as guard
from setpred.nonfinite.locate import diagnose
from setpred.schema import CLEVR
from setpred.training import task as training
from setpred.training.callbacks import MetricsFile, NotFiniteCounts, ResidualGrowth, TrainLoss
from setpred.training.task import SetPrediction

BATCH, STEPS = 8, 3  # of an epoch
BROKEN, SAMPLE = 4, 2  # the step and the sample of its batch that break
MARK = 7.0  # in a target: the losses below break there

CONFIG = {
    "encoder": {
        "class_path": "setpred.encoders.SmallCNN",
        "init_args": {"image_size": 16, "latent_dim": 16, "width": 4},
    },
    "decoder": {
        "class_path": "setpred.decoders.IDSPN",
        "init_args": {
            "set_size": 4,
            "objective": {
                "class_path": "setpred.inner.LatentMatching",
                "init_args": {
                    "set_encoder": {
                        "class_path": "setpred.aggregators.SetEncoder",
                        "init_args": {
                            "hidden_dim": 16,
                            "aggregator": {
                                "class_path": "setpred.aggregators.FSPool",
                                "init_args": {"in_dim": 16, "set_size": 4},
                            },
                        },
                    }
                },
            },
            "descent": {"class_path": "setpred.inner.GradientDescent", "init_args": {"iterations": 5, "momentum": 0.9}},
        },
    },
}


class SteepLoss(HungarianLoss):
    """Finite, but without a gradient for marked samples."""

    def forward(self, predicted, target):
        losses = super().forward(predicted, target)
        marked = (target[:, 0, 0] == MARK).nonzero().flatten()
        return losses.index_add(0, marked, (predicted[marked] * 0).sum((1, 2)).sqrt())


class OverflowingLoss(HungarianLoss):
    """The matching cost of marked samples overflows."""

    def forward(self, predicted, target):
        marked = (target[:, 0, 0] == MARK).view(-1, 1, 1)
        return super().forward(torch.where(marked, predicted * 1e38 * 1e38, predicted), target)


class ForgivingLoss(nn.Module):
    """Finite, whatever it is given."""

    def forward(self, predicted, target):
        return (predicted.nan_to_num(0, 0, 0) - target.nan_to_num(0, 0, 0)).square().mean((1, 2))


class Images(pl.LightningDataModule):
    """Images of floats, which can be broken, unlike those of bytes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.examples = [
            {
                "image": torch.rand(3, 16, 16, generator=generator),
                "elements": torch.rand(4, CLEVR.set_dim, generator=generator).round(decimals=1),
                "index": torch.tensor(100 + i),
            }
            for i in range(STEPS * BATCH)
        ]

    def train_dataloader(self):
        return DataLoader(self.examples, BATCH)

    def val_dataloader(self):
        return DataLoader(self.examples[:BATCH], BATCH)


class At(pl.Callback):
    """Does something to the batch or the model when the step begins, and something when the gradient is there."""

    def __init__(self, begin=None, gradient=None, step=BROKEN):
        self.begin, self.gradient, self.step = begin, gradient, step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step and self.begin:
            self.buffers = [value.clone() for value in module.buffers()]
            self.begin(module, batch)

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step and self.gradient:
            self.gradient(self, module)


class Recorder(pl.Callback):
    """What each step leaves: weights and buffers, the optimiser's numbers, the learning rate."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        state = {name: value.clone() for name, value in module.state_dict().items()}
        self.after.append((state, moments, optimizer.param_groups[0]["lr"]))


def module_of(policy="stop", loss=None, descent=None):
    torch.manual_seed(0)
    config = {name: dict(part) for name, part in CONFIG.items()}
    if descent:
        arguments = config["decoder"]["init_args"]
        config["decoder"]["init_args"] = arguments | {"descent": {**arguments["descent"], "init_args": descent}}
    parts = {name: build(part, allowed_classes()) for name, part in config.items()}
    module = SetPrediction(**parts, loss=loss and loss(), learning_rate=0.01, on_not_finite=policy)
    module.model_config, module.seed = config, 5
    module.settings = {"model": {"loss": loss and {"class_path": f"{__name__}.{loss.__name__}"}}}
    return module


def run(folder, *callbacks, policy="stop", epochs=2, resume=None, processes=1, precision="32-true", **changes):
    """A training of 3 steps an epoch; returns module and `Recorder`, also of one that ended in an error, with it."""
    module, recorder, error = module_of(policy, **changes), Recorder(), None
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=processes,
        precision=precision,
        strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[*callbacks, recorder, TrainLoss(), NotFiniteCounts(), MetricsFile(folder / "metrics.csv")],
    )
    try:
        trainer.fit(module, datamodule=Images(), ckpt_path=resume, weights_only=True)
    except InputError as raised:
        error = str(raised)
    return module, recorder, error


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same(one, other):
    return all(
        torch.equal(a, b) for a, b in zip((*one[0].values(), *one[1]), (*other[0].values(), *other[1]), strict=True)
    ) and (one[2] == other[2])


def written(folder):
    return sorted(path.name for path in folder.glob("repro*"))


# --- what breaks ----------------------------------------------------------------------------------------------------


def broken_image(module, batch, value=torch.nan):
    batch["image"][SAMPLE, 1, 3, 3] = value


def broken_target(module, batch, value=torch.nan):
    batch["elements"][SAMPLE, 1, 0] = value


def marked_target(module, batch):
    batch["elements"][SAMPLE, 0, 0] = MARK


def broken_weight(module, batch):
    with torch.no_grad():
        module.model.decoder.objective.set_encoder.aggregator.weight.view(-1)[3] = torch.nan


def broken_statistics(module, batch):
    next(value for name, value in module.named_buffers() if "running_mean" in name)[0] = torch.inf


class BreakingDescent:
    """Patches the descent's step: at iteration 3 of whole batches, in the step that is to break, a sample overflows."""

    def __init__(self, monkeypatch):
        self.now = False
        step = GradientDescent.step

        def patched(descent, state, gradient):
            after = step(descent, state, gradient)
            self.count = 1 if state.velocity is None else self.count + 1
            if self.now and self.count == 3 and len(after.iterate) == BATCH:
                after.iterate[SAMPLE, 0, 0] = torch.inf
            return after

        monkeypatch.setattr(GradientDescent, "step", patched)

    def __call__(self, module, batch):
        self.now = True

    def on_train_batch_end(self):
        self.now = False


FAULTS = {
    "image NaN": (broken_image, None, "the image is not finite in samples 2 ", "look at these images"),
    "image infinite": (
        partial(broken_image, value=torch.inf),
        None,
        "the image is not finite in samples 2 ",
        "look at these images",
    ),
    "target NaN": (broken_target, None, "the target is not finite in samples 2 ", "look at the elements"),
    "target infinite": (
        partial(broken_target, value=-torch.inf),
        None,
        "the target is not finite in samples 2 ",
        "look at the elements",
    ),
    "weight": (broken_weight, None, "the weights are not finite (model.decoder.objective.", "an earlier checkpoint"),
    "cost": (marked_target, OverflowingLoss, "the matching cost is not finite in samples 2 ", "lower model.learning"),
    "gradient": (marked_target, SteepLoss, "the gradient is not finite (of model.", "skip or sanitise"),
    "descent": (None, None, "the inner descent is not finite from iteration 3 on in samples 2 ", "lower the learning"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run in which nothing breaks."""
    folder = tmp_path_factory.mktemp("plain")
    module, recorder, error = run(folder)
    assert error is None
    assert len(recorder.after) == 2 * STEPS
    return module, recorder, rows(folder)


def begin_of(name, monkeypatch):
    begin, loss, *said = FAULTS[name]
    return (BreakingDescent(monkeypatch) if name == "descent" else begin), loss, said


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_stops_is_located_and_repeated_from_its_file(name, tmp_path, plain, monkeypatch, capsys):
    """With the weights of the last good step, and the same again by the command."""
    begin, loss, (said, advice) = begin_of(name, monkeypatch)
    module, recorder, error = run(tmp_path, At(begin), loss=loss)
    assert error.startswith(f"step {BROKEN} (epoch 1): {said}")
    assert advice in error
    if name not in ("weight",):
        assert f"data indices {100 + BATCH + SAMPLE}" in error
        assert all(torch.equal(v, plain[1].after[BROKEN - 1][0][k]) for k, v in module.state_dict().items())
    assert len(recorder.after) == BROKEN
    assert all(same(ours, theirs) for ours, theirs in zip(recorder.after, plain[1].after, strict=False))
    path = tmp_path / f"repro-step-{BROKEN}.pt"
    assert str(path) in error
    capsys.readouterr()
    assert replay([str(path), "--device", "cpu", "--allow", f"{__name__}.{loss.__name__ if loss else 'At'}"]) == 0
    printed = capsys.readouterr().out
    assert "NOT FINITE" in printed
    assert f"reproduced: {said}" in printed
    if name == "descent":
        assert "(norm of the iterate " in error
        assert "and of the residual " in error
        assert "inner descent, iterate 2" in printed
        begin.now = False  # as on a machine where the descent does not break
        assert replay([str(path), "--device", "cpu"]) == 1
        assert "not reproduced: in the training the inner descent" in capsys.readouterr().out


def hidden_weight(module, batch):
    module.model.decoder.spare = nn.Parameter(torch.tensor([1.0, torch.inf]))


HIDDEN = {
    "image": broken_image,
    "target": broken_target,
    "inner descent": None,
    "weights": hidden_weight,
}


@pytest.mark.parametrize("place", HIDDEN)
def test_what_the_loss_does_not_show_is_found(place, tmp_path, monkeypatch):
    begin = HIDDEN[place] or BreakingDescent(monkeypatch)
    _, recorder, error = run(tmp_path, At(begin), loss=ForgivingLoss)
    assert error.startswith(f"step {BROKEN} (epoch 1): the {place} {'are' if place == 'weights' else 'is'} not finite")
    assert len(recorder.after) == BROKEN


class DrawnStart(RandomStart):
    """Where the descent starts is broken in one sample, by chance."""

    def forward(self, features):
        start = super().forward(features)
        return start.index_fill(0, start[:, 0, 0].argmax(), torch.inf)


def test_what_is_random_is_repeated_too():
    """And drawn on as if nothing had been repeated."""
    module = module_of().train()
    module.model.decoder.start = DrawnStart(4, CLEVR.set_dim)
    batch = torch.utils.data.default_collate(Images().examples[:BATCH])
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        chosen = int(torch.randn(BATCH, 4, CLEVR.set_dim)[:, 0, 0].argmax())
        torch.rand(3)
        before = torch.get_rng_state()
        fault, _ = diagnose(Step(module.model, module.loss, batch, seed))
        assert torch.equal(torch.get_rng_state(), before)
        assert (fault.place, fault.iteration, fault.samples) == ("inner descent", 0, [chosen])
        found.append(chosen)
    assert len(set(found)) > 1


def test_a_descent_that_diverges_is_located(tmp_path):
    """Without anything patched: every sample, in the first step, as the file repeats."""
    descent = {"iterations": 8, "learning_rate": 1e14}
    _, recorder, error = run(tmp_path, descent=descent)
    assert not recorder.after
    assert "the inner descent is not finite from iteration 4 on in samples 0, 1, 2, 3, 4, 5, 6, 7 of" in error
    assert "lower the learning_rate or momentum of the decoder's descent" in error
    assert replay([str(tmp_path / "repro-step-0.pt"), "--device", "cpu"]) == 0


def untouched(module, batch):
    """Nothing is broken."""


def nothing(at, module):
    """The step does nothing."""
    for parameter in module.parameters():
        parameter.grad = None
    for buffer, before in zip(module.buffers(), at.buffers, strict=True):
        buffer.copy_(before)


@pytest.fixture(scope="module")
def without_step(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without-step")
    return run(folder, At(untouched, nothing))[1], rows(folder)


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "weight"])
def test_a_skipped_step_is_one_that_did_nothing(name, tmp_path, plain, without_step, monkeypatch, capsys):
    """Bit by bit: weights, momentum, running statistics, learning rates, validations; it is counted and said."""
    begin, loss, (said, _) = begin_of(name, monkeypatch)
    ending = [Ending(begin)] if name == "descent" else []
    _, recorder, error = run(tmp_path, At(begin), *ending, policy="skip", loss=loss)
    assert error is None
    twin, table = without_step
    assert same(recorder.after[BROKEN - 1], plain[1].after[BROKEN - 1])
    assert not same(recorder.after[BROKEN], plain[1].after[BROKEN])
    assert all(same(ours, theirs) for ours, theirs in zip(recorder.after, twin.after, strict=True))
    ours = rows(tmp_path)
    assert [row["skipped_batches"] for row in ours] == ["0.0", "1.0"]
    assert [row["val_loss"] for row in ours] == [row["val_loss"] for row in table]
    assert ours[0]["train_loss"] == table[0]["train_loss"]
    assert written(tmp_path) == [f"repro-step-{BROKEN}.pt"]
    assert f"skipped (1 so far): step {BROKEN} (epoch 1): {said}" in capsys.readouterr().out


class Ending(pl.Callback):
    def __init__(self, fault):
        self.fault = fault

    def on_train_batch_end(self, *_):
        self.fault.now = False


def rest(module, batch):
    """The samples that are whole."""
    kept = [sample for sample in range(BATCH) if sample != SAMPLE]
    for name, value in batch.items():
        batch[name] = value[kept]


@pytest.fixture(scope="module")
def of_the_rest(tmp_path_factory):
    return run(tmp_path_factory.mktemp("of-the-rest"), At(rest))[1]


@pytest.mark.parametrize("name", ["image NaN", "image infinite", "target NaN", "cost", "descent"])
def test_a_sanitised_step_is_one_on_the_other_samples(name, tmp_path, of_the_rest, monkeypatch, capsys):
    begin, loss, (said, _) = begin_of(name, monkeypatch)
    ending = [Ending(begin)] if name == "descent" else []
    _, recorder, error = run(tmp_path, At(begin), *ending, policy="sanitise", loss=loss)
    assert error is None
    assert all(same(ours, theirs) for ours, theirs in zip(recorder.after, of_the_rest.after, strict=True))
    last = rows(tmp_path)[-1]
    assert (last["sanitised_samples"], last["skipped_batches"]) == ("1.0", "0.0")
    assert f"1 samples are left out: step {BROKEN} (epoch 1): {said}" in capsys.readouterr().out


def gradient_entry(value, at, module):
    next(module.parameters()).grad[0] = value


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_entries_of_a_gradient_that_are_not_finite_count_as_zero(value, tmp_path, capsys):
    """Those too large to be squared, too: the optimiser would keep an infinite moment for ever."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    _, recorder, error = run(tmp_path / "a", At(gradient=partial(gradient_entry, value)), policy="sanitise")
    _, twin, _ = run(tmp_path / "b", At(gradient=partial(gradient_entry, 0.0)))
    assert error is None
    assert all(same(ours, theirs) for ours, theirs in zip(recorder.after, twin.after, strict=True))
    assert rows(tmp_path / "a")[-1]["sanitised_gradients"] == "1.0"
    # put there from outside, no repeat of the step shows it
    assert "which a repeat of the step does not show" in capsys.readouterr().out
    assert replay([str(tmp_path / "a" / f"repro-step-{BROKEN}.pt"), "--device", "cpu"]) == 1
    assert "here all is finite" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["image", "gradient"])
def test_where_sanitising_leaves_nothing_the_step_is_skipped(name, tmp_path, without_step):
    def all_images(module, batch):
        batch["image"][:] = torch.nan

    def all_entries(at, module):
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)

    at = At(all_images) if name == "image" else At(untouched, all_entries)
    _, recorder, error = run(tmp_path, at, policy="sanitise")
    assert error is None
    assert all(same(ours, theirs) for ours, theirs in zip(recorder.after, without_step[0].after, strict=True))
    last = rows(tmp_path)[-1]
    assert (last["skipped_batches"], last["sanitised_samples"], last["sanitised_gradients"]) == ("1.0", "0.0", "0.0")


@pytest.mark.parametrize("policy", ["skip", "sanitise"])
@pytest.mark.parametrize("begin", [broken_weight, broken_statistics])
def test_broken_weights_stop_under_every_policy(policy, begin, tmp_path):
    _, recorder, error = run(tmp_path, At(begin), policy=policy)
    if begin is broken_statistics:  # no training step looks at them, the validation does
        assert "the weights are not finite (model.encoder." in error
        return
    assert error.startswith(f"step {BROKEN} (epoch 1): the weights are not finite (model.decoder")
    assert len(recorder.after) == BROKEN


@pytest.mark.parametrize("policy", ["skip", "sanitise"])
def test_too_many_skipped_in_a_row_stop(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MOST_IN_A_ROW", 2)

    class All(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step not in (0, 3):
                batch["image"][:] = torch.nan

    _, recorder, error = run(tmp_path, All(), policy=policy, epochs=3)
    assert error.startswith("2 steps in a row were skipped, and the next one breaks, too: step 6 (epoch 2): the image")
    assert len(recorder.after) == 6
    assert len(written(tmp_path)) == guard.MOST_REPROS
    assert [row["skipped_batches"] for row in rows(tmp_path)] == ["2.0", "4.0"]


def test_what_was_counted_survives_a_resume(tmp_path):
    class Saving(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    _, whole, _ = run(tmp_path, At(broken_image, step=1), At(broken_image), Saving(), policy="skip")
    assert [row["skipped_batches"] for row in rows(tmp_path)] == ["1.0", "2.0"]
    (tmp_path / "metrics.csv").rename(tmp_path / "whole.csv")
    assert read_checkpoint(tmp_path / "0.ckpt")["not_finite"]["skipped_batches"] == 1
    _, resumed, error = run(tmp_path, At(broken_image), policy="skip", resume=tmp_path / "0.ckpt")
    assert error is None
    assert same(resumed.after[-1], whole.after[-1])
    assert [row["skipped_batches"] for row in rows(tmp_path)] == ["2.0"]


def test_several_batches_of_a_step_are_skipped_together(tmp_path, plain):
    """With accumulated gradients, the running statistics are those before the first of them."""
    module, recorder, seen = module_of("skip"), Recorder(), []

    class Breaking(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(next(v.clone() for n, v in module.named_buffers() if "running_mean" in n))
            if batch_idx == 1:
                batch["image"][SAMPLE] = torch.nan

    trainer = pl.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        inference_mode=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        callbacks=[Breaking(), recorder],
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.fit(module, datamodule=Images())
    assert all(torch.equal(value, before[name]) for name, value in recorder.after[1][0].items())
    assert not torch.equal(seen[1], seen[0])
    assert trainer.global_step == 2
    assert not all(torch.equal(value, before[name]) for name, value in recorder.after[2][0].items())


@pytest.mark.slow
def test_faults_at_random(tmp_path, plain, monkeypatch):
    """Any kind at any step in any sample: located and repeated, skipped or sanitised, as by hand; 120 of them."""
    twins = {}

    def twin(step, sample, *what):
        if (what, step, sample) not in twins:
            folder = tmp_path / f"twin-{len(twins)}"
            folder.mkdir()
            twins[what, step, sample] = run(folder, At(*what, step=step))[1].after
        return twins[what, step, sample]

    generator = random.Random(0)
    kinds = [name for name in FAULTS if name != "weight"]
    for trial in range(120):
        name, policy = kinds[trial % len(kinds)], get_args(guard.Policy)[trial // len(kinds) % 3]
        step, sample = generator.randrange(2 * STEPS), generator.randrange(BATCH)
        monkeypatch.setattr(f"{__name__}.SAMPLE", sample)
        with pytest.MonkeyPatch.context() as patched:
            begin, loss, (said, _) = begin_of(name, patched)
            folder = tmp_path / str(trial)
            folder.mkdir()
            ending = [Ending(begin)] if name == "descent" and policy != "stop" else []
            _, recorder, error = run(folder, At(begin, step=step), *ending, policy=policy, loss=loss)
            content = torch.load(folder / f"repro-step-{step}.pt", weights_only=True)["repro"]
            assert content["fault"]["samples"] == [sample], (trial, name, policy)
            if policy == "stop":
                assert said.replace("samples 2 ", f"samples {sample} ") in error
                expected = plain[1].after[:step]
            else:
                assert error is None
                if ending:
                    begin.now = True
                whole = policy == "sanitise" and name != "gradient"
                expected = twin(step, sample, rest) if whole else twin(step, None, untouched, nothing)
            allow = ["--allow", f"{__name__}.{loss.__name__ if loss else 'At'}"]
            assert replay([str(folder / f"repro-step-{step}.pt"), "--device", "cpu", *allow]) == 0
        if policy == "sanitise" and name == "gradient":
            expected = plain[1].after[:step]  # what comes then has no twin
        assert all(same(ours, theirs) for ours, theirs in zip(recorder.after, expected, strict=False)), (trial, name)
        assert len(recorder.after) == (step if policy == "stop" else 2 * STEPS)


# --- validation, checkpoints, files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_validation_stops_always(policy, tmp_path, capsys):
    class Validation(pl.Callback):
        def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
            batch["image"][1:4] = torch.nan

    _, recorder, error = run(tmp_path, Validation(), ResidualGrowth(), policy=policy)
    assert error.startswith(
        f"step {STEPS} (epoch 0): the image is not finite in samples 1, 2, 3 of the batch; data indices 101, "
    )
    assert len(recorder.after) == STEPS
    assert "diverges" not in capsys.readouterr().out  # it is not the descent
    assert replay([str(tmp_path / f"repro-step-{STEPS}.pt"), "--device", "cpu"]) == 0


class Estimated(Images):
    """An image that is broken for good, also where the statistics for validation are taken."""

    def __init__(self):
        super().__init__()
        self.examples[BATCH + SAMPLE]["image"][0, 0, 0] = torch.nan

    def statistics_batches(self, images):
        return self.train_dataloader()


def test_a_broken_image_that_is_skipped_is_not_in_the_statistics_for_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.Images", Estimated)
    assert run(tmp_path, policy="skip")[-1] is None
    assert [row["skipped_batches"] for row in rows(tmp_path)] == ["1.0", "2.0"]
    assert all(float(row["val_loss"]) < 10 for row in rows(tmp_path))


def test_broken_weights_are_not_saved(tmp_path):
    """An earlier checkpoint stays."""

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                broken_weight(module, batch)
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    _, _, error = run(tmp_path, Saving())
    assert error.startswith("step 2 (epoch 0): the weights are not finite (model.decoder")
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1


def test_the_file_of_another_process_has_its_rank(tmp_path, monkeypatch):
    """And is repeated with that process's seed."""
    monkeypatch.setattr(SetPrediction, "global_rank", 1)
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    monkeypatch.setattr(SetPrediction, "not_finite_counts", lambda self: dict(self.guard.counts))
    _, _, error = run(tmp_path, At(broken_image))
    path = tmp_path / f"repro-step-{BROKEN}-rank-1.pt"
    assert str(path) in error
    content = torch.load(path, weights_only=True)["repro"]
    assert (content["rank"], content["processes"]) == (1, 2)
    assert content["seed"] == (((5 * 1_000_003 + BROKEN) * 1_009 + 1) * 1_021 + 1) % 2**63
    assert replay([str(path), "--device", "cpu"]) == 0


def test_a_step_in_half_precision_is_repeated_in_it(tmp_path, capsys):
    _, _, error = run(tmp_path, At(broken_target), precision="bf16-mixed")
    assert "the target is not finite in samples 2" in error
    capsys.readouterr()
    assert replay([str(tmp_path / f"repro-step-{BROKEN}.pt"), "--device", "cpu"]) == 0
    assert "bf16-mixed, 8 samples, written on cpu" in capsys.readouterr().out


def test_a_full_disk_does_not_end_a_training_that_goes_on(tmp_path, monkeypatch, capsys):
    def full(content, path):
        raise InputError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr("setpred.nonfinite.repro.save_checkpoint", full)
    _, _, error = run(tmp_path, At(broken_image), policy="skip")
    assert error is None
    assert "could not be saved: cannot write" in capsys.readouterr().out


def test_a_file_that_cannot_be_repeated_is_an_error_in_one_sentence(tmp_path, capsys):
    run(tmp_path, At(marked_target), loss=SteepLoss)
    path = tmp_path / f"repro-step-{BROKEN}.pt"
    content = torch.load(path, weights_only=True)

    def refused(change, *options):
        changed = torch.load(path, weights_only=True)
        change(changed)
        torch.save(changed, tmp_path / "changed.pt")
        capsys.readouterr()
        assert replay([str(tmp_path / "changed.pt"), "--device", "cpu", *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    allow = ("--allow", f"{__name__}.SteepLoss")
    assert "--allow" in refused(lambda c: None)
    assert "is a checkpoint, expected a repro-step" in refused(lambda c: c.pop("repro"), *allow)
    assert "written at precision 'bf16-true'" in refused(lambda c: c["repro"].update(precision="bf16-true"), *allow)
    for damage in ("batch", "seed", "fault", "evaluating"):
        assert "is damaged" in refused(lambda c, damage=damage: c["repro"].pop(damage), *allow)
    assert "cannot be repeated" in refused(lambda c: c["repro"]["batch"].update(image=torch.zeros(3)), *allow)
    assert "does not say how" in refused(lambda c: c["setpred"].update(model=None), *allow)
    assert content["repro"]["fault"]["place"] == "gradient"


def test_an_unknown_policy_is_refused():
    with pytest.raises(InputError, match="on_not_finite: expected one of stop, skip, sanitise, got 'ignore'"):
        module_of("ignore")


def test_the_command_line_takes_the_policy(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["--config", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path), "--trainer.logger=false"]
    cli = command_line([*options, "--model.on_not_finite=skip"])
    assert cli.model.guard.policy == "skip"
    assert cli.model.settings["model"]["on_not_finite"] == "skip"
    measuring = [type(each) for each in cli.trainer.callbacks]
    assert max(measuring.index(each) for each in (NotFiniteCounts, ResidualGrowth)) < measuring.index(MetricsFile)


def test_the_error_of_a_loss_names_its_place():
    error = NotFiniteError("matching cost", [1])
    assert (str(error), error.place) == ("the matching cost is not finite in samples 1 of the batch", "matching cost")


# --- descents that diverge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 3e3])
def test_a_descent_that_diverges_is_told_at_validation(rate, tmp_path, capsys):
    """Once an epoch, in one number and a sentence; training and validation are as without."""
    results = []
    for watched in (True, False):
        folder = tmp_path / str(watched)
        folder.mkdir()
        watching = [ResidualGrowth()] if watched else []
        module, recorder, error = run(folder, *watching, descent={"iterations": 6, "learning_rate": rate})
        assert error is None
        results.append((recorder.after, [row["val_loss"] for row in rows(folder)]))
    assert all(same(ours, theirs) for ours, theirs in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1] == results[1][1]
    printed = capsys.readouterr().out
    growth = [float(row["val_residual_growth"]) for row in rows(tmp_path / "True")]
    if rate == 1.0:
        assert max(growth) < 2
        assert "diverges" not in printed
    else:
        assert min(growth) > 3
        for epoch in (0, 1):
            assert printed.count(f"epoch {epoch}: the inner descent diverges: its residual ends") == 1
        assert "lower the learning_rate (3e+03) or momentum (0) of model.decoder" in printed
    assert isinstance(module.model.decoder, nn.Module)


def test_the_growth_of_a_residual():
    """1 where it falls to the end, the factor to the least where it rises; rounding at an optimum is no rise."""
    norms = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, torch.nan],
            [0.5, 0.1, 9.0, 1e-9, torch.inf, 0.0, torch.nan],
            [0.2, 0.4, 90.0, 5e-9, 2.0, 0.0, torch.nan],
        ]
    )
    expected = torch.tensor([1.0, 4.0, 90.0, 5e-6, 2.0, 0.0, torch.inf])
    torch.testing.assert_close(residual_growth(norms), expected)
    assert residual_growth(torch.tensor([[1.0], [torch.nan]])).tolist() == [torch.inf]


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def breaks_at_1(monkeypatch):
    """The prediction of the second image is not finite."""

    def broken(model, images, *, iterations=None):
        found = torch.zeros(len(images), 4, CLEVR.set_dim)
        found[1, 2, 3] = torch.nan
        return found

    monkeypatch.setattr("setpred.evaluation.predict_in_passes", broken)
    monkeypatch.setattr("setpred.commands.predict.predict_in_passes", broken)


@pytest.mark.usefixtures("breaks_at_1")
def test_an_evaluation_names_the_images_whose_predictions_are_not_finite(monkeypatch):
    monkeypatch.setattr("setpred.evaluation.as_batch", torch.utils.data.default_collate)
    examples = [example | {"index": torch.tensor(i)} for i, example in enumerate(Images().examples)]
    with pytest.raises(InputError, match="numbers that are not finite for images 1 of the data"):
        evaluation.predict(nn.Identity(), examples)


@pytest.mark.usefixtures("breaks_at_1")
def test_a_prediction_that_is_not_finite_is_said_of_its_image_and_reaches_no_file(tmp_path, capsys):
    for name in ("a", "b", "c"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in ("a", "b", "c")]
    with pytest.raises(InputError, match=r"b\.png: the model predicts numbers that are not finite"):
        list(predict.predict(nn.Identity(), paths, image_size=16))
    found = predict.predict(nn.Identity(), paths, image_size=16, skip_broken=True)
    tally = predict.write_predictions(tmp_path / "out.json", found, lambda elements: elements.tolist())
    assert (tally.predicted, tally.skipped) == (2, 1)
    assert [each["image"] for each in json.loads((tmp_path / "out.json").read_text())] == [paths[0], paths[2]]
    assert "skipped: " in capsys.readouterr().err


# --- two processes --------------------------------------------------------------------------------------------------

SHARED = 2  # the step that breaks, in process 1 alone; 2 steps an epoch


def in_two_processes(folder: Path, port: str) -> None:
    """Forks two processes that train together, one training after the other, and saves what each has seen."""
    environment = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        status = 1
        try:
            torch.save({name: train(folder / name, rank) for name, train in TRAININGS.items()}, folder / f"{rank}.pt")
            status = 0
        finally:
            os._exit(status)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


def training_of_two(begin=None, gradient=None, *, both=False, **changes):
    """A training in two processes, of which only the second breaks."""

    def train(folder, rank):
        at = [At(begin, gradient, SHARED)] if rank == 1 or both else []
        module, recorder, error = run(folder, *at, processes=2, **changes)
        return recorder.after, error, module.not_finite_counts(), module.guard.counts

    return train


TRAININGS = {
    "nothing": training_of_two(untouched, nothing, both=True),
    "rest": training_of_two(rest),
    "stop": training_of_two(broken_image),
    "skip": training_of_two(broken_image, policy="skip"),
    "skip gradient": training_of_two(marked_target, loss=SteepLoss, policy="skip"),
    "sanitise": training_of_two(broken_image, policy="sanitise"),
    "sanitise gradient": training_of_two(marked_target, loss=SteepLoss, policy="sanitise"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = f"import pathlib, {__name__} as tests; tests.in_two_processes(pathlib.Path({str(folder)!r}), {port!r})"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_take_the_same_decision(two):
    """And each step leaves the same weights in both; `rest` and `nothing` are trainings where nothing breaks."""
    folder, seen = two
    for name, twin in {"skip": "nothing", "skip gradient": "nothing", "sanitise": "rest"}.items():
        for rank in range(2):
            after, error, _, _ = seen[rank][name]
            assert error is None
            assert len(after) == 4
            assert all(same(ours, theirs) for ours, theirs in zip(after, seen[rank][twin][0], strict=True)), name
    mended = [seen[rank]["sanitise gradient"] for rank in range(2)]
    parameters = [name for name, _ in module_of().named_parameters()]
    assert all(torch.equal(mended[0][0][-1][0][name], mended[1][0][-1][0][name]) for name in parameters)
    assert [(each[1], each[2]["sanitised_gradients"]) for each in mended] == [(None, 1), (None, 1)]
    # sanitised samples are those of all processes, skipped batches are skipped in all
    assert [seen[rank]["sanitise"][2]["sanitised_samples"] for rank in range(2)] == [1, 1]
    assert [seen[rank]["sanitise"][3]["sanitised_samples"] for rank in range(2)] == [0, 1]
    assert [seen[rank]["skip"][2]["skipped_batches"] for rank in range(2)] == [1, 1]
    assert rows(folder / "sanitise")[-1]["sanitised_samples"] == "1.0"


def test_both_processes_stop_and_the_one_that_broke_says_where(two):
    folder, seen = two
    first, second = (seen[rank]["stop"] for rank in range(2))
    assert [len(each[0]) for each in (first, second)] == [SHARED, SHARED]
    assert "the gradient is not finite" in first[1]
    assert f"step {SHARED} (epoch 1): the image is not finite in samples 2 of the batch" in second[1]
    assert f"repro-step-{SHARED}-rank-1.pt" in second[1]
    for name in ("stop", "skip", "skip gradient", "sanitise"):
        path = folder / name / f"repro-step-{SHARED}-rank-1.pt"
        assert replay([str(path), "--device", "cpu", "--allow", f"{__name__}.SteepLoss"]) == 0
