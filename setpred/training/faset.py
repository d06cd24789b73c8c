"""Two-stage training of attentional aggregation (FASet)."""

from typing import Any

import lightning.pytorch as pl

from setpred.aggregators import AttSets
from setpred.errors import InputError


class FASet(pl.Callback):
    """Two-stage training of a model with `AttSets` (FASet; Yang, Wang, Markham, Trigoni, IJCV 2020).

    The first stage trains everything but the attention, on one random element of each set (the paper makes an example
    of each element, with the same expected gradient). The second stage trains the attention alone, on complete sets;
    running statistics of batch normalisation continue. Validations see complete sets. The stage follows from the
    epoch, so a resumed run is in the right one.

        trainer: {callbacks: [{class_path: setpred.training.FASet, init_args: {single_epochs: 31}}]}

    Args:
        single_epochs: length of the first stage; 31 of 50 in the paper's code.

    Raises:
        InputError: a model without `AttSets`, when training starts.
    """

    def __init__(self, *, single_epochs: int) -> None:
        self.single_epochs = single_epochs

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.pools = [part for part in module.modules() if isinstance(part, AttSets)]
        if not self.pools:
            raise InputError("FASet trains the attention of AttSets, and the model has none: add one or drop FASet")
        attention = {id(parameter) for pool in self.pools for parameter in pool.attention.parameters()}
        learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.attention = [parameter for parameter in learned if id(parameter) in attention]
        self.base = [parameter for parameter in learned if id(parameter) not in attention]
        self.single: bool | None = None  # whether the first stage is under way

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        # not at the start of an epoch, which a run that is resumed within one does not reach
        single = trainer.current_epoch < self.single_epochs
        if single != self.single:
            self.single = single
            self._learn(base=single, attention=not single, single=single)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._learn(base=True, attention=True, single=False)

    def _learn(self, *, base: bool, attention: bool, single: bool) -> None:
        for parameters, learn in ((self.base, base), (self.attention, attention)):
            for parameter in parameters:
                parameter.requires_grad_(learn).grad = None  # the optimiser skips parameters without a gradient
        for pool in self.pools:
            pool.single = single
