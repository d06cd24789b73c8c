"""Padded sets and masks: the one set convention, checked at the door.

`elements [batch, set_size, set_dim]` float and `mask [batch, set_size]` bool, True where an element is present.
Padded elements may hold anything; every consumer of a mask ignores them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_set(elements: Tensor, mask: Tensor | None = None, *, set_dim: int | None = None) -> None:
    """Raises `ValueError` unless `elements` (and `mask`) follow the convention."""
    wanted = "set_dim" if set_dim is None else str(set_dim)
    if elements.ndim != 3 or (set_dim is not None and elements.shape[-1] != set_dim):
        raise ValueError(f"expected elements [batch, set_size, {wanted}], got {list(elements.shape)}")
    if not elements.is_floating_point():
        raise ValueError(f"expected floating point elements, got {elements.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != elements.shape[:2]):
        raise ValueError(f"expected bool mask {list(elements.shape[:2])}, got {mask.dtype} {list(mask.shape)}")


def presence_mask(elements: Tensor) -> Tensor:
    """Mask `[..., set_size]` of target elements: True where presence, the last number, is over one half."""
    return elements[..., -1] > 0.5


def present_order(mask: Tensor) -> Tensor:
    """Order the present elements first: indices `[batch, set_size]` for a mask `[batch, set_size]`, stable."""
    return mask.int().argsort(dim=1, descending=True, stable=True)
