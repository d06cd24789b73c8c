"""Checkpoints of a training: the best one, the last one, and one when a signal stops the training."""

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

# signals of preemption, of time limits, of closed terminals, and Ctrl-C
_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP", "SIGINT")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows lacks some


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint aside and renames it; loads tensors and plain types only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None):
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, and its score also where the run's folder was moved, unlike Lightning's callback.

    Epochs without a validation do not count.
    """

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = Path(str(self.dirpath)) / Path(state_dict["best_model_path"] or "none").name
        if path.is_file():
            state_dict = state_dict | {
                "dirpath": self.dirpath,
                "best_model_path": str(path),
                "kth_best_model_path": str(path),
                "best_k_models": {str(path): state_dict["best_model_score"]},
            }
        super().load_state_dict(state_dict)


class Interrupted(Exception):
    """A signal stopped the training.

    Args:
        last: path of last.ckpt.
        number: of the signal.
        saved: whether the checkpoint has all training steps.

    Attributes:
        status: exit status of the program by the convention of shells, 128 and the number of the signal.
    """

    def __init__(self, last: Path, number: int = signal.SIGINT, *, saved: bool = False) -> None:
        name = signal.Signals(number).name
        if saved:
            text = f"stopped by {name}; {last} has all training steps, continue with --resume last"
        elif last.exists():
            text = f"interrupted; {last} has the training up to its latest save, continue with --resume last"
        else:
            text = "interrupted before the first checkpoint"
        super().__init__(text)
        self.status = 128 + number


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, from which a run resumes exactly.

    Saves at the end of each epoch, before each validation, and every `minutes` within an epoch. On each of `SIGNALS`
    it saves after the present step and raises `Interrupted`, during a validation at once. A second Ctrl-C stops at
    once. A signal to one of several processes stops all at the same step.

    Batch statistics are over fewer images (`BatchStatistics.hasty`) in saves after every step, and in the first save on
    a signal within an epoch; a second save over all images follows.

    Args:
        path: of the checkpoint; the earlier one stays until the new one is complete.
        minutes: between two saves within an epoch; 0 saves after every step.

    Raises:
        Interrupted: after a signal, once the checkpoint is saved.
    """

    def __init__(self, path: Path, *, minutes: float) -> None:
        self.path, self.minutes = path, minutes
        self.before_validation = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.signal, self.saved = 0, time.monotonic()  # time of the latest save
        self.step = trainer.global_step  # the latest one
        module.statistics.hasty = self.before_validation = False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # the trainer restores the handlers at its end
                ignored = signal.getsignal(number) is signal.SIG_IGN
                if not (ignored and signal.Signals(number).name == "SIGHUP"):  # nohup ignores it
                    signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signal == number:
            raise KeyboardInterrupt
        self.signal = number
        # not by print, which the signal may have interrupted; and the terminal may be closed
        with suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: saving after this step, then stopping\n".encode())

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        # Between the batches of one step a save would lose gradients. After the last batch before a validation or the
        # end of an epoch a resume would skip these; both save at once anyway.
        loop = trainer.fit_loop
        if not stepped or trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            return
        number, due = self._agreed(trainer)
        if number or due:
            module.statistics.hasty = bool(number) or self.minutes == 0
            self._save(trainer)
            module.statistics.hasty = False
        if number:
            self._save(trainer)
            raise Interrupted(self.path, number, saved=True)

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.before_validation = True
        self._save(trainer)
        self.before_validation = False
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.world_size == 1 and self.signal and trainer.state.fn == "fit":
            raise Interrupted(self.path, self.signal, saved=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._save(trainer)
        self._stop_if_asked(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if self.before_validation:
            # Lightning would take the validation for a finished one and skip it, unless its first batch has started
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            started = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress |= {"total": dict(started), "current": dict(started), "is_last_batch": False}

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved = time.monotonic()

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if number := self._agreed(trainer)[0]:
            raise Interrupted(self.path, number, saved=True)

    def _agreed(self, trainer: pl.Trainer) -> tuple[int, bool]:
        """Number of the signal, 0 for none, and whether a save is due; equal in all processes."""
        due = trainer.is_global_zero and time.monotonic() - self.saved >= 60 * self.minutes
        if trainer.world_size == 1:
            return self.signal, due
        both = torch.tensor([self.signal, due], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
        number, due = both.tolist()
        return number, bool(due)
