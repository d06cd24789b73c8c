"""Attention weights as a transport plan between tokens and slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setpred.decoders.mesh import MESH
from setpred.matching import Transport, sinkhorn
from setpred.nn import MLP


class SinkhornAttention(nn.Module):
    """Slots and tokens exchange what each has to give: the entropic transport plan of least cost.

        argmin_P Σ_si P_si |k_s - q_i| / τ + KL(P | a bᵀ)   with   Σ_i P_si = a_s,  Σ_s P_si = b_i

    Both marginals are learned, a = n softmax_s(α(k_s)) and b = n softmax_i(β(q_i)), so that n slots have one unit each
    on average; the weights are P transposed. In place of `SlotSoftmax` in Slot Attention this is SA-SH, and with `mesh`
    SA-MESH (Zhang et al., ICML 2023). The released code takes the marginals from slots and tokens before the
    projections to q and k; here they come after, so that every head has its own. Its MESH transports at τ = 1 whatever
    the τ of the weights; here τ is one, and published is 1.

    Sums over tokens are b exactly, sums over slots a as far as the iterations go.

    Args:
        mesh: changes the costs before they are paid; None leaves them.
        dim: numbers of a query, that is slot_dim / heads.
        hidden_dim: of the networks α and β.
        iterations: of Sinkhorn's algorithm.
        temperature: τ.
    """

    def __init__(
        self,
        mesh: MESH | None = None,
        *,
        dim: int = 64,
        hidden_dim: int = 128,
        iterations: int = 5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.mesh = mesh
        self.iterations, self.temperature = iterations, temperature
        # without a last bias, which a softmax would not see
        self.token_mass, self.slot_mass = (
            nn.Sequential(*MLP(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1, bias=False)) for _ in range(2)
        )

    def draw(self, keys: Tensor, slots: int) -> Tensor | None:
        """The random numbers of one prediction: those of `mesh`."""
        return None if self.mesh is None else self.mesh.draw(keys, slots)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None, noise: Tensor | None) -> Tensor:
        """Weights `[batch, heads, slots, tokens]`; arguments as of `SlotSoftmax`."""
        batch, heads, slots, _ = queries.shape
        queries, keys = queries.flatten(0, 1), keys.flatten(0, 1)
        scores = self.token_mass(keys).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask.repeat_interleave(heads, dim=0), -torch.inf)
        a = slots * scores.softmax(-1)
        b = slots * self.slot_mass(queries).squeeze(-1).softmax(-1)

        def transport(cost: Tensor, start: Transport | None) -> Transport:
            return sinkhorn(cost, a, b, epsilon=self.temperature, iterations=self.iterations, start=start)

        # not through |k|² + |q|² - 2kq, whose rounding near zero the root would magnify
        cost, start = torch.cdist(keys, queries, compute_mode="donot_use_mm_for_euclid_dist"), None
        if self.mesh is not None:
            cost, start = self.mesh(cost, transport, noise)
        return transport(cost, start).plan.mT.unflatten(0, (batch, heads))
