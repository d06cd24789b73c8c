"""The losses of DETR, with boxes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from setpred.errors import InputError
from setpred.losses.base import SetLoss, counts
from setpred.matching import hungarian
from setpred.schema import PRESENCE, ElementSchema


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU = |A ∩ B| / |A ∪ B| - |H \\ (A ∪ B)| / |H|, H the smallest box around both (Rezatofighi et al., CVPR 2019).

    In (-1, 1], 1 for equal boxes; unlike the intersection over union it still has a slope where boxes are apart.
    Boxes are centre x, centre y, width, height, in the last axis `[..., 4]`, and broadcast -> `[...]`. Sides that
    are not positive count as 0; two boxes without area that lie on each other have 0.
    """
    (a_low, a_high), (b_low, b_high) = _corners(a), _corners(b)
    common = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    union = (a_high - a_low).prod(-1) + (b_high - b_low).prod(-1) - common
    tiny = torch.finfo(hull.dtype).tiny
    return common / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    centre, half = boxes[..., :2], 0.5 * boxes[..., 2:].clamp(min=0)
    return centre - half, centre + half


class DETRCriterion(SetLoss):
    """The loss of DETR (Carion et al., ECCV 2020), for elements of any schema.

    A prediction is an object with probability p = σ(presence - ½), so that even odds lie where decoding cuts, and
    then of class k of a field with probability softmax(scores)_k. Real objects, and nothing else of the target, are
    matched to predictions one to one by the least total of

        -exp(-E_ij) + λ Σ_continuous w |ŷ_i - y_j|₁ + λ_box w_box (1 - GIoU_ij),
        E_ij = -w_presence log p_i - Σ_categorical w log softmax(scores_i)_{class of j}

    where exp(-E) is the probability of being that object, all weights 1. For each example the loss is

        [Σ_matched E - u Σ_unmatched w_presence log(1 - p)] / [matched + u · unmatched] + mean over matched of distance

    with the last two terms of the matching cost as the distance. As published, but each example is averaged over itself
    (there: over the batch), "no object" is one number for all fields together, and a layer is scored alone (there:
    the sum over all layers of the decoder). A prediction's numbers are read as raw scores: no sigmoid, no softmax. An
    example without real objects asks all its predictions to be none.

    Args:
        no_object: u, weight of the predictions that are matched to nothing.
        coords: λ, of the absolute difference of the continuous numbers, summed over them, in stored units.
        box: name of a continuous field of four numbers (centre x, centre y, width, height) that also has the GIoU.
        box_overlap: λ_box.
        weights, schema: as everywhere; here w multiplies a field's terms.
        presence_threshold: target elements whose presence is over it are the real objects. Predictions are not cut.

    Raises:
        ValueError: fewer predictions than real objects.
    """

    def __init__(
        self,
        *,
        no_object: float = 0.1,
        coords: float = 5.0,
        box: str | None = None,
        box_overlap: float = 2.0,
        weights: Mapping[str, float] | None = None,
        schema: ElementSchema | None = None,
        presence_threshold: float = 0.5,
    ) -> None:
        super().__init__(weights=weights, schema=schema)
        if no_object < 0 or coords < 0 or box_overlap < 0:
            raise ValueError(f"expected weights of at least 0, got {no_object}, {coords} and {box_overlap}")
        if box is not None and (self.schema.field(box).categorical or self.schema.field(box).size != 4):
            raise InputError(f"box {box!r}: expected a continuous field of 4 numbers, got {self.schema.field(box)}")
        self.no_object, self.coords, self.box, self.box_overlap = no_object, coords, box, box_overlap
        self.real_over = presence_threshold

    def compare(
        self, predicted: Tensor, target: Tensor, predicted_mask: Tensor | None, target_mask: Tensor | None
    ) -> Tensor:
        if predicted.shape[-1] != self.schema.set_dim:
            raise ValueError(f"expected elements of {self.schema.set_dim} numbers, got {predicted.shape[-1]}")
        real = target[..., -1] > self.real_over
        real = real if target_mask is None else real & target_mask
        target = target.masked_fill(~real.unsqueeze(-1), 0.0)
        available, objects = counts(predicted, predicted_mask), counts(target, real)
        if (objects > available).any():
            raise ValueError(f"expected at least as many predictions as objects, got {available} for {objects}")

        classes, places = self.class_costs(predicted, target), self.place_costs(predicted, target)
        assignment = hungarian(places.detach() - (-classes.detach()).exp(), predicted_mask, real)
        matched = assignment.clamp(min=0)  # of padding: any, masked out below

        def over_matched(costs: Tensor) -> Tensor:
            return costs.masked_fill(~real, 0.0).sum(-1)

        nothing = self._weight(PRESENCE) * functional.softplus(predicted[..., -1] - 0.5)  # -log(1 - p)
        if predicted_mask is not None:
            nothing = nothing.masked_fill(~predicted_mask, 0.0)
        unmatched = nothing.sum(-1) - over_matched(nothing.gather(1, matched))
        pairs = matched.unsqueeze(1)
        class_term = over_matched(classes.gather(1, pairs).squeeze(1)) + self.no_object * unmatched
        total = objects + self.no_object * (available - objects)
        place_term = over_matched(places.gather(1, pairs).squeeze(1)) / objects.clamp(min=1)
        return class_term / torch.where(total > 0, total, 1.0) + place_term

    def class_costs(self, predicted: Tensor, target: Tensor) -> Tensor:
        """E `[batch, n, m]`: cross entropy of each prediction for the presence and the classes of each object."""
        costs = -self._weight(PRESENCE) * functional.logsigmoid(predicted[..., -1:] - 0.5)
        for field in self.schema.categorical:
            where = self.schema.slice(field.name)
            wanted = functional.one_hot(target[..., where].argmax(-1), field.size).to(predicted.dtype)
            costs = costs - self._weight(field.name) * predicted[..., where].log_softmax(-1) @ wanted.mT
        return costs.expand(-1, -1, target.shape[1])

    def place_costs(self, predicted: Tensor, target: Tensor) -> Tensor:
        """λ Σ w |difference| + λ_box w (1 - GIoU), `[batch, n, m]`."""
        costs = predicted.new_zeros(predicted.shape[0], predicted.shape[1], target.shape[1])
        for field in self.schema.continuous:
            where, weight = self.schema.slice(field.name), self._weight(field.name)
            ours, theirs = predicted[..., where].unsqueeze(2), target[..., where].unsqueeze(1)
            costs = costs + weight * self.coords * (ours - theirs).abs().sum(-1)
            if field.name == self.box:
                costs = costs + weight * self.box_overlap * (1 - generalised_iou(ours, theirs))
        return costs

    def _weight(self, name: str) -> float:
        return self.group_weights.get(name, 1.0)
