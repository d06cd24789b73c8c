"""Frame averaging: makes any set function invariant to rotations."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from setpred.aggregators.base import Aggregator
from setpred.errors import InputError
from setpred.sets import fill_absent, mean_present


class FrameAverage(Aggregator):
    """Average of an aggregator over frames of the positions (frame averaging).

    out(X) = mean over frames R of φ([(P - t) R, F]), for elements X = [P, F] with positions P and features F.

    The frames are the principal axes of the positions, with every choice of signs: t is the centroid, and R holds the
    eigenvectors of C = Σ_i (p_i - t)(p_i - t)ᵀ, smallest eigenvalue first (Puny et al., ICLR 2022). They turn with the
    set, so the average is exactly invariant to rotations and translations, and to permutations as φ is.

    Differentiable any number of times where the eigenvalues of C differ. Where two agree (the corners of a square) the
    axes are arbitrary within their plane: the average is not continuous, and its gradients are finite but omit how
    these axes turn (see `Eigenvectors`). Sets that do not span the space are no such case, since their coordinates
    along the missing axes are zero. Positions and frames use at least float32, also under autocast.

    Args:
        aggregator: φ, which is evaluated on 2ᵈ copies of the set, or half as many without reflections.
        position_dim: d, how many leading numbers of an element are its position, at most 10.
        reflections: True for invariance to O(d); False for the frames that are rotations, SO(d).
    """

    def __init__(self, aggregator: Aggregator, *, position_dim: int = 3, reflections: bool = True) -> None:
        if not 1 <= position_dim <= min(aggregator.in_dim, 10):  # 10 dimensions have 1,024 frames
            raise InputError(
                f"expected position_dim from 1 to the {aggregator.in_dim} numbers of an element, and at most 10, got "
                f"{position_dim}; give the number of leading coordinates"
            )
        super().__init__(aggregator.in_dim, aggregator.out_dim)
        self.aggregator = aggregator
        self.position_dim, self.reflections = position_dim, reflections
        signs = itertools.product((1.0, -1.0), repeat=position_dim)
        kept = [flips for flips in signs if reflections or math.prod(flips) > 0]
        self.register_buffer("signs", torch.tensor(kept), persistent=False)

    def frames(self, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Centroid `[batch, 1, d]` and frames `[batch, count, d, d]`, axes in columns, of positions `[batch, n, d]`."""
        positions = fill_absent(positions, mask)
        centroid = mean_present(positions, mask).unsqueeze(1)
        centred = fill_absent(positions - centroid, mask)
        axes = Eigenvectors.apply(centred.mT @ centred)
        if not self.reflections:  # right-handed axes: flipping two at a time then gives all rotations
            handed = torch.linalg.det(axes.detach()).sign()
            axes = torch.cat([axes[..., :-1], axes[..., -1:] * handed[:, None, None]], dim=-1)
        return centroid, axes.unsqueeze(1) * self.signs.to(axes.dtype)[:, None, :]

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        elements = fill_absent(elements, mask)
        with torch.autocast(elements.device.type, enabled=False):
            if elements.dtype in (torch.float16, torch.bfloat16):
                elements = elements.float()
            positions, features = elements[..., : self.position_dim], elements[..., self.position_dim :]
            centroid, frames = self.frames(positions, mask)
            seen = (positions - centroid).unsqueeze(1) @ frames
        count = frames.shape[1]
        copies = torch.cat([seen, features.unsqueeze(1).expand(-1, count, -1, -1)], dim=-1).flatten(0, 1)
        masks = None if mask is None else mask.repeat_interleave(count, dim=0)
        return self.aggregator(copies, masks).unflatten(0, (-1, count)).mean(1)


class Eigenvectors(torch.autograd.Function):
    """Eigenvectors of symmetric matrices `[..., d, d]`, in columns, with gradients that are finite for every matrix.

        dU = U (K ∘ (Uᵀ dC U)),    K_ij = 1 / (λ_j - λ_i), or 0 on the diagonal and where λ_i = λ_j to rounding

    The turning of axes is undefined only within an eigenspace, and is omitted there. Differentiable any number of
    times, since each derivative recomputes K from C.
    """

    @staticmethod
    def forward(context: Any, matrix: Tensor) -> Tensor:
        vectors = torch.linalg.eigh(matrix).eigenvectors
        context.save_for_backward(matrix, vectors)
        return vectors

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        matrix, vectors = context.saved_tensors  # `vectors` is the output, so higher derivatives come back here
        values = (vectors * (matrix @ vectors)).sum(-2)
        gap = values.unsqueeze(-2) - values.unsqueeze(-1)
        smallest = 100 * torch.finfo(values.dtype).eps * values.detach().abs().amax(-1)[..., None, None]
        apart = gap.detach().abs() > smallest
        factor = torch.where(apart, 1 / torch.where(apart, gap, 1.0), 0.0)
        turned = vectors @ (factor * (vectors.mT @ gradient)) @ vectors.mT
        return 0.5 * (turned + turned.mT)
