"""What the decoders share that compute their prediction: the door for features, and how iterates come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from setpred.errors import InputError


class SetDecoder(nn.Module):
    """Features to a set: tokens `[batch, tokens, token_dim]` or a vector `[batch, latent_dim]` to
    `[batch, set_size, set_dim]`.

    Subclasses write `predictions`, a generator of which the last yield counts. Elements are raw numbers, presence
    last, as those of `IDSPN`. What is random is drawn afresh in training, and in evaluation fixed by the parts' seeds:
    an answer depends on the features alone. Decoders run in float32 also under autocast, as the descents do.

    Args:
        set_size, set_dim: of the predicted sets; no set_size for decoders that say something of each token.
        token_dim: length of a token, for decoders that attend over tokens.
        latent_dim: length of the vector, for those that take one.
    """

    iterative = False  # whether `iterations` can be chosen

    def __init__(
        self, *, set_size: int | None, set_dim: int, token_dim: int | None = None, latent_dim: int | None = None
    ) -> None:
        super().__init__()
        self.set_size, self.set_dim = set_size, set_dim
        self.token_dim, self.latent_dim = token_dim, latent_dim

    def predictions(self, features: Tensor, *, iterations: int | None, mask: Tensor | None) -> Iterator[Tensor]:
        """Yields ever later predictions `[batch, set_size, set_dim]`; arguments as in `forward`, checked."""
        raise NotImplementedError

    def refine(
        self,
        features: Tensor,
        *,
        iterations: int | None = None,
        mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yields every prediction on the way, the last one as from `forward`."""
        features = self._checked(features, iterations, mask)
        steps = self.predictions(features, iterations=iterations, mask=mask)
        while True:
            # not held across the yield, where it would reach the caller
            with torch.autocast(features.device.type, enabled=False):
                elements = next(steps, None)
            if elements is None:
                return
            yield elements

    def forward(
        self,
        features: Tensor,
        *,
        iterations: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The predicted sets `[batch, set_size, set_dim]`.

        Args:
            features: `[batch, tokens, token_dim]`, or `[batch, latent_dim]`.
            iterations: number of iterations; the decoder's own unless given.
            mask: which tokens there are, `[batch, tokens]` bool, at least one of each example; all unless given.

        Raises:
            InputError: `iterations` for a decoder that has none to choose.
        """
        for elements in self.refine(features, iterations=iterations, mask=mask):  # noqa: B007
            pass
        return elements

    def _checked(self, features: Tensor, iterations: int | None, mask: Tensor | None) -> Tensor:
        wanted = ["batch", self.latent_dim] if self.token_dim is None else ["batch", "tokens", self.token_dim]
        if features.ndim != len(wanted) or features.shape[-1] != wanted[-1]:
            raise ValueError(f"expected features [{', '.join(map(str, wanted))}], got {list(features.shape)}")
        if mask is not None and (features.ndim != 3 or mask.dtype != torch.bool or mask.shape != features.shape[:2]):
            raise ValueError(f"expected a bool mask of tokens, got {mask.dtype} {list(mask.shape)}")
        if iterations is not None and not self.iterative:
            raise InputError(
                f"{type(self).__name__} has no number of iterations to choose, got {iterations}; leave it out"
            )
        features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
        # padding may hold anything, NaN too, which would reach the weights' gradients
        return features if mask is None else features.masked_fill(~mask.unsqueeze(-1), 0.0)


def refined(
    step: Callable[[Tensor], Tensor], start: Tensor, *, iterations: int, gradient_steps: int | None = None
) -> Iterator[Tensor]:
    """Yields s₀, …, s_T of s_{t+1} = f(s_t); gradients pass through the last k steps only.

    At a fixed point s = f(s; θ), with J = ∂f/∂s and an upstream gradient u, the gradient is

        uᵀ ds/dθ = uᵀ (I - J)⁻¹ ∂f/∂θ = Σ_j uᵀ Jʲ ∂f/∂θ

    and k steps give the first k terms of that series: k = 1 is the one-step gradient of implicit Slot Attention
    (Chang, Griffiths, Levine, NeurIPS 2022), whose memory does not grow with the iterations.

    Args:
        step: f.
        start: s₀; it gets no gradient with a k, for a fixed point does not depend on it.
        iterations: T, those with gradients among them.
        gradient_steps: k; None passes gradients through all steps, and to the start.
    """
    state = start
    yield state
    for left in reversed(range(iterations)):
        differentiated = gradient_steps is None or left < gradient_steps
        if gradient_steps is not None and left + 1 >= gradient_steps:
            state = state.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and differentiated):
            state = step(state)
        yield state
