"""Training end to end on tiny scenes: what a run writes, exact resumption, refusals, and nothing lost."""

import csv
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from tiny import CONFIG, run

from setpred import files
from setpred.checkpoint.load import load_checkpoint, read_checkpoint
from setpred.commands import release
from setpred.commands.evaluate import evaluate
from setpred.commands.train import build, train
from setpred.data.dataset import open_data
from setpred.errors import InputError
from setpred.losses import HungarianLoss
from setpred.model import unit_images
from setpred.nn import batch_norms
from setpred.training.schedules import Constant, StepDecay, WarmupCosine

ROOT = Path(__file__).resolve().parents[1]


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_data):
    """A run of two epochs."""
    return run(tmp_path_factory.mktemp("finished"), data=tiny_data)


def test_checkpoints_have_statistics_of_their_own_weights(finished, tiny_data):
    """Not running averages, which trail behind the weights."""
    encoder = load_checkpoint(finished / "last.ckpt").model.encoder
    (file,) = tiny_data.glob("*-40.h5")
    images = unit_images(open_data(file, image_size=16).__getitems__(range(40))["image"])
    with torch.no_grad():
        maps = encoder.trunk[0][0](images).unflatten(0, (5, 8)).transpose(1, 2).flatten(2)  # of each batch of 8
    (norm, *_) = batch_norms(encoder)
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2)))
    torch.testing.assert_close(norm.running_var, maps.var(2).mean(0))


def test_a_resume_within_an_epoch_ends_in_the_same_weights(finished, tmp_path, tiny_data):
    """And in the same statistics and validation."""
    saving = {"dirpath": str(tmp_path / "steps"), "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
    path = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    whole = run(tmp_path / "whole", f"--trainer.callbacks+={json.dumps(path)}", data=tiny_data)
    assert all(
        torch.equal(value, weights(finished / "last.ckpt")[name])
        for name, value in weights(whole / "last.ckpt").items()
    )
    for step in (3, 5):  # within an epoch, and at its end, before the validation
        resumed = run(tmp_path / f"from-{step}", f"--resume={tmp_path}/steps/step={step}.ckpt", data=tiny_data)
        ours, theirs = weights(resumed / "last.ckpt"), weights(whole / "last.ckpt")
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        assert rows(resumed)[-1]["val_loss"] == rows(whole)[-1]["val_loss"]


def test_compiling_is_no_other_model(tmp_path, finished):
    """A run goes on compiled or not, also one from before that could be chosen."""
    content = read_checkpoint(finished / "last.ckpt")
    del content["setpred"]["model"]["decoder"]["init_args"]["compile"]
    torch.save(content, tmp_path / "before.ckpt")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    options = ["--config", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path), "--trainer.logger", "false"]
    for path in (finished / "last.ckpt", tmp_path / "before.ckpt"):
        cli = build([*options, "--model.decoder.init_args.compile", "true", "--resume", str(path)])
        assert cli.resume_path() == path
    cli = build([*options, "--model.decoder.init_args.descent.init_args.momentum", "0.5", "--resume", str(path)])
    with pytest.raises(InputError, match="of another model"):
        cli.resume_path()


def test_validation_at_any_moment_is_that_of_the_trainer(tmp_path, tiny_data):
    """With statistics of its own, whatever the running ones are."""
    found = []

    class Again(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            for norm in batch_norms(module.model.encoder):
                norm.running_mean.fill_(1e3)
            found.append(module.validate(trainer.val_dataloaders)["val_loss"])
            assert found[-1] == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-5)

    (tmp_path / "tiny.yaml").write_text(CONFIG)
    options = ["--config", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path), "--trainer.max_epochs", "1"]
    cli = build([*options, f"--data.init_args.folder={tiny_data}", "--trainer.logger", "false"])
    cli.trainer.callbacks.append(Again())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert len(found) == 1


