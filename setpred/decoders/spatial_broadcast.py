"""Spatial broadcast decoder: each slot of a set draws a layer of the image."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.decoders.readout import SlotReader
from setpred.errors import InputError
from setpred.nn import LAYER, MLP


class SpatialBroadcast(SlotReader):
    """Set of image layers: slots from a set decoder, each drawn by one network (Watters et al., 2019).

        layer_i = CNN(W s_i + P),    image = Σ_i softmax_i(α_i) · colour_i

    s_i is slot i, copied to every position of a small map; P embeds the positions of that map. The same network draws
    all slots, so permuting the slots permutes the layers. `setpred.nn.composite` gives the image and the masks of the
    layers; `setpred.losses.Reconstruction` trains them without labels. With `SlotAttention` this is the autoencoder of
    object discovery (Locatello et al., NeurIPS 2020).

    With `relative` positions the first two numbers of a slot are the place (x, y) of its object, -1 at the left and
    upper edge of the image and 1 at the right and lower one. P then embeds positions relative to this place, as of
    Invariant Slot Attention (Biza et al., ICML 2023), so the network draws an object alike wherever it is.

    Args:
        slots: set decoder whose elements `[batch, set_size, set_dim]` are the slots.
        side: side of the map that slots are copied to.
        widths: channels after each doubling of the side. The layers have side · 2^len(widths); where that is less than
            the image's, it is compared at their size.
        subpixel: double the side by 3x3 convolutions to four times the channels (Shi et al., CVPR 2016), three times as
            fast on a CPU as the published 5x5 transposed convolutions.
        smoothing: number of 5x5 convolutions of stride 1 after them; published with 1.
        relative: whether the first two numbers of a slot are its place.
        background: draw one layer more, from the mean of the features, for what belongs to no object.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        slots: SetDecoder,
        *,
        side: int = 8,
        widths: Sequence[int] = (64, 64, 64),
        subpixel: bool = False,
        smoothing: int = 1,
        relative: bool = False,
        background: bool = False,
    ) -> None:
        if side < 1 or smoothing < 0 or not widths or min(widths) < 1:
            raise InputError(
                f"expected side >= 1, smoothing >= 0 and positive widths, got {side}, {smoothing} and {list(widths)}"
            )
        dim = slots.latent_dim if slots.token_dim is None else slots.token_dim
        if (background and dim is None) or (relative and slots.set_dim < 3):
            raise InputError(
                "expected slots of at least 3 numbers for relative places, with token_dim or latent_dim for a "
                f"background, got {type(slots).__name__} of {slots.set_dim}; give others"
            )
        super().__init__(slots, set_dim=LAYER * (side * 2 ** len(widths)) ** 2, more=int(background))
        self.side, self.relative = side, relative
        self.spread, self.position = nn.Linear(slots.set_dim, widths[0]), nn.Linear(4, widths[0])
        layers: list[nn.Module] = []
        for narrow, wide in pairwise([widths[0], *widths]):
            layers += _doubling(narrow, wide, subpixel=subpixel)
        for _ in range(smoothing):
            layers += [nn.Conv2d(widths[-1], widths[-1], 5, padding=2), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Conv2d(widths[-1], LAYER, 3, padding=1))
        self.background = MLP(dim, slots.set_dim, slots.set_dim) if background else None

    def predictions(self, features: Tensor, *arguments: Any, **options: Any) -> Iterator[Tensor]:
        """Yield the slots of each iteration, `[batch, n, set_dim of the slots]`, the background last."""
        for slots in super().predictions(features, *arguments, **options):
            if self.background is not None:
                mean = features if features.ndim == 2 else features.mean(1)
                slots = torch.cat([slots, self.background(mean).unsqueeze(1)], dim=1)
            yield slots

    def finish(self, state: Tensor) -> Tensor:
        """Draw slots `[batch, n, set_dim of the slots]` as layers `[batch, n, 4 · side²]`."""
        slots = state.flatten(0, 1)
        line = (2 * torch.arange(self.side, device=slots.device, dtype=slots.dtype) + 1) / self.side - 1
        places = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).unsqueeze(0)
        if self.relative:
            places = places - slots[:, None, None, :2]
        maps = self.spread(slots)[:, None, None] + self.position(torch.cat([places, places.square()], dim=-1))
        layers = self.network(maps.permute(0, 3, 1, 2).relu())
        return layers.reshape(*state.shape[:2], -1)


def _doubling(narrow: int, wide: int, *, subpixel: bool) -> list[nn.Module]:
    """Layers that double the sides of a map."""
    if subpixel:
        return [nn.Conv2d(narrow, 4 * wide, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()]
    return [nn.ConvTranspose2d(narrow, wide, 5, stride=2, padding=2, output_padding=1), nn.ReLU()]
