"""Where a refinement starts: random, or learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from setpred.errors import InputError


def gaussian(shape: Sequence[int], batch: int, index: Tensor | None, *, seed: int, device: torch.device) -> Tensor:
    """N(0, 1) of `[batch, *shape]`: fresh numbers, or with `index [batch]` those of (seed, index) alone.

    So that in evaluation neither batch size nor order nor device changes a result.
    """
    if index is None:
        return torch.randn(batch, *shape, device=device)
    generator = torch.Generator()  # on the CPU, so that every device gets the same numbers
    draws = []
    for i in index.tolist():
        generator.manual_seed((seed * 1_000_003 + i) % 2**63)
        draws.append(torch.randn(*shape, generator=generator))
    return torch.stack(draws).to(device)


def checked_shape(set_size: int, set_dim: int) -> tuple[int, int]:
    """(set_size, set_dim); raises `InputError` unless both are at least 1."""
    if set_size < 1 or set_dim < 1:
        raise InputError(f"expected sets of at least 1 element of at least 1 number, got {set_size} of {set_dim}")
    return set_size, set_dim


class RandomStart(nn.Module):
    """Y₀ = scale · N(0, 1).

    In training a fresh draw from torch's generator. In evaluation the draw of an example depends on `seed` and its
    index alone, so that neither batch size nor order nor device changes a result.
    """

    def __init__(self, set_size: int, set_dim: int, *, scale: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.shape = checked_shape(set_size, set_dim)
        self.scale, self.seed = scale, seed

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        """`[batch, set_size, set_dim]`."""
        return self.scale * gaussian(self.shape, len(features), index, seed=self.seed, device=features.device)


class LearnedStart(nn.Module):
    """Y₀ a parameter, the same for every example; starts at scale · N(0, 1).

    It learns through `Unrolled` differentiation, or through a `Proximity` term of the objective; an optimum does not
    depend on where the descent started, so `Implicit` gives it no other gradient.
    """

    def __init__(self, set_size: int, set_dim: int, *, scale: float = 0.1) -> None:
        super().__init__()
        self.initial = nn.Parameter(scale * torch.randn(checked_shape(set_size, set_dim)))

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        """`[batch, set_size, set_dim]`."""
        return self.initial.expand(len(features), -1, -1)


class GaussianStart(nn.Module):
    """Y₀ = μ + σ · N(0, 1), with μ and σ learned and shared by all elements: the start of Slot Attention's slots.

    (Locatello et al., NeurIPS 2020.) Draws are those of `RandomStart`. The elements are exchangeable: only the draw
    tells them apart.
    """

    def __init__(self, set_size: int, set_dim: int, *, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.seed = checked_shape(set_size, set_dim), seed
        bound = (6 / (1 + set_dim)) ** 0.5  # Glorot's, of a map from one number, as published
        self.mean = nn.Parameter(torch.empty(set_dim).uniform_(-bound, bound))
        self.log_deviation = nn.Parameter(torch.empty(set_dim).uniform_(-bound, bound))

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        """`[batch, set_size, set_dim]`."""
        noise = gaussian(self.shape, len(features), index, seed=self.seed, device=features.device)
        return self.mean + self.log_deviation.exp() * noise