def test_a_save_disturbs_nothing_and_statistics_that_are_held_fixed_stay(tmp_path, tiny_data):
    """Those of a part that its owner keeps in evaluation mode while training."""
    estimated = []

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            before = torch.get_rng_state(), [part.training for part in module.modules()]
            for _ in range(2):
                trainer.save_checkpoint(tmp_path / "step.ckpt")
            assert torch.equal(torch.get_rng_state(), before[0])
            assert [part.training for part in module.modules()] == before[1]

    (tmp_path / "tiny.yaml").write_text(CONFIG)
    options = ["--config", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path), "--trainer.max_epochs", "1"]
    cli = build([*options, f"--data.init_args.folder={tiny_data}", "--trainer.logger", "false"])
    encoder = cli.model.model.encoder
    first, *_, last = batch_norms(encoder)
    encoder.trunk.eval()
    last.register_forward_hook(lambda *_: estimated.append(last.training and not encoder.training))
    cli.trainer.callbacks.append(Saving())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    saved = load_checkpoint(cli.folder / "last.ckpt").model.encoder
    for each in (encoder, saved):
        assert torch.equal(batch_norms(each)[0].running_mean, first.running_mean)
        assert not torch.equal(batch_norms(each)[-1].running_mean, torch.zeros_like(last.running_mean))
    assert torch.equal(first.running_mean, torch.zeros(4))
    # five batches for each of five steps, though each is saved twice or more, and one is validated, too
    assert sum(estimated) == 5 * 5


def test_a_run_writes_what_it_promises(finished):
    assert {path.name for path in finished.iterdir()} >= {"best.ckpt", "last.ckpt", "config.yaml", "metrics.csv"}
    table = rows(finished)
    assert [row["epoch"] for row in table] == ["0", "1"]
    assert [row["step"] for row in table] == ["5", "10"]
    assert all(0 < float(row["train_loss"]) < 10 and 0 <= float(row["val_ap_inf"]) <= 1 for row in table)
    last = read_checkpoint(finished / "last.ckpt")
    assert (last["epoch"], last["global_step"]) == (1, 10)
    best = max(table, key=lambda row: float(row["val_ap"]))
    assert read_checkpoint(finished / "best.ckpt")["epoch"] == int(best["epoch"])
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["encoder"]["class_path"] == "setpred.encoders.SmallCNN"


def test_one_epoch_and_a_resume_are_two_epochs_bit_by_bit(finished, tmp_path, tiny_data):
    first = run(tmp_path, "--trainer.max_epochs=1", data=tiny_data)
    assert len(rows(first)) == 1
    again = run(tmp_path, "--trainer.max_epochs=2", "--resume=last", data=tiny_data)
    assert again == first
    resumed, undisturbed = weights(again / "last.ckpt"), weights(finished / "last.ckpt")
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)
    for ours, theirs in zip(rows(again), rows(finished), strict=True):
        for timed in ("seconds", "data_waiting"):
            ours.pop(timed), theirs.pop(timed)
        assert ours == theirs


def test_resume_from_a_path_and_from_another_model(finished, tmp_path, tiny_data):
    other = run(tmp_path, "--trainer.max_epochs=1", "--seed_everything=7", data=tiny_data)
    kept = (other / "best.ckpt").read_bytes()
    longer = run(tmp_path, "--trainer.max_epochs=3", f"--resume={finished / 'last.ckpt'}", data=tiny_data)
    assert [row["epoch"] for row in rows(longer)] == ["2"]
    assert (tmp_path / "tiny-before-1" / "best.ckpt").read_bytes() == kept
    other = "--model.decoder.init_args.descent.init_args.iterations=4"
    with pytest.raises(InputError, match=r"decoder.init_args.descent.init_args.iterations: 3 .* against 4"):
        run(tmp_path, other, f"--resume={finished / 'last.ckpt'}", data=tiny_data)
    with pytest.raises(InputError, match="nothing to resume"):
        run(tmp_path, "--resume=last", data=tiny_data, name="never")


