"""Pairwise costs, assignments (Hungarian) and transport plans (Sinkhorn)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor
from torch.nn import functional

from setpred.errors import NotFiniteError
from setpred.sets import present_order

NUMBERS_AT_ONCE = 2**22  # 16 MiB; for large sets this is also faster than all at once


def check_pair(predicted: Tensor, target: Tensor) -> None:
    """Raise `ValueError` unless these are sets `[batch, n, dim]` and `[batch, m, dim]`."""
    if predicted.ndim != 3 or target.ndim != 3 or predicted.shape[::2] != target.shape[::2]:
        raise ValueError(
            "expected sets of equal batch and element size, got "
            f"{list(predicted.shape)} predicted and {list(target.shape)} target"
        )


ElementCost = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _pairwise(cost: ElementCost, predicted: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Compute the cost of every pair `[batch, n, m]`, some examples at a time to limit memory."""
    check_pair(predicted, target)
    pair = (-1, predicted.shape[1], target.shape[1], -1)
    examples = max(1, NUMBERS_AT_ONCE // max(1, predicted[:1].numel() * target.shape[1]))
    parts = [
        cost(p.unsqueeze(2).expand(pair), t.unsqueeze(1).expand(pair), weights)
        for p, t in zip(predicted.split(examples), target.split(examples), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weighted_mean(costs: Tensor, weights: Tensor | None) -> Tensor:
    return (costs if weights is None else costs * weights).mean(-1)


def smooth_l1(
    predicted: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    beta: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """Compute mean_d w_d smooth_L1(predicted_d - target_d; β_d), element by element.

    smooth_L1(e; β) = e²/(2β) for |e| < β, |e| - β/2 beyond (Girshick 2015, β = 1). Twice `[..., dim]`, `weights [dim]`
    and `beta [dim]` (1 unless given) -> `[...]`. Numbers with a level τ < 1 in `levels [dim]` cost `pinball` instead.
    """
    if beta is None:
        costs = functional.smooth_l1_loss(predicted, target, reduction="none")
    else:
        error = (predicted - target).abs()
        costs = torch.where(error < beta, 0.5 * error.square() / beta, error - 0.5 * beta)
    if levels is not None:
        costs = torch.where(levels < 1, pinball(predicted, target, levels), costs)
    return _weighted_mean(costs, weights)


def pinball(predicted: Tensor, target: Tensor, levels: Tensor | float) -> Tensor:
    """Compute max(τ e, (τ - 1) e), e = target - predicted, number by number; its mean is least at the τ-quantile.

    Source: Koenker and Bassett, Econometrica 1978.
    """
    error = target - predicted
    return torch.maximum(levels * error, (levels - 1) * error)


def squared(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute ½ mean_d w_d (predicted_d - target_d)², element by element; shapes as `smooth_l1`."""
    return 0.5 * _weighted_mean(functional.mse_loss(predicted, target, reduction="none"), weights)


def pairwise_smooth_l1(
    predicted: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    beta: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """Compute cost[b, i, j] = `smooth_l1` of predicted_bi and target_bj.

    `[batch, n, dim]`, `[batch, m, dim]`, `weights [dim]`, `beta [dim]` and `levels [dim]` -> `[batch, n, m]`.
    """
    return _pairwise(partial(smooth_l1, beta=beta, levels=levels), predicted, target, weights)


def pairwise_squared(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute cost[b, i, j] = `squared` of predicted_bi and target_bj; shapes as `pairwise_smooth_l1`."""
    return _pairwise(squared, predicted, target, weights)


def hungarian(cost: Tensor, predicted_mask: Tensor | None = None, target_mask: Tensor | None = None) -> Tensor:
    """Find the one-to-one assignment of least total cost, for each example.

    argmin_π Σ_j cost[b, π(j), j], by scipy's `linear_sum_assignment` on the CPU, with one transfer each way.

    Args:
        cost: `[batch, n, m]`, predictions by targets; n >= m unless there are masks.
        predicted_mask, target_mask: present elements, bool `[batch, n]` and `[batch, m]`; all unless given. As many
            pairs form as the smaller number allows; costs of absent elements are ignored.

    Returns:
        int64 `[batch, m]`: the index of the prediction of each target, -1 for none.

    Raises:
        ValueError: costs of another shape.
        NotFiniteError: a cost that is NaN or infinite, naming the samples.

    >>> hungarian(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    tensor([[1, 0]])
    >>> hungarian(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), target_mask=torch.tensor([[False, True]]))
    tensor([[-1,  0]])
    """
    masked = predicted_mask is not None or target_mask is not None
    if cost.ndim != 3 or (cost.shape[1] < cost.shape[2] and not masked):
        raise ValueError(f"expected cost [batch, n, m] with n >= m, got {list(cost.shape)}")
    batch, n, m = cost.shape
    # scipy takes no half precision; float64 keeps its precision and range
    costs = cost.detach().to(torch.promote_types(cost.dtype, torch.float32))
    if masked:  # costs and masks in one transfer
        rows = costs.new_ones(batch, n) if predicted_mask is None else predicted_mask
        columns = costs.new_ones(batch, m) if target_mask is None else target_mask
        costs, rows, columns = torch.cat([costs.flatten(1), rows, columns], 1).cpu().split([n * m, n, m], dim=1)
        costs, rows, columns = costs.unflatten(1, (n, m)), rows > 0, columns > 0
    else:
        costs, rows, columns = costs.cpu(), torch.ones(batch, n).bool(), torch.ones(batch, m).bool()
    finite = (costs.isfinite() | ~(rows.unsqueeze(2) & columns.unsqueeze(1))).flatten(1).all(1)
    if not finite.all():
        raise NotFiniteError("matching cost", (~finite).nonzero().flatten().tolist())
    i, j = present_order(rows), present_order(columns)
    if masked:
        costs = costs.gather(1, i.unsqueeze(2).expand_as(costs)).gather(2, j.unsqueeze(1).expand_as(costs))
    assignment = np.full((batch, m), -1, dtype=np.int64)
    sizes = zip(rows.sum(1).tolist(), columns.sum(1).tolist(), strict=True)
    for chosen, c, (present, wanted), ours, theirs in zip(
        assignment, costs.numpy(), sizes, i.numpy(), j.numpy(), strict=True
    ):
        target, predicted = linear_sum_assignment(c[:present, :wanted].T)
        chosen[theirs[target]] = ours[predicted]
    return torch.from_numpy(assignment).to(cost.device)


def transport_cost(cost: Tensor) -> float:
    """Compute the least cost of transport between two uniform measures of mass 1, exactly.

        min_P Σ_ij P_ij C_ij    with P ≥ 0,  Σ_j P_ij = 1/n,  Σ_i P_ij = 1/m

    For sets of one size a one-to-one assignment is optimal (Birkhoff); others take scipy's linear programming.

    Args:
        cost: C `[n, m]`, finite, n and m at least 1.

    >>> transport_cost(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))  # a third of the mass has to move
    0.3333333333333333
    """
    values = cost.detach().double().cpu().numpy()
    n, m = values.shape
    if n == m:
        return float(values[linear_sum_assignment(values)].mean())
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    masses = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return float(linprog(values.ravel(), A_eq=sums, b_eq=masses).fun)


class Transport(NamedTuple):
    """Result of `sinkhorn`: the plan `[batch, n, m]`, and its potentials f `[batch, n]` and g `[batch, m]`."""

    plan: Tensor
    rows: Tensor
    columns: Tensor


def log_mass(mass: Tensor) -> Tensor:
    """Compute the log of masses `[batch, n]`, -∞ for mass 0; zeros for an example without mass, to avoid NaN."""
    present = mass > 0
    nothing = ~present.any(-1, keepdim=True)
    return torch.where(present, mass, 1.0).log().masked_fill(~(present | nothing), -torch.inf)


def soft_minimum(cost: Tensor, potential: Tensor, log_masses: Tensor, epsilon: float | Tensor) -> Tensor:
    """Compute f_i = -ε log Σ_j b_j exp((g_j - C_ij) / ε), a half-step of Sinkhorn's algorithm in the log domain.

    Cost `[batch, n, m]`, g and log b `[batch, m]`, ε one number or `[batch]` -> `[batch, n]`. As ε -> 0 it is
    min_j C_ij - g_j.
    """
    each = epsilon.unsqueeze(1) if isinstance(epsilon, Tensor) else epsilon
    exponents = (potential / each).unsqueeze(1) - cost / (each.unsqueeze(2) if isinstance(each, Tensor) else each)
    return -each * (exponents + log_masses.unsqueeze(1)).logsumexp(-1)


def sinkhorn(
    cost: Tensor,
    row_mass: Tensor | None = None,
    column_mass: Tensor | None = None,
    *,
    epsilon: float,
    iterations: int,
    start: Transport | None = None,
) -> Transport:
    """Find the transport plan of least cost at temperature ε for each example, by Sinkhorn in the log domain.

        argmin_P Σ_ij P_ij C_ij + ε KL(P | a bᵀ)   with   Σ_j P_ij = a_i,  Σ_i P_ij = b_j

    The solution is P_ij = a_i b_j exp((f_i + g_j - C_ij) / ε), with f and g updated in turns (Cuturi, NeurIPS 2013). g
    is updated last: column sums are exact, row sums converge with the iterations. A temperature that is small relative
    to the costs needs many of them. All iterations are differentiable. The scalings a exp(f / ε) and b exp(g / ε)
    start at 1, as in Cuturi's algorithm and the released MESH.

    Args:
        cost: C `[batch, n, m]`, finite.
        row_mass, column_mass: a `[batch, n]` and b `[batch, m]`, not negative and of equal sum; a uniform unit of mass
            unless given. Rows and columns of mass 0 have a plan of zeros.
        epsilon: ε, in the unit of the cost.
        iterations: number of updates of f and g.
        start: an earlier result, whose potentials are the first ones.

    Raises:
        ValueError: other shapes, or a number out of range.

    >>> plan = sinkhorn(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), epsilon=0.01, iterations=5).plan
    >>> plan.round(decimals=4).tolist()
    [[[0.5, 0.0], [0.0, 0.5]]]
    """
    if cost.ndim != 3 or epsilon <= 0 or iterations < 0:
        raise ValueError(
            "expected cost [batch, n, m], epsilon > 0 and iterations >= 0, got "
            f"{list(cost.shape)}, {epsilon} and {iterations}"
        )
    batch, n, m = cost.shape
    a = cost.new_full((batch, n), 1 / max(n, 1)) if row_mass is None else row_mass
    b = cost.new_full((batch, m), 1 / max(m, 1)) if column_mass is None else column_mass
    if a.shape != (batch, n) or b.shape != (batch, m):
        raise ValueError(f"expected masses {[batch, n]} and {[batch, m]}, got {list(a.shape)} and {list(b.shape)}")
    log_a, log_b = log_mass(a), log_mass(b)
    if start is None:
        f, g = (-epsilon * log.masked_fill(log == -torch.inf, 0.0) for log in (log_a, log_b))
    else:
        f, g = start.rows, start.columns
    for _ in range(iterations):
        f = soft_minimum(cost, g, log_b, epsilon)
        g = soft_minimum(cost.mT, f, log_a, epsilon)
    exponents = (f.unsqueeze(2) + g.unsqueeze(1) - cost) / epsilon + log_a.unsqueeze(2) + log_b.unsqueeze(1)
    something = (a > 0).any(-1) & (b > 0).any(-1)
    return Transport(exponents.exp() * something.view(-1, 1, 1), f, g)
