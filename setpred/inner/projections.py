"""Projections onto the set of allowed iterates."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Projection(ABC):
    """Map from each iterate `[batch, ...]` to the nearest allowed one (base class)."""

    @abstractmethod
    def __call__(self, iterate: Tensor) -> Tensor: ...


class Simplex(Projection):
    """Projection of each row, along the last axis, onto the probability simplex; see `simplex`."""

    def __call__(self, iterate: Tensor) -> Tensor:
        return simplex(iterate)


def simplex(points: Tensor) -> Tensor:
    """Project each row `[..., dim]` onto the probability simplex.

        argmin_p ½|p - x|²  with  p >= 0, Σ p = 1,    p = max(x - τ, 0)

    τ has a closed form in the sorted entries (Held, Wolfe, Crowder 1974; Duchi et al., ICML 2008).
    Differentiable almost everywhere; on the support the derivative is I - 11ᵀ/|support|.

    >>> simplex(torch.tensor([[0.5, 0.5], [2.0, 0.0]]))
    tensor([[0.5000, 0.5000],
            [1.0000, 0.0000]])
    """
    descending = points.sort(dim=-1, descending=True).values
    excess = descending.cumsum(-1) - 1
    count = torch.arange(1, points.shape[-1] + 1, device=points.device, dtype=points.dtype)
    support = (descending * count > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1) / support
    return (points - threshold).clamp(min=0)