def test_a_run_starts_from_the_weights_of_another(finished, tmp_path, tiny_data):
    """At a learning rate that moves nothing it ends where it began, also after a resume and from a release."""
    best = finished / "best.ckpt"
    released = tmp_path / "best.safetensors"
    assert release.main([str(best), "--out", str(released)]) == 0
    still = ("--model.learning_rate=1e-30", "--trainer.max_epochs=1")
    for init in (best, released):
        folder = run(tmp_path, f"--init={init}", *still, data=tiny_data)
        again = run(tmp_path, f"--init={init}", "--resume=auto", *still[:1], "--trainer.max_epochs=2", data=tiny_data)
        theirs = dict(load_checkpoint(init).model.named_parameters())
        for ended in (folder, again):
            for name, parameter in load_checkpoint(ended / "last.ckpt").model.named_parameters():
                torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"do not fit the model: .*size mismatch|do not fit the model: .*key"):
        run(tmp_path, f"--init={best}", "--model.encoder.init_args.width=6", data=tiny_data, name="other")
    assert not (tmp_path / "other").exists()


OWN_PARTS = """
import torch
from torch import nn

class Flat(nn.Module):
    def forward(self, latent, iterations=None):
        return latent

class Needy(nn.Module):
    def forward(self, latent, image):
        return latent

class Count(nn.Module):
    monitor = "count"
"""


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("decoder=own_parts.Flat", "SmallCNN and Flat: expected elements .*, got .2, 16. for a batch of 2"),
        ("decoder=own_parts.Needy", "SmallCNN and Needy cannot predict: .*iterations"),
        ("metric=own_parts.Count", "metric Count: expected update, .* got no update, compute, reset, mode"),
    ],
)
def test_a_part_that_does_not_do_its_work_is_named_before_anything_is_written(
    option, sentence, tmp_path, tiny_data, monkeypatch
):
    (tmp_path / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=sentence):
        run(tmp_path, f"--model.{option}", data=tiny_data)
    assert not (tmp_path / "tiny").exists()


OWN_DATA = """
import lightning.pytorch as pl
from torch import nn
from setpred.data.datamodule import RenderedScenes

class Data(pl.LightningDataModule):
    def __init__(self, folder: str):
        super().__init__()
        self.scenes = RenderedScenes(
            train_images=40, val_images=12, image_size=16, objects=(3, 4), set_size=4, batch_size=8, folder=folder
        )
        self.scenes.seed = 0

    def prepare_data(self):
        self.scenes.prepare_data()

    def setup(self, stage):
        self.scenes.setup(stage)

    def train_dataloader(self):
        return self.scenes.train_dataloader()

    def val_dataloader(self):
        return self.scenes.val_dataloader()

class Blind(nn.Module):
    latent_dim = 16

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(3, 16)

    def forward(self, images):
        return self.read(images.mean((2, 3)))
"""


def test_a_checkpoint_can_be_read_or_its_training_says_at_the_start_that_it_cannot(
    tmp_path, tiny_data, monkeypatch, capsys
):
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load(CONFIG)
    config["data"] = {"class_path": "own_data.Data", "init_args": {"folder": str(tiny_data)}}
    options = ["--trainer.max_epochs=1", "--allow=own_data.Data", "--allow=own_data.Blind"]
    found = []
    for name, encoder in (("sighted", config["model"]["encoder"]), ("blind", {"class_path": "own_data.Blind"})):
        config["model"]["encoder"] = encoder
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        folder = train(["--config", str(tmp_path / f"{name}.yaml"), "--runs", str(tmp_path / "runs"), *options])
        found.append("will not read the checkpoints" in capsys.readouterr().out)
        if name == "sighted":
            assert load_checkpoint(folder / "best.ckpt").image_size == 16
    assert found == [False, True]


def test_resuming_from_an_earlier_checkpoint_drops_the_later_rows(tmp_path, tiny_data):
    folder = run(tmp_path, "--trainer.max_epochs=1", data=tiny_data)
    first = tmp_path / "first.ckpt"
    shutil.copy(folder / "last.ckpt", first)
    run(tmp_path, "--trainer.max_epochs=3", "--resume=last", data=tiny_data)
    shutil.copy(first, folder / "first.ckpt")
    run(tmp_path, "--trainer.max_epochs=2", f"--resume={folder / 'first.ckpt'}", data=tiny_data)
    assert [row["epoch"] for row in rows(folder)] == ["0", "1"]


