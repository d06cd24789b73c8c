"""Frame averaging: makes any set function invariant to rotations, or to affine maps."""

import itertools
import math

import torch
from torch import Tensor

from setpred.aggregators.base import Aggregator
from setpred.encoders.invariant_coordinates import at_least_float32, centred_vectors, check_axes, principal_axes
from setpred.sets import fill_absent


class FrameAverage(Aggregator):
    """Average of an aggregator over frames of the positions (frame averaging).

    out(X) = mean over frames R of φ([(P - t) R, V R, F]), for elements X = [P, V, F] with positions P, directions V
    and features F.

    The frames are the principal axes of the positions, with every choice of signs: t is the centroid, and R holds the
    eigenvectors of C = Σ_i (p_i - t)(p_i - t)ᵀ, smallest eigenvalue first (Puny et al., ICLR 2022). They turn with the
    set, so the average is exactly invariant to rotations and translations, and to permutations as φ is. With `affine`
    the frames are those of `setpred.encoders.invariant_coordinates.principal_axes`, which follow every invertible map;
    φ then sees no proportions.

    Differentiable any number of times where the eigenvalues of C differ. Where two agree (the corners of a square) the
    axes are arbitrary within their plane: the average is not continuous, and its gradients are finite but omit how
    these axes turn (see `Eigenvectors`). Sets that do not span the space are no such case, since their coordinates
    along the missing axes are zero. Positions and frames use at least float32, also under autocast.

    Args:
        aggregator: φ, which is evaluated on 2ᵈ copies of the set, or half as many without reflections.
        position_dim: d, how many leading numbers of an element are its position, at most 10.
        reflections: True for invariance to O(d); False for the frames that are rotations, SO(d).
        directions: how many vectors of d numbers follow the position and turn with it, such as normals.
        affine: True for invariance to GL(d) instead of O(d); to positive determinants instead of SO(d).

    Raises:
        InputError: numbers that do not fit, or `affine` with directions.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        *,
        position_dim: int = 3,
        reflections: bool = True,
        directions: int = 0,
        affine: bool = False,
    ) -> None:
        check_axes(aggregator.in_dim, position_dim, directions, affine=affine)  # 10 dimensions have 1,024 frames
        super().__init__(aggregator.in_dim, aggregator.out_dim)
        self.aggregator = aggregator
        self.position_dim, self.reflections = position_dim, reflections
        self.directions, self.affine = directions, affine
        signs = itertools.product((1.0, -1.0), repeat=position_dim)
        kept = [flips for flips in signs if reflections or math.prod(flips) > 0]
        self.register_buffer("signs", torch.tensor(kept), persistent=False)

    def frames(self, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Centroid `[batch, 1, d]` and frames `[batch, count, d, d]`, axes in columns, of positions `[batch, n, d]`."""
        centroid, axes = principal_axes(positions, mask, affine=self.affine)
        if not self.reflections:  # right-handed axes: flipping two at a time then gives all rotations
            handed = torch.linalg.det(axes.detach()).sign()
            axes = torch.cat([axes[..., :-1], axes[..., -1:] * handed[:, None, None]], dim=-1)
        return centroid, axes.unsqueeze(1) * self.signs.to(axes.dtype)[:, None, :]

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        elements = fill_absent(elements, mask)
        with torch.autocast(elements.device.type, enabled=False):
            elements = at_least_float32(elements)
            centroid, frames = self.frames(elements[..., : self.position_dim], mask)
            vectors, features = centred_vectors(elements, centroid, self.position_dim, self.directions)
            seen = (vectors.unsqueeze(1) @ frames).unflatten(2, (-1, 1 + self.directions)).flatten(3)
        count = frames.shape[1]
        copies = torch.cat([seen, features.unsqueeze(1).expand(-1, count, -1, -1)], dim=-1).flatten(0, 1)
        masks = None if mask is None else mask.repeat_interleave(count, dim=0)
        return self.aggregator(copies, masks).unflatten(0, (-1, count)).mean(1)
