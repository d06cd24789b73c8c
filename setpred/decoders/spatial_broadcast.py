"""Spatial broadcast decoder: each slot of a set draws a layer of the image."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.decoders.readout import SlotReader
from setpred.encoders import position_grid
from setpred.errors import InputError
from setpred.nn import LAYER


class Broadcast(nn.Module):
    """Network from a slot to a picture: the slot at every position of a small map, with the position, then a CNN.

        picture = CNN(ReLU(W s + P)),    P_p = V e_p,    e_p = distances of position p to the four edges

    Args:
        slot_dim: numbers of a slot.
        side: side of the map that the slot is copied to.
        widths: channels after each doubling of the side.
        subpixel: double the side by 3x3 convolutions to four times the channels (Shi et al., CVPR 2016), faster on a
            CPU than the published 5x5 transposed convolutions.
        smoothing: number of 5x5 convolutions of stride 1 after them; published with 1.
        fine: number of further doublings at the last width. Each starts as an enlargement by nearest neighbours (as
            ICNR; Aitken et al., 2017), so a trained network that is given one draws the same at first.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self, slot_dim: int, *, side: int, widths: Sequence[int], subpixel: bool, smoothing: int, fine: int = 0
    ) -> None:
        super().__init__()
        if side < 1 or min(smoothing, fine) < 0 or not widths or min(widths) < 1:
            raise InputError(
                "expected side >= 1, smoothing >= 0, fine >= 0 and positive widths, got "
                f"{side}, {smoothing}, {fine} and {list(widths)}"
            )
        self.side = side
        self.spread, self.position = nn.Linear(slot_dim, widths[0]), nn.Linear(4, widths[0])
        layers: list[nn.Module] = []
        for narrow, wide in pairwise([widths[0], *widths]):
            if subpixel:
                layers += [nn.Conv2d(narrow, 4 * wide, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()]
            else:
                layers += [nn.ConvTranspose2d(narrow, wide, 5, stride=2, padding=2, output_padding=1), nn.ReLU()]
        for _ in range(smoothing):
            layers += [nn.Conv2d(widths[-1], widths[-1], 5, padding=2), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Conv2d(widths[-1], LAYER, 3, padding=1))
        doublings = (enlarging(widths[-1]) for _ in range(fine))
        self.fine = nn.Sequential(*(part for each in doublings for part in (each, nn.PixelShuffle(2), nn.ReLU())))

    def forward(self, slots: Tensor) -> Tensor:
        """`[n, slot_dim]` -> `[n, 4, S, S]` with S = side · 2^(len(widths) + fine)."""
        grid = position_grid(self.side, self.side, device=slots.device).to(slots.dtype)
        maps = self.spread(slots).unsqueeze(1) + self.position(grid)
        maps = maps.relu().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)  # channels last
        *layers, draw = self.network
        for layer in (*layers, *self.fine, draw):
            maps = layer(maps)
        return maps


def enlarging(width: int) -> nn.Conv2d:
    """Build a 3x3 convolution to 4 · width channels that repeats each channel: with a pixel shuffle, an enlargement."""
    convolution = nn.Conv2d(width, 4 * width, 3, padding=1)
    same = nn.init.dirac_(torch.empty(width, width, 3, 3))
    with torch.no_grad():
        convolution.weight.copy_(same.repeat_interleave(4, 0))
        convolution.bias.zero_()
    return convolution


class SpatialBroadcast(SlotReader):
    """Set of image layers: slots from a set decoder, each drawn by one network (Watters et al., 2019).

        layer_i = CNN(ReLU(W s_i + P)),    image = Σ_i softmax_i(α_i) · colour_i

    Slot s_i is copied to every position of a small map, to which P adds the positions. The same network draws all
    slots, so permuting the slots permutes the layers. `setpred.nn.composite` gives the image and the masks of the
    layers; `setpred.losses.Reconstruction` trains them without labels. With `SlotAttention` this is the autoencoder of
    object discovery (Locatello et al., NeurIPS 2020).

    The layers have the side S = side · 2^len(widths). Where that is less than the image's, image and masks are compared
    at the side of the other one.

    Args:
        slots: set decoder whose elements `[batch, set_size, set_dim]` are the slots.
        side, widths, subpixel, smoothing: of the network, see `Broadcast`.

    Raises:
        InputError: a number out of range.
    """

    draws_layers = True

    def __init__(
        self,
        slots: SetDecoder,
        *,
        side: int = 8,
        widths: Sequence[int] = (64, 64, 64),
        subpixel: bool = False,
        smoothing: int = 1,
    ) -> None:
        super().__init__(slots, set_dim=LAYER * (side * 2 ** len(widths)) ** 2)
        self.network = Broadcast(slots.set_dim, side=side, widths=widths, subpixel=subpixel, smoothing=smoothing)

    def finish(self, state: Tensor) -> Tensor:
        """Draw slots `[batch, set_size, set_dim of the slots]` as layers `[batch, set_size, 4 · S²]`."""
        return self.network(state.flatten(0, 1)).flatten(1).unflatten(0, state.shape[:2])
