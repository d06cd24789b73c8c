"""Coordinates of a set in its principal axes: multidimensional scaling, and the affine version."""

from typing import Any

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.sets import check_set, fill_absent, mean_present, set_sizes


class InvariantCoordinates(nn.Module):
    """Start features by multidimensional scaling: elements in the set's own axes, for any encoder of sets.

        out_i = [(p_i - t) W, v_i W, ..., f_i],    elements x_i = [p_i, v_i, ..., f_i],    W, t: `principal_axes`

    Classical scaling factors the Gram matrix of the centred positions, which their distances determine: its
    eigenvectors times the roots of its eigenvalues are the coordinates (p_i - t) W in the principal axes. Distances do
    not change when the set turns or moves, so nor do these, and every encoder that reads them is invariant: TinvNN
    (Zhang, Wang, Zhang, Cui, Zhu, 2021). Here W comes from the d x d scatter matrix, which has the same
    eigenvalues but for zeros. Eigenvectors leave the signs of the axes open: here Σ_i z_i³ ≥ 0 for the coordinates z_i
    along each axis, or, without reflections, along all but the first one, which makes the axes right-handed. How TinvNN
    chooses the signs is not known here.

    Blind to mirror images, unless `reflections` is False; with `scaled` to the size of the set, with `affine` also to
    its proportions. The coordinates are not continuous, and not invariant, at sets that are symmetric along an axis,
    where rounding decides its sign, and at sets with equal eigenvalues, where it decides the axes. For symmetric sets
    take `setpred.aggregators.FrameAverage`, the mean over the signs. Differentiable any number of times elsewhere, with
    finite gradients everywhere.

    Args:
        input_dim: numbers of an element; `token_dim` is the same.
        position_dim: d, how many leading numbers of an element are its position.
        directions: how many vectors of d numbers follow the position and turn with it, such as normals.
        reflections: True: mirror images have equal coordinates. False: they differ.
        scaled: divide positions by their root mean square distance from t, for invariance to size.
        affine: invariance to all invertible linear maps, or without reflections to those of positive determinant.

    Raises:
        InputError: numbers that do not fit, or `affine` with directions: normals and velocities change differently.
    """

    def __init__(
        self,
        *,
        input_dim: int,
        position_dim: int = 3,
        directions: int = 0,
        reflections: bool = True,
        scaled: bool = False,
        affine: bool = False,
    ) -> None:
        super().__init__()
        check_axes(input_dim, position_dim, directions, affine=affine)
        self.in_dim = self.token_dim = input_dim
        self.position_dim, self.directions = position_dim, directions
        self.reflections, self.scaled, self.affine = reflections, scaled, affine

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, n, input_dim]` and bool `[batch, n]` -> `[batch, n, input_dim]`, zeros where absent."""
        check_set(elements, mask, set_dim=self.in_dim)
        elements = fill_absent(elements, mask)
        with torch.autocast(elements.device.type, enabled=False):
            elements = at_least_float32(elements)
            dim = self.position_dim
            centroid, axes = principal_axes(elements[..., :dim], mask, affine=self.affine)
            vectors, features = centred_vectors(elements, centroid, dim, self.directions)
            seen = (vectors @ axes).unflatten(1, (-1, 1 + self.directions))
            skewness = fill_absent(seen[:, :, 0].detach(), mask).pow(3).sum(1)
            signs = torch.where(skewness < 0, -1.0, 1.0).to(axes.dtype)
            if not self.reflections:
                # the shortest axis, along which sets that do not span the space are 0
                handed = torch.linalg.det(axes.detach()).sign() * signs[:, 1:].prod(1)
                signs = torch.cat([handed.unsqueeze(1), signs[:, 1:]], dim=1)
            seen = seen * signs[:, None, None]
            if self.scaled:
                size = mean_present(seen[:, :, :1].square().sum(-1), mask).view(-1, 1, 1, 1)
                scale = torch.where(size > 0, size, 1.0).sqrt()
                seen = torch.cat([seen[:, :, :1] / scale, seen[:, :, 1:]], dim=2)
            return fill_absent(torch.cat([seen.flatten(2), features], dim=-1), mask)


def check_axes(set_dim: int, position_dim: int, directions: int, *, affine: bool) -> None:
    """Raise `InputError` unless an element holds a position and directions, and an affine map none of these."""
    vectors = position_dim * (1 + directions)
    if not 1 <= position_dim <= 10 or directions < 0 or vectors > set_dim or (affine and directions):
        raise InputError(
            f"expected position_dim from 1 to the {set_dim} numbers of an element, and at most 10, that many for each "
            f"of the directions, and no directions with affine, got {position_dim}, {directions} directions and affine "
            f"{affine}; give the number of leading coordinates"
        )


def at_least_float32(elements: Tensor) -> Tensor:
    """Convert half precision, in which eigenvectors are not implemented, to float32."""
    return elements.float() if elements.dtype in (torch.float16, torch.bfloat16) else elements


def centred_vectors(elements: Tensor, centroid: Tensor, dim: int, directions: int) -> tuple[Tensor, Tensor]:
    """Positions minus their centroid, and directions, `[batch, n * (1 + directions), dim]`; the other features."""
    end = dim * (1 + directions)
    vectors = torch.cat([elements[..., :dim] - centroid, elements[..., dim:end]], dim=-1)
    return vectors.unflatten(-1, (-1, dim)).flatten(1, 2), elements[..., end:]


def principal_axes(positions: Tensor, mask: Tensor | None = None, *, affine: bool = False) -> tuple[Tensor, Tensor]:
    """Compute axes that turn with the set, up to their signs.

        W = eigenvectors of C = Σ_i (p_i - t)(p_i - t)ᵀ, smallest eigenvalue first, with t the centroid

    or, for `affine`, with y_i = (p_i - t) L⁻ᵀ and L Lᵀ = C / n:

        W = L⁻ᵀ V,    V = eigenvectors of Σ_i |y_i|² y_iᵀ y_i, smallest eigenvalue first

    An invertible map is a symmetric positive or a triangular matrix times an orthogonal one. L⁻ᵀ removes the first
    factor, since the y_i of a set and of its image differ by an orthogonal matrix only. Their scatter is the identity,
    so V comes from fourth moments (Cardoso, ICASSP 1989; Tyler et al., J. R. Stat. Soc. B, 2009). Mironenco and Forré
    (ICLR 2024) factor affine groups in this way, to lift convolutions to samples of the group.

    L is of C / n plus a multiple of the identity near the rounding of the largest variance, so that sets that do not
    span the space have axes too; their coordinates along the missing ones are near zero.

    Args:
        positions: `[batch, n, d]`.
        mask: present elements, bool `[batch, n]`.

    Returns:
        Centroid `[batch, 1, d]` and W `[batch, d, d]`, axes in columns.
    """
    positions = fill_absent(positions, mask)
    centroid = mean_present(positions, mask).unsqueeze(1)
    centred = fill_absent(positions - centroid, mask)
    if not affine:
        return centroid, Eigenvectors.apply(centred.mT @ centred)
    dim = positions.shape[-1]
    covariance = centred.mT @ centred / set_sizes(positions, mask).clamp(min=1).view(-1, 1, 1)
    unit = torch.eye(dim, dtype=positions.dtype, device=positions.device)
    size = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)
    covariance = covariance + torch.where(size > 0, 10 * dim * torch.finfo(size.dtype).eps * size, 1.0) * unit
    whitening = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), unit, upper=False).mT
    white = centred @ whitening
    return centroid, whitening @ Eigenvectors.apply((white.square().sum(-1, keepdim=True) * white).mT @ white)


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
