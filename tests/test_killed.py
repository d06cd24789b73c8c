"""Killed and resumed trainings end as undisturbed ones, bit by bit; signals save first."""

import itertools
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import Trainings
from tiny import CONFIG, metrics

from setpred.checkpoint.load import TRAINED, load_checkpoint, read_checkpoint
from setpred.checkpoint.release import export
from setpred.commands.train import build
from setpred.errors import InputError
from setpred.nn import batch_norms, estimating_statistics, unit_images
from setpred.training.run_folder import run_lock

STREAMED = CONFIG.replace("datamodule.RenderedScenes", "streamed.StreamedScenes").replace(
    "train_images: 40", "scenes_per_epoch: 44"
)
CONFIGS = {"file": CONFIG, "streamed": STREAMED}
EPOCHS = 3


class Runs:
    """Trainings of one configuration on data rendered once."""

    def __init__(self, folder: Path, data: Path, start: Trainings, kind: str, *options: str) -> None:
        self.folder, self.start, self.kind = folder, start, kind
        config = folder / f"{kind}.yaml"
        config.write_text(CONFIGS[kind])
        self.arguments = ["--config", str(config), "--runs", str(folder), f"--trainer.max_epochs={EPOCHS}"]
        self.arguments += [f"--data.init_args.folder={data}", "--data.init_args.eval_batch_size=6", *options]
        self.numbers = itertools.count()
        if not any(data.glob("*.h5")):
            self.train(self.fresh(), "--trainer.max_epochs=1")  # renders, which the next one's time leaves out
        self.undisturbed = self.fresh()
        begun = time.monotonic()
        assert self.train(self.undisturbed) == 0, start.log.read_text()
        self.seconds = time.monotonic() - begun

    def fresh(self) -> Path:
        return self.folder / f"{self.kind}-{next(self.numbers)}"

    def train(self, run: Path, *arguments: str, kill=None) -> int:
        return self.start(*self.arguments, "--name", run.name, *arguments, kill=kill)

    def check(self, run: Path) -> None:
        """The run has ended as the undisturbed one."""
        ours, theirs = (read_checkpoint(each / "last.ckpt") for each in (run, self.undisturbed))
        for key in ("state_dict", TRAINED, "optimizer_states", "epoch", "global_step"):
            assert same(ours.get(key), theirs.get(key)), key
        assert metrics(run) == metrics(self.undisturbed)
        assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in self.undisturbed.iterdir())
        best, wanted = (read_checkpoint(each / "best.ckpt") for each in (run, self.undisturbed))
        assert same(best["state_dict"], wanted["state_dict"])


