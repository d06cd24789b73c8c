"""Non-finite numbers are located, a file repeats the step, and the policies stop and skip act as described."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from PIL import Image
from tiny import CONFIG, QUIET, built, metrics
from torch import nn
from torch.utils.data import DataLoader

from setpred import evaluation
from setpred.checkpoint.allowlist import allowed_classes
from setpred.checkpoint.load import build, read_checkpoint
from setpred.commands import predict
from setpred.commands.replay import main as replay
from setpred.data.exporting import to_json
from setpred.decoders.starts import RandomStart
from setpred.errors import InputError
from setpred.inner import GradientDescent
from setpred.inner.diagnostics import residual_growth
from setpred.losses import HungarianLoss
from setpred.model import SetPredictor, Step
from setpred.nonfinite import policy, repro
from setpred.nonfinite.locate import diagnose
from setpred.schema import CLEVR
from setpred.training.callbacks import MetricsFile, ResidualGrowth, SkippedSteps, TrainLoss
from setpred.training.task import SetPrediction

BATCH, STEPS = 8, 3  # of an epoch
FAULTY, SAMPLE = 4, 2  # step, and sample of its batch, with non-finite numbers
MARK = 7.0  # in a target: the losses below are non-finite there


class SteepLoss(HungarianLoss):
    """Finite, but with an infinite gradient for marked samples."""

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
    """Finite for all predictions and targets."""

    def forward(self, predicted, target):
        return (predicted.nan_to_num(0, 0, 0) - target.nan_to_num(0, 0, 0)).square().mean((1, 2))


class Images(pl.LightningDataModule):
    """Float images, which can hold NaN, unlike uint8 ones."""

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
    """Changes the batch or the model when a step begins, or the gradients once they are there."""

    def __init__(self, begin=None, gradient=None, step=FAULTY):
        self.begin, self.gradient, self.step = begin, gradient, step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.buffers = [value.clone() for value in module.buffers()]
        if trainer.global_step == self.step and self.begin:
            self.begin(module, batch)

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step and self.gradient:
            self.gradient(self, module)

    def on_train_batch_end(self, *_):
        if isinstance(self.begin, OverflowingDescent):
            self.begin.now = False


class Recorder(pl.Callback):
    """Keeps what each step leaves: weights and buffers, the optimiser's state, the learning rate."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        state = {name: value.clone() for name, value in module.state_dict().items()}
        self.after.append((state, moments, optimizer.param_groups[0]["lr"]))


def module_of(policy="stop", loss=None, descent=None, reads=False, **options):
    torch.manual_seed(0)
    config = yaml.safe_load(CONFIG)["model"]
    del config["schedule"]
    decoder = config["decoder"]["init_args"]
    if "auxiliary" in options:
        decoder["differentiation"] = {"class_path": "setpred.inner.Unrolled"}
    decoder["descent"]["init_args"].update(descent or {})
    decoder["set_dim"] = CLEVR.set_dim
    decoder["objective"]["init_args"]["set_encoder"]["init_args"]["set_dim"] = CLEVR.set_dim
    if reads:
        slots = {"slots": config["decoder"], "set_dim": CLEVR.set_dim}
        config["decoder"] = {"class_path": "setpred.decoders.Readout", "init_args": slots}
    parts = {name: build(part, allowed_classes()) for name, part in config.items()}
    module = SetPrediction(**parts, loss=loss and loss(), learning_rate=0.01, on_not_finite=policy, **options)
    module.model_config, module.seed = config, 5
    module.settings = {"model": {"loss": loss and {"class_path": f"{__name__}.{loss.__name__}"}}}
    return module


def run(folder, *callbacks, epochs=2, resume=None, processes=1, precision="32-true", data=Images, trainer=(), **model):
    """Train 3 steps per epoch; return module, `Recorder` and the message of the `InputError`, if any."""
    folder.mkdir(exist_ok=True)
    module, recorder, error = module_of(**model), Recorder(), None
    fit = pl.Trainer(
        max_epochs=epochs,
        devices=processes,
        precision=precision,
        strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
        inference_mode=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[*callbacks, recorder, TrainLoss(), SkippedSteps(), MetricsFile(folder / "metrics.csv")],
        **QUIET | dict(trainer),
    )
    try:
        fit.fit(module, datamodule=data(), ckpt_path=resume, weights_only=True)
    except InputError as raised:
        error = str(raised)
    return module, recorder.after, error


