"""Spatial broadcast decoder: each slot of a set draws a layer of the image."""

from collections.abc import Sequence
from itertools import pairwise

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

    Raises:
        InputError: a number out of range.
    """

    def __init__(self, slot_dim: int, *, side: int, widths: Sequence[int], subpixel: bool, smoothing: int) -> None:
        super().__init__()
        if side < 1 or smoothing < 0 or not widths or min(widths) < 1:
            raise InputError(
                f"expected side >= 1, smoothing >= 0 and positive widths, got {side}, {smoothing} and {list(widths)}"
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

    def forward(self, slots: Tensor) -> Tensor:
        """`[n, slot_dim]` -> `[n, 4, S, S]` with S = side · 2^len(widths)."""
        grid = position_grid(self.side, self.side, device=slots.device).to(slots.dtype)
        maps = self.spread(slots).unsqueeze(1) + self.position(grid)
        maps = maps.relu().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)  # channels last
        return self.network(maps)


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
