"""Positions of the tokens of a map: linear, sines, and sequences of digits.

Each part maps tokens `[batch, tokens, dim]` to their positions `[tokens, dim]`, which `PositionedTokens` and
`setpred.decoders.DETR` add. Tokens are those of a square map, row by row.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.errors import InputError
from setpred.nn import EncoderLayer


def position_grid(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Compute the distances of each position of a map from its edges, in [0, 1]: `[height * width, 4]`, row by row.

    Columns: from the top, from the left, from the bottom, from the right.
    """
    rows, columns = (torch.linspace(0, 1, side, device=device) for side in (height, width))
    grid = torch.cartesian_prod(rows, columns).view(-1, 2)
    return torch.cat([grid, 1 - grid], dim=-1)


def waves(places: Tensor, dim: int, temperature: float) -> Tensor:
    """Compute [sin ω_j p, cos ω_j p], ω_j = T^(-2j / dim), of places p `[...]` -> `[..., 2, dim / 2]`."""
    frequency = temperature ** -(torch.arange(0, dim, 2, device=places.device, dtype=places.dtype) / dim)
    angle = places.unsqueeze(-1) * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-2)


def map_side(tokens: Tensor, *, multiple: int = 1, dimensions: int = 2) -> int:
    """Compute the side of the square map of tokens `[batch, tokens, dim]`, dim a multiple of `multiple`.

    Raises:
        ValueError: other tokens.
    """
    count, dim = tokens.shape[1:]
    side = round(count ** (1 / dimensions))
    if side**dimensions != count or dim % multiple:
        raise ValueError(
            f"expected the tokens of a square map, of a multiple of {multiple} numbers, got {count} of {dim}"
        )
    return side


class LinearPosition(nn.Linear):
    """e_p = W d_p + b, with d_p the distances of position p from the four edges, in [0, 1] (`position_grid`).

    The soft position embedding of Slot Attention (Locatello et al., NeurIPS 2020).

    Args:
        dim: numbers of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(4, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[tokens, dim]` for tokens `[batch, tokens, dim]`, row by row."""
        side = map_side(tokens)
        return super().forward(position_grid(side, side, device=tokens.device).to(self.weight.dtype))


class SinePosition(nn.Module):
    """Positions of the tokens of a square map, as sines and cosines (DETR; Carion et al., ECCV 2020).

        e_p = [sin ω_j r, cos ω_j r, sin ω_j c, cos ω_j c]_j,    ω_j = 2π / side / T^(4j / dim),    j < dim / 4

    with r and c the row and the column of position p, counted from 1.

    Args:
        temperature: T.
        interleaved: order the numbers of a row or column by j, sine and cosine in turn, as published weights need
            them; else all sines come before all cosines.
    """

    def __init__(self, *, temperature: float = 10_000.0, interleaved: bool = False) -> None:
        super().__init__()
        self.temperature, self.interleaved = temperature, interleaved

    def forward(self, tokens: Tensor) -> Tensor:
        """`[tokens, dim]` for tokens `[batch, tokens, dim]`, row by row; dim a multiple of 4."""
        side, dim = map_side(tokens, multiple=4), tokens.shape[-1]
        place = 2 * math.pi / side * torch.arange(1, side + 1, device=tokens.device, dtype=tokens.dtype)
        pairs = waves(torch.cartesian_prod(place, place), dim // 2, self.temperature)
        return (pairs.mT if self.interleaved else pairs).flatten(1)


class SeqPE(nn.Module):
    """Positions as sequences of digits, which a small transformer reads (SeqPE; Li et al., 2025).

        e_p = W h_0 + b,    [h_0, h_1, ...] = layers([r, D_1 + P_1, D_2 + P_2, ...])

    A position of n coordinates is written as its digits, the first coordinate first, each with leading zeros. D_k is
    the learned vector of the k-th digit, P_k that of the k-th place, r a learned token that reads them. The layers are
    those of `setpred.nn.EncoderLayer`; the published ones are causal, with normalisation before attention.

    The contrastive regulariser draws positions, and asks each to have its largest product with the nearest other one:

        contrast · mean_i -log softmax_j(e_i · e_j / √dim)_nearest(i),    j ≠ i

    The published second regulariser, a distillation for maps larger than those of the training, is left out.

    Args:
        dim: numbers of a token.
        dimensions: n, coordinates of a position: 2 for maps, 1 for sequences.
        digits: digits of a coordinate; coordinates reach from 0 to base^digits - 1.
        base: number of the digits.
        width, heads, layers: of the transformer.
        contrast: weight of the contrastive regulariser in training.
        drawn: number of positions that it draws in each step.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        dimensions: int = 2,
        digits: int = 2,
        base: int = 10,
        width: int = 32,
        heads: int = 4,
        layers: int = 1,
        contrast: float = 0.0,
        drawn: int = 64,
    ) -> None:
        super().__init__()
        if min(dim, dimensions, digits, layers) < 1 or base < 2 or drawn < 3 or contrast < 0:
            raise InputError(
                "expected dim, dimensions, digits and layers of at least 1, base of at least 2, drawn of at least 3 "
                f"and contrast of at least 0, got {dim}, {dimensions}, {digits}, {layers}, {base}, {drawn}, {contrast}"
            )
        self.dim, self.dimensions, self.base = dim, dimensions, base
        self.span, self.contrast, self.drawn = base**digits, contrast, drawn
        self.register_buffer("powers", base ** torch.arange(digits).flip(0), persistent=False)
        self.digit = nn.Embedding(base, width)
        self.place = nn.Parameter(torch.randn(dimensions * digits, width))
        self.reader = nn.Parameter(torch.randn(1, width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads=heads, hidden_dim=2 * width) for _ in range(layers))
        self.head = nn.Linear(width, dim)

    def encode(self, positions: Tensor) -> Tensor:
        """Encode positions, int64 `[n, dimensions]`, to `[n, dim]`."""
        written = (positions.unsqueeze(-1) // self.powers % self.base).flatten(1)
        rows = torch.cat([self.reader.expand(len(written), 1, -1), self.digit(written) + self.place], dim=1)
        for layer in self.layers:
            rows = layer(rows)
        return self.head(rows[:, 0])

    def forward(self, tokens: Tensor) -> Tensor:
        """`[tokens, dim]` for tokens `[batch, tokens, dim]`, row by row."""
        side = map_side(tokens, dimensions=self.dimensions)
        if tokens.shape[-1] != self.dim or side > self.span:
            raise ValueError(
                f"expected tokens of {self.dim} numbers on a map of side up to {self.span}, got {tokens.shape[-1]} "
                f"and {side}"
            )
        line = torch.arange(side, device=tokens.device)
        return self.encode(torch.cartesian_prod(*[line] * self.dimensions).view(-1, self.dimensions))

    def penalty(self, *_: Any) -> Tensor | float:
        """The contrastive regulariser, `[]`."""
        if not self.contrast:
            return 0.0
        positions = torch.randint(self.span, (self.drawn, self.dimensions), device=self.powers.device)
        encoded, same = self.encode(positions), torch.eye(self.drawn, device=positions.device).bool()
        apart = torch.cdist(positions.float(), positions.float()).masked_fill(same, torch.inf)
        products = (encoded @ encoded.mT / math.sqrt(self.dim)).masked_fill(same, -torch.inf)
        return self.contrast * functional.cross_entropy(products, apart.argmin(1))
