"""Set encoders: an element-wise network, then an aggregator."""

import torch
from torch import Tensor, nn

from setpred.aggregators.base import Aggregator
from setpred.errors import InputError
from setpred.nn import MLP
from setpred.sets import check_set, fill_absent


class SetEncoder(Aggregator):
    """Set encoder: an MLP for each element, then an aggregator.

    g(Y) = aggregate_i [k_i, MLP(f_i)] for elements y_i = [k_i, f_i], with an MLP of one hidden layer.

    k_i is empty, unless the aggregator itself reads numbers of an element, such as positions or a membership.

    Args:
        aggregator: pools features; its `in_dim` is `kept` plus the width of the MLP's output.
        set_dim: numbers of an element.
        hidden_dim: width of the hidden layer.
        kept: how many leading numbers of an element the aggregator gets unchanged.
    """

    def __init__(self, aggregator: Aggregator, *, set_dim: int, hidden_dim: int = 512, kept: int = 0) -> None:
        if not 0 <= kept < min(set_dim, aggregator.in_dim):
            raise InputError(
                f"expected kept to leave some of {set_dim} numbers and of the aggregator's {aggregator.in_dim}, got "
                f"{kept}; give the number of leading positions or memberships"
            )
        super().__init__(set_dim, aggregator.out_dim)
        self.network = MLP(set_dim - kept, hidden_dim, aggregator.in_dim - kept)
        self.aggregator, self.kept = aggregator, kept

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return self.aggregator(self._features(elements, mask), mask)

    def residual(self, elements: Tensor, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """`EquilibriumAggregation.residual` of the encoded set at φ = `latent`."""
        check_set(elements, mask, set_dim=self.in_dim)
        return self.aggregator.residual(self._features(elements, mask), latent, mask)

    def _features(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        # a NaN in padding would reach the weights' gradients
        elements = fill_absent(elements, mask)
        if self.kept == 0:
            return self.network(elements)
        return torch.cat([elements[..., : self.kept], self.network(elements[..., self.kept :])], dim=-1)


class PairwiseSetEncoder(Aggregator):
    """Set encoder over all ordered pairs of elements.

    g(Y) = g'({[y_i, y_j]}_ij): a set encoder over all ordered pairs of elements.

    With FSPool of `set_size²` knots inside, this is the relational encoder (RNFS) of DSPN and iDSPN.

    Args:
        set_encoder: g', over elements of twice the size.
    """

    def __init__(self, set_encoder: Aggregator) -> None:
        if set_encoder.in_dim % 2:
            raise ValueError(f"expected a set encoder over pairs, of even in_dim, got {set_encoder.in_dim}")
        super().__init__(set_encoder.in_dim // 2, set_encoder.out_dim)
        self.set_encoder = set_encoder

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        pair_mask = None if mask is None else (mask.unsqueeze(2) & mask.unsqueeze(1)).flatten(1, 2)
        # not for a subclass, which may do something else
        if type(self.set_encoder) is SetEncoder and self.set_encoder.kept == 0:
            return self.set_encoder.aggregator(self._pair_features(fill_absent(elements, mask)), pair_mask)
        size = elements.shape[1]
        first = elements.unsqueeze(2).expand(-1, -1, size, -1)
        second = elements.unsqueeze(1).expand(-1, size, -1, -1)
        return self.set_encoder(torch.cat([first, second], dim=-1).flatten(1, 2), pair_mask)

    def _pair_features(self, elements: Tensor) -> Tensor:
        """Network of [y_i, y_j]; its first layer W [y_i, y_j] = W' y_i + W'' y_j takes each element only once."""
        layer, *rest = self.set_encoder.network
        ours, theirs = layer.weight.chunk(2, dim=1)
        first = nn.functional.linear(elements, ours, layer.bias).unsqueeze(2)
        features = (first + nn.functional.linear(elements, theirs).unsqueeze(1)).flatten(1, 2)
        for part in rest:
            features = part(features)
        return features
