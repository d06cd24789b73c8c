"""Group invariant global pooling (GIGP): pools elements orbit by orbit."""

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.errors import InputError
from setpred.sets import fill_absent, mean_present, set_sizes


class GIGP(Aggregator):
    """Group invariant global pooling for SO(d), of elements [p_i, f_i] (Bujel, Gideoni, Joshi, Liò, 2023).

        out = (1/n) Σ_q w_q (A h_q + o_q MLP([h_q, q])),    h_q = Σ_i m_iq f_i,    o_q = 1 - Π_i (1 - m_iq)

    Rotations about c keep the radius |p_i - c| of a position: its orbit. The orbits q are `orbits` radii from 0 to
    `largest`. m_iq, a softmax over q of -½ (radius_i - q)² / spacing², is the share of element i in q; o_q is near 0
    for empty orbits. The MLP starts at 0 and w at 1, so training starts from A (the identity where it fits) times mean
    pooling. Only radii are read, so the result is exactly invariant, also to a separate rotation of each element; the
    features must say how positions relate. Differentiable any number of times, also for positions at c, since radii
    are √(|p - c|² + (spacing / 10)²).

    In the published code m has bins with edges, through which no gradient reaches the positions, and radii span the
    batch, so a set's result depends on the others.

    Args:
        in_dim: numbers of an element, the position first. A `SetEncoder` must keep it (`kept=position_dim`).
        position_dim: d, length of the position.
        out_dim: length of the vector; that of f by default. Without features, f_i = 1 and elements are counted.
        orbits: number of radii q.
        largest: largest radius, in units of the positions; farther elements belong to it.
        centred: True: c is the centroid, which adds invariance to translations. False: c is the origin.
        hidden_dim: width of the MLP's hidden layers.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        position_dim: int = 3,
        out_dim: int | None = None,
        orbits: int = 50,
        largest: float = 1.0,
        centred: bool = True,
        hidden_dim: int = 16,
    ) -> None:
        if not 1 <= position_dim <= in_dim or orbits < 2 or largest <= 0:
            raise InputError(
                f"expected position_dim from 1 to in_dim, at least 2 orbits and a positive largest radius, got "
                f"{position_dim} of {in_dim}, {orbits} and {largest}; change what is out of range"
            )
        feature_dim = max(in_dim - position_dim, 1)
        super().__init__(in_dim, feature_dim if out_dim is None else out_dim)
        self.position_dim, self.centred = position_dim, centred
        self.spacing = largest / (orbits - 1)
        self.register_buffer("radii", torch.linspace(0.0, largest, orbits), persistent=False)
        self.weight = nn.Parameter(torch.ones(orbits))
        self.skip = nn.Identity() if feature_dim == self.out_dim else nn.Linear(feature_dim, self.out_dim, bias=False)
        self.network = nn.Sequential(
            *(nn.Linear(feature_dim + 1, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()),
            nn.Linear(hidden_dim, self.out_dim),
        )
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def orbit(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """Radius of each present element's orbit, `[batch, set_size]`, in units of the positions; invariant."""
        positions = fill_absent(elements[..., : self.position_dim], mask)
        if self.centred:
            positions = positions - mean_present(positions, mask).unsqueeze(1)
        return (positions.square().sum(-1) + (0.1 * self.spacing) ** 2).sqrt()

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        elements = fill_absent(elements, mask)
        distance = (self.orbit(elements, mask).unsqueeze(-1) - self.radii) / self.spacing
        share = fill_absent((-0.5 * distance.square()).softmax(-1), mask)
        features = elements[..., self.position_dim :]
        if features.shape[-1] == 0:
            features = torch.ones_like(elements[..., :1])
        pooled = share.mT @ features
        occupied = 1 - (1 - share).prod(1)
        radii = self.radii.to(pooled.dtype).expand(len(pooled), -1)
        changed = occupied.unsqueeze(-1) * self.network(torch.cat([pooled, radii.unsqueeze(-1)], dim=-1))
        return self.weight @ (self.skip(pooled) + changed) / set_sizes(elements, mask).clamp(min=1).unsqueeze(1)
