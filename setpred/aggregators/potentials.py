"""Potentials F(x, φ): how much an element x objects to the summary φ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from setpred.nn import LayerNorm


class ResidualPotential(nn.Module):
    """F(x, φ) = mean_c h_c([x, φ])² >= 0, with h a residual MLP (Bartunov et al., UAI 2022).

    Each stage is linear plus a skip (the identity, or a projection where the width changes); all but the last are
    followed by LayerNorm and tanh, so h and F are bounded.

    Args:
        in_dim: features of an element.
        state_dim: length of φ.
        widths: of the stages.
    """

    def __init__(self, in_dim: int, state_dim: int, *, widths: Sequence[int] = (64, 32)) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"expected at least two widths, so that tanh bounds the potential, got {list(widths)}")
        self.element_layer = nn.Linear(in_dim, widths[0])
        self.state_layer = nn.Linear(state_dim, widths[0], bias=False)
        self.norms = nn.ModuleList(LayerNorm(width) for width in widths[:-1])
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Linear(narrow, wide) for narrow, wide in pairs)
        self.skips = nn.ModuleList(
            nn.Identity() if narrow == wide else nn.Linear(narrow, wide, bias=False) for narrow, wide in pairs
        )

    def forward(self, elements: Tensor, state: Tensor) -> Tensor:
        """`[batch, set_size, in_dim]`, `[batch, state_dim]` -> `[batch, set_size]`."""
        # the first layer on [x, φ], with φ's part computed once per set
        hidden = self.element_layer(elements) + self.state_layer(state).unsqueeze(1)
        for norm, layer, skip in zip(self.norms, self.layers, self.skips, strict=True):
            hidden = torch.tanh(norm(hidden))
            if isinstance(skip, nn.Linear):  # two linear maps of one input are one: a matrix product less each way
                hidden = nn.functional.linear(hidden, layer.weight + skip.weight, layer.bias)
            else:
                hidden = layer(hidden) + hidden
        return hidden.square().mean(-1)