def same(one, other) -> bool:
    """Equal bit by bit, whatever it holds."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    trainings = Trainings(tmp_path_factory.mktemp("forked") / "log.txt")
    yield trainings
    trainings.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_data, start):
    return Runs(tmp_path_factory.mktemp("killed"), tiny_data, start, "file")


@pytest.fixture(scope="module")
def streams(tmp_path_factory, tiny_data, start):
    return Runs(tmp_path_factory.mktemp("killed"), tiny_data, start, "streamed")


@pytest.fixture(params=["files", "streams"])
def runs(request):
    return request.getfixturevalue(request.param)


def survive(runs: Runs, rng: random.Random, *, kills: int, timed: bool) -> list[str]:
    """Train a new run, killed up to `kills` times and resumed; return the kills. Its files are always complete."""
    run, done = runs.fresh(), []
    minutes = rng.choice([0, 0, 0.001, 10])
    workers = rng.choice([0, 0, 2])
    options = [f"--save_minutes={minutes}", f"--data.init_args.num_workers={workers}", "--resume=auto"]
    for _ in range(kills):
        call = rng.choice(["write", "fsync", "replace", "validation_step"])
        kill = {"call": call, "number": rng.randint(1, 6)}  # an undisturbed run has at least so many of each
        if timed and rng.random() < 0.5:
            kill = {"seconds": rng.uniform(0.1, 0.9) * runs.seconds}
        status = runs.train(run, *options, kill=kill)
        assert status in (0, -signal.SIGKILL), (status, kill, runs.start.log.read_text()[-3000:])
        if status == 0:
            break
        done.append(str(kill))
        for path in run.glob("*.ckpt"):
            read_checkpoint(path)
        assert all(len(row) > 3 for row in (metrics(run) if (run / "metrics.csv").exists() else []))
    assert runs.train(run, *options) == 0, (done, runs.start.log.read_text()[-3000:])
    runs.check(run)
    shutil.rmtree(run)
    return done


@pytest.mark.parametrize(
    ("seeds", "kills", "timed"), [(2, 3, False), pytest.param(24, 4, True, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_killed_training_ends_as_an_undisturbed_one(runs, seeds, kills, timed):
    """In writes and validations, and with `timed` at any moment, too."""
    done = [survive(runs, random.Random(seed), kills=kills, timed=timed) for seed in range(seeds)]
    assert sum(map(len, done)) >= seeds


STOPPED = [  # call, its number, signal, steps that are saved
    ("training_step", 2, signal.SIGUSR1, 2),
    ("training_step", 5, signal.SIGTERM, 5),  # the last one of an epoch, before its validation
    ("validation_step", 2, signal.SIGUSR1, 5),
    ("training_step", 7, signal.SIGINT, 7),
    ("validation_step", 4, signal.SIGTERM, 10),
    ("training_step", 15, signal.SIGTERM, 15),  # the last one of the training
]


@pytest.mark.parametrize(("call", "number", "sent", "steps"), STOPPED)
def test_a_signal_saves_first_and_the_resume_is_exact(call, number, sent, steps, files):
    run = files.fresh()
    assert files.train(run, kill={"call": call, "number": number, "signal": sent}) == 128 + sent
    assert f"stopped by {sent.name}" in files.start.log.read_text()
    assert read_checkpoint(run / "last.ckpt")["global_step"] == steps
    assert files.train(run, "--resume=last") == 0
    files.check(run)


def test_a_checkpoint_within_an_epoch_and_its_release_have_the_statistics_of_its_weights(files, tmp_path):
    """After a kill; running averages would trail behind at this learning rate."""
    run, kill = files.fresh(), {"call": "training_step", "number": 8, "signal": signal.SIGKILL}
    files.train(run, "--model.learning_rate=0.05", "--save_minutes=0", kill=kill)
    (release, *_) = export(run / "last.ckpt", tmp_path / "last.safetensors")
    data = build([*files.arguments, "--name", run.name]).datamodule
    data.setup("fit")
    encoder, released = (load_checkpoint(path).model.encoder for path in (run / "last.ckpt", release))
    saved, theirs = ([norm.running_var.clone() for norm in batch_norms(each)] for each in (encoder, released))
    with torch.no_grad(), estimating_statistics(batch_norms(encoder)):
        for batch in data.statistics_batches(1024):
            encoder(unit_images(batch["image"]))
    for norm, ours, other in zip(batch_norms(encoder), saved, theirs, strict=True):
        torch.testing.assert_close(ours, norm.running_var)
        assert torch.equal(ours, other)


VALIDATED = {  # option, and validation steps at which a signal comes
    "seldom": ("--trainer.check_val_every_n_epoch=2", (2,)),
    "often": ("--trainer.val_check_interval=2", (1, 4)),
}


@pytest.mark.parametrize("when", VALIDATED)
def test_a_signal_saves_first_whenever_there_are_validations(when, tmp_path, tiny_data, start):
    """Also in an epoch without a validation, and in one that continues after it."""
    option, steps = VALIDATED[when]
    runs = Runs(tmp_path, tiny_data, start, "file", option)
    validated = [row["val_ap"] != "" for row in metrics(runs.undisturbed)]
    assert validated == ([False, True, True] if when == "seldom" else [True] * EPOCHS)  # the last one always
    for call, number in [("training_step", 5), *(("validation_step", step) for step in steps)]:
        run = runs.fresh()
        kill = {"call": call, "number": number, "signal": signal.SIGTERM}
        assert runs.train(run, kill=kill) == 128 + signal.SIGTERM
        assert runs.train(run, "--resume=last") == 0, start.log.read_text()[-3000:]
        runs.check(run)


def test_a_resume_with_averaged_weights_is_exact(tmp_path, tiny_data, start):
    """Killed after a step, stopped within an epoch, and within a validation, where the average is in place."""
    averaging = '--trainer.callbacks=[{"class_path": "setpred.training.EMA", "init_args": {"decay": 0.8}}]'
    runs = Runs(tmp_path, tiny_data, start, "file", averaging)
    run = runs.fresh()
    for call, number, sent in [
        ("training_step", 4, signal.SIGKILL),
        ("training_step", 1, signal.SIGTERM),
        ("validation_step", 2, signal.SIGTERM),
        ("validation_step", 3, signal.SIGKILL),
    ]:
        kill = {"call": call, "number": number, "signal": sent}
        status = runs.train(run, "--resume=auto", "--save_minutes=0", kill=kill)
        assert status == (-sent if sent == signal.SIGKILL else 128 + sent), start.log.read_text()[-3000:]
    content = read_checkpoint(run / "last.ckpt")
    assert content["global_step"] == 10
    assert not same(content["state_dict"], content[TRAINED])
    assert runs.train(run, "--resume=auto") == 0, start.log.read_text()[-3000:]
    runs.check(run)


@pytest.mark.parametrize("number", [1, 3])
def test_a_kill_within_a_validation_costs_no_step(files, number):
    run = files.fresh()
    kill = {"call": "validation_step", "number": number, "signal": signal.SIGKILL}
    assert files.train(run, "--save_minutes=1000", kill=kill) == -signal.SIGKILL
    assert read_checkpoint(run / "last.ckpt")["global_step"] == 5 * ((number + 1) // 2)  # two batches a validation
    assert files.train(run, "--resume=last") == 0
    files.check(run)


def test_a_resume_falls_back_from_a_damaged_last_checkpoint_to_the_best(files):
    run = files.fresh()
    assert files.train(run) == 0
    best = read_checkpoint(run / "best.ckpt")["epoch"]
    (run / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:1000])
    assert files.train(run, "--resume=last") == 0
    assert f"falling back to {run / 'best.ckpt'}" in files.start.log.read_text()
    assert best + 1 == EPOCHS or read_checkpoint(run / "last.ckpt")["epoch"] == EPOCHS - 1


def test_a_signal_to_the_whole_group_saves_first(streams):
    """As from a scheduler or a terminal; the data loader's processes continue until the run has saved."""
    run, workers = streams.fresh(), "--data.init_args.num_workers=2"
    for sent in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        kill = {"call": "training_step", "number": 3, "signal": sent, "group": True}
        assert streams.train(run, workers, "--resume=auto", kill=kill) == 128 + sent, streams.start.log.read_text()
    assert read_checkpoint(run / "last.ckpt")["global_step"] == 9
    assert "Traceback" not in streams.start.log.read_text()
    assert streams.train(run, workers, "--resume=auto") == 0
    streams.check(run)


def test_two_trainings_do_not_share_a_folder(tmp_path, monkeypatch):
    """The second one would move the folder of the first."""
    monkeypatch.setattr("setpred.training.run_folder.PATIENCE", 0.2)
    with run_lock(tmp_path / "run"):
        with (
            pytest.raises(InputError, match=r"another training writes into .*run; wait for its end"),
            run_lock(tmp_path / "run"),
        ):
            pytest.fail("both have it")
        with run_lock(tmp_path / "other"):
            pass
    with run_lock(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
