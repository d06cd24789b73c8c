"""The training layer: one LightningModule for any set predictor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from setpred.checkpoint import load as checkpoint
from setpred.errors import InputError, NotFiniteError
from setpred.losses import HungarianLoss
from setpred.metrics import AveragePrecision, Mean
from setpred.model import SetPredictor, Step
from setpred.nn import batch_norms, estimating_statistics, evaluating
from setpred.nonfinite.locate import Fault, not_finite
from setpred.nonfinite.policy import MOST_IN_A_ROW, MOST_REPEATS, Guard, Policy, finite_norm, poison, trained
from setpred.nonfinite.repro import report, report_gradient
from setpred.schema import CLEVR, ElementSchema
from setpred.sets import check_set
from setpred.training.schedules import Constant, Schedule

SCHEMAS: dict[str, ElementSchema] = {CLEVR.name: CLEVR}
COUNTED = "not_finite"  # where a checkpoint keeps what the guard has counted
STATISTICS_IMAGES = 1024  # training images for the batch statistics of validations and checkpoints
HASTY_IMAGES = 128  # of checkpoints that must cost little


METRIC = ("update", "compute", "reset", "monitor", "mode")  # what a metric has


class SetPrediction(pl.LightningModule):
    """Trains a `SetPredictor` by a set loss and validates it by average precision, or by another metric.

    Batches are dictionaries with `image` uint8 `[batch, 3, H, W]`, or `input` `[batch, n, in_dim]` and perhaps
    `input_mask` bool `[batch, n]`; the target `elements [batch, set_size, set_dim]`; and perhaps `index [batch]`,
    by which messages name the examples. The randomness of a training step is a function of (seed, step) alone, so that
    a resumed run repeats the undisturbed one. If the data module has `statistics_batches`, the encoder's statistics of
    batch normalisation are estimated for the present weights, over the first training images, before each validation
    and for each checkpoint; see `setpred.nn.estimating_statistics`. Training does not read them, so it is the same
    however often that is done. Logs `val_loss` and `val_<name>` of every number of the metric;
    `setpred.training.callbacks.TrainLoss` logs `train_loss`.

    Args:
        encoder: image, or set, to features.
        decoder: features to set.
        schema: name of the element schema (`SCHEMAS`), which gives the metric; None for elements without one.
        loss: per-example set loss; `HungarianLoss` unless given.
        metric: a torchmetrics metric with `update(predicted, target)`, a `compute` that gives numbers by name, and
            which of them to `monitor` with which `mode`, "max" or "min". With a schema `AveragePrecision` unless given;
            without either the validation loss is monitored.
        learning_rate, betas: of Adam.
        weight_decay: decoupled, as in AdamW.
        schedule: of the learning rate; constant unless given.
        iterations_by_epoch: descent steps from given epochs on, e.g. `{0: 20, 50: 40}`; training only.
        on_not_finite: what to do with a training step whose numbers break, see `setpred.nonfinite.policy.Guard`: stop;
            skip it; or sanitise, that is take it without what is broken. A validation stops always.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        schema: str | None = CLEVR.name,
        loss: nn.Module | None = None,
        metric: nn.Module | None = None,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        iterations_by_epoch: dict[int, int] | None = None,
        on_not_finite: Policy = "stop",
    ) -> None:
        super().__init__()
        if schema is not None and schema not in SCHEMAS:
            raise InputError(f"unknown schema {schema!r}; expected one of {', '.join(SCHEMAS)}")
        if not (0 < learning_rate < math.inf and weight_decay >= 0):
            raise InputError(
                f"expected learning_rate > 0 and weight_decay >= 0, got {learning_rate} and {weight_decay}"
            )
        self.schema = None if schema is None else SCHEMAS[schema]
        set_dim = getattr(decoder, "set_dim", None)
        if self.schema is not None and set_dim not in (None, self.schema.set_dim):
            raise InputError(
                f"schema {schema!r} has elements of {self.schema.set_dim} numbers, the decoder of {set_dim}; give the "
                "decoder that set_dim, or `schema: null` for elements without a schema"
            )
        # channels-last is the faster layout for convolutions on GPUs and CPUs alike
        self.model = SetPredictor(encoder, decoder).to(memory_format=torch.channels_last)
        self.loss = HungarianLoss() if loss is None else loss
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.schedule = self._given_schedule = Constant() if schedule is None else schedule
        self._lasting: Schedule | None = None  # what became of it in the latest run
        self.iterations_by_epoch = iterations_by_epoch
        self.guard = Guard(on_not_finite)
        self._steps: list[Step] = []  # the batches of the present optimiser's step
        self._lost: tuple[Fault, str] | None = None  # why one of them has no loss
        self._stream = 0  # seed of the present batch
        self._trained_norms: list[nn.Module] = []  # of the encoder
        self._statistics_images: list[Tensor] | None = None
        self._estimated: list[Tensor] = []  # the encoder's weights and the statistics that were estimated for them
        self.averaged: Callable[[], AbstractContextManager] = nullcontext  # within, the weights to validate and save
        self.hasty = False  # whether the next statistics are estimated over fewer images
        self.seed = 0  # the command line sets it to seed_everything
        self.model_config: dict[str, Any] | None = None  # encoder and decoder as plain types, for checkpoints
        self.data_description: dict[str, Any] = {}  # the validation data's path, split and image size
        self.settings: dict[str, Any] = {}  # the other settings of the run, likewise; a resumed run is compared
        self.metric = AveragePrecision(schema=self.schema) if metric is None and self.schema is not None else metric
        if lacking := [name for name in METRIC if self.metric is not None and not hasattr(self.metric, name)]:
            raise InputError(
                f"metric {type(self.metric).__name__}: expected {', '.join(METRIC)} as of "
                f"setpred.metrics.AveragePrecision, got no {', '.join(lacking)}; add them"
            )
        self.mean_loss = Mean()  # of a validation
        self.monitor = "val_loss" if self.metric is None else f"val_{self.metric.monitor}"
        self.mode = "min" if self.metric is None else self.metric.mode

    def forward(self, inputs: Tensor, **arguments: Any) -> Tensor:
        return self.model(inputs, **arguments)

    def training_iterations(self) -> int | None:
        """Descent steps at this epoch of training; None leaves it to the decoder."""
        reached = [epoch for epoch in self.iterations_by_epoch or {} if epoch <= self.current_epoch]
        return self.iterations_by_epoch[max(reached)] if reached else None

    def on_train_start(self) -> None:
        self._check_length()
        self._note_norms()  # a run resumed at the end of an epoch validates first
        self._count_batches()

    def _check_length(self) -> None:
        """Gives the schedule the run's length; raises `InputError` where it ends before the training does."""
        planned = self._planned_steps()
        if self._lasting is None or self.schedule is not self._lasting:  # set anew, by a user or a callback
            self._given_schedule = self.schedule
        self.schedule = self._lasting = self._given_schedule.lasting(planned)
        total = self.schedule.total_steps
        if total is not None and math.isfinite(planned) and planned > total:
            raise InputError(
                f"expected a schedule of at least the {planned} steps of this run, got one that ends at step {total}, "
                f"from where nothing is learned; pass --model.schedule.init_args.total_steps {planned}, or fewer "
                "--trainer.max_epochs"
            )
        if self.iterations_by_epoch and self.trainer.is_global_zero:
            self.say(
                f"the descent takes {self.training_iterations()} steps in training from now on, by "
                "model.iterations_by_epoch, which overrides descent.iterations there; pass --model.iterations_by_epoch "
                "null to train with descent.iterations"
            )

    def _planned_steps(self) -> float:
        """Optimizer steps of the run; infinite where nothing says how many."""
        trainer, steps = self.trainer, self.trainer.estimated_stepping_batches
        if steps < 0:  # Lightning's word for data without a length and no max_steps
            return math.inf
        gathering = [part for part in trainer.callbacks if isinstance(part, GradientAccumulationScheduler)]
        if not gathering or trainer.max_epochs == -1:
            return steps
        each = (gathering[0].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs))
        total = sum(math.ceil(trainer.num_training_batches / some) for some in each)
        return total if trainer.max_steps == -1 else min(total, trainer.max_steps)

    def _count_batches(self) -> None:
        """Where an epoch goes on with batches of another size, or shared by other processes, as many have gone by."""
        loader, progress = self.trainer.train_dataloader, self.trainer.fit_loop.epoch_loop.batch_progress.current
        behind = loader.behind(self.current_epoch) if hasattr(loader, "behind") else None
        if behind is not None:
            shift = behind - progress.ready
            for name in ("ready", "started", "processed", "completed"):
                setattr(progress, name, getattr(progress, name) + shift)

    def _note_norms(self) -> None:
        """Which batch normalisations train: not those held fixed, in evaluation mode all along."""
        self._trained_norms = [norm for norm in batch_norms(self.model.encoder) if norm.training]

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # set from (step, epoch) each time, not by a stateful scheduler: nothing to restore, nothing to drift
        for group in self.optimizers().param_groups:
            group["lr"] = self.learning_rate * self.schedule(self.global_step, self.current_epoch)
        # also seeds CUDA; 1_000_003 keeps the streams of neighbouring seeds apart
        stream = (self.seed * 1_000_003 + self.global_step) * 1_009 + batch_idx
        self._stream = (stream * 1_021 + self.global_rank) % 2**63
        torch.manual_seed(self._stream)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self._note_norms()
        self.guard.keep(self.buffers(), self.global_step)
        losses = self._whole(Step(self.model, self.loss, batch, self._stream, self.training_iterations()))
        return poison(self.parameters()) if losses is None else losses.mean()

    def _whole(self, step: Step) -> Tensor | None:
        """Losses of a training step, or of the samples that are whole; None if there are none."""
        left_out = 0
        for _ in range(1 + MOST_REPEATS):
            try:
                losses, _ = self._losses(step)
            except NotFiniteError as error:
                self.guard.restore(self.buffers())
                fault, sentence = report(self, step, Fault(error.place, error.samples, repeated=False))
            else:
                self.guard.counts["sanitised_samples"] += left_out
                if self._trainer:  # else no optimiser's step would take them away
                    self._steps.append(step)
                return losses
            if self.guard.policy != "sanitise" or len(fault.samples) in (0, len(step.batch["elements"])):
                break
            self.say(f"{len(fault.samples)} samples are left out: {sentence}")
            left_out += len(fault.samples)
            step = step.without(fault.samples)
            torch.manual_seed(self._stream)
        self._lost = fault, sentence
        return None

    @torch.no_grad()
    def _estimate_statistics(self) -> None:
        """Estimate the batch statistics of the present weights while training, over the same images in every process.

        Skipped if they are there already. All processes must call it at the same step.
        """
        data = self._trainer and getattr(self.trainer, "datamodule", None)
        if not self._trained_norms or not hasattr(data, "statistics_batches") or self.trainer.state.fn != "fit":
            return
        if self._statistics_images is None:  # kept, for streamed ones have to be drawn
            batches = data.statistics_batches(STATISTICS_IMAGES)
            images = (self.trainer.strategy.batch_to_device(batch)["image"] for batch in batches)
            # one that is not finite, which a training may skip, would be in all of them
            whole = (some[some.isfinite().flatten(1).all(1)] if some.is_floating_point() else some for some in images)
            self._statistics_images = [some for some in whole if len(some)]
        chosen = self._statistics_images
        if self.hasty:
            chosen = chosen[: max(1, HASTY_IMAGES // max(map(len, chosen), default=1))]
        # compared by value: callbacks may have set weights or statistics, too
        sought = [torch.tensor(len(chosen)), *self.model.encoder.state_dict().values()]
        if len(sought) == len(self._estimated) and all(map(torch.equal, sought, self._estimated)):
            return
        with (
            self.trainer.precision_plugin.forward_context(),
            evaluating(self.model.encoder),
            estimating_statistics(self._trained_norms),
        ):
            for images in chosen:
                self.model.encode(images)
        self._estimated = [value.clone() for value in sought]

    def on_fit_end(self) -> None:
        # a checkpoint that is written later, perhaps from another device, has what was estimated last
        self._statistics_images, self._estimated, self._trained_norms = None, [], []

    def on_validation_epoch_start(self) -> None:
        self._estimate_statistics()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score(batch)

    def on_validation_epoch_end(self) -> None:
        # every process has them of all images; of equal numbers the largest is exact, a mean is not
        self.log_dict(self._scores(), sync_dist=True, reduce_fx="max")

    def validate(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """The same numbers as a validation by the trainer logs, at any moment and by themselves."""
        with self.averaged(), evaluating(self), torch.no_grad():
            self._estimate_statistics()
            for batch in batches:
                self._score({name: value.to(self.device) for name, value in batch.items()})
            return {name: float(value) for name, value in self._scores().items()}

    def _score(self, batch: dict[str, Tensor]) -> None:
        """Loss and metric take note of the predictions."""
        step = Step(self.model, self.loss, batch)
        try:
            losses, predicted = self._losses(step)
        except NotFiniteError as error:
            _, sentence = report(self, step, Fault(error.place, error.samples, repeated=False))
            raise InputError(sentence) from error
        self.mean_loss.update(losses)
        if self.metric is not None:
            self.metric.update(predicted.float(), batch["elements"])

    def _scores(self) -> dict[str, Tensor]:
        """What they say of all that all processes have seen, which they forget."""
        scores = {"loss": self.mean_loss.compute()}
        self.mean_loss.reset()
        if self.metric is not None:
            scores |= self.metric.compute()
            self.metric.reset()
        return {f"val_{name}": value.float() for name, value in scores.items()}

    def _losses(self, step: Step) -> tuple[Tensor, Tensor]:
        """Loss of each example and the predicted sets; `NotFiniteError` unless they and all before them are finite."""
        elements, inputs = step.batch["elements"], step.inputs()
        check_set(elements, set_dim=None if self.schema is None else self.schema.set_dim)
        predicted = step.predict()
        losses = self.loss(predicted.float(), elements)
        numbers = [losses, predicted, elements, *([inputs] if inputs.is_floating_point() else [])]
        whole = [each.detach().isfinite().all() for each in numbers]
        whole.append(finite_norm(trained(self).values(), largest=True))
        # one number to the host each step, against hours of training on nothing
        if not torch.stack(whole).all():
            raise NotFiniteError("loss", (~losses.detach().isfinite()).nonzero().flatten().tolist())
        return losses, predicted

    def say(self, sentence: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        bar = self.trainer.progress_bar_callback
        bar.print(sentence) if bar is not None else print(sentence, flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameters(), self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Decides what becomes of a step, from its gradient, which all processes share."""
        (steps, lost), self._steps, self._lost = (self._steps, self._lost), [], None
        parameters = list(self.parameters())
        if finite_norm(parameter.grad for parameter in parameters if parameter.grad is not None):
            self.guard.in_a_row = 0
            return
        if lost is None:
            if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                return  # which lowers the scale of the loss and leaves the step out
            lost = report_gradient(self, steps)
        fault, sentence = lost
        if self.guard.policy == "sanitise" and self.guard.mend(parameters):
            self.say(f"what of the gradient is not finite counts as zero: {sentence}")
        elif self.guard.policy == "stop" or fault.place == "weights":
            self.guard.restore(self.buffers())
            raise InputError(sentence)  # before the weights take it in
        elif self.guard.in_a_row >= MOST_IN_A_ROW:
            raise InputError(f"{MOST_IN_A_ROW} steps in a row were skipped, and the next one breaks, too: {sentence}")
        else:
            self.guard.drop(parameters, self.buffers())
            self.say(f"skipped ({self.guard.counts['skipped_batches']} so far): {sentence}")

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        """Adds batch statistics of the weights, and what evaluation needs to rebuild the model: plain types only."""
        with self.averaged():
            self._estimate_statistics()
        if broken := not_finite(trained(self)):
            raise InputError(
                f"step {self.global_step} (epoch {self.current_epoch}): {Fault('weights', names=broken)}, and are not "
                f"saved: an earlier checkpoint stays. What to do: {Fault('weights').advice}"
            )
        # Lightning has taken the weights before, perhaps as copies
        state = content["state_dict"]
        state |= {name: value.detach() for name, value in self.named_buffers() if name in state}
        content[checkpoint.KEY] = self.description()
        content[COUNTED] = self.not_finite_counts() | {"in_a_row": self.guard.in_a_row}

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        self.guard.load(content.get(COUNTED, {}))
        if self._trainer and not self.trainer.is_global_zero:
            self.guard.counts["sanitised_samples"] = 0  # the first process has those of all

    def not_finite_counts(self) -> dict[str, int]:
        """What was skipped and sanitised since the training began, in all processes, which all have to ask."""
        counts = dict(self.guard.counts)
        if self._trainer and self.trainer.world_size > 1:
            own = torch.tensor(counts["sanitised_samples"], device=self.device)
            counts["sanitised_samples"] = int(self.trainer.strategy.reduce(own, reduce_op="sum"))
        return counts

    def description(self) -> dict[str, Any]:
        """What rebuilds the model, in plain types; `setpred.checkpoint.load` reads it."""
        return {
            "version": checkpoint.VERSION,
            "schema": None if self.schema is None else self.schema.to_dict(),
            "model": self.model_config,
            "data": self.data_description,
            "settings": self.settings,
            "seed": self.seed,
        }
