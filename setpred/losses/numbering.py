"""Loss of class-specific numbering, matched within classes."""

import torch
from torch import Tensor, nn

from setpred.matching import hungarian
from setpred.sets import fill_absent, mean_present


class NumberingLoss(nn.Module):
    """min_π (1/n) Σ_i d(y_i, t_π(i)), the minimum over one-to-one matchings π within each class.

        d(y, t) = |y - t|₂,    or with cross entropy    -log softmax(y)_t

    Prediction i answers target element i, whose class it has; any order of the numbers within a class is right. The
    distance, not squared, is published for predictions on the simplex (Zhang et al., ICLR 2022), cross entropy for the
    baselines. The gradient holds the matching fixed, and is 0 where a distance is 0. Target elements without a class
    are padding: they and their predictions have no influence, even if these are NaN. A set of only padding costs 0.

    Args:
        classes: how many leading numbers of a target element are its one-hot class; the others, as many as a predicted
            element has, are its one-hot number.
        cross_entropy: True for predictions that are raw scores.

    Raises:
        NotFiniteError: a matching cost that is not finite.
        ValueError: shapes that do not fit.
    """

    def __init__(self, *, classes: int = 4, cross_entropy: bool = False) -> None:
        super().__init__()
        self.classes, self.cross_entropy = classes, cross_entropy

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Loss `[batch]` of predictions `[batch, n, numbers]` and targets `[batch, n, classes + numbers]`."""
        kinds, numbers = split_target(predicted, target, self.classes)
        present = kinds.sum(-1) > 0.5
        predicted = fill_absent(predicted, present)
        with torch.autocast(predicted.device.type, enabled=False):  # full precision, also where a model uses half
            if self.cross_entropy:
                predicted = predicted.log_softmax(-1)
            with torch.no_grad():
                cost = self._costs(predicted, numbers)
                # a pair of different classes costs more than all other pairs together can save
                forbidden = 1 + 2 * cost.shape[1] * cost.abs().amax((1, 2), keepdim=True)
                cost = cost.where(kinds @ kinds.mT > 0.5, forbidden)
                matched = hungarian(cost, present, present).clamp(min=0)
            answers = predicted.gather(1, matched.unsqueeze(-1).expand_as(predicted))
            if self.cross_entropy:
                distance = -(answers * numbers).sum(-1)
            else:
                distance = torch.linalg.vector_norm(answers - numbers, dim=-1)  # torch's gradient at 0 is 0
        return mean_present(distance, present)

    def _costs(self, predicted: Tensor, numbers: Tensor) -> Tensor:
        """d `[batch, n, n]`, predictions by targets."""
        if self.cross_entropy:
            return -predicted @ numbers.mT
        # not by |y|² + |t|² - 2yt: the root magnifies its rounding near zero
        return torch.cdist(predicted, numbers, compute_mode="donot_use_mm_for_euclid_dist")


def split_target(predicted: Tensor, target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Split a target into classes `[batch, n, classes]` and numbers `[batch, n, numbers]`, or raise `ValueError`."""
    if predicted.ndim != 3 or target.shape != (*predicted.shape[:2], classes + predicted.shape[-1]):
        raise ValueError(
            f"expected predictions [batch, n, numbers] and targets [batch, n, {classes} + numbers], got "
            f"{list(predicted.shape)} and {list(target.shape)}"
        )
    return target.split([classes, predicted.shape[-1]], dim=-1)
