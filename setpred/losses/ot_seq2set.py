"""OTSeq2Set's loss: a matching, and transport of the meaning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from setpred.losses.base import SetLoss, uniform_mass
from setpred.losses.hungarian import HungarianLoss
from setpred.matching import sinkhorn
from setpred.schema import ElementSchema
from setpred.sets import presence_mask


class MatchingWithTransport(SetLoss):
    """Hungarian loss + λ Σ_ij P_ij (1 - cos(x_i, y_j)): bipartite matching and optimal transport (OTSeq2Set).

    P carries one unit of mass from all predictions x to the real elements y, at the least total of those costs; it is
    held fixed in the gradient (Cao, Zhang, EMNLP 2022). The matching asks each prediction to be one element, the
    transport asks all of them to lie in the directions of real ones. The paper has labels: a likelihood as the
    matched cost, and word embeddings in the cosine. Here both see the elements. λ is in the unit of the matched cost:
    8 goes with a likelihood in nats; smooth L1 is some hundred times smaller.

    The paper's plan is that of proximal points, P ← argmin <P, C> + β KL(P | P before), β = 1, 50 times. Each
    multiplies the plan by exp(-C/β) and scales it, so k of them are the entropic plan at the temperature β / k, which
    is taken here. An example without real elements has no transport.

    Args:
        transport: λ.
        temperature: of the plan, in units of 1 - cos.
        iterations: of Sinkhorn's algorithm.
        weights: of the matched cost, which the cosine does not have.
    """

    def __init__(
        self,
        *,
        transport: float = 8.0,
        temperature: float = 0.02,
        iterations: int = 50,
        weights: Mapping[str, float] | None = None,
        schema: ElementSchema | None = None,
    ) -> None:
        super().__init__(weights=weights, schema=schema)
        if transport < 0 or temperature <= 0 or iterations < 1:
            raise ValueError(
                "expected transport >= 0, temperature > 0 and iterations >= 1, got "
                f"{transport}, {temperature} and {iterations}"
            )
        self.transport, self.temperature, self.iterations = transport, temperature, iterations
        self.matching = HungarianLoss(weights=weights, schema=schema)

    def compare(
        self, predicted: Tensor, target: Tensor, predicted_mask: Tensor | None, target_mask: Tensor | None
    ) -> Tensor:
        real = presence_mask(target) if target_mask is None else presence_mask(target) & target_mask
        costs = 1 - functional.normalize(predicted, dim=-1) @ functional.normalize(target, dim=-1).mT
        a, b = uniform_mass(predicted, predicted_mask), uniform_mass(target, real)
        with torch.no_grad():
            plan = sinkhorn(costs, a, b, epsilon=self.temperature, iterations=self.iterations).plan
        carried = (plan * costs).sum((1, 2))
        return self.matching.compare(predicted, target, predicted_mask, target_mask) + self.transport * carried
