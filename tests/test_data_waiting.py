"""The share of a training that waits for its data: seen where data are slow, gone where they are there."""

import csv
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from setpred.callbacks import DataWaiting, EpochLines, MetricsFile
from setpred.data.order import EpochPermutation, ResumableLoader

PAUSE = 0.02


class Numbers(Dataset):
    def __init__(self, pause: float) -> None:
        self.pause = pause

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        time.sleep(self.pause)
        return float(index)


class Model(LightningModule):
    """Learns nothing, in so many seconds a step and a validation step."""

    monitor = "val_loss"

    def __init__(self, step: float, validation: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.step, self.validation = step, validation

    def training_step(self, batch, _):
        time.sleep(self.step)
        return self.weight.square().sum() + batch.sum()

    def validation_step(self, batch, _):
        time.sleep(self.validation)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def shares(tmp_path, model, loader, val=None) -> list[str | None]:
    """What metrics.csv has of it, an epoch each; the first one also starts things."""
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[DataWaiting(), MetricsFile(tmp_path / "metrics.csv"), EpochLines()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, loader, val)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        return [row.get("data_waiting") for row in csv.DictReader(file)]


def loader(pause: float) -> ResumableLoader:
    return ResumableLoader(Numbers(pause), 2, sampler=EpochPermutation(8, seed=0), drop_last=True)


@pytest.mark.filterwarnings("ignore")  # Lightning warns about workers and few batches
def test_a_slow_data_set_is_seen_to_wait_and_an_instant_one_is_not(tmp_path, capsys):
    slow = shares(tmp_path, Model(step=0.0), loader(PAUSE))
    assert all(0 < float(share) <= 1 for share in slow)
    assert float(slow[-1]) > 0.5
    assert "of the training waits for data)" in capsys.readouterr().out
    instant = shares(tmp_path, Model(step=2 * PAUSE), loader(0.0))
    assert all(0 <= float(share) <= 1 for share in instant)
    assert float(instant[-1]) < 0.5


@pytest.mark.filterwarnings("ignore")
def test_validation_is_neither_waiting_nor_training(tmp_path):
    """A slow one changes nothing: as training it would bring the share under a half."""
    slow = Model(step=0.0, validation=20 * PAUSE)
    assert float(shares(tmp_path, slow, loader(PAUSE), DataLoader(torch.zeros(2)))[-1]) > 0.5


@pytest.mark.filterwarnings("ignore")
def test_a_loader_that_does_not_tell_is_not_timed(tmp_path):
    assert shares(tmp_path, Model(step=0.0), DataLoader(Numbers(0.0), 2)) == [None, None]


def test_a_loader_tells_when_it_was_asked():
    batches, before = loader(0.0), time.perf_counter()
    asked = []
    for _ in batches:
        asked.append(batches.asked)
    assert asked == sorted(asked)
    assert before < asked[0] < asked[-1] < time.perf_counter()
