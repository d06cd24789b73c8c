"""Rotation-invariant convolution on the surface of a set of points with normals (RISurConv)."""

import torch
from torch import Tensor

from setpred.encoders.elements import SetTokens
from setpred.errors import InputError
from setpred.nn import MLP, EncoderLayer


class SurfaceTokens(SetTokens):
    """Encoder from points with normals to tokens: local surface features with attention (RISurConv).

        X_0 = max_j MLP'([A({MLP(s_ij)}_j)_j, f_j]) over the nearest neighbours j of element i

    for elements x_i = [p_i, n_i, f_i] of position, unit normal and features; s_ij are the 14 numbers of
    `surface_features`, A a layer of self-attention among the neighbours. The layers of `SetTokens` follow, of
    self-attention over the set (Zhang, Yang, Xiang, ECCV 2024). Their network stacks five of these with fewer and fewer
    points, and batch normalisation; this is one, on all points. Its attention subtracts; here it is DETR's layer.

    Invariant to rotations and translations, since the features are lengths and angles, and equivariant to the order
    of the elements. Mirror images differ: their neighbours go around the normal in the other direction. Blind to where
    neighbourhoods are in the set: self-attention compares their features, not their positions. `GIGP` after it adds
    the distance from the centroid. Rounding chooses among neighbours at equal distances or angles, as on a grid, so
    use points in general positions. An element without neighbours has a row of zeros in X_0. Differentiable once,
    with finite gradients also at coincident points.

    Args:
        input_dim: numbers of an element, 6 for position and normal, then features.
        neighbours: number of nearest other elements; sets with fewer use all.
        token_dim, layers, heads, hidden_dim: those of `SetTokens`.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        *,
        input_dim: int = 6,
        neighbours: int = 8,
        token_dim: int = 64,
        layers: int = 1,
        heads: int = 4,
        hidden_dim: int = 64,
    ) -> None:
        sizes = {"token_dim": token_dim, "layers": layers, "heads": heads, "hidden_dim": hidden_dim}
        super().__init__(input_dim=input_dim, **sizes)
        if input_dim < 6 or neighbours < 1:
            raise InputError(
                f"expected an input_dim of at least 6, position and normal, and at least 1 neighbour, got {input_dim} "
                f"and {neighbours}"
            )
        self.neighbours = neighbours
        self.embedding = MLP(SURFACE_FEATURES, hidden_dim, token_dim)
        self.attention = EncoderLayer(token_dim, heads=heads, hidden_dim=hidden_dim)
        self.network = MLP(token_dim + input_dim - 6, hidden_dim, token_dim)

    def rows(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        positions, normals, features = elements.split([3, 3, elements.shape[-1] - 6], dim=-1)
        index, found = nearest_neighbours(positions.detach(), mask, count=self.neighbours)
        around = neighbours_of(torch.cat([positions, normals], dim=-1), index)
        surface, order = surface_features(positions, normals, around, found)
        embedded = self.embedding(surface).flatten(0, 1)
        found = found.flatten(0, 1)  # the ordered neighbours have the same mask, since the found ones come first
        readable = found | ~found.any(1, keepdim=True)  # without neighbours: attend to fillers, zeroed below
        attended = self.attention(embedded, mask=readable).unflatten(0, index.shape[:2])
        others = neighbours_of(features, index.gather(2, order))
        rows = self.network(torch.cat([attended, others], dim=-1))
        rows = rows.masked_fill(~found.view(*index.shape, 1), -torch.inf).amax(2)
        return rows.masked_fill(torch.isneginf(rows), 0.0).unsqueeze(2)


def nearest_neighbours(positions: Tensor, mask: Tensor | None, *, count: int) -> tuple[Tensor, Tensor]:
    """Find the nearest other elements: indices `[batch, n, k]`, nearest first, and whether each exists.

    k is `count` or fewer, as elements there are. The existing ones come first.
    """
    size = positions.shape[1]
    distances = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")
    itself = torch.eye(size, dtype=torch.bool, device=positions.device)
    excluded = itself if mask is None else itself | ~mask.unsqueeze(1)
    nearest = distances.masked_fill(excluded, torch.inf).topk(min(count, size), largest=False)
    return nearest.indices, nearest.values.isfinite()


def neighbours_of(values: Tensor, index: Tensor) -> Tensor:
    """Gather `[batch, n, dim]` by `[batch, m, k]` to `[batch, m, k, dim]`."""
    chosen = index.flatten(1).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, chosen).unflatten(1, index.shape[1:])


SURFACE_FEATURES = 14


def surface_features(positions: Tensor, normals: Tensor, around: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the lengths and cosines of the two triangles at each neighbour (Zhang, Yang, Xiang, ECCV 2024).

    The neighbours of p are ordered by their angle around its normal n. With a, b, c the vectors from p to a neighbour,
    to the one before and to the one after it, n_a, n_b, n_c the normals there and u(v) = v / |v| (0 for v = 0):

        |a|,  u(a)·n,  -u(a)·n_a,  u(b)·n,  -u(b)·n_b,  u(b - a)·n_a,  -u(b - a)·n_b,    p and two neighbours
        u(a)·u(b),  u(b)·u(b - a),                                                       angles at p and at b
        u(c)·u(a),  u(c)·u(c - a),  u(c - a)·n_c,  u(a)·n_c,                             the next triangle
        (u(c) × u(a))·(u(b) × u(a))                                                      the angle between the two

    Args:
        positions, normals: `[batch, n, 3]`.
        around: position and normal of the neighbours, `[batch, n, k, 6]`.
        found: whether a neighbour exists, bool `[batch, n, k]`; these come first.

    Returns:
        `[batch, n, k, 14]` and the order of the neighbours `[batch, n, k]`; any numbers where none exists.
    """
    normal = normals.unsqueeze(2).expand_as(around[..., :3])
    offsets = around[..., :3] - positions.unsqueeze(2)
    with torch.no_grad():
        flat = (offsets - dot(offsets, normal) * normal).masked_fill(~found.unsqueeze(-1), 0.0)
        farthest = flat.square().sum(-1).argmax(-1)[..., None, None].expand(*flat.shape[:2], 1, 3)
        reference = flat.gather(2, farthest).expand_as(flat)
        angle = torch.atan2(dot(torch.linalg.cross(reference, flat, dim=-1), normal), dot(reference, flat)).squeeze(-1)
        order = angle.masked_fill(~found, torch.inf).argsort(dim=-1, stable=True)
    places = torch.arange(around.shape[2], device=around.device)
    count = found.sum(-1, keepdim=True).clamp(min=1)
    local = torch.cat([offsets, around[..., 3:]], dim=-1)
    (a, at_a), (b, at_b), (c, at_c) = (
        local.gather(2, order.gather(2, (places + step) % count).unsqueeze(-1).expand_as(local)).split(3, dim=-1)
        for step in (0, -1, 1)
    )
    length = a.square().sum(-1, keepdim=True)
    length = torch.where(length > 0, length, 1.0).sqrt() * (length > 0)
    to_a, to_b, to_c, back, on = unit(a), unit(b), unit(c), unit(b - a), unit(c - a)
    sides = torch.linalg.cross(to_c, to_a), torch.linalg.cross(to_b, to_a)
    pairs = [(to_a, normal), (-to_a, at_a), (to_b, normal), (-to_b, at_b), (back, at_a), (-back, at_b), (to_a, to_b)]
    pairs += [(to_b, back), (to_c, to_a), (to_c, on), (on, at_c), (to_a, at_c), sides]
    return torch.cat([length, *(dot(*pair) for pair in pairs)], dim=-1), order


def dot(first: Tensor, second: Tensor) -> Tensor:
    """Scalar products of vectors, with a last dimension of 1."""
    return (first * second).sum(-1, keepdim=True)


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1; of length 0 where they are 0, with a gradient of 0."""
    squares = vectors.square().sum(-1, keepdim=True)
    return torch.where(squares > 0, vectors / torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
