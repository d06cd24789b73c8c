"""Soft equivariance: measure how far a model is from equivariant, and penalise it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setpred.errors import InputError
from setpred.losses.hungarian import HungarianLoss
from setpred.matching import hungarian, pairwise_squared
from setpred.schema import ElementSchema
from setpred.sets import check_set, fill_absent

Motion = tuple[Tensor, Tensor]  # A `[batch, d, d]` and b `[batch, 1, d]`: rows x of d numbers move to x A + b


def orthogonal(count: int, dim: int, sign: float, like: Tensor) -> Tensor:
    """Draw orthogonal matrices of determinant `sign`, uniformly: `[count, dim, dim]` (Stewart, 1980)."""
    q, r = torch.linalg.qr(torch.randn(count, dim, dim, dtype=like.dtype, device=like.device))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    wrong = q.det() * sign < 0
    return torch.cat([torch.where(wrong[:, None, None], -q[..., :1], q[..., :1]), q[..., 1:]], dim=-1)


def _linear(matrix: Tensor) -> Motion:
    return matrix, matrix.new_zeros(len(matrix), 1, matrix.shape[-1])


def _identity(count: int, dim: int, like: Tensor) -> Tensor:
    return torch.eye(dim, dtype=like.dtype, device=like.device).expand(count, -1, -1)


# how to draw `count` motions of positions of `dim` numbers, in the type of a tensor
SYMMETRIES: Mapping[str, Callable[[int, int, Tensor], Motion]] = {
    "rotation": lambda count, dim, like: _linear(orthogonal(count, dim, 1.0, like)),
    "reflection": lambda count, dim, like: _linear(orthogonal(count, dim, -1.0, like)),
    "translation": lambda count, dim, like: (
        _identity(count, dim, like),
        torch.randn(count, 1, dim, dtype=like.dtype, device=like.device),
    ),
    "scaling": lambda count, dim, like: _linear(
        _identity(count, dim, like) * 2 ** (2 * torch.rand(count, 1, 1, dtype=like.dtype, device=like.device) - 1)
    ),
}


def moved(elements: Tensor, motion: Motion, mask: Tensor | None = None) -> Tensor:
    """Move the first d numbers of elements `[batch, n, dim]` of a motion of d numbers; absent elements become zeros."""
    matrix, shift = motion
    first, rest = elements.tensor_split([matrix.shape[-1]], dim=-1)
    return fill_absent(torch.cat([first @ matrix + shift, rest], dim=-1), mask)


def equivariance_error(
    predict: Callable[[Tensor], Tensor],
    inputs: Tensor,
    mask: Tensor | None = None,
    *,
    symmetry: str,
    input_dims: int,
    output_dims: int = 0,
    predicted: Tensor | None = None,
) -> Tensor:
    """Compute |f(g x) - g f(x)|² for a random g of a symmetry: 0 for all x if and only if f is equivariant.

    With output_dims = 0 it measures invariance, |f(g x) - f(x)|². f(x) is a set or a vector: a set is compared under
    the best matching, so its order does not matter. The gradient holds the matching fixed. Divide the mean by that of
    |f(x) - f(x')|² for other inputs x' for a number without unit.

    Args:
        predict: f, inputs to sets `[batch, n, dim]` or vectors `[batch, dim]`.
        inputs, mask: x `[batch, m, input_dim]` and bool `[batch, m]`.
        symmetry: "rotation" and "reflection" about the origin, uniform; "translation" by N(0, 1) for each coordinate;
            "scaling" by 2^u, u uniform from -1 to 1.
        input_dims, output_dims: how many of the first numbers of an element of the input, and of the output, are its
            position, which g moves; equally many, or 0 for an output that g does not move.
        predicted: f(x), if it is known.

    Returns:
        `[batch]`, the mean over the numbers of f.

    Source: Kim, Lee, Yang, Lee, "Regularizing Towards Soft Equivariance Under Mixed Symmetries", ICML 2023.

    Raises:
        InputError: an unknown symmetry, or numbers of dimensions out of range.
    """
    check_set(inputs, mask)
    if symmetry not in SYMMETRIES or not 1 <= input_dims <= inputs.shape[-1] or output_dims not in (0, input_dims):
        raise InputError(
            f"expected one of {', '.join(SYMMETRIES)}, positions of 1 to {inputs.shape[-1]} numbers of the input and "
            f"of 0 or as many of the output, got {symmetry}, {input_dims} and {output_dims}"
        )
    motion = SYMMETRIES[symmetry](len(inputs), input_dims, inputs)
    here = predict(fill_absent(inputs, mask)) if predicted is None else predicted
    there = predict(moved(inputs, motion, mask))
    here, there = (each.unsqueeze(1) if each.ndim == 2 else each for each in (here, there))
    if output_dims:
        here = moved(here, tuple(part.to(here.dtype) for part in motion))
    assignment = hungarian(pairwise_squared(there.detach(), here.detach())).unsqueeze(-1)
    return (there.gather(1, assignment.expand_as(here)) - here).square().mean((1, 2))


class SoftEquivariance(nn.Module):
    """A loss, in training plus the equivariance errors of the model under several symmetries, each with its weight:

        L(f(x), t) + Σ_s λ_s |f(g_s x) - g_s f(x)|²,    g_s drawn afresh for each example and step

    See `equivariance_error`. Small weights suit symmetries that hold only approximately: the data decide. The published
    method also tunes λ in training; here they are given. Each symmetry costs one more prediction in a step. Validations
    report L alone. For models of input sets; images are augmented instead (`setpred.data.augmentation`).

    Args:
        loss: L; `HungarianLoss` unless given.
        weights: λ by the name of the symmetry: `{"rotation": 1.0, "translation": 0.1}`.
        input_dims, output_dims: those of `equivariance_error`.

    Raises:
        InputError: an unknown symmetry, or a negative weight.
    """

    def __init__(
        self,
        loss: nn.Module | None = None,
        *,
        weights: Mapping[str, float],
        input_dims: int = 2,
        output_dims: int = 0,
    ) -> None:
        super().__init__()
        if not set(weights) <= set(SYMMETRIES) or not all(weight >= 0 for weight in weights.values()):
            raise InputError(
                f"expected weights of at least 0 of {', '.join(SYMMETRIES)}, got {dict(weights)}; correct them"
            )
        self.loss = HungarianLoss() if loss is None else loss
        self.weights, self.input_dims, self.output_dims = dict(weights), input_dims, output_dims

    def forward(self, *sets: Tensor) -> Tensor:
        """L of each example, `[batch]`."""
        return self.loss(*sets)

    def use_schema(self, schema: ElementSchema) -> None:
        """Give the loss its groups of numbers, if it has any."""
        if hasattr(self.loss, "use_schema"):
            self.loss.use_schema(schema)

    def penalty(self, step: Any, predicted: Tensor) -> Tensor:
        """The weighted errors of each example of a `setpred.model.Step` that gave `predicted`, `[batch]`."""
        if step.input_name != "input":
            raise InputError("SoftEquivariance: expected a model of input sets, got images; augment them instead")
        options = {"input_dims": self.input_dims, "output_dims": self.output_dims, "predicted": predicted.float()}
        given = step.inputs(), step.batch.get("input_mask")
        errors = (
            weight * equivariance_error(lambda inputs: step.predict(inputs).float(), *given, symmetry=name, **options)
            for name, weight in self.weights.items()
        )
        return sum(errors, start=predicted.new_zeros(len(predicted), dtype=torch.float32))
