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
    ) -> None:
        dim = slots.latent_dim if slots.token_dim is None else slots.token_dim
        if canvas < 1 or not extent > 0 or slots.set_dim < 4 or dim is None:
            raise InputError(
                "expected canvas >= 1, extent > 0 and slots of at least 4 numbers from features of a known length, got "
                f"{canvas}, {extent} and {type(slots).__name__} of {slots.set_dim}; change the one that is out of range"
            )
        super().__init__(slots, set_dim=LAYER * canvas**2, more=1)
        self.canvas, self.extent, self.prior = canvas, extent, prior
        self.glimpse = Broadcast(slots.set_dim - 3, side=side, widths=widths, subpixel=True, smoothing=0)
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
        size = len(state)
        slots = state[:, :-1, : self.slots.set_dim].flatten(0, 1)
        line = (2 * torch.arange(self.canvas, device=state.device, dtype=state.dtype) + 1) / self.canvas - 1
        pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
        inside = (pixels - slots[:, None, None, :2]) / self.extent
        drawn = self.glimpse(slots[:, 2:-1])
        layers = functional.grid_sample(drawn, inside, mode="bilinear", padding_mode="border", align_corners=False)
        presence = slots[:, -1, None, None].clamp(min=LEAST_PRESENCE).log() - self.prior
        logits = layers[:, -1] - 2 * inside.square().sum(-1) + presence
        logits = torch.where((inside.abs() < 1).all(-1), logits, OUTSIDE)
        layers = torch.cat([layers[:, :-1], logits.unsqueeze(1)], dim=1).unflatten(0, (size, -1))
        planes = state[:, -1, : self.plane.out_features].unflatten(-1, (LAYER - 1, PLANE))
        ground = planes @ functional.pad(pixels, (1, 0), value=1.0).flatten(0, 1).T
        ground = self.background + ground.unflatten(-1, (self.canvas, self.canvas))
        ground = functional.pad(ground, (0, 0, 0, 0, 0, 1)).unsqueeze(1)  # logit 0
        return torch.cat([layers, ground], dim=1).flatten(2)
