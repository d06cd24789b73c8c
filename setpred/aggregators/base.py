"""Base class of the aggregators."""

from torch import Tensor, nn

from setpred.sets import check_set


class Aggregator(nn.Module):
    """Base class of functions from a set to a vector: `[batch, set_size, in_dim]` and a mask to `[batch, out_dim]`.

    A subclass implements `aggregate(elements, mask)`. Equal multisets give equal vectors, whatever the order of their
    elements (`LearnableMonoid` has to learn that). Masked elements have no influence on value and gradient. An empty
    set gives zeros.

    Args:
        in_dim: numbers of an element.
        out_dim: length of the vector, `in_dim` by default.

    Raises:
        ValueError: elements or a mask of a wrong shape or type; a subclass that returns another shape.
    """

    def __init__(self, in_dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = in_dim if out_dim is None else out_dim

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        check_set(elements, mask, set_dim=self.in_dim)
        vectors = self.aggregate(elements, mask)
        if vectors.shape != (elements.shape[0], self.out_dim):  # others could broadcast in silence
            expected, got = [elements.shape[0], self.out_dim], list(vectors.shape)
            raise ValueError(f"expected {type(self).__name__}.aggregate to return {expected}, got {got}")
        return vectors

    def aggregate(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        """Pool validated sets into vectors `[batch, out_dim]`."""
        raise NotImplementedError(f"{type(self).__name__} has no method aggregate(elements, mask)")

    @property
    def latent_dim(self) -> int:
        """`out_dim`, under the name that encoders use."""
        return self.out_dim


def zeros_where_empty(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """Replace the vectors `[batch, dim]` of empty sets by zeros."""
    return vectors if mask is None else vectors.masked_fill(~mask.any(1, keepdim=True), 0.0)
