"""Loss of OTSeq2Set: a matching plus optimal transport."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from setpred.losses.base import Mask, uniform_mass
from setpred.losses.hungarian import HungarianLoss
from setpred.matching import sinkhorn
from setpred.sets import presence_mask


class MatchingWithTransport(HungarianLoss):
    """Hungarian loss + λ Σ_ij P_ij (1 - cos(x_i, y_j)): bipartite matching and optimal transport (OTSeq2Set).

    P carries one unit of mass from all predictions x to the real elements y at the least total of those costs; the
    gradient holds it fixed (Cao, Zhang, EMNLP 2022). The matching trains each prediction towards one element, the
    transport trains all of them towards the directions of real ones. An example without real elements has no transport.

    The paper predicts labels, with a likelihood as the matched cost and word embeddings in the cosine; here both terms
    read the elements. λ is in the unit of the matched cost: 8 suits a likelihood in nats; smooth L1 is some hundred
    times smaller. The paper's k = 50 proximal points, P ← argmin <P, C> + β KL(P | P before), β = 1, each multiply the
    plan by exp(-C/β) and rescale it: together they are the entropic plan at temperature β / k, which is taken here.

    Args:
        transport: λ.
        temperature: temperature of the plan, in units of 1 - cos.
        iterations: iterations of Sinkhorn's algorithm.
        common: those of `HungarianLoss`; they do not affect the cosine.
    """

    def __init__(
        self, *, transport: float = 8.0, temperature: float = 0.02, iterations: int = 50, **common: Any
    ) -> None:
        super().__init__(**common)
        if transport < 0 or temperature <= 0 or iterations < 1:
            raise ValueError(
                "expected transport >= 0, temperature > 0 and iterations >= 1, got "
                f"{transport}, {temperature} and {iterations}"
            )
        self.transport, self.temperature, self.iterations = transport, temperature, iterations

    def compare(self, predicted: Tensor, target: Tensor, predicted_mask: Mask, target_mask: Mask) -> Tensor:
        costs = 1 - functional.normalize(predicted, dim=-1) @ functional.normalize(target, dim=-1).mT
        a, b = uniform_mass(predicted, predicted_mask), uniform_mass(target, presence_mask(target))
        with torch.no_grad():
            plan = sinkhorn(costs, a, b, epsilon=self.temperature, iterations=self.iterations).plan
        carried = (plan * costs).sum((1, 2))
        return super().compare(predicted, target, predicted_mask, target_mask) + self.transport * carried
