"""What a training saves and when: whole checkpoints, the best one, and the last one, also when a signal comes."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from setpred.checkpoint.load import save_checkpoint

# how schedulers announce a preemption or the end of a time limit, terminals that they close, and users Ctrl-C
_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP", "SIGINT")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows lacks some


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint aside and renames it; loads tensors and plain types only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None):
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)


class BestCheckpoint(ModelCheckpoint):
    """Remembers the best score also when the run's folder was moved, where Lightning starts to count anew.

    Epochs without a validation before them are passed over in silence.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath))
        path = here / Path(state_dict["best_model_path"] or "none").name
        if path.is_file():
            score = state_dict["best_model_score"]
            state_dict = state_dict | {
                "dirpath": self.dirpath,
                "best_model_path": str(path),
                "kth_best_model_path": str(path),
                "best_k_models": {str(path): score},
            }
        super().load_state_dict(state_dict)


class StopSignalError(Exception):
    """A signal asked the training to stop, and what was trained is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class LastCheckpoint(Checkpoint):
    """Keeps a checkpoint from which a run goes on as if nothing had happened.

    It is saved at the end of each epoch, before each validation, and within an epoch every `minutes`, so that a kill
    costs at most these. On each of `SIGNALS` it is saved after the present step, and `StopSignalError` raised; during
    a validation at once, for nothing was trained since it began. A second Ctrl-C does not wait. With many processes a
    signal to any of them stops all, at the same step.

    The batch statistics in it are those of its weights. Two kinds of saves take them over `HASTY_IMAGES`: those after
    every step, and the first one on a signal within an epoch, which a second one over all `STATISTICS_IMAGES` follows.

    Args:
        path: of the checkpoint; an earlier one stays until the new one is whole.
        minutes: between two saves within an epoch; 0 saves after every step.
    """

    def __init__(self, path: Path, *, minutes: float) -> None:
        self.path, self.minutes = path, minutes
        self.signal = 0
        self.saved = 0.0  # when
        self.step = -1  # the last one seen
        self.before_validation = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signal, self.saved, self.step = 0, time.monotonic(), trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # the trainer restores what was there when it ends
                ignored = signal.getsignal(number) is signal.SIG_IGN
                if not (ignored and signal.Signals(number).name == "SIGHUP"):  # as nohup leaves it
                    signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signal == number:
            raise KeyboardInterrupt
        self.signal = number
        # not printed: the signal may have come in the middle of a print; and the terminal may be closed
        with suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: saving after this step, then stopping\n".encode())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        # Between the batches of one step gradients would be lost. After the last batch before a validation or the end
        # of an epoch, Lightning would go on with the next one; they come at once, and save.
        loop = trainer.fit_loop
        if not stepped or trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            return
        number, due = self._agreed(trainer)
        if number or due:
            pl_module.hasty = bool(number) or self.minutes == 0
            try:
                self._save(trainer)
            finally:
                pl_module.hasty = False
        if number:
            self._save(trainer)
            raise StopSignalError(number)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.before_validation = True
        try:
            self._save(trainer)
        finally:
            self.before_validation = False
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.world_size == 1 and self.signal and trainer.state.fn == "fit":
            raise StopSignalError(self.signal)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)
        self._stop_if_asked(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.before_validation:
            # Lightning takes a checkpoint of this moment for one of a validation that is over and leaves it out, unless
            # its first batch is under way
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            under_way = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress |= {"total": dict(under_way), "current": dict(under_way), "is_last_batch": False}

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved = time.monotonic()

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        number, _ = self._agreed(trainer)
        if number:
            raise StopSignalError(number)

    def _agreed(self, trainer: pl.Trainer) -> tuple[int, bool]:
        """The signal that came, 0 if none, and whether a save is due: the same in all processes."""
        due = trainer.is_global_zero and time.monotonic() - self.saved >= 60 * self.minutes
        if trainer.world_size == 1:
            return self.signal, due
        both = torch.tensor([self.signal, due], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
        number, due = both.tolist()
        return number, bool(due)


def checkpoint_callbacks(folder: Path, monitor: str, mode: str, *, minutes: float) -> list[Checkpoint]:
    """`best.ckpt` by what is monitored, and `last.ckpt`.

    Two callbacks, since one with `save_last` writes last.ckpt only when it also saves a better one.
    """
    best = BestCheckpoint(
        folder,
        filename="best",
        monitor=monitor,
        mode=mode,
        save_top_k=1,
        save_on_train_epoch_end=True,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    return [best, LastCheckpoint(folder / "last.ckpt", minutes=minutes)]
