"""Costs to assignments."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional


class NotFiniteError(ArithmeticError):
    """A NaN or infinity where numbers were expected; `samples` are the positions in the batch."""

    def __init__(self, what: str, samples: list[int]) -> None:
        shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
        super().__init__(f"{what} is not finite" + (f" in samples {shown} of the batch" if samples else ""))
        self.samples = samples


def pairwise_smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """cost[b, i, j] = mean_d smooth_L1(predicted_bid - target_bjd).

    smooth_L1(e) = e²/2 for |e| < 1, |e| - 1/2 beyond (Girshick 2015). `[batch, n, dim]`, `[batch, m, dim]` ->
    `[batch, n, m]`.
    """
    if predicted.ndim != 3 or target.ndim != 3 or predicted.shape[::2] != target.shape[::2]:
        raise ValueError(
            "expected sets of equal batch and element size, got "
            f"{list(predicted.shape)} predicted and {list(target.shape)} target"
        )
    n, m = predicted.shape[1], target.shape[1]
    shape = (-1, n, m, -1)
    return functional.smooth_l1_loss(
        predicted.unsqueeze(2).expand(shape), target.unsqueeze(1).expand(shape), reduction="none"
    ).mean(-1)


def hungarian(cost: Tensor) -> Tensor:
    """The one-to-one assignment of least total cost, for each example.

    argmin_π Σ_j cost[b, π(j), j], by scipy's `linear_sum_assignment` on the CPU; one transfer each way.

    Args:
        cost: `[batch, n, m]` with n >= m: predictions by targets.

    Returns:
        int64 `[batch, m]`: which prediction each target gets.

    Raises:
        NotFiniteError: a cost that is NaN or infinite, naming the samples.

    >>> hungarian(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    tensor([[1, 0]])
    """
    if cost.ndim != 3 or cost.shape[1] < cost.shape[2]:
        raise ValueError(f"expected cost [batch, n, m] with n >= m, got {list(cost.shape)}")
    costs = cost.detach().float().cpu().numpy()
    finite = np.isfinite(costs).all(axis=(1, 2))
    if not finite.all():
        raise NotFiniteError("the matching cost", np.flatnonzero(~finite).tolist())
    # of the transposed cost the rows are the targets, which come back in order
    assignment = np.array([linear_sum_assignment(c.T)[1] for c in costs], dtype=np.int64)
    return torch.from_numpy(assignment.reshape(cost.shape[0], cost.shape[2])).to(cost.device)
