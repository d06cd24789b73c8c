"""Slot Mixture Module: slots that are Gaussians, fitted to the tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.decoders.starts import GaussianStart
from setpred.errors import InputError
from setpred.inner import Unrolled
from setpred.nn import MLP


def log_responsibilities(
    points: Tensor, mean: Tensor, log_deviation: Tensor, log_prior: Tensor, *, scale: float = 1.0
) -> Tensor:
    """Compute log γ_is, the posterior that Gaussian i generated point s, with diagonal covariances.

        γ_is ∝ π_i N(x_s; μ_i, σ_i²)^scale,    Σ_i γ_is = 1

    Args:
        points: x `[batch, points, dim]`.
        mean, log_deviation: μ and log σ `[batch, slots, dim]`.
        log_prior: log π `[batch, slots]`.
        scale: below 1 it flattens the densities, which are nearly one-hot in many dimensions.

    Returns:
        `[batch, slots, points]`.
    """
    precision = (-2 * log_deviation).exp()
    # |x - μ|² / σ², multiplied out: no tensor of slots by points by dimensions
    crossed = (mean * precision) @ points.mT
    squares = precision @ points.square().mT - 2 * crossed + (mean.square() * precision).sum(-1, keepdim=True)
    log_density = -0.5 * squares - log_deviation.sum(-1, keepdim=True)
    return (log_prior.unsqueeze(-1) + scale * log_density).log_softmax(dim=-2)


class SlotMixture(SetDecoder):
    """Slots with a mean and a deviation, refined by a learned form of expectation maximisation.

        γ = responsibilities of the Gaussians (q(μ), q(log σ)) for the keys k(X),    W_is = γ_is / Σ_t γ_it
        μ ← GRU(μ, W V),    μ ← μ + MLP(LN(μ)),    Y = head([μ, log σ])
        σ² ← Σ_s W_is (v_s - μ_i)²,    π_i ← mean_s γ_is

    (Kirilenko et al., ICLR 2024.) Slot Attention is its soft k-means, with means alone. As published, gradients pass
    through the last refinement only. Log-densities are divided by √dim, as in the released code, which also drops the
    density's normaliser and its ½, keeps π uniform, gives the GRU the normalised μ as its state and starts the slots
    from a transformer over the tokens. Here the slots start as in Slot Attention, and permute as they do.

    Args:
        token_dim, slot_dim: lengths of a token and of a slot's mean.
        hidden_dim: width of the means' MLP; the head's is `slot_dim`.
        iterations: default number of refinements.
        gradient_steps: number of last refinements that pass gradients, as in `SlotAttention`.
        start: the first [μ, log σ] `[batch, set_size, 2 slot_dim]` from the tokens; `GaussianStart` unless given.
        set_size, set_dim: elements of the predicted sets, one per slot, and numbers of each.

    Raises:
        InputError: a number out of range.
    """

    iterative = True

    def __init__(
        self,
        *,
        token_dim: int = 64,
        slot_dim: int = 64,
        hidden_dim: int = 128,
        iterations: int = 8,
        gradient_steps: int | None = 1,
        start: nn.Module | None = None,
        set_size: int,
        set_dim: int,
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, token_dim=token_dim)
        if iterations < 0 or (gradient_steps is not None and gradient_steps < 1):
            raise InputError(
                f"expected iterations >= 0 and gradient_steps >= 1, got {iterations} and {gradient_steps}; change the "
                "one that is out of range"
            )
        self.iterations, self.gradient_steps = iterations, gradient_steps
        self.start = GaussianStart(set_size, 2 * slot_dim) if start is None else start
        self.norm_tokens, self.norm_slots = nn.LayerNorm(token_dim), nn.LayerNorm(2 * slot_dim)
        self.query = nn.Linear(slot_dim, slot_dim, bias=False)
        self.key, self.value = (nn.Linear(token_dim, slot_dim, bias=False) for _ in range(2))
        self.recurrent = nn.GRUCell(slot_dim, slot_dim)
        self.residual = nn.Sequential(nn.LayerNorm(slot_dim), MLP(slot_dim, hidden_dim, slot_dim))
        self.head = MLP(2 * slot_dim, slot_dim, set_dim)

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        tokens = self.norm_tokens(features)
        keys, values = self.key(tokens), self.value(tokens)
        log_present = torch.zeros_like(tokens[..., 0])  # weight 0 for absent tokens
        if mask is not None:
            log_present = log_present.masked_fill(~mask, -torch.inf)

        def step(state: Tensor) -> Tensor:
            slots, log_prior = state[..., :-1], state[..., -1]
            mean, log_deviation = self.query(self.norm_slots(slots).unflatten(-1, (2, -1))).unbind(-2)
            scale = mean.shape[-1] ** -0.5
            log_shares = log_responsibilities(keys, mean, log_deviation, log_prior, scale=scale)
            log_shares = log_shares + log_present.unsqueeze(1)
            weights = log_shares.softmax(-1)  # sums to 1 also for a slot with nearly no share
            received = weights @ values
            old = slots[..., : received.shape[-1]]
            mean = self.recurrent(received.flatten(0, 1), old.flatten(0, 1)).view_as(old)
            mean = mean + self.residual(mean)
            # about the new mean, multiplied out as above
            variance = weights @ values.square() - 2 * mean * received + mean.square()
            log_deviation = 0.5 * (variance.clamp(min=0) + 1e-8).log()
            log_prior = log_shares.logsumexp(-1) - log_present.logsumexp(-1, keepdim=True)
            return torch.cat([mean, log_deviation, log_prior.unsqueeze(-1)], dim=-1)

        slots = self.start(features).to(features.dtype)
        start = torch.cat([slots, torch.zeros_like(slots[..., :1])], dim=-1)  # [μ, log σ, log π]
        if self.gradient_steps is not None and self.gradient_steps <= iterations:
            start = start.detach()  # a fixed point does not depend on its start
        for state in Unrolled(self.gradient_steps).states(step, start, iterations):
            yield self.head(state[..., :-1])
