"""Padded sets and their masks.

`elements [batch, set_size, set_dim]` float and `mask [batch, set_size]` bool, True where an element is present; no mask
(None) means that all are. Padded elements may hold anything (NaN too); every consumer of a mask ignores them.
"""

import torch
from torch import Tensor


def check_set(elements: Tensor, mask: Tensor | None = None, *, set_dim: int | None = None) -> None:
    """Raise `ValueError` unless `elements` (and `mask`) follow the convention."""
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


def fill_absent(elements: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
    """`elements` with `value` in the place of the absent ones."""
    return elements if mask is None else elements.masked_fill(~mask.unsqueeze(-1), value)


def token_mask(mask: Tensor, tokens: int) -> Tensor:
    """Mask `[batch, tokens]` of the tokens of each set, from that of its elements `[batch, set_size]`.

    Every element has as many tokens, one after the other.
    """
    return mask.repeat_interleave(tokens // mask.shape[1], dim=1)


def set_sizes(elements: Tensor, mask: Tensor | None = None) -> Tensor:
    """Number of present elements of each set, `[batch]`, in the elements' dtype."""
    if mask is None:
        return elements.new_full((elements.shape[0],), elements.shape[1])
    return mask.sum(1).to(elements.dtype)


def mean_present(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the present elements: `[batch, set_size, ...]` to `[batch, ...]`; 0 for an empty set."""
    sizes = set_sizes(values, mask).clamp(min=1).view(-1, *[1] * (values.ndim - 2))
    if mask is not None:
        values = values.masked_fill(~mask.view(*mask.shape, *[1] * (values.ndim - 2)), 0.0)
    return values.sum(1) / sizes


def present_order(mask: Tensor) -> Tensor:
    """Order the present elements first: indices `[batch, set_size]` for a mask `[batch, set_size]`, stable."""
    return mask.int().argsort(dim=1, descending=True, stable=True)


def present_first(elements: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The present elements in their order, then zeros; and the mask of them, never None."""
    if mask is None:
        return elements, elements.new_ones(elements.shape[:2], dtype=torch.bool)
    order = present_order(mask)
    elements = fill_absent(elements, mask)
    return elements.gather(1, order.unsqueeze(-1).expand_as(elements)), mask.gather(1, order)