def same(ours, theirs, *, strict=True):
    """Whether two recordings are equal bit by bit."""
    return all(
        torch.equal(a, b)
        for one, other in zip(ours, theirs, strict=strict)
        for a, b in zip((*one[0].values(), *one[1]), (*other[0].values(), *other[1]), strict=True)
    ) and all(one[2] == other[2] for one, other in zip(ours, theirs, strict=strict))


def again(folder, *, step=FAULTY, rank="", loss=None):
    """Exit status of `setpred replay` on the file of a step."""
    allow = ["--allow", f"{__name__}.{loss.__name__}"] if loss else []
    return replay([str(folder / f"repro-step-{step}{rank}.pt"), "--device", "cpu", *allow])


# --- faults ---------------------------------------------------------------------------------------------------------


def set_image(value, module, batch):
    batch["image"][SAMPLE, 1, 3, 3] = value


def set_target(value, module, batch):
    batch["elements"][SAMPLE, 1, 0] = value


def mark_target(module, batch):
    batch["elements"][SAMPLE, 0, 0] = MARK


def set_weight(module, batch):
    with torch.no_grad():
        module.model.decoder.objective.set_encoder.aggregator.weight.view(-1)[3] = torch.nan


def set_statistics(module, batch):
    next(value for name, value in module.named_buffers() if "running_mean" in name)[0] = torch.inf


class OverflowingDescent:
    """Patch of the descent: in the second step on batches of the faulty training step, one sample overflows."""

    def __init__(self, monkeypatch):
        self.now = False
        step = GradientDescent.step

        def patched(descent, state, gradient):
            after = step(descent, state, gradient)
            self.count = 1 if state.velocity is None else self.count + 1
            if self.now and self.count == 2 and len(after.iterate) == BATCH:
                after.iterate[SAMPLE, 0, 0] = torch.inf
            return after

        monkeypatch.setattr(GradientDescent, "step", patched)

    def __call__(self, module, batch):
        self.now = True


nan_image = partial(set_image, torch.nan)
FAULTS = {  # change at the begin of the step, loss, message, advice
    "image": (nan_image, None, "the image is not finite in samples 2 ", "inspect these images"),
    "target": (partial(set_target, -torch.inf), None, "the target is not finite in samples 2 ", "inspect the elements"),
    "cost": (mark_target, OverflowingLoss, "the matching cost is not finite in samples 2 ", "lower model.learning"),
    "gradient": (mark_target, SteepLoss, "the gradient is not finite (of model.", "on_not_finite to skip"),
    "descent": (None, None, "the inner descent is not finite from iteration 2 on in samples 2 ", "lower the learning"),
}


def fault(name, monkeypatch):
    begin, loss, *texts = FAULTS[name]
    return begin or OverflowingDescent(monkeypatch), loss, texts


def untouched(module, batch):
    """No change."""


