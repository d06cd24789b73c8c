"""What tells the rows of a sequence apart: their place, or chance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setpred.decoders.starts import gaussian


class SequencePositions(nn.Module):
    """Adds to each row where it stands, as sines and cosines of falling frequency (Vaswani et al., NeurIPS 2017).

        e_p = [sin ω_j p, cos ω_j p]_j,    ω_j = T^(-2j / dim),    j < dim / 2

    Args:
        temperature: T.
    """

    widening = 1  # how many times wider rows become

    def __init__(self, *, temperature: float = 10_000.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, rows: Tensor) -> Tensor:
        """`[batch, rows, dim]` to the same, dim even."""
        count, dim = rows.shape[1:]
        if dim % 2:
            raise ValueError(f"expected rows of an even length, got {dim}")
        frequency = self.temperature ** -(torch.arange(0, dim, 2, device=rows.device, dtype=rows.dtype) / dim)
        angle = torch.arange(count, device=rows.device, dtype=rows.dtype).unsqueeze(-1) * frequency
        return rows + torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class RandomPositions(nn.Module):
    """Puts chance beside each row: [x_i, α + exp(β) N(0, 1)], as many numbers again, with α and β learned.

    The "random PE" of the iDSPN paper, in the manner of Slot Attention's start: no order, yet equal rows differ.
    Draws are those of `RandomStart`: fresh ones in training, in evaluation one for all examples, a function of `seed`.
    """

    widening = 2

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, rows: Tensor) -> Tensor:
        """`[batch, rows, dim]` -> `[batch, rows, 2 dim]`."""
        seed = None if self.training else self.seed
        noise = gaussian(rows.shape[1:], rows.shape[0], seed=seed, device=rows.device).to(rows.dtype)
        return torch.cat([rows, self.shift + self.log_scale.exp() * noise], dim=-1)
