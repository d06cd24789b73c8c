"""Trainings that are killed and resumed end as undisturbed ones, bit by bit; signals save first."""

import csv
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Trainings
from tiny import CONFIG

from setpred.checkpoint import read_checkpoint
from setpred.files import locked

ROOT = Path(__file__).resolve().parents[1]
STREAMED = CONFIG.replace("RenderedScenes", "StreamedScenes").replace("train_images: 40", "scenes_per_epoch: 44")
CONFIGS = {"file": CONFIG, "streamed": STREAMED}
EPOCHS = 3
TIMED = ("seconds", "data_waiting")  # of metrics.csv, which differ from run to run


class Runs:
    """Trainings of one configuration on data rendered once."""

    def __init__(self, folder: Path, data: Path, start: Trainings, kind: str) -> None:
        self.folder, self.start, self.kind = folder, start, kind
        config = folder / f"{kind}.yaml"
        config.write_text(CONFIGS[kind])
        self.arguments = ["--config", str(config), "--runs", str(folder), f"--trainer.max_epochs={EPOCHS}"]
        self.arguments += [f"--data.init_args.folder={data}"]
        self.numbers = itertools.count()
        self.whole = self.fresh()
        assert self.train(self.whole) == 0, start.log.read_text()

    def fresh(self) -> Path:
        return self.folder / f"{self.kind}-{next(self.numbers)}"

    def train(self, run: Path, *arguments: str, kill=None) -> int:
        return self.start(*self.arguments, "--name", run.name, *arguments, kill=kill)

    def check(self, run: Path) -> None:
        """The run has ended as the undisturbed one."""
        ours, theirs = (read_checkpoint(each / "last.ckpt") for each in (run, self.whole))
        for key in ("state_dict", "optimizer_states", "epoch", "global_step"):
            assert same(ours[key], theirs[key]), key
        assert table(run) == table(self.whole)
        assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in self.whole.iterdir())
        best, wanted = (read_checkpoint(each / "best.ckpt") for each in (run, self.whole))
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


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    trainings = Trainings(tmp_path_factory.mktemp("forked") / "log.txt")
    yield trainings
    trainings.close()


@pytest.fixture(scope="module", params=CONFIGS)
def runs(request, tmp_path_factory, tiny_data, start):
    return Runs(tmp_path_factory.mktemp("killed"), tiny_data, start, request.param)


def survive(runs: Runs, rng: random.Random, *, kills: int) -> list[str]:
    """Trains under the name of a new run, killed up to so many times on the way; how it was killed each time."""
    run, done = runs.fresh(), []
    minutes = rng.choice([0, 0, 0.001, 10])
    workers = rng.choice([0, 0, 2])
    options = [f"--save_minutes={minutes}", f"--data.init_args.num_workers={workers}", "--resume=auto"]
    for _ in range(kills):
        if rng.random() < 0.5:
            kill = {"seconds": rng.uniform(0.2, 3.0)}
        else:
            kill = {"call": rng.choice(["write", "fsync", "replace"]), "number": rng.randint(1, 25)}
        status = runs.train(run, *options, kill=kill)
        assert status in (0, -signal.SIGKILL), (status, kill, runs.start.log.read_text()[-3000:])
        if status == 0:
            break
        done.append(str(kill))
    assert runs.train(run, *options) == 0, (done, runs.start.log.read_text()[-3000:])
    runs.check(run)
    shutil.rmtree(run)
    return done


def test_a_killed_training_ends_as_an_undisturbed_one(runs):
    assert sum(len(survive(runs, random.Random(seed), kills=3)) for seed in range(2)) > 1


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(runs, capsys):
    """Twenty-four seeds each for files and streams, up to four kills each."""
    killed = [survive(runs, random.Random(100 + seed), kills=4) for seed in range(24)]
    with capsys.disabled():
        flat = list(itertools.chain(*killed))
        writing = sum("call" in kill for kill in flat)
        print(f"\n{runs.kind}: 24 runs, {len(flat)} kills, {writing} of them within a write; all ended the same")
    assert sum(map(bool, killed)) > 18


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_kill_in_every_write_leaves_whole_files(runs, call):
    """Whatever can be read after it is whole."""
    if runs.kind == "streamed":
        return
    run = runs.fresh()
    for number in (2, 5, 8):
        status = runs.train(run, "--resume=auto", "--save_minutes=0", kill={"call": call, "number": number})
        assert status == -signal.SIGKILL
        for path in run.glob("*.ckpt"):
            read_checkpoint(path)
        assert all(len(row) > 3 for row in (table(run) if (run / "metrics.csv").exists() else []))
    assert runs.train(run, "--resume=auto") == 0
    runs.check(run)
