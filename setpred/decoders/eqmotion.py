"""EqMotion: motion of points, equivariant under turns, reflections and shifts."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.errors import InputError
from setpred.nn import MLP
from setpred.sets import mean_present

TINY = 1e-8  # below squared lengths, whose roots and reciprocals have no slope at 0


class MotionLayer(nn.Module):
    """A layer of `EqMotion` on geometric features G `[batch, n, channels, D]` and invariant ones h `[batch, n, dim]`.

    d_ij = |G_i - G_j| by channel,    m_ij = MLP([h_i, h_j, d_ij]),    e_ij = W m_ij
    h_i ← h_i + MLP([h_i, mean_j m_ij])
    G_i ← G_i + MLP(h_i) G_i + mean_j e_ij (G_j - G_i)        factors by channel
    G_i ← Q - min(0, ⟨Q, K⟩) K / |K|²,    Q = W_Q G_i,    K = W_K G_i
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.message, self.factor = MLP(2 * dim + channels, dim, dim), nn.Linear(dim, channels, bias=False)
        self.own, self.update = MLP(dim, dim, channels), MLP(2 * dim, dim, dim)
        self.query, self.key = (nn.Linear(channels, channels, bias=False) for _ in range(2))

    def forward(self, geometry: Tensor, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        apart = geometry.unsqueeze(1) - geometry.unsqueeze(2)  # from point i, the first axis, to its partner j
        distances = (apart.square().sum(-1) + TINY).sqrt()
        pairs = [row.expand(*distances.shape[:3], -1) for row in (hidden.unsqueeze(2), hidden.unsqueeze(1))]
        messages = self.message(torch.cat([*pairs, distances], dim=-1)).relu()
        partners = None if mask is None else mask.repeat_interleave(mask.shape[1], dim=0)
        pulls = self.factor(messages).unsqueeze(-1) * apart
        pull, heard = (mean_present(part.flatten(0, 1), partners) for part in (pulls, messages))
        hidden = hidden + self.update(torch.cat([hidden, heard.view_as(hidden)], dim=-1))
        geometry = geometry * (1 + self.own(hidden).unsqueeze(-1)) + pull.view_as(geometry)
        query, key = (layer(geometry.mT).mT for layer in (self.query, self.key))
        against = (query * key).sum(-1, keepdim=True).clamp(max=0)
        return query - against * key / (key.square().sum(-1, keepdim=True) + TINY), hidden


class EqMotion(SetDecoder):
    """Decoder from the past positions of points to their future ones, equivariant under motions of the space.

        G_i = W_0 (X_i - c),    h_i = MLP([|V_i|, ⟨V_i,t, V_i,t+1⟩]),    then layers,    Y_i = c + W_1 G_i

    X_i are the T positions of point i `[T, D]`, V_i the steps between them, c the mean of all positions. W mix times,
    never coordinates, so Y turns, mirrors and moves with X, and permutes with the points. `MotionLayer` has the layers.

    After EqMotion (Xu et al., CVPR 2023), without its categories of relations. Points differ by their motion alone.
    The reflections come along: a motion that prefers a direction of turning cannot be learned.

    Args:
        token_dim: T D numbers of a token, time by time.
        set_dim: numbers of an element, future positions time by time.
        dim: D, dimension of the space.
        channels: vectors of a point inside.
        hidden_dim: length of h and of messages.
        layers: number of layers.

    Raises:
        InputError: a token of fewer than two positions, lengths that D does not divide, or no channel.
    """

    def __init__(
        self,
        *,
        token_dim: int,
        set_dim: int,
        dim: int = 2,
        channels: int = 16,
        hidden_dim: int = 32,
        layers: int = 2,
    ) -> None:
        super().__init__(set_size=None, set_dim=set_dim, token_dim=token_dim)
        if dim < 1 or token_dim % dim or set_dim % dim or token_dim < 2 * dim or min(channels, hidden_dim) < 1:
            raise InputError(
                f"expected two or more past positions and future ones of {dim} numbers each, and channels, got tokens "
                f"of {token_dim}, elements of {set_dim} numbers and {channels} channels of width {hidden_dim}"
            )
        self.dim, times = dim, token_dim // dim
        self.first, self.last = (
            nn.Linear(narrow, wide, bias=False) for narrow, wide in ((times, channels), (channels, set_dim // dim))
        )
        self.start = MLP(2 * times - 3, hidden_dim, hidden_dim)
        self.layers = nn.ModuleList(MotionLayer(channels, hidden_dim) for _ in range(layers))

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        positions = features.unflatten(-1, (-1, self.dim))
        steps = positions.diff(dim=2)
        speeds, bends = (steps.square().sum(-1) + TINY).sqrt(), (steps[:, :, 1:] * steps[:, :, :-1]).sum(-1)
        centre = mean_present(positions.mean(2), mask)[:, None, None]
        geometry, hidden = self.first((positions - centre).mT).mT, self.start(torch.cat([speeds, bends], dim=-1))
        for layer in self.layers:
            geometry, hidden = layer(geometry, hidden, mask)
        yield (centre + self.last(geometry.mT).mT).flatten(2)
