"""View set attention: tokens of a set of images with the poses of their cameras."""

import torch
from torch import Tensor, nn

from setpred.encoders.elements import SetTokens
from setpred.encoders.tokens import token_rows
from setpred.nn import MLP, POSE


class ViewTokens(SetTokens):
    """Encoder of a set of views to tokens, with attention over all views and no positions of views in the set.

        token_kp = MLP(LN(f_kp + W [q_kp, r_kp] + b)),    then layers of self-attention over all (k, p)

    f_k is the trunk's map of view k. Position p of it sees along the ray c + t A (x, y, 1)ᵀ, where x and y of the
    cell's centre run from -1 at the left and upper edge to 1. r is the direction of the ray, of length 1, and
    q = c - (c · r) r is its point next to the origin of the world: together they say which ray it is.

    The answer does not depend on the order of the views, and a view may be absent. After VSFormer (Sun et al., IEEE
    TVCG 2024), which recognises one shape: there a view is one token and has no pose. Here views keep their maps, since
    the set has a place for every object; with `layers=0` views meet in the decoder alone.

    An element of the input is [c, columns of A, pixels in [0, 1]]: 12 + 3 S² numbers, pixels row by row, each red,
    green, blue. c and A are in world units. `setpred.data.views.SceneViews` makes them of rendered scenes.

    Args:
        trunk: image to map `[batch, channels, height, width]`, with `channels` and `image_size` S.
        token_dim, layers, heads, hidden_dim: those of `SetTokens`.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self, trunk: nn.Module, *, token_dim: int = 64, layers: int = 1, heads: int = 4, hidden_dim: int = 128
    ) -> None:
        sizes = {"token_dim": token_dim, "layers": layers, "heads": heads, "hidden_dim": hidden_dim}
        super().__init__(input_dim=POSE + 3 * trunk.image_size**2, **sizes)
        self.trunk = trunk
        self.position = nn.Linear(6, trunk.channels)
        self.norm = nn.LayerNorm(trunk.channels)
        self.network = MLP(trunk.channels, token_dim, token_dim)

    def rows(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        present = elements.flatten(0, 1) if mask is None else elements[mask]  # norms of the trunk see no absent view
        side = self.trunk.image_size
        maps = self.trunk(present[:, POSE:].unflatten(1, (side, side, 3)).permute(0, 3, 1, 2))
        rays = view_rays(present[:, :POSE], *maps.shape[2:])
        tokens = self.network(self.norm(token_rows(maps) + self.position(rays)))
        if mask is None:
            return tokens.unflatten(0, elements.shape[:2])
        return tokens.new_zeros(*mask.shape, *tokens.shape[1:]).masked_scatter(mask[..., None, None], tokens)


def view_rays(poses: Tensor, height: int, width: int) -> Tensor:
    """Point next to the origin and direction of the ray of each cell of a map, `[views, height * width, 6]`.

    Args:
        poses: `[views, 12]`, see `ViewTokens`.
    """
    lines = ((2 * torch.arange(side, device=poses.device) + 1) / side - 1 for side in (height, width))
    y, x = torch.meshgrid(*lines, indexing="ij")
    cells = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1).to(poses.dtype)
    location, columns = poses[:, None, :3], poses[:, 3:].unflatten(1, (3, 3))
    directions = nn.functional.normalize(cells @ columns, dim=-1)
    nearest = location - (location * directions).sum(-1, keepdim=True) * directions
    return torch.cat([nearest, directions], dim=-1)
