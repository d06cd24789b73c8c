"""DETR's loss: classes, coordinates and boxes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from setpred.errors import InputError
from setpred.losses.base import Mask, SetLoss
from setpred.matching import hungarian
from setpred.schema import PRESENCE
from setpred.sets import fill_absent, mean_present, set_sizes


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU = |A ∩ B| / |A ∪ B| - |H \\ (A ∪ B)| / |H|, H the smallest box around both (Rezatofighi et al., CVPR 2019).

    In (-1, 1], 1 for equal boxes, 0 if they have no area. Boxes are centre x, centre y, width, height, in the last axis
    `[..., 4]`; they broadcast to `[...]`. Negative sides count as 0.
    """
    from torchvision.ops import box_convert, generalized_box_iou_loss  # slow to import, and rarely used

    sides = (torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=0)], -1) for boxes in torch.broadcast_tensors(a, b))
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in sides)
    return 1 - generalized_box_iou_loss(*corners, eps=torch.finfo(a.dtype).tiny)


class DETRCriterion(SetLoss):
    """Loss of DETR (Carion et al., ECCV 2020), for elements of any schema.

    A prediction is an object with probability p = σ(presence - ½), so that decoding cuts at even odds, and has class k
    of a field with probability softmax(scores)_k. Real objects are matched to predictions one to one by the least total

        -exp(-E_ij) + λ Σ_continuous w |ŷ_i - y_j|₁ + λ_box w_box (1 - GIoU_ij),
        E_ij = -w_presence log p_i - Σ_categorical w log softmax(scores_i)_{class of j}

    where exp(-E) is the probability of being that object if all weights are 1. For each example the loss is

        [Σ_matched E - u Σ_unmatched w_presence log(1 - p)] / [matched + u · unmatched] + mean over matched of distance

    with the last two terms of the matching cost as the distance. Predictions are raw scores. Unlike the published code,
    this averages over an example (there: over the batch), has one "no object" number for all fields, and scores one
    layer (there: all layers of the decoder).

    Args:
        no_object: u, weight of the predictions without a match.
        coords: λ, of the absolute difference of the continuous numbers, summed over them, in stored units.
        box: name of a continuous field of four numbers (centre x, centre y, width, height) that also gets the GIoU.
        box_overlap: λ_box.
        presence_threshold: target elements whose presence is above it are the real objects. Predictions are not cut.
        common: `weights` and `schema` of `SetLoss`; w multiplies a field's terms.

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
        presence_threshold: float = 0.5,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if no_object < 0 or coords < 0 or box_overlap < 0:
            raise ValueError(f"expected weights of at least 0, got {no_object}, {coords} and {box_overlap}")
        self.no_object, self.coords, self.box, self.box_overlap = no_object, coords, box, box_overlap
        self.real_threshold, self.grouped = presence_threshold, True
        self._place_groups()

    def _place_groups(self) -> None:
        super()._place_groups()
        if self.box is not None and self.schema is not None:
            field = self.schema.field(self.box)
            if field.categorical or field.size != 4:
                raise InputError(f"box {self.box!r}: expected a continuous field of 4 numbers, got {field}")

    def compare(self, predicted: Tensor, target: Tensor, predicted_mask: Mask, target_mask: Mask) -> Tensor:
        real = target[..., -1] > self.real_threshold
        real = real if target_mask is None else real & target_mask
        target = fill_absent(target, real)
        available, objects = set_sizes(predicted, predicted_mask), set_sizes(target, real)
        if (objects > available).any():
            raise ValueError(f"expected at least as many predictions as objects, got {available} for {objects}")

        classes, places = self.class_costs(predicted, target), self.place_costs(predicted, target)
        assignment = hungarian(places.detach() - (-classes.detach()).exp(), predicted_mask, real)
        matched = assignment.clamp(min=0)  # padding gets an arbitrary match, masked out below
        pairs = matched.unsqueeze(1)

        nothing = self._weight(PRESENCE) * functional.softplus(predicted[..., -1] - 0.5)  # -log(1 - p)
        if predicted_mask is not None:
            nothing = nothing.masked_fill(~predicted_mask, 0.0)
        unmatched = nothing.sum(-1) - nothing.gather(1, matched).masked_fill(~real, 0.0).sum(-1)
        of_matched = classes.gather(1, pairs).squeeze(1).masked_fill(~real, 0.0).sum(-1)
        total = objects + self.no_object * (available - objects)
        class_term = (of_matched + self.no_object * unmatched) / torch.where(total > 0, total, 1.0)
        return class_term + mean_present(places.gather(1, pairs).squeeze(1), real)

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
