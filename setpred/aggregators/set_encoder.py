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

    k_i is empty, unless the aggregator itself reads numbers of an element, such as positions or a membership. With
    `tokens`, f_i is the token of element i, such as `setpred.encoders.InvariantCoordinates`; g is then invariant to
    what the tokens, and an aggregator that reads k_i, are invariant to.

    Args:
        aggregator: pools features; its `in_dim` is `kept` plus the width of the MLP's output.
        set_dim: numbers of an element.
        hidden_dim: width of the hidden layer.
        kept: how many leading numbers of an element the aggregator gets unchanged.
        tokens: encoder of input sets with one token for each element, which the MLP reads in place of f_i.

    Raises:
        InputError: numbers that do not fit.
        ValueError: another number of tokens than of elements.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        *,
        set_dim: int,
        hidden_dim: int = 512,
        kept: int = 0,
        tokens: nn.Module | None = None,
    ) -> None:
        if not 0 <= kept < min(set_dim, aggregator.in_dim):
            raise InputError(
                f"expected kept to leave some of {set_dim} numbers and of the aggregator's {aggregator.in_dim}, got "
                f"{kept}; give the number of leading positions or memberships"
            )
        if tokens is not None and getattr(tokens, "in_dim", None) != set_dim:
            raise InputError(
                f"expected tokens of an encoder of sets with an in_dim of {set_dim}, got {type(tokens).__name__} with "
                f"{getattr(tokens, 'in_dim', None)}; choose another encoder or set_dim"
            )
        super().__init__(set_dim, aggregator.out_dim)
        read = set_dim - kept if tokens is None else tokens.token_dim
        self.network = MLP(read, hidden_dim, aggregator.in_dim - kept)
        self.aggregator, self.kept, self.tokens = aggregator, kept, tokens

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return self.aggregator(self._features(elements, mask), mask)

    def residual(self, elements: Tensor, latent: Tensor, mask: Tensor | None = None) -> Tensor:
        """`EquilibriumAggregation.residual` of the encoded set at φ = `latent`."""
        check_set(elements, mask, set_dim=self.in_dim)
        return self.aggregator.residual(self._features(elements, mask), latent, mask)

    def _features(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        # a NaN in padding would reach the weights' gradients
        elements = fill_absent(elements, mask)
        read = elements[..., self.kept :] if self.tokens is None else self.tokens(elements, mask)
        if read.shape[1] != elements.shape[1]:
            raise ValueError(f"expected one token for each of {elements.shape[1]} elements, got {read.shape[1]}")
        features = self.network(read)
        return torch.cat([elements[..., : self.kept], features], dim=-1) if self.kept else features


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
        plain = type(self.set_encoder) is SetEncoder and self.set_encoder.tokens is None
        if plain and self.set_encoder.kept == 0:
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
