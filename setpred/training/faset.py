"""Two-stage training of attentional aggregation (FASet)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from setpred.aggregators import AttSets
from setpred.errors import InputError


class FASet(pl.Callback):
    """Trains a model with `AttSets` in two stages (FASet; Yang, Wang, Markham, Trigoni, IJCV 2020).

    First everything but the attention, on single elements: in each step every set is seen as one of its elements,
    drawn at random (the paper makes an example of each; the expected gradient is the same). Then the attention alone,
    on whole sets, everything else held fixed; running statistics of batch normalisation go on. So the features are
    good for any number of elements, and the attention only learns how to combine them. Validation sees whole sets
    throughout. The stage follows from the epoch, so a resumed run is in the right one.

        trainer: {callbacks: [{class_path: setpred.training.FASet, init_args: {single_epochs: 31}}]}

    Args:
        single_epochs: length of the first stage; the paper's code has 31 of 50.
    """

    def __init__(self, *, single_epochs: int) -> None:
        self.single_epochs = single_epochs
        self.stage: bool | None = None

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.pools = [module for module in module.modules() if isinstance(module, AttSets)]
        if not self.pools:
            raise InputError("FASet trains the attention of AttSets, and the model has none: add one or drop FASet")
        attention = {id(parameter) for pool in self.pools for parameter in pool.attention.parameters()}
        learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.attention = [parameter for parameter in learned if id(parameter) in attention]
        self.base = [parameter for parameter in learned if id(parameter) not in attention]
        self.stage = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        # before a batch, not an epoch, whose start does not come again where a run is resumed within one
        single = trainer.current_epoch < self.single_epochs
        if single != self.stage:
            self.stage = single
            self._learn(base=single, attention=not single, single=single)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._learn(base=True, attention=True, single=False)

    def _learn(self, *, base: bool, attention: bool, single: bool) -> None:
        for parameters, learn in ((self.base, base), (self.attention, attention)):
            for parameter in parameters:
                # without a gradient the optimiser leaves a parameter be: no momentum, no decay
                parameter.requires_grad_(learn).grad = None
        for pool in self.pools:
            pool.single = single
