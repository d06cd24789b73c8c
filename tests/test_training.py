"""Training end to end on tiny scenes: files of a run, exact resumption, clear errors, and no lost run."""

import errno
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import lightning.pytorch as pl
import pytest
import torch
import torchvision
import yaml
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from tiny import CONFIG, built, equal, metrics, run, set_file

from setpred import files
from setpred.aggregators import FSPool, SetEncoder
from setpred.checkpoint.allowlist import imported
from setpred.checkpoint.load import load_checkpoint, read_checkpoint
from setpred.commands import release
from setpred.commands.train import check_fit, train
from setpred.data.dataset import open_data
from setpred.decoders import DETR, IDSPN, SlotAttention
from setpred.encoders import ResNetTrunk
from setpred.errors import InputError
from setpred.inner import GradientDescent, Implicit, LatentMatching, Unrolled
from setpred.model import Step
from setpred.nn import batch_norms, unit_images
from setpred.schema import ElementSchema, categorical, continuous
from setpred.training import callbacks
from setpred.training.checkpointing import BestCheckpoint, Interrupted
from setpred.training.schedules import Constant, StepDecay, WarmupCosine, fitted, planned_steps
from setpred.training.task import SetPrediction


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_data):
    """A run of two epochs, with a checkpoint of every step in the folder `steps` next to it."""
    folder = tmp_path_factory.mktemp("finished")
    saving = {"dirpath": str(folder / "steps"), "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
    each_step = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    return run(folder, f"--trainer.callbacks+={json.dumps(each_step)}", data=tiny_data)


@pytest.fixture
def earlier(finished, tmp_path):
    """A copy of that run in `tmp_path`, which a test may continue or replace."""
    shutil.copytree(finished, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_run_writes_its_files(finished):
    assert {path.name for path in finished.iterdir()} >= {"best.ckpt", "last.ckpt", "config.yaml", "metrics.csv"}
    table = metrics(finished)
    assert [(row["epoch"], row["step"]) for row in table] == [("0", "5"), ("1", "10")]
    assert all(0 < float(row["train_loss"]) < 10 and 0 <= float(row["val_ap_inf"]) <= 1 for row in table)
    last = read_checkpoint(finished / "last.ckpt")
    assert (last["epoch"], last["global_step"]) == (1, 10)
    best = max(table, key=lambda row: float(row["val_ap"]))
    assert read_checkpoint(finished / "best.ckpt")["epoch"] == int(best["epoch"])
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["encoder"]["class_path"] == "setpred.encoders.SmallCNN"


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


def dspn(differentiation):
    objective = LatentMatching(SetEncoder(set_dim=5, hidden_dim=8, aggregator=FSPool(8, set_size=4)))
    descent = GradientDescent(iterations=3, learning_rate=0.1)
    return Vector(), IDSPN(objective, descent, differentiation, set_size=4, set_dim=5)


class Vector(torch.nn.Module):
    """Encoder of a vector of 8 numbers, whatever the images are."""

    image_size, latent_dim, shape = 16, 8, (8,)

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.randn(self.shape))

    def forward(self, image):
        return self.value.expand(len(image), *self.shape)


class Constants(Vector):
    """The same of 9 tokens."""

    token_dim, latent_dim, shape = 8, None, (9, 8)


SIZES = {"token_dim": 8, "set_size": 4, "set_dim": 5}
REFINING = {  # and the number of iterates before the last with a gradient
    "detr": (lambda: (Constants(), DETR(dim=8, heads=2, decoder_layers=3, encoder_layers=1, **SIZES)), 2),
    "slot attention": (lambda: (Constants(), SlotAttention(iterations=3, **SIZES)), 3),
    "dspn": (lambda: dspn(Unrolled()), 2),  # the start has none
}


@pytest.mark.parametrize("name", REFINING)
def test_auxiliary_losses_are_the_mean_of_those_of_the_earlier_iterates(name):
    torch.manual_seed(0)
    parts, count = REFINING[name]
    module = SetPrediction(*parts(), schema=None, auxiliary=3.0)
    batch = {"image": torch.rand(2, 3, 16, 16), "elements": torch.rand(2, 4, 5)}
    torch.manual_seed(1)
    losses, predicted = module.losses(module.step(batch, 0))
    torch.manual_seed(1)
    *earlier, last = module.model.refine(batch["image"])
    assert torch.equal(predicted, last)
    each = [module.loss(iterate, batch["elements"]) for iterate in earlier if iterate.requires_grad]
    assert len(each) == count
    torch.testing.assert_close(losses, module.loss(last, batch["elements"]) + 3 * sum(each) / count)
    with torch.no_grad():  # a validation has the last loss alone
        torch.manual_seed(1)
        losses, _ = module.losses(Step(module.model, module.loss, batch))
        torch.testing.assert_close(losses, module.loss(last, batch["elements"]))


def test_auxiliary_losses_without_effect_are_errors():
    module = SetPrediction(*dspn(Implicit()), schema=None, auxiliary=1.0)
    batch = {"image": torch.rand(2, 3, 16, 16), "elements": torch.rand(2, 4, 5)}
    with pytest.raises(InputError, match=r"auxiliary: expected earlier iterates .* got none from IDSPN"):
        module.losses(module.step(batch, 0))
    with pytest.raises(InputError, match="auxiliary >= 0"):
        SetPrediction(*dspn(Unrolled()), schema=None, auxiliary=-1.0)


def test_a_save_changes_nothing_and_frozen_statistics_stay(tmp_path, tiny_data):
    """Frozen are those of a part that its owner keeps in evaluation mode while training."""
    estimated = []

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            before = torch.get_rng_state(), [part.training for part in module.modules()]
            for _ in range(2):
                trainer.save_checkpoint(tmp_path / "step.ckpt")
            assert torch.equal(torch.get_rng_state(), before[0])
            assert [part.training for part in module.modules()] == before[1]

    cli = built(tmp_path, "--trainer.max_epochs=1", f"--data.init_args.folder={tiny_data}")
    encoder = cli.model.model.encoder
    last = batch_norms(encoder)[-1]
    encoder.trunk.eval()
    last.register_forward_hook(lambda *_: estimated.append(last.training and not encoder.training))
    cli.trainer.callbacks.append(Saving())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    for each in (encoder, load_checkpoint(cli.folder / "last.ckpt").model.encoder):
        assert torch.equal(batch_norms(each)[0].running_mean, torch.zeros(4))
        assert not torch.equal(batch_norms(each)[-1].running_mean, torch.zeros_like(last.running_mean))
    # five batches for each of five steps, though each is saved twice or more, and one is validated, too
    assert sum(estimated) == 5 * 5


# --- resuming, and earlier runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 5])
def test_a_resume_is_the_undisturbed_run_bit_by_bit(step, finished, earlier, tmp_path):
    """From within an epoch, and from its end before the validation; the written configuration repeats the run."""
    shutil.copy(finished.parent / "steps" / f"step={step}.ckpt", earlier / "step.ckpt")
    options = ["--runs", str(tmp_path), "--trainer.callbacks=null", "--resume", str(earlier / "step.ckpt")]
    folder = train(["--config", str(finished / "config.yaml"), *options])
    assert folder == earlier
    assert equal(weights(folder / "last.ckpt"), weights(finished / "last.ckpt"))
    ours, theirs = metrics(folder), metrics(finished)
    assert len(ours) == len(theirs) == 2  # without the later rows from before
    assert ours[-1]["val_loss"] == theirs[-1]["val_loss"]
    assert step == 5 or ours == theirs


def test_a_resume_within_an_epoch_with_another_batch_size_is_an_error(finished, tmp_path, tiny_data):
    path = finished.parent / "steps" / "step=3.ckpt"
    with pytest.raises(InputError, match=r"expected batch_size 8 and 1 processes, .* got 4 and 1; resume with"):
        run(tmp_path, f"--resume={path}", "--data.init_args.batch_size=4", data=tiny_data)


def test_a_resume_reports_other_settings_and_finished_runs(earlier, tmp_path, tiny_data, capsys):
    run(tmp_path, "--resume=last", "--model.learning_rate=0.5", data=tiny_data)
    printed = capsys.readouterr().out
    assert "model.learning_rate: 0.001 in the checkpoint against 0.5" in printed
    assert "nothing left to train" in printed


def test_a_resume_needs_a_checkpoint_of_the_same_model_compiled_or_not(finished, tmp_path):
    content = read_checkpoint(finished / "last.ckpt")
    del content["setpred"]["model"]["decoder"]["init_args"]["compile"]  # of before the option
    torch.save(content, tmp_path / "before.ckpt")
    for path in (finished / "last.ckpt", tmp_path / "before.ckpt"):
        cli = built(tmp_path, "--model.decoder.init_args.compile=true", f"--resume={path}")
        assert cli.resume_path() == path
    cli = built(tmp_path, "--model.decoder.init_args.descent.init_args.iterations=4", f"--resume={path}")
    with pytest.raises(InputError, match=r"another model.*decoder.init_args.descent.init_args.iterations: 3 .* 4"):
        cli.resume_path()
    with pytest.raises(InputError, match="nothing to resume"):
        built(tmp_path, "--resume=last", "--name=never").resume_path()


def test_the_best_checkpoint_stays_the_best_in_a_moved_folder(earlier):
    content = read_checkpoint(earlier / "last.ckpt")
    (state,) = (state for state in content["callbacks"].values() if state.get("monitor") == "val_ap")
    assert Path(state["best_model_path"]).parent != earlier
    best = BestCheckpoint(earlier, "val_ap", "max")
    best.load_state_dict(state)
    assert best.best_model_score == state["best_model_score"]
    assert list(best.best_k_models) == [best.kth_best_model_path] == [str(earlier / "best.ckpt")]


MISTAKES = {
    "val_check_interval": ["--trainer.val_check_interval=100"],  # which only the trainer notices
    "num_workers": ["--data.init_args.num_workers=-1"],
    "sets of 3, the data has sets of 4": ["--model.decoder.init_args.set_size=3"],
}
OUT_OF_RANGE = [
    "--seed_everything=-1",
    "--seed_everything=4294967296",
    *("--model.betas=[2,0.9]", "--model.learning_rate=-1", "--model.iterations_by_epoch={0: 0}"),
    *("--model.iterations_by_epoch={-1: 3}", "--trainer.precision=16-true", "--trainer.precision=64"),
    *("--trainer.accumulate_grad_batches=0", "--trainer.check_val_every_n_epoch=0", "--trainer.gradient_clip_val=-1"),
    *("--data.init_args.workers=-1", "--data.init_args.objects=[3,9]", "--data.init_args.set_size=3"),
]


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_a_value_out_of_range_is_an_error_before_scenes_are_rendered(option, tmp_path):
    with pytest.raises(InputError, match=r"expected .*, got "):
        built(tmp_path, option)


def test_an_earlier_run_is_kept_also_behind_a_link(finished, tmp_path, tiny_data, capsys):
    """And stays in its place where a start fails; another seed is another run."""
    disk = tmp_path / "disk"
    shutil.copytree(finished, disk / "tiny")
    (tmp_path / "tiny").symlink_to(disk / "tiny")
    for text, options in MISTAKES.items():
        with pytest.raises(InputError, match=text):
            run(tmp_path, *options, data=tiny_data)
        assert [path.name for path in disk.iterdir()] == ["tiny"]
        assert equal(weights(disk / "tiny" / "last.ckpt"), weights(finished / "last.ckpt"))
    with pytest.raises(InputError, match="is not finite"):  # before the first checkpoint
        run(tmp_path, "--model.learning_rate=1e38", data=tiny_data)
    assert (disk / "tiny" / "last.ckpt").read_bytes() == (finished / "last.ckpt").read_bytes()
    assert [path.name for path in disk.rglob("repro-*")] == ["repro-step-1.pt"]  # the message names it
    assert capsys.readouterr().out.count("moved the previous run back to") == 2
    run(tmp_path, "--trainer.max_epochs=1", "--seed_everything=5", data=tiny_data)
    assert "moved the previous run: it is kept in" in capsys.readouterr().out
    assert (disk / "tiny-before-1" / "last.ckpt").read_bytes() == (finished / "last.ckpt").read_bytes()
    ours = read_checkpoint(disk / "tiny" / "last.ckpt")
    assert ours["setpred"]["seed"] == 5
    assert not equal(ours["state_dict"], weights(finished.parent / "steps" / "step=5.ckpt"))


@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_a_callback_of_an_unknown_number_is_one_error(callback, tmp_path, tiny_data):
    options = (f"--trainer.callbacks=lightning.pytorch.callbacks.{callback}", "--trainer.callbacks.monitor=nonsense")
    with pytest.raises(InputError, match=r"cannot work with these options: .*nonsense.*val_ap"):
        run(tmp_path, *options, data=tiny_data)


@pytest.mark.parametrize("name", ["", ".", "..", "a/../.."])
def test_a_name_is_that_of_a_run_and_not_the_folder_of_all_runs(name, tmp_path, tiny_data):
    with pytest.raises(InputError, match="--name: expected the name of a run, got"):
        run(tmp_path, data=tiny_data, name=name)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


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


def test_fine_tuning_takes_what_fits_and_names_the_rest(finished, tmp_path, capsys):
    """From CLEVR's schema to another: the encoder has the weights of the checkpoint, layers of elements are new."""
    best = finished / "best.ckpt"
    theirs = {name.removeprefix("model."): value for name, value in weights(best).items()}
    cells = ElementSchema("cells", [continuous("radius", 1), categorical("label", "a", "b")], max_objects=4)
    data = str(set_file(tmp_path / "cells.h5", cells))
    cli = built(tmp_path, f"--init={best}", "--data", data, "--val", data)
    fresh = {name: value.clone() for name, value in cli.model.model.state_dict().items()}
    cli.load_initial_weights()
    ours = cli.model.model.state_dict()
    fits = {name for name, value in ours.items() if theirs[name].shape == value.shape}
    encoder = {name for name in ours if name.startswith("encoder.")}
    assert encoder <= fits < set(ours)
    for name, value in ours.items():
        assert torch.equal(value, (theirs if name in fits else fresh)[name])
    printed = capsys.readouterr().out
    assert f"took {len(fits)} of the model's {len(ours)} tensors; others keep their random start: " in printed
    for name in set(ours) - fits:
        shapes = ("x".join(map(str, each[name].shape)) for each in (theirs, ours))
        assert f"{name} ({' against '.join(shapes)})" in printed


def test_a_checkpoint_that_fits_nowhere_is_an_error(finished, tmp_path, tiny_data):
    best, other = finished / "best.ckpt", {"class_path": "torch.nn.Flatten"}
    mlp = {"class_path": "setpred.decoders.MLPDecoder", "init_args": {"latent_dim": 768, "set_size": 4}}
    parts = [f"--model.encoder={json.dumps(other)}", f"--model.decoder={json.dumps(mlp)}"]
    with pytest.raises(InputError, match="expected weights that fit the model, but none"):
        run(tmp_path, f"--init={best}", *parts, data=tiny_data, name="other")
    assert not (tmp_path / "other").exists()


PRETRAINED = {
    "class_path": "setpred.encoders.SmallCNN",
    "init_args": {
        "latent_dim": 16,
        "trunk": {
            "class_path": "setpred.encoders.ResNetTrunk",
            "init_args": {"image_size": 16, "stages": 1, "weights": "IMAGENET1K_V1"},
        },
    },
}


def test_pretrained_trunks_are_downloaded_once_at_the_start_of_a_run(tmp_path, tiny_data, monkeypatch):
    """Not by a resumed run, a checkpoint that is loaded, or `--init` of a trunk."""
    downloads, resnet = [], torchvision.models.resnet18()
    weights_of = torchvision.models.ResNet18_Weights

    def download(self, **options):
        assert options == {"progress": False, "check_hash": True, "weights_only": True}
        downloads.append(self)
        return resnet.state_dict()

    monkeypatch.setattr(weights_of, "get_state_dict", download)
    options = (f"--model.encoder={json.dumps(PRETRAINED)}", "--trainer.max_epochs=1")
    folder = run(tmp_path, *options, "--model.learning_rate=1e-30", data=tiny_data)
    assert downloads == [weights_of.IMAGENET1K_V1]
    trunk = load_checkpoint(folder / "last.ckpt").model.encoder.trunk.eval()
    resnet.eval()
    image = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for place, layer in enumerate((resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1)):
        for name, value in dict(layer.named_parameters()).items():
            torch.testing.assert_close(dict(trunk[place].named_parameters())[name], value, rtol=0, atol=1e-6)
    untouched = ResNetTrunk(image_size=16, stages=1).eval()
    untouched.load_state_dict(trunk.state_dict())  # the normalisation is no weight
    torch.testing.assert_close(trunk(image), untouched((image - mean) / std))
    run(tmp_path, *options[:1], "--resume=last", "--trainer.max_epochs=2", data=tiny_data)
    cli = built(tmp_path, *options, f"--init={folder / 'last.ckpt'}")
    cli.load_initial_weights()
    assert len(downloads) == 1


def test_pretrained_weights_that_cannot_be_had_are_one_error(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_: (_ for _ in ()).throw(URLError("no network")))
    options = (f"--model.encoder={json.dumps(PRETRAINED)}", "--trainer.max_epochs=1")
    with pytest.raises(InputError, match=r"IMAGENET1K_V1 .*no network.*; download https://.* into .*hub/checkpoints"):
        run(tmp_path, *options, data=tiny_data, name="other")
    assert not (tmp_path / "other").exists()
    unknown = options[0].replace("K_V1", "K_V7")
    with pytest.raises(InputError, match="expected weights IMAGENET1K_V1 for ResNet-18, got 'IMAGENET1K_V7'"):
        built(tmp_path, unknown)


def test_the_last_epoch_is_validated_whatever_the_interval(tmp_path, tiny_data):
    folder = run(tmp_path, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2", data=tiny_data)
    assert [bool(row["val_loss"]) for row in metrics(folder)] == [False, True, True]


def test_a_long_run_states_its_time_once(tmp_path, tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(callbacks, "TIMED_STEPS", (2, 4))
    run(tmp_path, "--trainer.max_epochs=1", data=tiny_data)
    assert "steps/s" not in capsys.readouterr().out  # a short one does not
    monkeypatch.setattr(callbacks, "NOTABLE_SECONDS", 0.0)
    run(tmp_path, data=tiny_data)
    assert len(re.findall(r"about 0 minutes, .*for the other 6 steps at [\d.]+ steps/s", capsys.readouterr().out)) == 1


def test_sizes_are_checked_before_scenes_are_rendered(tmp_path):
    with pytest.raises(InputError, match="encoder takes images of 32x32, the data has 16x16"):
        run(tmp_path, "--model.encoder.init_args.image_size=32", data=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_interrupted_run_reports_its_checkpoint(tmp_path, tiny_data, monkeypatch):
    step = SetPrediction.training_step

    def stopped(self, batch, batch_idx):
        if self.global_step == 7:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SetPrediction, "training_step", stopped)
    with pytest.raises(Interrupted, match=r"last\.ckpt has the training up to its latest save") as stopped:
        run(tmp_path, data=tiny_data)
    assert stopped.value.status == 130
    assert read_checkpoint(tmp_path / "tiny" / "last.ckpt")["epoch"] == 0


def test_a_full_disk_keeps_the_last_complete_checkpoint(earlier, tmp_path, tiny_data, monkeypatch):
    before, write_bytes = (earlier / "last.ckpt").read_bytes(), Path.write_bytes

    def full(self, content):
        if ".ckpt" in self.name:
            write_bytes(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(self, content)

    monkeypatch.setattr(files.Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"last.ckpt: the disk is full|best.ckpt: the disk is full"):
        run(tmp_path, "--resume=last", "--trainer.max_epochs=3", data=tiny_data)
    assert (earlier / "last.ckpt").read_bytes() == before
    assert not [path for path in earlier.iterdir() if "partial" in path.name]


def test_training_lowers_the_loss(tmp_path, tiny_data):
    table = metrics(run(tmp_path, "--trainer.max_epochs=8", "--model.learning_rate=0.01", data=tiny_data))
    assert float(table[-1]["train_loss"]) < 0.7 * float(table[0]["train_loss"])


# --- parts and options of users -------------------------------------------------------------------------------------

OWN_PARTS = """
import lightning.pytorch as pl
import torch
from torch import nn
from setpred.data.datamodule import RenderedScenes
from setpred.decoders import SetDecoder

class Flat(nn.Module):
    def forward(self, latent, iterations=None):
        return latent

class Needy(nn.Module):
    def forward(self, latent, image):
        return latent

class Mine(SetDecoder):
    def __init__(self, *, set_size: int, set_dim: int) -> None:
        super().__init__(latent_dim=16, set_size=set_size, set_dim=set_dim)
        self.network = nn.Linear(16, set_size * set_dim)

    def predictions(self, features, mask, iterations):
        yield self.network(features).unflatten(-1, (self.set_size, self.set_dim))

class Short(Mine):
    def predictions(self, features, mask, iterations):
        yield next(super().predictions(features, mask, iterations))[:, 1:]

class Detached(Mine):
    def predictions(self, features, mask, iterations):
        yield next(super().predictions(features, mask, iterations)).detach()

class Returning(Mine):
    def predictions(self, features, mask, iterations):
        return self.network(features)

class Silent(Mine):
    def predictions(self, features, mask, iterations):
        yield from ()

class Failing(Mine):
    def predictions(self, features, mask, iterations):
        yield features @ features

class Unfinished(SetDecoder):
    def __init__(self, *, set_size: int, set_dim: int) -> None:
        super().__init__(latent_dim=16, set_size=set_size, set_dim=set_dim)

class Count(nn.Module):
    monitor = "count"

class Blind(nn.Module):
    latent_dim = 16

    def forward(self, images):
        return images.flatten(1)[:, :16]

class Data(pl.LightningDataModule):
    pass
"""


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("decoder=own_parts.Flat", "SmallCNN and Flat: expected elements .*, got .2, 16. for a batch of 2"),
        ("decoder=own_parts.Needy", "SmallCNN and Needy cannot predict: .*iterations"),
        ("decoder=own_parts.Short", r"Short: expected elements \[batch, 4, 19\], got \[2, 3, 19\] for a batch of 2"),
        ("decoder=own_parts.Detached", "Detached: expected a prediction with a gradient, got one without; remove"),
        ("decoder=own_parts.Returning", "expected Returning.predictions to yield .*, got a Tensor; write yield"),
        ("decoder=own_parts.Silent", "expected Silent.predictions to yield at least one tensor, got none"),
        ("decoder=own_parts.Failing", r"Failing cannot predict: .*\(own_parts.py, line \d+\)"),
        ("decoder=own_parts.Unfinished", r"Unfinished has no method predictions\(features, mask, iterations\)"),
        ("loss=torch.nn.ReLU", r"the loss ReLU: .*arguments.*; give a loss of \(predicted, target\)"),
        ("metric=own_parts.Count", "metric Count: expected update, .* got no update, compute, reset, mode"),
    ],
)
def test_a_part_with_a_wrong_interface_is_named_before_anything_is_written(
    option, sentence, tmp_path, tiny_data, monkeypatch
):
    (tmp_path / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=sentence):
        run(tmp_path, f"--model.{option}", data=tiny_data)
    assert not (tmp_path / "tiny").exists()


def test_a_part_is_found_in_the_working_folder_and_an_error_of_its_module_is_located(tmp_path, monkeypatch):
    (tmp_path / "part_of_mine.py").write_text(OWN_PARTS)
    (tmp_path / "broken_part.py").write_text("zero = 0\n\n1 / zero\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    assert imported(["part_of_mine.Mine"])["part_of_mine.Mine"].__name__ == "Mine"
    for path, sentence in {
        "broken_part.Mine": r"--allow broken_part.Mine: .*division by zero \(broken_part.py, line 3\)",
        "part_of_mine.Nobody": "has no attribute 'Nobody'; expected package.module.Class",
        "no_such_part.Mine": "No module named 'no_such_part'",
    }.items():
        with pytest.raises(InputError, match=sentence):
            imported([path])


def test_a_run_without_an_image_size_warns_that_its_checkpoints_cannot_be_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load(CONFIG) | {"data": {"class_path": "own_parts.Data"}}
    for encoder, size in ((config["model"]["encoder"], 16), ({"class_path": "own_parts.Blind"}, None)):
        config["model"]["encoder"] = encoder
        allowed = ("--allow=own_parts.Data", "--allow=own_parts.Blind")
        cli = built(tmp_path, *allowed, config=yaml.safe_dump(config))
        check_fit(cli)
        assert cli.model.data_description["image_size"] == size
        assert ("will not read the checkpoints" in capsys.readouterr().out) == (size is None)


# --- schedules ------------------------------------------------------------------------------------------------------


def test_schedules():
    assert Constant()(7, 3) == 1
    decay = StepDecay(epochs=[2, 4], factor=0.1)
    assert [round(decay(0, epoch), 6) for epoch in range(6)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    cosine = WarmupCosine(warmup_steps=10, total_steps=110, final=0.1)
    assert [cosine(step, 0) for step in (0, 10, 60, 110, 1000)] == pytest.approx([1 / 11, 1, 0.55, 0.1, 0.1])
    values = [cosine(step, 0) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)
    with pytest.raises(ValueError, match="warmup_steps"):
        WarmupCosine(warmup_steps=10, total_steps=10)


def trainer(**changes):
    plain = {"max_steps": -1, "max_epochs": 4, "num_training_batches": 5, "accumulate_grad_batches": 1, "callbacks": []}
    return SimpleNamespace(**plain | changes)


def test_the_length_of_a_run():
    assert planned_steps(trainer()) == 20
    assert planned_steps(trainer(max_steps=7)) == 7
    assert planned_steps(trainer(accumulate_grad_batches=2)) == 12
    assert planned_steps(trainer(callbacks=[GradientAccumulationScheduler({0: 2, 1: 5})])) == 3 + 1 + 1 + 1
    assert planned_steps(trainer(max_epochs=-1)) == math.inf
    assert planned_steps(trainer(num_training_batches=math.inf, max_steps=9)) == 9


def test_a_schedule_without_a_length_takes_that_of_the_run_and_a_shorter_one_is_an_error():
    cosine = WarmupCosine(warmup_steps=10, final=0.1)
    for steps in (30, 110, 1000):
        lasting = fitted(cosine, trainer(max_steps=steps, max_epochs=-1))
        assert lasting(steps, 0) == pytest.approx(0.1)
        assert max(lasting(step, 0) for step in range(steps)) == pytest.approx(1.0)
    assert cosine.lasting(110)(40, 0) == WarmupCosine(warmup_steps=10, total_steps=110, final=0.1)(40, 0)
    with pytest.raises(InputError, match="total_steps"):
        fitted(cosine, trainer(max_epochs=-1))
    with pytest.raises(InputError, match="total_steps 20"):
        fitted(WarmupCosine(warmup_steps=2, total_steps=8), trainer())
