"""The loss of class-specific numbering: matched within classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setpred.matching import hungarian


class NumberingLoss(nn.Module):
    """min_π (1/n) Σ_i d(y_i, t_π(i)), the minimum over one-to-one matchings π within each class.

        d(y, t) = |y - t|₂,    or with cross entropy    -log softmax(y)_t

    Element i of the prediction is an answer to element i of the target, whose class it has; any order of the numbers
    of one class is as right. The distance is not squared, as published (Zhang et al., ICLR 2022), for predictions on
    the simplex; the baselines there are trained by cross entropy. The gradient is that of the matched distances, 0
    where a distance is 0.

    Target elements without a class are padding: they and the predictions for them have no influence, whatever these
    hold. A set of padding alone costs 0.

    Args:
        classes: how many leading numbers of a target element are its one-hot class; the others, as many as a
            predicted element has, are its one-hot number.
        cross_entropy: of predictions that are raw scores.

    Raises `setpred.errors.NotFiniteError`; `ValueError` for shapes that do not fit.
    """

    def __init__(self, *, classes: int = 4, cross_entropy: bool = False) -> None:
        super().__init__()
        self.classes, self.cross_entropy = classes, cross_entropy

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """`[batch]` from predictions `[batch, n, numbers]` and targets `[batch, n, classes + numbers]`."""
        kinds, numbers = split_target(predicted, target, self.classes)
        present = kinds.sum(-1) > 0.5
        predicted = predicted.masked_fill(~present.unsqueeze(-1), 0.0)
        with torch.autocast(predicted.device.type, enabled=False):  # full precision where a model trains in half
            if self.cross_entropy:
                predicted = predicted.log_softmax(-1)
            with torch.no_grad():
                matched = matched_within(self._costs(predicted, numbers), kinds @ kinds.mT > 0.5, present)
            answers = predicted.gather(1, matched.unsqueeze(-1).expand_as(predicted))
            if self.cross_entropy:
                distance = -(answers * numbers).sum(-1)
            else:
                distance = torch.linalg.vector_norm(answers - numbers, dim=-1)  # of which torch's slope at 0 is 0
        return distance.masked_fill(~present, 0.0).sum(-1) / present.sum(-1).clamp(min=1)

    def _costs(self, predicted: Tensor, numbers: Tensor) -> Tensor:
        """d `[batch, n, n]`, predictions by targets."""
        if self.cross_entropy:
            return -predicted @ numbers.mT
        # not through |y|² + |t|² - 2yt, whose rounding near zero the root would magnify
        return torch.cdist(predicted, numbers, compute_mode="donot_use_mm_for_euclid_dist")


def split_target(predicted: Tensor, target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Classes `[batch, n, classes]` and numbers `[batch, n, numbers]` of a target; raises unless the shapes fit."""
    if predicted.ndim != 3 or target.shape != (*predicted.shape[:2], classes + predicted.shape[-1]):
        raise ValueError(
            f"expected predictions [batch, n, numbers] and targets [batch, n, {classes} + numbers], got "
            f"{list(predicted.shape)} and {list(target.shape)}"
        )
    return target.split([classes, predicted.shape[-1]], dim=-1)


def matched_within(cost: Tensor, same: Tensor, present: Tensor) -> Tensor:
    """The assignment of least cost among those that pair equals only, if each element has an equal of its own.

    Args:
        cost: `[batch, n, n]`, predictions by targets.
        same: which pairs may be, bool `[batch, n, n]`.
        present: which elements take part, as predictions and as targets, bool `[batch, n]`.

    Returns:
        int64 `[batch, n]`: which prediction each target gets; of absent ones some that means nothing.
    """
    # one forbidden pair costs more than all allowed ones can save
    forbidden = 1 + 2 * cost.shape[1] * cost.abs().amax((1, 2), keepdim=True)
    return hungarian(cost.where(same, forbidden), present, present).clamp(min=0)
