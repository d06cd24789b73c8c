"""Predictions that do not depend on what else is predicted: every pass through a model has the same shape."""

from __future__ import annotations

import torch
from torch import Tensor

from setpred.model import SetPredictor
from setpred.precision import encoder_autocast

PASS = 64  # images; of 128 a pass takes four fifths of the time an image, of one alone ten times as much


def predict_in_passes(model: SetPredictor, images: Tensor, *, iterations: int | None = None) -> Tensor:
    """The predicted set of each image, whatever is predicted beside it.

    Libraries choose the routine of a matrix product by its size, and each rounds in its own way. One rounding, 1e-7,
    is mostly nothing; but where a descent passes a watershed, it ends in another set. So images go through the model
    `PASS` at a time, and a last pass is filled up. On a GPU the encoder runs in bfloat16, all else in float32.

    Args:
        model: in evaluation mode.
        images: `[batch, 3, H, W]`, on the device of the model.
        iterations: overrides the decoder's number of steps.

    Returns:
        float32 `[batch, set_size, set_dim]` on the CPU.
    """
    found = []
    with torch.no_grad(), encoder_autocast(images.device):
        for some in images.split(PASS):
            elements = model(whole_pass(some), iterations=iterations)
            found.append(elements[: len(some)].float().cpu())
    return torch.cat(found)


def whole_pass(rows: Tensor) -> Tensor:
    """At most `PASS` rows, the last one repeated until there are so many; images keep their layout in memory."""
    return rows if len(rows) == PASS else rows[torch.arange(PASS, device=rows.device).clamp(max=len(rows) - 1)]
