"""One predicted set against the real one: who stands for whom, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from setpred.metrics import match_by_position, pairwise_distance
from setpred.schema import ElementSchema
from setpred.sets import presence_mask
from setpred.visualise.style import plural


@dataclass(frozen=True)
class Comparison:
    """Objects as `ElementSchema.decode` names them, the predicted ones most confident first.

    partner: for each predicted object the index of the real one it stands for, or None (then it is extra).
    distance: for each predicted object that to its partner, or None.
    wrong: for each predicted object the names of the categorical fields that differ from its partner's.
    missed: indices of the real objects that no prediction stands for.
    """

    predicted: list[dict[str, Any]]
    real: list[dict[str, Any]]
    partner: list[int | None]
    distance: list[float | None]
    wrong: list[list[str]]
    missed: list[int]

    @property
    def summary(self) -> str:
        right = sum(p is not None and not w for p, w in zip(self.partner, self.wrong, strict=True))
        wrong = sum(bool(w) for w in self.wrong)
        extra = self.partner.count(None)
        parts = [f"{plural(len(self.real), 'real object')}: {right} with all attributes right"]
        parts += [f"{wrong} with some wrong"] if wrong else []
        parts += [f"{len(self.missed)} missed"] if self.missed else []
        parts += [f"{extra} extra"] if extra else []
        return ", ".join(parts)


def compare(predicted: Tensor, target: Tensor, schema: ElementSchema) -> Comparison:
    """The confident predictions (presence over one half) of one image, matched to its real objects by position."""
    rows, truth = _present(predicted), _present(target)
    guesses = schema.decode(rows, threshold=0.5)
    real = schema.decode(truth, threshold=0.5)
    assignment = match_by_position(rows[None], truth[None], schema=schema)[0].tolist()
    distances = pairwise_distance(rows[None], truth[None], schema=schema)[0]
    partner = [assignment.index(i) if i in assignment else None for i in range(len(rows))]
    return Comparison(
        predicted=guesses,
        real=real,
        partner=partner,
        distance=[None if j is None else float(distances[i, j]) for i, j in enumerate(partner)],
        wrong=[
            [] if j is None else [f.name for f in schema.categorical if guesses[i][f.name] != real[j][f.name]]
            for i, j in enumerate(partner)
        ],
        missed=[j for j, i in enumerate(assignment) if i < 0],
    )


def _present(elements: Tensor) -> Tensor:
    """The rows with presence over one half, highest first, as `ElementSchema.decode` orders them."""
    order = elements[:, -1].argsort(descending=True, stable=True)
    return elements[order][presence_mask(elements[order])]
