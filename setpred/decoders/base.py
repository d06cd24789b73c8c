"""Base class of feed-forward and iterative set decoders."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.sets import fill_absent


class SetDecoder(nn.Module):
    """Decoder from tokens `[batch, tokens, token_dim]` or a vector `[batch, latent_dim]` to a set.

    Subclasses write `predictions`, whose last yield is the result `[batch, set_size, set_dim]`. Elements are raw
    numbers, presence last, without sigmoid or softmax. Random parts draw afresh in training; in evaluation their seeds
    fix them, so a prediction depends on the features alone. Decoders run in float32 also under autocast.

    Args:
        set_size: elements of the predicted sets; None for one element per token.
        set_dim: numbers of an element.
        token_dim: length of a token, for decoders of tokens.
        latent_dim: length of the vector, for decoders of one; None accepts any.
    """

    iterative = False  # has `iterations`, a default that callers may override
    conditional = False  # reads an input set as `condition`
    denoises = False  # in training reads the `target`, to add noise to it
    masks_elements = False  # `mask` is of the predicted elements, not of tokens
    draws_layers = False  # elements are layers of the image, see `setpred.nn.composite`
    draws_background = False  # and the last layer is that of the background

    def __init__(
        self, *, set_size: int | None, set_dim: int, token_dim: int | None = None, latent_dim: int | None = None
    ) -> None:
        super().__init__()
        self.set_size, self.set_dim = set_size, set_dim
        self.token_dim, self.latent_dim = token_dim, latent_dim

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        """Yield successive predictions from validated arguments; a conditional decoder gets `condition` as well."""
        raise NotImplementedError(f"{type(self).__name__} has no method predictions(features, mask, iterations)")

    def finish(self, state: Tensor) -> Tensor:
        """Turn what `predictions` yields into a prediction; a costly last layer belongs here, for it runs once."""
        return state

    def refine(
        self,
        features: Tensor,
        *,
        iterations: int | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield every intermediate prediction; the last one is that of `forward`, with the same arguments."""
        for state in self._states(features, iterations, mask, condition, target):
            with torch.autocast(features.device.type, enabled=False):
                prediction = self.finish(state)
            yield prediction

    def _states(
        self,
        features: Tensor,
        iterations: int | None,
        mask: Tensor | None,
        condition: Tensor | None,
        target: Tensor | None,
    ) -> Iterator[Tensor]:
        """Validate the arguments, and yield what `predictions` does."""
        features = self._checked(features, iterations, mask)
        steps = self.iterations if self.iterative and iterations is None else iterations
        more = {"condition": condition} if self.conditional else {}
        more |= {"target": target} if self.denoises else {}
        predictions = self.predictions(features, mask, steps, **more)
        if not isinstance(predictions, Iterator):
            name, kind = type(self).__name__, type(predictions).__name__
            raise TypeError(f"expected {name}.predictions to yield tensors, got a {kind}; write yield for return")
        while True:
            # not held across the yield, where it would reach the caller
            with torch.autocast(features.device.type, enabled=False):
                elements = next(predictions, None)
            if elements is None:
                return
            yield elements

    def forward(
        self,
        features: Tensor,
        *,
        iterations: int | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Predict sets `[batch, set_size, set_dim]`.

        Args:
            features: `[batch, tokens, token_dim]`, or `[batch, latent_dim]`.
            iterations: number of iterations; the decoder's default unless given.
            mask: present tokens, `[batch, tokens]` bool, at least one per example; or present elements, `[batch,
                set_size]`, if the decoder `masks_elements`. All are present unless given.
            condition: an input set `[batch, set_size, any]`, for `conditional` decoders.
            target: the real sets `[batch, set_size, set_dim]`, for training decoders that `denoise`.

        Raises:
            InputError: `iterations` for a decoder without iterations.
            ValueError: features or a mask of another shape.
        """
        state = None
        for state in self._states(features, iterations, mask, condition, target):  # noqa: B007
            pass
        if state is None:
            raise ValueError(f"expected {type(self).__name__}.predictions to yield at least one tensor, got none")
        with torch.autocast(features.device.type, enabled=False):
            return self.finish(state)

    def _checked(self, features: Tensor, iterations: int | None, mask: Tensor | None) -> Tensor:
        """Features in at least single precision, zero where padding."""
        wanted = ["batch", self.latent_dim] if self.token_dim is None else ["batch", "tokens", self.token_dim]
        if features.ndim != len(wanted) or wanted[-1] not in (None, features.shape[-1]):
            names = ", ".join("latent_dim" if name is None else str(name) for name in wanted)
            raise ValueError(f"expected features [{names}], got {list(features.shape)}")
        if iterations is not None and not self.iterative:
            name = type(self).__name__
            raise InputError(f"expected no iterations for {name}, which does not iterate, got {iterations}; drop them")
        features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
        if mask is None or self.masks_elements:
            return features
        if features.ndim != 3 or mask.dtype != torch.bool or mask.shape != features.shape[:2]:
            raise ValueError(f"expected a bool mask of tokens, got {mask.dtype} {list(mask.shape)}")
        # padding may hold NaN, which would reach the gradients of the weights
        return fill_absent(features, mask)