def nothing(at, module):
    """Make the step one without any effect."""
    for parameter in module.parameters():
        parameter.grad = None
    for buffer, before in zip(module.buffers(), at.buffers, strict=True):
        buffer.copy_(before)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of finite steps."""
    _, after, error = run(tmp_path_factory.mktemp("plain"))
    assert (len(after), error) == (2 * STEPS, None)
    return after


@pytest.fixture(scope="module")
def without_step(tmp_path_factory):
    """A run where the faulty step has no effect."""
    folder = tmp_path_factory.mktemp("without-step")
    return run(folder, At(untouched, nothing))[1], metrics(folder)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_located_repeated_and_skipped(name, tmp_path, plain, without_step, monkeypatch, capsys):
    """The skipped step has no effect, bit by bit; the file repeats the fault."""
    begin, loss, (text, advice) = fault(name, monkeypatch)
    _, after, error = run(tmp_path, At(begin), policy="skip", loss=loss)
    assert error is None
    assert same(after, without_step[0])
    assert not same(after[FAULTY:], plain[FAULTY:])
    ours, theirs = metrics(tmp_path), without_step[1]
    assert [row["skipped_batches"] for row in ours] == ["0.0", "1.0"]
    assert [row["val_loss"] for row in ours] == [row["val_loss"] for row in theirs]
    assert ours[0]["train_loss"] == theirs[0]["train_loss"]
    printed = capsys.readouterr().out
    assert f"skipped (1 so far): step {FAULTY} (epoch 1): {text}" in printed
    assert f"; data indices {100 + BATCH + SAMPLE}. " in printed
    assert advice in printed
    (path,) = tmp_path.glob("repro*")
    assert str(path) in printed
    if name == "descent":
        begin.now = True
    assert again(tmp_path, loss=loss) == 0
    printed = capsys.readouterr().out
    assert f"reproduced: {text}" in printed
    if name == "descent":
        assert "the inner descent is finite in iterate 1, norm " in printed
        begin.now = False  # as on a machine without the fault
        assert again(tmp_path) == 1
        assert "not reproduced: in the training the inner descent" in capsys.readouterr().out


def test_a_repeated_step_has_its_auxiliary_losses(tmp_path, capsys):
    _, _, error = run(tmp_path, At(nan_image), auxiliary=2.0)
    assert "the image is not finite" in error
    assert repro.read(tmp_path / f"repro-step-{FAULTY}.pt").step.auxiliary == 2
    assert again(tmp_path) == 0


@pytest.mark.parametrize("name", ["image", "gradient"])
def test_stop_keeps_the_weights_of_the_last_finite_step(name, tmp_path, plain, monkeypatch):
    begin, loss, (text, _) = fault(name, monkeypatch)
    module, after, error = run(tmp_path, At(begin), loss=loss)
    assert error.startswith(f"step {FAULTY} (epoch 1): {text}")
    assert str(tmp_path / f"repro-step-{FAULTY}.pt") in error
    assert len(after) == FAULTY
    assert same(after, plain, strict=False)
    assert all(torch.equal(value, plain[FAULTY - 1][0][name]) for name, value in module.state_dict().items())


def add_infinite_weight(module, batch):
    module.model.decoder.spare = nn.Parameter(torch.tensor([1.0, torch.inf]))


HIDDEN = {  # faults that the loss does not show, and weights, which stop under both policies
    "target": (FAULTS["target"][0], ForgivingLoss, "stop", "target is"),
    "descent": (None, ForgivingLoss, "stop", "inner descent is"),
    "spare weight": (add_infinite_weight, ForgivingLoss, "stop", "weights are"),
    "weight": (set_weight, None, "skip", "weights are not finite (model.decoder.objective."),
    "statistics": (set_statistics, None, "skip", "weights are not finite (model.encoder."),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_weights_and_faults_that_the_loss_does_not_show_stop(name, tmp_path, monkeypatch):
    begin, loss, act, text = HIDDEN[name]
    _, after, error = run(tmp_path, At(begin or OverflowingDescent(monkeypatch)), loss=loss, policy=act)
    assert error.startswith(f"step {FAULTY} (epoch 1): the {text}")
    assert "not finite" in error
    assert len(after) == FAULTY


class DrawnStart(RandomStart):
    """The start of the descent is infinite in one random sample."""

    def forward(self, features):
        start = super().forward(features)
        return start.index_fill(0, start[:, 0, 0].argmax(), torch.inf)


def test_random_numbers_are_repeated_and_the_generator_is_restored():
    module = module_of().train()
    module.model.decoder.start = DrawnStart(4, CLEVR.set_dim)
    batch = torch.utils.data.default_collate(Images().examples[:BATCH])
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        chosen = int(torch.randn(BATCH, 4, CLEVR.set_dim)[:, 0, 0].argmax())
        before = torch.rand(3), torch.get_rng_state()
        last = diagnose(Step(module.model, module.loss, batch, seed))[-1]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert (last.place, last.iteration, last.samples) == ("inner descent", 0, [chosen])
        found.append(chosen)
    assert len(set(found)) > 1


def test_a_diverging_descent_is_located(tmp_path):
    """Without a patch: every sample, in the first step."""
    _, after, error = run(tmp_path, descent={"iterations": 8, "learning_rate": 1e14, "momentum": 0.0})
    assert not after
    assert "the inner descent is not finite from iteration 4 on in samples 0, 1, 2, 3, 4, 5, 6, 7 of" in error
    assert again(tmp_path, step=0) == 0


def test_a_fault_from_outside_is_skipped_though_no_repeat_shows_it(tmp_path, without_step, capsys):
    def gradient(at, module):
        next(module.parameters()).grad[0] = torch.nan

    _, after, error = run(tmp_path, At(untouched, gradient), policy="skip")
    assert error is None
    assert same(after, without_step[0])
    assert "which a repeat of the step does not show" in capsys.readouterr().out
    assert again(tmp_path) == 1
    assert "here all numbers are finite" in capsys.readouterr().out


def test_too_many_skipped_steps_in_a_row_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "MOST_IN_A_ROW", 2)
    faults = [At(nan_image, step=step) for step in (1, 2, 4, 5, 6)]
    _, after, error = run(tmp_path, *faults, policy="skip", epochs=3)
    assert error.startswith("2 steps in a row were skipped, and the next one fails, too: step 6 (epoch 2): the image")
    assert len(after) == 6
    assert len(list(tmp_path.glob("repro*"))) == repro.MOST_REPROS
    assert [row["skipped_batches"] for row in metrics(tmp_path)] == ["2.0", "4.0"]


def test_a_resume_continues_the_count(tmp_path):
    class Saving(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    _, undisturbed, _ = run(tmp_path, At(nan_image, step=1), At(nan_image), Saving(), policy="skip")
    assert [row["skipped_batches"] for row in metrics(tmp_path)] == ["1.0", "2.0"]
    _, resumed, error = run(tmp_path / "again", At(nan_image), policy="skip", resume=tmp_path / "0.ckpt")
    assert error is None
    assert same(resumed[-1:], undisturbed[-1:])
    assert [row["skipped_batches"] for row in metrics(tmp_path / "again")] == ["2.0"]


def test_all_batches_of_a_step_are_skipped_together(tmp_path):
    """With accumulated gradients, running statistics are those from before the first batch."""
    seen = []

    class Second(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append({name: value.clone() for name, value in module.state_dict().items()})
            if batch_idx == 1:
                nan_image(module, batch)

    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    _, after, _ = run(tmp_path, Second(), policy="skip", epochs=1, trainer=options)
    assert any(not torch.equal(value, seen[1][name]) for name, value in seen[0].items())
    assert all(torch.equal(value, seen[0][name]) for name, value in after[1][0].items())
    assert not all(torch.equal(value, seen[0][name]) for name, value in after[2][0].items())


# --- validation, checkpoints, files ---------------------------------------------------------------------------------


def test_a_validation_always_stops(tmp_path, capsys):
    class Validation(pl.Callback):
        def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
            batch["image"][1:4] = torch.nan

    _, after, error = run(tmp_path, Validation(), ResidualGrowth(), policy="skip")
    assert error.startswith(
        f"step {STEPS} (epoch 0): the image is not finite in samples 1, 2, 3 of the batch; data indices 101, "
    )
    assert len(after) == STEPS
    assert "diverges" not in capsys.readouterr().out  # not a fault of the descent
    assert again(tmp_path, step=STEPS) == 0


class FaultyImages(Images):
    """One image has NaN in every epoch, also where batch statistics are estimated."""

    def __init__(self):
        super().__init__()
        self.examples[BATCH + SAMPLE]["image"][0, 0, 0] = torch.nan

    def statistics_batches(self, images):
        return self.train_dataloader()


def test_a_skipped_image_is_not_in_the_batch_statistics(tmp_path):
    assert run(tmp_path, policy="skip", data=FaultyImages)[-1] is None
    assert [row["skipped_batches"] for row in metrics(tmp_path)] == ["1.0", "2.0"]
    assert all(float(row["val_loss"]) < 10 for row in metrics(tmp_path))


def test_non_finite_weights_are_not_saved(tmp_path):
    """An earlier checkpoint stays."""

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                set_weight(module, batch)
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    _, _, error = run(tmp_path, Saving())
    assert error.startswith("step 2 (epoch 0): the weights are not finite (model.decoder")
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1


def test_a_step_in_half_precision_of_another_process_is_repeated(tmp_path, monkeypatch, capsys):
    """The file has the rank in its name, and the seed and precision of that process."""
    monkeypatch.setattr(SetPrediction, "global_rank", 1)
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    _, _, error = run(tmp_path, At(nan_image), precision="bf16-mixed")
    path = tmp_path / f"repro-step-{FAULTY}-rank-1.pt"
    assert str(path) in error
    seed = (((5 * 1_000_003 + FAULTY) * 1_009 + 1) * 1_021 + 1) % 2**63
    assert torch.load(path, weights_only=True)["repro"]["seed"] == seed
    capsys.readouterr()
    assert again(tmp_path, rank="-rank-1") == 0
    assert f"training, seed {seed}, bf16-mixed" in capsys.readouterr().out


def test_a_full_disk_does_not_end_a_training_that_skips(tmp_path, monkeypatch, capsys):
    def full(content, path):
        raise InputError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr("setpred.nonfinite.repro.save_checkpoint", full)
    assert run(tmp_path, At(nan_image), policy="skip")[-1] is None
    assert "could not be saved: cannot write" in capsys.readouterr().out


DAMAGES = {
    "--allow": (lambda content: None, None),
    "is a checkpoint, expected a repro-step": (lambda content: content.pop("repro"), SteepLoss),
    "written at precision 'bf16-true'": (lambda content: content["repro"].update(precision="bf16-true"), SteepLoss),
    "cannot be repeated": (lambda content: content["repro"]["batch"].update(image=torch.zeros(3)), SteepLoss),
    "does not say how": (lambda content: content["setpred"].update(model=None), SteepLoss),
} | {
    f"is damaged: '{key}'": (lambda content, key=key: content["repro"].pop(key), SteepLoss)
    for key in ("batch", "seed", "fault", "evaluating")
}


def test_a_damaged_file_is_an_error_in_one_sentence(tmp_path, capsys):
    run(tmp_path, At(mark_target), loss=SteepLoss)
    for text, (damage, loss) in DAMAGES.items():
        content = torch.load(tmp_path / f"repro-step-{FAULTY}.pt", weights_only=True)
        damage(content)
        torch.save(content, tmp_path / "repro-step-0.pt")
        capsys.readouterr()
        assert again(tmp_path, step=0, loss=loss) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert text in error


def test_the_command_line_takes_the_policies_stop_and_skip(tmp_path):
    cli = built(tmp_path, "--model.on_not_finite=skip")
    assert cli.model.guard.policy == cli.model.settings["model"]["on_not_finite"] == "skip"
    measuring = [type(each) for each in cli.trainer.callbacks]
    assert max(measuring.index(each) for each in (SkippedSteps, ResidualGrowth)) < measuring.index(MetricsFile)
    with pytest.raises(InputError, match="on_not_finite: expected stop or skip, got 'sanitise'; use skip"):
        built(tmp_path, "--model.on_not_finite=sanitise")


# --- diverging descents, and options of the trainer -----------------------------------------------------------------


@pytest.mark.parametrize(("rate", "reads"), [(1.0, False), (3e3, False), (3e3, True)])
def test_a_validation_reports_a_diverging_descent(rate, reads, tmp_path, plain, capsys):
    """One number and at most one sentence per epoch, also of slots; training and validation are the same without."""
    descent = {"iterations": 6, "learning_rate": rate, "momentum": 0.0}
    _, after, error = run(tmp_path, ResidualGrowth(), descent=descent, reads=reads)
    _, twin, _ = run(tmp_path / "without", descent=descent, reads=reads)
    assert error is None
    assert same(after, twin)
    assert [row["val_loss"] for row in metrics(tmp_path)] == [row["val_loss"] for row in metrics(tmp_path / "without")]
    printed, growth = capsys.readouterr().out, [float(row["val_residual_growth"]) for row in metrics(tmp_path)]
    if rate == 1.0:
        assert max(growth) < 2
        assert "diverges" not in printed
    else:
        assert min(growth) > 3
        for epoch in (0, 1):
            assert printed.count(f"epoch {epoch}: the inner descent diverges: its residual ends") == 1
        assert "lower the learning_rate (3e+03) or momentum (0) of the decoder's descent" in printed


def test_the_growth_of_a_residual():
    """1 where it falls to the end, the factor to the least where it rises; rounding at an optimum is no rise."""
    norms = {(1, 0.5, 0.2): 1.0, (1, 0.1, 0.4): 4.0, (1, 9, 90): 90.0, (1, 1e-9, 5e-9): 5e-6, (1, torch.inf, 2): 2.0}
    norms |= {(0, 0, 0): 0.0, (torch.nan,) * 3: torch.inf, (1, 1, torch.nan): torch.inf}
    torch.testing.assert_close(residual_growth(torch.tensor(list(norms)).T), torch.tensor(list(norms.values())))


def test_gradients_are_clipped_and_descents_take_the_steps_of_the_epoch(tmp_path, monkeypatch):
    forward, asked = SetPredictor.forward, []

    def spy(self, images, *, mask=None, iterations=None):
        asked.extend([iterations] * self.training)
        return forward(self, images, mask=mask, iterations=iterations)

    monkeypatch.setattr(SetPredictor, "forward", spy)
    module, after, _ = run(tmp_path, trainer={"gradient_clip_val": 1e-6}, iterations_by_epoch={0: 1, 1: 2, 7: 3})
    assert asked == [1] * STEPS + [2] * STEPS
    first_moments = after[0][1][1::3]  # of AdamW, after step counts
    assert nn.utils.get_total_norm(first_moments) <= 1.01e-7  # 1 - beta_1 times the clipped gradient
    monkeypatch.setattr(type(module), "current_epoch", 9)
    assert module.training_iterations() == 3


# --- predictions ----------------------------------------------------------------------------------------------------


def test_non_finite_predictions_are_named_and_reach_no_file(tmp_path, monkeypatch, capsys):
    """By evaluation and by predict; that of the second image is not finite."""

    def predicted(model, images, *, mask=None, iterations=None):
        found = torch.zeros(len(images), 4, CLEVR.set_dim)
        found[1, 2, 3] = torch.nan
        return found

    monkeypatch.setattr("setpred.evaluation.predict_in_passes", predicted)
    monkeypatch.setattr("setpred.commands.predict.predict_in_passes", predicted)
    monkeypatch.setattr("setpred.evaluation.as_batch", torch.utils.data.default_collate)
    examples = [example | {"index": torch.tensor(i)} for i, example in enumerate(Images().examples)]
    with pytest.raises(InputError, match="not finite for inputs 1 of the data"):
        evaluation.predict(nn.Identity(), examples)
    paths = [str(tmp_path / f"{name}.png") for name in ("a", "b", "c")]
    for path in paths:
        Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(InputError, match=r"b\.png: .* not finite"):
        list(predict.predict(nn.Identity(), paths, image_size=16))
    found = predict.predict(nn.Identity(), paths, image_size=16, skip_broken=True)
    tally = predict.write_predictions(tmp_path / "out.json", found, lambda _, elements: elements.tolist(), to_json)
    assert (tally.predicted, tally.skipped) == (2, 1)
    assert [each["image"] for each in json.loads((tmp_path / "out.json").read_text())] == [paths[0], paths[2]]
    assert "skipped: " in capsys.readouterr().err


# --- two processes --------------------------------------------------------------------------------------------------

SHARED = 2  # the faulty step, in process 1 alone; 2 steps per epoch


def in_two_processes(folder: Path, port: str) -> None:
    """Fork two processes that train together, one training after the other, and save what each has recorded."""
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


def training_of_two(begin, gradient=None, *, both=False, **changes):
    """A training in two processes with a fault in the second one."""

    def train(folder, rank):
        at = [At(begin, gradient, SHARED)] if rank == 1 or both else []
        module, after, error = run(folder, *at, processes=2, **changes)
        return after, error, module.guard.skipped

    return train


TRAININGS = {
    "nothing": training_of_two(untouched, nothing, both=True),
    "stop": training_of_two(nan_image),
    "skip": training_of_two(nan_image, policy="skip"),
    "skip gradient": training_of_two(mark_target, loss=SteepLoss, policy="skip"),
}


def test_two_processes_act_alike(tmp_path):
    """Both skip or both stop; the process with the fault reports it and writes the file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = f"import pathlib, {__name__} as tests; tests.in_two_processes(pathlib.Path({str(tmp_path)!r}), {port!r})"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for seen in (first, second):
        for name in ("skip", "skip gradient"):
            after, error, skipped = seen[name]
            assert (error, skipped, len(after)) == (None, 1, 4)
            assert same(after, seen["nothing"][0])
        assert len(seen["stop"][0]) == SHARED
    assert "the gradient is not finite" in first["stop"][1]
    assert f"step {SHARED} (epoch 1): the image is not finite in samples 2 of the batch" in second["stop"][1]
    assert f"repro-step-{SHARED}-rank-1.pt" in second["stop"][1]
    for name in ("stop", "skip", "skip gradient"):
        assert again(tmp_path / name, step=SHARED, rank="-rank-1", loss=SteepLoss) == 0
