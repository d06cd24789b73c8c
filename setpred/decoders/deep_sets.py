"""DeepSets as a map from set to set: each element, and the mean of all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.errors import InputError


class DeepSetsLayer(nn.Module):
    """f(X)_i = A x_i + B mean_j x_j + c: of the linear maps that are set-equivariant, all that there are.

    (Zaheer et al., NeurIPS 2017.)
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.each, self.all = nn.Linear(in_dim, out_dim), nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        """`[batch, n, in_dim]` -> `[batch, n, out_dim]`; what is absent has no say in the mean."""
        if mask is None:
            mean = elements.mean(1, keepdim=True)
        else:
            present = mask.unsqueeze(-1)
            mean = elements.masked_fill(~present, 0.0).sum(1, keepdim=True) / present.sum(1, keepdim=True)
        return self.each(elements) + self.all(mean)


class DeepSets(SetDecoder):
    """Y = f_L(… ReLU(f_1(X))), one element for each token: the DeepSets baseline of numbering in the iDSPN paper.

    Permuting the tokens permutes the elements, and equal tokens give equal elements: it is set-equivariant, so it
    cannot tell equals apart, whatever it learns.

    Args:
        token_dim: length of a token.
        hidden_dim: of the layers between.
        layers: L.
        set_dim: of an element.
    """

    def __init__(self, *, token_dim: int, set_dim: int, hidden_dim: int = 64, layers: int = 2) -> None:
        super().__init__(set_size=None, set_dim=set_dim, token_dim=token_dim)
        if layers < 1:
            raise InputError(f"expected at least one layer, got {layers}; give more")
        widths = [token_dim, *[hidden_dim] * (layers - 1), set_dim]
        self.layers = nn.ModuleList(DeepSetsLayer(narrow, wide) for narrow, wide in itertools.pairwise(widths))

    def predictions(self, features: Tensor, *, iterations: int | None, mask: Tensor | None) -> Iterator[Tensor]:
        rows = self.layers[0](features, mask)
        for layer in self.layers[1:]:
            rows = layer(rows.relu(), mask)
        yield rows
