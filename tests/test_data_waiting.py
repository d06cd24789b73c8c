"""The logged share of a training that waits for data is that of reading."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tiny import QUIET
from torch.utils.data import DataLoader, Dataset

from setpred.data import loading
from setpred.data.loading import EpochPermutation, ResumableLoader
from setpred.training import callbacks
from setpred.training.callbacks import DataWaiting, EpochLines, MetricsFile


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A stand-in for the module `time`, which stands still unless it is moved."""
    clock = SimpleNamespace(now=1000.0, perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    for module in (callbacks, loading):
        monkeypatch.setattr(module, "time", clock)
    return clock


class Numbers(Dataset):
    """Eight numbers, each read in `seconds`."""

    def __init__(self, clock: SimpleNamespace, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        self.clock.now += self.seconds
        return float(index)


class Model(LightningModule):
    """A step and a validation step take the given seconds."""

    monitor, say = "val_loss", print

    def __init__(self, clock: SimpleNamespace, step: float, validation: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.clock, self.step, self.validation = clock, step, validation

    def training_step(self, batch, _):
        self.clock.now += self.step
        return self.weight.square().sum() + batch.sum()

    def validation_step(self, batch, _):
        self.clock.now += self.validation

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def shares(tmp_path, model, loader, val=None, **options) -> list[str | None]:
    """Column of metrics.csv, one entry per epoch."""
    watching = [DataWaiting(), MetricsFile(tmp_path / "metrics.csv"), EpochLines()]
    trainer = Trainer(max_epochs=2, callbacks=watching, num_sanity_val_steps=0, **QUIET, **options)
    trainer.fit(model, loader, val)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        return [row.get("data_waiting") for row in csv.DictReader(file)]


def loader(clock: SimpleNamespace, seconds: float) -> ResumableLoader:
    """Batches of two."""
    return ResumableLoader(Numbers(clock, seconds), 2, sampler=EpochPermutation(8, seed=0), drop_last=True)


@pytest.mark.parametrize(("reading", "step", "share"), [(3, 2, 0.75), (1, 6, 0.25), (0, 1, 0.0), (1, 0, 1.0)])
def test_the_share_is_that_of_reading(tmp_path, capsys, clock, reading, step, share):
    """Batches of two: 2 reading / (2 reading + step)."""
    found = shares(tmp_path, Model(clock, step), loader(clock, reading))
    assert [float(value) for value in found] == pytest.approx([share, share])
    assert ("of the training waits for data)" in capsys.readouterr().out) == (share > 0)


def test_validation_is_neither_waiting_nor_training(tmp_path, clock):
    """A slow one changes nothing, between epochs or within one."""
    val = DataLoader(torch.zeros(2))
    for within in ({}, {"val_check_interval": 2}):
        found = shares(tmp_path, Model(clock, step=2, validation=1000), loader(clock, 3), val, **within)
        assert [float(value) for value in found] == pytest.approx([0.75, 0.75])


def test_only_loaders_with_the_time_asked_are_measured(tmp_path, clock):
    assert shares(tmp_path, Model(clock, step=1), DataLoader(Numbers(clock, 1), 2)) == [None, None]
    batches, asked, start = loader(clock, 3), [], clock.now
    for _ in batches:
        asked.append(batches.asked - start)
        clock.now += 100
    assert asked == [0, 106, 212, 318]
