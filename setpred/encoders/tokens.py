"""Encoders from image to tokens, the cells of a map; and the votes of tokens."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.encoders.positions import LinearPosition
from setpred.errors import InputError
from setpred.nn import MLP, copy_attributes
from setpred.sets import token_mask


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

        token_p = MLP(LN(f_p + e_p))

    f is the trunk's map, e its positions. The same network runs at every position.

    Args:
        trunk: image to map `[batch, channels, height, width]`, with `channels` and `image_size`; such as `SmallTrunk`.
        token_dim: length of a token, and width of the MLP's hidden layer. None drops norm and MLP, for readers that
            begin with their own, such as `Votes`: token_p = f_p + e_p, of `trunk.channels` numbers.
        positions: e `[tokens, channels]` from f `[batch, tokens, channels]`, such as `SinePosition`; `LinearPosition`,
            as published, unless given.
    """

    def __init__(self, trunk: nn.Module, *, token_dim: int | None = 64, positions: nn.Module | None = None) -> None:
        super().__init__(trunk)
        self.position = LinearPosition(trunk.channels) if positions is None else positions
        if token_dim is None:
            self.norm = self.network = nn.Identity()
        else:
            self.token_dim = token_dim
            self.norm = nn.LayerNorm(trunk.channels)
            self.network = MLP(trunk.channels, token_dim, token_dim)

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, image_size, image_size]` in [0, 1] -> `[batch, height * width, token_dim]`."""
        rows = token_rows(self.trunk(image))
        return self.network(self.norm(rows + self.position(rows)))


class Occluded(nn.Module):
    """Encoder of images whose right part is hidden: another encoder, of grey in its place.

    What is hidden has more than one answer, so point predictors and samplers differ (`configs/occluded/`). The data do
    not change: scores count hidden objects, and pictures show them.

    Args:
        encoder: image to tokens or to a vector.
        share: hidden part of the width, rounded to pixels: at least one, and not all.

    Raises:
        InputError: a share out of range.
    """

    def __init__(self, encoder: nn.Module, *, share: float = 0.4) -> None:
        super().__init__()
        width = getattr(encoder, "image_size", None)
        if not 0 < share < 1 or (width and not 0 < self.seen(width, share) < width):
            raise InputError(f"expected a hidden share of one pixel to all but one, got {share}; change it")
        self.encoder, self.share = encoder, share
        copy_attributes(encoder, self, ("image_size", "token_dim", "latent_dim"))

    @staticmethod
    def seen(width: int, share: float) -> int:
        """Count the columns of an image that are not hidden."""
        return round(width * (1 - share))

    def forward(self, image: Tensor) -> Tensor:
        """`[batch, 3, H, W]` in [0, 1] to the features of the other encoder."""
        seen = self.seen(image.shape[-1], self.share)
        return self.encoder(functional.pad(image[..., :seen], (0, image.shape[-1] - seen), value=0.5))


class Votes(nn.Module):
    """Encoder that predicts, from each token, its element v, the precisions p of v, and the mass m of its vote.

        [v, a, b] = MLP(LN x),   p = 2 σ(a),   m = σ(b)

    p starts at 1. `setpred.inner.VotingEnergy` and `setpred.decoders.GreedyVotes` read the result. Votes are
    computed in float32 also under autocast, because half precision would round coordinates.

    Anchored votes are offsets from the token's own place, as in Hough voting: v ← v + (x, y, 0, ..., 0), where x and y
    of the cell's centre run from -1 at the left and upper edge of the image to 1. So they differ from the first step
    on, where elements look alike. Positions must be of the image plane, in this scale (`ElementSchema.side`).

    Args:
        tokens: image, or set, to tokens `[batch, tokens, token_dim]`; such as `PositionedTokens` or `Elements`.
        set_dim: numbers of an element.
        precise: how many of the first numbers of an element have precisions. Use the coordinates alone: with
            precisions of classes the start merges and splits objects.
        hidden_dim: width of the hidden layer.
        anchored: whether the first two numbers of a vote are offsets; needs tokens of a square map, row by row.
        gated: whether tokens that vote for nothing have no mass: m = σ(b) · f, where f is the last number of the vote,
            its presence, clamped to [0, 1] and without gradients. Otherwise they pull small objects to zero. Tokens
            without mass learn nothing from the elements, so a model whose presences begin below 0 may not learn.
        massive: whether the last number of a vote, its presence, is its mass; then the start learns from what presence
            learns.
    """

    def __init__(
        self,
        tokens: nn.Module,
        *,
        set_dim: int,
        precise: int = 0,
        hidden_dim: int = 128,
        anchored: bool = False,
        gated: bool = False,
        massive: bool = False,
    ) -> None:
        super().__init__()
        if set_dim < 2 * anchored + massive:
            raise InputError(
                f"expected set_dim >= {2 * anchored + massive} for votes with a place or their mass, got {set_dim}; "
                "leave anchored and massive out"
            )
        if gated and massive:
            raise InputError("expected votes that are gated or massive, got both; leave one out")
        self.anchored, self.gated, self.massive = anchored, gated, massive
        self.tokens = tokens
        copy_attributes(tokens, self, ("image_size", "in_dim"))
        self.set_dim, self.token_dim = set_dim, set_dim + precise + 1
        self.norm = nn.LayerNorm(tokens.token_dim)
        self.network = MLP(tokens.token_dim, hidden_dim, self.token_dim)
        with torch.no_grad():  # p = 1 at the start
            for parameter in self.network[-1].parameters():
                parameter[set_dim : set_dim + precise] = 0

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images `[batch, 3, H, W]`, or sets and their mask -> `[batch, tokens, set_dim + precise + 1]`: v, p, m.

        Absent tokens have mass 0.
        """
        tokens = self.tokens(inputs) if mask is None else self.tokens(inputs, mask)
        if mask is not None:  # padding may hold NaN
            mask = token_mask(mask, tokens.shape[1])
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
        with torch.autocast(tokens.device.type, enabled=False):
            outputs = self.network(self.norm(tokens.to(self.norm.weight.dtype)))
            votes, rest = outputs.split([self.set_dim, self.token_dim - self.set_dim], dim=-1)
            rest = rest.sigmoid()
            if self.anchored:
                votes = votes + functional.pad(self._places(tokens), (0, self.set_dim - 2))
            mass = rest[..., -1:] if mask is None else rest[..., -1:].masked_fill(~mask.unsqueeze(-1), 0.0)
            if self.gated:
                mass = mass * votes[..., -1:].detach().clamp(0, 1)
            if self.massive:
                votes = torch.cat([votes[..., :-1], mass], dim=-1)
            return torch.cat([votes, 2 * rest[..., :-1], mass], dim=-1)

    @staticmethod
    def _places(tokens: Tensor) -> Tensor:
        """x and y of the cells of a square map, in [-1, 1]: `[tokens, 2]`."""
        side = math.isqrt(tokens.shape[1])
        if side**2 != tokens.shape[1]:
            raise ValueError(f"expected tokens of a square map for anchored votes, got {tokens.shape[1]}")
        line = (2 * torch.arange(side, device=tokens.device) + 1) / side - 1
        return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
