"""Attention by optimal transport for Slot Attention: Sinkhorn attention and MESH."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.decoders.starts import gaussian
from setpred.inner import GradientDescent, State, inner_gradient, minimise
from setpred.inner.differentiation import Differentiation, Unrolled
from setpred.matching import Transport, sinkhorn
from setpred.nn import MLP

FLAT = 1e-12  # published: below this norm of ∇ mean_ij H_ij steps are shorter than `step_size`


def entropy(plan: Tensor) -> Tensor:
    """Compute H(P) = -Σ_ij p_ij log p_ij with p = min(P, 1), of each plan `[batch, n, m]`.

    Terms of P > 1 would be negative and unbounded. The clamp gives them no value and no gradient, as in the released
    code.
    """
    return torch.special.entr(plan.clamp(min=1e-20, max=1.0)).sum((1, 2))


class MESH(nn.Module):
    """Minimisation of the entropy of the Sinkhorn plan, by descent on the costs (Zhang et al., ICML 2023).

        C ← C - η ∇H(P(C)) / |∇H(P(C))|,    P(C) = Sinkhorn's plan,    C₀ = C + noise · N(0, 1)

    It interpolates between the soft plan and a one-to-one assignment, without the latter's flat gradients. The noise
    breaks ties: equal slots have equal costs, a maximum of the entropy, and the descent separates them. So the
    attention is exclusively multiset-equivariant. Clipping to a tiny norm normalises the gradient. Each plan starts
    from the potentials of the previous one, as in the released code.

    Args:
        differentiation: how gradients pass; `Unrolled()` is exact. None takes ∂C_T/∂C₀ = I with constant steps, as the
            released code does. (Not `Implicit`, which gives the start of a descent, here the only input, no gradient.)
        iterations: number of steps of the descent.
        step_size: η, the length of a step in the unit of the costs, of the complete matrix.
        noise: standard deviation of the noise on the costs, the same in all refinements of the slots: in training
            drawn afresh for each example, in evaluation one draw for all, a function of `seed` alone.
        seed: seed of the noise in evaluation.
    """

    def __init__(
        self,
        differentiation: Differentiation | None = None,
        *,
        iterations: int = 4,
        step_size: float = 8.0,
        noise: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.descent = GradientDescent(iterations=iterations, learning_rate=step_size / FLAT, clip=FLAT)
        self.differentiation = differentiation
        self.noise, self.seed = noise, seed

    def draw(self, keys: Tensor, slots: int) -> Tensor | None:
        """Draw noise · N(0, 1) `[batch, heads, tokens, slots]` for keys `[batch, heads, tokens, dim]`; None if 0."""
        if not self.noise:
            return None
        _, heads, tokens = keys.shape[:3]
        # tokens first: padding changes no other token's numbers
        drawn = gaussian((tokens, heads, slots), keys, seed=None if self.training else self.seed)
        return self.noise * drawn.transpose(1, 2).to(keys.dtype)

    def forward(
        self, cost: Tensor, transport: Callable[[Tensor, Transport | None], Transport], noise: Tensor | None
    ) -> tuple[Tensor, Transport | None]:
        """Return changed costs, and the potentials that their plan starts from.

        Args:
            cost: C `[batch * heads, tokens, slots]`.
            transport: (costs, initial potentials) -> plan.
            noise: added to the costs, from `draw`; None adds nothing.
        """
        if noise is not None:
            cost = cost + noise.flatten(0, 1)
        latest: Transport | None = None
        kept = torch.is_grad_enabled()

        def energy(costs: Tensor) -> Tensor:
            nonlocal latest
            found = transport(costs, latest)
            latest = found if kept else Transport(*(x.detach() for x in found))
            return entropy(found.plan) / found.plan.shape[1:].numel()

        if self.differentiation is not None or not kept:
            differentiation = Unrolled() if self.differentiation is None else self.differentiation
            return minimise(energy, cost, descent=self.descent, differentiation=differentiation), latest
        state = State(cost)
        for _ in range(self.descent.iterations):
            iterate = state.iterate.view_as(cost)  # a new node, after the potentials it starts from
            iterate = iterate if iterate.requires_grad else iterate.requires_grad_()
            gradient = inner_gradient(energy, iterate, create_graph=False, retain_graph=True)
            state = self.descent.step(state._replace(iterate=iterate), gradient)
        return state.iterate, latest


class SinkhornAttention(nn.Module):
    """Attention weights from the entropic transport plan of least cost between tokens and slots.

        argmin_P Σ_si P_si C_si / τ + KL(P | a bᵀ)   with   Σ_i P_si = a_s,  Σ_s P_si = b_i

    for costs C_si = |k_s - q_i|, or 1 - cos(k_s, q_i). The published model of videos has costs 6 (1 - cos) at τ = 1:
    cosine costs, τ = 1/6, and a step size and noise of `MESH` divided by 6.
    Both marginals are learned, a = n softmax_s(α(k_s)) and b = n softmax_i(β(q_i)) for n slots; the weights are P
    transposed. Sums over tokens equal b exactly, sums over slots equal a at convergence. In Slot Attention, in place of
    `SlotSoftmax`, this is SA-SH, and with `mesh` SA-MESH (Zhang et al., ICML 2023). The released code takes the
    marginals from slots and tokens before the projections to q and k; here every head has its own. Its MESH transports
    at τ = 1 whatever the τ of the weights; here there is one τ.

    Args:
        mesh: changes the costs before the transport; None leaves them.
        dim: length of a query, slot_dim / heads.
        hidden_dim: width of the networks α and β.
        iterations: number of iterations of Sinkhorn's algorithm.
        temperature: τ.
        cosine: whether costs are 1 - cos instead of the distance.
    """

    def __init__(
        self,
        mesh: MESH | None = None,
        *,
        dim: int = 64,
        hidden_dim: int = 128,
        iterations: int = 5,
        temperature: float = 1.0,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.mesh, self.cosine = mesh, cosine
        self.iterations, self.temperature = iterations, temperature
        # no last bias, which a softmax would ignore
        self.token_mass, self.slot_mass = (
            nn.Sequential(*MLP(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1, bias=False)) for _ in range(2)
        )

    def draw(self, keys: Tensor, slots: int) -> Tensor | None:
        """Draw the random numbers of one prediction: those of `mesh`."""
        return None if self.mesh is None else self.mesh.draw(keys, slots)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None, noise: Tensor | None) -> Tensor:
        """Weights `[batch, heads, slots, tokens]`; arguments as for `SlotSoftmax`."""
        batch, heads, slots, _ = queries.shape
        queries, keys = queries.flatten(0, 1), keys.flatten(0, 1)
        scores = self.token_mass(keys).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask.repeat_interleave(heads, dim=0), -torch.inf)
        a = slots * scores.softmax(-1)
        b = slots * self.slot_mass(queries).squeeze(-1).softmax(-1)

        def transport(cost: Tensor, start: Transport | None) -> Transport:
            return sinkhorn(cost, a, b, epsilon=self.temperature, iterations=self.iterations, start=start)

        if self.cosine:
            # a constant token has a key near zero, whose direction is no information: its gradient stays bounded
            keys, queries = (functional.normalize(each, dim=-1, eps=1e-2) for each in (keys, queries))
            cost = 1 - keys @ queries.mT
        else:  # not by |k|² + |q|² - 2kq, whose rounding near zero the root would magnify
            cost = torch.cdist(keys, queries, compute_mode="donot_use_mm_for_euclid_dist")
        start = None
        if self.mesh is not None:
            cost, start = self.mesh(cost, transport, noise)
        return transport(cost, start).plan.mT.unflatten(0, (batch, heads))
