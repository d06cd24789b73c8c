"""LightningModule that trains any set predictor."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from setpred.checkpoint import load as checkpoint
from setpred.checkpoint.describe import describe, describe_model
from setpred.errors import InputError, NotFiniteError
from setpred.losses import HungarianLoss
from setpred.metrics import AveragePrecision, CalibrationFit, GatheredSets, Mean
from setpred.model import SetPredictor, Step, target_name
from setpred.nn import evaluating
from setpred.nonfinite.locate import Stage, finite_norm, not_finite, trained
from setpred.nonfinite.policy import Guard, poison
from setpred.nonfinite.repro import report
from setpred.schema import CLEVR, Calibration, ElementSchema
from setpred.sets import check_set
from setpred.training.schedules import Constant, Schedule, fitted
from setpred.training.statistics import BatchStatistics

SCHEMAS: dict[str, ElementSchema] = {CLEVR.name: CLEVR}
# with `Any`, jsonargparse would write and read the class name "0" as a number
SchemaRecord = dict[str, str | int | list[dict[str, str | int | float | bool | list[str]]] | list[list[str]]]
COUNTED = "not_finite"  # key of the guard's counts in a checkpoint
METRIC = ("update", "compute", "reset", "monitor", "mode")  # attributes of a metric


def schema_of(schema: str | dict[str, Any] | None, decoder: nn.Module) -> ElementSchema | None:
    """Return the schema of a name or record; raise `InputError` if it is unknown or does not fit the decoder."""
    if isinstance(schema, str) and schema not in SCHEMAS:
        raise InputError(f"unknown schema {schema!r}; expected one of {', '.join(SCHEMAS)}")
    found = SCHEMAS[schema] if isinstance(schema, str) else schema and ElementSchema.from_dict(schema)
    set_dim = getattr(decoder, "set_dim", None)
    if found is not None and set_dim not in (None, found.set_dim):
        raise InputError(
            f"schema {found.name!r} has elements of {found.set_dim} numbers, the decoder of {set_dim}; "
            "give the decoder that set_dim, or `schema: null` for elements without a schema"
        )
    return found


def finite_losses(step: Step, weights: Iterable[Tensor], *, set_dim: int | None) -> tuple[Tensor, Tensor]:
    """Loss of each example and predicted sets; `NotFiniteError` unless they, weights and batch are finite."""
    target = step.target
    if target_name(step.loss) == "elements":
        check_set(target, set_dim=set_dim)
    iterates = step.iterates()
    losses, predicted = step.losses(iterates), iterates[-1]
    finite = [each.detach().isfinite().all() for each in (losses, predicted, target, step.inputs())]
    finite.append(finite_norm(weights, largest=True))
    # one number to the host in each step, against hours of training on nothing
    if not torch.stack(finite).all():
        raise NotFiniteError("loss", (~losses.detach().isfinite()).nonzero().flatten().tolist())
    return losses, predicted


class Scores:
    """Mean loss, metric and calibration of validation examples, in all processes.

    Args:
        metric: see `SetPrediction`.
        schema: gives the default metric, and the calibration; it is that of a metric without one.

    Raises:
        InputError: a metric without the attributes `METRIC`, or of another schema.
    """

    def __init__(self, metric: nn.Module | None, schema: ElementSchema | None) -> None:
        if metric is None and schema is not None:
            metric = AveragePrecision()
        if isinstance(metric, GatheredSets) and schema is not None:
            metric.use_schema(schema)
        if lacking := [name for name in METRIC if metric is not None and not hasattr(metric, name)]:
            raise InputError(
                f"metric {type(metric).__name__}: expected {', '.join(METRIC)} as of "
                f"setpred.metrics.AveragePrecision, got no {', '.join(lacking)}; add them"
            )
        self.mean_loss, self.metric = Mean(), metric
        self.calibration_fit = None if schema is None else CalibrationFit(schema)
        self.calibration: Calibration | None = None  # of the latest validation
        self.monitor = "val_loss" if metric is None else f"val_{metric.monitor}"
        self.mode = "min" if metric is None else metric.mode

    @property
    def parts(self) -> tuple[nn.Module, nn.Module | None, nn.Module | None]:
        """The modules that gather examples: mean loss, metric and calibration."""
        return self.mean_loss, self.metric, self.calibration_fit

    def update(
        self,
        losses: Tensor,
        predicted: Tensor,
        batch: dict[str, Tensor],
        samples: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Add a batch; a metric that states a number of `samples` gets so many predictions, made by `samples`."""
        self.mean_loss.update(losses)
        for part in self.parts[1:]:
            if part is None:
                continue
            if (name := target_name(part)) not in batch:
                raise InputError(
                    f"the metric {type(part).__name__} compares with {name!r}, expected it in the validation batches, "
                    f"got {', '.join(batch)}" + "; pass --data.masks true" * (name == "instances")
                )
            many = getattr(part, "samples", None)
            # a copy: to keep a worker's own tensor keeps two file descriptors open
            part.update((predicted if many is None else samples(many)).float(), batch[name].clone())

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all examples since the last call."""
        scores = {"loss": self.mean_loss.compute()}
        self.mean_loss.reset()
        if self.metric is not None:
            scores |= self.metric.compute()
            self.metric.reset()
        if self.calibration_fit is not None:
            self.calibration = Calibration(**{name: float(v) for name, v in self.calibration_fit.compute().items()})
            self.calibration_fit.reset()
        return {f"val_{name}": value.float() for name, value in scores.items()}


def frozen_part(model: nn.Module, name: str) -> nn.Module:
    """Freeze the weights of a part; return it. Raises `InputError` if there is none of this name."""
    try:
        part = model.get_submodule(name)
    except AttributeError as error:
        names = [each for each, _ in model.named_modules() if len(each) > 0 and each.count(".") < 2]
        raise InputError(f"frozen: expected parts of the model, such as {', '.join(names)}, got {name!r}") from error
    return part.requires_grad_(False)


class SetPrediction(pl.LightningModule):
    """Trains a `SetPredictor` by a set loss, and validates it by average precision or another metric.

    Batches are dictionaries of `image` uint8 `[batch, 3, H, W]`, or `input` `[batch, n, in_dim]` with an optional
    `input_mask` bool `[batch, n]`; the target `elements [batch, set_size, set_dim]`; and optionally `index [batch]`,
    by which messages name the examples. Random numbers of a step depend on (seed, step) alone, so that a resumed run
    equals the undisturbed one. Validations and checkpoints have batch statistics of the present weights, see
    `BatchStatistics`. Logs `val_loss` and `val_<name>` of every number of the metric. With a schema, each validation
    fits the `Calibration` of the model, which checkpoints hold.

    Args:
        encoder: image, or set, to features.
        decoder: features to set.
        schema: name of the element schema (`SCHEMAS`), or its record (`ElementSchema.to_dict`). It gives the metric and
            its thresholds, and the groups of numbers of the loss. None for elements without a schema.
        loss: per-example set loss; `HungarianLoss` by default.
        metric: a torchmetrics metric with `update(predicted, target)`, a `compute` that gives numbers by name, the
            name to `monitor`, and the `mode`, "max" or "min". The default is `AveragePrecision` with a schema, and the
            validation loss without.
        learning_rate, betas: of Adam.
        weight_decay: decoupled, as in AdamW.
        schedule: of the learning rate; constant by default.
        iterations_by_epoch: descent steps from given epochs on, e.g. `{0: 20, 50: 40}`; training only.
        auxiliary: weight of the mean loss of the earlier iterates, added to that of the last one; training only. DETR's
            auxiliary losses have `decoder_layers - 1`; the mean of all of DSPN's losses has the number of its steps.
        on_not_finite: "stop" or "skip" a training step with NaN or infinity, see `setpred.nonfinite.policy.Guard`. A
            validation always stops.
        frozen: parts whose weights stay as they are, such as "encoder" and "decoder.slots"; they also stay in
            evaluation mode.

    Raises:
        InputError: an unknown schema, policy or part, numbers out of range, or parts that do not fit together.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        schema: str | SchemaRecord | None = CLEVR.name,
        loss: nn.Module | None = None,
        metric: nn.Module | None = None,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        iterations_by_epoch: dict[int, int] | None = None,
        auxiliary: float = 0.0,
        on_not_finite: str = "stop",
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not (0 < learning_rate < math.inf and 0 <= weight_decay < math.inf and 0 <= auxiliary < math.inf):
            raise InputError(
                "expected learning_rate > 0, weight_decay >= 0 and auxiliary >= 0, all finite, got "
                f"{learning_rate}, {weight_decay} and {auxiliary}"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"expected betas of at least 0 and below 1, got {', '.join(map(str, betas))}")
        if not all(epoch >= 0 and steps >= 1 for epoch, steps in (iterations_by_epoch or {}).items()):
            raise InputError(
                "iterations_by_epoch: expected epochs of at least 0 and at least 1 descent step in each, got "
                f"{iterations_by_epoch}"
            )
        self.schema = schema_of(schema, decoder)
        # channels-last is the faster layout for convolutions on GPUs and CPUs alike
        self.model = SetPredictor(encoder, decoder).to(memory_format=torch.channels_last)
        self.loss = HungarianLoss() if loss is None else loss
        denoises, matching = getattr(decoder, "denoises", False), getattr(self.loss, "loss", self.loss)  # if wrapped
        if isinstance(matching, HungarianLoss) and matching.aligned != denoises:
            raise InputError(
                f"expected a HungarianLoss with aligned {denoises} for {type(decoder).__name__}, got "
                f"{matching.aligned}; only decoders that match elements to their noise, such as FlowMatching, are "
                f"trained in the order of the target, and need to be; set model.loss.init_args.aligned to {denoises}"
            )
        if denoises and hasattr(self.loss, "penalty"):  # its two predictions would differ by their noise
            raise InputError(
                f"expected a loss of one prediction for {type(decoder).__name__}, which samples, got "
                f"{type(self.loss).__name__}; use its inner loss alone"
            )
        self.frozen = [frozen_part(self.model, name) for name in frozen]
        if frozen and not any(weights.requires_grad for weights in self.parameters()):
            raise InputError(
                f"frozen: expected a part of the model that learns, got all of them frozen by {list(frozen)}; leave "
                "one out"
            )
        for part in (self.loss, self.model):
            if hasattr(part, "use_schema") and self.schema is not None:
                part.use_schema(self.schema)
        self.scores = Scores(metric, self.schema)
        # move with the module
        self.mean_loss, self.metric, self.calibration_fit = self.scores.parts
        self.monitor, self.mode = self.scores.monitor, self.scores.mode
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.schedule = Constant() if schedule is None else schedule
        self.iterations_by_epoch, self.auxiliary = iterations_by_epoch, auxiliary
        self.guard, self.statistics = Guard(on_not_finite), BatchStatistics()
        self.averaged: Callable[[], AbstractContextManager] = nullcontext  # within, the weights to validate and save
        self.seed = 0  # the command line sets it to seed_everything
        self.model_config: dict[str, Any] | None = None  # encoder and decoder as plain types, for checkpoints
        self.data_description: dict[str, Any] = {}  # path, split and image size of the validation data
        self.settings: dict[str, Any] = {}  # the other settings of the run; a resumed run is compared with them

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts but the frozen ones."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, inputs: Tensor, **arguments: Any) -> Tensor:
        return self.model(inputs, **arguments)

    def training_iterations(self) -> int | None:
        """Descent steps in this epoch of training; None leaves the number to the decoder."""
        return checkpoint.iterations_at(self.iterations_by_epoch, self.current_epoch)

    def describe_data(self, data: Any) -> None:
        """Note what checkpoints say of the validation data: path, split, and size of the images or input sets."""
        size = getattr(data, "image_size", None) or getattr(self.model.encoder, "image_size", None)
        path, split = getattr(data, "val_path", None), getattr(data, "val_split", None)
        self.data_description = {"path": path, "split": split, "image_size": size}
        if (sets := getattr(data, "inputs", None)) is not None:
            self.data_description["input_size"] = sets.most
        schema = getattr(data, "schema", None)
        if None not in (size, schema) and self.schema is None and not schema.has_world:
            self.data_description["padded"] = True  # as `setpred data import` pads images; else the schema tells it

    def check_schema(self, data: Any) -> None:
        """Raise `InputError` if the data state another schema than the model's."""
        ours, theirs = self.schema, getattr(data, "schema", None)
        if None not in (ours, theirs) and ours.fields != theirs.fields:  # also of the same length, in other units
            raise InputError(
                f"the model is of schema {ours.name!r}, the data of {theirs.name!r}: {ours.differences(theirs)}; give "
                "model.schema the schema of the data"
            )

    def describe_model(self) -> None:
        """Describe a model that was built in Python for its checkpoints, or say why commands will not read them."""
        size = self.data_description["image_size"]
        try:
            if size is None and not self.model.takes_sets:
                raise InputError(f"{type(self.model.encoder).__name__} has no image_size; give it this attribute")
            self.model_config = describe_model(self.model, image_size=size)
        except InputError as error:
            if self.trainer.is_global_zero:
                self.say(f"the commands of setpred will not read the checkpoints of this training: {error}")
        try:
            loss = describe(self.loss, "loss")
        except InputError:
            loss = type(self.loss).__name__  # `setpred gradients`, which alone needs it, says that it is unknown
        self.settings = {"model": {"loss": loss, "iterations_by_epoch": self.iterations_by_epoch}}

    def on_train_start(self) -> None:
        self._fitted = fitted(self.schedule, self.trainer)
        if self.model_config is None:  # the command line has checked the data and described the model
            loader = self.trainer.train_dataloader
            data = getattr(self.trainer, "datamodule", None) or getattr(loader, "dataset", None)
            self.check_schema(data)
            self.describe_data(data)
            self.describe_model()
        self.guard.steps = []
        self.statistics.note_trained(self.model.encoder)  # a run that is resumed at the end of an epoch validates first
        if self.iterations_by_epoch and self.trainer.is_global_zero:
            self.say(
                f"model.iterations_by_epoch overrides descent.iterations in training: {self.training_iterations()} "
                "descent steps from now on; pass --model.iterations_by_epoch null to use descent.iterations"
            )

    def step(self, batch: dict[str, Tensor], batch_idx: int) -> Step:
        """The training step on a batch."""
        # 1_000_003 keeps the streams of neighbouring seeds apart
        stream = (self.seed * 1_000_003 + self.global_step) * 1_009 + batch_idx
        seed = (stream * 1_021 + self.global_rank) % 2**63
        return Step(self.model, self.loss, batch, seed, self.training_iterations(), self.auxiliary)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # set from (step, epoch) each time, not by a stateful scheduler: nothing to restore, nothing to drift
        for group in self.optimizers().param_groups:
            group["lr"] = self.learning_rate * self._fitted(self.global_step, self.current_epoch)
        step = self.step(batch, batch_idx)
        torch.manual_seed(step.seed)  # also seeds CUDA
        self.statistics.note_trained(self.model.encoder)
        self.guard.begin(step, self.buffers())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        step = self.step(batch, batch_idx)
        try:
            return self.losses(step)[0].mean()
        except NotFiniteError as error:
            self.guard.lost = step, error
            return poison(self.parameters())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.guard.check(self)

    def on_fit_end(self) -> None:
        self.statistics.reset()  # a checkpoint that is saved later, perhaps on another device, has the latest ones

    def on_validation_epoch_start(self) -> None:
        self.statistics.estimate(self)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        step = Step(self.model, self.loss, batch)
        try:
            losses, predicted = self.losses(step)
        except NotFiniteError as error:
            raise InputError(report(self, [step], Stage(error.place, error.samples))[1]) from error
        self.scores.update(losses, predicted, batch, step.samples)

    def on_validation_epoch_end(self) -> None:
        # every process has the scores of all images; of equal numbers the largest is exact, a mean is not
        self.log_dict(self.scores.compute(), sync_dist=True, reduce_fx="max")

    def validate(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """The numbers that a validation by the trainer logs, at any moment."""
        with self.averaged(), evaluating(self), torch.no_grad():
            self.statistics.estimate(self)
            for index, batch in enumerate(batches):
                self.validation_step({name: value.to(self.device) for name, value in batch.items()}, index)
            return {name: float(value) for name, value in self.scores.compute().items()}

    def losses(self, step: Step) -> tuple[Tensor, Tensor]:
        """Loss of each example and predicted sets, all finite."""
        return finite_losses(step, trained(self).values(), set_dim=self.schema and self.schema.set_dim)

    def when(self) -> str:
        """The present step, for messages."""
        return f"step {self.global_step} (epoch {self.current_epoch})"

    def say(self, sentence: str) -> None:
        """Print a line, above the progress bar if there is one."""
        bar = self.trainer.progress_bar_callback
        bar.print(sentence) if bar is not None else print(sentence, flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = {"betas": self.betas, "weight_decay": self.weight_decay}
        return torch.optim.AdamW(self.parameters(), self.learning_rate, **options)

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        """Add batch statistics of the weights, and the description that rebuilds the model, in plain types only."""
        with self.averaged():
            self.statistics.estimate(self)
        if names := not_finite(trained(self)):
            fault = Stage("weights", names=names)
            raise InputError(f"{self.when()}: {fault}; they are not saved. What to do: {fault.advice}")
        # Lightning has taken the weights before, perhaps as copies
        state = content["state_dict"]
        state |= {name: value.detach() for name, value in self.named_buffers() if name in state}
        content[checkpoint.KEY] = self.description()
        content[COUNTED] = self.guard.state_dict()

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        self.guard.load_state_dict(content.get(COUNTED, {}))
        record = content[checkpoint.KEY].get("calibration")
        self.scores.calibration = None if record is None else Calibration.from_dict(record)

    def description(self) -> dict[str, Any]:
        """Description that rebuilds the model, in plain types; `setpred.checkpoint.load` reads it."""
        return {
            "version": checkpoint.VERSION,
            "revision": checkpoint.REVISION,
            "schema": None if self.schema is None else self.schema.to_dict(),
            "calibration": self.scores.calibration and self.scores.calibration.to_dict(),
            "model": self.model_config,
            "data": self.data_description,
            "settings": self.settings,
            "seed": self.seed,
        }
