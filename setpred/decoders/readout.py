"""Decoders that finish the elements of another set decoder, its slots."""

from collections.abc import Iterator

from torch import Tensor

from setpred.decoders.base import SetDecoder
from setpred.errors import InputError
from setpred.nn import MLP


class SlotReader(SetDecoder):
    """Base class of decoders that turn each slot, an element of another set decoder, into an element.

    Subclasses write `finish`. Features, masks, conditions and iterations are those of the slots.

    Args:
        slots: set decoder whose elements `[batch, set_size, dim]` are the slots.
        set_dim: numbers of an element.
        more: number of elements beyond the slots.

    Raises:
        InputError: slots that are sampled, such as those of `FlowMatching`, which learn from noised targets alone.
    """

    def __init__(self, slots: SetDecoder, *, set_dim: int, more: int = 0) -> None:
        if getattr(slots, "denoises", False):
            raise InputError(f"expected slots that are predicted, got {type(slots).__name__}; use another decoder")
        size = None if slots.set_size is None else slots.set_size + more
        super().__init__(set_size=size, set_dim=set_dim, token_dim=slots.token_dim, latent_dim=slots.latent_dim)
        self.slots, self.iterative, self.masks_elements = slots, slots.iterative, slots.masks_elements
        self.conditional = slots.conditional

    @property
    def iterations(self) -> int:
        """Default number of iterations of the slots."""
        return self.slots.iterations

    def predictions(
        self, features: Tensor, mask: Tensor | None, iterations: int | None, condition: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the slots of each iteration, `[batch, set_size, dim]`."""
        yield from self.slots.refine(features, mask=mask, iterations=iterations, condition=condition)


class Readout(SlotReader):
    """Elements read from the slots of another set decoder, each by the same network.

        y_i = MLP(s_i)

    With frozen slots of a model that was trained without labels, the average precision of y is the usual probe of
    object discovery: it measures which properties of the objects the slots hold. `setpred train --init` takes the
    weights of encoder and slots from a checkpoint of `SpatialBroadcast`, and `model.frozen` keeps them.

    Args:
        slots: set decoder whose elements `[batch, set_size, dim]` are the slots.
        hidden_dim: width of the MLP's hidden layer; None reads linearly.
        set_dim: numbers of an element.
    """

    def __init__(self, slots: SetDecoder, *, hidden_dim: int | None = None, set_dim: int) -> None:
        super().__init__(slots, set_dim=set_dim)
        self.head = MLP(slots.set_dim, *([] if hidden_dim is None else [hidden_dim]), set_dim)

    def finish(self, state: Tensor) -> Tensor:
        """Read the elements `[batch, set_size, set_dim]` from the slots."""
        return self.head(state)