def test_the_best_checkpoint_stays_the_best_in_a_moved_folder(tmp_path, tiny_data):
    folder = run(tmp_path / "here", "--trainer.max_epochs=1", data=tiny_data)
    content = torch.load(folder / "last.ckpt", weights_only=True)
    state = next(s for s in content["callbacks"].values() if s.get("monitor") == "val_ap")
    state["best_model_score"] = torch.tensor(0.99)
    state["best_k_models"] = {path: torch.tensor(0.99) for path in state["best_k_models"]}
    torch.save(content, folder / "last.ckpt")
    moved = tmp_path / "there" / "tiny"
    shutil.copytree(folder, moved)
    best = (moved / "best.ckpt").read_bytes()
    run(tmp_path / "there", "--trainer.max_epochs=2", "--resume=last", data=tiny_data)
    assert (moved / "best.ckpt").read_bytes() == best


def test_other_settings_of_a_resumed_run_are_said(finished, tmp_path, tiny_data, capsys):
    run(tmp_path, "--trainer.max_epochs=1", data=tiny_data)
    run(tmp_path, "--resume=last", "--model.learning_rate=0.5", data=tiny_data)
    assert "model.learning_rate: 0.001 in the checkpoint against 0.5" in capsys.readouterr().out
    run(tmp_path, "--resume=last", data=tiny_data)
    assert "nothing left to train" in capsys.readouterr().out


def test_an_earlier_run_is_kept(tmp_path, tiny_data, capsys):
    first = run(tmp_path, "--trainer.max_epochs=1", data=tiny_data)
    before = (first / "last.ckpt").read_bytes()
    run(tmp_path, "--trainer.max_epochs=1", "--seed_everything=5", data=tiny_data)
    assert (tmp_path / "tiny-before-1" / "last.ckpt").read_bytes() == before
    assert "kept in" in capsys.readouterr().out
    assert read_checkpoint(first / "last.ckpt")["setpred"]["seed"] == 5


@pytest.mark.parametrize("option", ["--trainer.val_check_interval=100", "--data.init_args.num_workers=-1"])
def test_a_start_that_fails_leaves_the_earlier_run_in_its_place(option, tmp_path, tiny_data):
    first = run(tmp_path, "--trainer.max_epochs=1", data=tiny_data)
    before = (first / "last.ckpt").read_bytes()
    with pytest.raises(InputError):
        run(tmp_path, option, data=tiny_data)
    assert (first / "last.ckpt").read_bytes() == before
    assert not (tmp_path / "tiny-before-1").exists()


def test_an_earlier_run_behind_a_link_is_kept(tmp_path, tiny_data):
    (tmp_path / "disk" / "tiny").mkdir(parents=True)
    (tmp_path / "tiny").symlink_to(tmp_path / "disk" / "tiny")
    before = (run(tmp_path, "--trainer.max_epochs=1", data=tiny_data) / "best.ckpt").read_bytes()
    run(tmp_path, "--trainer.max_epochs=1", "--seed_everything=5", data=tiny_data)
    assert (tmp_path / "disk" / "tiny-before-1" / "best.ckpt").read_bytes() == before
    assert (tmp_path / "disk" / "tiny" / "best.ckpt").read_bytes() != before


def test_seeds_decide(finished, tmp_path, tiny_data):
    other = run(tmp_path, "--seed_everything=1", data=tiny_data)
    ours, theirs = weights(other / "last.ckpt"), weights(finished / "last.ckpt")
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_interrupted_run_says_so(tmp_path, tiny_data, monkeypatch):
    from setpred.training.task import SetPrediction

    step = SetPrediction.training_step

    def stopped(self, batch, batch_idx):
        if self.global_step == 7:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SetPrediction, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt, match=r"last\.ckpt has what was trained until it was written"):
        run(tmp_path, data=tiny_data)
    assert read_checkpoint(tmp_path / "tiny" / "last.ckpt")["epoch"] == 0


