"""Operations on vectors `[3, ...]` and on lists of pixels.

Numbers that decide a pixel use only + - * / and the square root, and sums over an axis are written out. These
operations round in the same way one by one and in groups, so a picture does not depend on the rest of its batch.
"""

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products of vectors `[3, ...]`."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def take(values: Tensor, index: Tensor) -> Tensor:
    """`values[..., index]`, six times as fast on a CPU."""
    return values.index_select(-1, index)


def normalised(vectors: Tensor) -> Tensor:
    """Vectors `[3, ...]` scaled to length one."""
    return vectors / (dot(vectors, vectors) + 1e-24).sqrt()


def added(parts: Tensor) -> Tensor:
    """Sum over the first axis, in order."""
    total, *rest = parts.unbind(0)
    for part in rest:
        total = total + part
    return total


def smoothstep(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, 3x^2 - 2x^3 between."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def pixels_of(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pixels of boxes (left, top, right, bottom) `[boxes, 4]`: the box's index, x and y, each int64 `[n]`."""
    left, top, right, bottom = boxes.unbind(1)
    width = (right - left).clamp(min=0)
    count = width * (bottom - top).clamp(min=0)
    box = torch.repeat_interleave(count)
    number = torch.arange(len(box), device=boxes.device) - take(count.cumsum(0) - count, box)
    across = take(width, box)
    row = number // across
    return box, take(left, box) + number - row * across, take(top, box) + row
