"""Set predictor: an encoder of images or sets, and a set decoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.inner import OfTokens
from setpred.nn import check_parts, unit_images
from setpred.schema import ElementSchema
from setpred.sets import fill_absent, token_mask


class SetPredictor(nn.Module):
    """An encoder followed by a set decoder.

    Encoders with an `in_dim`, such as `setpred.aggregators.SetEncoder`, take sets of elements of so many numbers; all
    others take images. Features are a vector z `[batch, latent_dim]`, or tokens `[batch, tokens, token_dim]` if both
    parts have a `token_dim`.

    In evaluation mode a prediction depends on the input and the model alone: seeds of the parts fix all random
    numbers. In training they are drawn afresh.

    Args:
        encoder: `[batch, 3, H, W]` in [0, 1] -> features; or a set `[batch, n, in_dim]` and its mask -> features.
        decoder: features -> elements `[batch, set_size, set_dim]`, with `refine` yielding its iterates, such as a
            `setpred.decoders.SetDecoder`. A `conditional` one gets the input set too; one of tokens gets its mask.

    Raises:
        InputError: features that do not fit, see `check_parts`; a conditional decoder of images.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        check_parts(encoder, decoder)
        self.encoder, self.decoder = encoder, decoder
        self.takes_sets = getattr(encoder, "in_dim", None) is not None
        if getattr(decoder, "conditional", False) and not self.takes_sets:
            raise InputError(
                "expected a set encoder for an objective that is conditioned on an input set, got "
                f"{type(encoder).__name__}, which takes images; take a set encoder, or leave out `Conditioned`"
            )

    def use_schema(self, schema: ElementSchema) -> None:
        """Give the losses within the model, as of `setpred.encoders.Supervised`, their groups of numbers."""
        for part in self.modules():
            if part is not self and hasattr(part, "use_schema"):
                part.use_schema(schema)

    def encode(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute features from uint8 or unit float images `[batch, 3, H, W]`, or from sets `[batch, n, in_dim]`."""
        if self.takes_sets:
            return self.encoder(inputs, mask)
        if inputs.ndim != 4 or inputs.shape[1] != 3:
            raise ValueError(f"expected images [batch, 3, height, width], got {list(inputs.shape)}")
        wanted = getattr(self.encoder, "image_size", None)
        if wanted is not None and inputs.shape[2:] != (wanted, wanted):
            raise ValueError(f"expected images of {wanted}x{wanted}, got {inputs.shape[3]}x{inputs.shape[2]}")
        return self.encoder(unit_images(inputs))

    def forward(
        self,
        inputs: Tensor,
        *,
        mask: Tensor | None = None,
        iterations: int | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Predict elements `[batch, set_size, set_dim]`.

        Args:
            inputs: images `[batch, 3, H, W]`, uint8 or float in [0, 1]; or sets `[batch, n, in_dim]`.
            mask: present elements of the input sets, bool `[batch, n]`; all unless given.
            iterations: overrides the decoder's number of steps.
            target: the real sets, for training decoders that `denoise` them.
        """
        features = self.encode(inputs, mask)
        return self.decoder(features, **self._options(inputs, mask, iterations, features, target))

    @property
    def start(self) -> nn.Module | None:
        """The decoder's random start, whose `seed` fixes the predictions in evaluation; None without one."""
        start = getattr(getattr(self.decoder, "slots", self.decoder), "start", None)
        return start if hasattr(start, "seed") else None

    def samples(
        self, inputs: Tensor, count: int, *, mask: Tensor | None = None, iterations: int | None = None
    ) -> Tensor:
        """Predict sets with `count` successive seeds of the start, `[count, batch, set_size, set_dim]`.

        The first is the prediction in evaluation; without a random start all are equal.
        """
        features, start = self.encode(inputs, mask), self.start
        options, seed, found = self._options(inputs, mask, iterations, features), getattr(start, "seed", 0), []
        try:
            for number in range(count):
                if start is not None:
                    start.seed = seed + number
                found.append(self.decoder(features, **options))
        finally:
            if start is not None:
                start.seed = seed
        return torch.stack(found)

    def refine(
        self,
        inputs: Tensor,
        *,
        mask: Tensor | None = None,
        iterations: int | None = None,
        target: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield every iterate of the prediction, the start first; arguments as in `forward`."""
        features = self.encode(inputs, mask)
        return self.decoder.refine(features, **self._options(inputs, mask, iterations, features, target))

    def _options(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        iterations: int | None,
        features: Tensor,
        target: Tensor | None = None,
    ) -> dict[str, Any]:
        """Arguments of the decoder besides the features; it gets an input set and its mask only if it reads them."""
        decoder, options = self.decoder, {"iterations": iterations}
        if target is not None:
            options["target"] = target
        if getattr(decoder, "conditional", False):
            options["condition"] = inputs
        if mask is not None and not mask.all() and any(isinstance(part, OfTokens) for part in decoder.modules()):
            raise InputError("expected input sets without padding for OfTokens, got a mask; give sets of one size")
        takes_tokens = getattr(decoder, "token_dim", None) is not None
        if mask is not None and takes_tokens and not getattr(decoder, "masks_elements", False):
            options["mask"] = token_mask(mask, features.shape[1])
        return options


def inputs_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Images of a batch and None, or its input sets and their mask, None if none is padded."""
    return batch["image" if "image" in batch else "input"], batch.get("input_mask")


def target_name(part: nn.Module | None) -> str:
    """The entry of a batch that a loss or metric compares predictions with: its `truth`; "elements" without one."""
    return getattr(part, "truth", "elements")


@dataclass(frozen=True)
class Step:
    """Inputs of a training step, or of a validation batch: its result depends on these alone.

    Args:
        model, loss: the parts under training, with their weights and modes.
        batch: see `setpred.training.SetPrediction`.
        seed: seed of torch's generator at the beginning; None for a validation, which draws nothing.
        iterations: of the descent; the decoder's default unless given.
        auxiliary: weight of the mean loss of the earlier iterates.
    """

    model: SetPredictor
    loss: nn.Module
    batch: dict[str, Tensor]
    seed: int | None = None
    iterations: int | None = None
    auxiliary: float = 0.0

    @property
    def target(self) -> Tensor:
        """The truth that the loss compares with: the sets, or another entry of the batch that the loss names."""
        return self.batch[target_name(self.loss)]

    @property
    def input_name(self) -> str:
        return "image" if "image" in self.batch else "input"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the model besides the inputs; decoders that `denoise` get the real sets in training."""
        decoder, options = self.model.decoder, {"mask": self.batch.get("input_mask"), "iterations": self.iterations}
        noised = decoder.training and getattr(decoder, "denoises", False)
        return options | ({"target": self.batch["elements"]} if noised else {})

    def predict(self, inputs: Tensor | None = None) -> Tensor:
        """Predict sets `[batch, set_size, set_dim]`, with torch's generator in its present state.

        Args:
            inputs: in the place of those of the batch, with the same mask.
        """
        return self.model(self.batch[self.input_name] if inputs is None else inputs, **self.options)

    def samples(self, count: int) -> Tensor:
        """Predict `count` sets of each input, see `SetPredictor.samples`."""
        inputs, mask = inputs_of(self.batch)
        return self.model.samples(inputs, count, mask=mask)

    def iterates(self) -> list[Tensor]:
        """Predict as `predict` does; return every iterate if the loss reads them, else the last one alone."""
        if not self.auxiliary or not hasattr(self.model.decoder, "refine"):
            return [self.predict()]
        return list(self.model.refine(self.batch[self.input_name], **self.options))

    def losses(self, iterates: Sequence[Tensor]) -> Tensor:
        """Compute the loss of each example, `[batch]`: L(Y_T) + auxiliary · mean of L(Y_t) over t < T.

        Iterates without a gradient are left out, such as a random start. In training the penalties of the loss and of
        the model's parts are added: a part that regularises has a method `penalty(step, predicted)`, which returns
        `[batch]` or one number.

        Raises:
            InputError: auxiliary losses, but no earlier iterate has a gradient.
        """
        *earlier, last = iterates
        losses = self.loss(last.float(), self.target)
        for part in (self.loss, *self.model.modules()) if self.model.training else ():
            if hasattr(part, "penalty") and part.training:  # frozen parts have none
                losses = losses + part.penalty(self, last)
        if not self.auxiliary:
            return losses
        earlier = [iterate for iterate in earlier if iterate.requires_grad]
        if not earlier:
            raise InputError(
                "auxiliary: expected earlier iterates with a gradient, as of DETR, Slot Attention or IDSPN with "
                f"Unrolled, got none from {type(self.model.decoder).__name__}; set model.auxiliary to 0"
            )
        return losses + self.auxiliary * torch.stack([self.loss(each.float(), self.target) for each in earlier]).mean(0)

    def inputs(self) -> Tensor:
        """Images or sets, with zeros in place of padding."""
        return fill_absent(*inputs_of(self.batch))
