"""Locate the first non-finite numbers of a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from setpred.decoders import IDSPN
from setpred.errors import NotFiniteError, listed
from setpred.inner.diagnostics import Recorded, residual_norms
from setpred.model import SetPredictor, Step
from setpred.nonfinite.policy import trained

ADVICE = {
    "weights": "go on from an earlier checkpoint, with a lower model.learning_rate or a trainer.gradient_clip_val",
    "image": "look at these images in the data",
    "input": "look at these sets in the data",
    "target": "look at the elements of these in the data",
    "features": "if the loss rose before, lower model.learning_rate; if not, try --trainer.precision 32-true",
    "inner descent": "lower the learning_rate or momentum of the decoder's descent, or set its clip",
    "refinement": "if the loss rose before, lower model.learning_rate or set trainer.gradient_clip_val",
    "prediction": "if the loss rose before, lower model.learning_rate or set trainer.gradient_clip_val",
    "gradient": "set model.on_not_finite to skip or sanitise if it is rare; if the loss rose before, lower "
    "model.learning_rate",
}
OF_THE_LOSS = (
    "if the loss rose before, lower model.learning_rate; if it came at once, look at the data of these samples"
)


@dataclass(frozen=True)
class Stage:
    """One thing that was looked at: norms, of each sample if it has samples, and what of it is not finite.

    residuals: of an iterate of a descent, |R(Y_t)| of each sample.
    """

    name: str
    norms: list[float]
    samples: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        return bool(self.samples or self.names)

    def __str__(self) -> str:
        norms = [f"norm {_range(self.norms)}"] if self.norms else []
        norms += [f"residual {_range(self.residuals)}"] if self.residuals else []
        what = [f"samples {listed(self.samples)}"] if self.samples else []
        what += [listed(self.names)] if self.names else []
        return f"{self.name:16} {'NOT FINITE: ' + '; '.join(what) if self.broken else 'finite'}  {', '.join(norms)}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g}" + (f" to {max(values):.3g}" if len(values) > 1 else "")


@dataclass(frozen=True)
class Fault:
    """The first place where numbers are not finite.

    place: a key of `ADVICE`, "loss", or what a loss calls its own, such as "matching cost". samples: positions in the
    batch; none where no sample can be named. names: of weights, or of parameters with such a gradient. iteration: of
    the first iterate that is not finite, with the norms of the iterate and the residual just before, by sample.
    repeated: whether a repeat of the step showed it too. stages: what was looked at on the way, as plain types.
    """

    place: str
    samples: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    iteration: int | None = None
    iterate_norms: list[float] = field(default_factory=list)
    residual_norms: list[float] = field(default_factory=list)
    repeated: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def same(self, other: Mapping[str, Any]) -> bool:
        """Whether a fault that was written down (`to_dict`) is this one."""
        return all(getattr(self, key) == other.get(key) for key in ("place", "samples", "names", "iteration"))

    @property
    def advice(self) -> str:
        return ADVICE.get(self.place, OF_THE_LOSS)

    def __str__(self) -> str:
        text = f"the {self.place} {'are' if self.place == 'weights' else 'is'} not finite"
        if self.names:
            text += f" ({'of ' if self.place == 'gradient' else ''}{listed(self.names)})"
        if self.iteration is not None:
            text += f" from iteration {self.iteration} on"
        if self.samples:
            text += f" in samples {listed(self.samples)} of the batch"
        norms = {"iterate": self.iterate_norms, "residual": self.residual_norms}
        said = [f"of the {name} {values[0]:.3g}" for name, values in norms.items() if values]
        return text + (f" (norm {' and '.join(said)} just before)" if said else "")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those with numbers that are not finite."""
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    if not floats:
        return []
    found = torch.stack([value.isfinite().all() for value in floats.values()]).tolist()
    return [name for name, whole in zip(floats, found, strict=True) if not whole]


ITERATE = ", iterate "


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
