"""Glimpse decoder: each slot of a set draws a small picture at its place, over a background."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.decoders.base import SetDecoder
from setpred.decoders.readout import SlotReader
from setpred.decoders.spatial_broadcast import Broadcast
from setpred.errors import InputError
from setpred.nn import LAYER

OUTSIDE = -20.0  # logit of a mask outside of its glimpse
LEAST_PRESENCE = 1e-3
PLANE = 3  # numbers of a plane over the image: a constant and slopes along x and y


class Glimpses(SlotReader):
    """Set of image layers: slots from a set decoder, each drawn as a small picture at its place over a background.

        layer_i(p) = CNN(s_i) at u = (p - (x_i, y_i)) / extent,    α_i ← α_i - 2 |u|² + log o_i - prior

    A slot s_i = (x, y, ..., o) begins with the place of its object, -1 at the left and upper edge of the image and 1 at
    the right and lower one, and ends with its presence o. So an object is drawn alike wherever it is, and its layer
    ends at the border of the glimpse. The last layer is the background, with the logit 0: a learned image, plus a plane
    over it for each colour, linear in the mean of the features. It is too simple to draw objects. Places and glimpses
    are those of AIR (Eslami et al., NeurIPS 2016) and SPACE (Lin et al., ICLR 2020), without a distribution over them.

    With `setpred.inner.VotingEnergy` the slots are clusters of the tokens' votes, and `Votes(anchored=True,
    massive=True)` gives places and presences from the first step on.

    Args:
        slots: set decoder whose elements `[batch, set_size, set_dim]` are the slots.
        canvas: side of the layers.
        extent: half the side of a glimpse, in the units of places: the largest object must fit.
        prior: what a mask's logit is lowered by, so that the background draws all that it can.
        side, widths: of the glimpse's network, as of `SpatialBroadcast`.
        fine: further doublings of the glimpse, for sharper masks; a training with `--init` may add them.

    Raises:
        InputError: a number out of range, or slots that do not fit.
    """

    draws_layers = draws_background = True

    def __init__(
        self,
        slots: SetDecoder,
        *,
        canvas: int,
        extent: float = 0.4,
        prior: float = 1.0,
        side: int = 4,
        widths: Sequence[int] = (32, 16),
        fine: int = 0,
    ) -> None:
        dim = slots.latent_dim if slots.token_dim is None else slots.token_dim
        if canvas < 1 or not extent > 0 or slots.set_dim < 4 or dim is None:
            raise InputError(
                "expected canvas >= 1, extent > 0 and slots of at least 4 numbers from features of a known length, got "
                f"{canvas}, {extent} and {type(slots).__name__} of {slots.set_dim}; change the one that is out of range"
            )
        super().__init__(slots, set_dim=LAYER * canvas**2, more=1)
        self.canvas, self.extent, self.prior = canvas, extent, prior
        self.glimpse = Broadcast(slots.set_dim - 3, side=side, widths=widths, subpixel=True, smoothing=0, fine=fine)
        self.background = nn.Parameter(torch.full((LAYER - 1, canvas, canvas), 0.5))
        self.plane = nn.Linear(dim, (LAYER - 1) * PLANE)
        nn.init.zeros_(self.plane.weight)

    def predictions(self, features: Tensor, *arguments: Any, **options: Any) -> Iterator[Tensor]:
        """Yield slots and the planes of the background, in rows of one length, of each iteration."""
        planes = self.plane(features if features.ndim == 2 else features.mean(1)).unsqueeze(1)
        for slots in super().predictions(features, *arguments, **options):
            length = max(slots.shape[-1], planes.shape[-1])
            yield torch.cat([functional.pad(rows, (0, length - rows.shape[-1])) for rows in (slots, planes)], dim=1)

    def finish(self, state: Tensor) -> Tensor:
        """Draw the layers `[batch, set_size + 1, 4 · canvas²]` of what `predictions` yields."""
        slots = state[:, :-1, : self.slots.set_dim].flatten(0, 1)
        line = (2 * torch.arange(self.canvas, device=state.device, dtype=state.dtype) + 1) / self.canvas - 1
        columns, rows = (
            (line - slots[:, axis, None]) / self.extent for axis in (0, 1)
        )  # u of pixels `[slots, canvas]`
        drawn = self.glimpse(slots[:, 2:-1])
        # bilinear, as two products: several times as fast as `grid_sample`
        across, down = (_hats(place, drawn.shape[-1]).unsqueeze(1) for place in (columns, rows))
        layers = down @ drawn @ across.mT
        fall = _fall(rows).unsqueeze(2) + _fall(columns).unsqueeze(1)
        presence = slots[:, -1, None, None].clamp(min=LEAST_PRESENCE).log() - self.prior
        layers = torch.cat([layers[:, :-1], (layers[:, -1] + fall + presence).unsqueeze(1)], dim=1)
        level, right, below = state[:, -1, : self.plane.out_features].unflatten(-1, (LAYER - 1, PLANE, 1)).unbind(-2)
        ground = self.background + (level + right * line).unsqueeze(2) + (below * line).unsqueeze(3)
        ground = functional.pad(ground, (0, 0, 0, 0, 0, 1))  # logit 0
        return torch.cat([layers.unflatten(0, (len(state), -1)), ground.unsqueeze(1)], dim=1).flatten(2)


def _hats(places: Tensor, cells: int) -> Tensor:
    """Weights of linear interpolation between cells of [-1, 1] at places `[n, p]`: `[n, p, cells]`."""
    centres = torch.arange(cells, device=places.device, dtype=places.dtype) + 0.5
    at = ((places + 1) * cells / 2).clamp(0.5, cells - 0.5).unsqueeze(2)
    return (1 - (at - centres).abs()).relu()


def _fall(places: Tensor) -> Tensor:
    """The logit of a mask falls with the distance from the glimpse's centre, down to `OUTSIDE` beyond its border."""
    return torch.where(places.abs() < 1, -2 * places.square(), OUTSIDE)