def test_a_termination_signal_ends_in_a_failure_that_can_be_gone_on_from(tmp_path, tiny_data, finished):
    """As a scheduler stops a job; the shell must not take it for a finished training."""
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), "--runs", str(tmp_path)]
    command += [f"--data.init_args.folder={tiny_data}", "--trainer.max_epochs=100000"]
    command += ["--model.schedule=setpred.training.Constant"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        for line in running.stdout:
            if line.startswith("epoch 1:"):
                break
        running.send_signal(signal.SIGTERM)
        rest = running.stdout.read()
    assert running.returncode not in (0, 2)
    assert "--resume last" in rest
    assert "Traceback" not in rest
    assert read_checkpoint(tmp_path / "tiny" / "last.ckpt")["epoch"] >= 1


def test_trainer_options_for_clipping_work(tmp_path, tiny_data, finished):
    clipped = run(tmp_path, "--trainer.gradient_clip_val=1e-6", "--trainer.max_epochs=1", data=tiny_data)
    assert rows(clipped)[0]["train_loss"] != rows(finished)[0]["train_loss"]


def test_gradients_that_are_not_finite_stop_before_the_weights_take_them(tmp_path, tiny_data, monkeypatch):
    from setpred.training.task import SetPrediction

    def poison(self):
        if self.global_step == 6:
            next(self.parameters()).grad[0] = torch.nan

    monkeypatch.setattr(SetPrediction, "on_after_backward", poison)
    with pytest.raises(InputError, match=r"step 6 \(epoch 1\): the gradient is not finite"):
        run(tmp_path, data=tiny_data)
    record = torch.load(tmp_path / "tiny" / "repro-step-6.pt", weights_only=True)
    assert record["state_dict"].keys() == weights(tmp_path / "tiny" / "last.ckpt").keys()
    assert all(torch.isfinite(value).all() for value in record["state_dict"].values())


def test_training_lowers_the_loss(tmp_path, tiny_data):
    folder = run(tmp_path, "--trainer.max_epochs=8", "--model.learning_rate=0.01", data=tiny_data)
    table = rows(folder)
    assert float(table[-1]["train_loss"]) < 0.7 * float(table[0]["train_loss"])


def test_real_clevr_scenes_lower_the_loss(tmp_path, clevr_blender, tiny_data):
    """Straight from a CLEVR folder; the scenes have up to 10 objects."""
    config = tmp_path / "clevr.yaml"
    text = CONFIG[: CONFIG.index("data:")].replace("set_size: 4", "set_size: 10")
    config.write_text(
        f"""{text}
data:
  class_path: setpred.data.datamodule.SetDataModule
  init_args: {{train: {clevr_blender}, val: {clevr_blender}, train_split: val, image_size: 16, batch_size: 16}}
trainer: {{max_epochs: 5, accelerator: cpu, precision: 32-true}}
"""
    )
    folder = train(["--config", str(config), "--runs", str(tmp_path), "--model.learning_rate=0.01"])
    table = rows(folder)
    assert float(table[-1]["train_loss"]) < 0.8 * float(table[0]["train_loss"])


def test_more_objects_than_the_model_holds_is_refused(tmp_path, tiny_data):
    small = "--model.decoder.init_args.set_size=3"
    with pytest.raises(InputError, match=r"image \d+ has 4 objects, but the model holds sets of at most 3"):
        run(tmp_path, small, "--data.init_args.set_size=3", data=tiny_data)


def test_a_data_set_of_another_set_size_than_the_model_is_refused(tmp_path, tiny_data):
    with pytest.raises(InputError, match="the decoder predicts sets of 3, the data has sets of 4"):
        run(tmp_path, "--model.decoder.init_args.set_size=3", data=tiny_data)


def test_the_written_configuration_repeats_the_run(finished, tmp_path, tiny_data):
    again = train(["--config", str(finished / "config.yaml"), "--runs", str(tmp_path)])
    assert again == tmp_path / "tiny"
    ours, theirs = weights(again / "last.ckpt"), weights(finished / "last.ckpt")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_command_line_wins_over_the_configuration(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    options = ["--model.learning_rate", "0.5", "--trainer.max_epochs", "7", "--seed_everything", "4"]
    cli = build(["--config", str(config), *options])
    assert cli.model.learning_rate == 0.5
    assert cli.model.seed == cli.datamodule.seed == 4
    assert cli.trainer.max_epochs == 7
    assert cli.config.name == "tiny"


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--trainer.max_epoch=3", "max_epoch"),
        ("--model.encoder.init_args.widht=3", "widht"),
        ("--learning_rate=1", "learning_rate"),
    ],
)
def test_unknown_keys_are_refused_by_name(argument, named, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    with pytest.raises(SystemExit) as stopped:
        build(["--config", str(config), argument])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_unknown_keys_in_a_file_are_refused_by_name(tmp_path, capsys):
    config = tmp_path / "typo.yaml"
    config.write_text(CONFIG.replace("max_epochs: 2", "max_epochs: 2, max_epohcs: 3"))
    with pytest.raises(SystemExit):
        build(["--config", str(config)])
    assert "max_epohcs" in capsys.readouterr().err


def test_bad_values_are_refused_with_a_sentence(tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text(CONFIG.replace("image_size: 16, latent_dim", "image_size: 17, latent_dim"))
    with pytest.raises(InputError, match="expected image_size"):
        build(["--config", str(config)])


class Broken(HungarianLoss):
    """Not a number for the second sample, from the seventh step on."""

    calls = 0

    def forward(self, predicted, target):
        losses = super().forward(predicted, target)
        Broken.calls += predicted.requires_grad
        if Broken.calls > 6 and predicted.requires_grad:
            losses = losses.clone()
            losses[1] = torch.nan
        return losses


@pytest.mark.parametrize("where", ["loss", "prediction"])
def test_nan_stops_with_step_samples_and_a_repro_file(where, tmp_path, tiny_data, monkeypatch):
    Broken.calls = 0
    loss = Broken()
    if where == "prediction":
        from setpred.model import SetPredictor

        forward = SetPredictor.forward

        def poisoned(self, images, **arguments):
            elements = forward(self, images, **arguments)
            Broken.calls += self.training
            if self.training and Broken.calls > 6:
                elements = elements.clone()
                elements[1, 0, 0] = torch.nan
            return elements

        monkeypatch.setattr(SetPredictor, "forward", poisoned)
        loss = HungarianLoss()
    monkeypatch.setattr("setpred.training.task.HungarianLoss", lambda: loss)
    with pytest.raises(InputError, match=rf"step 6 \(epoch 1\): the {where} is not finite in samples 1 ") as e:
        run(tmp_path, data=tiny_data)
    repro = tmp_path / "tiny" / "repro-step-6.pt"
    assert str(repro) in str(e.value)
    record = torch.load(repro, weights_only=True)["repro"]
    assert record["fault"]["samples"] == [1]
    assert record["batch"]["image"].shape == (8, 3, 16, 16)
    assert str(record["batch"]["index"].tolist()[1]) in str(e.value)
    # the epoch before is whole and can be gone on from
    assert read_checkpoint(tmp_path / "tiny" / "last.ckpt")["epoch"] == 0


def test_a_full_disk_keeps_the_last_whole_checkpoint(tmp_path, tiny_data, monkeypatch):
    folder = run(tmp_path, "--trainer.max_epochs=1", data=tiny_data)
    whole = (folder / "last.ckpt").read_bytes()
    write_bytes = Path.write_bytes

    def full(self, content):
        if ".ckpt" in self.name:
            write_bytes(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(self, content)

    monkeypatch.setattr(files.Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"last.ckpt: the disk is full|best.ckpt: the disk is full"):
        run(tmp_path, "--resume=last", data=tiny_data)
    assert (folder / "last.ckpt").read_bytes() == whole
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_no_permission_to_write_is_a_sentence(tmp_path, tiny_data):
    (tmp_path / "tiny").write_text("a file where the run's folder should be")
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path, data=tiny_data)


def test_no_permission_for_a_checkpoint_is_a_sentence(tmp_path, tiny_data, monkeypatch):
    write_bytes = Path.write_bytes

    def forbidden(self, content):
        if ".ckpt" in self.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return write_bytes(self, content)

    monkeypatch.setattr(files.Path, "write_bytes", forbidden)
    with pytest.raises(InputError, match=r"\.ckpt: no permission to write there"):
        run(tmp_path, data=tiny_data)


def test_image_sizes_that_differ_are_refused_before_anything_is_moved(finished, tmp_path, tiny_data):
    first = run(tmp_path, "--trainer.max_epochs=1", data=tiny_data)
    with pytest.raises(InputError, match="takes images of 32x32, the data has 16x16"):
        run(tmp_path, "--model.encoder.init_args.image_size=32", data=tiny_data)
    assert (first / "last.ckpt").exists()


def test_evaluation_gives_the_validation_score_of_training(finished, tmp_path):
    result = evaluate([str(finished / "last.ckpt"), "--json", str(tmp_path / "out.json")])
    row = rows(finished)[-1]
    for name, score in result["ap"].items():
        assert score == pytest.approx(float(row[f"val_ap_{name}"]), abs=1e-6)
    loaded = load_checkpoint(finished / "last.ckpt")
    assert (loaded.epoch, loaded.step, loaded.seed) == (1, 10, 0)


def test_mistakes_on_the_command_line_leave_one_sentence_and_status_2(tmp_path):
    """As users run it, with no traceback."""
    for command in (
        ["evaluate.py", str(tmp_path / "none.ckpt")],
        ["train.py", "--resume", "last", "--runs", str(tmp_path)],
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / command[0]), *command[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: no")


def test_schedules():
    assert Constant()(7, 3) == 1
    decay = StepDecay(epochs=[2, 4], factor=0.1)
    assert [round(decay(0, epoch), 6) for epoch in range(6)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    cosine = WarmupCosine(warmup_steps=10, total_steps=110, final=0.1)
    assert cosine(0, 0) == pytest.approx(1 / 11)
    assert cosine(10, 0) == pytest.approx(1.0)
    assert cosine(60, 0) == pytest.approx(0.55)
    assert cosine(110, 0) == pytest.approx(0.1) == cosine(1000, 9)
    values = [cosine(step, 0) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)
    with pytest.raises(ValueError, match="warmup_steps"):
        WarmupCosine(warmup_steps=10, total_steps=10)


def test_a_schedule_without_a_length_takes_that_of_the_run():
    cosine = WarmupCosine(warmup_steps=10, final=0.1)
    for steps in (30, 110, 1000):
        lasting = cosine.lasting(steps)
        assert lasting(steps, 0) == pytest.approx(0.1)
        assert max(lasting(step, 0) for step in range(steps)) == pytest.approx(1.0)
    assert cosine.lasting(110)(40, 0) == WarmupCosine(warmup_steps=10, total_steps=110, final=0.1)(40, 0)
    with pytest.raises(InputError, match="total_steps"):
        cosine.lasting(math.inf)


def test_a_schedule_that_ends_before_the_training_is_an_error(tmp_path, tiny_data):
    short = ["--model.schedule.init_args.total_steps=8", "--trainer.max_epochs=4"]
    with pytest.raises(InputError, match="total_steps 20"):
        run(tmp_path, *short, data=tiny_data)
    assert not (tmp_path / "tiny" / "metrics.csv").exists()


def test_iterations_by_epoch(tmp_path, monkeypatch):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    model = build(["--config", str(config), "--model.iterations_by_epoch={0: 2, 5: 4}"]).model
    asked = []
    for epoch in (0, 4, 5, 9):
        monkeypatch.setattr(type(model), "current_epoch", epoch)
        asked.append(model.training_iterations())
    assert asked == [2, 2, 4, 4]


def test_training_uses_the_iterations_of_the_epoch(tmp_path, tiny_data, monkeypatch):
    from setpred.model import SetPredictor

    forward, asked = SetPredictor.forward, []

    def spy(self, images, *, mask=None, iterations=None):
        if self.training:
            asked.append(iterations)
        return forward(self, images, mask=mask, iterations=iterations)

    monkeypatch.setattr(SetPredictor, "forward", spy)
    run(tmp_path, "--model.iterations_by_epoch={0: 1, 1: 2}", data=tiny_data)
    assert asked == [1] * 5 + [2] * 5
