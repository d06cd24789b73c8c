"""What is known of a step whose numbers break: where it did first, in which samples, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

SHOWN = 8  # names, or samples, in a sentence
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


def listed(items: Sequence[Any]) -> str:
    """The first of them, for a sentence."""
    return ", ".join(map(str, items[:SHOWN])) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
