"""Coverage of predicted quantiles."""

from collections.abc import Mapping

import torch
from torch import Tensor

from setpred.errors import InputError
from setpred.matching import pinball
from setpred.metrics.attributes import match_by_position
from setpred.metrics.average_precision import GatheredSets
from setpred.schema import ElementSchema


class Coverage(GatheredSets):
    """Share of the real numbers that are under their predicted quantiles, of elements matched by position:

        below_f = mean 1[t ≤ p],    pinball = mean over fields f of mean max(τ_f (t - p), (τ_f - 1) (t - p))

    over the numbers t of field f and their predictions p, in the units of the field; see `match_by_position`. With
    calibrated predictions below_f is the level τ_f. The pinball loss is a proper score: only the true quantiles have
    the least mean (Gneiting and Raftery, JASA 2007), however wide the intervals are.

    `compute()` gives "pinball", "below_<field>" for each field, and of the fields with the least and the greatest level
    "covered", the share of the numbers between their predictions, and "width", their mean distance.

    Args:
        quantiles: level of each field, as of `setpred.losses.HungarianLoss`; two or more, which repeat one number or
            position.
        schema: of the elements; that of the task by default.

    Raises:
        InputError: fewer than two levels, or one that is not between 0 and 1; on use, fields of different numbers.
    """

    monitor, mode, higher_is_better = "pinball", "min", False

    def __init__(self, *, quantiles: Mapping[str, float], schema: ElementSchema | None = None) -> None:
        super().__init__(schema)
        if len(quantiles) < 2 or not all(0 < level < 1 for level in quantiles.values()):
            raise InputError(f"expected at least two fields with levels between 0 and 1, got {dict(quantiles)}")
        self.quantiles = dict(sorted(quantiles.items(), key=lambda item: item[1]))

    def compute(self) -> dict[str, Tensor]:
        predicted, target = self.sets()
        assignment = match_by_position(predicted, target, schema=self.schema)
        image, real = (assignment >= 0).nonzero(as_tuple=True)
        found, truth = predicted[image, assignment[image, real]].double(), target[image, real].double()
        guesses, reals = ({name: self.schema.values(each, name) for name in self.quantiles} for each in (found, truth))
        first, *others = reals
        for name in others:
            same = reals[first].shape == reals[name].shape and torch.allclose(reals[first], reals[name])
            if not same:
                raise InputError(
                    f"Coverage: expected fields that repeat the same numbers, got others in {first} and {name}; score "
                    "quantiles of one number or position"
                )
        losses = [pinball(guesses[name], reals[name], level).mean() for name, level in self.quantiles.items()]
        low, *_, high = guesses.values()
        inside = (low <= reals[first]) & (reals[first] <= high)
        below = {f"below_{name}": (reals[name] <= guess).double().mean() for name, guess in guesses.items()}
        scores = {
            "pinball": torch.stack(losses).mean(),
            "covered": inside.double().mean(),
            "width": (high - low).mean(),
        }
        return scores | below
