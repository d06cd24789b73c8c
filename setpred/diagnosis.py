"""Where a step breaks: it is repeated stage by stage, down to the first numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from setpred.decoders import IDSPN
from setpred.faults import Fault, Stage, not_finite
from setpred.guard import trained
from setpred.inner.diagnostics import Recorded, residual_norms
from setpred.matching import NotFiniteError
from setpred.model import SetPredictor

ITERATE = ", iterate "


@dataclass(frozen=True)
class Step:
    """What a training step, or a batch of a validation, is a function of, beside weights and modes of its parts.

    Args:
        model, loss: as they are trained.
        batch: see `setpred.training.SetPrediction`.
        seed: of torch's generator when the step begins; None for a validation, which draws nothing.
        iterations: of the descent; the decoder's own unless given.
    """

    model: SetPredictor
    loss: nn.Module
    batch: dict[str, Tensor]
    seed: int | None = None
    iterations: int | None = None

    @property
    def input_name(self) -> str:
        return "image" if "image" in self.batch else "input"

    def predict(self) -> Tensor:
        """The predicted sets `[batch, set_size, set_dim]`, from torch's generator as it stands."""
        mask = self.batch.get("input_mask")
        return self.model(self.batch[self.input_name], mask=mask, iterations=self.iterations)

    def inputs(self) -> Tensor:
        """Images or sets; zero where a set has no element, since padding may hold anything."""
        inputs, mask = self.batch[self.input_name], self.batch.get("input_mask")
        return inputs if mask is None else inputs.masked_fill(~mask.unsqueeze(-1), 0)

    def without(self, samples: Sequence[int]) -> Step:
        """The step of the other samples."""
        size = len(self.batch["elements"])
        rest = [sample for sample in range(size) if sample not in set(samples)]
        return replace(self, batch={name: value[rest] for name, value in self.batch.items()})


def diagnose(step: Step) -> tuple[Fault | None, list[Stage]]:
    """Repeats the step down to its first fault, None if all is finite; and the stages on the way.

    In order: weights and buffers, inputs, targets, features, each iterate, prediction, loss, gradient (of training
    steps). Leaves buffers and torch's generators as they were; talks to no other process.
    """
    buffers = [*step.model.buffers(), *step.loss.buffers()]
    before = [buffer.clone() for buffer in buffers]
    stages: list[Stage] = []
    try:
        with _seeded(step), torch.set_grad_enabled(step.seed is not None):
            for stage in _stages(step):
                stages.append(stage)
                if stage.broken:
                    return _fault(stages), stages
        return None, stages
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _fault(stages: Sequence[Stage]) -> Fault:
    last = stages[-1]
    place, iterate, number = last.name.partition(ITERATE)
    fault = Fault(place, last.samples, last.names)
    if not iterate or number == "0":
        return replace(fault, iteration=int(number) if iterate else None)
    before = stages[-2]
    norms = {"iterate_norms": before.norms, "residual_norms": before.residuals}
    chosen = {name: [values[sample] for sample in last.samples] for name, values in norms.items() if values}
    return replace(fault, iteration=int(number), **chosen)


@contextmanager
def _seeded(step: Step) -> Iterator[None]:
    """torch's generators as when the step began, and afterwards as they were."""
    device = step.batch["elements"].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if step.seed is not None:
            torch.manual_seed(step.seed)
        yield


def _stages(step: Step) -> Iterator[Stage]:
    yield _of_names("weights", trained(nn.ModuleDict({"model": step.model, "loss": step.loss})))
    yield _of_samples(step.input_name, step.inputs())
    elements = step.batch["elements"]
    yield _of_samples("target", elements)
    with _recording(step.model) as record:
        predicted = step.predict()
    yield _of_samples("features", record.features)
    yield from _iterates(record)
    yield _of_samples("prediction", predicted)
    try:
        losses = step.loss(predicted.float(), elements)
    except NotFiniteError as error:
        yield Stage(error.place, [], error.samples)
        return
    yield _of_samples("loss", losses)
    if losses.requires_grad:
        yield _gradient(step, losses, predicted, record.features)


def _of_samples(name: str, values: Tensor, residuals: Sequence[float] = ()) -> Stage:
    rows = values.detach().flatten(1) if values.ndim > 1 else values.detach().unsqueeze(1)
    broken = (~rows.isfinite()).any(1).nonzero().flatten().tolist()
    return Stage(name, rows.float().norm(dim=1).tolist(), broken, residuals=list(residuals))


def _of_names(name: str, tensors: Mapping[str, Tensor]) -> Stage:
    floats = [value.detach() for value in tensors.values() if value.is_floating_point()]
    return Stage(name, [float(nn.utils.get_total_norm(floats))], names=not_finite(tensors))


@dataclass
class _Record:
    features: Tensor = field(default_factory=lambda: torch.zeros(0, 1))
    iterates: list[Tensor] = field(default_factory=list)
    descent: Recorded | None = None


@contextmanager
def _recording(model: SetPredictor) -> Iterator[_Record]:
    """Within, features and iterates of the model's predictions are kept."""
    record, decoder = _Record(), model.decoder
    refine, own = decoder.refine, getattr(decoder, "differentiation", None)

    def keep_features(module: nn.Module, given: Any, features: Tensor) -> None:
        record.features = features

    def keep_iterates(*arguments: Any, **named: Any) -> Iterator[Tensor]:
        for iterate in refine(*arguments, **named):
            record.iterates.append(iterate.detach())
            yield iterate

    hook = model.encoder.register_forward_hook(keep_features)
    decoder.refine = keep_iterates
    if isinstance(decoder, IDSPN):
        decoder.differentiation = record.descent = Recorded(own)
    try:
        yield record
    finally:
        hook.remove()
        del decoder.refine
        if record.descent is not None:
            decoder.differentiation = own


def _iterates(record: _Record) -> Iterator[Stage]:
    """Each iterate up to the first that is not finite, which names all samples that ever break."""
    name = ("refinement" if record.descent is None else "inner descent") + ITERATE
    for number, iterate in enumerate(record.iterates):
        residuals: list[float] = []
        if record.descent is not None:
            residuals = residual_norms(record.descent.energy, [iterate], record.descent.descent)[0].tolist()
        stage = _of_samples(f"{name}{number}", iterate, residuals)
        if stage.broken:
            ever = {sample for later in record.iterates[number:] for sample in _of_samples("", later).samples}
            stage = replace(stage, samples=sorted(ever))
        yield stage


def _gradient(step: Step, losses: Tensor, *on_the_way: Tensor) -> Stage:
    """The gradient of the mean loss; if it is not finite, in which samples.

    Each sample has its own prediction and its own features, so the first of `on_the_way` whose gradient is not finite
    tells them; none where the gradient breaks in the encoder only.
    """
    parts = (("model", step.model), ("loss", step.loss))
    named = {f"{part}.{name}": p for part, module in parts for name, p in module.named_parameters() if p.requires_grad}

    def gradients(of: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(losses.mean(), of, retain_graph=True, allow_unused=True)

    found = zip(named, gradients(list(named.values())), strict=True)
    stage = _of_names("gradient", {name: value for name, value in found if value is not None})
    if stage.broken:
        for value in gradients([each for each in on_the_way if each.requires_grad]):
            samples = [] if value is None else _of_samples("", value).samples
            if samples:
                return replace(stage, samples=samples)
    return stage
