"""Positions of the rows of a sequence or map, sinusoidal or random."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from setpred.decoders.starts import gaussian


def waves(places: Tensor, dim: int, temperature: float) -> Tensor:
    """Compute [sin ω_j p, cos ω_j p], ω_j = T^(-2j / dim), of places p `[...]` -> `[..., 2, dim / 2]`."""
    frequency = temperature ** -(torch.arange(0, dim, 2, device=places.device, dtype=places.dtype) / dim)
    angle = places.unsqueeze(-1) * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-2)


class SinePosition(nn.Module):
    """Positions of the tokens of a square map, as sines and cosines (DETR; Carion et al., ECCV 2020).

        e_p = [sin ω_j r, cos ω_j r, sin ω_j c, cos ω_j c]_j,    ω_j = 2π / side / T^(4j / dim),    j < dim / 4

    with r and c the row and the column of position p, counted from 1.

    Args:
        temperature: T.
    """

    def __init__(self, *, temperature: float = 10_000.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, tokens: Tensor) -> Tensor:
        """`[tokens, dim]` for tokens `[batch, tokens, dim]`, row by row; dim a multiple of 4."""
        count, dim = tokens.shape[1:]
        side = math.isqrt(count)
        if side * side != count or dim % 4:
            raise ValueError(f"expected the tokens of a square map, of a multiple of 4 numbers, got {count} of {dim}")
        place = 2 * math.pi / side * torch.arange(1, side + 1, device=tokens.device, dtype=tokens.dtype)
        return waves(torch.cartesian_prod(place, place), dim // 2, self.temperature).flatten(1)


class SequencePositions(nn.Module):
    """Sum of each row and its position, as sines and cosines (Vaswani et al., NeurIPS 2017).

        e_p = [sin ω_j p, cos ω_j p]_j,    ω_j = T^(-2j / dim),    j < dim / 2

    Args:
        temperature: T.
    """

    widening = 1  # ratio of output to input width

    def __init__(self, *, temperature: float = 10_000.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, rows: Tensor) -> Tensor:
        """`[batch, rows, dim]` to the same, dim even."""
        count, dim = rows.shape[1:]
        if dim % 2:
            raise ValueError(f"expected rows of an even length, got {dim}")
        places = torch.arange(count, device=rows.device, dtype=rows.dtype)
        return rows + waves(places, dim, self.temperature).mT.flatten(1)


class RandomPositions(nn.Module):
    """Concatenation of each row and noise: [x_i, α + exp(β) N(0, 1)], twice as wide, with α and β learned.

    The "random PE" of the iDSPN paper (Zhang et al., ICLR 2022): no order, yet equal rows differ. Draws are those of
    `RandomStart`: fresh in training, in evaluation one for all examples, a function of `seed`.
    """

    widening = 2

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, rows: Tensor) -> Tensor:
        """`[batch, rows, dim]` -> `[batch, rows, 2 dim]`."""
        noise = gaussian(rows.shape[1:], rows, seed=None if self.training else self.seed).to(rows.dtype)
        return torch.cat([rows, self.shift + self.log_scale.exp() * noise], dim=-1)
