"""Encoders from image to tokens, one per position of a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setpred.nn import MLP


def position_grid(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Compute the distances of each position of a map from its edges, in [0, 1]: `[height * width, 4]`, row by row.

    Columns: from the top, from the left, from the bottom, from the right.
    """
    rows, columns = (torch.linspace(0, 1, side, device=device) for side in (height, width))
    grid = torch.cartesian_prod(rows, columns).view(-1, 2)
    return torch.cat([grid, 1 - grid], dim=-1)


def token_rows(features: Tensor) -> Tensor:
    """View a map `[batch, channels, height, width]` as `[batch, height * width, channels]`, row by row."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)  # no copy of a channels-last map


class Tokens(nn.Module):
    """Encoder from image to tokens: the positions of the trunk's map, row by row.

    Tokens hold no positions; decoders such as `DETR` add them.

    Args:
        trunk: image to map `[batch, channels, height, width]`, with `channels` and `image_size`; such as `SmallTrunk`.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.image_size, self.token_dim = trunk.image_size, trunk.channels

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]` in [0, 1] -> `[batch, height * width, token_dim]`."""
        return token_rows(self.trunk(image))


class PositionedTokens(Tokens):
    """Encoder from image to tokens with positions, for Slot Attention (Locatello et al., NeurIPS 2020).

        token_p = MLP(LN(f_p + W e_p + b)),    e_p = distances of position p to the four edges

    f is the trunk's map, W e + b the soft position embedding. The same network runs at every position.

    Args:
        trunk: image to map `[batch, channels, height, width]`, with `channels` and `image_size`; such as `SmallTrunk`.
        token_dim: length of a token, and width of the MLP's hidden layer. None drops norm and MLP, for readers that
            begin with their own, such as `Votes`: token_p = f_p + W e_p + b, of `trunk.channels` numbers.
    """

    def __init__(self, trunk: nn.Module, *, token_dim: int | None = 64) -> None:
        super().__init__(trunk)
        self.position = nn.Linear(4, trunk.channels)
        if token_dim is None:
            self.norm = self.network = nn.Identity()
        else:
            self.token_dim = token_dim
            self.norm = nn.LayerNorm(trunk.channels)
            self.network = MLP(trunk.channels, token_dim, token_dim)

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]` in [0, 1] -> `[batch, height * width, token_dim]`."""
        features = self.trunk(image)
        grid = position_grid(*features.shape[2:], device=image.device)
        return self.network(self.norm(token_rows(features) + self.position(grid)))
