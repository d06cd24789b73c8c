"""Locate the first non-finite numbers of a training step by repeating it stage by stage."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from setpred.decoders.idspn import descending
from setpred.errors import NotFiniteError, listed
from setpred.model import Step

LOWER_RATE = "if the loss rose before, lower model.learning_rate or set trainer.gradient_clip_val"
ADVICE = {
    "weights": f"resume from an earlier checkpoint; {LOWER_RATE}",
    "image": "inspect these images in the data",
    "input": "inspect these sets in the data",
    "target": "inspect the elements of these in the data",
    "inner descent": "lower the learning_rate or momentum of the decoder's descent, or set its clip",
    "gradient": f"set model.on_not_finite to skip if it is rare; {LOWER_RATE}",
}


@dataclass(frozen=True)
class Stage:
    """One stage of a step, and where its tensors have non-finite numbers.

    Args:
        place: a key of `ADVICE`, "features", "refinement", "prediction", "loss", or the name that a loss gives.
        samples: positions in the batch with non-finite numbers; empty where no sample is known.
        names: parameters and running statistics with non-finite numbers or gradients.
        iteration: number of the iterate, for iterates of a decoder.
        norm: the largest of all samples.
        repeated: whether a repeat of the step has shown the fault.
    """

    place: str
    samples: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    iteration: int | None = None
    norm: float = field(default=0.0, compare=False)
    repeated: bool = field(default=True, compare=False)

    @property
    def finite(self) -> bool:
        return not (self.samples or self.names)

    @property
    def advice(self) -> str:
        return ADVICE.get(self.place, f"{LOWER_RATE}; if not, inspect the data of these samples")

    def __str__(self) -> str:
        text = f"the {self.place} {'are' if self.place == 'weights' else 'is'} {'' if self.finite else 'not '}finite"
        if self.names:
            text += f" ({'of ' if self.place == 'gradient' else ''}{listed(self.names)})"
        if self.iteration is not None:
            text += f" in iterate {self.iteration}" if self.finite else f" from iteration {self.iteration} on"
        return text + (f" in samples {listed(self.samples)} of the batch" if self.samples else "")


def trained(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics by name, which must be finite. Other buffers may hold masks of infinities."""
    statistics = {name: each for name, each in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return dict(module.named_parameters()) | statistics


def finite_norm(tensors: Iterable[Tensor], *, largest: bool = False) -> Tensor:
    """Whether the common 2-norm of the tensors is finite, bool `[]`; with `largest` their largest absolute value."""
    values = [tensor.detach() for tensor in tensors]
    return torch.isfinite(nn.utils.get_total_norm(values, norm_type=torch.inf if largest else 2.0))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with non-finite numbers."""
    finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist() if tensors else []
    return [name for name, good in zip(tensors, finite, strict=True) if not good]


def diagnose(step: Step) -> list[Stage]:
    """Repeat a step down to its first non-finite stage; return the stages, in their order.

    The order is weights and statistics, input, target, features, each iterate, prediction, loss, and the gradient of
    training steps. Buffers and torch's generators stay as they were. No other process takes part.
    """
    buffers = [*step.model.buffers(), *step.loss.buffers()]
    before, stages, device = [buffer.clone() for buffer in buffers], [], step.inputs().device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.set_grad_enabled(step.seed is not None),
    ):
        if step.seed is not None:
            torch.manual_seed(step.seed)
        try:
            for stage in _stages(step):
                stages.append(stage)
                if not stage.finite:
                    break
            return stages
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.detach().copy_(value)


def _stages(step: Step) -> Iterator[Stage]:
    parts = nn.ModuleDict({"model": step.model, "loss": step.loss})
    yield _of_names("weights", trained(parts))
    yield _of_samples(step.input_name, step.inputs())
    target, features = step.target, []
    yield _of_samples("target", target)
    hook = step.model.encoder.register_forward_hook(lambda module, given, output: features.append(output))
    try:
        options = {"mask": step.batch.get("input_mask"), "iterations": step.iterations}
        iterates = list(step.model.refine(step.batch[step.input_name], **options))
    finally:
        hook.remove()
    yield _of_samples("features", *features)
    for number, iterate in enumerate(iterates):
        place = "inner descent" if descending(step.model.decoder) else "refinement"
        yield replace(_of_samples(place, iterate), iteration=number)
    predicted = iterates[-1]
    yield _of_samples("prediction", predicted)
    try:
        losses = step.losses(iterates)
    except NotFiniteError as error:
        yield Stage(error.place, error.samples)
        return
    yield _of_samples("loss", losses)
    if losses.requires_grad:
        yield _gradient(parts, losses, [each for each in (predicted, *features) if each.requires_grad])


def _of_samples(place: str, values: Tensor) -> Stage:
    rows = values.detach().float().reshape(len(values), -1)
    samples = (~rows.isfinite()).any(1).nonzero().flatten().tolist()
    return Stage(place, samples, norm=float(rows.norm(dim=1).max()))


def _of_names(place: str, tensors: Mapping[str, Tensor]) -> Stage:
    return Stage(place, names=not_finite(tensors), norm=float(nn.utils.get_total_norm(list(tensors.values()))))


def _gradient(parts: nn.Module, losses: Tensor, of_samples: Sequence[Tensor]) -> Stage:
    """The gradient of the mean loss.

    Prediction and features have one row per sample, so the first of them with a non-finite gradient gives the
    samples; there are none where the gradient is finite up to the encoder.
    """
    named = {name: parameter for name, parameter in parts.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(losses.mean(), [*named.values(), *of_samples], allow_unused=True)
    stage = _of_names("gradient", {name: value for name, value in zip(named, found, strict=False) if value is not None})
    rows = [_of_samples("gradient", value) for value in found[len(named) :] if value is not None]
    return replace(stage, samples=next((row.samples for row in rows if row.samples), []))
