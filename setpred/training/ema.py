"""Exponential moving average of the weights (EMA)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from setpred.checkpoint.load import TRAINED
from setpred.errors import InputError


class EMA(pl.Callback):
    """Exponential moving average of the weights for validations and checkpoints; training is the same without.

        average ← d · average + (1 - d) · weights,  d = min(decay, (1 + t) / (10 + t))

    after optimiser step t. d grows from 2/11, as in TensorFlow's `ExponentialMovingAverage` with `num_updates`, so that
    the untrained weights are soon forgotten. Skipped steps (`on_not_finite`) leave the average as it is.

    Validations, the `state_dict` of checkpoints, and the module after training have the average, with its own batch
    statistics. Checkpoints hold the trained weights, too: a resumed run is exact. One that is resumed without this
    callback starts from the average.

        trainer: {callbacks: [{class_path: setpred.training.EMA, init_args: {decay: 0.999}}]}

    Args:
        decay: limit of d, in [0, 1): the average is over about the last 1 / (1 - d) steps.

    Raises:
        InputError: another decay.
    """

    def __init__(self, *, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay: expected a number of at least 0 and below 1, got {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # while `inside`, the trained weights
        self.inside = False
        self.step = 0  # the latest one

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        self.average, self.inside = {}, False  # before the state of a resumed run comes

    def on_load_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if TRAINED in checkpoint and trainer.state.fn == "fit":
            self.average = {name: checkpoint["state_dict"][name] for name, _ in module.named_parameters()}
            module.load_state_dict(checkpoint[TRAINED])

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        named = module.named_parameters()  # on the device by now
        self.average = {name: self.average.get(name, own).detach().to(own, copy=True) for name, own in named}
        self.step = trainer.global_step
        module.averaged = lambda: self.averaged(module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        # a skipped step has no gradients
        if stepped and any(weight.grad is not None for weight in module.parameters()):
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            for average, weight in zip(self.average.values(), module.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._swap(module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._swap(module)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if self.average:
            checkpoint[TRAINED] = checkpoint["state_dict"] | (self.average if self.inside else {})
            with self.averaged(module):
                checkpoint["state_dict"] = {name: value.clone() for name, value in module.state_dict().items()}

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._swap(module)
        self.average, self.inside, module.averaged = {}, False, nullcontext

    @contextmanager
    def averaged(self, module: pl.LightningModule) -> Iterator[None]:
        """Within, the module has the average."""
        swapped = not self.inside
        if swapped:
            self._swap(module)
        try:
            yield
        finally:
            if swapped:
                self._swap(module)

    @torch.no_grad()
    def _swap(self, module: pl.LightningModule) -> None:
        """Swap average and weights."""
        self.inside = not self.inside
        for average, weight in zip(self.average.values(), module.parameters(), strict=bool(self.average)):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
