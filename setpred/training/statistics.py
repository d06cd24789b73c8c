"""Batch statistics of the weights that a training validates and saves."""

from typing import Any

import torch
from torch import Tensor, nn

from setpred.model import inputs_of
from setpred.nn import batch_norms, estimating_statistics, evaluating

STATISTICS_IMAGES = 1024  # training images for the statistics of validations and checkpoints
HASTY_IMAGES = 128  # training images for checkpoints that must cost little


class BatchStatistics:
    """Statistics of the encoder's batch normalisation for its present weights, from the first training images.

    Running averages trail behind the weights; see `setpred.nn.estimating_statistics`. Training does not read the
    estimates, so it is the same however often they are taken. Normalisations that a user keeps in evaluation mode
    while training stay as they are.

    Attributes:
        hasty: whether the next estimates are over `HASTY_IMAGES`.
    """

    def __init__(self) -> None:
        self.hasty = False
        self.reset()

    def reset(self) -> None:
        """Forget the images and what was estimated."""
        self._trained: list[nn.Module] = []
        self._inputs: list[tuple[Tensor, Tensor | None]] | None = None  # images or sets, and their masks
        self._estimated: list[Tensor] = []  # the encoder's weights and their statistics

    def note_trained(self, encoder: nn.Module) -> None:
        """Note which batch normalisations train; call it in training mode."""
        self._trained = [norm for norm in batch_norms(encoder) if norm.training]

    @torch.no_grad()
    def estimate(self, module: Any) -> None:
        """Estimate the statistics of a `SetPrediction` in training, unless they are those of the weights already.

        Uses `statistics_batches(images)` of the data module; without it the running averages stay. All processes
        must call it at the same step; they use the same images.
        """
        trainer = module._trainer
        data = trainer and getattr(trainer, "datamodule", None)
        if not self._trained or not hasattr(data, "statistics_batches") or trainer.state.fn != "fit":
            return
        if self._inputs is None:  # kept, for streamed scenes are drawn again
            self._inputs = []
            for batch in data.statistics_batches(STATISTICS_IMAGES):
                some, mask = inputs_of(trainer.strategy.batch_to_device(batch))
                # a non-finite image, which a training may skip, would spoil all statistics
                finite = some.isfinite().flatten(1).all(1)
                if finite.any():
                    self._inputs.append((some[finite], None if mask is None else mask[finite]))
        inputs = self._inputs
        if self.hasty:
            inputs = inputs[: max(1, HASTY_IMAGES // max((len(some) for some, _ in inputs), default=1))]
        encoder = module.model.encoder
        # compared by value: callbacks may have changed weights or statistics, too
        wanted = [torch.tensor(len(inputs)), *encoder.state_dict().values()]
        if len(wanted) == len(self._estimated) and all(map(torch.equal, wanted, self._estimated)):
            return
        with trainer.precision_plugin.forward_context(), evaluating(encoder), estimating_statistics(self._trained):
            for some, mask in inputs:
                module.model.encode(some, mask)
        self._estimated = [value.clone() for value in wanted]
