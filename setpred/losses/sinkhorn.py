"""Debiased Sinkhorn divergence."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from setpred.losses.base import Mask, SetLoss, uniform_mass
from setpred.matching import log_mass, pairwise_squared, soft_minimum


class SinkhornDivergence(SetLoss):
    """Sinkhorn divergence between two sets.

    S(α, β) = OT(α, β) - ½ OT(α, α) - ½ OT(β, β), between sets as uniform measures over their present elements.

        OT(α, β) = min_P Σ_ij P_ij C_ij + ε KL(P | a bᵀ),    C_ij = ½ mean_d w_d (x_id - y_jd)²

    with P's row sums a_i = 1/n and column sums b_j = 1/m. It is smooth, positive, and zero only for equal multisets
    (Feydy et al., AISTATS 2019). As ε -> 0 it becomes the least cost of transport (sets of equal size: of the best
    matching); as ε grows, half the squared distance of the means. A pair with an empty set costs 0.

    The potentials are fitted in turns while the temperature falls from the largest cost to ε. Equal sets take the same
    steps, so their divergence is 0 after any number. The gradient holds the potentials fixed: exact at convergence.

    Args:
        epsilon: ε, in the unit of the cost: an entropic blur of about √(2ε dim) in the distance of elements.
        iterations: turns of the potentials; too few for a small ε underestimate the distance.
        common: `weights`, `schema` and `presence_threshold` of `SetLoss`.
    """

    def __init__(self, *, epsilon: float = 0.01, iterations: int = 50, **common: Any) -> None:
        super().__init__(**common)
        if epsilon <= 0 or iterations < 1:
            raise ValueError(f"expected epsilon > 0 and iterations >= 1, got {epsilon} and {iterations}")
        self.epsilon, self.iterations = epsilon, iterations

    def compare(self, predicted: Tensor, target: Tensor, predicted_mask: Mask, target_mask: Mask) -> Tensor:
        a, b = uniform_mass(predicted, predicted_mask), uniform_mass(target, target_mask)
        neither_empty = (a > 0).any(-1) & (b > 0).any(-1)
        size = max(predicted.shape[1], target.shape[1])
        x, y = (functional.pad(part, (0, 0, 0, size - part.shape[1])) for part in (predicted, target))
        a, b = (functional.pad(part, (0, size - part.shape[1])) for part in (a, b))
        # padded to one size, the three problems are solved in one go
        across, of_x, of_y = self._transport_cost(
            torch.cat([x, x, y]), torch.cat([y, x, y]), torch.cat([a, a, b]), torch.cat([b, a, b])
        ).chunk(3)
        return (across - 0.5 * (of_x + of_y)).masked_fill(~neither_empty, 0.0)

    def _transport_cost(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """OT `[batch]`, by its dual: Σ_i a_i f_i + Σ_j b_j g_j, where f fits g and g is held fixed."""
        cost = pairwise_squared(x, y, self.element_weights(x))
        log_a, log_b = log_mass(a), log_mass(b)
        with torch.no_grad():
            largest = (cost * (a > 0).unsqueeze(2) * (b > 0).unsqueeze(1)).amax((1, 2))
            ratio = (largest / self.epsilon).clamp(min=1)
            falling = max(self.iterations // 2, 1)
            g = torch.zeros_like(b)
            for step in range(self.iterations):
                # falls geometrically from the largest cost to ε over the first half, then stays at ε
                temperature = self.epsilon * ratio ** max(0.0, 1 - step / falling)
                f = soft_minimum(cost, g, log_b, temperature)
                g = soft_minimum(cost.mT, f, log_a, temperature)
        f = soft_minimum(cost, g, log_b, self.epsilon)
        return (a * f).sum(-1) + (b * g).sum(-1)
