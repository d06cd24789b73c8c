"""How well two boxes cover each other."""

from __future__ import annotations

import torch
from torch import Tensor


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
