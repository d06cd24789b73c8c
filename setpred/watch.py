"""What a training tells of its numbers: steps that were skipped or mended, and descents whose residual rises."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from setpred.decoders import IDSPN
from setpred.diagnosis import Step
from setpred.inner import Unrolled
from setpred.inner.diagnostics import Recorded, residual_growth, residual_norms

WATCHED = 4  # samples, of the first validation batch
RISING = (
    3.0  # descents that settle end at most 1.8 times above their least residual, those that diverge 5 times and more
)


class NotFiniteCounts(pl.Callback):
    """Logs what `setpred.guard.Guard` has counted since the training began, unless its policy is to stop.

    `skipped_batches` and `sanitised_gradients`, which are the same in all processes, and `sanitised_samples` of all.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.guard.policy != "stop":
            pl_module.log_dict({name: float(count) for name, count in pl_module.not_finite_counts().items()})


class ResidualGrowth(pl.Callback):
    """Measures the descent in each validation: `val_residual_growth`, and a sentence where it diverges.

    The median, over the first `WATCHED` samples, of `setpred.inner.diagnostics.residual_growth`; of the descent as it
    is, whichever iterate is kept. Draws no random numbers and changes nothing. Decoders without a descent have none.
    """

    def __init__(self) -> None:
        self.said = -1  # in which epoch

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        decoder = pl_module.model.decoder
        if batch_idx or not isinstance(decoder, IDSPN):
            return
        few = {name: value[:WATCHED] for name, value in batch.items()}
        with trainer.precision_plugin.forward_context():
            norms = descent_norms(Step(pl_module.model, pl_module.loss, few))
        if not norms[0].isfinite().all():
            return  # broken before the descent, which the validation says itself
        growth = residual_growth(norms).median()
        pl_module.log("val_residual_growth", growth.float(), batch_size=WATCHED, sync_dist=True)
        if growth > RISING and self.said != trainer.current_epoch and trainer.is_global_zero:
            self.said = trainer.current_epoch
            pl_module.say(f"epoch {trainer.current_epoch}: {rising(decoder, float(growth))}")


def rising(decoder: IDSPN, growth: float) -> str:
    """The sentence for the user."""
    descent, kept = decoder.descent, getattr(decoder.differentiation, "best", False)
    rate, momentum = (float(torch.as_tensor(value).detach()) for value in (descent.learning_rate, descent.momentum))
    return (
        f"the inner descent diverges: its residual ends {growth:.3g} times above the least on the way; lower the "
        f"learning_rate ({rate:.3g}) or momentum ({momentum:.3g}) of model.decoder.init_args.descent"
        + ("" if kept else ", or keep the best iterate with setpred.inner.Implicit's best: true")
    )


@torch.no_grad()
def descent_norms(step: Step) -> Tensor:
    """|R(Y_t)| along the decoder's descent on a batch, `[iterates, batch]`, whichever iterate it keeps."""
    decoder: Any = step.model.decoder
    recorded, own = Recorded(Unrolled()), (decoder.differentiation, decoder.compiled)
    # as written: a batch of another size would be compiled anew
    decoder.differentiation, decoder.compiled = recorded, False
    try:
        step.predict()
    finally:
        decoder.differentiation, decoder.compiled = own
    return residual_norms(recorded.energy, recorded.found, recorded.descent)
