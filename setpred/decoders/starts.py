"""Initial sets of iterative decoders."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.inner.voting import Ballot
from setpred.nn import SMALLEST_EXPONENT, diagonal


def gaussian(shape: Sequence[int], features: Tensor, *, seed: int | None) -> Tensor:
    """Draw N(0, 1) of `[batch, *shape]`, in torch's default dtype, for features `[batch, ...]`.

    Args:
        shape: of one example's draw.
        features: give the batch size and the device.
        seed: None draws afresh for each example, from torch's generator. A number fixes one draw for all examples, a
            function of the number alone: order, batch size and device do not change it.
    """
    batch, device = features.shape[0], features.device
    if seed is None:
        return torch.randn(batch, *shape, device=device)
    # numpy's draw is a constant to torch.export, and a longer draw begins with the shorter one, which padding needs
    drawn = np.random.default_rng(seed % 2**63).standard_normal([int(length) for length in shape], dtype=np.float32)
    return torch.tensor(drawn, dtype=torch.get_default_dtype(), device=device).expand(batch, *shape)


def checked_shape(set_size: int, set_dim: int) -> tuple[int, int]:
    """Return (set_size, set_dim); raise `InputError` unless both are at least 1."""
    if set_size < 1 or set_dim < 1:
        raise InputError(f"expected sets of at least 1 element of at least 1 number, got {set_size} of {set_dim}")
    return set_size, set_dim


class RandomStart(nn.Module):
    """Random start, the same for all images in evaluation.

    Y₀ = scale · N(0, 1), `[batch, set_size, set_dim]` for any features.

    In training each example gets a fresh draw from torch's generator. In evaluation there is one draw for all, a
    function of `seed` alone, so that a prediction depends on the image and the model alone.
    """

    def __init__(self, set_size: int, set_dim: int, *, scale: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.shape = checked_shape(set_size, set_dim)
        self.scale, self.seed = scale, seed

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * gaussian(self.shape, features, seed=None if self.training else self.seed)


class LearnedStart(nn.Module):
    """Learned start, the same for every example.

    Y₀ a parameter, the same for every example; it starts at scale · N(0, 1).

    It learns through `Unrolled` differentiation, or through a `Proximity` term of the objective. An optimum does not
    depend on the start of the descent, so `Implicit` gives it no other gradient.
    """

    def __init__(self, set_size: int, set_dim: int, *, scale: float = 0.1) -> None:
        super().__init__()
        self.initial = nn.Parameter(scale * torch.randn(checked_shape(set_size, set_dim)))

    def forward(self, features: Tensor) -> Tensor:
        return self.initial.expand(features.shape[0], -1, -1)


class GaussianStart(nn.Module):
    """Random start with a learned mean and deviation, as of Slot Attention's slots.

    Y₀ = μ + σ · N(0, 1), with μ and σ learned and shared by all elements (Locatello et al., NeurIPS 2020).

    The start of Slot Attention's slots. Draws are those of `RandomStart`. Only the draw distinguishes the elements.
    """

    def __init__(self, set_size: int, set_dim: int, *, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.seed = checked_shape(set_size, set_dim), seed
        bound = (6 / (1 + set_dim)) ** 0.5  # Glorot's, of a map from one number, as published
        self.mean = nn.Parameter(torch.empty(set_dim).uniform_(-bound, bound))
        self.log_deviation = nn.Parameter(torch.empty(set_dim).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> Tensor:
        noise = gaussian(self.shape, features, seed=None if self.training else self.seed)
        return self.mean + self.log_deviation.exp() * noise


class GreedyVotes(nn.Module):
    """Start from the votes of tokens: greedy suppression of those that a pick explains.

    r(X): successive picks, each near the heaviest vote that no earlier pick explains.

    With k_n = exp(-½ |v_n - v_j|²_B) around the vote v_j of the heaviest token j,

        pick = Σ_n m_n k_n p_n v_n / Σ_n m_n k_n p_n,   m_n ← m_n (1 - k_n)

    and σ(20 (m_j - floor)) fades the pick to the zero element, so absent elements start at zero. This is greedy
    non-maximum suppression with soft weights. It depends on the image alone and passes no gradients.

    Args:
        set_size, set_dim: elements of the predicted sets, and numbers of each.
        weights, rest: b of the first numbers of an element and of all others, as in the `VotingEnergy`.
        floor: mass at which a pick is half faded.
    """

    def __init__(
        self,
        set_size: int,
        set_dim: int,
        *,
        weights: Sequence[float] = (),
        rest: float = 1.0,
        floor: float = 0.3,
    ) -> None:
        super().__init__()
        self.set_size, self.set_dim = checked_shape(set_size, set_dim)
        self.floor = floor
        self.register_buffer("weights", diagonal(weights, set_dim, rest), persistent=False)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Votes `[batch, tokens, set_dim + precise + 1]` -> `[batch, set_size, set_dim]`."""
        votes, precisions, masses = Ballot.of(features, self.set_dim)
        scaled = votes * self.weights.sqrt()
        lengths = scaled.square().sum(-1)
        picks = []
        for _ in range(self.set_size):
            heaviest, chosen = masses.max(-1, keepdim=True)
            centre = scaled.gather(1, chosen.unsqueeze(-1).expand(-1, -1, self.set_dim))
            apart = lengths + centre.square().sum(-1) - 2 * (scaled * centre).sum(-1)
            kernel = (-0.5 * apart.clamp(0, -2 * SMALLEST_EXPONENT)).exp()
            shares = (masses * kernel).unsqueeze(-1) * precisions
            mean = (shares * votes).sum(1) / shares.sum(1).clamp(min=1e-8)
            picks.append(mean * (20 * (heaviest - self.floor)).sigmoid())
            masses = masses * (1 - kernel)
        return torch.stack(picks, dim=1)
